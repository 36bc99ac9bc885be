"""Relative convolutional attention as a row of `VARIANTS`: what a decoder trains and decodes with.

    --set model.attention=rcmha --set model.positions=none           the paper's, without a memory
    --set model.attention="rcmha(use_relative=false)"                MDHA, Primer's
    --set model.attention="rcmha(use_conv=false)"                    RMHA
    --set model.attention="rcmha(use_conv=false)*2+rcmha(width=5)"

Distances are counted in slots and kept apart from the model's own positions: with rotary ones, the
convolved queries and keys are rotated as well.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxheads.attention import softmax
from jaxheads.attention.contract import AttentionContext, Cost, HeadsOut, Variant
from jaxheads.attention.relative_conv import (
    RelConvParams,
    add_query_bias,
    check_sizes,
    depthwise_causal_conv,
    init_rel_conv,
    positions_bias,
)
from jaxheads.typing import Array, PyTree


@dataclasses.dataclass(frozen=True)
class RCMHAOptions:
    """What the parentheses after `rcmha` may set.

    Attributes:
      use_conv: convolve queries, keys and values.
      use_relative: positions in the score.
      width: W, tokens that a kernel sees.
      max_distance: P, the longest sequence.
      per_head_kernel: a kernel per head rather than one for all.
    """

    use_conv: bool = True
    use_relative: bool = True
    width: int = 3
    max_distance: int = 4096
    per_head_kernel: bool = False

    def __post_init__(self):
        check_sizes(self.width, self.max_distance)

    @property
    def num_past(self) -> int:
        """Tokens before a token that its convolution reads."""
        return self.width - 1 if self.use_conv else 0


def init(key: Array, cfg: Any, options: RCMHAOptions | None = None) -> RelConvParams:
    """See `init_rel_conv`."""
    return init_rel_conv(
        key, cfg.num_heads, cfg.head_dim, num_kv_heads=cfg.num_kv_heads,
        **dataclasses.asdict(options or RCMHAOptions()),
    )  # fmt: skip


def apply(params: RelConvParams, q: Array, k: Array, v: Array, ctx: AttentionContext) -> HeadsOut:
    """Convolves, rotates where the model does, adds the positions, attends.

    A token is convolved with tokens of its own segment only; padding counts as zeros.

    Args:
      params: as `init` makes them.
      q: [B,T,H,D] unrotated queries.
      k: [B,S,K,D] unrotated keys; with `ctx.state`, of the new tokens.
      v: [B,S,K,W] values.
      ctx: see `AttentionContext`.
    Returns:
      HeadsOut with z [B,T,H,W].
    Raises:
      ValueError: without causality, or for more keys than the tables have distances.
      NotImplementedError: some queries without their predecessors, or rotated keys.
    """
    options = ctx.options or RCMHAOptions()
    if not ctx.mask.is_causal:
        raise ValueError("attention 'rcmha' is causal; it has no distances to later keys.")
    if ctx.k_is_rotated or (ctx.state is None and (ctx.mask.q_index is not None
                                                   or q.shape[1] != k.shape[1])):  # fmt: skip
        raise NotImplementedError(
            f"attention 'rcmha' with {q.shape[1]} queries at slots of {k.shape[1]} keys: a query "
            "needs the queries before it. Give whole sequences, or a state of its own."
        )
    state, ids = ctx.state, _segments(q, ctx, options)
    if options.use_conv:
        held = {} if state is None else {name: state[f"past_{name}"] for name in "qkv"}
        past = {}
        conv = lambda name, x: depthwise_causal_conv(
            x, getattr(params, f"{name}_kernel"), getattr(params, f"{name}_bias"),
            state=held.get(name), segment_ids=ids,
        )  # fmt: skip
        (q, past["past_q"]), (k, past["past_k"]), (v, past["past_v"]) = (
            conv("q", q), conv("k", k), conv("v", v),
        )  # fmt: skip
        state = None if state is None else {**state, **past}
    free = q  # distances are told by tables, not by angles
    q, k = softmax.rotate_heads(q, k, ctx)
    q_offset: int | Array = 0
    if state is not None:
        q_offset = cast(Array, ctx.slots)[0]
        put = lambda old, new: jax.lax.dynamic_update_slice(
            old, new.astype(old.dtype), (0, q_offset, 0, 0)
        )
        state = {**state, "k": put(state["k"], k), "v": put(state["v"], v)}
        k, v = state["k"].astype(q.dtype), state["v"].astype(q.dtype)
        ctx = dataclasses.replace(
            ctx, mask=dataclasses.replace(ctx.mask, q_index=ctx.slots), state=None
        )
    if options.use_relative:
        scale = 1 / math.sqrt(q.shape[-1]) if ctx.scale is None else ctx.scale
        bias = positions_bias(params, free, k.shape[1], q_offset, scale)
        q = add_query_bias(params, q)
        ctx = dataclasses.replace(ctx, bias=bias if ctx.bias is None else ctx.bias + bias)
    out = softmax.apply(None, q, k, v, dataclasses.replace(ctx, rotate=None))
    return out._replace(state=state)


def _segments(q: Array, ctx: AttentionContext, options: RCMHAOptions) -> Array | None:
    """[B,T] ids that keep convolutions apart, with a state [B,W-1+T]; None: nothing is apart."""
    mask = ctx.mask
    if ctx.state is not None and mask.k_segment_ids is not None:
        ids = jnp.pad(mask.k_segment_ids, ((0, 0), (options.num_past, 0)))
        start = cast(Array, ctx.slots)[0]
        return jax.lax.dynamic_slice_in_dim(ids, start, options.num_past + q.shape[1], axis=1)
    ids = mask.q_segment_ids
    if mask.key_mask is not None:
        ids = jnp.where(mask.key_mask, 1 if ids is None else ids, 0)
    return ids


def init_state(
    cfg: Any, batch_size: int, num_slots: int, dtype: Any, options: RCMHAOptions | None = None
) -> PyTree:
    """Convolved keys and values k, v [B,S,K,D], and past_q, past_k, past_v [B,W-1,H|K,D] before."""
    options = options or RCMHAOptions()
    if options.use_relative and num_slots > options.max_distance:
        raise ValueError(
            f"a cache of {num_slots} tokens exceeds max_distance={options.max_distance}; shorten "
            "it, or set rcmha(max_distance=...) in the model."
        )
    empty = lambda length, heads: jnp.zeros((batch_size, length, heads, cfg.head_dim), dtype)
    kv = empty(num_slots, cfg.num_kv_heads)
    state = {"k": kv, "v": kv}
    if options.use_conv:
        for name, heads in (("q", cfg.num_heads), ("k", cfg.num_kv_heads), ("v", cfg.num_kv_heads)):
            state[f"past_{name}"] = empty(options.num_past, heads)
    return state


def state_axes(options: RCMHAOptions | None = None) -> PyTree:
    """The logical axes of `init_state`."""
    kv = ("batch", "length", "act_kv_heads", None)
    axes: dict[str, tuple[str | None, ...]] = {"k": kv, "v": kv}
    if (options or RCMHAOptions()).use_conv:
        for name, heads in (("q", "act_heads"), ("k", "act_kv_heads"), ("v", "act_kv_heads")):
            axes[f"past_{name}"] = ("batch", None, heads, None)
    return axes


def cost(
    cfg: Any,
    num_queries: int,
    num_keys: int,
    *,
    is_causal: bool = True,
    itemsize: int = 2,
    options: RCMHAOptions | None = None,
) -> Cost:
    """That of `dense`, 2 T (T + S) D a head for the positions, 2 W D a head and token to convolve.

    Args:
      cfg: has num_heads, num_kv_heads and head_dim.
      num_queries: T.
      num_keys: S.
      is_causal: causal self-attention (T = S) needs half the products of queries and keys.
      itemsize: bytes of an activation.
      options: an `RCMHAOptions`.
    """
    options = options or RCMHAOptions()
    whole = softmax.cost(cfg, num_queries, num_keys, is_causal=is_causal, itemsize=itemsize)
    flops = whole.flops
    if options.use_relative:
        flops += 2.0 * num_queries * (num_queries + num_keys) * cfg.num_heads * cfg.head_dim
    if options.use_conv:
        heads = cfg.num_heads + 2 * cfg.num_kv_heads
        flops += 2.0 * num_queries * options.width * heads * cfg.head_dim
    return whole._replace(flops=flops)


RCMHA = Variant(
    name="rcmha",
    init=init,
    apply=apply,
    cost=cost,
    # A row of the result needs the queries before it; decoding goes by `init_state`.
    supports=softmax.SOFTMAX.supports._replace(
        bidirectional=False,
        cached_decode=False,
        caches_rotated_keys=False,
        implementations=("dense", "blocked", "xla"),
    ),
    options=RCMHAOptions,
    init_state=init_state,
    state_axes=state_axes,
)
