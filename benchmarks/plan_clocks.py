"""What the TPU compiler believes a chip can do, against the published peaks.

    python -m benchmarks.plan_clocks     # seconds; needs libtpu, no TPU

Compiles a bfloat16 product of 8192 x 8192 matrices and the scaling of 1 GiB of float32 (1 GiB read,
1 GiB written) for one device of each chip, and prints the estimated cycles at the clock of
`parallel.topology` as a share of the published FLOP/s and memory bandwidth. Writes
benchmarks/plan_clocks.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch import flags

OUT = Path(__file__).with_suffix(".json")
SIDE, ELEMENTS = 8192, 2**28


def measure(name: str) -> dict[str, float]:
    """Shares of the peaks of one chip."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from jaxheads.parallel.program import analyze, compile_with_text
    from jaxheads.parallel.topology import parse_topology

    topology = parse_topology(name)
    chip: Any = topology.chip
    here = SingleDeviceSharding(topology.devices()[0])
    matrix = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.bfloat16, sharding=here)
    vector = jax.ShapeDtypeStruct((ELEMENTS,), jnp.float32, sharding=here)
    product = analyze(compile_with_text(jax.jit(jnp.matmul).lower(matrix, matrix))[1])
    scaled = analyze(compile_with_text(jax.jit(lambda x: x * 2.0).lower(vector))[1])
    flops = product.flops / (product.cycles / chip.clock_hz)
    moved = 8 * ELEMENTS / (scaled.cycles / chip.clock_hz)
    return {
        "clock_ghz": chip.clock_hz / 1e9,
        "share_of_peak_flops": flops / chip.peak_flops,
        "share_of_hbm_bandwidth": moved / chip.hbm_bandwidth,
    }


def main() -> int:
    """Runs the command; returns the exit code."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    chips = {n: measure(f"{n}:{s}") for n, s in
             (("v5e", "1x1"), ("v5p", "1x1x1"), ("v6e", "1x1"), ("tpu7x", "1x1x1"))}  # fmt: skip
    for name, row in chips.items():
        print(name, "  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    flags.write_json(OUT, {"chips": chips, "provenance": flags.provenance()})
    return 0


if __name__ == "__main__":
    flags.define_common()
    flags.run(main)
