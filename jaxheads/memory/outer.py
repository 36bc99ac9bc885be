"""A limit on how much derivatives grow on their way back through the chunks of a memory.

Going back over a chunk, the derivative with respect to the weights it starts from has three parts:
what its tokens read, what is passed on from the chunks after it, and what comes through the inner
gradients, which were taken at these weights. The third holds second derivatives of the memory
network; where its matrices have become small a layer norm makes them huge, and the product over
hundreds of chunks overflows though every loss is finite.

With a limit g, per row and head, the derivative may not exceed g times what the tokens from here on
have read, and what the end state was asked for:

    |dW| + |dS| + |dM_ref|  <=  g (|dW| + |dS| of the reads, over this and later chunks, + |d end|)

Smaller derivatives are exact. The sum travels as the cotangent of an array of zeros that is carried
along with the state.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.typing import Array, PyTree

Weights = list[Array]


class Routes(NamedTuple):
    """The state at the start of a chunk, once for each way in which it is used."""

    reads: tuple[Weights, Weights]
    """Weights and momentum that the chunk's tokens read."""
    weights: Weights
    momentum: Weights
    ref: Weights
    """Where its gradients are taken."""
    total: Array | None
    """[B,H] zeros."""


def begin(weights: Weights) -> Array:
    """The array of zeros to carry, [B,H]."""
    return 0.0 * weights[0][..., 0, 0]


def split(
    weights: Weights,
    momentum: Weights,
    ref: Weights | None,
    total: Array | None,
    growth: float | None,
) -> Routes:
    """The routes of a chunk; their derivatives are limited where they meet again.

    Args:
      ref: None where gradients are taken at `weights`.
      total: of `begin`; None without a limit.
      growth: g; None: no limit.
    """
    if growth is None:
        return Routes((weights, momentum), weights, momentum, weights if ref is None else ref, None)
    return _limited(growth, weights, momentum, ref, total)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _limited(growth, weights, momentum, ref, total):
    del growth
    return Routes((weights, momentum), weights, momentum, weights if ref is None else ref, total)


def _limited_fwd(growth, weights, momentum, ref, total):
    return _limited(growth, weights, momentum, ref, total), None if ref is None else ()


def _limited_bwd(growth, has_ref, routes: Routes):
    add = lambda a, b: jax.tree.map(jnp.add, a, b)
    assert routes.total is not None  # there is a limit
    total = routes.total + norm(routes.reads[0]) + norm(routes.reads[1])
    weights = add(routes.reads[0], routes.weights)
    momentum = add(routes.reads[1], routes.momentum)
    weights, ref = (add(weights, routes.ref), None) if has_ref is None else (weights, routes.ref)
    size = norm(weights) + norm(momentum) + (0.0 if ref is None else norm(ref))
    scale = jnp.minimum(1.0, growth * total / jnp.maximum(size, jnp.finfo(size.dtype).tiny))
    limit = lambda d: jax.tree.map(lambda x: scale[..., None, None] * x, d)
    return limit(weights), limit(momentum), limit(ref), total


_limited.defvjp(_limited_fwd, _limited_bwd)


@jax.custom_vjp
def end(state: PyTree, total: Array) -> PyTree:
    """The state after the last chunk; what is asked of it counts into the sum."""
    del total
    return state


def _end_fwd(state, total):
    del total
    return state, None


def _end_bwd(_, state):
    return state, norm(jax.tree.leaves(state))


end.defvjp(_end_fwd, _end_bwd)


def norm(weights: Weights) -> Array:
    """[B,H] Frobenius norm of all layers together."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(w), axis=(-2, -1)) for w in weights))
