"""Reading an unbounded past: complete blocks in a ring, of which a query reads a few.

Texts come in chunks. Every query (or head, or chunk) scores the landmarks of the cached blocks and
reads the `top_k` best, whole, beside the running block and the chunk; `landmark_attention` over
those gives the output. Keys are held unrotated and take new positions every time: the `top_k`
latest blocks stand before the running one, whatever older block is read stands behind them, and no
position exceeds (top_k + 1)(l + 1) + the running block and the chunk.

    cache = init(batch, num_blocks, num_kv_heads, head_dim, block_size=50)
    y, cache, info = attend_chunk(cache, q, k, v, is_landmark, 4, "max_over_tokens", rotate=rotate)

Landmarks stand after every l tokens, counted from the first token ever fed. Rows of a batch may be
of different lengths. Mohtashami and Jaggi, 2023, arXiv:2305.16300.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.attention.api import check_arrays
from jaxheads.attention.contract import Rotate
from jaxheads.attention.host_memory import AXES, HostBlocks, fetch, host_blocks, store
from jaxheads.attention.landmark import group_heads
from jaxheads.attention.landmark_blocks import attend_once, regular_masks, take_apart
from jaxheads.attention.landmark_tokens import check_block_size
from jaxheads.attention.longheads_cache import check_rotate, reorder, to_front
from jaxheads.attention.longheads_chunks import rotate_at
from jaxheads.attention.masks import penalty
from jaxheads.fields import unknown
from jaxheads.typing import Array, is_traced

POLICIES = ("per_token_and_head", "max_over_heads", "max_over_tokens")


class LandmarkCache(NamedTuple):
    """One layer's cache; a pytree whose M and l are the shapes of its arrays.

    The batch is the first axis of every array.
    """

    k: Array | HostBlocks
    """[B,M,l+1,K,D] unrotated keys of complete blocks, a landmark last; block n at n % M. Or in
    host memory."""
    v: Array | HostBlocks
    """[B,M,l+1,K,D]"""
    tail_k: Array
    """[B,l+1,K,D] unrotated keys of the running block; zeros beyond its tokens."""
    tail_v: Array
    """[B,l+1,K,D]"""
    num_complete: Array
    """[B] int32, blocks completed since the beginning; the last M of them are held."""
    num_tail: Array
    """[B] int32, tokens of the running block, 0 to l."""
    landmarks: Array | None = None
    """[B,M,K,D] the keys of landmarks, where blocks are in host memory."""

    @property
    def num_blocks(self) -> int:
        """M, blocks the cache can hold."""
        return self.k.num_blocks if isinstance(self.k, HostBlocks) else self.k.shape[1]

    @property
    def block_size(self) -> int:
        """l, text tokens of a block."""
        return self.tail_k.shape[1] - 1

    @property
    def num_held(self) -> Array:
        """[B] int32, blocks held."""
        return jnp.minimum(self.num_complete, self.num_blocks)


class ChunkInfo(NamedTuple):
    """What `attend_chunk` did."""

    blocks: Array
    """[B,H or 1,T or 1,k] int32: the blocks read, counted from the first token ever fed, in their
    order; -1 in front where fewer were held. Axes of size 1 where all share a set."""
    max_position: Array
    """[B] int32, the highest position of any query or key."""


CACHE_AXES: Any = LandmarkCache(
    *cast(
        Any,
        (
            *(("batch", None, None, "act_kv_heads", None),) * 2,
            *(("batch", None, "act_kv_heads", None),) * 2,
            ("batch",),
            ("batch",),
        ),
    )
)
"""The logical axes of every array."""
OFFLOADED_AXES: Any = CACHE_AXES._replace(
    k=AXES, v=AXES, landmarks=("batch", None, "act_kv_heads", None)
)
"""The same with blocks in host memory; of one layer."""


class Stingy(NamedTuple):
    """Positions of what a query may read."""

    landmarks: np.ndarray
    """[nb] positions at which the landmarks of the cached blocks are scored, oldest first."""
    start: int
    """The position of the running block's first token."""


