"""Decoding with LongHeads: keys and values of all tokens, a vector per complete chunk and head, and
the queries of the running chunk, which its vector will need.

A step reads n chunks per head, and the vectors of all. Rows of a batch may have different lengths:
padding is left out of the cache, so chunks begin at each row's first token.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.attention.api import check_arrays
from jaxheads.attention.contract import Rotate
from jaxheads.attention.longheads_chunks import (
    LongHeadsOptions,
    attend_chunks,
    represent,
    rotate_at,
)
from jaxheads.typing import Array, is_traced


class Slots(NamedTuple):
    """What one layer keeps between calls; the batch is the first axis of every array."""

    k: Array
    """[B,S,K,D] keys rotated by their place in their chunk; S whole chunks."""
    v: Array
    """[B,S,K,D]"""
    reps: Array
    """[B,S/w,H,D] float32, of complete chunks."""
    q: Array
    """[B,w,H,D] unrotated queries of the running chunk."""
    length: Array
    """[B] int32, tokens held."""


_KV, _HEADS = ("batch", None, "act_kv_heads", None), ("batch", None, "act_heads", None)
SLOT_AXES: Any = Slots(*cast(Any, (_KV, _KV, _HEADS, _HEADS, ("batch",))))
"""The logical axes of every array of `Slots`."""


def init_slots(
    options: LongHeadsOptions,
    batch_size: int,
    max_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: Any = jnp.float32,
) -> Slots:
    """Empty slots for `max_len` tokens."""
    num_chunks = -(-max_len // options.chunk)
    empty = lambda *shape, dtype=dtype: jnp.zeros((batch_size, *shape, head_dim), dtype)
    kv = empty(num_chunks * options.chunk, num_kv_heads)
    reps = empty(num_chunks, num_heads, dtype=jnp.float32)
    queries = empty(options.chunk, num_heads)
    return Slots(kv, kv, reps, queries, jnp.zeros(batch_size, jnp.int32))


def extend(
    slots: Slots,
    q: Array,
    k: Array,
    v: Array,
    rotate: Rotate,
    options: LongHeadsOptions,
    *,
    impl: str,
    scale: float,
    valid: Array | None = None,
    key: Array | None = None,
) -> tuple[Array, Slots]:
    """T new tokens over what `slots` hold and over each other.

    Args:
      slots: of the tokens before.
      q: [B,T,H,D], k: [B,T,K,D], v: [B,T,K,D] of the new tokens, unrotated.
      valid: [B,T] bool; other tokens are padding: they are not kept, and get zeros.
      impl: "gather" or "masked".
      scale: factor on q.k.
      key: for `options.at_random`.
    Returns:
      y [B,T,H,D], and the slots with the new tokens.
    """
    batch, num_new = q.shape[:2]
    chunk, dtype = options.chunk, q.dtype
    if valid is None:
        count = jnp.full(batch, num_new, jnp.int32)
    else:
        order, back = to_front(valid)
        q, k, v = (reorder(x, order) for x in (q, k, v))
        count = valid.sum(axis=1, dtype=jnp.int32)
    t = slots.length[:, None] + jnp.arange(num_new, dtype=jnp.int32)
    keys = rotate_at(rotate, k, t % chunk)
    grown = _complete(slots, q, keys, v, count, rotate, options, scale)
    run = lambda options: attend_chunks(
        q, t, grown.k.astype(dtype), grown.v.astype(dtype), grown.reps, rotate, options,
        impl=impl, scale=scale, key=key,
    )[0]  # fmt: skip
    y = run(options)
    if options.start > options.window:  # tokens that see more chunks than later ones
        whole = run(dataclasses.replace(options, window=options.start))
        y = jnp.where((t < options.start)[..., None, None], whole, y)
    if valid is not None:
        y = jnp.where(valid[..., None, None], reorder(y, back), 0)
    return y, grown


def to_front(valid: Array) -> tuple[Array, Array]:
    """Indices [B,T] that bring the valid tokens of each row to its front, in order, and back."""
    order = jnp.argsort(~valid, axis=1, stable=True)
    return order, jnp.argsort(order, axis=1)


def reorder(x: Array, order: Array) -> Array:
    """x [B,T,H,D] with its tokens taken in another order."""
    return jnp.take_along_axis(x, order[..., None, None], axis=1)


def _complete(slots, q, k, v, count, rotate, options, scale) -> Slots:
    """The slots with new tokens, and with the vectors of the chunks that they complete."""
    chunk, num_new = options.chunk, q.shape[1]
    size = (-(-num_new // chunk) + 1) * chunk
    put = jax.vmap(lambda x, new, i: jax.lax.dynamic_update_slice_in_dim(x, new, i, axis=0))
    cut = jax.vmap(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, chunk, axis=0))
    running, filled = slots.length // chunk, slots.length % chunk

    def region(held: Array, new: Array) -> Array:
        """The running chunk [B,w,...] and the new tokens behind what it holds."""
        tail = ((0, 0), (0, size - chunk), (0, 0), (0, 0))
        return put(jnp.pad(held.astype(new.dtype), tail), new, filled)

    queries = region(slots.q, q)
    done = jnp.arange(1, size // chunk) * chunk <= (filled + count)[:, None]  # [B,size/w - 1]

    def add(reps: Array) -> Array:
        held = size - chunk
        place = jnp.arange(held) % chunk
        part = lambda old, new: region(cut(old, running * chunk), new)[:, :held]
        turned = rotate_at(rotate, queries[:, :held], place)
        keys, values = part(slots.k, k), part(slots.v, v)
        new = represent(turned, keys, values, chunk, None, options, scale)
        index = running[:, None] + jnp.arange(done.shape[1])
        index = jnp.where(done, index, reps.shape[1])
        return jax.vmap(lambda x, i, y: x.at[i].set(y, mode="drop"))(reps, index, new)

    write = lambda old, new: put(old, new.astype(old.dtype), slots.length)
    return Slots(
        write(slots.k, k),
        write(slots.v, v),
        jax.lax.cond(done.any(), add, lambda reps: reps, slots.reps),
        cut(queries, (filled + count) // chunk * chunk).astype(slots.q.dtype),
        slots.length + count,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LongHeadsCache:
    """A layer's cache for decoding with LongHeads.

    Attributes:
      slots: the arrays.
      options: chunk, window and the rest.
      max_len: tokens the cache was made for.
    """

    slots: Slots
    options: LongHeadsOptions = dataclasses.field(metadata={"static": True})
    max_len: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def init(
        cls,
        batch_size: int,
        max_len: int,
        num_heads: int,
        head_dim: int,
        *,
        chunk_size: int,
        window: int,
        begin: int | None = None,
        num_kv_heads: int | None = None,
        dtype: Any = jnp.float32,
        **options: Any,
    ) -> LongHeadsCache:
        """An empty cache for `max_len` tokens; `options` are those of `LongHeadsOptions`."""
        given = LongHeadsOptions(chunk_size, window, begin, **options)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        slots = init_slots(given, batch_size, max_len, num_heads, kv_heads, head_dim, dtype)
        return cls(slots, given, max_len)

    @property
    def length(self) -> Array:
        """[B] int32, tokens held."""
        return self.slots.length

    @property
    def num_complete(self) -> Array:
        """[B] int32, chunks that have a vector."""
        return self.length // self.options.chunk

    def prefill(
        self, q: Array, k: Array, v: Array, rotate: Rotate, *, scale: float | None = None
    ) -> tuple[Array, LongHeadsCache]:
        """T more tokens: y [B,T,H,D], as `longheads_attention` gives for them, and the new cache.

        Args:
          q: [B,T,H,D], k: [B,T,K,D], v: [B,T,K,D], unrotated.
          rotate: (x [B,T,H,D], positions [B,T,H]) -> x.
          scale: factor on q.k; None = 1/sqrt(D).
        Raises:
          ValueError: more tokens than the cache was made for (where the length is known), or heads
            other than the cache's.
        """
        check_arrays(q, k, v)
        check_rotate(rotate, q.shape[-1])
        used = 0 if is_traced(self.length) else int(np.max(self.length))
        if used + q.shape[1] > self.max_len:
            raise ValueError(
                f"the cache was made for {self.max_len} tokens and holds {used}: no room for "
                f"{q.shape[1]} more; make it longer with LongHeadsCache.init."
            )
        heads = (self.slots.q.shape[2], self.slots.k.shape[2])
        if (q.shape[2], k.shape[2]) != heads:
            raise ValueError(
                f"q and k have {q.shape[2]} and {k.shape[2]} heads, the cache {heads[0]} and "
                f"{heads[1]}."
            )
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        impl = "gather" if self.options.impl == "auto" else self.options.impl
        y, slots = extend(self.slots, q, k, v, rotate, self.options, impl=impl, scale=scale)
        return y, dataclasses.replace(self, slots=slots)

    def decode_step(
        self, q: Array, k: Array, v: Array, rotate: Rotate, *, scale: float | None = None
    ) -> tuple[Array, LongHeadsCache]:
        """One more token, [B,1,...] each: y [B,1,H,D] and the new cache; see `prefill`."""
        if q.shape[1] != 1:
            raise ValueError(f"q has {q.shape[1]} tokens; a step takes one, prefill takes many.")
        return self.prefill(q, k, v, rotate, scale=scale)


def check_rotate(rotate: Rotate | None, head_dim: int) -> None:
    """Raise for a rotation that is missing or, where that can be seen, ignores positions."""
    hint = "LongHeads gives keys new positions, so the model needs rotary ones (RoPE)."
    if rotate is None:
        raise ValueError(f"rotate is None: {hint}")
    if not jax.sharding.get_abstract_mesh().empty:
        return  # its devices may be of a machine that is only compiled for
    with jax.ensure_compile_time_eval():
        x = jnp.ones((1, 2, 1, head_dim), jnp.float32)
        turned = rotate(x, jnp.arange(2, dtype=jnp.int32)[None, :, None])
    if not is_traced(turned) and np.ptp(np.asarray(turned), axis=1).max() < 1e-6:
        raise ValueError(f"rotate gives positions 0 and 1 the same result: {hint}")
