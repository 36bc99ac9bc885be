"""What an attention variant is given, what it returns, and what a row of `VARIANTS` holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from jaxheads.attention.masks import Mask
from jaxheads.taps import NO_TAP, Tap
from jaxheads.typing import Array, PyTree

Rotate = Callable[[Array, Any], Array]


_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AttentionContext:
    """Everything a variant may use besides q, k and v.

    Attributes:
      mask: which keys each query sees.
      q_positions: [T] or [B,T] positions for the rotation; not needed when `rotate` is None.
      k_positions: [S] or [B,S].
      bias: broadcastable to [B,H,T,S], added to the scaled and capped scores.
      sinks: [H] logits that join each softmax denominator.
      alibi_slopes: [H] penalty per slot of distance.
      x: [B,T,M] the normed input of the layer at the queries, for routers and pooled agents.
      layer: int32 scalar, the index of the layer.
      tap: applies edits and records; static, and alive only in the function body that made it.
      rotate: (x [B,T,H,D], positions) -> same shape; None when the model has no rotation.
      k_is_rotated: the keys come rotated, from a cache that holds them so.
      scale: factor on q.k; None = 1/sqrt(D).
      soft_cap: scores become cap * tanh(scores / cap).
      implementation: a name of `IMPLEMENTATIONS`, or "auto".
      options: the variant's options (`Variant.options`) in this layer.
      state: what the layer kept of earlier calls, where the variant has a state of its own
        (`Variant.init_state`) and a cache is in use; k and v are then of the new tokens alone.
      slots: [T] with a state: the slots of the new tokens, counted from the first token ever fed.
    """

    mask: Mask
    q_positions: Array | None = None
    k_positions: Array | None = None
    bias: Array | None = None
    sinks: Array | None = None
    alibi_slopes: Array | None = None
    x: Array | None = None
    layer: Array | None = None
    state: PyTree | None = None
    slots: Array | None = None
    tap: Tap = dataclasses.field(default=NO_TAP, metadata=_STATIC)
    rotate: Rotate | None = dataclasses.field(default=None, metadata=_STATIC)
    k_is_rotated: bool = dataclasses.field(default=False, metadata=_STATIC)
    scale: float | None = dataclasses.field(default=None, metadata=_STATIC)
    soft_cap: float | None = dataclasses.field(default=None, metadata=_STATIC)
    implementation: str = dataclasses.field(default="auto", metadata=_STATIC)
    options: Any = dataclasses.field(default=None, metadata=_STATIC)


def asked_beyond(ctx: AttentionContext, others: Iterable[tuple[bool, str]] = ()) -> str | None:
    """The first thing, in words, that a call asks beyond scaled causal softmax; None: nothing.

    A variant with a form of its own serves segment ids and key masks and refuses, or does another
    way, what this names.

    Args:
      ctx: the call.
      others: (whether it is asked, what it is) that this variant cannot honour either.
    """
    mask = ctx.mask
    common = (
        (mask.head_mask is not None, "a head mask"),
        (mask.window is not None, "a sliding window"),
        (mask.prefix_lengths is not None, "a prefix"),
        (ctx.bias is not None, "a bias"),
        (ctx.sinks is not None, "sinks"),
        (ctx.soft_cap is not None, "a soft cap"),
        (ctx.alibi_slopes is not None, "ALiBi"),
        (not mask.is_causal, "no causality"),
    )
    return next((what for is_asked, what in (*common, *others) if is_asked), None)


class HeadsOut(NamedTuple):
    """What a variant returns."""

    z: Array
    """[B,T,H,D], the dtype of q: one output per query head, before the output projection."""
    lse: Array | None
    """[B,H,T] float32: log of the softmax denominator; None where the kernel keeps it."""
    aux: dict[str, Array]
    """Scalars: losses, of which a model takes the mean over the layers that have them, and counts
    (`is_count`), which it sums and nobody optimises."""
    state: PyTree = None
    """`AttentionContext.state` with the new tokens, where there was one."""


def is_count(name: str) -> bool:
    """Whether an entry of `HeadsOut.aux` counts something rather than being a loss."""
    return name.startswith("num_")


class Cost(NamedTuple):
    """What one layer's attention takes for one sequence."""

    flops: float
    """Forward floating-point operations; a backward pass takes 2.5 times as many."""
    bytes: float
    """Least traffic to memory: read q, k, v once, write z once."""
    kv_cache_bytes: float
    """Cache that S tokens leave behind."""


class Supports(NamedTuple):
    """What a variant can do; callers check before they build on it."""

    causal: bool
    bidirectional: bool
    gqa: bool
    cached_decode: bool
    caches_rotated_keys: bool
    """The decoder rotates keys before it writes its cache and sets `k_is_rotated`."""
    segment_ids: bool
    head_mask: bool
    taps: frozenset[str]
    implementations: tuple[str, ...]
    mesh_axes: frozenset[str]


class Variant(NamedTuple):
    """A row of `VARIANTS`: one way for heads to attend."""

    name: str
    init: Callable[..., PyTree]
    """(key, cfg, options) -> parameters, or None for a variant without any."""
    apply: Callable[[PyTree, Array, Array, Array, AttentionContext], HeadsOut]
    """(params, q [B,T,H,D], k [B,S,K,D], v [B,S,K,D], ctx) -> HeadsOut; q and k unrotated."""
    cost: Callable[..., Cost]
    """(cfg, T, S, *, is_causal, itemsize, options) -> Cost."""
    supports: Supports
    options: type | None = None
    """A frozen dataclass with defaults: what parentheses after the name may set, as in
    ``model.attention="s2(block=64,stride=16)"``."""
    init_state: Callable[..., PyTree] | None = None
    """(cfg, batch_size, num_slots, dtype, options) -> what one layer keeps between calls, arrays
    with the batch first; None: the decoder's cache of keys and values."""
    state_axes: Callable[..., PyTree] | None = None
    """options -> the logical axes of each array of the state, a tuple in its place; None: only
    the batch is split."""
    check: Callable[[Any, Any], None] | None = None
    """(cfg, spec of a layer): raises ValueError for a model that the variant cannot serve."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One call of attention as every implementation sees it: checked, rotated, defaults filled."""

    q: Array
    k: Array
    v: Array
    mask: Mask
    bias: Array | None
    scale: float
    soft_cap: float | None
    sinks: Array | None
    alibi_slopes: Array | None
    tap: Tap
    needs_lse: bool
    platform: str

    @property
    def num_queries(self) -> int:
        """T."""
        return self.q.shape[1]

    @property
    def num_keys(self) -> int:
        """S."""
        return self.k.shape[1]
