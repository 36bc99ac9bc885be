"""Grouped softmax over regular blocks: the arithmetic of one tile, and attention without [T,S].

A period is l tokens and their landmark. For one query and a far block

    a = softmax of its tokens' scores,   (landmark's score, a V) = one virtual key and value

which joins the outer softmax beside the tokens of the query's own block. `block_attention` takes
queries and keys in tiles of whole periods, with an online softmax: before the tile on the diagonal,
where blocks of both kinds are (`take_apart`), all blocks are far (`take_far`), and after it none
is read. The backward pass forms the scores again. With P the weight of a block, g = a . (dy V) and
delta = dy . y,

    d score of a far token = P a (dy v - g)         of its landmark = P (g - delta)
    d score of an own token = p (dy v - delta)
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.attention.masks import FLOOR, penalty
from jaxheads.typing import Array, vary_like

TILE = 512
"""Keys, and queries, that a step of the loops takes, at least one period."""


class Parts(NamedTuple):
    """The scores of one tile of m periods, taken apart; masked scores are `MASK_VALUE`."""

    inner: Array
    """[...,m,l] weights inside far blocks; 0 elsewhere."""
    gates: Array
    """[...,m] scores of the landmarks of far blocks."""
    own: Array | None
    """[...,m,l] scores of the tokens of the query's own block; None where it is in no period."""

    @property
    def top(self) -> Array:
        """[...] the highest score of the outer softmax, at least `FLOOR`."""
        top = jnp.maximum(self.gates.max(-1), FLOOR)
        return top if self.own is None else jnp.maximum(top, self.own.max((-2, -1)))

    def weights(self, shift: Array) -> Weights:
        """exp(score - shift)."""
        gates = jnp.exp(self.gates - shift[..., None])
        far = gates[..., None] * self.inner
        if self.own is None:
            return Weights(gates, far, None, far, gates.sum(-1))
        own = jnp.exp(self.own - shift[..., None, None])
        return Weights(gates, far, own, far + own, gates.sum(-1) + own.sum((-2, -1)))


class Weights(NamedTuple):
    """Parts of a tile by what they weigh in the outer softmax, not yet divided."""

    gates: Array
    """[...,m] of far blocks."""
    far: Array
    """[...,m,l] of their tokens."""
    own: Array | None
    """[...,m,l] of the tokens of the query's own block."""
    tokens: Array
    """[...,m,l] of all tokens."""
    total: Array
    """[...] their sum."""


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
    gates = scores[..., -1] + penalty(sees[..., -1] & is_far)
    return Parts(_inner_softmax(tokens + penalty(far)), gates, tokens + penalty(near))


def take_far(scores: Array, sees: Array | None) -> Parts:
    """`take_apart` where every block is far.

    Args:
      scores: [...,m,l+1] float32.
      sees: broadcastable to scores; None: everything.
    """
    scores = scores if sees is None else scores + penalty(sees)
    return Parts(_inner_softmax(scores[..., :-1]), scores[..., -1], None)


def _inner_softmax(tokens: Array) -> Array:
    """Over the last axis; 0 where all is masked."""
    shift = jax.lax.stop_gradient(jnp.maximum(tokens.max(-1, keepdims=True), FLOOR))
    weights = jnp.exp(tokens - shift)
    return weights / nonzero(weights.sum(-1, keepdims=True))


class Regular(NamedTuple):
    """What is fixed about a call."""

    block_size: int
    """l"""
    scale: float
    first: int
    """The index of the first query among the keys, a multiple of l + 1."""


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
    length, more = q.shape[1], -q.shape[1] % (regular.block_size + 1)
    last = lambda x: jnp.pad(x, ((0, 0), (0, more), *((0, 0),) * (x.ndim - 2)))
    q_ids = None if q_ids is None else last(q_ids)
    y: Any = _attend(last(q), k, v, q_ids, k_ids, regular)
    return y[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, q_ids, k_ids, regular: Regular) -> Array:
    return _forward(q, k, v, q_ids, k_ids, regular)[0]


