"""Landmark attention as a row of `VARIANTS`: trained on short texts, it reads long ones.

    --set model.attention="landmark(block=50)" --set data.landmark_block=50

Every token of a row of which l go before, counted in periods of l + 1 and without padding, is taken
for a landmark: texts must have them in (`insert_landmarks`, or the data pipeline). Without a cache
this is `landmark_attention` over the whole row, exact and as expensive as full attention; with one,
tokens go in chunks and read the `top_k` best blocks of the past (`landmark_cache`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxheads.attention import landmark_cache, softmax
from jaxheads.attention.contract import (
    AttentionContext,
    Cost,
    HeadsOut,
    Supports,
    Variant,
    asked_beyond,
)
from jaxheads.attention.landmark import IMPLS, dense_landmarks, group_heads
from jaxheads.attention.landmark_blocks import Regular, block_attention
from jaxheads.attention.landmark_tokens import check_block_size
from jaxheads.attention.longheads_cache import check_rotate, reorder, to_front
from jaxheads.fields import unknown
from jaxheads.typing import Array, PyTree


@dataclasses.dataclass(frozen=True)
class LandmarkOptions:
    """What parentheses after `landmark` may set.

    Attributes:
      block: l, text tokens before each landmark.
      token: the id of the landmark; None: the last one of the vocabulary. Attention goes by places;
        data, sampling and evaluation need the id.
      top_k: blocks that are read with a cache.
      policy: who shares them: "per_token_and_head", "max_over_heads" or "max_over_tokens".
      chunk: tokens that go into the cache at once, landmarks counted; None: five blocks.
      blocks: blocks that the cache holds; None: all that the cache's slots amount to.
      offload: keep the blocks of the cache in host memory; with "max_over_tokens" alone.
      at_random: read blocks at random rather than by score (a control).
      impl: "fused" or "dense", without a cache.
      force: accept positions beyond those that the model was trained on.
    """

    block: int = 50
    token: int | None = None
    top_k: int = 4
    policy: str = "per_token_and_head"
    chunk: int | None = None
    blocks: int | None = None
    offload: bool = False
    at_random: bool = False
    impl: str = "fused"
    force: bool = False

    def __post_init__(self):
        check_block_size(self.block)
        for name in ("top_k", "chunk", "blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"landmark: {name}={value} must be at least 1.")
        for name, known in (("policy", landmark_cache.POLICIES), ("impl", IMPLS)):
            if getattr(self, name) not in known:
                raise ValueError(f"landmark: {unknown(name, getattr(self, name), known)}")
        if self.offload:
            landmark_cache.check_offload(self.policy)

    @property
    def period(self) -> int:
        """l + 1, a block and its landmark."""
        return self.block + 1

    @property
    def chunk_size(self) -> int:
        """Tokens that go into the cache at once."""
        return 5 * self.period if self.chunk is None else self.chunk

    @property
    def num_positions(self) -> int:
        """Positions that a cached call may use."""
        return (self.top_k + 1) * self.period + self.block + self.chunk_size


class Landmarks(NamedTuple):
    """The landmarks of a model's texts."""

    block_size: int
    token: int


def landmarks_of(cfg: Any) -> Landmarks | None:
    """Which landmarks a decoder's texts need; None: none.

    Raises:
      ValueError: layers that want different ones.
    """
    options = [spec.options or LandmarkOptions() for spec in cfg.pattern
               if spec.attention == "landmark"]  # fmt: skip
    wanted = {(o.block, cfg.vocab_size - 1 if o.token is None else o.token) for o in options}
    if len(wanted) > 1:
        raise ValueError(
            f"attention={cfg.attention!r} has layers with different landmarks, (block, token) = "
            f"{sorted(wanted)}; a text has them in one way."
        )
    return Landmarks(*wanted.pop()) if wanted else None


def init(key: Array, cfg: Any, options: LandmarkOptions | None = None) -> None:
    """Landmark attention has no parameters of its own but a row of the embedding."""


