"""Row-wise optimisers against dense formulas in float64, and what they leave alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.parallel.embedding_updates import ROW_OPTIMIZERS, row_gradients

R, D = 23, 6
RNG = np.random.default_rng(1)
TABLE = RNG.normal(size=(R, D)).astype(np.float32)
STEPS = [
    (RNG.integers(0, R + 4, (2, 5)).astype(np.int32), RNG.normal(size=(2, 5, D)).astype(np.float32))
    for _ in range(4)
]
STEPS[0][0][0, :3] = 7  # equal rows add up
LR = 0.1


def dense(asked, parts):
    gradient = np.zeros((R, D))
    for row, part in zip(asked.reshape(-1), parts.reshape(-1, D)):
        if row < R:
            gradient[row] += part
    return gradient


def expected(name):
    """(table, state) after STEPS, by loops over rows in float64."""
    table, square, mean = TABLE.astype(np.float64), np.zeros((R, D)), np.zeros((R, D))
    total, count = np.zeros(R), np.zeros(R, int)
    for asked, parts in STEPS:
        gradient = dense(asked, parts)
        for r in {int(a) for a in asked.reshape(-1) if a < R}:
            g = gradient[r]
            count[r] += 1
            total[r] += np.mean(g**2)
            mean[r] = 0.9 * mean[r] + 0.1 * g
            square[r] = 0.999 * square[r] + 0.001 * g**2
            m, v = mean[r] / (1 - 0.9 ** count[r]), square[r] / (1 - 0.999 ** count[r])
            table[r] -= (
                LR
                * {
                    "sgd": g,
                    "rowwise_adagrad": g / (np.sqrt(total[r]) + 1e-8),
                    "adam": m / (np.sqrt(v) + 1e-8),
                }[name]
            )
    return table, {"sgd": (), "rowwise_adagrad": total, "adam": (mean, square, count)}[name]


def step(name):
    def update(table, state, asked, parts):
        found = row_gradients(asked, parts, table.shape[0])
        return ROW_OPTIMIZERS[name].update(table, state, found.rows, found.gradients, LR)

    return jax.jit(update, donate_argnums=(0, 1))


@pytest.mark.parametrize("name", list(ROW_OPTIMIZERS))
def test_equals_the_dense_formula_on_touched_rows(name):
    table = jnp.array(TABLE)
    state = ROW_OPTIMIZERS[name].init(table)
    update = step(name)
    for asked, parts in STEPS:
        before = np.array(table)
        table, state = update(table, state, asked, parts)
        untouched = np.setdiff1d(np.arange(R), asked)
        assert len(untouched) and np.array_equal(before[untouched], table[untouched])
    want_table, want_state = expected(name)
    np.testing.assert_allclose(table, want_table, atol=1e-5)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(want_state), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_lazy_adam_is_dense_adam_for_rows_that_are_always_touched():
    import optax

    asked = np.arange(R, dtype=np.int32)
    table, dense_table = jnp.array(TABLE), jnp.array(TABLE)
    optimizer = optax.adam(LR)
    state, dense_state = ROW_OPTIMIZERS["adam"].init(table), optimizer.init(dense_table)
    update = step("adam")
    for seed in range(3):
        parts = np.random.default_rng(seed).normal(size=(R, D)).astype(np.float32)
        table, state = update(table, state, asked, parts)
        change, dense_state = optimizer.update(jnp.asarray(parts), dense_state)
        dense_table = optax.apply_updates(dense_table, change)
    np.testing.assert_allclose(table, dense_table, atol=1e-5)


def test_row_gradients():
    asked, parts = STEPS[0]
    rows, gradients, count = row_gradients(asked, parts, R)
    real = np.unique(asked[asked < R])
    assert count == len(real)
    np.testing.assert_array_equal(rows[: len(real)], real)
    assert (np.diff(rows) > 0).all() and (rows[len(real) :] >= R).all()
    np.testing.assert_allclose(gradients[: len(real)], dense(asked, parts)[real], atol=1e-6)
    assert not gradients[len(real) :].any()
    # Never more entries than rows, and nothing lost then.
    many = np.tile(np.arange(4, dtype=np.int32), 5)
    rows, gradients, count = row_gradients(many, np.ones((20, 1)), 3)
    assert count == 3
    np.testing.assert_array_equal(rows[:3], [0, 1, 2])
    np.testing.assert_array_equal(gradients[:3, 0], [5, 5, 5])


@pytest.mark.parametrize("name", ["rowwise_adagrad", "adam"])
def test_bfloat16_tables_learn_in_float32(name):
    asked, parts = STEPS[0]
    low = jnp.asarray(TABLE).astype(jnp.bfloat16)
    high = low.astype(jnp.float32)
    table, state = step(name)(jnp.copy(low), ROW_OPTIMIZERS[name].init(low), asked, parts)
    want, _ = step(name)(high, ROW_OPTIMIZERS[name].init(high), asked, parts)
    assert table.dtype == jnp.bfloat16
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))
    np.testing.assert_array_equal(table, want.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", list(ROW_OPTIMIZERS))
def test_nothing_of_the_size_of_the_table_is_formed(name):
    """Temporary bytes of the compiled update do not depend on the number of rows."""
    struct = jax.ShapeDtypeStruct
    sizes = {}
    for rows in (10**5, 10**6):
        table = struct((rows, 16), jnp.float32)
        state = jax.eval_shape(ROW_OPTIMIZERS[name].init, table)
        program = step(name).lower(
            table, state, struct((64,), jnp.int32), struct((64, 16), jnp.float32)
        )
        memory = program.compile().memory_analysis()
        sizes[rows] = memory.temp_size_in_bytes
        assert memory.alias_size_in_bytes >= rows * 16 * 4  # in place
    assert sizes[10**5] == sizes[10**6] < 10**5
