"""Ranking metrics against rank statistics and loops, whole and in pieces."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from jaxheads.training.ranking import (
    StreamingAUC,
    StreamingGroupedAUC,
    StreamingMean,
    auc,
    grouped_auc,
    log_loss,
)


def samples(n=500, levels=20, seed=0):
    """Probabilities with many ties, labels that follow them, groups."""
    rng = np.random.default_rng(seed)
    probability = rng.integers(0, levels, n) / levels
    label = (rng.random(n) < 0.2 + 0.6 * probability).astype(np.float32)
    return probability, label, rng.integers(0, 30, n)


def naive_auc(score, label):
    """Over all pairs."""
    positive, negative = score[label == 1], score[label == 0]
    wins = (positive[:, None] > negative).sum() + 0.5 * (positive[:, None] == negative).sum()
    return wins / (len(positive) * len(negative))


@pytest.mark.parametrize("levels", [2, 20, 10**6])
def test_auc_is_the_rank_statistic(levels):
    score, label, _ = samples(levels=levels)
    u = mannwhitneyu(score[label == 1], score[label == 0]).statistic
    want = u / ((label == 1).sum() * (label == 0).sum())
    np.testing.assert_allclose(auc(score, label), want, rtol=1e-12)
    np.testing.assert_allclose(auc(score, label), naive_auc(score, label), rtol=1e-12)
    np.testing.assert_allclose(auc(-3 * score, label), 1 - want, rtol=1e-12)


def test_auc_and_log_loss_as_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    score, label, _ = samples()
    np.testing.assert_allclose(auc(score, label), metrics.roc_auc_score(label, score), rtol=1e-12)
    p = 0.1 + 0.8 * score
    np.testing.assert_allclose(log_loss(p, label), metrics.log_loss(label, p), rtol=1e-9)


def test_grouped_auc_leaves_out_groups_of_one_class():
    score, label, group = samples(n=120)
    label[group == 3], label[group == 4] = 1, 0
    total = weight = 0.0
    for g in np.unique(group):
        rows = group == g
        if 0 < label[rows].sum() < rows.sum():
            total += rows.sum() * naive_auc(score[rows], label[rows])
            weight += rows.sum()
    assert weight < len(label)
    np.testing.assert_allclose(grouped_auc(score, label, group), total / weight, rtol=1e-12)


def test_batches_give_what_the_whole_gives():
    """In two states of several batches, one of them compiled, then merged."""
    score, label, group = samples(levels=256)
    states = [
        (StreamingAUC.create(256), StreamingGroupedAUC.create(30), StreamingMean.create())
    ] * 2
    logit = jax.scipy.special.logit(0.1 + 0.8 * score)

    def add(state, rows):
        one, many, mean = state
        p, y = score[rows], label[rows]
        return (
            one.add(p, y),
            many.add(p, y, group[rows]),
            mean.add_log_loss(logit[rows], y),
        )

    parts = np.array_split(np.arange(len(label)), 5)
    for n, rows in enumerate(parts):
        states[n % 2] = add(states[n % 2], rows)
    one, many, mean = (a.merge(b) for a, b in zip(*states))
    np.testing.assert_allclose(one.result(), auc(score, label), rtol=1e-12)
    np.testing.assert_allclose(many.result(), grouped_auc(score, label, group), rtol=1e-12)
    np.testing.assert_allclose(mean.result(), log_loss(0.1 + 0.8 * score, label), rtol=1e-5)
    compiled = jax.jit(StreamingAUC.add)(StreamingAUC.create(256), jnp.asarray(score), label)
    assert compiled.result() == one.result()
    assert int(one.positive.sum() + one.negative.sum()) == len(label)


def test_bins_cost_at_most_the_pairs_that_share_one():
    score, label, _ = samples(levels=10**6)
    state = StreamingAUC.create(64).add(score, label)
    positive, negative = (np.asarray(x) for x in state)
    bound = (positive * negative).sum() / (positive.sum() * negative.sum()) / 2
    assert 0 < abs(state.result() - auc(score, label)) <= bound


def test_states_add_up_over_devices():
    score, label, _ = samples(n=64)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(score, label):
        return jax.lax.psum(StreamingAUC.create(128).add(score, label), "data")

    rows = jax.P("data")
    summed = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=jax.P()))
    np.testing.assert_allclose(
        summed(jnp.asarray(score), label).result(), auc(score, label), rtol=1e-12
    )


def test_mean_ndcg_counts_samples_with_something_to_find():
    rng = np.random.default_rng(0)
    scores, gains = rng.normal(size=(6, 9)).astype(np.float32), rng.random((6, 9))
    gains[2] = 0
    want = []
    for s, g in zip(scores, gains):
        discounted = lambda order, g=g: sum(g[p] / np.log2(i + 2) for i, p in enumerate(order[:4]))
        if g.any():
            want.append(discounted(np.argsort(-s)) / discounted(np.argsort(-g)))
    state = StreamingMean.create().add_ndcg(scores[:4], gains[:4], 4)
    state = state.add_ndcg(scores[4:], gains[4:], 4)
    assert int(state.count) == 5
    np.testing.assert_allclose(state.result(), np.mean(want), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, y, g: auc(s, np.ones_like(y)), "500 positives and 0 negatives"),
        (lambda s, y, g: auc(s, np.zeros_like(y)), "0 positives and 500 negatives"),
        (lambda s, y, g: auc(s, 2 * y), "label 2.0 is neither 0 nor 1"),
        (lambda s, y, g: auc(s, y - 1), "neither 0 nor 1"),
        (lambda s, y, g: auc(s[:3], y), "both must be"),
        (lambda s, y, g: auc(s * np.nan, y), "NaN"),
        (lambda s, y, g: grouped_auc(s, y, np.arange(500)), "no group has both"),
        (lambda s, y, g: grouped_auc(s, y, g[:3]), "groups"),
        (lambda s, y, g: log_loss(s + 3, y), "no probabilities"),
        (lambda s, y, g: StreamingAUC.create().add(s, np.ones_like(y)).result(), "at least one"),
        (lambda s, y, g: StreamingAUC.create().add(s, 3 * y), "neither 0 nor 1"),
        (lambda s, y, g: StreamingAUC.create().add(s - 9, y), "apply a sigmoid"),
        (lambda s, y, g: StreamingAUC.create(1), "num_bins=1"),
        (lambda s, y, g: StreamingGroupedAUC.create(5).add(s, y, g), "group ids 0..29 of 5"),
        (lambda s, y, g: StreamingGroupedAUC.create(5).result(), "no group"),
        (lambda s, y, g: StreamingMean.create().result(), "no samples"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(*samples())
