"""Landmark attention: a token at the end of each block is the gate to it.

    far block:   weight of a token = S1[landmark] * S2[token inside its block]
    own block:   weight of a token = S1[token]

S1 is one softmax over the tokens of the query's own block and the landmarks of earlier ones, S2 one
inside each earlier block: a grouped softmax. Trained so, a landmark's score says whether its block
is worth reading, and `landmark_cache` reads those blocks alone.

    y = landmark_attention(q, k, v, is_landmark)                              # anywhere
    y = landmark_attention(q, k, v, is_landmark, impl="fused", block_size=50)  # after every 50

`landmark_variant.py` puts it into a decoder. Mohtashami and Jaggi, 2023, arXiv:2305.16300.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.attention.api import check_arrays
from jaxheads.attention.contract import AttentionContext, asked_beyond
from jaxheads.attention.landmark_blocks import Regular, block_attention, nonzero
from jaxheads.attention.landmark_tokens import (
    check_block_size,
    insert_landmarks,
    landmark_places,
    strip_landmarks,
)
from jaxheads.attention.masks import FLOOR, Mask, penalty
from jaxheads.fields import unknown
from jaxheads.typing import Array, is_traced

__all__ = [
    "IMPLS",
    "LandmarkOutput",
    "grouped_softmax",
    "insert_landmarks",
    "landmark_attention",
    "landmark_places",
    "strip_landmarks",
]

IMPLS = ("dense", "fused")


class LandmarkOutput(NamedTuple):
    """What `landmark_attention` returns with `return_weights=True`."""

    y: Array
    """[B,T,H,W], the dtype of q."""
    weights: Array
    """[B,H,T,S] float32: what each value counts for; 0 for landmarks."""


class Miss(NamedTuple):
    """A token that stands for the controlled landmarks (`landmark_miss.py`)."""

    key: Array
    """[B,K,D] rotated."""
    is_controlled: Array
    """[B,S] bool; counts at landmarks."""
    cutoff: float
    """Shares below this are 0."""


def grouped_softmax(
    scores: Array, group_ids: Array, *, num_groups: int, where: Array | None = None
) -> Array:
    """A softmax over each group of the last axis.

        out_j = exp(s_j) / sum over j' of j's group exp(s_j')

    By sums over segments: nothing has an axis of groups beside one of scores.

    Args:
      scores: [...,S].
      group_ids: integers broadcastable to scores, 0 to num_groups - 1.
      num_groups: how many groups a row may have.
      where: bool broadcastable to scores; others count nowhere and get 0.
    Returns:
      [...,S] float32. A group without members is nowhere; nothing is NaN.
    Raises:
      ValueError: ids outside their range; where they are traced, those entries are NaN.
    Example:
      >>> grouped_softmax(jnp.zeros(4), jnp.asarray([0, 0, 1, 1]), num_groups=2).tolist()
      [0.5, 0.5, 0.5, 0.5]
    """
    if num_groups < 1:
        raise ValueError(f"num_groups={num_groups} must be at least 1.")
    if not is_traced(group_ids):
        ids = np.asarray(group_ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < num_groups:
            raise ValueError(
                f"group_ids run from {ids.min()} to {ids.max()}, outside 0 to {num_groups - 1}; "
                "num_groups is the number of different groups that a row may have."
            )
    shape = jnp.shape(scores)
    row = partial(_grouped_row, num_groups=num_groups)
    for _ in shape[:-1]:
        row = jax.vmap(row)
    seen = jnp.broadcast_to(True if where is None else where, shape)
    return row(jnp.asarray(scores, jnp.float32), jnp.broadcast_to(group_ids, shape), seen)


def _grouped_row(scores: Array, ids: Array, seen: Array, *, num_groups: int) -> Array:
    scores = scores + penalty(seen)
    top = jax.ops.segment_max(jax.lax.stop_gradient(scores), ids, num_segments=num_groups)
    of_mine = partial(jnp.take, indices=ids, mode="fill", fill_value=jnp.nan)
    weights = jnp.exp(scores - of_mine(jnp.maximum(top, FLOOR)))
    total = jax.ops.segment_sum(weights, ids, num_segments=num_groups)
    return weights / of_mine(nonzero(total))


def landmark_attention(
    q: Array,
    k: Array,
    v: Array,
    is_landmark: Array,
    *,
    mask: Mask | Array | None = None,
    impl: str = "dense",
    block_size: int | None = None,
    return_weights: bool = False,
    scale: float | None = None,
    group_dropout: float = 0.0,
    key: Array | None = None,
) -> Array | LandmarkOutput:
    """Causal attention with a grouped softmax.

    With b(j) the number of landmarks before token j, and causal scores s = scale q.k,

        own   = tokens j <= i with b(j) = b(i), no landmarks
        gates = landmarks l with b(l) < b(i)
        S1    = softmax over own and gates;   S2 = softmax over the tokens of one earlier block
        y_i   = sum_own S1_j v_j + sum_gates S1_l sum_{j in l's block} S2_j v_j

    A landmark's own query attends to its block; its value is never read. Rows sum to 1 but for the
    weight of landmarks whose block is empty, which is lost. Without landmarks this is plain causal
    attention.

    Args:
      q: [B,T,H,D] rotated queries, those of the last T of the S tokens.
      k: [B,S,K,D] rotated keys; K divides H. v: [B,S,K,W] values.
      is_landmark: [B,S] bool, anywhere; "fused" wants one after every `block_size` tokens (a row
        that differs, where this is known only at run time, is NaN).
      mask: [B,S] bool, real tokens; or a `Mask` with segment ids or a key mask.
      impl: "dense" forms the weights [B,H,T,S]; "fused" never does, in either pass.
      block_size: l, for "fused".
      return_weights: return `LandmarkOutput(y, weights)`; "dense" can.
      scale: factor on q.k; None = 1/sqrt(D).
      group_dropout: probability that a query loses a gate (the others are scaled up; tokens of its
        own block stay as they are); "dense" can. Needs `key`.
      key: for `group_dropout`.
    Returns:
      y [B,T,H,W] in the dtype of q; queries that see nothing get zeros.
    Raises:
      ValueError: shapes that do not fit, an unknown impl, and landmarks that "fused" cannot take.
      NotImplementedError: what only "dense" can, and masks that are neither.
    """
    check_arrays(q, k, v)
    if impl not in IMPLS:
        raise ValueError(unknown("impl", impl, IMPLS))
    check_landmarks(q, k, is_landmark)
    batch, num_keys = k.shape[:2]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    index = jnp.arange(num_keys - q.shape[1], num_keys)
    q_ids, k_ids = documents(mask, q.shape[1], (batch, num_keys))
    if impl == "fused":
        if return_weights or group_dropout:
            raise NotImplementedError(
                "impl='fused' never has the weights of a row at once: return_weights and "
                "group_dropout need impl='dense'."
            )
        first = num_keys - q.shape[1]
        block = _check_regular(is_landmark, block_size, first)
        y: Any = block_attention(
            group_heads(q, k.shape[2]), k, v, q_ids, k_ids, Regular(block, scale, first)
        )
        fits = (is_landmark == landmark_places(num_keys, block)).all(axis=1)
        y = jnp.where(fits[:, None, None, None], y.reshape(*q.shape[:3], -1), jnp.nan)
        return y.astype(q.dtype)
    keep = None
    if group_dropout:
        keep = _kept_gates(group_dropout, key, (batch, q.shape[2], q.shape[1], num_keys))
    y, weights, _ = dense_landmarks(q, k, v, is_landmark, index, q_ids, k_ids, scale, keep)
    return LandmarkOutput(y, weights) if return_weights else y


def dense_landmarks(
    q: Array,
    k: Array,
    v: Array,
    is_landmark: Array,
    index: Array,
    q_ids: Array | None,
    k_ids: Array | None,
    scale: float,
    keep: Array | None = None,
    miss: Miss | None = None,
) -> tuple[Array, Array, Array | None]:
    """The definition with all weights in memory.

    Args:
      q: [B,T,H,D], k: [B,S,K,D], v: [B,S,K,W], rotated.
      is_landmark: [B,S]; those of padding do not count.
      index: [T] or [B,T] places of the queries among the keys.
      q_ids, k_ids: [B,T] and [B,S] documents, 0 for padding; both or none.
      keep: [B,H,T,S] factors on gates, at their landmarks.
      miss: a token between queries and controlled landmarks.
    Returns:
      y [B,T,H,W], weights [B,H,T,S] and, with `miss`, its share [B,H,T].
    """
    batch, num_keys, kv_heads = k.shape[:3]
    if k_ids is not None:
        is_landmark = is_landmark & (k_ids != 0)
    index = jnp.broadcast_to(index, q.shape[:2])
    before = jnp.cumsum(is_landmark, axis=1) - is_landmark  # [B,S], the block of each token
    mine = jnp.take_along_axis(before, index, axis=1)[..., None]  # [B,T,1]
    sees = jnp.arange(num_keys) <= index[..., None]  # [B,T,S]
    if q_ids is not None and k_ids is not None:
        sees = sees & (q_ids[..., None] == k_ids[:, None]) & (k_ids != 0)[:, None]
    landmark, block = is_landmark[:, None], before[:, None]
    own = sees & (block == mine) & ~landmark
    far = sees & (block < mine)
    group = jnp.where(far & ~landmark, 1 + block, 0)

    queries = group_heads(q, kv_heads)
    scores = jnp.einsum(
        "btkgd,bskd->bkgts", queries, k, preferred_element_type=jnp.float32
    ).reshape(batch, q.shape[2], q.shape[1], num_keys)
    share = None
    if miss is None:
        shares = grouped_softmax(
            scale * scores, group[:, None], num_groups=num_keys + 1, where=(own | far)[:, None]
        )
    else:  # one more key, and one more group for controlled landmarks
        controlled = landmark & miss.is_controlled[:, None]
        group = jnp.where(far & controlled, num_keys + 1, group)
        last = jnp.einsum("btkgd,bkd->bkgt", queries, miss.key, preferred_element_type=jnp.float32)
        scores = jnp.concatenate([scores, last.reshape(*scores.shape[:3], 1)], axis=-1)
        one_more = ((0, 0), (0, 0), (0, 1))
        shares = grouped_softmax(
            scale * scores, jnp.pad(group, one_more)[:, None], num_groups=num_keys + 2,
            where=jnp.pad(own | far, one_more, constant_values=True)[:, None],
        )  # fmt: skip
        shares, share = shares[..., :-1], shares[..., -1]
        share = jnp.where(share < miss.cutoff, 0.0, share)
        keep = jnp.where(controlled[:, None], share[..., None], 1.0)
    # The landmark that closes a token's block: the first one from there on.
    at = jnp.where(is_landmark, jnp.arange(num_keys), num_keys - 1)
    closing = jax.lax.cummin(at, axis=1, reverse=True)
    gates = shares if keep is None else shares * keep
    gates = jax.vmap(lambda x, i: jnp.take(x, i, axis=-1, mode="clip"))(gates, closing)
    weights = jnp.where(own[:, None], shares, 0.0)
    weights = jnp.where((far & ~landmark)[:, None], gates * shares, weights)
    by_group = weights.reshape(batch, kv_heads, -1, *weights.shape[2:]).astype(v.dtype)
    y = jnp.einsum("bkgts,bskw->btkgw", by_group, v, preferred_element_type=jnp.float32)
    return y.reshape(*q.shape[:3], -1).astype(q.dtype), weights, share


def group_heads(q: Array, num_kv_heads: int) -> Array:
    """[B,T,H,D] -> [B,T,K,G,D]."""
    return q.reshape(*q.shape[:2], num_kv_heads, -1, q.shape[-1])


def check_landmarks(q: Array, k: Array, is_landmark: Array) -> None:
    """Raise for landmarks that are not said for every key, and for queries without keys."""
    batch, num_keys = k.shape[:2]
    if jnp.shape(is_landmark) != (batch, num_keys) or is_landmark.dtype != bool:
        raise ValueError(
            f"is_landmark has shape {jnp.shape(is_landmark)} and dtype {is_landmark.dtype}; needed "
            f"bool [B,S] = {(batch, num_keys)}."
        )
    if q.shape[1] > num_keys:
        raise ValueError(f"q has {q.shape[1]} tokens, k only {num_keys}: q are those of the last.")


def documents(
    mask: Mask | Array | None, num_queries: int, keys: tuple[int, int]
) -> tuple[Array | None, Array | None]:
    """Documents [B,T] of the queries and [B,S] of the keys, 0 for padding."""
    if mask is None:
        return None, None
    if not isinstance(mask, Mask):
        mask = Mask(is_causal=True, key_mask=mask)
    moved = mask.q_index is not None or mask.k_index is not None
    others = ((moved, "indices of its own"),)
    reason = asked_beyond(AttentionContext(mask=mask), others)
    if reason is not None:
        raise NotImplementedError(
            f"landmark_attention cannot honour a mask with {reason}; it is causal over all tokens "
            "of a document: pass segment ids or a key mask."
        )
    ids = mask.q_segment_ids if mask.k_segment_ids is None else mask.k_segment_ids
    ids = jnp.ones(keys, jnp.int32) if ids is None else jnp.asarray(ids)
    for name, x in (("the mask", mask.key_mask), ("its segment ids", ids)):
        if x is not None and jnp.shape(x) != keys:
            raise ValueError(f"{name} of keys has shape {jnp.shape(x)}, needed [B,S] = {keys}.")
    ids = ids if mask.key_mask is None else jnp.where(mask.key_mask, ids, 0)
    own = mask.q_segment_ids
    return ids[:, -num_queries:] if own is None or mask.k_segment_ids is None else own, ids


def _check_regular(is_landmark: Array, block_size: int | None, first: int) -> int:
    """Raise for landmarks that do not stand in a row of equal blocks; the block size."""
    if block_size is None:
        raise ValueError("impl='fused' needs block_size, the text tokens of every block.")
    check_block_size(block_size)
    length, period = is_landmark.shape[1], block_size + 1
    if length % period or first % period:
        raise ValueError(
            f"impl='fused' takes whole blocks: {length} keys and the {first} before the first "
            f"query must be multiples of block_size + 1 = {period}; pad the text, or take 'dense'."
        )
    if not is_traced(is_landmark):
        places = np.asarray(is_landmark)
        wrong = (places != landmark_places(length, block_size)).any(axis=0)
        if wrong.any():
            raise ValueError(
                f"impl='fused' wants a landmark after every block_size={block_size} tokens and "
                f"nowhere else; token {int(wrong.argmax())} differs. impl='dense' takes any."
            )
    return cast(int, block_size)


def _kept_gates(rate: float, key: Array | None, shape: tuple[int, ...]) -> Array:
    if not 0 <= rate < 1:
        raise ValueError(f"group_dropout={rate} must be at least 0 and below 1.")
    if key is None:
        raise ValueError(f"group_dropout={rate} draws gates at random; pass key=jax.random.key(0).")
    return jax.random.bernoulli(key, 1 - rate, shape) / (1 - rate)
