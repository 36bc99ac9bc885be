"""CCA-attention: the definition token by token, its limits, its cache, and eight devices."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxheads as jh
from jaxheads.attention import (
    VARIANTS,
    AttentionContext,
    CCACache,
    CCAOptions,
    Mask,
    RopeConfig,
    cca_attention,
    cca_costs,
    cca_effective_attention,
    core_tokens,
    inverse_frequencies,
    rotate,
)
from jaxheads.models import Decoder, ModelConfig, forward, init_cache, with_config
from jaxheads.parallel.program import analyze

G, S, LENGTH, HEAD_DIM = 4, 6, 43, 8
SIZES = {"group_size": G, "window_size": S}
KINDS = {
    "mha": (2, 2, {}),
    "gqa": (4, 2, {"boundary": "printed"}),
    "per query head": (4, 2, {"gqa_pool": "per_query_head"}),
}


def arrays(heads=2, kv_heads=2, length=LENGTH, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda n: jnp.asarray(rng.normal(size=(batch, length, n, HEAD_DIM)), jnp.float32)
    return normal(heads), normal(kv_heads), normal(kv_heads)


def naive(q, k, v, g=G, s=S, gqa_pool="mean", boundary="disjoint"):
    """The definition, one token and head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (batch, length, num_heads, dim), group = q.shape, q.shape[2] // k.shape[2]

    def softmax(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    def weights(b, i, h):
        return softmax(k[b, i * g : (i + 1) * g, h // group] @ q[b, (i + 1) * g - 1, h] / dim**0.5)

    z = np.zeros((batch, length, num_heads, v.shape[-1]))
    for b, h in np.ndindex(batch, num_heads):
        c = h // group
        shared = range(c * group, (c + 1) * group) if gqa_pool == "mean" else [h]
        pooled = [np.mean([weights(b, i, n) for n in shared], 0) for i in range(length // g)]
        core = [[a @ x[b, i * g : (i + 1) * g, c] for i, a in enumerate(pooled)] for x in (k, v)]
        for t in range(length):
            j = max(0, math.floor((t + 1 - s) / g))
            low = j * g if boundary == "disjoint" else max(0, j * g - 1)
            keys, values = (
                np.array([*some[:j], *x[b, low : t + 1, c]]) for some, x in zip(core, (k, v))
            )
            z[b, t, h] = softmax(keys @ q[b, t, h] / dim**0.5) @ values
    return z


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_equals_the_definition(kind):
    heads, kv_heads, options = KINDS[kind]
    q, k, v = arrays(heads, kv_heads)
    wanted = naive(q, k, v, **options)

    @jax.jit
    def run(q, k, v):
        blocked, dense = (
            cca_attention(q, k, v, impl=impl, **SIZES, **options) for impl in ("blocked", "dense")
        )
        return blocked, dense, cca_effective_attention(q, k, v, **SIZES, **options)

    blocked, dense, effective = run(q, k, v)
    np.testing.assert_allclose(blocked, wanted, atol=1e-5)
    np.testing.assert_allclose(dense, wanted, atol=1e-5)
    values = jnp.repeat(v, heads // kv_heads, axis=2)
    np.testing.assert_allclose(jnp.einsum("bhts,bshd->bthd", effective, values), wanted, atol=1e-5)
    np.testing.assert_allclose(effective.sum(-1), 1, atol=1e-5)
    lower = np.tril(np.ones((LENGTH, LENGTH), bool))
    assert (effective[..., ~lower] == 0).all() and (effective[..., lower] > 0).all()


@pytest.mark.parametrize("kind", ["gqa", pytest.param("per query head", marks=pytest.mark.slow)])
def test_the_cache_in_pieces_of_any_size_equals_the_parallel_form(kind):
    heads, kv_heads, options = KINDS[kind]
    q, k, v = arrays(heads, kv_heads)
    wanted = naive(q, k, v, **options)
    cache = CCACache.init_cache(2, LENGTH, kv_heads, HEAD_DIM, num_heads=heads, **SIZES, **options)
    elements = sum(x.size for x in cache.slots[:4])
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": HEAD_DIM}
    assert elements == 2 * cca_costs(LENGTH, G, S, **sizes, **options).cache_elements

    part = jax.jit(CCACache.prefill)

    @jax.jit
    def steps(cache, q, k, v):
        def step(cache, x):
            y, cache = cache.decode_step(*(a[:, None] for a in x))
            return cache, y[:, 0]

        cache, y = jax.lax.scan(step, cache, [jnp.moveaxis(x, 1, 0) for x in (q, k, v)])
        return jnp.moveaxis(y, 0, 1), cache

    found, start = [], 0
    for run, size in ((part, 15), (steps, 13), (part, 15)):
        y, cache = run(cache, *(x[:, start : start + size] for x in (q, k, v)))
        found.append(y)
        start += size
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), wanted, atol=1e-5)
    assert int(cache.length) == LENGTH
    with pytest.raises(ValueError, match="no room for 1 more"):
        cache.decode_step(q[:, :1], k[:, :1], v[:, :1])


def test_limits():
    q, k, v = arrays()
    full = jh.attention.attention(q, k, v, Mask(is_causal=True), implementation="dense")
    for group, window in ((1, 1), (4, LENGTH), (64, 7)):  # the last has no complete group
        run = jax.jit(functools.partial(cca_attention, group_size=group, window_size=window))
        z = run(q, k, v)
        np.testing.assert_allclose(z, full, atol=1e-5)
    constant = jnp.repeat(k[:, ::G, :, :][:, :10], G, axis=1)
    kg, vg, weights = core_tokens(q[:, :40], constant, v[:, :40], group_size=G, pool_func="mean")
    np.testing.assert_allclose(vg, v[:, :40].reshape(2, 10, G, 2, HEAD_DIM).mean(2), atol=1e-6)
    np.testing.assert_allclose(kg, constant[:, ::G], atol=1e-6)
    assert weights.shape == (2, 10, 2, G) and weights.dtype == jnp.float32
    for name in ("max", "random", "last"):
        kg, _, weights = core_tokens(q, k, v, group_size=G, pool_func=name)
        assert ((weights == 1).sum(-1) == 1).all()
        one = jnp.einsum("bicu,biucd->bicd", weights, k[:, :40].reshape(2, 10, G, 2, HEAD_DIM))
        np.testing.assert_allclose(kg, one, atol=1e-6)
    np.testing.assert_array_equal(core_tokens(q, k, v, group_size=G, pool_func="last")[0],
                                  k[:, G - 1 : 40 : G])  # fmt: skip


def test_a_later_token_changes_no_bit_before_it():
    q, k, v = arrays()
    run = jax.jit(functools.partial(cca_attention, impl="blocked", **SIZES))
    plain = run(q, k, v)
    for token in (3, 19, 42):
        other = run(*(x.at[:, token].add(3.0) for x in (q, k, v)))
        np.testing.assert_array_equal(other[:, :token], plain[:, :token])
        assert (other[:, token] != plain[:, token]).any()


def test_gradients_are_finite_differences():
    q, k, v = arrays(4, 2, length=19, batch=1)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
    f = lambda a, impl: (cca_attention(*a, impl=impl, **SIZES) * weights).sum()
    blocked, dense = (jax.jit(jax.grad(functools.partial(f, impl=i)))((q, k, v))
                      for i in ("blocked", "dense"))  # fmt: skip
    chex.assert_trees_all_close(blocked, dense, atol=1e-5)
    exact = lambda a: (naive(*a) * np.asarray(weights, np.float64)).sum()
    places = ((0, 3, 1), (0, 7, 2), (1, 1, 0), (2, 2, 1), (0, 18, 3))  # 3, 7: ends of groups
    for which, token, head in places:
        step = np.zeros((q, k, v)[which].shape)
        step[0, token, head] = np.random.default_rng(token).normal(size=HEAD_DIM)
        ahead, behind = (
            exact([np.asarray(x, np.float64) + (sign * 1e-5 * step if n == which else 0)
                   for n, x in enumerate((q, k, v))])
            for sign in (1, -1)
        )  # fmt: skip
        np.testing.assert_allclose(
            (blocked[which] * step).sum(), (ahead - behind) / 2e-5, rtol=1e-4, atol=1e-5
        )
    # Token 3 attends to itself alone unless it pools: its query matters through the core.
    through_core = lambda q: cca_attention(q, k, v, **SIZES)[:, 12:].sum()
    assert (jax.jit(jax.grad(through_core))(q)[:, 3] != 0).all()


def test_group_end_is_the_pooled_unrotated_key_at_the_last_position():
    q, k, v = arrays()
    inv_freq, scaling = inverse_frequencies(RopeConfig(), HEAD_DIM)
    turn = lambda x, n: scaling * rotate(x, n, inv_freq, interleaved=False, scaling=1.5)
    positions = 5 + jnp.arange(LENGTH)
    kg, vg, a = core_tokens(
        q, k, v, group_size=G, rope="group_end", positions=positions, rotate=turn
    )
    other = core_tokens(turn(q, positions), turn(k, positions), v, group_size=G)
    np.testing.assert_allclose(a, other[2], atol=1e-5)
    np.testing.assert_allclose(vg, other[1], atol=1e-5)
    unrotated = jnp.einsum("bicu,biucd->bicd", a, k[:, :40].reshape(2, 10, G, 2, HEAD_DIM))
    np.testing.assert_allclose(kg, turn(unrotated, positions[G - 1 : 40 : G]), atol=1e-5)
    assert not np.allclose(kg, other[0], atol=1e-2)


def test_documents_are_as_if_alone():
    q, k, v = arrays(length=44)
    ids = np.asarray([[1] * 20 + [2] * 24, [0] * 8 + [3] * 36])
    z = jax.jit(functools.partial(cca_attention, impl="blocked", **SIZES))(q, k, v, segment_ids=ids)
    for row, low, high in ((0, 0, 20), (0, 20, 44), (1, 8, 44)):
        alone = naive(*(x[row : row + 1, low:high] for x in (q, k, v)))
        np.testing.assert_allclose(z[row : row + 1, low:high], alone, atol=1e-5)
    assert (z[1, :8] == 0).all()
    whole = jax.jit(functools.partial(cca_effective_attention, **SIZES))
    effective = whole(q, k, segment_ids=jnp.asarray(ids))
    np.testing.assert_allclose(jnp.einsum("bhts,bshd->bthd", effective, v), z, atol=1e-5)


def test_nothing_of_the_size_of_all_pairs_exists():
    length = 2048
    x = jax.ShapeDtypeStruct((1, length, 1, HEAD_DIM), jnp.float32)
    loss = lambda q, k, v: cca_attention(
        q, k, v, group_size=16, window_size=64, impl="blocked"
    ).sum()
    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, x, x)
    largest = max(size for size, _ in _sizes(program.jaxpr))
    assert largest < length**2 / 16
    dense = lambda q, k, v: cca_attention(q, k, v, group_size=16, window_size=64, impl="dense")
    assert max(size for size, _ in _sizes(jax.make_jaxpr(dense)(x, x, x).jaxpr)) >= length**2


def _sizes(jaxpr):
    """(elements, shape) of every value in a program, inner programs too."""
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            yield math.prod(var.aval.shape), var.aval.shape
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _sizes(getattr(value, "jaxpr", value))


def _is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def apply(q, k, v, options, ids=None, **fields):
    mask = Mask(is_causal=True, q_segment_ids=ids, k_segment_ids=ids)
    ctx = AttentionContext(mask=mask, options=options, **fields)
    return VARIANTS["cca"].apply(None, q, k, v, ctx).z


@pytest.mark.parametrize(
    "sizes", ["context:4,model:2", pytest.param("data:2,context:2,model:2", marks=pytest.mark.slow)]
)
def test_a_mesh_changes_nothing(sizes):
    """Groups and documents that straddle devices, a halo over several of them."""
    q, k, v = arrays(4, 2, length=48)
    ids = jnp.asarray([[1] * 21 + [2] * 27, [0] * 5 + [3] * 43])
    options = CCAOptions(5, 14, impl="blocked")
    f = lambda q, k, v: jax.value_and_grad(
        lambda *a: (apply(*a, options, ids) ** 2).sum(), argnums=(0, 1, 2)
    )(q, k, v)
    single = jax.jit(f)(q, k, v)
    mesh = jh.parallel.make_mesh(sizes)
    with jax.set_mesh(mesh):
        spec = jax.NamedSharding(mesh, jax.P("data", "context", "model"))
        placed = [jax.device_put(x, spec) for x in (q, k, v)]
        compiled = jax.jit(f).lower(*placed).compile()
        split = compiled(*placed)
    chex.assert_trees_all_close(split, single, rtol=1e-5, atol=1e-5)


def test_a_split_sequence_gathers_cores_only():
    mesh = jh.parallel.make_mesh("context:8")
    with jax.set_mesh(mesh):
        spec = jax.NamedSharding(mesh, jax.P(None, "context"))
        x = jax.ShapeDtypeStruct((1, 512, 2, HEAD_DIM), jnp.float32, sharding=spec)
        options = CCAOptions(16, 32, impl="blocked")
        compiled = jax.jit(lambda q, k, v: apply(q, k, v, options)).lower(x, x, x).compile()
    found = analyze(compiled.as_text(), dict(mesh.shape)).collectives
    gathered = sum(c.payload_bytes for c in found if c.kind == "all-gather")
    cores = 2 * 32 * 2 * HEAD_DIM * 4
    assert cores <= gathered <= cores + 2 * 32 * 4  # and their indices and documents


@pytest.fixture(scope="module")
def decoder():
    """A trained model's parameters stand in dense; the variant is swapped in."""
    cfg = ModelConfig(vocab_size=40, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2)
    model = Decoder(cfg, rngs=nnx.Rngs(0))
    return with_config(model, attention="cca(group_size=4,window_size=6)+dense")


def test_cached_runs_of_a_decoder_equal_a_whole_one(decoder):
    tokens = np.random.default_rng(0).integers(0, 40, (2, 60))
    want = forward(decoder, tokens).logits
    cache, got = init_cache(decoder.cfg, 2, 60), []
    for start, stop in ((0, 30), (30, 60)):
        out = forward(decoder, tokens[:, start:stop], cache=cache)
        cache = out.cache
        got.append(out.logits)
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=2e-5)
    assert cache.k.shape[0] == 1 and cache.states[0].core_k.shape[2] == 15
    assert cache.states[0].window_k.shape[2] == 9


def test_generation_of_prompts_padded_on_the_left(decoder):
    tokens = np.random.default_rng(1).integers(0, 40, 30).tolist()
    prompts = [tokens, tokens[:19]]
    out = jh.generate(decoder, prompts, max_new_tokens=6)
    short = np.asarray(out[1])
    short = short[-25:]
    logits = forward(decoder, short[None, :-1]).logits[0]
    np.testing.assert_array_equal(short[19:], logits[18:].argmax(-1))


BAD = {
    "group_size=0 must be": {"group_size": 0},
    "window_size=2.5 must be": {"window_size": 2.5},
    "window_size=True must be": {"window_size": True},
    "pool_func='sum' is not one of": {"pool_func": "sum"},
    "gqa_pool='max' is not one of": {"gqa_pool": "max"},
    "boundary='open' is not one of": {"boundary": "open"},
    "rope='none' is not one of": {"rope": "none"},
    "impl='fast' is not one of": {"impl": "fast"},
    "needs positions": {"rope": "group_end"},
    r"needed \(43,\) or \(2, 43\)": {"rope": "group_end", "positions": jnp.arange(7)},
    "rows of 43 tokens": {"segment_ids": np.ones((2, 43), int)},
    r"needed \(2, 43\)": {"segment_ids": np.ones((2, 4), int)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options(message):
    q, k, v = arrays()
    with pytest.raises(ValueError, match=message):
        cca_attention(q, k, v, **{**SIZES, **BAD[message]})


def test_bad_shapes_and_caches():
    q, k, v = arrays()
    with pytest.raises(ValueError, match="H=3 query heads are not a multiple of K=2"):
        cca_attention(jnp.ones((2, LENGTH, 3, HEAD_DIM)), k, v, **SIZES)
    with pytest.raises(ValueError, match="q has 40 tokens and k 43"):
        cca_attention(q[:, :40], k, v, **SIZES)
    with pytest.raises(ValueError, match="begins at token 6, which is not a multiple"):
        ids = np.asarray([[1] * 6 + [2] * 34] * 2)
        cca_attention(q[:, :40], k[:, :40], v[:, :40], segment_ids=ids, **SIZES)
    cache = CCACache.init_cache(2, 60, 2, HEAD_DIM, **SIZES)
    with pytest.raises(ValueError, match="no room for 61 more"):
        cache.prefill(*arrays(length=61))
    with pytest.raises(ValueError, match="takes one token"):
        cache.decode_step(q, k, v)
    with pytest.raises(ValueError, match="do not fit the cache"):
        cache.prefill(q, k[:, :5], v)
    slots = cache.slots._replace(window_k=cache.slots.window_k[:, 1:])
    with pytest.raises(ValueError, match="8 exact tokens and window_size=6, group_size=4 need 9"):
        CCACache(slots, jnp.int32(0), cache.options, 60, 2).decode_step(
            q[:, :1], k[:, :1], v[:, :1]
        )
    x = jnp.ones((1, 12, 2, HEAD_DIM))
    with pytest.raises(NotImplementedError, match="cannot honour a soft cap"):
        apply(x, x, x, CCAOptions(4, 6), soft_cap=30.0)
    with pytest.raises(ValueError, match="this model has none"):
        apply(x, x, x, CCAOptions(4, 6, rope="group_end"))
