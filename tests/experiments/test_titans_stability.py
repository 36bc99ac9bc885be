"""Training through a deep memory at the default settings stays finite; without them it does not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import titans_stability

SMALL = dict(width=8, chunk=16)


@pytest.mark.slow
def test_defaults_stay_finite_and_learn():
    run = titans_stability.train(0, steps=60, length=256, arm="default", **SMALL)
    loss, grad, largest = map(np.asarray, run)
    assert np.isfinite(loss).all() and np.isfinite(grad).all() and np.isfinite(largest).all()
    assert loss[-5:].mean() < loss[0] - 0.2
    assert grad.max() < 100


@pytest.mark.slow
def test_the_limit_is_what_keeps_the_outer_gradient_finite():
    """At 1,024 tokens one gradient overflows without it, though the loss is finite."""
    params = titans_stability.init(jax.random.key(0), 8)
    tokens = titans_stability.batch(jax.random.key(1), 1024)

    def gradient(arm):
        settings = titans_stability.ARMS[arm]
        loss = lambda p: titans_stability.loss_fn(p, tokens, chunk=16, **settings)
        (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        leaves = jax.tree.leaves(grads)
        return value, jnp.sqrt(sum(jnp.sum(g * g) for g in leaves))

    value, norm = gradient("no limit")
    assert jnp.isfinite(value) and not norm < 1e6
    value, norm = gradient("default")
    assert jnp.isfinite(value) and norm < 10


@pytest.mark.slow
def test_a_plain_memory_with_a_step_of_one_breaks():
    run = titans_stability.train(
        0, steps=5, length=256, arm="no limit, plain, theta_max=1", **SMALL
    )
    assert not np.isfinite(np.asarray(run[0])).all()
