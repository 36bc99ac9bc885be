"""Time and memory of S2 attention, blocked attention and DMHA against what else computes them.

    python -m benchmarks.attention                    # everything this machine can run
    python -m benchmarks.attention --parts=cpu        # timings here, about ten minutes on two cores
    python -m benchmarks.attention --parts=tpu,dmha   # compiled only: needs libtpu, no TPU
    python -m benchmarks.attention --parts=gpu        # on an NVIDIA GPU; skipped without one
    python -m benchmarks.attention --table            # print the tables of the JSON and stop

cpu   forward, and forward with all gradients, in float32: vanilla attention (scores in memory),
      `jax.nn.dot_product_attention`, our blocked dense causal attention, S2 blocked, and torch's
      scaled_dot_product_attention on as many threads. Contenders take turns, so that a busy machine
      slows all alike; processor seconds are beside wall seconds for the same reason.
dmha  the longest sequence that fits a device's memory, by the compiler's own account: vanilla on
      one device against distributed attention over four; and how evenly zigzag spreads the work.
tpu   the kernels compiled for v5e, v5p and v6e, with their analytic cost, beside splash dense.
gpu   the S2 kernel against cuDNN's and torch's FlashAttention in bfloat16.

Writes benchmarks/attention.json and benchmarks/attention.png. The ideal speed-up is the ratio of
visible tiles. Aims stand beside what was measured; nothing is tuned to meet them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

_PARTS = flags.DEFINE_list("parts", ["cpu", "dmha", "tpu", "gpu"], "What to measure.")
_LENGTHS = flags.DEFINE_list("lengths", [str(2**n) for n in range(10, 18)], "T, for cpu.")
_REPS = flags.DEFINE_integer("reps", 3, "Timed runs of each contender and length.")
_LIMIT = flags.DEFINE_float("limit", 15.0, "Seconds of one run beyond which a contender stops.")
_BUDGET = flags.DEFINE_float("budget", 16e9, "Bytes of a device, for dmha.")
_TABLE = flags.DEFINE_bool("table", False, "Print the tables of the JSON and stop.")
_OUT = flags.DEFINE_string("out", str(Path(__file__).with_suffix(".json")), "Where to write.")

HEADS, HEAD_DIM = 16, 64
BLOCK, LOCAL, STRIDE = 64, 4, 16
SCORES_BYTES = 3e8  # the largest [H,T,T] float32 array that a contender may keep
THREADS = 2
CALLS = 8  # of a GPU kernel between two waits


class Contender(NamedTuple):
    """A way to compute causal attention."""

    run: Callable
    keeps_scores: bool = False


def _patterns(num_heads: int, strides: tuple[int, ...], block: int, local: int):
    from jaxheads.attention.s2 import ShardPattern

    return {v: ShardPattern(block, local, v, num_heads=num_heads) for v in strides}


def vanilla(q, k, v):
    """Causal attention with all scores in memory."""
    import jax
    import jax.numpy as jnp

    scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tri(q.shape[1], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v)


def jax_contenders() -> dict[str, Contender]:
    """(q, k, v) [B,T,H,D] -> z, causal."""
    import jax

    from jaxheads.attention.api import attention
    from jaxheads.attention.s2 import s2_attention

    pattern = _patterns(HEADS, (STRIDE,), BLOCK, LOCAL)[STRIDE]
    return {
        "vanilla": Contender(vanilla, keeps_scores=True),
        "jax.nn xla": Contender(
            functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla"),
            keeps_scores=True,
        ),
        "blocked dense": Contender(functools.partial(attention, implementation="blocked")),
        "S2 blocked": Contender(functools.partial(s2_attention, pattern=pattern, impl="blocked")),
    }


def jax_program(run: Callable, length: int, with_grads: bool) -> tuple[Callable[[], Any], int]:
    """(a function that runs it once on random arrays, its temporary bytes)."""
    import jax

    shape = (1, length, HEADS, HEAD_DIM)
    count = 4 if with_grads else 3
    if with_grads:
        loss = lambda q, k, v, dz: (run(q, k, v) * dz).sum()
        program = jax.value_and_grad(loss, argnums=(0, 1, 2))
    else:
        program = run
    compiled = jax.jit(program).lower(*[jax.ShapeDtypeStruct(shape, "float32")] * count).compile()

    @functools.cache
    def arrays() -> list[Any]:
        return [jax.random.normal(jax.random.key(n), shape) for n in range(count)]

    memory = compiled.memory_analysis().temp_size_in_bytes
    return lambda: jax.block_until_ready(compiled(*arrays())), memory


def torch_program(length: int, with_grads: bool) -> Callable[[], Any]:
    """The same in torch: its fused CPU attention."""
    import torch

    torch.set_num_threads(THREADS)
    attend = torch.nn.functional.scaled_dot_product_attention
    q, k, v, dz = (torch.randn(1, HEADS, length, HEAD_DIM) for _ in range(4))

    def forward():
        with torch.no_grad():
            attend(q, k, v, is_causal=True)

    def both():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.autograd.grad((attend(*inputs, is_causal=True) * dz).sum(), inputs)

    return both if with_grads else forward


def timed(runs: Mapping[str, Callable[[], Any]], reps: int) -> dict[str, dict[str, Any]]:
    """Wall and processor seconds of `reps` runs of each, in turn, after one that warms up."""
    results: dict[str, dict[str, Any]] = {name: {"seconds": [], "cpu": []} for name in runs}
    for rep in range(reps + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if rep:
                results[name]["seconds"].append(round(time.perf_counter() - wall, 4))
                results[name]["cpu"].append(round(time.process_time() - cpu, 4))
    for row in results.values():
        row["median_seconds"] = statistics.median(row["seconds"])
        row["median_cpu_seconds"] = statistics.median(row.pop("cpu"))
    return results


def measure_cpu(
    lengths: list[int],
    reps: int,
    limit: float,
    save: Callable[[dict[str, Any]], None],
    before: list[dict[str, Any]],
) -> dict[str, Any]:
    """Temporary bytes of every contender at every length, and seconds of those it can run.

    Rows of other lengths in `before` stay: a shared machine may be free for one length at a time.
    """
    pattern = _patterns(HEADS, (STRIDE,), BLOCK, LOCAL)[STRIDE]
    contenders = jax_contenders()
    rows = [row for row in before if row["length"] not in lengths]
    all_lengths = sorted({*lengths, *(row["length"] for row in rows)})
    ideal = {n: round(pattern.ideal_speedup(pattern.num_blocks(n)), 3) for n in all_lengths}
    shape = {"heads": HEADS, "head_dim": HEAD_DIM, "batch": 1, "dtype": "float32"}
    content: dict[str, Any] = {
        "shape": shape | {"block": BLOCK, "local": LOCAL, "stride": STRIDE},
        "threads": THREADS,
        "ideal": ideal,
        "rows": rows,
    }
    expected: dict[tuple[str, bool], float] = {}
    for length in lengths:
        for with_grads in (False, True):
            programs, memory = {}, {}
            for name in (*contenders, "torch sdpa"):
                is_quick = expected.get((name, with_grads), 0.0) <= limit
                contender = contenders.get(name)
                if contender is None:
                    if is_quick:
                        programs[name] = torch_program(length, with_grads)
                    continue
                run, memory[name] = jax_program(contender.run, length, with_grads)
                fits = not contender.keeps_scores or 4 * HEADS * length**2 <= SCORES_BYTES
                if is_quick and fits:
                    programs[name] = run
            results = timed(programs, reps)
            for name in dict.fromkeys((*memory, *results)):
                row = results.get(name, {"median_seconds": None})
                if row["median_seconds"] is not None:
                    growth = 3.5 if name == "S2 blocked" else 4.0  # with twice the tokens
                    expected[name, with_grads] = growth * row["median_seconds"]
                found = {
                    "length": length,
                    "pass": "forward+backward" if with_grads else "forward",
                    "contender": name,
                    "temporary_bytes": memory.get(name),
                    "load_average_1_minute": round(os.getloadavg()[0], 1),
                    "reps": reps,
                    **row,
                }
                rows.append(found)
                print(length, found["pass"], name, row["median_seconds"], flush=True)
            rows.sort(key=lambda row: (row["length"], row["pass"]))
            content["aims"] = _cpu_aims(rows, ideal)
            save(content)
    return content


def _cpu_aims(rows: list[dict[str, Any]], ideal: Mapping[int, float]) -> list[dict[str, Any]]:
    """What was wanted of S2 blocked, and what it did."""

    def speedup(other: str, length: int, which: str, clock: str) -> float | None:
        found = {
            row["contender"]: row[clock]
            for row in rows
            if (row["length"], row["pass"]) == (length, which) and clock in row
        }
        if found.get(other) is None or found.get("S2 blocked") is None:
            return None
        return found[other] / found["S2 blocked"]

    aims = []
    for which in ("forward", "forward+backward"):
        for clock in ("median_seconds", "median_cpu_seconds"):
            share = speedup("blocked dense", 8192, which, clock)
            ahead = speedup("torch sdpa", 16384, which, clock)
            if share is not None:
                name = f"share of the ideal ratio over blocked dense, T=8k, {which}, {clock}"
                aims.append(_aim(name, share / ideal[8192], 0.5))
            if ahead is not None:
                name = f"times faster than torch sdpa dense, T=16k, {which}, {clock}"
                aims.append(_aim(name, ahead, 3.0))
    return aims


def _aim(name: str, measured: float, wanted: float, *, at_most: bool = False) -> dict[str, Any]:
    met = measured <= wanted if at_most else measured >= wanted
    return {"aim": name, "measured": round(measured, 4), "wanted": wanted, "met": bool(met)}


def longest(total_bytes: Callable[[int], float], budget: float, step: int) -> int:
    """The largest multiple of `step` whose bytes fit the budget (they grow with length)."""
    low, high = 0, 1
    while total_bytes(high * step) <= budget:
        low, high = high, 2 * high
    while high - low > max(1, low // 32):
        middle = (low + high) // 2
        low, high = (middle, high) if total_bytes(middle * step) <= budget else (low, middle)
    return low * step


def measure_dmha(budget: float, devices: int = 4, heads: int = 8) -> dict[str, Any]:
    """Longest sequence with gradients on one device and over several, and the balance of work."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxheads import parallel
    from jaxheads.attention.distributed import distributed_attention
    from jaxheads.attention.layouts import layout_order

    mesh = parallel.make_mesh(f"context:{devices}", devices=jax.devices()[:devices], exact=True)

    def spread(q, k, v):
        return distributed_attention(
            q, k, v, mesh=mesh, schedule="ring", layout="zigzag", causal=True
        )

    def bytes_of(run: Callable, sharding, length: int) -> float:
        x = jax.ShapeDtypeStruct((1, length, heads, HEAD_DIM), jnp.float32, sharding=sharding)
        loss = lambda q, k, v: run(q, k, v).sum()
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
        memory = compiled.memory_analysis()
        return (
            memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        )

    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    split = jax.sharding.NamedSharding(mesh, jax.P(None, "context"))
    step = 2 * devices * 128
    on_one = longest(functools.partial(bytes_of, vanilla, one), budget, 128)
    on_all = longest(functools.partial(bytes_of, spread, split), budget, step)
    length = 1 << 16
    work = {}
    for layout in ("contiguous", "zigzag", "striped"):
        order = np.asarray(layout_order(layout, length, devices), np.int64)
        seen = (order + 1).reshape(devices, -1).sum(axis=1)
        work[layout] = float(seen.max() / seen.mean())
    return {
        "devices": devices,
        "shape": {"heads": heads, "head_dim": HEAD_DIM, "batch": 1, "dtype": "float32"},
        "budget_bytes": budget,
        "longest_vanilla_one_device": on_one,
        "longest_distributed": on_all,
        "busiest_over_mean_causal_work": work,
        "aims": [
            _aim("longest sequence over vanilla on one device", on_all / on_one, 40.0),
            _aim("busiest device over the mean, zigzag", work["zigzag"], 1.02, at_most=True),
        ],
    }


