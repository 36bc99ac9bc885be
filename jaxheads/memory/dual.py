"""One chunk of the memory by matrix products: per-token weights are never formed.

All gradients of a chunk are taken at the same weights, so they are outer products of two matrices
per layer (`network.gradients`), and reading with the weights of token t is linear attention over
the tokens written so far, with the coefficients of `decays`:

    h W_l(t) = weights_t h W_l + momentum_t h S_l - ((h x_l^T) * mix) d_l
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.memory import outer
from jaxheads.memory.decays import Decays
from jaxheads.memory.network import (
    Inner,
    clamp_factor,
    dot,
    finish,
    gelu,
    gradients,
    squared_norm,
)
from jaxheads.typing import Array

Weights = list[Array]


class Chunk(NamedTuple):
    """The tokens of one chunk; leading axes [B,H]."""

    k: Array  # [B,H,b,D]
    v: Array
    q: Array
    decays: tuple[Decays, ...]
    """One for all layers, or one per layer."""
    fresh: Array | None
    """[B,H,b] True for tokens of documents that began in this chunk."""


class ChunkOut(NamedTuple):
    """What the tokens of a chunk read, and how much they surprised the memory."""

    y: Array  # [B,H,b,D]
    surprise: Array  # [B,H,b] norm of the token's gradient


def write_terms(
    ref: Weights, initial: Weights | None, chunk: Chunk, inner: Inner
) -> tuple[Weights, Weights, Array]:
    """Layer inputs and deltas of the chunk's tokens, and the norms of their gradients."""
    inputs, deltas = gradients(ref, chunk.k, chunk.v, inner)
    if chunk.fresh is not None and initial is not None:
        fresh = chunk.fresh[..., None]
        choose = lambda new, old: jnp.where(fresh, new, old)
        new_inputs, new_deltas = gradients(initial, chunk.k, chunk.v, inner)
        inputs = [choose(*pair) for pair in zip(new_inputs, inputs)]
        deltas = [choose(*pair) for pair in zip(new_deltas, deltas)]
    squared = squared_norm(inputs, deltas)
    if inner.max_grad_norm is not None:
        factor = clamp_factor(squared, inner.max_grad_norm)[..., None]
        deltas = [factor * d for d in deltas]
    if inner.stop_inner_grad:
        inputs, deltas = jax.lax.stop_gradient((inputs, deltas))
    return inputs, deltas, jnp.sqrt(jax.lax.stop_gradient(squared))


def _scores(h: Array, x: Array, mix: Array, inner: Inner) -> Array:
    """`sum_c h[t,c] x[j,c] mix[t,j,c]`, [..., b, b]."""
    if mix.shape[-1] == 1:
        return dot(h, jnp.swapaxes(x, -1, -2), inner) * mix[..., 0]
    return jnp.einsum("...tc,...jc,...tjc->...tj", h, x, mix, precision=inner.precision)


def chunk_step(
    weights: Weights,
    momentum: Weights,
    ref: Weights,
    initial: Weights | None,
    chunk: Chunk,
    inner: Inner,
    initial_momentum: Weights | None = None,
    reads: tuple[Weights, Weights] | None = None,
) -> tuple[Weights, Weights, ChunkOut]:
    """Read and write one chunk.

    Args:
      weights, momentum: [B,H,d_in,d_out] of each layer at the start of the chunk.
      ref: the weights at which the gradients are taken.
      initial: the weights a new document starts with; None when none begins here.
      initial_momentum: its momentum; None: none.
      reads: `weights` and `momentum` again, for the tokens to read (`outer.Routes`).
    Returns:
      The weights and the momentum after the last token, and what was read.
    """
    inputs, deltas, surprise = write_terms(ref, initial, chunk, inner)
    h = chunk.q
    new_weights, new_momentum = [], []
    read_weights, read_momentum = (weights, momentum) if reads is None else reads
    for layer, (w, s, x, d) in enumerate(zip(weights, momentum, inputs, deltas)):
        decay = chunk.decays[min(layer, len(chunk.decays) - 1)]
        h = gelu(h) if layer else h
        z = dot(decay.weights * h, read_weights[layer], inner)
        z = z + dot(decay.momentum * h, read_momentum[layer], inner)
        if initial is not None and decay.initial is not None:
            z = z + dot(decay.initial * h, initial[layer], inner)
        if initial_momentum is not None and decay.initial_momentum is not None:
            z = z + dot(decay.initial_momentum * h, initial_momentum[layer], inner)
        h = z - dot(_scores(h, x, decay.mix, inner), d, inner)
        end = decay.end
        column = lambda c: c[..., None]  # [B,H,C] over the rows of a matrix
        written = dot(jnp.swapaxes(end.mix * x, -1, -2), d, inner)
        new_w = column(end.weights) * w + column(end.momentum) * s - written
        if initial is not None and end.initial is not None:
            new_w = new_w + column(end.initial) * initial[layer]
        written = dot(jnp.swapaxes(end.momentum_mix * x, -1, -2), d, inner)
        new_s = column(end.momentum_left) * s - written
        if initial_momentum is not None and end.initial_momentum is not None:
            new_w = new_w + column(end.initial_momentum) * initial_momentum[layer]
            new_s = new_s + column(end.initial_left) * initial_momentum[layer]
        new_weights.append(new_w)
        new_momentum.append(new_s)
    return new_weights, new_momentum, ChunkOut(finish(chunk.q, h, inner), surprise)


