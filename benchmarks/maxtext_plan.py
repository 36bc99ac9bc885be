"""MaxText's train step compiled for a TPU slice by MaxText's own ahead-of-time tool.

Runs in an environment of its own, because MaxText pins other versions than ours:

    python3.12 -m venv env && env/bin/pip install maxtext==0.2.5 <what it imports> libtpu==0.0.52
    cd env/lib/python3.12/site-packages          # its configuration files are found from here
    PYTHONPATH=<this repository> TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python \
        <this repository>/benchmarks/maxtext_plan.py --topology=v5e-16 --seq_len=4096 \
        --name=llama3.1-8b/v5e:4x4/fsdp:16/B16/T4096

Per-device batch 1, full rematerialisation, bfloat16 compute, float32 AdamW state and MaxText's
defaults for everything else. Adds a row to benchmarks/pod_plans.json under `maxtext`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Compile and write the row."""
    flags = argparse.ArgumentParser()
    flags.add_argument("--topology", required=True, help="as MaxText names it: v5e-16")
    flags.add_argument("--seq_len", type=int, required=True)
    flags.add_argument("--name", required=True, help="the row of pod_plans.json it belongs to")
    flags.add_argument("--model", default="llama3.1-8b")
    flags.add_argument("--out", default=str(Path(__file__).with_name("pod_plans.json")))
    flags.add_argument("settings", nargs="*", help="more of MaxText's name=value")
    given = flags.parse_args()

    from absl import app
    from maxtext.trainers.pre_train import train_compile

    from jaxheads.parallel.program import analyze

    compile_step = train_compile.jit_and_compile

    def measured(*args, **kwargs):
        compiled = compile_step(*args, **kwargs)
        memory, summary = compiled.memory_analysis(), analyze(compiled.as_text())
        counts: dict[str, float] = {}
        for collective in summary.collectives:
            counts[collective.kind] = counts.get(collective.kind, 0) + collective.count
        row = {
            "maxtext": "0.2.5",
            "topology": given.topology,
            "seq_len": given.seq_len,
            "settings": given.settings,
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "estimated_cycles": summary.cycles,
            "kernels": sum(k.count for k in summary.kernels),
            "collectives": counts,
        }
        path = Path(given.out)
        content = {"jaxheads": {}, "maxtext": {}}
        if path.exists():
            content = json.loads(path.read_text())
        content["maxtext"][given.name] = row
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(row)
        return compiled

    train_compile.jit_and_compile = measured
    settings = {
        "compile_topology": given.topology,
        "compile_topology_num_slices": 1,
        "model_name": given.model,
        "max_target_length": given.seq_len,
        "per_device_batch_size": 1,
        "remat_policy": "full",
        "attention": "flash",
        "dataset_type": "synthetic",
        "enable_checkpointing": "false",
        "skip_jax_distributed_system": "true",
        "run_name": "plan",
        "base_output_directory": tempfile.mkdtemp(prefix="maxtext-"),
    }
    options = [f"{k}={v}" for k, v in settings.items()]
    app.run(
        train_compile.main, [sys.argv[0], "maxtext/configs/base.yml", *options, *given.settings]
    )


if __name__ == "__main__":
    main()
