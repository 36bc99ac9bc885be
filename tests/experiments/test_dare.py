"""The experiment on decoupled embeddings: its measures, and that its claims can fail."""

from __future__ import annotations

import numpy as np
import optax
import pytest
from scipy.stats import spearmanr

from experiments import dare
from jaxheads.data.clicklog import make_click_log, make_world


def test_rank_correlation_is_spearmans_mean():
    rng = np.random.default_rng(0)
    scores, weights = rng.normal(size=(5, 12)), rng.integers(0, 3, (5, 12)).astype(float)
    want = np.mean([spearmanr(a, b).statistic for a, b in zip(scores, weights)])
    constant = np.concatenate([weights, np.zeros((1, 12))])
    more = np.concatenate([scores, scores[:1]])
    assert dare.rank_correlation(more, constant) == pytest.approx(want)
    some = np.where(weights > 0, weights, np.nan)
    pairs = [(a[~np.isnan(b)], b[~np.isnan(b)]) for a, b in zip(scores, some)]
    want = np.mean([spearmanr(a, b).statistic for a, b in pairs])
    assert dare.rank_correlation(scores, some) == pytest.approx(want)


def test_every_arm_can_be_made_and_differs():
    world = make_world()
    configs = {name: (arm.config(world), arm.samples) for name, arm in dare.ARMS.items()}
    assert len(set(configs.values())) == len(configs)
    assert all(cfg.top_k == dare.TOP_K for cfg, _ in configs.values())


def scores(better):
    """One score per arm and seed; `better` those that DARE has more."""
    base = {name: [dare.Score(0.58, 0.4, 0.3, 0.3)] * 3 for name in dare.ARMS}
    for name in ("DARE", "DARE, d_A = 4", "DARE, 150k"):
        base[name] = [dare.Score(0.58 + better, 0.4 + 9 * better, *(0.3 + 9 * better,) * 2)] * 3
    base["TWIN w/ projection"] = [dare.Score(0.5, 0.4 - 9 * better, 0, 0)] * 3
    return base


def test_claims_hold_and_fail():
    good = dare.decide(scores(0.04), {"random": 0.17, "recency": 0.46}, [dare.Fight(9.0, 0.1)] * 3)
    assert all(claim.holds for claim in good)
    bad = dare.decide(scores(-0.04), {"random": 0.3, "recency": 0.9}, [dare.Fight(2.0, 0.1)] * 3)
    assert not any(claim.holds for claim in bad)
    one_seed = scores(0.04)
    one_seed["DARE"][2] = dare.Score(0.581, 0.9, 0.9, 0.9)
    control = {"random": 0.17, "recency": 0.46}
    assert not dare.decide(one_seed, control, [dare.Fight(9.0, 0)])[0].holds


@pytest.mark.slow
def test_training_takes_any_stream_of_batches():
    """Twin: a few steps lower the loss; tied copies take the same steps."""
    log, world = make_click_log(0, 64)
    cfg = dare.ARMS["TWIN"].config(world)
    stream = list(dare.inputs(log, 64)) * 12
    assert "true_weights" not in stream[0]
    optimizer = optax.adam(0.02)
    trained = dare.train(cfg, iter(stream), seed=0, optimizer=optimizer)
    assert trained.losses[-1] < trained.losses[0] - 0.02
    score = dare.measure(trained, log, 64)
    assert score.auc > 0.6  # on what it was trained on
    fight = dare.fight(cfg, stream[:3], seed=0, optimizer=optimizer)
    assert fight.norm_ratio > 1 and 0 <= fight.conflict <= 1


def test_controls_and_maps():
    log, world = make_click_log(0, 500)
    found = dare.controls(log)
    assert 0.1 < found["random"] < found["recency"] < 0.6
    true = dare.correlation_maps(world, {})["true"]
    assert true.shape == (10, 12) and true[0, 0] == 1 and (true[:, 0] >= true[:, -1]).all()
