"""Click models that learn by touched rows, against dense gradients of whole tables."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxheads.models.recommender import (
    RECOMMENDERS,
    LongSequenceRecommender,
    init_stats,
    loss,
)
from jaxheads.parallel import make_mesh
from jaxheads.training.recommender import TrainSettings
from jaxheads.training.recommender_rows import (
    batch_ids,
    init_recommender,
    join_tables,
    make_join,
    make_recommender_step,
    row_loss,
    split_tables,
)
from jaxheads.training.sparse_step import init_sparse

ITEMS, CATEGORIES, B, T, LR = 37, 5, 8, 6, 0.05
SMALL = dict(representation_dim=4, top_k=3, head_dims=(4,), num_times=8)
CONFIGS = {
    "dare": RECOMMENDERS["dare"](ITEMS, CATEGORIES, **SMALL, attention_dim=2, row_multiple=8),
    "twin-4e": RECOMMENDERS["twin-4e"](ITEMS, CATEGORIES, **SMALL, aux_loss=False),
    "twin-hard": RECOMMENDERS["twin-hard"](ITEMS, CATEGORIES, **SMALL, aux_loss=False),
}
DARE = CONFIGS["dare"]


def model_of(cfg):
    """A model whose parameters are all of order one, so that every gradient counts."""
    leaves, tree = jax.tree.flatten(LongSequenceRecommender(cfg, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    leaves = [jnp.asarray(rng.normal(size=x.shape) * 0.5, jnp.float32) for x in leaves]
    return jax.tree.unflatten(tree, leaves)


def make_batch():
    """Histories padded in front (one is empty), few categories and few items: many repeat."""
    rng = np.random.default_rng(2)
    draw = lambda most, shape: rng.integers(1, most + 1, shape, dtype=np.int32)
    real = np.arange(T) >= T - np.array([T, 2, 0, 4, 5, 3, T, 1])[:, None]
    return {
        "item": draw(9, B),
        "category": draw(2, B),
        "history_item": draw(9, (B, T)) * real,
        "history_category": draw(2, (B, T)) * real,
        "label": (np.arange(B) % 2).astype(np.float32),
    }


BATCH = make_batch()


def mesh_of(devices):
    return make_mesh(f"data:{devices}", devices=jax.devices()[:devices])


def begin(cfg, mesh, rows):
    tables = split_tables(model_of(cfg), mesh.size)
    return init_sparse(*tables, mesh, optimizer=optax.sgd(LR), rows=rows)


def close(got, want):
    want = jax.tree.map(np.asarray, want)
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(compare, jax.tree.map(np.asarray, got), want)


@jax.jit
def dense_step(model, stats, batch):
    (value, out), gradient = jax.value_and_grad(loss, has_aux=True)(model, stats, batch)
    return jax.tree.map(lambda x, g: x - LR * g, model, gradient), out.stats, value


@pytest.mark.parametrize(
    ("name", "devices", "method"),
    [
        ("dare", 8, "all_to_all"),
        ("dare", 1, "psum_scatter"),
        ("twin-4e", 8, "psum_scatter"),
        ("twin-hard", 8, "psum_scatter"),
    ],
)
def test_a_step_is_the_dense_step(name, devices, method):
    cfg, mesh = CONFIGS[name], mesh_of(devices)
    before, stats = model_of(cfg), init_stats(cfg)
    want, want_stats, want_loss = dense_step(before, stats, BATCH)
    how = dict(optimizer=optax.sgd(LR), rows="sgd", method=method)
    step = make_recommender_step(cfg, mesh, row_lr=LR, **how)
    out = step(begin(cfg, mesh, "sgd"), stats, BATCH)
    model = join_tables(out.state.params, out.state.tables, devices)
    close(out.loss, want_loss)
    close(out.stats, want_stats)
    close(model, want)
    read = np.unique(np.append(BATCH["history_item"], BATCH["item"]))
    others = np.setdiff1d(np.arange(ITEMS + 1), read)
    for use in ("attention", "representation"):
        table, old = model.tables(use)["item"], before.tables(use)["item"]
        np.testing.assert_array_equal(table[others], old[others])
    rows = before.tables("representation")["item"]
    assert (np.abs(table - rows).max(axis=1)[1:10] > 1e-4).any()  # it did learn


@pytest.mark.parametrize("name", [*RECOMMENDERS, "add"])
def test_every_preset_reads_its_rows(name):
    changes = dict(time_mode="add", history_mean=True) if name == "add" else {}
    cfg = RECOMMENDERS["dare" if name == "add" else name](ITEMS, CATEGORIES, **SMALL | changes)
    model, stats = model_of(cfg), init_stats(cfg)
    rest, tables = split_tables(model, 1)
    ids = batch_ids(cfg, BATCH)
    rows = {field: {use: t[ids[field]] for use, t in of.items()} for field, of in tables.items()}
    got, got_stats = row_loss(rest, rows, (stats, BATCH))
    want, out = loss(model, stats, BATCH)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    close(got_stats, out.stats)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_split_and_join(name, multiple):
    cfg = RECOMMENDERS[name](ITEMS, CATEGORIES, **SMALL, row_multiple=multiple)
    model = model_of(cfg)
    rest, tables = split_tables(model, 8)
    uses = {"dare": ["attention", "representation"], "twin-hard": ["representation"]}
    assert sorted(tables["item"]) == uses.get(name, ["attention", "representation"])
    assert ("item_candidate" in tables) == (name == "twin-4e")
    assert rest.representation.item.shape == (0, 4) and rest.representation.time is not None
    back = join_tables(rest, tables, 8)
    assert jax.tree.structure(back) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, back, model)


@pytest.fixture(scope="module")
def lazy():
    """A state as training begins it, and its step with lazy Adam."""
    mesh, how = mesh_of(8), dict(optimizer=optax.adam(0.02), rows="adam")
    state = lambda: init_recommender(DARE, mesh, seed=3, **how)
    return mesh, state, make_recommender_step(DARE, mesh, row_lr=0.02, method="psum_scatter", **how)


def test_lazy_adam_lowers_the_loss(lazy):
    mesh, begin, step = lazy
    state, stats, losses = begin(), init_stats(DARE), []
    start = make_join(DARE, mesh)(state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7),
        start,
        LongSequenceRecommender(DARE, rngs=nnx.Rngs(3)),
    )
    for _ in range(8):
        state, stats, value, _ = step(state, stats, BATCH)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0] and state.step == 8


def test_ids_outside_a_table_change_nothing(lazy):
    _, begin, step = lazy
    state, stats = begin(), init_stats(DARE)
    before = jax.tree.map(np.array, (state.params, state.tables, state.row_states, stats))
    bad = BATCH | {"item": np.full(B, ITEMS + 1, np.int32)}  # a row of padding
    state, stats, value, _ = step(state, stats, bad)
    assert np.isnan(value) and state.step == 1
    after = (state.params, state.tables, state.row_states, stats)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_no_gradient_has_the_shape_of_a_table():
    rest, tables = split_tables(model_of(DARE), 1)
    rows = jax.tree.map(lambda t: jnp.zeros((B, T + 1, t.shape[-1])), tables)
    given = (init_stats(DARE), BATCH)
    gradient = jax.grad(row_loss, argnums=(0, 1), has_aux=True)
    of_rest, of_rows = jax.eval_shape(gradient, rest, rows, given)[0]
    assert of_rest.attention.item.shape == (0, 2)
    assert of_rows["item"]["representation"].shape == (B, T + 1, 4)


def test_settings_that_do_not_exist():
    make = lambda **options: make_recommender_step(
        DARE, mesh_of(1), **(dict(optimizer=optax.sgd(LR), row_lr=LR, rows="sgd") | options)
    )
    with pytest.raises(ValueError, match="unknown row optimizer 'adamm'; did you mean 'adam'"):
        make(rows="adamm")
    with pytest.raises(ValueError, match="unknown method 'sparsecore'"):
        make(method="sparsecore")
    with pytest.raises(ValueError, match="unknown row optimizer 'rowwise_adagrd'"):
        TrainSettings(sparse_rows="rowwise_adagrd")
    missing = {name: value for name, value in BATCH.items() if name != "category"}
    with pytest.raises(ValueError, match="the batch has no 'category'"):
        make()(begin(DARE, mesh_of(1), "sgd"), init_stats(DARE), missing)
