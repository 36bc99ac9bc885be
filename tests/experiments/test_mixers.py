"""The tasks of the two experiments on mixing and context, from their definitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import long_context_helps, mixers
from jaxheads.attention import mixing


def test_each_query_asks_for_the_value_that_stood_with_its_key():
    batch = jax.tree.map(np.asarray, mixers.retrieval(jax.random.key(0), 5))
    for keys, values, targets, weights in zip(*batch):
        pairs = {k: v for k, v in zip(keys, values) if v}
        assert len(pairs) == mixers.NUM_PAIRS
        assert sorted(pairs.values()) == list(range(1, mixers.NUM_VALUES + 1))
        asked = np.flatnonzero(weights)
        assert len(asked) == mixers.NUM_PAIRS
        for t in asked:
            assert values[t] == 0
            assert targets[t] == pairs[keys[t]] - 1


def test_copies_stand_32_places_earlier():
    batch = jax.tree.map(np.asarray, mixers.copy(jax.random.key(0), 3))
    for t in range(mixers.LENGTHS["copy"]):
        assert (batch.weights[:, t] == (t >= mixers.OFFSET)).all()
        if t >= mixers.OFFSET:
            assert (batch.targets[:, t] == batch.keys[:, t - mixers.OFFSET] - 1).all()


@pytest.mark.parametrize("control", mixers.CONTROLS)
def test_the_controls_are_random_and_frozen(control):
    net = mixers.Net(mixers.make_mixer(control, "copy"))
    params = net.init(jax.random.key(0))
    batch = mixers.copy(jax.random.key(1), 2)
    grads = jax.jit(jax.grad(net.loss))(params, batch)
    assert not grads["layers"][0]["mixer"]["m"].any()
    assert grads["layers"][0]["out"].any()
    assert (jnp.std(params["layers"][0]["mixer"]["m"]) * 8 > 0.9).all()


def test_every_claim_names_a_mixer_and_every_mixer_can_be_made():
    for needed in mixers.NEEDED:
        assert needed.task in mixers.TASKS
    for task in mixers.TASKS:
        for name in mixing.MIXERS:
            assert mixers.make_mixer(name, task).length == mixers.LENGTHS[task]
    with pytest.raises(ValueError, match="did you mean 'softmax'"):
        mixers.pairs(["sofmax"])


def test_answers_stand_at_the_distance_drawn():
    batch = jax.tree.map(np.asarray, long_context_helps.retrieval(jax.random.key(0), 40))
    distances = []
    for first, second, targets, weights, distance in zip(*batch):
        for t in np.flatnonzero(weights):
            place = t - distance[t]
            assert first[place] == first[t]
            assert second[place] == targets[t]
            assert second[t] == long_context_helps.NOTHING
            distances.append(distance[t])
        assert (second != 0).sum() == weights.sum()  # no pair without its query
    farthest = long_context_helps.FARTHEST
    assert min(distances) < 12 and max(distances) > farthest - 12
    assert abs(np.mean(distances) - farthest / 2) < 20


def test_the_3_gram_reads_two_tokens_back():
    """Pairs of tokens predict the next one better than single tokens do."""
    batch = long_context_helps.three_gram(jax.random.key(3), 64)
    tokens = np.asarray(batch.first) - long_context_helps.FIRST_VALUE
    targets = np.asarray(batch.targets) - long_context_helps.FIRST_VALUE
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
    n = long_context_helps.NUM_SYMBOLS
    counts = np.zeros((n, n, n))
    np.add.at(counts, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel(), targets[:, 1:].ravel()), 1)

    def entropy(counts):
        counts = counts.reshape(-1, n)
        log_probs = np.log(np.maximum(counts, 1e-9) / counts.sum(-1, keepdims=True))
        return -(counts * log_probs).sum() / counts.sum()

    assert entropy(counts) < 0.8 * entropy(counts.sum(axis=0))


def test_claims_can_fail():
    flat = {
        (task, c): long_context_helps.Result(task, c, np.full(3, 1.0), np.full(3, 0.5))
        for task in long_context_helps.TASKS
        for c in long_context_helps.WINDOWS
    }
    assert [claim.holds for claim in long_context_helps.decide(flat)] == [False, False, True]
    falling = {
        (task, c): long_context_helps.Result(
            task, c, np.full(3, 2.0 - c / 256), np.full(3, c / 256)
        )
        for task, c in flat
    }
    assert [claim.holds for claim in long_context_helps.decide(falling)] == [True, True, False]
