"""S2-attention as a row of `VARIANTS`: what a decoder trains and decodes with.

    --set model.attention="s2"                                    every layer
    --set model.attention="s2(block=64,local_blocks=16,stride=8)+dense"    every second layer dense
    --set model.attention="s2(block=512,local_blocks=2,stride=16)*3+dense"

`dense_every(n)` writes such a text: layer i is dense where (i + 1) % n == 0.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from functools import cache
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxheads.attention import s2_cache
from jaxheads.attention.api import attend
from jaxheads.attention.contract import (
    AttentionContext,
    Cost,
    HeadsOut,
    Supports,
    Variant,
    asked_beyond,
)
from jaxheads.attention.s2 import (
    KERNELS,
    S2_IMPLEMENTATIONS,
    s2_attention,
    select_s2,
    visible_tokens,
)
from jaxheads.attention.s2_parallel import mesh_plan, s2_over_mesh
from jaxheads.attention.s2_pattern import ShardPattern
from jaxheads.typing import Array, PyTree

_log = logging.getLogger(__name__)
_WHOLE = ("scores", "pattern", "attn_argmax")  # sites that need the rows of the pattern


@dataclasses.dataclass(frozen=True)
class S2Options:
    """What the parentheses after `s2` may set; the defaults are those published for Phi-3-small.

    Attributes:
      block: B, tokens in a block.
      local_blocks: L, blocks in the local window, the own one included.
      stride: V; beyond the window a head keeps every V-th block.
      head_offset: shifts all residue classes.
      num_dense_heads: the last so many kv heads see everything; dense layers ("s2*3+dense") are
        cheaper where heads are split over devices.
      homogeneous: every head keeps the same class (a control).
      allow_incomplete_union: accept heads that together miss some blocks of a long sequence.
      allow_small_blocks: accept blocks under 16 tokens.
      impl: a back end by name ("blocked", "pallas_tpu", ...); "auto" takes the model's
        `implementation`, and picks if that is "auto" too.
    """

    block: int = 64
    local_blocks: int = 16
    stride: int = 8
    head_offset: int = 0
    num_dense_heads: int = 0
    homogeneous: bool = False
    allow_incomplete_union: bool = False
    allow_small_blocks: bool = False
    impl: str = "auto"

    def __post_init__(self):
        if self.impl not in ("auto", *S2_IMPLEMENTATIONS):
            known = ", ".join(("auto", *S2_IMPLEMENTATIONS))
            raise ValueError(f"s2.impl={self.impl!r} is not one of {known}.")
        self._pattern(num_heads=max(1, self.num_dense_heads), num_kv_heads=None)

    def _pattern(self, num_heads: int, num_kv_heads: int | None) -> ShardPattern:
        return ShardPattern(
            self.block,
            self.local_blocks,
            self.stride,
            num_heads,
            num_kv_heads,
            head_offset=self.head_offset,
            num_dense_heads=self.num_dense_heads,
            homogeneous=self.homogeneous,
            allow_incomplete_union=True,
            allow_small_blocks=self.allow_small_blocks,
        )

    def pattern(self, num_heads: int, num_kv_heads: int, num_tokens: int) -> ShardPattern:
        """The pattern of a model's heads, for sequences of `num_tokens`.

        Raises:
          ValueError: the sequence is longer than the window and some blocks would be kept by no
            head (unless `homogeneous` or `allow_incomplete_union`).
        """
        pattern = self._pattern(num_heads, num_kv_heads)
        opted_in = self.allow_incomplete_union or self.homogeneous
        is_short = num_tokens <= self.local_blocks * self.block
        if opted_in or is_short:
            return pattern
        return dataclasses.replace(pattern, allow_incomplete_union=False)


def dense_every(every_n: int, s2: str = "s2") -> str:
    """A layer pattern in which layer i (from 0) is dense iff (i + 1) % every_n == 0.

    Args:
      every_n: 2 is the hybrid of Phi-3-small; 1 makes every layer dense.
      s2: the sparse layers, for example ``"s2(block=512,local_blocks=2,stride=16)"``.
    Example:
      >>> dense_every(4)
      's2*3+dense'
    """
    if every_n < 1:
        raise ValueError(f"every_n={every_n} must be at least 1 (1: every layer is dense).")
    return "dense" if every_n == 1 else f"{s2}*{every_n - 1}+dense"


def init(key: Array, cfg: Any, options: S2Options | None = None) -> None:
    """S2-attention has no parameters of its own."""


def apply(params: None, q: Array, k: Array, v: Array, ctx: AttentionContext) -> HeadsOut:
    """Rotates queries and keys, then attends over each head's blocks.

    Args:
      params: None.
      q: [B,T,H,D] unrotated queries.
      k: [B,S,K,D] keys, unrotated unless `ctx.k_is_rotated`; with `ctx.state`, of the new tokens.
      v: [B,S,K,W] values.
      ctx: see `AttentionContext`; `ctx.options` is an `S2Options`.
    Returns:
      HeadsOut with z [B,T,H,W].
    Raises:
      NotImplementedError: a back end asked for by name cannot honour the call.
    """
    options = ctx.options or S2Options()
    tap = ctx.tap
    if ctx.rotate is not None:
        q = tap("q_rot", ctx.rotate(q, ctx.q_positions))
        if not ctx.k_is_rotated:
            k = tap("k_rot", ctx.rotate(k, ctx.k_positions))
    impl = _impl(options, ctx)
    if ctx.state is not None:
        return _cached(options, q, k, v, ctx)
    pattern = options.pattern(q.shape[2], k.shape[2], k.shape[1])
    reason = _reason_general(q, k, ctx)
    if reason is None and impl != "dense":
        z, lse = _attend(impl, q, k, v, pattern, ctx)
    else:
        if impl not in ("auto", "dense"):
            raise NotImplementedError(
                f"impl={impl!r} of S2-attention cannot honour this call: {reason}; pass "
                "impl='dense' or 'auto'."
            )
        z, lse = _general(q, k, v, pattern, ctx)
    if lse is not None and tap.wants("lse"):
        lse = tap("lse", lse)
    return HeadsOut(z, lse, {})


def _impl(options: S2Options, ctx: AttentionContext) -> str:
    """The back end asked for: by the layer's options, else by the model."""
    if options.impl != "auto" or ctx.implementation == "auto":
        return options.impl
    if ctx.implementation not in S2_IMPLEMENTATIONS:
        raise NotImplementedError(
            f"implementation={ctx.implementation!r} has no S2-attention; use one of "
            f"{', '.join(S2_IMPLEMENTATIONS)}, or set s2(impl=...) beside it."
        )
    return ctx.implementation


