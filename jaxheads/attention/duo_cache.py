"""The two caches of DuoAttention: every token of the retrieval heads, few of the others.

    bytes of one layer = 2 B D b (max_len Kf + (sink + recent) Ks)

References: Xiao et al., 2024, arXiv:2410.10819, section 2.4.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.attention.api import check_arrays
from jaxheads.attention.duo_streaming import as_pattern, check_sizes, masked, stream
from jaxheads.attention.masks import Mask
from jaxheads.typing import Array, ArrayLike, is_traced

FIRST_CHUNKS = ("full", "streaming")


class KeysValues(NamedTuple):
    """Keys and values [B,S,K,D] of some heads, rotated at their own positions."""

    k: Array
    v: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DuoCache:
    """What one layer keeps between calls.

    Token u of the streaming heads lies in slot u while u < sink, then in slot
    sink + (u - sink) mod recent; the order inside a softmax does not matter.
    """

    full: KeysValues
    """[B,max_len,Kf,D] of the retrieval heads."""
    streaming: KeysValues
    """[B,sink+recent,Ks,D] of the others."""
    lengths: Array
    """[B] tokens of each row."""
    positions: Array
    """[B,sink+recent] the token in each slot of `streaming`, -1 for none."""
    index: Array
    """int32 scalar: columns appended, padding included."""
    sink: int = dataclasses.field(metadata={"static": True})
    recent: int = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values: 2 B D b (max_len Kf + (sink + recent) Ks)."""
        return sum(x.size * x.dtype.itemsize for x in (*self.full, *self.streaming))

    def evict_last(self, n: int) -> DuoCache:
        """See `evict_last`."""
        return evict_last(self, n)


def init_cache(
    batch: int,
    max_len: int,
    pattern: ArrayLike,
    *,
    head_dim: int,
    sink: int = 64,
    recent: int = 256,
    dtype: jnp.dtype = jnp.float32,
) -> DuoCache:
    """An empty cache of one layer.

    Args:
      batch: B.
      max_len: tokens the full cache can hold.
      pattern: [K] bool, True for the retrieval heads.
      head_dim: D.
      sink, recent: tokens the streaming heads keep; 64 and 256 are the paper's.
      dtype: of keys and values.
    Example:
      >>> init_cache(1, 100, [1, 0, 0], head_dim=8, sink=2, recent=6).streaming.k.shape
      (1, 8, 2, 8)
    """
    check_sizes(sink, recent)
    retrieves = as_pattern(pattern, len(np.atleast_1d(pattern)))
    num_full, size = int(retrieves.sum()), sink + recent
    empty = lambda slots, heads: jnp.zeros((batch, slots, heads, head_dim), dtype)
    pair = lambda x: KeysValues(x, x)
    return DuoCache(
        pair(empty(max_len, num_full)),
        pair(empty(size, len(retrieves) - num_full)),
        jnp.zeros(batch, jnp.int32),
        jnp.full((batch, size), -1, jnp.int32),
        jnp.int32(0),
        sink,
        recent,
    )


class Stepped(NamedTuple):
    """What `duo_attention_step` returns."""

    z: Array
    """[B,n,H,D]"""
    cache: DuoCache


def duo_attention_step(
    q: Array,
    k: Array,
    v: Array,
    cache: DuoCache,
    *,
    pattern: ArrayLike,
    first_chunk: str = "full",
    scale: float | None = None,
    segment_ids: Array | None = None,
) -> Stepped:
    """n new tokens, of a prompt or one of an answer, over what the cache holds.

    Retrieval heads attend to all tokens so far. Streaming heads attend to everything in their cache
    and causally to the new tokens: up to sink + recent + n keys, more than the window, as in the
    released code. Then they keep the first `sink` and the last `recent` tokens.

    Args:
      q: [B,n,H,D] rotated queries.
      k: [B,n,K,D] rotated keys.
      v: [B,n,K,D] values.
      cache: from `init_cache` or an earlier call.
      pattern: [K] bool, True for the retrieval heads, as given to `init_cache`.
      first_chunk: "full": in the call that meets an empty cache every head is causal (the released
        code). "streaming": there, streaming heads follow `streaming_mask`, as in training.
      scale: factor on q.k; None = 1/sqrt(D).
      segment_ids: [B,n], 0 for padding, which only stands before a row's first token.
    Returns:
      Stepped(z, cache).
    Raises:
      ValueError: for a pattern that does not fit, and for more tokens than the cache has room for.
    """
    if first_chunk not in FIRST_CHUNKS:
        raise ValueError(f"first_chunk={first_chunk!r} is not one of {', '.join(FIRST_CHUNKS)}.")
    check_arrays(q, k, v)
    (batch, n, heads, _), kv_heads = q.shape, k.shape[2]
    retrieves = as_pattern(pattern, kv_heads, heads)
    _check_room(cache, batch, n, retrieves)
    real = jnp.ones((batch, n), bool) if segment_ids is None else segment_ids != 0
    count = jnp.sum(real, axis=1, dtype=jnp.int32)
    grown = dataclasses.replace(cache, lengths=cache.lengths + count, index=cache.index + n)

    query, kv = split_heads(retrieves, heads)
    parts = []
    if len(kv[0]):
        z, full = _step_full(*heads_of(q, k, v, query[0], kv[0]), grown, n, scale)
        parts.append(z)
        grown = dataclasses.replace(grown, full=full)
    if len(kv[1]):
        new = heads_of(q, k, v, query[1], kv[1])
        z = _step_streaming(*new, cache, real, first_chunk, scale)
        parts.append(z)
        grown = _keep(grown, cache, *new[1:], n - count)
    z = jnp.concatenate(parts, axis=2)
    return Stepped(pick(z, np.argsort(np.concatenate(query))), grown)


