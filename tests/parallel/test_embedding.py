"""Lookups in split tables against ``table[ids]`` and a scatter-add in float64."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.parallel import RULES, make_mesh, partition_spec
from jaxheads.parallel.embedding import (
    from_round_robin,
    lookup,
    padded_rows,
    sharded_lookup,
    table_axes,
    to_round_robin,
)
from jaxheads.parallel.embedding_routes import capacity

P = jax.P
V, D = 37, 5
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(V, D)).astype(np.float32)
WEIGHT = RNG.normal(size=(4, 10, D)).astype(np.float32)
IDS = {
    "zipf": np.minimum(RNG.zipf(1.3, (4, 10)) - 1, V - 1).astype(np.int32),
    "same": np.full((4, 10), 11, np.int32),
    "spread": RNG.permutation(40).reshape(4, 10).astype(np.int32) % V,
}
MESHES = [
    ("data:8", None),
    ("data:2,model:4", None),
    ("data:2,model:4", "model"),
    ("fsdp:4", None),
    ("", None),
]


def place(table, mesh, axes=None):
    names = table_axes(mesh) if axes is None else (axes,)
    n = math.prod(mesh.shape[a] for a in names)
    return jnp.asarray(to_round_robin(table, n)), n


def looked_up(mesh, **options):
    """(rows, overflow, gradient of sum(WEIGHT * rows) by the table), compiled once."""

    @jax.jit
    def run(table, ids):
        def objective(table):
            found = lookup(table, ids, mesh, num_rows=V, **options)
            return jnp.sum(jnp.nan_to_num(found.rows) * WEIGHT), found

        gradient, found = jax.grad(objective, has_aux=True)(table)
        return found.rows, found.overflow, gradient

    return run


def scatter_add(ids, weight=WEIGHT):
    result = np.zeros((V, D))
    np.add.at(result, ids.reshape(-1), weight.reshape(-1, D).astype(np.float64))
    return result


@pytest.mark.parametrize(("spec", "axes"), MESHES)
@pytest.mark.parametrize("method", ["psum_scatter", "all_to_all"])
def test_equals_dense_lookup_and_its_gradient(spec, axes, method):
    mesh = make_mesh(spec)
    table, n = place(TABLE, mesh, axes)
    # Capacity n: everything fits, whatever the ids.
    run = looked_up(mesh, axes=axes, method=method, capacity_factor=n, on_overflow="report")
    for name, ids in IDS.items():
        rows, overflow, gradient = run(table, ids)
        assert overflow == 0, name
        np.testing.assert_array_equal(rows, TABLE[ids])
        whole = from_round_robin(np.asarray(gradient), n, V)
        np.testing.assert_allclose(whole, scatter_add(ids), atol=1e-5)
        assert not np.any(np.asarray(gradient).reshape(n, -1, D)[V % n or n :, -1])  # the padding


def wanted_too_much(ids, n, size):
    """Rows of each device's wishes beyond `size` of one owner, counted in Python."""
    flat = np.pad(ids.reshape(-1), (0, -ids.size % n), constant_values=-1)
    missing = []
    for device, mine in enumerate(flat.reshape(n, -1)):
        for owner in range(n):
            wanted = sorted({int(i) for i in mine if i >= 0 and i % n == owner})
            missing += [(device, i) for i in wanted[size:]]
    return missing


@pytest.mark.parametrize("name", ["zipf", "spread"])
def test_overflow_is_counted_and_shows(name):
    mesh, ids = make_mesh("fsdp:4"), IDS[name]
    table, n = place(TABLE, mesh)
    size = capacity(10, n, 0.1)
    missing = wanted_too_much(ids, n, size)
    assert size == 1 and missing
    run = looked_up(mesh, capacity_factor=0.1, on_overflow="report")
    rows, overflow, gradient = run(table, ids)
    assert overflow == len(missing)
    lost = np.array([[(b, int(i)) in missing for i in row] for b, row in enumerate(ids)])
    np.testing.assert_array_equal(np.isnan(rows).all(-1), lost)
    np.testing.assert_array_equal(np.asarray(rows)[~lost], TABLE[ids][~lost])
    kept = scatter_add(ids, WEIGHT * ~lost[..., None])
    np.testing.assert_allclose(from_round_robin(np.asarray(gradient), n, V), kept, atol=1e-5)


