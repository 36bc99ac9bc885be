"""The three evaluations of the memory agree with each other and with the definition."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.memory import init_memory, init_state, memory_step, neural_memory, run_memory
from tests.memory import reference
from tests.memory.inputs import FAST_COMPILE, assert_close, tokens

LENGTH = 19  # divides by none of the chunks but 1 and itself


@functools.lru_cache
def gradients_of(impl, **options):
    """A jitted function of all inputs: a scalar of outputs and end state, with its gradients."""

    def scalar(*args):
        y, state = neural_memory(*args, impl=impl, **options)
        ends = jax.tree.leaves((state.weights, state.momentum, state.ref_weights))
        total = jnp.sum(jnp.sin(y)) + sum(jnp.sum(jnp.cos(x)) for x in ends)
        return total, (y, state)

    run = jax.value_and_grad(scalar, argnums=tuple(range(7)), has_aux=True)
    return jax.jit(run, compiler_options=FAST_COMPILE)


def error(got, want):
    """The largest difference, as a share of the largest element (at least of 1)."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.abs(got - want).max() / max(1.0, np.abs(want).max())


CHUNKS = (1, 4, 16, LENGTH)
GRID = [(chunk, depth, norm) for depth in (1, 2, 3) for norm in (False, True) for chunk in CHUNKS]
QUICK = {(4, 2, True), (LENGTH, 1, False)}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in GRID], ids=str
)
def test_dual_scan_and_loop_agree(case):
    """Outputs, end states and all outer gradients, in float64 and in float32.

    The norm of a small vector amplifies rounding, and the loop in float32 is then itself off by
    more than a thousandth: no more is asked of the chunks than of the definition.
    """
    chunk, depth, residual_norm = case
    run = lambda impl, args: gradients_of(impl, chunk=chunk, residual_norm=residual_norm)(*args)
    with jax.enable_x64(True):
        args = tokens(LENGTH, depth=depth, dtype=jnp.float64)
        exact = run("naive", args)
        assert_close(run("dual", args), exact, 1e-10)
        assert_close(run("scan", args), exact, 1e-10)
        low = jax.tree.map(lambda x: x.astype(jnp.float32), args)
    got, loop = run("dual", low), run("naive", low)
    if not residual_norm:
        assert_close(got, loop, 1e-5)
        return
    with jax.enable_x64(True):
        exact = jax.device_get(run("naive", jax.tree.map(lambda x: x.astype(jnp.float64), low)))
    for ours, literal, true in zip(*map(jax.tree.leaves, (got, loop, exact)), strict=True):
        assert_close(ours, true, max(1e-3, 4 * error(literal, true)))


@pytest.mark.parametrize("loss", ["half", "sum", "mean"])
@pytest.mark.parametrize("read", ["post", "pre"])
@pytest.mark.parametrize(("depth", "residual_norm", "layers"), [(1, 0, None), (2, 1, 2), (4, 1, 4)])
def test_dual_is_the_definition(loss, read, depth, residual_norm, layers):
    """Against numpy in float64 with hand-written backpropagation."""
    options = dict(chunk=5, loss=loss, read=read, residual_norm=bool(residual_norm))
    with jax.enable_x64(True):
        args = tokens(13, depth=depth, dtype=jnp.float64, layers=layers)
        y, state = neural_memory(*args, **options)
        expected, ends = reference.titans(*args, **options)
        np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-10)
        for got, want in zip((state.weights, state.momentum, state.ref_weights), ends):
            chex.assert_trees_all_close(got, want, rtol=1e-9, atol=1e-10)
    assert state.offset.tolist() == [3, 3]


@pytest.mark.parametrize("read", ["post", pytest.param("pre", marks=pytest.mark.slow)])
def test_options_agree_over_the_evaluations(read):
    """Limits, channel decay, padding and documents: dual = scan = loop with gradients."""
    with jax.enable_x64(True):
        args = tokens(LENGTH, depth=2, dtype=jnp.float64, layers=2)
        draw = lambda seed, shape: jax.random.uniform(jax.random.key(seed), shape)
        options = dict(
            chunk=6,
            read=read,
            max_grad_norm=0.5,
            channel_alpha=draw(1, args[0].shape),
            mask=draw(2, (2, LENGTH)) < 0.7,
            reset=draw(3, (2, LENGTH)) < 0.2,
        )

        def run(impl):
            def scalar(*args):
                out = run_memory(*args, impl=impl, **options)
                ends = jax.tree.leaves((out.state.weights, out.state.ref_weights))
                return jnp.sum(jnp.sin(out.y)) + sum(map(jnp.sum, ends)), out

            grad = jax.value_and_grad(scalar, argnums=tuple(range(7)), has_aux=True)
            return jax.jit(grad, compiler_options=FAST_COMPILE)(*args)

        naive = run("naive")
        assert_close(run("dual"), naive, 1e-10)
        assert_close(run("scan"), naive, 1e-10)


