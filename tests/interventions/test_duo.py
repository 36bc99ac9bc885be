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
from tests.tiny import tiny_model

L, H, K, T = 2, 4, 2, 13
CFG = ModelConfig(
    vocab_size=17, num_layers=L, model_dim=16, num_heads=H, num_kv_heads=K, mlp_dim=16,
    qkv_bias=True, attn_sinks=False,
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


def test_fractions_have_gradients(model):
    loss = jax.jit(jax.value_and_grad(lambda a: (streamed(model, a)[:, -1] ** 2).sum()))
    a, step = jnp.full((L, K), 0.6), jnp.asarray([[0.5, -1.0], [1.0, 0.7]])
    measured = (loss(a + 1e-2 * step)[0] - loss(a - 1e-2 * step)[0]) / 2e-2
    np.testing.assert_allclose((loss(a)[1] * step).sum(), measured, rtol=2e-2)


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
    wanted = run()
    np.testing.assert_array_equal(run(prefill_chunk=5), wanted)
    np.testing.assert_array_equal(run(prefill_chunk=5, cache_policy=every), wanted)
    window = duo_layers(np.zeros((L, K)), sink=0, recent=T + 4)
    np.testing.assert_array_equal(run(prefill_chunk=5, cache_policy=window), wanted)
    policy = duo_layers(PATTERN, first_chunk="streaming", **SIZES)
    row = run(cache_policy=policy)[0]
    # Single tokens see sink + recent of the cache and themselves: literally, over a growing text.
    assert row.tolist() == literal(model, prompts[0], 4).tolist()


def literal(model, prompt, num_new):
    """Greedy decoding with the mask of a streaming prompt, then one key more a step."""
    ids = list(prompt)
    for _ in range(num_new):
        text = jnp.asarray([ids])
        t, u = np.arange(len(ids))[:, None], np.arange(len(ids))[None]
        # The last prompt token is a step of its own already.
        reach = np.where(t < len(prompt) - 1, SIZES["recent"], SIZES["recent"] + 1)
        seen = (u <= t) & ((u < SIZES["sink"]) | (t - u < reach))
        ids.append(int(_masked(model, text, jnp.asarray(seen))[0, -1].argmax()))
    return np.array(ids)


def _masked(model, text, seen):
    from jaxheads.taps import Edit, intervene

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
