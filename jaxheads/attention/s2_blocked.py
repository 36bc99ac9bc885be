"""S2-attention in plain JAX: a banded local product and compacted residue classes, tile by tile.

A head's far blocks are one class modulo the stride, so they are first copied side by side ("kept"
keys, T/V tokens a head). For a chunk of query blocks the online softmax then starts from their
local windows (a band: c blocks of queries against c + L - 1 blocks of keys, in one product) and
goes on over tiles of kept keys. Nothing of size T x T exists; the backward pass recomputes tiles
from the saved lse, as in `attention/blocked.py`:

    dv += p^T dz,  ds = p (dz v^T - delta + dlse),  dq += ds k,  dk += ds^T q

Window keys and kept keys are separate inputs that say which blocks they hold. One device cuts both
out of its sequence; a context-parallel one gets them from its neighbours (`s2_parallel`), a decode
cache holds them (`s2_cache`); the gradients flow back by ordinary differentiation.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxheads.attention.api import platform
from jaxheads.attention.dense import TINY
from jaxheads.attention.masks import FLOOR, penalty
from jaxheads.typing import Array, vary_like

# Rows of a chunk of queries (tokens times the heads that share a kv head) and kept keys in a tile:
# small enough on CPU for the scores to stay in its caches, larger where matrix units wait.
TILES = {"cpu": (128, 64)}
OTHER_TILES = (1024, 256)
NO_BLOCK = jnp.iinfo(jnp.int32).max  # the index of a kept block that holds nothing


class Keys(NamedTuple):
    """Blocks of keys and values, and where they come from."""

    k: Array
    """[B,K,n*block,D]"""
    v: Array
    """[B,K,n*block,W]"""
    segments: Array | None
    """[B,K|1,n*block] int32, 0 = nobody sees the key; None = all keys are of one segment."""


class _Static(NamedTuple):
    """The part of a call that shapes the program."""

    scale: float
    block: int
    local: int  # L
    group: int  # G, query heads of a kv head
    chunk: int  # query blocks in a chunk
    tile: int  # kept blocks in a tile


class _Arrays(NamedTuple):
    """The differentiable part; P = B*K problems, rows = positions times G."""

    q: Array  # [P,T*G,D]
    k: Array  # [P,(N+L-1)*block,D] keys of the windows
    v: Array
    kept_k: Array  # [P,M*block,D]
    kept_v: Array


class _Places(NamedTuple):
    """Which blocks and segments those are; int32."""

    first_block: Array  # [] index of the first query block
    bounds: Array  # [2] the window holds blocks bounds[0] <= j < bounds[1]
    kept: Array  # [P,M] block index of each kept block
    q_segments: Array | None  # [P,T*G]
    segments: Array | None  # [P,(N+L-1)*block]
    kept_segments: Array | None  # [P,M*block]


def attend_shards(
    q: Array,
    window: Keys,
    kept: Keys,
    kept_blocks: Array,
    *,
    block: int,
    local_blocks: int,
    scale: float,
    first_block: int | Array = 0,
    bounds: tuple[int | Array, int | Array] = (0, NO_BLOCK),
    q_segments: Array | None = None,
) -> tuple[Array, Array]:
    """Each query block against its window of L blocks and every kept block before the window.

    Args:
      q: [B,T,H,D], T a multiple of `block`.
      window: (T/block + L - 1) blocks of keys, the first being block `first_block - L + 1`.
      kept: M blocks of keys per kv head.
      kept_blocks: [K,M] int32, index of each kept block; `NO_BLOCK` where there is none.
      block: tokens in a block.
      local_blocks: L.
      scale: factor on q.k.
      first_block: index of the first query block (may be traced).
      bounds: window blocks outside [low, high) do not exist.
      q_segments: [B,T] int32; goes with the keys' segments.
    Returns:
      z [B,T,H,W] in the dtype of q, lse [B,H,T] float32; zeros and -inf where nothing is visible.
    """
    batch, length, num_heads, _ = q.shape
    num_kv_heads = window.k.shape[1]
    group = num_heads // num_kv_heads
    chunk_rows, key_tile = TILES.get(platform(), OTHER_TILES)
    most = max(2, local_blocks)  # c blocks of queries meet c + L - 1 of keys where L would do
    chunk = max(1, min(length // block, chunk_rows // (block * group), most))
    tile = max(1, min(kept_blocks.shape[1], key_tile // block))
    static = _Static(scale, block, local_blocks, group, chunk, tile)

    pad_q = -length % (chunk * block)
    pad_kept = -kept_blocks.shape[1] % tile if kept_blocks.shape[1] else tile
    rows = jnp.einsum("btkgd->bktgd", q.reshape(batch, length, num_kv_heads, group, -1))
    rows = rows.reshape(batch * num_kv_heads, length * group, -1)
    flat = lambda x: x.reshape(batch * num_kv_heads, *x.shape[2:])
    arrays = _Arrays(
        q=_pad(rows, pad_q * group),
        k=_pad(flat(window.k), pad_q),
        v=_pad(flat(window.v), pad_q),
        kept_k=_pad(flat(kept.k), pad_kept * block),
        kept_v=_pad(flat(kept.v), pad_kept * block),
    )
    kept_blocks = jnp.asarray(kept_blocks, jnp.int32)
    kept_blocks = jnp.pad(kept_blocks, ((0, 0), (0, pad_kept)), constant_values=NO_BLOCK)

    def by_problem(x: Array | None, pad: int) -> Array | None:
        if x is None:
            return None
        x = jnp.broadcast_to(x, (batch, num_kv_heads, x.shape[-1]))
        return _pad(x.reshape(-1, x.shape[-1]).astype(jnp.int32), pad)

    if q_segments is not None:
        q_segments = jnp.repeat(q_segments, group, axis=-1)[:, None]
    places = _Places(
        first_block=jnp.asarray(first_block, jnp.int32),
        bounds=jnp.stack([jnp.asarray(x, jnp.int32) for x in bounds]),
        kept=jnp.tile(kept_blocks, (batch, 1)),
        q_segments=by_problem(q_segments, pad_q * group),
        segments=by_problem(window.segments, pad_q),
        kept_segments=by_problem(kept.segments, pad_kept * block),
    )
    arrays, places = vary_like((arrays, places), arrays, places)
    z, lse = cast(tuple[Array, Array], _attend(static, arrays, places))
    z = z[:, : length * group].reshape(batch, num_kv_heads, length, group, -1)
    lse = lse[:, : length * group].reshape(batch, num_kv_heads, length, group)
    z = jnp.einsum("bktgw->btkgw", z).reshape(batch, length, num_heads, -1)
    return z, jnp.einsum("bktg->bkgt", lse).reshape(batch, num_heads, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, arrays: _Arrays, places: _Places) -> tuple[Array, Array]:
    """z [P,X,W] in the dtype of q and lse [P,X] float32."""
    attend_chunk = lambda c: _attend_chunk(static, arrays, places, c)
    z, lse = jax.lax.map(attend_chunk, jnp.arange(_num_chunks(static, arrays)))
    return _join(z), _join(lse)


def _attend_chunk(static: _Static, arrays: _Arrays, places: _Places, c: Array):
    """One chunk of query blocks: its windows, then the tiles of kept keys it can see."""
    q = _rows(static, arrays.q, c)  # [P,x,D]
    scores = _window_scores(static, arrays, places, q, c)
    highest = jnp.maximum(scores.max(axis=-1), FLOOR)
    weights = jnp.exp(scores - highest[..., None])
    v = _band(static, arrays.v, c)
    start = (_dot("pxs,psw->pxw", weights.astype(v.dtype), v), highest, weights.sum(axis=-1))

    def visit(t, carry):
        z, highest, total = carry
        scores = _tile_scores(static, arrays, places, q, c, t)
        new_highest = jnp.maximum(highest, scores.max(axis=-1))
        weights = jnp.exp(scores - new_highest[..., None])
        keep = jnp.exp(highest - new_highest)
        v = _tile(static, arrays.kept_v, t)
        new = _dot("pxs,psw->pxw", weights.astype(v.dtype), v)
        return z * keep[..., None] + new, new_highest, total * keep + weights.sum(axis=-1)

    start = vary_like(start, arrays, places)
    z, highest, total = jax.lax.fori_loop(0, _num_tiles(static, places, c), visit, start)
    z = z * (1 / jnp.maximum(total, TINY))[..., None]
    return z.astype(q.dtype), highest + jnp.log(total)


def _attend_fwd(static: _Static, arrays: _Arrays, places: _Places):
    z, lse = cast(tuple[Array, Array], _attend(static, arrays, places))
    return (z, lse), (arrays, places, z, lse)


def _attend_bwd(static: _Static, residuals, cotangents):
    arrays, places, z, lse = residuals
    dz, dlse = cotangents
    delta = (z.astype(jnp.float32) * dz.astype(jnp.float32)).sum(axis=-1) - dlse  # [P,X]
    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    grads = tuple(zeros(x) for x in arrays[1:])

    def one_chunk(grads, c):
        return _backward_chunk(static, arrays, places, c, dz, lse, delta, grads)

    chunks = jnp.arange(_num_chunks(static, arrays))
    grads, dq = jax.lax.scan(one_chunk, vary_like(grads, arrays, places, dz), chunks)
    found = _Arrays(_join(dq), *grads)
    return jax.tree.map(lambda x, dx: dx.astype(x.dtype), arrays, found), None


def _backward_chunk(static, arrays, places, c, dz, lse, delta, grads):
    """Adds one chunk's part to the gradients of all keys and values; returns its dq."""
    q, dz = _rows(static, arrays.q, c), _rows(static, dz, c)
    shift = jnp.maximum(_rows(static, lse[..., None], c), FLOOR)
    delta = _rows(static, delta[..., None], c)
    dk_all, dv_all, dkept_k, dkept_v = grads

    def slopes(scores, k, v):
        """(dq, dk, dv) of a chunk's rows with some keys."""
        p = jnp.exp(scores - shift)
        dv = _dot("pxs,pxw->psw", p.astype(v.dtype), dz)
        ds = p * (_dot("pxw,psw->pxs", dz, v) - delta)
        ds = (ds * static.scale).astype(k.dtype)
        return _dot("pxs,psd->pxd", ds, k), _dot("pxs,pxd->psd", ds, q), dv

    k, v = _band(static, arrays.k, c), _band(static, arrays.v, c)
    dq, dk, dv = slopes(_window_scores(static, arrays, places, q, c), k, v)
    place = c * static.chunk * static.block
    dk_all, dv_all = _add(dk_all, dk, place), _add(dv_all, dv, place)

    def visit(t, carry):
        dq, dkept_k, dkept_v = carry
        k, v = _tile(static, arrays.kept_k, t), _tile(static, arrays.kept_v, t)
        new, dk, dv = slopes(_tile_scores(static, arrays, places, q, c, t), k, v)
        place = t * static.tile * static.block
        return dq + new, _add(dkept_k, dk, place), _add(dkept_v, dv, place)

    start = vary_like((dq, dkept_k, dkept_v), arrays, places, dz)
    num_tiles = _num_tiles(static, places, c)
    dq, dkept_k, dkept_v = jax.lax.fori_loop(0, num_tiles, visit, start)
    return (dk_all, dv_all, dkept_k, dkept_v), dq


