"""CCA-attention as a row of `VARIANTS`: what a decoder trains and decodes with.

    --set model.attention="cca"                                     g = 16, s = 1024 everywhere
    --set model.attention="cca(group_size=32,window_size=2048)*3+dense"

It has no parameters, so it serves any trained decoder: `models.with_config(model,
attention="cca")`, or `--set model.attention=cca` with a checkpoint; fine-tune the projections with
`--set train.trainable=*attention.wq,*attention.wk,*attention.wv`. Texts of at most s tokens are
causal attention, and take whatever that takes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import jax.numpy as jnp

from jaxheads.attention import cca_cache
from jaxheads.attention.api import attend
from jaxheads.attention.cca import CCAOptions, cca_costs
from jaxheads.attention.cca_parallel import cca_over_mesh, mesh_axes
from jaxheads.attention.cca_parts import attend_row
from jaxheads.attention.cca_pooling import IMPLS
from jaxheads.attention.contract import (
    AttentionContext,
    Cost,
    HeadsOut,
    Supports,
    Variant,
    asked_beyond,
)
from jaxheads.attention.softmax import rotate_heads
from jaxheads.typing import Array, PyTree


def init(key: Array, cfg: Any, options: CCAOptions | None = None) -> None:
    """CCA-attention has no parameters of its own."""


def apply(params: None, q: Array, k: Array, v: Array, ctx: AttentionContext) -> HeadsOut:
    """Rotates queries and keys, then attends over core tokens and the window.

    Documents may begin anywhere: groups are counted from their first tokens, found by gathering.

    Args:
      params: None.
      q: [B,T,H,D] unrotated queries.
      k: [B,S,K,D] keys, unrotated unless `ctx.k_is_rotated`; with `ctx.state`, of the new tokens.
      v: [B,S,K,W] values.
      ctx: see `AttentionContext`; `ctx.options` is a `CCAOptions`.
    Returns:
      HeadsOut with z [B,T,H,W].
    Raises:
      NotImplementedError: what a text longer than the window cannot have.
      ValueError: ``rope="group_end"`` in a model without rotary positions.
    """
    options: CCAOptions = ctx.options or CCAOptions()
    q, k = rotate_heads(q, k, ctx)
    if options.rope == "group_end" and ctx.rotate is None:
        raise ValueError(
            "cca(rope=group_end) needs rotary positions and this model has none; use rope=rotated."
        )
    wants_lse, state = ctx.tap.wants("lse"), None
    if ctx.state is None and k.shape[1] <= options.window_size:
        z, lse = attend(q, k, v, ctx, needs_lse=wants_lse)
    else:
        options = _with_impl(options, ctx)
        _check_plain(q, k, ctx)
        scale = 1 / math.sqrt(q.shape[-1]) if ctx.scale is None else ctx.scale
        ids = _segments(q, ctx)
        if ctx.state is not None:
            slots, length = cast(cca_cache.Slots, ctx.state), cast(Array, ctx.slots)[0]
            ids = jnp.ones(q.shape[:2], jnp.int32) if ids is None else ids
            z, lse, state = cca_cache.extend(
                q, k, v, slots, length, ids, options, scale, ctx.rotate
            )
        elif (axes := mesh_axes(q, k)) is not None:
            z, lse = cca_over_mesh(q, k, v, options, axes, scale, ids, ctx.rotate)
        else:
            z, lse = attend_row(q, k, v, options, scale, ids, ctx.rotate)
    if lse is not None and wants_lse:
        lse = ctx.tap("lse", lse)
    return HeadsOut(z, lse, {}, state)


def _with_impl(options: CCAOptions, ctx: AttentionContext) -> CCAOptions:
    """The options with the back end asked for: by the layer, else by the model."""
    if options.impl != "auto" or ctx.implementation == "auto":
        return options
    if ctx.implementation not in IMPLS:
        raise NotImplementedError(
            f"implementation={ctx.implementation!r} has no CCA-attention; use one of "
            f"{', '.join(IMPLS)}, or set cca(impl=...) beside it."
        )
    return dataclasses.replace(options, impl=ctx.implementation)


def _check_plain(q: Array, k: Array, ctx: AttentionContext) -> None:
    mask = ctx.mask
    in_cache = ctx.state is None and not (mask.q_index is None and mask.k_index is None)
    others = (
        (q.shape[1] != k.shape[1], "T != S"),
        (in_cache, "keys at slots of a cache that is not its own"),
    )
    reason = asked_beyond(ctx, others)
    if reason is not None:
        raise NotImplementedError(
            f"CCA-attention of a text longer than its window cannot honour {reason}; use "
            "attention='dense', or a window_size of at least the length."
        )


def _segments(q: Array, ctx: AttentionContext) -> Array | None:
    """[B,T] ids of the tokens, 0 where a key mask hides them."""
    ids, key_mask = ctx.mask.q_segment_ids, ctx.mask.key_mask
    if key_mask is None:
        return ids
    return jnp.where(key_mask, jnp.ones(q.shape[:2], jnp.int32) if ids is None else ids, 0)


def init_state(
    cfg: Any, batch_size: int, num_slots: int, dtype: Any, options: CCAOptions | None = None
) -> PyTree:
    """The cache of one layer for `num_slots` tokens."""
    sizes = (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim)
    return cca_cache.init_slots(options or CCAOptions(), batch_size, num_slots, *sizes, dtype)


def cost(
    cfg: Any,
    num_queries: int,
    num_keys: int,
    *,
    is_causal: bool = True,
    itemsize: int = 2,
    options: CCAOptions | None = None,
) -> Cost:
    """Visible pairs of 4 D operations each (`cca_costs`); for single queries, the whole cache.

    Args:
      cfg: has num_heads, num_kv_heads and head_dim.
      num_queries: T.
      num_keys: S.
      is_causal: not read; CCA-attention is causal.
      itemsize: bytes of an activation.
      options: a `CCAOptions`.
    """
    options = options or CCAOptions()
    found = cca_costs(
        num_keys,
        options.group_size,
        options.window_size,
        num_heads=cfg.num_heads,
        num_kv_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        gqa_pool=options.gqa_pool,
        boundary=options.boundary,
    )
    cache = float(found.cache_elements * itemsize)
    row = 2.0 * cfg.head_dim * itemsize  # a query and its output, or a key and its value
    flops, read = found.flops, num_keys * cfg.num_kv_heads * row
    if num_queries != num_keys:
        seen = num_keys // options.group_size + options.reach
        flops = 4.0 * num_queries * min(seen, num_keys) * cfg.num_heads * cfg.head_dim
        read = cache
    return Cost(flops=flops, bytes=num_queries * cfg.num_heads * row + read, kv_cache_bytes=cache)


CCA = Variant(
    name="cca",
    init=init,
    apply=apply,
    cost=cost,
    supports=Supports(
        causal=True,
        bidirectional=False,
        gqa=True,
        cached_decode=True,
        caches_rotated_keys=True,
        segment_ids=True,
        head_mask=False,
        taps=frozenset({"q_rot", "k_rot", "lse"}),
        implementations=IMPLS,
        mesh_axes=frozenset({"data", "fsdp", "model", "context"}),
    ),
    options=CCAOptions,
    init_state=init_state,
    state_axes=lambda options: cca_cache.slot_axes(),
)
