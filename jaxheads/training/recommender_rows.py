"""Click models whose tables learn by touched rows: `recommender.loss` inside `make_sparse_step`.

    how = dict(optimizer=optax.adam(1e-3), rows="rowwise_adagrad")
    state = init_recommender(cfg, mesh, **how)
    step = make_recommender_step(cfg, mesh, row_lr=0.01, **how)
    state, stats, value, overflow = step(state, stats, batch)
    model = join_tables(state.params, state.tables, mesh.size)     # to save, to serve, to evaluate

The ids of a batch's histories and candidates are looked up once for attention and representation
together. The model then runs on those rows as if they were its tables: a lookup in them goes by
position. Ids stay what they are, so masks and hard search see the same batch, and the loss is that
of the dense model. Time tables have some thousand rows and stay with the networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxheads import parallel
from jaxheads.embeddings.dare import take_rows
from jaxheads.models.recommender import (
    LongSequenceRecommender,
    RecommenderConfig,
    check_batch,
    loss,
)
from jaxheads.models.recommender_configs import Batch
from jaxheads.models.recommender_layers import Stats
from jaxheads.parallel.embedding import from_round_robin, padded_rows, to_round_robin
from jaxheads.parallel.embedding_updates import RowOptimizer
from jaxheads.training.sparse_step import (
    Rate,
    SparseState,
    begin_state,
    make_sparse_step,
    sparse_shardings,
)
from jaxheads.typing import Array

FIELDS = ("item", "category")
"""The fields with a row for every id of a catalogue."""

Tables = Mapping[str, Mapping[str, Array]]
Step = Callable[[SparseState, Stats, Batch], "StepResult"]


class StepResult(NamedTuple):
    """What a step returns."""

    state: SparseState
    stats: Stats
    """The next running statistics; as given when the loss is not finite."""
    loss: Array
    overflow: Array
    """[] int32: distinct rows that did not fit and were looked up again by psum_scatter."""


def split_tables(
    model: LongSequenceRecommender, num_shards: int
) -> tuple[LongSequenceRecommender, Tables]:
    """``(rest, tables)``: the model with tables of no rows, and its tables in round-robin order.

    Args:
      model: the parameters.
      num_shards: devices of the mesh.
    Returns:
      rest: the same tree; item and category tables are [0,d].
      tables: ``{"item": {"attention": [n R,Da], "representation": [n R,Dr]}, "category": ...}``;
        "representation" alone where it is shared. With four sets, those of the candidate are the
        fields "item_candidate" and "category_candidate": other ids read them.
    """
    tables: dict[str, dict[str, Array]] = {}

    def take(use: str, field: str, table: Array) -> Array:
        tables.setdefault(field, {})[use] = to_round_robin(table, num_shards)
        return table[:0]

    return _map_tables(take, model), tables


def join_tables(
    rest: LongSequenceRecommender, tables: Tables, num_shards: int
) -> LongSequenceRecommender:
    """The model that `split_tables` took apart, bit for bit."""
    cfg = rest.cfg

    def give(use: str, field: str, _: Array) -> Array:
        rows = padded_rows(_num_ids(cfg, field), cfg.row_multiple)
        return from_round_robin(tables[field][use], num_shards, rows)

    return _map_tables(give, rest)


def _map_tables(
    fn: Callable[[str, str, Array], Array], model: LongSequenceRecommender
) -> LongSequenceRecommender:
    """The model with ``fn(use, field, table)`` in place of each item and category table."""

    def of(path: Any, leaf: Array) -> Array:
        use, name = jax.tree_util.keystr(path, simple=True, separator=".").split(".")[:2]
        if name not in FIELDS:
            return leaf
        return fn(use, f"{name}_candidate" if use.endswith("_candidate") else name, leaf)

    return jax.tree_util.tree_map_with_path(of, model)


def _num_ids(cfg: RecommenderConfig, field: str) -> int:
    """Ids of a field, padding's 0 included."""
    return 1 + (cfg.num_items if field.startswith("item") else cfg.num_categories)


def batch_ids(cfg: RecommenderConfig, batch: Batch) -> dict[str, Array]:
    """The ids that a batch reads, by field of `split_tables`: [B,T+1], the candidate's last.

    With four sets of tables, [B,T] of the history and [B,1] of the candidate.
    """
    check_batch(cfg, batch)
    past = {field: jnp.asarray(batch[f"history_{field}"]) for field in FIELDS}
    ahead = {field: jnp.asarray(batch[field])[:, None] for field in FIELDS}
    if cfg.decoupling == "four_tables":
        return past | {f"{field}_candidate": ahead[field] for field in FIELDS}
    return {field: jnp.concatenate([past[field], ahead[field]], axis=1) for field in FIELDS}