@pytest.mark.parametrize("impl", ["dual", "scan", "naive"])
def test_gates_of_exactly_0_and_1_have_exact_values_and_gradients(impl):
    with jax.enable_x64(True):
        *vectors, theta, eta, alpha, params = tokens(LENGTH, dtype=jnp.float64)
        pattern = jnp.arange(LENGTH)[None, :, None]
        eta = jnp.where(pattern % 3 == 0, 0.0, jnp.where(pattern % 5 == 0, 1.0, eta))
        alpha = jnp.where(pattern % 4 == 1, 1.0, jnp.where(pattern % 4 == 2, 0.0, alpha))
        theta = jnp.where(pattern % 7 == 0, 0.0, theta)
        args = (*vectors, theta, eta, alpha, params)
        options = dict(chunk=8, residual_norm=False)
        (_, (y, _)), grads = gradients_of(impl, **options)(*args)
        expected, _ = reference.titans(*args, **options)
        np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)
        naive = gradients_of("naive", **options)(*args)[1]
        assert_close(grads, naive, 1e-10)


def test_a_gradient_is_a_finite_difference():
    with jax.enable_x64(True):
        args = tokens(11, batch=1, heads=1, dtype=jnp.float64)
        scalar = lambda *a: jnp.sum(jnp.sin(neural_memory(*a, chunk=4)[0]))
        flat, unravel = jax.flatten_util.ravel_pytree(args)
        f = jax.jit(lambda x: scalar(*unravel(x)))
        direction = jax.random.normal(jax.random.key(9), flat.shape)
        slope = jnp.vdot(jax.jit(jax.grad(f))(flat), direction)
        step = 1e-6
        difference = (f(flat + step * direction) - f(flat - step * direction)) / (2 * step)
        np.testing.assert_allclose(slope, difference, rtol=1e-6)


def test_the_delta_rule_is_a_limit():
    """alpha = eta = 0, one layer, chunk 1: W <- W + theta k^T (v - k W)."""
    with jax.enable_x64(True):
        k, v, q, theta, *_, params = tokens(9, depth=1, dtype=jnp.float64)
        zero = jnp.zeros_like(theta)
        y, _ = neural_memory(k, v, q, theta, zero, zero, params, chunk=1, residual_norm=False)
        for row in range(2):
            for head in range(2):
                w = np.array(params[0][head])
                for t in range(9):
                    key, value = k[row, t, head], v[row, t, head]
                    w = w + theta[row, t, head] * np.outer(key, value - key @ w)
                    np.testing.assert_allclose(y[row, t, head], q[row, t, head] @ w, rtol=1e-10)


def test_causal_linear_attention_is_a_limit():
    """chunk = T, one layer, M_0 = 0, eta = alpha = 0, theta = 1: y_t = sum_{i<=t} (q k_i) v_i."""
    with jax.enable_x64(True):
        k, v, q, theta, *_, params = tokens(9, depth=1, dtype=jnp.float64)
        zero, one = jnp.zeros_like(theta), jnp.ones_like(theta)
        params = [jnp.zeros_like(params[0])]
        y, _ = neural_memory(k, v, q, one, zero, zero, params, chunk=9, residual_norm=False)
        scores = np.einsum("bthd,bshd->bhts", q, k) * np.tri(9)
        np.testing.assert_allclose(y, np.einsum("bhts,bshd->bthd", scores, v), atol=1e-12)


def test_no_step_and_no_forgetting_freeze_the_memory():
    k, v, q, theta, eta, _, params = tokens(21)
    zero = jnp.zeros_like(theta)
    y, state = neural_memory(k, v, q, zero, eta, zero, params, chunk=8)
    chex.assert_trees_all_equal(state.weights, init_state(params, 2).weights)
    frozen = reference.titans(k, v, q, zero, eta, zero, params, chunk=8)[0]
    np.testing.assert_allclose(y, frozen, atol=2e-5)


def test_later_tokens_change_nothing_before_them():
    args = tokens(21)
    run = jax.jit(functools.partial(neural_memory, chunk=8))
    y, _ = run(*args)
    for place in range(6):
        changed = list(args)
        changed[place] = changed[place].at[:, 13].add(0.3)
        z, _ = run(*changed)
        assert jnp.array_equal(y[:, :13], z[:, :13])
        if place != 4:  # the momentum of the last token of a state without momentum may not matter
            assert not jnp.array_equal(y[:, 13:], z[:, 13:])


