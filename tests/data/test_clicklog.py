"""The synthetic click log: its definition and its statistics."""

from __future__ import annotations

import numpy as np
import pytest

from jaxheads.data.clicklog import (
    batches,
    bayes_auc,
    make_click_log,
    make_world,
)
from jaxheads.embeddings.diagnostics import retrieval_ndcg


def test_the_world_is_fixed_and_as_defined():
    world = make_world()
    assert world.num_items == 600 and world.num_categories == 30
    assert (np.bincount(world.item_category)[1:] == 20).all()
    r = world.relevance[1:, 1:]
    assert (r == r.T).all() and (np.diag(r) == 1).all()
    assert set(np.unique(r)) == {0, 0.5, 1}
    assert ((r == 0.5).sum(axis=1) >= 2).all()
    assert set(np.unique(world.taste[1:])) == {-1, 1}
    np.testing.assert_array_equal(make_world().taste, world.taste)
    # taste says nothing about category
    means = np.array([world.taste[world.item_category == c].mean(axis=0) for c in range(1, 31)])
    assert abs(means).mean() < 0.3


def test_every_sample_follows_the_formula():
    log, world = make_click_log(3, 50, length=10)
    for b in range(50):
        t, items = log["item"][b], log["history_item"][b]
        assert world.item_category[t] == log["category"][b]
        np.testing.assert_array_equal(world.item_category[items], log["history_category"][b])
        assert len({*log["history_category"][b], log["category"][b]}) <= 6
        raw = [
            world.relevance[log["category"][b], world.item_category[i]] * 2 ** (-(10 - n - 1) / 12)
            for n, i in enumerate(items)
        ]
        total = sum(raw)
        weights = np.array(raw) / total if total else np.zeros(10)
        np.testing.assert_allclose(log["true_weights"][b], weights, rtol=1e-5, atol=1e-7)
        agree = [np.mean(world.taste[i] * world.taste[t]) for i in items]
        np.testing.assert_allclose(log["true_logit"][b], 4 * weights @ agree, rtol=1e-4, atol=1e-5)


def test_statistics():
    log, world = make_click_log(10_000, 8000)
    assert abs(world.bayes_auc - 0.71) < 0.015
    click = 1 / (1 + np.exp(-log["true_logit"].astype(float)))
    assert abs(log["label"].mean() - click.mean()) < 0.02
    weights = log["true_weights"]
    random = np.random.default_rng(0).random(weights.shape)
    newest = np.broadcast_to(np.arange(64.0), weights.shape)
    assert abs(retrieval_ndcg(random, weights, 16) - 0.17) < 0.02
    assert abs(retrieval_ndcg(newest, weights, 16) - 0.46) < 0.02
    np.testing.assert_allclose(weights.sum(axis=1)[weights.any(axis=1)], 1, rtol=1e-5)
    other, _ = make_click_log(10_001, 100, world)
    assert (other["history_item"] != log["history_item"][:100]).mean() > 0.9


def test_bayes_auc_is_that_of_all_pairs():
    p = np.random.default_rng(0).choice([0.1, 0.4, 0.4, 0.9, 0.25], 40)
    pairs = p[:, None] * (1 - p)
    wins = np.where(p[:, None] > p, 1.0, np.where(p[:, None] == p, 0.5, 0.0))
    np.testing.assert_allclose(bayes_auc(p), (pairs * wins).sum() / pairs.sum(), rtol=1e-12)


def test_batches_visit_every_row_once_an_epoch():
    log, _ = make_click_log(0, 20, length=5)
    seen = [b["user"] for b in batches(log, 5, epochs=2, seed=1)]
    assert len(seen) == 8
    for epoch in (seen[:4], seen[4:]):
        assert sorted(np.concatenate(epoch)) == list(range(1, 21))
    assert (np.concatenate(seen[:4]) != np.concatenate(seen[4:])).any()
    assert [len(b["label"]) for b in batches(log, 8)] == [8, 8]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_click_log(0, 0), "n=0"),
        (lambda: make_click_log(0, 4, num_favourites=31), "num_favourites=31"),
        (lambda: make_world(num_items=601), "num_items=601"),
        (lambda: make_world(num_categories=3), "num_categories=3"),
        (lambda: list(batches(make_click_log(0, 4)[0], 5)), "batch_size=5 of a log of 4"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
