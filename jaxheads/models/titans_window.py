"""Sliding-window attention after a prefix of persistent tokens, with a ring buffer for decoding.

Softmax attention over parts of the keys is exact when the parts are merged by their log-sum-exp:
the window goes through the library's implementations, which skip what it hides; the few keys of
the prefix and of the ring are their own parts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxheads import attention
from jaxheads.attention.masks import FLOOR
from jaxheads.models.configs import ModelConfig
from jaxheads.models.titans_modules import HEADS, KV_HEADS, WindowAttention, from_heads, to_heads
from jaxheads.parallel import constrain
from jaxheads.taps import Tap
from jaxheads.typing import Array


class Ring(NamedTuple):
    """The newest w-1 keys and values (at least one); the token of slot s lies at s modulo w-1."""

    k: Array  # [B,R,K,D], rotated
    v: Array
    ids: Array  # [B,R] int32, 0 where nothing is written


class Prefix(NamedTuple):
    """Keys and values before every document."""

    k: Array  # [B|1,N_p,K,D], unrotated
    v: Array


class Part(NamedTuple):
    """Attention over some of the keys."""

    z: Array  # [B,T,H,D]
    lse: Array  # [B,H,T] float32


def init_ring(cfg: ModelConfig, batch_size: int, window: int, dtype: Any) -> Ring:
    """An empty ring."""
    size = max(window - 1, 1)
    empty = jnp.zeros((batch_size, size, cfg.num_kv_heads, cfg.head_dim), dtype)
    return Ring(empty, empty, jnp.zeros((batch_size, size), jnp.int32))


def prefix_of(weights: WindowAttention, tokens: Array) -> Prefix:
    """Keys and values of persistent tokens [B,N_p,M]."""
    return Prefix(to_heads(tokens, weights.wk, KV_HEADS), to_heads(tokens, weights.wv, KV_HEADS))


def merge(parts: list[Part]) -> Array:
    """Attention over all keys from attention over disjoint parts of them."""
    lse = jnp.stack([p.lse for p in parts])  # [N,B,H,T]
    lse = jnp.maximum(lse, FLOOR)
    share = jnp.exp(lse - jax.lax.stop_gradient(jnp.max(lse, axis=0)))
    share = share / jnp.sum(share, axis=0)
    z = jnp.stack([p.z for p in parts]).astype(jnp.promote_types(parts[0].z.dtype, jnp.float32))
    return jnp.einsum("nbht,nbthd->bthd", share, z).astype(parts[0].z.dtype)


def attend_part(cfg: ModelConfig, q: Array, k: Array, v: Array, mask: attention.Mask) -> Part:
    """Attention over one part, with its log-sum-exp."""
    ctx = attention.AttentionContext(mask=mask, scale=cfg.score_scale)
    z, lse = attention.attend(q, k, v, ctx, needs_lse=True)
    assert lse is not None  # asked for
    return Part(z, lse)


def window_attention(
    weights: WindowAttention,
    x: Array,
    *,
    cfg: ModelConfig,
    window: int,
    rotate,
    positions: Array,
    segment_ids: Array | None,
    index: Array,
    prefix: Prefix | None,
    prefix_in_window: bool,
    ring: Ring | None,
    slots: Array | None,
    tap: Tap,
) -> tuple[Array, Ring | None]:
    """Causal sliding-window attention [B,T,M] -> [B,T,M], and the ring after it.

    Args:
      rotate: (x, positions) -> x, or None.
      segment_ids: [B,T] or None; attention never crosses documents.
      index: [T] or [B,T] place of each token in its document: how far the prefix lies back.
      prefix_in_window: the prefix is subject to the window too (memory as layer); otherwise every
        token sees all of it (memory as gate).
      ring, slots: what is kept between calls, and the cache slots [T] of the tokens.
    """
    q = tap("q", to_heads(x, weights.wq))
    k = tap("k", to_heads(x, weights.wk, KV_HEADS))
    v = tap("v", to_heads(x, weights.wv, KV_HEADS))
    if rotate is not None:
        q, k = rotate(q, positions), rotate(k, positions)
    own = attention.Mask(is_causal=True, window=window, q_segment_ids=segment_ids)
    parts = [attend_part(cfg, q, k, v, own)]
    if ring is not None:
        assert slots is not None and segment_ids is not None
        parts.append(_ring_part(cfg, q, ring, slots, segment_ids, window))
        ring = _write(ring, k, v, segment_ids, slots)
    if prefix is not None:
        visible = None
        if prefix_in_window:
            num = prefix.k.shape[1]
            back = index[..., None] + num - jnp.arange(num)  # [T,N_p] or [B,T,N_p]
            visible = back < window
            visible = visible[None, None] if visible.ndim == 2 else visible[:, None]
        widen = lambda a: jnp.broadcast_to(a, (x.shape[0], *a.shape[1:])).astype(x.dtype)
        mask = attention.Mask(head_mask=visible)
        parts.append(attend_part(cfg, q, widen(prefix.k), widen(prefix.v), mask))
    z = parts[0].z if len(parts) == 1 else merge(parts)
    return from_heads(tap("z", constrain(z, HEADS)), weights.wo), ring


def _ring_part(
    cfg: ModelConfig, q: Array, ring: Ring, slots: Array, segment_ids: Array, window: int
) -> Part:
    """The keys of earlier calls: only the first tokens of a call can see any."""
    size = ring.ids.shape[1]
    num = min(q.shape[1], size)
    first = slots[0]
    held = first - 1 - (first - 1 - jnp.arange(size)) % size  # [R] slot of each entry
    near = slots[:num, None] - held[None, :] < window
    same = segment_ids[:, :num, None] == ring.ids[:, None, :]
    visible = near[None] & same & (ring.ids != 0)[:, None, :]
    mask = attention.Mask(head_mask=visible[:, None])
    part = attend_part(cfg, q[:, :num], ring.k.astype(q.dtype), ring.v.astype(q.dtype), mask)
    rest = q.shape[1] - num
    return Part(
        jnp.pad(part.z, ((0, 0), (0, rest), (0, 0), (0, 0))),
        jnp.pad(part.lse, ((0, 0), (0, 0), (0, rest)), constant_values=FLOOR),
    )


def _write(ring: Ring, k: Array, v: Array, ids: Array, slots: Array) -> Ring:
    size = ring.ids.shape[1]
    newest = slice(max(0, k.shape[1] - size), None)
    at = slots[newest] % size
    put = lambda old, new: old.at[:, at].set(new[:, newest].astype(old.dtype))
    return Ring(put(ring.k, k), put(ring.v, v), put(ring.ids, ids))
