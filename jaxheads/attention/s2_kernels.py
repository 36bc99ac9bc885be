"""What the S2 kernels of every platform share: checks, launching, the arithmetic of one tile.

With s = scale log2(e) q.k over one tile, running over the visible tiles of a row,

    m' = max(m, max s),  l' = l 2^(m - m') + sum 2^(s - m'),  z' = z 2^(m - m') + 2^(s - m') v

and at the end z / l, lse = (m + log2 l) / log2(e). Backwards, with p = e^(scale q.k - lse) and
delta = sum(z dz) - dlse:  dv = p^T dz,  ds = p (dz v^T - delta),  dq = scale ds k,
dk = scale ds^T q.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxheads.attention.api import platform as current_platform
from jaxheads.attention.s2_worklist import Shape
from jaxheads.typing import Array

if TYPE_CHECKING:
    from jaxheads.attention.s2 import ShardPattern

P = jax.P
LOG2E = math.log2(math.e)
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: a tile's row may be masked throughout
BATCH_AXES, HEADS_AXIS = ("data", "fsdp"), "model"


def check_arrays(q: Array, k: Array, v: Array, pattern: ShardPattern) -> None:
    """Raises ValueError or TypeError unless the arrays fit each other and the pattern."""
    batch, num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = pattern.num_kv_heads or pattern.num_heads
    if k.shape != v.shape or k.shape != (batch, num_tokens, k.shape[2], head_dim):
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} do not fit: the kernels take whole "
            "sequences, q [B,T,H,D] with k and v [B,T,K,D]; pass impl='blocked' for anything else."
        )
    if (num_heads, k.shape[2]) != (pattern.num_heads, num_kv_heads):
        raise ValueError(
            f"the arrays have {num_heads} query and {k.shape[2]} kv heads, the pattern was built "
            f"for {pattern.num_heads} and {num_kv_heads}; build it for these heads, or take a part "
            "of it with for_heads()."
        )
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; the kernels take one of "
            "bfloat16, float16 and float32 for all three."
        )


def launch(
    run: Callable,
    make_lists: Callable[[int], Any],
    q: Array,
    k: Array,
    v: Array,
    *,
    platform: str,
    interpret: bool | None,
) -> tuple[Array, Array]:
    """Runs a kernel on the mesh that is set: batch over data and fsdp, kv heads over model.

    GSPMD cannot partition a Pallas call, so it goes into a `shard_map`; every shard of heads gets
    its own lists. Sequences are gathered.

    Args:
      run: (lists, q, k, v, interpret) -> (z [B,T,H,D], lse [B,H,T]).
      make_lists: (shards of kv heads) -> arrays with a leading axis over those shards.
      q: [B,T,H,D], k: [B,T,K,D], v: [B,T,K,D].
      platform: "tpu" or "cuda", where the kernel runs as it is; elsewhere it is interpreted.
      interpret: None = by the platform that the program is lowered for.
    """
    if interpret is None and current_platform() == {"cuda": "gpu"}.get(platform, platform):
        interpret = False  # no need to trace the interpreted kernel beside the real one

    def attend(lists, q, k, v):
        lists = jax.tree.map(lambda x: x[0], lists)
        if interpret is not None:
            # Inside jit the kernels keep their plain names in the compiled program.
            return jax.jit(functools.partial(run, interpret=interpret))(lists, q, k, v)
        branches = {
            platform: functools.partial(run, interpret=False),
            "default": functools.partial(run, interpret=True),
        }
        return jax.lax.platform_dependent(lists, q, k, v, **branches)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or mesh.size == 1:
        return attend(jax.tree.map(jnp.asarray, make_lists(1)), q, k, v)
    heads = mesh.shape.get(HEADS_AXIS, 1)
    batch_axes = tuple(a for a in BATCH_AXES if a in mesh.shape)
    batch = math.prod(mesh.shape[a] for a in batch_axes)
    if k.shape[2] % heads or q.shape[0] % batch:
        raise ValueError(
            f"batch {q.shape[0]} and {k.shape[2]} kv heads do not divide over {batch} data and "
            f"fsdp shards and {heads} model shards of the mesh."
        )
    heads_axis = HEADS_AXIS if HEADS_AXIS in mesh.shape else None
    spec = P(batch_axes or None, None, heads_axis, None)
    sharded = jax.shard_map(
        attend,
        in_specs=(P(heads_axis), spec, spec, spec),
        out_specs=(spec, P(batch_axes or None, heads_axis, None)),
        check_vma=False,  # Pallas calls do not state how their outputs vary over the mesh
    )
    return sharded(jax.tree.map(jnp.asarray, make_lists(heads)), q, k, v)


def pad_tokens(x: Array, length: int) -> Array:
    """[B,T,H,D] with `length` zeros after the last token."""
    return jnp.pad(x, ((0, 0), (0, length), (0, 0), (0, 0))) if length else x


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """Matrix product in float32, of float32 operands without rounding them."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def visible(shape: Shape, q_tile, k_tile, rows, *, q_axis: int) -> Array:
    """Which pairs of a tile see each other: [block_q,block_k], transposed for q_axis=1.

    Args:
      shape: tile sizes.
      q_tile: index of the query tile.
      k_tile: index of the key tile.
      rows: leading rows, in sparse blocks, that see the key tile.
      q_axis: the axis that queries lie along.
    """
    size = (shape.block_q, shape.block_k) if q_axis == 0 else (shape.block_k, shape.block_q)
    query = jax.lax.broadcasted_iota(jnp.int32, size, q_axis)
    key = jax.lax.broadcasted_iota(jnp.int32, size, 1 - q_axis)
    k_start = k_tile * shape.block_k
    if shape.is_causal:
        seen = query + (q_tile * shape.block_q - k_start) >= key
    else:
        seen = key < shape.num_tokens - k_start
    return seen & (query < rows * shape.row) if shape.merged > 1 else seen


def softmax_step(scores: Array, highest: Array, total: Array) -> tuple[Array, Array, Array, Array]:
    """One tile of the online softmax, base 2.

    Args:
      scores: [q,k] float32; highest, total: [q,1].
    Returns:
      weights [q,k], the factor [q,1] for what was summed before, new highest and total.
    """
    new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1, keepdims=True))
    keep = jnp.exp2(highest - new_highest)
    weights = jnp.exp2(scores - new_highest)
    return weights, keep, new_highest, total * keep + jnp.sum(weights, axis=-1, keepdims=True)


def row_dot(a: Array, b: Array) -> Array:
    """Sum over the last axis of a b, float32: the delta of the backward pass from z and dz."""
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1)
