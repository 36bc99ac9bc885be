"""Scores, search and pooling of long histories."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.embeddings import (
    PADDED_SCORE,
    embed,
    history_times,
    masked_mean,
    pool_all,
    relevance_of_ids,
    relevance_scores,
    search_topk,
    target_aware_features,
    two_stage_pool,
)

B, T, D, K = 3, 7, 4, 3


def random(*shape, seed=0):
    """Normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tables(time_dim=D):
    """Tables of 9 items, 4 categories and 12 times."""
    return {
        "item": random(9, D),
        "category": random(4, D, seed=1),
        "time": random(12, time_dim, seed=2),
    }


def ids(shape, most, seed=0):
    """Ids from 1."""
    return np.random.default_rng(seed).integers(1, most + 1, shape, dtype=np.int32)


@pytest.mark.parametrize("mode", ["concat", "add", "none"])
def test_vectors_are_rows_side_by_side(mode):
    rows = tables(2 * D if mode == "add" else D)
    item, category = ids((B, T), 8), ids((B, T), 3)
    out = embed(rows, item, category, history_times(T), mode)
    for b in range(B):
        for p in range(T):
            want = [*rows["item"][item[b, p]], *rows["category"][category[b, p]]]
            if mode == "concat":
                want = [*want, *rows["time"][T - p]]
            if mode == "add":
                want = np.array(want) + rows["time"][T - p]
            np.testing.assert_array_equal(out[b, p], np.array(want, np.float32))


def test_time_ids_may_be_given_for_every_sample():
    rows, item, category = tables(), ids((B, T), 8), ids((B, T), 3)
    every = jnp.broadcast_to(history_times(T), (B, T))
    np.testing.assert_array_equal(
        embed(rows, item, category, every), embed(rows, item, category, history_times(T))
    )


