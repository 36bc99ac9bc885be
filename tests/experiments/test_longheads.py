"""The LongHeads experiment: what its texts promise, and that it runs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxheads as jh
from experiments import longheads
from jaxheads.models import ModelConfig
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]


def test_every_question_has_its_answer_at_its_place():
    tokenizer = jh.Tokenizer.load("lab")
    texts = longheads.needle_texts(tokenizer, 3, 240, 4, seed=0)
    assert 225 < texts.hay.shape[1] + texts.questions.shape[-1] <= 241
    for hay, questions, answers, places in zip(*texts, strict=True):
        np.testing.assert_array_equal(hay[places], answers)
        said = [tokenizer.decode(hay[place - 4 : place + 1]) for place in places]
        asked = [tokenizer.decode(question) for question in questions]
        assert len({*asked}) == 4
        for sentence, question in zip(said, asked, strict=True):
            assert sentence.split()[3] in question.split()


def test_lengths():
    assert [longheads.parse_length(text) for text in ("512", "4k")] == [512, 4096]
    with pytest.raises(ValueError, match="no number of tokens"):
        longheads.parse_length("4M")


@pytest.mark.slow
def test_the_script_runs(tmp_path):
    cfg = ModelConfig(vocab_size=512, num_layers=1, model_dim=16, num_heads=2, max_positions=256)
    jh.save(tiny_model(cfg), tmp_path / "model")
    jh.Tokenizer.load("lab").save(tmp_path / "model")
    command = [sys.executable, "-m", "experiments.longheads", "--quick", "--needles=2"]
    command += [f"--models={tmp_path / 'model'}", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert "B6" in (tmp_path / "claims.json").read_text()
