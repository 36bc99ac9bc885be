"""The texts of the landmark experiment, its measures on an untrained model, and a whole run."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import landmark as experiment


def test_needles_are_told_once_and_asked_at_the_end():
    texts = jax.device_get(experiment.needles(2, jax.random.key(0)))
    assert texts.tokens.shape == (experiment.BATCH, 2 * experiment.TEXT)
    hay, ask = texts.tokens[:, : -experiment.QUESTIONS], texts.tokens[:, -experiment.QUESTIONS :]
    for row, places in enumerate(texts.places):
        for n, place in enumerate(places):
            key, value = ask[row, 2 * n : 2 * n + 2]
            assert hay[row, place - 1] == key and hay[row, place] == value
            assert (hay[row] == key).sum() == 1
    stream = np.asarray(experiment.stream(1, jax.random.key(1)))
    for row in stream:
        pairs = row.reshape(-1, 2)
        told = pairs[pairs[:, 0] < experiment.NUM_KEYS]
        assert len(np.unique(told, axis=0)) == len(np.unique(told[:, 0])) < len(told)
    assert len(experiment.with_marks(stream)[0]) == experiment.TEXT // 8 * 9


@pytest.mark.slow
def test_it_runs(tmp_path):
    command = [sys.executable, "-m", "experiments.landmark", "--quick", "--seeds=0"]
    done = subprocess.run([*command, f"--workdir={tmp_path}"], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    claims = json.loads((tmp_path / "claims.json").read_text())["claims"]
    assert [c["name"][:2] for c in claims] == sorted(c["name"][:2] for c in claims)
    assert {c["name"]: c["holds"] for c in claims if c["name"].startswith("B5")}.popitem()[1]
