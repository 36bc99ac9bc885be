"""Core tokens of CCA-attention: finished groups of g tokens, pooled into one key and value each.

    a[i,h] = softmax_{u<g}( scale q[ig+g-1,h] . k[ig+u,h//G] )    the last token looks back
    KG[i] = sum_u a[i,u] k[ig+u],   VG[i] = sum_u a[i,u] v[ig+u]

Groups are counted from the first token of each document. `Places` therefore gives every token an
index in which documents begin at multiples of g: then "which group" and "which cores are visible"
are functions of the index alone, for packed rows, left padding, pieces of a text and parts of a
sequence that lie on different devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.typing import Array

POOLS = ("cca", "mean", "max", "random", "last")
GQA_POOLS = ("mean", "per_query_head")
BOUNDARIES = ("disjoint", "printed")
ROPES = ("rotated", "group_end")
IMPLS = ("auto", "dense", "blocked")
NOWHERE = 1 << 30  # the index of a core that does not exist: after every query

Rotate = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class CCAOptions:
    """What parentheses after `cca` may set; g and s may differ from those of training.

    Attributes:
      group_size: g, tokens in a group.
      window_size: s, the least number of newest tokens that are seen exactly.
      pool_func: "cca" is the method; controls: "mean", "max" (its largest weight only), "random"
        (one member by `seed`), "last" (the last member).
      gqa_pool: under grouped queries, "mean" over the query heads of a kv head, or
        "per_query_head": a core for every query head, and G times the cache of cores.
      boundary: "disjoint", or "printed": the window one token longer, which counts it twice.
      rope: "rotated" pools rotated keys; "group_end" turns the members to the position of the
        group's last token first.
      seed: of "random".
      impl: "dense" (all scores in memory), "blocked", or "auto".
    """

    group_size: int = 16
    window_size: int = 1024
    pool_func: str = "cca"
    gqa_pool: str = "mean"
    boundary: str = "disjoint"
    rope: str = "rotated"
    seed: int = 0
    impl: str = "auto"

    def __post_init__(self):
        for name in ("group_size", "window_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"cca: {name}={value!r} must be an integer of at least 1.")
        for name, known in (
            ("pool_func", POOLS),
            ("gqa_pool", GQA_POOLS),
            ("boundary", BOUNDARIES),
            ("rope", ROPES),
            ("impl", IMPLS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"cca: {name}={getattr(self, name)!r} is not one of {', '.join(known)}."
                )

    @property
    def reach(self) -> int:
        """Most exact tokens that a query sees, itself included."""
        return self.window_size + self.group_size - (self.boundary == "disjoint")

    def num_cores_seen(self, index: Array) -> Array:
        """j: the cores before group j are visible from the token at `index`."""
        return (index + 1 - self.window_size) // self.group_size

    def sees_exactly(self, q_index: Array, k_index: Array) -> Array:
        """Whether a key is late enough to be exact; causality and documents are left to a mask."""
        first = self.num_cores_seen(q_index) * self.group_size
        return k_index >= first - (self.boundary == "printed")


class Places(NamedTuple):
    """Where tokens lie; `index` grows along the row."""

    index: Array
    """[B,T] int32; every document begins at a multiple of g."""
    run: Array
    """[B,T] int32: which document of the row, 0 for padding."""
    begin: Array
    """[B,T] int32: the token, counted along the row, at which the document begins."""


class Cores(NamedTuple):
    """Core tokens and which groups they stand for."""

    k: Array
    """[B,m,C,D]: C = K, or H under ``gqa_pool="per_query_head"``."""
    v: Array
    """[B,m,C,W]"""
    index: Array | None
    """[B,m] int32: the group, `Places.index` // g; None: 0..m-1."""
    run: Array | None
    """[B,m] int32 document, 0 for none; None: all tokens are of one document."""


def places(segment_ids: Array, group_size: int, offset: Array | None = None) -> Places:
    """Places of tokens with ids [B,T], each contiguous run of one id a document; 0 is padding.

    `offset` [B]: how many tokens of the first document come before these.
    """
    token = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    offset = jnp.zeros(segment_ids.shape[0], jnp.int32) if offset is None else offset
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    changes = jnp.pad(changes, ((0, 0), (1, 0)))
    begin = jax.lax.cummax(jnp.where(changes, token, -offset[:, None]), axis=1)
    before = jnp.pad(begin, ((0, 0), (1, 0)))[:, :-1]
    gap = jnp.where(changes, (before - token) % group_size, 0)  # up to the next multiple of g
    index = offset[:, None] + token + jnp.cumsum(gap, axis=1)
    run = jnp.where(segment_ids == 0, 0, 1 + jnp.cumsum(changes, axis=1))
    return Places(index.astype(jnp.int32), run.astype(jnp.int32), begin)


