"""The key/value cache of autoregressive decoding: an argument and a result, never hidden state."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxheads.attention.host_memory import HostBlocks, host_blocks, is_host_blocks
from jaxheads.models.architectures import OwnState, own_state
from jaxheads.models.configs import ModelConfig
from jaxheads.parallel import constrain
from jaxheads.parallel.rules import constrained_spec
from jaxheads.typing import Array, PyTree

CACHE_AXES = ("layers", "batch", "length", "act_kv_heads", None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Preallocated keys and values of `S` slots. Slot s holds the s-th token of every row.

    Attributes:
      k: [R,B,S,K,D] keys of the layers without a state of their own (R = L where none has one),
        rotated where the layer's variant caches rotated keys.
      v: [R,B,S,K,D] values.
      segment_ids: [B,S] int32; 0 marks padding and slots not written yet.
      positions: [B,S] int32 position of each token.
      index: int32 scalar, the next free slot.
      states: for each place of the layer pattern, the states of its layers stacked over the
        repeats; None where they keep keys and values.
    """

    k: Array
    v: Array
    segment_ids: Array
    positions: Array
    index: Array
    states: tuple[PyTree, ...] = ()

    @property
    def num_slots(self) -> int:
        """S, the tokens the cache can hold."""
        return self.k.shape[2]

    def write_tokens(self, segment_ids: Array, positions: Array) -> Cache:
        """The cache with T tokens' bookkeeping written at `index`, and `index` advanced by T."""
        put = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, self.index))
        return dataclasses.replace(
            self,
            segment_ids=put(self.segment_ids, segment_ids),
            positions=put(self.positions, positions),
            index=self.index + segment_ids.shape[1],
        )


def init_cache(cfg: ModelConfig, batch_size: int, num_slots: int, dtype=jnp.float32) -> Cache:
    """An empty cache, sharded like the activations when a mesh is set.

    Raises:
      ValueError: when `num_slots` exceeds the learned positions of the model.
    """
    if cfg.positions == "learned" and num_slots > cfg.max_positions:
        raise ValueError(
            f"a cache of {num_slots} tokens exceeds the {cfg.max_positions} learned positions of "
            "the model; shorten the prompt or generate fewer tokens."
        )
    kinds = [own_state(cfg, spec) for spec in cfg.pattern]
    repeats = [len(range(n, cfg.num_layers, len(kinds))) for n in range(len(kinds))]

    def stacked(kind: OwnState | None, count: int) -> PyTree:
        if kind is None:
            return None
        one = kind.init(cfg, batch_size, num_slots, dtype, kind.options)

        def repeat(a: Array | HostBlocks) -> Array | HostBlocks:
            if isinstance(a, HostBlocks):
                return host_blocks(a.array.shape[1:], a.array.dtype, count)
            return jnp.broadcast_to(a, (count, *a.shape))

        def place(a: Array | HostBlocks, axes: tuple[str | None, ...]) -> Array | HostBlocks:
            return a if isinstance(a, HostBlocks) else constrain(a, axes)

        many = jax.tree.map(repeat, one, is_leaf=is_host_blocks)
        return jax.tree.map(place, many, _stacked_axes(kind, many), is_leaf=is_host_blocks)

    num_rows = sum(n for kind, n in zip(kinds, repeats) if kind is None)
    shape = (num_rows, batch_size, num_slots, cfg.num_kv_heads, cfg.head_dim)
    empty = constrain(jnp.zeros(shape, dtype), CACHE_AXES)
    ids = jnp.zeros((batch_size, num_slots), jnp.int32)
    states = tuple(stacked(kind, n) for kind, n in zip(kinds, repeats))
    return Cache(empty, empty, ids, ids, jnp.int32(0), states)


def _stacked_axes(kind: OwnState, states: PyTree) -> PyTree:
    """The logical axes of every array of stacked states."""
    if kind.axes is None:
        return jax.tree.map(lambda a: ("layers", "batch", *(None,) * (a.ndim - 2)), states)
    return jax.tree.map(
        lambda _, axes: ("layers", *axes), states, kind.axes, is_leaf=is_host_blocks
    )


def cache_shape(
    cfg: ModelConfig, batch_size: int, num_slots: int, dtype=jnp.float32, mesh: Mesh | None = None
) -> Cache:
    """The cache of `init_cache` as `jax.ShapeDtypeStruct`, placed as it is on `mesh`."""
    shapes = jax.eval_shape(lambda: init_cache(cfg, batch_size, num_slots, dtype))
    if mesh is None:
        return shapes

    def placed(leaf: Any, axes: tuple[str | None, ...], memory: str | None = None) -> Any:
        if isinstance(leaf, HostBlocks):
            return HostBlocks(placed(leaf.array, axes, "pinned_host"))
        with jax.set_mesh(mesh):
            spec = constrained_spec(axes, leaf.shape)
        sharding = NamedSharding(mesh, spec, memory_kind=memory)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    kinds = [own_state(cfg, spec) for spec in cfg.pattern]
    states = tuple(
        None
        if kind is None
        else jax.tree.map(placed, state, _stacked_axes(kind, state), is_leaf=is_host_blocks)
        for kind, state in zip(kinds, shapes.states)
    )
    kv = placed(shapes.k, CACHE_AXES)
    return dataclasses.replace(shapes, k=kv, v=kv, states=states)
