"""The claims of the DuoAttention experiment hold where they should, and can fail."""

import numpy as np

from experiments.duo import SPARSITIES, Study, claims_of, random_patterns, rows_of

GOOD = Study(
    alpha=np.array([[1.0, 0.2], [0.4, 0.1]]),
    retrieval=np.array([[0.9, 0.1], [0.3, 0.0]]),
    curves={
        "gates": np.array([1, 1, 0.97, 0.9, 0]),
        "attention profile": np.array([1, 1, 0.9, 0.5, 0]),
        "random": np.array([1, 0.6, 0.4, 0.1, 0]),
    },
    random=np.array([0.3, 0.5]),
    inverted=0.05,
    others={"facts": np.array([0.9, 0.89])},
    bytes=(0.501, 0.5),
    means=np.array([0.99, 0.8, 0.5]),
)
FAILS = {
    "needles at half": {"curves": {**GOOD.curves, "gates": np.array([1, 1, 0.9, 0.9, 0.5])}},
    "needles lost by random": {"random": np.array([0.9, 0.9])},
    "heads of the lower gates": {"inverted": 0.2},
    "rank correlation": {"retrieval": np.array([[0.9, 0.8], [0.0, 0.7]])},
    "gate of the top retrieval head": {
        "retrieval": np.array([[0.5, 0.1], [0.9, 0.0]]),
    },
    "area under": {"curves": {**GOOD.curves, "random": np.ones(len(SPARSITIES))}},
    "bytes": {"bytes": (0.52, 0.5)},
    "task without retrieval": {"others": {"facts": np.array([0.9, 0.88])}},
    "without the L1 term": {"means": np.array([0.9, 0.8, 0.5])},
    "as the L1 term grows": {"means": np.array([0.99, 0.5, 0.6])},
}


def test_claims_hold_and_each_can_fail():
    assert all(claim.holds for claim in claims_of([GOOD, GOOD]))
    for name, change in FAILS.items():
        found = [c for c in claims_of([GOOD, GOOD._replace(**change)]) if name in c.name]
        assert len(found) == 1 and not found[0].holds, name
    assert len(rows_of([GOOD])) == 3 * len(SPARSITIES)


def test_random_patterns_have_one_sparsity():
    patterns = random_patterns((5, 8), 3, 0.5, seed=0)
    assert patterns.shape == (3, 5, 8) and (patterns.sum(axis=(1, 2)) == 20).all()
    assert (patterns[0] != patterns[1]).any()