def _forward(q, k, v, q_ids, k_ids, regular: Regular) -> tuple[Array, Array]:
    """y [B,T,K,G,W] and lse [N,B,K,G,t], that of the outer softmax by tiles of t queries."""
    batch, _, kv_heads, groups, _ = q.shape
    cut = _cut(q, k, regular)
    keys = _key_tiles(k, v, k_ids, cut)

    def attend(_, queries: _Queries):
        rows = (batch, kv_heads, groups, queries.q.shape[1])
        state = (
            jnp.zeros((*rows, v.shape[-1]), jnp.float32),
            jnp.full(rows, FLOOR, jnp.float32),
            jnp.zeros(rows, jnp.float32),
        )

        def step(j: Array, state, is_diagonal: bool = False):
            acc, top, total = state
            tile = _take(keys, j)
            parts = _parts(queries, tile, regular, is_diagonal)
            new = jnp.maximum(top, parts.top)
            weights = parts.weights(new)
            keep = jnp.exp(top - new)
            gained = jnp.einsum(
                "bkgtml,bmlkw->bkgtw",
                weights.tokens.astype(v.dtype),
                tile.v[:, :, :-1],
                preferred_element_type=jnp.float32,
            )
            return acc * keep[..., None] + gained, new, total * keep + weights.total

        state = vary_like(state, q, k, v, q_ids, k_ids)
        if cut.num_keys > 1:
            state = jax.lax.fori_loop(0, queries.diagonal, step, state)
        acc, top, total = step(queries.diagonal, state, is_diagonal=True)
        total = nonzero(total)
        return None, (jnp.einsum("bkgtw->btkgw", acc / total[..., None]), top + jnp.log(total))

    _, (y, lse) = _over(attend, None, _query_tiles(q, q_ids, cut))
    return _join(y), lse


def _backward_rule(regular: Regular, kept, dy: Array):
    q, k, v, q_ids, k_ids, y, lse = kept
    dy = dy.astype(jnp.float32)
    cut = _cut(q, k, regular)
    keys = _key_tiles(k, v, k_ids, cut)
    d_keys = vary_like(
        (jnp.zeros(keys.k.shape, jnp.float32), jnp.zeros(keys.v.shape, jnp.float32)),
        q, k, v, q_ids, k_ids, dy,
    )  # fmt: skip

    def go_back(d_keys, inputs):
        queries, dy, y, lse = inputs
        delta = jnp.einsum("btkgw,btkgw->bkgt", dy, y)
        d_q = vary_like(jnp.zeros(queries.q.shape, jnp.float32), q, k, v, q_ids, k_ids, dy)

        def step(j: Array, state, is_diagonal: bool = False):
            d_q, d_k, d_v = state
            tile = _take(keys, j)
            parts = _parts(queries, tile, regular, is_diagonal)
            weights = parts.weights(lse)
            d_weights = jnp.einsum("btkgw,bmlkw->bkgtml", dy, tile.v[:, :, :-1].astype(jnp.float32))
            mean = (parts.inner * d_weights).sum(-1)  # g
            d_token = weights.far * (d_weights - mean[..., None])
            if weights.own is not None:
                d_token = d_token + weights.own * (d_weights - delta[..., None, None])
            d_gate = weights.gates * (mean - delta[..., None])
            d_scores = regular.scale * jnp.concatenate([d_token, d_gate[..., None]], axis=-1)
            d_q = d_q + jnp.einsum("bkgtmp,bmpkd->btkgd", d_scores, tile.k.astype(jnp.float32))
            gained = jnp.einsum("bkgtmp,btkgd->bmpkd", d_scores, queries.q.astype(jnp.float32))
            d_k = d_k.at[j].add(gained)
            gained = jnp.einsum("bkgtml,btkgw->bmlkw", weights.tokens, dy)
            return d_q, d_k, d_v.at[j, :, :, :-1].add(gained)

        state = (d_q, *d_keys)
        if cut.num_keys > 1:
            state = jax.lax.fori_loop(0, queries.diagonal, step, state)
        d_q, d_k, d_v = step(queries.diagonal, state, is_diagonal=True)
        return (d_k, d_v), d_q

    by_tile = lambda x: jnp.moveaxis(x.reshape(x.shape[0], cut.num_queries, -1, *x.shape[2:]), 1, 0)
    inputs = (_query_tiles(q, q_ids, cut), by_tile(dy), by_tile(y), lse)
    (d_k, d_v), d_q = _over(go_back, d_keys, inputs)
    like = lambda x, given: _join(x).reshape(given.shape).astype(given.dtype)
    return like(d_q, q), like(d_k, k), like(d_v, v), None, None


