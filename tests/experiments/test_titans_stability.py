"""Training through a deep memory at the default settings stays finite; without them it does not."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import titans_stability
from experiments.titans_lm import corpus


@pytest.fixture(scope="module")
def train():
    text, _ = corpus("stdlib", 100_000)

    def run(arm, steps, length):
        numbers = titans_stability.train(0, text, steps=steps, length=length, width=8, arm=arm)
        return map(np.asarray, numbers)

    return run


@pytest.mark.slow
def test_defaults_stay_finite_and_learn(train):
    loss, grad, memory = train("default", 60, 256)
    assert np.isfinite(loss).all() and np.isfinite(grad).all() and np.isfinite(memory).all()
    assert loss[-5:].mean() < loss[0] - 0.2
    assert grad.max() < 1000


@pytest.mark.slow
def test_a_plain_memory_with_a_step_of_one_breaks(train):
    loss, _, _ = train("plain", 5, 1024)
    assert not np.isfinite(loss).all()


@pytest.mark.slow
def test_the_limits_are_what_keeps_the_outer_gradient_finite(train):
    """Without them it overflows at 1,024 tokens, though every loss is finite."""
    loss, grad, _ = train("no limits", 3, 1024)
    assert np.isfinite(loss).all() and not np.isfinite(grad).all()
    loss, grad, _ = train("lasting", 3, 1024)
    assert np.isfinite(loss).all() and np.isfinite(grad).all()
