import gzip
import json
from pathlib import Path

import pytest

from jaxheads.data import TaskExample, load_tasks

DATA = Path(__file__).parents[2] / "../shared/data"
OPTIONS = "Which?\nOptions:\n(A) one (see (B))\n(B) two\n(C) three"


def put(path, text):
    data = text if isinstance(text, bytes) else text.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "answer": " a", "distractors": [" b", " c"]}, ("p", " a", (" b", " c"))),
        ({"prompt": "p", "answer": "a", "id": 3}, ("p", "a", ())),
        ({"input": "hot", "output": "cold"}, ("hot", "cold", ())),
        ({"input": OPTIONS, "target": "(B)"}, (OPTIONS, "(B)", ("(A)", "(C)"))),
        ({"clean": "She", "corrupted": "He", "answer": "a", "wrong": "b"}, ("She", "a", ("b",))),
        ({"good": "It is.", "bad": "It are."}, ("", "It is.", ("It are.",))),
        (["p", " a"], ("p", " a", ())),
    ],
)
@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.json", "examples.json"])
def test_rows(tmp_path, name, row, expected):
    if ".jsonl" in name:
        text = f"{json.dumps(row)}\n\n{json.dumps(row)}"
    else:
        text = json.dumps([row, row] if name == "t.json" else {"examples": [row, row]}, indent=1)
    assert load_tasks(put(tmp_path / name, text)) == [TaskExample(*expected)] * 2


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("icl-tasks/antonym.json", 2398),
        ("bbh-mcq/penguins_in_a_table.json", 146),
        ("colored-objects/cobjs.json", 1000),
        ("story-prompts/prompts.jsonl", 138),
        ("blimp/blimp.jsonl.gz", 55_000),
    ],
)
def test_shared_files(name, count):
    if not (DATA / name).exists():
        pytest.skip("no shared data")
    examples = load_tasks(DATA / name)
    assert len(examples) == count
    assert all(example.answer for example in examples)


GOOD = '{"prompt": "p", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", GOOD + "{", r"t\.jsonl, line 2 is not valid JSON"),
        ("t.jsonl", GOOD + '\n{"prompt": "p"}', r"line 3 has the fields 'prompt'; it needs"),
        ("t.jsonl", "{}", r"has the fields \(none\)"),
        ("t.jsonl", '{"prompt": "p", "answer": 3}', "line 1: 'answer' is a int, not a string"),
        ("t.jsonl", '{"prompt": "p", "answer": ""}', "nothing to score"),
        ("t.jsonl", '{"prompt": "", "answer": "a", "distractors": ["a"]}', "is also among"),
        ("t.jsonl", '{"prompt": "", "answer": "a", "distractors": [1]}', "a list of strings"),
        ("t.jsonl", '["a", "b", "c"]', r"list of 3; it must be \[prompt, answer\]"),
        ("t.jsonl", '"text"', "is a str; it must be an object"),
        ("t.jsonl", "\n", "holds no examples"),
        ("t.json", GOOD + GOOD, r"must be named \.jsonl"),
        ("t.json", '{"a": 1}', "must hold a list of rows"),
        ("t.json", '[{"input": "x"}]', r"t\.json, row 1 has the fields 'input'"),
        ("t.jsonl", b"\xff", "is not UTF-8"),
    ],
)
def test_errors(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        load_tasks(put(tmp_path / name, text))


def test_file_errors(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_tasks(tmp_path / "none.jsonl")
    path = put(tmp_path / "t.jsonl.gz", GOOD * 100)
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(ValueError, match="is truncated"):
        load_tasks(path)