def apply(params: None, q: Array, k: Array, v: Array, ctx: AttentionContext) -> HeadsOut:
    """Attends to everything through a grouped softmax or, with a cache, to retrieved blocks.

    Args:
      params: None.
      q: [B,T,H,D] unrotated queries.
      k: [B,S,K,D] unrotated keys; with `ctx.state`, of the new tokens.
      v: [B,S,K,D] values.
      ctx: see `AttentionContext`; `ctx.options` is a `LandmarkOptions`.
    Returns:
      HeadsOut with z [B,T,H,D]. With a cache a row that holds several documents is NaN.
    Raises:
      NotImplementedError: masks other than segments and padding, biases, sinks or soft caps.
    """
    options = ctx.options or LandmarkOptions()
    _check_plain(ctx)
    scale = 1 / math.sqrt(q.shape[-1]) if ctx.scale is None else ctx.scale
    q_ids, k_ids = _documents(q, k, ctx)
    if ctx.state is None:
        q, k = softmax.rotate_heads(q, k, ctx)
        return HeadsOut(_whole(q, k, v, q_ids, k_ids, ctx, options, scale), None, {})
    check_rotate(ctx.rotate, q.shape[-1])
    valid = key = None
    if k_ids is not None:
        valid = k_ids != 0
    if options.at_random and ctx.layer is not None:
        key = jax.random.fold_in(jax.random.key(0), ctx.layer)
    z, state = landmark_cache.extend(
        cast(landmark_cache.LandmarkCache, ctx.state), q, k, v, cast(Any, ctx.rotate),
        top_k=options.top_k, policy=options.policy, chunk=options.chunk_size, scale=scale,
        valid=valid, key=key,
    )  # fmt: skip
    if k_ids is not None and valid is not None:
        is_one = (~valid | (k_ids == k_ids.max(axis=1, keepdims=True))).all(axis=1)
        z = jnp.where(is_one[:, None, None, None], z, jnp.nan)
    return HeadsOut(z, None, {}, state)


def _whole(q, k, v, q_ids, k_ids, ctx: AttentionContext, options: LandmarkOptions, scale) -> Array:
    """Every query over all keys, rotated."""
    impl = options.impl if ctx.implementation == "auto" else ctx.implementation
    length, period = k.shape[1], options.period
    if impl == "fused" and ctx.mask.q_index is None and q.shape[1] == length:
        back = None
        if k_ids is not None:  # padding first would shift the blocks
            order, back = to_front(k_ids != 0)
            q, k, v = (reorder(x, order) for x in (q, k, v))
            ids = jnp.take_along_axis(k_ids, order, axis=1)
            q_ids, k_ids = ids, jnp.pad(ids, ((0, 0), (0, -length % period)))
        more = ((0, 0), (0, -length % period), (0, 0), (0, 0))
        k, v = jnp.pad(k, more), jnp.pad(v, more)  # later than every query
        regular = Regular(options.block, scale, 0)
        y: Any = block_attention(group_heads(q, k.shape[2]), k, v, q_ids, k_ids, regular)
        y = y.reshape(*q.shape[:3], -1).astype(q.dtype)
        return y if back is None else reorder(y, back)
    place = jnp.broadcast_to(jnp.arange(length), k.shape[:2])
    if k_ids is not None:
        place = jnp.cumsum(k_ids != 0, axis=1) - 1
    index = jnp.arange(q.shape[1]) if ctx.mask.q_index is None else ctx.mask.q_index
    is_landmark = place % period == options.block
    return dense_landmarks(q, k, v, is_landmark, index, q_ids, k_ids, scale)[0]


def _check_plain(ctx: AttentionContext) -> None:
    known = ("auto", *IMPLS)
    others = (
        (ctx.implementation not in known, f"implementation={ctx.implementation!r}"),
        (ctx.mask.k_index is not None, "keys at slots of a cache that is not its own"),
        (ctx.k_is_rotated, "rotated keys"),
    )
    reason = asked_beyond(ctx, others)
    if reason is not None:
        raise NotImplementedError(
            f"attention 'landmark' cannot honour {reason}; use attention='dense', or leave it out."
        )


def _documents(q: Array, k: Array, ctx: AttentionContext) -> tuple[Array | None, Array | None]:
    """Documents [B,T] of the queries and [B,S] of the keys, 0 for padding; None: all one."""
    mask = ctx.mask
    q_ids = mask.q_segment_ids
    is_new = ctx.state is not None  # then keys are those of the queries, whatever the cache holds
    k_ids = q_ids if mask.k_segment_ids is None or is_new else mask.k_segment_ids
    if mask.key_mask is not None:
        k_ids = jnp.ones(k.shape[:2], jnp.int32) if k_ids is None else k_ids
        q_ids = jnp.ones(q.shape[:2], jnp.int32) if q_ids is None else q_ids
        k_ids = jnp.where(mask.key_mask, k_ids, 0)
    return q_ids, k_ids


