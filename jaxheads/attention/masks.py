"""Structured attention masks: causality, windows, segments, padding and per-head masks as data.

A `Mask` keeps the parts of a mask apart, so that each implementation uses the structure it can
(a kernel skips blocks, a blocked loop builds one tile at a time) and nobody builds `[B,H,T,S]`
unless the mask really differs per head. Causality and windows compare *indices* (slots of the
sequence or of the cache), never RoPE positions.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxheads.typing import Array

# What a mask adds to a score that must not be attended to: finite, so that differences of scores
# stay finite, and so large that the score itself is lost in rounding.
MASK_VALUE = float(jnp.finfo(jnp.float32).min) / 2
# Lower bound of a row's maximum. Only a row that sees nothing lies below it, and then each
# exponential underflows to exactly zero.
FLOOR = MASK_VALUE / 2

Span: TypeAlias = tuple[int | Array, int]  # (start, size); the start may be traced


_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """Which keys each query sees: the conjunction of every part that is given.

    Query t sees key s when all of these hold:
        is_causal        q_index[t] >= k_index[s]
        window = w       q_index[t] - k_index[s] < w          (causal)
                         |q_index[t] - k_index[s]| < w        (not causal)
        window = (l, r)  -r <= q_index[t] - k_index[s] <= l
        segment ids      q_segment_ids[t] == k_segment_ids[s] != 0   (0 marks padding)
        key_mask         key_mask[s]
        head_mask        head_mask[b, h, t, s]
    With `prefix_lengths`, causality and window do not hide keys with k_index[s] < prefix.

    Attributes:
      is_causal: no query sees a later key.
      window: number of keys in a sliding window, the query's own slot included; or a pair (left,
        right) of how many keys before and after its own slot a query sees.
      q_index: [T] or [B,T] slots of the queries; None = 0..T-1.
      k_index: [S] or [B,S] slots of the keys; None = 0..S-1.
      q_segment_ids: [B,T] integers.
      k_segment_ids: [B,S] integers; None = `q_segment_ids` (self-attention, T = S).
      key_mask: [B,S] bool.
      head_mask: bool, broadcastable to [B,H,T,S].
      prefix_lengths: [B] integers: that many first slots are visible to every query (prefix LM).
    """

    is_causal: bool = dataclasses.field(default=False, metadata=_STATIC)
    window: int | tuple[int, int] | None = dataclasses.field(default=None, metadata=_STATIC)
    q_index: Array | None = None
    k_index: Array | None = None
    q_segment_ids: Array | None = None
    k_segment_ids: Array | None = None
    key_mask: Array | None = None
    head_mask: Array | None = None
    prefix_lengths: Array | None = None

    def __post_init__(self):
        if isinstance(self.window, tuple):
            if len(self.window) != 2 or min(self.window) < 0:
                raise ValueError(
                    f"window={self.window} must be (left, right), two counts of at least 0: the "
                    "keys visible before and after the query's own."
                )
        elif self.window is not None and self.window < 1:
            raise ValueError(
                f"window={self.window} leaves no visible key; a window counts the query itself, "
                "so it is at least 1. Pass None for no window."
            )
        if self.k_segment_ids is not None and self.q_segment_ids is None:
            raise ValueError(
                "k_segment_ids was given without q_segment_ids; pass the queries' ids as well."
            )

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """How far before and after its own slot a query sees; None = without bound."""
        if isinstance(self.window, tuple):
            left, right = self.window
        else:
            left = right = None if self.window is None else self.window - 1
        return left, 0 if self.is_causal else right

    @property
    def keys_share_segments(self) -> bool:
        """Whether queries and keys are the same packed tokens, each in its own segment."""
        return self.q_segment_ids is not None and self.k_segment_ids is None

    def tile(self, q_span: Span, k_span: Span) -> Array | None:
        """The part of the mask for a span of queries and a span of keys.

        Args:
          q_span: (start, size) over T; the start may be traced.
          k_span: (start, size) over S.
        Returns:
          bool, broadcastable to [B,H,q_size,k_size]; None when every key is visible.
        """
        parts = (
            self._index_tile(q_span, k_span),
            self._segment_tile(q_span, k_span),
            self._key_tile(k_span),
            self._head_tile(q_span, k_span),
        )
        visible = None
        for part in parts:
            if part is not None:
                visible = part if visible is None else visible & part
        return visible

    def materialize(self, num_queries: int, num_keys: int) -> Array | None:
        """The whole mask, broadcastable to [B,H,T,S]; None when every key is visible."""
        return self.tile((0, num_queries), (0, num_keys))

    def visible_rows(self, num_queries: int, num_keys: int) -> Array | None:
        """Which queries see at least one key: bool broadcastable to [B,H,T]; None when all do."""
        if self._every_row_sees_itself(num_queries, num_keys):
            return None
        only_segments = self.key_mask is None and self.head_mask is None
        if only_segments and self.keys_share_segments and self._default_indices():
            return (self.q_segment_ids != 0)[:, None, :]
        visible = self.materialize(num_queries, num_keys)
        return None if visible is None else visible.any(axis=-1)

    def relative_index(self, q_span: Span, k_span: Span) -> Array:
        """q_index - k_index, [q_size,k_size] or [B,q_size,k_size] int32."""
        q, k = self.indices(q_span, k_span)
        return q - k

    def indices(self, q_span: Span, k_span: Span) -> tuple[Array, Array]:
        """q_index [...,q_size,1] and k_index [...,1,k_size] int32, with a batch axis or without."""
        q = _indices(self.q_index, q_span)
        k = _indices(self.k_index, k_span)
        return q[..., :, None], k[..., None, :]

    def key_range(self, q_span: Span, num_keys: int) -> tuple[int | Array, int | Array]:
        """Bounds [low, high) on the keys a span of queries can see by causality and window.

        Everything outside is invisible; inside, `tile` decides. Bounds are traced when the span's
        start or the indices are. Bounds are tight for keys in the order of their indices.
        """
        left, right = self.reach
        if left is None and right is None:
            return 0, num_keys
        q = _indices(self.q_index, q_span)
        lowest = None if left is None else q.min() - left
        highest = None if right is None else q.max() + right
        if self.prefix_lengths is not None:
            lowest = None
            if highest is not None:
                highest = jnp.maximum(highest, self.prefix_lengths.max() - 1)
        if self.k_index is not None:
            return _index_range(self.k_index, lowest, highest)
        low = 0 if lowest is None else jnp.clip(lowest, 0, num_keys)
        return low, num_keys if highest is None else jnp.clip(highest + 1, 0, num_keys)

    def pad(self, num_queries: int, num_keys: int) -> Mask:
        """The same mask for sequences padded at the end to these lengths.

        Padding is invisible through segment ids, `key_mask` and `head_mask` where these exist; a
        mask without them cannot tell padding from keys, so the caller bounds the keys itself.
        """
        share = self.keys_share_segments and num_queries != num_keys
        k_segment_ids = self.q_segment_ids if share else self.k_segment_ids
        return dataclasses.replace(
            self,
            q_index=pad_end(self.q_index, num_queries, mode="edge"),
            k_index=pad_end(self.k_index, num_keys, mode="edge"),
            q_segment_ids=pad_end(self.q_segment_ids, num_queries),
            k_segment_ids=pad_end(k_segment_ids, num_keys),
            key_mask=pad_end(self.key_mask, num_keys),
            head_mask=pad_end(pad_end(self.head_mask, num_keys), num_queries, axis=-2),
        )

    def _default_indices(self) -> bool:
        return self.q_index is None and self.k_index is None

    def _every_row_sees_itself(self, num_queries: int, num_keys: int) -> bool:
        arrays = (self.q_segment_ids, self.key_mask, self.head_mask)
        if any(part is not None for part in arrays):
            return False
        if self.reach == (None, None):
            return True
        if not self._default_indices():
            return False
        return num_queries <= num_keys or (self.is_causal and self.window is None)

    def _index_tile(self, q_span: Span, k_span: Span) -> Array | None:
        left, right = self.reach
        if left is None and right is None:
            return None
        distance = self.relative_index(q_span, k_span)
        parts = [] if left is None else [distance <= left]
        parts += [] if right is None else [distance >= -right]
        visible = functools.reduce(jnp.bitwise_and, parts)
        visible = visible[None, None] if visible.ndim == 2 else visible[:, None]
        if self.prefix_lengths is None:
            return visible
        k_index = jnp.expand_dims(_indices(self.k_index, k_span), -2)  # [1,k_size] or [B,1,k_size]
        in_prefix = k_index < self.prefix_lengths[:, None, None]
        return visible | in_prefix[:, None]

    def _segment_tile(self, q_span: Span, k_span: Span) -> Array | None:
        if self.q_segment_ids is None:
            return None
        keys = self.q_segment_ids if self.k_segment_ids is None else self.k_segment_ids
        q = take(self.q_segment_ids, q_span, axis=-1)[:, None, :, None]
        k = take(keys, k_span, axis=-1)[:, None, None, :]
        return (q == k) & (k != 0)

    def _key_tile(self, k_span: Span) -> Array | None:
        if self.key_mask is None:
            return None
        return take(self.key_mask, k_span, axis=-1)[:, None, None, :]

    def _head_tile(self, q_span: Span, k_span: Span) -> Array | None:
        if self.head_mask is None:
            return None
        return take(take(as_4d(self.head_mask), q_span, axis=-2), k_span, axis=-1)


def penalty(visible: Array) -> Array:
    """What to add to scores: 0 where visible, `MASK_VALUE` elsewhere; float32.

    Adding keeps XLA's CPU loops vectorised; a select over the scores makes them twice as slow.
    """
    return jnp.where(visible, 0.0, MASK_VALUE).astype(jnp.float32)


def as_4d(x: Array) -> Array:
    """Leading axes of size one until the array has four."""
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _indices(index: Array | None, span: Span) -> Array:
    if index is None:
        return span[0] + jnp.arange(span[1], dtype=jnp.int32)
    return take(index, span, axis=-1).astype(jnp.int32)


def take(x: Array, span: Span, axis: int) -> Array:
    """A span of one axis; an axis of size one broadcasts and is left alone."""
    start, size = span
    length = x.shape[axis]
    if length == 1 or (isinstance(start, int) and start == 0 and size == length):
        return x
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def _index_range(index: Array, lowest, highest) -> tuple[Array, Array]:
    """[low, high): from the first to the last entry of index [...,S] within the bounds."""
    inside = jnp.ones(index.shape, bool)
    if lowest is not None:
        inside = inside & (index >= lowest)
    if highest is not None:
        inside = inside & (index <= highest)
    inside = inside.reshape(-1, index.shape[-1]).any(axis=0)
    low = jnp.argmax(inside)
    high = index.shape[-1] - jnp.argmax(inside[::-1])
    return low, jnp.where(inside.any(), high, low)


def pad_end(x: Array | None, length: int, axis: int = -1, mode: str = "constant") -> Array | None:
    """Pads one axis at its end; absent arrays and broadcast axes stay as they are."""
    if x is None or x.ndim < -axis or x.shape[axis] in (1, length):
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, mode=mode)
