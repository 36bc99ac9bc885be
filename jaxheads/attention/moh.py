"""Mixture-of-head attention (MoH): a router gives each token a weight per head.

    y = sum_i g_i o_i W_O^i        o_i: output of head i;  g_i = 0 unless the head is active

The first `hs` heads are shared, active for every token; of the E others each token activates k.
Gates act on head outputs, before W_O: keys and values of every head are formed for every token.

References: Jin, Zhu, Yuan, Yan, 2024, arXiv:2410.11842. Two forms of the gates and of the balance
loss exist: the paper's equations, and those of the released code, which its checkpoints use and
which are the defaults here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.attention.api import attend
from jaxheads.attention.contract import AttentionContext
from jaxheads.attention.masks import Mask
from jaxheads.attention.moh_gather import attend_gathered, row_capacity
from jaxheads.typing import Array

GATE_SCALES = ("unit_mean", "paper")
BALANCE_SCALES = ("official", "paper")
IMPLS = ("dense", "gather")
_EPS = float(jnp.finfo(jnp.float32).eps)


class MoHStats(NamedTuple):
    """How tokens were routed; for `load_balance_loss` and reports."""

    probs: Array
    """[B,T,E] float32, p: softmax over the routed heads."""
    mask: Array
    """[B,T,E] float32, 1 for the heads a token activates; carries no gradient."""
    P: Array
    """[E] mean of `probs` over the tokens."""
    f: Array
    """[E] mean of `mask` over the tokens; sums to k."""


class MoHOutput(NamedTuple):
    """What `moh_attention` returns."""

    z: Array
    """[B,T,H,W] gated head outputs, the dtype of q."""
    num_dropped: Array
    """int32: active (token, head) pairs that found no room and contribute nothing; 0 if dense."""


def moh_gates(
    router_logits: Array | None,
    shared_logits: Array | None = None,
    type_logits: Array | None = None,
    *,
    top_k: int,
    gate_scale: str = "unit_mean",
) -> tuple[Array, MoHStats]:
    """Gates of the two-stage learned router.

        p = softmax(router)   m = top-k mask of p   s = softmax(shared)   a = softmax(type)
        unit_mean:  g = (2 a_1 hs s,  2 a_2 k p m / max(sum p m, eps))       the released code
        paper:      g = (a_1 s,  a_2 p m)                                    eq. 5 and 6

    Without shared heads there is no a, and the routed gates stand alone (without 2 a_2, or a_2);
    the same for shared heads without routed ones. Ties go to the lower head.

    Args:
      router_logits: [B,T,E], x W_r; None (or E = 0) where every head is shared.
      shared_logits: [B,T,hs], x W_s; None for hs = 0, or for one shared head if `type_logits` is
        given.
      type_logits: [B,T,2], x W_h; None unless there are shared and routed heads.
      top_k: k, routed heads that a token activates.
      gate_scale: "unit_mean" or "paper".
    Returns:
      gates [B,T,hs+E] float32, shared heads first, and `MoHStats`.
    Raises:
      ValueError: for k outside 1..E, logits that do not fit, or an unknown scale.
    Example:
      >>> gates, _ = moh_gates(jnp.zeros((1, 2, 3)), None, jnp.zeros((1, 2, 2)), top_k=3)
      >>> gates[0, 0].tolist()
      [1.0, 1.0, 1.0, 1.0]
    """
    return learned_gates(router_logits, shared_logits, type_logits, top_k, gate_scale)


def learned_gates(
    router_logits: Array | None,
    shared_logits: Array | None,
    type_logits: Array | None,
    top_k: int,
    gate_scale: str,
    choose: Callable[[Array], Array] = lambda mask: mask,
) -> tuple[Array, MoHStats]:
    """`moh_gates` with the mask [B,T,E] passed through `choose`."""
    _check_choice("gate_scale", gate_scale, GATE_SCALES)
    num_routed = _check_logits(router_logits, shared_logits, type_logits)
    if num_routed or top_k:
        check_top_k(top_k, num_routed)
    softmax = lambda logits: jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    known = next(x for x in (shared_logits, type_logits, router_logits) if x is not None)
    shared = jnp.zeros((*known.shape[:-1], 0), jnp.float32)
    probs = softmax(router_logits) if router_logits is not None and num_routed else shared
    if shared_logits is not None:
        shared = softmax(shared_logits)
    elif type_logits is not None:
        shared = jnp.ones((*known.shape[:-1], 1), jnp.float32)
    mask = choose(_top_mask(probs, top_k))
    routed = probs * mask
    factor = 1
    if gate_scale == "unit_mean":
        routed = routed / jnp.maximum(routed.sum(-1, keepdims=True), _EPS) * top_k
        shared, factor = shared * shared.shape[-1], 2
    if type_logits is not None:
        share = factor * softmax(type_logits)
        shared, routed = share[..., :1] * shared, share[..., 1:] * routed
    return jnp.concatenate([shared, routed], axis=-1), _stats(probs, mask)


def norm_router_gates(
    q: Array, *, num_shared: int, top_k: int, straight_through: bool = True
) -> tuple[Array, MoHStats]:
    """Gates of 1 and 0 from the norms of the queries, for models that were trained without gates.

        n_i = ||q_i||   z = n / std(n)   p = softmax(z)   m = top-k mask of p     i routed
        g_i = 1 (shared),  g_i = m_i (routed)

    std is over the routed heads of the token, unbiased, at least 1e-6. Rotation keeps norms, so q
    may be rotated or not.

    Args:
      q: [B,T,H,D] queries.
      num_shared: the first so many heads are always active.
      top_k: k, routed heads that a token activates.
      straight_through: hand the gradient of g_i to p_i, for selected heads and others alike
        (eq. 9 and 10); False: the mask is a constant.
    Returns:
      gates [B,T,H] float32 and `MoHStats`.
    Raises:
      ValueError: for counts that do not fit H, one routed head (its std is undefined), or
        `straight_through` without routed heads.
    """
    return norm_gates(q, num_shared, top_k, straight_through)


def norm_gates(
    q: Array,
    num_shared: int,
    top_k: int,
    straight_through: bool,
    choose: Callable[[Array], Array] = lambda mask: mask,
) -> tuple[Array, MoHStats]:
    """`norm_router_gates` with the mask [B,T,E] passed through `choose`."""
    if q.ndim != 4:
        raise ValueError(f"q has shape {q.shape}; it must be [B,T,H,D].")
    check_split(num_shared, top_k, q.shape[2])
    check_norm_router(num_shared, q.shape[2])
    shared = jnp.ones((*q.shape[:2], num_shared), jnp.float32)
    if num_shared == q.shape[2]:
        if straight_through:
            raise ValueError(
                f"straight_through=True with num_shared={num_shared} of {q.shape[2]} heads: no "
                "head is routed; pass straight_through=False, or share fewer heads."
            )
        return shared, _stats(shared[..., :0], shared[..., :0])
    squares = jnp.sum(jnp.square(q[:, :, num_shared:].astype(jnp.float32)), axis=-1)
    is_zero = squares == 0  # where the root has no derivative
    norms = jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squares)))  # [B,T,E]
    std = jnp.sqrt(jnp.maximum(jnp.var(norms, axis=-1, ddof=1, keepdims=True), 1e-12))
    probs = jax.nn.softmax(norms / std, axis=-1)
    mask = choose(_top_mask(probs, top_k))
    routed = mask + (probs - jax.lax.stop_gradient(probs)) if straight_through else mask
    return jnp.concatenate([shared, routed], axis=-1), _stats(probs, mask)


def moh_combine(head_out: Array, gates: Array) -> Array:
    """Head outputs times their gates, ``g_i o_i``; the output projection then sums over heads.

    Args:
      head_out: [B,T,H,W], before W_O.
      gates: [B,T,H].
    Returns:
      [B,T,H,W] in the dtype of `head_out`.
    """
    _check_gates(gates, head_out.shape)
    return jnp.einsum("bth,bthd->bthd", gates, head_out).astype(head_out.dtype)


def moh_attention(
    q: Array,
    k: Array,
    v: Array,
    gates: Array,
    *,
    mask: Mask | Array | None = None,
    impl: str = "dense",
    capacity_factor: float | None = None,
    num_shared: int = 0,
    top_k: int | None = None,
) -> MoHOutput:
    """Softmax attention whose head outputs are multiplied by gates.

    ``impl="gather"`` computes a routed head only for the queries that activated it (gate not 0),
    the first C of each sequence, in order:

        C = ceil(capacity_factor T k / E), at most T

    C is static, per sequence and head. ``capacity_factor >= E/k`` (the default) makes room for
    everything, so that the result is that of "dense"; with less, FLOPs fall to (hs + E C / T) / H
    and pairs that find no room are counted. Gradients reach the gates of computed pairs only: train
    straight-through gates with "dense". Below a thousand tokens dense matrices tend to be faster.

    Args:
      q: [B,T,H,D] queries, already rotated.
      k: [B,S,K,D] keys; K divides H.
      v: [B,S,K,W] values.
      gates: [B,T,H].
      mask: None (every key is visible), a `Mask`, a bool array, or a float array that is added to
        the scores; arrays broadcastable to [B,H,T,S].
      impl: "dense" or "gather".
      capacity_factor: see above; None = E/k.
      num_shared: hs, heads that "gather" computes for every query.
      top_k: k; None = E: any token may activate any head, and C = ceil(capacity_factor T).
    Returns:
      `MoHOutput`: z [B,T,H,W] and num_dropped.
    Raises:
      ValueError: for gates of another shape, a capacity_factor that is not positive, or "gather"
        with an additive mask that differs between queries.
    """
    _check_choice("impl", impl, IMPLS)
    _check_gates(gates, q.shape)
    check_capacity_factor(capacity_factor)
    bias = None
    if not isinstance(mask, Mask):
        if mask is not None and jnp.issubdtype(mask.dtype, jnp.floating):
            mask, bias = None, mask
        mask = Mask(head_mask=mask)
    ctx = AttentionContext(mask=mask, bias=bias)
    if impl == "dense":
        return MoHOutput(moh_combine(attend(q, k, v, ctx)[0], gates), jnp.int32(0))
    num_routed = q.shape[2] - num_shared
    top_k = num_routed if top_k is None else top_k
    check_split(num_shared, top_k, q.shape[2])
    capacity = row_capacity(capacity_factor, q.shape[1], top_k, num_routed)
    return MoHOutput(*attend_gathered(q, k, v, gates, ctx, num_shared, capacity))


def load_balance_loss(
    stats: MoHStats,
    *,
    scale: str = "official",
    token_mask: Array | None = None,
    axis_name: Any = None,
) -> Array:
    """The balance loss of one layer, over its N tokens.

        P_i = mean_t p_ti    f_i = mean_t m_ti (no gradient)
        official:  E sum_i P_i f_i     k when uniform
        paper:     sum_i P_i f_i       k/E when uniform (eq. 7)

    A model adds beta = 0.01 times the mean of it over the layers with routed heads.

    Args:
      stats: from `moh_gates` or `norm_router_gates`.
      scale: "official" or "paper".
      token_mask: [B,T] bool, the tokens that count (padding does not); None = all.
      axis_name: mesh axes over which tokens are split inside `shard_map` or `vmap`; means are
        taken over them before the product, so that the value does not depend on the split.
    Returns:
      Scalar float32; 0 without routed heads.
    """
    _check_choice("scale", scale, BALANCE_SCALES)
    num_routed = stats.probs.shape[-1]
    if token_mask is not None and token_mask.shape != stats.probs.shape[:-1]:
        raise ValueError(
            f"token_mask has shape {token_mask.shape}; it must be that of the tokens, "
            f"{stats.probs.shape[:-1]}."
        )
    if num_routed == 0:
        return jnp.zeros((), jnp.float32)
    if token_mask is None:
        probs, loads = stats.P, stats.f
        if axis_name is not None:
            probs, loads = jax.lax.pmean((probs, loads), axis_name)
    else:
        counts = token_mask.astype(jnp.float32)
        total = lambda x: jnp.sum(x * counts[..., None], axis=tuple(range(counts.ndim)))
        sums = total(stats.probs), total(stats.mask), jnp.sum(counts)
        probs, loads, number = sums if axis_name is None else jax.lax.psum(sums, axis_name)
        probs, loads = probs / jnp.maximum(number, 1), loads / jnp.maximum(number, 1)
    loss = jnp.sum(probs * jax.lax.stop_gradient(loads))
    return loss * num_routed if scale == "official" else loss


def _top_mask(probs: Array, top_k: int) -> Array:
    """[...,E] float32: 1 at the k largest, of equal ones the first."""
    if top_k == 0:
        return jnp.zeros_like(probs)
    chosen = jax.lax.top_k(jax.lax.stop_gradient(probs), top_k)[1]
    return jax.nn.one_hot(chosen, probs.shape[-1], dtype=jnp.float32).sum(-2)


def _stats(probs: Array, mask: Array) -> MoHStats:
    mask = jax.lax.stop_gradient(mask)
    tokens = tuple(range(probs.ndim - 1))
    return MoHStats(probs, mask, probs.mean(tokens), mask.mean(tokens))


def check_split(num_shared: int, top_k: int, num_heads: int) -> None:
    """Raise unless hs shared heads and k of the others are a choice out of H."""
    if not _is_count(num_shared) or num_shared > num_heads:
        raise ValueError(
            f"num_shared={num_shared!r} must be an integer from 0 to the {num_heads} heads there "
            "are."
        )
    num_routed = num_heads - num_shared
    if num_routed or top_k:
        check_top_k(top_k, num_routed)


def check_top_k(top_k: int, num_routed: int) -> None:
    """Raise unless k of the E routed heads can be active."""
    if not _is_count(top_k) or not min(1, num_routed) <= top_k <= num_routed:
        raise ValueError(
            f"top_k={top_k!r} must be an integer from {min(1, num_routed)} to the {num_routed} "
            "routed heads (0 only where every head is shared)."
        )


def check_norm_router(num_shared: int, num_heads: int) -> None:
    """Raise for one routed head, whose norm has no deviation over heads."""
    if num_heads - num_shared == 1:
        raise ValueError(
            f"num_shared={num_shared} of {num_heads} heads leaves one routed head; the query-norm "
            "router divides by the deviation over routed heads, so it needs at least 2, or none."
        )


def check_capacity_factor(capacity_factor: float | None) -> None:
    """Raise unless it is a positive number or None."""
    if capacity_factor is not None and not 0 < capacity_factor < math.inf:
        raise ValueError(
            f"capacity_factor={capacity_factor!r} must be positive (1: as many rows as a balanced "
            "router fills; E/k: room for all), or None for E/k."
        )


def _is_count(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 0


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}.")


def _check_gates(gates: Array, shape: tuple[int, ...]) -> None:
    if gates.shape != tuple(shape[:3]):
        raise ValueError(
            f"gates has shape {gates.shape}; it must be [B,T,H] = {tuple(shape[:3])}, one gate for "
            "each token and head."
        )


def _check_logits(router: Array | None, shared: Array | None, types: Array | None) -> int:
    """E; raises for logits that do not belong together."""
    num_routed = 0 if router is None else router.shape[-1]
    num_shared = int(types is not None) if shared is None else shared.shape[-1]
    if num_routed + num_shared == 0 or (num_routed == 0 and shared is None):
        raise ValueError("no logits: give router_logits [B,T,E], shared_logits [B,T,hs] or both.")
    if (types is not None) != (num_routed > 0 and num_shared > 0):
        have = "none were given" if types is None else f"they have shape {types.shape}"
        raise ValueError(
            f"type_logits belong to layers with shared and routed heads; {have}, with "
            f"{num_shared} shared and {num_routed} routed heads."
        )
    if types is not None and types.shape[-1] != 2:
        raise ValueError(f"type_logits has shape {types.shape}; it must be [B,T,2].")
    given = {"router_logits": router, "shared_logits": shared, "type_logits": types}
    leading = {name: x.shape[:-1] for name, x in given.items() if x is not None}
    if len(set(leading.values())) > 1:
        raise ValueError(f"logits differ in their tokens [B,T]: {leading}.")
    return num_routed
