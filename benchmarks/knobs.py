"""What each throughput knob buys: planned for a TPU slice, and timed on this machine's CPU.

    python -m benchmarks.knobs                 # both: about 20 minutes on two cores
    python -m benchmarks.knobs --cpu=false     # the planner's half
    python -m benchmarks.knobs --plans=false   # the CPU's half, about 2 minutes
    python -m benchmarks.knobs --table         # the tables of docs/throughput.md from the JSON

Planned: Llama 3.1 8B on v5e:4x4, fsdp:16, 32 rows of 4096 tokens (two a chip), each knob alone
against the first row. Timed: a 6-layer decoder of width 256 in float32 on CPU; knobs take turns, so
that a busy machine slows all alike, and medians count. Writes benchmarks/knobs.json.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

_PLANS = flags.DEFINE_bool("plans", True, "Plan for the TPU slice.")
_CPU = flags.DEFINE_bool("cpu", True, "Time on the CPU.")
_ONLY = flags.DEFINE_string("only", "", "Plan only knobs whose name contains this text.")
_REPS = flags.DEFINE_integer("reps", 5, "Timed steps of each knob.")
_TABLE = flags.DEFINE_bool("table", False, "Print the Markdown tables of the JSON and stop.")
_OUT = flags.DEFINE_string("out", str(Path(__file__).with_suffix(".json")), "Where to write.")


class Knob(NamedTuple):
    """A setting against the base."""

    name: str
    model: Mapping[str, Any] = {}
    train: Mapping[str, Any] = {}


PLANNED = (
    Knob("base: remat=full"),
    Knob("remat=names:lse", {"remat": "names:lse"}),
    Knob("remat=names:lse,resid_mid", {"remat": "names:lse,resid_mid"}),
    Knob("grad_accum=2", {}, {"grad_accum": 2}),
    Knob("scan_unroll=2", {"scan_unroll": 2}),
    Knob("implementation=blocked", {"implementation": "blocked"}),
    Knob("loss_chunks=4", {}, {"loss_chunks": 4}),
)
TIMED = (
    Knob("base: remat=none"),
    Knob("remat=full", {"remat": "full"}),
    Knob("remat=dots", {"remat": "dots"}),
    Knob("grad_accum=2", {}, {"grad_accum": 2}),
    Knob("grad_accum=4", {}, {"grad_accum": 4}),
    Knob("scan_unroll=2", {"scan_unroll": 2}),
    Knob("scan_unroll=6", {"scan_unroll": 6}),
    Knob("implementation=dense", {"implementation": "dense"}),
    Knob("implementation=blocked", {"implementation": "blocked"}),
    Knob("loss_chunks=4", {}, {"loss_chunks": 4}),
)


def planned(knob: Knob) -> dict[str, Any]:
    """Bytes per chip and estimated cycles of a knob on the slice."""
    from jaxheads.models import PRESETS
    from jaxheads.training import TrainConfig
    from launch.plan_jobs import Request, platform_defaults
    from launch.plan_report import plan

    model = dataclasses.replace(PRESETS["llama3.1-8b"](), **{"remat": "full", **knob.model})
    request = Request(
        name="llama3.1-8b",
        model=model,
        train=TrainConfig(**knob.train),
        topology="v5e:4x4",
        mesh="fsdp:16",
        batch_size=32,
        seq_len=4096,
    )
    report = plan(platform_defaults(request, ()))
    summary = report.summary
    return {
        "peak_bytes": report.memory.peak,
        "fits": report.fits,
        "temporary_bytes": report.memory.temporaries,
        "estimated_cycles": None if summary is None else summary.cycles,
        "kernels": None if summary is None else sum(k.count for k in summary.kernels),
        "compile_seconds": round(report.compile_seconds, 1),
    }


def cpu_step(knob: Knob) -> tuple[Callable[[], None], float, int]:
    """(a function that takes one step, seconds to compile it, its temporary bytes)."""
    import jax
    import numpy as np
    from flax import nnx

    from jaxheads.models import Decoder, ModelConfig
    from jaxheads.training import TrainConfig, init_state, make_optimizer, make_train_step

    sizes = {"vocab_size": 8192, "num_layers": 6, "model_dim": 256, "compute_dtype": "float32"}
    cfg, train = ModelConfig(**(sizes | dict(knob.model))), TrainConfig(**knob.train)
    optimizer = make_optimizer(train)
    state = init_state(lambda: Decoder(cfg, rngs=nnx.Rngs(0)), optimizer)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (8, 513), dtype=np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    start = time.perf_counter()
    lowered = make_train_step(train, optimizer).lower(state, batch)
    memory = lowered.compile().memory_analysis().temp_size_in_bytes
    seconds = time.perf_counter() - start
    step = make_train_step(train, optimizer)

    def run() -> None:
        nonlocal state
        state, _ = step(state, batch)
        jax.block_until_ready(state)

    run()
    return run, seconds, memory


def timed(reps: int) -> dict[str, Any]:
    """Median seconds of a step for every knob, taking turns."""
    steps = {knob.name: cpu_step(knob) for knob in TIMED}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(reps):
        for name, (run, _, _) in steps.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "median_seconds": round(statistics.median(seconds[name]), 4),
            "seconds": [round(s, 4) for s in seconds[name]],
            "compile_seconds": round(compile_seconds, 2),
            "temporary_bytes": memory,
        }
        for name, (_, compile_seconds, memory) in steps.items()
    }


def tables(content: Mapping[str, Any]) -> str:
    """Markdown: what the planner says, and what the CPU took."""
    lines = [
        "| knob | temporaries a chip | estimated cycles | attention kernels |",
        "|---|---|---|---|",
    ]
    for name, row in content.get("planned", {}).items():
        if row["estimated_cycles"] is None:
            lines.append(f"| {name} | does not fit ({row['peak_bytes'] / 1e9:.1f} GB) | | |")
            continue
        lines.append(
            f"| {name} | {row['temporary_bytes'] / 1e9:.2f} GB | {row['estimated_cycles']:.3g} | "
            f"{row['kernels']:.0f} |"
        )
    lines += ["", "| knob | seconds a step | temporaries | compile |", "|---|---|---|---|"]
    for name, row in content.get("timed", {}).items():
        lines.append(
            f"| {name} | {row['median_seconds']:.2f} | {row['temporary_bytes'] / 1e6:.0f} MB | "
            f"{row['compile_seconds']:.1f} s |"
        )
    return "\n".join(lines)


def main(_: list[str]) -> None:
    """Measure what was asked for and write it down."""
    path = Path(_OUT.value)
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if _TABLE.value:
        print(tables(content))
        return

    def write() -> None:
        packages = ("jax", "jaxlib", "libtpu")
        content["versions"] = {p: importlib.metadata.version(p) for p in packages}
        content["machine"] = {"cores": os.cpu_count(), "system": platform.platform()}
        content["command"] = "python -m benchmarks.knobs"
        path.write_text(json.dumps(content, indent=1) + "\n")

    if _CPU.value:
        content["timed"] = timed(_REPS.value)
        write()
    for knob in PLANNED if _PLANS.value else ():
        if _ONLY.value not in knob.name:
            continue
        try:
            row = planned(knob)
        except Exception as error:  # one that does not compile must not lose the others
            print(f"{knob.name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            continue
        content.setdefault("planned", {})[knob.name] = row
        print(knob.name, row, flush=True)
        write()


if __name__ == "__main__":
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    app.run(main)
