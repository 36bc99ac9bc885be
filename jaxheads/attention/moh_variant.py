"""Mixture-of-head attention as a row of `VARIANTS`: what a decoder trains and decodes with.

    --set model.attention="moh"                                  a quarter shared, half active of H
    --set model.attention="moh(num_shared=2,top_k=2)"            8 heads: half of them active
    --set model.attention="moh(num_shared=8,top_k=0)*2+moh(num_shared=2,top_k=4)*2"
    --set model.attention="moh(router=query_norm,num_shared=4,top_k=2)"     a dense model's weights

The balance loss is the entry `moh_balance` of the model's auxiliary losses; training weighs it by
``train.aux_weight`` (0.01, the published beta).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.attention import moh, softmax
from jaxheads.attention.contract import AttentionContext, Cost, HeadsOut, Variant
from jaxheads.attention.moh_gather import attend_gathered, row_capacity
from jaxheads.typing import Array

ROUTERS = ("learned", "query_norm")


@dataclasses.dataclass(frozen=True)
class MoHOptions:
    """What the parentheses after `moh` may set.

    Attributes:
      num_shared: hs, heads that every token activates; None = H // 4.
      top_k: k, of the other heads; None = H // 2, so that with the default above 75 % are active.
      router: "learned" (parameters of its own) or "query_norm" (none).
      gate_scale: of the learned router, "unit_mean" or "paper".
      balance_scale: of the balance loss, "official" or "paper".
      impl: "dense", or "gather", which skips inactive heads.
      capacity_factor: of "gather"; None = E/k, room for all.
    """

    num_shared: int | None = None
    top_k: int | None = None
    router: str = "learned"
    gate_scale: str = "unit_mean"
    balance_scale: str = "official"
    impl: str = "dense"
    capacity_factor: float | None = None

    def __post_init__(self):
        for name, choices in (
            ("router", ROUTERS),
            ("gate_scale", moh.GATE_SCALES),
            ("balance_scale", moh.BALANCE_SCALES),
            ("impl", moh.IMPLS),
        ):
            if getattr(self, name) not in choices:
                known = ", ".join(choices)
                raise ValueError(f"moh: {name}={getattr(self, name)!r} is not one of {known}.")
        moh.check_capacity_factor(self.capacity_factor)

    def split(self, num_heads: int) -> tuple[int, int]:
        """(hs, k) for H heads.

        Raises:
          ValueError: for numbers that do not fit H.
        """
        num_shared = num_heads // 4 if self.num_shared is None else self.num_shared
        top_k = self.top_k
        if top_k is None:
            top_k = max(0, min(max(1, num_heads // 2), num_heads - num_shared))
        moh.check_split(num_shared, top_k, num_heads)
        if self.router == "query_norm":
            moh.check_norm_router(num_shared, num_heads)
        return num_shared, top_k


def init(key: Array, cfg: Any, options: MoHOptions | None = None) -> dict[str, Array] | None:
    """W_r [M,E], W_s [M,hs] and W_h [M,2] float32, those that the gates need; None without any."""
    options = options or MoHOptions()
    num_shared, _ = options.split(cfg.num_heads)
    if options.router == "query_norm":
        return None
    num_routed = cfg.num_heads - num_shared
    widths = {
        "routed": num_routed,
        "shared": num_shared if num_shared > 1 or not num_routed else 0,
        "type": 2 if num_shared and num_routed else 0,
    }
    keys = jax.random.split(key, len(widths))
    return {
        name: jax.random.normal(one, (cfg.model_dim, width), jnp.float32) * cfg.model_dim**-0.5
        for one, (name, width) in zip(keys, widths.items(), strict=True)
        if width
    }


def apply(
    params: dict[str, Array] | None, q: Array, k: Array, v: Array, ctx: AttentionContext
) -> HeadsOut:
    """Softmax attention with gated heads.

    Taps: `active` [B,T,H], 1 for the heads a token activates; an edit there decides which heads are
    used, and gates and loads follow. `gates` [B,T,H], the factors. `pattern` and `lse` are those of
    the heads before their gates; `z` holds gated outputs.

    Args:
      params: as `init` makes them.
      q: [B,T,H,D] unrotated queries.
      k: [B,S,K,D] keys, unrotated unless `ctx.k_is_rotated`.
      v: [B,S,K,W] values.
      ctx: see `AttentionContext`; `ctx.x` is read by the learned router.
    Returns:
      HeadsOut with z [B,T,H,W]; aux has `moh_balance` where heads are routed, and `num_dropped`
      (pairs of token and head) where they are gathered.
    """
    options = ctx.options or MoHOptions()
    num_shared, top_k = options.split(q.shape[2])
    gates, stats = _route(params, q, ctx, options)
    gates = ctx.tap("gates", gates)
    aux: dict[str, Array] = {}
    if num_shared < q.shape[2]:
        ids = ctx.mask.q_segment_ids
        aux["moh_balance"] = moh.load_balance_loss(
            stats, scale=options.balance_scale, token_mask=None if ids is None else ids != 0
        )
    if options.impl == "dense":
        out = softmax.apply(None, q, k, v, ctx)
        return HeadsOut(moh.moh_combine(out.z, gates), out.lse, aux)
    q, k = softmax.rotate_heads(q, k, ctx)
    capacity = row_capacity(options.capacity_factor, q.shape[1], top_k, q.shape[2] - num_shared)
    z, num_dropped = attend_gathered(q, k, v, gates, ctx, num_shared, capacity)
    return HeadsOut(z, None, {**aux, "num_dropped": num_dropped.astype(jnp.float32)})


def _route(
    params: dict[str, Array] | None, q: Array, ctx: AttentionContext, options: MoHOptions
) -> tuple[Array, moh.MoHStats]:
    """Gates [B,T,H] of the layer's router, the mask tapped at `active`."""
    num_shared, top_k = options.split(q.shape[2])

    def choose(mask: Array) -> Array:
        shared = jnp.ones((*q.shape[:2], num_shared), mask.dtype)
        return ctx.tap("active", jnp.concatenate([shared, mask], axis=-1))[..., num_shared:]

    if options.router == "query_norm":
        is_dense = options.impl == "dense" and num_shared < q.shape[2]
        return moh.norm_gates(q, num_shared, top_k, is_dense, choose)
    if ctx.x is None:
        raise ValueError(
            "the learned router of attention 'moh' reads the layer's input; set "
            "AttentionContext.x [B,T,M], or use router=query_norm."
        )
    x = ctx.x.astype(jnp.float32)
    params = params or {}
    logits = lambda name: (
        jnp.einsum("btm,me->bte", x, params[name].astype(jnp.float32)) if name in params else None
    )
    return moh.learned_gates(
        logits("routed"), logits("shared"), logits("type"), top_k, options.gate_scale, choose
    )