def stingy_positions(nb: int, top_k: int, block_size: int) -> Stingy:
    """Positions by which few reach far.

    The min(top_k, nb) latest of nb blocks stand where they are, just before the running block; all
    older ones share the first place:

        place of a block of age a = p - 1 - min(a, top_k),   p = min(nb, top_k + 1)

    in periods of block_size + 1; the running block begins at p.

    Example:
      >>> stingy_positions(5, 2, 3)
      Stingy(landmarks=array([ 3,  3,  3,  7, 11]), start=12)
    """
    _check_top_k(top_k)
    check_block_size(block_size)
    if nb < 0:
        raise ValueError(f"nb={nb} blocks must be at least 0.")
    age = np.arange(nb)[::-1]
    place = min(nb, top_k + 1) - 1 - np.minimum(age, top_k)
    period = block_size + 1
    return Stingy(place * period + block_size, min(nb, top_k + 1) * period)


def init(
    batch_size: int,
    num_blocks: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    block_size: int,
    dtype: Any = jnp.float32,
    offload: bool = False,
) -> LandmarkCache:
    """An empty cache.

    Args:
      num_blocks: M; the oldest block makes room for a new one.
      block_size: l.
      offload: keep blocks in host memory, all but the keys of landmarks; for "max_over_tokens".
    Raises:
      ValueError: a cache without blocks.
    """
    check_block_size(block_size)
    if num_blocks < 1:
        raise ValueError(f"num_blocks={num_blocks} leaves no past to read; give at least 1.")
    row = (num_kv_heads, head_dim)
    tail = jnp.zeros((batch_size, block_size + 1, *row), dtype)
    none = jnp.zeros(batch_size, jnp.int32)
    if offload:
        shape = (batch_size, num_blocks, num_kv_heads, block_size + 1, head_dim)
        k, v = (host_blocks(shape, dtype).of_layer(0) for _ in "kv")
        landmarks = jnp.zeros((batch_size, num_blocks, *row), dtype)
        return LandmarkCache(k, v, tail, tail, none, none, landmarks)
    blocks = jnp.zeros((batch_size, num_blocks, block_size + 1, *row), dtype)
    return LandmarkCache(blocks, blocks, tail, tail, none, none)


def retrieve(
    cache: LandmarkCache,
    q: Array,
    top_k: int,
    policy: str,
    *,
    rotate: Rotate,
    scale: float | None = None,
    valid: Array | None = None,
    key: Array | None = None,
) -> Array:
    """The blocks that the tokens of a chunk read.

        gamma = softmax over cached blocks of scale q . landmark's key

    and the top_k largest of it, of its maximum over heads, or of that over the chunk's tokens.
    Equal scores go to the later block.

    Args:
      cache: before the chunk.
      q: [B,T,H,D] unrotated queries.
      top_k: blocks to read; all that are held where they are fewer.
      policy: a name of `POLICIES`.
      rotate: (x [B,T,H,D], positions [B,T,H]) -> x.
      scale: factor on q.k; None = 1/sqrt(D).
      valid: [B,T] bool, real tokens, which come first; others have no say in "max_over_tokens".
      key: draw blocks at random instead (a control).
    Returns:
      `ChunkInfo.blocks`.
    Raises:
      ValueError: top_k below 1, an unknown policy, one that blocks in host memory do not allow.
    """
    _check_top_k(top_k)
    if policy not in POLICIES:
        raise ValueError(unknown("policy", policy, POLICIES))
    if isinstance(cache.k, HostBlocks):
        check_offload(policy)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    count = min(top_k, cache.num_blocks)
    age = jnp.arange(cache.num_blocks, dtype=jnp.int32)
    last, held = cache.num_complete[:, None] - 1, cache.num_held[:, None]
    ring = (last - age) % cache.num_blocks  # [B,M], the latest block first
    landmarks: Any = cast(Any, cache.k)[:, :, -1] if cache.landmarks is None else cache.landmarks
    keys = jnp.take_along_axis(landmarks, ring[..., None, None], axis=1)  # [B,M,K,D]
    start = jnp.minimum(held, count + 1)
    period = cache.block_size + 1
    place = jnp.maximum(start - 1 - jnp.minimum(age, count), 0)
    keys = rotate_at(rotate, keys.astype(q.dtype), place * period + cache.block_size)
    q = rotate_at(rotate, q, _query_positions(cache, q.shape[1], start * period))
    scores = scale * jnp.einsum(
        "btkgd,bmkd->bkgtm",
        group_heads(q, keys.shape[2]),
        keys,
        preferred_element_type=jnp.float32,
    )
    scores = scores.reshape(scores.shape[0], -1, *scores.shape[3:])  # [B,H,T,M]
    exists = (age < held)[:, None, None]
    gamma = jax.nn.softmax(scores.astype(jnp.float32) + penalty(exists), axis=-1)
    if key is not None:
        gamma = jax.random.uniform(key, gamma.shape)
    gamma = jnp.where(exists, jax.lax.stop_gradient(gamma), -1.0)
    if valid is not None:
        gamma = jnp.where(valid[:, None, :, None], gamma, -1.0)
    axis = {"max_over_heads": 1, "max_over_tokens": 2}.get(policy)
    gamma = gamma if axis is None else gamma.max(axis=axis, keepdims=True)
    best = jax.lax.top_k(gamma, count)[1]  # ages; the lower one of equals
    blocks = jnp.where(best < held[..., None, None], last[..., None, None] - best, -1)
    return jnp.sort(blocks, axis=-1).astype(jnp.int32)


