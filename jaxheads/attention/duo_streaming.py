"""Streaming attention: every token sees a few first tokens and a window.

    M_s[t,u] = (u <= t) and (u < sink or t - u < recent)

in absolute positions; `recent` counts the token itself.

References: Xiao et al., 2023, arXiv:2309.17453; Xiao et al., 2024, arXiv:2410.10819.
"""

from __future__ import annotations

import math
from typing import cast

import jax.numpy as jnp
import numpy as np

from jaxheads.attention.api import attention, check_arrays
from jaxheads.attention.blocked import blocked_attention
from jaxheads.attention.dense import dense_attention
from jaxheads.attention.masks import Mask
from jaxheads.attention.merge import merge_partitions
from jaxheads.typing import Array, ArrayLike, is_traced

IMPLS = ("dense", "blocked")


def check_sizes(sink: int, recent: int) -> None:
    """Raise unless a streaming head sees at least the token itself."""
    if sink < 0 or recent < 1:
        raise ValueError(
            f"sink={sink}, recent={recent}: needed sink >= 0 first tokens and recent >= 1 last "
            "ones, the token itself included."
        )


def as_pattern(pattern: ArrayLike, num_kv_heads: int, num_heads: int | None = None) -> np.ndarray:
    """[K] bool, True for the retrieval heads of a layer.

    Raises:
      ValueError: for another shape, values other than 0 and 1, or heads that do not group.
    """
    if num_heads is not None and num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} kv heads evenly.")
    if is_traced(pattern):
        raise TypeError("pattern decides the shapes of the caches; it cannot be traced.")
    values = np.asarray(pattern)
    if values.shape != (num_kv_heads,):
        hint = " (one a kv head, not one a query head)" if values.shape == (num_heads,) else ""
        raise ValueError(f"pattern has shape {values.shape}, needed ({num_kv_heads},){hint}.")
    if not np.isin(values, (0, 1)).all():
        raise ValueError(f"pattern={values.tolist()} must be 0 or 1; see discovery.sparsify.")
    return values.astype(bool)


def streaming_mask(q_pos: ArrayLike, k_pos: ArrayLike, sink: ArrayLike, recent: ArrayLike) -> Array:
    """(u <= t) and (u < sink or t - u < recent): bool [...,T,S].

    Args:
      q_pos: [...,T] positions t of the queries.
      k_pos: [...,S] positions u of the keys.
      sink: first tokens that everybody sees.
      recent: last tokens a query sees, itself included.
    Example:
      >>> streaming_mask(jnp.arange(4), jnp.arange(4), 1, 2).astype(int)[3].tolist()
      [1, 0, 1, 1]
    """
    if not is_traced(sink) and not is_traced(recent):
        check_sizes(int(sink), int(recent))
    t, u = jnp.asarray(q_pos)[..., :, None], jnp.asarray(k_pos)[..., None, :]
    return (u <= t) & ((u < sink) | (t - u < recent))


def streaming_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    sink: int,
    recent: int,
    impl: str = "dense",
    scale: float | None = None,
) -> Array:
    """Softmax attention under `streaming_mask`, tokens counted from 0.

    Args:
      q: [B,T,H,D] rotated queries.
      k: [B,T,K,D] rotated keys; K divides H.
      v: [B,T,K,W] values.
      sink: first tokens seen by all; at least 0.
      recent: length of the window, the token itself included; at least 1.
      impl: "dense" forms [T,T] scores. "blocked" visits T (sink + recent) of them: attention over
        the first tokens and over the window, merged.
      scale: factor on q.k; None = 1/sqrt(D).
    Returns:
      z [B,T,H,W], the dtype of q.
    Example:
      >>> x = jnp.ones((1, 6, 2, 8))
      >>> streaming_attention(x, x, x, sink=1, recent=2).shape
      (1, 6, 2, 8)
    """
    check_sizes(sink, recent)
    check_arrays(q, k, v)
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} queries and {k.shape[1]} keys: streaming_attention is over one text; "
            "use duo_attention_step with a cache."
        )
    return stream(q, k, v, None, sink, recent, impl, scale)


def masked(q: Array, k: Array, v: Array, mask: Mask, scale: float | None = None) -> Array:
    """`attention` under a mask: z alone."""
    return cast(Array, attention(q, k, v, mask, scale=scale))


def stream(q, k, v, padding: Array | None, sink: int, recent: int, impl: str, scale) -> Array:
    """`streaming_attention` of rows whose first `padding` [B] columns are no tokens."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    index = jnp.arange(q.shape[1], dtype=jnp.int32)
    start = jnp.zeros(q.shape[0], jnp.int32) if padding is None else padding
    own = index - start[:, None]  # [B,T] tokens before each
    if impl == "dense":
        seen = streaming_mask(own, own, sink, recent) & (own >= 0)[:, None, :]
        mask = Mask(is_causal=True, head_mask=seen[:, None])
        return dense_attention(q, k, v, mask, scale=scale)[0]
    if impl != "blocked":
        raise ValueError(f"impl={impl!r} is not one of {', '.join(IMPLS)}.")
    window = Mask(is_causal=True, window=recent, key_mask=own >= sink)
    parts = [blocked_attention(q, k, v, window, scale=scale)]
    if sink:
        at = start[:, None] + jnp.arange(min(sink, q.shape[1]), dtype=jnp.int32)  # [B,sink]
        first = lambda x: jnp.take_along_axis(x, at[..., None, None], axis=1, mode="clip")
        mask = Mask(is_causal=True, k_index=at)
        parts.append(blocked_attention(q, first(k), first(v), mask, scale=scale))
    return merge_partitions(*zip(*parts, strict=True))[0]