def pool(
    q: Array,
    k: Array,
    v: Array,
    number: Array,
    options: CCAOptions,
    scale: float,
    rotate: Rotate | None,
) -> tuple[Array, Array, Array]:
    """Pools whole groups.

    Args:
      q: [B,m,H,D] queries of the groups' last tokens.
      k: [B,m,g,K,D] keys, rotated if at all; v: [B,m,g,K,W].
      number: [m] or [B,m], counting a document's groups from 0.
      options: which weights.
      scale: factor on q.k.
      rotate: (x, positions) -> x, for ``rope="group_end"``.
    Returns:
      KG [B,m,C,D], VG [B,m,C,W], weights [B,m,C,g] float32.
    """
    batch, num_groups, num_heads, head_dim = q.shape
    size, num_kv_heads = k.shape[2:4]
    shared = num_heads // num_kv_heads
    grouped = q.reshape(batch, num_groups, num_kv_heads, shared, head_dim)  # [B,m,K,G,D]
    shape = (*grouped.shape[:4], size)
    if options.pool_func in ("cca", "max"):
        scores = jnp.einsum("bikgd,biukd->bikgu", grouped, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scale * scores.astype(jnp.float32), axis=-1)
        if options.pool_func == "max":
            weights = jax.nn.one_hot(jnp.argmax(weights, axis=-1), size)
    elif options.pool_func == "mean":
        weights = jnp.full(shape, 1 / size, jnp.float32)
    else:
        member = jnp.full(number.shape, size - 1)
        if options.pool_func == "random":
            draw = lambda n: jax.random.randint(
                jax.random.fold_in(jax.random.key(options.seed), n), (), 0, size
            )
            member = jax.vmap(draw)(number.reshape(-1)).reshape(number.shape)
        chosen = jax.nn.one_hot(member, size)
        weights = jnp.broadcast_to(jnp.expand_dims(chosen, (-3, -2)), shape)
    weights = weights.astype(jnp.float32)
    if options.rope == "group_end":  # the weights are those of the rotated keys
        k = _advance(k, rotate)
    if options.gqa_pool == "mean":
        weights = weights.mean(axis=3)  # [B,m,K,g]
    else:
        weights = weights.reshape(batch, num_groups, num_heads, size)
        k, v = (jnp.repeat(x, shared, axis=3) for x in (k, v))
    sum_up = lambda x: jnp.einsum(
        "bicu,biucd->bicd", weights, x, preferred_element_type=jnp.float32
    ).astype(x.dtype)
    return sum_up(k), sum_up(v), weights


def _advance(k: Array, rotate: Rotate | None) -> Array:
    """Rotated keys [B,m,g,K,D] turned on to the position of their group's last member."""
    if rotate is None:
        raise ValueError("cca: rope='group_end' needs rotary positions; use rope='rotated'.")
    batch, num_groups, size = k.shape[:3]
    ahead = jnp.tile(jnp.arange(size - 1, -1, -1), num_groups)
    unit = rotate(jnp.ones((1, 1, 1, k.shape[-1])), jnp.zeros(1, jnp.int32))  # its scaling
    turned = rotate(k.reshape(batch, num_groups * size, *k.shape[3:]), ahead) / unit
    return turned.reshape(k.shape).astype(k.dtype)


def pool_row(
    q: Array, k: Array, v: Array, options: CCAOptions, scale: float, rotate: Rotate | None
) -> tuple[Cores, Array]:
    """The cores of a row that is one document, and their weights [B,m,C,g]."""
    size = options.group_size
    count = k.shape[1] // size
    cut = lambda x: x[:, : count * size].reshape(x.shape[0], count, size, *x.shape[2:])
    last, number = cut(q)[:, :, -1], jnp.arange(count)
    kg, vg, weights = pool(last, cut(k), cut(v), number, options, scale, rotate)
    return Cores(kg, vg, None, None), weights


class Pooled(NamedTuple):
    """Groups found among tokens, pooled."""

    cores: Cores
    weights: Array
    """[B,m,C,g]"""
    tokens: Array
    """[B,m,g] int32: the members, counted among the keys given; past them where there is none."""
    number: Array
    """[B,m] the group's number in its document."""


def pool_found(
    q: Array,
    k: Array,
    v: Array,
    where: Places,
    options: CCAOptions,
    scale: float,
    rotate: Rotate | None,
) -> Pooled:
    """The cores of all groups whose last token is one of the queries'.

    Args:
      q: [B,T,H,D] queries of the last T of the keys' tokens.
      k: [B,S,K,D], v: [B,S,K,W], S >= T.
      where: places of the S tokens.
      options: which weights.
      scale: factor on q.k.
      rotate: for ``rope="group_end"``.
    """
    size, (batch, length) = options.group_size, where.index.shape
    before = length - q.shape[1]
    count = length // size if before == 0 else -(-q.shape[1] // size)
    pad = ((0, 0), (0, size - 1))
    ends_inside = jnp.pad(where.run, pad)[:, size - 1 :] == where.run
    is_first = (where.index % size == 0) & (where.run != 0) & ends_inside
    is_first &= jnp.arange(length) + size - 1 >= before
    find = lambda row: jnp.nonzero(row, size=count, fill_value=length)[0]
    first = jax.vmap(find)(is_first).astype(jnp.int32)  # [B,m]
    exists = first < length
    tokens = first[..., None] + jnp.arange(size)
    rows = jnp.arange(batch)[:, None]
    at = lambda x, n: x[rows, jnp.clip(n, 0, x.shape[1] - 1)]
    members = lambda x: x[rows[..., None], jnp.clip(tokens, 0, length - 1)]
    number = (first - at(where.begin, first)) // size
    last = at(q, tokens[..., -1] - before)
    kg, vg, weights = pool(last, members(k), members(v), number, options, scale, rotate)
    index = jnp.where(exists, at(where.index, first) // size, NOWHERE)
    run = jnp.where(exists, at(where.run, first), 0)
    return Pooled(Cores(kg, vg, index, run), weights, tokens, number)
