"""Conflicts from files of facts: what is stated of whom, and twins of equal length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxheads.data import Tokenizer
from jaxheads.data.tasks.world_capitals import cross_product, load_facts, pair_up

SHARED = Path(__file__).parents[2] / "../shared/data/relations/factual/country_capital_city.json"
FACTS = {"Peru": "Lima", "Cuba": "Havana", "Iran": "Tehran", "Oman": "Muscat"}


def test_every_other_object_is_stated():
    rows = cross_product(FACTS, aliases={"Oman": ["Lima"]})
    assert len(rows) == 4 * 3 - 1
    assert {(r.subject, r.stated) for r in rows if r.subject == "Oman"} == {
        ("Oman", "Havana"), ("Oman", "Tehran"),
    }  # fmt: skip
    assert all(r.memory == FACTS[r.subject] != r.stated for r in rows)
    assert rows[0].prompt == "The capital of Peru is Havana. Q: What is the capital of Peru? A:"
    with pytest.raises(ValueError, match="must name"):
        cross_product(FACTS, "The capital is {stated}.")


def test_twins_differ_in_both_words_and_have_as_many_tokens():
    tokenizer = Tokenizer.load("bytes")
    rows = pair_up(cross_product(FACTS), tokenizer, 100, seed=1)
    assert rows == pair_up(cross_product(FACTS), tokenizer, 100, seed=1)
    assert len(pair_up(cross_product(FACTS), tokenizer, 3)) == 3
    assert {row.stated for row in rows} == {"Havana", "Tehran", "Muscat"}  # Lima has no twin
    for row in rows:
        assert len(row.corrupt) == len(row.prompt)
        assert row.subject not in row.corrupt
        assert row.stated not in row.corrupt


def test_facts_come_from_json_and_csv(tmp_path):
    samples = [{"subject": k, "object": v} for k, v in FACTS.items()]
    samples[0]["object"] = "Lim\\u00e1"  # written as six characters
    (tmp_path / "a.json").write_text(json.dumps({"samples": samples}))
    (tmp_path / "b.json").write_text(json.dumps(FACTS))
    lines = "\n".join(f"{k},{v}" for k, v in FACTS.items())
    (tmp_path / "c.csv").write_text(f"country,capital\n{lines}\n")
    assert load_facts(tmp_path / "a.json") == {**FACTS, "Peru": "Limá"}
    assert load_facts(tmp_path / "b.json") == load_facts(tmp_path / "c.csv") == FACTS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "holds no facts"),
        ('{"samples": [{"subject": "Peru"}]}', "holds no facts"),
        ('{"Peru": "Lima"}', "two other objects"),
        ('{"samples": [{"subject": "a", "object": "b"}, {"subject": "a", "object": "c"}]}',
         "two objects"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, text, message):
    (tmp_path / "facts.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_facts(tmp_path / "facts.json")


def test_capitals_of_the_world():
    if not SHARED.exists():
        pytest.skip("shared data are not here")
    facts = load_facts(SHARED)
    assert facts["France"] == "Paris"
    assert facts["Brazil"] == "Brasília"
