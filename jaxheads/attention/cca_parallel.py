"""CCA-attention over a mesh: the sequence over `context`, heads over `model`, the batch over more.

A device pools the groups that end in its own tokens and needs two things from elsewhere: s + g - 1
exact tokens to its left (a halo, from its neighbours) and all cores (gathered). Received bytes a
device and layer, for n devices along the sequence:

    2 K D itemsize (T / g (n - 1) / n + s + g - 1)      instead of  2 K D itemsize T (n - 1) / n
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxheads.attention.cca_parts import attend_parts
from jaxheads.attention.cca_pooling import CCAOptions, Places, Rotate, places, pool_found
from jaxheads.attention.kernels import BATCH_AXES, CONTEXT_AXIS, HEADS_AXIS
from jaxheads.attention.places import AxisNames
from jaxheads.attention.s2_parallel import with_halo
from jaxheads.typing import Array


def mesh_axes(q: Array, k: Array) -> AxisNames | None:
    """How a call of global arrays is split over the mesh that is set; None: not here.

    Axes that do not divide their sizes are left to the compiler, as is all where the sequence does
    not divide, and inside a `shard_map`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty or mesh.manual_axes else {a: n for a, n in mesh.shape.items() if n > 1}
    if not sizes or q.shape[1] % sizes.get(CONTEXT_AXIS, 1):
        return None
    data: tuple[str, ...] = ()
    for axis in BATCH_AXES:
        if axis in sizes and q.shape[0] % math.prod(sizes[a] for a in (*data, axis)) == 0:
            data = (*data, axis)
    heads = HEADS_AXIS if HEADS_AXIS in sizes and k.shape[2] % sizes[HEADS_AXIS] == 0 else None
    return AxisNames(data or None, heads, CONTEXT_AXIS if CONTEXT_AXIS in sizes else None)


def cca_over_mesh(
    q: Array,
    k: Array,
    v: Array,
    options: CCAOptions,
    axes: AxisNames,
    scale: float,
    segment_ids: Array | None = None,
    rotate: Rotate | None = None,
) -> tuple[Array, Array]:
    """CCA-attention of global arrays, split as `mesh_axes` says.

    Args:
      q: [B,T,H,D], k: [B,T,K,D], v: [B,T,K,W] global arrays, rotated.
      options: what is visible.
      axes: from `mesh_axes`.
      scale: factor on q.k.
      segment_ids: [B,T]; documents may begin anywhere.
      rotate: for ``rope="group_end"``.
    Returns:
      z [B,T,H,W] and lse [B,H,T].
    """
    if segment_ids is None:
        token = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
        where = Places(token, jnp.ones_like(token), jnp.zeros_like(token))
    else:
        where = places(segment_ids, options.group_size)
    context = cast(str | None, axes.seq)

    def local(q: Array, k: Array, v: Array, where: Places) -> tuple[Array, Array]:
        mine = where
        if context is not None:
            extend = partial(with_halo, size=options.reach - 1, axis_name=context)
            k, v, where = jax.tree.map(extend, (k, v, where))
            # `begin` is counted along the row, tokens along this device's part of it.
            start = jax.lax.axis_index(context) * q.shape[1] - (k.shape[1] - q.shape[1])
            where = where._replace(begin=where.begin - start)
        cores = pool_found(q, k, v, where, options, scale, rotate).cores
        if context is not None:
            gather = lambda x: jax.lax.all_gather(x, context, axis=1, tiled=True)
            cores = jax.tree.map(gather, cores)
        return attend_parts(q, k, v, [cores], options, scale, mine, where)

    batch, heads = axes.data, axes.heads
    arrays = jax.P(batch, context, heads, None)
    tokens: Any = jax.P(batch, context)
    return jax.shard_map(
        local,
        in_specs=(arrays, arrays, arrays, Places(tokens, tokens, tokens)),
        out_specs=(arrays, jax.P(batch, heads, context)),
    )(q, k, v, where)