@pytest.mark.parametrize(("spec", "axes"), [MESHES[1], MESHES[2]])
def test_overflow_falls_back_to_an_exact_lookup(spec, axes):
    mesh = make_mesh(spec)
    table, n = place(TABLE, mesh, axes)
    run = looked_up(mesh, axes=axes, capacity_factor=0.1)
    seen = []
    for ids in (IDS["spread"], IDS["same"]):
        rows, overflow, gradient = run(table, ids)
        seen.append(int(overflow))
        np.testing.assert_array_equal(rows, TABLE[ids])
        whole = from_round_robin(np.asarray(gradient), n, V)
        np.testing.assert_allclose(whole, scatter_add(ids), atol=1e-5)
    assert seen[0] > 0 and seen[1] == 0  # one id always fits


def test_inside_shard_map_with_a_table_that_is_whole_on_one_axis():
    """Ids differ over data and model, rows lie over model: gradients sum over data too."""
    mesh = make_mesh("data:2,model:4")
    table, n = place(TABLE, mesh, "model")

    def local(shard, ids):
        rows, overflow = sharded_lookup(
            shard, ids, axis_name="model", method="all_to_all", capacity_factor=4
        )
        return rows, overflow[None]

    both = P(("data", "model"))
    split = jax.shard_map(
        local, mesh=mesh, in_specs=(P("model"), both), out_specs=(both, P("data"))
    )
    ids = IDS["zipf"].reshape(-1)
    weight = WEIGHT.reshape(-1, D)

    def objective(table):
        rows, overflow = split(table, ids)
        return jnp.sum(rows * weight), overflow

    value = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (total, overflow), gradient = value(table)
    assert overflow.shape == (2,) and not overflow.any()
    np.testing.assert_allclose(total, np.sum(TABLE[ids].astype(np.float64) * weight), rtol=1e-5)
    np.testing.assert_allclose(
        from_round_robin(np.asarray(gradient), n, V), scatter_add(ids), atol=1e-5
    )


@pytest.mark.parametrize("method", ["psum_scatter", "all_to_all"])
def test_bfloat16_tables(method):
    mesh = make_mesh("data:8")
    table, n = place(TABLE, mesh)
    low = table.astype(jnp.bfloat16)
    run = looked_up(mesh, method=method, capacity_factor=8, on_overflow="report")
    rows, _, gradient = run(low, IDS["zipf"])
    assert rows.dtype == gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows, jnp.asarray(TABLE).astype(jnp.bfloat16)[IDS["zipf"]])
    whole = from_round_robin(np.asarray(gradient.astype(jnp.float32)), n, V)
    np.testing.assert_allclose(whole, scatter_add(IDS["zipf"]), atol=5e-2, rtol=2e-2)


