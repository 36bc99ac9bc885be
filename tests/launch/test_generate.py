"""`python -m launch.generate` from the command line, and its stream of text."""

import io
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxheads.checkpoints import huggingface
from jaxheads.data import Tokenizer
from jaxheads.generation import generate
from jaxheads.interventions import ablate
from jaxheads.models import ModelConfig, forward
from launch.generate import TextStream
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
CFG = ModelConfig(vocab_size=384, num_layers=2, model_dim=16, num_heads=4, mlp_dim=16)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    model = tiny_model(CFG)
    model.embed.table[...] = model.embed.table[...].at[128:].set(0)  # writes ASCII only
    huggingface.save(model, directory)
    Tokenizer.load("bytes").save(directory)
    return directory


def launch(*args):
    command = [sys.executable, "-m", "launch.generate", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300)


@pytest.mark.slow
def test_writes_what_generate_returns(model_dir):
    model, tokenizer = huggingface.load(model_dir), Tokenizer.load("bytes")
    done = launch(
        f"--model={model_dir}", "--prompt=say ", "--max_new_tokens=12", "--heads=0.2",
        "--mesh=model:2", "--stop_at_eos=false",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ids = tokenizer.encode("say ")[None]
    forward_ = ablate(forward, [(0, 2)])
    want = generate(model, ids, max_new_tokens=12, forward=forward_)
    assert done.stdout.decode() == tokenizer.decode(np.asarray(want)[0]) + "\n"


def test_bad_input_is_one_message_and_exit_code_2(model_dir):
    done = launch(f"--model={model_dir}", "--prompt=a", "--top_p=2")
    assert done.returncode == 2 and b"top_p=2" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["plain", "größer — 日本語 🙂", "é"])
def test_characters_come_whole(text):
    tokenizer, out = Tokenizer.load("bytes"), io.StringIO()
    stream = TextStream(tokenizer, tokenizer.encode("> ").tolist(), out)
    shown = [out.getvalue()]
    for token in tokenizer.encode(text, add_bos=False).tolist():
        stream.add(token)
        shown.append(out.getvalue())
    assert not any("\ufffd" in s for s in shown)
    assert shown[0] == "> " and shown[-1] == "> " + text
    assert all(late.startswith(early) for early, late in itertools.pairwise(shown))


def test_bytes_that_never_become_text_are_shown_at_the_end():
    out = io.StringIO()
    stream = TextStream(Tokenizer.load("bytes"), [65], out)
    stream.add(0xC3)
    assert out.getvalue() == "A"
    stream.flush()
    assert out.getvalue() == "A\ufffd"
