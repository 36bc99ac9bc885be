"""One softmax over core tokens and exact tokens, from attention over each of them.

The window is a band with a staircase edge, the cores are causal between groups: two masks that
tiled attention serves as it is, in O(T + S) memory. Their results are merged by their lse.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxheads.attention.blocked import blocked_attention
from jaxheads.attention.cca_pooling import (
    CCAOptions,
    Cores,
    Places,
    Rotate,
    places,
    pool_found,
    pool_row,
)
from jaxheads.attention.dense import dense_attention
from jaxheads.attention.masks import Mask
from jaxheads.attention.merge import merge_pair
from jaxheads.typing import Array

DENSE_SCORES = 256 * 256  # up to so many scores a head, one matrix product beats tiles on CPU


def attend_row(
    q: Array,
    k: Array,
    v: Array,
    options: CCAOptions,
    scale: float,
    segment_ids: Array | None = None,
    rotate: Rotate | None = None,
) -> tuple[Array, Array]:
    """z [B,L,H,W] and lse [B,H,L] of whole rows, rotated; documents may begin anywhere."""
    if segment_ids is None:
        where = None
        cores = pool_row(q, k, v, options, scale, rotate)[0]
    else:
        where = places(jnp.asarray(segment_ids), options.group_size)
        cores = pool_found(q, k, v, where, options, scale, rotate).cores
    return attend_parts(q, k, v, [cores], options, scale, where, where)


def attend_parts(
    q: Array,
    k: Array,
    v: Array,
    cores: list[Cores],
    options: CCAOptions,
    scale: float,
    q_where: Places | None,
    k_where: Places | None,
) -> tuple[Array, Array]:
    """One softmax over cores and exact tokens.

    Args:
      q: [B,T,H,D]; k: [B,S,K,D], v: [B,S,K,W] exact tokens.
      cores: any number of sets of cores.
      options: what is visible, and how to compute it.
      scale: factor on q.k.
      q_where: places of the queries and `k_where` of the exact tokens; None for both: one document
        from its first token on.
    Returns:
      z [B,T,H,W] and lse [B,H,T].
    """
    is_small = q.shape[1] * (k.shape[1] + sum(c.k.shape[1] for c in cores)) <= DENSE_SCORES
    is_dense = options.impl == "dense" or (options.impl == "auto" and is_small)
    with jax.named_scope(f"attention.cca.{'dense' if is_dense else 'blocked'}"):
        if is_dense:
            mask = exact_mask(options, q_where, k_where, q.shape[1], k.shape[1])
            z, lse = dense_attention(q, k, v, mask, scale=scale)
        else:
            mask = _window_mask(options, q_where, k_where)
            z, lse = blocked_attention(q, k, v, mask, scale=scale, mask_fn=options.sees_exactly)
        attend = dense_attention if is_dense else blocked_attention
        cores = [some for some in cores if some.k.shape[1]]
        for some in cores:
            mask = core_mask(options, some, q.shape[1], q_where)
            part = attend(q, some.k, some.v, mask, scale=scale)
            z, lse = _merge((z, lse), part)
    return z.astype(q.dtype), lse


def _merge(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two results (z [B,T,H,W], lse [B,H,T]) over different keys as one, float32."""
    by_head = lambda z: jnp.einsum("bthw->bhtw", z).astype(jnp.float32)
    z, lse = merge_pair((by_head(a[0]), a[1]), (by_head(b[0]), b[1]))
    return jnp.einsum("bhtw->bthw", z), lse


def _window_mask(options: CCAOptions, q_where: Places | None, k_where: Places | None) -> Mask:
    """What could be exact: `CCAOptions.sees_exactly` decides within it."""
    if q_where is None or k_where is None:
        return Mask(is_causal=True, window=options.reach)
    return Mask(
        is_causal=True,
        window=options.reach,
        q_index=q_where.index,
        k_index=k_where.index,
        q_segment_ids=q_where.run,
        k_segment_ids=k_where.run,
    )


def exact_mask(
    options: CCAOptions,
    q_where: Places | None,
    k_where: Places | None,
    num_queries: int,
    num_keys: int,
) -> Mask:
    """Which tokens are seen exactly, with [T,S] booleans inside."""
    mask = _window_mask(options, q_where, k_where)
    exact = options.sees_exactly(*mask.indices((0, num_queries), (0, num_keys)))
    return dataclasses.replace(mask, head_mask=exact if exact.ndim == 2 else exact[:, None])


def core_mask(options: CCAOptions, cores: Cores, num_queries: int, q_where: Places | None) -> Mask:
    """Cores before `num_cores_seen`: causality between groups."""
    if q_where is None or cores.run is None:
        last = options.num_cores_seen(jnp.arange(num_queries)) - 1
        return Mask(is_causal=True, q_index=last)
    return Mask(
        is_causal=True,
        q_index=options.num_cores_seen(q_where.index) - 1,
        k_index=cores.index,
        q_segment_ids=q_where.run,
        k_segment_ids=cores.run,
    )


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Raises ValueError where query heads are not grouped evenly over kv heads."""
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"H={num_heads} query heads are not a multiple of K={num_kv_heads} kv heads; query "
            "heads are grouped evenly over kv heads."
        )
