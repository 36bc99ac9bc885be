"""Attention of routed heads for the queries that activated them, and no others.

Heads become rows of the batch: of each sequence and routed head the C queries are gathered, attend
to all keys of the head under the ordinary mask with any implementation, and are scattered back.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxheads.attention.api import attend
from jaxheads.attention.contract import AttentionContext
from jaxheads.attention.masks import Mask, as_4d
from jaxheads.typing import Array


def row_capacity(
    capacity_factor: float | None, num_queries: int, top_k: int, num_routed: int
) -> int:
    """C = ceil(capacity_factor T k / E), from 1 to T; T where no factor is given."""
    if capacity_factor is None or not num_routed:
        return num_queries
    wanted = math.ceil(capacity_factor * num_queries * top_k / num_routed - 1e-9)
    return min(num_queries, max(1, wanted))


def attend_gathered(
    q: Array,
    k: Array,
    v: Array,
    gates: Array,
    ctx: AttentionContext,
    num_shared: int,
    capacity: int,
) -> tuple[Array, Array]:
    """Gated outputs z [B,T,H,W] and the number of (token, head) pairs beyond the capacity.

    Args:
      q: [B,T,H,D], k: [B,S,K,D], v: [B,S,K,W], rotated.
      gates: [B,T,H]; a routed head is computed where its gate is not 0.
      ctx: mask, scale and soft cap.
      num_shared: the first so many heads are computed for every query.
      capacity: C, queries per sequence and routed head.
    """
    _check(ctx)
    num_heads, groups = q.shape[2], q.shape[2] // k.shape[2]
    parts, num_dropped = [], jnp.int32(0)
    if num_shared:
        own = dataclasses.replace(
            ctx,
            mask=dataclasses.replace(ctx.mask, head_mask=_heads(ctx.mask.head_mask, 0, num_shared)),
            bias=_heads(ctx.bias, 0, num_shared),
        )
        keys, values = (_kv_of(x, 0, num_shared, groups) for x in (k, v))
        z = attend(q[:, :, :num_shared], keys, values, own)[0]
        parts.append((gates[:, :, :num_shared, None] * z).astype(q.dtype))
    if num_shared < num_heads:
        keys, values = (_kv_of(x, num_shared, num_heads, groups) for x in (k, v))
        z, num_dropped = _routed(
            q[:, :, num_shared:], keys, values, gates[:, :, num_shared:], ctx, capacity
        )
        parts.append(z)
    return jnp.concatenate(parts, axis=2), num_dropped


def _routed(q, k, v, gates, ctx: AttentionContext, capacity: int) -> tuple[Array, Array]:
    """The same for routed heads alone: q [B,T,E,D], k and v [B,S,E,...], gates [B,T,E]."""
    batch, length, num_routed, _ = q.shape
    gates = jnp.einsum("bte->bet", gates)
    is_active = gates != 0
    # The first C that are active, in order, then others, whose gate is 0.
    rows = jax.lax.top_k(is_active.astype(jnp.float32), capacity)[1]  # [B,E,C]
    fold = lambda x: x.reshape(batch * num_routed, *x.shape[2:])
    by_head = lambda x: fold(jnp.einsum("bted->betd", x))[:, :, None]  # [BE,T,1,D]
    picked = jnp.take_along_axis(by_head(q), fold(rows)[..., None, None], axis=1)
    own = dataclasses.replace(
        ctx,
        mask=_mask_of_rows(ctx.mask, rows, length, k.shape[1]),
        bias=None if ctx.bias is None else _spread(ctx.bias, rows, length),
    )
    z = attend(picked, by_head(k), by_head(v), own)[0]  # [BE,C,1,W]
    z = z.reshape(batch, num_routed, capacity, -1)
    z = (jnp.take_along_axis(gates, rows, axis=-1)[..., None] * z).astype(q.dtype)
    every = jnp.zeros((batch, num_routed, length, z.shape[-1]), z.dtype)
    put = jax.vmap(jax.vmap(lambda into, at, x: into.at[at].set(x)))
    num_active = jnp.sum(is_active, axis=-1, dtype=jnp.int32)
    num_dropped = jnp.sum(jnp.maximum(num_active - capacity, 0))
    return jnp.einsum("betd->bted", put(every, rows, z)), num_dropped


def _mask_of_rows(mask: Mask, rows: Array, num_queries: int, num_keys: int) -> Mask:
    """`mask` for the gathered queries [B,E,C], heads folded into the batch."""
    batch, num_routed, capacity = rows.shape

    def repeat(x: Array | None) -> Array | None:  # [B,...] -> [BE,...]
        return None if x is None else jnp.repeat(x, num_routed, axis=0)

    def at_rows(x: Array) -> Array:  # [B,T] -> [BE,C]
        x = jnp.broadcast_to(x[:, None], (batch, num_routed, num_queries))
        return jnp.take_along_axis(x, rows, axis=-1).reshape(-1, capacity)

    wide = lambda x, n: jnp.broadcast_to(x, (batch, n))
    index = jnp.arange(num_queries) if mask.q_index is None else mask.q_index
    k_ids = mask.q_segment_ids if mask.k_segment_ids is None else mask.k_segment_ids
    q_ids, head_mask = mask.q_segment_ids, mask.head_mask
    return dataclasses.replace(
        mask,
        q_index=at_rows(wide(index, num_queries)),
        k_index=None if mask.k_index is None else repeat(wide(mask.k_index, num_keys)),
        q_segment_ids=None if q_ids is None else at_rows(q_ids),
        k_segment_ids=repeat(k_ids),
        key_mask=repeat(mask.key_mask),
        head_mask=None if head_mask is None else _spread(head_mask, rows, num_queries),
        prefix_lengths=repeat(mask.prefix_lengths),
    )


def _spread(x: Array, rows: Array, num_queries: int) -> Array:
    """An array broadcastable to [B,H,T,S] at the gathered queries: [BE,1,C|1,S]."""
    batch, num_routed, _ = rows.shape
    x = as_4d(x)
    x = x if x.shape[1] == 1 else x[:, -num_routed:]
    x = jnp.broadcast_to(x, (batch, num_routed, *x.shape[2:]))
    if x.shape[2] == num_queries > 1:
        x = jnp.take_along_axis(x, rows[..., None], axis=2)
    return x.reshape(batch * num_routed, 1, *x.shape[2:])


def _heads(x: Array | None, start: int, stop: int) -> Array | None:
    """Heads of an array broadcastable to [B,H,T,S]."""
    x = None if x is None else as_4d(x)
    return x if x is None or x.shape[1] == 1 else x[:, start:stop]


def _kv_of(x: Array, start: int, stop: int, groups: int) -> Array:
    """[B,S,K,D] -> one key or value head for each of the query heads."""
    return x[:, :, start:stop] if groups == 1 else x[:, :, jnp.arange(start, stop) // groups]


def _check(ctx: AttentionContext) -> None:
    if ctx.bias is not None and as_4d(ctx.bias).shape[2] > 1:
        raise ValueError(
            f"impl='gather' cannot index an additive mask of shape {ctx.bias.shape} by query; give "
            "one with a query axis of size 1, a bool mask or a Mask, or use impl='dense'."
        )
    for name, x in (("sinks", ctx.sinks), ("alibi_slopes", ctx.alibi_slopes)):
        if x is not None:
            raise NotImplementedError(
                f"impl='gather' cannot take {name}, which differ by head; use impl='dense'."
            )
