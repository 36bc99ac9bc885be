"""Grouped softmax over regular blocks: the arithmetic of one tile, and attention without [T,S].

A period is l tokens and their landmark. For one query and a far block

    a = softmax of its tokens' scores,   (landmark's score, a V) = one virtual key and value

which joins the outer softmax beside the tokens of the query's own block. `block_attention` goes
through the keys in tiles with an online softmax; its backward pass forms the scores again. With
P the weight of a block, g = a . (dy V) and delta = dy . y,

    d score of a far token = P a (dy v - g)         of its landmark = P (g - delta)
    d score of an own token = p (dy v - delta)
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.attention.masks import FLOOR, penalty
from jaxheads.typing import Array, vary_like

TILE = 512
"""Keys that a step of the loop takes, at least one period."""


class Parts(NamedTuple):
    """The scores of one tile of m periods, taken apart; masked scores are `MASK_VALUE`."""

    inner: Array
    """[...,m,l] weights inside far blocks; 0 elsewhere."""
    gates: Array
    """[...,m] scores of the landmarks of far blocks."""
    own: Array
    """[...,m,l] scores of the tokens of the query's own block."""

    @property
    def top(self) -> Array:
        """[...] the highest score of the outer softmax, at least `FLOOR`."""
        return jnp.maximum(jnp.maximum(self.gates.max(-1), self.own.max((-2, -1))), FLOOR)

    def weights(self, shift: Array) -> tuple[Array, Array, Array]:
        """exp(score - shift): (gates [...,m], own [...,m,l], of all tokens [...,m,l])."""
        gates = jnp.exp(self.gates - shift[..., None])
        own = jnp.exp(self.own - shift[..., None, None])
        return gates, own, gates[..., None] * self.inner + own


def take_apart(scores: Array, sees: Array, is_far: Array) -> Parts:
    """The inner softmax of far blocks, and what goes into the outer one.

    Args:
      scores: [...,m,l+1] float32, a landmark last in each period.
      sees: broadcastable to scores; false for keys of another document or padding, for later keys,
        and for the landmark of a query's own block.
      is_far: broadcastable to [...,m]; whether a query reads a block through its landmark.
    """
    tokens, sees_token = scores[..., :-1], sees[..., :-1]
    far, near = sees_token & is_far[..., None], sees_token & ~is_far[..., None]
    inside = tokens + penalty(far)
    shift = jax.lax.stop_gradient(jnp.maximum(inside.max(-1, keepdims=True), FLOOR))
    inner = jnp.exp(inside - shift)
    inner = inner / nonzero(inner.sum(-1, keepdims=True))
    gates = scores[..., -1] + penalty(sees[..., -1] & is_far)
    return Parts(inner, gates, tokens + penalty(near))


class Regular(NamedTuple):
    """What is fixed about a call."""

    block_size: int
    """l"""
    scale: float
    first: int
    """The index of the first query among the keys."""


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def block_attention(
    q: Array, k: Array, v: Array, q_ids: Array | None, k_ids: Array | None, regular: Regular
) -> Array:
    """Landmark attention over regular blocks.

    Args:
      q: [B,T,K,G,D] rotated queries.
      k: [B,S,K,D] rotated keys, S a multiple of l + 1; v: [B,S,K,W].
      q_ids: [B,T] documents of the queries, k_ids: [B,S] of the keys, 0 for padding; both or none.
      regular: sizes.
    Returns:
      y [B,T,K,G,W] float32.
    """
    return _forward(q, k, v, q_ids, k_ids, regular)[0]


def _forward(q, k, v, q_ids, k_ids, regular: Regular) -> tuple[Array, Array]:
    """y [B,T,K,G,W] and lse [B,K,G,T], that of the outer softmax."""
    batch, length, kv_heads, groups, _ = q.shape
    rows = (batch, kv_heads, groups, length)
    state = (
        jnp.zeros((*rows, v.shape[-1]), jnp.float32),
        jnp.full(rows, FLOOR, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )
    state = vary_like(state, q, k, v, q_ids, k_ids)

    def step(state, tile: _Tile):
        acc, top, total = state
        parts = _parts(q, tile, q_ids, regular)
        new = jnp.maximum(top, parts.top)
        gates, own, weights = parts.weights(new)
        keep = jnp.exp(top - new)
        gained = jnp.einsum(
            "bkgtml,bmlkw->bkgtw",
            weights.astype(v.dtype),
            tile.v[:, :, :-1],
            preferred_element_type=jnp.float32,
        )
        total = total * keep + gates.sum(-1) + own.sum((-2, -1))
        return (acc * keep[..., None] + gained, new, total), None

    (acc, top, total), _ = _over_tiles(step, state, _tiles(k, v, k_ids, regular))
    total = nonzero(total)
    return jnp.einsum("bkgtw->btkgw", acc / total[..., None]), top + jnp.log(total)


def _backward_rule(regular: Regular, kept, dy: Array):
    q, k, v, q_ids, k_ids, y, lse = kept
    dy = dy.astype(jnp.float32)
    delta = jnp.einsum("btkgw,btkgw->bkgt", dy, y)[..., None]  # [B,K,G,T,1]
    d_q = vary_like(jnp.zeros(q.shape, jnp.float32), q, k, v, q_ids, k_ids, dy)

    def step(d_q, tile: _Tile):
        parts = _parts(q, tile, q_ids, regular)
        gates, own, weights = parts.weights(lse)
        d_weights = jnp.einsum("btkgw,bmlkw->bkgtml", dy, tile.v[:, :, :-1].astype(jnp.float32))
        mean = (parts.inner * d_weights).sum(-1)  # g
        d_far = (gates[..., None] * parts.inner) * (d_weights - mean[..., None])
        d_token = d_far + own * (d_weights - delta[..., None])
        d_scores = jnp.concatenate([d_token, (gates * (mean - delta))[..., None]], axis=-1)
        d_scores = regular.scale * d_scores
        d_q = d_q + jnp.einsum("bkgtmp,bmpkd->btkgd", d_scores, tile.k.astype(jnp.float32))
        d_k = jnp.einsum("bkgtmp,btkgd->bmpkd", d_scores, q.astype(jnp.float32))
        d_v = jnp.einsum("bkgtml,btkgw->bmlkw", weights, dy)
        return d_q, (d_k, jnp.pad(d_v, ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0))))

    d_q, (d_k, d_v) = _over_tiles(step, d_q, _tiles(k, v, k_ids, regular))
    join = lambda x, like: jnp.moveaxis(x, 0, 1).reshape(like.shape).astype(like.dtype)
    return d_q.astype(q.dtype), join(d_k, k), join(d_v, v), None, None


