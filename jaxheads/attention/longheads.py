"""LongHeads: long context for trained RoPE models, without training.

The past is cut into chunks of w tokens. Every query of every head reads n of them, the first, its
own, the one before and those whose vectors fit the query best, as if they stood side by side: no
position exceeds what the model was trained on, and a token costs the same wherever it is. One head
sees little; heads and layers choose differently, and together they cover the text.

    y, info = longheads_attention(q, k, v, rotate, chunk_size=256, window=2048)

`LongHeadsCache` decodes; `longheads_variant.py` puts it into a decoder:

    long = models.with_config(model, attention="longheads(window=2048,chunk=256)")

Differences from the released code, which is for one text and no grouped queries: prefill includes
the query's own key (`include_self`), and prefill and decode follow one rule of selection.
Lu et al., 2024, arXiv:2402.10685.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.attention.api import attention, check_arrays, platform
from jaxheads.attention.contract import Rotate
from jaxheads.attention.longheads_cache import LongHeadsCache, check_rotate
from jaxheads.attention.longheads_chunks import (
    IMPLS,
    LongHeadsOptions,
    attend_chunks,
    check_room,
    pick,
    represent,
    rotate_at,
    score,
)
from jaxheads.typing import Array, is_traced

__all__ = [
    "IMPLS",
    "LongHeadsCache",
    "LongHeadsInfo",
    "LongHeadsOptions",
    "chunk_representations",
    "longheads_attention",
    "select_chunks",
]


class LongHeadsInfo(NamedTuple):
    """What `longheads_attention` did."""

    chunks: Array
    """[B,T,H,n] int32: the chunks each query of each head reads, ascending, -1 where it reads
    fewer than n. Queries that see more than n chunks (`begin` beyond the window) have -1 only."""
    positions: Array
    """[T] int32: the position each query is rotated to, the highest it uses."""

    @property
    def max_position(self) -> Array:
        """int32 scalar, the highest position of any query or key."""
        return self.positions.max()


def chunk_representations(
    q: Array,
    k: Array,
    v: Array,
    rotate: Rotate,
    *,
    chunk_size: int,
    valid: Array | None = None,
    repr: str = "longheads",
    repr_per: str = "query",
    scale: float | None = None,
) -> Array:
    """One vector per complete chunk and query head.

        O = softmax(scale Q K^T) V            inside the chunk, without causality
        a = mean of the rows of O
        rep = softmax(scale a K^T) K          Q, K rotated by their places in the chunk

    a lies in the space of values and is used as a query: that is the method.

    Args:
      q: [B,T,H,D] unrotated queries.
      k: [B,T,K,D] unrotated keys.
      v: [B,T,K,D] values.
      rotate: (x [B,T,H,D], positions [B,T,H]) -> x.
      chunk_size: w.
      valid: [B,T] bool, real tokens, which come first; None: all. Others count neither as keys nor
        in the mean, and a chunk without any has a vector of zeros.
      repr: "longheads", "mean_key" (the mean of the rotated keys) or "mean_output" (a).
      repr_per: "query", or "kv" for the mean query of each group of heads.
      scale: factor on q.k; None = 1/sqrt(D).
    Returns:
      [B,G,H,D] float32, G = T // w.
    Raises:
      ValueError: shapes that do not fit; padding in front (chunks begin at the first real token).
    """
    check_arrays(q, k, v)
    options = LongHeadsOptions(chunk_size, 4 * chunk_size, repr=repr, repr_per=repr_per)
    check_rotate(rotate, q.shape[-1])
    if valid is not None and not is_traced(valid):
        real = np.asarray(valid)
        if real.shape != q.shape[:2]:
            raise ValueError(f"valid has shape {real.shape}, needed [B,T] = {q.shape[:2]}.")
        if (real[:, 1:] > real[:, :-1]).any():
            raise ValueError(
                "valid has padding before real tokens; chunks begin at the first real token, so "
                "move the padding to the end of each row."
            )
    length = q.shape[1] // chunk_size * chunk_size
    place = jnp.arange(length) % chunk_size
    q, k = (rotate_at(rotate, x[:, :length], place) for x in (q, k))
    valid = None if valid is None else jnp.asarray(valid)[:, :length]
    return represent(q, k, v[:, :length], chunk_size, valid, options, _scale(q, scale))


def select_chunks(
    q: Array,
    reps: Array,
    chunk_of_query: Array,
    *,
    num_chunks: int,
    num_sink: int = 1,
    num_recent: int = 2,
) -> Array:
    """The chunks that each query of each head reads.

        {0 .. num_sink-1} + {c-num_recent+1 .. c} + the best others by q . rep

    A query whose chunk c is below `num_chunks` reads all chunks up to it. Ties go to the earlier
    chunk.

    Args:
      q: [B,T,H,D] queries, neither rotated nor scaled.
      reps: [B,G,H,D] from `chunk_representations`.
      chunk_of_query: [T] or [B,T], c of each query.
      num_chunks: n.
      num_sink: first chunks that are always read.
      num_recent: last chunks that are always read, c included.
    Returns:
      [B,T,H,n] int32, ascending; -1 fills the end where a query reads fewer.
    Raises:
      ValueError: fewer than num_sink + num_recent chunks; exactly as many warn.
    """
    check_room(num_chunks, num_sink, num_recent)
    chunk_of_query = jnp.asarray(chunk_of_query)
    return pick(score(q, reps), chunk_of_query, num_chunks, num_sink, num_recent)


def longheads_attention(
    q: Array,
    k: Array,
    v: Array,
    rotate: Rotate,
    *,
    chunk_size: int,
    window: int,
    begin: int | None = None,
    include_self: bool = True,
    impl: str = "auto",
    scale: float | None = None,
    key: Array | None = None,
    **options: Any,
) -> tuple[Array, LongHeadsInfo]:
    """Causal attention of each head over the chunks it selects, re-numbered.

        y_t = softmax(scale rot(q_t, (n_t-1) w + r) . rot(k_p, p)) v_p

    over the n_t chunks of `select_chunks` in order, p counting their tokens from 0, of the own
    chunk only those up to the query (t = c w + r). Tokens before `begin` attend to everything.

    Args:
      q: [B,T,H,D] unrotated queries.
      k: [B,T,K,D] unrotated keys; K divides H.
      v: [B,T,K,D] values.
      rotate: (x [B,T,H,D], positions [B,T,H]) -> x; a rotation in which scores depend on the
        difference of positions.
      chunk_size: w.
      window: A = n w, at most the length the model was trained on.
      begin: S0, a multiple of w; None: A.
      include_self: False hides each query's own key from it, as the released prefill does.
      impl: "gather" (O(T A) operations), "masked" (O(T^2) operations, no gathers of keys), or
        "auto": gather on CPU.
      scale: factor on q.k; None = 1/sqrt(D).
      key: for `at_random`.
      options: num_sink, num_recent, repr, repr_per, at_random of `LongHeadsOptions`.
    Returns:
      y [B,T,H,D] in the dtype of q, and `LongHeadsInfo`.
    Raises:
      ValueError: sizes that do not fit each other, `rotate` that ignores positions.
    Example:
      >>> from functools import partial
      >>> from jaxheads.attention import rotate
      >>> turn = partial(rotate, inv_freq=jnp.ones(4), interleaved=False)
      >>> q = k = v = jnp.ones((1, 64, 2, 8))
      >>> run = jax.jit(partial(longheads_attention, rotate=turn, chunk_size=4, window=16))
      >>> y, info = run(q, k, v)
      >>> y.shape, int(info.max_position)
      ((1, 64, 2, 8), 15)
    """
    check_arrays(q, k, v)
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} tokens and k {k.shape[1]}; LongHeads reads the queries of all "
            "tokens. New tokens over old ones go through LongHeadsCache."
        )
    given = LongHeadsOptions(
        chunk_size, window, begin, include_self=include_self, impl=impl, **options
    )
    check_rotate(rotate, q.shape[-1])
    length, scale = q.shape[1], _scale(q, scale)
    place = jnp.arange(length)
    with jax.named_scope("attention.longheads"):
        begin = min(length, given.start)
        parts = []
        if begin:
            turn = lambda x: rotate_at(rotate, x[:, :begin], place[:begin])
            parts.append(attention(turn(q), turn(k), v[:, :begin], scale=scale))
        keys = rotate_at(rotate, k, place % chunk_size)
        complete = length // chunk_size * chunk_size
        queries = rotate_at(rotate, q[:, :complete], place[:complete] % chunk_size)
        cut = lambda x: x[:, :complete]
        reps = represent(queries, cut(keys), cut(v), chunk_size, None, given, scale)
        if begin < length:
            more = ((0, 0), (0, -length % chunk_size), (0, 0), (0, 0))
            t = jnp.broadcast_to(place[begin:], (q.shape[0], length - begin))
            blocks = jnp.pad(keys, more), jnp.pad(v, more)
            name = choose_impl(given, length)
            y, chunks = attend_chunks(
                q[:, begin:], t, *blocks, reps, rotate, given, impl=name, scale=scale, key=key
            )
            parts.append(y)
        every = jnp.arange(given.num_chunks)
        c = place[:begin, None] // chunk_size
        seen = jnp.where((every <= c) & (c < given.num_chunks), every, -1)[:, None]  # [S0,1,n]
        shape = (q.shape[0], begin, q.shape[2], given.num_chunks)
        seen = jnp.broadcast_to(seen, shape).astype(jnp.int32)
        chunks = jnp.concatenate([seen, chunks], axis=1) if begin < length else seen
    moved = jnp.minimum(place // chunk_size, given.num_chunks - 1) * chunk_size + place % chunk_size
    positions = jnp.where(place < begin, place, moved).astype(jnp.int32)
    return jnp.concatenate(parts, axis=1), LongHeadsInfo(chunks, positions)


def choose_impl(options: LongHeadsOptions, num_queries: int) -> str:
    """The implementation that "auto" means here: few gathered keys, or no gathers."""
    if options.impl != "auto":
        return options.impl
    return "gather" if num_queries == 1 or platform() == "cpu" else "masked"


def _scale(q: Array, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale
