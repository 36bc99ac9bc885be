"""Gradients of the touched rows only, and optimisers that change those rows and no others.

    rows, gradients, count = row_gradients(asked, parts, R)              # of one device's shard
    shard, state = rowwise_adagrad(shard, state, rows, gradients, lr)

No array of the table's shape is formed besides the table and what the optimiser keeps, and with
donated arguments these are written in place: a step costs the same for any number of rows.
Untouched rows stay as they are to the last bit, unlike under dense Adam, whose moments move them
after their last gradient: `rows_adam` is lazy, and the results of the two differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.typing import Array


class RowGradients(NamedTuple):
    """The gradient of a table [R,d] by its touched rows."""

    rows: Array
    """[k] int32, ascending, each once; R and more where there is none."""
    gradients: Array
    """[k,d] float32, zero where there is none."""
    count: Array
    """[] int32: rows that are touched."""


def row_gradients(asked: Array, parts: Array, num_rows: int) -> RowGradients:
    """Sums the gradients of equal rows.

    Args:
      asked: [...] int32 rows, in any order and with repeats; `num_rows` and more are left out.
      parts: [...,d] a gradient for each, as `return_gradients` gives them.
      num_rows: R.
    Returns:
      `RowGradients` with k = the entries of `asked`, or R where that is less.
    """
    flat = asked.reshape(-1)  # [...] -> [N]
    size = min(flat.size, num_rows + 1)  # the one of those left out included
    left_out = jnp.minimum(flat, num_rows)
    rows, inverse = jnp.unique(left_out, size=size, fill_value=num_rows, return_inverse=True)
    is_row = rows < num_rows
    values = parts.reshape(-1, parts.shape[-1]).astype(jnp.float32)  # [...,d] -> [N,d]
    sums = jax.ops.segment_sum(values, inverse.reshape(-1), num_segments=size)
    # Distinct even where unused: scatters may rely on it.
    rows = jnp.where(is_row, rows, num_rows + jnp.arange(size))
    return RowGradients(
        rows.astype(jnp.int32), sums * is_row[:, None], jnp.sum(is_row, dtype=jnp.int32)
    )


def _take(x: Array, rows: Array) -> Array:
    return (
        x.at[rows]
        .get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)
        .astype(jnp.float32)
    )


def _put(x: Array, rows: Array, values: Array) -> Array:
    # Fused with the reading of the same rows, the write could not be in place on TPU.
    values = jax.lax.optimization_barrier(values)
    return x.at[rows].set(
        values.astype(x.dtype), mode="drop", unique_indices=True, indices_are_sorted=True
    )


def rows_sgd(
    table: Array, state: tuple[()], rows: Array, gradients: Array, lr: Any
) -> tuple[Array, tuple[()]]:
    """``row -= lr g``. Arguments as for `rowwise_adagrad`; there is no state."""
    return _put(table, rows, _take(table, rows) - lr * gradients), state


def init_rowwise_adagrad(table: Array, *, initial: float = 0.0) -> Array:
    """The accumulator [R] of `rowwise_adagrad`."""
    return jnp.full(table.shape[:1], initial, jnp.float32)


def rowwise_adagrad(
    table: Array, state: Array, rows: Array, gradients: Array, lr: Any, *, eps: float = 1e-8
) -> tuple[Array, Array]:
    """Adagrad with one accumulator a row: 4 bytes of state where Adam keeps 8 d.

        a_r += mean_d(g_r^2);    row_r -= lr g_r / (sqrt(a_r) + eps)

    Args:
      table: [R,d].
      state: [R] float32.
      rows: [k] int32, ascending, each once; those of R and more are left out.
      gradients: [k,d] float32.
    Returns:
      (table, state).
    References: Duchi et al., 2011; by rows: Gupta et al., 2014, "Training highly multiclass
      classifiers", and the embedding tables of Naumov et al., 2019, arXiv:1906.00091.
    """
    total = _take(state, rows) + jnp.mean(jnp.square(gradients), axis=-1)  # [k]
    step = lr * gradients / (jnp.sqrt(total) + eps)[:, None]
    return _put(table, rows, _take(table, rows) - step), _put(state, rows, total)


class RowsAdamState(NamedTuple):
    """What `rows_adam` keeps."""

    mean: Array
    """[R,d] float32."""
    square: Array
    """[R,d] float32."""
    steps: Array
    """[R] int32: gradients that each row has seen."""


def init_rows_adam(table: Array) -> RowsAdamState:
    """All zeros."""
    zeros = lambda: jnp.zeros(table.shape, jnp.float32)
    return RowsAdamState(zeros(), zeros(), jnp.zeros(table.shape[:1], jnp.int32))


def rows_adam(
    table: Array,
    state: RowsAdamState,
    rows: Array,
    gradients: Array,
    lr: Any,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> tuple[Array, RowsAdamState]:
    """Lazy Adam: moments and step counts of touched rows only.

    A row that is touched at every step goes the way of dense Adam; one that is touched k times
    goes as after k steps, its bias corrections with its own count. Arguments as for
    `rowwise_adagrad`.

    References: Kingma & Ba, 2014, arXiv:1412.6980.
    """
    count = _take(state.steps, rows) + 1  # [k] float32
    mean = b1 * _take(state.mean, rows) + (1 - b1) * gradients
    square = b2 * _take(state.square, rows) + (1 - b2) * jnp.square(gradients)
    unbiased = lambda moment, b: moment / (1 - b**count)[:, None]
    step = lr * unbiased(mean, b1) / (jnp.sqrt(unbiased(square, b2)) + eps)
    new = RowsAdamState(
        _put(state.mean, rows, mean),
        _put(state.square, rows, square),
        _put(state.steps, rows, count),
    )
    return _put(table, rows, _take(table, rows) - step), new


class RowOptimizer(NamedTuple):
    """How the rows of a table learn."""

    init: Callable[[Array], Any]
    """table [R,d] -> its state; every array leads with [R], so it is split like the table."""
    update: Callable[..., tuple[Array, Any]]
    """(table, state, rows, gradients, lr) -> (table, state)."""


ROW_OPTIMIZERS = {
    "sgd": RowOptimizer(lambda table: (), rows_sgd),
    "rowwise_adagrad": RowOptimizer(init_rowwise_adagrad, rowwise_adagrad),
    "adam": RowOptimizer(init_rows_adam, rows_adam),
}
