"""The network that is the memory, and its gradient at one token, both by matrix products.

One head's memory is `mlp(x) = gelu(... gelu(x W_1) W_2 ...) W_L` without biases, or with
`residual_norm` `x + LN(mlp(x))`, LN without parameters. The gradient of the loss of one token with
respect to `W_l` is the outer product `x_l^T d_l` of the layer's input and of the loss's derivative
with respect to its output, so a chunk of tokens needs two matrices per layer and no gradient.

Every function works on any leading axes: inputs `[..., T, D]`, weights `[..., d_in, d_out]`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxheads.typing import Array

LN_EPS = 1e-5
_SQRT_HALF = math.sqrt(0.5)
_INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)

LOSSES: Mapping[str, float | None] = {"half": 1.0, "sum": 2.0, "mean": None}
"""Loss name -> factor of (M(k) - v) in its gradient; None is 2 / D."""


@dataclass(frozen=True, kw_only=True)
class Inner:
    """The settings of the inner loop; static."""

    loss: str = "half"
    residual_norm: bool = True
    read: str = "post"
    stop_inner_grad: bool = False
    max_grad_norm: float | None = None
    """Soft limit of the norm of one token's gradient, over all layers together."""
    max_outer_growth: float | None = None
    """Limit of the derivatives that go back through the inner gradients (`outer.py`)."""
    precision: str = "highest"
    """Of the inner products. On TPU "default" rounds their inputs to bfloat16."""


def init_memory(
    key: Array, num_heads: int, head_dim: int, depth: int = 2, expansion: int = 4
) -> list[Array]:
    """The memory before the first token, `M_0`: Xavier-uniform, independent per head, float32.

    Args:
      key: PRNG key.
      num_heads: H.
      head_dim: D, the width of keys, queries and values of one head.
      depth: L, the number of matrices; 1 is a linear (matrix) memory.
      expansion: width of the hidden layers over D.
    Returns:
      L arrays `[H, d_in, d_out]`; the first `d_in` and the last `d_out` are D.
    References: Behrouz et al., 2024, arXiv:2501.00663, section 3.1.
    """
    for name, value in dict(
        num_heads=num_heads, head_dim=head_dim, depth=depth, expansion=expansion
    ).items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1.")
    hidden = [expansion * head_dim] * (depth - 1)
    dims = [head_dim, *hidden, head_dim]
    limits = [math.sqrt(6.0 / (a + b)) for a, b in itertools.pairwise(dims)]
    return [
        jax.random.uniform(k, (num_heads, a, b), jnp.float32, -limit, limit)
        for k, a, b, limit in zip(jax.random.split(key, depth), dims, dims[1:], limits)
    ]


def dot(x: Array, w: Array, inner: Inner) -> Array:
    """`x @ w` over equal leading axes, accumulated in the inputs' own precision."""
    return jnp.matmul(x, w, precision=inner.precision)


def gelu(x: Array) -> Array:
    """The exact GELU, x Phi(x)."""
    return x * _gauss_cdf(x)


def _gauss_cdf(x: Array) -> Array:
    return 0.5 * (1.0 + jax.lax.erf(x * _SQRT_HALF))


def _gelu_slope(x: Array, cdf: Array) -> Array:
    return cdf + x * (_INV_SQRT_2PI * jnp.exp(-0.5 * x * x))


def _standardize(x: Array) -> tuple[Array, Array]:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + LN_EPS)
    return centred * scale, scale


def layer_norm(x: Array) -> Array:
    """Zero mean and unit variance along the last axis; no parameters."""
    return _standardize(x)[0]


def finish(x: Array, h: Array, inner: Inner) -> Array:
    """The memory's output from its input and the last layer's output."""
    return x + layer_norm(h) if inner.residual_norm else h


def apply_memory(weights: Sequence[Array], x: Array, inner: Inner) -> Array:
    """`M(x)` with one set of weights for all tokens: `[..., T, D] -> [..., T, D]`."""
    h = x
    for layer, w in enumerate(weights):
        h = dot(gelu(h) if layer else h, w, inner)
    return finish(x, h, inner)


def loss_factor(inner: Inner, head_dim: int) -> float:
    """What the gradient multiplies `M(k) - v` with."""
    factor = LOSSES[inner.loss]
    return 2.0 / head_dim if factor is None else factor


def token_loss(weights: Sequence[Array], k: Array, v: Array, inner: Inner) -> Array:
    """The loss of one token `[D]` at weights `[d_in, d_out]`; for `jax.grad`."""
    error = apply_memory(weights, k[None], inner)[0] - v
    return 0.5 * loss_factor(inner, k.shape[-1]) * jnp.sum(error * error)


def gradients(
    weights: Sequence[Array], k: Array, v: Array, inner: Inner
) -> tuple[list[Array], list[Array]]:
    """The gradient of every token's loss, factored: `u_l = x_l^T d_l` for each layer.

    Args:
      weights: `[..., d_in, d_out]` of each layer.
      k, v: `[..., T, D]`.
    Returns:
      (inputs, deltas): of each layer, its input `x_l [..., T, d_in]` and the derivative
      `d_l [..., T, d_out]` of the loss with respect to its output.
    """
    inputs, slopes, h = [k], [], k
    for layer, w in enumerate(weights):
        h = dot(inputs[-1], w, inner)
        if layer < len(weights) - 1:
            cdf = _gauss_cdf(h)
            slopes.append(_gelu_slope(h, cdf))
            inputs.append(h * cdf)
    factor = loss_factor(inner, k.shape[-1])
    if inner.residual_norm:
        normal, scale = _standardize(h)
        error = factor * (k + normal - v)
        along = normal * jnp.mean(error * normal, axis=-1, keepdims=True)
        delta = scale * (error - jnp.mean(error, axis=-1, keepdims=True) - along)
    else:
        delta = factor * (h - v)
    deltas = [delta]
    for w, slope in zip(reversed(weights[1:]), reversed(slopes)):
        deltas.append(dot(deltas[-1], jnp.swapaxes(w, -1, -2), inner) * slope)
    return inputs, deltas[::-1]


def squared_norm(inputs: Sequence[Array], deltas: Sequence[Array]) -> Array:
    """`||u_t||^2` over all layers, `[..., T]`: an outer product's norm is the factors' product."""
    total = 0.0
    for x, d in zip(inputs, deltas):
        total = total + jnp.sum(x * x, axis=-1) * jnp.sum(d * d, axis=-1)
    return jnp.asarray(total)


def clamp_factor(squared: Array, limit: float) -> Array:
    """`limit tanh(n / limit) / n` at `n^2 = squared`: 1 for small gradients, `limit / n` for big.

    The norm is kept off 0, where its derivative does not exist.
    """
    norm = jnp.sqrt(squared + jnp.asarray(1e-12, squared.dtype))
    return limit * jnp.tanh(norm / limit) / norm