def attend_chunk(
    cache: LandmarkCache,
    q: Array,
    k: Array,
    v: Array,
    is_landmark: Array | None,
    top_k: int,
    policy: str,
    *,
    rotate: Rotate,
    scale: float | None = None,
    valid: Array | None = None,
    max_position: int | None = None,
) -> tuple[Array, LandmarkCache, ChunkInfo]:
    """T new tokens over what they retrieve, the running block, and each other.

    A retrieved block of rank r (0: oldest) stands in place r, or r + 1 if it is one of the top_k
    latest and there are older ones (`stingy_positions`). With top_k of at least all blocks this is
    `landmark_attention` over the whole text.

    Args:
      cache: of the tokens before.
      q: [B,T,H,D], k: [B,T,K,D], v: [B,T,K,D], unrotated.
      is_landmark: [B,T] bool: after every l tokens, counting on over chunks; None: take it so. Rows
        that differ are an error, or NaN where this is known only at run time.
      top_k, policy, rotate, scale: as in `retrieve`.
      valid: [B,T] bool, real tokens, which come first in each row; others are not kept and get 0.
      max_position: raise if positions could exceed this, such as the trained length - 1.
    Returns:
      y [B,T,H,D] in the dtype of q, the cache with the new tokens, and `ChunkInfo`.
    Raises:
      ValueError: shapes that do not fit the cache, bad options, a chunk that is too long.
    """
    check_arrays(q, k, v)
    check_rotate(rotate, q.shape[-1])
    _check_chunk(cache, q, k, top_k, max_position)
    batch, num_new = q.shape[:2]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    period, wrong = cache.block_size + 1, None
    if is_landmark is not None:
        if jnp.shape(is_landmark) != (batch, num_new):
            raise ValueError(
                f"is_landmark has shape {jnp.shape(is_landmark)}, needed {(batch, num_new)}."
            )
        place = cache.num_tail[:, None] + jnp.arange(num_new)
        wrong = is_landmark != (place % period == period - 1)
        wrong = (wrong if valid is None else wrong & valid).any(axis=1)
        if not is_traced(wrong) and np.any(wrong):
            raise ValueError(
                f"is_landmark of row {int(np.argmax(wrong))} does not continue blocks of "
                f"{cache.block_size} tokens and a landmark; insert_landmarks takes the phase."
            )
    blocks = retrieve(cache, q, top_k, policy, rotate=rotate, scale=scale, valid=valid)
    y, grown, highest = _attend(cache, q, k, v, blocks, rotate, scale, valid)
    if wrong is not None:
        y = jnp.where(wrong[:, None, None, None], jnp.nan, y)
    return y, grown, ChunkInfo(blocks, highest)