def _attend(impl, q, k, v, pattern, ctx) -> tuple[Array, Array | None]:
    """The sparse back ends, over the mesh where one is set."""
    scale = _scale(q, ctx)
    ids = _segments(q, k, ctx)
    plan = mesh_plan(q, k, pattern)
    name = select_s2(q, k, pattern, impl, is_plain=ids is None)
    if plan is not None and plan.context is not None and name in KERNELS:
        if impl in KERNELS:
            raise NotImplementedError(
                f"impl={impl!r} takes whole sequences, and the mesh splits them over "
                f"{plan.context!r}; pass impl='blocked' or 'auto'."
            )
        name = "blocked"
    if plan is None or name in (*KERNELS, "dense"):  # kernels split heads themselves
        q_ids, k_ids = ids or (None, None)
        z, lse = s2_attention(
            q, k, v, pattern, scale=scale, segment_ids=q_ids, kv_segment_ids=k_ids, impl=name,
            return_lse=True,
        )  # fmt: skip
        return z, lse
    return s2_over_mesh(q, k, v, pattern, plan, scale=scale, segment_ids=ids)


def _reason_general(q: Array, k: Array, ctx: AttentionContext) -> str | None:
    """Why a call needs the whole mask, or None."""
    at_slots = not (ctx.mask.q_index is None and ctx.mask.k_index is None)
    others = (
        (at_slots, "queries or keys at slots of a cache"),
        (q.shape[1] != k.shape[1], "T != S"),
        (any(ctx.tap.wants(site) for site in _WHOLE), f"one of {', '.join(_WHOLE)}"),
    )
    return asked_beyond(ctx, others)


def _general(q, k, v, pattern, ctx) -> tuple[Array, Array | None]:
    """Dense attention under the pattern's mask: everything that it supports, in O(T S) memory."""
    mask = ctx.mask
    batched = lambda index, length: (
        jnp.arange(length)[None] if index is None else jnp.atleast_2d(index)
    )
    q_index, k_index = batched(mask.q_index, q.shape[1]), batched(mask.k_index, k.shape[1])
    rows = max(len(q_index), len(k_index))
    spread = lambda x: jnp.broadcast_to(x, (rows, x.shape[-1]))
    visible = jax.vmap(lambda i, j: visible_tokens(pattern, i, j))(spread(q_index), spread(k_index))
    if mask.head_mask is not None:
        visible = visible & mask.head_mask
    mask = dataclasses.replace(mask, head_mask=visible)
    ctx = dataclasses.replace(ctx, mask=mask, implementation="dense")
    _log_general(k.shape[1])
    return attend(q, k, v, ctx, needs_lse=ctx.tap.wants("lse"))


@cache
def _log_general(num_keys: int) -> None:
    if num_keys > 4096:
        _log.warning(
            "S2-attention: this call takes the dense path with a mask over %d keys.", num_keys
        )


def _scale(q: Array, ctx: AttentionContext) -> float:
    return 1 / math.sqrt(q.shape[-1]) if ctx.scale is None else ctx.scale


def _segments(q: Array, k: Array, ctx: AttentionContext) -> tuple[Array, Array] | None:
    """Segment ids of queries and keys; a key mask makes ids where there are none."""
    mask = ctx.mask
    if mask.q_segment_ids is None and mask.key_mask is None:
        return None
    ones = jnp.ones(q.shape[:2], jnp.int32)
    q_ids = ones if mask.q_segment_ids is None else mask.q_segment_ids
    k_ids = q_ids if mask.k_segment_ids is None else mask.k_segment_ids
    if mask.key_mask is not None:
        k_ids = jnp.where(mask.key_mask, k_ids, 0)
    return q_ids, k_ids


def _cached(options: S2Options, q: Array, k: Array, v: Array, ctx: AttentionContext) -> HeadsOut:
    """New tokens over the compact cache, and the cache with them."""
    wants_pattern = any(ctx.tap.wants(site) for site in _WHOLE)
    reason = asked_beyond(ctx, ((wants_pattern, "an edit or a record of the pattern"),))
    if reason is not None:
        raise NotImplementedError(
            f"the compact cache of S2-attention cannot honour {reason}; run without a cache."
        )
    state, length = cast(s2_cache.Slots, ctx.state), cast(Array, ctx.slots)[0]
    ids = ctx.mask.q_segment_ids
    if ids is None:
        ids = jnp.ones(q.shape[:2], jnp.int32)
    pattern = options._pattern(q.shape[2], k.shape[2])
    scale = _scale(q, ctx)
    if q.shape[1] == 1:
        state = s2_cache.append(state, length, k, v, ids, pattern)
        z, lse = s2_cache.decode(q, state, length + 1, ids, pattern, scale)
    else:
        z, lse, state = s2_cache.extend(q, k, v, state, length, ids, pattern, scale)
    if ctx.tap.wants("lse"):
        lse = ctx.tap("lse", lse)
    return HeadsOut(z, lse, {}, state)


def init_state(
    cfg: Any, batch_size: int, num_slots: int, dtype: Any, options: S2Options | None = None
) -> PyTree:
    """The compact cache of one layer for `num_slots` tokens."""
    options = options or S2Options()
    pattern = options.pattern(cfg.num_heads, cfg.num_kv_heads, num_slots)
    return s2_cache.init_slots(pattern, batch_size, num_slots, cfg.head_dim, dtype)


def cost(
    cfg: Any,
    num_queries: int,
    num_keys: int,
    *,
    is_causal: bool = True,
    itemsize: int = 2,
    options: S2Options | None = None,
) -> Cost:
    """Visited tiles of 4 B^2 D operations each; for single queries, the slots of the cache.

    Args:
      cfg: has num_heads, num_kv_heads and head_dim.
      num_queries: T.
      num_keys: S.
      is_causal: not read; the pattern is causal.
      itemsize: bytes of an activation.
      options: an `S2Options`.
    """
    options = options or S2Options()
    pattern = options._pattern(cfg.num_heads, cfg.num_kv_heads)
    n, block = pattern.num_blocks(num_keys), pattern.block
    slots = [min(int(held), n * block) for held in pattern.cache_slots(num_keys)]
    if num_queries == num_keys:
        pairs = float(pattern.tiles(n).sum()) * block**2
    else:
        pairs = float(num_queries * sum(slots) * pattern.group_size)
    held = 2.0 * sum(slots) * cfg.head_dim * itemsize
    read = 2.0 * num_keys * cfg.num_kv_heads * cfg.head_dim * itemsize
    queries_and_outputs = 2.0 * num_queries * cfg.num_heads * cfg.head_dim * itemsize
    is_decode = num_queries != num_keys
    return Cost(
        flops=4.0 * pairs * cfg.head_dim,
        bytes=queries_and_outputs + (held if is_decode else read),
        kv_cache_bytes=held,
    )


S2 = Variant(
    name="s2",
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
        head_mask=True,
        taps=frozenset({"q_rot", "k_rot", "scores", "pattern", "lse", "attn_argmax"}),
        implementations=S2_IMPLEMENTATIONS,
        mesh_axes=frozenset({"data", "fsdp", "model", "context"}),
    ),
    options=S2Options,
    init_state=init_state,
    state_axes=lambda options: s2_cache.slot_axes(),
)
