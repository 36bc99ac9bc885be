"""What one device computes, moves and holds in `distributed_attention`, by formula."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from jaxheads.attention.blocked import BLOCK_K, BLOCK_Q
from jaxheads.attention.layouts import check_layout, layout_order
from jaxheads.attention.masks import Mask

FLOAT32 = 4


class Cost(NamedTuple):
    """One call's forward pass on the busiest device."""

    flops: float
    """2 x 2 D per score of every tile that is computed; a backward pass takes 2.5 times as many."""
    hbm_bytes: float
    """Traffic to memory: keys and values once per block of queries, queries, outputs and the state
    that is merged in every step."""
    comm_bytes: float
    """Bytes received from other devices."""
    peak_bytes: float
    """Inputs, outputs, buffers of the schedule, float32 state and one tile of scores per head."""


def attention_cost(
    *,
    batch: int,
    num_queries: int,
    num_keys: int | None = None,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int,
    schedule: str = "ring",
    layout: str = "contiguous",
    seq: int = 1,
    heads: int = 1,
    data: int = 1,
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
    itemsize: int = 2,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
) -> Cost:
    """The cost of a call on one of seq x heads x data devices.

    Args:
      batch: B over all devices, as are all sizes of arrays.
      num_queries: T.
      num_keys: S; None = T.
      num_heads: H.
      num_kv_heads: K; None = H.
      head_dim: D.
      schedule: "ring", "gather" or "all_to_all".
      layout: as in `distributed_attention`, with `causal` and `window`.
      seq: devices that share a sequence.
      heads: devices that share the heads.
      data: devices that share the batch.
      itemsize: bytes of an activation.
      block_q: queries in a tile.
      block_k: keys in a tile.
    Returns:
      `Cost`: flops, hbm_bytes, comm_bytes, peak_bytes.
    Example:
      >>> attention_cost(batch=1, num_queries=4096, num_heads=8, head_dim=64, seq=4).comm_bytes
      6291456.0
    """
    num_keys = num_queries if num_keys is None else num_keys
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    rows, h, k = batch / data, num_heads / heads, num_kv_heads / heads
    t, s = num_queries / seq, num_keys / seq
    structure = (causal, window)
    if schedule == "all_to_all":
        counts = tile_scores("contiguous", num_queries, num_keys, 1, *structure, block_q, block_k)
        scores = float(counts.max()) / seq  # of the whole sequence, for 1/seq of the heads
        steps = 1
    else:
        counts = tile_scores(layout, num_queries, num_keys, seq, *structure, block_q, block_k)
        scores = float(counts.max())
        steps = seq
    queries = rows * t * h * head_dim
    keys = 2 * rows * s * k * head_dim
    comm = comm_bytes(
        schedule,
        tokens=rows * t,
        keys=rows * s,
        num_heads=h,
        num_kv_heads=k,
        head_dim=head_dim,
        seq=seq,
        itemsize=itemsize,
    )
    state = FLOAT32 * queries * (1 if steps == 1 else 2)
    buffers = {
        "ring": itemsize * keys if seq > 1 else 0,
        "gather": itemsize * keys * seq if seq > 1 else 0,
        "all_to_all": itemsize * (2 * queries + keys * max(1.0, seq / k)) if seq > 1 else 0,
    }[schedule]
    tile = FLOAT32 * rows * h * min(block_q, num_queries) * min(block_k, num_keys)
    return Cost(
        flops=4 * rows * h * head_dim * scores,
        hbm_bytes=itemsize * 2 * rows * k * head_dim * scores / block_q
        + itemsize * 2 * queries
        + (0 if steps == 1 else 2 * FLOAT32 * queries * steps),
        comm_bytes=comm,
        peak_bytes=itemsize * (2 * queries + keys) + buffers + state + tile,
    )


def comm_bytes(
    schedule: str,
    *,
    tokens: float,
    keys: float,
    num_heads: float,
    num_kv_heads: float,
    head_dim: int,
    seq: int,
    itemsize: int,
) -> float:
    """Bytes that one device receives in a forward pass.

        ring, gather   2 S/n K D (n-1)
        all_to_all     (2 H T/n + 2 K S/n) D (n-1)/n        K at least n: smaller ones are repeated

    Args:
      schedule: "ring", "gather" or "all_to_all".
      tokens: B T/n, queries of this device.
      keys: B S/n.
      num_heads: heads of this device, before any exchange.
      num_kv_heads: the same for keys and values.
      head_dim: D.
      seq: n, devices of the sequence axis.
      itemsize: bytes of an activation.
    """
    if seq == 1:
        return 0.0
    if schedule in ("ring", "gather"):
        return float(2 * keys * num_kv_heads * head_dim * itemsize * (seq - 1))
    moved = 2 * tokens * num_heads + 2 * keys * max(num_kv_heads, seq)
    return moved * head_dim * itemsize * (seq - 1) / seq


@functools.lru_cache(maxsize=256)
def tile_scores(
    layout: str,
    num_queries: int,
    num_keys: int,
    n: int,
    causal: bool,
    window: int | tuple[int, int] | None,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
) -> np.ndarray:
    """[n] scores per head that each of n devices computes: those of the tiles it does not skip.

    The same rule as the loops of `blocked.forward_tiles`: of the keys that each device holds, a
    block of queries visits the blocks from the first to the last key it may see.
    """
    check_layout(layout, num_queries, n)
    check_layout(layout, num_keys, n)
    left, right = Mask(is_causal=causal, window=window).reach
    q_index = layout_order(layout, num_queries, n).reshape(n, -1)
    k_index = layout_order(layout, num_keys, n).reshape(n, -1)
    block_q, block_k = min(block_q, q_index.shape[1]), min(block_k, k_index.shape[1])
    starts = np.arange(0, q_index.shape[1], block_q)
    first = np.minimum.reduceat(q_index, starts, axis=1).reshape(-1)
    last = np.maximum.reduceat(q_index, starts, axis=1).reshape(-1)
    blocks = np.zeros(first.shape, np.int64)
    for keys in k_index:  # increasing
        low = 0 if left is None else np.searchsorted(keys, first - left)
        high = np.searchsorted(keys, last + right, "right") if right is not None else len(keys)
        visited = -(-high // block_k) - low // block_k
        blocks += np.where(np.asarray(high) > low, visited, 0)
    return blocks.reshape(n, -1).sum(axis=1) * block_q * block_k
