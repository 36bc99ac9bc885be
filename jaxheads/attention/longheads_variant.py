"""LongHeads as a row of `VARIANTS`: any RoPE decoder reads long texts, and decodes with a cache.

    long = models.with_config(model, attention="longheads(window=2048,chunk=256)")

Up to `begin` tokens (the window, by default) a layer is a dense one, taps and all. Longer texts are
one document a row, padded wherever: a row of several documents becomes NaN. Positions count from
the first token of the row; those the forward was given are not read.
"""

from __future__ import annotations

import math
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxheads.attention import longheads_cache, softmax
from jaxheads.attention.contract import (
    AttentionContext,
    Cost,
    HeadsOut,
    Supports,
    Variant,
    asked_beyond,
)
from jaxheads.attention.longheads import LongHeadsOptions, choose_impl, longheads_attention
from jaxheads.attention.longheads_cache import check_rotate, reorder, to_front
from jaxheads.typing import Array, PyTree


def init(key: Array, cfg: Any, options: LongHeadsOptions | None = None) -> None:
    """LongHeads has no parameters of its own."""


def apply(params: None, q: Array, k: Array, v: Array, ctx: AttentionContext) -> HeadsOut:
    """Attends to everything in short texts, to selected chunks in long ones.

    Args:
      params: None.
      q: [B,T,H,D] unrotated queries.
      k: [B,S,K,D] unrotated keys; with `ctx.state`, of the new tokens.
      v: [B,S,K,D] values.
      ctx: see `AttentionContext`; `ctx.options` is a `LongHeadsOptions`.
    Returns:
      HeadsOut with z [B,T,H,D].
    Raises:
      NotImplementedError: masks, biases or soft caps in a long text or with a cache.
      ValueError: a model without rotary positions.
    """
    options = ctx.options or LongHeadsOptions()
    if ctx.state is None and k.shape[1] <= options.start:
        return softmax.apply(None, q, k, v, ctx)
    reason = _reason_not(q, k, ctx)
    if reason is not None:
        raise NotImplementedError(
            f"attention 'longheads' cannot honour {reason} with a cache or beyond its first "
            f"{options.start} tokens; use attention='dense', or shorter texts."
        )
    check_rotate(ctx.rotate, q.shape[-1])
    rotate = cast(Any, ctx.rotate)
    scale = 1 / math.sqrt(q.shape[-1]) if ctx.scale is None else ctx.scale
    key = None
    if options.at_random and ctx.layer is not None:
        key = jax.random.fold_in(jax.random.key(0), ctx.layer)
    valid, is_one = _real_tokens(ctx)
    if ctx.state is not None:
        z, state = longheads_cache.extend(
            cast(longheads_cache.Slots, ctx.state), q, k, v, rotate, options,
            impl=choose_impl(options, q.shape[1]), scale=scale, valid=valid, key=key,
        )  # fmt: skip
    else:
        order = back = None
        if valid is not None:
            order, back = to_front(valid)
            q, k, v = (reorder(x, order) for x in (q, k, v))
        z, _ = longheads_attention(
            q, k, v, rotate, chunk_size=options.chunk, scale=scale, key=key,
            **{n: x for n, x in vars(options).items() if n != "chunk"},
        )  # fmt: skip
        if valid is not None and back is not None:
            z = jnp.where(valid[..., None, None], reorder(z, back), 0)
        state = None
    if is_one is not None:
        z = jnp.where(is_one[:, None, None, None], z, jnp.nan)
    return HeadsOut(z, None, {}, state)


def _reason_not(q: Array, k: Array, ctx: AttentionContext) -> str | None:
    mask = ctx.mask
    is_whole = mask.q_index is None and mask.k_index is None and q.shape[1] == k.shape[1]
    others = (
        (ctx.k_is_rotated, "rotated keys"),
        (ctx.implementation != "auto", f"implementation={ctx.implementation!r}"),
        (ctx.state is None and not is_whole, "queries of some tokens only"),
    )
    return asked_beyond(ctx, others)


