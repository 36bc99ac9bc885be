"""Commands of several processes on this machine, for the tests of this folder."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# What Gloo says of its connections: several threads write it piece by piece, in any order.
_PIECES = r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :"
_GLOO = re.compile(rf"[\d ]*(?:(?:{_PIECES})[\d\s]*)+")
ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--seq_len=32",
    "--batch_size=8",
    "--set=model.num_layers=2",
    "--set=model.model_dim=32",
    "--set=model.num_heads=4",
    "--set=data.max_document_bytes=256",
    "--set=train.log_every=1",
    "--set=train.schedule=constant",
    "--set=train.eval_every=0",
    "--set=train.eval_batches=2",
    "--set=sample.tokens=0",
)
"""Settings of a run whose steps take milliseconds."""


def make_environment(cache: Path) -> dict[str, str]:
    """No simulated devices but those a command asks for; programs are compiled once."""
    left_out = ("XLA_FLAGS", "JAX_PLATFORMS")
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    return env | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def write_corpus(path: Path) -> Path:
    path.write_text("".join(f"the number {i % 50} is a number\n\n" for i in range(3000)))
    return path


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(environment, module: str, *flags: str) -> subprocess.Popen[str]:
    """``python -m module flags`` in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def start_pair(environment, module: str, *flags: str) -> list[subprocess.Popen[str]]:
    """The same command as two processes that find each other."""
    address = free_address()
    return [
        start(environment, module, *flags, f"--processes={address},{index},2") for index in (0, 1)
    ]


def finish(processes: Sequence[subprocess.Popen[str]], seconds=240) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; none is left running.

    Gloo, which connects processes on CPUs, writes its own lines to stdout: left out.
    """
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, _GLOO.sub("", out), err) for p, (out, err) in zip(processes, outputs)]


def wait_for(condition: Callable[[], object], processes, seconds=240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
