"""How the memory, work and traffic of attention scale when devices share the sequence.

    memory     temporary bytes a device of forward + backward, from compiled programs: vanilla
               attention grows as L^2, distributed attention as L; the longest sequence that fits
               24 GiB a device, on one device and on four
    balance    work of each device in a causal ring: equal in layout zigzag, 2n/(n+1) times the mean
               on the last device in layout contiguous
    time       4 devices against 1 where the machine has 4 cores; by the roofline model elsewhere

    python -m experiments.dmha_scaling           # 4 minutes on two busy cores; nothing is run
    python -m experiments.dmha_scaling --quick   # seconds

Hè and Kabić, 2023, arXiv:2302.06218, report that four RTX 4090 scale attention "almost 40x" over
vanilla attention on one; the reading here is the context length that fits. The baseline is
quadratic, so the length that blocked attention reaches on one device stands beside it: what the
algorithm gains and what the devices gain are different numbers.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common
from jaxheads.attention.costs import attention_cost, tile_scores
from jaxheads.attention.distributed import distributed_attention, vanilla_attention
from jaxheads.parallel import make_mesh
from jaxheads.parallel.topology import CHIPS
from launch import flags

NUM_HEADS, HEAD_DIM = 16, 64
GIB = 2**30
BUDGET = 24 * GIB  # an RTX 4090
BLOCK = 128
DEVICES = 4
ROUND = 1024  # lengths that fit are rounded down to a multiple


def define_flags() -> None:
    common.define_flags("dmha_scaling")


def vanilla(q, k, v):
    return vanilla_attention(q, k, v, causal=True)


def distributed(q, k, v):
    """Over the context axis of the mesh that is set; blocked attention where it has size 1."""
    split = jax.sharding.get_abstract_mesh().shape["context"] > 1
    return distributed_attention(
        q,
        k,
        v,
        causal=True,
        schedule="ring",
        layout="zigzag" if split else "contiguous",
        block_q=BLOCK,
        block_k=BLOCK,
        local_impl="xla",
    )


METHODS: dict[str, tuple[Callable, int]] = {
    "vanilla, 1 device": (vanilla, 1),
    "distributed, 1 device": (distributed, 1),
    f"distributed, {DEVICES} devices": (distributed, DEVICES),
}


def compiled(attend: Callable, length: int, devices: int):
    """Forward and backward of one sequence, compiled and not run."""
    mesh = make_mesh({"context": devices}, jax.devices()[:devices])
    place = jax.sharding.NamedSharding(mesh, jax.P(None, "context"))
    x = jax.ShapeDtypeStruct((1, length, NUM_HEADS, HEAD_DIM), jnp.float32, sharding=place)
    loss = lambda q, k, v, dz: jnp.vdot(attend(q, k, v), dz)
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, x).compile()


def bytes_of(attend: Callable, length: int, devices: int) -> tuple[int, int]:
    """(temporary, all) bytes a device."""
    memory: Any = compiled(attend, length, devices).memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return memory.temp_size_in_bytes, memory.temp_size_in_bytes + held


def longest(attend: Callable, devices: int, start: int) -> int:
    """The longest sequence whose forward + backward fits `BUDGET` a device, to 1 in 1,000.

    A secant in the logarithms, which are straight lines; the result is a length that was compiled.
    """
    fits, points = 0, []
    length = start
    for _ in range(6):
        total = bytes_of(attend, length, devices)[1]
        points.append((math.log(length), math.log(total)))
        if total <= BUDGET:
            fits = max(fits, length)
            if total > 0.998 * BUDGET:
                break
        slope = 1.0
        if len(points) > 1:
            (x0, y0), (x1, y1) = points[-2:]
            slope = (y1 - y0) / (x1 - x0) if x1 != x0 else 1.0
        target = math.log(0.999 * BUDGET)
        following = math.exp(points[-1][0] + (target - points[-1][1]) / max(slope, 0.5))
        following = int(following) // ROUND * ROUND
        if following == length:
            break
        length = following
    return fits


def slope(lengths: list[int], values: Sequence[float]) -> float:
    """Of the line through the logarithms."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def block_products(layout: str, n: int) -> np.ndarray:
    """[n] products of blocks (zigzag: of chunks) that each device of a causal ring computes."""
    length = 64 * n
    size = 32 if layout == "zigzag" else 64
    return tile_scores(layout, length, length, n, True, None, size, size) // size**2


def ring_limits() -> list[dict[str, Any]]:
    """Per chip, the tokens a device from which a ring step hides its transfer: e F K / (2 H W)."""
    rows = []
    for name, chip in CHIPS.items():
        if chip.peak_flops and chip.link_bandwidth:
            mha = 2 * chip.peak_flops / (2 * chip.link_bandwidth)
            rows.append({"chip": name, "K = H": round(mha), "K = H/4": round(mha / 4)})
    return rows


