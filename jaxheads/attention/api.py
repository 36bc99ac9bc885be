"""One attention function, several implementations, and the rule that picks one.

    dense    everything in memory; every feature, taps on scores and pattern
    blocked  online softmax in tiles, plain JAX; every feature but those taps (summaries of the
             pattern by row come in blocks: `summaries`)
    splash   Pallas kernel for TPU ("pallas_tpu" means the same)
    cudnn    fused kernel for NVIDIA GPUs
    xla      jax.nn.dot_product_attention as XLA compiles it

"auto" takes the platform's kernel when it can honour the call and says once in the log why it
cannot; an implementation asked for by name is used or refused, never replaced.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxheads.attention import kernels
from jaxheads.attention.blocked import blocked_attention
from jaxheads.attention.contract import AttentionContext, Request
from jaxheads.attention.dense import dense_attention
from jaxheads.attention.masks import Mask
from jaxheads.attention.summaries import tap_summaries
from jaxheads.taps import Tap
from jaxheads.typing import Array

logger = logging.getLogger(__name__)

# Above this many scores per head, tiles that stay in the caches are faster than whole rows on CPU
# (equal at 512 x 512, twice as fast at 1024 x 1024 forward), and everywhere they are smaller.
DENSE_SCORES = 512 * 512


class AttentionOutput(NamedTuple):
    """What `attention` returns with `return_lse=True`."""

    z: Array
    """[B,T,H,W], the dtype of q."""
    lse: Array
    """[B,H,T] float32, log of the softmax denominator."""


class Implementation(NamedTuple):
    """A way to compute attention, and why it would refuse a call."""

    reason_not: Callable[[Request], str | None]
    run: Callable[[Request], tuple[Array, Array | None]]


def _run_pure(function: Callable, request: Request, **extra) -> tuple[Array, Array]:
    return function(
        request.q,
        request.k,
        request.v,
        request.mask,
        request.bias,
        scale=request.scale,
        soft_cap=request.soft_cap,
        sinks=request.sinks,
        alibi_slopes=request.alibi_slopes,
        **extra,
    )


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "dense": Implementation(
        lambda request: None,
        lambda request: _run_pure(dense_attention, request, tap=request.tap),
    ),
    "blocked": Implementation(
        lambda request: None, functools.partial(_run_pure, blocked_attention)
    ),
    "splash": Implementation(kernels.splash_reason_not, kernels.splash_attention),
    "cudnn": Implementation(kernels.cudnn_reason_not, kernels.cudnn_attention),
    "xla": Implementation(kernels.xla_reason_not, kernels.xla_attention),
}
ALIASES = {"pallas_tpu": "splash"}
FUSED = {"tpu": "splash", "gpu": "cudnn"}  # what "auto" tries first on each platform


def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask | Array | None = None,
    bias: Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    window: int | None = None,
    segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    implementation: str = "auto",
    return_lse: bool = False,
) -> Array | AttentionOutput:
    """Grouped-query softmax attention over plain arrays.

        z = softmax(cap tanh(scale q.k / cap) + bias - slope |t - s|, over visible s) v

    Args:
      q: [B,T,H,D] queries, already rotated.
      k: [B,S,K,D] keys; K divides H, and query head h reads kv head h // (H / K).
      v: [B,S,K,W] values.
      mask: a bool array broadcastable to [B,H,T,S], combined with the options below; or a `Mask`,
        which says everything itself (`is_causal` is not read, window and segment ids must be None).
      bias: broadcastable to [B,H,T,S].
      scale: factor on q.k; None = 1/sqrt(D).
      is_causal: query t sees keys s <= t (both counted from 0; a cache needs `Mask.q_index`).
      window: keys in a sliding window, the query's own included.
      segment_ids: [B,T] ids of packed documents; equal ids see each other, 0 is padding.
      kv_segment_ids: [B,S]; None = `segment_ids`.
      soft_cap: bound of a tanh cap on the scaled scores (Gemma 2), before bias and mask.
      sinks: [H] logits that join each softmax denominator (gpt-oss).
      alibi_slopes: [H] penalty per position of distance (`alibi_slopes()`).
      implementation: "auto", "dense", "blocked", "splash", "cudnn" or "xla".
      return_lse: return `AttentionOutput(z, lse)`; dense and blocked can.
    Returns:
      z [B,T,H,W] in the dtype of q. A query that sees no key gets zeros.
    Raises:
      NotImplementedError: the named implementation cannot honour the call.
    Example:
      >>> q = jnp.ones((1, 4, 2, 8)); k = v = jnp.ones((1, 4, 1, 8))
      >>> attention(q, k, v, window=2).shape
      (1, 4, 2, 8)
    """
    if isinstance(mask, Mask):
        if window is not None or segment_ids is not None or kv_segment_ids is not None:
            raise ValueError(
                "a Mask object was given together with window or segment ids; set them in the "
                "Mask, or pass mask as a bool array."
            )
    else:
        mask = Mask(
            is_causal=is_causal,
            window=window,
            q_segment_ids=segment_ids,
            k_segment_ids=kv_segment_ids,
            head_mask=mask,
        )
    ctx = AttentionContext(
        mask=mask,
        bias=bias,
        scale=scale,
        soft_cap=soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        implementation=implementation,
    )
    z, lse = attend(q, k, v, ctx, needs_lse=return_lse)
    return AttentionOutput(z, cast(Array, lse)) if return_lse else z


def attend(
    q: Array, k: Array, v: Array, ctx: AttentionContext, *, needs_lse: bool = False
) -> tuple[Array, Array | None]:
    """Checks a call, picks an implementation and runs it: what variants build on.

    Args:
      q: [B,T,H,D], k: [B,S,K,D], v: [B,S,K,W], rotated.
      ctx: mask, bias and options; `ctx.rotate` is not used here.
      needs_lse: only implementations that return a differentiable lse fit.
    Returns:
      z [B,T,H,W] and lse [B,H,T] float32, or None where the kernel keeps it.
    """
    check_arrays(q, k, v)
    _check_options(q, k, ctx)
    request = Request(
        q=q,
        k=k,
        v=v,
        mask=ctx.mask,
        bias=ctx.bias,
        scale=1 / math.sqrt(q.shape[-1]) if ctx.scale is None else ctx.scale,
        soft_cap=ctx.soft_cap,
        sinks=ctx.sinks,
        alibi_slopes=ctx.alibi_slopes,
        tap=ctx.tap,
        needs_lse=needs_lse,
        platform=platform(),
    )
    name = select_implementation(request, ctx.implementation)
    with jax.named_scope(f"attention.{name}"):
        out = IMPLEMENTATIONS[name].run(request)
    if name != "dense":  # which has the pattern itself
        tap_summaries(request)
    return out


def select_implementation(request: Request, name: str = "auto") -> str:
    """The implementation to use for a call.

    Raises:
      ValueError: unknown name.
      NotImplementedError: `name` cannot honour the call; the message says why and what to do.
    """
    name = ALIASES.get(name, name)
    if name != "auto":
        if name not in IMPLEMENTATIONS:
            known = ", ".join(("auto", *IMPLEMENTATIONS, *ALIASES))
            raise ValueError(f"unknown implementation {name!r}; known: {known}.")
        reason = _reason_not(name, request)
        if reason is not None:
            raise NotImplementedError(
                f"implementation={name!r} cannot honour this call: {reason}; pass "
                "implementation='auto', 'dense' or, for long inputs, 'blocked'."
            )
        return name
    fused = FUSED.get(request.platform)
    if fused is not None and request.num_queries > 1:  # one query is decoding: nothing to fuse
        reason = _reason_not(fused, request)
        if reason is None:
            return fused
        _log_once(fused, reason)
    if request.num_queries * request.num_keys <= DENSE_SCORES or _wants_pattern(request.tap):
        return "dense"
    return "blocked"


def _reason_not(name: str, request: Request) -> str | None:
    if name != "dense" and _wants_pattern(request.tap):
        site = "scores" if request.tap.wants("scores") else "pattern"
        return f"it never forms {site!r}, which an edit or a record asks for"
    return IMPLEMENTATIONS[name].reason_not(request)


def _wants_pattern(tap: Tap) -> bool:
    return tap.wants("scores") or tap.needs_whole("pattern")


@functools.cache
def _log_once(name: str, reason: str) -> None:
    logger.warning("attention: not using %s: %s.", name, reason)


def platform() -> str:
    """Platform of the mesh that is set (it may belong to an absent TPU), else the default one."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    platform = getattr(device, "platform", None) or jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)


