"""Steps on split tables against dense ones, what a step leaves alone, and resuming."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxheads.checkpoints.orbax import Checkpoints
from jaxheads.parallel import make_mesh
from jaxheads.parallel.embedding import from_round_robin, to_round_robin
from jaxheads.training.sparse_step import (
    SparseState,
    begin_state,
    init_sparse,
    make_sparse_step,
    sparse_shardings,
)

V, B, T = 50, 8, 6
RNG = np.random.default_rng(0)
# The attention vectors are narrower than the representations.
TABLES = {
    "item": {
        "attention": RNG.normal(size=(V, 3)).astype(np.float32),
        "representation": RNG.normal(size=(V, 5)).astype(np.float32),
    },
    "category": RNG.normal(size=(11, 5)).astype(np.float32),
}
PARAMS = {"w": np.ones(5, np.float32)}
BATCHES = [
    (
        {
            "item": RNG.integers(0, V, (B, T)).astype(np.int32),
            "category": RNG.integers(0, 11, (B, T)).astype(np.int32),
        },
        RNG.normal(size=B).astype(np.float32),
    )
    for _ in range(4)
]
SIZES = {"item": V, "category": 11}
OPTIMIZER = optax.sgd(0.1)
LR, MESH = 0.05, "data:2,model:4"


def loss(params, rows, label):
    a, r = rows["item"]["attention"], rows["item"]["representation"]
    weights = jax.nn.softmax(jnp.einsum("bd,btd->bt", a[:, 0], a[:, 1:]), axis=-1)
    h = jnp.einsum("bt,btd->bd", weights, (r + rows["category"])[:, 1:]) * r[:, 0]
    return jnp.mean((h @ params["w"] - label) ** 2), {"h": h}


def begin(mesh, tables=TABLES):
    dealt = jax.tree.map(lambda t: to_round_robin(t, mesh.size), tables)
    return init_sparse(PARAMS, dealt, mesh, optimizer=OPTIMIZER)


def make(mesh, **options):
    return make_sparse_step(loss, mesh, optimizer=OPTIMIZER, lr=LR, num_rows=SIZES, **options)


def whole(state):
    """(tables, row states, params) in natural order as numpy."""
    of = lambda tree: {
        f: jax.tree.map(lambda t, f=f: from_round_robin(np.asarray(t), 8, SIZES[f]), tree[f])
        for f in tree
    }
    return of(state.tables), of(state.row_states), jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def dense():
    """The same steps with dense gradients of whole tables; and their losses."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    tables = jax.tree.map(jnp.asarray, TABLES)
    sums = jax.tree.map(lambda t: jnp.zeros(t.shape[0]), tables)

    @jax.jit
    def step(params, tables, sums, ids, label):
        read = lambda t: {f: jax.tree.map(lambda x, i=i: x[i], t[f]) for f, i in ids.items()}
        of = lambda p, t: loss(p, read(t), label)[0]
        value, (gp, gt) = jax.value_and_grad(of, (0, 1))(params, tables)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gp)
        sums = jax.tree.map(lambda s, g: s + jnp.mean(g * g, axis=-1), sums, gt)
        move = lambda t, g, s: t - LR * g / (jnp.sqrt(s) + 1e-8)[:, None]
        return params, jax.tree.map(move, tables, gt, sums), sums, value

    losses = []
    for ids, label in BATCHES:
        params, tables, sums, value = step(params, tables, sums, ids, label)
        losses.append(float(value))
    return jax.tree.map(np.asarray, (tables, sums, params)), losses


@pytest.fixture(scope="module")
def roomy():
    """A step in which everything fits."""
    return make(make_mesh(MESH), capacity_factor=8, on_overflow="report")


def run(step, state, batches=BATCHES):
    losses, overflow = [], 0
    for ids, label in batches:
        state, value, over, _ = step(state, ids, label)
        losses.append(float(value))
        overflow += int(over)
    return state, losses, overflow


def check(state, losses, dense):
    for got, want in zip(whole(state), dense[0], strict=True):
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
        jax.tree.map(close, got, want)
    np.testing.assert_allclose(losses, dense[1], rtol=1e-5)


def test_equals_dense_steps(roomy, dense):
    state, losses, overflow = run(roomy, begin(make_mesh(MESH)))
    assert overflow == 0 and state.step == 4
    check(state, losses, dense)


def test_equals_dense_steps_when_nothing_fits(dense):
    step = make(make_mesh(MESH), capacity_factor=0.1)
    state, losses, overflow = run(step, begin(make_mesh(MESH)))
    assert overflow > 0 and state.step == 4
    check(state, losses, dense)


def test_other_methods_and_meshes(dense):
    mesh = make_mesh("expert:8")
    check(*run(make(mesh, method="psum_scatter"), begin(mesh))[:2], dense)


def unchanged(step, ids, label):
    """(loss, overflow) of a step that must change nothing but its number."""
    state = begin(make_mesh(MESH))
    before = jax.tree.map(np.array, state)
    after, value, overflow, _ = step(state, ids, label)
    assert after.step == 1
    for name in ("params", "opt_state", "tables", "row_states"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))
    return float(value), int(overflow)


