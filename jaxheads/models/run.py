"""What the layers of one forward share, and what one layer is given of the cache."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads import attention
from jaxheads.models.configs import LayerSpec, ModelConfig
from jaxheads.typing import Array


class Run(NamedTuple):
    """One forward as its layers see it."""

    cfg: ModelConfig
    positions: Array
    """[T] or [B,T]"""
    k_positions: Array
    """[S] or [B,S]"""
    segment_ids: Array | None
    """[B,T]"""
    k_segment_ids: Array | None
    """[B,S]"""
    slots: Array | None
    """[T] the cache slots of the tokens; None without a cache."""
    num_keys: int
    """S: the slots of the cache, or T."""
    reads: Array | None = None
    """[B,N] slots, without a cache: a layer computes its output only there, and `positions`,
    `segment_ids` and `slots` [B,N] are those of the slots. None: everywhere."""
    layout: str = "contiguous"
    """The order of the tokens (`models/order.py`)."""

    def at_reads(self, x: Array) -> Array:
        """[B,T,...] -> [B,N,...] at the slots that are computed."""
        if self.reads is None:
            return x
        return jnp.take_along_axis(x, self.reads[..., None], axis=1)

    def mask(self, spec: LayerSpec) -> attention.Mask:
        """Who sees whom in a layer of this kind."""
        return attention.Mask(
            is_causal=True,
            window=spec.window,
            q_index=self.slots,
            q_segment_ids=self.segment_ids,
            k_segment_ids=self.k_segment_ids,
        )


class Rows(NamedTuple):
    """The key/value cache as one layer sees it: it reads and writes one row, in place."""

    k: Array
    """[R,B,S,K,D]"""
    v: Array
    """[R,B,S,K,D]"""
    row: Array
    """int32 scalar, the layer's row of the R."""

    def append(self, k: Array, v: Array, start: Array) -> tuple[Rows, Array, Array]:
        """Write T new keys and values [B,T,K,D] at slot `start`: (rows, all k, all v [B,S,K,D])."""
        write = lambda held, new: write_slots(held, new.astype(held.dtype), self.row, start)
        read = lambda held, new: jax.lax.dynamic_index_in_dim(
            held, self.row, keepdims=False
        ).astype(new.dtype)
        rows = Rows(write(self.k, k), write(self.v, v), self.row)
        return rows, read(rows.k, k), read(rows.v, v)


def write_slots(held: Array, new: Array, row: Array, start: Array) -> Array:
    """`held` [R,B,S,K,D] with `new` [B,T,K,D] at the slots from `start` of one row.

    Where the context axis splits the slots, each device takes what falls into its own; left to the
    compiler, several tokens at a traced slot gather the whole cache.
    """
    mesh = jax.sharding.get_abstract_mesh()
    num_slots, num_tokens = held.shape[2], new.shape[1]
    is_split = not mesh.empty and not mesh.manual_axes and mesh.shape.get("context", 1) > 1
    if num_tokens == 1 or not is_split or num_slots % mesh.shape["context"]:
        return jax.lax.dynamic_update_slice(held, new[None], (row, 0, start, 0, 0))

    def write(held: Array, new: Array, row: Array, start: Array) -> Array:
        size = held.shape[2]
        first = jax.lax.axis_index("context") * size
        token = first + jnp.arange(size, dtype=jnp.int32) - start  # which lands in each slot
        is_new = ((token >= 0) & (token < num_tokens))[:, None, None]
        old = jax.lax.dynamic_index_in_dim(held, row, keepdims=False)
        kept = jnp.where(is_new, jnp.take(new, token, axis=1, mode="clip"), old)
        return jax.lax.dynamic_update_index_in_dim(held, kept, row, axis=0)

    slots = jax.P(None, None, "context")
    return jax.shard_map(
        write,
        in_specs=(slots, jax.P(), jax.P(), jax.P()),
        out_specs=slots,
        axis_names={"context"},
        check_vma=False,
    )(held, new, row, start)
