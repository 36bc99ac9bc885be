"""What the compile cache saves a run that starts again, and how long its steps wait for input.

    python -m benchmarks.restart     # about a minute on two cores; writes benchmarks/restart.json

The same training command runs in processes of its own: with an empty cache, again with the
programs of the first run, and with ``--compile_cache=off``. Told are the seconds until the first
step is done (as the run itself says them: compilation, data, and the step), the seconds of the
whole process, and the share of the time that steps waited for their input.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = (
    "--simulated_devices=8", "--mesh=data:4,model:2", "--seq_len=128", "--batch_size=16",
    "--set=sample.tokens=0", "--set=train.eval_batches=1",
)  # fmt: skip


def run(workdir: str, steps: int, *more: str) -> dict[str, float]:
    """One run of launch.train."""
    dropped = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", *FLAGS, f"--workdir={workdir}", f"--steps={steps}",
         f"--set=train.log_every={steps}", "--noresume", *more],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise RuntimeError(done.stderr)
    first = re.search(r"first step after ([\d.]+) s", done.stdout)
    rows = [json.loads(t) for t in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in rows if row["step"] == steps and "input_wait_share" in row)
    return {
        "first_step_seconds": float(first[1]) if first else float("nan"),
        "process_seconds": round(seconds, 1),
        "input_wait_seconds": last["input_wait_seconds"],
        "input_wait_share": last["input_wait_share"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", default="benchmarks/restart.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        runs = {
            "empty cache": run(one, given.steps),
            "filled cache": run(one, given.steps),
            "no cache": run(other, given.steps, "--compile_cache=off"),
        }
    result = {
        "command": ["python", "-m", "benchmarks.restart", *sys.argv[1:]],
        "flags": FLAGS,
        "steps": given.steps,
        "machine": {
            "platform": platform.platform(),
            "processor_count": os.cpu_count(),
            "python": platform.python_version(),
            "jax": metadata.version("jax"),
        },
        "runs": runs,
    }
    (ROOT / given.output).write_text(json.dumps(result, indent=2) + "\n")
    for name, row in runs.items():
        print(name, json.dumps(row))


if __name__ == "__main__":
    main()
