"""Blocks of a cache in host memory: read and written one at a time, never moved as a whole.

A program's array in host memory can be sliced and updated in place, a contiguous piece at a time,
which a TPU does by copies between host and device alone; gathers, and slices of a layer from a
stack of them, would pass the whole array through. So a loop goes over the blocks that are wanted,
and the layers of a model share one array, of which each is told its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.parallel.rules import constrain, constrained_spec
from jaxheads.typing import Array

AXES = ("batch", None, "act_kv_heads", None, None)
"""The logical axes of `HostBlocks.array` after that of the layers."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostBlocks:
    """Blocks of tokens of several layers, in host memory.

    Attributes:
      array: [R,B,M,K,P,D] M blocks of P tokens for each of R layers; what is in a block before it
        is written is not said.
      layer: int32 scalar, the layer in whose name it is used, 0 to R - 1; None between calls.
    """

    array: Array
    layer: Array | None = None

    @property
    def num_blocks(self) -> int:
        """M"""
        return self.array.shape[2]

    def of_layer(self, layer: Array | int | None) -> HostBlocks:
        """The same for another layer."""
        return HostBlocks(self.array, None if layer is None else jnp.int32(layer))


def is_host_blocks(x: Any) -> bool:
    """For `is_leaf`: `HostBlocks` go through a model whole."""
    return isinstance(x, HostBlocks)


def host_blocks(shape: tuple[int, ...], dtype: Any, num_layers: int = 1) -> HostBlocks:
    """New blocks for `num_layers` layers, split as `AXES` says; shape [B,M,K,P,D]."""
    return _allocate((num_layers, *shape), jnp.dtype(dtype).name)


@partial(jax.jit, static_argnums=(0, 1))
def _allocate(shape: tuple[int, ...], dtype: str) -> HostBlocks:
    array = jax.device_put(
        constrain(jnp.zeros(shape, dtype), ("layers", *AXES)), jax.memory.Space.Host
    )
    # XLA for TPU makes room in host memory where something is written next; the zeros alone it
    # would have on the device first.
    blocks = HostBlocks(array, jnp.int32(0))
    batch, _, kv_heads, length, width = shape[1:]
    one = jnp.zeros((batch, 1, length, kv_heads, width), dtype)
    return store((blocks,), (one,), *[jnp.ones(batch, jnp.int32)] * 2)[0].of_layer(None)


def fetch(
    blocks: tuple[HostBlocks, ...], index: Array
) -> tuple[tuple[HostBlocks, ...], tuple[Array, ...]]:
    """Blocks on the device: [B,K,N,P,D] of each array.

    Args:
      blocks: of one layer, alike but for D.
      index: [B,K,N] integers, 0 to M - 1.
    Returns:
      The blocks, for `store` to write to when this is done (or it would write to a copy), and
      what was asked for.
    """

    def local(arrays: tuple[Array, ...], index: Array, layer: Array) -> tuple[Array, ...]:
        batch, kv_heads, count = index.shape

        def one(n: Array) -> tuple[Array, ...]:
            row, head, rank = n // (kv_heads * count), n // count % kv_heads, n % count

            def take(x: Array) -> Array:
                block = (layer * batch + row) * x.shape[2] + index[row, head, rank]
                found = jax.lax.dynamic_slice(_flat(x), (block, head, 0, 0), (1, 1, *x.shape[4:]))
                return jax.device_put(found, jax.memory.Space.Device).reshape(x.shape[4:])

            return tuple(map(take, arrays))

        found = jax.lax.map(one, jnp.arange(index.size, dtype=jnp.int32))
        return tuple(x.reshape(*index.shape, *x.shape[1:]) for x in found)

    stacks = _specs(blocks)
    rows = jax.P(stacks[0][1], stacks[0][3])
    arrays = tuple(x.array for x in blocks)
    run = _on_mesh(local, (stacks, rows, jax.P()), tuple(rows for _ in blocks))
    found = run(arrays, index.astype(jnp.int32), _layer(blocks))
    arrays, found = jax.lax.optimization_barrier((arrays, found))
    return tuple(HostBlocks(x, old.layer) for x, old in zip(arrays, blocks, strict=True)), found


def store(
    blocks: tuple[HostBlocks, ...], new: tuple[Array, ...], count: Array, first: Array
) -> tuple[HostBlocks, ...]:
    """The blocks with new ones written.

    Args:
      blocks: of one layer.
      new: for each of them [B,n,P,K,D].
      count: [B] how many of the n are written.
      first: [B] where the first goes; block j goes to (first + j) % M.
    """

    def local(arrays, new, count, first, layer):
        ends = jnp.cumsum(count)

        def body(n: Array, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
            row = (n >= ends).sum(dtype=jnp.int32)
            j = n - (ends[row] - count[row])

            def put(x: Array, y: Array) -> Array:
                block = jnp.swapaxes(y[row, j], 0, 1).astype(x.dtype)  # [K,P,D]
                block = jax.device_put(block[None], jax.memory.Space.Host)
                at = (layer * x.shape[1] + row) * x.shape[2] + (first[row] + j) % x.shape[2]
                whole = jax.lax.dynamic_update_slice(_flat(x), block, (at, 0, 0, 0))
                return whole.reshape(x.shape)

            return tuple(map(put, arrays, new))

        return jax.lax.fori_loop(0, ends[-1], body, arrays)

    stacks = _specs(blocks)
    batch, heads = stacks[0][1], stacks[0][3]
    fresh = tuple(jax.P(batch, None, None, heads) for _ in blocks)
    specs = (stacks, fresh, jax.P(batch), jax.P(batch), jax.P())
    arrays = _on_mesh(local, specs, stacks)(
        tuple(x.array for x in blocks), new, count, first, _layer(blocks)
    )
    return tuple(HostBlocks(x, old.layer) for x, old in zip(arrays, blocks, strict=True))


def _flat(x: Array) -> Array:
    """[R B M,K,P,D]: a TPU copies slices of at most two dimensions beside the last two."""
    return x.reshape(-1, *x.shape[3:])


def _layer(blocks: tuple[HostBlocks, ...]) -> Array:
    layer = blocks[0].layer
    if layer is None:
        raise ValueError("these blocks are of several layers; take those of one with of_layer.")
    return layer


def _specs(blocks: tuple[HostBlocks, ...]) -> tuple[jax.P, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tuple(jax.P(*[None] * 6) for _ in blocks)
    return tuple(constrained_spec(("layers", *AXES), x.array.shape) for x in blocks)


def _on_mesh(local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Every device goes through the rows and heads that it holds."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return local
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs)
