"""A sequence split over eight devices gives what one device gives, with gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import P

from jaxheads.memory import neural_memory
from jaxheads.memory.sequence import gathered_linear_memory, pipeline_cost, pipelined_memory
from jaxheads.parallel import make_mesh
from tests.memory.inputs import FAST_COMPILE, assert_close, tokens


def split_run(function, spec, args, **options):
    """Outputs, end weights and gradients with the sequence over the axis `context`."""
    mesh = make_mesh(spec)
    rows, heads = P("data", "context", "model"), P("data", "model")

    def local(k, v, q, theta, eta, alpha, params):
        out = function(k, v, q, theta, eta, alpha, params, axis_name="context", **options)
        return out.y, out.state.weights, out.state.momentum

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(*[rows] * 6, P("model")),
        out_specs=(rows, heads, heads),
    )
    return compared(sharded, args)


def compared(run, args):
    def scalar(*args):
        out = run(*args)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(out)), out

    grad = jax.value_and_grad(scalar, argnums=tuple(range(7)), has_aux=True)
    return jax.jit(grad, compiler_options=FAST_COMPILE)(*args)


def whole(args, **options):
    def run(*args):
        y, state = neural_memory(*args, **options)
        return y, state.weights, state.momentum

    return compared(run, args)


@pytest.mark.parametrize(
    ("spec", "microbatches"),
    [
        ("context:8", 2),
        pytest.param("data:2,context:2,model:2", 1, marks=pytest.mark.slow),
        pytest.param("context:4", 3, marks=pytest.mark.slow),
    ],
)
def test_pipelined_shards_equal_one_device(spec, microbatches):
    """Microbatches of rows, one microbatch with rows and heads sharded too, and of heads."""
    heads = 3 if microbatches == 3 else 2
    with jax.enable_x64(True):
        args = tokens(32, heads=heads, dtype=jnp.float64)
        got = split_run(pipelined_memory, spec, args, chunk=4, num_microbatches=microbatches)
        assert_close(got, whole(args, chunk=4), 1e-10)


def test_shards_of_a_linear_memory_work_at_once():
    with jax.enable_x64(True):
        args = tokens(32, depth=1, dtype=jnp.float64)
        got = split_run(gathered_linear_memory, "context:8", args)
        assert_close(got, whole(args, chunk=4, residual_norm=False), 1e-10)


@pytest.mark.parametrize("loss", ["half", "mean"])
def test_the_associative_form_is_the_dual_form(loss):
    with jax.enable_x64(True):
        args = tokens(29, depth=1, dtype=jnp.float64)
        run = functools.partial(whole, args, chunk=4, residual_norm=False, loss=loss)
        assert_close(run(impl="associative"), run(impl="dual"), 1e-10)


def test_what_cannot_be_split_says_so():
    args = tokens(32)
    with pytest.raises(ValueError, match="multiple of chunk=16"):
        split_run(pipelined_memory, "context:4", args, chunk=16, num_microbatches=1)
    with pytest.raises(ValueError, match="divides neither the 2 rows nor the 2 heads"):
        split_run(pipelined_memory, "context:4", args, chunk=8, num_microbatches=3)
    with pytest.raises(NotImplementedError, match="depth=2"):
        split_run(gathered_linear_memory, "context:4", args)
    with pytest.raises(NotImplementedError, match="residual_norm=True"):
        neural_memory(*tokens(32, depth=1), impl="associative")


def test_the_cost_model_counts_steps_and_bytes():
    params = tokens(1, depth=2, heads=2, dim=4)[-1]
    cost = pipeline_cost(params, batch_size=8, num_shards=4, num_microbatches=8)
    assert cost.steps == 11
    assert cost.speedup == pytest.approx(4 * 8 / 11)
    assert cost.state_bytes == 2 * 4 * sum(w.size for w in params)
