"""Nearest search in histories that several devices hold a part of each.

    best = split_topk(scores, (item, category), k, axis_name="context")     # inside jax.shard_map

Every device searches its part, the n K best of the parts are exchanged, and the K best of those are
the K best of all: exact, with K numbers per device on the wire instead of the history.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.embeddings.dare import search_topk
from jaxheads.typing import Array


class Best(NamedTuple):
    """The K highest scores, highest first; equal scores in order of position."""

    scores: Array
    """[B,K]"""
    index: Array
    """[B,K] int32 positions in the whole history."""
    carried: tuple[Array, ...]
    """[B,K] each, what stands there."""


def split_topk(
    scores: Array,
    carried: Sequence[Array],
    k: int,
    *,
    axis_name: str | None = None,
    approximate: bool = False,
) -> Best:
    """The K highest scores of a history, and what stands at their places.

    Args:
      scores: [B,T/n], this device's part of the scores; parts are equal and in order.
      carried: [B,T/n] each, such as ids.
      k: K, at most T.
      axis_name: the mesh axis of `jax.shard_map` that splits the history; None: it is whole.
      approximate: search each part as `dare.search_topk` does with this.
    Raises:
      ValueError: for K < 1 or K > T.
    """
    length = scores.shape[-1]
    if axis_name is None:
        values, index = search_topk(scores, k, approximate=approximate)
        return Best(values, index, tuple(_at(x, index) for x in carried))
    parts = jax.lax.axis_size(axis_name)
    if k > parts * length:
        raise ValueError(f"k={k} of {parts * length} behaviours; k must be at most their number.")
    values, here = search_topk(scores, min(k, length), approximate=approximate)
    index = here + jax.lax.axis_index(axis_name) * length
    found = [values, index, *(_at(x, here) for x in carried)]
    # Parts follow one another by position, so ties fall as in a search of the whole.
    found = [jax.lax.all_gather(x, axis_name, axis=1, tiled=True) for x in found]
    _, best = search_topk(found[0], k)
    values, index, *rest = (_at(x, best) for x in found)
    return Best(values, index, tuple(rest))


def _at(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index, axis=-1)
