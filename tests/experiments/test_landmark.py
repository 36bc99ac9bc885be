"""How the landmark experiment asks, and what its claims say."""

import jax
import numpy as np
import pytest

import jaxheads as jh
from experiments import landmark as experiment
from experiments.longheads import TRAINED, needle_texts
from jaxheads.attention import insert_landmarks
from jaxheads.models import with_config


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["landmark, all", "full"])
def test_what_is_asked_in_pieces_is_what_a_whole_text_says(arm):
    model, tokenizer = jh.load("lab"), jh.Tokenizer.load("lab")
    texts, way = needle_texts(tokenizer, 4, TRAINED, experiment.CODES, 0), experiment.ARMS[arm]
    found = experiment.ask(model, way, texts)
    uncached = {"attention": experiment.landmark(force="true")} if way.is_landmark else {}
    whole = with_config(model, **uncached)
    right, losses = [], []
    for m in range(experiment.CODES):
        rows = np.concatenate([texts.hay, texts.questions[:, m]], axis=1)
        if way.is_landmark:
            rows = np.asarray(insert_landmarks(rows, experiment.BLOCK, experiment.MARK))
        logits = jh.forward(whole, rows).logits[:, -1]
        if way.is_landmark:
            logits = logits.at[:, experiment.MARK].set(-1e30)
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        right.append(log_probs.argmax(-1) == texts.answers[:, m])
        losses.append(-log_probs[np.arange(4), texts.answers[:, m]])
    assert found.right == np.mean(right)
    np.testing.assert_allclose(found.loss, np.mean(losses), rtol=1e-4)
    assert (found.hits is None) == (arm == "full")


@pytest.mark.slow
def test_tuning_leaves_the_given_model_alone():
    model, tokenizer = jh.load("lab"), jh.Tokenizer.load("lab")
    before = jax.tree.map(np.array, model)
    tuned = experiment.tune(model, tokenizer, True, 1, 0)
    after = jax.tree.map(np.array, model)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    assert tuned.cfg.attention.startswith("landmark")
    leaves = zip(jax.tree.leaves(before), jax.tree.leaves(tuned), strict=True)
    assert any(not np.array_equal(a, b) for a, b in leaves)


def study(right, hits, at_once, by_length, by_policy):
    asked = {
        arm: {n: experiment.Asked(x, 0.0, np.full((2, 2), hits) if arm == "landmark" else None)
              for n, x in zip((1, 2, 4, 8), values)}
        for arm, values in right.items()
    }  # fmt: skip
    policies = dict(zip(experiment.POLICIES, by_policy))
    return experiment.Study(at_once, asked, dict(zip((1, 2, 4, 8), by_length)), policies)


def test_claims_hold_for_what_the_paper_says_and_fail_for_its_opposite():
    arms = {
        "landmark": (1.0, 1.0, 0.97, 0.95),
        "landmark, all": (1.0,),
        "random blocks": (0.5, 0.3, 0.2, 0.1),
        "full": (1.0, 0.6, 0.3, 0.2),
        "window": (0.5, 0.3, 0.2, 0.1),
    }
    good = study(arms, 0.9, (1.02, 1.0), (1.4, 1.3, 1.2, 1.1), (1.2, 1.25, 1.3))
    claims = experiment.claims_of([good] * 3, 1.0)
    assert len(claims) == 10 and all(claim.holds for claim in claims)
    arms |= {"landmark": arms["full"], "full": (1.0,) * 4, "window": (0.6,) * 4,
             "random blocks": (0.9,) * 4}  # fmt: skip
    bad = study(arms, 0.1, (1.1, 1.0), (1.1, 1.2, 1.3, 1.4), (1.3, 1.25, 1.2))
    claims = experiment.claims_of([bad] * 3, 1.2)
    assert not any(claim.holds for claim in claims)
