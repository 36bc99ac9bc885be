"""A 7B decoder trained on texts of 1,048,576 tokens, planned ahead of time for two TPU slices.

    nice python -m benchmarks.million_tokens                   # all rows, one after another
    nice python -m benchmarks.million_tokens --only=v5e        # rows whose name holds the text
    python -m benchmarks.million_tokens --table                # the Markdown table of the file

Each row is what ``python -m launch.plan`` with the same settings reports (``--list`` prints the
commands); ``launch.train`` takes them unchanged. Writes benchmarks/million_tokens.json: bytes a
chip, FLOPs, bytes of every collective, estimated time of a step. Nothing has been run on a TPU:
times are the compiler's cycles, see docs/plan.md. A row takes some minutes on two cores.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags as absl_flags

from launch import flags

OUT = Path(__file__).with_suffix(".json")
LENGTH = 1048576
DMHA = "dmha(schedule=ring,layout=zigzag)"
# The compiler refuses the zigzag's exchange of tokens on this slice (libtpu 0.0.52: "limited ICI
# routing"); in the order of the text the last device has twice the mean work.
IN_TEXT_ORDER = "dmha(schedule=ring)"
# S2's residue classes are counted from the start of the text, so its layers keep that order. 8
# classes, as many as kv heads: together the heads see everything.
HYBRID = "s2(block=512,local_blocks=2,stride=8)*3+dmha(schedule=ring)"


class Row(NamedTuple):
    """One plan."""

    name: str
    topology: str
    mesh: str
    attention: str
    seq_len: int = LENGTH
    model: str = "lm-7b"
    remat: str = "offload"
    mlp_chunk: int = 2048
    settings: tuple[str, ...] = ()

    @property
    def flags(self) -> dict[str, Any]:
        """Arguments of `launch.plan.resolve`."""
        return {
            "topology": self.topology,
            "model": self.model,
            "mesh": self.mesh,
            "remat": self.remat,
            "set": [
                f"model.attention={self.attention}",
                f"model.mlp_chunk={self.mlp_chunk}",
                *self.settings,
            ],
            "sizes": {"seq_len": self.seq_len, "batch_size": 1},
        }

    @property
    def command(self) -> str:
        """The same as a command."""
        given = self.flags
        sizes = " ".join(f"--{k}={v}" for k, v in given["sizes"].items())
        sets = " ".join(f'--set "{text}"' for text in given["set"])
        return (
            f"python -m launch.plan --topology={self.topology} --model={self.model} "
            f"--mesh={self.mesh} {sizes} --remat={self.remat} {sets}"
        )


ROWS = (
    Row("dmha on v5p:8x8x8", "v5p:8x8x8", "context:128,model:4", DMHA),
    Row("dmha on v5e:16x16", "v5e:16x16", "context:64,model:4", IN_TEXT_ORDER),
    Row("s2-hybrid on v5p:8x8x8", "v5p:8x8x8", "context:128,model:4", HYBRID),
    Row("s2-hybrid on v5e:16x16", "v5e:16x16", "context:64,model:4", HYBRID),
)


def plan_row(row: Row) -> dict[str, Any]:
    """The report of one row, or why there is none."""
    from launch.plan import resolve, table
    from launch.plan_report import CompilerError, plan

    try:
        report = plan(resolve(**row.flags))
    except CompilerError as error:
        return {"command": row.command, "error": str(error)}
    print(table(report), flush=True)
    content = report.to_json()
    del content["settings"]
    return {"command": row.command, "attention": row.attention} | content


def table_of(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: what a chip holds, computes, sends and waits for."""
    lines = [
        "| job | bytes a chip | on its host | model FLOPs | sent by a chip | step | of peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | | | |")
            continue
        memory, time = row["bytes_per_device"], row["time"]
        sent = sum(c["wire_bytes"] for c in row.get("collectives", ()))
        lines.append(
            f"| {name} | {memory['peak'] / 2**30:.2f} of {memory['hbm'] / 2**30:.2f} GiB | "
            f"{memory['host'] / 2**30:.2f} GiB | {row['flops']['model']:.3g} | "
            f"{sent / 2**30:.1f} GiB | "
            + ("| |" if time is None else f"{time['step']:.1f} s | {time['mfu']:.0%} |")
        )
    return "\n".join(lines)


def read() -> dict[str, Any]:
    """What the file holds."""
    return json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {"rows": {}}


def main() -> int:
    """Runs the command; returns the exit code: 3 when a row does not fit."""
    import jax

    given = absl_flags.FLAGS
    rows = [row for row in ROWS if given.only in row.name]
    if given.list:
        print("\n".join(row.command for row in rows))
        return 0
    if given.table:
        print(table_of(read()["rows"]))
        return 0
    jax.config.update("jax_platforms", "cpu")
    fits = True
    for row in rows:
        content = plan_row(row)
        fits = fits and bool(content.get("fits"))
        held = read()
        found = held["rows"] | {row.name: content}
        held["rows"] = {r.name: found[r.name] for r in ROWS if r.name in found}
        held["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
        held["provenance"] = flags.provenance()
        flags.write_json(OUT, held)
    return 0 if fits else 3


if __name__ == "__main__":
    flags.define_common()
    absl_flags.DEFINE_string("only", "", "Only rows whose name holds this text.")
    absl_flags.DEFINE_bool("list", False, "Print the commands of the rows.")
    absl_flags.DEFINE_bool("table", False, "Print the table of the file and stop.")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    flags.run(main)
