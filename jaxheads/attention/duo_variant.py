"""DuoAttention as a row of `VARIANTS`: what a decoder runs and decodes with.

    --set model.attention="duo(sink=64,recent=256)"                      every head streams
    --set model.attention="duo(heads=0110)+duo(heads=1000)+dense"        by layer; 1 = retrieval

`duo_layers(pattern)` writes such a text for a pattern [L,K]. Layers that differ form a repeating
block, so a pattern of its own in every layer unrolls the stack.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from jaxheads.attention import duo_cache
from jaxheads.attention.api import DENSE_SCORES, attend
from jaxheads.attention.contract import (
    AttentionContext,
    Cost,
    HeadsOut,
    Supports,
    Variant,
    asked_beyond,
)
from jaxheads.attention.duo_cache import (
    FIRST_CHUNKS,
    DuoCache,
    KeysValues,
    heads_of,
    pick,
    split_heads,
)
from jaxheads.attention.duo_streaming import as_pattern, check_sizes, stream, streaming_mask
from jaxheads.attention.softmax import rotate_heads
from jaxheads.typing import Array, ArrayLike, PyTree

_WHOLE = ("scores", "pattern", "attn_argmax")  # sites that need the rows of the pattern


@dataclasses.dataclass(frozen=True)
class DuoOptions:
    """What the parentheses after `duo` may set; sizes are those the paper deploys.

    Attributes:
      heads: one digit a kv head, 1 for retrieval, such as 0110; or "all", or "none".
      sink: first tokens that streaming heads see.
      recent: last tokens that they see, the token itself included.
      first_chunk: see `duo_attention_step`; without a cache streaming heads always stream.
    """

    heads: str = "none"
    sink: int = 64
    recent: int = 256
    first_chunk: str = "full"

    def __post_init__(self):
        check_sizes(self.sink, self.recent)
        if self.heads not in ("all", "none") and not set("01") >= set(self.heads) > set():
            raise ValueError(f"duo.heads={self.heads!r} must be digits 0 and 1, 'all' or 'none'.")
        if self.first_chunk not in FIRST_CHUNKS:
            known = " or ".join(FIRST_CHUNKS)
            raise ValueError(f"duo.first_chunk={self.first_chunk!r} must be {known}.")

    def pattern(self, num_kv_heads: int) -> np.ndarray:
        """[K] bool, True for the retrieval heads.

        Raises:
          ValueError: written for another number of heads.
        """
        if self.heads in ("all", "none"):
            return np.full(num_kv_heads, self.heads == "all")
        if len(self.heads) != num_kv_heads:
            raise ValueError(
                f"duo.heads={self.heads!r} names {len(self.heads)} kv heads, and the model has "
                f"{num_kv_heads}: the pattern is of another model."
            )
        return np.array([digit == "1" for digit in self.heads])


def duo_layers(
    pattern: ArrayLike, *, sink: int = 64, recent: int = 256, first_chunk: str = "full"
) -> str:
    """The text that gives each layer its row of a pattern.

    Args:
      pattern: [L,K] bool, True for the retrieval heads (`discovery.sparsify`).
      sink, recent, first_chunk: see `DuoOptions`.
    Example:
      >>> duo_layers([[1, 0], [1, 0], [0, 0]], sink=4, recent=8)
      'duo(heads=10,sink=4,recent=8)*2+duo(heads=00,sink=4,recent=8)'
    """
    rows = np.asarray(pattern)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"pattern has shape {rows.shape}, needed [L,K]: a row for every layer.")
    rest = f"sink={sink},recent={recent}"
    rest += "" if first_chunk == "full" else f",first_chunk={first_chunk}"
    layers = []
    for row in rows:
        digits = "".join("01"[int(kept)] for kept in as_pattern(row, rows.shape[1]))
        DuoOptions(digits, sink, recent, first_chunk)
        layers.append(f"duo(heads={digits},{rest})")
    runs = [(text, len(list(run))) for text, run in itertools.groupby(layers)]
    return "+".join(text if count == 1 else f"{text}*{count}" for text, count in runs)


def init(key: Array, cfg: Any, options: DuoOptions | None = None) -> None:
    """DuoAttention has no parameters of its own."""


def apply(params: None, q: Array, k: Array, v: Array, ctx: AttentionContext) -> HeadsOut:
    """Rotates queries and keys, then attends: retrieval heads to all, the others under the mask.

    With segment ids or a mask of keys the first tokens are those of the lowest positions, otherwise
    those of the first slots.

    Args:
      params: None.
      q: [B,T,H,D] unrotated queries.
      k: [B,S,K,D] keys, unrotated unless `ctx.k_is_rotated`; with `ctx.state`, of the new tokens.
      v: [B,S,K,W] values.
      ctx: see `AttentionContext`; `ctx.options` is a `DuoOptions`.
    Returns:
      HeadsOut with z [B,T,H,W].
    """
    options = ctx.options or DuoOptions()
    q, k = rotate_heads(q, k, ctx)
    retrieves = options.pattern(k.shape[2])
    if ctx.state is not None:
        return _cached(options, q, k, v, ctx)
    is_long = q.shape[1] * k.shape[1] > DENSE_SCORES
    wants_blocks = ctx.implementation == "blocked" or (ctx.implementation == "auto" and is_long)
    if wants_blocks and _is_plain(q, k, ctx):
        return HeadsOut(_by_kind(retrieves, q, k, v, options, ctx), None, {})
    q_at, k_at = _places(q, k, ctx)
    seen = streaming_mask(q_at, k_at, options.sink, options.recent)
    seen = (seen if seen.ndim == 3 else seen[None])[:, None]  # [1|B,1,T,S]
    whole = np.repeat(retrieves, q.shape[2] // k.shape[2])[:, None, None]
    seen = seen | jnp.asarray(whole)
    if ctx.mask.head_mask is not None:
        seen = seen & ctx.mask.head_mask
    ctx = dataclasses.replace(ctx, mask=dataclasses.replace(ctx.mask, head_mask=seen))
    z, lse = attend(q, k, v, ctx, needs_lse=ctx.tap.wants("lse"))
    if lse is not None and ctx.tap.wants("lse"):
        lse = ctx.tap("lse", lse)
    return HeadsOut(z, lse, {})


def _places(q: Array, k: Array, ctx: AttentionContext) -> tuple[Array, Array]:
    """Where queries [...,T] and keys [...,S] stand in their text."""
    mask = ctx.mask
    is_packed = mask.q_segment_ids is not None or mask.key_mask is not None
    if is_packed and ctx.q_positions is not None and ctx.k_positions is not None:
        return ctx.q_positions, ctx.k_positions
    or_slots = lambda index, n: jnp.arange(n, dtype=jnp.int32) if index is None else index
    return or_slots(mask.q_index, q.shape[1]), or_slots(mask.k_index, k.shape[1])


def _is_plain(q: Array, k: Array, ctx: AttentionContext) -> bool:
    """Whether heads of the two kinds may be computed apart, without a mask [T,S]."""
    mask = ctx.mask
    marks = (mask.q_segment_ids, mask.key_mask, mask.q_index, mask.k_index)
    wanted = any(ctx.tap.wants(site) for site in (*_WHOLE, "lse"))
    is_whole = all(mark is None for mark in marks) and q.shape[1] == k.shape[1]
    return is_whole and not wanted and asked_beyond(ctx) is None


def _by_kind(retrieves, q, k, v, options: DuoOptions, ctx: AttentionContext) -> Array:
    query, kv = split_heads(retrieves, q.shape[2])
    parts = []
    if len(kv[0]):
        parts.append(attend(*heads_of(q, k, v, query[0], kv[0]), ctx)[0])
    if len(kv[1]):
        streaming = heads_of(q, k, v, query[1], kv[1])
        sizes = (options.sink, options.recent)
        parts.append(stream(*streaming, None, *sizes, "blocked", ctx.scale))
    return pick(jnp.concatenate(parts, axis=2), np.argsort(np.concatenate(query)))


def _cached(options: DuoOptions, q: Array, k: Array, v: Array, ctx: AttentionContext) -> HeadsOut:
    """New tokens over the two caches."""
    wants_pattern = any(ctx.tap.wants(site) for site in (*_WHOLE, "lse"))
    reason = asked_beyond(ctx, ((wants_pattern, "an edit or a record of the pattern"),))
    if reason is not None:
        raise NotImplementedError(
            f"the caches of DuoAttention cannot honour {reason}; run without a cache, or with "
            "interventions.stream_heads, which only masks."
        )
    z, state = duo_cache.duo_attention_step(
        q,
        k,
        v,
        cast(DuoCache, ctx.state),
        pattern=options.pattern(k.shape[2]),
        first_chunk=options.first_chunk,
        scale=ctx.scale,
        segment_ids=ctx.mask.q_segment_ids,
    )
    return HeadsOut(z, None, {}, state)


def init_state(
    cfg: Any, batch_size: int, num_slots: int, dtype: Any, options: DuoOptions | None = None
) -> PyTree:
    """The two caches of one layer for `num_slots` tokens."""
    options = options or DuoOptions()
    return duo_cache.init_cache(
        batch_size,
        num_slots,
        options.pattern(cfg.num_kv_heads),
        head_dim=cfg.head_dim,
        sink=options.sink,
        recent=options.recent,
        dtype=dtype,
    )


def state_axes(options: DuoOptions | None = None) -> PyTree:
    """The logical axes of every array of `DuoCache`: heads stay whole, as their number differs from
    layer to layer; the full cache is split over its tokens."""
    options = options or DuoOptions()
    full, streaming = (("batch", length, None, None) for length in ("length", None))
    pairs: Any = (KeysValues(*[full] * 2), KeysValues(*[streaming] * 2))  # type: ignore[arg-type]
    rest: Any = (("batch",), ("batch", None), ())
    return DuoCache(*pairs, *rest, sink=options.sink, recent=options.recent)


def cost(
    cfg: Any,
    num_queries: int,
    num_keys: int,
    *,
    is_causal: bool = True,
    itemsize: int = 2,
    options: DuoOptions | None = None,
) -> Cost:
    """4 D operations for each visible pair; the two caches.

    Args:
      cfg: has num_heads, num_kv_heads and head_dim.
      num_queries: T.
      num_keys: S.
      is_causal: not read; streaming heads are causal.
      itemsize: bytes of an activation.
      options: a `DuoOptions`.
    """
    options = options or DuoOptions()
    num_full = int(options.pattern(cfg.num_kv_heads).sum())
    num_streaming = cfg.num_kv_heads - num_full
    group, size = cfg.num_heads // cfg.num_kv_heads, options.sink + options.recent
    seen = np.arange(num_keys - num_queries + 1, num_keys + 1)  # keys up to each query
    pairs = num_full * seen.sum() + num_streaming * np.minimum(seen, size).sum()
    slots = num_full * num_keys + num_streaming * size
    read = slots if num_queries != num_keys else cfg.num_kv_heads * num_keys
    row = 2.0 * cfg.head_dim * itemsize
    return Cost(
        flops=4.0 * float(pairs) * group * cfg.head_dim,
        bytes=row * (num_queries * cfg.num_heads + read),
        kv_cache_bytes=row * slots,
    )


DUO = Variant(
    name="duo",
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
        implementations=("dense", "blocked"),
        mesh_axes=frozenset({"data", "fsdp", "model", "context"}),
    ),
    options=DuoOptions,
    init_state=init_state,
    state_axes=state_axes,
)
