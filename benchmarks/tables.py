"""Split embedding tables: bytes and time of a lookup by method, and of a step by table size.

    python -m benchmarks.tables                    # all parts, about two minutes on two cores
    python -m benchmarks.tables --parts=lookup

Parts, on eight simulated devices of this machine's CPU:
* `lookup`: forward, and forward with the gradient of the whole table, by psum_scatter, by
  all_to_all, and by ``table[ids]`` left to the compiler. Bytes that a device sends are read from
  the compiled program; seconds are medians over rounds in which the methods take turns, and say
  little about a network: simulated devices copy memory.
* `step`: a step of `make_sparse_step` with row-wise Adagrad for tables of growing size, and dense
  Adagrad on the gradient of the whole table: seconds, and temporary bytes of a device.

Writes benchmarks/tables.json with the command, versions and machine. Parts that were not run keep
what the file held.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jax.sharding import NamedSharding

from jaxheads.parallel import make_mesh
from jaxheads.parallel.embedding import lookup
from jaxheads.parallel.embedding_routes import METHODS, capacity
from jaxheads.parallel.program import analyze
from jaxheads.training.sparse_step import init_sparse, make_sparse_step

_PARTS = flags.DEFINE_list("parts", ["lookup", "step"], "Which parts to run.")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed rounds.")
_OUT = flags.DEFINE_string("out", str(Path(__file__).with_suffix(".json")), "Where to write.")

P = jax.P
MESH = "data:8"
ROWS, WIDTH, IDS = 200_000, 64, 8 * 2048


def zipf(rows: int, count: int, exponent: float = 1.2) -> np.ndarray:
    """Ids as frequency-sorted catalogues have them."""
    return (np.minimum(np.random.default_rng(0).zipf(exponent, count), rows) - 1).astype(np.int32)


def wire_bytes(compiled: Any, mesh: Any) -> dict[str, float]:
    """Bytes that a device sends, by kind of collective; a branch that is not taken left out."""
    summary = analyze(compiled.as_text(), dict(mesh.shape), unknown_trips=0.0)
    kinds: dict[str, float] = {}
    for row in summary.collective_table():
        kinds[row["kind"]] = kinds.get(row["kind"], 0.0) + row["wire_bytes"]
    return kinds


def take_turns(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of every call in every round."""
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS.value):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def measure_lookup() -> list[dict[str, Any]]:
    """A row per method and direction."""
    mesh = make_mesh(MESH)
    split = NamedSharding(mesh, P("data"))
    table = jax.device_put(jnp.ones((ROWS, WIDTH), jnp.float32), split)
    ids = jax.device_put(zipf(ROWS, IDS), split)
    of: dict[str, Callable] = {"compiler": lambda table, ids: table[ids]}
    for method in METHODS:
        of[method] = lambda table, ids, method=method: (
            lookup(table, ids, mesh, method=method, on_overflow="report").rows
        )
    programs, rows = {}, {}
    for name, function in of.items():
        backward = jax.grad(lambda t, i, f=function: jnp.sum(f(t, i) ** 2))
        for direction, call, place in (
            ("forward", function, split),
            ("forward and gradient", backward, split),
        ):
            compiled = jax.jit(call, out_shardings=place).lower(table, ids).compile()
            programs[name, direction] = compiled
            rows[name, direction] = {
                "method": name,
                "direction": direction,
                "bytes_sent": wire_bytes(compiled, mesh),
                "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
            }
    overflow = int(lookup(table, ids, mesh, on_overflow="report").overflow)
    calls = {key: lambda p=program: p(table, ids) for key, program in programs.items()}
    for key, seconds in take_turns(calls).items():  # type: ignore[arg-type]
        rows[key] |= {
            "bytes_sent_total": sum(rows[key]["bytes_sent"].values()),
            "seconds_median": statistics.median(seconds),
            "seconds_fastest": min(seconds),
        }
    places = capacity(IDS // mesh.size, mesh.size, 2.0)
    sizes = {"rows": ROWS, "width": WIDTH, "ids": IDS, "distinct": len(np.unique(ids))}
    return [{**sizes, "places": places, "overflow": overflow, **row} for row in rows.values()]


def measure_step() -> list[dict[str, Any]]:
    """A row per table size and kind of step."""
    mesh = make_mesh(MESH)
    split = NamedSharding(mesh, P("data"))
    optimizer = optax.sgd(0.1)

    def loss(params, rows, batch):
        del params, batch
        return jnp.mean(jnp.sum(rows["item"], axis=1) ** 2), {}

    def dense(state, ids):
        table, sums = state
        gradient = jax.grad(lambda t: loss({}, {"item": t[ids]}, None)[0])(table)
        sums = sums + jnp.mean(gradient**2, axis=-1)
        return table - 0.05 * gradient / (jnp.sqrt(sums) + 1e-8)[:, None], sums

    sparse = make_sparse_step(loss, mesh, optimizer=optimizer, lr=0.05)
    found = []
    ids = jax.device_put(zipf(20_000, IDS).reshape(-1, 16), split)  # the same for every size
    for rows in (20_000, 200_000, 2_000_000):
        fresh = lambda rows=rows: jnp.ones((rows, WIDTH), jnp.float32)
        states: dict[str, Any] = {
            "sparse": init_sparse({}, {"item": fresh()}, mesh, optimizer=optimizer),
            "dense": jax.device_put((fresh(), jnp.zeros(rows)), split),
        }
        programs = {
            "sparse": sparse.lower(states["sparse"], {"item": ids}, None).compile(),
            "dense": jax.jit(dense, donate_argnums=0, out_shardings=(split, split))
            .lower(states["dense"], ids)
            .compile(),
        }

        def call(name: str, states=states, programs=programs) -> Any:
            if name == "sparse":
                result = programs[name](states[name], {"item": ids}, None)
                states[name] = result.state
                return result.loss
            states[name] = programs[name](states[name], ids)
            return states[name]

        # Not in turns: the dense step sweeps all caches.
        seconds = {n: take_turns({n: lambda n=n, call=call: call(n)})[n] for n in programs}
        for name, program in programs.items():
            found.append(
                {
                    "rows": rows,
                    "width": WIDTH,
                    "ids": IDS,
                    "step": name,
                    "seconds_median": statistics.median(seconds[name]),
                    "seconds_fastest": min(seconds[name]),
                    "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
                    "table_bytes_per_device": rows * WIDTH * 4 // mesh.size,
                }
            )
    return found


MEASURES = {"lookup": measure_lookup, "step": measure_step}


def main(argv: list[str]) -> None:
    """Runs the parts that are asked for."""
    del argv
    from launch import flags as launch_flags

    path = Path(_OUT.value)
    held = json.loads(path.read_text()).get("parts", {}) if path.exists() else {}
    for part in _PARTS.value:
        held[part] = {
            **launch_flags.provenance(),
            "machine": {
                "system": platform.platform(),
                "cores": len(os.sched_getaffinity(0)),
                "load_average_1_minute": os.getloadavg()[0],
            },
            "rows": MEASURES[part](),
        }
        for row in held[part]["rows"]:
            print(json.dumps(row), flush=True)
        path.write_text(json.dumps({"parts": held}, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
