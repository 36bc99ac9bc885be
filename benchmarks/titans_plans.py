"""Titans of 760 million parameters compiled for TPU slices that are not there.

Training at 32,768 tokens a row, and generation after 2,097,152 tokens of context (the state does
not grow with them): bytes per chip against its memory, the compiler's cycles, collectives. These
are the programs that `launch.plan` compiles.

    python -m benchmarks.titans_plans                            # every configuration
    python -m benchmarks.titans_plans --only=titans-mac-760m/decode
    python -m benchmarks.titans_plans --table                    # a table from the JSON

Writes benchmarks/titans_plans.json, one row after the other. Needs the `tpu` extra (libtpu).
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

_ONLY = flags.DEFINE_string("only", "", "Configurations whose name contains this text.")
_TABLE = flags.DEFINE_bool("table", False, "Print the Markdown table of the JSON and stop.")
_OUT = flags.DEFINE_string("out", str(Path(__file__).with_suffix(".json")), "Where to write.")

TRAIN_TOKENS, CONTEXT = 32768, 2097152


class Plan(NamedTuple):
    """A job on a slice."""

    model: str
    job: str
    topology: str
    mesh: str
    batch_size: int
    seq_len: int

    @property
    def name(self) -> str:
        """How it is asked for."""
        size = f"B{self.batch_size}/T{self.seq_len}"
        return f"{self.model}/{self.job}/{self.topology}/{self.mesh}/{size}"


_SLICES = (("v5e:16x16", "fsdp:16,model:16", 16), ("v5p:8x8x8", "fsdp:32,model:16", 32))
PLANS = tuple(
    Plan(f"titans-{variant}-760m", job, topology, mesh, batch, length)
    for variant in ("mac", "lmm", "mag", "mal")
    for job, length in (("train", TRAIN_TOKENS), ("decode", CONTEXT))
    for topology, mesh, batch in _SLICES
)


def compile_plan(plan: Plan) -> dict[str, Any]:
    """The row of a plan."""
    from launch.plan_jobs import Request, platform_defaults, resolve_model
    from launch.plan_report import plan as run

    model = resolve_model(plan.model, {})
    if plan.job == "train":
        model = dataclasses.replace(model, remat="full")
    request = Request(
        name=plan.model,
        model=model,
        topology=plan.topology,
        mesh=plan.mesh,
        job=plan.job,
        batch_size=plan.batch_size,
        seq_len=plan.seq_len,
        new_tokens=128,
    )
    begin = time.perf_counter()
    report = run(platform_defaults(request, ()))
    content = report.to_json()
    kept = ("chips", "num_params", "fits", "bytes_per_device", "flops", "time", "compile_seconds")
    row = {"name": plan.name, **plan._asdict(), **{name: content[name] for name in kept}}
    cycles = content.get("cycles")
    return row | {
        "cycles": None if cycles is None else cycles["total"],
        "seconds": round(time.perf_counter() - begin, 1),
        "notes": content["notes"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| job | slice, mesh | rows x tokens | GiB a chip | of | fits | compiled in |",
        "|" + " --- |" * 7,
    ]
    for row in rows:
        memory = row["bytes_per_device"]
        lines.append(
            f"| {row['model']} {row['job']} | {row['topology']}, {row['mesh']} "
            f"| {row['batch_size']} x {row['seq_len']:,} | {memory['peak'] / 2**30:.2f} "
            f"| {memory['hbm'] / 2**30:.1f} | {'yes' if row['fits'] else 'no'} "
            f"| {row['seconds']:.0f} s |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Compiles what is asked for and keeps the other rows of the JSON."""
    del argv
    path = Path(_OUT.value)
    held = json.loads(path.read_text()) if path.exists() else {"rows": []}
    if _TABLE.value:
        print(table(held["rows"]))
        return
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    import jax

    from launch import flags as launch_flags

    jax.config.update("jax_platforms", "cpu")
    rows = {row["name"]: row for row in held["rows"]}
    for plan in PLANS:
        if _ONLY.value not in plan.name:
            continue
        rows[plan.name] = row = compile_plan(plan)
        print(json.dumps({k: row[k] for k in ("name", "fits", "bytes_per_device", "seconds")}),
              flush=True)  # fmt: skip
        content = {
            **launch_flags.provenance(),
            "machine": {"system": platform.platform(), "cores": os.cpu_count()},
            "rows": [rows[p.name] for p in PLANS if p.name in rows],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
