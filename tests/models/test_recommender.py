"""The click model against a loop over samples, and what must not change its output."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify

from jaxheads import intervene, parallel, record
from jaxheads.models.recommender import (
    RECOMMENDERS,
    LongSequenceRecommender,
    RecommenderConfig,
    apply,
    check_batch,
    forward,
    init_stats,
    is_penalised,
    loss,
    squared_norm,
)
from jaxheads.models.recommender_gradients import gradient_conflict, tied_copies
from jaxheads.taps import Edit
from tests.embeddings import naive

ITEMS, CATEGORIES, B, T, K, D = 30, 5, 6, 9, 4, 3
SMALL = dict(num_times=T + 3, top_k=K, representation_dim=D, head_dims=(7, 5), scorer_dim=4)
VARIANTS = {
    **{name: make(ITEMS, CATEGORIES, **SMALL) for name, make in RECOMMENDERS.items()},
    "narrow": RECOMMENDERS["dare"](ITEMS, CATEGORIES, **SMALL, attention_dim=2),
    "add": RECOMMENDERS["dare"](ITEMS, CATEGORIES, **SMALL, time_mode="add"),
    "history mean, two logits": RECOMMENDERS["dare"](
        ITEMS, CATEGORIES, **SMALL, history_mean=True, num_logits=2
    ),
    "product only": RECOMMENDERS["dare"](ITEMS, CATEGORIES, **SMALL, only_product=True),
}


@cache
def model_of(cfg: RecommenderConfig):
    """A model whose parameters are all of order one, so that nothing hides in the noise."""
    model = LongSequenceRecommender(cfg, rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(model)
    rng = np.random.default_rng(1)
    leaves = [jnp.asarray(rng.normal(size=x.shape) * 0.6 + 0.1, jnp.float32) for x in leaves]
    return jax.tree.unflatten(tree, leaves)


def make_batch(seed=0, size=B, length=T):
    """Front-padded histories: full, short, shorter than K, empty, then random lengths."""
    rng = np.random.default_rng(seed)
    draw = lambda most, shape: rng.integers(1, most + 1, shape, dtype=np.int32)
    lengths = np.array([length, 5, 2, 0, *rng.integers(1, length + 1, max(size - 4, 0))])[:size]
    real = np.arange(length) >= length - lengths[:, None]
    return {
        "item": draw(ITEMS, size),
        "category": draw(CATEGORIES, size),
        "history_item": draw(ITEMS, (size, length)) * real,
        "history_category": draw(CATEGORIES, (size, length)) * real,
        "label": rng.integers(0, 2, size).astype(np.float32),
    }


BATCH = make_batch()
jitted_loss = jax.jit(loss)
jitted_grads = jax.jit(jax.value_and_grad(loss, has_aux=True))
jitted_apply = jax.jit(apply, static_argnames="train")


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_a_loop_over_samples(name):
    cfg = VARIANTS[name]
    model, stats = model_of(cfg), init_stats(cfg)
    value, out = jitted_loss(model, stats, BATCH)
    rows = [naive.sample(model, BATCH, b) for b in range(B)]
    for b, (scores, kept, _, _) in enumerate(rows):
        for p in range(T):
            if p in scores:
                np.testing.assert_allclose(out.scores[b, p], scores[p], rtol=2e-6, atol=1e-6)
            else:
                assert out.scores[b, p] < -(2.0**31)
        if cfg.pooling == "attention":
            assert out.index[b].tolist()[: len(kept)] == kept
    main, mean, var = naive.head(model.main, np.array([row[2] for row in rows]))
    aux, _, _ = naive.head(model.aux, np.array([row[3] for row in rows]))
    np.testing.assert_allclose(out.logit, main, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.aux_logit, aux, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.stats["main"]["mean"], 0.1 * mean, rtol=1e-5, atol=1e-6)
    running = 0.9 + 0.1 * var * B / (B - 1)
    np.testing.assert_allclose(out.stats["main"]["var"], running, rtol=1e-5, atol=1e-6)
    label = BATCH["label"]
    want = naive.cross_entropy(main, label) + naive.cross_entropy(aux, label)
    np.testing.assert_allclose(value, want + 1e-6 * naive.penalty(model), rtol=1e-5)


def test_running_statistics_are_used_outside_training():
    cfg = VARIANTS["dare"]
    model, stats = model_of(cfg), init_stats(cfg)
    stats["main"] = {"mean": stats["main"]["mean"] + 0.3, "var": stats["main"]["var"] * 2.0}
    out = jitted_apply(model, stats, BATCH, train=False)
    features = np.array([naive.sample(model, BATCH, b)[2] for b in range(B)])
    scale, bias = (np.asarray(x[...]) for x in (model.main.norm.scale, model.main.norm.bias))
    x = (features - 0.3) / np.sqrt(2 + 1e-5) * scale + bias
    want = [naive.mlp(model.main.mlp, row)[0] for row in x]
    np.testing.assert_allclose(out.logit, want, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(out.stats, stats)
    alone = jax.tree.map(lambda x: x[:1], BATCH)
    np.testing.assert_allclose(
        jitted_apply(model, stats, alone, train=False).logit, out.logit[:1], rtol=1e-5
    )


def test_twin_is_dare_with_tied_tables():
    """Same value; the gradient of the shared tables is the sum of the two."""
    cfg = VARIANTS["twin"]
    model, stats = model_of(cfg), init_stats(cfg)
    (value, out), grads = jitted_grads(model, stats, BATCH)
    tied = tied_copies(model)
    (tied_value, tied_out), both = jitted_grads(tied, stats, BATCH)
    assert tied.cfg.decoupling == "dare"
    np.testing.assert_allclose(value, tied_value, rtol=1e-6)
    chex.assert_trees_all_close(out.logit, tied_out.logit, rtol=1e-5, atol=1e-5)
    total = jax.tree.map(jnp.add, both.attention, both.representation)
    # The two sum scores in different orders, and the parts of a gradient cancel.
    chex.assert_trees_all_close(total, grads.representation, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(both.attention.category[...]).max()) > 1e-3
    conflict = jax.jit(gradient_conflict)(model, stats, BATCH)
    chex.assert_trees_all_close(conflict.grads, grads, rtol=1e-4, atol=1e-4)
    for field in ("item", "category", "time"):
        a, r = (np.asarray(getattr(m, field)[...]) for m in (both.attention, both.representation))
        norms = [np.linalg.norm(g, axis=1) for g in (a, r)]
        means = [n[n > 0].mean() for n in norms]
        use = (norms[0] > 0) & (norms[1] > 0)
        cosines = (a * r).sum(axis=1)[use] / (norms[0] * norms[1])[use]
        found = conflict.by_field[field]
        np.testing.assert_allclose(found.ratio, means[1] / means[0], rtol=1e-4)
        np.testing.assert_allclose(found.cosine, cosines.mean(), rtol=1e-3, atol=1e-4)


def test_only_a_twin_has_tied_copies():
    with pytest.raises(ValueError, match="decoupling='dare'; only decoupling='shared'"):
        tied_copies(model_of(VARIANTS["dare"]))


def test_more_padding_in_front_changes_nothing():
    cfg = dataclasses.replace(VARIANTS["dare"], num_times=64)
    model, stats = model_of(cfg), init_stats(cfg)
    pad = lambda x: np.pad(x, ((0, 0), (11, 0))) if x.ndim == 2 else x
    out = jitted_loss(model, stats, BATCH)[1]
    padded = jitted_loss(model, stats, {name: pad(x) for name, x in BATCH.items()})[1]
    chex.assert_trees_all_close(padded.logit, out.logit, rtol=1e-5)
    chex.assert_trees_all_close(padded.aux_logit, out.aux_logit, rtol=1e-5)
    np.testing.assert_allclose(padded.scores[:, 11:], out.scores, rtol=1e-6)


def test_renaming_items_with_their_rows_changes_nothing():
    cfg = VARIANTS["dare"]
    model, stats = model_of(cfg), init_stats(cfg)
    new = np.concatenate([[0], 1 + np.random.default_rng(3).permutation(ITEMS)]).astype(np.int32)
    renamed = jax.tree.map(lambda x: x, model)
    for tables in (renamed.attention, renamed.representation):
        rows = tables.item[...]
        tables.item = tables.item.replace(jnp.zeros_like(rows).at[new].set(rows))
    batch = {**BATCH, **{name: new[BATCH[name]] for name in ("item", "history_item")}}
    chex.assert_trees_all_equal(
        jitted_apply(renamed, stats, batch, train=False).logit,
        jitted_apply(model, stats, BATCH, train=False).logit,
    )


def test_the_order_of_behaviours_counts_only_through_time():
    cfg = VARIANTS["din"]  # no time field
    model, stats = model_of(cfg), init_stats(cfg)
    batch = make_batch(size=1)
    turned = {**batch, **{n: batch[n][:, ::-1] for n in ("history_item", "history_category")}}
    logit = lambda batch: jitted_apply(model, stats, batch, train=False).logit
    chex.assert_trees_all_close(logit(turned), logit(batch), rtol=1e-5)


def test_the_penalty_is_over_weights_scales_and_slopes():
    cfg = VARIANTS["twin-projection"]
    model = model_of(cfg)
    paths = jax.tree_util.tree_leaves_with_path(is_penalised(model))
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    out = {name(path).removesuffix(".value") for path, yes in paths if not yes}
    assert out >= {"representation.item", "main.norm.bias", "projections.query.bias"}
    assert all(n.startswith("representation.") or n.endswith("bias") for n in out)
    np.testing.assert_allclose(squared_norm(model), naive.penalty(model), rtol=1e-5)


def test_initialisation():
    cfg = RECOMMENDERS["dare"](4000, 50, representation_dim=32)
    model = LongSequenceRecommender(cfg, rngs=nnx.Rngs(0))
    for x in (model.attention.item, model.representation.time, model.main.mlp.layers[0].weight):
        assert abs(float(jnp.std(x[...])) / 0.01 - 1) < 0.05
    assert (np.asarray(model.main.norm.scale[...]) == 1).all()
    assert float(model.main.mlp.slopes[0][...]) == np.float32(0.1)
    assert [layer.weight.shape[1] for layer in model.main.mlp.layers] == [200, 80, 1]
    assert [layer.weight.shape[1] for layer in model.aux.mlp.layers] == [200, 1]
    assert model.attention.item.shape == (4001, 32)
    assert model.attention.item.get_metadata()["axes"] == ("table_rows", None)


def test_one_step_on_eight_devices_is_one_step_on_one():
    """Batch norm sees the whole batch, under jit and under shard_map."""
    cfg = dataclasses.replace(VARIANTS["dare"], row_multiple=8)
    model, stats, batch = model_of(cfg), init_stats(cfg), make_batch(size=16)
    (value, out), grads = jitted_grads(model, stats, batch)
    mesh = parallel.make_mesh("data:8")
    placed = parallel.shard(model, mesh)
    assert placed.attention.item[...].sharding.spec[0] == "data"
    rows = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
    (split_value, split_out), split_grads = jitted_grads(placed, stats, rows)

    def local(model, stats, batch):
        value, out = loss(model, stats, batch, axis_name="data")
        return value, out.stats, out.logit

    specs = (jax.P(), jax.P(), jax.P("data"))
    by_hand = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs))
    hand_value, hand_stats, hand_logit = by_hand(model, stats, rows)
    close = partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-4)
    for got in (split_value, hand_value):
        close(np.asarray(got), np.asarray(value))
    close(jax.device_get(split_grads), jax.device_get(grads))
    close(jax.device_get(split_out.stats), jax.device_get(out.stats))
    close(jax.device_get(hand_stats), jax.device_get(out.stats))
    close(np.asarray(hand_logit), np.asarray(out.logit))


def _scale(value, factor, ctx):
    del ctx
    return value * factor


@pytest.mark.parametrize("name", ["dare", "twin"])
def test_embed_is_a_tap(name):
    cfg = VARIANTS[name]
    model, stats = model_of(cfg), init_stats(cfg)
    seen = record(forward, "embed")(model, BATCH, stats=stats).seen["embed"]
    assert seen.shape == (B, T + 1, (2 if name == "dare" else 1) * 3 * D)
    item = np.asarray(model.tables("attention")["item"])
    np.testing.assert_array_equal(seen[:, -1, :D], item[BATCH["item"]])
    np.testing.assert_array_equal(seen[:, :-1, :D], item[BATCH["history_item"]])
    doubled = jax.tree.map(lambda x: x, model)
    for tables in (doubled.attention, doubled.representation):
        if tables is not None:
            for field in ("item", "category", "time"):
                table = getattr(tables, field)
                setattr(tables, field, table.replace(2 * table[...]))
    edited = intervene(forward, Edit("embed", _scale, jnp.float32(2)))
    chex.assert_trees_all_close(
        edited(model, BATCH, stats=stats).logit,
        forward(doubled, BATCH, stats=stats).logit,
        rtol=1e-5,
    )
    with pytest.raises(ValueError, match="has no site 'z'"):
        record(forward, "z")(model, BATCH, stats=stats)


def changed(**arrays):
    """BATCH with some arrays replaced or, with None, left out."""
    return {k: v for k, v in {**BATCH, **arrays}.items() if v is not None}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (changed(item=BATCH["item"] + ITEMS), "item holds the id .* ids 0 .padding. to 30"),
        (changed(category=-BATCH["category"]), "category holds the id -"),
        (changed(history_item=BATCH["history_item"] + 31), "history_item holds the id"),
        (changed(history_category=BATCH["history_category"] + 6), "history_category holds"),
        (changed(history_item=None), "no 'history_item'"),
        (changed(label=None), "no 'label'"),
        (changed(label=BATCH["label"] + 1), "label 2.0 is neither 0 nor 1"),
        (changed(label=BATCH["label"] - 0.5), "neither 0 nor 1"),
        (changed(item=BATCH["item"][:2]), "item has shape"),
        (changed(history_category=BATCH["history_category"][:, 1:]), "must both be"),
        (make_batch(length=K - 1), "top_k=4"),
        (make_batch(length=T + 3), "num_times=12; set num_times to at least 13"),
    ],
)
def test_batches_that_do_not_fit(batch, message):
    cfg = VARIANTS["dare"]
    with pytest.raises(ValueError, match=message):
        loss(model_of(cfg), init_stats(cfg), batch)


def test_ids_inside_a_compiled_program():
    """NaN, or an error under checkify."""
    cfg = VARIANTS["mean"]
    model, stats = model_of(cfg), init_stats(cfg)
    run = lambda batch: apply(model, stats, batch, train=False).logit
    for wrong in (ITEMS + 1, -1):
        batch = changed(item=np.full(B, wrong, np.int32))
        assert np.isnan(jax.jit(run)(batch)).all()
    error, _ = jax.jit(checkify.checkify(run))(batch)
    with pytest.raises(checkify.JaxRuntimeError, match="item holds an id outside 0 to 30"):
        error.throw()
    jax.jit(checkify.checkify(run))(BATCH)[0].throw()


def test_ids_are_integers():
    with pytest.raises(TypeError, match="item has dtype float32"):
        check_batch(VARIANTS["dare"], changed(item=BATCH["item"].astype(np.float32)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(decoupling="shared", attention_dim=8), "attention_dim=8 with decoupling='shared'"),
        (dict(decoupling="projection", attention_dim=8), "attention_dim=8"),
        (dict(decoupling="darr"), "did you mean 'dare'"),
        (dict(scorer="cosine"), "unknown scorer"),
        (dict(search="hard", time_mode="add"), "search='hard'"),
        (dict(top_k=0), "top_k=0"),
        (dict(num_items=0), "num_items=0"),
        (dict(only_product=True, target_aware=False), "only_product"),
        (dict(num_logits=3), "num_logits=3"),
        (dict(head_dims=()), "head_dims"),
    ],
)
def test_configurations_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        RecommenderConfig(**{**dict(num_items=10, num_categories=3), **settings})


def test_rows_that_the_mesh_does_not_divide_are_an_error():
    mesh = parallel.make_mesh("data:8")
    with pytest.raises(ValueError, match="category: axis 'table_rows' has size 6"):
        parallel.shard(model_of(VARIANTS["dare"]), mesh)
