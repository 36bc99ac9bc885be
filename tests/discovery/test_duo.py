"""Learned gates: losses, gradients, sparsity, files; and the texts with pass-keys."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import Tokenizer, parallel
from jaxheads.attention.duo import MIX_SOURCES, duo_attention_train
from jaxheads.data.passkeys import LAB, TEXT, Wording, lab_paragraphs, passkeys
from jaxheads.discovery import (
    GateConfig,
    TwoStream,
    load_pattern,
    save_pattern,
    sparsify,
    train_gates,
)
from jaxheads.discovery.duo import gate_loss
from jaxheads.models import ModelConfig, forward
from jaxheads.taps import record
from tests.tiny import tiny_model

L, T = 2, 12
SIZES = dict(sink=1, recent=3)
HEADS = {"gqa": 2, "mha": 4}
TOKENS = np.random.default_rng(0).integers(0, 17, (2, T)).astype(np.int32)
ANSWERS = np.arange(T) >= np.array([[6], [9]])


@functools.cache
def model_of(heads):
    return tiny_model(
        ModelConfig(vocab_size=17, num_layers=L, model_dim=16, num_heads=4,
                    num_kv_heads=HEADS[heads], mlp_dim=16), scale=0.5)  # fmt: skip


@functools.partial(jax.jit, static_argnames="source")
def loss_of(model, alpha, source):
    two = TwoStream(**SIZES, mix_source=source)

    def loss(alpha):
        streams = two(model, jnp.asarray(TOKENS), alpha)
        value, seen = gate_loss(streams, jnp.asarray(ANSWERS), alpha, 0.05)
        return value, (seen["distill"], streams)

    return jax.value_and_grad(loss, has_aux=True)(alpha)


@pytest.mark.parametrize("source", MIX_SOURCES)
@pytest.mark.parametrize("heads", ["gqa", pytest.param("mha", marks=pytest.mark.slow)])
def test_gradients_are_finite_differences(heads, source):
    model, shape = model_of(heads), (L, HEADS[heads])
    rng = np.random.default_rng(1)
    alpha, step = rng.uniform(0.3, 0.7, shape), rng.normal(size=shape)
    value = lambda a: loss_of(model, jnp.asarray(a, jnp.float32), source)
    (_, _), grad = value(alpha)
    measured = (value(alpha + 1e-2 * step)[0][0] - value(alpha - 1e-2 * step)[0][0]) / 2e-2
    np.testing.assert_allclose((grad * step).sum(), measured, rtol=3e-2)

    (_, (distill, streams)), grad = value(np.ones(shape))
    np.testing.assert_allclose(distill, 0, atol=1e-10)
    np.testing.assert_allclose(streams.mixed, streams.full, atol=1e-5)
    np.testing.assert_allclose(grad, 0.05 / grad.size, atol=1e-5)  # of the L1 term alone
    (_, (_, streams)), _ = value(np.zeros(shape))
    (_, (distill, _)), _ = value(alpha)
    error = np.square(np.asarray(streams.full, np.float64) - streams.mixed).mean(-1)
    assert distill > 1e-3 and error[ANSWERS].mean() > 1e-3


def test_the_mixed_stream_is_the_formula_layer_by_layer():
    """The heads of `TwoStream`, from its own q, k, v and `duo_attention_train`."""
    model = model_of("gqa")
    alpha = jnp.asarray([[0.2, 0.9], [0.6, 0.0]])
    taps = ("q_rot", "k_rot", "v")
    full = record(forward, *taps)(model, TOKENS).seen
    runs = []

    def spy(*args, **kwargs):
        out = record(forward, "attn.hook_z", *taps)(*args, **kwargs)
        runs.append(out.seen)
        return out

    TwoStream(**SIZES, forward=spy)(model, jnp.asarray(TOKENS), alpha)
    mixed = runs[-1]  # the student runs last
    for layer in range(L):
        part = lambda seen, n=layer: [seen[name][n] for name in taps]
        out = duo_attention_train(*part(full), *part(mixed), alpha[layer], **SIZES)
        np.testing.assert_allclose(mixed["attn.hook_z"][layer], out.mixed, atol=1e-5)


def test_training_sharded_is_training_alone():
    model, data = model_of("gqa"), [(TOKENS, ANSWERS), (TOKENS[::-1], ANSWERS)]
    cfg = GateConfig(num_steps=4, lr=0.1)
    alone = train_gates(TwoStream(**SIZES), model, data, cfg)
    mesh = parallel.make_mesh("data:2,model:2", devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.NamedSharding(mesh, jax.P("data"))
        rows = [tuple(jax.device_put(x, placed) for x in batch) for batch in data]
        split = train_gates(TwoStream(**SIZES), parallel.shard(model, mesh), rows, cfg)
    np.testing.assert_allclose(split.alpha, alone.alpha, atol=1e-4)
    np.testing.assert_allclose(split.history["loss"], alone.history["loss"], rtol=1e-4)
    assert (alone.alpha < 1).any() and alone.history["reg"][0] == 1


def test_the_rate_rises_stays_and_falls():
    cfg = GateConfig(num_steps=100, lr=2.0)
    rates = np.asarray([cfg.rate(step) for step in (0, 9, 19, 50, 80, 90, 99)])
    np.testing.assert_allclose(rates, [0.2, 1.0, 2.0, 2.0, 2.0, 1.0, 0.2], rtol=1e-6)


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])
def test_sparsify_is_the_quantile(sparsity):
    gates = np.random.default_rng(2).permutation(24).reshape(3, 8) / 24
    mask, realised = sparsify(gates, sparsity)
    assert abs(realised - sparsity) <= 1 / 24 and realised == 1 - mask.mean()
    expected = gates >= np.quantile(gates, sparsity) if 0 < sparsity < 1 else sparsity == 0
    assert (mask == expected).all()
    tied = sparsify(np.ones((3, 8)), sparsity)
    assert tied.realised == realised  # the same share where all gates are equal
    assert (np.diff(tied.mask.reshape(-1).astype(int)) >= 0).all()


def test_sparsify_by_threshold():
    mask, realised = sparsify([[0.5, -3.0], [0.49, 7.0]], threshold=0.5)
    assert mask.tolist() == [[True, False], [False, True]] and realised == 0.5


def test_patterns_are_files(tmp_path):
    alpha = np.random.default_rng(3).random((L, 2), np.float32)
    save_pattern(tmp_path, alpha, sink=64, recent=256)
    found = load_pattern(tmp_path, model_of("gqa").cfg)
    np.testing.assert_array_equal(found.alpha, alpha)
    assert found[1:] == (64, 256)
    rows = (tmp_path / "full_attention_heads.tsv").read_text().splitlines()
    assert len(rows) == L and all(len(row.split("\t")) == 2 for row in rows)


def load(tmp_path, text, sizes):
    (tmp_path / "full_attention_heads.tsv").write_text(text)
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    return load_pattern(tmp_path, model_of("gqa").cfg)


GOOD, GOOD_SIZES = "1\t0\n0\t1\n", {"sink_size": 4, "recent_size": 8}
NO_ANSWER = [(TOKENS, np.zeros_like(ANSWERS))]
BAD = {
    "split by tabs": lambda tmp: load(tmp, "1 0\n0 1\n", GOOD_SIZES),
    "L rows of K finite": lambda tmp: load(tmp, "1\t0\n0\n", GOOD_SIZES),
    "K finite numbers": lambda tmp: load(tmp, "1\tnan\n0\t1\n", GOOD_SIZES),
    "is it of this model": lambda tmp: load(tmp, GOOD + GOOD, GOOD_SIZES),
    "needed sink_size and recent_size": lambda tmp: load(tmp, GOOD, {"sink": 4}),
    "needed integers": lambda tmp: load(tmp, GOOD, {**GOOD_SIZES, "sink_size": "4"}),
    "recent=0": lambda tmp: load(tmp, GOOD, {**GOOD_SIZES, "recent_size": 0}),
    "sink=-1": lambda tmp: save_pattern(tmp, np.ones((2, 2)), -1, 3),
    "sparsity=1.5": lambda tmp: sparsify(np.ones((2, 2)), 1.5),
    "sparsity=-0.1": lambda tmp: sparsify(np.ones((2, 2)), -0.1),
    "give one of them": lambda tmp: sparsify(np.ones((2, 2)), 0.5, 0.5),
    "sparsity=None": lambda tmp: sparsify(np.ones((2, 2))),
    "finite gates": lambda tmp: sparsify(np.full((2, 2), np.nan), 0.5),
    "alpha has shape": lambda tmp: sparsify(np.ones(4), 0.5),
    "mix_source='none'": lambda tmp: TwoStream(mix_source="none"),
    "one a kv head": lambda tmp: TwoStream()(model_of("gqa"), TOKENS, jnp.ones((L, 4))),
    "marks no token": lambda tmp: train_gates(TwoStream(**SIZES), model_of("gqa"), NO_ANSWER),
    "ended after 0": lambda tmp: train_gates(TwoStream(**SIZES), model_of("gqa"), iter([])),
    "num_steps=0": lambda tmp: GateConfig(num_steps=0),
    "num_keys=11": lambda tmp: passkeys(BYTES, HAY, lengths=[900], num_keys=11),
    "give longer contexts": lambda tmp: next(passkeys(BYTES, HAY, lengths=[900])),
    "haystack, which has": lambda tmp: next(passkeys(BYTES, HAY[:9], lengths=[9000])),
}


BYTES = Tokenizer.load("bytes")
HAY = [f"\n\nParagraph {n} says nothing." for n in range(400)]


@pytest.mark.parametrize("message", BAD)
def test_bad_input(tmp_path, message):
    with pytest.raises(ValueError, match=message):
        BAD[message](tmp_path)


def test_pass_keys_stand_in_the_text_and_are_asked_for_in_order():
    short = Wording(**{**vars(TEXT), "num_words": 3})
    batch = next(passkeys(BYTES, HAY, short, lengths=[1500], num_keys=4, batch_size=2))
    assert batch.tokens.shape == batch.answers.shape and batch.tokens.shape[1] % 16 == 0
    for tokens, answers in zip(*batch, strict=True):
        assert tokens[0] == BYTES.bos_id
        text, asked = BYTES.decode(tokens[~answers]), BYTES.decode(tokens[answers])
        assert asked.startswith("\n\nWhat is the first pass key?") and answers[-1]
        keys = asked.split("pass key is ")[1:]
        assert len(keys) == 4
        places = []
        for name, key in zip(TEXT.names, keys, strict=False):
            key = key.split(".")[0]
            assert len(key.split()) == 3 and set(key.split()) <= set(TEXT.words)
            assert f"the {name} pass key is {key}." in text
            places.append(text.index(f"the {name} pass key is"))
        assert places == sorted(places) and places[-1] < 1500


def test_pass_keys_of_the_lab_language():
    tokenizer = Tokenizer.load("lab")
    batches = passkeys(tokenizer, lab_paragraphs(), LAB, lengths=[96, 160], num_keys=2, seed=1)
    first, second = next(batches), next(batches)
    assert {first.tokens.shape[1], second.tokens.shape[1]} == {128, 192}
    asked = tokenizer.decode(first.tokens[first.answers])
    assert asked.count("What is the code of") == 2 and "unk" not in tokenizer.decode(
        first.tokens[0]
    )
    again = next(passkeys(tokenizer, lab_paragraphs(), LAB, lengths=[96, 160], num_keys=2, seed=1))
    np.testing.assert_array_equal(again.tokens, first.tokens)
