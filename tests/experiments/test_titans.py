"""The tasks of the Titans experiments are what they say; the scripts run and decide."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from experiments import titans_ablation, titans_lm, titans_needle, titans_recall
from tests.launch.processes import finish, make_environment, start


def test_a_recall_row_asks_for_what_was_shown():
    batch = titans_recall.recall_batch(jax.random.key(0), length=64, batch_size=5)
    tokens, queries, answers = map(np.asarray, batch)
    for row, slots, wanted in zip(tokens, queries, answers):
        shown = dict(zip(row[0:8:2], row[1:8:2]))
        assert len(shown) == 4
        assert (row[8:56] >= titans_recall.NUM_KEYS + titans_recall.NUM_VALUES).all()
        assert [shown[k] for k in row[slots]] == wanted.tolist() == row[slots + 1].tolist()


def test_a_needle_lies_outside_every_window():
    batch = titans_needle.needle_batch(jax.random.key(0), length=64, batch_size=20)
    tokens, queries, answers = map(np.asarray, batch)
    for row, slot, wanted in zip(tokens, queries[:, 0], answers[:, 0]):
        places = np.flatnonzero(row[:slot] == row[slot])
        assert len(places) == 1 and slot - places[0] > 2 * titans_needle.WINDOW
        assert row[places[0] + 1] == wanted


def test_a_redefined_binding_is_the_newest_one():
    batch = titans_ablation.redefinition_batch(jax.random.key(0), length=72, batch_size=5)
    tokens, queries, answers = map(np.asarray, batch)
    assert tokens.shape == (5, 72)
    for row, slots, wanted in zip(tokens, queries, answers):
        for slot, answer in zip(slots, wanted):
            newest = np.flatnonzero(row[: slots[0]] == row[slot])[-1]
            assert row[newest + 1] == answer
            assert len(np.flatnonzero(row[: slots[0]] == row[slot])) == 4


def test_a_regression_row_has_unit_keys():
    x, y = titans_ablation.regression_batch(jax.random.key(0), 3)
    assert x.shape == y.shape == (3, 192, 1, 8)
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, atol=1e-5)


def test_every_model_is_a_configuration():
    for module in (titans_recall, titans_lm):
        for name in module.MODELS:
            assert module.config(name).num_params > 0
    for part in titans_ablation.PARTS:
        assert titans_ablation.config_of(part).mixer.name == "titans-lmm"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [("titans_recall", ["--models=swa"]), ("titans_needle", ["--models=swa"]),
     ("titans_ablation", ["--parts=depth"]), ("titans_lm", ["--models=swa"])],
)  # fmt: skip
def test_a_quick_run_writes_its_claims(tmp_path, script, flags):
    environment = make_environment(tmp_path / "cache")
    everyday = ("--quick", "--seeds=0", f"--workdir={tmp_path}")
    process = start(environment, f"experiments.{script}", *everyday, *flags)
    code, out, error = finish([process])[0]
    assert code in (0, 1), out + error
    assert (tmp_path / "claims.json").exists()
