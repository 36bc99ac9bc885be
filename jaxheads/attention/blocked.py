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
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.attention.dense import split_heads
from jaxheads.attention.masks import MASK_VALUE, Mask, Span, as_4d
from jaxheads.typing import Array

BLOCK_Q = 256
BLOCK_K = 512


class _Static(NamedTuple):
    """The part of a call that shapes the program."""

    scale: float
    soft_cap: float | None
    block_q: int
    block_k: int
    num_keys: int  # before padding


class _Arrays(NamedTuple):
    """The differentiable part: padded to whole blocks, heads before positions."""

    q: Array  # [B,K,G,T,D]
    k: Array  # [B,K,S,D]
    v: Array  # [B,K,S,W]
    bias: Array | None  # [B|1,H|1,T|1,S|1]
    sinks: Array | None  # [K,G] float32
    slopes: Array | None  # [K,G] float32


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
    Returns:
      z [B,T,H,W] in the dtype of q and lse [B,H,T] float32.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    groups = (num_kv_heads, num_heads // num_kv_heads)
    block_q, block_k = min(block_q, num_queries), min(block_k, num_keys)
    extra_q, extra_k = -num_queries % block_q, -num_keys % block_k
    padded = (num_queries + extra_q, num_keys + extra_k)

    q = q.reshape(batch, num_queries, *groups, head_dim)
    arrays = _Arrays(
        q=_pad(jnp.einsum("btkgd->bkgtd", q), -2, extra_q),
        k=_pad(jnp.einsum("bskd->bksd", k), -2, extra_k),
        v=_pad(jnp.einsum("bskw->bksw", v), -2, extra_k),
        bias=None if bias is None else _pad(_pad(as_4d(bias), -2, extra_q), -1, extra_k),
        sinks=None if sinks is None else sinks.astype(jnp.float32).reshape(groups),
        slopes=None if alibi_slopes is None else alibi_slopes.astype(jnp.float32).reshape(groups),
    )
    static = _Static(scale, soft_cap, block_q, block_k, num_keys)
    z, lse = _attend(static, arrays, mask.pad(*padded))
    z = jnp.einsum("bkgtw->btkgw", z[..., :num_queries, :])
    z = z.reshape(batch, num_queries, num_heads, v.shape[-1])
    return z, lse[..., :num_queries].reshape(batch, num_heads, num_queries)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, arrays: _Arrays, mask: Mask) -> tuple[Array, Array]:
    """z [B,K,G,T,W] in the dtype of q and lse [B,K,G,T] float32."""
    num_blocks = arrays.q.shape[-2] // static.block_q
    z, lse = jax.lax.map(
        lambda i: _attend_block(static, arrays, mask, i * static.block_q), jnp.arange(num_blocks)
    )
    return _join_blocks(z, axis=-2), _join_blocks(lse, axis=-1)


