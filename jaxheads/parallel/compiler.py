"""Options of the TPU compiler that a train step is compiled with.

    jax.jit(step, compiler_options=compiler_options(mesh))

A table, so that training, planning and benchmarks compile the same program.
"""

from __future__ import annotations

from collections.abc import Mapping

from jax.sharding import Mesh

TPU_OPTIONS: Mapping[str, bool | int] = {
    # Gathering the shards of a weight beside earlier work beats a ring of partial products, which
    # sums bfloat16 activations once per shard: half the estimated cycles of a Llama under fsdp.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    # Otherwise the compiler casts the stacked weights before the loop over layers, since every
    # layer casts its slice: a bfloat16 copy of the whole model beside the float32 one.
    "xla_jf_bf16_propagation": False,
}
"""Measured with libtpu 0.0.52 (docs/pods.md)."""


def compiler_options(mesh: Mesh | None) -> dict[str, bool | int] | None:
    """What `jax.jit(..., compiler_options=)` takes for programs on `mesh`; None off TPU."""
    if mesh is None or mesh.devices.flat[0].platform != "tpu":
        return None
    return dict(TPU_OPTIONS)
