"""Every preset on slices of TPU v5e, v5p, v6e and tpu7x, up to 4,096 chips, planned ahead of time.

    nice python -m benchmarks.pod_presets                       # all rows, one after another
    nice python -m benchmarks.pod_presets --only=llama3.1-70b   # rows whose name holds the text
    python -m benchmarks.pod_presets --list

Writes benchmarks/pod_presets.json: the report of `launch.plan` of every row, without settings.
A row takes half a minute to a few minutes on two cores; rows already in the file are planned again.
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


class Row(NamedTuple):
    """One plan."""

    model: str
    topology: str
    mesh: str
    seq_len: int
    batch_size: int
    remat: str = "full"
    job: str = "train"

    @property
    def name(self) -> str:
        """What the row is called in the file."""
        return f"{self.job} {self.model} {self.topology} {self.mesh}"


ROWS = (
    Row("gpt2-small", "v5e:2x2", "data:4", 1024, 64, "none"),
    Row("gpt2-small", "v6e:4x4", "data:16", 1024, 512, "none"),
    Row("pythia-6.9b", "v5e:4x8", "fsdp:32", 2048, 64),
    Row("pythia-6.9b", "v6e:4x4", "fsdp:16", 2048, 64),
    Row("qwen3-8b", "v5e:8x8", "fsdp:64", 4096, 64),
    Row("qwen3-8b", "tpu7x:2x2x4", "fsdp:32", 8192, 64),
    Row("llama3.1-8b", "v5e:4x4", "fsdp:16", 4096, 16),
    Row("llama3.1-8b", "v5p:8x8x8", "fsdp:64,model:8", 8192, 512, "none"),
    Row("llama3.1-8b", "v5p:8x8x8", "fsdp:64,model:8", 8192, 512),
    Row("llama3.1-8b", "v5p:8x8x8", "fsdp:512", 8192, 512),
    Row("llama3.1-8b", "v6e:16x16", "fsdp:256", 8192, 256),
    Row("gemma3-27b", "v5p:4x4x4", "fsdp:64", 8192, 64),
    Row("gemma3-27b", "v6e:16x16", "fsdp:256", 8192, 256),
    Row("llama3.1-70b", "v5p:4x8x8", "fsdp:64,model:4", 8192, 256),
    Row("llama3.1-70b", "tpu7x:8x8x8", "fsdp:256,model:4", 8192, 1024),
    Row("llama3.1-70b", "v5p:16x16x16", "data:8,fsdp:128,model:4", 8192, 2048),
    Row("llama3.1-8b", "v6e:2x2", "model:4", 8192, 8, "none", "prefill"),
    Row("llama3.1-8b", "v6e:2x2", "model:4", 8192, 8, "none", "decode"),
    Row("llama3.1-70b", "v6e:2x4", "model:8", 8192, 16, "none", "decode"),
)


def plan_row(row: Row) -> dict:
    """The report of one row, or why there is none."""
    from launch.plan import resolve
    from launch.plan_report import CompilerError, plan

    request = resolve(
        topology=row.topology,
        model=row.model,
        mesh=row.mesh,
        job=row.job,
        remat=row.remat,
        sizes={"seq_len": row.seq_len, "batch_size": row.batch_size},
    )
    try:
        report = plan(request)
    except CompilerError as error:
        return {"error": str(error)}
    content = report.to_json()
    del content["settings"]
    return content


def describe(name: str, content: dict) -> str:
    """A line of the table."""
    if "error" in content:
        return f"{name:<64} {content['error']}"
    memory, times = content["bytes_per_device"], content["time"]
    speed = "" if times is None else f"{times['step']:8.3f} s {times['mfu']:6.1%}"
    return (
        f"{name:<64} {memory['peak'] / 2**30:7.2f} of {memory['hbm'] / 2**30:6.2f} GiB "
        f"{'fits' if content['fits'] else 'NO':>4} {speed} ({content['compile_seconds']:.0f} s)"
    )


def main() -> int:
    """Runs the command; returns the exit code."""
    import jax

    given = absl_flags.FLAGS
    rows = [row for row in ROWS if given.only in row.name]
    if given.list:
        print("\n".join(row.name for row in rows))
        return 0
    jax.config.update("jax_platforms", "cpu")
    held: dict[str, Any] = (
        json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {"rows": {}}
    )
    for row in rows:
        content = plan_row(row)
        print(describe(row.name, content), flush=True)
        held["rows"][row.name] = content
        held["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
        held["provenance"] = flags.provenance()
        flags.write_json(OUT, held)
    return 0


if __name__ == "__main__":
    flags.define_common()
    absl_flags.DEFINE_string("only", "", "Only rows whose name holds this text.")
    absl_flags.DEFINE_bool("list", False, "Print the names of the rows.")
    flags.run(main)
