"""The prompts of the two experiments on conflicts, and that their scripts run and decide."""

from __future__ import annotations

import json

import numpy as np
import pytest

import jaxheads as jh
from experiments import conflicts, ph3, recall_mechanisms
from jaxheads.data.tasks import facts, generate
from jaxheads.data.tasks.world_capitals import cross_product, pair_up
from jaxheads.models import ModelConfig
from tests.launch.processes import finish, make_environment, start
from tests.tiny import tiny_model

FACTS = {"Peru": "Lima", "Cuba": "Havana", "Iran": "Tehran", "Kenya": "Nairobi", "Oz": "Lima"}


def test_prompts_hold_both_answers_and_mark_their_places():
    tokenizer = jh.Tokenizer.load("lab")
    rows = pair_up(cross_product(FACTS), tokenizer, 100)
    found, left_out, long = conflicts.encode(rows, tokenizer)
    word = lambda ids: tokenizer.decode(np.atleast_1d(ids)).strip()
    assert (left_out, long) == (0, [])
    assert found.size == len(rows) > 10
    for n in range(found.size):
        assert word(found.mem[n]) == FACTS[found.subject[n]] == found.memory[n]
        assert word(found.ctx[n]) == found.stated[n] != found.memory[n]
        spans = {
            key: word(found.clean["tokens"][n][where[n]]) for key, where in found.marks.items()
        }
        assert spans["subject"] == found.subject[n]
        assert spans["stated"] == found.stated[n]
        assert spans["subject2"] == found.subject[n]
        assert found.marks["subject2"][n].argmax() > found.marks["stated"][n].argmax()
        assert spans["question"].startswith("Q")
        question = found.question["tokens"][n][: conflicts.last(found)[n] + 1]
        assert word(question).endswith("A :") or word(question).endswith("A:")
    parts = found.split(4, 6)
    assert [part.size for part in parts] == [4, 6]
    np.testing.assert_array_equal(parts[1].mem, found.mem[4:10])


def test_lab_prompts_are_those_of_the_task():
    rows = cross_product(dict(facts.FACTS["language"]), conflicts.lab_template("language"))
    pairs = generate("conflict", jh.Tokenizer.load("lab"), 40, relation="language")
    assert {pair.clean for pair in pairs} <= {row.prompt for row in rows}


def test_answers_that_begin_alike_are_left_out():
    tokenizer = jh.Tokenizer.load("lab")
    own = {"Peru": "Lima Paris", "Cuba": "Lima Havana", "Iran": "Rome Tehran",
           "Kenya": "Rome Nairobi"}  # fmt: skip
    rows = pair_up(cross_product(own), tokenizer, 100)
    found, left_out, long = conflicts.encode(rows, tokenizer)
    assert (len(rows), left_out, found.size) == (12, 4, 8)
    assert set(long) == set(own.values())
    with pytest.raises(ValueError, match="no conflict is left"):
        conflicts.encode([row for row in rows if row.memory[0] == row.stated[0]], tokenizer)


def test_frequency_ranks_subjects_and_shuffles_them():
    counts = {"a": 1.0, "b": 10.0, "c": 100.0, "d": 1000.0}
    subjects = np.repeat(list(counts), 50)
    memorised = np.repeat([0.0, 0.0, 1.0, 1.0], 50)
    value, p = recall_mechanisms.frequency(subjects, memorised, counts)
    ranks = np.repeat([0, 1, 2, 3], 50)
    np.testing.assert_allclose(value, np.corrcoef(ranks, memorised)[0, 1])
    np.testing.assert_allclose(p, 4 / 24, atol=0.03)  # orders with {c, d} on top
    assert np.isnan(recall_mechanisms.frequency(subjects, 0 * memorised, counts)[0])


def test_claims_fail_without_a_gain():
    row = {"goal": "memory", "gain": -0.1, "after": 0.3, "random gain": -0.3, "other": 0.0,
           "other, pruned": 0.0, "gain on B": 0.1}  # fmt: skip
    holds = [claim.holds for claim in ph3._claims([row], "pruning")]
    assert holds == [False, False, True, False]
    good = {**row, "gain": 0.3, "random gain": 0.1, "gain on B": 0.2}
    assert all(claim.holds for claim in ph3._claims([good], "pruning"))
    saturated = ph3._claims([{**good, "gain": 0.01, "after": 0.96}], "pruning")
    assert saturated[0].holds


def make_model():
    tokenizer = jh.Tokenizer.load("lab")
    cfg = ModelConfig(
        vocab_size=tokenizer.vocab_size, num_layers=2, model_dim=16, num_heads=4, mlp_dim=16
    )
    return tiny_model(cfg)


def test_subjects_unknown_to_the_model_are_left_out():
    tokenizer = jh.Tokenizer.load("lab")
    found, *_ = conflicts.encode(pair_up(cross_product(FACTS), tokenizer, 8), tokenizer)
    model = make_model()
    top = jh.forward(model, **found.question).logits
    top = np.asarray(top)[np.arange(8), conflicts.last(found)].argmax(-1)
    known = found._replace(mem=np.where(np.arange(8) % 2, top, found.mem).astype(np.int32))
    kept = conflicts.keep_known(model, known, "capital")
    np.testing.assert_array_equal(kept.stated, found.stated[(known.mem == top)])
    with pytest.raises(ValueError, match="no capital question"):
        conflicts.keep_known(model, found._replace(mem=(top + 1) % 400), "capital")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["recall_mechanisms", "ph3"])
def test_a_quick_run_writes_its_claims(tmp_path, script):
    jh.save(make_model(), tmp_path / "model")
    environment = make_environment(tmp_path / "cache")
    everyday = ("--quick", "--seeds=0", f"--workdir={tmp_path}", "--nofilter", "--tokenizer=lab")
    process = start(environment, f"experiments.{script}", *everyday, f"--model={tmp_path}/model")
    code, out, error = finish([process])[0]
    assert code in (0, 1), out + error
    content = json.loads((tmp_path / "claims.json").read_text())
    assert len(content["claims"]) >= 7
    assert (tmp_path / "figure.png").exists()
