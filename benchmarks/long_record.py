"""Peak memory of recording what every head attends to over a long text.

    python -m benchmarks.long_record    # minutes on two cores; writes benchmarks/long_record.json

A random two-layer Llama-style decoder (4 query heads, 2 key/value heads of width 32) reads one text
of each length, and keeps for every query of every head: the entropy of its attention, the three
keys it attends to most, and its attention to the first four tokens; and the norm of every head's
output. One layer's attention maps at 32,768 tokens would take 16 GiB. Every length is a process of
its own, which also checks some rows against a float64 computation from the recorded queries and
keys. Peak memory is the process's largest resident set (`ru_maxrss`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

QUERIES_CHECKED = 5


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summarise(pattern, keys):
    """Everything that is kept of rows [B,H,t,S]."""
    from jaxheads import reductions

    top = reductions.top_k(3)(pattern)
    return {
        "entropy": reductions.entropy(pattern),
        "top": top.positions,
        "first": reductions.mass(keys)(pattern),
    }


def measure(length: int) -> dict[str, float]:
    """Record at one length in this process: seconds, bytes, and the largest error of the check."""
    import jax
    import numpy as np
    from flax import nnx

    from jaxheads import reductions
    from jaxheads.models import Decoder, ModelConfig, forward
    from jaxheads.taps import record

    cfg = ModelConfig(
        vocab_size=256, num_layers=2, model_dim=128, num_heads=4, num_kv_heads=2, mlp_dim=512
    )
    model = Decoder(cfg, rngs=nnx.Rngs(0))
    rows = reductions.Reduction(summarise, np.arange(4), by_row=True)
    fwd = record(record(forward, "pattern", reduce=rows), "z", reduce=reductions.norm)
    fwd = record(fwd, "q_rot", "k_rot")
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, length))
    seen = jax.jit(lambda fwd, model, tokens: fwd(model, tokens).seen)
    start = time.perf_counter()
    compiled = seen.lower(fwd, model, tokens).compile()
    compile_seconds = time.perf_counter() - start
    before = _peak_bytes()
    start = time.perf_counter()
    out = jax.block_until_ready(compiled(fwd, model, tokens))
    seconds = time.perf_counter() - start
    peak = _peak_bytes()

    worst = 0.0
    for t in np.random.default_rng(1).integers(0, length, QUERIES_CHECKED):
        q = np.asarray(out["q_rot"][:, 0, t], np.float64).reshape(2, 2, 2, 32)
        k = np.asarray(out["k_rot"][:, 0, : t + 1], np.float64)
        scores = np.einsum("lkgd,lskd->lkgs", q, k).reshape(2, 4, -1) / 32**0.5
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        kept = jax.tree.map(lambda x, t=t: np.asarray(x[:, 0, :, t]), out["pattern"])
        worst = max(
            worst,
            np.abs(kept["entropy"] + (p * np.log(p)).sum(-1)).max(),
            np.abs(kept["first"] - p[..., :4].sum(-1)).max(),
            np.abs(p.max(-1) - np.take_along_axis(p, kept["top"][..., :1], -1)[..., 0]).max(),
        )
    return {
        "length": length,
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "bytes_peak_before_the_run": before,
        "bytes_peak": peak,
        "bytes_temporary_compiled": compiled.memory_analysis().temp_size_in_bytes,
        "bytes_one_map_of_a_layer": 4 * cfg.num_heads * length**2,
        "largest_error_of_sampled_rows": float(worst),
    }


def _machine() -> dict[str, object]:
    from importlib import metadata

    return {
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "load_average_1_minute": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("jax", "flax", "numpy")},
    }


def _child(length: int) -> dict[str, float]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)
    command = [sys.executable, "-m", "benchmarks.long_record", "--measure", str(length)]
    out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="8192,16384,32768")
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".json")))
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    report = {
        "command": f"python -m benchmarks.long_record --lengths {args.lengths}",
        "machine": _machine(),
        "runs": [_child(int(length)) for length in args.lengths.split(",")],
    }
    Path(args.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for run in report["runs"]:
        print(
            f"{run['length']} tokens: {run['seconds']:.1f} s, peak {run['bytes_peak'] / 2**20:.0f} "
            f"MiB, one layer's maps would be {run['bytes_one_map_of_a_layer'] / 2**20:.0f} MiB, "
            f"error {run['largest_error_of_sampled_rows']:.1e}"
        )


if __name__ == "__main__":
    main()
