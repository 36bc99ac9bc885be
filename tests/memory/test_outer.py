"""The limit on derivatives: exact where it does not bind, a bound where it does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.memory import neural_memory
from tests.memory.inputs import FAST_COMPILE, assert_close, tokens


def gradients(args, growth, *, chunk=4, **options):
    """Of a scalar of outputs and end state, with respect to k, v, q, the gates and `M_0`."""

    def scalar(*args):
        y, end = neural_memory(*args, chunk=chunk, max_outer_growth=growth, **options)
        return jnp.sum(jnp.sin(y)) + sum(jnp.sum(jnp.cos(w)) for w in end.weights)

    run = jax.grad(scalar, argnums=tuple(range(7)))
    return jax.jit(run, compiler_options=FAST_COMPILE)(*args)


BOTH = [False, pytest.param(True, marks=pytest.mark.slow)]


@pytest.mark.parametrize("moved", BOTH, ids=["whole chunks", "slots"])
def test_a_wide_limit_changes_nothing(moved):
    args = tokens(14, depth=2)
    mask = jnp.arange(14) != 5
    reset = jnp.arange(14) == 9
    rows = lambda x: jnp.broadcast_to(x, (2, 14))
    options = dict(mask=rows(mask), reset=rows(reset)) if moved else {}
    assert_close(gradients(args, 1e9, **options), gradients(args, None, **options), 1e-6)


@pytest.mark.parametrize("moved", BOTH, ids=["whole chunks", "slots"])
def test_the_limit_bounds_what_goes_back(moved):
    """Many chunks of a deep memory that forgets: huge without the limit, bounded with it."""
    k, v, q, theta, eta, alpha, params = tokens(256, depth=4, batch=1, heads=1)
    args = k, v, q, 0 * theta + 0.3, 0 * eta + 0.5, 0 * alpha + 0.05, params
    options = dict(mask=jnp.ones((1, 256), bool)) if moved else {}
    norm = lambda grads: float(jnp.sqrt(sum(jnp.sum(jnp.square(w)) for w in grads[-1])))
    free = norm(gradients(args, None, chunk=16, max_grad_norm=1.0, **options))
    held = [norm(gradients(args, g, chunk=16, max_grad_norm=1.0, **options)) for g in (4.0, 1.0)]
    assert free > 1e6
    assert 0 < held[1] < held[0] < 5000


@pytest.mark.slow
def test_the_last_reads_are_exact_when_earlier_chunks_are_limited():
    """The derivative of a query is local; of what is asked of the end state nothing is lost."""
    args = tokens(12, depth=2)
    tight, free = gradients(args, 1e-3), gradients(args, None)
    queries = 2
    np.testing.assert_allclose(tight[queries], free[queries], rtol=1e-5, atol=1e-6)
    values = 1  # the last chunk's writes meet no limit on their way
    np.testing.assert_allclose(tight[values][:, -4:], free[values][:, -4:], rtol=1e-5, atol=1e-6)
    assert np.abs(tight[values][:, :4] - free[values][:, :4]).max() > 1e-4


@pytest.mark.parametrize(("growth", "impl"), [(0.0, "dual"), (-1.0, "dual"), (4.0, "naive")])
def test_bad_limits(growth, impl):
    with pytest.raises((ValueError, NotImplementedError), match="max_outer_growth"):
        neural_memory(*tokens(4), chunk=2, max_outer_growth=growth, impl=impl)
