"""How the rows of split tables travel: who asks whom (`make_route`), there (`fetch_rows`) and back.

Everything here runs inside `jax.shard_map`, for a table dealt round-robin over the devices of
`axis_name`: row ``id`` is row ``id // n`` of device ``id % n``. `embedding` says what the methods
cost; a method is a row of `METHODS`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.fields import unknown
from jaxheads.typing import Array, vary_like

AxisName = str | tuple[str, ...]
ON_OVERFLOW = ("fallback", "report")


class Route(NamedTuple):
    """Which rows every device wants of every other: integers only.

    It serves every table of as many rows, whatever its width, so tables that are read at the same
    ids (attention and representation of an item) exchange the ids once.
    """

    asked: Array
    """[n,C] rows of this shard that each device asks for; the number of rows where it asks none."""
    place: Array
    """[m] where the row of an id stands among the answers; their number for an id without one."""
    missing: Array
    """[] int32: distinct rows that this device wants and that did not fit."""


def capacity(num_ids: int, num_shards: int, capacity_factor: float) -> int:
    """C: places for rows between two devices, of `num_ids` ids a device."""
    return max(1, min(num_ids, math.ceil(capacity_factor * num_ids / num_shards)))


def make_route(
    ids: Array,
    shard_rows: int,
    *,
    axis_name: AxisName,
    method: str = "all_to_all",
    capacity_factor: float = 2.0,
    num_rows: int | None = None,
) -> Route:
    """The `Route` of ids [m] to tables with `shard_rows` rows a device; inside `jax.shard_map`.

    Raises:
      TypeError: for ids that are not integers.
      ValueError: for an unknown method, a capacity that is not positive, or 2^31 rows and more.
    """
    check_options(method, capacity_factor)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids are {ids.dtype}; a lookup needs integers, such as int32.")
    if ids.ndim != 1:
        raise ValueError(f"ids have shape {ids.shape}; inside shard_map they are a vector [m].")
    n = jax.lax.axis_size(axis_name)
    if n * shard_rows >= 2**31:
        raise ValueError(
            f"{n} x {shard_rows} rows exceed 2^31 - 1, the ids of int32; hash them to fewer rows."
        )
    most = n * shard_rows if num_rows is None else num_rows
    ids = ids.astype(jnp.promote_types(ids.dtype, jnp.int32))
    ids = vary_like(ids, jax.lax.axis_index(axis_name))
    is_inside = (ids >= 0) & (ids < most)
    ids = ids.astype(jnp.int32)
    # Where the row stands in round-robin order: sorted by owner, then by its row there.
    slots = jnp.where(is_inside, ids % n * shard_rows + ids // n, n * shard_rows)
    size = capacity(ids.shape[0], n, capacity_factor)
    return METHODS[method].route(slots, n, shard_rows, size, axis_name)


def _route_to_all(slots: Array, n: int, shard_rows: int, size: int, axis_name: AxisName) -> Route:
    """Everybody is asked everything."""
    del size
    m = slots.shape[0]
    gathered = jax.lax.all_gather(slots, axis_name)  # [n,m]
    mine = gathered - jax.lax.axis_index(axis_name) * shard_rows
    asked = jnp.where((mine >= 0) & (mine < shard_rows), mine, shard_rows)
    place = jnp.where(slots < n * shard_rows, jnp.arange(m), m)
    return Route(asked, place, vary_like(jnp.zeros((), jnp.int32), slots))


def _route_to_owners(slots: Array, n: int, shard_rows: int, size: int, axis_name) -> Route:
    """Every row is asked for once, of its owner, who hears of at most `size` rows."""
    m = slots.shape[0]
    total = n * shard_rows
    distinct, inverse = jnp.unique(slots, size=m, fill_value=total, return_inverse=True)
    bounds = jnp.searchsorted(distinct, jnp.arange(n + 1) * shard_rows).astype(jnp.int32)
    index = bounds[:-1, None] + jnp.arange(size)  # [n,C] of the rows wanted of each owner
    wanted = distinct.at[index].get(mode="fill", fill_value=total) - jnp.arange(n)[:, None] * (
        shard_rows
    )
    wanted = jnp.where(index < bounds[1:, None], wanted, shard_rows)
    owner = distinct // shard_rows  # [m], n where there is none
    rank = jnp.arange(m) - bounds[jnp.minimum(owner, n - 1)]
    place = jnp.where((rank < size) & (owner < n), owner * size + rank, n * size)
    missing = jnp.sum((rank >= size) & (owner < n), dtype=jnp.int32)
    asked = jax.lax.all_to_all(wanted, axis_name, 0, 0, tiled=True)
    return Route(asked, place[inverse.reshape(m)], missing)


class _Method(NamedTuple):
    """How ids and rows travel."""

    route: Callable[..., Route]
    deliver: Callable[[Array, AxisName], Array]
    """Answers [n,C,d] of this device to those who asked: the answers it gets, [c,d]."""
    collect: Callable[[Array, int, AxisName], Array]
    """Its transpose: gradients [c,d] of what this device got, to the owners, [n,C,d]."""


def _reduce(answers: Array, axis_name: AxisName) -> Array:
    return jax.lax.psum_scatter(answers, axis_name)


def _gather(sums: Array, n: int, axis_name: AxisName) -> Array:
    del n
    return jax.lax.all_gather(sums, axis_name)


def _exchange(answers: Array, axis_name: AxisName) -> Array:
    got = jax.lax.all_to_all(answers, axis_name, 0, 0, tiled=True)
    return got.reshape(-1, answers.shape[-1])  # [n,C,d] -> [nC,d]


def _exchange_back(sums: Array, n: int, axis_name: AxisName) -> Array:
    parts = sums.reshape(n, -1, sums.shape[-1])  # [nC,d] -> [n,C,d]
    return jax.lax.all_to_all(parts, axis_name, 0, 0, tiled=True)


METHODS: Mapping[str, _Method] = {
    "psum_scatter": _Method(_route_to_all, _reduce, _gather),
    "all_to_all": _Method(_route_to_owners, _exchange, _exchange_back),
}


class _Table(NamedTuple):
    """What the derivative must know of a table."""

    shape: tuple[int, ...]
    dtype: Any
    method: str
    axis_name: AxisName


def fetch_rows(table_shard: Array, route: Route, axis_name: AxisName, method: str) -> Array:
    """The rows [m,d] that `route` asks for, with the gradient of ``table[ids]``."""
    check_table(table_shard)
    table = _Table(table_shard.shape, table_shard.dtype, method, axis_name)
    return _fetch(table, vary_like(table_shard, route.place), route)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fetch(table: _Table, shard: Array, route: Route) -> Array:
    answers = shard.at[route.asked].get(mode="fill", fill_value=0)  # [n,C,d]
    got = METHODS[table.method].deliver(answers, table.axis_name)
    return got.at[route.place].get(mode="fill", fill_value=jnp.nan)


def _fetch_forward(table: _Table, shard: Array, route: Route):
    return _fetch(table, shard, route), route


def _fetch_backward(table: _Table, route: Route, gradient: Array):
    parts = return_gradients(gradient, route, table.axis_name, table.method)
    whole = jnp.zeros(table.shape, jnp.float32)
    whole = whole.at[route.asked].add(parts.astype(jnp.float32), mode="drop")
    return whole.astype(table.dtype), None


_fetch.defvjp(_fetch_forward, _fetch_backward)


def return_gradients(gradient: Array, route: Route, axis_name: AxisName, method: str) -> Array:
    """Gradients [m,d] of fetched rows, sent to the owners of the rows: [n,C,d], as `route.asked`.

    Those of one row are summed in float32 before they travel, in the dtype they came in.
    """
    n, size = route.asked.shape
    count = route.place.shape[0] if method == "psum_scatter" else n * size
    sums = jax.ops.segment_sum(gradient.astype(jnp.float32), route.place, num_segments=count)
    return METHODS[method].collect(sums.astype(gradient.dtype), n, axis_name)


def check_options(method: str, capacity_factor: float, on_overflow: str = "report") -> None:
    """Raise for options that no lookup can honour."""
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    if on_overflow not in ON_OVERFLOW:
        raise ValueError(unknown("on_overflow", on_overflow, ON_OVERFLOW))
    if not 0 < capacity_factor < math.inf:
        raise ValueError(
            f"capacity_factor={capacity_factor} must be positive: 1 is room for a perfect spread."
        )


def check_table(table: Array) -> None:
    """Raise for a table of integers."""
    if not jnp.issubdtype(table.dtype, jnp.floating):
        raise TypeError(f"the table is {table.dtype}; rows that may be NaN need a float.")
