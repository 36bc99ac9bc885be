"""Summaries of the attention pattern where nobody forms the pattern.

    reduction(pattern)[b, h, t] depends on row [b, h, t] alone,

so rows can be made, summarised and forgotten a block of queries at a time: O(S) memory for texts
of any length, beside whichever implementation computes z.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.attention.contract import Request
from jaxheads.attention.dense import group_rows, grouped_pattern, last_argmax, rows_by_head
from jaxheads.attention.masks import Mask, as_4d, pad_end
from jaxheads.typing import Array, PyTree

BLOCK_SCORES = 2**22  # scores of all heads that are held at once: 16 MiB


def tap_summaries(request: Request) -> None:
    """Serves what `request.tap` asks of the pattern, for an implementation without one."""
    options: dict[str, Any] = dict(
        scale=request.scale,
        soft_cap=request.soft_cap,
        sinks=request.sinks,
        alibi_slopes=request.alibi_slopes,
    )
    q, k, mask, bias, tap = request.q, request.k, request.mask, request.bias, request.tap
    if tap.wants("pattern"):
        tap.by_row("pattern", lambda reduce: reduce_pattern(q, k, mask, bias, reduce, **options))
    if tap.wants("attn_argmax"):
        newest = group_rows(q[:, -1:], k.shape[2])
        span = (request.num_queries - 1, 1)
        pattern, _ = grouped_pattern(newest, k, mask, bias, span=span, **options)
        tap("attn_argmax", last_argmax(rows_by_head(pattern, 1)))


def reduce_pattern(
    q: Array,
    k: Array,
    mask: Mask,
    bias: Array | None,
    reduction: Callable[[Array], PyTree],
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    block_q: int | None = None,
) -> PyTree:
    """``reduction(pattern)`` without the pattern: its rows come in blocks of queries.

    Args:
      q: [B,T,H,D] queries.
      k: [B,S,K,D] keys.
      mask: which keys each query sees.
      bias: broadcastable to [B,H,T,S].
      reduction: maps rows [B,H,t,S] float32 of any t queries to a tree of arrays [B,H,t,...].
      scale: factor on q.k.
      soft_cap: as in `dense_attention`, and so are `sinks` and `alibi_slopes`.
      block_q: queries in a block; default as many as keep its scores within `BLOCK_SCORES`.
    Returns:
      The tree, of arrays [B,H,T,...]; O(S) memory for a block, backward too.
    """
    batch, length, num_heads, _ = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    fitting = BLOCK_SCORES // (batch * num_heads * num_keys)
    block_q = min(length, max(1, fitting) if block_q is None else block_q)
    padded = length + -length % block_q
    q = jnp.pad(q, ((0, 0), (0, padded - length), (0, 0), (0, 0)))
    bias = None if bias is None else pad_end(as_4d(bias), padded, axis=-2)
    mask = mask.pad(padded, num_keys)

    @jax.checkpoint  # or the backward pass would keep the rows of every block
    def one_block(start: Array) -> PyTree:
        block = jax.lax.dynamic_slice_in_dim(q, start, block_q, axis=1)
        pattern, _ = grouped_pattern(
            group_rows(block, num_kv_heads),
            k,
            mask,
            bias,
            span=(start, block_q),
            scale=scale,
            soft_cap=soft_cap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
        )
        return reduction(rows_by_head(pattern, block_q))

    blocks = jax.lax.map(one_block, jnp.arange(0, padded, block_q))  # [N,B,H,block_q,...]
    join = lambda x: jnp.moveaxis(x, 0, 2).reshape(batch, num_heads, padded, *x.shape[4:])
    return jax.tree.map(lambda x: join(x)[:, :, :length], blocks)
