"""What every row of `attention.VARIANTS` must do; a new variant gets these tests for free."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention import (
    VARIANTS,
    AttentionContext,
    Mask,
    RopeConfig,
    inverse_frequencies,
    rotate,
)
from jaxheads.taps import Record, Tap, Taps

BATCH, LENGTH, HEAD_DIM = 2, 12, 8
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
INV_FREQ, _ = inverse_frequencies(RopeConfig(), HEAD_DIM)


def turn(x, positions):
    return rotate(x, positions, INV_FREQ, interleaved=False)


def config(num_heads=4, num_kv_heads=2):
    return types.SimpleNamespace(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM, model_dim=32
    )


def inputs(num_heads=4, num_kv_heads=2, dtype=jnp.float32, batch=BATCH, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    q = normal(batch, LENGTH, num_heads, HEAD_DIM)
    k, v = (normal(batch, LENGTH, num_kv_heads, HEAD_DIM) for _ in range(2))
    return q, k, v, normal(batch, LENGTH, 32)


def context(x, mask=None, **fields):
    defaults = {
        "mask": Mask(is_causal=True) if mask is None else mask,
        "q_positions": jnp.arange(LENGTH),
        "k_positions": jnp.arange(LENGTH),
        "rotate": turn,
        "x": x,
        "layer": jnp.int32(0),
    }
    return AttentionContext(**{**defaults, **fields})


def run(variant, q, k, v, x, mask=None, params=None, **fields):
    return variant.apply(params, q, k, v, context(x, mask, **fields)).z


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


@pytest.fixture
def params(variant):
    return variant.init(jax.random.key(0), config())


def naive(q, k, v, visible):
    """Softmax attention in float64 with rotated inputs: what `dense` computes."""
    q, k, v = (
        np.asarray(x, np.float64)
        for x in (turn(q, jnp.arange(LENGTH)), turn(k, jnp.arange(LENGTH)), v)
    )
    groups = q.shape[2] // k.shape[2]
    z = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, h in np.ndindex(*q.shape[:3]):
        keys = np.flatnonzero(visible[b, t])
        if keys.size:
            weights = np.exp(k[b, keys, h // groups] @ q[b, t, h] / np.sqrt(HEAD_DIM))
            z[b, t, h] = weights / weights.sum() @ v[b, keys, h // groups]
    return z


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_dtypes(variant, heads, dtype):
    q, k, v, x = inputs(*HEADS[heads], dtype=dtype)
    params = variant.init(jax.random.key(0), config(*HEADS[heads]))
    out = jax.eval_shape(lambda: variant.apply(params, q, k, v, context(x)))
    assert out.z.shape == q.shape and out.z.dtype == dtype
    if out.lse is not None:
        assert out.lse.shape == (BATCH, 4, LENGTH) and out.lse.dtype == jnp.float32
    assert all(value.shape == () for value in out.aux.values())


@pytest.mark.parametrize("heads", HEADS)
def test_dense_equals_the_formula(heads):
    q, k, v, x = inputs(*HEADS[heads])
    causal = np.tril(np.ones((LENGTH, LENGTH), bool))
    z = run(VARIANTS["dense"], q, k, v, x)
    np.testing.assert_allclose(z, naive(q, k, v, np.stack([causal] * BATCH)), atol=1e-5)


def test_kv_heads_are_shared_in_order(variant, params):
    """Grouped heads equal full heads with each kv head repeated G times."""
    q, k, v, x = inputs(4, 2)
    repeat = functools.partial(jnp.repeat, repeats=2, axis=2)
    grouped = run(variant, q, k, v, x, params=params)
    repeated = run(variant, q, repeat(k), repeat(v), x, params=params)
    np.testing.assert_allclose(grouped, repeated, atol=1e-5)


def test_no_leak_from_the_future(variant, params):
    """The gradient of position t with respect to later inputs is exactly zero."""
    q, k, v, x = inputs()

    def at(q, k, v):
        return run(variant, q, k, v, x, params=params)[:, 5].sum()

    dq, dk, dv = jax.jit(jax.grad(at, argnums=(0, 1, 2)))(q, k, v)
    for grad in (dq, dk, dv):
        assert (grad[:, 6:] == 0).all()
    assert (dk[:, :6] != 0).any() and (dv[:, :6] != 0).any()


def test_segments_do_not_see_each_other(variant, params):
    q, k, v, x = inputs()
    ids = jnp.asarray([[1] * 7 + [2] * 5] * BATCH)
    mask = Mask(is_causal=True, q_segment_ids=ids, k_segment_ids=ids)

    def second(q, k, v):
        return run(variant, q, k, v, x, mask, params=params)[:, 7:].sum()

    for grad in jax.jit(jax.grad(second, argnums=(0, 1, 2)))(q, k, v):
        assert (grad[:, :7] == 0).all()


def test_left_padding_changes_nothing(variant, params):
    """Padded on the left, with positions counted from the first token: the same outputs."""
    q, k, v, x = inputs()
    alone = run(variant, q, k, v, x, params=params)[:, : LENGTH - 3]
    shift = functools.partial(jnp.roll, shift=3, axis=1)
    positions = jnp.arange(LENGTH) - 3
    mask = Mask(is_causal=True, key_mask=jnp.tile(positions >= 0, (BATCH, 1)))
    fields = {"q_positions": positions, "k_positions": positions, "params": params}
    padded = run(variant, shift(q), shift(k), shift(v), shift(x), mask, **fields)
    np.testing.assert_allclose(padded[:, 3:], alone, atol=1e-5)


def test_a_row_that_sees_nothing_is_zero_with_zero_gradients(variant, params):
    q, k, v, x = inputs()
    mask = Mask(is_causal=True, key_mask=jnp.tile(jnp.arange(LENGTH) >= 4, (BATCH, 1)))
    f = lambda q, k, v: run(variant, q, k, v, x, mask, params=params)
    z = f(q, k, v)
    assert (z[:, :4] == 0).all() and jnp.isfinite(z).all()
    grads = jax.jit(jax.grad(lambda *a: f(*a).sum(), argnums=(0, 1, 2)))(q, k, v)
    chex.assert_tree_all_finite(grads)
    assert (grads[0][:, :4] == 0).all()


def test_a_head_mask_silences_one_head_only(variant, params):
    if not variant.supports.head_mask:
        pytest.skip("no per-head masks")
    q, k, v, x = inputs()
    visible = jnp.arange(4)[:, None, None] != 2
    z = run(variant, q, k, v, x, Mask(is_causal=True, head_mask=visible), params=params)
    free = run(variant, q, k, v, x, params=params)
    assert (z[:, :, 2] == 0).all()
    others = jnp.asarray([0, 1, 3])
    np.testing.assert_allclose(z[:, :, others], free[:, :, others], atol=1e-6)


def test_heads_commute(variant, params):
    """Permuting kv groups and the heads inside a group permutes the outputs."""
    if params is not None:
        pytest.skip("heads have parameters of their own")
    q, k, v, x = inputs(4, 2)
    heads, kv_heads = jnp.asarray([3, 2, 0, 1]), jnp.asarray([1, 0])
    permuted = run(variant, q[:, :, heads], k[:, :, kv_heads], v[:, :, kv_heads], x, params=params)
    np.testing.assert_allclose(
        permuted, run(variant, q, k, v, x, params=params)[:, :, heads], atol=1e-6
    )


def test_jit_equals_eager(variant, params):
    arguments = inputs()
    f = functools.partial(run, variant, params=params)
    np.testing.assert_allclose(jax.jit(f)(*arguments), f(*arguments), atol=1e-6)


def test_vmap_equals_a_loop(variant, params):
    many = [inputs(seed=seed) for seed in range(3)]
    f = jax.jit(functools.partial(run, variant, params=params))
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *many)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(f))(*stacked), jnp.stack([f(*a) for a in many]), atol=1e-5
    )


def test_gradients_are_finite_differences_in_float64(variant):
    with jax.enable_x64(True):
        params = variant.init(jax.random.key(0), config())
        q, k, v, x = inputs(dtype=jnp.float64, batch=1)
        weights = jnp.asarray(np.random.default_rng(9).normal(size=q.shape))
        f = jax.jit(lambda a: (run(variant, *a, x, params=params) * weights).sum())
        grads = jax.grad(f)((q, k, v))
        rng = np.random.default_rng(1)
        for i in range(3):
            step = [jnp.zeros_like(a) for a in (q, k, v)]
            step[i] = jnp.asarray(rng.normal(size=step[i].shape))
            ahead, behind = (
                f(tuple(a + sign * 1e-3 * d for a, d in zip((q, k, v), step, strict=True)))
                for sign in (1, -1)
            )
            # Scores and softmax are float32 by design: differences carry 1e-7 / 1e-3.
            measured = (ahead - behind) / 2e-3
            np.testing.assert_allclose((grads[i] * step[i]).sum(), measured, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1), (1, 4, 2)])
def test_sharded_equals_single(variant, params, sizes):
    q, k, v, x = inputs(4, 4, batch=8)
    f = lambda q, k, v, x: run(variant, q, k, v, x, params=params)
    grads = jax.jit(jax.value_and_grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1, 2)))
    single = grads(q, k, v, x)
    axes = ("data", "model", "context")
    types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh(sizes, axes, axis_types=types)
    heads = jax.sharding.NamedSharding(mesh, jax.P("data", "context", "model", None))
    tokens = jax.sharding.NamedSharding(mesh, jax.P("data", "context", None))
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, s) for a, s in zip((q, k, v, x), [heads] * 3 + [tokens], strict=True)
        ]
        sharded = grads(*placed)
    chex.assert_trees_all_close(sharded, single, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_close_to_float32(variant, params):
    arguments = inputs(dtype=jnp.bfloat16)
    z = run(variant, *arguments, params=params).astype(jnp.float32)
    exact = run(variant, *(a.astype(jnp.float32) for a in arguments), params=params)
    np.testing.assert_allclose(z, exact, rtol=2e-2, atol=2e-2)


def test_works_under_remat(variant, params):
    q, k, v, x = inputs()
    f = lambda q: (run(variant, q, k, v, x, params=params) ** 2).sum()
    plain, remat = jax.jit(jax.grad(f))(q), jax.jit(jax.grad(jax.checkpoint(f)))(q)
    np.testing.assert_allclose(remat, plain, rtol=1e-5, atol=1e-6)


def test_named_implementations_agree(variant, params):
    q, k, v, x = inputs()
    z = run(variant, q, k, v, x, params=params, implementation="dense")
    for name in {"blocked", "xla"} & set(variant.supports.implementations):
        other = run(variant, q, k, v, x, params=params, implementation=name)
        np.testing.assert_allclose(other, z, atol=1e-5)


def test_taps_it_promises_are_reached_and_right(variant, params):
    q, k, v, x = inputs()
    tap = Tap(Taps(record=tuple(Record(site) for site in sorted(variant.supports.taps))))
    out = variant.apply(params, q, k, v, context(x, tap=tap))
    seen = tap.finish(variant.name)
    assert set(seen) == variant.supports.taps
    if {"pattern", "lse"} <= set(seen):
        np.testing.assert_allclose(seen["pattern"].sum(-1), 1, atol=1e-5)
        assert seen["pattern"].shape == seen["scores"].shape == (BATCH, 4, LENGTH, LENGTH)
        again = jnp.exp(seen["scores"] - seen["lse"][..., None])
        np.testing.assert_allclose(again, seen["pattern"], atol=1e-5)
        values = jnp.repeat(v, 2, axis=2)
        z = jnp.einsum("bhts,bshd->bthd", seen["pattern"], values)
        z = z * seen["gates"][..., None] if "gates" in seen else z
        np.testing.assert_allclose(z, out.z, atol=1e-5)


def test_cached_keys_give_the_rows_of_the_full_forward(variant, params):
    """One query at slot 7 of a cache of 12, later slots hidden, equals row 7."""
    if not variant.supports.cached_decode:
        pytest.skip("no cached decoding")
    q, k, v, x = inputs()
    full = run(variant, q, k, v, x, params=params)
    rotated = variant.supports.caches_rotated_keys
    mask = Mask(is_causal=True, q_index=jnp.asarray([7]))
    one = run(
        variant,
        q[:, 7:8],
        turn(k, jnp.arange(LENGTH)) if rotated else k,
        v,
        x[:, 7:8],
        mask,
        params=params,
        q_positions=jnp.asarray([7]),
        k_is_rotated=rotated,
    )
    np.testing.assert_allclose(one, full[:, 7:8], atol=1e-5)


def test_no_rotation_taps_without_rotation(variant, params):
    q, k, v, x = inputs()
    tap = Tap(Taps(record=(Record("q_rot"),)))
    variant.apply(params, q, k, v, context(x, tap=tap, rotate=None))
    with pytest.raises(NotImplementedError, match="q_rot"):
        tap.finish(variant.name)


def test_cost_counts(variant):
    cost = variant.cost(config(), LENGTH, LENGTH, is_causal=False, itemsize=2)
    assert cost.flops > 0 and cost.bytes > 0 and cost.kv_cache_bytes > 0
    double = variant.cost(config(), 2 * LENGTH, 2 * LENGTH, is_causal=False, itemsize=2)
    assert double.kv_cache_bytes <= 2 * cost.kv_cache_bytes


def test_dense_cost_is_the_formula():
    cost = VARIANTS["dense"].cost(config(), 10, 10, itemsize=4)
    assert cost.flops == 4 * 10 * 10 * 4 * HEAD_DIM / 2
    assert cost.kv_cache_bytes == 2 * 10 * 2 * HEAD_DIM * 4
    assert VARIANTS["dense"].cost(config(), 1, 10).flops == 4 * 10 * 4 * HEAD_DIM


def test_table_keys_are_names():
    assert all(name == row.name for name, row in VARIANTS.items())
