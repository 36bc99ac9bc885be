"""The job `recommender`: bytes against formulas, verdicts, the step it plans, bad input."""

from __future__ import annotations

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.parallel import make_mesh
from jaxheads.training.sparse_step import SparseState
from launch import plan as launcher
from launch import plan_jobs, plan_recommender
from launch.plan_report import plan

SMALL = ("model.num_rows=1001", "model.top_k=4", "model.hidden_dim=8")
SIZES = {"batch_size": 16, "seq_len": 6}


def resolve(**given):
    defaults = {
        "topology": "cpu:8",
        "model": "dare-100m",
        "mesh": "data:8",
        "job": "recommender",
        "set": SMALL,
        "sizes": SIZES,
    }
    return launcher.resolve(**defaults | given)


def test_argument_bytes_are_rows_accumulators_head_and_batch():
    request = resolve()
    report = plan(request)
    rows = -(-1001 // 8)
    head = 336 * 8 + 8 + 8 + 1
    expected = rows * (128 + 1) * 4 + 3 * head * 4 + 2 * (7 + 1) * 4 + 2 * 4
    assert report.memory.arguments == expected  # batch: 2 of 7 ids and a label; step and count
    assert report.memory.aliased >= rows * 129 * 4
    content = report.to_json()
    assert content["recommender"]["rows_per_device"] == rows
    assert content["recommender"]["places_per_pair"] == 4  # ceil(2 * 14 / 8)
    kinds = {row["kind"] for row in content["collectives"] if row["count"]}
    assert "all-to-all" in kinds and "reduce-scatter" not in kinds  # the fallback's
    assert any("counted 0 times" in note for note in report.notes)
    assert "16 x 6 behaviours" in launcher.table(report)
    json.dumps(content)


def test_the_planned_step_learns():
    """The program that is planned, on real arrays: the loss of one batch falls."""
    request = resolve(mesh="data:2,model:4")
    mesh = make_mesh("data:2,model:4")
    like, batch = plan_recommender.arguments(request, mesh)
    key = jax.random.key(0)
    draw = lambda x: jax.device_put(
        0.3 * jax.random.normal(key, x.shape) if x.ndim else jnp.zeros(x.shape, x.dtype), x.sharding
    )
    zero = lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)
    state = SparseState(
        zero(like.step),
        jax.tree.map(draw, like.params),
        jax.tree.map(zero, like.opt_state),
        jax.tree.map(draw, like.tables),
        jax.tree.map(zero, like.row_states),
    )
    rng = np.random.default_rng(0)
    ids = {"item": rng.integers(0, 1001, batch["ids"].shape).astype(np.int32)}
    label = rng.integers(0, 2, batch["label"].shape).astype(np.float32)
    step = plan_recommender.make_step(request.model, mesh)
    losses = []
    for _ in range(5):
        state, value, *_ = step(state, ids, label)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0] and np.isfinite(losses).all()


def test_loss_is_the_formula_of_one_sample():
    cfg = resolve(set=(*SMALL, "model.attention_dim=2", "model.representation_dim=3")).model
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1, 7, 5)).astype(np.float32)
    params = {
        "w_in": rng.normal(size=(9, 8)).astype(np.float32),
        "b_in": rng.normal(size=8).astype(np.float32),
        "w_out": rng.normal(size=8).astype(np.float32),
        "b_out": np.float32(0.3),
    }
    found, _ = plan_recommender.pooled_loss(cfg, params, {"item": rows}, jnp.ones(1))
    a, r = rows[0, :, :2].astype(np.float64), rows[0, :, 2:].astype(np.float64)
    scores = a[1:] @ a[0] / np.sqrt(2)
    best = np.argsort(-scores)[:4]
    weights = np.exp(scores[best]) / np.exp(scores[best]).sum()
    h = weights @ r[1:][best]
    hidden = np.maximum(np.concatenate([r[0], h, h * r[0]]) @ params["w_in"] + params["b_in"], 0)
    logit = hidden @ params["w_out"] + 0.3
    np.testing.assert_allclose(found, np.log1p(np.exp(-logit)), rtol=1e-5)


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_tpu_updates_the_table_in_place():
    settings = ("model.num_rows=1000000", "model.on_overflow=report")
    request = resolve(
        topology="v5e:2x2",
        mesh="data:4",
        set=settings,
        sizes={"batch_size": 64, "seq_len": 32},
    )
    report = plan(request)
    shard = 250_000 * 128 * 4
    assert report.fits and report.memory.arguments > shard
    assert report.memory.peak < 1.2 * shard and report.memory.temporaries < shard / 20
    assert report.times is not None and report.times.step > 0


def test_jobs_of_the_flag_are_the_table():
    assert tuple(plan_jobs.JOBS) == launcher.JOB_NAMES


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "llama3.1-8b"}, "unknown recommender 'llama3.1-8b'"),
        ({"job": "recommend"}, "unknown job 'recommend'; did you mean 'recommender'"),
        ({"sizes": {"batch_size": 12, "seq_len": 6}}, "batch_size=12 does not split over 8"),
        ({"sizes": {"batch_size": 16, "seq_len": 3}}, "top_k=4 .* seq_len=3"),
        ({"set": ("model.method=ring",)}, "unknown method 'ring'"),
        ({"set": ("model.capacity_factor=-1",)}, "capacity_factor=-1"),
        ({"set": ("model.row_optimizer=adagrad",)}, "unknown row optimizer"),
        ({"set": ("model.num_rows=0",)}, "num_rows=0"),
        ({"set": (*SMALL, "train.lr=1")}, "train"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(ValueError, match=message):
        resolve(**given)


def test_what_only_formulas_could_answer_is_refused():
    with pytest.raises(ValueError, match="no formulas for h200:8"):
        plan(resolve(topology="h200:8"))
    with pytest.raises(ValueError, match="no formulas for --job=recommender"):
        launcher.run(resolve(), search=True)
