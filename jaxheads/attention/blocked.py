"""Softmax attention in tiles with an online softmax: linear memory, any length, plain JAX.

Forward, for each block of queries and over the key blocks it can see (Milakov & Gimelshein 2018,
arXiv:1805.02867; Dao 2023, arXiv:2307.08691):

    m' = max(m, max_s scores),  l' = l e^(m - m') + sum_s e^(scores - m')
    z' = z e^(m - m') + e^(scores - m') v,      at the end  z / l,  lse = m + log l

Backward recomputes each tile from the saved lse: with p = e^(scores - lse), delta = sum(z dz),

    dv += p^T dz,  ds = p (dz v^T - delta + dlse),  dq += ds k,  dk += ds^T q

Key blocks outside the range that causality and the window allow are never visited. Reverse-mode
derivatives only (a custom rule); forward mode needs the dense implementation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxheads.attention.dense import (
    TINY,
    alibi_penalty,
    distance,
    group_heads,
    group_rows,
    ungroup_lse,
    ungroup_rows,
)
from jaxheads.attention.masks import FLOOR, Mask, Span, as_4d, pad_end, penalty, take
from jaxheads.typing import Array, vary_like

BLOCK_Q = 256
BLOCK_K = 512


class Tiling(NamedTuple):
    """The part of a call that shapes the program."""

    scale: float
    soft_cap: float | None
    block_q: int
    block_k: int
    num_keys: int  # before padding
    groups: tuple[int, int]  # (K, G)
    mask_fn: Callable[[Array, Array], Array] | None = None
    bias_fn: Callable[[Array, Array], Array] | None = None

    @property
    def block_rows(self) -> int:
        """Rows of scores in a tile: its queries times the heads that share a kv head."""
        return self.block_q * self.groups[1]


class Operands(NamedTuple):
    """The differentiable part, padded to whole blocks; X = T*G rows read one kv head."""

    q: Array  # [B,K,X,D]
    k: Array  # [B,K,S,D]
    v: Array  # [B,K,S,W]
    bias: Array | None  # [B|1,H|1,T|1,S|1]
    sinks: Array | None  # [H]
    slopes: Array | None  # [H]


def blocked_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    bias: Array | None = None,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    mask_fn: Callable[[Array, Array], Array] | None = None,
    bias_fn: Callable[[Array, Array], Array] | None = None,
) -> tuple[Array, Array]:
    """The same function of its arguments as `dense_attention`, in O(T + S) memory.

    Args:
      q: [B,T,H,D] queries; any T.
      k: [B,S,K,D] keys; any S.
      v: [B,S,K,W] values.
      mask: which keys each query sees; built one tile at a time.
      bias: broadcastable to [B,H,T,S].
      scale: factor on q.k.
      soft_cap: bound of the tanh cap on the scaled scores, before bias and mask.
      sinks: [H] logits that join the denominator.
      alibi_slopes: [H] penalty per slot of distance.
      block_q: queries in a tile.
      block_k: keys in a tile.
      mask_fn: (q_index [...,t,1], k_index [...,1,s]) -> bool, elementwise; another condition on
        what is visible.
      bias_fn: the same arguments -> broadcastable to [B,H,t,s], added to the scores. Nothing is
        differentiated with respect to what either function closes over.
    Returns:
      z [B,T,H,W] in the dtype of q and lse [B,H,T] float32.
    """
    num_queries = q.shape[1]
    tiling, operands, mask = tile(
        q,
        k,
        v,
        mask,
        bias,
        scale=scale,
        soft_cap=soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        block_q=block_q,
        block_k=block_k,
        mask_fn=mask_fn,
        bias_fn=bias_fn,
    )
    z, lse = cast(tuple[Array, Array], _attend(tiling, operands, mask))
    return untile(z, num_queries, tiling), untile_lse(lse, num_queries, tiling)


def tile(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    bias: Array | None = None,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    mask_fn: Callable[[Array, Array], Array] | None = None,
    bias_fn: Callable[[Array, Array], Array] | None = None,
) -> tuple[Tiling, Operands, Mask]:
    """The arguments of `blocked_attention` as `forward_tiles` and `backward_tiles` take them."""
    num_queries, num_heads = q.shape[1:3]
    num_keys, num_kv_heads = k.shape[1:3]
    groups = (num_kv_heads, num_heads // num_kv_heads)
    block_q, block_k = min(block_q, num_queries), min(block_k, num_keys)
    padded_queries = num_queries + -num_queries % block_q
    padded_keys = num_keys + -num_keys % block_k

    if bias is not None:
        bias = pad_end(pad_end(as_4d(bias), padded_keys), padded_queries, axis=-2)
    arrays = Operands(
        q=group_rows(_pad_positions(q, padded_queries), num_kv_heads),
        k=jnp.einsum("bskd->bksd", _pad_positions(k, padded_keys)),
        v=jnp.einsum("bskw->bksw", _pad_positions(v, padded_keys)),
        bias=bias,
        sinks=sinks,
        slopes=alibi_slopes,
    )
    tiling = Tiling(scale, soft_cap, block_q, block_k, num_keys, groups, mask_fn, bias_fn)
    mask = mask.pad(padded_queries, padded_keys)
    arrays, mask = vary_like((arrays, mask), arrays, mask)
    return tiling, arrays, mask


def untile(z: Array, num_queries: int, tiling: Tiling) -> Array:
    """Rows [B,K,X,W] of padded queries -> [B,T,H,W]."""
    return ungroup_rows(z, z.shape[2] // tiling.groups[1])[:, :num_queries]


def untile_lse(lse: Array, num_queries: int, tiling: Tiling) -> Array:
    """[B,K,X] of padded queries -> [B,H,T]."""
    return ungroup_lse(lse, lse.shape[2] // tiling.groups[1])[..., :num_queries]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tiling: Tiling, arrays: Operands, mask: Mask) -> tuple[Array, Array]:
    """z [B,K,X,W] in the dtype of q and lse [B,K,X] float32."""
    z, lse = forward_tiles(tiling, arrays, mask)
    return z.astype(arrays.q.dtype), lse


def forward_tiles(tiling: Tiling, arrays: Operands, mask: Mask) -> tuple[Array, Array]:
    """z [B,K,X,W] and lse [B,K,X], both float32, without a rule for derivatives."""
    attend_block = lambda q_start: _attend_block(tiling, arrays, mask, q_start)
    z, lse = jax.lax.map(attend_block, _q_starts(tiling, arrays))
    return _join_blocks(z), _join_blocks(lse)


def _attend_block(tiling: Tiling, arrays: Operands, mask: Mask, q_start: Array):
    """One block of queries against every key block it can see."""
    q = _rows(tiling, arrays.q, q_start)

    def visit(j, carry):
        z, highest, total = carry
        k_start = j * tiling.block_k
        v = _keys(tiling, arrays.v, k_start)
        scores, _ = _scores(tiling, arrays, mask, q, q_start, k_start)
        new_highest = jnp.maximum(highest, scores.max(axis=-1))
        weights = jnp.exp(scores - new_highest[..., None])
        keep = jnp.exp(highest - new_highest)
        new = _dot("bkxs,bksw->bkxw", weights.astype(v.dtype), v)
        return z * keep[..., None] + new, new_highest, total * keep + weights.sum(axis=-1)

    shape = q.shape[:-1]
    if arrays.sinks is None:
        highest = jnp.full(shape, FLOOR, jnp.float32)
        total = jnp.zeros(shape, jnp.float32)
    else:
        highest = jnp.broadcast_to(_sink_rows(tiling, arrays.sinks, shape[-1]), shape)
        total = jnp.ones(shape, jnp.float32)
    z = jnp.zeros((*shape, arrays.v.shape[-1]), jnp.float32)
    start = vary_like((z, highest, total), arrays, mask)
    low, high = _block_range(tiling, mask, q_start)
    z, highest, total = jax.lax.fori_loop(low, high, visit, start)
    z = z * (1 / jnp.maximum(total, TINY))[..., None]
    return z, highest + jnp.log(total)


def _scores(tiling: Tiling, arrays: Operands, mask: Mask, q: Array, q_start, k_start):
    """One tile [B,K,x,tk] float32 of masked scores, and the derivative of its soft cap."""
    q_span, k_span = (q_start, tiling.block_q), (k_start, tiling.block_k)
    groups = tiling.groups
    scores = tiling.scale * _dot("bkxd,bksd->bkxs", q, _keys(tiling, arrays.k, k_start))
    slope_of_cap = None
    if tiling.soft_cap is not None:
        capped = jnp.tanh(scores / tiling.soft_cap)
        scores, slope_of_cap = tiling.soft_cap * capped, 1 - capped**2
    if arrays.bias is not None:
        bias = take(take(arrays.bias, q_span, axis=-2), k_span, axis=-1)
        scores = scores + group_heads(bias.astype(jnp.float32), groups, tiling.block_q)
    if arrays.slopes is not None:
        scores = scores - alibi_penalty(arrays.slopes, groups, mask, q_span, k_span)
    if tiling.bias_fn is not None:
        bias = call_on_indices(tiling.bias_fn, mask, q_span, k_span).astype(jnp.float32)
        scores = scores + group_heads(bias, groups, tiling.block_q)
    visible = mask.tile(q_span, k_span)
    if tiling.mask_fn is not None:
        chosen = call_on_indices(tiling.mask_fn, mask, q_span, k_span)
        visible = chosen if visible is None else visible & chosen
    if tiling.num_keys != arrays.k.shape[-2]:
        is_key = (k_start + jnp.arange(tiling.block_k) < tiling.num_keys)[None, None, None]
        visible = is_key if visible is None else visible & is_key
    if visible is not None:
        scores = scores + group_heads(penalty(visible), groups, tiling.block_q)
    return scores, slope_of_cap


def call_on_indices(function: Callable, mask: Mask, q_span: Span, k_span: Span) -> Array:
    """`function` of the indices of a tile, [B|1,H|1,t|1,s|1]."""
    q_index, k_index = mask.indices(q_span, k_span)
    if max(q_index.ndim, k_index.ndim) == 3:  # [B,t,1]: an axis for the heads
        q_index, k_index = as_heads(q_index), as_heads(k_index)
    return as_4d(function(q_index, k_index))


def as_heads(index: Array) -> Array:
    """[B,t,s] -> [B,1,t,s]; [t,s] as it is."""
    return index[:, None] if index.ndim == 3 else index


def _attend_fwd(tiling: Tiling, arrays: Operands, mask: Mask):
    z, lse = cast(tuple[Array, Array], _attend(tiling, arrays, mask))
    return (z, lse), (arrays, mask, z, lse)


class _Grads(NamedTuple):
    """Sums over blocks, float32, shaped as in `Operands` (a query block's dq leaves the loop)."""

    k: Array
    v: Array
    bias: Array | None
    slopes: Array | None


def _attend_bwd(tiling: Tiling, residuals, cotangents):
    arrays, mask, z, lse = residuals
    dz, dlse = cotangents
    delta = (z.astype(jnp.float32) * dz.astype(jnp.float32)).sum(axis=-1) - dlse  # [B,K,X]
    found = backward_tiles(tiling, arrays, mask, dz, lse, delta)
    return jax.tree.map(lambda x, dx: dx.astype(x.dtype), arrays, found), None


def backward_tiles(
    tiling: Tiling, arrays: Operands, mask: Mask, dz: Array, lse: Array, delta: Array
) -> Operands:
    """The gradients of every operand, float32, from these keys.

    Args:
      dz: [B,K,X,W] cotangent of z.
      lse: [B,K,X] over all keys, of which those in `arrays` may be a part.
      delta: [B,K,X] sum(z dz) - dlse, with z over all keys.
    """
    summed = _Grads(arrays.k, arrays.v, arrays.bias, arrays.slopes)
    grads = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), summed)

    def one_block(grads, q_start):
        return _backward_block(tiling, arrays, mask, q_start, dz, lse, delta, grads)

    grads, dq = jax.lax.scan(
        one_block, vary_like(grads, arrays, mask, dz), _q_starts(tiling, arrays)
    )
    dsinks = None
    if arrays.sinks is not None:
        share = jnp.exp(_sink_rows(tiling, arrays.sinks, lse.shape[-1]) - lse)
        batch, num_kv_heads, _ = lse.shape
        by_head = (share * delta).reshape(batch, num_kv_heads, -1, tiling.groups[1])
        dsinks = -by_head.sum(axis=(0, 2)).reshape(-1)
    return Operands(_join_blocks(dq), grads.k, grads.v, grads.bias, dsinks, grads.slopes)


