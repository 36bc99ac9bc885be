"""The standard variant, `VARIANTS["dense"]`: softmax attention of every query over every key."""

from __future__ import annotations

from typing import Any

from jaxheads.attention.api import IMPLEMENTATIONS, attend
from jaxheads.attention.contract import AttentionContext, Cost, HeadsOut, Supports, Variant
from jaxheads.typing import Array


def init(key: Array, cfg: Any, options: None = None) -> None:
    """Softmax attention has no parameters of its own."""


def apply(params: None, q: Array, k: Array, v: Array, ctx: AttentionContext) -> HeadsOut:
    """Rotates queries and keys, then attends.

    Args:
      params: None.
      q: [B,T,H,D] unrotated queries.
      k: [B,S,K,D] keys, unrotated unless `ctx.k_is_rotated`.
      v: [B,S,K,W] values.
      ctx: see `AttentionContext`.
    Returns:
      HeadsOut with z [B,T,H,W].
    """
    tap = ctx.tap
    q, k = rotate_heads(q, k, ctx)
    z, lse = attend(q, k, v, ctx, needs_lse=tap.wants("lse"))
    if lse is not None and tap.wants("lse"):
        lse = tap("lse", lse)
    return HeadsOut(z, lse, {})


def rotate_heads(q: Array, k: Array, ctx: AttentionContext) -> tuple[Array, Array]:
    """Queries and keys rotated, unless the model has no rotation or the keys come rotated."""
    if ctx.rotate is not None:
        q = ctx.tap("q_rot", ctx.rotate(q, ctx.q_positions))
        if not ctx.k_is_rotated:
            k = ctx.tap("k_rot", ctx.rotate(k, ctx.k_positions))
    return q, k


def cost(
    cfg: Any,
    num_queries: int,
    num_keys: int,
    *,
    is_causal: bool = True,
    itemsize: int = 2,
    options: None = None,
) -> Cost:
    """Two matrix products of 2 T S D operations per head, halved where half is never visible.

    Args:
      cfg: has num_heads, num_kv_heads and head_dim.
      num_queries: T.
      num_keys: S.
      is_causal: causal self-attention (T = S) needs half the products.
      itemsize: bytes of an activation.
      options: None.
    """
    flops = 4.0 * num_queries * num_keys * cfg.num_heads * cfg.head_dim
    if is_causal and num_queries == num_keys:
        flops /= 2
    cache = 2.0 * num_keys * cfg.num_kv_heads * cfg.head_dim * itemsize
    queries_and_outputs = 2.0 * num_queries * cfg.num_heads * cfg.head_dim * itemsize
    return Cost(flops=flops, bytes=queries_and_outputs + cache, kv_cache_bytes=cache)


SOFTMAX = Variant(
    name="dense",
    init=init,
    apply=apply,
    cost=cost,
    supports=Supports(
        causal=True,
        bidirectional=True,
        gqa=True,
        cached_decode=True,
        caches_rotated_keys=True,
        segment_ids=True,
        head_mask=True,
        taps=frozenset({"q_rot", "k_rot", "scores", "pattern", "lse", "attn_argmax"}),
        implementations=tuple(IMPLEMENTATIONS),
        mesh_axes=frozenset({"data", "fsdp", "model", "context"}),
    ),
)