def init_state(
    cfg: Any, batch_size: int, num_slots: int, dtype: Any, options: LandmarkOptions | None = None
) -> PyTree:
    """The cache of one layer for `num_slots` tokens, or for the last `options.blocks` blocks."""
    options = options or LandmarkOptions()
    num_blocks = max(1, -(-num_slots // options.period))
    if options.blocks is not None:
        num_blocks = min(num_blocks, options.blocks)
    return landmark_cache.init(
        batch_size, num_blocks, cfg.num_kv_heads, cfg.head_dim, block_size=options.block,
        dtype=dtype, offload=options.offload,
    )  # fmt: skip


def state_axes(options: LandmarkOptions | None) -> Any:
    """The logical axes of `init_state`."""
    is_far = options is not None and options.offload
    return landmark_cache.OFFLOADED_AXES if is_far else landmark_cache.CACHE_AXES


def check(cfg: Any, spec: Any) -> None:
    """Raise for a model whose positions cannot be given anew, or whose landmark is no token."""
    options = spec.options or LandmarkOptions()
    if cfg.positions != "rope":
        raise ValueError(
            f"attention 'landmark' gives keys new positions, which positions={cfg.positions!r} do "
            "not allow; it needs a model with rotary positions (RoPE)."
        )
    if spec.window is not None:
        raise ValueError(
            f"attention 'landmark' reads blocks of the whole text, and the layer has a sliding "
            f"window of {spec.window} tokens; give that layer attention 'dense'."
        )
    wanted = landmarks_of(cfg)
    if wanted is not None and not 0 <= wanted.token < cfg.vocab_size:
        raise ValueError(
            f"landmark: token={wanted.token} is outside the vocabulary of {cfg.vocab_size}; add a "
            "row for the landmark with model.vocab_size."
        )
    if options.num_positions > cfg.max_positions and not options.force:
        raise ValueError(
            f"landmark: top_k={options.top_k} blocks of {options.block} and chunks of "
            f"{options.chunk_size} tokens reach position {options.num_positions - 1}, beyond the "
            f"{cfg.max_positions} positions that the model was trained on (max_positions); take a "
            "smaller chunk or top_k, or force=true."
        )


def cost(
    cfg: Any,
    num_queries: int,
    num_keys: int,
    *,
    is_causal: bool = True,
    itemsize: int = 2,
    options: LandmarkOptions | None = None,
) -> Cost:
    """Full attention for a whole text; 2 D operations for each landmark and 4 D for each key read
    for queries with a cache.

    Args:
      cfg: has num_heads, num_kv_heads and head_dim.
      num_queries: T.
      num_keys: S.
      is_causal: of a whole text.
      itemsize: bytes of an activation.
      options: a `LandmarkOptions`.
    """
    options = options or LandmarkOptions()
    whole = softmax.cost(cfg, num_queries, num_keys, is_causal=is_causal, itemsize=itemsize)
    if num_queries == num_keys:
        return whole
    num_blocks = num_keys / options.period
    seen = min(options.top_k, num_blocks) * options.period + options.block
    per_head = cfg.head_dim * num_queries * cfg.num_heads
    row = 2.0 * cfg.head_dim * itemsize
    landmarks = num_blocks * cfg.num_kv_heads * row / 2
    return Cost(
        flops=per_head * (2.0 * num_blocks + 4.0 * min(seen, num_keys)),
        bytes=num_queries * cfg.num_heads * (1 + seen) * row + landmarks,
        kv_cache_bytes=whole.kv_cache_bytes,
    )


LANDMARK = Variant(
    name="landmark",
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
        taps=frozenset({"q_rot", "k_rot"}),
        implementations=IMPLS,
        mesh_axes=frozenset({"data", "fsdp", "model"}),
    ),
    options=LandmarkOptions,
    init_state=init_state,
    state_axes=state_axes,
    check=check,
)