def _backward_block(tiling, arrays, mask, q_start, dz, lse, delta, grads):
    """Adds one query block's part to the gradients of keys, values and bias; returns its dq."""
    q, dz = _rows(tiling, arrays.q, q_start), _rows(tiling, dz, q_start)
    lse = _rows(tiling, lse[..., None], q_start)
    delta = _rows(tiling, delta[..., None], q_start)
    shift = jnp.maximum(lse, FLOOR)
    q_span = (q_start, tiling.block_q)

    def visit(j, carry):
        dq, grads = carry
        k_start = j * tiling.block_k
        k_span = (k_start, tiling.block_k)
        k, v = _keys(tiling, arrays.k, k_start), _keys(tiling, arrays.v, k_start)
        scores, slope_of_cap = _scores(tiling, arrays, mask, q, q_start, k_start)
        p = jnp.exp(scores - shift)
        dv = _dot("bkxs,bkxw->bksw", p.astype(v.dtype), dz)
        ds = p * (_dot("bkxw,bksw->bkxs", dz, v) - delta)
        dbias, dslopes = grads.bias, grads.slopes
        if dbias is not None:
            dbias = _add_bias_tile(tiling, dbias, ds, q_span, k_span)
        if dslopes is not None:
            by_position = _by_position(tiling, ds) * distance(mask, q_span, k_span)
            dslopes = dslopes - by_position.sum(axis=(0, 2, 4)).reshape(-1)
        if slope_of_cap is not None:
            ds = ds * slope_of_cap
        ds = (ds * tiling.scale).astype(k.dtype)
        dq = dq + _dot("bkxs,bksd->bkxd", ds, k)
        dk = _dot("bkxs,bkxd->bksd", ds, q)
        dk, dv = _add_keys(grads.k, dk, k_start), _add_keys(grads.v, dv, k_start)
        return dq, _Grads(dk, dv, dbias, dslopes)

    low, high = _block_range(tiling, mask, q_start)
    dq = vary_like(jnp.zeros(q.shape, jnp.float32), arrays, mask, dz)
    dq, grads = jax.lax.fori_loop(low, high, visit, (dq, grads))
    return grads, dq


