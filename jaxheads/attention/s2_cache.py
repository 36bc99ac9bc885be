"""The compact cache of S2-attention: a ring of the last L blocks and a store of kept blocks.

A sparse head needs its window and the blocks of its own class; a block that leaves the window is
copied to the store if it is of the class, and overwritten otherwise. Slots per head at N blocks:

    L B + B ceil(max(0, N - L - r) / V)        instead of N B

Keys are held rotated at their own positions. Token u lies in slot u mod (L B) of the ring; block
r + m V lies at place m of the store. Dense heads keep every token.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.attention.blocked import blocked_attention
from jaxheads.attention.dense import TINY
from jaxheads.attention.masks import FLOOR, Mask, penalty
from jaxheads.attention.s2_blocked import NO_BLOCK, Keys, attend_shards
from jaxheads.attention.s2_blocks import kept_blocks, take_blocks
from jaxheads.attention.s2_pattern import ShardPattern
from jaxheads.typing import Array, PyTree, is_traced


class Held(NamedTuple):
    """Keys [B,K,S,D], values [B,K,S,W] and segment ids [B,S] or [B,K,S] of some slots."""

    k: Array
    v: Array
    segments: Array


class Slots(NamedTuple):
    """What one layer keeps between calls; the batch is the first axis of every array."""

    ring: Held
    """[B,K,L*block,...] of the sparse heads; segments [B,L*block]."""
    store: Held
    """[B,K,M*block,...] kept blocks of the sparse heads; segments [B,K,M*block]."""
    full: Held
    """[B,K,max_len,...] of the dense heads; segments [B,max_len]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class S2Cache:
    """A layer's keys and values for decoding, with their number.

    Attributes:
      slots: the arrays.
      length: int32 scalar, tokens appended so far.
      pattern: which blocks each head keeps.
      max_len: tokens the cache was made for.
    """

    slots: Slots
    length: Array
    pattern: ShardPattern = dataclasses.field(metadata={"static": True})
    max_len: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def init(
        cls,
        pattern: ShardPattern,
        batch_size: int,
        max_len: int,
        head_dim: int,
        dtype=jnp.float32,
    ) -> S2Cache:
        """An empty cache for `max_len` tokens.

        Raises:
          ValueError: a pattern that comes back to dropped blocks.
        """
        slots = init_slots(pattern, batch_size, max_len, head_dim, dtype)
        return cls(slots, jnp.int32(0), pattern, max_len)

    def append(self, k: Array, v: Array, segment_ids: Array | None = None) -> S2Cache:
        """The cache with T more tokens: k [B,T,K,D] rotated, v [B,T,K,W], segment ids [B,T].

        Without ids all tokens are of segment 1; 0 marks padding, which nobody sees.
        Raises:
          ValueError: more tokens than the cache was made for (where the length is known).
        """
        length = self.length
        if not is_traced(length) and int(length) + k.shape[1] > self.max_len:
            raise ValueError(
                f"the cache was made for {self.max_len} tokens and holds {int(length)}: no room "
                f"for {k.shape[1]} more; make it longer with S2Cache.init."
            )
        if k.shape[2] != self.pattern.kv_heads:
            raise ValueError(
                f"k has {k.shape[2]} kv heads, the cache's pattern {self.pattern.kv_heads}."
            )
        if segment_ids is None:
            segment_ids = jnp.ones(k.shape[:2], jnp.int32)
        slots = append(self.slots, length, k, v, segment_ids, self.pattern)
        return dataclasses.replace(self, slots=slots, length=length + k.shape[1])

    def live_slots(self) -> Array:
        """Slots in use, int32 [K]: the ring, and the whole blocks of the store. Dense heads: N B.

        Equals `pattern.cache_slots(length)`.
        """
        p, n = self.pattern, -(-self.length // self.pattern.block)
        residues = _residues(p)
        stored = p.block * num_stored(residues, n, p).astype(jnp.int32)
        sparse = p.window[0] * p.block + stored
        return jnp.concatenate([sparse, jnp.full(p.num_dense_heads, n * p.block, jnp.int32)])


def s2_decode(
    q: Array,
    cache: S2Cache,
    pattern: ShardPattern | None = None,
    *,
    scale: float | None = None,
    segment_ids: Array | None = None,
) -> Array:
    """S2-attention of the newest token over the cache that it was appended to.

    Args:
      q: [B,1,H,D] rotated query of the last appended token.
      cache: with that token's key and value.
      pattern: the cache's own; None = that.
      scale: factor on q.k; None = 1/sqrt(D).
      segment_ids: [B,1]; None = 1.
    Returns:
      z [B,1,H,W].
    Raises:
      ValueError: more than one query, or another pattern or number of heads than the cache's.
    Example:
      >>> pattern = ShardPattern(16, 1, 2, num_heads=2)
      >>> cache = S2Cache.init(pattern, 1, 64, head_dim=8)
      >>> x = jnp.ones((1, 1, 2, 8))
      >>> s2_decode(x, cache.append(x, x), pattern).shape
      (1, 1, 2, 8)
    """
    if pattern is not None and pattern != cache.pattern:
        raise ValueError(f"the cache was made for {cache.pattern}, not for {pattern}.")
    if q.shape[1] != 1 or q.shape[2] != cache.pattern.num_heads:
        raise ValueError(
            f"q has shape {q.shape}, needed [B,1,{cache.pattern.num_heads},D]: one query, the "
            "last appended token's."
        )
    if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return decode(q, cache.slots, cache.length, segment_ids, cache.pattern, scale)[0]


def init_slots(pattern: ShardPattern, batch_size: int, max_len: int, head_dim: int, dtype) -> Slots:
    """Empty slots for `max_len` tokens."""
    pattern.check_cacheable()
    sparse, n = pattern.num_sparse_heads, pattern.num_blocks(max_len)
    stored = max([pattern.num_stored_blocks(n, h) for h in range(sparse)], default=0)

    def held(heads: int, tokens: int, *axes: int) -> Held:
        x = jnp.zeros((batch_size, heads, tokens, head_dim), dtype)
        return Held(x, x, jnp.zeros((batch_size, *axes, tokens), jnp.int32))

    return Slots(
        ring=held(sparse, pattern.window[0] * pattern.block if sparse else 0),
        store=held(sparse, stored * pattern.block, sparse),
        full=held(pattern.num_dense_heads, max_len if pattern.num_dense_heads else 0),
    )


def slot_axes() -> PyTree:
    """The logical axes of every array of `Slots`."""
    tokens: Any = ("batch", "act_kv_heads", None, None)
    by_head: Any = ("batch", "act_kv_heads", None)
    by_token: Any = ("batch", None)
    once = Held(tokens, tokens, by_token)
    return Slots(once, Held(tokens, tokens, by_head), once)


def append(
    slots: Slots, length: Array, k: Array, v: Array, segments: Array, pattern: ShardPattern
) -> Slots:
    """`slots` of `length` tokens with T more: k [B,T,K,D], v [B,T,K,W], segments [B,T]."""
    sparse = pattern.num_sparse_heads
    new = Held(jnp.einsum("bskd->bksd", k), jnp.einsum("bskd->bksd", v), segments)
    ring, store, full = slots
    if sparse:
        mine = Held(new.k[:, :sparse], new.v[:, :sparse], segments)
        store = _append_store(slots, length, mine, pattern)
        ring = _append_ring(ring, length, mine)
    if sparse < pattern.kv_heads:
        rest = Held(new.k[:, sparse:], new.v[:, sparse:], segments)
        full = _map(lambda old, x, axis: _put(old, x, length, axis), full, rest)
    return Slots(ring, store, full)


def decode(
    q: Array, slots: Slots, length: Array, segments: Array, pattern: ShardPattern, scale: float
) -> tuple[Array, Array]:
    """One query [B,1,H,D], of the last of `length` tokens: z [B,1,H,W] and lse [B,H,1]."""
    current = (length - 1) // pattern.block
    parts = []
    heads = pattern.num_sparse_heads * pattern.group_size
    if heads:
        size = slots.ring.segments.shape[-1]
        token = length - 1 - (length - 1 - jnp.arange(size)) % size
        in_window = (token >= 0) & (token // pattern.block > current - pattern.window[0])
        kept = jnp.repeat(_store_blocks(slots, pattern), pattern.block, axis=1)  # [K,M*block]
        sources = [
            (slots.ring, in_window[None, None], slots.ring.segments[:, None]),
            (slots.store, (kept <= current - pattern.window[0])[None], slots.store.segments),
        ]
        parts.append(_one_query(q[:, :, :heads], sources, segments, scale))
    if heads < pattern.num_heads:
        written = jnp.arange(slots.full.segments.shape[-1]) < length
        sources = [(slots.full, written[None, None], slots.full.segments[:, None])]
        parts.append(_one_query(q[:, :, heads:], sources, segments, scale))
    z, lse = (jnp.concatenate(x, axis=axis) for x, axis in zip(zip(*parts), (2, 1)))
    return z.astype(q.dtype), lse


def extend(
    q: Array,
    k: Array,
    v: Array,
    slots: Slots,
    length: Array,
    segments: Array,
    pattern: ShardPattern,
    scale: float,
) -> tuple[Array, Array, Slots]:
    """T new tokens over what `slots` hold and over each other.

    The new tokens may begin inside a block. They are laid out from that block's start, behind the
    L blocks before it, which the ring still holds.

    Args:
      q: [B,T,H,D], k: [B,T,K,D], v: [B,T,K,W] of the new tokens, rotated.
      slots: of the `length` tokens before.
      length: int32 scalar.
      segments: [B,T].
      pattern: causal local-stride.
      scale: factor on q.k.
    Returns:
      z [B,T,H,W], lse [B,H,T], and the slots with the new tokens.
    """
    grown = append(slots, length, k, v, segments, pattern)
    num_new, sparse = q.shape[1], pattern.num_sparse_heads
    heads = sparse * pattern.group_size
    parts = []
    if heads:
        mine = (q[:, :, :heads], k[:, :, :sparse], v[:, :, :sparse])
        parts.append(_extend_sparse(*mine, slots, length, segments, pattern, scale))
    if heads < pattern.num_heads:
        mask = Mask(
            is_causal=True,
            q_index=length + jnp.arange(num_new),
            q_segment_ids=segments,
            k_segment_ids=grown.full.segments,
        )
        turn = lambda x: jnp.einsum("bksd->bskd", x).astype(q.dtype)
        full = (turn(grown.full.k), turn(grown.full.v))
        parts.append(blocked_attention(q[:, :, heads:], *full, mask, scale=scale))
    z, lse = (jnp.concatenate(x, axis=axis) for x, axis in zip(zip(*parts), (2, 1)))
    return z, lse, grown


def _extend_sparse(q, k, v, slots, length, segments, pattern, scale) -> tuple[Array, Array]:
    block, local, num_new = pattern.block, pattern.window[0], q.shape[1]
    size = local * block
    first = length // block  # the block of the first new token
    num_blocks = -(-num_new // block) + 1
    low = first - local  # the first block of the layout
    # Where each token of the layout lies: in the ring, or behind it among the new ones.
    token = low * block + jnp.arange((num_blocks + local) * block)
    source = jnp.where(token < length, token % size, size + token - length)
    new = Held(jnp.einsum("bskd->bksd", k), jnp.einsum("bskd->bksd", v), segments)
    join = lambda old, x, axis: jnp.take(
        jnp.concatenate([old.astype(x.dtype), x], axis=axis), source, axis=axis, mode="clip"
    )
    layout = _map(join, slots.ring, new)

    place = length - first * block
    shape = (q.shape[0], num_blocks * block)
    put = lambda x: _put(jnp.zeros((*shape, *x.shape[2:]), x.dtype), x, place, 1)
    window = Keys(layout.k[:, :, block:], layout.v[:, :, block:], layout.segments[:, None, block:])

    # Kept blocks: those that have left the ring, and those of the class that are in the layout.
    stored_before = (length - 1) // block - local
    residues = _residues(pattern)
    count = -(-(num_blocks + local) // pattern.stride)
    start = jnp.maximum(stored_before + 1, 0)
    fresh = kept_blocks(residues, pattern.stride, start, first + num_blocks, count)
    by_token = lambda x: jnp.einsum("bksd->bskd", x)
    fresh_keys = take_blocks(
        by_token(layout.k), by_token(layout.v), layout.segments, block, fresh - low
    )
    old = _store_blocks(slots, pattern)
    old = jnp.where(old <= stored_before, old, NO_BLOCK)
    merge = lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=2)
    z, lse = attend_shards(
        put(q),
        window,
        jax.tree.map(merge, fresh_keys, Keys(*slots.store)),
        jnp.concatenate([fresh, old], axis=1),
        block=block,
        local_blocks=local,
        scale=scale,
        first_block=first,
        bounds=(0, NO_BLOCK),
        q_segments=put(segments),
    )
    z = jax.lax.dynamic_slice_in_dim(z, place, num_new, axis=1)
    return z, jax.lax.dynamic_slice_in_dim(lse, place, num_new, axis=2)


def num_stored(residues: Array, n: Array, pattern: ShardPattern) -> Array:
    """[K] blocks of each class that have left the window at N blocks."""
    beyond = jnp.maximum(0, n - pattern.window[0] - residues)
    return -(-beyond // pattern.stride)


def _residues(pattern: ShardPattern) -> Array:
    return jnp.asarray(pattern.kv_residues()[: pattern.num_sparse_heads])


def _store_blocks(slots: Slots, pattern: ShardPattern) -> Array:
    """[K,M] block index of each place of the store."""
    places = np.arange(slots.store.segments.shape[-1] // pattern.block)
    residues = pattern.kv_residues()[: pattern.num_sparse_heads]
    return jnp.asarray(residues[:, None] + pattern.stride * places, jnp.int32)


def _append_ring(ring: Held, length: Array, new: Held) -> Held:
    size, num_new = ring.segments.shape[-1], new.segments.shape[-1]
    if num_new == 1:
        return _map(lambda old, x, axis: _put(old, x, length % size, axis), ring, new)
    end = length + num_new
    token = end - 1 - (end - 1 - jnp.arange(size)) % size  # the newest token of each slot

    def update(old: Array, x: Array, axis: int) -> Array:
        taken = jnp.take(x, token - length, axis=axis, mode="clip").astype(old.dtype)
        is_new = jnp.expand_dims(token >= length, tuple(range(1, old.ndim - axis)))
        return jnp.where(is_new, taken, old)

    return _map(update, ring, new)


def _append_store(slots: Slots, length: Array, new: Held, pattern: ShardPattern) -> Held:
    """The store with the kept blocks that leave the window as the new tokens come in."""
    block, local, stride = pattern.block, pattern.window[0], pattern.stride
    ring, store = slots.ring, slots.store
    num_new, num_places = new.segments.shape[-1], store.segments.shape[-1] // block
    if num_places == 0:
        return store
    residues = _residues(pattern)
    left_before = (length - 1) // block - local  # blocks up to here had left
    left_now = (length + num_new - 1) // block - local
    count = min(num_places, (num_new - 1) // (block * stride) + 1)
    start = jnp.minimum(num_stored(residues, left_before + local + 1, pattern), num_places - count)
    moved = residues[:, None] + stride * (start[:, None] + jnp.arange(count))  # [K,count] blocks
    leaves = (moved > left_before) & (moved <= left_now)
    token = (moved[..., None] * block + jnp.arange(block)).reshape(moved.shape[0], -1)
    leaves = jnp.repeat(leaves, block, axis=1)  # [K,count*block]
    size = ring.segments.shape[-1]
    source = jnp.where(token < length, token % size, size + token - length)

    by_head = jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="clip"))
    cut = jax.vmap(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, count * block, axis=0))
    put = jax.vmap(lambda x, new, i: jax.lax.dynamic_update_slice_in_dim(x, new, i, axis=0))

    def update(stored: Array, old: Array, x: Array) -> Array:  # of one row of the batch
        if num_new > 1:
            old = jnp.concatenate([old, x.astype(old.dtype)], axis=1)
        taken = by_head(old, source)
        is_new = leaves.reshape(*leaves.shape, *(1,) * (taken.ndim - 2))
        taken = jnp.where(is_new, taken, cut(stored, start * block))
        return put(stored, taken, start * block)

    heads = (store.segments.shape[1],)
    spread = lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], *heads, x.shape[-1]))
    old = ring._replace(segments=spread(ring.segments))
    new = new._replace(segments=spread(new.segments))
    return Held(*(jax.vmap(update)(*arrays) for arrays in zip(store, old, new)))


