"""Runs that are killed, told to stop, out of disk or given damaged files: all go on as if not."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from jaxheads import parallel
from jaxheads.checkpoints import checksums, orbax
from jaxheads.fields import from_json
from jaxheads.models import Decoder, ModelConfig
from jaxheads.training import TrainConfig, init_state, make_optimizer
from tests.checkpoints.test_checksums import flip
from tests.launch.processes import (
    SMALL,
    finish,
    make_environment,
    start,
    wait_for,
    write_corpus,
)

pytestmark = pytest.mark.slow
TRAIN = "launch.train"
EVERY_3 = "--set=train.checkpoint_every=3"
LARGE = "--set=model.mlp_dim=30000"  # so that a save takes a while: 2.9 M parameters a layer
KILLS = 20
STEPS = 600


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return make_environment(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "text.txt")
    return (*SMALL, "--simulated_devices=2", "--mesh=fsdp:2", f"--data={corpus}")


def complete(workdir):
    """Steps of complete checkpoints, in order."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def unfinished(workdir):
    return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(workdir):
    return [(line["step"], line["loss"]) for line in lines(workdir) if "loss" in line]


def arrays(workdir, step):
    """Everything a checkpoint holds, by name."""
    with orbax.Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        stored = checkpoints.config(step)
        cfg = from_json(ModelConfig, stored["model"], section="model")
        optimizer = make_optimizer(from_json(TrainConfig, stored["train"], section="train"))
        mesh = parallel.make_mesh("")
        like = orbax.abstract(
            lambda: init_state(lambda: Decoder(cfg, rngs=nnx.Rngs(0)), optimizer), mesh
        )
        key = orbax.abstract(lambda: jax.random.key(0), mesh)
        training = {"step": like.step, "opt_state": like.opt_state, "key": key}
        read = checkpoints.restore(like.model, training, step)
    key = jax.random.key_data(read.training.pop("key"))
    found = orbax.flatten((read.model, read.training, key))
    return {name: np.asarray(value) for name, value in found.items()}


def assert_same_arrays(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)


def run(environment, *flags):
    ((code, out, err),) = finish([start(environment, TRAIN, *flags)])
    assert code == 0, err
    return out, err


