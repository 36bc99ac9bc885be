"""DuoAttention on arrays: the mask, the gates, and two caches against a literal list of tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention import duo, duo_layers, streaming_mask
from jaxheads.attention.duo import duo_attention_step, duo_attention_train, init_cache

B, T, H, K, D = 2, 19, 4, 2, 8
SINK, RECENT = 2, 5


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(B, T, n, D)), jnp.float32) for n in (H, K, K))


def attend(q, k, v, keys_of):
    """Head by head in float64; `keys_of(kv_head, t)` is the list of keys that query t sees."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    z = np.zeros_like(q)
    for h, t in np.ndindex(H, T):
        g = h // (H // K)
        keys = keys_of(g, t)
        scores = np.einsum("bd,bsd->bs", q[:, t, h], k[:, keys, g]) / np.sqrt(D)
        weights = np.exp(scores)
        weights /= weights.sum(axis=1, keepdims=True)
        z[:, t, h] = np.einsum("bs,bsd->bd", weights, v[:, keys, g])
    return z


def streamed(g, t):
    return [u for u in range(t + 1) if u < SINK or t - u < RECENT]


@functools.partial(jax.jit, static_argnames=("sink", "recent", "impl"))
def value_and_grads(q, k, v, *, sink, recent, impl):
    f = lambda *a: duo.streaming_attention(*a, sink=sink, recent=recent, impl=impl)
    weights = jnp.cos(jnp.arange(D))
    return f(q, k, v), jax.grad(lambda *a: (f(*a) * weights).sum(), argnums=(0, 1, 2))(q, k, v)


def test_streaming_attention_is_the_loop():
    found = {i: value_and_grads(*draw(), sink=SINK, recent=RECENT, impl=i) for i in duo_impls()}
    np.testing.assert_allclose(found["dense"][0], attend(*draw(), streamed), atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found.values())


def test_a_window_of_everything_is_causal():
    causal = attend(*draw(), lambda g, t: list(range(t + 1)))
    for impl in duo_impls():
        z, _ = value_and_grads(*draw(), sink=0, recent=T, impl=impl)
        np.testing.assert_allclose(z, causal, atol=1e-5)


def duo_impls():
    return ("dense", "blocked")


