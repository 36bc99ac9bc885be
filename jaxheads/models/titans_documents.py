"""Documents of a packed row as a recurrence sees them, across calls."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.typing import Array


class Progress(NamedTuple):
    """How far the rows of a batch have come."""

    segment: Array
    """[B] int32 segment id of the last token; 0 before the first one."""
    count: Array
    """[B] int32 tokens of its document so far."""


class Documents(NamedTuple):
    """The tokens of one call; a field is None where nothing needs to be told apart."""

    ids: Array | None
    """[B,T] document of each token, 0 for padding."""
    real: Array | None
    """[B,T] bool: tokens, not padding."""
    reset: Array | None
    """[B,T] bool: tokens that begin a document inside a row that has begun."""
    fresh: Array | None
    """[B] bool: rows that had no token before this call."""
    index: Array
    """[T] or [B,T] int32: the place of each token in its document."""


def no_progress(batch_size: int) -> Progress:
    """Before the first token."""
    zeros = jnp.zeros((batch_size,), jnp.int32)
    return Progress(zeros, zeros)


def documents(
    segment_ids: Array | None, length: int, progress: Progress | None, *, carry: bool = False
) -> tuple[Documents, Progress | None]:
    """The documents of a call of T tokens, and the progress after it.

    Args:
      segment_ids: [B,T]; 0 is padding; None: one document a row (only without `progress`).
      length: T.
      progress: what went before; None: nothing, and nothing follows.
      carry: take all tokens of a row for one document.
    """
    if segment_ids is None:
        return Documents(None, None, None, None, jnp.arange(length, dtype=jnp.int32)), None
    ids = segment_ids.astype(jnp.int32)
    ids = (ids != 0).astype(jnp.int32) if carry else ids
    batch = ids.shape[0]
    before = no_progress(batch) if progress is None else progress
    real = ids != 0
    place = jnp.arange(length, dtype=jnp.int32)
    last = jax.lax.cummax(jnp.where(real, place, -1), axis=1)  # [B,T] newest token up to here
    older = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    held = jnp.take_along_axis(ids, jnp.maximum(older, 0), axis=1)
    previous = jnp.where(older < 0, before.segment[:, None], held)
    begins = real & (ids != previous)
    rank = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    start = jax.lax.cummax(jnp.where(begins, rank, -1), axis=1)
    index = jnp.where(start >= 0, rank - start, rank + before.count[:, None])
    end = last[:, -1]
    at_end = lambda x: jnp.take_along_axis(x, jnp.maximum(end, 0)[:, None], axis=1)[:, 0]
    after = Progress(
        jnp.where(end < 0, before.segment, at_end(ids)),
        jnp.where(end < 0, before.count, at_end(index) + 1),
    )
    reset = None if carry else begins & (previous != 0)
    docs = Documents(ids, real, reset, before.segment == 0, index)
    return docs, None if progress is None else after
