"""Every causal row of `attention.VARIANTS` beside dense attention: time, memory, and cost on a TPU.

Beside them `agent` (49 agents over a grid of tokens, bidirectional) and `lama` (pooling to as many
vectors as there are heads): no row of a decoder, so that they do less, or see more, than dense.

    taskset -c 0 python -m benchmarks.variants                 # forward on this CPU, 1k, 4k, 16k
    python -m benchmarks.variants --only=cca,s2 --lengths=4096
    python -m benchmarks.variants --tpu                        # compiled only: needs libtpu, no TPU
    python -m benchmarks.variants --table                      # print the tables of the JSON, stop

On the CPU the variants take turns with dense attention in one run, so that a busy machine slows all
alike; seconds are medians, the ratio is of processor seconds, float32. With --tpu each variant is
compiled for one chip in bfloat16, forward with gradients (without, LongHeads: it is not trained).
Cycles are the compiler's; loops whose length it does not know count so often that the program's
FLOPs are those of the variant's own formula (times 3.5 with gradients), and Pallas kernels count at
half of the chip's peak. A variant whose memory would exceed --limit_gb is left out with the reason.
A new row of the table shows up by itself, with its default options unless `OPTIONS` names others.

Writes benchmarks/variants.json; rows that are not measured again stay.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from launch import flags

OUT = Path(__file__).with_suffix(".json")
OPTIONS = {
    "landmark": "landmark(block=63)",  # a period of 64
    "rcmha": "rcmha(max_distance=131072)",  # the longest sequence measured
    "s2": "s2(allow_incomplete_union=true)",  # fewer heads than its classes
}
"""Variant -> the text that names it with options, where the defaults do not serve."""
NUM_AGENTS = 49
HEADS, HEAD_DIM = {"cpu": 2, "tpu": 8}, {"cpu": 64, "tpu": 128}
TPU, TPU_LENGTHS = "v5e", (32768, 131072)
WITH_GRADS = 3.5  # FLOPs of forward and backward over those of forward
UNTRAINED = ("longheads",)  # compiled for a TPU without gradients: nobody trains with it


def contender(name: str, kind: str, length: int) -> tuple[Callable, tuple[Any, ...], float]:
    """(f(params, q, k, v, x) -> z, the shapes of its arguments, its forward FLOPs)."""
    import jax
    import jax.numpy as jnp

    heads, head_dim = HEADS[kind], HEAD_DIM[kind]
    dtype = jnp.float32 if kind == "cpu" else jnp.bfloat16
    shape = lambda *size: jax.ShapeDtypeStruct((1, length, *size), dtype)
    run, params, flops = BESIDE.get(name, functools.partial(variant, name))(heads, head_dim, length)
    return run, (params, *(shape(heads, head_dim),) * 3, shape(heads * head_dim)), flops


def variant(name: str, heads: int, head_dim: int, length: int) -> tuple[Callable, Any, float]:
    """A row of `VARIANTS`: (function, the shapes of its parameters, its FLOPs)."""
    import jax
    import jax.numpy as jnp

    from jaxheads.attention import (
        VARIANTS,
        AttentionContext,
        Mask,
        RopeConfig,
        inverse_frequencies,
        rotate,
    )
    from jaxheads.models import ModelConfig
    from jaxheads.models.configs import parse_attention

    cfg = ModelConfig(num_heads=heads, head_dim=head_dim, model_dim=heads * head_dim)
    (_, options), row = parse_attention(OPTIONS.get(name, name))[0], VARIANTS[name]
    inv_freq, _ = inverse_frequencies(RopeConfig(), head_dim)
    turn = functools.partial(rotate, inv_freq=jnp.asarray(inv_freq), interleaved=False)
    place = jnp.arange(length)

    def run(params, q, k, v, x):
        ctx = AttentionContext(
            mask=Mask(is_causal=True), q_positions=place, k_positions=place, rotate=turn, x=x,
            layer=jnp.int32(0), options=options,
        )  # fmt: skip
        return row.apply(params, q, k, v, ctx).z

    params = jax.eval_shape(lambda: row.init(jax.random.key(0), cfg, options))
    return run, params, row.cost(cfg, length, length, options=options).flops


def agent(heads: int, head_dim: int, length: int) -> tuple[Callable, Any, float]:
    """Agent attention of an image of `length` tokens, agents pooled from its queries."""
    from jaxheads.attention import agent_attention, pool_agents

    rows = 1 << (length.bit_length() - 1) // 2
    grid = (rows, length // rows)

    def run(params, q, k, v, x):
        return agent_attention(q, k, v, pool_agents(q, grid, NUM_AGENTS))

    return run, {}, 8.0 * heads * NUM_AGENTS * length * head_dim


def lama(heads: int, head_dim: int, length: int) -> tuple[Callable, Any, float]:
    """Low-rank attention pooling of a text of `length` states, P, Q and c given."""
    import jax
    import jax.numpy as jnp

    from jaxheads.attention import attention_pool_flops, low_rank_attention_pool

    dim = heads * head_dim
    factor = jax.ShapeDtypeStruct((dim, heads), jnp.float32)
    params = {"c": jax.ShapeDtypeStruct((dim,), jnp.float32), "P": factor, "Q": factor}

    def run(params, q, k, v, x):
        # The states are made of all three, so that gradients reach each.
        states = (q + k + v).reshape(x.shape)
        return low_rank_attention_pool(states, states, params["c"], params["P"], params["Q"])[0]

    return run, params, float(attention_pool_flops("lama", length, dim, heads))


BESIDE = {"agent": agent, "lama": lama}
"""What is measured too, and is no row of `VARIANTS`."""


def measure_cpu(names: list[str], length: int, reps: int, limit: float) -> dict[str, Any]:
    """Seconds and temporary bytes of each, beside dense in turn."""
    import jax

    rows, runs = {}, {}
    for name in dict.fromkeys(("dense", *names)):
        run, shapes, flops = contender(name, "cpu", length)
        try:
            compiled = jax.jit(run).lower(*shapes).compile()
        except (ValueError, NotImplementedError) as error:
            rows[name] = {"skipped": str(error)}
            continue
        memory = compiled.memory_analysis().temp_size_in_bytes
        rows[name] = {"temporary_bytes": memory, "gigaflops": flops / 1e9}
        if memory > limit:
            rows[name]["skipped"] = f"needs {memory / 1e9:.1f} GB, --limit_gb={limit / 1e9:g}"
            continue
        keys = iter(jax.random.split(jax.random.key(0), 99))
        fill = lambda x, keys=keys: jax.random.normal(next(keys), x.shape, x.dtype)
        runs[name] = functools.partial(compiled, *jax.tree.map(fill, shapes))
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for rep in range(reps + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            if rep:
                spent[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    medians = {name: [statistics.median(x) for x in zip(*all_)] for name, all_ in spent.items()}
    for name, (wall, cpu) in medians.items():
        rows[name]["seconds"], rows[name]["cpu_seconds"] = round(wall, 4), round(cpu, 4)
        if "dense" in medians:
            rows[name]["of_dense"] = round(cpu / medians["dense"][1], 3)
            rows[name]["of_dense_bytes"] = round(
                rows[name]["temporary_bytes"] / max(1, rows["dense"]["temporary_bytes"]), 3
            )
    return rows


def measure_tpu(name: str, length: int) -> dict[str, Any]:
    """Bytes and estimated cycles of forward, and backward where there is one, on one chip."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from jaxheads import parallel
    from jaxheads.parallel.program import analyze, compile_with_text
    from jaxheads.parallel.topology import CHIPS

    chip = CHIPS[TPU]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{TPU}:2x2").devices
    mesh = parallel.make_mesh("data:1", devices=devices[:1], exact=True)
    run, shapes, flops = contender(name, "tpu", length)
    place = lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, jax.P())
    )
    loss = lambda *a: run(*a).astype(jnp.float32).sum()
    program = run if name in UNTRAINED else jax.grad(loss, argnums=(1, 2, 3))
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = jax.jit(program).lower(*jax.tree.map(place, shapes))
        compiled, text = compile_with_text(lowered)
    memory = compiled.memory_analysis()
    once, twice = (analyze(text, unknown_trips=n) for n in (1, 2))
    kernels = sum(k.count * (k.flops or 0.0) * k.visited_share for k in once.kernels)
    wanted = flops if name in UNTRAINED else WITH_GRADS * flops
    trips = 1.0
    if twice.flops > once.flops:
        trips = max(1.0, 1 + (wanted - kernels - once.flops) / (twice.flops - once.flops))
    found = analyze(text, unknown_trips=trips)
    peak, clock = chip.peak_flops or 0.0, chip.clock_hz or 0.0
    cycles = found.cycles + kernels / (peak / 2) * clock
    return {
        "temporary_bytes": memory.temp_size_in_bytes,
        "fits": memory.temp_size_in_bytes + memory.argument_size_in_bytes < (chip.hbm_bytes or 0),
        "gigaflops": wanted / 1e9,
        "estimated_cycles": round(cycles),
        "estimated_milliseconds": round(1e3 * cycles / clock, 2),
        "trips_of_unknown_loops": round(trips, 2),
        "kernels": sorted({k.name for k in once.kernels}),
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def table(content: dict[str, Any]) -> str:
    """Markdown: a line for every variant and length."""
    lines = []
    for kind, columns in (
        ("cpu", ("seconds", "of_dense", "temporary_bytes", "of_dense_bytes", "skipped")),
        ("tpu", ("estimated_milliseconds", "temporary_bytes", "fits", "error")),
    ):
        by_length = content.get(kind, {}).get("rows", {})
        if by_length:
            lines += ["", f"| {kind}: tokens | variant | {' | '.join(columns)} |",
                      "|---" * (len(columns) + 2) + "|"]  # fmt: skip
        for length, rows in sorted(by_length.items(), key=lambda item: int(item[0])):
            for name, row in rows.items():
                cells = " | ".join(str(row.get(column, "")) for column in columns)
                lines.append(f"| {length} | {name} | {cells} |")
    return "\n".join(lines)


def main() -> int:
    """Measures what was asked for and keeps the other rows of the JSON."""
    given = absl_flags.FLAGS
    content = json.loads(OUT.read_text()) if OUT.exists() else {}
    if given.table:
        print(table(content))
        return 0
    import jax

    from jaxheads.attention import VARIANTS

    jax.config.update("jax_platforms", "cpu")
    names = [*(name for name, row in VARIANTS.items() if row.supports.causal), *BESIDE]
    names = [name for name in names if not given.only or name in given.only]
    kind, limit = "tpu" if given.tpu else "cpu", given.limit_gb * 1e9
    lengths = [int(n) for n in given.lengths] or (TPU_LENGTHS if given.tpu else (1024, 4096, 16384))
    part = content.setdefault(kind, {"rows": {}})
    for length in lengths:
        rows = part["rows"].setdefault(str(length), {})
        if kind == "cpu":
            rows.update(measure_cpu(names, length, given.reps, limit))
        else:
            for name in names:
                try:
                    rows[name] = measure_tpu(name, length)
                except (jax.errors.JaxRuntimeError, ValueError) as error:  # what a chip cannot hold
                    rows[name] = {"error": str(error).splitlines()[0][:200]}
                print(length, name, rows[name], flush=True)
        part["shape"] = {"batch": 1, "heads": HEADS[kind], "head_dim": HEAD_DIM[kind]}
        part["machine"] = {"system": platform.platform(), "cores": len(os.sched_getaffinity(0))}
        part["load_average"] = round(os.getloadavg()[0], 1)
        part["provenance"] = flags.provenance()
        flags.write_json(OUT, content)
    print(table(content))
    return 0


if __name__ == "__main__":
    flags.define_common()
    absl_flags.DEFINE_list("only", [], "What to measure; everything by default.")
    absl_flags.DEFINE_list("lengths", [], "Tokens.")
    absl_flags.DEFINE_integer("reps", 2, "Timed runs of each variant and length.")
    absl_flags.DEFINE_float("limit_gb", 4.0, "Temporary memory beyond which a variant is skipped.")
    absl_flags.DEFINE_bool("tpu", False, "Compile for a TPU instead of running here.")
    absl_flags.DEFINE_bool("table", False, "Print the tables of the JSON and stop.")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    flags.run(main)