def _attend(
    cache: LandmarkCache, q, k, v, blocks: Array, rotate: Rotate, scale: float, valid: Array | None
) -> tuple[Array, LandmarkCache, Array]:
    """y [B,T,H,D], the new cache, and the highest position [B]."""
    batch, num_new, _, width = q.shape
    kv_heads, period, count = k.shape[2], cache.block_size + 1, blocks.shape[-1]
    dtype = q.dtype
    if valid is None:
        new = jnp.full(batch, num_new, jnp.int32)
    else:
        new = valid.sum(axis=1, dtype=jnp.int32)
        k, v = (jnp.where(valid[..., None, None], x, 0) for x in (k, v))
    num_near = -(-(cache.block_size + num_new) // period)
    near_k, near_v = (_join(*x, cache.num_tail, num_near * period) for x in
                      ((cache.tail_k, k), (cache.tail_v, v)))  # fmt: skip

    held = cache.num_held[:, None]
    start = jnp.minimum(held, count + 1) * period
    places = _query_positions(cache, num_new, start)  # [B,T]
    queries = group_heads(rotate_at(rotate, q, places), kv_heads)
    cache, far_k, far_v, axes = _gather(cache, blocks, kv_heads)
    far_k = _rotate_blocks(rotate, far_k.astype(dtype), _places(cache, blocks), period)
    far = scale * jnp.einsum(
        f"btkgd,{axes}rpd->bkgtrp", queries, far_k, preferred_element_type=jnp.float32
    )
    keys = rotate_at(rotate, near_k.astype(dtype), start + jnp.arange(num_near * period))
    near = scale * jnp.einsum("btkgd,bskd->bkgts", queries, keys,
                              preferred_element_type=jnp.float32)  # fmt: skip
    near = near.reshape(*near.shape[:-1], num_near, period)

    is_far, sees = regular_masks(places - start, jnp.arange(num_near), period)  # [B,T,m(,P)]
    exists = jnp.broadcast_to(  # [B,1|H,1|T,k] -> [B,H,T,k]
        blocks >= 0, (batch, q.shape[2], num_new, count)
    ).reshape(*near.shape[:4], count)
    shape = (*near.shape[:4], num_near)
    is_far = jnp.broadcast_to(is_far[:, None, None], shape)
    sees = jnp.broadcast_to(sees[:, None, None], (*shape, period))
    join = lambda a, b: jnp.concatenate([a, b], axis=4)
    parts = take_apart(
        join(far, near).astype(jnp.float32),
        join(jnp.broadcast_to(exists[..., None], far.shape), sees),
        join(jnp.ones_like(exists), is_far),
    )
    weights = attend_once(parts).astype(dtype)  # [B,K,G,T,k+m,l]
    y = jnp.einsum(
        f"bkgtrl,{axes}rld->btkgd", weights[..., :count, :], far_v[..., :-1, :].astype(dtype),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    cut = near_v.astype(dtype).reshape(batch, num_near, period, kv_heads, width)
    y = y + jnp.einsum(
        "bkgtml,bmlkd->btkgd", weights[..., count:, :], cut[:, :, :-1],
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    y = y.reshape(q.shape).astype(dtype)
    if valid is not None:
        y = jnp.where(valid[..., None, None], y, 0)
    return y, _grow(cache, near_k, near_v, new), start[:, 0] + cache.num_tail + new - 1


def _join(tail: Array, new: Array, start: Array, size: int) -> Array:
    """[B,size,K,D]: the running block and the new tokens behind what it holds."""
    wide = jnp.pad(tail, ((0, 0), (0, max(0, size - tail.shape[1])), (0, 0), (0, 0)))[:, :size]
    put = lambda x, y, i: jax.lax.dynamic_update_slice_in_dim(x, y, i, axis=0)
    return jax.vmap(put)(wide, new.astype(tail.dtype), start)


def _query_positions(cache: LandmarkCache, num_new: int, start: Array) -> Array:
    """[B,T] positions of new tokens; the running block begins at `start` [B,1]."""
    return start + cache.num_tail[:, None] + jnp.arange(num_new, dtype=jnp.int32)


def _places(cache: LandmarkCache, blocks: Array) -> Array:
    """Where retrieved blocks stand, in periods: [B,H|1,T|1,k]."""
    count = blocks.shape[-1]
    lift = lambda x: x[:, None, None, None]
    held = lift(cache.num_held)
    rank = jnp.arange(count) - (count - jnp.minimum(count, held))
    is_late = lift(cache.num_complete) - 1 - blocks < count
    return jnp.maximum(rank + (is_late & (held > count)), 0)


def _gather(
    cache: LandmarkCache, blocks: Array, kv_heads: int
) -> tuple[LandmarkCache, Array, Array, str]:
    """The cache as it is to be used from then on, keys and values of the blocks
    [B,K,(g),(t),k,P,D], and the letters of the first axes."""
    batch, heads, tokens, count = blocks.shape
    by_head, by_token = heads > 1, tokens > 1
    index = blocks % cache.num_blocks
    index = index.reshape(batch, kv_heads if by_head else 1, -1, tokens, count)
    index = jnp.broadcast_to(index, (batch, kv_heads, *index.shape[2:]))
    if not by_token:
        index = index[:, :, :, 0]
    if not by_head:
        index = index[:, :, 0]
    axes = "bk" + "g" * by_head + "t" * by_token
    if isinstance(cache.k, HostBlocks):
        kept, found = fetch(
            (cache.k, cast(HostBlocks, cache.v)), index.reshape(batch, kv_heads, -1)
        )
        exists = blocks.reshape(batch, kv_heads if by_head else 1, -1, 1, 1) >= 0
        k, v = (jnp.where(exists, x, 0).reshape(*index.shape, *x.shape[3:]) for x in found)
        return cache._replace(k=kept[0], v=kept[1]), k, v, axes
    take = jax.vmap(jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="clip")))
    pick = lambda x: take(jnp.einsum("bmpkd->bkmpd", x), index)
    return cache, pick(cache.k), pick(cache.v), axes


def _rotate_blocks(rotate: Rotate, k: Array, places: Array, period: int) -> Array:
    """k [B,K,(g),(t),r,P,D] rotated for its blocks to stand at `places` [B,H|1,T|1,r]."""
    batch, kv_heads = k.shape[:2]
    by_head = places.shape[1] > 1
    places = places.reshape(batch, kv_heads if by_head else 1, -1, *places.shape[2:])
    places = places[..., None] * period + jnp.arange(period)  # [B,K|1,G|1,T|1,r,P]
    size = math.prod(k.shape[2:-1])
    places = jnp.broadcast_to(places.reshape(batch, -1, size), (batch, kv_heads, size))
    turned = rotate(jnp.swapaxes(k.reshape(batch, kv_heads, size, -1), 1, 2),
                    jnp.swapaxes(places, 1, 2))  # fmt: skip
    return jnp.swapaxes(turned, 1, 2).reshape(k.shape)


def _grow(cache: LandmarkCache, near_k: Array, near_v: Array, new: Array) -> LandmarkCache:
    """The cache with the blocks that the new tokens complete, and what is left over."""
    period, size = cache.block_size + 1, cache.num_blocks
    end = cache.num_tail + new
    done = (end // period)[:, None]
    n = jnp.arange(near_k.shape[1] // period)
    goes = (n < done) & (n >= done - size)  # later ones would overwrite the rest
    to = jnp.where(goes, (cache.num_complete[:, None] + n) % size, size)

    cut = lambda x: x.reshape(x.shape[0], -1, period, *x.shape[2:])  # [B,n,P,K,D]
    put = jax.vmap(lambda x, i, y: x.at[i].set(y, mode="drop"))
    k, v, landmarks = cache.k, cache.v, cache.landmarks
    if isinstance(k, HostBlocks):
        new_k, new_v = cut(near_k), cut(near_v)
        kept = (k, cast(HostBlocks, v))
        k, v = store(kept, (new_k, new_v), done[:, 0], cache.num_complete)
        landmarks = put(landmarks, to, new_k[:, :, -1])
    else:
        k, v = put(k, to, cut(near_k)), put(v, to, cut(near_v))

    def rest(tokens: Array) -> Array:
        wide = jnp.pad(tokens, ((0, 0), (0, period), (0, 0), (0, 0)))
        last = lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, period, axis=0)
        return jax.vmap(last)(wide, done[:, 0] * period)

    tail = (rest(near_k), rest(near_v), cache.num_complete + done[:, 0], end % period)
    return LandmarkCache(k, v, *tail, landmarks)


def extend(
    cache: LandmarkCache,
    q: Array,
    k: Array,
    v: Array,
    rotate: Rotate,
    *,
    top_k: int,
    policy: str,
    chunk: int,
    scale: float,
    valid: Array | None = None,
    key: Array | None = None,
) -> tuple[Array, LandmarkCache]:
    """Any number of new tokens, `chunk` at a time: y [B,T,H,D] and the new cache.

    Args:
      valid: [B,T] bool; other tokens are padding, anywhere: they are not kept, and get zeros.
      key: read blocks at random, others in every chunk.
    """
    batch, num_new = q.shape[:2]
    back = None
    if valid is not None:
        order, back = to_front(valid)
        q, k, v = (reorder(x, order) for x in (q, k, v))
        valid = jnp.take_along_axis(valid, order, axis=1)

    def step(cache: LandmarkCache, piece: tuple[Array, ...]):
        q, k, v, valid = piece
        place = cache.num_complete.max() * (cache.block_size + 1) + cache.num_tail.max()
        drawn = None if key is None else jax.random.fold_in(key, place)
        blocks = retrieve(
            cache, q, top_k, policy, rotate=rotate, scale=scale, valid=valid, key=drawn
        )
        y, cache, _ = _attend(cache, q, k, v, blocks, rotate, scale, valid)
        return cache, y

    if num_new <= chunk:
        cache, y = step(cache, (q, k, v, cast(Any, valid)))
    else:
        valid = jnp.ones((batch, num_new), bool) if valid is None else valid
        more = -num_new % chunk

        def cut(x: Array) -> Array:  # [B,T,...] -> [N,B,chunk,...]
            x = jnp.pad(x, ((0, 0), (0, more), *((0, 0),) * (x.ndim - 2)))
            return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

        cache, y = jax.lax.scan(step, cache, tuple(map(cut, (q, k, v, valid))))
        y = jnp.moveaxis(y, 0, 1).reshape(batch, -1, *y.shape[3:])[:, :num_new]
    return (y if back is None else reorder(y, back)), cache


def check_offload(policy: str) -> None:
    """Raise for a policy that would fetch blocks from host memory for every token."""
    if policy != "max_over_tokens":
        raise ValueError(
            f"offload fetches blocks once a chunk, and policy={policy!r} wants other blocks for "
            "every token; take policy='max_over_tokens'."
        )


def _check_top_k(top_k: int) -> None:
    if top_k < 1:
        raise ValueError(f"top_k={top_k} blocks must be at least 1.")


def _check_chunk(cache: LandmarkCache, q: Array, k: Array, top_k: int, bound: int | None) -> None:
    _check_top_k(top_k)
    want = (cache.tail_k.shape[0], *cache.tail_k.shape[2:])
    if (k.shape[0], *k.shape[2:]) != want:
        raise ValueError(
            f"k has shape {k.shape}; the cache was made for batch, kv heads and head_dim {want}."
        )
    if bound is None:
        return
    period = cache.block_size + 1
    highest = (min(top_k, cache.num_blocks) + 1) * period + cache.block_size + q.shape[1] - 1
    if highest > bound:
        room = bound + 1 - (min(top_k, cache.num_blocks) + 1) * period - cache.block_size
        raise ValueError(
            f"a chunk of {q.shape[1]} tokens may reach position {highest}, beyond "
            f"max_position={bound}; feed at most {max(room, 0)} tokens at once, take a smaller "
            "top_k, or leave max_position out."
        )
