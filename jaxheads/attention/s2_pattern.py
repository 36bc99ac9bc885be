"""Which blocks each head sees in S2-attention, as data: masks, tile lists, counts, cache sizes.

Causal local-stride pattern of kv head h over blocks of `block` tokens (i query, j key block):

    visible(h, i, j) = j <= i and (i - j < L or j mod V == r_h or h is a dense head)
    r_h = -(h * max(1, V // H) + head_offset) mod V

Everything here is NumPy on the host: a pattern is a frozen, hashable value, static under `jit`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

Position = Literal["absolute", "relative"]


class WorkList(NamedTuple):
    """All visible tiles in one flat order: by head, then query tile, then key tile. int32 each."""

    head: np.ndarray
    q_tile: np.ndarray
    kv_tile: np.ndarray
    first: np.ndarray
    """1 where the tile is the first of its query tile."""
    last: np.ndarray
    """1 where the tile is the last of its query tile."""


@dataclasses.dataclass(frozen=True)
class ShardPattern:
    """A sparsely sharded pattern: a dense local window and one key block in `stride` beyond it.

    Attributes:
      block: B, tokens in a block; a power of two, at least 16.
      local_blocks: L, blocks in the local window, the query's own included. Bidirectional patterns
        also take (left, right); an int means both sides.
      stride: V; beyond the window a head sees every V-th block. 1 is dense attention.
      num_heads: H query heads.
      num_kv_heads: K key/value heads, a divisor of H; None = H. The H/K query heads of a group
        share a pattern.
      head_offset: shifts the residue classes of all heads.
      num_dense_heads: the last so many kv heads see everything.
      homogeneous: all heads take the residue class of head 0 (a control; never covers the context).
      causal: whether only earlier tokens are visible.
      position: "absolute" keeps blocks by their index, "relative" by their distance (then all
        heads are equal); None = absolute if causal, else relative.
      residues: one class per kv head, instead of the formula.
      ranges: ((N1, v1), (N2, v2), ...), bounds on the distance in blocks and strides: a block at
        distance N_{k-1} <= |i - j| < N_k is visible if it is in the head's class modulo v_k. The
        last bound may be `math.inf`. Replaces `local_blocks` and `stride`; local-stride is
        ((L, 1), (inf, V)).
      always_diagonal: with `ranges`, every query block sees its own block whatever the classes.
      allow_incomplete_union: accept patterns whose heads together miss some blocks.
      allow_small_blocks: accept blocks under 16 tokens (toy problems).
      first_kv_head: index of the first kv head in the whole model, for slices (`for_heads`).
      total_heads: query heads of the whole model; None = `num_heads`.

    Raises:
      ValueError: a field breaks a rule above, or the heads' classes leave blocks that no head
        keeps (unless `allow_incomplete_union`).
    Example:
      >>> pattern = ShardPattern(64, 16, 8, num_heads=32)
      >>> pattern.residue(1), round(pattern.ideal_speedup(128), 2)
      (7, 3.04)

    References: Lin et al., 2024, arXiv:2407.17678; the class formula is that of the released
      kernels, which use the number of query heads under grouped queries too.
    """

    block: int
    local_blocks: int | tuple[int, int]
    stride: int
    num_heads: int
    num_kv_heads: int | None = None
    head_offset: int = 0
    num_dense_heads: int = 0
    homogeneous: bool = False
    causal: bool = True
    position: Position | None = None
    residues: tuple[int, ...] | None = None
    ranges: tuple[tuple[float, int], ...] | None = None
    always_diagonal: bool = True
    allow_incomplete_union: bool = False
    allow_small_blocks: bool = False
    first_kv_head: int = 0
    total_heads: int | None = None

    def __post_init__(self):
        set_field = lambda name, value: object.__setattr__(self, name, value)
        set_field("num_kv_heads", self.num_heads if self.num_kv_heads is None else self.kv_heads)
        set_field("position", self.position or ("absolute" if self.causal else "relative"))
        for name in ("local_blocks", "residues", "ranges"):
            set_field(name, _frozen(getattr(self, name)))
        if self.ranges is not None:
            _check_ranges(self.ranges)
            local_stride = len(self.ranges) == 2 and self.ranges[0][1] == 1
            if self.causal and local_stride and self.ranges[1][0] == math.inf:
                set_field("local_blocks", int(self.ranges[0][0]))
                set_field("stride", self.ranges[1][1])
                set_field("ranges", None)
        _check(self)
        opted_in = self.allow_incomplete_union or self.homogeneous or self.position == "relative"
        if not opted_in and not self.is_union_complete():
            kept = sorted({self.residue(h) for h in range(self.num_sparse_heads)})
            raise ValueError(
                f"the {self.num_sparse_heads} sparse kv heads keep the residue classes {kept} of "
                f"stride={self.stride}: no head would see the other blocks. Use a smaller stride, "
                "more kv heads, residues=..., a dense head, or allow_incomplete_union=True."
            )

    # The few derived numbers that everything below is written in.

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def group_size(self) -> int:
        """G = H / K query heads share a kv head."""
        return self.num_heads // self.kv_heads

    @property
    def num_sparse_heads(self) -> int:
        """Kv heads that are not dense; they come first."""
        return self.kv_heads - self.num_dense_heads

    @property
    def window(self) -> tuple[int, int]:
        """Blocks in the window to the left and to the right, the own block counted in each."""
        if isinstance(self.local_blocks, tuple):
            return self.local_blocks
        return self.local_blocks, self.local_blocks

    @property
    def is_local_stride(self) -> bool:
        """Causal, absolute, a window and one stride: the form that kernels and caches serve."""
        return self.causal and self.position == "absolute" and self.ranges is None

    def residue(self, kv_head: int, stride: int | None = None) -> int:
        """The class, modulo `stride`, of the blocks that a kv head keeps beyond its window.

        Args:
          kv_head: index in this pattern (in the slice, after `for_heads`).
          stride: modulus; None = the pattern's. Other moduli serve `ranges`.
        """
        if not 0 <= kv_head < self.kv_heads:
            raise ValueError(f"kv_head={kv_head} is not one of the {self.kv_heads} kv heads.")
        stride = self.stride if stride is None else stride
        if self.residues is not None:
            return self.residues[0 if self.homogeneous else kv_head] % stride
        step = max(1, stride // (self.total_heads or self.num_heads))
        head = 0 if self.homogeneous else self.first_kv_head + kv_head
        return -(head * step + self.head_offset) % stride

    def kv_residues(self) -> np.ndarray:
        """[K] int32: `residue` of every kv head."""
        return np.asarray([self.residue(h) for h in range(self.kv_heads)], np.int32)

    def is_dense_head(self, kv_head: int) -> bool:
        """Whether a kv head sees everything."""
        return kv_head >= self.num_sparse_heads

    def num_blocks(self, num_tokens: int) -> int:
        """N = ceil(T / B)."""
        return -(-num_tokens // self.block)

    def block_mask(
        self, n_q: int, n_kv: int | None = None, q_start: int = 0, kv_start: int = 0
    ) -> np.ndarray:
        """Which tiles each query head visits, bool [H,n_q,n_kv].

        Args:
          n_q: query blocks.
          n_kv: key blocks; None = `n_q`.
          q_start: index, in blocks, of the first query block.
          kv_start: index, in blocks, of the first key block.
        """
        masks = self._kv_block_mask(n_q, n_q if n_kv is None else n_kv, q_start, kv_start)
        return np.repeat(masks, self.group_size, axis=0)

    def token_mask(self, num_queries: int, num_keys: int | None = None) -> np.ndarray:
        """Which keys each query of each head sees, bool [H,T,S]; for tests and small inputs."""
        num_keys = num_queries if num_keys is None else num_keys
        t, s = np.arange(num_queries), np.arange(num_keys)
        blocks = self.block_mask(self.num_blocks(num_queries), self.num_blocks(num_keys))
        mask = blocks[:, t[:, None] // self.block, s[None, :] // self.block]
        return mask & (s[None, :] <= t[:, None]) if self.causal else mask

    def tile_lists(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The key blocks of every query block, in increasing order.

        Returns:
          index int32 [K,N,S], padded by repeating the last entry (the diagonal when causal), and
          count int32 [K,N].
        Raises:
          ValueError: some query block sees nothing.
        """
        masks = self._kv_block_mask(n, n, 0, 0)
        self._check_no_empty_row(masks)
        return lists(masks)

    def tile_lists_transposed(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The query blocks that visit every key block: index int32 [K,N,S], count int32 [K,N]."""
        return lists(np.swapaxes(self._kv_block_mask(n, n, 0, 0), 1, 2))

    def worklist(self, n: int, *, grouped: bool = False) -> WorkList:
        """All tiles, flat, in the order a kernel with one grid axis visits them.

        Args:
          n: N, blocks of the sequence.
          grouped: list each kv head once (a kernel that takes the queries of a group together);
            otherwise every query head, and the length is `tiles(n).sum()`.
        """
        masks = self._kv_block_mask(n, n, 0, 0)
        self._check_no_empty_row(masks)
        if not grouped:
            masks = np.repeat(masks, self.group_size, axis=0)
        head, q_tile, kv_tile = np.nonzero(masks)
        row = head * n + q_tile
        changes = row[1:] != row[:-1]
        first = np.concatenate([[True], changes])
        last = np.concatenate([changes, [True]])
        return WorkList(*(x.astype(np.int32) for x in (head, q_tile, kv_tile, first, last)))

    def tiles(self, n: int) -> np.ndarray:
        """Tiles each query head visits in N blocks, int64 [H]: `block_mask(n).sum()` by head.

        For the causal local-stride pattern with M = max(0, N - L - r), a, b = divmod(M, V):
            L N - L (L - 1) / 2  +  V a (a + 1) / 2 + b (a + 1)
        """
        if not self.is_local_stride:
            by_head = [m.sum() for m in self._kv_block_mask(n, n, 0, 0)]
            return np.repeat(np.asarray(by_head, np.int64), self.group_size)
        local = min(n, self.window[0])
        by_head = []
        for head in range(self.kv_heads):
            if self.is_dense_head(head):
                by_head.append(dense_tiles(n, causal=True))
                continue
            a, b = divmod(max(0, n - self.window[0] - self.residue(head)), self.stride)
            remote = self.stride * a * (a + 1) // 2 + b * (a + 1)
            by_head.append(local * n - local * (local - 1) // 2 + remote)
        return np.repeat(np.asarray(by_head, np.int64), self.group_size)

    def density(self, n: int) -> float:
        """Visited tiles over those of dense attention (of the same causality)."""
        return float(self.tiles(n).sum()) / (self.num_heads * dense_tiles(n, causal=self.causal))

    def ideal_speedup(self, n: int) -> float:
        """Dense tiles over visited tiles: the speed-up if time were tiles. Tends to V."""
        return 1 / self.density(n)

    def cache_slots(self, num_tokens: int) -> np.ndarray:
        """Slots of the decode cache at a length, int64 [K]: L B + B ceil(max(0, N - L - r) / V).

        A dense head keeps every block: N B.
        Raises:
          ValueError: the pattern is not one whose dropped blocks stay unseen.
        """
        self.check_cacheable()
        n, local = self.num_blocks(num_tokens), self.window[0]
        blocks = [
            n if self.is_dense_head(h) else local + self.num_stored_blocks(n, h)
            for h in range(self.kv_heads)
        ]
        return np.asarray(blocks, np.int64) * self.block

    def num_stored_blocks(self, n: int, kv_head: int) -> int:
        """Blocks of a sparse head's class that have left its window at N blocks."""
        return -(-max(0, n - self.window[0] - self.residue(kv_head)) // self.stride)

    def is_union_complete(self) -> bool:
        """Whether every block is seen, at any distance, by some head."""
        if self.num_dense_heads > 0:
            return True
        if self.position == "relative":
            return self.stride == 1
        if self.ranges is not None and self.ranges[-1][0] != math.inf:
            return False
        strides = [self.stride] if self.ranges is None else [v for _, v in self.ranges]
        heads = range(self.num_sparse_heads)
        return all(len({self.residue(h, v) for h in heads}) == v for v in strides)

    def is_kv_cache_efficient(self) -> bool:
        """Whether a past block that a head no longer sees is never seen again.

        True for absolute causal patterns of one stride, whatever the heads; ranges need nested
        classes; relative patterns and bidirectional ones with a stride come back to old blocks.
        """
        if self.is_local_stride:
            return True
        bounds = [max(self.window)] if self.ranges is None else [b for b, _ in self.ranges]
        strides = [self.stride] if self.ranges is None else [v for _, v in self.ranges]
        n = int(max(b for b in (0, *bounds) if b != math.inf)) + 2 * math.lcm(*strides) + 2
        masks = self._kv_block_mask(n, n, 0, 0)
        comes_back = masks[:, 1:] & ~masks[:, :-1]  # row i + 1 against row i
        past = np.tri(n - 1, n, -1, dtype=bool)
        return not bool((comes_back & past).any())

    def check_cacheable(self) -> None:
        """Raise unless blocks that leave every row's view may be dropped for good."""
        if not self.is_local_stride:
            raise ValueError(
                "a compact cache and tiles of several query blocks need a pattern in which the "
                "rows that use a past block form a prefix: causal, position='absolute', without "
                f"ranges; got causal={self.causal}, position={self.position!r}, ranges="
                f"{self.ranges}."
            )

    def for_heads(self, start: int, stop: int) -> ShardPattern:
        """The pattern of query heads [start, stop) of the model, with their classes unchanged.

        For a tensor-parallel slice: a pattern built from the slice's own number of heads would have
        other classes.
        """
        g = self.group_size
        if not 0 <= start < stop <= self.num_heads or start % g or stop % g:
            raise ValueError(
                f"heads [{start}, {stop}) are not whole groups of {g} query heads within the "
                f"{self.num_heads} of the pattern; a slice keeps the heads of a kv head together."
            )
        low, high = start // g, stop // g
        return dataclasses.replace(
            self,
            num_heads=stop - start,
            num_kv_heads=high - low,
            num_dense_heads=max(0, high - max(low, self.num_sparse_heads)),
            residues=None if self.residues is None else self._slice_residues(low, high),
            allow_incomplete_union=True,
            first_kv_head=self.first_kv_head + low,
            total_heads=self.total_heads or self.num_heads,
        )

    def _slice_residues(self, low: int, high: int) -> tuple[int, ...]:
        residues = self.residues or ()
        return residues[:1] * (high - low) if self.homogeneous else residues[low:high]

    def check_no_empty_row(self, n: int) -> None:
        """Raise if a query block of a sequence of N blocks sees nothing."""
        if self.ranges is not None and not self.always_diagonal:
            self._check_no_empty_row(self._kv_block_mask(n, n, 0, 0))

    def _check_no_empty_row(self, masks: np.ndarray) -> None:
        empty = np.argwhere(~masks.any(axis=-1))
        if empty.size:
            head, row = empty[0]
            raise ValueError(
                f"query block {row} of kv head {head} sees no block, so its softmax is empty; pass "
                "always_diagonal=True, or a first range with stride 1."
            )

    def _kv_block_mask(self, n_q: int, n_kv: int, q_start: int, kv_start: int) -> np.ndarray:
        """bool [K,n_q,n_kv]."""
        i, j = q_start + np.arange(n_q), kv_start + np.arange(n_kv)
        return self.visible(i[:, None], j[None, :])

    def visible(self, i: Any, j: Any, *, xp: Any = np) -> Any:
        """Which kv heads see key block j from query block i.

        Args:
          i: block indices; any integer array.
          j: block indices, broadcastable with `i`.
          xp: the library of the arrays: `numpy`, or `jax.numpy` for traced indices.
        Returns:
          bool [K, ...].
        """
        reachable = (j <= i) if self.causal else (i == i) & (j == j)
        sees: Callable[[int], Any]
        if self.ranges is not None:
            sees = lambda head: self._sees_by_range(head, i, j)
        elif self.position == "relative":
            left, right = self.window
            outside = xp.maximum(0, i - j - left + 1) + xp.maximum(0, j - i - right + 1)
            sees = lambda head: outside % self.stride == 0
        else:
            left, right = self.window
            near = (i - j < left) & (j - i < right)
            sees = lambda head: near | (j % self.stride == self.residue(head))
        heads = range(self.kv_heads)
        rows = [reachable if self.is_dense_head(h) else reachable & sees(h) for h in heads]
        return xp.stack(rows)

    def _sees_by_range(self, head: int, i: Any, j: Any) -> Any:
        distance = abs(i - j)
        visible = (distance == 0) & self.always_diagonal
        low = 0
        for high, stride in self.ranges or ():
            inside = (low <= distance) & (distance < high)
            visible = visible | (inside & (j % stride == self.residue(head, stride)))
            low = high
        return visible


def dense_tiles(n: int, *, causal: bool) -> int:
    """Tiles of dense attention over N blocks."""
    return n * (n + 1) // 2 if causal else n * n


def lists(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool [K,N,X] -> the indices of each row's true entries [K,N,S] and their number [K,N]."""
    count = masks.sum(axis=-1).astype(np.int32)
    width = max(1, int(count.max(initial=0)))
    head, row, column = np.nonzero(masks)
    ends = count.cumsum()
    starts = np.concatenate([[0], ends[:-1]]).reshape(count.shape)
    place = np.arange(len(column)) - starts[head, row]
    index = np.zeros((*count.shape, width), np.int32)
    index[head, row, place] = column
    last = np.take_along_axis(index, np.maximum(count - 1, 0)[..., None], axis=-1)
    return np.where(np.arange(width) < count[..., None], index, last), count


def _frozen(value):
    """Lists become tuples, so that a pattern read from text is hashable."""
    if isinstance(value, list | tuple | np.ndarray):
        return tuple(_frozen(x) for x in value)
    return value.item() if isinstance(value, np.generic) else value


def _check(p: ShardPattern) -> None:
    """Raise ValueError for a field that breaks a rule."""
    smallest = 1 if p.allow_small_blocks else 16
    if p.block < smallest or p.block & (p.block - 1):
        raise ValueError(
            f"block={p.block} must be a power of two of at least {smallest} tokens (smaller blocks "
            "starve matrix units; allow_small_blocks=True for toy problems)."
        )
    if p.num_heads < 1 or p.kv_heads < 1 or p.num_heads % p.kv_heads:
        raise ValueError(
            f"num_heads={p.num_heads} is not divisible by num_kv_heads={p.kv_heads}; query heads "
            "are grouped evenly over kv heads."
        )
    if isinstance(p.local_blocks, tuple) and (p.causal or len(p.local_blocks) != 2):
        raise ValueError(
            f"local_blocks={p.local_blocks}: a pair (left, right) is for causal=False; a causal "
            "window has one side."
        )
    if min(p.window) < 1:
        raise ValueError(
            f"local_blocks={p.local_blocks} must be at least 1: the window counts the query's own "
            "block, without which a row may see nothing."
        )
    if p.stride < 1:
        raise ValueError(f"stride={p.stride} must be at least 1; 1 is dense attention.")
    if not 0 <= p.num_dense_heads <= p.kv_heads:
        raise ValueError(
            f"num_dense_heads={p.num_dense_heads} is outside 0..{p.kv_heads} kv heads."
        )
    if p.position not in ("absolute", "relative"):
        raise ValueError(f"position={p.position!r} must be 'absolute', 'relative' or None.")
    if p.residues is not None:
        _check_residues(p)
    if p.ranges is not None and p.position == "relative":
        raise ValueError("ranges keep blocks by absolute index; position='relative' does not fit.")


def _check_residues(p: ShardPattern) -> None:
    residues = p.residues or ()
    if p.position == "relative":
        raise ValueError("position='relative' has no residue classes; drop residues=....")
    if len(residues) != p.kv_heads:
        raise ValueError(
            f"residues={residues} has {len(residues)} entries, needed one per kv head "
            f"({p.kv_heads})."
        )
    limit = p.stride if p.ranges is None else max(v for _, v in p.ranges)
    wrong = [r for r in residues if not 0 <= r < limit]
    if wrong:
        raise ValueError(f"residues={residues}: {wrong[0]} is outside 0..{limit - 1} (the stride).")


def _check_ranges(ranges: tuple[tuple[float, int], ...]) -> None:
    if not ranges or any(not isinstance(x, tuple) or len(x) != 2 for x in ranges):
        raise ValueError(f"ranges={ranges} must be ((N1, v1), (N2, v2), ...), at least one.")
    bounds = [bound for bound, _ in ranges]
    if bounds[0] < 1 or any(a >= b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"ranges={ranges}: the bounds must increase and the first be at least 1.")
    if any(v < 1 for _, v in ranges):
        raise ValueError(f"ranges={ranges}: every stride must be at least 1.")
