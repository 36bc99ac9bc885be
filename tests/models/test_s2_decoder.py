"""Decoders with S2 layers: cached runs, generation, taps, meshes, bad input."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import jaxheads as jh
from jaxheads.attention import VARIANTS, dense_every
from jaxheads.models import Decoder, ModelConfig, forward, init_cache

TOKENS = np.random.default_rng(0).integers(0, 40, (2, 100))
S2 = "s2(block=16,local_blocks=1,stride=2)"


def model_of(attention, layers=3, **fields):
    cfg = ModelConfig(
        vocab_size=40, num_layers=layers, model_dim=32, num_heads=4, num_kv_heads=2,
        attention=attention, **fields,
    )  # fmt: skip
    return Decoder(cfg, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("attention", [S2, dense_every(2, S2)])
def test_cached_runs_equal_a_whole_one(attention):
    model = model_of(attention)
    want = forward(model, TOKENS).logits
    cache, got = init_cache(model.cfg, 2, 100), []
    for start, stop in ((0, 39), (39, 40), (40, 41), (41, 100)):
        out = forward(model, TOKENS[:, start:stop], cache=cache)
        cache = out.cache
        got.append(out.logits)
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=2e-5)


def test_the_cache_is_compact():
    cache = init_cache(model_of(dense_every(2, S2)).cfg, 2, 320)
    assert cache.k.shape[0] == 1  # the one dense layer of three
    ring, store, _ = cache.states[0]
    assert ring.k.shape[-2] == 16 and store.k.shape[-2] == 160


def test_generation_continues_the_argmax_of_the_full_forward():
    model = model_of(S2)
    prompt = TOKENS[:, :30]
    out = jh.generate(model, prompt, max_new_tokens=12)
    full = forward(model, out[:, :-1]).logits
    np.testing.assert_array_equal(out[:, 30:], full[:, 29:].argmax(-1))


def test_the_pattern_of_a_record_is_the_mask():
    model = model_of(S2, layers=1)
    seen = jh.record(forward, "pattern", "lse")(model, TOKENS).seen
    mask = VARIANTS["s2"].options(16, 1, 2).pattern(4, 2, 100).token_mask(100)
    np.testing.assert_array_equal(seen["pattern"][0] > 0, np.broadcast_to(mask, (2, 4, 100, 100)))


@pytest.mark.parametrize("sizes", ["context:2,model:2,data:2", "context:4"])
def test_a_mesh_changes_no_logit_or_gradient(sizes):
    model = model_of(dense_every(2, S2), layers=2)
    tokens = TOKENS[:, :64]

    def loss(model, tokens):
        logits = forward(model, tokens).logits
        return (jax.nn.log_softmax(logits)[..., 0] ** 2).mean()

    step = jax.jit(jax.value_and_grad(loss))
    single = step(model, tokens)
    mesh = jh.parallel.make_mesh(sizes, devices=jax.devices()[: 8 if "data" in sizes else 4])
    with jax.set_mesh(mesh):
        placed = jh.parallel.shard(model, mesh)
        split = jax.jit(jax.value_and_grad(loss))(placed, tokens)
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_implementations_agree():
    whole = forward(model_of(S2, implementation="dense"), TOKENS).logits
    tiles = forward(model_of(S2, implementation="blocked"), TOKENS).logits
    np.testing.assert_allclose(tiles, whole, atol=2e-5)


def test_bad_input():
    with pytest.raises(ValueError, match="impl='fast' is not one of"):
        ModelConfig(attention="s2(impl=fast)")
    with pytest.raises(ValueError, match="power of two"):
        ModelConfig(attention="s2(block=48)")
    with pytest.raises(ValueError, match=r"stride=0 must be at least 1"):
        ModelConfig(attention="s2(stride=0)")
    with pytest.raises(ValueError, match="no head would see"):
        forward(model_of("s2(block=16,local_blocks=1,stride=8)"), TOKENS)
    with pytest.raises(NotImplementedError, match="has no S2-attention"):
        forward(model_of(S2, implementation="cudnn"), TOKENS)
    with pytest.raises(NotImplementedError, match="runs on tpu"):
        forward(model_of("s2(block=16,local_blocks=1,stride=2,impl=pallas_tpu)"), TOKENS)
    with pytest.raises(NotImplementedError, match="cannot honour this call: one of scores"):
        model = model_of("s2(block=16,local_blocks=1,stride=2,impl=blocked)")
        jh.record(forward, "pattern")(model, TOKENS)
    with pytest.raises(ValueError, match="at least 1"):
        dense_every(0)


def test_cost_counts_tiles():
    cfg = dataclasses.replace(model_of(S2).cfg)
    options = VARIANTS["s2"].options(16, 1, 2)
    pattern = options.pattern(4, 2, 320)
    cost = VARIANTS["s2"].cost(cfg, 320, 320, options=options, itemsize=2)
    assert cost.flops == 4 * pattern.block_mask(20).sum() * 16 * 16 * 8
    assert cost.kv_cache_bytes == 2 * pattern.cache_slots(320).sum() * 8 * 2