def _one_query(q: Array, sources, segments: Array, scale: float) -> tuple[Array, Array]:
    """One query [B,1,H,D] over slots (held, visible [1|B,1|K,S], their segments [B,1|K,S])."""
    batch, _, num_heads, head_dim = q.shape
    num_kv_heads = sources[0][0].k.shape[1]
    grouped = q.reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = []
    for held, visible, ids in sources:
        k = held.k.astype(q.dtype)
        dot = jnp.einsum("bkgd,bksd->bkgs", grouped, k, preferred_element_type=jnp.float32)
        visible = visible & (ids == segments[:, :, None]) & (ids != 0)
        scores.append(scale * dot + penalty(visible)[:, :, None])
    highest = jnp.maximum(jnp.concatenate(scores, axis=-1).max(axis=-1, keepdims=True), FLOOR)
    weights = [jnp.exp(x - highest) for x in scores]
    total = sum((x.sum(axis=-1) for x in weights), start=jnp.zeros(()))
    z = sum(
        jnp.einsum(
            "bkgs,bksw->bkgw",
            x.astype(q.dtype),
            held.v.astype(q.dtype),
            preferred_element_type=jnp.float32,
        )
        for x, (held, _, _) in zip(weights, sources)
    )
    z = z / jnp.maximum(total, TINY)[..., None]
    lse = highest[..., 0] + jnp.log(total)
    return z.reshape(batch, 1, num_heads, -1), lse.reshape(batch, num_heads, 1)


def _map(f, old: Held, new: Held) -> Held:
    """f(old, new, token axis) for keys, values and segments."""
    return Held(f(old.k, new.k, 2), f(old.v, new.v, 2), f(old.segments, new.segments, 1))


def _put(old: Array, x: Array, start: Array, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), start, axis=axis)