def roofline(length: int, devices: int, chip: str) -> float:
    """Seconds of a causal forward + backward in bfloat16, computing and sending side by side."""
    cost = attention_cost(
        batch=1,
        num_queries=length,
        num_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
        seq=devices,
        layout="zigzag" if devices > 1 else "contiguous",
        causal=True,
    )
    spec = CHIPS[chip]
    if not (spec.peak_flops and spec.link_bandwidth and spec.hbm_bandwidth):
        raise ValueError(f"chip {chip!r} has no peaks in the table of chips.")
    compute = 3.5 * max(cost.flops / spec.peak_flops, cost.hbm_bytes / spec.hbm_bandwidth)
    return max(compute, 3 * cost.comm_bytes / spec.link_bandwidth)


def cpu_ratio(length: int) -> float:
    """Time of 4 devices over time of 1, forward + backward."""

    def seconds(devices: int) -> float:
        program = compiled(distributed, length, devices)
        mesh = make_mesh({"context": devices}, jax.devices()[:devices])
        place = jax.sharding.NamedSharding(mesh, jax.P(None, "context"))
        x = jax.device_put(jnp.ones((1, length, NUM_HEADS, HEAD_DIM)), place)
        jax.block_until_ready(program(x, x, x, x))
        begin = time.perf_counter()
        jax.block_until_ready(program(x, x, x, x))
        return time.perf_counter() - begin

    return seconds(DEVICES) / seconds(1)


def main() -> int:
    run = common.options()
    flags.simulate_devices(DEVICES)
    lengths = [2048, 4096] if run.quick else [1024, 2048, 4096, 8192, 16384]
    table, claims = [], []
    temporary = {
        name: [bytes_of(attend, length, devices)[0] for length in lengths]
        for name, (attend, devices) in METHODS.items()
    }
    for i, length in enumerate(lengths):
        row = {name: f"{values[i] / 2**20:.1f} MiB" for name, values in temporary.items()}
        table.append({"L": length, **row})
    for name, values in temporary.items():
        exponent, tolerance = (2, 0.1) if name.startswith("vanilla") else (1, 0.15)
        title = f"exponent of temporary bytes: {name}"
        claims.append(within(title, slope(lengths, values), exponent, tolerance))
    reach = {}
    if not run.quick:
        for name, (attend, devices) in METHODS.items():
            reach[name] = longest(attend, devices, 8192 if attend is vanilla else 262144 * devices)
        vanilla_reach, blocked_reach, split_reach = reach.values()
        claims.append(
            common.at_least(
                f"context that fits {DEVICES} devices of 24 GiB over vanilla on one",
                split_reach / vanilla_reach,
                40,
            )
        )
        table.append({"L": "longest in 24 GiB", **{k: f"{v:,}" for k, v in reach.items()}})
        print(
            f"algorithm alone {blocked_reach / vanilla_reach:.1f}x, devices alone "
            f"{split_reach / blocked_reach:.2f}x"
        )
    for n in (4, 8, 128):
        zigzag, contiguous = block_products("zigzag", n), block_products("contiguous", n)
        title = f"zigzag, n={n}: most over least work of a device"
        claims.append(common.at_most(title, zigzag.max() / zigzag.min(), 1.02))
        ratio, formula = contiguous.max() / contiguous.mean(), 2 * n / (n + 1)
        title = f"contiguous, n={n}: most over mean work in blocks, over 2n/(n+1)"
        claims.append(within(title, ratio / formula, 1, 0.05))
        tiles = tile_scores("zigzag", 8192 * n, 8192 * n, n, True, None)
        title = f"zigzag, n={n}: the same in tiles of 256 x 512 at 8,192 tokens a device"
        claims.append(common.at_most(title, tiles.max() / tiles.min(), 1.02))
    cores = os.cpu_count() or 1
    if cores >= DEVICES and not run.quick:
        claims.append(common.at_most("time on 4 devices over 1 (CPU)", cpu_ratio(8192), 0.5))
    else:
        print(f"time on 4 devices over 1: skipped, {cores} cores (it needs {DEVICES}).")
    model = {
        str(length): {str(n): roofline(length, n, "h200") for n in (1, DEVICES)}
        for length in (32768, 131072, 1048576)
    }
    data = {
        "longest": reach,
        "ring_hides_transfers_from_tokens": ring_limits(),
        "roofline_seconds_h200": model,
        "temporary_bytes": {"lengths": lengths, **temporary},
    }
    draw = lambda figure: _draw(figure, lengths, temporary)
    return common.finish(claims, run.workdir, table=table, figure=draw, data=data)


def within(name: str, measured: float, target: float, tolerance: float) -> common.Claim:
    """The claim that a number is the target, give or take the tolerance."""
    needed = f"{target:g} +- {tolerance:g}"
    return common.Claim(name, measured, needed, abs(measured - target) <= tolerance)


def _draw(figure, lengths: list[int], temporary: dict[str, list[int]]) -> None:
    axes = figure.subplots()
    for name, values in temporary.items():
        axes.loglog(lengths, [value / 2**20 for value in values], marker="o", label=name)
    axes.set_xlabel("tokens")
    axes.set_ylabel("temporary MiB a device, forward + backward")
    axes.set_title(f"causal, {NUM_HEADS} heads of {HEAD_DIM}, float32")
    axes.legend()


if __name__ == "__main__":
    define_flags()
    flags.run(main)
