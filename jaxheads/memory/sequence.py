"""A sequence split over a mesh axis: the state of the memory travels from shard to shard.

A deep memory is serial in the sequence. Rows (or heads) are independent, so they are cut into m
microbatches that follow each other through the P shards like the stages of a pipeline: shard p
works on microbatch i - p at step i and hands the end state to shard p + 1. Of m + P - 1 steps each
shard is busy in m, hence a speed-up of `P m / (m + P - 1)` over one device (`pipeline_cost`). A
linear memory with one chunk per shard needs no pipeline: every shard's tokens are an affine map of
the start state (`linear.py`), and the maps are small enough to gather.

Both functions are called inside `jax.shard_map` with the local tokens of each shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.memory.dual import chunk_step, join_chunks
from jaxheads.memory.linear import check_linear, end_map, stack_state, unstack_state
from jaxheads.memory.network import Inner
from jaxheads.memory.passes import Gates, MemoryOut, layer_alphas, to_chunks
from jaxheads.memory.state import MemoryState, init_state, inner_dtype
from jaxheads.memory.titans import run_memory
from jaxheads.typing import Array, vary_like


class PipelineCost(NamedTuple):
    """What a pass over a split sequence costs, per layer."""

    steps: int
    speedup: float
    """Over one device with all tokens, communication aside."""
    busy: float
    """Share of the steps in which a shard has work."""
    state_bytes: int
    """Sent by each shard in one step."""
    total_bytes: int
    """Sent by each shard in the pass."""


def pipeline_cost(
    params: Sequence[Array | jax.ShapeDtypeStruct],
    batch_size: int,
    num_shards: int,
    num_microbatches: int,
) -> PipelineCost:
    """The cost model of `pipelined_memory`, forward; the backward pass sends as much again."""
    steps = num_microbatches + num_shards - 1
    memory = sum(w.size for w in params) * 4 * batch_size // num_microbatches
    return PipelineCost(
        steps,
        num_shards * num_microbatches / steps,
        num_microbatches / steps,
        2 * memory,
        2 * memory * steps,
    )


def pipelined_memory(
    k: Array,
    v: Array,
    q: Array,
    theta: Array,
    eta: Array,
    alpha: Array,
    params: Sequence[Array],
    *,
    axis_name: str,
    num_microbatches: int,
    chunk: int = 16,
    state: MemoryState | None = None,
    **options,
) -> MemoryOut:
    """`run_memory` over a sequence that a mesh axis splits; call it inside `jax.shard_map`.

    Args:
      k, v, q, theta, eta, alpha: the shard's tokens, [B,T/P,H,...]; T/P a multiple of `chunk`.
      params: `M_0`, the same on every shard.
      axis_name: of the mesh axis that splits the sequence, in order.
      num_microbatches: m; divides B, or else H.
      chunk, **options: as in `run_memory`, without `mask`, `reset` and `aligned`.
      state: where an earlier sequence ended, at the start of a chunk; the same on every shard.
    Returns:
      The shard's part of `y` and `surprise`; the state after the whole sequence on every shard.
    """
    batch, length, heads, _ = k.shape
    if length % chunk:
        raise ValueError(
            f"a shard's {length} tokens are not a multiple of chunk={chunk}: the state is handed "
            "on between chunks."
        )
    by_rows = batch % num_microbatches == 0
    if num_microbatches < 1 or not (by_rows or heads % num_microbatches == 0):
        raise ValueError(
            f"num_microbatches={num_microbatches} divides neither the {batch} rows nor the "
            f"{heads} heads of a shard."
        )
    params = list(params)
    dtype = inner_dtype(k, *params)
    if state is None:
        state = init_state([w.astype(dtype) for w in params], batch)
    shards = jax.lax.axis_size(axis_name)
    here = jax.lax.axis_index(axis_name)
    tokens = dict(k=k, v=v, q=q, theta=theta, eta=eta, alpha=alpha)
    if options.get("channel_alpha") is not None:
        tokens["channel_alpha"] = options.pop("channel_alpha")
    token_axis, state_axis, param_axis = (0, 0, None) if by_rows else (2, 1, 0)
    cut = lambda x, axis: _cut(x, axis, num_microbatches)
    tokens = {name: cut(x, token_axis) for name, x in tokens.items()}
    starts = jax.tree.map(lambda x: cut(x, state_axis), (state.weights, state.momentum))
    parts = [cut(w, param_axis) if param_axis is not None else w for w in params]

    def work(index: Array, weights: list[Array], momentum: list[Array]) -> MemoryOut:
        pick = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
        local = [pick(w) for w in parts] if param_axis is not None else parts
        offset = jnp.zeros((weights[0].shape[0],), jnp.int32)
        begin = MemoryState(weights, momentum, weights, offset)
        inputs = {name: pick(x) for name, x in tokens.items()}
        return run_memory(**inputs, params=local, chunk=chunk, state=begin, aligned=True, **options)

    def step(carry, i):
        received, ends = carry
        index = jnp.clip(i - here, 0, num_microbatches - 1)
        pick = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
        first = jax.tree.map(pick, starts)
        begin = jax.tree.map(lambda a, b: jnp.where(here == 0, a, b), first, received)
        out = work(index, *begin)
        end = (out.state.weights, out.state.momentum)
        valid = (i >= here) & (i - here < num_microbatches)
        keep = lambda all_, new: all_.at[index].set(jnp.where(valid, new, all_[index]))
        ends = jax.tree.map(keep, ends, (out.y, out.surprise, end))
        onward = [(shard, shard + 1) for shard in range(shards - 1)]
        received = jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, onward), end)
        return (received, ends), None

    shape = jax.eval_shape(work, jnp.zeros((), jnp.int32), *jax.tree.map(lambda x: x[0], starts))
    everything = (tokens, starts, parts, here)
    blank = lambda x: vary_like(jnp.zeros((num_microbatches, *x.shape), x.dtype), everything)
    ends = jax.tree.map(
        blank, (shape.y, shape.surprise, (shape.state.weights, shape.state.momentum))
    )
    received = jax.tree.map(lambda x: vary_like(jnp.zeros_like(x[0]), everything), starts)
    steps = jnp.arange(num_microbatches + shards - 1)
    (_, (y, surprise, end)), _ = jax.lax.scan(step, (received, ends), steps)
    join = lambda x, axis: jnp.moveaxis(x, 0, axis).reshape(
        *x.shape[1 : axis + 1], -1, *x.shape[axis + 2 :]
    )
    weights, momentum = jax.tree.map(lambda x: _from_last(join(x, state_axis), axis_name), end)
    offset = jnp.zeros((batch,), jnp.int32)
    state = MemoryState(weights, momentum, weights, offset)
    return MemoryOut(join(y, token_axis), state, join(surprise, token_axis))


def gathered_linear_memory(
    k: Array,
    v: Array,
    q: Array,
    theta: Array,
    eta: Array,
    alpha: Array,
    params: Sequence[Array],
    *,
    axis_name: str,
    loss: str = "half",
    read: str = "post",
    precision: str = "highest",
) -> MemoryOut:
    """A linear memory whose chunk is the shard: all shards work at once.

    Equals `neural_memory(..., chunk=T/P, residual_norm=False)` of depth 1 on the whole sequence.
    Gathers `6 D^2` numbers per row, head and shard. Arguments as `pipelined_memory`.
    """
    inner = Inner(loss=loss, residual_norm=False, read=read, precision=precision)
    check_linear(len(params), inner)
    dtype = inner_dtype(k, *params)
    cast = lambda x: x.astype(dtype)
    gates = Gates(cast(theta), cast(eta), layer_alphas(cast(alpha), None, 1))
    chunks = to_chunks(cast(k), cast(v), cast(q), gates, k.shape[1], inner)
    chunk = jax.tree.map(lambda x: x[0], chunks)
    own = end_map(chunk.k, chunk.v, chunk.decays[0].end, inner)
    maps = jax.lax.all_gather(own, axis_name)  # [P,B,H,...]
    first = init_state([cast(w) for w in params], k.shape[0])
    start = vary_like(stack_state(first.weights, first.momentum), maps)

    def advance(state, shard_map_):
        return shard_map_(state, inner), state

    end, starts = jax.lax.scan(advance, start, maps)
    mine = jax.lax.dynamic_index_in_dim(starts, jax.lax.axis_index(axis_name), keepdims=False)
    weights, momentum = unstack_state(mine)
    _, _, out = chunk_step(weights, momentum, weights, None, chunk, inner)
    weights, momentum = unstack_state(_from_last(end, axis_name))
    y, surprise = (join_chunks(x[None]) for x in out)
    state = MemoryState(weights, momentum, weights, first.offset)
    return MemoryOut(y.astype(q.dtype), state, surprise)


def _cut(x: Array, axis: int, parts: int) -> Array:
    """Split an axis into `parts`, which go to the front."""
    shape = (*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _from_last(x: Array, axis_name: str) -> Array:
    """The last shard's value on every shard."""
    last = jax.lax.axis_index(axis_name) == jax.lax.axis_size(axis_name) - 1
    return jax.lax.psum(jnp.where(last, x, jnp.zeros_like(x)), axis_name)