def _real_tokens(ctx: AttentionContext) -> tuple[Array | None, Array | None]:
    """Which tokens [B,T] are no padding, and whether each row [B] holds one document; None: all."""
    ids, key_mask = ctx.mask.q_segment_ids, ctx.mask.key_mask
    if ids is None:
        return key_mask, None
    valid = ids != 0 if key_mask is None else (ids != 0) & key_mask
    return valid, jnp.all(~valid | (ids == ids.max(axis=1, keepdims=True)), axis=1)


def init_state(
    cfg: Any, batch_size: int, num_slots: int, dtype: Any, options: LongHeadsOptions | None = None
) -> PyTree:
    """The cache of one layer for `num_slots` tokens."""
    return longheads_cache.init_slots(
        options or LongHeadsOptions(),
        batch_size,
        num_slots,
        cfg.num_heads,
        cfg.num_kv_heads,
        cfg.head_dim,
        dtype,
    )


def check(cfg: Any, spec: Any) -> None:
    """Raise for a model whose positions cannot be given anew, or a window it was not trained on."""
    options = spec.options or LongHeadsOptions()
    if cfg.positions != "rope":
        raise ValueError(
            f"attention 'longheads' gives keys new positions, which positions={cfg.positions!r} do "
            "not allow; it needs a model with rotary positions (RoPE)."
        )
    if spec.window is not None:
        raise ValueError(
            f"attention 'longheads' reads chunks of the whole text, and the layer has a sliding "
            f"window of {spec.window} tokens; give that layer attention 'dense'."
        )
    if options.window > cfg.max_positions and not options.force:
        raise ValueError(
            f"longheads: window={options.window} exceeds the {cfg.max_positions} positions that "
            "the model was trained on (max_positions); take a smaller window, or force=true."
        )


def cost(
    cfg: Any,
    num_queries: int,
    num_keys: int,
    *,
    is_causal: bool = True,
    itemsize: int = 2,
    options: LongHeadsOptions | None = None,
) -> Cost:
    """4 A D operations per query and head, 2 G D for the scores of G chunks, and 4 w D per token
    for their vectors; dense attention up to the first token that selects.

    Args:
      cfg: has num_heads, num_kv_heads and head_dim.
      num_queries: T.
      num_keys: S.
      is_causal: of the dense part.
      itemsize: bytes of an activation.
      options: a `LongHeadsOptions`.
    """
    options = options or LongHeadsOptions()
    if num_keys <= options.start:
        return softmax.cost(cfg, num_queries, num_keys, is_causal=is_causal, itemsize=itemsize)
    num_chunks = num_keys / options.chunk
    per_query = 4 * options.window + 2 * num_chunks + 4 * options.chunk
    chunk_bytes = 4 * num_chunks * cfg.num_heads * cfg.head_dim
    kv = 2.0 * cfg.num_kv_heads * cfg.head_dim * itemsize
    per_head = 2.0 * cfg.num_heads * cfg.head_dim * itemsize
    is_decode = num_queries != num_keys
    read = options.window * per_head if is_decode else num_keys * kv
    return Cost(
        flops=float(num_queries * cfg.num_heads * cfg.head_dim * per_query),
        bytes=num_queries * per_head + read + chunk_bytes,
        kv_cache_bytes=num_keys * kv + chunk_bytes,
    )


LONGHEADS = Variant(
    name="longheads",
    init=init,
    apply=apply,
    cost=cost,
    supports=Supports(
        causal=True,
        bidirectional=False,
        gqa=True,
        cached_decode=False,  # from keys and values alone; its own state decodes
        caches_rotated_keys=False,
        segment_ids=True,
        head_mask=False,
        taps=frozenset(),
        implementations=("auto",),
        mesh_axes=frozenset({"data", "fsdp", "model"}),
    ),
    options=LongHeadsOptions,
    init_state=init_state,
    state_axes=lambda options: longheads_cache.SLOT_AXES,
    check=check,
)
