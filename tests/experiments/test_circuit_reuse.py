"""The experiment on circuits of two tasks: what it measures, and how it decides."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxheads as jh
from experiments import circuit_reuse
from experiments.circuit_reuse import claims_of, examples, inhibition_heads
from jaxheads.discovery import Circuit, Stage, circuit_overlap

ROOT = Path(__file__).parents[2]


def circuit(movers, feeders, scores):
    stages = (
        Stage("logits", np.zeros((4, 4)), movers),
        Stage(((3, 0, "q"),), np.asarray(scores, float), feeders),
    )
    return Circuit(stages, 0.05, False)


def test_inhibition_heads_are_those_whose_corruption_hurts():
    scores = np.zeros((4, 4))
    scores[1, 2], scores[2, 3] = 0.4, -0.5
    assert inhibition_heads(circuit(((3, 0),), ((1, 2), (2, 3)), scores)) == [(1, 2)]
    assert inhibition_heads(Circuit((Stage("logits", scores, ((3, 0),)),), 0.05, False)) == []


def result(shared, colored, greater, gained):
    mask = lambda heads: jh.heads.mask(heads, 4, 4)
    ioi = mask([(3, 0), (3, 1), (2, 0), (2, 1)])
    return {
        "colored": circuit_overlap(ioi, mask(colored)),
        "greater": circuit_overlap(ioi, mask(greater)),
        "lost": {f"{t}: {w}": v for t in circuit_reuse.TASKS[:2] for w, v in shared.items()},
        "repair": gained,
    }


def test_claims_hold_and_fail():
    good = result(
        {"shared": 60.0, "random": 2.0},
        [(3, 0), (3, 1), (2, 0), (2, 1)],
        [(0, 0), (0, 1), (0, 2), (2, 1)],
        {"repair": 20.0, "elsewhere": 0.0, "other heads": 1.0},
    )
    assert all(claim.holds for claim in claims_of([good]))
    bad = result(
        {"shared": 5.0, "random": 12.0},
        [(0, 0), (0, 1), (0, 2), (2, 1)],
        [(3, 0), (3, 1), (2, 0), (2, 1)],
        None,  # no inhibition head was found: nothing is claimed to be repaired
    )
    assert not any(claim.holds for claim in claims_of([bad]))


def test_colours_are_capitalised_for_real_tokenizers():
    tokenizer = jh.Tokenizer.load("lab")
    said = lambda is_lab: examples("colored_objects", tokenizer, 3, is_lab, 0).pairs[0].answer
    assert said(True).strip().islower() and said(False).strip().istitle()


@pytest.mark.slow
def test_the_command(tmp_path):
    command = ["-m", "experiments.circuit_reuse", "--quick", f"--workdir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
    content = json.loads((tmp_path / "claims.json").read_text())
    assert len(content["claims"]) == 9 and (tmp_path / "figure.png").exists()
    (row,) = content["table"]
    assert row["model"] == "lab" and 0 <= row["IOI/colour"] <= 1