def scan_chunks(
    weights: Weights,
    momentum: Weights,
    chunks: Chunk,
    inner: Inner,
) -> tuple[Weights, Weights, ChunkOut]:
    """Full chunks one after another; every leaf of `chunks` leads with the number of chunks.

    Only the states between chunks are kept for the backward pass.
    """

    growth = inner.max_outer_growth

    @jax.checkpoint
    def body(carry: tuple[Weights, Weights, Array | None], chunk: Chunk):
        w, s, total = carry
        to = outer.split(w, s, None, total, growth)
        w, s, out = chunk_step(to.weights, to.momentum, to.ref, None, chunk, inner, None, to.reads)
        return (w, s, to.total), out

    total = None if growth is None else outer.begin(weights)
    (weights, momentum, total), out = jax.lax.scan(body, (weights, momentum, total), chunks)
    if total is not None:
        weights, momentum = outer.end((weights, momentum), total)
    return weights, momentum, out


def scan_slots(
    weights: Weights,
    momentum: Weights,
    ref: Weights,
    initial: Weights | None,
    chunks: Chunk,
    complete: Array,
    inner: Inner,
    initial_momentum: Weights | None = None,
) -> tuple[Weights, Weights, Weights, ChunkOut]:
    """As `scan_chunks` for slots that may be empty and documents that may begin anywhere.

    Args:
      ref: where the gradients of a chunk that was begun earlier are taken.
      complete: [chunks, B] True where the chunk's last slot has been reached.
    """

    growth = inner.max_outer_growth

    @jax.checkpoint
    def body(carry, xs):
        w, s, ref, total = carry
        chunk, complete = xs
        to = outer.split(w, s, ref, total, growth)
        w, s, out = chunk_step(
            to.weights, to.momentum, to.ref, initial, chunk, inner, initial_momentum, to.reads
        )
        ref = to.ref
        if chunk.fresh is not None and initial is not None:
            begun = chunk.fresh[..., -1, None, None]
            ref = [jnp.where(begun, new, old) for new, old in zip(initial, ref)]
        done = complete[:, None, None, None]
        ref = [jnp.where(done, new, old) for new, old in zip(w, ref)]
        return (w, s, ref, to.total), out

    total = None if growth is None else outer.begin(weights)
    carry = (weights, momentum, ref, total)
    (weights, momentum, ref, total), out = jax.lax.scan(body, carry, (chunks, complete))
    if total is not None:
        weights, momentum, ref = outer.end((weights, momentum, ref), total)
    return weights, momentum, ref, out


def split_chunks(x: Array, chunk: int) -> Array:
    """[B,T,H,...] -> [T/b,B,H,b,...]."""
    batch, length, heads, *rest = x.shape
    x = x.reshape(batch, length // chunk, chunk, heads, *rest)
    return jnp.moveaxis(jnp.moveaxis(x, 3, 2), 1, 0)


def join_chunks(x: Array) -> Array:
    """[T/b,B,H,b,...] -> [B,T,H,...]."""
    n, batch, heads, chunk, *rest = x.shape
    return jnp.moveaxis(jnp.moveaxis(x, 0, 1), 2, 3).reshape(batch, n * chunk, heads, *rest)
