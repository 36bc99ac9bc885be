"""Weights inside the layer scan: cast a layer at a time, differentiated as if cast before."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import parallel
from jaxheads.models import forward
from jaxheads.models.decoder import with_config
from tests.training.cases import TINY, random_model

MIXED = dataclasses.replace(TINY, compute_dtype="bfloat16", remat="full")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 16)))


def loss(model):
    return jnp.mean(jnp.square(forward(model, TOKENS).logits))


def cast_matrices(model):
    """The stacked matrices of the layers in bfloat16, everything else as it is."""
    layers = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.ndim > 2 else a, model.layers)
    new = with_config(model)
    new.layers = layers
    return new


@pytest.mark.parametrize(
    "remat",
    ["full", *(pytest.param(r, marks=pytest.mark.slow) for r in ("none", "dots", "names:z"))],
)
def test_gradients_are_those_of_weights_cast_before_the_scan(remat):
    model = with_config(random_model(MIXED), remat=remat)
    value, grads = jax.jit(jax.value_and_grad(loss))(model)
    want_value, want = jax.jit(jax.value_and_grad(loss))(cast_matrices(model))
    assert value == want_value
    for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(want)):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, wanted.astype(jnp.float32))


@pytest.mark.slow
def test_forward_mode_and_second_derivatives_reach_the_weights():
    """Along a direction, forward mode = reverse mode; and of the gradient, = a difference."""
    model = random_model(dataclasses.replace(MIXED, implementation="dense"))
    r = np.random.default_rng(1)
    along = jax.tree.map(lambda a: jnp.asarray(r.normal(size=a.shape), a.dtype), model)
    dot = lambda a, b: sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
    forward_mode = jax.jvp(loss, (model,), (along,))[1]
    reverse_mode = dot(jax.grad(loss)(model), along)
    np.testing.assert_allclose(forward_mode, reverse_mode, rtol=2e-2)

    slope = lambda m: dot(jax.grad(loss)(m), along)
    second = jax.jvp(slope, (model,), (along,))[1]
    twice = jax.jvp(lambda m: jax.jvp(loss, (m,), (along,))[1], (model,), (along,))[1]
    assert abs(second) > 0
    np.testing.assert_allclose(second, twice, rtol=5e-2)


@pytest.mark.parametrize("unroll", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_unrolled_layers_compute_the_same(unroll):
    model = random_model(dataclasses.replace(TINY, num_layers=6))
    want, want_grads = jax.value_and_grad(loss)(model)
    got, grads = jax.value_and_grad(loss)(with_config(model, scan_unroll=unroll))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_no_device_holds_the_whole_embedding_table():
    """Neither for the lookup nor for its gradient."""
    cfg = dataclasses.replace(TINY, vocab_size=96, tie_embeddings=False)
    mesh = parallel.make_mesh("data:2,fsdp:4")
    model = parallel.shard(random_model(cfg), mesh)
    tokens = jax.device_put(
        jnp.zeros((8, 16), jnp.int32), jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    )
    hidden = lambda m: jnp.sum(jnp.square(forward(m, tokens).hidden))
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(hidden)).lower(model).compile()
    shapes = set(re.findall(r"\[([\d,]+)\]", compiled.as_text()))
    assert "96,8" in shapes  # a device's columns
    assert "96,32" not in shapes