def _attend_block(static: _Static, arrays: _Arrays, mask: Mask, q_start: Array):
    """One block of queries against every key block it can see."""
    q = _block(arrays.q, q_start, static.block_q)

    def visit(j, carry):
        z, highest, total = carry
        k_start = j * static.block_k
        v = _block(arrays.v, k_start, static.block_k)
        scores, _ = _scores(static, arrays, mask, q, q_start, k_start)
        new_highest = jnp.maximum(highest, scores.max(axis=-1))
        # While nothing was visible the shift is zero, and masked scores underflow to zero.
        shift = jnp.where(new_highest <= MASK_VALUE / 2, 0.0, new_highest)
        weights = jnp.exp(scores - shift[..., None])
        keep = jnp.exp(highest - shift)
        new = jnp.einsum(
            "bkgts,bksw->bkgtw", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return z * keep[..., None] + new, new_highest, total * keep + weights.sum(axis=-1)

    rows = q.shape[:-1]
    if arrays.sinks is None:
        highest = jnp.full(rows, MASK_VALUE, jnp.float32)
        total = jnp.zeros(rows, jnp.float32)
    else:
        highest = jnp.broadcast_to(arrays.sinks[..., None], rows)
        total = jnp.ones(rows, jnp.float32)
    z = jnp.zeros((*rows, arrays.v.shape[-1]), jnp.float32)
    low, high = _block_range(static, mask, q_start)
    z, highest, total = jax.lax.fori_loop(low, high, visit, (z, highest, total))
    is_empty = total == 0
    z = z / jnp.where(is_empty, 1.0, total)[..., None]
    lse = jnp.where(is_empty, -jnp.inf, highest + jnp.log(total))
    return z.astype(q.dtype), lse


def _scores(static: _Static, arrays: _Arrays, mask: Mask, q: Array, q_start, k_start):
    """One tile [B,K,G,tq,tk] float32 of masked scores, and the derivative of its soft cap."""
    q_span: Span = (q_start, static.block_q)
    k_span: Span = (k_start, static.block_k)
    groups = q.shape[1:3]
    k = _block(arrays.k, k_start, static.block_k)
    scores = static.scale * jnp.einsum(
        "bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32
    )
    slope_of_cap = None
    if static.soft_cap is not None:
        capped = jnp.tanh(scores / static.soft_cap)
        scores, slope_of_cap = static.soft_cap * capped, 1 - capped**2
    if arrays.bias is not None:
        bias = _bias_tile(arrays.bias, q_span, k_span)
        scores = scores + split_heads(bias, groups).astype(jnp.float32)
    if arrays.slopes is not None:
        scores = scores - arrays.slopes[..., None, None] * _distance(mask, q_span, k_span)
    visible = mask.tile(q_span, k_span)
    if static.num_keys != arrays.k.shape[-2]:
        is_key = (k_start + jnp.arange(static.block_k) < static.num_keys)[None, None, None]
        visible = is_key if visible is None else visible & is_key
    if visible is not None:
        scores = jnp.where(split_heads(visible, groups), scores, MASK_VALUE)
    return scores, slope_of_cap


def _attend_fwd(static: _Static, arrays: _Arrays, mask: Mask):
    z, lse = _attend(static, arrays, mask)
    return (z, lse), (arrays, mask, z, lse)


class _Grads(NamedTuple):
    """Sums over blocks, float32, shaped as in `_Arrays` (a query block's dq leaves the loop)."""

    k: Array
    v: Array
    bias: Array | None
    slopes: Array | None


def _attend_bwd(static: _Static, residuals, cotangents):
    arrays, mask, z, lse = residuals
    dz, dlse = cotangents
    delta = (z.astype(jnp.float32) * dz.astype(jnp.float32)).sum(axis=-1) - dlse  # [B,K,G,T]
    zeros = lambda x: None if x is None else jnp.zeros(x.shape, jnp.float32)
    grads = _Grads(*(zeros(x) for x in (arrays.k, arrays.v, arrays.bias, arrays.slopes)))
    starts = jnp.arange(arrays.q.shape[-2] // static.block_q) * static.block_q

    def one_block(grads, q_start):
        return _backward_block(static, arrays, mask, q_start, dz, lse, delta, grads)

    grads, dq = jax.lax.scan(one_block, grads, starts)
    dsinks = None
    if arrays.sinks is not None:
        share = jnp.exp(arrays.sinks[..., None] - lse)
        dsinks = -(share * delta).sum(axis=(0, -1))
    found = _Arrays(_join_blocks(dq, axis=-2), grads.k, grads.v, grads.bias, dsinks, grads.slopes)
    cast = lambda x, dx: None if x is None else dx.astype(x.dtype)
    return _Arrays(*(cast(x, dx) for x, dx in zip(arrays, found, strict=True))), None


def _backward_block(static, arrays, mask, q_start, dz, lse, delta, grads):
    """Adds one query block's part to the gradients of keys, values and bias; returns its dq."""
    block_q, block_k = static.block_q, static.block_k
    q, dz = _block(arrays.q, q_start, block_q), _block(dz, q_start, block_q)
    lse = jax.lax.dynamic_slice_in_dim(lse, q_start, block_q, axis=-1)
    delta = jax.lax.dynamic_slice_in_dim(delta, q_start, block_q, axis=-1)
    shift = jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None]
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def visit(j, carry):
        dq, grads = carry
        k_start = j * block_k
        k, v = _block(arrays.k, k_start, block_k), _block(arrays.v, k_start, block_k)
        scores, slope_of_cap = _scores(static, arrays, mask, q, q_start, k_start)
        p = jnp.exp(scores - shift)
        dv = dot("bkgts,bkgtw->bksw", p.astype(v.dtype), dz)
        ds = p * (dot("bkgtw,bksw->bkgts", dz, v) - delta[..., None])
        dbias, dslopes = grads.bias, grads.slopes
        if dbias is not None:
            dbias = _add_bias_tile(dbias, ds, (q_start, block_q), (k_start, block_k))
        if dslopes is not None:
            distance = _distance(mask, (q_start, block_q), (k_start, block_k))
            dslopes = dslopes - (ds * distance).sum(axis=(0, -2, -1))
        if slope_of_cap is not None:
            ds = ds * slope_of_cap
        ds = (ds * static.scale).astype(k.dtype)
        dq = dq + dot("bkgts,bksd->bkgtd", ds, k)
        dk = dot("bkgts,bkgtd->bksd", ds, q)
        dk, dv = _add_block(grads.k, dk, k_start), _add_block(grads.v, dv, k_start)
        return dq, _Grads(dk, dv, dbias, dslopes)

    low, high = _block_range(static, mask, q_start)
    dq, grads = jax.lax.fori_loop(low, high, visit, (jnp.zeros(q.shape, jnp.float32), grads))
    return grads, dq


_attend.defvjp(_attend_fwd, _attend_bwd)


def _block_range(static: _Static, mask: Mask, q_start) -> tuple[Array, Array]:
    """The key blocks [low, high) that some query of the block may see."""
    low, high = mask.key_range((q_start, static.block_q), static.num_keys)
    low, high = jnp.asarray(low, jnp.int32), jnp.asarray(high, jnp.int32)
    return low // static.block_k, (high + static.block_k - 1) // static.block_k


def _distance(mask: Mask, q_span: Span, k_span: Span) -> Array:
    """|q_index - k_index| as [B|1,1,1,tq,tk] float32."""
    distance = jnp.abs(mask.relative_index(q_span, k_span)).astype(jnp.float32)
    return distance.reshape(-1, 1, 1, q_span[1], k_span[1])


def _block(x: Array, start, size: int) -> Array:
    """A block of positions, the axis before the last."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=-2)


def _add_block(total: Array, x: Array, start) -> Array:
    """`total` with `x` added to the block of positions at `start`."""
    old = _block(total, start, x.shape[-2])
    return jax.lax.dynamic_update_slice_in_dim(total, old + x, start, axis=total.ndim - 2)


def _bias_tile(bias: Array, q_span: Span, k_span: Span) -> Array:
    for axis, (start, size) in ((2, q_span), (3, k_span)):
        if bias.shape[axis] != 1:
            bias = jax.lax.dynamic_slice_in_dim(bias, start, size, axis=axis)
    return bias


def _add_bias_tile(total: Array, ds: Array, q_span: Span, k_span: Span) -> Array:
    """Adds a tile's score gradient to the bias gradient, summed over the bias's broadcast axes."""
    ds = ds.reshape(ds.shape[0], ds.shape[1] * ds.shape[2], *ds.shape[3:])  # [B,H,tq,tk]
    sums = tuple(axis for axis in range(4) if total.shape[axis] == 1)
    old = _bias_tile(total, q_span, k_span)
    starts = [
        start if size != 1 else 0
        for start, size in zip((0, 0, q_span[0], k_span[0]), total.shape, strict=True)
    ]
    return jax.lax.dynamic_update_slice(total, old + ds.sum(axis=sums, keepdims=True), starts)


def _join_blocks(x: Array, axis: int) -> Array:
    """[N, ..., block, ...] -> [..., N * block, ...] with the blocks in order along `axis`."""
    x = jnp.moveaxis(x, 0, axis - 1)
    shape = list(x.shape)
    shape[axis - 1 : x.ndim + axis + 1] = [shape[axis - 1] * shape[axis]]
    return x.reshape(shape)


def _pad(x: Array, axis: int, extra: int) -> Array:
    """Zeros at the end of one axis; an axis of size one broadcasts and is left alone."""
    if extra == 0 or x.shape[axis] == 1:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, extra)
    return jnp.pad(x, widths)
