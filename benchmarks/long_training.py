"""A small decoder trained on texts of 65,536 tokens over 8 simulated devices, and its memory law.

    nice python -m benchmarks.long_training              # both parts; minutes on two cores
    nice python -m benchmarks.long_training --part=memory

`train` runs the ordinary launcher, ``python -m launch.train --mesh=context:8 --seq_len=65536``,
and reads the losses from its metrics. `memory` compiles the same step for several lengths T and
numbers of devices n and reads the temporary bytes of a device: they follow T/n, whatever T and n
are (log-log slope 1). Writes benchmarks/long_training.json and exits with 1 when a claim fails.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags as absl_flags

from launch import flags

OUT = Path(__file__).with_suffix(".json")
MODEL = {
    "num_layers": "2",
    "model_dim": "64",
    "num_heads": "1",
    "head_dim": "32",
    "mlp_dim": "192",
    "max_positions": "65536",
    "attention": "dmha(schedule=ring,layout=zigzag)",
    "window": "1024,none",
    "remat": "names:lse",
    "mlp_chunk": "1024",
}
TRAIN = {"lr": "0.02", "warmup_steps": "1", "log_every": "1", "schedule": "constant"}
POINTS = ((8192, 8), (16384, 8), (32768, 8), (65536, 8), (8192, 4), (8192, 2), (16384, 4))
"""(T, n) at which memory is measured."""


def train(length: int, devices: int, steps: int) -> dict[str, Any]:
    """Losses of a run of the launcher."""
    with tempfile.TemporaryDirectory(prefix="jaxheads-long-") as workdir:
        sets = [f"model.{k}={v}" for k, v in MODEL.items()]
        sets += [f"train.{k}={v}" for k, v in TRAIN.items()]
        sets += ["sample.tokens=0", "data.validation_fraction=0", "train.keep_best=0"]
        command = [
            *("-m", "launch.train", f"--simulated_devices={devices}", f"--mesh=context:{devices}"),
            *(f"--seq_len={length}", "--batch_size=1", f"--steps={steps}"),
            *(f"--set={text}" for text in sets),
        ]
        start = time.perf_counter()
        subprocess.run([sys.executable, *command, f"--workdir={workdir}"], check=True)
        seconds = time.perf_counter() - start
        lines = (Path(workdir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    losses = [round(row["loss"], 4) for row in rows if "loss" in row]
    return {
        "command": "python " + " ".join(command),
        "seconds": round(seconds, 1),
        "losses": losses,
    }


def temporaries(length: int, devices: int) -> int:
    """Temporary bytes of one device of the same train step, compiled and not run."""
    from launch.plan import resolve
    from launch.plan_report import plan

    request = resolve(
        topology=f"cpu:{devices}",
        model="tiny",
        mesh=f"context:{devices}",
        set=[f"model.{k}={v}" for k, v in MODEL.items()],
        sizes={"seq_len": length, "batch_size": 1},
    )
    return int(plan(request).memory.temporaries or 0)


def memory_law(points: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Temporary bytes at every point, and the slope of log bytes over log T/n."""
    rows = [{"length": t, "devices": n, "temporary_bytes": temporaries(t, n)} for t, n in points]
    x = np.log([row["length"] / row["devices"] for row in rows])
    y = np.log([row["temporary_bytes"] for row in rows])
    slope, level = np.polyfit(x, y, 1)
    error = float(np.max(np.abs(y - (slope * x + level))))
    return {"points": rows, "slope": round(float(slope), 4), "largest_log_error": round(error, 4)}


def claims(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What must hold."""
    found = []
    if "train" in content:
        losses = content["train"]["losses"]
        fall = losses[-1] / losses[0]
        found.append(
            {"name": "the loss falls: last over first", "measured": round(fall, 4),
             "needed": "at most 0.8", "holds": fall <= 0.8}
        )  # fmt: skip
    if "memory" in content:
        slope = content["memory"]["slope"]
        found.append(
            {"name": "temporary bytes of a device over T/n: log-log slope", "measured": slope,
             "needed": "1 +- 0.15", "holds": abs(slope - 1) <= 0.15}
        )  # fmt: skip
    return found


def main() -> int:
    """Runs the command; returns the exit code."""
    given = absl_flags.FLAGS
    content = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    if given.part in ("both", "memory"):
        flags.simulate_devices(max(n for _, n in POINTS))
        content["memory"] = memory_law(POINTS)
    if given.part in ("both", "train"):
        content["train"] = train(given.length, given.devices, given.steps)
    content["claims"] = claims(content)
    content["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    content["provenance"] = flags.provenance()
    flags.write_json(OUT, content)
    for claim in content["claims"]:
        print(claim)
    return 0 if all(claim["holds"] for claim in content["claims"]) else 1


if __name__ == "__main__":
    flags.define_common()
    absl_flags.DEFINE_enum("part", "both", ("both", "train", "memory"), "What to measure.")
    absl_flags.DEFINE_integer("length", 65536, "Tokens of a text in training.")
    absl_flags.DEFINE_integer("devices", 8, "Simulated devices in training.")
    absl_flags.DEFINE_integer("steps", 6, "Steps of training.")
    flags.run(main)
