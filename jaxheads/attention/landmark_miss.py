"""Landmark attention with a context-miss token: is the past worth looking at, before looking.

    S1 = softmax over the tokens of the query's own block, the free landmarks and the miss token
    S3 = softmax over the controlled landmarks
    far token j of a block with a free landmark l:        S1[l] S2[j]
    far token j of a block with a controlled landmark l:  S1[miss] S3[l] S2[j]

The miss token's share says how much of what a query needs is missing from its chunk. Blocks of the
cache are controlled and those of the running chunk free, so that its share is known without the
cache, and below a cutoff nothing is retrieved. In training landmarks are controlled at random, each
for itself. Mohtashami and Jaggi, 2023, arXiv:2305.16300.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import jax.numpy as jnp

from jaxheads.attention.api import check_arrays
from jaxheads.attention.landmark import Miss, check_landmarks, dense_landmarks, documents
from jaxheads.attention.masks import Mask
from jaxheads.typing import Array


class MissOutput(NamedTuple):
    """What `landmark_miss_attention` returns."""

    y: Array
    """[B,T,H,W], the dtype of q."""
    weights: Array
    """[B,H,T,S] float32: what each value counts for; 0 for landmarks."""
    miss: Array
    """[B,H,T] float32: the share of the miss token, S1[miss]; 0 where it is below the cutoff and
    controlled blocks are not read."""


def landmark_miss_attention(
    q: Array,
    k: Array,
    v: Array,
    is_landmark: Array,
    miss_key: Array,
    is_controlled: Array,
    *,
    mask: Mask | Array | None = None,
    rem_cutoff: float = 0.0,
    scale: float | None = None,
) -> MissOutput:
    """`landmark_attention` in which a miss token stands for the controlled landmarks.

    The token itself is none of the S: nothing is attended to in its name (its output is 0 in every
    layer), and its value is not read. Where a query sees no controlled landmark, or is below the
    cutoff, the token's share of the weight is lost.

    Args:
      q: [B,T,H,D] rotated queries, those of the last T of the S tokens.
      k: [B,S,K,D] rotated keys; v: [B,S,K,W] values.
      is_landmark: [B,S] bool, anywhere.
      miss_key: [B,K,D] the miss token's key, rotated to position -1.
      is_controlled: [B,S] bool; counts at landmarks. For training, Bernoulli draws.
      mask: as in `landmark_attention`.
      rem_cutoff: shares below this become 0 (inference).
      scale: factor on q.k; None = 1/sqrt(D).
    Raises:
      ValueError: shapes that do not fit, a cutoff outside [0, 1].
      NotImplementedError: masks that are not causal over documents.
    """
    check_arrays(q, k, v)
    check_landmarks(q, k, is_landmark)
    batch, num_keys, kv_heads, width = k.shape
    if jnp.shape(miss_key) != (batch, kv_heads, width):
        raise ValueError(
            f"miss_key has shape {jnp.shape(miss_key)}; needed [B,K,D] = {batch, kv_heads, width}."
        )
    if jnp.shape(is_controlled) != (batch, num_keys) or is_controlled.dtype != bool:
        raise ValueError(
            f"is_controlled has shape {jnp.shape(is_controlled)} and dtype {is_controlled.dtype}; "
            f"needed bool [B,S] = {batch, num_keys}."
        )
    if not 0 <= rem_cutoff <= 1:
        raise ValueError(f"rem_cutoff={rem_cutoff} is a share of the weight, from 0 to 1.")
    index = jnp.arange(num_keys - q.shape[1], num_keys)
    q_ids, k_ids = documents(mask, q.shape[1], (batch, num_keys))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    miss = Miss(miss_key, is_controlled, rem_cutoff)
    y, weights, share = dense_landmarks(q, k, v, is_landmark, index, q_ids, k_ids, scale, miss=miss)
    return MissOutput(y, weights, cast(Array, share))