TPU_SHAPE = {"heads": 16, "head_dim": 128, "block": 512, "local": 2, "stride": 16}


def measure_tpu(save: Callable[[dict[str, Any]], None], length: int = 32768) -> dict[str, Any]:
    """Kernels compiled for chips that are not here: FLOPs, bytes, seconds at half of peak."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from jaxheads import parallel
    from jaxheads.attention import s2_pallas_tpu, s2_splash
    from jaxheads.attention.api import attention
    from jaxheads.parallel.program import analyze
    from jaxheads.parallel.topology import CHIPS

    heads, stride = TPU_SHAPE["heads"], TPU_SHAPE["stride"]
    pattern = _patterns(heads, (stride,), TPU_SHAPE["block"], TPU_SHAPE["local"])[stride]
    contenders = {
        "splash dense": functools.partial(attention, implementation="splash"),
        "S2 worklist": lambda q, k, v: s2_pallas_tpu.attend(q, k, v, pattern)[0],
        "S2 splash by class": lambda q, k, v: s2_splash.attend(q, k, v, pattern)[0],
    }
    blocks = pattern.num_blocks(length)
    rows: list[dict[str, Any]] = []
    content = {
        "shape": TPU_SHAPE | {"length": length, "batch": 1, "dtype": "bfloat16"},
        "pass": "forward+backward",
        "ideal": round(pattern.ideal_speedup(blocks), 3),
        "steps_of_the_worklist": int(pattern.tiles(blocks).sum()),
        "rows": rows,
    }
    chips = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
    programs = [(chip, name) for chip in chips for name in ("splash dense", "S2 worklist")]
    # Its sixteen kernels are the same on every chip, and slow to make.
    programs.append(("v5e:2x2", "S2 splash by class"))
    for topology, name in programs:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        mesh = parallel.make_mesh("data:1", devices=devices[:1], exact=True)
        sharding = jax.sharding.NamedSharding(mesh, jax.P())
        shape = (1, length, heads, TPU_SHAPE["head_dim"])
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
        run = contenders[name]
        loss = lambda q, k, v, run=run: run(q, k, v).astype(jnp.float32).sum()
        start = time.perf_counter()
        with jax.set_mesh(mesh):
            compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
        seconds = time.perf_counter() - start
        kernels = analyze(compiled.as_text(), dict(mesh.shape)).kernels
        counts: Counter[str] = Counter()
        for kernel in kernels:
            counts[kernel.name] += int(kernel.count)
        flops = sum(k.count * (k.flops or 0.0) * k.visited_share for k in kernels)
        peak = CHIPS[topology.split(":")[0]].peak_flops or math.inf
        rows.append(
            {
                "topology": topology,
                "contender": name,
                "kernels": dict(counts),
                "flops": flops,
                "milliseconds_at_half_of_peak": round(1e3 * flops / (peak / 2), 3),
                "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
                "compile_seconds": round(seconds, 1),
            }
        )
        print(rows[-1], flush=True)
        save(content)
    return content


def measure_gpu(reps: int = 20) -> dict[str, Any]:
    """The S2 kernel against cuDNN's attention, and torch's FlashAttention where torch is there."""
    import jax
    import jax.numpy as jnp

    from jaxheads.attention import s2_pallas_gpu

    heads, head_dim = 16, 128
    patterns = _patterns(heads, (4, 16), 64, 8)
    # 32 classes need 32 heads; with 16 each second class is left out, at the same tiles a head.
    patterns[32] = type(patterns[16])(64, 8, 32, num_heads=heads, allow_incomplete_union=True)
    dense = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    contenders = {"cudnn flash": dense} | {
        f"S2 V={v}": lambda q, k, v_, p=p: s2_pallas_gpu.attend(q, k, v_, p, interpret=False)[0]
        for v, p in patterns.items()
    }
    rows, aims = [], []
    for length in (8192, 32768, 131072):
        keys = jax.random.split(jax.random.key(0), 4)
        arrays = [
            jax.random.normal(key, (1, length, heads, head_dim), jnp.bfloat16) for key in keys
        ]
        for with_grads in (False, True):
            runs: dict[str, Callable[[], Any]] = {}
            for name, run in contenders.items():
                loss = lambda q, k, v, dz, run=run: (run(q, k, v) * dz).sum(dtype=jnp.float32)
                grads = jax.grad(loss, argnums=(0, 1, 2))
                call = grads if with_grads else (lambda q, k, v, dz, run=run: run(q, k, v))
                compiled = jax.jit(call).lower(*arrays).compile()
                runs[name] = functools.partial(_repeat, compiled, arrays)
            if (flash := _torch_flash(length, heads, head_dim, with_grads)) is not None:
                runs["torch flash"] = flash
            which = "forward+backward" if with_grads else "forward"
            results = timed(runs, reps)
            baseline = results["cudnn flash"]["median_seconds"]
            for name, row in results.items():
                found = {
                    "length": length,
                    "pass": which,
                    "contender": name,
                    "milliseconds": round(1e3 * row["median_seconds"] / CALLS, 4),
                    "speedup_over_cudnn": round(baseline / row["median_seconds"], 3),
                }
                if name.startswith("S2"):
                    pattern = patterns[int(name.split("=")[1])]
                    blocks = pattern.num_blocks(length)
                    found["ideal"] = round(pattern.ideal_speedup(blocks), 3)
                    found["share_of_ideal"] = round(found["speedup_over_cudnn"] / found["ideal"], 3)
                    if length > 8192:
                        label = f"{name}: share of the ideal ratio over cuDNN, T={length}, {which}"
                        aims.append(_aim(label, found["share_of_ideal"], 0.75))
                    if length == 131072 and name != "S2 V=4":
                        wanted = 10.0 if name == "S2 V=16" else 25.3
                        label = f"{name}: times faster than cuDNN, T={length}, {which}"
                        aims.append(_aim(label, found["speedup_over_cudnn"], wanted))
                rows.append(found)
                print(found, flush=True)
    return {
        "device": jax.devices()[0].device_kind,
        "shape": {"heads": heads, "head_dim": head_dim, "batch": 1, "dtype": "bfloat16"},
        "rows": rows,
        "aims": aims,
    }


def _repeat(compiled: Callable, arrays: list) -> None:
    """`CALLS` calls and one wait, so that launching is not what is measured."""
    import jax

    jax.block_until_ready([compiled(*arrays) for _ in range(CALLS)][-1])


def _torch_flash(length: int, heads: int, head_dim: int, with_grads: bool):
    """`CALLS` runs of torch's FlashAttention, or None without torch or its CUDA."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    attend = torch.nn.functional.scaled_dot_product_attention
    q, k, v, dz = (
        torch.randn(1, heads, length, head_dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(4)
    )
    inputs = [x.detach().requires_grad_(with_grads) for x in (q, k, v)]

    def run():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            for _ in range(CALLS):
                z = attend(*inputs, is_causal=True)
                if with_grads:
                    torch.autograd.grad(z, inputs, dz)
        torch.cuda.synchronize()

    return run


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Forward time, forward and backward time, and temporary bytes over the length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = content["cpu"]["rows"]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    panels = (
        ("forward", "median_seconds", "seconds, forward"),
        ("forward+backward", "median_seconds", "seconds, forward + backward"),
        ("forward+backward", "temporary_bytes", "temporary bytes, forward + backward"),
    )
    for ax, (which, field, label) in zip(axes, panels, strict=True):
        for name in names:
            points = [
                (row["length"], row[field])
                for row in rows
                if (row["contender"], row["pass"]) == (name, which) and row[field]
            ]
            if points:
                ax.loglog(*zip(*points, strict=True), "o-", label=name, markersize=3)
        ax.set_xlabel("tokens")
        ax.set_title(label, fontsize=10)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    fig.savefig(path, dpi=90)
    plt.close(fig)


def tables(content: Mapping[str, Any]) -> str:
    """Markdown of every part in the JSON."""
    lines = []
    if "cpu" in content:
        part = content["cpu"]
        names = list(dict.fromkeys(row["contender"] for row in part["rows"]))
        lines += [
            f"| tokens | pass | {' | '.join(names)} | ideal |",
            "|---" * (len(names) + 3) + "|",
        ]
        cells = {
            (r["length"], r["pass"], r["contender"]): r["median_seconds"] for r in part["rows"]
        }
        for length, which in dict.fromkeys((r["length"], r["pass"]) for r in part["rows"]):
            found = (cells.get((length, which, name)) for name in names)
            texts = ("" if x is None else f"{x:.3f} s" for x in found)
            ideal = {str(n): x for n, x in part["ideal"].items()}[str(length)]
            lines.append(f"| {length} | {which} | {' | '.join(texts)} | {ideal:.2f} |")
    for name in ("tpu", "gpu"):
        for row in content.get(name, {}).get("rows", ()):
            lines.append(f"- {name}: {', '.join(f'{k} {v}' for k, v in row.items())}")
    for name in ("cpu", "dmha", "gpu"):
        for aim in content.get(name, {}).get("aims", ()):
            verdict = "met" if aim["met"] else "NOT met"
            lines.append(f"- {aim['aim']}: {aim['measured']} (aim {aim['wanted']}), {verdict}")
    return "\n".join(lines)


def _machine() -> dict[str, Any]:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = (x for x in info.read_text().splitlines() if x.startswith("model name"))
        cpu = next((x.split(":")[1].strip() for x in names), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform()}


def _versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "libtpu", "torch")
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"python": platform.python_version()}


