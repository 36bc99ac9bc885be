"""The texts of the landmark experiment, and what its claims say."""

import jax
import numpy as np

from experiments import landmark as experiment


def test_needles_are_told_once_and_asked_at_the_end():
    texts = jax.device_get(experiment.needles(2, jax.random.key(0)))
    assert texts.tokens.shape == (experiment.BATCH, 2 * experiment.TEXT)
    hay, ask = texts.tokens[:, : -experiment.QUESTIONS], texts.tokens[:, -experiment.QUESTIONS :]
    for row, places in enumerate(texts.places):
        for n, place in enumerate(places):
            key, value = ask[row, 2 * n] - experiment.ASK, ask[row, 2 * n + 1] - experiment.VALUE
            assert hay[row, place] == key * experiment.NUM_VALUES + value
            told = hay[row][hay[row] < experiment.ASK] // experiment.NUM_VALUES
            assert (told == key).sum() == 1
    stream = np.asarray(experiment.stream(1, jax.random.key(1)))
    for row in stream:
        told = dict(divmod(x, experiment.NUM_VALUES) for x in row if x < experiment.ASK)
        asked = np.flatnonzero((row >= experiment.ASK) & (row < experiment.VALUE))
        for at in asked:
            key, value = row[at] - experiment.ASK, row[at + 1] - experiment.VALUE
            assert told.get(key, value) == value
    assert len(experiment.with_marks(stream)[0]) == experiment.TEXT // 8 * 9


def test_claims_hold_for_what_the_paper_says_and_fail_for_its_opposite():
    lengths, seeds = (1, 2, 4, 8), 3
    arm = lambda values: {n: {"right": np.full(seeds, x)} for n, x in zip(lengths, values)}
    arms = {
        "landmark": arm((1.0, 1.0, 0.97, 0.95)),
        "landmark, all": arm((1.0,) * 4),
        "random blocks": arm((0.5, 0.3, 0.2, 0.1)),
        "full": arm((1.0, 0.6, 0.3, 0.2)),
        "window": arm((0.5, 0.3, 0.2, 0.1)),
    }
    found = {f"{name} {n}": x for name, by_length in arms.items() for n, x in by_length.items()}
    heads = np.zeros((seeds, 4, 4))
    heads[:, 2, 1] = 0.9
    for n in lengths:
        found[f"landmark {n}"]["hits"] = heads
    loss = lambda *values: [np.full(seeds, x) for x in values]
    at_once = dict(zip((True, False), loss(1.02, 1.0)))
    by_length = dict(zip(lengths, loss(1.4, 1.3, 1.2, 1.1)))
    by_policy = dict(zip(experiment.POLICIES, loss(1.2, 1.25, 1.3)))
    claims = experiment.claims_of(found, at_once, by_length, by_policy, 1.0)
    assert len(claims) == 10 and all(claim.holds for claim in claims)
    found["landmark 8"], found["full 8"] = found["full 8"], found["landmark 8"]
    found["landmark 8"]["hits"] = heads * 0.1
    found["window 8"], found["random blocks 8"] = arm((0.6,))[1], arm((0.9,))[1]
    claims = experiment.claims_of(
        found, dict(zip((True, False), loss(1.1, 1.0))),
        dict(zip(lengths, loss(1.1, 1.2, 1.3, 1.4))),
        dict(zip(experiment.POLICIES, loss(1.3, 1.25, 1.2))), 1.2,
    )  # fmt: skip
    assert not any(claim.holds for claim in claims)