@pytest.mark.slow
def test_stopping_inner_gradients_changes_gradients_only():
    args = tokens(LENGTH, batch=1)
    full = gradients_of("dual", chunk=4)(*args)
    with jax.enable_x64(True):
        wide = tokens(LENGTH, batch=1, dtype=jnp.float64)
        run = lambda impl: gradients_of(impl, chunk=4, stop_inner_grad=True)(*wide)
        assert_close(run("dual"), run("naive"), 1e-10)
        assert_close(run("scan"), run("naive"), 1e-10)
    stopped = gradients_of("dual", chunk=4, stop_inner_grad=True)(*args)
    chex.assert_trees_all_close(full[0], stopped[0], rtol=1e-6)
    assert float(jnp.abs(stopped[1][0]).max()) == 0  # keys
    assert float(jnp.abs(stopped[1][1]).max()) == 0  # values
    assert float(jnp.abs(full[1][0]).max()) > 0
    assert float(jnp.abs(stopped[1][3]).max()) > 0  # step sizes still learn


def test_a_limit_on_the_gradient_bounds_the_write():
    k, v, q, theta, *_, params = tokens(1)
    zero = jnp.zeros_like(theta)
    v = 1e4 * v
    start = init_state(params, 2)
    _, state = neural_memory(
        k, v, q, zero + 1, zero, zero, params, max_grad_norm=0.5, residual_norm=False
    )
    moved = [new - old for new, old in zip(state.weights, start.weights)]
    norms = jnp.sqrt(sum(jnp.sum(m * m, axis=(-1, -2)) for m in moved))
    np.testing.assert_allclose(norms, 0.5, rtol=1e-3)
    free = run_memory(k, v, q, theta, zero, zero, params, residual_norm=False)
    assert float(free.surprise.min()) > 100


def test_surprise_is_the_norm_of_the_gradient():
    args = tokens(7, batch=1, heads=1)
    out = run_memory(*args, chunk=1, residual_norm=True)
    start = [np.asarray(w[0], np.float64) for w in args[-1]]
    first = reference.gradient(
        start,
        *np.asarray(args[0][0, 0, :1], np.float64),
        *np.asarray(args[1][0, 0, :1], np.float64),
        True,
        "half",
    )
    norm = np.sqrt(sum(np.sum(g * g) for g in first))
    np.testing.assert_allclose(out.surprise[0, 0, 0], norm, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_inner_loop_is_float32_whatever_comes_in(dtype):
    args = tokens(33)
    low = [x.astype(dtype) for x in args[:6]]
    y, state = neural_memory(*low, args[-1])
    assert y.dtype == dtype
    assert {x.dtype for x in jax.tree.leaves(state[:3])} == {jnp.dtype("float32")}
    exact, end = neural_memory(*(x.astype(jnp.float32) for x in low), args[-1])
    chex.assert_trees_all_equal(state, end)
    assert jnp.array_equal(y, exact.astype(dtype))


def test_vmap_over_rows_and_jit_give_the_same():
    with jax.enable_x64(True):
        args = tokens(LENGTH, dtype=jnp.float64)
        y, state = neural_memory(*args)
        one = lambda *a: neural_memory(*(x[None] for x in a), args[-1])
        z, each = jax.jit(jax.vmap(one))(*args[:6])
        np.testing.assert_allclose(z[:, 0], y, rtol=1e-9, atol=1e-10)
        each = jax.tree.map(lambda x: x[:, 0], each)
        chex.assert_trees_all_close(each, state, rtol=1e-9, atol=1e-10)


def test_init_is_xavier_per_head():
    w1, w2 = init_memory(jax.random.key(0), 3, 16, 2, 4)
    assert (w1.shape, w2.shape) == ((3, 16, 64), (3, 64, 16))
    limit = np.sqrt(6 / 80)
    assert 0.95 * limit < float(jnp.abs(w1).max()) <= limit
    np.testing.assert_allclose(w1.std(), limit / np.sqrt(3), rtol=0.05)
    assert not jnp.array_equal(w1[0], w1[1])
    assert [w.shape for w in init_memory(jax.random.key(0), 3, 16, 1)] == [(3, 16, 16)]


def test_a_step_is_one_token_of_a_pass():
    with jax.enable_x64(True):
        args = tokens(20, dtype=jnp.float64)
        y, end = neural_memory(*args, chunk=8)
        state = init_state(args[-1], 2)
        step = jax.jit(functools.partial(memory_step, chunk=8))
        for t in range(20):
            z, state = step(state, *(x[:, t] for x in args[:6]))
            np.testing.assert_allclose(z, y[:, t], rtol=1e-9, atol=1e-10)
        chex.assert_trees_all_close(state, end, rtol=1e-9, atol=1e-10)
