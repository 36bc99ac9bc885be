"""The S2 experiments: what their batches promise, and that the scripts run."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import s2_needle, s2_quality, s2_union

ROOT = Path(__file__).parents[2]


def test_union_pairs_stay_inside_blocks_and_queries_have_answers():
    data = jax.tree.map(np.asarray, s2_union.batch(jax.random.key(0)))
    tokens = data["tokens"]
    assert tokens.shape == (s2_union.BATCH, 64)
    assert 2 * s2_union.NUM_PAIRS == 40 and s2_union.FIRST_QUERY == 48 and s2_union.BLOCK % 2 == 0
    asked = tokens[:, 48::2]
    for row, keys, values in zip(tokens, asked, data["value"], strict=True):
        for key, value in zip(keys, values, strict=True):
            place = np.flatnonzero(row[:40:2] == key)
            assert len(place) == 1 and row[2 * place[0] + 1] == value


def test_union_arms_have_the_budgets_they_claim():
    assert [s2_union.tiles(arm) for arm in s2_union.ARMS] == [15, 18, 21, 36]


@pytest.mark.parametrize("length", s2_needle.LENGTHS)
def test_needles_lie_where_their_depth_says(length):
    data = jax.tree.map(np.asarray, s2_needle.batch(length, jax.random.key(1)))
    hay = length - 2 * s2_needle.NUM_NEEDLES
    for row, depths, values in zip(data["tokens"], data["depth"], data["value"], strict=True):
        keys = row[hay::2]
        for key, depth, value in zip(keys, depths, values, strict=True):
            place = round(depth * hay)
            assert place % 2 == 0 and row[place] == key and row[place + 1] == value
            assert (row[:hay] == key).sum() == 1


def test_quality_rows_repeat_their_string():
    row = np.asarray(s2_quality.synthetic(jax.random.key(2)))
    string = row[-s2_quality.REPEATED :].tolist()
    found = [
        start
        for start in range(s2_quality.LENGTH - 2 * s2_quality.REPEATED + 1)
        if row[start : start + s2_quality.REPEATED].tolist() == string
    ]
    assert len(found) == 1
    seen, held_out = s2_quality.corpus()
    assert len(seen) > 8 * len(held_out) > 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s2_union", "s2_quality", "s2_needle"])
def test_scripts_run(name, tmp_path):
    command = [sys.executable, "-m", f"experiments.{name}", "--quick", "--seeds=0"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    assert (tmp_path / "claims.json").exists() and (tmp_path / "table.md").exists()
