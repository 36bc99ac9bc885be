"""Summaries of activations, made inside the layer that has them: ``record(..., reduce=...)``.

    seen = record(forward, "pattern", reduce=entropy)(model, tokens).seen["pattern"]   # [L,B,H,T]

Those of ``pattern`` [B,H,T,S] work row by row. Where nothing else needs the pattern, a model makes
its rows in blocks of queries, so that a text of any length is summarised without a [T,S] map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.taps import Reduction
from jaxheads.typing import Array, ArrayLike


class TopK(NamedTuple):
    """What `top_k` gives."""

    values: Array
    """[...,k] float32, highest first"""
    positions: Array
    """[...,k] int32"""


def _entropy(rows: Array) -> Array:
    logs = jnp.log(jnp.where(rows > 0, rows, 1.0))
    return -jnp.sum(rows * logs, axis=-1)


def _argmax(rows: Array) -> Array:
    return jnp.argmax(rows, axis=-1).astype(jnp.int32)


def _norm(value: Array) -> Array:
    return jnp.linalg.norm(value.astype(jnp.float32), axis=-1)


@dataclass(frozen=True)
class _TopK:
    k: int

    def __call__(self, rows: Array) -> TopK:
        values, positions = jax.lax.top_k(rows, min(self.k, rows.shape[-1]))
        return TopK(values, positions.astype(jnp.int32))


def _mass_of_mask(rows: Array, keys: Array) -> Array:
    short = rows.shape[-1] - keys.shape[-1]
    if short < 0:
        raise ValueError(f"keys cover {keys.shape[-1]} positions; there are {rows.shape[-1]}.")
    keys = jnp.pad(keys, [(0, 0)] * (keys.ndim - 1) + [(0, short)])  # free slots of a cache
    keys = keys if keys.ndim == 1 else keys[:, None, None, :]
    return jnp.sum(jnp.where(keys, rows, 0.0), axis=-1)


def _mass_of_list(rows: Array, keys: Array) -> Array:
    columns = jnp.broadcast_to(keys, (rows.shape[0], keys.shape[-1]))[:, None, None, :]
    taken = jnp.take_along_axis(rows, jnp.maximum(columns, 0), axis=-1, mode="fill")
    return jnp.sum(jnp.where(columns >= 0, taken, 0.0), axis=-1)


entropy = Reduction(_entropy, by_row=True)
"""Of a pattern's rows, in nats: ``-sum_s p log p``, [B,H,T]. From 0 to log(number of keys)."""

argmax = Reduction(_argmax, by_row=True)
"""The key each query attends to most, [B,H,T] int32; the first one on ties."""

norm = Reduction(_norm)
"""Length of a value over its last axis, float32: of ``z`` [B,T,H], of ``resid_post`` [B,T]."""


def top_k(k: int) -> Reduction:
    """The `k` keys that each query attends to most: `TopK` of [B,H,T,k]."""
    if k < 1:
        raise ValueError(f"k={k} must be at least 1.")
    return Reduction(_TopK(k), by_row=True)


def mass(keys: ArrayLike | Any) -> Reduction:
    """The attention each query gives to a set of keys, [B,H,T].

    Args:
      keys: columns of the text as integers [N], or [B,N] for each row (-1 pads), or a bool array
        [S] or [B,S]. Data: two sets of one shape share a program. Each key counts once a mention.
    """
    keys = keys if isinstance(keys, jax.Array) else np.asarray(keys)
    if keys.ndim not in (1, 2) or not (
        jnp.issubdtype(keys.dtype, jnp.bool_) or jnp.issubdtype(keys.dtype, jnp.integer)
    ):
        raise ValueError(
            f"keys have shape {keys.shape} and dtype {keys.dtype}; needed columns [N] or [B,N], or "
            "a bool array [S] or [B,S]."
        )
    is_mask = jnp.issubdtype(keys.dtype, jnp.bool_)
    return Reduction(_mass_of_mask if is_mask else _mass_of_list, keys, by_row=True)
