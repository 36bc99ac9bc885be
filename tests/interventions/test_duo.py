"""Heads that stream in a model: masks, gates, the order of heads, and decoding with two caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import generate
from jaxheads.attention import duo_layers
from jaxheads.interventions import reorder_heads, stream_heads
from jaxheads.models import ModelConfig, forward, init_cache, with_config
from jaxheads.taps import Edit, intervene
from tests.tiny import tiny_model

L, H, K, T = 2, 4, 2, 13
CFG = ModelConfig(
    vocab_size=17, num_layers=L, model_dim=16, num_heads=H, num_kv_heads=K, mlp_dim=16,
    qkv_bias=True,
)  # fmt: skip
PATTERN = np.array([[0, 1], [1, 0]])
SIZES = dict(sink=1, recent=3)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, T)))


@pytest.fixture(scope="module")
def model():
    return tiny_model(CFG, scale=0.5)


@jax.jit
def streamed(model, pattern):
    return stream_heads(forward, pattern, **SIZES)(model, TOKENS).logits


def test_masks_are_the_variant(model):
    """The edit of the pattern and attention that never sees the masked keys."""
    wanted = forward(with_config(model, attention=duo_layers(PATTERN, **SIZES)), TOKENS).logits
    np.testing.assert_allclose(streamed(model, PATTERN), wanted, atol=1e-4)
    assert np.abs(streamed(model, np.ones((L, K))) - wanted).max() > 0.01


def test_a_pattern_of_ones_changes_nothing(model):
    plain = forward(model, TOKENS).logits
    np.testing.assert_allclose(streamed(model, np.ones((L, K))), plain, atol=1e-5)


def test_reordered_heads_are_the_same_model(model):
    new = reorder_heads(model, PATTERN)
    assert np.abs(new.layers.attention.wk[...] - model.layers.attention.wk[...]).max() > 0.1
    plain = forward(model, TOKENS).logits
    np.testing.assert_allclose(forward(new, TOKENS).logits, plain, atol=1e-5)
    sorted_pattern = -np.sort(-PATTERN, axis=1)
    np.testing.assert_allclose(
        streamed(new, sorted_pattern), streamed(model, PATTERN), atol=1e-4
    )  # fmt: skip


def test_decoding_with_two_caches(model):
    """Prompts of unequal lengths, in chunks; retrieval everywhere is ordinary decoding."""
    prompts = [TOKENS[0].tolist(), TOKENS[1, :9].tolist()]
    run = functools.partial(generate, model, prompts, max_new_tokens=4)
    every = duo_layers(np.ones((L, K)), **SIZES)
    np.testing.assert_array_equal(run(prefill_chunk=5, cache_policy=every), run())
    policy = duo_layers(PATTERN, first_chunk="streaming", **SIZES)
    row = np.asarray(run(cache_policy=policy)[0])
    # All but the last prompt token are one chunk under the mask; every token after it is a chunk of
    # its own, and sees what the cache holds (sink + recent) and itself.
    t, u = np.arange(len(row))[:, None], np.arange(len(row))[None]
    reach = np.where(t < T - 1, SIZES["recent"], SIZES["recent"] + 1)
    seen = (u <= t) & ((u < SIZES["sink"]) | (t - u < reach))
    said = _masked(model, jnp.asarray(row)[None], jnp.asarray(seen))[0].argmax(axis=-1)
    np.testing.assert_array_equal(row[T:], said[T - 1 : -1])


def _masked(model, text, seen):
    whole = jnp.repeat(jnp.asarray(PATTERN), H // K, axis=1)[:, :, None, None] > 0  # [L,H,1,1]
    return intervene(forward, Edit("scores", _hide, whole | seen))(model, text).logits


def _hide(value, payload, ctx):
    return jnp.where(payload, value, -1e9)


def test_caches_have_the_bytes_of_the_formula(model):
    slots, batch = 40, 3
    duo = with_config(model, attention=duo_layers(PATTERN, **SIZES))
    cache = init_cache(duo.cfg, batch, slots)
    held = sum(a.size * a.dtype.itemsize for s in cache.states for a in (*s.full, *s.streaming))
    kept = PATTERN.sum() * slots + (1 - PATTERN).sum() * sum(SIZES.values())
    assert cache.k.size == 0 and held == 2 * batch * CFG.head_dim * 4 * kept


BAD = {
    r"shape \(2, 4\).*one a kv head": lambda m: stream_heads(forward, np.ones((L, H)), 1, 3)(
        m, TOKENS
    ),
    "is it of this model": lambda m: stream_heads(forward, np.ones((3, K)), 1, 3)(m, TOKENS),
    "recent=0": lambda m: stream_heads(forward, PATTERN, 1, 0),
    "sink=-1": lambda m: stream_heads(forward, PATTERN, -1, 2),
    "needed .L,K.": lambda m: reorder_heads(m, np.ones(K)),
    "names 3 kv heads": lambda m: forward(with_config(m, attention="duo(heads=101)"), TOKENS),
    "must be digits": lambda m: with_config(m, attention="duo(heads=1x)"),
    "prefill_chunk=0": lambda m: generate(m, TOKENS, max_new_tokens=1, prefill_chunk=0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(model, message):
    with pytest.raises(ValueError, match=message):
        BAD[message](model)


def test_heads_that_differ_by_number_stay(model):
    other = with_config(model, attention="duo")
    with pytest.raises(NotImplementedError, match="differ by their number"):
        reorder_heads(other, PATTERN)
