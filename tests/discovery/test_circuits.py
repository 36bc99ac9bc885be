"""Overlaps against counting permutations, and the stages of a discovery."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jaxheads.discovery import (
    Circuit,
    Stage,
    circuit_overlap,
    circuits,
    discover_circuit,
    logit_difference,
    overlap_at_cuts,
    path_patch,
)
from jaxheads.models import forward
from tests.configs import model_of, tokens_of

SHAPE = (2, 4)


def mask(*heads):
    out = np.zeros(SHAPE, bool)
    for head in heads:
        out[head] = True
    return out


A = mask((0, 0), (0, 1), (1, 2))
B = mask((0, 1), (1, 2), (1, 3))


def test_overlap_is_that_of_every_permutation():
    got = circuit_overlap(A, B)
    places = itertools.combinations(range(A.size), int(B.sum()))
    draws = [sum(A.reshape(-1)[list(chosen)]) for chosen in places]
    assert got.n == 2
    assert got.frac == pytest.approx(2 / 3)
    assert got.null_mean == pytest.approx(np.mean(draws) / 3)
    assert got.p_value == pytest.approx(np.mean(np.array(draws) >= 2))


def test_overlap_within_layers_permutes_each_layer():
    got = circuit_overlap(A, B, within_layers=True)
    rows = [
        [sum(row[list(c)]) for c in itertools.combinations(range(4), int(other.sum()))]
        for row, other in zip(A, B)
    ]
    draws = [sum(pair) for pair in itertools.product(*rows)]
    assert got.null_mean == pytest.approx(np.mean(draws) / 3)
    assert got.p_value == pytest.approx(np.mean(np.array(draws) >= 2))


def test_the_papers_overlap_is_far_from_chance():
    heads = [divmod(n, 16) for n in range(57)]
    got = circuit_overlap(heads[:32], heads[7:39], shape=(24, 16))
    assert (got.n, round(got.frac, 2)) == (25, 0.78)
    assert got.null_mean == pytest.approx(32 / 384)
    assert got.p_value < 1e-20


def test_overlap_takes_lists_masks_and_circuits():
    want = circuit_overlap(A, B)
    assert circuit_overlap(["0.0", "0.1", "1.2"], B, shape=SHAPE) == want
    stage = Stage("logits", A * 1.0, ((0, 0), (0, 1), (1, 2)))
    circuit = Circuit((stage,), 3 / 8, False)
    assert circuit_overlap(circuit, B) == want
    assert overlap_at_cuts(circuit, circuit, cuts=(0.125, 0.25))[0.25].n == 2


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (["0.0"], B, {}, "pass shape"),
        (mask(), B, {}, "without heads"),
        (np.ones((3, 4), bool), B, {}, "layers x heads"),
        (A[0], B, {}, "needed a mask"),
    ],
)
def test_bad_circuits_are_refused(a, b, options, message):
    with pytest.raises(ValueError, match=message):
        circuit_overlap(a, b, **options)


def test_two_percent_of_gpt2_medium_are_eight_heads():
    scores = np.random.default_rng(0).normal(size=(24, 16))
    kept = circuits.keep_top(scores, 0.02)
    assert len(kept) == 8
    assert min(abs(scores[h]) for h in kept) == np.sort(np.abs(scores).reshape(-1))[-8]
    assert kept[0] not in circuits.keep_top(scores, 0.02, np.abs(scores) == np.abs(scores).max())


def test_stages_follow_each_other_back_from_the_logits():
    model = model_of("llama")
    clean, corrupt = (tokens_of("llama", 2, 6, seed=s) for s in (3, 4))
    metric = logit_difference([5, 6], [8, 9])
    found = discover_circuit(
        forward, model, clean, corrupt, metric, stages=("logits", "q", "kv"), frac=0.25
    )
    assert [len(stage.heads) for stage in found.stages][:2] == [3, 3]
    assert len(set(found.heads)) == len(found.heads)
    first, second = found.stages[:2]
    want = path_patch(forward, model, clean, corrupt, metric)
    np.testing.assert_allclose(first.scores, want, atol=1e-6)
    assert first.heads == circuits.keep_top(np.asarray(want), 0.25)
    assert second.receivers == tuple((la, h, "q") for la, h in sorted(first.heads) if la > 0)
    want = path_patch(forward, model, clean, corrupt, metric, receivers=second.receivers)
    np.testing.assert_allclose(second.scores, want, atol=1e-6)
    assert not {r[:2] for r in second.receivers} & set(second.heads)
    if len(found.stages) > 2:
        assert all(r[1] < 2 and r[2] in "kv" for r in found.stages[2].receivers)
    assert found.mask().sum() == len(found.heads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stages=("q",)), "must be 'logits'"),
        (dict(stages=("logits", "qx")), "letters of q, k, v"),
        (dict(frac=2), "share"),
    ],
)
def test_bad_discoveries_are_refused(options, message):
    model = model_of("llama")
    tokens = tokens_of("llama", 2, 6)
    with pytest.raises(ValueError, match=message):
        discover_circuit(
            forward, model, tokens, tokens, logit_difference([5, 6], [8, 9]), **options
        )