def _check_room(cache: DuoCache, batch: int, n: int, retrieves: np.ndarray) -> None:
    held = (cache.full.k.shape[2], cache.streaming.k.shape[2])
    wanted = (int(retrieves.sum()), int((~retrieves).sum()))
    if held != wanted or cache.full.k.shape[0] != batch:
        raise ValueError(
            f"the cache holds {held[0]} retrieval and {held[1]} streaming heads of "
            f"{cache.full.k.shape[0]} rows; the call has {wanted[0]} and {wanted[1]} of {batch}."
        )
    room = cache.full.k.shape[1]
    used = 0 if is_traced(cache.index) else int(cache.index)
    if used + n > room:
        raise ValueError(
            f"a chunk of {n} tokens does not fit: the cache was made for {room} and holds {used}; "
            "make it longer with init_cache."
        )


def split_heads(retrieves: np.ndarray, num_heads: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Query heads and kv heads, each as (retrieval, streaming)."""
    group = num_heads // len(retrieves)
    kv = [np.flatnonzero(retrieves), np.flatnonzero(~retrieves)]
    return [(i[:, None] * group + np.arange(group)).reshape(-1) for i in kv], kv


def pick(x: Array, heads: np.ndarray) -> Array:
    """Some heads of [B,n,H,D]; a slice where they are neighbours, as after `reorder_heads`."""
    low, high = int(heads[0]), int(heads[-1]) + 1
    if np.array_equal(heads, np.arange(low, high)):
        return x[:, :, low:high]
    return jnp.take(x, jnp.asarray(heads), axis=2)


def heads_of(q, k, v, query: np.ndarray, kv: np.ndarray) -> tuple[Array, Array, Array]:
    """The queries, keys and values of some heads."""
    return pick(q, query), pick(k, kv), pick(v, kv)


def _step_full(q, k, v, grown: DuoCache, n: int, scale) -> tuple[Array, KeysValues]:
    start = grown.index - n
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
        old, new.astype(old.dtype), start, axis=1
    )
    full = KeysValues(put(grown.full.k, k), put(grown.full.v, v))
    slots = jnp.arange(full.k.shape[1], dtype=jnp.int32)
    mask = Mask(
        is_causal=True,
        q_index=start + jnp.arange(n, dtype=jnp.int32),
        key_mask=slots >= (grown.index - grown.lengths)[:, None],
    )
    keys, values = full.k.astype(k.dtype), full.v.astype(v.dtype)
    return masked(q, keys, values, mask, scale), full


def _step_streaming(q, k, v, cache: DuoCache, real: Array, first_chunk: str, scale) -> Array:
    size, n = cache.positions.shape[1], q.shape[1]
    join = lambda old, new: jnp.concatenate([old.astype(new.dtype), new], axis=1)
    mask = Mask(
        is_causal=True,
        q_index=size + jnp.arange(n, dtype=jnp.int32),
        key_mask=jnp.concatenate([cache.positions >= 0, real], axis=1),
    )
    z = masked(q, join(cache.streaming.k, k), join(cache.streaming.v, v), mask, scale)
    if first_chunk == "full" or n == 1:
        return z
    padding = n - jnp.sum(real, axis=1, dtype=jnp.int32)
    fresh = stream(q, k, v, padding, cache.sink, cache.recent, "blocked", scale)
    return jnp.where((cache.lengths == 0)[:, None, None, None], fresh, z)


def _keep(grown: DuoCache, cache: DuoCache, k: Array, v: Array, padding: Array) -> DuoCache:
    """`grown` with the new tokens in the slots of the streaming heads."""
    sink, recent = cache.sink, cache.recent
    slot = jnp.arange(sink + recent, dtype=jnp.int32)
    last = grown.lengths[:, None] - 1
    token = jnp.where(slot < sink, slot, last - (last - slot) % recent)  # the newest of each slot
    is_new = (
        (token >= cache.lengths[:, None]) & (token <= last) & (token >= jnp.minimum(slot, sink))
    )
    column = (token - cache.lengths[:, None] + padding[:, None])[..., None, None]
    put = lambda old, new: jnp.where(
        is_new[..., None, None],
        jnp.take_along_axis(new, column, axis=1, mode="clip").astype(old.dtype),
        old,
    )
    streaming = KeysValues(put(cache.streaming.k, k), put(cache.streaming.v, v))
    positions = jnp.where(is_new, token, cache.positions)
    return dataclasses.replace(grown, streaming=streaming, positions=positions)


def evict_last(cache: DuoCache, n: int) -> DuoCache:
    """The cache without its last n tokens.

    What they had overwritten in the slots of the streaming heads is gone: these then see up to n
    tokens fewer. Keep the cache of before to take a draft back without loss.

    Raises:
      ValueError: for n < 0, or (where lengths are known) more tokens than a row has.
    """
    held = 0 if is_traced(cache.lengths) else int(cache.lengths.min())
    if n < 0 or (not is_traced(cache.lengths) and n > held):
        raise ValueError(f"evict_last({n}): needed 0 to {held}, the tokens of the shortest row.")
    lengths = cache.lengths - n
    positions = jnp.where(cache.positions < lengths[:, None], cache.positions, -1)
    return dataclasses.replace(cache, lengths=lengths, index=cache.index - n, positions=positions)
