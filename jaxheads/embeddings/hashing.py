"""Ids of any size to the rows of a table that is smaller: hashes, and what their collisions cost.

    rows = hash_ids(ids, num_buckets)                     # [...] int32
    rows = multi_hash(ids, num_buckets, num_hashes=2)     # [...,k]: sum the k rows of each id
    print(collision_statistics(np.unique(ids), num_buckets))

Two ids that meet in one bucket share a row for good. With k hashes whose rows are summed, two ids
are the same only where all k meet. Everything is uint32 arithmetic, so it is the same on every
platform, with and without 64-bit types in JAX.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxheads.typing import Array

# Odd constants whose bits look random: 2^32 / golden ratio, and the multipliers of a mixer that
# was found by search for the least bias (Wellons, "Prospecting for hash functions", 2018).
_STEP = 0x9E3779B9
_MIX = (0x7FEB352D, 0x846CA68B)


def _mix(x: Array) -> Array:
    """uint32 to uint32, one to one; every input bit changes every output bit half of the time."""
    x = (x ^ (x >> 16)) * jnp.uint32(_MIX[0])
    x = (x ^ (x >> 15)) * jnp.uint32(_MIX[1])
    return x ^ (x >> 16)


def split_int64(ids: Any) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) uint32 words of 64-bit ids, on the host: JAX may have no 64-bit integers."""
    ids = np.asarray(ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"ids are {ids.dtype}; hashing needs integers.")
    words = ids.astype(np.int64).view(np.uint64)
    return (words & 0xFFFFFFFF).astype(np.uint32), (words >> np.uint64(32)).astype(np.uint32)


def hash_ids(ids: Any, num_buckets: int, *, seed: int = 0, high: Any = None) -> Array:
    """Buckets [...] int32 of ids.

    Args:
      ids: [...] int32 or uint32; of 64-bit ids the low words (`split_int64`).
      num_buckets: V, up to 2^31 - 1. Buckets differ in likelihood by at most V / 2^32.
      seed: another seed is another function.
      high: [...] uint32, the high words; default: those of the same number (the sign of int32).
    Raises:
      TypeError: for ids that are not integers of 32 bits.
      ValueError: for a number of buckets or a seed out of range.
    """
    if not 1 <= num_buckets < 2**31:
        raise ValueError(f"num_buckets={num_buckets} must be from 1 to 2^31 - 1.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be from 0 to 2^32 - 1.")
    if isinstance(ids, np.ndarray | np.integer) and ids.dtype.itemsize > 4:
        raise TypeError(
            f"ids are {ids.dtype}, which JAX would cut to 32 bits; pass "
            "hash_ids(low, ..., high=high) with low, high = split_int64(ids)."
        )
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids are {ids.dtype}; hashing needs integers.")
    if high is None:
        high = jnp.where(ids < 0, jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
    mixed = _mix(ids.astype(jnp.uint32) + _mix(jnp.uint32(seed) + jnp.uint32(_STEP)))
    mixed = _mix(mixed + jnp.asarray(high).astype(jnp.uint32) * jnp.uint32(_STEP))
    return (mixed % jnp.uint32(num_buckets)).astype(jnp.int32)


def multi_hash(
    ids: Any, num_buckets: int, num_hashes: int, *, seed: int = 0, high: Any = None
) -> Array:
    """[...,k] buckets of each id under k hashes; the id's vector is the sum of these rows.

    References: Svenstrup et al., 2017, arXiv:1709.03933 (with learned weights, here all 1).
    """
    if num_hashes < 1:
        raise ValueError(f"num_hashes={num_hashes} must be at least 1.")
    seeds = [(seed + i * _STEP) % 2**32 for i in range(num_hashes)]
    return jnp.stack([hash_ids(ids, num_buckets, seed=s, high=high) for s in seeds], axis=-1)


class CollisionStatistics(NamedTuple):
    """How ids share the rows of a table."""

    unique_ids: int
    buckets_used: int
    colliding_share: float
    """Share of the distinct ids that share their bucket."""
    expected_share: float
    """The same for a random function: 1 - (1 - 1/V)^(n-1)."""
    largest_bucket: int
    """Distinct ids in the fullest bucket."""


def expected_collisions(num_ids: int, num_buckets: int) -> float:
    """The expected share of n ids that share a bucket of V: ``1 - (1 - 1/V)^(n-1)``."""
    if num_ids < 2 or num_buckets == 1:
        return float(num_ids > 1)
    return -math.expm1((num_ids - 1) * math.log1p(-1 / num_buckets))


def collision_statistics(ids: Any, num_buckets: int, *, seed: int = 0) -> CollisionStatistics:
    """What `hash_ids` does to these ids; on the host.

    Args:
      ids: [...] integers of up to 64 bits, repeats allowed.
    """
    low, high = split_int64(np.unique(np.asarray(ids)))
    buckets = hash_ids(low, num_buckets, seed=seed, high=high)
    return bucket_statistics(np.unique(np.asarray(buckets), return_counts=True)[1], num_buckets)


def bucket_statistics(counts: Any, num_buckets: int) -> CollisionStatistics:
    """The same from how many distinct ids every bucket (or every used one) holds."""
    counts = np.asarray(counts)
    total = int(counts.sum())
    return CollisionStatistics(
        total,
        int(np.count_nonzero(counts)),
        float(counts[counts > 1].sum() / total) if total else 0.0,
        expected_collisions(total, num_buckets),
        int(counts.max(initial=0)),
    )
