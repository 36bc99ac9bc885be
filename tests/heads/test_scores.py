"""Scores with controls and intervals: against scipy, plain loops and limit cases."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxheads import heads
from jaxheads.heads import Control, HeadScores

L, H = 3, 4
RNG = np.random.default_rng(0)
MAP = RNG.normal(size=(L, H)).astype(np.float32)


@pytest.mark.parametrize("method", ["pearson", "spearman"])
@pytest.mark.parametrize("levels", [None, 3])  # 3: many ties
def test_correlation_agrees_with_scipy(method, levels):
    stats = pytest.importorskip("scipy.stats")
    for seed in range(5):
        rng = np.random.default_rng(seed)
        a, b = rng.normal(size=(2, 6, 8))
        if levels:
            a, b = rng.integers(0, levels, (2, 6, 8))
        want = getattr(stats, f"{method}r")(a.ravel(), b.ravel()).statistic
        np.testing.assert_allclose(heads.correlation(a, b, method=method), want, atol=1e-12)


def test_correlation_of_chosen_heads():
    a = np.array([[1.0, 2.0, 3.0, 50.0]])
    b = np.array([[2.0, 4.0, 6.0, -50.0]])
    assert heads.correlation(a, b) < 0
    assert heads.correlation(a, b, where=a < 10) == pytest.approx(1)
    assert heads.correlation(a, -a, method="spearman") == -1


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (MAP, MAP.T, {}, "shapes"),
        (MAP, np.ones_like(MAP), {}, "constant"),
        (MAP, np.full_like(MAP, np.nan), {}, "NaN"),
        (MAP, MAP, {"method": "kendall"}, "'kendall' is not one of pearson, spearman"),
        (MAP, MAP, {"where": np.eye(2)}, "where has shape"),
        (MAP, MAP, {"where": np.zeros_like(MAP)}, "0 heads"),
    ],
)
def test_correlation_refuses(a, b, options, message):
    with pytest.raises(ValueError, match=message):
        heads.correlation(a, b, **options)


def test_bootstrap_is_the_quantile_of_resampled_means():
    """Against a loop that draws prompts one by one, and against the normal interval."""
    examples = RNG.normal(2, 1, size=(200, 2, 3))
    low, high = heads.bootstrap(examples, resamples=4000, seed=1)
    means = [examples[RNG.integers(0, 200, 200)].mean(0) for _ in range(4000)]
    np.testing.assert_allclose([low, high], np.quantile(means, [0.025, 0.975], axis=0), atol=0.02)
    half = 1.96 * examples.std(0) / np.sqrt(200)
    np.testing.assert_allclose(high - low, 2 * half, rtol=0.08)
    narrow = heads.bootstrap(examples, confidence=0.5, seed=1)
    assert np.all(narrow.high - narrow.low < high - low)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    inside = [
        bool(low <= 1 <= high)
        for low, high in (
            heads.bootstrap(rng.normal(1, 1, 60), resamples=500, seed=n) for n in range(200)
        )
    ]
    assert 0.88 <= np.mean(inside) <= 0.99


def test_a_ratio_is_resampled_whole():
    """Where every prompt has the same ratio, the interval of the ratio of means is a point."""
    scale = RNG.uniform(0.5, 3, 50)
    examples = scale[:, None, None] * MAP
    low, high = heads.bootstrap(examples, denominator=scale)
    np.testing.assert_allclose(low, MAP, atol=1e-6)
    np.testing.assert_allclose(high, MAP, atol=1e-6)
    scores = HeadScores.from_examples(examples, denominator=scale)
    np.testing.assert_allclose(scores.values, MAP, atol=1e-6)
    assert scores.meta["bootstrap"]["examples"] == 50


def test_large_maps_are_resampled_in_parts(monkeypatch):
    examples = RNG.normal(size=(8, 5, 7))
    whole = heads.bootstrap(examples, resamples=100)
    monkeypatch.setattr("jaxheads.heads.statistics._CELLS", 300)
    np.testing.assert_allclose(heads.bootstrap(examples, resamples=100), whole, rtol=1e-6)


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        (np.zeros((1, 2)), {}, "at least two prompts"),
        (np.full((3, 2), np.nan), {}, "NaN"),
        (np.zeros((3, 2)), {"confidence": 95}, "confidence=95"),
        (np.zeros((3, 2)), {"denominator": np.ones(2)}, r"must be \[3\]"),
        (np.zeros((3, 2)), {"denominator": np.zeros(3)}, "score alike"),
        (np.zeros((3, 2)), {"resamples": 0}, "resamples=0"),
    ],
)
def test_bootstrap_refuses(examples, options, message):
    with pytest.raises(ValueError, match=message):
        heads.bootstrap(examples, **options)


@given(st.integers(0, 6), st.integers(0, 10_000))
def test_random_heads_are_different_seeded_and_leave_out(k, seed):
    banned = [(0, 0), (1, 2), (2, 3)]
    drawn = heads.random_heads(L, H, k, seed, exclude=banned)
    assert len(set(drawn)) == k and not set(drawn) & set(banned)
    assert drawn == heads.random_heads(L, H, k, seed, exclude=banned) == sorted(drawn)
    assert heads.mask(drawn, L, H).sum() == k


def test_every_head_is_drawn_about_equally_often():
    counts = sum(heads.mask(heads.random_heads(L, H, 3, seed), L, H) for seed in range(4000))
    np.testing.assert_allclose(counts / 4000, 3 / 12, atol=0.035)  # five standard deviations


def test_random_heads_can_keep_the_layers():
    chosen = [(0, 1), (2, 0), (2, 3)]
    for seed in range(20):
        drawn = heads.random_heads(L, H, None, seed, match=chosen, exclude=chosen)
        assert [layer for layer, _ in drawn] == [0, 2, 2] and not set(drawn) & set(chosen)
    assert drawn == heads.random_heads(
        L, H, 3, seed, match=heads.mask(chosen, L, H), exclude=chosen
    )


def test_random_heads_take_typed_keys():
    draws = {tuple(heads.random_heads(L, H, 3, jax.random.key(n))) for n in range(6)}
    assert len(draws) > 1
    assert heads.random_heads(L, H, 3, jax.random.key(5)) == heads.random_heads(
        L, H, 3, jax.random.key(5)
    )


@pytest.mark.parametrize(
    ("k", "options", "message"),
    [
        (13, {}, "13 heads cannot be drawn from 12"),
        (-1, {}, "-1 heads"),
        (12, {"exclude": [(0, 0)]}, "from 11"),
        (None, {}, "k=None needs match"),
        (2, {"match": [(0, 0)]}, "k=2 differs from the 1 heads"),
        (None, {"match": [(0, 0), (0, 1), (0, 2)], "exclude": [(0, 0), (0, 1)]}, "of layer 0"),
        (1, {"exclude": [(3, 0)]}, "out of range"),
    ],
)
def test_random_heads_refuse(k, options, message):
    with pytest.raises(ValueError, match=message):
        heads.random_heads(L, H, k, 0, **options)


def test_a_control_compares_with_equally_many_others():
    values = np.zeros((L, H))
    values[1, 1:3] = 5
    seen = []

    def score(masks):
        seen.append(masks)
        return (masks * values).sum((1, 2))

    control = heads.random_control(score, [(1, 1), (1, 2)], L, H, seeds=range(9), method="sum")
    (masks,) = seen  # one call
    assert masks.shape == (10, L, H) and np.all(masks.sum((1, 2)) == 2)
    assert not (masks[1:] * masks[0]).any()  # random sets leave the chosen heads out
    assert control.chosen == 10 and control.mean == control.std == 0
    assert control.p_value == pytest.approx(1 / 10) and control.num_heads == 2
    matched = heads.random_control(score, [(1, 1), (1, 2)], L, H, seeds=range(9), match=True)
    assert matched.matched and np.all(seen[1].sum(2) == [0, 2, 0])


def test_the_p_value_of_an_arbitrary_choice_is_uniform():
    """A choice that has nothing to do with the score is rarely significant."""
    rng = np.random.default_rng(0)
    values = [
        HeadScores(rng.normal(size=(6, 8))).with_control(
            4, lambda masks: rng.normal(size=len(masks)), seeds=range(19)
        )
        for _ in range(200)
    ]
    p = np.array([scores.control.p_value for scores in values])
    assert p.min() == 0.05 and abs(p.mean() - 0.525) < 0.07 and (p <= 0.1).mean() < 0.18


def test_control_by_the_map_itself():
    scores = HeadScores(MAP).with_control(3, seeds=range(50))
    best = np.sort(MAP.ravel())[::-1]
    assert scores.control.chosen == pytest.approx(best[:3].mean(), abs=1e-6)
    assert np.all(scores.control.random <= best[3:6].mean() + 1e-6)
    assert "mean value" in scores.control.method
    signed = HeadScores(-MAP).with_control(3, by="magnitude")
    assert signed.control.chosen == pytest.approx(np.sort(abs(MAP).ravel())[-3:].mean(), abs=1e-6)


def test_choices():
    scores = HeadScores([[1.0, -9.0], [0.5, 2.0]], ci=([[0.5, -10], [-1, 1]], [[2, -8], [1, 3]]))
    assert scores.top_k(2) == [(1, 1), (0, 0)]
    assert scores.top_k(2, by="magnitude") == [(0, 1), (1, 1)]
    np.testing.assert_array_equal(scores.mask(1), [[False, False], [False, True]])
    np.testing.assert_array_equal(scores.above(0.7), [[True, False], [False, True]])
    np.testing.assert_array_equal(scores.significant(), [[True, True], [False, True]])
    assert scores.correlate(scores) == pytest.approx(1)
    assert scores.correlate(-scores.values, method="spearman") == -1
    assert scores.num_layers == scores.num_heads == 2 and np.asarray(scores).shape == (2, 2)


@pytest.mark.parametrize("kind", ["query", "kv"])
def test_round_trip(tmp_path, kind):
    file = tmp_path / "heads.json"
    scores = HeadScores.from_examples(
        RNG.normal(size=(6, L, H)), meta={"method": "m", "flags": {"k": 1}}, model="lab", kind=kind
    ).with_control(2, seeds=(3, 5))
    scores.to_json(file)
    back = HeadScores.from_json(file)
    for name in ("values", "ci"):
        np.testing.assert_array_equal(getattr(back, name), getattr(scores, name))
    np.testing.assert_array_equal(back.control.random, scores.control.random)
    assert back.control.to_dict() == scores.control.to_dict() and back.control.seeds == (3, 5)
    assert (back.meta, back.model, back.kind) == (dict(scores.meta), "lab", kind)
    # Readers of plain scores see the scores and the six fields they know.
    plain = heads.from_json(file)
    np.testing.assert_array_equal(plain.scores, scores.values)
    assert set(json.loads(file.read_text())) == {
        "model", "num_layers", "num_heads", "scores", "meta"
    }  # fmt: skip


def test_older_files_load(tmp_path):
    file = tmp_path / "heads.json"
    heads.to_json(file, num_layers=L, num_heads=H, scores=MAP, model="old", meta={"method": "x"})
    old = HeadScores.from_json(file)
    np.testing.assert_array_equal(old.values, MAP)
    assert old.control is None and old.ci is None and old.meta == {"method": "x"}
    heads.to_json(file, num_layers=L, num_heads=H, heads=["2.3", "0.1"])
    assert HeadScores.from_json(file).above(0).sum() == 2


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"control": [1]}, "'control' must be an object"),
        ({"control": {"random": []}}, "at least one score"),
        ({"control": {"random": [1, 2], "seeds": [1]}}, "1 seeds were given for 2"),
        ({"ci": {"low": [[0] * H] * L}}, "'ci' must be an object with 'low' and 'high'"),
        ({"ci": {"low": [[0]], "high": [[0]]}}, "ci.low has shape"),
        ({"ci": {"low": [[1] * H] * L, "high": [[0] * H] * L}}, "ci.low exceeds ci.high"),
        ({"kind": "value"}, "kind='value'"),
    ],
)
def test_bad_files_are_named(tmp_path, meta, message):
    file = tmp_path / "heads.json"
    heads.to_json(file, num_layers=L, num_heads=H, scores=MAP, meta=meta)
    with pytest.raises(ValueError, match=message) as caught:
        HeadScores.from_json(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HeadScores([1.0, 2.0]), r"\[L,H\]"),
        (lambda: HeadScores([[np.nan]]), "NaN"),
        (lambda: HeadScores([[1.0]], meta={"ci": 1}), "give it as ci="),
        (lambda: HeadScores([[1.0]], ci=(0, 1, 2)), "low, high"),
        (lambda: HeadScores([[1.0]]).significant(), "no confidence interval"),
        (lambda: HeadScores([[1.0]]).top_k(1, by="size"), "'size' is not one of"),
        (lambda: heads.random_control(len, [], 2, 2), "no head"),
        (lambda: heads.random_control(len, [(0, 0)], 2, 2, seeds=()), "seeds is empty"),
        (lambda: heads.random_control(lambda m: m, [(0, 0)], 2, 2), "score returned shape"),
    ],
)
def test_scores_refuse(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_numbers_alone_are_a_control():
    control = HeadScores([[1.0]], control=[0.1, 0.3]).control
    assert isinstance(control, Control) and control.mean == pytest.approx(0.2)
    assert control.p_value is None
