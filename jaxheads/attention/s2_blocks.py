"""Cutting a sequence into the window keys and the kept keys that `s2_blocked` works on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.attention.s2_blocked import NO_BLOCK, Keys, attend_shards
from jaxheads.attention.s2_pattern import ShardPattern
from jaxheads.typing import Array


def attend_sparse_heads(
    q: Array,
    k: Array,
    v: Array,
    pattern: ShardPattern,
    scale: float,
    segments: tuple[Array | None, Array | None] = (None, None),
    starts: tuple[int | Array, int | Array] = (0, 0),
    residues: Array | None = None,
) -> tuple[Array, Array]:
    """A chunk of queries over a chunk of keys, for heads with residue classes.

    Args:
      q: [B,T,H,D], k: [B,S,K,D] and v: [B,S,K,W], sparse heads only.
      pattern: causal local-stride.
      scale: factor on q.k.
      segments: ids [B,T] and [B,S], or None for both.
      starts: positions of the first query and the first key, multiples of the block.
      residues: [K] int32 instead of the pattern's, where heads are split over devices.
    Returns:
      z [B,T,H,W] in the dtype of q and lse [B,H,T] float32.
    """
    q_start, kv_start = starts
    block, local = pattern.block, pattern.window[0]
    num_queries, num_keys = q.shape[1], k.shape[1]
    q_segments, k_segments = segments
    is_static = isinstance(q_start, int) and isinstance(kv_start, int)
    keys_end_first = not is_static or bool(q_start + num_queries > kv_start + num_keys)
    if k_segments is None and num_keys % block and keys_end_first:
        # Only segments tell the padding of the last key block from keys.
        q_segments = jnp.ones((q.shape[0], num_queries), jnp.int32)
        k_segments = jnp.ones((q.shape[0], num_keys), jnp.int32)
    q = pad_blocks(q, block)
    k, v = pad_blocks(k, block), pad_blocks(v, block)
    q_segments = None if q_segments is None else pad_blocks(q_segments, block)
    k_segments = None if k_segments is None else pad_blocks(k_segments, block)

    first, low = q_start // block, kv_start // block
    high = low + k.shape[1] // block
    keys = (k, v, k_segments)
    window = cut_window(*keys, block, first - local + 1 - low, q.shape[1] // block + local - 1)
    count = -(-(k.shape[1] // block) // pattern.stride)
    if is_static:  # no query sees a kept block closer than its window
        last = int(first) + q.shape[1] // block - 1 - local
        nearest = [low] if residues is not None else pattern.kv_residues()[: k.shape[2]]
        reach = max(last - int(low) - int(r - low) % pattern.stride for r in nearest)
        count = max(0, min(count, reach // pattern.stride + 1))
    residues = jnp.asarray(pattern.kv_residues()[: k.shape[2]] if residues is None else residues)
    blocks = kept_blocks(residues, pattern.stride, low, high, count)
    z, lse = attend_shards(
        q,
        window,
        take_blocks(*keys, block, blocks - low),
        blocks,
        block=block,
        local_blocks=local,
        scale=scale,
        first_block=first,
        bounds=(low, high),
        q_segments=q_segments,
    )
    return z[:, :num_queries], lse[..., :num_queries]


def kept_blocks(residues: Array | np.ndarray, stride: int, low, high, count: int) -> Array:
    """[K,count] int32: the first blocks of each head's class in [low, high), else `NO_BLOCK`."""
    residues = jnp.asarray(residues, jnp.int32)[:, None]
    blocks = low + (residues - low) % stride + stride * jnp.arange(count, dtype=jnp.int32)
    return jnp.where(blocks < high, blocks, NO_BLOCK)


def take_blocks(k: Array, v: Array, segments: Array | None, block: int, index: Array) -> Keys:
    """Blocks of a sequence side by side.

    Args:
      k: [B,S,K,D], S a multiple of `block`.
      v: [B,S,K,W].
      segments: [B,S] or None.
      block: tokens in a block.
      index: [K,M] which blocks for each kv head; those outside [0, S/block) come as zeros.
    Returns:
      Keys with k [B,K,M*block,D] and segments [B,K,M*block].
    """
    # One gather of whole blocks; heads and batch stay axes that a mesh can split.
    take = jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))
    index = jnp.where(index < 0, NO_BLOCK, index)

    def blocks(x: Array) -> Array:
        x = jnp.einsum("bnskd->bknsd", x.reshape(x.shape[0], -1, block, *x.shape[2:]))
        x = jax.vmap(take, in_axes=(0, None))(x, index)  # [B,K,M,block,D]
        return x.reshape(*x.shape[:2], -1, x.shape[-1])

    if segments is not None:
        by_head = (*segments.shape, k.shape[2], 1)
        segments = blocks(jnp.broadcast_to(segments[:, :, None, None], by_head))[..., 0]
    return Keys(blocks(k), blocks(v), segments)


def cut_window(
    k: Array, v: Array, segments: Array | None, block: int, start: int | Array, count: int
) -> Keys:
    """Blocks [start, start + count) of a sequence, zeros where there are none.

    Args as `take_blocks`; `start` may be negative or traced.
    Returns:
      Keys with k [B,K,count*block,D] and segments [B,1,count*block].
    """
    num_blocks = k.shape[1] // block

    def cut(x: Array) -> Array:
        if isinstance(start, int):
            low, high = max(0, start), max(0, min(num_blocks, start + count))
            low = min(low, high)
            before = min(count, max(0, -start))
            x = x[:, low * block : high * block]
            after = count * block - before * block - x.shape[1]
            return jnp.pad(x, [(0, 0), (before * block, after)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], num_blocks, block, *x.shape[2:])
        index = start + jnp.arange(count)
        index = jnp.where((index >= 0) & (index < num_blocks), index, num_blocks)
        x = x.at[:, index].get(mode="fill", fill_value=0)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    if segments is not None:
        segments = cut(segments)[:, None]
    return Keys(jnp.einsum("bskd->bksd", cut(k)), jnp.einsum("bskd->bksd", cut(v)), segments)


def pad_blocks(x: Array, block: int) -> Array:
    """Zeros behind axis 1 up to whole blocks."""
    extra = -x.shape[1] % block
    return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2)) if extra else x
