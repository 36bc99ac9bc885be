"""Embedding tables split by rows over the devices of a mesh, and lookups in them.

A table [V,d] is dealt out like cards: device ``id % n`` holds row ``id`` as its row ``id // n``.
Ids sorted by frequency then load all devices alike. The whole array, device after device, is the
table in *round-robin order* (`to_round_robin`), rows padded to a multiple of n.

    rows, overflow = lookup(table, ids, mesh)                      # outside shard_map
    rows, overflow = sharded_lookup(shard, ids, axis_name="data")  # inside

Both equal ``table[ids]``, and their gradients equal its scatter-add. Two methods, for m ids on each
of n devices and a width of d:

    psum_scatter   every device answers all n m ids, with zeros for rows it does not own;
                   a reduce-scatter brings the answers home        about n m d numbers a device
    all_to_all     each id once, to its owner: C = capacity_factor m / n places between every two
                   devices                                         about capacity_factor m d

When more than C distinct rows are wanted from one device the others do not fit: they are counted
(`overflow`), and never silently wrong: NaN, or looked up again by psum_scatter (`lookup`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxheads.fields import unknown
from jaxheads.parallel.embedding_routes import (
    AxisName,
    check_options,
    check_table,
    fetch_rows,
    make_route,
)
from jaxheads.parallel.rules import RULES
from jaxheads.typing import Array, is_traced

P = jax.P


class Lookup(NamedTuple):
    """What a lookup returns."""

    rows: Array
    """[...,d]; NaN for ids outside the table and for rows that did not fit."""
    overflow: Array
    """[] int32: distinct rows that did not fit, summed over devices."""


def padded_rows(num_rows: int, num_shards: int) -> int:
    """The rows of a table with `num_rows` ids over `num_shards` devices: a multiple of them."""
    return -(-num_rows // num_shards) * num_shards


def to_round_robin(table: Any, num_shards: int) -> Any:
    """A table [V,...] in the order in which it is split: row ``id`` goes to
    ``(id % n) * ceil(V / n) + id // n``; padding rows are zero."""
    rows = padded_rows(table.shape[0], num_shards)
    xp = np if isinstance(table, np.ndarray) else jnp
    rest = table.shape[1:]
    padded = xp.pad(table, [(0, rows - table.shape[0])] + [(0, 0)] * len(rest))
    return padded.reshape(rows // num_shards, num_shards, *rest).swapaxes(0, 1).reshape(rows, *rest)


def from_round_robin(table: Any, num_shards: int, num_rows: int) -> Any:
    """The inverse of `to_round_robin`: [V,...] with V = `num_rows`."""
    rows, rest = table.shape[0], table.shape[1:]
    if rows != padded_rows(num_rows, num_shards):
        raise ValueError(
            f"a table of {num_rows} ids over {num_shards} devices has "
            f"{padded_rows(num_rows, num_shards)} rows, but this one has {rows}."
        )
    dealt = table.reshape(num_shards, rows // num_shards, *rest)
    return dealt.swapaxes(0, 1).reshape(rows, *rest)[:num_rows]


def sharded_lookup(
    table_shard: Array,
    ids: Array,
    *,
    axis_name: AxisName,
    method: str = "psum_scatter",
    capacity_factor: float = 2.0,
    num_rows: int | None = None,
) -> Lookup:
    """``table[ids]`` inside `jax.shard_map`, for a table split over `axis_name`.

    The gradient is that of ``table[ids]``: repeated ids, of this device and of others, add up (in
    float32). Ids outside the table give rows of NaN, so that a loss shows them.

    Args:
      table_shard: [R,d] this device's rows, float; the table has n R of them.
      ids: [m] int, this device's; m is the same on all.
      axis_name: one or several mesh axes, in the order of the table's `PartitionSpec`.
      method: "psum_scatter", or "all_to_all", whose overflow must be looked at.
      capacity_factor: places for ids, relative to a perfect spread over devices; for all_to_all.
        n always suffices.
      num_rows: ids of the table, without padding; default: n R.
    Returns:
      `Lookup`, rows [m,d].
    """
    route = make_route(
        ids,
        table_shard.shape[0],
        axis_name=axis_name,
        method=method,
        capacity_factor=capacity_factor,
        num_rows=num_rows,
    )
    rows = fetch_rows(table_shard, route, axis_name, method)
    return Lookup(rows, jax.lax.psum(route.missing, axis_name))


def table_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The mesh axes over which the rule "table_rows" splits a table; never empty."""
    rule = RULES["table_rows"]
    wanted = (rule,) if isinstance(rule, str) else tuple(rule or ())
    return tuple(a for a in wanted if mesh.shape.get(a, 1) > 1) or mesh.axis_names[:1]


def lookup(
    table: Array,
    ids: Any,
    mesh: Mesh | AbstractMesh | None = None,
    *,
    axes: AxisName | None = None,
    method: str = "all_to_all",
    capacity_factor: float = 2.0,
    on_overflow: str = "fallback",
    num_rows: int | None = None,
) -> Lookup:
    """``table[ids]`` for a whole table in round-robin order, split over `mesh`.

    Call it eagerly or under `jax.jit`. The ids are split over all axes of the mesh, those that do
    not split the table included.

    Args:
      table: [n R,d], `to_round_robin` of the table, n the devices that `axes` name.
      ids: [...] int.
      mesh: default: the one of `jax.set_mesh`.
      axes: mesh axes that split the rows; default: those of the rule "table_rows".
      method, capacity_factor: as for `sharded_lookup`; or "sparsecore" (`parallel.sparsecore`).
      on_overflow: "fallback" looks everything up by psum_scatter when something did not fit;
        "report" leaves NaN in those rows. Both return the count.
      num_rows: ids of the table, without padding; default: all its rows.
    Returns:
      `Lookup`, rows [...,d].
    Raises:
      ValueError: for rows that the devices do not divide, unknown options, and ids outside the
        table where they are known (under `jax.jit` their rows are NaN).
      TypeError: for ids that are not integers, or a table of integers.
    """
    is_sparsecore = method == "sparsecore"
    check_options("all_to_all" if is_sparsecore else method, capacity_factor, on_overflow)
    mesh = the_mesh(mesh)
    axes = as_axes(axes, mesh)
    shard_rows = rows_per_shard(table.shape[0], mesh, axes)
    check_table(table)
    known, ids = ids, check_ids(ids, table.shape[0] if num_rows is None else num_rows)
    if is_sparsecore:
        from jaxheads.parallel.sparsecore import sparsecore_lookup

        rows = sparsecore_lookup(table, known, mesh, axes)  # type: ignore[arg-type]
        return Lookup(rows, jnp.zeros((), jnp.int32))
    options = (method, capacity_factor, on_overflow, num_rows)
    rows, overflow = _program(mesh, axes, shard_rows, *options)(table, pad_ids(ids, mesh))
    return Lookup(rows[: ids.size].reshape(*ids.shape, table.shape[1]), overflow)


@functools.lru_cache(maxsize=128)
def _program(
    mesh: Mesh | AbstractMesh,
    axes: tuple[str, ...],
    shard_rows: int,
    method: str,
    capacity_factor: float,
    on_overflow: str,
    num_rows: int | None,
) -> Any:
    """The compiled (table, ids [N]) -> (rows [N,d], overflow)."""
    everywhere = split_axes(mesh, axes)
    split = P(everywhere)
    options: dict[str, Any] = {
        "axis_name": axes,
        "capacity_factor": capacity_factor,
        "num_rows": num_rows,
    }

    def local(shard: Array, mine: Array) -> tuple[Array, Array]:
        route = make_route(mine, shard_rows, method=method, **options)
        overflow = jax.lax.psum(route.missing, everywhere)
        fetch = lambda: fetch_rows(shard, route, axes, method)
        again = lambda: sharded_lookup(shard, mine, method="psum_scatter", **options).rows
        if method == "psum_scatter" or on_overflow == "report":
            return fetch(), overflow
        return jax.lax.cond(overflow > 0, again, fetch), overflow

    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(P(axes), split), out_specs=(split, P()))
    )


def split_axes(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> tuple[str, ...]:
    """The mesh axes that ids are split over: all that have several devices, and `axes`."""
    return tuple(a for a in mesh.axis_names if mesh.shape[a] > 1 or a in axes)


def pad_ids(ids: Array, mesh: Mesh | AbstractMesh) -> Array:
    """Ids [...] as a vector that the devices of the mesh divide, padded with -1."""
    flat = ids.reshape(-1)  # [...] -> [N]
    padding = padded_rows(max(flat.size, 1), mesh.size) - flat.size
    return jnp.pad(flat, (0, padding), constant_values=-1)


def the_mesh(mesh: Mesh | AbstractMesh | None) -> Mesh | AbstractMesh:
    """`mesh`, or the one of `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty:
        raise ValueError("a split table needs a mesh; pass mesh=make_mesh('data:8') or set one.")
    return mesh


def as_axes(axes: AxisName | None, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """`axes` as a tuple of names of the mesh; None: `table_axes`."""
    if axes is None:
        return table_axes(mesh)
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    for name in axes:
        if name not in mesh.axis_names:
            raise ValueError(unknown("mesh axis", name, mesh.axis_names))
    return axes


def rows_per_shard(num_rows: int, mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> int:
    """Rows of one device."""
    n = math.prod(mesh.shape[a] for a in axes)
    if num_rows % n:
        raise ValueError(
            f"a table of {num_rows} rows does not divide over {n} devices of {tuple(axes)}; pad it "
            f"to {padded_rows(num_rows, n)} rows: to_round_robin(table, {n}) does."
        )
    return num_rows // n


def check_ids(ids: Any, num_rows: int) -> Array:
    """Ids as an array; those that are known are looked at.

    Raises:
      TypeError, ValueError: for ids that are not integers, or outside the table.
    """
    known = not is_traced(ids)
    if not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
        raise TypeError(f"ids are {jnp.result_type(ids)}; a lookup needs integers, such as int32.")
    if known and np.size(ids):
        least, most = int(np.min(ids)), int(np.max(ids))
        if least < 0 or most >= num_rows:
            raise ValueError(
                f"ids go from {least} to {most}, but the table has rows 0 to {num_rows - 1}; hash "
                "ids to the table (jaxheads.embeddings.hashing) or make it larger."
            )
    return jnp.asarray(ids)
