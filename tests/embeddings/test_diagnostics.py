"""Diagnostics of relevance against loops and known cases."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from jaxheads.embeddings.diagnostics import (
    discriminability,
    kmeans,
    learned_relevance,
    mutual_information_table,
    ndcg,
    relevance_gains,
    retrieval_ndcg,
    row_conflict,
)

C, T, N = 3, 4, 600


def log(seed=0):
    """Clicks that depend on whether the newest behaviour has the candidate's category."""
    rng = np.random.default_rng(seed)
    category, past = rng.integers(1, C + 1, N), rng.integers(0, C + 1, (N, T))
    label = (rng.random(N) < np.where(past[:, -1] == category, 0.8, 0.3)).astype(int)
    return label, category, past


def test_mutual_information_is_that_of_the_counts():
    """Of two binary variables, from their joint distribution."""
    label, category, past = log()
    table = mutual_information_table(label, category, past, C)
    for c in range(1, C + 1):
        rows = category == c
        for b in range(1, C + 1):
            for position in range(1, T + 1):
                has, y = past[rows, T - position] == b, label[rows]
                want = 0.0
                for i in (0, 1):
                    for j in (0, 1):
                        joint = np.mean((has == i) & (y == j))
                        want += joint * math.log2(joint / (np.mean(has == i) * np.mean(y == j)))
                np.testing.assert_allclose(table.bits[c, b, position - 1], want, atol=1e-12)
    own = np.array([table.bits[c, c, 0] for c in range(1, C + 1)])
    assert own.min() > 3 * table.bits[1:, 1:, 1:].max()
    assert table.clicked[:, 0].sum() == table.unclicked[:, 0].sum() == 0  # padding


def test_a_count_of_zero_is_a_little_more_than_nothing():
    """The formula by hand: t_1 = 3, t_0 = 2, x_1 = 2, x_0 = 0."""
    label, category = np.array([1, 1, 1, 0, 0]), np.ones(5, int)
    past = np.array([[2], [2], [1], [1], [1]])
    s, x1, x0, t1, t0 = 5, 2, 1e-5, 3, 2
    want = x1 / s * math.log2(x1 * s / ((x1 + x0) * t1))
    want += x0 / s * math.log2(x0 * s / ((x1 + x0) * t0))
    want += (t1 - x1) / s * math.log2((t1 - x1) * s / ((s - x1 - x0) * t1))
    want += (t0 - x0) / s * math.log2((t0 - x0) * s / ((s - x1 - x0) * t0))
    table = mutual_information_table(label, category, past, 2)
    np.testing.assert_allclose(table.bits[1, 2, 0], want, rtol=1e-12)
    assert np.isfinite(table.bits).all()
    assert (table.bits[2] == 0).all()  # never a candidate


def test_gains_and_filters():
    label, category, past = log()
    table = mutual_information_table(label, category, past, C)
    gains = relevance_gains(table, category, past, min_samples=195, min_count=20, most_poor=1)
    for n in range(N):
        poor = 0
        for p in range(T):
            b, position = past[n, p], T - p
            want = table.bits[category[n], b, position - 1] if b else 0
            assert gains.bits[n, p] == want
            rows = (category == category[n]) & (past[:, p] == b)
            poor += b > 0 and min(rows[label == 1].sum(), rows[label == 0].sum()) < 20
        assert gains.kept[n] == ((category == category[n]).sum() >= 195 and poor <= 1)
    assert 0 < gains.kept.sum() < N
    assert not relevance_gains(table, category, past).kept.any()  # 700 samples, by default


def test_learned_relevance_leaves_the_item_out():
    rng = np.random.default_rng(0)
    tables = {n: rng.normal(size=(9, 5)).astype(np.float32) for n in ("category", "time")}
    other = {n: rng.normal(size=(9, 5)).astype(np.float32) for n in ("category", "time")}
    _, category, past = log()
    for ahead in (tables, other):
        scores = learned_relevance(tables, category[:4], past[:4], candidate=ahead)
        for n in range(4):
            for p in range(T):
                if past[n, p] == 0:
                    assert scores[n, p] < -(2.0**31)
                    continue
                a, b = ahead["category"][category[n]], tables["category"][past[n, p]]
                want = a @ b / math.sqrt(10)
                want += ahead["time"][0] @ tables["time"][T - p] / math.sqrt(5)
                np.testing.assert_allclose(scores[n, p], want, rtol=1e-5, atol=1e-5)


def test_ndcg_of_the_best_and_the_worst_order():
    gains = np.array([[0.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    assert retrieval_ndcg(gains, gains, 2) == pytest.approx(1)
    worst = ndcg(-gains, gains, 2)
    assert float(worst[0]) == pytest.approx((1 / math.log2(3)) / (3 + 2 / math.log2(3)))
    assert np.isnan(worst[1])
    with pytest.raises(ValueError, match="nothing to retrieve"):
        retrieval_ndcg(gains, 0 * gains, 2)
    with pytest.raises(ValueError, match="k=5"):
        ndcg(gains, gains, 5)


def test_rows_without_a_gradient_are_left_out():
    first = np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], np.float32)
    second = np.array([[6.0, 8.0], [1.0, 1.0], [0.0, 0.0]], np.float32)
    found = row_conflict(first, second)
    np.testing.assert_allclose(found.first_norm, 3)
    np.testing.assert_allclose(found.ratio, (10 + math.sqrt(2)) / 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(found.cosine, 1, rtol=1e-6)
    np.testing.assert_allclose(row_conflict(first, -second).cosine, -1, rtol=1e-6)


def test_clusters_that_are_the_label_say_all_about_it():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 200)
    features = np.where(label[:, None] == 1, 5.0, -5.0) + rng.normal(size=(200, 3))
    share = label.mean()
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    found = discriminability(features, label, (2, 5))
    np.testing.assert_allclose(found[0], entropy, rtol=1e-6)
    noise = discriminability(rng.normal(size=(200, 3)), label, (2,))
    assert noise[0] < 0.1 * entropy
    cluster = np.asarray(kmeans(features.astype(np.float32), 2, jax.random.key(1)))
    assert len({(a, b) for a, b in zip(cluster, label)}) == 2
    with pytest.raises(ValueError, match="1000 clusters of 200"):
        discriminability(features, label)


def test_bad_input():
    label, category, past = log()
    with pytest.raises(ValueError, match="0 or 1"):
        mutual_information_table(label + 1, category, past, C)
    with pytest.raises(ValueError, match="num_categories=2"):
        mutual_information_table(label, category, past, 2)
