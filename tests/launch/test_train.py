"""`python -m launch.train` as a command: a whole run, signals, kill -9, bad input."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxheads.checkpoints import orbax

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--simulated_devices=2",
    "--seq_len=32",
    "--batch_size=8",
    "--set=model.num_layers=1",
    "--set=model.model_dim=32",
    "--set=model.num_heads=4",
    "--set=data.max_document_bytes=256",
    "--set=train.eval_batches=2",
    "--set=sample.tokens=12",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """No simulated devices but those the command asks for; programs are compiled once."""
    env = {n: v for n, v in os.environ.items() if n not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return env | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"the number {i % 50} is a number\n\n" for i in range(3000)))
    return path


def command(workdir, corpus, *flags):
    return [
        *(sys.executable, "-m", "launch.train", *SMALL),
        *(f"--workdir={workdir}", f"--data={corpus}", *flags),
    ]


def launch(environment, workdir, corpus, *flags):
    return subprocess.run(
        command(workdir, corpus, *flags),
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def start(environment, workdir, corpus, *flags):
    return subprocess.Popen(
        command(workdir, corpus, *flags),
        env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(condition, process, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def last_step(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def read_losses(workdir):
    lines = [json.loads(t) for t in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in lines if "loss" in r}


def test_a_run_from_start_to_end_and_on(environment, corpus, tmp_path):
    mesh = "--mesh=data:2"
    # The profiler is only started in a process of its own: beside libtpu, which the ahead-of-time
    # tests load, starting it crashes.
    flags = ("--steps=40", "--set=train.lr=1e-2", "--profile=10:12")
    done = launch(environment, tmp_path, corpus, mesh, *flags)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"step 40/40  loss \d\.\d{4}", done.stdout)
    assert "on mesh data:2 (cpu)" in done.stdout and "sampled text:\nthe" not in done.stdout

    losses = read_losses(tmp_path)
    assert list(losses) == [10, 20, 30, 40]
    assert losses[10] > losses[20] > losses[40] and losses[40] < losses[10] / 2
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/loss"] == pytest.approx(losses[40], rel=0.5)

    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"]["vocab_size"] == 384  # the tokenizer's
    assert config["mesh"] == "data:2" and config["train"]["steps"] == 40
    assert config["data"]["path"] == str(corpus) and config["data"]["seq_len"] == 32
    assert config["versions"]["jax"] and config["command"][:3] == ["python", "-m", "launch.train"]
    assert list((tmp_path / "tensorboard").glob("events.out.*"))
    assert (tmp_path / "sample.txt").read_text().startswith("def ")
    assert (tmp_path / "tokenizer.json").is_file()
    assert orbax.load_model(tmp_path).cfg.model_dim == 32
    (trace,) = (tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 1000

    again = launch(environment, tmp_path, corpus, "--steps=45", "--set=train.lr=1e-2")
    assert again.returncode == 0, again.stderr
    assert "resuming after step 40 of 45" in again.stdout

    same = launch(environment, tmp_path, corpus, "--steps=45", "--set=train.lr=1e-2")
    assert same.returncode == 0 and "all 45 steps are done already" in same.stdout

    other = launch(environment, tmp_path, corpus, "--steps=50", "--set=model.qk_norm=true")
    assert other.returncode == 2 and "Traceback" not in other.stderr
    assert "is of another model: qk_norm: False -> True" in other.stderr


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_zero(environment, corpus, tmp_path):
    process = start(environment, tmp_path, corpus, "--steps=100000", "--set=train.log_every=1")
    wait_for(lambda: last_step(tmp_path) >= 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (step,) = map(int, re.findall(r"stopped by SIGTERM after step (\d+); the checkpoint", out))
    with orbax.Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps == [step]
    assert last_step(tmp_path) == step


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--stepz=3"], ["Unknown command line flag 'stepz'", "steps"]),
        (["--set=train.lrr=1"], ["unknown field of train 'lrr'; did you mean 'lr'?"]),
        (["--mesh=data:16"], ["needs 16 devices but there are 2", "--debug"]),
        (["extra"], ["unexpected argument 'extra'"]),
    ],
)
def test_bad_input_is_a_message_and_exit_code_two(environment, corpus, tmp_path, flags, messages):
    done = launch(environment, tmp_path, corpus, *flags)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.startswith("error: ")
    for message in messages:
        assert message in done.stderr


@pytest.mark.slow
def test_debug_shows_the_traceback(environment, corpus, tmp_path):
    done = launch(environment, tmp_path, corpus, "--mesh=data:16", "--debug")
    assert done.returncode == 2 and "Traceback" in done.stderr


@pytest.mark.slow
def test_a_loss_that_is_not_finite_exits_with_one(environment, corpus, tmp_path):
    flags = ("--set=train.lr=1e38", "--set=train.grad_clip=0", "--steps=9")
    done = launch(environment, tmp_path, corpus, *flags)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "param_norm is inf" in done.stderr
    assert list(tmp_path.glob("nonfinite-step-1-process-0.npz"))


@pytest.mark.slow
def test_kill_nine_during_a_save_falls_back(environment, corpus, tmp_path):
    """Killed as soon as a second checkpoint begins to be written."""
    flags = (
        "--steps=100000",
        "--set=train.checkpoint_every=3",
        "--set=train.eval_every=0",
        "--set=model.mlp_dim=60000",
    )  # fmt: skip  (large enough that writing takes a while)
    folder = tmp_path / "checkpoints"
    process = start(environment, tmp_path, corpus, *flags)
    unfinished = lambda: list(folder.glob("*.orbax-checkpoint-tmp*")) if folder.exists() else []
    complete = lambda: [p for p in folder.glob("*") if p.name.isdigit()]
    wait_for(lambda: unfinished() and complete(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert unfinished(), "the save ended before the signal"
    steps = sorted(int(p.name) for p in complete())

    resumed = start(environment, tmp_path, corpus, *flags)
    wait_for(lambda: any(int(p.name) > steps[-1] for p in complete()), resumed)
    resumed.send_signal(signal.SIGTERM)
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert f"resuming after step {steps[-1]} of" in out
    assert "unfinished save of an interrupted run" in err


@pytest.mark.slow
def test_two_processes_train_one_model_and_stop_together(environment, corpus, tmp_path):
    """The losses of one process; SIGTERM to one of them saves and ends both."""
    flags = ("--set=train.log_every=1", "--set=train.schedule=constant", "--mesh=data:2,model:2")
    alone = launch(environment, tmp_path / "one", corpus, *flags, "--steps=6",
                   "--simulated_devices=4")  # fmt: skip
    assert alone.returncode == 0, alone.stderr

    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    pair = [
        start(environment, tmp_path / "two", corpus, *flags, "--steps=100000",
              f"--processes={address},{index},2")
        for index in range(2)
    ]  # fmt: skip
    wait_for(lambda: last_step(tmp_path / "two") >= 6, pair[0])
    pair[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120) for process in pair]
    assert [p.returncode for p in pair] == [0, 0], outputs
    (step,) = map(int, re.findall(r"stopped by preemption after step (\d+);", outputs[0][0]))
    with orbax.Checkpoints(tmp_path / "two/checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps == [step]
    assert "step" not in outputs[1][0]  # only process 0 talks
    losses = [read_losses(tmp_path / name) for name in ("one", "two")]
    for n in range(1, 7):
        assert losses[1][n] == pytest.approx(losses[0][n], rel=1e-5)