_attend.defvjp(_attend_fwd, _attend_bwd)

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _q_starts(tiling: Tiling, arrays: Operands) -> Array:
    """The first query of each block."""
    return jnp.arange(arrays.q.shape[-2] // tiling.block_rows) * tiling.block_q


def _block_range(tiling: Tiling, mask: Mask, q_start) -> tuple[Array, Array]:
    """The key blocks [low, high) that some query of the block may see."""
    low, high = mask.key_range((q_start, tiling.block_q), tiling.num_keys)
    low, high = jnp.asarray(low, jnp.int32), jnp.asarray(high, jnp.int32)
    return low // tiling.block_k, (high + tiling.block_k - 1) // tiling.block_k


def _rows(tiling: Tiling, x: Array, q_start) -> Array:
    """The rows [B,K,x,...] of a block of queries."""
    start = q_start * tiling.groups[1]
    return jax.lax.dynamic_slice_in_dim(x, start, tiling.block_rows, axis=-2)


def _keys(tiling: Tiling, x: Array, k_start) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, k_start, tiling.block_k, axis=-2)


def _add_keys(total: Array, x: Array, k_start) -> Array:
    """`total` with `x` added to the block of keys at `k_start`."""
    old = jax.lax.dynamic_slice_in_dim(total, k_start, x.shape[-2], axis=-2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + x, k_start, axis=total.ndim - 2)


