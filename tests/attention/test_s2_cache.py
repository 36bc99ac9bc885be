"""Decoding with the compact cache: the rows of the full forward, from exactly its slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention.s2 import S2Cache, ShardPattern, s2_attention, s2_decode
from jaxheads.attention.s2_cache import extend

PATTERNS = {
    "one local block": ShardPattern(16, 1, 2, 2),
    "gqa, offset": ShardPattern(16, 2, 4, 8, 4, head_offset=1),
    "dense head": ShardPattern(16, 1, 3, 3, num_dense_heads=1),
    "only dense": ShardPattern(16, 1, 3, 2, num_dense_heads=2),
    "wide": ShardPattern(16, 20, 2, 2),
}
LENGTH, BATCH, HEAD_DIM = 150, 2, 8


def arrays(pattern, length=LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    shape = lambda heads: (BATCH, length, heads, HEAD_DIM)
    normal = lambda heads: jnp.asarray(rng.normal(size=shape(heads)), jnp.float32)
    return normal(pattern.num_heads), normal(pattern.kv_heads), normal(pattern.kv_heads)


@pytest.mark.parametrize("name", PATTERNS)
def test_token_by_token_equals_the_full_forward(name):
    pattern = PATTERNS[name]
    q, k, v = arrays(pattern)
    full = s2_attention(q, k, v, pattern, impl="dense")

    @jax.jit
    def step(cache, t):
        q1, k1, v1 = (jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1) for x in (q, k, v))
        cache = cache.append(k1, v1)
        return cache, (s2_decode(q1, cache, pattern)[:, 0], cache.live_slots())

    cache = S2Cache.init(pattern, BATCH, LENGTH, HEAD_DIM)
    _, (z, slots) = jax.lax.scan(step, cache, jnp.arange(LENGTH))
    np.testing.assert_allclose(jnp.moveaxis(z, 0, 1), full, atol=1e-5)
    wanted = [pattern.cache_slots(t + 1) for t in range(LENGTH)]
    np.testing.assert_array_equal(slots, wanted)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_cache_has_no_room_for_more_than_its_slots(name):
    """The arrays hold the largest head's slots, and nothing else of length max_len."""
    pattern = PATTERNS[name]
    slots = S2Cache.init(pattern, BATCH, LENGTH, HEAD_DIM).slots
    sparse = pattern.num_sparse_heads
    held = slots.ring.k.shape[2] + slots.store.k.shape[2]
    if sparse:
        assert held == pattern.cache_slots(LENGTH)[:sparse].max()
    assert slots.full.k.shape[1] == pattern.num_dense_heads


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gqa, offset", (64, 86)),
        ("one local block", (37, 113)),
        pytest.param("one local block", (150,), marks=pytest.mark.slow),
        pytest.param("dense head", (1, 40, 68, 41), marks=pytest.mark.slow),
        pytest.param("wide", (37, 113), marks=pytest.mark.slow),
    ],
)
def test_pieces_of_any_size_equal_the_full_forward(name, pieces):
    pattern = PATTERNS[name]
    q, k, v = arrays(pattern)
    ids = jnp.asarray([[0] * 5 + [1] * (LENGTH - 5), [1] * 90 + [2] * (LENGTH - 90)])
    full = s2_attention(q, k, v, pattern, segment_ids=ids, impl="dense")
    slots = S2Cache.init(pattern, BATCH, LENGTH, HEAD_DIM).slots
    step = jax.jit(functools.partial(extend, pattern=pattern, scale=HEAD_DIM**-0.5))
    found, start = [], 0
    for size in pieces:
        part = slice(start, start + size)
        z, _, slots = step(
            q[:, part], k[:, part], v[:, part], slots, jnp.int32(start), ids[:, part]
        )
        found.append(z)
        start += size
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), full, atol=1e-5)


def test_bad_input():
    pattern = PATTERNS["one local block"]
    cache = S2Cache.init(pattern, 1, 16, HEAD_DIM)
    x = jnp.ones((1, 17, 2, HEAD_DIM))
    with pytest.raises(ValueError, match="no room for 17 more"):
        cache.append(x, x)
    with pytest.raises(ValueError, match="kv heads"):
        cache.append(x[:, :1, :1], x[:, :1, :1])
    with pytest.raises(ValueError, match="one query"):
        s2_decode(x, cache)
    with pytest.raises(ValueError, match="was made for"):
        s2_decode(x[:, :1], cache, PATTERNS["wide"])
    with pytest.raises(ValueError, match="past block form a prefix"):
        S2Cache.init(ShardPattern(16, 1, 2, 2, position="relative"), 1, 16, HEAD_DIM)
