"""S2-attention over a mesh: the sequence over one axis, heads over another, the batch over more.

A device needs two things that lie elsewhere: the L - 1 blocks left of its own tokens (a halo, from
its neighbours) and the blocks of each head's residue class (1/V of all keys and values, gathered).
Received bytes per device and layer, for n devices along the sequence:

    2 K D itemsize (T / V (n - 1) / n + (L - 1) B)      instead of  2 K D itemsize T (n - 1) / n

Both joins are one online softmax, so nothing has to be merged afterwards, and the gradients return
by the transposes of the two collectives.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.attention.blocked import blocked_attention
from jaxheads.attention.masks import Mask
from jaxheads.attention.s2_blocked import Keys, attend_shards
from jaxheads.attention.s2_blocks import attend_sparse_heads, kept_blocks, take_blocks
from jaxheads.attention.s2_pattern import ShardPattern
from jaxheads.parallel.mesh import MESH_AXES
from jaxheads.typing import Array

_log = logging.getLogger(__name__)

BATCH, CONTEXT, HEADS = ("data", "fsdp"), "context", "model"  # as in `parallel.RULES`


def s2_context_parallel(
    q: Array,
    k: Array,
    v: Array,
    pattern: ShardPattern,
    *,
    axis_name: str,
    scale: float | None = None,
    segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    residues: Array | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """S2-attention of a sequence split contiguously over a mesh axis; call inside `shard_map`.

    Args:
      q: [B,T/n,H,D] this device's queries, rotated.
      k: [B,T/n,K,D] its keys.
      v: [B,T/n,K,W] its values.
      pattern: causal local-stride, for these heads.
      axis_name: the mesh axis; T/n must be a multiple of the pattern's block. Where T/n is also a
        multiple of B V, every device sends equally much.
      scale: factor on q.k; None = 1/sqrt(D).
      segment_ids: [B,T/n] ids of packed documents.
      kv_segment_ids: [B,T/n] of the keys; None = `segment_ids`.
      residues: [K] int32 classes of these kv heads, instead of the pattern's: under head
        parallelism they differ from device to device, so they come in through `in_specs`, cut
        from the global model's (`pattern.kv_residues()`). Then the pattern is the model's.
      return_lse: also return lse.
    Returns:
      z [B,T/n,H,W] (and lse [B,H,T/n] float32), as `s2_attention` of the whole sequence.
    Raises:
      ValueError: T/n is not whole blocks; heads that do not fit the pattern.
      NotImplementedError: the pattern is not causal local-stride, or has dense heads while
        residues are given (a dense head on one device of several would hold the others up).
    """
    _check_local(q, k, pattern, axis_name, residues)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    keys_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    segments = (segment_ids, keys_ids)
    num_sparse = k.shape[2] if residues is not None else pattern.num_sparse_heads
    heads = num_sparse * pattern.group_size
    parts = []
    if num_sparse:
        if residues is None:
            residues = jnp.asarray(pattern.kv_residues()[:num_sparse])
        sparse = (q[:, :, :heads], k[:, :, :num_sparse], v[:, :, :num_sparse])
        parts.append(_sparse_heads(*sparse, segments, pattern, axis_name, scale, residues))
    if num_sparse < k.shape[2]:
        dense = (q[:, :, heads:], k[:, :, num_sparse:], v[:, :, num_sparse:])
        parts.append(_dense_heads(*dense, segments, axis_name, scale))
    z = jnp.concatenate([z for z, _ in parts], axis=2)
    lse = jnp.concatenate([lse for _, lse in parts], axis=1)
    return (z, lse) if return_lse else z


def _sparse_heads(q, k, v, segments, pattern, axis_name, scale, residues) -> tuple[Array, Array]:
    q_segments, k_segments = segments
    block, local = pattern.block, pattern.window[0]
    num_local = q.shape[1] // block  # blocks on each device
    num_devices = jax.lax.axis_size(axis_name)
    first = jax.lax.axis_index(axis_name) * num_local

    extend = lambda x: with_halo(x, (local - 1) * block, axis_name)
    window = Keys(
        jnp.einsum("bskd->bksd", extend(k)),
        jnp.einsum("bskd->bksd", extend(v)),
        None if k_segments is None else extend(k_segments)[:, None],
    )
    count = -(-num_local // pattern.stride)
    blocks_of = lambda low: kept_blocks(residues, pattern.stride, low, low + num_local, count)
    gather = lambda x: jax.lax.all_gather(x, axis_name, axis=2, tiled=True)
    kept = jax.tree.map(gather, take_blocks(k, v, k_segments, block, blocks_of(first) - first))
    starts = np.arange(num_devices) * num_local
    return attend_shards(
        q,
        window,
        kept,
        jnp.concatenate([blocks_of(int(start)) for start in starts], axis=1),
        block=block,
        local_blocks=local,
        scale=scale,
        first_block=first,
        bounds=(0, num_devices * num_local),
        q_segments=q_segments,
    )


def with_halo(x: Array, size: int, axis_name: str) -> Array:
    """[B,T/n,...] -> [B,size+T/n,...]: the tokens to the left in front, zeros before the first."""
    length, num_devices = x.shape[1], jax.lax.axis_size(axis_name)
    pieces = [x]
    for hop in range(1, -(-size // length) + 1):
        part = x[:, -min(length, size - (hop - 1) * length) :]
        pairs = [(i, i + hop) for i in range(num_devices - hop)]
        received = jax.lax.ppermute(part, axis_name, pairs) if pairs else jnp.zeros_like(part)
        pieces.insert(0, received)
    return jnp.concatenate(pieces, axis=1)


def _dense_heads(q, k, v, segments, axis_name, scale) -> tuple[Array, Array]:
    """Dense heads gather all their keys: put them into layers of their own where that matters."""
    gather = lambda x: jax.lax.all_gather(x, axis_name, axis=1, tiled=True)
    start = jax.lax.axis_index(axis_name) * q.shape[1]
    mask = Mask(
        is_causal=True,
        q_index=start + jnp.arange(q.shape[1]),
        q_segment_ids=segments[0],
        k_segment_ids=None if segments[1] is None else gather(segments[1]),
    )
    return blocked_attention(q, gather(k), gather(v), mask, scale=scale)


def _check_local(q, k, pattern, axis_name, residues) -> None:
    if not pattern.is_local_stride:
        raise NotImplementedError(
            "context parallelism serves causal local-stride patterns (position='absolute', no "
            "ranges), whose far blocks are one class per head."
        )
    if q.shape[1] % pattern.block:
        raise ValueError(
            f"{q.shape[1]} tokens per device along {axis_name!r} are not a multiple of block="
            f"{pattern.block}; blocks must not straddle devices. Use a longer sequence, fewer "
            "devices or a smaller block."
        )
    heads = (q.shape[2], k.shape[2])
    if residues is None and heads != (pattern.num_heads, pattern.kv_heads):
        raise ValueError(
            f"q and k have {heads[0]} and {heads[1]} heads here, the pattern {pattern.num_heads} "
            f"and {pattern.kv_heads}. Under head parallelism keep the model's pattern and pass "
            "residues=, this device's part of pattern.kv_residues(); a pattern built from the "
            "local number of heads would have other classes."
        )
    if residues is not None and pattern.num_dense_heads:
        raise NotImplementedError(
            f"num_dense_heads={pattern.num_dense_heads} with heads split over devices: the devices "
            "with dense heads would hold up the rest; use dense layers ('s2*3+dense') instead."
        )


class MeshPlan(NamedTuple):
    """The mesh axes a call is split over."""

    batch: tuple[str, ...] | None
    context: str | None
    heads: str | None


def mesh_plan(q: Array, k: Array, pattern: ShardPattern) -> MeshPlan | None:
    """How a call of global arrays is split over the mesh that is set, or None: as one program.

    One program: no sequence or heads to split, inside a `shard_map`, or a sequence that is not
    whole blocks on every device (then the compiler splits the plain program; logged once).
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {axis: n for axis, n in mesh.shape.items() if n > 1 and axis in MESH_AXES}
    if mesh.manual_axes or not pattern.is_local_stride:
        return None
    context = CONTEXT if CONTEXT in sizes else None
    heads = HEADS if HEADS in sizes and k.shape[2] % sizes[HEADS] == 0 else None
    if context is not None and q.shape[1] % (sizes[context] * pattern.block):
        _log_once(q.shape[1], sizes[context], pattern.block)
        return None
    if context is None and (heads is None or pattern.num_dense_heads):
        return None
    batch: tuple[str, ...] = ()
    for axis in BATCH:
        if axis in sizes and q.shape[0] % math.prod(sizes[a] for a in (*batch, axis)) == 0:
            batch = (*batch, axis)
    return MeshPlan(batch or None, context, heads)


