"""S2-attention for any pattern, by tile lists: each query block gathers the blocks it sees.

Serves bidirectional, relative and multi-range patterns. Rows of the list are padded to the longest
one, so a causal pattern pays about twice its tiles; the causal local-stride pattern has its own
path (`s2_blocked`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.attention.dense import TINY
from jaxheads.attention.masks import FLOOR, penalty
from jaxheads.attention.s2_pattern import ShardPattern, lists
from jaxheads.typing import Array


def attend_lists(
    q: Array,
    k: Array,
    v: Array,
    pattern: ShardPattern,
    scale: float,
    segments: tuple[Array | None, Array | None] = (None, None),
    *,
    q_start: int = 0,
    kv_start: int = 0,
) -> tuple[Array, Array]:
    """Softmax attention over the blocks in each query block's list; memory O(T + S) per block.

    Args:
      q: [B,T,H,D].
      k: [B,S,K,D].
      v: [B,S,K,W].
      pattern: any pattern for these heads.
      scale: factor on q.k.
      segments: ids [B,T] and [B,S], or None for both.
      q_start: position of the first query, a multiple of the block.
      kv_start: position of the first key.
    Returns:
      z [B,T,H,W] in the dtype of q and lse [B,H,T] float32.
    """
    block, group = pattern.block, pattern.group_size
    (batch, length, num_heads, _), num_keys = q.shape, k.shape[1]
    num_q, num_kv = pattern.num_blocks(length), pattern.num_blocks(num_keys)
    i, j = q_start // block + np.arange(num_q), kv_start // block + np.arange(num_kv)
    mask = pattern.visible(i[:, None], j[None, :])
    index, count = (jnp.asarray(x) for x in lists(mask))  # [K,N,S], [K,N]

    def split(x: Array, n: int) -> Array:
        x = jnp.pad(x, [(0, 0), (0, n * block - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, n, block, *x.shape[2:])

    q_blocks = jnp.einsum("bnthd->nbthd", split(q, num_q))
    k_blocks = jnp.einsum("bnskd->bknsd", split(k, num_kv))
    v_blocks = jnp.einsum("bnskd->bknsd", split(v, num_kv))
    q_ids, k_ids = (None if x is None else split(x, n) for x, n in zip(segments, (num_q, num_kv)))
    take = jax.vmap(jax.vmap(lambda x, i: x[i]), in_axes=(0, None))

    @jax.checkpoint
    def one_row(row):
        i, q, index, count = row
        keys, values = take(k_blocks, index), take(v_blocks, index)  # [B,K,S,block,D]
        keys, values = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (keys, values))
        rows = q.reshape(batch, block, -1, group, q.shape[-1])
        dot = jnp.einsum("btkgd,bksd->bkgts", rows, keys, preferred_element_type=jnp.float32)
        t = q_start + i * block + jnp.arange(block)[:, None]
        local = (index[:, :, None] * block + jnp.arange(block)).reshape(index.shape[0], 1, -1)
        listed = jnp.repeat(jnp.arange(index.shape[1]) < count[:, None], block, axis=1)
        visible = listed[:, None] & (local < num_keys)
        if pattern.causal:
            visible = visible & (kv_start + local <= t)
        visible = jnp.broadcast_to(visible, (batch, *visible.shape))
        if q_ids is not None and k_ids is not None:
            seen = k_ids[:, index].reshape(batch, index.shape[0], 1, -1)
            mine = jnp.take(q_ids, i, axis=1)[:, None, :, None]
            visible = visible & (seen == mine) & (seen != 0)
        scores = scale * dot + penalty(visible)[:, :, None]
        highest = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1), FLOOR))
        weights = jnp.exp(scores - highest[..., None])
        total = weights.sum(axis=-1)
        z = jnp.einsum(
            "bkgts,bksw->bkgtw", weights.astype(v.dtype), values,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        sees = total > 0
        lse = jnp.where(sees, highest + jnp.log(jnp.where(sees, total, 1)), -jnp.inf)
        z = z / jnp.maximum(total, TINY)[..., None]
        return jnp.einsum("bkgtw->btkgw", z).astype(q.dtype), lse

    rows = (jnp.arange(num_q), q_blocks, jnp.swapaxes(index, 0, 1), jnp.swapaxes(count, 0, 1))
    z, lse = jax.lax.map(one_row, rows)  # [N,B,block,K,G,W], [N,B,K,G,block]
    z = jnp.moveaxis(z, 0, 1).reshape(batch, num_q * block, num_heads, -1)[:, :length]
    lse = jnp.moveaxis(lse, 0, -2).reshape(batch, num_heads, -1)[..., :length]
    return z, lse
