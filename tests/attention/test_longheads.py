"""LongHeads against a loop over tokens and heads, its limits, its cache, and decoders with it."""

import functools
import itertools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxheads as jh
from jaxheads.attention import (
    LongHeadsCache,
    LongHeadsOptions,
    RopeConfig,
    attention,
    chunk_representations,
    inverse_frequencies,
    longheads_attention,
    rotate,
    select_chunks,
)
from jaxheads.interventions import chunks_read, with_longheads
from jaxheads.models import ModelConfig, forward, init_cache, with_config
from tests.tiny import tiny_model

B, T, H, D, W, A = 2, 37, 4, 8, 3, 15  # T is no multiple of the chunk; five chunks of three
INV_FREQ, _ = inverse_frequencies(RopeConfig(theta=100.0), D)
turn = functools.partial(rotate, inv_freq=INV_FREQ, interleaved=False)


@functools.partial(jax.jit, static_argnames=("begin", "include_self", "impl"))
def longheads(q, k, v, begin=None, include_self=True, impl="gather"):
    return longheads_attention(
        q, k, v, turn, chunk_size=W, window=A, begin=begin, include_self=include_self, impl=impl
    )


@functools.partial(jax.jit, static_argnames=("repr", "repr_per"))
def representations(q, k, v, valid=None, **options):
    return chunk_representations(q, k, v, turn, chunk_size=W, valid=valid, **options)


