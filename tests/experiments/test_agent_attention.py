"""The claims of the experiment with agents follow the numbers; its batches are what they say."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import agent_attention as experiment

ACCURACY = {"softmax": 0.95, "agent": 0.945, "linear": 0.93, "frozen": 0.945, "no-bias": 0.949,
            "no-conv": 0.96}  # fmt: skip


def test_claims_follow_the_numbers():
    """Made-up results: frozen agents are as good, and no convolution is better by 1.5 points."""
    models = {name: {"accuracy": [a] * 3} for name, a in ACCURACY.items()}
    claims = experiment.claims_of_models(models)
    assert [claim.holds for claim in claims] == [True, True, False, True, False]
    assert [c.holds for c in experiment.claims_of_cost(4.0, 11.0)] == [True, True, False]
    errors = np.linspace(1, 0.5, 4)[:, None] * np.ones(3)
    found = {"counts": [4, 6, 8, 10], "merged": errors, "random": 2 * errors, "k2=1": errors / 2}
    assert [c.holds for c in experiment.claims_without_training(found)] == [True, False, True]
    found["merged"] = errors[[0, 3, 2, 1]]
    assert not experiment.claims_without_training(found)[2].holds


def test_numbers_of_agents_leave_agents():
    counts = experiment.agent_counts((8, 8), 4)
    assert counts == [4, 7, 10, 13, 16, 19]  # 2 * 19 < 64 - int(0.4 * 64)
    assert experiment.agent_counts((4, 4), 2) == [4]


def test_batches_move_images():
    images = jnp.zeros((1, 16, 16, 1)).at[0, 8, 8].set(100.0)
    moved, labels = jax.jit(experiment.batch_of)(jax.random.key(0), (images, jnp.zeros(1, int)))
    places = np.unravel_index(np.asarray(moved).reshape(len(labels), -1).argmax(1), (16, 16))
    assert all(set(p) == {6, 7, 8, 9, 10} for p in places)
    assert 0.2 < np.std(moved[:, :4]) < 1
