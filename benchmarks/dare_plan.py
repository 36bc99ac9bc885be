"""Training on tables of 100 million and a billion rows, compiled for TPU slices that are not there.

    python -m benchmarks.dare_plan                     # all plans
    python -m benchmarks.dare_plan --only=dare-100m    # plans whose name contains the text

The step of `launch.plan --job=recommender`: lookup by all-to-all of 201 ids a sample, with
psum_scatter to fall back on, pooling and head, row-wise Adagrad in place. Writes
benchmarks/dare_plan.json: bytes per chip against its memory, collectives, the compiler's time.
Needs the `tpu` extra (libtpu).
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

_ONLY = flags.DEFINE_string("only", "", "Plans whose name contains this text.")
_OUT = flags.DEFINE_string("out", str(Path(__file__).with_suffix(".json")), "Where to write.")


class Plan(NamedTuple):
    """A job on a slice."""

    model: str
    topology: str
    mesh: str
    batch_size: int
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How it is asked for."""
        return " ".join([self.model, self.topology, self.mesh, *self.settings])


HISTORY = 200
PLANS = (
    Plan("dare-100m", "v5e:16x16", "data:256", 16384),
    Plan("dare-100m", "v5e:16x16", "data:256", 16384, ("model.on_overflow=report",)),
    Plan("dare-100m", "v5e:16x16", "data:256", 16384, ("model.row_optimizer=adam",)),
    Plan("dare-100m", "v5e:16x16", "data:256", 16384, ("model.method=psum_scatter",)),
    Plan("dare-1b", "v5p:8x8x8", "data:512", 32768, ("model.on_overflow=report",)),
)


def compile_plan(plan: Plan) -> dict[str, Any]:
    """The row of a plan."""
    from launch.plan import resolve, table
    from launch.plan_report import plan as run

    request = resolve(
        topology=plan.topology,
        model=plan.model,
        mesh=plan.mesh,
        job="recommender",
        set=plan.settings,
        sizes={"batch_size": plan.batch_size, "seq_len": HISTORY},
    )
    report = run(request)
    print(table(report), flush=True)
    content = report.to_json()
    del content["settings"]
    return {"name": plan.name, **content}


def main(argv: list[str]) -> None:
    """Compiles what is asked for and keeps the other rows of the JSON."""
    del argv
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    import jax

    from launch import flags as launch_flags

    jax.config.update("jax_platforms", "cpu")
    path = Path(_OUT.value)
    held = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {row["name"]: row for row in held}
    for plan in PLANS:
        if _ONLY.value not in plan.name:
            continue
        rows[plan.name] = compile_plan(plan)
        content = {
            **launch_flags.provenance(),
            "machine": {"system": platform.platform(), "cores": os.cpu_count()},
            "rows": [rows[p.name] for p in PLANS if p.name in rows],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
