"""A train step whose tables learn by touched rows: no gradient has the shape of a table.

    step = make_sparse_step(loss, mesh, optimizer=optax.adam(1e-3), lr=0.05)
    state = init_sparse(params, tables, mesh, optimizer=optax.adam(1e-3))
    state, value, overflow, aux = step(state, ids, batch)

    ids -> route -> rows -> loss(params, rows, batch) -> gradients of params and of rows
    -> rows' gradients to their owners -> equal rows summed -> row-wise update

A field is a set of ids, and holds one table or several that are read at those ids: the ids of
``{"item": {"attention": [V,16], "representation": [V,128]}}`` travel once for both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxheads.fields import unknown
from jaxheads.parallel import compiler_options
from jaxheads.parallel.embedding import pad_ids, rows_per_shard, split_axes, table_axes
from jaxheads.parallel.embedding_routes import (
    Route,
    check_options,
    fetch_rows,
    make_route,
    return_gradients,
)
from jaxheads.parallel.embedding_updates import ROW_OPTIMIZERS, RowOptimizer, row_gradients
from jaxheads.typing import Array, PyTree

Loss = Callable[[PyTree, Mapping[str, PyTree], Any], tuple[Array, PyTree]]
Rate = float | Callable[[Array], Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseState:
    """Everything a step changes; a pytree, as checkpoints store them."""

    step: Array
    """int32 scalar: the steps taken."""
    params: PyTree
    """What is not a table; optax updates it."""
    opt_state: PyTree
    tables: Mapping[str, PyTree]
    """By field: a table [n R,d] in round-robin order, or a tree of tables with as many rows."""
    row_states: Mapping[str, PyTree]
    """By field: what the row optimiser keeps for each table."""


class SparseResult(NamedTuple):
    """What a step returns."""

    state: SparseState
    loss: Array
    overflow: Array
    """[] int32: distinct rows that did not fit, over all fields and devices."""
    aux: PyTree


def row_optimizer(name: str | RowOptimizer) -> RowOptimizer:
    """A row of `ROW_OPTIMIZERS`, or one's own."""
    if isinstance(name, RowOptimizer):
        return name
    if name not in ROW_OPTIMIZERS:
        raise ValueError(unknown("row optimizer", name, ROW_OPTIMIZERS))
    return ROW_OPTIMIZERS[name]


def init_sparse(
    params: PyTree,
    tables: Mapping[str, PyTree] | Callable[[], Mapping[str, PyTree]],
    mesh: Mesh,
    *,
    optimizer: optax.GradientTransformation,
    rows: str | RowOptimizer = "rowwise_adagrad",
) -> SparseState:
    """A state at step 0 on the mesh.

    Args:
      tables: by field, in round-robin order (`to_round_robin`); or a function that makes them,
        compiled so that every row is born on its device: no device ever holds a whole table.
    """
    begin = functools.partial(begin_state, optimizer=optimizer, rows=rows)
    build = begin if not callable(tables) else lambda params: begin(params, tables())
    given = (params,) if callable(tables) else (params, tables)
    shapes = jax.eval_shape(build, *given)
    for table in jax.tree.leaves(shapes.tables):
        rows_per_shard(table.shape[0], mesh, table_axes(mesh))
    return jax.jit(build, out_shardings=sparse_shardings(shapes, mesh))(*given)


def begin_state(
    params: PyTree,
    tables: Mapping[str, PyTree],
    *,
    optimizer: optax.GradientTransformation,
    rows: str | RowOptimizer = "rowwise_adagrad",
) -> SparseState:
    """`init_sparse` without a mesh; for `jax.eval_shape`."""
    states = jax.tree.map(row_optimizer(rows).init, dict(tables))
    return SparseState(
        jnp.zeros((), jnp.int32), params, optimizer.init(params), dict(tables), states
    )


def sparse_shardings(state: SparseState, mesh: Mesh) -> SparseState:
    """A `NamedSharding` for every leaf: tables and their state by rows, the rest on all devices."""
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(table_axes(mesh)))
    like = lambda tree, place: jax.tree.map(lambda _: place, tree)
    return dataclasses.replace(
        state,
        step=whole,
        params=like(state.params, whole),
        opt_state=like(state.opt_state, whole),
        tables=like(state.tables, split),
        row_states=like(state.row_states, split),
    )


