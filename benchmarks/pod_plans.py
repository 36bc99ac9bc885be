"""Train steps compiled for TPU slices that are not there: bytes per chip and estimated cycles,
jaxheads beside MaxText on the same compiler.

Ours are the programs `launch.plan` compiles: the real train step, rows packed with segment ids,
AdamW with float32 parameters and moments, bfloat16 compute, full rematerialisation. Estimated
cycles are the compiler's, summed over the program with loop trip counts multiplied out; it has
none for Pallas kernels, whose executions are counted instead, nor for collectives.

    python -m benchmarks.pod_plans                       # every configuration: about 20 minutes
    python -m benchmarks.pod_plans --only=llama3.1-8b/v5e:4x4
    python -m benchmarks.pod_plans --table               # the table of docs/pods.md from the JSON

MaxText's rows come from `benchmarks/maxtext_plan.py`, which runs in MaxText's own environment.
Writes benchmarks/pod_plans.json, one row after the other. Needs the `tpu` extra (libtpu).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

_ONLY = flags.DEFINE_string("only", "", "Configurations whose name contains this text.")
_TABLE = flags.DEFINE_bool("table", False, "Print the Markdown table of the JSON and stop.")
_OUT = flags.DEFINE_string("out", str(Path(__file__).with_suffix(".json")), "Where to write.")


class Plan(NamedTuple):
    """A train step on a slice."""

    model: str
    topology: str
    mesh: str
    batch_size: int
    seq_len: int
    remat: str = "full"

    @property
    def name(self) -> str:
        """How it is asked for."""
        return "/".join(
            (self.model, self.topology, self.mesh, f"B{self.batch_size}", f"T{self.seq_len}")
        )


PLANS = (
    Plan("llama3.1-8b", "v5e:4x4", "fsdp:16", 16, 4096),
    Plan("llama3.1-8b", "v5e:4x4", "fsdp:16", 16, 8192),
    Plan("llama3.1-8b", "v5e:16x16", "fsdp:256", 256, 4096),
    Plan("llama3.1-8b", "v5e:16x16", "data:16,fsdp:16", 256, 4096),
    Plan("llama3.1-8b", "v5p:4x4x4", "fsdp:64", 64, 8192),
    Plan("llama3.1-8b", "v5p:4x4x4", "fsdp:16,model:4", 64, 8192),
    Plan("llama3.1-8b", "v6e:16x16", "fsdp:64,context:4", 64, 32768),
    Plan("llama3.1-70b", "v5p:8x8x8", "fsdp:512", 512, 4096),
    Plan("gpt2-small", "v5e:4x4", "data:16", 128, 1024),
)


def compile_plan(plan: Plan) -> dict[str, Any]:
    """The row of a plan."""
    from jaxheads.training import TrainConfig
    from launch.plan_jobs import Request, platform_defaults, resolve_model
    from launch.plan_report import plan as run

    model = dataclasses.replace(resolve_model(plan.model, {}), remat=plan.remat)
    request = Request(
        name=plan.model,
        model=model,
        train=TrainConfig(),
        topology=plan.topology,
        mesh=plan.mesh,
        batch_size=plan.batch_size,
        seq_len=plan.seq_len,
    )
    report = run(platform_defaults(request, ()))
    summary = report.summary
    if summary is None:
        raise RuntimeError(f"{plan.name} was not compiled; install the `tpu` extra (libtpu).")
    counts: dict[str, float] = {}
    for collective in summary.collectives:
        counts[collective.kind] = counts.get(collective.kind, 0) + collective.count
    return {
        **plan._asdict(),
        "argument_bytes": report.memory.arguments,
        "temporary_bytes": report.memory.temporaries,
        "estimated_cycles": summary.cycles,
        "kernels": sum(k.count for k in summary.kernels),
        "collectives": counts,
        "compile_seconds": round(report.compile_seconds, 1),
    }


def table(content: dict[str, Any]) -> str:
    """Markdown: a line per configuration, ours against MaxText's where it was compiled too."""
    lines = [
        "| model, slice, mesh | rows x tokens | arguments | temporaries | of MaxText's | estimated "
        "cycles | of MaxText's | kernels |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in content["jaxheads"].items():
        other = content["maxtext"].get(name)
        share = lambda key, row=row, other=other: (
            f"{row[key] / other[key]:.2f}" if other else "not compiled"
        )
        lines.append(
            f"| {row['model']}, {row['topology']}, {row['mesh']} | {row['batch_size']} x "
            f"{row['seq_len']} | {row['argument_bytes'] / 1e9:.2f} GB | "
            f"{row['temporary_bytes'] / 1e9:.2f} GB | {share('temporary_bytes')} | "
            f"{row['estimated_cycles']:.3g} | {share('estimated_cycles')} | {row['kernels']:.0f} |"
        )
    return "\n".join(lines)


def write(path: Path, content: dict[str, Any]) -> None:
    """The file with the machine and versions of this run."""
    packages = ("jax", "jaxlib", "libtpu", "flax", "optax")
    content["versions"] = {p: importlib.metadata.version(p) for p in packages}
    content["machine"] = {"cores": os.cpu_count(), "system": platform.platform()}
    content["command"] = "python -m benchmarks.pod_plans"
    path.write_text(json.dumps(content, indent=1) + "\n")


def main(_: list[str]) -> None:
    """Compile what was asked for and write it down."""
    path = Path(_OUT.value)
    content = {"jaxheads": {}, "maxtext": {}}
    if path.exists():
        content = json.loads(path.read_text())
    if _TABLE.value:
        print(table(content))
        return
    for plan in PLANS:
        if _ONLY.value not in plan.name:
            continue
        print(plan.name, flush=True)
        try:
            row = compile_plan(plan)
        except Exception as error:  # one that does not compile must not lose the others
            print(f"  {type(error).__name__}: {str(error)[:500]}", file=sys.stderr, flush=True)
            continue
        content["jaxheads"][plan.name] = row
        print(
            f"  arguments {row['argument_bytes'] / 1e9:.3f} GB, temporaries "
            f"{row['temporary_bytes'] / 1e9:.3f} GB, {row['estimated_cycles']:.4g} cycles, "
            f"{row['kernels']:.0f} kernels, {row['compile_seconds']} s",
            flush=True,
        )
        write(path, content)


if __name__ == "__main__":
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    app.run(main)
