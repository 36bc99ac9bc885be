"""Where tokens stand on the grid of chunks.

A chunk begins every b tokens of a row, counted from the row's first token and without padding. A
piece that begins inside a chunk, or that holds padding, is moved: token number r of the piece goes
to slot `offset + r`. Empty slots change nothing (`decays`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxheads.typing import Array


class Placement(NamedTuple):
    """The move of T tokens to N = chunks * b slots and back."""

    chunk: int
    """Slots per chunk: b, or 1 for a single token."""
    real: Array
    """[B,N] bool: slots with a token."""
    complete: Array
    """[chunks,B] bool: chunks whose last slot has been reached."""
    filled: Array
    """[B] int32: tokens of the chunk in progress before this piece."""
    offset: Array
    """[B] int32: the same after it."""
    source: Array | None
    """[B,N] int32: the token of each slot; None when slots follow tokens."""
    slot: Array | None
    """[B,T] int32: the slot of each token."""
    mask: Array | None
    """[B,T] bool."""
    num_tokens: int

    def to_slots(self, x: Array) -> Array:
        """[B,T,...] -> [B,N,...], zeros in empty slots."""
        if self.source is None:
            end = self.real.shape[1] - x.shape[1]
            return jnp.pad(x, [(0, 0), (0, end)] + [(0, 0)] * (x.ndim - 2))
        moved = jnp.take_along_axis(x, _like(self.source, x), axis=1)
        return jnp.where(_like(self.real, x), moved, jnp.zeros((), x.dtype))

    def to_tokens(self, x: Array) -> Array:
        """[B,N,...] -> [B,T,...], zeros for padding."""
        if self.slot is None:
            return x[:, : self.num_tokens]
        moved = jnp.take_along_axis(x, _like(self.slot, x), axis=1)
        if self.mask is None:
            return moved
        return jnp.where(_like(self.mask, x), moved, jnp.zeros((), x.dtype))


def _like(index: Array, x: Array) -> Array:
    return index.reshape(*index.shape, *(1,) * (x.ndim - 2))


def place(
    offset: Array, length: int, chunk: int, mask: Array | None = None, *, aligned: bool = False
) -> Placement:
    """The slots of a piece of T tokens.

    Args:
      offset: [B] tokens of the chunk in progress.
      length: T.
      chunk: b.
      mask: [B,T] False for padding; None for none.
      aligned: all offsets are 0.
    """
    batch = offset.shape[0]
    count = jnp.full((batch,), length, jnp.int32)
    if mask is not None:
        count = jnp.sum(mask, axis=1, dtype=jnp.int32)
    total = offset + count
    new_offset = total % chunk
    if length == 1:
        real = jnp.ones((batch, 1), bool) if mask is None else mask
        complete = (real[:, 0] & (new_offset == 0))[None]
        return Placement(1, real, complete, offset, new_offset, None, None, mask, 1)
    spare = 0 if aligned else chunk - 1
    num_chunks = -(-(length + spare) // chunk)
    slots = jnp.arange(num_chunks * chunk, dtype=jnp.int32)
    real = (slots >= offset[:, None]) & (slots < total[:, None])
    complete = (jnp.arange(1, num_chunks + 1)[:, None] * chunk) <= total
    if aligned:
        return Placement(chunk, real, complete, offset, new_offset, None, None, None, length)
    rank = jnp.clip(slots - offset[:, None], 0, length - 1)
    if mask is None:
        slot = offset[:, None] + jnp.arange(length, dtype=jnp.int32)
        return Placement(chunk, real, complete, offset, new_offset, rank, slot, None, length)
    order = jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)  # tokens before padding
    source = jnp.take_along_axis(order, rank, axis=1)
    slot = offset[:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    slot = jnp.clip(slot, 0, num_chunks * chunk - 1)
    return Placement(chunk, real, complete, offset, new_offset, source, slot, mask, length)
