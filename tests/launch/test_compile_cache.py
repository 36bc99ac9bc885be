"""Compiled programs are kept in the workdir, and a second run compiles nothing."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# launch.train, with what JAX tells about compiling printed at the end.
PROGRAM = """
import collections, json, sys
import jax
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: seen.update([name.rpartition("/")[2]]))
def note(name, seconds, **_):
    if name.endswith("backend_compile_duration"):
        seen["seconds"] += seconds
jax.monitoring.register_event_duration_secs_listener(note)
from launch import flags, train
train.define_flags()
try:
    flags.run(train.main)
finally:
    print("\\nSEEN", json.dumps(seen))
"""
SMALL = (
    "--simulated_devices=2", "--mesh=data:2", "--seq_len=32", "--batch_size=4",
    "--set=model.num_layers=1", "--set=model.model_dim=32", "--set=model.num_heads=4",
    "--set=train.eval_batches=1", "--set=sample.tokens=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"the number {i % 50} is a number\n\n" for i in range(300)))
    return path


def run(corpus, workdir, *flags, **env):
    """(what JAX counted, standard error) of a run."""
    dropped = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")
    clean = {n: v for n, v in os.environ.items() if n not in dropped}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *SMALL, f"--data={corpus}", f"--workdir={workdir}", *flags],
        env=clean | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | env,
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("SEEN")[2]), done.stderr


@pytest.mark.slow
def test_a_second_run_compiles_nothing(corpus, tmp_path):
    first, _ = run(corpus, tmp_path / "run", "--steps=3")
    assert first["cache_misses"] > 10
    assert list((tmp_path / "run/compile_cache").iterdir())
    # From the start again: with the checkpoint there, it would run other programs too.
    second, err = run(corpus, tmp_path / "run", "--steps=3", "--noresume")
    assert second.get("cache_misses", 0) == 0
    assert second["cache_hits"] >= first["cache_misses"]
    assert second["seconds"] < first["seconds"] / 2
    assert "Error reading persistent compilation cache" not in err


@pytest.mark.slow
def test_a_restart_loads_its_step_and_damaged_entries_do_no_harm(corpus, tmp_path):
    constant = "--set=train.schedule=constant"  # others have the number of steps in the program
    run(corpus, tmp_path, constant, "--steps=3")
    resumed, _ = run(corpus, tmp_path, constant, "--steps=5")
    again, _ = run(corpus, tmp_path, constant, "--steps=7")
    assert resumed["cache_hits"] > 10
    assert again.get("cache_misses", 0) == 0
    for path in (tmp_path / "compile_cache").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # as a kill leaves them
    broken, err = run(corpus, tmp_path, constant, "--steps=9")
    assert broken.get("cache_hits", 0) == 0 and "Error reading persistent" in err


@pytest.mark.slow
def test_the_users_directory_and_switching_it_off(corpus, tmp_path):
    mine = tmp_path / "mine"
    env = {"JAX_COMPILATION_CACHE_DIR": str(mine),
           "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # fmt: skip
    seen, _ = run(corpus, tmp_path / "a", "--steps=2", **env)
    assert seen["cache_misses"] > 10 and list(mine.iterdir())
    assert not (tmp_path / "a/compile_cache").exists()

    seen, _ = run(corpus, tmp_path / "b", "--steps=2", "--compile_cache=off", **env)
    assert not {"cache_hits", "cache_misses"} & seen.keys()
    assert not (tmp_path / "b/compile_cache").exists()

    seen, _ = run(corpus, tmp_path / "b", "--steps=3", f"--compile_cache={mine}")
    assert seen["cache_hits"] > 10


@pytest.mark.slow
def test_of_several_processes_only_process_0_writes(corpus, tmp_path):
    from tests.launch.processes import free_address

    flags = ("--steps=2", "--mesh=data:4")

    def both(*more):
        address = free_address()
        with ThreadPoolExecutor() as pool:
            done = pool.map(
                lambda i: run(corpus, tmp_path, *flags, *more, f"--processes={address},{i},2"),
                range(2),
            )
            return [seen for seen, _ in done]

    first = both()
    written = sorted(p.name for p in (tmp_path / "compile_cache").iterdir())
    again = both("--noresume")
    assert first[0]["cache_misses"] > 10 and "cache_misses" not in first[1]  # it writes nothing
    assert again[0].get("cache_misses", 0) == 0 and again[0]["cache_hits"] > 10
    assert sorted(p.name for p in (tmp_path / "compile_cache").iterdir()) == written


def test_an_empty_setting():
    from launch import compile_cache

    with pytest.raises(ValueError, match="compile_cache='' is empty"):
        compile_cache.enable("", "/tmp/x")