def main(_: list[str]) -> None:
    """Measure what was asked for and write it down."""
    path = Path(_OUT.value)
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if _TABLE.value:
        print(tables(content))
        return
    lengths = [int(n) for n in _LENGTHS.value]

    arguments = [x for x in sys.argv[1:] if not x.startswith("--out")]

    def save(name: str, part: dict[str, Any]) -> None:
        content[name] = part | {
            "command": " ".join(("python -m benchmarks.attention", *arguments)),
            "machine": _machine(),
            "versions": _versions(),
        }
        path.write_text(json.dumps(content, indent=1) + "\n")

    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "cpu": lambda: measure_cpu(
            lengths,
            _REPS.value,
            _LIMIT.value,
            functools.partial(save, "cpu"),
            content.get("cpu", {}).get("rows", []),
        ),
        "dmha": lambda: measure_dmha(_BUDGET.value),
        "tpu": lambda: measure_tpu(functools.partial(save, "tpu")),
        "gpu": measure_gpu,
    }
    unknown = sorted(set(_PARTS.value) - set(parts))
    if unknown:
        raise app.UsageError(f"--parts={','.join(unknown)}: known parts are {', '.join(parts)}.")
    import jax

    has_gpu = jax.default_backend() == "gpu"
    for name in _PARTS.value:
        if (name == "gpu") != has_gpu:
            print(f"{name}: skipped, the default device is {jax.devices()[0].device_kind}")
            continue
        save(name, parts[name]())
    if "cpu" in content:
        draw(content, path.with_suffix(".png"))
    print(tables(content))


if __name__ == "__main__":
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
        )
    app.run(main)
