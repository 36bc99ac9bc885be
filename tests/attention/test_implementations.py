"""Every implementation against the float64 formula: outputs, lse and all gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention import Mask, blocked_attention, dense_attention
from jaxheads.attention.contract import Request
from jaxheads.attention.kernels import splash_attention, xla_attention
from jaxheads.taps import NO_TAP
from tests.attention.cases import CASES, make_case
from tests.attention.naive import naive_value_and_grads, value_and_grads


@functools.cache
def expected(name):
    return naive_value_and_grads(*make_case(name))


def make_request(arrays, mask, scale, soft_cap, platform="cpu"):
    fields = {"bias": None, "sinks": None, "alibi_slopes": None, **arrays}
    return Request(
        mask=mask,
        scale=scale,
        soft_cap=soft_cap,
        tap=NO_TAP,
        needs_lse=False,
        platform=platform,
        **fields,
    )


PURE = {
    "dense": dense_attention,
    "blocked": functools.partial(blocked_attention, block_q=8, block_k=4),
}


@pytest.mark.parametrize("implementation", PURE)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_the_formula(name, implementation):
    arrays, mask, scale, soft_cap, dz, dlse = make_case(name)
    run = lambda x: PURE[implementation](mask=mask, scale=scale, soft_cap=soft_cap, **x)
    got = value_and_grads(run, arrays, dz, dlse)
    chex.assert_trees_all_close(got, expected(name), rtol=1e-5, atol=1e-5)


FITS_XLA = [
    "causal mqa",
    "window",
    "two-sided window",
    "left padding",
    "bias per head",
    "alibi",
    "cache",
]


@pytest.mark.parametrize("name", FITS_XLA)
def test_xla_equals_the_formula(name):
    arrays, mask, scale, soft_cap, dz, dlse = make_case(name)
    run = lambda x: xla_attention(make_request(x, mask, scale, soft_cap))
    (z, _), grads = value_and_grads(run, arrays, dz, 0 * dlse)
    arguments = (arrays, mask, scale, soft_cap, dz, 0 * dlse)
    (naive_z, _), naive_grads = naive_value_and_grads(*arguments)
    chex.assert_trees_all_close((z, grads), (naive_z, naive_grads), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", PURE.values(), ids=PURE)
def test_a_row_that_sees_nothing_gives_zeros_and_zero_gradients(run):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 6, 2, 4)), jnp.float32) for _ in range(3))
    mask = Mask(is_causal=True, key_mask=jnp.arange(6)[None] >= 2)
    z, lse = jax.jit(lambda *x: run(*x, mask, scale=0.5))(q, k, v)
    assert (z[:, :2] == 0).all() and (z[:, 2:] != 0).all()
    assert jnp.isneginf(lse[..., :2]).all() and jnp.isfinite(lse[..., 2:]).all()
    grads = jax.jit(jax.grad(lambda x: run(*x, mask, scale=0.5)[0].sum()))((q, k, v))
    chex.assert_tree_all_finite(grads)
    assert (grads[0][:, :2] == 0).all()
    assert (grads[1][:, :2] == 0).all() and (grads[2][:, :2] == 0).all()


@pytest.mark.parametrize("run", PURE.values(), ids=PURE)
def test_large_scores_do_not_overflow(run):
    q = jnp.full((1, 4, 1, 2), 1e4)
    z, lse = run(q, q, jnp.ones((1, 4, 1, 3)), Mask(is_causal=True), scale=1.0)
    np.testing.assert_allclose(z, np.ones((1, 4, 1, 3)), rtol=1e-6)
    np.testing.assert_allclose(lse[0, 0], 2e8 + np.log([1, 2, 3, 4]), rtol=1e-6)


@pytest.mark.parametrize("run", PURE.values(), ids=PURE)
def test_works_inside_shard_map_with_replicated_sinks(run):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(4, 9, 2, 4)), jnp.float32) for _ in range(3))
    sinks = jnp.asarray([0.3, -1.0])

    def loss(q, k, v, sinks):
        z, lse = run(q, k, v, Mask(is_causal=True), scale=0.5, sinks=sinks)
        return (z**2).sum(axis=(1, 2, 3)) + lse.sum(axis=(1, 2))

    P = jax.P
    sharded = jax.shard_map(
        loss, mesh=mesh, in_specs=(P("data"), P("data"), P("data"), P()), out_specs=P("data")
    )
    grad = lambda f: jax.jit(jax.grad(lambda x: f(*x).sum()))((q, k, v, sinks))
    chex.assert_trees_all_close(grad(sharded), grad(loss), rtol=1e-5, atol=1e-5)


def test_dense_has_forward_mode():
    rng = np.random.default_rng(0)
    q, dq = (jnp.asarray(rng.normal(size=(1, 5, 2, 4)), jnp.float32) for _ in range(2))
    f = jax.jit(lambda q: dense_attention(q, q, q, Mask(is_causal=True), scale=0.5)[0].sum())
    _, forward = jax.jvp(f, (q,), (dq,))
    np.testing.assert_allclose(forward, (jax.grad(f)(q) * dq).sum(), rtol=1e-5)


SPLASH = {
    "causal": ({"is_causal": True}, {}),
    "bidirectional": ({}, {}),
    "window": ({"is_causal": True, "window": 100}, {}),
    "two-sided window": ({"window": 100}, {}),
    "segments": ({"is_causal": True, "q_segment_ids": "segments"}, {}),
    "left padding, soft cap": ({"is_causal": True, "key_mask": "padding"}, {"soft_cap": 2.0}),
    "segments and padding": ({"q_segment_ids": "segments", "key_mask": "padding"}, {}),
    "sinks": ({"is_causal": True}, {"sinks": True}),
}


FAST_SPLASH = ("window", "segments and padding", "sinks")


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST_SPLASH else pytest.param(name, marks=pytest.mark.slow)
        for name in SPLASH
    ],
)
def test_splash_equals_dense_in_the_kernel_interpreter(name):
    fields, options = SPLASH[name]
    rng = np.random.default_rng(0)
    length = 256
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    arrays = {"q": normal(2, length, 2, 16), "k": normal(2, length, 1, 16)}
    arrays["v"] = normal(2, length, 1, 16)
    if options.get("sinks"):
        arrays["sinks"] = normal(2)
    ids = np.array([[1] * 100 + [2] * 120 + [0] * 36, [1] * 256])
    padding = np.arange(length)[None] >= np.array([[40], [0]])
    values = {"segments": jnp.asarray(ids), "padding": jnp.asarray(padding)}
    mask = Mask(**{key: values.get(value, value) for key, value in fields.items()})
    soft_cap, dz = options.get("soft_cap"), normal(2, length, 2, 16)

    splash = lambda x: splash_attention(make_request(x, mask, 0.25, soft_cap))
    dense = lambda x: dense_attention(mask=mask, scale=0.25, soft_cap=soft_cap, **x)
    (z, _), grads = value_and_grads(splash, arrays, dz, 0.0)
    (dense_z, _), dense_grads = value_and_grads(dense, arrays, dz, 0.0)
    chex.assert_trees_all_close((z, grads), (dense_z, dense_grads), rtol=1e-4, atol=1e-4)