def check_arrays(q: Array, k: Array, v: Array) -> None:
    """Raise unless q [B,T,H,D], k [B,S,K,D] and v [B,S,K,W] fit each other and are floating."""
    for name, x, axes in (("q", q, "[B,T,H,D]"), ("k", k, "[B,S,K,D]"), ("v", v, "[B,S,K,W]")):
        if jnp.ndim(x) != 4:
            raise ValueError(f"{name} has shape {jnp.shape(x)}; it must be {axes}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {x.dtype}; attention needs a floating dtype.")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k {k.shape} and v {v.shape} differ in batch, length or heads; they share [B,S,K]."
        )
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q {q.shape} and k {k.shape} differ in batch or head_dim; they must share B and D."
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"num_heads={q.shape[2]} is not divisible by num_kv_heads={k.shape[2]}; query heads "
            "are grouped evenly over kv heads."
        )


def _check_options(q: Array, k: Array, ctx: AttentionContext) -> None:
    batch, num_queries, num_heads, _ = q.shape
    num_keys, mask = k.shape[1], ctx.mask
    full = (batch, num_heads, num_queries, num_keys)
    if ctx.soft_cap is not None and ctx.soft_cap <= 0:
        raise ValueError(f"soft_cap={ctx.soft_cap} must be positive; None means no cap.")
    for name, x in (("bias", ctx.bias), ("mask", mask.head_mask)):
        if x is not None and not _broadcasts(jnp.shape(x), full):
            raise ValueError(
                f"{name} has shape {jnp.shape(x)}, which does not broadcast to [B,H,T,S] = {full}."
            )
    for name, x in (("mask", mask.head_mask), ("key_mask", mask.key_mask)):
        if x is not None and x.dtype != bool:
            raise TypeError(
                f"{name} has dtype {x.dtype}; a mask is bool (True = visible). An additive mask "
                "goes into bias."
            )
    for name, x in (("sinks", ctx.sinks), ("alibi_slopes", ctx.alibi_slopes)):
        if x is not None and jnp.shape(x) != (num_heads,):
            raise ValueError(f"{name} has shape {jnp.shape(x)}; it must be [H] = ({num_heads},).")
    if mask.keys_share_segments and num_queries != num_keys:
        raise ValueError(
            f"segment ids of the queries alone serve only self-attention, but T={num_queries} and "
            f"S={num_keys}; pass the keys' segment ids [B,S] as well."
        )
    per_token = (
        ("q_index", mask.q_index, num_queries),
        ("k_index", mask.k_index, num_keys),
        ("q_segment_ids", mask.q_segment_ids, num_queries),
        ("k_segment_ids", mask.k_segment_ids, num_keys),
        ("key_mask", mask.key_mask, num_keys),
    )
    for name, x, length in per_token:
        if x is None:
            continue
        shapes = [(batch, length), (length,)] if name.endswith("index") else [(batch, length)]
        if jnp.shape(x) not in shapes:
            allowed = " or ".join(map(str, shapes))
            raise ValueError(f"{name} has shape {jnp.shape(x)}; it must be {allowed}.")


def _broadcasts(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    if len(shape) > len(full):
        return False
    return all(n in (1, m) for n, m in zip(shape[::-1], full[::-1], strict=False))
