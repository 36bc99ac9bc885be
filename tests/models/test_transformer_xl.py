"""Segments and memory against whole sequences, in Transformer-XL and in a decoder's cache."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads.models import Decoder, ModelConfig, forward, init_cache
from jaxheads.models.transformer_xl import Memory, TransformerXL, TransformerXLConfig, sinusoid
from jaxheads.taps import Record, Taps
from jaxheads.training import noam_schedule

LENGTH, PIECE = 12, 4


def config(variant="rcmha", **changes):
    size = dict(vocab_size=11, num_layers=2, model_dim=8, num_heads=2, mlp_dim=8)
    memory = dict(mem_len=LENGTH, max_distance=2 * LENGTH)
    return TransformerXLConfig(variant=variant, **{**size, **memory, **changes})


def drawn(model):
    """The model with tables that say something."""
    for i, name in enumerate(("rel_key", "rel_bias", "query_bias")):
        table = getattr(model.layers, name)
        table[...] = jax.random.normal(jax.random.key(i), table.shape)
    return model


@pytest.fixture(scope="module")
def carry():
    return drawn(TransformerXL(config(query_conv="carry"), rngs=nnx.Rngs(0)))


TOKENS = np.random.default_rng(0).integers(0, 11, (2, LENGTH))
RUN = jax.jit(lambda model, tokens, memory: model.run(
    tokens, memory, Taps(record=(Record("q"), Record("z"), Record("scores")))))  # fmt: skip


def in_pieces(model):
    memory, outs = model.init_memory(2), []
    for start in range(0, LENGTH, PIECE):
        outs.append(RUN(model, TOKENS[:, start : start + PIECE], memory))
        memory = outs[-1].memory
    return outs


def test_segments_with_carried_queries_are_the_whole(carry):
    whole = RUN(carry, TOKENS, carry.init_memory(2))
    pieces = in_pieces(carry)
    logits = jnp.concatenate([out.logits for out in pieces], axis=1)
    np.testing.assert_allclose(logits, whole.logits, atol=2e-5)
    np.testing.assert_allclose(pieces[-1].memory.hidden, whole.memory.hidden, atol=2e-5)
    np.testing.assert_array_equal(pieces[-1].memory.length, LENGTH)
    terms = carry.score_terms(TOKENS)
    visible = np.tril(np.ones((LENGTH, LENGTH), bool))
    total, seen = (np.asarray(a)[..., LENGTH:] for a in (sum(terms.values()), whole.seen["scores"]))
    np.testing.assert_allclose(total[..., visible], seen[..., visible], atol=1e-5)


def test_segments_alone_differ_where_the_convolution_starts_anew(carry):
    model = drawn(TransformerXL(config(), rngs=nnx.Rngs(0)))
    whole, pieces = RUN(model, TOKENS, model.init_memory(2)), in_pieces(model)
    z = np.concatenate([out.seen["z"][0] for out in pieces], axis=1)  # layer 1
    gap = abs(z - whole.seen["z"][0]).max((0, 2, 3)).reshape(-1, PIECE)
    assert (gap[1:, :2] > 1e-3).all() and gap[:, 2:].max() < 2e-5 and gap[0].max() < 2e-5


def test_no_leak_from_the_future_or_into_the_memory(carry):
    """Through the embedding of one stream: later tokens and earlier segments get no gradient."""

    def loss(x):
        model = jax.tree.map(lambda leaf: leaf, carry)
        model.embed[...] = x
        _, memory = model(jnp.asarray([[0, 1, 2]]))
        return model(jnp.asarray([[3, 4, 5]]), memory)[0][:, 1].sum()

    slope = jax.jit(jax.grad(loss))(carry.embed[...])
    moved = np.asarray(abs(slope).sum(-1)[:6] > 0)
    np.testing.assert_array_equal(moved, [False, False, False, True, True, False])


def test_counts_of_parameters():
    def count(variant):
        build = lambda: TransformerXL(config(variant, abs_pos="sinusoid"), rngs=nnx.Rngs(0))
        return sum(math.prod(a.shape) for a in jax.tree.leaves(jax.eval_shape(build)))

    heads, dim, rows, width, layers = 2, 4, 2 * LENGTH, 3, 2
    assert count("rcmha") - count("rmha") == layers * 3 * (width + 1) * dim
    assert count("mdha") - count("mha") == layers * 3 * (width + 1) * dim
    more = rows * heads * (dim + 1) + heads * dim - 2 * heads * dim
    assert count("rmha") - count("mha") == layers * more


def test_schedule():
    rate = noam_schedule(128)
    for t, shape in ((1, 2000**-1.5), (2000, 2000**-0.5), (20_000, 20_000**-0.5)):
        np.testing.assert_allclose(rate(t - 1), 128**-0.5 * shape, rtol=1e-6)


def test_sinusoid():
    np.testing.assert_allclose(sinusoid(3, 4)[2], [np.sin(2), np.cos(2), np.sin(0.02),
                                                  np.cos(0.02)], atol=1e-6)  # fmt: skip


def test_a_decoder_decodes_with_its_state():
    """Left padding, two segments of the cache, and one token at a time equal the whole."""
    cfg = ModelConfig(
        vocab_size=11, num_layers=2, model_dim=8, num_heads=2, num_kv_heads=1, mlp_dim=8,
        attention="rcmha(max_distance=16)",
    )  # fmt: skip
    model = Decoder(cfg, rngs=nnx.Rngs(0))
    place = model.variants[0]
    for i, name in enumerate(("rel_key", "rel_bias", "query_bias")):
        value = getattr(place, name)
        value[...] = jax.random.normal(jax.random.key(i), value.shape)
    ids = jnp.ones((2, 8), jnp.int32).at[0, :3].set(0)
    tokens = TOKENS[:, :8]
    whole = forward(model, tokens, segment_ids=ids).logits
    cache, got = init_cache(cfg, 2, 12), []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 8)):
        out = forward(model, tokens[:, start:stop], segment_ids=ids[:, start:stop], cache=cache)
        cache = out.cache
        got.append(out.logits)
    got = jnp.concatenate(got, axis=1)
    np.testing.assert_allclose(got[1], whole[1], atol=2e-5)
    np.testing.assert_allclose(got[0, 3:], whole[0, 3:], atol=2e-5)
    alone = forward(model, tokens[:1, 3:]).logits
    np.testing.assert_allclose(alone[0], whole[0, 3:], atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "model_dim=8 is not divisible by num_heads=3"),
        ({"kernel_width": 0}, "width=0 must be at least 1"),
        ({"variant": "rcmah"}, "unknown variant 'rcmah'; did you mean 'rcmha'"),
        ({"mem_len": -1}, "mem_len=-1 must be 0 or more"),
        ({"mem_len": 1, "query_conv": "carry"}, "mem_len=1 is too short"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_bad_memory(carry):
    memory = carry.init_memory(2)
    with pytest.raises(ValueError, match=r"for tokens \(3, 4\) it must be"):
        carry(np.zeros((3, 4), int), memory)
    with pytest.raises(ValueError, match="memory is bfloat16; the model computes in float32"):
        carry(TOKENS, Memory(memory.hidden.astype(jnp.bfloat16), memory.length))
    with pytest.raises(ValueError, match="need 25"):
        carry(np.zeros((2, 13), int), memory)
