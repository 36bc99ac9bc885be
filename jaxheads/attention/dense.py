"""Softmax attention with the whole pattern in memory: the reference, and the only path with taps.

    scores  = cap tanh(scale q.k / cap) + bias - slope |q_index - k_index|, masked      [B,H,T,S]
    pattern = exp(scores - lse),  lse = log(sum_s exp(scores) + exp(sink))
    z       = pattern v

Query heads stay grouped beside their kv head, so keys and values are never repeated.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxheads.attention.masks import FLOOR, MASK_VALUE, Mask, Span, as_4d, penalty, take
from jaxheads.taps import NO_TAP, Tap
from jaxheads.typing import Array

TINY = float(jnp.finfo(jnp.float32).tiny)  # below the denominator of any row that sees a key


def dense_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    bias: Array | None = None,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    tap: Tap = NO_TAP,
) -> tuple[Array, Array]:
    """Grouped-query softmax attention; O(T S) memory.

    Args:
      q: [B,T,H,D] queries.
      k: [B,S,K,D] keys; K divides H, query head h reads kv head h // G.
      v: [B,S,K,W] values.
      mask: which keys each query sees.
      bias: broadcastable to [B,H,T,S].
      scale: factor on q.k.
      soft_cap: bound of the tanh cap on the scaled scores, before bias and mask.
      sinks: [H] logits that join the denominator without a value (gpt-oss).
      alibi_slopes: [H] penalty per slot of distance.
      tap: called at `scores` and `pattern`.
    Returns:
      z [B,T,H,W] in the dtype of q and lse [B,H,T] float32. A query that sees no key gets zeros,
      a zero gradient and lse = -inf (its sink where there is one).
    """
    num_queries, num_kv_heads = q.shape[1], k.shape[2]
    pattern, lse = grouped_pattern(
        group_rows(q, num_kv_heads),
        k,
        mask,
        bias,
        span=(0, num_queries),
        scale=scale,
        soft_cap=soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        tap=tap,
    )
    if tap.wants("attn_argmax"):
        tap("attn_argmax", last_argmax(rows_by_head(pattern, num_queries)))

    with jax.named_scope("attn.values"):
        v = jnp.einsum("bskw->bksw", v)
        z = jnp.einsum(
            "bkxs,bksw->bkxw", pattern.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
    return ungroup_rows(z.astype(q.dtype), num_queries), ungroup_lse(lse, num_queries)


def grouped_pattern(
    rows: Array,
    k: Array,
    mask: Mask,
    bias: Array | None,
    *,
    span: Span,
    scale: float,
    soft_cap: float | None,
    sinks: Array | None,
    alibi_slopes: Array | None,
    tap: Tap = NO_TAP,
) -> tuple[Array, Array]:
    """The pattern [B,K,X,S] float32 of the grouped rows of a span of queries, and lse [B,K,X]."""
    num_queries, num_keys, num_kv_heads = span[1], k.shape[1], k.shape[2]
    groups = (num_kv_heads, rows.shape[2] // num_queries)
    with jax.named_scope("attn.scores"):
        k = jnp.einsum("bskd->bksd", k)
        scores = scale * jnp.einsum(
            "bkxd,bksd->bkxs", rows, k, preferred_element_type=jnp.float32
        )  # [B,K,X,S]
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        if bias is not None:
            bias = take(as_4d(bias), span, axis=-2)
            scores = scores + group_heads(bias.astype(jnp.float32), groups, num_queries)
        if alibi_slopes is not None:
            scores = scores - alibi_penalty(alibi_slopes, groups, mask, span, (0, num_keys))
        visible = mask.tile(span, (0, num_keys))
        if visible is not None:
            scores = scores + group_heads(penalty(visible), groups, num_queries)
    scores = _tap(tap, "scores", scores, num_queries)

    with jax.named_scope("attn.softmax"):
        if sinks is None:
            sink = jnp.full((1, 1), MASK_VALUE, jnp.float32)
        else:
            sink = jnp.tile(sinks.astype(jnp.float32).reshape(groups), (1, num_queries))
        pattern, lse = _softmax(scores, sink)
    return _tap(tap, "pattern", pattern, num_queries), lse


def last_argmax(pattern: Array) -> Array:
    """[B,H] int32: the key that the last query of rows [B,H,T,S] attends to most."""
    return jnp.argmax(pattern[:, :, -1], axis=-1).astype(jnp.int32)


def group_rows(q: Array, num_kv_heads: int) -> Array:
    """[B,T,H,D] -> [B,K,X,D]: the X = T*G rows that read one kv head, positions outermost.

    One matrix product per kv head is several times faster on CPU than one with G apart; positions
    outermost let a mesh shard them.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    grouped = q.reshape(batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    rows = jnp.einsum("btkgd->bktgd", grouped)
    return rows.reshape(batch, num_kv_heads, -1, head_dim)


def ungroup_rows(z: Array, num_queries: int) -> Array:
    """[B,K,X,W] -> [B,T,H,W]."""
    batch, num_kv_heads, _, width = z.shape
    grouped = z.reshape(batch, num_kv_heads, num_queries, -1, width)
    return jnp.einsum("bktgw->btkgw", grouped).reshape(batch, num_queries, -1, width)


def ungroup_lse(lse: Array, num_queries: int) -> Array:
    """[B,K,X] -> [B,H,T]."""
    batch, num_kv_heads, _ = lse.shape
    by_head = jnp.einsum("bktg->bkgt", lse.reshape(batch, num_kv_heads, num_queries, -1))
    return by_head.reshape(batch, -1, num_queries)


def group_heads(x: Array, groups: tuple[int, int], num_queries: int) -> Array:
    """[B|1,H|1,T|1,S|1] (leading axes may be missing) -> rows [B|1,K|1,X|1,S|1].

    Whatever meets the scores has their four axes: XLA's CPU loops are twice as slow over five.
    """
    x = as_4d(x)
    batch, num_heads, length, num_keys = x.shape
    if num_heads == length == 1:
        return x
    num_kv_heads, num_groups = (1, 1) if num_heads == 1 else groups
    x = x.reshape(batch, num_kv_heads, num_groups, length, num_keys)
    shape = (batch, num_kv_heads, num_queries, groups[1], num_keys)
    x = jnp.broadcast_to(jnp.einsum("bkgts->bktgs", x), shape)
    return x.reshape(batch, num_kv_heads, -1, num_keys)


def alibi_penalty(
    slopes: Array, groups: tuple[int, int], mask: Mask, q_span: Span, k_span: Span
) -> Array:
    """slope |q_index - k_index| as rows [B|1,K,x,tk] float32."""
    slopes = slopes.astype(jnp.float32).reshape(groups)[:, None, :, None]  # [K,1,G,1]
    by_position = slopes * distance(mask, q_span, k_span)
    return by_position.reshape(*by_position.shape[:2], -1, k_span[1])


def distance(mask: Mask, q_span: Span, k_span: Span) -> Array:
    """|q_index - k_index| as [B|1,1,tq,1,tk] float32."""
    gap = jnp.abs(mask.relative_index(q_span, k_span)).astype(jnp.float32)
    return gap.reshape(-1, 1, q_span[1], 1, k_span[1])


def _tap(tap: Tap, site: str, rows: Array, num_queries: int) -> Array:
    """Taps see one axis of query heads: rows [B,K,X,S] <-> [B,H,T,S]."""
    batch, num_kv_heads, _, num_keys = rows.shape
    tapped = tap(site, rows_by_head(rows, num_queries))
    tapped = tapped.reshape(batch, num_kv_heads, -1, num_queries, num_keys)
    return jnp.einsum("bkgts->bktgs", tapped).reshape(rows.shape)


def rows_by_head(rows: Array, num_queries: int) -> Array:
    """[B,K,X,S] -> [B,H,T,S]."""
    batch, num_kv_heads, _, num_keys = rows.shape
    grouped = rows.reshape(batch, num_kv_heads, num_queries, -1, num_keys)
    return jnp.einsum("bktgs->bkgts", grouped).reshape(batch, -1, num_queries, num_keys)


# A derivative of our own keeps one [T,S] array for the backward pass, the pattern itself.
@jax.custom_jvp
def _softmax(scores: Array, sink: Array) -> tuple[Array, Array]:
    """Softmax over the last axis with one more logit in the denominator; and its log.

    Args:
      scores: [..., S] float32, about `MASK_VALUE` where masked.
      sink: broadcastable to [...]; `MASK_VALUE` for none.
    Returns:
      pattern [..., S] and lse [...].
    """
    highest = jnp.maximum(jnp.maximum(scores.max(axis=-1), sink), FLOOR)
    weights = jnp.exp(scores - highest[..., None])
    total = weights.sum(axis=-1) + jnp.exp(sink - highest)
    pattern = weights * (1 / jnp.maximum(total, TINY))[..., None]
    return pattern, highest + jnp.log(total)


@_softmax.defjvp
def _softmax_jvp(primals, tangents):
    scores, sink = primals
    scores_dot, sink_dot = tangents
    pattern, lse = _softmax(scores, sink)
    sink_share = jnp.exp(sink - jnp.maximum(lse, FLOOR))
    lse_dot = (pattern * scores_dot).sum(axis=-1) + sink_share * sink_dot
    return (pattern, lse), (pattern * (scores_dot - lse_dot[..., None]), lse_dot)
