"""The decode cache of CCA-attention: core tokens, and the newest s + g - 1 exact ones.

    2 D (C ceil(L/g) + K (s + g - 1)) numbers a row and layer,  instead of 2 D K L

New tokens, one or many, are laid out behind the exact ones. Groups that they finish are pooled with
the queries of their last tokens, and one softmax goes over held cores, new cores and exact tokens:
the parallel form, whatever the size of the pieces.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.attention.cca_parts import attend_parts, check_heads
from jaxheads.attention.cca_pooling import (
    NOWHERE,
    CCAOptions,
    Cores,
    Places,
    Rotate,
    places,
    pool_found,
)
from jaxheads.typing import Array, PyTree, is_traced


class Slots(NamedTuple):
    """What one layer keeps between calls; the batch is the first axis of every array."""

    core_k: Array
    """[B,ceil(max_len/g),C,D] of the newest document, from its first group on."""
    core_v: Array
    window_k: Array
    """[B,R,K,D] the newest R tokens in order, rotated."""
    window_v: Array
    begin: Array
    """[B] int32: the slot of the first token of the newest document."""
    segment: Array
    """[B] int32: its id; 0 after padding and in an empty cache."""


def init_slots(
    options: CCAOptions,
    batch_size: int,
    max_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype,
) -> Slots:
    """Empty slots for `max_len` tokens."""
    check_heads(num_heads, num_kv_heads)
    heads = num_kv_heads if options.gqa_pool == "mean" else num_heads
    core = jnp.zeros((batch_size, -(-max_len // options.group_size), heads, head_dim), dtype)
    exact = (batch_size, min(options.reach, max_len), num_kv_heads, head_dim)
    window, number = jnp.zeros(exact, dtype), jnp.zeros(batch_size, jnp.int32)
    return Slots(core, core, window, window, number, number)


def slot_axes() -> PyTree:
    """The logical axes of every array of `Slots`."""
    tokens = ("batch", None, "act_kv_heads", None)
    return Slots(*(tokens,) * 4, ("batch",), ("batch",))  # type: ignore[arg-type]


def extend(
    q: Array,
    k: Array,
    v: Array,
    slots: Slots,
    length: Array,
    segment_ids: Array,
    options: CCAOptions,
    scale: float,
    rotate: Rotate | None = None,
) -> tuple[Array, Array, Slots]:
    """T new tokens over what `slots` hold and over each other.

    Args:
      q: [B,T,H,D], k: [B,T,K,D], v: [B,T,K,W] of the new tokens, rotated.
      slots: of the `length` tokens before.
      length: int32 scalar.
      segment_ids: [B,T]; a run of one id is a document, 0 is padding.
      options: as the slots were made for.
      scale: factor on q.k.
      rotate: for ``rope="group_end"``.
    Returns:
      z [B,T,H,W], lse [B,H,T], and the slots with the new tokens.
    """
    num_held, size, num_new = slots.window_k.shape[1], options.group_size, q.shape[1]
    join = lambda held, new: jnp.concatenate([held.astype(new.dtype), new], axis=1)
    keys, values = join(slots.window_k, k), join(slots.window_v, v)
    first = length - num_held  # the slot of the first token laid out
    token = first + jnp.arange(num_held)
    held_ids = jnp.where(token >= slots.begin[:, None], slots.segment[:, None], 0)
    where = places(join(held_ids, segment_ids), size, jnp.maximum(first - slots.begin, 0))
    rest = Places(*(x[:, num_held:] for x in where))

    done = (length - slots.begin) // size  # [B] groups held
    base = (where.index[:, num_held - 1] - (length - 1 - slots.begin)) // size
    number = jnp.arange(slots.core_k.shape[1])
    is_held = number < done[:, None]
    held = Cores(
        slots.core_k.astype(q.dtype),
        slots.core_v.astype(q.dtype),
        jnp.where(is_held, base[:, None] + number, NOWHERE),
        jnp.where(is_held, where.run[:, num_held - 1 : num_held], 0),
    )
    found = pool_found(q, keys, values, where, options, scale, rotate)
    new = found.cores
    # A core is seen s tokens after its group at the earliest.
    cores = [held, new] if num_new > options.window_size else [held]
    z, lse = attend_parts(q, keys, values, cores, options, scale, rest, where)

    is_newest = (new.run == where.run[:, -1:]) & (new.run != 0)
    slot = jnp.where(is_newest, found.number, NOWHERE)
    rows = jnp.arange(q.shape[0])[:, None]
    put = lambda old, x: old.at[rows, slot].set(x.astype(old.dtype), mode="drop")
    grown = Slots(
        put(slots.core_k, new.k),
        put(slots.core_v, new.v),
        keys[:, num_new:].astype(slots.window_k.dtype),
        values[:, num_new:].astype(slots.window_v.dtype),
        (first + where.begin[:, -1]).astype(jnp.int32),
        segment_ids[:, -1].astype(jnp.int32),
    )
    return z, lse, grown


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CCACache:
    """A layer's cores and newest tokens, with the number of tokens behind them.

    Attributes:
      slots: the arrays.
      length: int32 scalar, tokens so far.
      options: group and window size, pooling, boundary.
      max_len: tokens the cache was made for.
      num_heads: H.
    """

    slots: Slots
    length: Array
    options: CCAOptions = dataclasses.field(metadata={"static": True})
    max_len: int = dataclasses.field(metadata={"static": True})
    num_heads: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def init_cache(
        cls,
        batch_size: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        group_size: int,
        window_size: int,
        num_heads: int | None = None,
        pool_func: str = "cca",
        gqa_pool: str = "mean",
        boundary: str = "disjoint",
        seed: int = 0,
        dtype=jnp.float32,
    ) -> CCACache:
        """An empty cache for `max_len` tokens; `num_heads`: H, by default K.

        Raises:
          ValueError: options or sizes that do not fit.
        """
        options = CCAOptions(group_size, window_size, pool_func, gqa_pool, boundary, seed=seed)
        if max_len < 1:
            raise ValueError(f"max_len={max_len} must be at least 1.")
        heads = num_kv_heads if num_heads is None else num_heads
        slots = init_slots(options, batch_size, max_len, heads, num_kv_heads, head_dim, dtype)
        return cls(slots, jnp.int32(0), options, max_len, heads)

    def prefill(
        self, q: Array, k: Array, v: Array, *, segment_ids: Array | None = None
    ) -> tuple[Array, CCACache]:
        """T more tokens: (y [B,T,H,W], the cache with them). Pieces may have any size.

        Args:
          q: [B,T,H,D], k: [B,T,K,D], v: [B,T,K,W] rotated.
          segment_ids: [B,T], 0 for padding; None: one document.
        Raises:
          ValueError: other shapes than the cache's, or more tokens than it was made for (where the
            length is known).
        """
        self._check(q, k, v)
        if segment_ids is None:
            segment_ids = jnp.ones(q.shape[:2], jnp.int32)
        scale = 1 / math.sqrt(q.shape[-1])
        y, _, slots = extend(q, k, v, self.slots, self.length, segment_ids, self.options, scale)
        return y, dataclasses.replace(self, slots=slots, length=self.length + q.shape[1])

    def decode_step(self, q: Array, k: Array, v: Array) -> tuple[Array, CCACache]:
        """One more token: `prefill` of q [B,1,H,D], k and v [B,1,K,D]."""
        if q.shape[1] != 1:
            raise ValueError(f"decode_step takes one token, q has {q.shape[1]}; use prefill.")
        return self.prefill(q, k, v)

    def _check(self, q: Array, k: Array, v: Array) -> None:
        window, num_new = self.slots.window_k, q.shape[1]
        wanted = (window.shape[0], num_new, *window.shape[2:])
        if k.shape != wanted or v.shape != wanted or q.shape != (
            *wanted[:2], self.num_heads, wanted[3]
        ):  # fmt: skip
            raise ValueError(
                f"q {q.shape}, k {k.shape} and v {v.shape} do not fit the cache, which takes "
                f"{self.num_heads} query heads and k and v of {wanted}."
            )
        needed = min(self.options.reach, self.max_len)
        if window.shape[1] < needed:
            raise ValueError(
                f"the cache holds {window.shape[1]} exact tokens and window_size="
                f"{self.options.window_size}, group_size={self.options.group_size} need {needed}; "
                "make it with init_cache."
            )
        if not is_traced(self.length) and int(self.length) + num_new > self.max_len:
            raise ValueError(
                f"the cache was made for {self.max_len} tokens and holds {int(self.length)}: no "
                f"room for {num_new} more; make it longer with init_cache."
            )


init_cache = CCACache.init_cache
prefill = CCACache.prefill
decode_step = CCACache.decode_step