@pytest.fixture(scope="module")
def uninterrupted(environment, common, tmp_path_factory):
    """(workdir, seconds until the first step of a run whose programs are compiled)."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    run(environment, *common, f"--workdir={workdir}", f"--steps={STEPS}")
    begin = time.monotonic()
    process = start(environment, TRAIN, *common, "--steps=100000", EVERY_3,
                    f"--workdir={workdir / 'timed'}")  # fmt: skip
    wait_for(lambda: complete(workdir / "timed"), [process])
    seconds = time.monotonic() - begin
    process.kill()
    process.communicate()
    return workdir, seconds


def test_twenty_kills_change_nothing(environment, common, uninterrupted, tmp_path):
    """At random moments: while it starts, restores, trains, saves, writes checksums, deletes."""
    reference, seconds = uninterrupted
    moments = random.Random(20)
    flags = (*common, f"--workdir={tmp_path}", f"--steps={STEPS}")
    steps, saving = [], 0
    for _ in range(KILLS):
        before = complete(tmp_path)[-1:]
        process = start(environment, TRAIN, *flags, EVERY_3)
        if moments.random() < 0.25:  # as it starts; the others as it trains
            time.sleep(moments.uniform(0, seconds))
        else:
            went_on = lambda: complete(tmp_path)[-1:] > before  # noqa: B023
            wait_for(went_on, [process])
            time.sleep(moments.uniform(0, 0.15 * seconds))
        assert process.poll() is None, f"it ended by itself: {process.communicate()}"
        process.kill()
        process.communicate()
        saving += bool(unfinished(tmp_path))
        steps.append((complete(tmp_path) or [0])[-1])
        assert steps[-1] >= (before or [0])[0], "a checkpoint was lost"
    assert steps[-1] < STEPS and len(set(steps)) > KILLS / 2, steps
    assert saving, "no kill met a save"
    aside = [p.name for p in (tmp_path / "checkpoints").glob("*-*") if "tmp" not in p.name]
    assert not aside, "a checkpoint was left half written or half deleted"

    out, _ = run(environment, *flags, "--set=train.checkpoint_every=100")
    assert f"resuming after step {steps[-1]} of {STEPS}" in out
    assert losses(tmp_path) == losses(reference)
    assert [step for step, _ in losses(tmp_path)] == list(range(1, STEPS + 1))
    assert_same_arrays(arrays(tmp_path, STEPS), arrays(reference, STEPS))


def test_sigterm_with_a_save_in_flight(environment, common, tmp_path):
    flags = (*common, LARGE, f"--workdir={tmp_path}", "--steps=100000", EVERY_3)
    process = start(environment, TRAIN, *flags)
    wait_for(lambda: unfinished(tmp_path) and complete(tmp_path), [process])
    process.send_signal(signal.SIGTERM)
    in_flight = [int(p.name.partition(".")[0]) for p in unfinished(tmp_path)]
    assert in_flight, "the save ended before the signal"
    ((code, out, err),) = finish([process])
    assert code == 0 and "Traceback" not in err, err
    (step,) = map(int, re.findall(r"stopped by SIGTERM after step (\d+);", out))
    assert complete(tmp_path)[-1] == step >= in_flight[0] and not unfinished(tmp_path)
    for number in complete(tmp_path):
        directory = tmp_path / "checkpoints" / str(number)
        assert checksums.is_complete(directory) and not checksums.problems(directory)


@pytest.fixture(params=["full disk", "largest file"])
def crowded(request, tmp_path):
    """(workdir, take(pid): nothing large can be written from now on, give: it can again)."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    if request.param == "largest file":
        # As a quota does: what exceeds it cannot be written.
        limit = resource.RLIMIT_FSIZE
        yield workdir, lambda pid: resource.prlimit(pid, limit, (2**16,) * 2), lambda: None
        return
    size = lambda mb: ["mount", "-t", "tmpfs", "-o", mb, "tmpfs", str(workdir)]
    if (
        shutil.which("mount") is None
        or subprocess.run(size("size=400m"), capture_output=True).returncode
    ):
        pytest.skip("no right to mount a small tmpfs")
    filling = workdir / "filling"

    def take(_):
        with filling.open("wb") as file:
            free = shutil.disk_usage(workdir).free
            file.write(b"\0" * max(free - 2**19, 0))  # numbers still fit, arrays do not

    yield workdir, take, filling.unlink
    subprocess.run(["umount", "-l", str(workdir)], check=True)


def test_a_full_disk(environment, common, crowded):
    workdir, take, give = crowded
    flags = (*common, LARGE, f"--workdir={workdir}", "--set=train.keep_last=99",
             "--set=train.keep_best=0")  # fmt: skip
    process = start(environment, TRAIN, *flags, "--steps=100000", EVERY_3)
    wait_for(lambda: (workdir / "checkpoints/3/checksums-0-of-1.json").is_file(), [process])
    take(process.pid)
    ((code, _, err),) = finish([process])
    assert code == 2, err
    # Anywhere: threads of Orbax that end later write lines of their own behind it.
    assert re.search(r"checkpoint of step \d+ could not be written to .*"
                     r"(No space left on device|File too large)", err), err  # fmt: skip
    sound = [n for n in complete(workdir) if checksums.is_complete(workdir / f"checkpoints/{n}")]
    assert 3 in sound
    for number in sound:
        assert checksums.problems(workdir / "checkpoints" / str(number)) == []
    give()
    newest = complete(workdir)[-1]
    out, _ = run(environment, *flags, f"--steps={newest + 2}")
    assert f"resuming after step {newest} of {newest + 2}" in out
    assert not unfinished(workdir)


def test_a_flipped_bit_in_the_newest_checkpoint(environment, common, uninterrupted, tmp_path):
    reference, _ = uninterrupted
    flags = (*common, f"--workdir={tmp_path}")
    run(environment, *flags, "--steps=9", EVERY_3)
    assert complete(tmp_path) == [6, 9]
    folder = tmp_path / "checkpoints/9/model"
    flip(max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size))
    out, err = run(environment, *flags, "--steps=12", EVERY_3)
    assert "checkpoints/9 is damaged (model/" in err and "renamed damaged-9" in err
    assert "resuming after step 6 of 12" in out
    assert losses(tmp_path) == losses(reference)[:12]


def test_the_fixture_kills_what_it_starts():
    """The helper of these tests leaves nothing behind."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    with pytest.raises(subprocess.TimeoutExpired):
        finish([process], seconds=0.1)
    process.wait(timeout=10)
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