@pytest.mark.parametrize("method", ["psum_scatter", "all_to_all"])
def test_ids_outside_the_table_give_nan_rows_under_jit(method):
    mesh = make_mesh("data:8")
    table, n = place(TABLE, mesh)
    ids = IDS["spread"].copy()
    ids[0, :4] = [V, -1, padded_rows(V, 8), 2**31 - 1]  # the first is a row of padding
    run = looked_up(mesh, method=method, capacity_factor=8, on_overflow="report")
    rows, overflow, gradient = run(table, ids)
    assert overflow == 0
    assert np.isnan(rows[0, :4]).all() and not np.isnan(rows[0, 4:]).any()
    np.testing.assert_array_equal(rows[1:], TABLE[ids[1:]])
    inside = (ids >= 0) & (ids < V)
    kept = scatter_add(np.where(inside, ids, 0), WEIGHT * inside[..., None])
    np.testing.assert_allclose(from_round_robin(np.asarray(gradient), n, V), kept, atol=1e-5)


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("xp", [np, jnp])
def test_round_robin_order(n, xp):
    table = xp.asarray(TABLE)
    dealt = to_round_robin(table, n)
    rows = padded_rows(V, n)
    assert dealt.shape == (rows, D) and rows % n == 0 and rows - V < n
    for i in (0, 1, n, V - 1):
        np.testing.assert_array_equal(dealt[i % n * (rows // n) + i // n], TABLE[i])
    np.testing.assert_array_equal(from_round_robin(dealt, n, V), TABLE)
    sums = xp.arange(V)  # as the state of an optimiser, by rows
    np.testing.assert_array_equal(from_round_robin(to_round_robin(sums, n), n, V), sums)


def test_any_shape_of_ids_without_jit():
    mesh = make_mesh("data:8")
    table, _ = place(TABLE, mesh)
    with jax.set_mesh(mesh):
        one = lookup(table, np.int32(5), on_overflow="report")
        empty = lookup(table, np.zeros((0, 3), np.int32), on_overflow="report")
    np.testing.assert_array_equal(one.rows, TABLE[5])
    assert empty.rows.shape == (0, 3, D) and empty.overflow == 0


@pytest.mark.parametrize("dtype", [np.int8, np.uint32])
def test_other_integers(dtype):
    """Of 200 rows, which an int8 could not count; and numbers that an int32 has as negative."""
    mesh, table = make_mesh("data:8"), np.arange(200.0, dtype=np.float32)[:, None]
    ids = np.array([3, 99], dtype)
    run = jax.jit(lambda ids: lookup(to_round_robin(table, 8), ids, mesh).rows[:, 0])
    np.testing.assert_array_equal(run(ids), [3.0, 99.0])
    if dtype is np.uint32:
        np.testing.assert_array_equal(run(np.array([7, 2**31 + 7], dtype)), [7.0, np.nan])


def test_the_rule_of_table_rows_splits_over_every_axis():
    mesh = make_mesh("data:2,model:4")
    spec = partition_spec(("table_rows", None), (40, 5), mesh)
    assert spec == P(("data", "model"), None) and table_axes(mesh) == ("data", "model")
    assert set(RULES["table_rows"]) == set(mesh.axis_names)
    with pytest.raises(ValueError, match="'table_rows' has size 37"):
        partition_spec(("table_rows", None), (V, D), mesh)
    assert table_axes(make_mesh("")) == ("data",)


def test_capacity():
    assert capacity(100, 8, 1.0) == 13 and capacity(100, 8, 100.0) == 100
    assert capacity(1, 8, 0.01) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "psum"}, ValueError, "unknown method 'psum'; did you mean 'psum_scatter'"),
        ({"capacity_factor": -1.0}, ValueError, "capacity_factor=-1.0 must be positive"),
        ({"capacity_factor": 0.0}, ValueError, "capacity_factor=0.0 must be positive"),
        ({"on_overflow": "drop"}, ValueError, "unknown on_overflow 'drop'"),
        ({"axes": "rows"}, ValueError, "unknown mesh axis 'rows'"),
        ({"ids": np.ones(3, np.float32)}, TypeError, "ids are float32"),
        ({"ids": np.array([3, V])}, ValueError, f"ids go from 3 to {V}, .* rows 0 to {V - 1}"),
        ({"ids": np.array([-1])}, ValueError, "ids go from -1 to -1"),
        ({"table": np.ones((V, D), np.float32)}, ValueError, "pad it to 40 rows"),
        ({"table": np.ones((40, D), np.int32)}, TypeError, "the table is int32"),
        ({"mesh": None}, ValueError, "needs a mesh"),
    ],
)
def test_bad_input(change, error, message):
    mesh = make_mesh("data:8")
    given = {"table": place(TABLE, mesh)[0], "ids": np.array([1]), "mesh": mesh} | change
    with pytest.raises(error, match=message):
        lookup(given.pop("table"), given.pop("ids"), given.pop("mesh"), num_rows=V, **given)


def test_round_robin_of_another_size_is_refused():
    with pytest.raises(ValueError, match="37 ids over 8 devices has 40 rows, but this one has 37"):
        from_round_robin(TABLE, 8, V)