@pytest.mark.parametrize("source", duo.MIX_SOURCES)
def test_gates_mix_streaming_and_full_heads(source):
    sizes = dict(sink=SINK, recent=RECENT, mix_source=source)
    train = jax.jit(lambda f, m, a: duo_attention_train(*f, *m, a, **sizes))
    own, other = draw(0), draw(1)
    causal = lambda g, t: list(range(t + 1))
    full = attend(*own, causal)
    mixed_in = attend(*(own if source == "teacher" else other), causal)
    a = np.array([0.25, 2.0])  # clipped to 1
    per_head = np.repeat(np.clip(a, 0, 1), H // K)[:, None]
    expected = (1 - per_head) * attend(*other, streamed) + per_head * mixed_in
    out = train(own, other, jnp.asarray(a, jnp.float32))
    np.testing.assert_allclose(out.full, full, atol=1e-5)
    np.testing.assert_allclose(out.mixed, expected, atol=1e-5)
    same = train(own, own, jnp.ones(K))
    np.testing.assert_array_equal(same.mixed, same.full)
    zero = train(own, other, jnp.zeros(K))
    np.testing.assert_allclose(zero.mixed, attend(*other, streamed), atol=1e-5)


_step = jax.jit(duo_attention_step, static_argnames=("pattern", "first_chunk"))


def run_chunks(chunks, pattern, *, sink=SINK, recent=RECENT, first_chunk="full", ids=None):
    q, k, v = draw()
    cache = init_cache(B, T, pattern, head_dim=D, sink=sink, recent=recent)
    out, start = [], 0
    for n in chunks:
        now = slice(start, start + n)
        part = (q[:, now], k[:, now], v[:, now], cache)
        segment_ids = None if ids is None else ids[:, now]
        z, cache = _step(
            *part, pattern=pattern, first_chunk=first_chunk, segment_ids=segment_ids
        )  # fmt: skip
        out.append(z)
        start += n
    return np.concatenate(out, axis=1), cache


def lists(chunks, pattern, sink=SINK, recent=RECENT):
    """What each query sees, kept as literal lists of tokens (section 2.4 of the paper)."""
    seen = {}
    for g in range(K):
        held, start = [], 0
        for n in chunks:
            for i in range(n):
                seen[g, start + i] = [*held, *range(start, start + i + 1)]
            held = [*held, *range(start, start + n)]
            if not pattern[g] and len(held) > sink + recent:
                held = held[:sink] + held[-recent:]
            start += n
    return lambda g, t: seen[g, t]


CHUNKS = ([6, 6, 6, 1], [1] * 7 + [6, 6], [6, 1, 1, 6, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("pattern", [(1, 0), (0, 1), (0, 0), (1, 1)])
def test_two_caches_are_lists_of_tokens(pattern):
    """All-retrieval is ordinary decoding: its lists hold every token."""
    for chunks in CHUNKS:
        z, cache = run_chunks(chunks, pattern)
        np.testing.assert_allclose(z, attend(*draw(), lists(chunks, pattern)), atol=1e-5)
        num_full = sum(pattern)
        slots = T * num_full + (SINK + RECENT) * (K - num_full)
        assert cache.nbytes == 2 * B * D * 4 * slots
        assert cache.full.k.shape == (B, T, num_full, D)
        assert cache.streaming.v.shape == (B, SINK + RECENT, K - num_full, D)


def test_a_long_window_streams_nothing():
    z, _ = run_chunks([6, 6, 6, 1], (0, 0), sink=0, recent=T)
    np.testing.assert_allclose(z, attend(*draw(), lambda g, t: list(range(t + 1))), atol=1e-5)


def test_a_first_chunk_may_stream():
    z, _ = run_chunks([T], (0, 0), first_chunk="streaming")
    np.testing.assert_allclose(z, attend(*draw(), streamed), atol=1e-5)


def test_padding_on_the_left_is_no_token():
    """Row 0 begins at column 9: the same as its tokens alone, of which the first five stream."""
    start, ids = 9, jnp.ones((B, T), jnp.int32)
    padded = ids.at[0, :start].set(0)
    z, cache = run_chunks([7, 7, 5], (1, 0), first_chunk="streaming", ids=padded)
    alone = init_cache(B, T, (1, 0), head_dim=D, sink=SINK, recent=RECENT)
    for now in (slice(9, 14), slice(14, 19)):
        part = (*(x[:, now] for x in draw()), alone)
        expected, alone = _step(
            *part, pattern=(1, 0), first_chunk="streaming", segment_ids=ids[:, now]
        )
        np.testing.assert_allclose(z[0, now], expected[0], atol=1e-5)
    assert cache.lengths.tolist() == [T - start, T]
    assert sorted(cache.positions[0].tolist()) == sorted(alone.positions[0].tolist())


def test_evicted_tokens_are_gone_and_others_stay():
    _, cache = run_chunks([6, 6, 1, 1, 1], (1, 0))
    evicted = cache.evict_last(3)
    assert evicted.lengths.tolist() == [12, 12] and int(evicted.index) == 12
    # Tokens 7 to 9 were overwritten and do not come back.
    assert sorted(t for t in evicted.positions[0].tolist() if t >= 0) == [0, 1, 10, 11]
    q, k, v = (x[:, 12:13] for x in draw())
    z, after = _step(q, k, v, evicted, pattern=(1, 0))
    seen = lambda g, t: list(range(13)) if g == 0 else [0, 1, 10, 11, 12]
    full = attend(*draw(), lambda g, t: seen(g, t) if t == 12 else [0])
    np.testing.assert_allclose(z[:, 0], full[:, 12], atol=1e-5)
    assert after.lengths.tolist() == [13, 13]


BAD = {
    "sink=-1": lambda: streaming_mask(jnp.arange(3), jnp.arange(3), -1, 2),
    "recent=0": lambda: init_cache(1, 8, (1, 0), head_dim=D, sink=1, recent=0),
    "impl='fast'": lambda: duo.streaming_attention(*draw(), sink=1, recent=2, impl="fast"),
    "not divisible": lambda: duo.streaming_attention(
        draw()[0][:, :, :3], *draw()[1:], sink=1, recent=2
    ),
    "one gate a kv head": lambda: duo_attention_train(
        *draw(), *draw(), jnp.ones(H), sink=1, recent=2
    ),
    "mix_source='both'": lambda: duo_attention_train(
        *draw(), *draw(), jnp.ones(K), sink=1, recent=2, mix_source="both"
    ),
    "not one a query head": lambda: step_once(20, (1, 0, 1, 0)),
    "must be 0 or 1": lambda: step_once(20, (1, 0.5)),
    "1 retrieval and 1 streaming": lambda: step_once(20, (1, 1)),
    "a chunk of 19 tokens does not fit": lambda: step_once(18, (1, 0)),
    "holds 12": lambda: step_once(30, (1, 0), index=12),
    "first_chunk='some'": lambda: step_once(20, (1, 0), first_chunk="some"),
    r"evict_last\(1\)": lambda: init_cache(1, 8, (1, 0), head_dim=D).evict_last(1),
    "needed .L,K.": lambda: duo_layers([1, 0]),
}


def step_once(room, pattern, index=0, **options):
    cache = init_cache(B, room, (1, 0), head_dim=D, sink=SINK, recent=RECENT)
    cache = dataclasses.replace(cache, index=jnp.int32(index))
    return duo_attention_step(*draw(), cache, pattern=pattern, **options)


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
