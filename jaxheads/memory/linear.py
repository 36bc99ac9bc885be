"""The linear memory, whose chunks are affine maps of their start state.

With one matrix, no norm and gradients taken at the start `W` of a chunk, the delta of a token is
`f (k W - v)`, so the end state of a chunk is affine in its start:

    [W'; S'] = F [W; S] + G,    F [2D,2D], G [2D,D]

Maps compose associatively: all chunks, or all shards of a sequence, find their start states in a
logarithmic number of steps (`jax.lax.associative_scan`) instead of one after another. Composing two
maps costs 8 D^3 + 4 D^3 multiplications, worth it where chunks are longer than about 10 D.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.memory.decays import EndDecays
from jaxheads.memory.dual import Chunk, ChunkOut, Weights, chunk_step
from jaxheads.memory.network import Inner, dot, loss_factor
from jaxheads.typing import Array


class AffineMap(NamedTuple):
    """`state -> matrix @ state + shift` on `[W; S]`."""

    matrix: Array  # [...,2D,2D]
    shift: Array  # [...,2D,D]

    def __call__(self, state: Array, inner: Inner) -> Array:
        return dot(self.matrix, state, inner) + self.shift


def check_linear(depth: int, inner: Inner) -> None:
    """Raise for a memory whose chunks are not affine in their start."""
    reasons = {
        f"depth={depth}": depth != 1,
        "residual_norm=True": inner.residual_norm,
        "max_grad_norm": inner.max_grad_norm is not None,
        "stop_inner_grad=True": inner.stop_inner_grad,
    }
    given = [name for name, holds in reasons.items() if holds]
    if given:
        raise NotImplementedError(
            f"{', '.join(given)}: only a linear memory (depth 1, residual_norm=False, no limit, "
            "gradients not stopped) can be scanned associatively; use impl='dual'."
        )


def end_map(k: Array, v: Array, end: EndDecays, inner: Inner) -> AffineMap:
    """What a chunk does to its start state.

    Args:
      k, v: [...,b,D].
      end: its decays, the same leading axes.
    """
    head_dim = k.shape[-1]
    factor = loss_factor(inner, head_dim)
    identity = jnp.eye(head_dim, dtype=k.dtype)
    by_row = lambda x: x[..., None] * identity  # [...,C] -> [...,D,D]
    weigh = lambda mix: jnp.swapaxes(factor * mix * k, -1, -2)  # [...,D,b]
    to_weights, to_momentum = weigh(end.mix), weigh(end.momentum_mix)
    top = [by_row(end.weights) - dot(to_weights, k, inner), by_row(end.momentum)]
    low = [-dot(to_momentum, k, inner), by_row(end.momentum_left)]
    matrix = jnp.concatenate([jnp.concatenate(top, -1), jnp.concatenate(low, -1)], -2)
    shift = jnp.concatenate([dot(to_weights, v, inner), dot(to_momentum, v, inner)], -2)
    return AffineMap(matrix, shift)


def compose(first: AffineMap, second: AffineMap, inner: Inner) -> AffineMap:
    """First `first`, then `second`."""
    matrix = dot(second.matrix, first.matrix, inner)
    return AffineMap(matrix, dot(second.matrix, first.shift, inner) + second.shift)


def stack_state(weights: Weights, momentum: Weights) -> Array:
    """[...,2D,D] of a linear memory."""
    return jnp.concatenate([weights[0], momentum[0]], axis=-2)


def unstack_state(state: Array) -> tuple[Weights, Weights]:
    """The inverse of `stack_state`: (weights, momentum)."""
    weights, momentum = jnp.split(state, 2, axis=-2)
    return [weights], [momentum]


def associative_chunks(
    weights: Weights, momentum: Weights, chunks: Chunk, inner: Inner
) -> tuple[Weights, Weights, ChunkOut]:
    """As `dual.scan_chunks`, all chunks at once; the states of all chunks are formed."""
    maps = end_map(chunks.k, chunks.v, chunks.decays[0].end, inner)  # leads with [n,B,H]
    upto = jax.lax.associative_scan(lambda a, b: compose(a, b, inner), maps)
    start = stack_state(weights, momentum)
    ends = upto(start[None], inner)
    starts = jnp.concatenate([start[None], ends[:-1]])
    step = lambda w, s, chunk: chunk_step(w, s, w, None, chunk, inner)[2]
    out = jax.vmap(step)(*unstack_state(starts), chunks)
    return *unstack_state(ends[-1]), out