def _by_position(tiling: Tiling, x: Array) -> Array:
    """[B,K,x,tk] -> [B,K,tq,G,tk]."""
    return x.reshape(*x.shape[:2], tiling.block_q, tiling.groups[1], x.shape[-1])


def _sink_rows(tiling: Tiling, sinks: Array, num_rows: int) -> Array:
    """[H] -> [K,num_rows] float32: the sink of the head that each row belongs to."""
    by_group = sinks.astype(jnp.float32).reshape(tiling.groups)
    return jnp.tile(by_group, (1, num_rows // tiling.groups[1]))


def _add_bias_tile(tiling: Tiling, total: Array, ds: Array, q_span: Span, k_span: Span) -> Array:
    """Adds a tile's score gradient to the bias gradient, summed over the bias's broadcast axes."""
    ds = jnp.einsum("bktgs->bkgts", _by_position(tiling, ds))
    ds = ds.reshape(ds.shape[0], -1, *ds.shape[3:])  # [B,H,tq,tk]
    sums = tuple(axis for axis in range(4) if total.shape[axis] == 1)
    old = take(take(total, q_span, axis=-2), k_span, axis=-1)
    starts = (0, 0, q_span[0], k_span[0])
    starts = [0 if size == 1 else start for start, size in zip(starts, total.shape, strict=True)]
    return jax.lax.dynamic_update_slice(total, old + ds.sum(axis=sums, keepdims=True), starts)


def _join_blocks(x: Array) -> Array:
    """[N,B,K,x,...] -> [B,K,N*x,...]."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _pad_positions(x: Array, length: int) -> Array:
    """[B,T,H,D] with zeros up to a length."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
