r"""Patching every head of GPT-2 small: seconds and results against TransformerLens.

    JAX_PLATFORMS=cpu python -m benchmarks.sweep_vs_transformerlens \
        --peer_python /path/to/venv/bin/python

writes benchmarks/sweep_vs_transformerlens.json; about four minutes on two idle cores. The peer's
interpreter belongs to a virtual environment of its own with `torch` and `transformer-lens`.

One random model with the shape of GPT-2 small (12 layers x 12 heads), saved once and loaded by
both; 8 prompts x 16 tokens and as many donor prompts of random tokens; z of one head at a time
takes the donor's values at every position, and the logit difference at the last token is averaged
over the prompts. Both sides are processes with two threads that stay alive and take turns, so
that a noisy machine meets both; seconds are medians. TransformerLens runs its usual loop: one
hooked forward a head. Our seconds include recording both runs; compiling is reported apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np

TOLERANCE, AIM = 1e-4, {"cpu": 3.0, "gpu": 20.0}


def make(directory: Path, num_layers: int, batch: int, length: int) -> None:
    """Write the random model and the prompts."""
    from flax import nnx

    from jaxheads import parallel
    from jaxheads.checkpoints import save
    from jaxheads.models import PRESETS, Decoder

    cfg = dataclasses.replace(PRESETS["gpt2-small"](), num_layers=num_layers)
    rng = np.random.default_rng(0)
    save(parallel.initialize(lambda: Decoder(cfg, rngs=nnx.Rngs(0))), directory)
    ids = lambda *shape: rng.integers(0, cfg.vocab_size, shape)
    np.savez(
        directory / "prompts.npz",
        tokens=ids(batch, length),
        donor=ids(batch, length),
        answer=ids(batch),
        wrong=ids(batch),
    )


def ours(directory: Path, mesh: str, batch_size: int | None):
    """A function that sweeps once and returns (seconds, scores), and the seconds to compile."""
    import jax

    from jaxheads import forward, load, parallel
    from jaxheads.discovery import logit_difference, sweep_heads

    model = load(directory)
    held = np.load(directory / "prompts.npz", allow_pickle=False)
    prompts = {name: held[name].astype(np.int32) for name in held.files}
    metric = logit_difference(prompts["answer"], prompts["wrong"])
    if mesh:
        jax.set_mesh(parallel.make_mesh(mesh))
        model = parallel.shard(model, jax.sharding.get_mesh())

    def run() -> tuple[float, np.ndarray]:
        begin = time.perf_counter()
        scores = sweep_heads(
            forward,
            model,
            prompts["tokens"],
            edit="patch",
            donor=prompts["donor"],
            metric=metric,
            batch_size=batch_size,
            progress=False,
        )
        scores = np.asarray(scores)
        return time.perf_counter() - begin, scores

    first, _ = run()
    second, _ = run()
    return run, first - second


class Peer:
    """TransformerLens in its own process and environment."""

    def __init__(self, python: str, directory: Path, threads: int, device: str):
        script = Path(__file__).with_name("sweep_peer.py")
        command = [python, str(script), str(directory), str(threads), device]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"the peer process ended with code {self._process.wait()}.")
        return json.loads(line)

    def run(self, file: Path) -> tuple[float, np.ndarray]:
        """(seconds, scores) of one sweep."""
        self._process.stdin.write(f"run {file}\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        seconds = self._answer()["seconds"]
        return seconds, np.load(file, allow_pickle=False)

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()


def on_simulated_devices(directory: Path, batch_size: int | None, count: int = 8) -> dict:
    """The same sweep in a process that sees `count` simulated devices."""
    flags = f"--xla_force_host_platform_device_count={count}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.sweep_vs_transformerlens"]
    command += ["--sharded", str(directory), "--mesh", f"data:{count}"]
    command += [] if batch_size is None else ["--batch_size", str(batch_size)]
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace) -> dict[str, object]:
    """The report."""
    import jax

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make(directory, args.layers, args.prompts, args.length)
        run, compile_seconds = ours(directory, "", args.batch_size)
        kind = jax.default_backend()
        device = "cuda" if kind == "gpu" else "cpu"
        peers = [Peer(p, directory, args.threads, device) for p in args.peer_python]
        taken: list[list[float]] = [[] for _ in range(1 + len(peers))]
        results: list[np.ndarray] = []
        for _ in range(args.repeats):
            results = []
            for n, one in enumerate([run, *(p.run for p in peers)]):
                seconds, scores = one() if n == 0 else one(directory / f"{n}.npy")
                taken[n].append(seconds)
                results.append(scores)
        for peer in peers:
            peer.close()
        sharded = on_simulated_devices(directory, args.batch_size) if kind == "cpu" else None
    medians = [statistics.median(t) for t in taken]
    report: dict[str, object] = {
        "command": "python -m benchmarks.sweep_vs_transformerlens " + " ".join(sys.argv[1:]),
        "machine": _machine(kind),
        "model": f"GPT-2 small shape, {args.layers} layers x 12 heads, random float32 weights",
        "prompts": [args.prompts, args.length],
        "score_spread": float(results[0].std()),
        "jaxheads": {
            "seconds": taken[0],
            "median": medians[0],
            "seconds_a_head": medians[0] / results[0].size,
            "compile_seconds": compile_seconds,
        },
        "peers": [
            {
                **peer.about,
                "seconds": taken[n],
                "median": medians[n],
                "seconds_a_head": medians[n] / results[n].size,
                "largest_difference": float(np.abs(results[n] - results[0]).max()),
                "is_equal": bool(np.abs(results[n] - results[0]).max() <= TOLERANCE),
                "times_faster": medians[n] / medians[0],
                "aim_met": medians[n] / medians[0] >= AIM[kind],
            }
            for n, peer in enumerate(peers, 1)
        ],
        "aim_times_faster": AIM[kind],
    }
    if sharded is not None:
        scores = np.asarray(sharded.pop("scores"), np.float32)
        gap = float(np.abs(scores - results[0]).max())
        report["eight_simulated_devices"] = {**sharded, "largest_difference": gap}
    return report


def _machine(kind: str) -> dict[str, object]:
    import jax

    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "load_average_1_minute": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {n: metadata.version(n) for n in ("jax", "jaxlib", "flax", "numpy")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--peer_python",
        action="append",
        default=[],
        help="interpreter of an environment with transformer-lens; may be repeated",
    )
    parser.add_argument("--repeats", type=int, default=3, help="sweeps a side, taken in turn")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--threads", type=int, default=2, help="of the peer; ours uses all cores")
    parser.add_argument("--batch_size", type=int, default=None, help="heads at once")
    parser.add_argument("--output", default=str(Path(__file__).with_suffix(".json")))
    parser.add_argument("--sharded", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--mesh", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sharded:
        run, compile_seconds = ours(Path(args.sharded), args.mesh, args.batch_size)
        seconds, scores = run()
        row = {"mesh": args.mesh, "seconds": seconds, "compile_seconds": compile_seconds}
        print(json.dumps({**row, "scores": scores.tolist()}))
        return
    report = compare(args)
    Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