def arrays(num_kv_heads=2, length=T, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda heads: jnp.asarray(rng.normal(size=(B, length, heads, D)), jnp.float32)
    return normal(H), normal(num_kv_heads), normal(num_kv_heads)


def turned(x, position):
    """One vector of float64 at a position."""
    angle = position * INV_FREQ.astype(np.float64)
    a, b = x[: D // 2], x[D // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle),
                           b * np.cos(angle) + a * np.sin(angle)])  # fmt: skip


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def naive(q, k, v, *, begin=A, include_self=True):
    """The definition, a token and a head at a time: (reps, chunks, y)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scale, n = D**-0.5, A // W
    reps, y = np.zeros((B, T // W, H, D)), np.zeros(q.shape)
    chunks = np.full((B, T, H, n), -1)
    for b, h in np.ndindex(B, H):
        kh = h // (H // k.shape[2])
        for g in range(T // W):
            inside = range(g * W, (g + 1) * W)
            qs = np.stack([turned(q[b, u, h], u % W) for u in inside])
            ks = np.stack([turned(k[b, u, kh], u % W) for u in inside])
            outputs = [softmax(scale * ks @ x) @ v[b, inside, kh] for x in qs]
            reps[b, g, h] = softmax(scale * ks @ np.mean(outputs, axis=0)) @ ks
        for t in range(T):
            c, r = divmod(t, W)
            if c < n:
                read = list(range(c + 1))
            else:
                scores = {g: q[b, t, h] @ reps[b, g, h] for g in range(1, c - 1)}
                best = sorted(scores, key=lambda g: -scores[g])[: n - 3]
                read = sorted([0, c - 1, c, *best])
            chunks[b, t, h, : len(read)] = read
            if t < begin:
                keys, own = list(range(t + 1)), t
            else:
                keys = [u for g in read for u in range(g * W, (g + 1) * W)]
                own = (len(read) - 1) * W + r
                keys = keys[: own + include_self]
            query = turned(q[b, t, h], own)
            if keys:
                s = [query @ turned(k[b, u, kh], p) for p, u in enumerate(keys)]
                y[b, t, h] = softmax(scale * np.array(s)) @ v[b, keys, kh]
    return reps, chunks, y


@pytest.mark.parametrize(("num_kv_heads", "include_self"), [(4, True), (2, False)])
def test_every_part_equals_the_definition(num_kv_heads, include_self):
    q, k, v = arrays(num_kv_heads)
    reps, chunks, y = naive(q, k, v, begin=0, include_self=include_self)
    found, info = longheads(q, k, v, begin=0, include_self=include_self)
    np.testing.assert_allclose(found, y, atol=1e-5)
    np.testing.assert_array_equal(info.chunks, chunks)
    got = representations(q, k, v)
    np.testing.assert_allclose(got, reps, atol=1e-5)
    picked = select_chunks(q, got, jnp.arange(T) // W, num_chunks=A // W)
    np.testing.assert_array_equal(picked, chunks)
    assert picked.dtype == jnp.int32


@pytest.fixture(scope="module")
def case():
    """Inputs with grouped heads, and what the gathering form makes of them."""
    return arrays(), longheads(*arrays())


def test_short_texts_are_plain_causal_attention(case):
    (q, k, v), (y, _) = case
    place = jnp.arange(A)
    plain = attention(turn(q[:, :A], place), turn(k[:, :A], place), v[:, :A])
    np.testing.assert_array_equal(longheads(q[:, :A], k[:, :A], v[:, :A])[0], plain)
    np.testing.assert_allclose(y[:, :A], plain, atol=1e-6)
    selective, info = longheads(q[:, :A], k[:, :A], v[:, :A], begin=0)
    np.testing.assert_allclose(selective, plain, atol=1e-5)
    assert int(info.max_position) == A - 1


def test_positions_stay_below_the_window(case):
    _, (_, info) = case
    at = np.arange(T)
    np.testing.assert_array_equal(info.positions, np.where(at < A, at, A - W + at % W))
    assert int(info.max_position) == A - 1


def test_masked_equals_gather(case):
    (q, k, v), (y, info) = case
    other, same = longheads(q, k, v, impl="masked")
    np.testing.assert_allclose(other, y, atol=1e-5)
    np.testing.assert_array_equal(same.chunks, info.chunks)


def test_no_token_reaches_back(case):
    """Changing token u changes nothing before u, whatever chunk u completes or leaves open."""
    (q, k, v), (y, _) = case
    for u in range(T - 2 * W, T):
        changed = longheads(*(x.at[:, u].add(3.0) for x in (q, k, v)))[0]
        np.testing.assert_array_equal(changed[:, :u], y[:, :u])
        assert (changed[:, u] != y[:, u]).any()


@pytest.mark.parametrize("begin", [None, pytest.param(21, marks=pytest.mark.slow)])
def test_decoding_equals_prefill(case, begin):
    """From a prefill that ends inside a chunk, over completions at every offset; compiled once."""
    (q, k, v), (y, _) = case
    if begin is not None:
        y = longheads(q, k, v, begin=begin)[0]
    traced = []

    @jax.jit
    def step(cache, q, k, v):
        traced.append(q.shape[1])
        return cache.prefill(q, k, v, turn)

    cache = LongHeadsCache.init(
        B, T, H, D, chunk_size=W, window=A, begin=begin, num_kv_heads=2
    )  # fmt: skip
    got, places = [], [0, 11, *range(12, T + 1)]
    for start, stop in itertools.pairwise(places):
        z, cache = step(cache, *(x[:, start:stop] for x in (q, k, v)))
        got.append(z)
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), y, atol=1e-5)
    assert traced == [11, 1]
    np.testing.assert_allclose(cache.slots.reps[:, : T // W], representations(q, k, v), atol=1e-5)
    assert cache.num_complete.tolist() == [T // W] * B
    with pytest.raises(ValueError, match="no room for 1 more"):
        cache.decode_step(q[:, :1], k[:, :1], v[:, :1], turn)


def test_sharded_equals_single(case):
    (q, k, v), (y, _) = case
    mesh = jh.parallel.make_mesh("data:2,model:2", devices=jax.devices()[:4])
    placed = [
        jax.device_put(x, jax.NamedSharding(mesh, jax.P("data", None, "model"))) for x in (q, k, v)
    ]
    with jax.set_mesh(mesh):
        split, info = longheads(*placed)
    np.testing.assert_allclose(split, y, atol=1e-5)
    assert split.sharding.spec[2] == "model" and info.chunks.sharding.spec[2] == "model"


@pytest.mark.parametrize("options", [{"repr": "mean_key"}, {"repr": "mean_output"}])
def test_other_vectors(options):
    q, k, v = arrays()
    place = np.arange(T) % W
    keys = np.asarray(turn(k, jnp.asarray(place)), np.float64)[:, : T // W * W]
    mean = keys.reshape(B, T // W, W, 2, D).mean(axis=2).repeat(2, axis=2)
    got = representations(q, k, v, **options)
    per_kv = representations(q, k, v, repr_per="kv", **options)
    if options["repr"] == "mean_key":
        np.testing.assert_allclose(got, mean, atol=1e-6)
        np.testing.assert_allclose(per_kv, mean, atol=1e-6)
    else:  # a lies in the hull of the chunk's values
        low, high = (f(v[:, :W], axis=1).repeat(2, axis=1) for f in (np.min, np.max))
        assert ((got[:, 0] >= low - 1e-6) & (got[:, 0] <= high + 1e-6)).all()
        np.testing.assert_array_equal(per_kv[:, :, 0], per_kv[:, :, 1])


def test_padding_in_a_chunk_has_no_weight():
    q, k, v = arrays(length=W)
    valid = jnp.arange(W)[None].repeat(B, 0) < W - 1
    other = [x.at[:, W - 1].set(9.0) for x in (q, k, v)]
    np.testing.assert_allclose(
        representations(q, k, v, valid), representations(*other, valid), atol=1e-6
    )
    np.testing.assert_array_equal(representations(q, k, v, valid & False), 0)


LONG = f"longheads(window={A},chunk={W})"
TOKENS = np.random.default_rng(1).integers(1, 40, (B, 30))


@pytest.fixture(scope="module")
def models():
    """A decoder, and the same with LongHeads."""
    cfg = ModelConfig(
        vocab_size=40, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, max_positions=A
    )
    plain = tiny_model(cfg)
    return plain, with_config(plain, attention=LONG)


def test_a_decoder_decodes_with_its_own_cache(models):
    _, model = models
    want = forward(model, TOKENS).logits
    cache, got = init_cache(model.cfg, B, 30), []
    for start, stop in ((0, 16), (16, 17), (17, 18), (18, 19)):
        out = forward(model, TOKENS[:, start:stop], cache=cache)
        cache = out.cache
        got.append(out.logits)
    np.testing.assert_allclose(np.concatenate(got, axis=1), want[:, :19], atol=1e-3)


def test_left_padding_changes_nothing_and_documents_do_not_mix(models):
    _, model = models
    want = forward(model, TOKENS[:1]).logits
    tokens = np.stack([np.pad(TOKENS[0], (5, 0)), np.pad(TOKENS[0], (0, 5))])
    ids = (tokens != 0).astype(np.int32)
    ids[1, -4:] = 2  # another document
    logits = forward(model, tokens, segment_ids=ids).logits
    np.testing.assert_allclose(logits[0, 5:], want[0], atol=1e-3)
    assert jnp.isnan(logits[1]).any()


def test_the_wrapper_is_the_upgraded_model(models):
    plain, model = models
    wrapped = with_longheads(jh.record(forward, "z"), A, W)
    out = wrapped(plain, TOKENS)
    np.testing.assert_array_equal(out.logits, forward(model, TOKENS).logits)
    assert out.seen["z"].shape[0] == 2
    assert not np.allclose(out.logits, forward(plain, TOKENS).logits)
    chunks = chunks_read(model, TOKENS)
    assert chunks.shape == (2, B, 30, H, A // W)
    last = np.asarray(chunks[:, :, -1])
    assert (last[..., 0] == 0).all() and (last[..., -2:] == [8, 9]).all()
    assert (np.diff(last, axis=-1) > 0).all()
    with pytest.raises(ValueError, match="takes no cache"):
        wrapped(plain, TOKENS, cache=init_cache(plain.cfg, B, 30))
    with pytest.raises(ValueError, match="must name layers from 0 to 1"):
        with_longheads(forward, A, W, layers=[2])(plain, TOKENS)
    with pytest.raises(ValueError, match="'dense' attention only"):
        with_longheads(forward, A, W)(model, TOKENS)
    with pytest.raises(ValueError, match="in every layer"):
        chunks_read(plain, TOKENS)


@pytest.mark.slow
def test_generation_and_single_layers(models):
    plain, model = models
    out = jh.generate(model, [TOKENS[0, :20], TOKENS[1, :17]], max_new_tokens=6)
    for row, length in ((0, 20), (1, 17)):
        full = forward(model, out[row : row + 1, 20 - length : -1]).logits
        np.testing.assert_array_equal(out[row, 20:], full[0, length - 1 :].argmax(-1))
    one = with_longheads(forward, A, W, layers=[1])(plain, TOKENS).logits
    mixed = forward(with_config(plain, attention=f"dense+{LONG}"), TOKENS).logits
    np.testing.assert_array_equal(one, mixed)


@pytest.mark.slow
def test_gradients_agree(case):
    (q, k, v), _ = case
    loss = lambda impl: jax.jit(jax.grad(lambda *a: (longheads(*a, impl=impl)[0] ** 2).sum(),
                                         argnums=(0, 1, 2)))  # fmt: skip
    chex.assert_trees_all_close(loss("gather")(q, k, v), loss("masked")(q, k, v), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 16}, r"window=16 must be a multiple of chunk=3, such as 15"),
        ({"begin": 7}, r"begin=7 must be a multiple of chunk=3"),
        ({"window": 6}, r"a window of 2 chunks cannot hold num_sink=1 and num_recent=2"),
        ({"chunk": 0}, r"chunk=0 tokens must be at least 1"),
        ({"num_recent": 0}, r"num_recent=0 at least 1"),
        ({"repr": "max"}, r"unknown repr 'max'|'max'"),
        ({"impl": "fast"}, r"'fast'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LongHeadsOptions(**{"chunk": W, "window": A, **options})


def test_no_room_to_retrieve_warns():
    with pytest.warns(UserWarning, match="nothing is retrieved"):
        LongHeadsOptions(chunk=3, window=9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positions": "learned"}, "needs a model with rotary positions"),
        ({"positions": "alibi"}, "needs a model with rotary positions"),
        ({"max_positions": 12}, "window=15 exceeds the 12 positions"),
        ({"window": (4,)}, "sliding window of 4 tokens"),
    ],
)
def test_models_it_cannot_serve(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(attention=LONG, **fields)
    ModelConfig(attention=f"longheads(window={A},chunk={W},force=true)", max_positions=12)


def test_bad_input(models):
    q, k, v = arrays()
    with pytest.raises(ValueError, match="same result: LongHeads gives keys new positions"):
        longheads_attention(q, k, v, lambda x, positions: x, chunk_size=W, window=A)
    with pytest.raises(ValueError, match="rotate is None"):
        longheads_attention(q, k, v, None, chunk_size=W, window=A)
    with pytest.raises(ValueError, match="padding before real tokens"):
        valid = np.arange(T)[None].repeat(B, 0) >= 2
        chunk_representations(q, k, v, turn, chunk_size=W, valid=valid)
    with pytest.raises(ValueError, match="37 tokens and k 36"):
        longheads(q, k[:, :-1], v[:, :-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = LongHeadsCache.init(B, 4, H, D, chunk_size=W, window=A, num_kv_heads=2)
    with pytest.raises(ValueError, match="no room for 37 more"):
        cache.prefill(q, k, v, turn)
    with pytest.raises(ValueError, match="4 and 4 heads, the cache 4 and 2"):
        cache.prefill(q[:, :1], q[:, :1], q[:, :1], turn)
    with pytest.raises(ValueError, match="a step takes one"):
        cache.decode_step(q, k, v, turn)
    with pytest.raises(NotImplementedError, match="cannot honour a soft cap"):
        forward(with_config(models[1], attn_soft_cap=5.0), TOKENS)
    with pytest.raises(NotImplementedError, match="cannot honour implementation='dense'"):
        forward(with_config(models[1], implementation="dense"), TOKENS)
