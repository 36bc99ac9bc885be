"""`python -m launch.evaluate` from the command line, and its parts."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxheads.checkpoints import huggingface
from jaxheads.data import Tokenizer
from jaxheads.data.tasks import generate
from jaxheads.models import ModelConfig
from launch import evaluate
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
CFG = ModelConfig(
    vocab_size=384, num_layers=2, model_dim=16, num_heads=4, mlp_dim=16, max_positions=64
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    huggingface.save(tiny_model(CFG, scale=0.02), directory)
    Tokenizer.load("bytes").save(directory)
    return directory


def launch(*args):
    command = [sys.executable, "-m", "launch.evaluate", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_text_and_tasks_with_and_without_heads(model_dir, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 60)
    rows = [{"prompt": "a", "answer": "b", "distractors": ["c", "dd"]}] * 3
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = launch(
        f"--model={model_dir}", f"--data={tmp_path / 'text.txt'}", "--seq_len=32", "--batch_size=4",
        f"--tasks={tmp_path / 'tasks.jsonl'}", "--heads=0.1,1.0", "--edit=scale", "--factor=9",
        "--mesh=data:2,model:2", "--limit=2", f"--workdir={tmp_path / 'out'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.split("\n")[1:3]] == [
        ["text", "loss"], ["text", "perplexity"]
    ]  # fmt: skip
    content = json.loads((tmp_path / "out/results.json").read_text())
    assert content["edited_heads"] == [[0, 1], [1, 0]]
    assert content["flags"]["factor"] == 9 and content["command"][2] == "launch.evaluate"
    baseline, scaled = content["results"]["baseline"], content["results"]["scale"]
    assert baseline["text"]["tokens"] == 2 * 4 * 32 and baseline["tasks"]["examples"] == 2
    assert baseline["text"]["loss"] == pytest.approx(np.log(384), rel=0.02)  # nothing learned
    assert baseline["text"]["loss"] != scaled["text"]["loss"]
    lines = (tmp_path / "out/examples.jsonl").read_text().splitlines()
    details = [json.loads(line) for line in lines]
    assert [(d["run"], d["example"]) for d in details] == [
        ("baseline", 0), ("baseline", 1), ("scale", 0), ("scale", 1)
    ]  # fmt: skip


@pytest.mark.slow
def test_a_named_task_with_landmarks(tmp_path):
    tokenizer = Tokenizer.load("lab")
    size = tokenizer.vocab_size
    cfg = dataclasses.replace(CFG, vocab_size=size + 1, attention="landmark(block=7,force=true)")
    huggingface.save(tiny_model(cfg, scale=0.02), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    done = launch(
        f"--model={tmp_path / 'model'}", "--tasks=ioi", "--limit=2", "--batch_size=2",
        f"--workdir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    asked = generate("ioi", tokenizer, 2, split="heldout")
    for line, pair in zip(lines, asked, strict=True):
        assert line["prompt"] == pair.clean and line["num_tokens"][0] == 1
        # Nothing is learned: all tokens of the text are as likely.
        assert line["log_probs"][0] == pytest.approx(-np.log(size), rel=0.02)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch_size=3", "--mesh=data:2", "--seq_len=32"], "batch_size"),
        (["--tasks=none.jsonl"], "none.jsonl does not exist"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(model_dir, tmp_path, args, message):
    done = launch(f"--model={model_dir}", f"--workdir={tmp_path}", *args)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and "Traceback" not in done.stderr


def test_named_tasks_are_held_out_questions():
    tokenizer = Tokenizer.load("lab")
    asked = evaluate.read_tasks("needle", tokenizer, 5)
    pairs = generate("needle", tokenizer, 5, split="heldout")
    assert [(e.prompt, e.answer) for e in asked] == [(p.clean, p.answer) for p in pairs]


def test_table_shows_the_change():
    results = {
        "baseline": {"text": {"loss": 2.0, "tokens": 1200}, "tasks": {"margin": None}},
        "ablate": {"text": {"loss": 2.5, "tokens": 1200}, "tasks": {"margin": None}},
    }
    assert evaluate.table(results).split("\n") == [
        "              baseline  ablate  change",
        "text loss       2.0000  2.5000    +0.5",
        "text tokens      1,200   1,200      +0",
        "tasks margin         -       -       -",
    ]
    alone = evaluate.table({"baseline": results["baseline"]})
    assert "change" not in alone and "2.0000" in alone


def test_data_config_of_the_default_is_held_out_text(model_dir):
    model, tokenizer = huggingface.load(model_dir), Tokenizer.load("bytes")
    make = lambda path, seq_len=None, settings=None: evaluate.data_config(
        model, tokenizer, path, 8, seq_len, settings or {}
    )
    assert make(None).split == "validation" and make(None).path == "stdlib"
    assert make("a.txt").split == "all"
    assert make("a.txt", settings={"split": "train"}).split == "train"
    assert make(None).seq_len == 64 and make(None, 2000).seq_len == 2000
    with pytest.raises(ValueError, match="did you mean 'split'"):
        make(None, settings={"splitt": "train"})
