"""The head maps against loops over heads and positions."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags as absl_flags

import jaxheads as jh
from experiments import head_map
from tests.configs import model_of, tokens_of

L, H, T = 3, 4, 12


@pytest.fixture(scope="module")
def batch():
    """Two rows, the second padded at its end."""
    tokens = tokens_of("llama", length=T + 1)
    segment_ids = jnp.array([[1] * T, [1] * (T - 3) + [0] * 3])
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segment_ids,
        "positions": jnp.broadcast_to(jnp.arange(T), (2, T)),
        "weights": (segment_ids != 0).astype(jnp.float32),
    }


def _pattern(tokens, **kwargs):
    seen = jh.record(jh.forward, "pattern")(model_of("llama"), tokens, **kwargs).seen
    return np.asarray(seen["pattern"])


def test_maps_equal_loops_over_heads(batch):
    maps = head_map.head_maps(model_of("llama"), batch)
    pattern = _pattern(batch["tokens"], segment_ids=batch["segment_ids"])
    for layer in range(L):
        for head in range(H):
            p = pattern[layer, :, head]
            real = [(b, t) for b, end in ((0, T), (1, T - 3)) for t in range(1, end)]
            previous = np.mean([p[b, t, t - 1] for b, t in real])
            first = np.mean([p[b, t, 0] for b, t in real])
            np.testing.assert_allclose(maps["previous token"][layer, head], previous, rtol=1e-5)
            np.testing.assert_allclose(maps["first token"][layer, head], first, rtol=1e-5)


def test_loss_increase_is_the_loss_without_the_head(batch):
    maps = head_map.head_maps(model_of("llama"), batch)

    def loss(forward):
        logits = np.asarray(
            forward(model_of("llama"), batch["tokens"], segment_ids=batch["segment_ids"]).logits,
            np.float64,
        )
        logits -= logits.max(-1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        taken = np.take_along_axis(log_probs, np.asarray(batch["targets"])[..., None], -1)[..., 0]
        weights = np.asarray(batch["weights"])
        return -(taken * weights).sum() / weights.sum()

    for head in [(0, 0), (1, 3), (2, 2)]:
        want = loss(jh.ablate(jh.forward, [head])) - loss(jh.forward)
        np.testing.assert_allclose(maps["loss increase"][head], want, atol=2e-6)


def test_induction_reads_the_token_after_the_earlier_copy():
    got = head_map.induction_scores(model_of("llama"), length=5, batch_size=3, seed=1)
    half = np.random.default_rng(1).integers(0, 61, (3, 5))
    pattern = _pattern(np.tile(half, 2))
    # At t >= 5 the same token stood at t - 5; what followed it stands at t - 4.
    want = np.mean([pattern[:, b, :, t, t - 4] for b in range(3) for t in range(5, 10)], axis=0)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_command_writes_maps_heads_and_a_picture(tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"line {n} of a small text" for n in range(200)))
    cfg = jh.ModelConfig(vocab_size=384, num_layers=2, model_dim=32, num_heads=4, mlp_dim=32)
    from flax import nnx

    jh.save(jh.Decoder(cfg, rngs=nnx.Rngs(0)), tmp_path / "model")
    values = absl_flags.FlagValues()
    monkeypatch.setattr(absl_flags, "FLAGS", values)
    for name, value in {
        "model": str(tmp_path / "model"), "tokenizer": "bytes", "data": str(text),
        "workdir": str(tmp_path / "out"),
        "mesh": "data:2", "batch_size": 2, "seq_len": 32, "top": 3, "seed": 0,
    }.items():  # fmt: skip
        define = absl_flags.DEFINE_integer if isinstance(value, int) else absl_flags.DEFINE_string
        define(name, value, name, flag_values=values)
    values(["head_map"])
    head_map.main()
    assert "loss increase" in capsys.readouterr().out
    maps = json.loads((tmp_path / "out" / "head_map.json").read_text())["maps"]
    assert {np.shape(m) for m in maps.values()} == {(2, 4)}
    heads = jh.heads.from_json(tmp_path / "out" / "heads.json")
    assert len(heads.heads) == 3
    assert (tmp_path / "out" / "head_map.png").stat().st_size > 1000
