"""Which tiles a kernel visits for a `ShardPattern`, in the orders that kernels need.

A sparse block of B tokens becomes kernel tiles of block_q x block_k positions: blocks larger than
a tile are split, and consecutive rows of blocks smaller than `block_q` are merged (MergeQ): the
tile then visits the union of their columns, and each visit says how many leading rows see it.

Within a row (or column) the tiles that need no mask come first. Everything here is numpy, computed
once while a program is traced.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxheads.attention.s2 import ShardPattern


class Tiles(NamedTuple):
    """A flat list of visits, int32 each; positions are counted in tiles."""

    head: np.ndarray
    """kv head; all its query heads make the same visits."""
    q: np.ndarray
    k: np.ndarray
    rows: np.ndarray
    """Leading rows of the query tile, in sparse blocks, that see the key tile (MergeQ)."""
    is_partial: np.ndarray
    """bool: some pair of the tile is invisible."""

    def take(self, order: np.ndarray) -> Tiles:
        """The visits in another order, or some of them."""
        return Tiles(*(x[order] for x in self))


class Shape(NamedTuple):
    """The sizes of a call's tiles."""

    num_tokens: int  # before padding
    align: int  # tokens are padded to a multiple of this
    block_q: int
    block_k: int
    row: int  # query rows that one step of `Tiles.rows` stands for
    num_heads: int  # kv heads
    is_causal: bool

    @property
    def padded(self) -> int:
        """Tokens in whole tiles."""
        return -(-self.num_tokens // self.align) * self.align

    @property
    def num_q(self) -> int:
        """Tiles of queries."""
        return self.padded // self.block_q

    @property
    def num_k(self) -> int:
        """Tiles of keys."""
        return self.padded // self.block_k

    @property
    def merged(self) -> int:
        """Rows of sparse blocks in a query tile: 1 without MergeQ."""
        return self.block_q // self.row


def shape_of(
    pattern: ShardPattern, num_tokens: int, block_q: int, block_k: int, align: int
) -> Shape:
    """Checks tile sizes against a pattern.

    Raises:
      ValueError: a tile size that is no power of two, a key tile larger than the sparse block, or
        MergeQ on a pattern whose rows that see a past column are not a prefix.
    """
    block = pattern.block
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size < 1 or size & (size - 1):
            raise ValueError(f"{name}={size} is not a power of two; tiles halve or merge blocks.")
    if block_k > block:
        raise ValueError(
            f"block_k={block_k} is larger than the sparse block of {block} tokens; a key tile must "
            "lie inside one block."
        )
    if block_q > block and not pattern.is_kv_cache_efficient():
        raise ValueError(
            f"block_q={block_q} merges {block_q // block} rows of blocks, which needs a pattern "
            "where the rows that see a past column are a prefix (is_kv_cache_efficient()); pass "
            f"block_q={block} or less."
        )
    num_heads = pattern.num_kv_heads or pattern.num_heads
    row = min(block, block_q)
    return Shape(num_tokens, align, block_q, block_k, row, num_heads, pattern.causal)


@functools.lru_cache(maxsize=32)
def tiles_of(pattern: ShardPattern, shape: Shape) -> Tiles:
    """All visits of a pattern, by kv head, query tile, whether they need a mask, key tile."""
    num_blocks = -(-shape.padded // pattern.block)
    index, count = (np.asarray(x) for x in pattern.tile_lists(num_blocks))
    head, i, n = np.nonzero(np.arange(index.shape[-1]) < count[..., None])
    j = index[head, i, n]
    head, i, j = _split(head, i, j, pattern.block // shape.row, pattern.block // shape.block_k)
    keep = (i * shape.row < shape.padded) & (j * shape.block_k < shape.padded)
    if shape.is_causal:
        keep &= j * shape.block_k < (i + 1) * shape.row
    head, i, j = head[keep], i[keep], j[keep]
    head, i, j, rows = _merge(head, i, j, shape)
    k_end = (j + 1) * shape.block_k
    is_partial = (rows < shape.merged) | (k_end > shape.num_tokens)
    if shape.is_causal:
        is_partial |= k_end - 1 > i * shape.block_q
    head, i, j, rows = (np.asarray(x, np.int32) for x in (head, i, j, rows))
    tiles = Tiles(head, i, j, rows, is_partial)
    return tiles.take(np.lexsort((tiles.k, tiles.is_partial, tiles.q, tiles.head)))


def by_column(tiles: Tiles) -> Tiles:
    """The same visits by kv head, key tile, whether they need a mask, query tile."""
    return tiles.take(np.lexsort((tiles.q, tiles.is_partial, tiles.k, tiles.head)))


def check_no_empty(group: np.ndarray, num_groups: int, name: str) -> None:
    """Raises ValueError where a row or column is never visited: no kernel would write it."""
    if len(np.unique(group)) != num_groups:
        raise ValueError(
            f"the pattern leaves {num_groups - len(np.unique(group))} {name} without any visible "
            "block; let every block see itself (local_blocks >= 1), or use impl='dense'."
        )


def ends(group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each visit is the first and the last of its group; groups are consecutive."""
    change = group[1:] != group[:-1]
    return np.r_[True, change], np.r_[change, True]


def padded_lists(group: np.ndarray, word: np.ndarray, is_partial: np.ndarray, num_groups: int):
    """Lists per group for kernels that loop: (words [n,S], counts [n,2]), int32.

    S is a power of two; counts are the visits without a mask and all visits.
    """
    total = np.bincount(group, minlength=num_groups)
    full = np.bincount(group[~is_partial], minlength=num_groups)
    size = 1 << (max(int(total.max()), 1) - 1).bit_length()
    words = np.zeros((num_groups, size), np.int32)
    start = np.cumsum(total) - total
    words[group, np.arange(len(group)) - start[group]] = word
    return words, np.stack([full, total], axis=-1).astype(np.int32)


def _split(head, i, j, rows: int, columns: int):
    """Every block as rows x columns tiles."""
    if rows == columns == 1:
        return head, i, j
    down, across = (x.reshape(-1) for x in np.mgrid[:rows, :columns])
    repeat = lambda x, n, part: (x[:, None] * n + part).reshape(-1)
    same = np.zeros_like(down)
    return repeat(head, 1, same), repeat(i, rows, down), repeat(j, columns, across)


def _merge(head, i, j, shape: Shape):
    """Rows of blocks as query tiles: (head, tile, key tile, leading rows that see it)."""
    merged = shape.merged
    if merged == 1:
        return head, i, j, np.ones_like(i)
    key = (head.astype(np.int64) * shape.num_q + i // merged) * shape.num_k + j
    unique, place = np.unique(key, return_inverse=True)
    rows = np.zeros(len(unique), np.int64)
    np.maximum.at(rows, place, i % merged + 1)
    seen = np.bincount(place)
    tile, j = unique // shape.num_k, unique % shape.num_k
    i = tile % shape.num_q
    # Rows before a key tile's own are hidden by causality, not by the cut-off.
    before = np.maximum(j * shape.block_k // shape.row - i * merged, 0)
    if np.any(seen != rows - before):
        raise ValueError(
            "the rows that see a key block are not consecutive, so their query rows cannot be "
            "merged; pass block_q no larger than the sparse block."
        )
    return tile // shape.num_q, i, j, rows
