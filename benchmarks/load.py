"""Seconds and peak memory to load a 500 MB model, against transformers.

    python -m benchmarks.load        # about two minutes on two cores; writes benchmarks/load.json

The model has the shape of GPT-2 small (124,439,808 parameters) in float32. Every measurement is a
process of its own: import, note the peak memory so far, load, note the seconds, then read every
parameter once (a loader may leave them in the file until then) and note seconds and peak again.
The file is in the page cache. Peak memory is the process's largest resident set (`ru_maxrss`),
mapped pages of the file included; the aim is below 1.2 times the weights' bytes.

transformers leaves the parameters in the mapped file; jaxheads copies them into memory of its own
(stacked over layers, and safe from later changes of the file), so its time is mostly the time the
machine takes to hand out 500 MB of fresh pages, which on a virtual machine varies tenfold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

# The parent imports nothing large: a process inherits its parent's peak when it starts.
LOADERS = ("jaxheads", "transformers")
AIM = 1.2


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make(directory: str, num_layers: int) -> None:
    """Write the random model."""
    import dataclasses

    import jax
    import numpy as np
    from flax import nnx

    from jaxheads.checkpoints import save
    from jaxheads.models import PRESETS, Decoder

    cfg = dataclasses.replace(PRESETS["gpt2-small"](), num_layers=num_layers)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))
    draw = lambda x: jax.device_put(rng.standard_normal(x.shape, np.float32) / 50)
    save(jax.tree.map(draw, shapes), directory)


def measure(loader: str, directory: str) -> dict[str, float]:
    """Load in this process; a dictionary of seconds and bytes."""
    if loader == "jaxheads":
        import jax

        from jaxheads.checkpoints import load

        jax.devices()
        start = lambda: jax.block_until_ready(load(directory))
        use = lambda model: [jax.block_until_ready(x.sum()) for x in jax.tree.leaves(model)]
    else:
        import torch
        from transformers import GPT2LMHeadModel

        torch.set_grad_enabled(False)
        start = lambda: GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32)
        use = lambda model: [float(p.sum()) for p in model.parameters()]
    imported = _peak_bytes()
    begin = time.perf_counter()
    model = start()
    loaded = time.perf_counter()
    peak = _peak_bytes()
    use(model)
    used = time.perf_counter()
    return {
        "seconds_load": loaded - begin,
        "seconds_load_and_read": used - begin,
        "bytes_imported": imported,
        "bytes_peak_load": peak,
        "bytes_peak": _peak_bytes(),
    }


def _child(*args: str) -> str:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    env.pop("XLA_FLAGS", None)
    command = [sys.executable, "-m", "benchmarks.load", *args]
    return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


def _machine() -> dict[str, object]:
    names = ("jax", "flax", "numpy", "safetensors", "torch", "transformers")
    return {
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "load_average_1_minute": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in names},
    }


def compare(num_layers: int, repeats: int) -> dict[str, object]:
    """The report: medians of `repeats` processes per loader, taken in turn."""
    with tempfile.TemporaryDirectory() as directory:
        _child("--make", directory, "--layers", str(num_layers))
        file = Path(directory) / "model.safetensors"
        weights = file.stat().st_size
        with open(file, "rb") as stream:  # into the page cache
            while stream.read(1 << 20):
                pass
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
        for _ in range(repeats):
            for name in LOADERS:
                runs[name].append(json.loads(_child("--measure", name, directory).splitlines()[-1]))
    report: dict[str, object] = {
        "command": f"python -m benchmarks.load --layers {num_layers} --repeats {repeats}",
        "machine": _machine(),
        "weights_bytes": weights,
        "runs": runs,
    }
    medians = {}
    for name, results in runs.items():
        m = {key: statistics.median(r[key] for r in results) for key in results[0]}
        m["seconds_load_fastest"] = min(r["seconds_load"] for r in results)
        m["peak_over_weights"] = m["bytes_peak"] / weights
        m["peak_without_imports_over_weights"] = (m["bytes_peak"] - m["bytes_imported"]) / weights
        medians[name] = m
    ours, theirs = (medians[name] for name in LOADERS)
    report["medians"] = medians
    report["jaxheads_over_transformers"] = {
        key: ours[key] / theirs[key]
        for key in ("seconds_load", "seconds_load_and_read", "bytes_peak")
    }
    report["aim_peak_over_weights"] = AIM
    report["aim_met_without_imports"] = ours["peak_without_imports_over_weights"] < AIM
    report["aim_met_with_imports"] = ours["peak_over_weights"] < AIM
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="layers of the model")
    parser.add_argument("--repeats", type=int, default=5, help="processes per loader")
    parser.add_argument("--output", default=str(Path(__file__).with_suffix(".json")))
    parser.add_argument("--make", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, metavar=("LOADER", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.make, args.layers)
    elif args.measure:
        print(json.dumps(measure(*args.measure)))
    else:
        report = compare(args.layers, args.repeats)
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps({k: v for k, v in report.items() if k != "runs"}, indent=2))


if __name__ == "__main__":
    main()