def test_overflow_that_is_only_reported_changes_nothing():
    step = make(make_mesh(MESH), capacity_factor=0.1, on_overflow="report")
    value, overflow = unchanged(step, *BATCHES[0])
    assert np.isnan(value) and overflow > 0


def test_an_id_outside_the_table_changes_nothing(roomy):
    ids = {f: x.copy() for f, x in BATCHES[0][0].items()}
    ids["item"][3, 2] = V
    value, overflow = unchanged(roomy, ids, BATCHES[0][1])
    assert np.isnan(value) and overflow == 0


def test_rows_that_nobody_reads_keep_their_bits(roomy):
    ids, label = BATCHES[0]
    state, *_ = roomy(begin(make_mesh(MESH)), ids, label)
    tables, sums, _ = whole(state)
    unread = np.setdiff1d(np.arange(V), ids["item"])
    assert len(unread) > 5
    for name, table in tables["item"].items():
        np.testing.assert_array_equal(table[unread], TABLES["item"][name][unread])
        assert not sums["item"][name][unread].any() and sums["item"][name].any()


def test_interrupted_and_resumed_is_uninterrupted(roomy, tmp_path):
    mesh = make_mesh(MESH)
    straight, *_ = run(roomy, begin(mesh))
    half, *_ = run(roomy, begin(mesh), BATCHES[:2])
    rest = lambda s: {"step": s.step, "params": s.params, "opt": s.opt_state, "rows": s.row_states}
    with Checkpoints(tmp_path, keep_best=0) as checkpoints:
        checkpoints.save(2, model=half.tables, training=rest(half), config={}, data_state={})
    like = jax.eval_shape(lambda: half)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        like,
        sparse_shardings(like, mesh),
    )
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(like.tables, rest(like))
    state = SparseState(
        found.training["step"],
        found.training["params"],
        found.training["opt"],
        found.model,
        found.training["rows"],
    )
    assert found.step == 2 and state.tables["category"].sharding.spec[0] == ("data", "model")
    resumed, *_ = run(roomy, state, BATCHES[2:])
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)


def test_tables_that_a_function_makes_are_born_in_their_shards():
    mesh = make_mesh(MESH)
    make_tables = lambda: {"x": jax.random.normal(jax.random.key(0), (64, 4))}
    state = init_sparse({}, make_tables, mesh, optimizer=OPTIMIZER, rows="adam")
    for leaf in (state.tables["x"], *jax.tree.leaves(state.row_states)):
        assert {s.data.shape[0] for s in leaf.addressable_shards} == {8}
    np.testing.assert_allclose(state.tables["x"], make_tables()["x"], atol=1e-6)


def test_no_temporary_grows_with_the_tables():
    """The fallback included: a table of ten times the rows takes the same temporary bytes."""
    mesh = make_mesh("data:8")
    little = lambda params, rows, label: (jnp.mean(rows["x"] ** 2), {})
    step = make_sparse_step(little, mesh, optimizer=OPTIMIZER, lr=LR)
    struct = jax.ShapeDtypeStruct
    found = []
    for rows in (8 * 10**4, 8 * 10**5):
        begin = lambda rows=rows: begin_state({}, {"x": jnp.zeros((rows, 16))}, optimizer=OPTIMIZER)
        like = jax.eval_shape(begin)
        places = sparse_shardings(like, mesh)
        like = jax.tree.map(lambda x, s: struct(x.shape, x.dtype, sharding=s), like, places)
        memory = step.lower(like, {"x": struct((64,), jnp.int32)}, None).compile().memory_analysis()
        found.append(memory.temp_size_in_bytes)
        assert memory.alias_size_in_bytes > rows / 8 * 16 * 4
    assert found[0] == found[1] < 10**5


def test_bad_input(roomy):
    mesh = make_mesh(MESH)
    ids, label = BATCHES[0]
    with pytest.raises(ValueError, match=r"ids of \['item'\], but the tables are"):
        roomy(begin(mesh), {"item": ids["item"]}, label)
    with pytest.raises(ValueError, match="unknown row optimizer 'adagrad'; did you mean"):
        make(mesh, rows="adagrad")
    with pytest.raises(ValueError, match="capacity_factor=-2"):
        make(mesh, capacity_factor=-2)
    with pytest.raises(ValueError, match="pad it to 16 rows"):
        init_sparse(PARAMS, TABLES, mesh, optimizer=OPTIMIZER)
    uneven = {**TABLES, "item": {"attention": np.ones((8, 3)), "representation": np.ones((16, 5))}}
    with pytest.raises(ValueError, match=r"as many rows each, but got \{8, 16\}"):
        roomy(begin(mesh, uneven), ids, label)
    with pytest.raises(TypeError, match="ids are float32"):
        roomy(begin(mesh), {**ids, "item": ids["item"].astype(np.float32)}, label)