def _forward_rule(q, k, v, q_ids, k_ids, regular: Regular):
    y, lse = _forward(q, k, v, q_ids, k_ids, regular)
    return y, (q, k, v, q_ids, k_ids, y, lse)


block_attention.defvjp(_forward_rule, _backward_rule)


class _Tile(NamedTuple):
    """m periods of keys."""

    k: Array
    """[B,m,P,K,D]"""
    v: Array
    """[B,m,P,K,W]"""
    ids: Array | None
    """[B,m,P]"""
    block: Array
    """[m] which periods they are."""


def _tiles(k: Array, v: Array, k_ids: Array | None, regular: Regular) -> _Tile:
    """The keys in tiles [N, ...]."""
    period = regular.block_size + 1
    num = k.shape[1] // period
    size = max(m for m in range(1, num + 1) if num % m == 0 and (m == 1 or m * period <= TILE))

    def cut(x: Array) -> Array:  # [B,S,...] -> [N,B,m,P,...]
        return jnp.moveaxis(x.reshape(x.shape[0], num // size, size, period, *x.shape[2:]), 1, 0)

    ids = None if k_ids is None else cut(k_ids)
    return _Tile(cut(k), cut(v), ids, jnp.arange(num).reshape(-1, size))


def _over_tiles(step, state, tiles: _Tile):
    """`jax.lax.scan`, without a loop where there is one tile."""
    if tiles.block.shape[0] > 1:
        return jax.lax.scan(step, state, tiles)
    state, out = step(state, jax.tree.map(lambda x: x[0], tiles))
    return state, jax.tree.map(lambda x: x[None], out)


def _parts(q: Array, tile: _Tile, q_ids: Array | None, regular: Regular) -> Parts:
    """The scores [B,K,G,T,m,P] of a tile, taken apart."""
    period = regular.block_size + 1
    scores = regular.scale * jnp.einsum(
        "btkgd,bmpkd->bkgtmp", q, tile.k, preferred_element_type=jnp.float32
    )
    index = regular.first + jnp.arange(q.shape[1])
    is_far, sees = regular_masks(index, tile.block, period)
    if q_ids is not None and tile.ids is not None:
        same = (q_ids[:, :, None, None] == tile.ids[:, None]) & (tile.ids != 0)[:, None]
        sees = sees & same[:, None, None]  # [B,1,1,T,m,P]
    return take_apart(scores.astype(jnp.float32), sees, is_far)


def regular_masks(index: Array, block: Array, period: int) -> tuple[Array, Array]:
    """Which blocks a query reads through their landmarks, and which keys it may see.

    Args:
      index: [...,T] places of the queries, from 0 where a block begins.
      block: [m] numbers of blocks.
    Returns:
      is_far [...,T,m], sees [...,T,m,period].
    """
    mine, offset = index // period, index % period
    is_far = block < mine[..., None]
    is_mine = block == mine[..., None]
    place = jnp.arange(period)
    upto = (place <= offset[..., None]) & (place < period - 1)  # [...,T,P]
    return is_far, is_far[..., None] | is_mine[..., None] & upto[..., None, :]


def nonzero(total: Array) -> Array:
    """A divisor for weights: 1 where there is nothing to divide, with derivatives that are 0."""
    return jnp.where(total == 0, 1.0, total)


def attend_once(parts: Parts) -> Array:
    """[...,m,l] weights of the tokens where a tile holds all that a query sees."""
    gates, own, weights = parts.weights(jax.lax.stop_gradient(parts.top))
    total = gates.sum(-1) + own.sum((-2, -1))
    return weights / nonzero(total)[..., None, None]
