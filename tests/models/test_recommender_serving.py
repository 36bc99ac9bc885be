"""Serving in two stages: equal to the forward of training, alone and split over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads import parallel
from jaxheads.checkpoints import recommender as files
from jaxheads.embeddings.search import split_topk
from jaxheads.models.recommender import (
    RECOMMENDERS,
    LongSequenceRecommender,
    RecommenderConfig,
    apply,
    init_stats,
)
from jaxheads.models.recommender_serving import lookup_bytes, serve, serve_one_stage

SIZES = dict(
    num_items=40, num_categories=6, num_times=40, representation_dim=4, top_k=5, init_std=0.5
)


def make(name="dare", **changes):
    """A model whose statistics are not those of the start."""
    cfg = RECOMMENDERS[name](**{**SIZES, "head_dims": (8, 6), **changes})
    model = LongSequenceRecommender(cfg, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 8))
    draw = lambda x: x + jax.random.uniform(next(keys), x.shape, minval=0.2, maxval=0.9)
    return model, jax.tree.map(draw, init_stats(cfg))


def make_batch(rows=4, length=24, seed=0):
    """Histories of all lengths, an empty one among them, with repeated behaviours (ties)."""
    rng = np.random.default_rng(seed)
    items = rng.integers(1, 41, (rows, length))
    items[-1, 2:6] = items[-1, 2]
    empty = np.arange(length) < np.linspace(0, length, rows).astype(int)[:, None]
    items = np.where(empty, 0, items)
    return {
        "item": rng.integers(1, 41, rows).astype(np.int32),
        "category": rng.integers(1, 7, rows).astype(np.int32),
        "history_item": items.astype(np.int32),
        "history_category": np.where(items > 0, items % 6 + 1, 0).astype(np.int32),
    }


SERVABLE = {
    "dare": ("dare", dict(attention_dim=3)),
    "twin": ("twin", {}),
    "projection": ("twin-projection", {}),
    "four tables": ("twin-4e", {}),
    "hard": ("twin-hard", {}),
    "no tr": ("twin-no-tr", {}),
    "din": ("din", {}),
    "add": ("dare", dict(time_mode="add")),
    "products": ("dare", dict(only_product=True, num_logits=2, aux_loss=False)),
}


def all_three(model, stats, batch):
    out = apply(model, stats, batch, train=False)
    return out, serve(model, stats, batch), serve_one_stage(model, stats, batch)


@pytest.mark.parametrize("name", SERVABLE)
def test_serving_is_the_forward_of_training(name):
    preset, changes = SERVABLE[name]
    model, stats = make(preset, **changes)
    batch = make_batch()
    out, served, one = jax.jit(all_three)(model, stats, batch)
    np.testing.assert_allclose(served.logit, out.logit, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(served.index, out.index)
    np.testing.assert_allclose(served.probability, 1 / (1 + np.exp(-np.float64(out.logit))), 1e-5)
    np.testing.assert_allclose(served.weights, one.weights, atol=1e-6)
    is_real = np.take_along_axis(batch["history_item"], np.asarray(served.index), 1) > 0
    if name == "hard":
        same = batch["history_category"] == batch["category"][:, None]
        is_real &= np.take_along_axis(same, np.asarray(served.index), 1)
    np.testing.assert_array_equal(np.asarray(served.weights) > 0, is_real)
    total = np.asarray(served.weights).sum(1)
    np.testing.assert_allclose(total, is_real.any(1), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "spec"),
    [("dare", "context:8"), ("hard", "context:2"), ("projection", "data:2,context:4")],
)
def test_a_split_history_is_the_whole_one(name, spec):
    preset, changes = SERVABLE[name]
    model, stats = make(preset, **changes)
    batch = make_batch()
    want = jax.jit(serve)(model, stats, batch)
    with jax.set_mesh(parallel.make_mesh(spec)):
        got = jax.jit(serve)(model, stats, batch)
    np.testing.assert_array_equal(got.index, want.index)  # ties too
    np.testing.assert_allclose(got.logit, want.logit, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.weights, want.weights, rtol=1e-5, atol=1e-6)


def test_split_topk_is_exact_whatever_lies_where():
    """All of the best in one part, and ties over all parts, against a stable sort."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4, 32)).astype(np.float32)
    scores[0, 8:14] += 100
    scores[1] = 1.0
    scores[2] = rng.integers(0, 3, 32)
    carried = rng.integers(0, 1000, (4, 32))
    with jax.set_mesh(parallel.make_mesh("context:8")):
        for k in (1, 6, 32):
            search = jax.shard_map(
                lambda s, c, k=k: tuple(split_topk(s, (c,), k, axis_name="context")),
                in_specs=jax.P(None, "context"),
                out_specs=jax.P(),
                check_vma=False,
            )
            best = jax.jit(search)(scores, carried)
            index = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            np.testing.assert_array_equal(best[1], index)
            np.testing.assert_array_equal(best[0], np.take_along_axis(scores, index, 1))
            np.testing.assert_array_equal(best[2][0], np.take_along_axis(carried, index, 1))


