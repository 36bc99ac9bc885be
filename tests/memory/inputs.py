"""Inputs of the memory's tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.memory import init_memory

FAST_COMPILE = {"xla_backend_optimization_level": 0}
"""Tests run programs once: compiling is what they spend their time on."""


def assert_close(got, want, tolerance):
    """Every array within `tolerance` of its own largest element (at least of 1)."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for x, y in zip(got, want):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1.0, np.abs(y).max()))


def unit(x):
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)


def tokens(length, *, depth=2, batch=2, heads=2, dim=4, dtype=jnp.float32, layers=None, seed=0):
    """(k, v, q, theta, eta, alpha, params) with keys and queries of unit length."""
    keys = jax.random.split(jax.random.key(seed), 7)
    shape = (batch, length, heads, dim)
    k, v, q = (jax.random.normal(key, shape, dtype) for key in keys[:3])
    gates = shape[:3] if layers is None else (*shape[:3], layers)
    theta, eta, alpha = (jax.random.uniform(key, gates, dtype) for key in keys[3:6])
    params = [w.astype(dtype) for w in init_memory(keys[6], heads, dim, depth)]
    return unit(k), v, unit(q), 0.2 * theta, eta, alpha, params