def cost(
    cfg: Any,
    num_queries: int,
    num_keys: int,
    *,
    is_causal: bool = True,
    itemsize: int = 2,
    options: MoHOptions | None = None,
) -> Cost:
    """That of `dense` and of the router; "gather" does (hs + E C / T) / H of the attention.

    Args:
      cfg: has num_heads, num_kv_heads, head_dim and model_dim.
      num_queries: T.
      num_keys: S.
      is_causal: causal self-attention (T = S) needs half the products.
      itemsize: bytes of an activation.
      options: a `MoHOptions`.
    """
    options = options or MoHOptions()
    num_shared, top_k = options.split(cfg.num_heads)
    whole = softmax.cost(cfg, num_queries, num_keys, is_causal=is_causal, itemsize=itemsize)
    num_routed, share = cfg.num_heads - num_shared, 1.0
    if options.impl == "gather":
        rows = row_capacity(options.capacity_factor, num_queries, top_k, num_routed)
        share = (num_shared + num_routed * rows / num_queries) / cfg.num_heads
    router = 0.0
    if options.router == "learned":
        router = 2.0 * num_queries * cfg.model_dim * (cfg.num_heads + 2)
    return whole._replace(flops=whole.flops * share + router)


MOH = Variant(
    name="moh",
    init=init,
    apply=apply,
    cost=cost,
    supports=softmax.SOFTMAX.supports._replace(
        taps=softmax.SOFTMAX.supports.taps | {"active", "gates"}
    ),
    options=MoHOptions,
)