_attend.defvjp(_attend_fwd, _attend_bwd)

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _window_scores(static: _Static, arrays: _Arrays, places: _Places, q: Array, c) -> Array:
    """Masked scores [P,x,(c+L-1)*block] float32 of a chunk's rows with their windows' band."""
    scores = static.scale * _dot("pxd,psd->pxs", q, _band(static, arrays.k, c))
    token = jnp.arange(q.shape[1]) // static.group
    place = jnp.arange(scores.shape[-1]) - (static.local - 1) * static.block
    ago = token[:, None] // static.block - place // static.block  # blocks before the query's
    scores = scores + penalty((place <= token[:, None]) & (ago < static.local))
    key_block = places.first_block + c * static.chunk + place // static.block
    scores = scores + penalty((key_block >= places.bounds[0]) & (key_block < places.bounds[1]))
    if places.segments is not None and places.q_segments is not None:
        keys = _band(static, places.segments[..., None], c)[:, None, :, 0]
        queries = _rows(static, places.q_segments[..., None], c)
        scores = scores + penalty((queries == keys) & (keys != 0))
    return scores


def _tile_scores(static: _Static, arrays: _Arrays, places: _Places, q: Array, c, t) -> Array:
    """Masked scores [P,x,tile*block] float32 of a chunk's rows with a tile of kept keys."""
    scores = static.scale * _dot("pxd,psd->pxs", q, _tile(static, arrays.kept_k, t))
    query_block = places.first_block + c * static.chunk + jnp.arange(static.chunk)
    kept = jax.lax.dynamic_slice_in_dim(places.kept, t * static.tile, static.tile, axis=1)
    visible = kept[:, None, :] <= query_block[None, :, None] - static.local  # [P,chunk,tile]
    visible = jnp.repeat(visible, static.block * static.group, axis=1)
    scores = scores + jnp.repeat(penalty(visible), static.block, axis=2)
    if places.kept_segments is not None and places.q_segments is not None:
        keys = _tile(static, places.kept_segments[..., None], t)[:, None, :, 0]
        queries = _rows(static, places.q_segments[..., None], c)
        scores = scores + penalty((queries == keys) & (keys != 0))
    return scores