def row_loss(
    rest: LongSequenceRecommender, rows: Tables, given: tuple[Stats, Batch]
) -> tuple[Array, Stats]:
    """`recommender.loss` of a batch, from the rows of its `batch_ids`; and the next statistics.

    Args:
      rest: of `split_tables`.
      rows: by field and use, [B,T+1,d].
      given: running statistics and the batch.
    """
    stats, batch = given
    model = _map_tables(lambda use, field, _: rows[field][use], rest)
    value, out = loss(model, stats, batch, lookup=_at_positions)
    return value, out.stats


def _at_positions(table: Array, ids: Array) -> Array:
    """The rows of ids [B] (candidate) or [B,T] (history) among those looked up, [B,T+1,d]."""
    if table.ndim == 2:  # of times
        return take_rows(table, ids)
    return table[:, -1] if ids.ndim == 1 else table[:, : ids.shape[1]]


def init_recommender(
    cfg: RecommenderConfig,
    mesh: Mesh,
    *,
    optimizer: optax.GradientTransformation,
    rows: str | RowOptimizer,
    seed: int = 0,
) -> SparseState:
    """A state at step 0 on the mesh, with the parameters that the dense model starts from.

    Args:
      cfg: the mesh's size must divide the rows of the tables (`row_multiple`).
      optimizer, rows: as for `make_recommender_step`.
      seed: of the parameters.
    """

    begin = lambda: LongSequenceRecommender(cfg, rngs=nnx.Rngs(seed))
    born = parallel.shardings(jax.eval_shape(begin), mesh)

    def build() -> SparseState:
        # Without the constraint every device would draw the whole of each table and keep its part.
        model = jax.lax.with_sharding_constraint(begin(), born)
        return begin_state(*split_tables(model, mesh.size), optimizer=optimizer, rows=rows)

    places = sparse_shardings(jax.eval_shape(build), mesh)
    return jax.jit(build, out_shardings=places)()


def make_recommender_step(
    cfg: RecommenderConfig,
    mesh: Mesh,
    *,
    optimizer: optax.GradientTransformation,
    row_lr: Rate,
    rows: str | RowOptimizer,
    method: str = "all_to_all",
    capacity_factor: float = 2.0,
) -> Step:
    """``step(state, stats, batch) -> StepResult``, compiled; `state` is donated.

    A step whose loss is not finite changes nothing but the step count.

    Args:
      cfg: any decoupling, scorer and search.
      optimizer: of networks and time tables.
      row_lr: learning rate of the rows; a number, or a function of the step.
      rows: "rowwise_adagrad", "adam" (lazy), "sgd", or a `RowOptimizer`.
      method, capacity_factor: as for `parallel.embedding.lookup`.
    Raises:
      ValueError: for options that do not exist, and batches that the model cannot read.
    References: Feng et al., 2024, arXiv:2410.02604.
    """
    fields = [*FIELDS]
    if cfg.decoupling == "four_tables":
        fields += [f"{field}_candidate" for field in FIELDS]
    learn = make_sparse_step(
        row_loss,
        mesh,
        optimizer=optimizer,
        lr=row_lr,
        rows=rows,
        method=method,
        capacity_factor=capacity_factor,
        num_rows={field: _num_ids(cfg, field) for field in fields},
    )
    ids_of = jax.jit(lambda batch: batch_ids(cfg, batch))
    keep = jax.jit(lambda value, new, old: jax.tree.map(
        lambda a, b: jnp.where(jnp.isfinite(value), a, b), new, old
    ))  # fmt: skip

    def step(state: SparseState, stats: Stats, batch: Batch) -> StepResult:
        state, value, overflow, moved = learn(state, ids_of(batch), (stats, batch))
        return StepResult(state, keep(value, moved, stats), value, overflow)

    return step


def make_join(cfg: RecommenderConfig, mesh: Mesh) -> Callable[[SparseState], Any]:
    """``join(state) -> model``: `join_tables`, compiled, placed as `parallel.initialize` does."""

    def join(rest: LongSequenceRecommender, tables: Tables) -> LongSequenceRecommender:
        return join_tables(rest, tables, mesh.size)

    like = jax.eval_shape(lambda: LongSequenceRecommender(cfg, rngs=nnx.Rngs(0)))
    compiled = jax.jit(join, out_shardings=parallel.shardings(like, mesh))
    return lambda state: compiled(state.params, state.tables)
