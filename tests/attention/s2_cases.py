"""S2 attention written to be obvious, for kernels to be compared with."""

import jax
import jax.numpy as jnp
import numpy as np


def arrays_of(pattern, length, head_dim, batch=1, seed=0):
    """q, k, v and the cotangents of z and lse, float64 numpy."""
    rng = np.random.default_rng(seed)
    heads, kv_heads = pattern.num_heads, pattern.kv_heads
    shapes = [(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [rng.standard_normal(s) for s in (*shapes, (batch, heads, length))]


def naive_s2(q, k, v, dz, dlse, pattern, scale):
    """z, lse and the gradients of sum(z dz) + sum(lse dlse), float64, from the token mask."""
    group = pattern.num_heads // pattern.kv_heads
    seen = pattern.token_mask(q.shape[1])

    def loss(q, k, v):
        k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
        weights = jnp.where(seen, jnp.exp(scale * jnp.einsum("bthd,bshd->bhts", q, k)), 0.0)
        total = weights.sum(-1)
        z = jnp.einsum("bhts,bshd->bthd", weights / total[..., None], v)
        lse = jnp.log(total)
        return (z * dz).sum() + (lse * dlse).sum(), (z, lse)

    with jax.enable_x64():
        inputs = [jnp.asarray(x, jnp.float64) for x in (q, k, v)]
        (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*inputs)
    return [np.asarray(x) for x in (*out, *grads)]


def run_s2(attend, q, k, v, dz, dlse, dtype=jnp.float32):
    """The same five arrays from `attend(q, k, v) -> (z, lse)`, jitted."""

    def loss(q, k, v):
        z, lse = attend(q, k, v)
        return (z.astype(jnp.float32) * dz).sum() + (lse * dlse).sum(), (z, lse)

    inputs = [jnp.asarray(x, dtype) for x in (q, k, v)]
    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return [np.asarray(x, np.float64) for x in (*out, *grads)]


def relative(a, b):
    """Largest difference, over the largest entry where that exceeds one."""
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))