def _forward_rule(q, k, v, q_ids, k_ids, regular: Regular):
    y, lse = _forward(q, k, v, q_ids, k_ids, regular)
    return y, (q, k, v, q_ids, k_ids, y, lse)


_attend.defvjp(_forward_rule, _backward_rule)


class _Cut(NamedTuple):
    """Queries and keys in tiles of the same size."""

    periods: int
    """m, periods of a tile."""
    num_queries: int
    """Tiles of queries."""
    num_keys: int
    """Tiles of keys."""
    first: int
    """The tile of keys at the first queries."""
    period: int
    """l + 1"""


class _Queries(NamedTuple):
    """A tile of queries."""

    q: Array
    """[B,t,K,G,D]"""
    ids: Array | None
    """[B,t]"""
    diagonal: Array
    """The tile of keys at the same places."""


class _Keys(NamedTuple):
    """m periods of keys."""

    k: Array
    """[B,m,P,K,D]"""
    v: Array
    """[B,m,P,K,W]"""
    ids: Array | None
    """[B,m,P]"""


def _cut(q: Array, k: Array, regular: Regular) -> _Cut:
    period = regular.block_size + 1
    num_queries, num_keys = q.shape[1] // period, k.shape[1] // period
    first = regular.first // period
    common = math.gcd(num_queries, num_keys, first)
    size = max(
        m for m in range(1, common + 1) if common % m == 0 and (m == 1 or m * period <= TILE)
    )
    return _Cut(size, num_queries // size, num_keys // size, first // size, period)


def _key_tiles(k: Array, v: Array, k_ids: Array | None, cut: _Cut) -> _Keys:
    """The keys in tiles [N, ...]."""

    def of(x: Array) -> Array:  # [B,S,...] -> [N,B,m,P,...]
        shape = (x.shape[0], cut.num_keys, cut.periods, cut.period, *x.shape[2:])
        return jnp.moveaxis(x.reshape(shape), 1, 0)

    return _Keys(of(k), of(v), None if k_ids is None else of(k_ids))


def _query_tiles(q: Array, q_ids: Array | None, cut: _Cut) -> _Queries:
    """The queries in tiles [N, ...]."""

    def of(x: Array) -> Array:  # [B,T,...] -> [N,B,t,...]
        shape = (x.shape[0], cut.num_queries, cut.periods * cut.period, *x.shape[2:])
        return jnp.moveaxis(x.reshape(shape), 1, 0)

    diagonal = cut.first + jnp.arange(cut.num_queries)
    return _Queries(of(q), None if q_ids is None else of(q_ids), diagonal)


def _take(keys: _Keys, j: Array) -> _Keys:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, j, keepdims=False), keys)


def _over(step, carry, tiles):
    """`jax.lax.scan`, without a loop where there is one tile."""
    if jax.tree.leaves(tiles)[0].shape[0] > 1:
        return jax.lax.scan(step, carry, tiles)
    carry, out = step(carry, jax.tree.map(lambda x: x[0], tiles))
    return carry, jax.tree.map(lambda x: x[None], out)


def _join(x: Array) -> Array:
    """[N,B,t,...] -> [B,N t,...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _parts(queries: _Queries, tile: _Keys, regular: Regular, is_diagonal: bool) -> Parts:
    """The scores [B,K,G,t,m,P] of a tile, taken apart."""
    scores = regular.scale * jnp.einsum(
        "btkgd,bmpkd->bkgtmp", queries.q, tile.k, preferred_element_type=jnp.float32
    )
    scores, same = scores.astype(jnp.float32), None
    if queries.ids is not None and tile.ids is not None:
        same = (queries.ids[:, :, None, None] == tile.ids[:, None]) & (tile.ids != 0)[:, None]
        same = same[:, None, None]  # [B,1,1,t,m,P]
    if not is_diagonal:
        return take_far(scores, same)
    # Tiles begin where periods do, so that places within them are all that counts.
    is_far, sees = regular_masks(
        jnp.arange(scores.shape[3]), jnp.arange(scores.shape[4]), regular.block_size + 1
    )
    return take_apart(scores, sees if same is None else sees & same, is_far)


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
    weights = parts.weights(jax.lax.stop_gradient(parts.top))
    return weights.tokens / nonzero(weights.total)[..., None, None]
