"""The passes over a row of tokens: gates to coefficients, tokens to chunks, chunks one by one."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.memory.decays import Decays, decays
from jaxheads.memory.dual import (
    Chunk,
    Weights,
    chunk_step,
    join_chunks,
    scan_chunks,
    scan_slots,
    split_chunks,
)
from jaxheads.memory.linear import associative_chunks
from jaxheads.memory.network import Inner
from jaxheads.memory.oracles import Slots, chunk_scan, token_loop
from jaxheads.memory.placement import Placement
from jaxheads.memory.state import MemoryState
from jaxheads.typing import Array


class MemoryOut(NamedTuple):
    """What a pass over tokens gives."""

    y: Array
    """[B,T,H,D] what the queries read, in the dtype of `q`."""
    state: MemoryState
    surprise: Array
    """[B,T,H] norm of each token's gradient over all layers, before any limit; no derivative."""


class Gates(NamedTuple):
    """Step size, momentum and forgetting of every token."""

    theta: Array  # [B,T,H] or [B,T,H,L]
    eta: Array
    alpha: tuple[Array, ...]  # [B,T,H,C], one for all layers or one per layer


def layer_alphas(alpha: Array, channels: Array | None, depth: int) -> tuple[Array, ...]:
    """Forgetting of each layer's input channels; one entry where all layers share it."""
    if channels is not None and alpha.ndim == 3:
        alpha = jnp.broadcast_to(alpha[..., None], (*alpha.shape, depth))
    if alpha.ndim == 3:
        return (alpha[..., None],)
    layers = [alpha[..., layer, None] for layer in range(depth)]
    if channels is not None:
        layers[0] = channels.astype(alpha.dtype)
    return tuple(layers)


def _chunk_decays(
    gates: Gates, chunk: int, inner: Inner, real: Array | None = None, reset: Array | None = None
) -> tuple[Decays, ...]:
    """Coefficients of every chunk and layer, each leaf leading with [chunks, B, H]."""
    split = lambda x: split_chunks(x, chunk)
    layers = max(len(gates.alpha), *(1 if x.ndim == 3 else x.shape[-1] for x in gates[:2]))
    of_layer = lambda x, layer: x if x.ndim == 3 else x[..., layer]
    return tuple(
        decays(
            split(of_layer(gates.theta, layer)),
            split(of_layer(gates.eta, layer)),
            split(gates.alpha[min(layer, len(gates.alpha) - 1)]),
            real=real,
            reset=reset,
            read=inner.read,
        )
        for layer in range(layers)
    )


def to_chunks(k: Array, v: Array, q: Array, gates: Gates, chunk: int, inner: Inner) -> Chunk:
    """Whole chunks of tokens [B,T,H,...]; every leaf leads with their number."""
    split = lambda x: split_chunks(x, chunk)
    return Chunk(split(k), split(v), split(q), _chunk_decays(gates, chunk, inner), None)


def run_aligned(
    start: MemoryState,
    k: Array,
    v: Array,
    q: Array,
    gates: Gates,
    chunk: int,
    inner: Inner,
    *,
    associative: bool = False,
) -> MemoryOut:
    """All rows stand at the start of a chunk: full chunks, then what is left over."""
    length = k.shape[1]
    rest = length % chunk
    tokens = (k, v, q, gates)
    weights, momentum, outs = start.weights, start.momentum, []
    if length >= chunk:
        whole = jax.tree.map(lambda x: x[:, : length - rest], tokens)
        run = associative_chunks if associative else scan_chunks
        chunks = to_chunks(whole[0], whole[1], whole[2], whole[3], chunk, inner)
        weights, momentum, out = run(weights, momentum, chunks, inner)
        outs.append(out)
    ref = weights
    if rest:
        last = jax.tree.map(lambda x: x[:, length - rest :], tokens)
        chunks = to_chunks(last[0], last[1], last[2], last[3], rest, inner)
        last = jax.tree.map(lambda x: x[0], chunks)
        weights, momentum, out = chunk_step(weights, momentum, ref, None, last, inner)
        outs.append(jax.tree.map(lambda x: x[None], out))
    outs = jax.tree.map(join_chunks, outs)
    y, surprise = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *outs)
    offset = jnp.full_like(start.offset, rest)
    return MemoryOut(y, MemoryState(weights, momentum, ref, offset), surprise)


def run_placed(
    start: MemoryState,
    initial: Weights,
    k: Array,
    v: Array,
    q: Array,
    gates: Gates,
    reset: Array | None,
    where: Placement,
    chunk: int,
    impl: str,
    inner: Inner,
    initial_momentum: Weights | None = None,
) -> MemoryOut:
    """Tokens moved to their places on the grid; slots may be empty."""
    k, v, q, gates = jax.tree.map(where.to_slots, (k, v, q, gates))
    flags = None if reset is None else where.to_slots(reset) & where.real
    weights, momentum, ref = start.weights, start.momentum, start.ref_weights
    size = where.chunk
    if impl == "dual":
        rows = lambda x: split_chunks(x[:, :, None], size)  # [n,B,1,b]
        heads = lambda x: jnp.broadcast_to(rows(x), (*rows(x).shape[:2], k.shape[2], size))
        numbers = lambda x: None if x is None else heads(x.astype(k.dtype))
        chunks = Chunk(
            split_chunks(k, size),
            split_chunks(v, size),
            split_chunks(q, size),
            _chunk_decays(gates, size, inner, numbers(where.real), numbers(flags)),
            None if flags is None else jnp.cumsum(heads(flags), axis=-1) > 0,
        )
        begin = None if flags is None else initial
        weights, momentum, ref, out = scan_slots(
            weights, momentum, ref, begin, chunks, where.complete, inner, initial_momentum
        )
        out = jax.tree.map(join_chunks, out)
    else:
        slots = _oracle_slots(k, v, q, gates, where.real, flags, len(initial))
        if impl == "naive":
            run, grid, ends = token_loop, chunk, where.filled
        else:
            run, grid, ends = chunk_scan, size, where.complete
        weights, momentum, ref, out = run(weights, momentum, ref, initial, slots, grid, inner, ends)
        out = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), out)  # [B,H,N,...] -> [B,N,H,...]
    y, surprise = where.to_tokens(out.y), where.to_tokens(out.surprise)
    return MemoryOut(y, MemoryState(weights, momentum, ref, where.offset), surprise)


def _oracle_slots(
    k: Array, v: Array, q: Array, gates: Gates, real: Array, reset: Array | None, depth: int
) -> Slots:
    by_layer = lambda x: x[..., None] if x.ndim == 3 else x
    per_layer = lambda x: jnp.broadcast_to(by_layer(x), (*x.shape[:3], depth))
    by_head = lambda x: jnp.moveaxis(x, 2, 1)  # [B,N,H,...] -> [B,H,N,...]
    of_layer = lambda xs, layer: by_head(xs[min(layer, len(xs) - 1)])
    return Slots(
        by_head(k),
        by_head(v),
        by_head(q),
        by_head(per_layer(gates.theta)),
        by_head(per_layer(gates.eta)),
        tuple(of_layer(gates.alpha, layer) for layer in range(depth)),
        real,
        jnp.zeros_like(real) if reset is None else reset,
    )