def test_scores_divide_each_part_by_its_own_width():
    q, k = random(B, 3 * D), random(B, T, 3 * D, seed=1)
    mask = np.arange(T) > np.array([[0], [2], [-1]])
    scores = np.asarray(relevance_scores(q, k, D, mask))
    alone = np.asarray(relevance_scores(q, k, D, mask, item_only=True))
    for b in range(B):
        for p in range(T):
            semantic = q[b, : 2 * D] @ k[b, p, : 2 * D] / np.sqrt(2 * D)
            item = q[b, :D] @ k[b, p, :D] / np.sqrt(D)
            time = q[b, 2 * D :] @ k[b, p, 2 * D :] / np.sqrt(D)
            if mask[b, p]:
                np.testing.assert_allclose(scores[b, p], semantic + time, rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(alone[b, p], item + time, rtol=1e-5, atol=1e-6)
            else:
                assert scores[b, p] == np.float32(-(2**32) + 1)


@pytest.mark.parametrize("mode", ["concat", "none"])
def test_scores_from_ids_are_those_of_the_vectors(mode):
    rows, other = tables(), {n: x + 0.3 for n, x in tables().items()}
    if mode == "none":
        rows.pop("time"), other.pop("time")
    item, category = ids((B,), 8), ids((B,), 3)
    past, past_category = ids((B, T), 8, seed=1), ids((B, T), 3, seed=1)
    past[0, :4] = 0
    q = embed(other, item, category, jnp.zeros((), int), mode)
    k = embed(rows, past, past_category, history_times(T), mode)
    for item_only in (False, True):
        got = relevance_of_ids(
            rows, item, category, past, past_category, candidate=other, item_only=item_only
        )
        want = relevance_scores(q, k, D, past > 0, item_only=item_only)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_without_a_time_part_one_divisor_serves():
    q, k = random(B, 2 * D), random(B, T, 2 * D, seed=1)
    want = np.einsum("bd,btd->bt", q, k) / np.sqrt(2 * D)
    np.testing.assert_allclose(relevance_scores(q, k, D), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("approximate", [False, True])
def test_search_keeps_the_highest_in_order(approximate):
    scores = random(B, T)
    values, index = search_topk(jnp.asarray(scores), K, approximate=approximate)
    want = np.argsort(-scores, axis=1)[:, :K]
    np.testing.assert_array_equal(index, want)
    np.testing.assert_array_equal(values, np.take_along_axis(scores, want, axis=1))


def test_equal_scores_come_in_order_of_position():
    np.testing.assert_array_equal(search_topk(jnp.zeros((1, T)), K)[1], [[0, 1, 2]])


def test_pooling_is_the_softmax_of_the_scores_kept():
    scores, values = random(B, T), random(B, T, D, seed=1)
    h, weights, index = two_stage_pool(jnp.asarray(scores), jnp.asarray(values), K)
    for b in range(B):
        best = sorted(range(T), key=lambda p: -scores[b, p])[:K]
        raw = np.exp(scores[b, best].astype(float))
        np.testing.assert_array_equal(index[b], best)
        np.testing.assert_allclose(weights[b], raw / raw.sum(), rtol=1e-5)
        want = sum(w * values[b, p] for w, p in zip(raw / raw.sum(), best))
        np.testing.assert_allclose(h[b], want, rtol=1e-5, atol=1e-6)


def test_keeping_everything_is_the_full_softmax():
    scores, values = random(B, T), random(B, T, D, seed=1)
    full = jnp.einsum("bt,btd->bd", jax.nn.softmax(scores), values)
    np.testing.assert_allclose(two_stage_pool(scores, values, T).h, full, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pool_all(scores, values), full, rtol=1e-5, atol=1e-6)


def test_padding_weighs_nothing_and_a_history_of_padding_gives_zero():
    """Fewer behaviours than K: the released code would let padding in."""
    scores, values = random(2, T), random(2, T, D, seed=1)
    real = np.array([[False] * (T - 2) + [True] * 2, [False] * T])
    scores = np.where(real, scores, np.float32(PADDED_SCORE))

    def total(scores, values):
        pooled = two_stage_pool(scores, values, K)
        return jnp.sum(jnp.sin(pooled.h) + jnp.cos(pool_all(scores, values))), pooled

    (_, pooled), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(scores, values)
    raw = np.exp(scores[0, -2:].astype(float))
    np.testing.assert_allclose(np.sort(pooled.weights[0])[1:], np.sort(raw / raw.sum()), rtol=1e-5)
    assert np.sort(pooled.weights[0])[0] == 0
    np.testing.assert_array_equal(pooled.weights[1], 0)
    np.testing.assert_array_equal(pooled.h[1], 0)
    assert all(np.isfinite(g).all() for g in grads)
    assert not np.asarray(grads[0])[~real].any() and not np.asarray(grads[1])[~real].any()


def test_huge_scores_do_not_overflow():
    weights = two_stage_pool(jnp.array([[1e5, 1e5 - 1, -1e5]]), jnp.ones((1, 3, 1)), 3).weights
    np.testing.assert_allclose(weights[0], [1 / (1 + np.exp(-1)), 1 / (1 + np.e), 0], rtol=1e-5)


def test_the_choice_is_not_differentiated_but_the_scores_are():
    scores, values = jnp.asarray(random(B, T)), random(B, T, D, seed=1)
    grads = np.asarray(jax.grad(lambda s: jnp.sum(two_stage_pool(s, values, K).h ** 2))(scores))
    index = np.asarray(search_topk(scores, K)[1])
    for b in range(B):
        reached = set(np.flatnonzero(grads[b]))
        assert reached == set(index[b].tolist())


def test_features_and_means():
    r, h, m = random(B, D), random(B, D, seed=1), random(B, D, seed=2)
    both = target_aware_features(r, h, m)
    np.testing.assert_array_equal(both, np.concatenate([r, h, m, h * r, m * r], axis=1))
    plain = target_aware_features(r, h, target_aware=False)
    np.testing.assert_array_equal(plain, np.concatenate([r, h], axis=1))
    np.testing.assert_array_equal(target_aware_features(r, h, only_product=True), h * r)
    values, mask = random(B, T, D), np.arange(T) >= np.array([[0], [4], [T]])
    for b in range(B):
        want = values[b][mask[b]].sum(axis=0) / (mask[b].sum() + 1)
        np.testing.assert_allclose(masked_mean(values, mask)[b], want, rtol=1e-5, atol=1e-6)


def test_target_aware_representation_commutes_with_pooling():
    """sum_p w_p (r_p * r_t) = h * r_t."""
    scores, values, r = random(B, T), random(B, T, D, seed=1), random(B, D, seed=2)
    each = two_stage_pool(scores, values * r[:, None], K).h
    np.testing.assert_allclose(each, two_stage_pool(scores, values, K).h * r, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: embed(tables(), ids((B,), 8), ids((B,), 3), None, "sum"), "unknown time mode"),
        (lambda: embed(tables(), ids((B,), 8), ids((B,), 3), None), "needs time ids"),
        (lambda: embed(tables(), ids((B,), 8), ids((B,), 3), jnp.zeros(B, int), "add"), "width 4"),
        (lambda: relevance_scores(random(B, 5), random(B, T, 5), D), "3 \\* d_field = 12"),
        (lambda: relevance_scores(random(B, 8), random(B, T, 12), D), "8 .candidate. and 12"),
        (lambda: search_topk(random(B, T), T + 1), "between 1 and the length"),
        (lambda: search_topk(random(B, T), 0), "between 1 and the length"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_id_outside_the_table_gives_nan_inside_jit():
    rows = tables()
    out = jax.jit(lambda i: embed(rows, i, jnp.ones_like(i), 0))(jnp.array([3, 9, -1]))
    assert np.isfinite(out[0]).all() and np.isnan(out[1:, :D]).all()
