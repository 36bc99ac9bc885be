"""Softmax attention with the whole pattern in memory: the reference, and the only path with taps.

    scores  = cap tanh(scale q.k / cap) + bias - slope |q_index - k_index|, masked      [B,H,T,S]
    pattern = exp(scores - lse),  lse = log(sum_s exp(scores) + exp(sink))
    z       = pattern v

Query heads are kept as [K,G] beside their kv heads, so keys and values are never repeated.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxheads.attention.masks import MASK_VALUE, Mask, as_4d
from jaxheads.taps import NO_TAP, Tap
from jaxheads.typing import Array


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
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    groups = (num_kv_heads, num_heads // num_kv_heads)
    grouped_q = q.reshape(batch, num_queries, *groups, head_dim)

    with jax.named_scope("attn.scores"):
        scores = scale * jnp.einsum(
            "btkgd,bskd->bkgts", grouped_q, k, preferred_element_type=jnp.float32
        )
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        if bias is not None:
            scores = scores + split_heads(bias, groups).astype(jnp.float32)
        if alibi_slopes is not None:
            distance = jnp.abs(mask.relative_index((0, num_queries), (0, num_keys)))
            distance = distance.reshape(-1, 1, 1, num_queries, num_keys)
            slopes = alibi_slopes.astype(jnp.float32).reshape(1, *groups, 1, 1)
            scores = scores - slopes * distance
        visible = mask.materialize(num_queries, num_keys)
        if visible is not None:
            scores = jnp.where(split_heads(visible, groups), scores, MASK_VALUE)
    scores = _tap(tap, "scores", scores)

    with jax.named_scope("attn.softmax"):
        if sinks is None:
            sink = jnp.full((1, 1, 1, 1), MASK_VALUE, jnp.float32)
        else:
            sink = sinks.astype(jnp.float32).reshape(1, *groups, 1)
        pattern, lse = _softmax(scores, sink)
    pattern = _tap(tap, "pattern", pattern)

    with jax.named_scope("attn.values"):
        z = jnp.einsum(
            "bkgts,bskw->btkgw",
            pattern.astype(v.dtype),
            v,
            preferred_element_type=jnp.float32,
        ).astype(q.dtype)
    z = z.reshape(batch, num_queries, num_heads, v.shape[-1])
    return z, lse.reshape(batch, num_heads, num_queries)


def split_heads(x: Array, groups: tuple[int, int]) -> Array:
    """[B|1,H|1,T|1,S|1] (leading axes may be missing) -> [B|1,K|1,G|1,T|1,S|1]."""
    x = as_4d(x)
    heads = (1, 1) if x.shape[1] == 1 else groups
    return x.reshape(x.shape[0], *heads, *x.shape[2:])


def _tap(tap: Tap, site: str, value: Array) -> Array:
    """Taps see query heads on one axis: [B,K,G,T,S] <-> [B,H,T,S]."""
    batch, num_kv_heads, num_groups, *rest = value.shape
    tapped = tap(site, value.reshape(batch, num_kv_heads * num_groups, *rest))
    return tapped.reshape(value.shape)


# A derivative of our own keeps one [T,S] array for the backward pass, the pattern itself.
@jax.custom_jvp
def _softmax(scores: Array, sink: Array) -> tuple[Array, Array]:
    """Softmax over the last axis with one more logit in the denominator; and its log.

    Args:
      scores: [..., T, S] float32, `MASK_VALUE` where masked.
      sink: broadcastable to [..., T]; `MASK_VALUE` for none.
    Returns:
      pattern [..., T, S] and lse [..., T].
    """
    highest = jnp.maximum(scores.max(axis=-1), sink)
    is_empty = highest <= MASK_VALUE / 2
    # Shifting an empty row by zero makes each of its exponentials underflow to exactly zero.
    shift = jnp.where(is_empty, 0.0, highest)
    weights = jnp.exp(scores - shift[..., None])
    total = weights.sum(axis=-1) + jnp.exp(sink - shift)
    pattern = weights * (1.0 / jnp.where(is_empty, 1.0, total))[..., None]
    return pattern, shift + jnp.log(total)


@_softmax.defjvp
def _softmax_jvp(primals, tangents):
    scores, sink = primals
    scores_dot, sink_dot = tangents
    pattern, lse = _softmax(scores, sink)
    is_empty = jnp.isneginf(lse)
    sink_share = jnp.exp(sink - jnp.where(is_empty, 0.0, lse))
    lse_dot = (pattern * scores_dot).sum(axis=-1) + sink_share * sink_dot
    return (pattern, lse), (pattern * (scores_dot - lse_dot[..., None]), lse_dot)