TABLES = {(rows, width) for rows in (41, 7, 40) for width in (3, 4)}


def rows_read(fn, *args):
    """Bytes that the gathers of a program take out of tables."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "gather" and eqn.invars[0].aval.shape in TABLES:
                yield eqn.outvars[0].aval.size * 4
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)

    return sum(walk(jax.make_jaxpr(fn)(*args).jaxpr))


def live(fn):
    """Only what the probability needs: the auxiliary head is no part of a service."""
    return lambda *args: fn(*args).probability


@pytest.mark.parametrize("name", ["dare", "twin", "no tr"])
def test_the_bytes_that_two_stages_read(name):
    """The formula against the gathers of the programs, for one request."""
    preset, changes = SERVABLE[name]
    model, stats = make(preset, **changes, aux_loss=False)
    batch = make_batch(rows=1, length=30)
    said = lookup_bytes(model.cfg, 30)
    assert rows_read(live(serve), model, stats, batch) == said.two_stage
    one = lambda *args: apply(*args, train=False).logit
    assert rows_read(one, model, stats, batch) == said.one_stage
    if name == "dare":
        assert said.two_stage < said.one_stage


def test_bytes_of_the_paper_s_case():
    cfg = RecommenderConfig(num_items=9, num_categories=9, attention_dim=64, representation_dim=128)
    said = lookup_bytes(cfg, 200)
    assert said.two_stage == 4 * 3 * (201 * 64 + 21 * 128)
    assert said.one_stage == 4 * 3 * (201 * 64 + 201 * 128)


def test_what_cannot_be_served():
    with pytest.raises(NotImplementedError, match=r"pooling='mean' reads the representation of"):
        serve(*make("mean"), make_batch())
    with pytest.raises(NotImplementedError, match=r"history_mean=True reads"):
        serve(*make(history_mean=True), make_batch())
    model, stats = make()
    on = lambda spec: jax.set_mesh(parallel.make_mesh(spec))
    with on("context:8"), pytest.raises(ValueError, match="20 behaviours are not divisible by 8"):
        serve(model, stats, make_batch(length=20))
    with on("data:8"), pytest.raises(ValueError, match="4 samples are not divisible by 8"):
        serve(model, stats, make_batch())
    bad = make_batch()
    bad["history_item"][0, 3] = 41
    with pytest.raises(ValueError, match="history_item holds the id 41"):
        serve(model, stats, bad)
    with pytest.raises(ValueError, match="k=9 of 8 behaviours"):
        split_topk(jnp.zeros((1, 8)), (), 9)


def test_models_come_back_bit_for_bit(tmp_path):
    for name in ("din", "twin-4e"):
        model, stats = make(name)
        files.save(model, stats, tmp_path / name, extra={"auc": 0.5})
        cfg, extra = files.load_config(tmp_path / name)
        assert cfg == model.cfg and extra == {"auc": 0.5}
        again = files.load(tmp_path / name)
        assert jax.tree.structure(again.model) == jax.tree.structure(model)
        for a, b in zip(
            jax.tree.leaves(tuple(again)), jax.tree.leaves((model, stats)), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_a_model_comes_back_on_a_mesh(tmp_path):
    model, stats = make(row_multiple=8)
    files.save(model, stats, tmp_path)
    mesh = parallel.make_mesh("data:2,model:4")
    again = files.load(tmp_path, mesh=mesh)
    table = again.model.attention.item[...]
    assert table.sharding.shard_shape(table.shape) == (table.shape[0] // 8, table.shape[1])
    np.testing.assert_array_equal(table, model.attention.item[...])
    files.save(again.model, again.stats, tmp_path / "again")
    one, two = (d / "model.safetensors" for d in (tmp_path, tmp_path / "again"))
    assert one.read_bytes() == two.read_bytes()


def test_damaged_models_are_refused(tmp_path):
    model, stats = make()
    files.save(model, stats, tmp_path / "good")
    with pytest.raises(ValueError, match=r"holds no config.json"):
        files.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="holds a model of type 'gpt2', needed"):
        files.load(tmp_path)
    text = (tmp_path / "good/config.json").read_text()
    (tmp_path / "good/config.json").write_text(text.replace('"num_items": 40', '"num_items": 41'))
    with pytest.raises(ValueError, match=r"model.attention.item is F32\[41, 4\], needed"):
        files.load(tmp_path / "good")
    with pytest.raises(ValueError, match="is a file; save needs"):
        files.save(model, stats, tmp_path / "config.json")