@cache
def _log_once(length: int, num_devices: int, block: int) -> None:
    _log.warning(
        "S2-attention: %d tokens over %d devices are not whole blocks of %d; the compiler splits "
        "the unsharded program.",
        length,
        num_devices,
        block,
    )


def s2_over_mesh(
    q: Array,
    k: Array,
    v: Array,
    pattern: ShardPattern,
    plan: MeshPlan,
    *,
    scale: float,
    segment_ids: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """S2-attention of global arrays, split as `mesh_plan` says.

    Args:
      q: [B,T,H,D], k: [B,T,K,D], v: [B,T,K,W] global arrays.
      pattern: the model's.
      plan: from `mesh_plan`.
      scale: factor on q.k.
      segment_ids: [B,T] of the queries and of the keys.
    Returns:
      z [B,T,H,W] and lse [B,H,T].
    """

    def local(q, k, v, segment_ids, residues):
        if plan.context is None:
            segments = segment_ids or (None, None)
            return attend_sparse_heads(q, k, v, pattern, scale, segments, residues=residues)
        q_ids, k_ids = segment_ids or (None, None)
        out = s2_context_parallel(
            q,
            k,
            v,
            pattern,
            axis_name=plan.context,
            scale=scale,
            segment_ids=q_ids,
            kv_segment_ids=k_ids,
            residues=residues,
            return_lse=True,
        )
        return cast(tuple[Array, Array], out)

    batch, context, heads = plan
    by_head = jnp.asarray(pattern.kv_residues()) if heads else None
    arrays = jax.P(batch, context, heads, None)
    specs = (arrays, arrays, arrays, jax.P(batch, context), jax.P(heads))
    return jax.shard_map(local, in_specs=specs, out_specs=(arrays, jax.P(batch, heads, context)))(
        q, k, v, segment_ids, by_head
    )