def make_sparse_step(
    loss: Loss,
    mesh: Mesh,
    *,
    optimizer: optax.GradientTransformation,
    lr: Rate,
    rows: str | RowOptimizer = "rowwise_adagrad",
    method: str = "all_to_all",
    capacity_factor: float = 2.0,
    on_overflow: str = "fallback",
    num_rows: Mapping[str, int] | None = None,
) -> Callable[[SparseState, Mapping[str, Array], Any], SparseResult]:
    """``step(state, ids, batch) -> SparseResult``, compiled; `state` is donated.

    A step whose loss is not finite changes nothing but the step count; ids outside a table make it
    so (their rows are NaN).

    Args:
      loss: ``loss(params, rows, batch) -> (scalar, aux)``; ``rows[field]`` has the structure of
        ``tables[field]`` with arrays [...,d], where ``ids[field]`` are [...].
      optimizer: of `params`.
      lr: of the rows; a number, or a function of the step.
      rows: "rowwise_adagrad", "adam" (lazy), "sgd", or a `RowOptimizer`.
      method, capacity_factor: as for `embedding.sharded_lookup`.
      on_overflow: "fallback" takes the whole step by psum_scatter when rows did not fit; "report"
        leaves everything as it is, and the caller sees the count.
      num_rows: by field, the ids of its tables without padding.
    """
    check_options(method, capacity_factor, on_overflow)
    learn, sizes = row_optimizer(rows), dict(num_rows or {})

    def by(way: str, state: SparseState, ids: Mapping[str, Array], batch: Any) -> SparseResult:
        places = _Places(mesh, way, capacity_factor)
        found = {f: places.find(tables, ids[f], sizes.get(f)) for f, tables in state.tables.items()}
        read = {f: rows for f, (rows, _) in found.items()}
        overflow = sum((jnp.sum(r.missing) for _, r in found.values()), jnp.zeros((), jnp.int32))
        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, aux), (of_params, of_rows) = gradient(state.params, read, batch)
        is_good = (overflow == 0) & jnp.isfinite(value)
        updates, opt_state = optimizer.update(of_params, state.opt_state, state.params)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(is_good, a, b), new, old)
        rate = lr(state.step) if callable(lr) else lr
        learned = {
            f: places.learn(learn, tables, state.row_states[f], found[f][1], of_rows[f], rate,
                            is_good)
            for f, tables in state.tables.items()
        }  # fmt: skip
        new = SparseState(
            state.step + 1,
            keep(optax.apply_updates(state.params, updates), state.params),
            keep(opt_state, state.opt_state),
            {f: tables for f, (tables, _) in learned.items()},
            {f: states for f, (_, states) in learned.items()},
        )
        return SparseResult(new, value, overflow, aux)

    def step(state: SparseState, ids: Mapping[str, Array], batch: Any) -> SparseResult:
        if ids.keys() != state.tables.keys():
            raise ValueError(f"ids of {sorted(ids)}, but the tables are {sorted(state.tables)}.")
        first = by(method, state, ids, batch)
        if method == "psum_scatter" or on_overflow == "report":
            return first

        def again(carry: tuple[Array, SparseResult]) -> tuple[Array, SparseResult]:
            before = dataclasses.replace(carry[1].state, step=state.step)
            second = by("psum_scatter", before, ids, batch)
            return jnp.zeros((), bool), second._replace(overflow=carry[1].overflow)

        # A loop of no turns or one: `jax.lax.cond` would copy the tables.
        return jax.lax.while_loop(lambda carry: carry[0], again, (first.overflow > 0, first))[1]

    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(mesh))


class _Places(NamedTuple):
    """The parts of a step that run on every device's shard."""

    mesh: Mesh
    method: str
    capacity_factor: float

    @property
    def axes(self) -> tuple[str, ...]:
        return table_axes(self.mesh)

    @property
    def split(self) -> P:
        return P(split_axes(self.mesh, self.axes))

    def route(self, tables: PyTree, ids: Array, num_rows: int | None) -> Route:
        """The `Route` of a field, of all devices one after another."""
        counts = {table.shape[0] for table in jax.tree.leaves(tables)}
        if len(counts) != 1:
            raise ValueError(f"tables of one field have as many rows each, but got {counts}.")
        shard_rows = rows_per_shard(counts.pop(), self.mesh, self.axes)

        def local(mine: Array) -> Route:
            route = make_route(
                mine,
                shard_rows,
                axis_name=self.axes,
                method=self.method,
                capacity_factor=self.capacity_factor,
                num_rows=num_rows,
            )
            return route._replace(missing=route.missing[None])

        split_over_all = jax.shard_map(
            local, mesh=self.mesh, in_specs=self.split, out_specs=self.split
        )
        return split_over_all(pad_ids(ids, self.mesh))

    def find(self, tables: PyTree, ids: Array, num_rows: int | None) -> tuple[PyTree, Route]:
        """The rows [...,d] of every table of a field, and the way to them."""
        route = self.route(tables, ids, num_rows)

        def local(shards: PyTree, route: Route) -> PyTree:
            return jax.tree.map(lambda s: fetch_rows(s, route, self.axes, self.method), shards)

        rows = jax.shard_map(
            local, mesh=self.mesh, in_specs=(P(self.axes), self.split), out_specs=self.split
        )(tables, route)
        return jax.tree.map(lambda r: r[: ids.size].reshape(*ids.shape, r.shape[-1]), rows), route

    def learn(
        self, optimizer: RowOptimizer, tables, states, route: Route, gradients, rate, is_good
    ) -> tuple[PyTree, PyTree]:
        """(tables, states) after the update of a field, unchanged unless `is_good`."""

        def one(shard: Array, state: PyTree, route: Route, gradient: Array, rate, is_good):
            parts = return_gradients(gradient, route, self.axes, self.method)
            asked = jnp.where(is_good, route.asked, shard.shape[0])
            found = row_gradients(asked, parts, shard.shape[0])
            return optimizer.update(shard, state, found.rows, found.gradients, rate)

        leaves, structure = jax.tree.flatten(tables)
        count = route.place.shape[0]  # [N] padded to a multiple of the devices
        new = []
        for table, state, gradient in zip(
            leaves, structure.flatten_up_to(states), structure.flatten_up_to(gradients)
        ):
            flat = gradient.reshape(-1, gradient.shape[-1])  # [...,d] -> [N,d]
            flat = jnp.pad(flat, ((0, count - flat.shape[0]), (0, 0)))
            by_rows = P(self.axes)
            new.append(
                jax.shard_map(
                    one,
                    mesh=self.mesh,
                    in_specs=(by_rows, by_rows, self.split, self.split, P(), P()),
                    out_specs=(by_rows, by_rows),
                )(table, state, route, flat, rate, is_good)
            )
        return tuple(structure.unflatten(part) for part in zip(*new))
