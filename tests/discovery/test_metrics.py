"""Metrics against float64 formulas, and what they read against whole logits."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.discovery import (
    Metric,
    accuracy,
    as_metric,
    kl_divergence,
    log_probability,
    logit_difference,
)
from jaxheads.models import forward
from tests.configs import CONFIGS, model_of, tokens_of

BATCH, LENGTH, VOCAB = 3, 5, 61
ANSWER, WRONG = [4, 60, 0], [5, 2, 7]
POSITIONS = [-1, 2, jnp.array([0, 4, -2]), None]


def _logits(seed=0):
    return np.asarray(jax.random.normal(jax.random.key(seed), (BATCH, LENGTH, VOCAB))) * 3


def _log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _naive(name, logits, other):
    """[B,T] float64 values of every metric at every slot."""
    rows = np.arange(BATCH)
    log_p, log_q = _log_softmax(other), _log_softmax(logits)
    return {
        "logit_difference": logits[rows, :, ANSWER] - logits[rows, :, WRONG],
        "log_probability": log_q[rows, :, ANSWER],
        "kl_divergence": (np.exp(log_p) * (log_p - log_q)).sum(-1),
        "accuracy": logits.argmax(-1) == np.asarray(ANSWER)[:, None],
    }[name].astype(np.float64)


def _metric(name, positions, clean):
    return {
        "logit_difference": lambda: logit_difference(ANSWER, WRONG, positions=positions),
        "log_probability": lambda: log_probability(ANSWER, positions=positions),
        "kl_divergence": lambda: kl_divergence(clean, positions=positions),
        "accuracy": lambda: accuracy(ANSWER, positions=positions),
    }[name]()


NAMES = ["logit_difference", "log_probability", "kl_divergence", "accuracy"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("positions", POSITIONS, ids=["last", "one", "each", "all"])
def test_equals_the_formula(name, positions):
    logits, clean = _logits(0), _logits(1)
    logits[0, -1, 4] = 50.0  # one prompt is right
    by_slot = _naive(name, logits, clean)
    if positions is None:
        needed = by_slot.mean(1)
    else:
        slots = np.broadcast_to(np.asarray(positions), (BATCH,)) % LENGTH
        needed = by_slot[np.arange(BATCH), slots]
    got = _metric(name, positions, jnp.asarray(clean))(jnp.asarray(logits))
    assert got.dtype == jnp.float32
    chex.assert_trees_all_close(np.asarray(got), needed.astype(np.float32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_reading_hidden_states_equals_reading_logits(config, name):
    model, tokens = model_of(config), tokens_of(config, BATCH, LENGTH)
    out = forward(model, tokens)
    clean = forward(model, tokens_of(config, BATCH, LENGTH, seed=9)).logits
    for positions in POSITIONS:
        metric = _metric(name, positions, clean)
        read = jax.jit(lambda m, model, hidden: m.from_hidden(model, hidden))
        chex.assert_trees_all_close(
            read(metric, model, out.hidden), metric(out.logits), rtol=1e-5, atol=1e-5
        )


def test_kl_of_the_clean_run_is_zero_and_takes_minus_infinity():
    clean = _logits()
    clean[:, :, 3] = -np.inf
    metric = kl_divergence(jnp.asarray(clean), positions=None)
    chex.assert_trees_all_close(metric(jnp.asarray(clean)), jnp.zeros(BATCH), atol=1e-6)


def test_only_the_tokens_read_are_unembedded():
    model, tokens = model_of("llama"), tokens_of("llama", BATCH, LENGTH)
    hidden = forward(model, tokens).hidden
    read = jax.jit(lambda m, model, hidden: m.from_hidden(model, hidden))
    few = read.lower(logit_difference(ANSWER, WRONG), model, hidden).compile().cost_analysis()
    all_ = read.lower(log_probability(ANSWER), model, hidden).compile().cost_analysis()
    assert few["flops"] < all_["flops"] / 5


def test_plain_functions_become_metrics_that_share_a_program():
    logits = jnp.asarray(_logits())
    mean = as_metric(_mean_logit)
    chex.assert_trees_all_close(mean(logits), jnp.full(BATCH, logits.mean()), rtol=1e-5)
    assert as_metric(mean) is mean
    traces = []

    @jax.jit
    def run(metric, logits):
        traces.append(metric.name)
        return metric(logits)

    run(as_metric(_mean_logit), logits)
    run(as_metric(_mean_logit), logits)
    run(logit_difference(ANSWER, WRONG), logits)
    run(logit_difference(WRONG, ANSWER, positions=1), logits)
    assert traces == ["_mean_logit", "logit_difference"]


def _mean_logit(logits):
    return logits.mean()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: logit_difference([[1, 2]], [3]), "several tokens"),
        (lambda: logit_difference([1, 2], [3]), "2 tokens and wrong 1"),
        (lambda: logit_difference([1.5], [3]), "integer"),
        (lambda: logit_difference([1], [3], positions=1.5), "positions has shape"),
        (lambda: kl_divergence(jnp.zeros((2, 3))), r"needed \[B,T,V\]"),
        (lambda: as_metric("accuracy"), "needed a Metric"),
        (lambda: logit_difference(ANSWER, WRONG, positions=5)(_logits()), "reads position 5"),
        (lambda: logit_difference([1], [2])(_logits()), r"needed \[3, N\]"),
        (lambda: logit_difference([1, 2, 61], WRONG)(_logits()), "outside the vocabulary"),
        (lambda: log_probability(ANSWER, positions=[0, 1])(_logits()), "has shape"),
        (lambda: Metric(lambda x, _: x)(_logits()), "returned shape"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_metrics_are_data():
    metric = logit_difference(ANSWER, WRONG)
    assert len(jax.tree.leaves(metric)) == 2
    moved = dataclasses.replace(metric, positions=jnp.int32(0))
    logits = jnp.asarray(_logits())
    assert not np.allclose(moved(logits), metric(logits))