def _num_chunks(static: _Static, arrays: _Arrays) -> int:
    return arrays.q.shape[1] // (static.chunk * static.block * static.group)


def _num_tiles(static: _Static, places: _Places, c) -> Array:
    """Tiles of kept keys up to the last one that some query of the chunk sees."""
    last = places.first_block + (c + 1) * static.chunk - 1
    place = jnp.arange(places.kept.shape[1])
    end = jnp.where(places.kept <= last - static.local, place + 1, 0).max(initial=0)
    return (end + static.tile - 1) // static.tile


def _rows(static: _Static, x: Array, c) -> Array:
    """The rows [P,x,...] of a chunk of queries."""
    size = static.chunk * static.block * static.group
    return jax.lax.dynamic_slice_in_dim(x, c * size, size, axis=1)


def _tile(static: _Static, x: Array, t) -> Array:
    size = static.tile * static.block
    return jax.lax.dynamic_slice_in_dim(x, t * size, size, axis=1)


def _band(static: _Static, x: Array, c) -> Array:
    """The blocks of x [P,(N+L-1)*block,...] that the windows of a chunk's queries reach."""
    size = (static.chunk + static.local - 1) * static.block
    return jax.lax.dynamic_slice_in_dim(x, c * static.chunk * static.block, size, axis=1)


def _add(total: Array, x: Array, start) -> Array:
    old = jax.lax.dynamic_slice_in_dim(total, start, x.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(total, old + x, start, axis=1)


def _join(x: Array) -> Array:
    """[C,P,x,...] -> [P,C*x,...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _pad(x: Array, extra: int) -> Array:
    """Zeros behind axis 1."""
    return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2)) if extra else x
