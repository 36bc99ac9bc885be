"""The needles of the retrieval experiment are what they say; its claims can fail."""

import json

import numpy as np
import pytest

import jaxheads as jh
from experiments import retrieval_heads, retrieval_tasks
from experiments.retrieval_heads import Study
from jaxheads.checkpoints.directory import ASSETS
from jaxheads.discovery import NeedleInstance, RetrievalResult
from tests.launch.processes import finish, make_environment, start

ROW = {"needle": "Ann keeps the key in a pot.", "question": "Where?", "answer": "in a pot"}


def test_needles_of_the_lab_language():
    lab = jh.Tokenizer.load("lab")
    task = retrieval_tasks.lab_task(
        lab, [64, 128], [0, 100], people=2, num_needles=2, max_new=None, seed=1
    )
    assert len(task.instances) == 8 and task.max_new == 3
    for one, other in zip(task.instances, task.misplaced):
        text = lab.decode(one.prompt_ids)
        who = text.split("What is the code of ")[1].split()[0]
        code, wrong = (
            lab.decode(i.prompt_ids[i.needle_start : i.needle_end]) for i in (one, other)
        )
        assert f"Codes : {who} {code} ." in text
        assert f" {wrong} ." in text and wrong != code
        assert lab.decode(one.answer_ids) == code
        assert one.length - 8 <= len(one.prompt_ids) <= one.length + 8
    assert len({one.prompt_ids.tobytes() for one in task.instances}) == 8
    prompt, answer = task.asked["facts"][0]
    assert "What is the" in lab.decode(prompt) and lab.decode([answer]).istitle()
    for name, times in (("choices", 1), ("scratchpad", 2)):
        prompt, label = task.asked[name][0]
        words = lab.decode(prompt).split()
        place = words.index(".", words.index(lab.decode([label]))) - 1  # "Warsaw B ."
        assert words.count(words[place - 1]) == times


def test_needles_of_a_file(tmp_path):
    (tmp_path / "needles.json").write_text(json.dumps([ROW]))
    (tmp_path / "text.txt").write_text("A line of text. " * 100)
    tokenizer = jh.Tokenizer.load("bytes")
    task = retrieval_tasks.file_task(
        tokenizer, [400, 500], [0, 50], str(tmp_path / "needles.json"), str(tmp_path / "text.txt"),
        num_needles=3, max_new=None, seed=0,
    )  # fmt: skip
    assert len(task.instances) == 4 and task.max_new == 50
    assert ord("\n") in task.stop_ids and task.asked == {}
    for one, other in zip(task.instances, task.misplaced):
        span = one.prompt_ids[one.needle_start : one.needle_end]
        assert task.decode(span) == " in a pot" and one.prompt_ids[0] == tokenizer.bos_id
        assert "Question: Where?\nAnswer:" in task.decode(one.prompt_ids)
        assert other.needle_end - other.needle_start == len(span)
        assert other.needle_end <= one.needle_start or other.needle_start >= one.needle_end


@pytest.mark.parametrize(
    ("rows", "message"),
    [("[", "not JSON"), ([], "needed a list"), ([{**ROW, "answer": "here"}], "row 0 needs text"),
     ([ROW, 3], "row 1 needs text")],
)  # fmt: skip
def test_files_that_hold_no_needles(tmp_path, rows, message):
    path = tmp_path / "needles.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    with pytest.raises(ValueError, match=message):
        retrieval_tasks.read_needles(str(path))


def test_sets_of_heads():
    score = np.zeros((3, 4))
    score[1, 2], score[2, 0], score[0, 1] = 0.9, 0.3, 0.05
    (top,) = retrieval_heads.head_sets(score, 2, 5, seed=0)
    assert np.argwhere(top).tolist() == [[1, 2], [2, 0]]
    random = retrieval_heads.head_sets(score, -3, 5, seed=0)
    assert len(random) == 5 and all(s.sum() == 3 and not (s * (score > 0.1)).any() for s in random)
    assert len({s.tobytes() for s in random}) > 1
    for k, message in ((0, "masks nothing"), (13, "from 1 to 12"), (-11, "cannot be drawn")):
        with pytest.raises(ValueError, match=message):
            retrieval_heads.head_sets(score, k, 5, seed=0)


def test_flags_are_read():
    assert retrieval_heads.spread("64,128") == [64, 128]
    assert retrieval_heads.spread("1000:50000:20")[:2] == [1000, 3578]
    assert retrieval_heads.names_of("lab", [0, 1, 2]) == ["lab", "lab-1", "lab-2"]
    assert retrieval_heads.names_of("/a/model", [0, 1]) == ["/a/model"] * 2
    with pytest.raises(ValueError, match="START:END:COUNT"):
        retrieval_heads.spread("64:128")


def make_study(
    share=0.1, wrong=0.0, alike=0.9, top=0.2, random=0.9, facts=0.95, choices=0.95, worked=0.8
) -> Study:
    score = np.zeros((5, 8))
    score.flat[: int(share * 40)] = 0.8
    found = RetrievalResult(score, score, 9, np.ones(9), np.ones(9, bool), score[None], score)
    masked = {("none", 0): np.ones((1, 4))}
    masked["zero_output", 2] = np.array([[top, facts, choices, worked]])
    masked["zero_output", -2] = np.array([[random, 1, 1, 1], [1, 1, 1, 1]])
    columns = ("needles", "facts", "choices", "scratchpad")
    return Study(found, score * 0 + wrong, alike, alike, columns, masked)


@pytest.mark.parametrize(
    ("change", "lost"),
    [({}, []), ({"share": 0.0}, ["share"]), ({"share": 0.3}, ["share"]),
     ({"wrong": 0.1}, ["wrong"]), ({"alike": 0.7}, ["halves", "short"]),
     ({"alike": float("nan")}, ["halves", "short"]),
     ({"top": 0.8}, ["needles lost"]), ({"random": 0.0}, ["3 times"]),
     ({"facts": 0.9}, ["facts lost"]), ({"worked": 0.91}, ["scratchpad"]),
     ({"worked": 1.0, "choices": 1.0}, ["scratchpad"])],
)  # fmt: skip
def test_every_claim_can_fail(change, lost):
    """One model of two that fails is enough."""
    claims = retrieval_heads.claims_of([make_study(), make_study(**change)], [2, 4, -2])
    assert len(claims) == 8
    failed = [claim.name for claim in claims if not claim.holds]
    assert len(failed) == len(lost)
    assert all(any(word in name for name in failed) for word in lost)


def test_the_wrong_span_leaves_room_to_be_wrong():
    one = NeedleInstance(np.arange(10), 3, 6, [3, 4, 5], 10, 0.0)
    starts = {
        retrieval_tasks.elsewhere(one, np.random.default_rng(n)).needle_start for n in range(60)
    }
    assert starts == {0, 6, 7}


@pytest.mark.slow
def test_a_quick_run_writes_its_claims(tmp_path):
    if not (ASSETS / "lab/config.json").exists():
        pytest.skip("the lab model is not shipped")
    process = start(make_environment(tmp_path / "cache"), "experiments.retrieval_heads", "--quick",
                    "--seeds=0", f"--workdir={tmp_path}")  # fmt: skip
    code, out, error = finish([process])[0]
    assert code in (0, 1), out + error
    claims = json.loads((tmp_path / "claims.json").read_text())
    assert claims["scores"] and (tmp_path / "heads.json").exists()
