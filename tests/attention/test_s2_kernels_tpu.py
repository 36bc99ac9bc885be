"""The S2 kernels compiled for TPUs that are not there."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from jaxheads import parallel
from jaxheads.attention import s2_pallas_tpu, s2_splash
from jaxheads.attention.s2 import ShardPattern
from jaxheads.parallel.program import analyze

pytestmark = [pytest.mark.slow, pytest.mark.tpu_aot]
if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed", allow_module_level=True)

HEADS, HEAD_DIM = 8, 128


def kernels_of(topology, spec, attend, pattern, length, dtype=jnp.bfloat16):
    """The Pallas kernels of forward and backward, compiled, and the temporary bytes."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = parallel.make_mesh(spec, devices=devices, exact=spec != "data:1")
    spread = jax.P("data", None, "model" if "model" in spec else None, None)
    sharding = jax.sharding.NamedSharding(mesh, spread)
    batch = mesh.shape.get("data", 1)
    shapes = [(batch, length, n, HEAD_DIM) for n in (pattern.num_heads, pattern.kv_heads)]
    q, k = (jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape in shapes)

    def loss(q, k, v):
        z, lse = attend(q, k, v, pattern)
        return z.astype(jnp.float32).sum() + lse.sum()

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k).compile()
    kernels = analyze(compiled.as_text(), dict(mesh.shape)).kernels
    return {kernel.name: kernel for kernel in kernels}, compiled.memory_analysis()


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_worklist_kernels_compile_with_their_own_cost(topology):
    length = 16384
    pattern = ShardPattern(512, 2, 8, num_heads=HEADS)
    found, memory = kernels_of(topology, "data:4", s2_pallas_tpu.attend, pattern, length)
    tiles = int(pattern.tiles(length // 512).sum())
    for name, products in (("s2_forward", 2), ("s2_backward_dq", 3), ("s2_backward_dkv", 4)):
        assert found[name].flops == 2 * products * tiles * 512 * 512 * HEAD_DIM
        assert found[name].visited_share == 1.0  # nothing is counted that is not visited
    assert memory.temp_size_in_bytes < 24 * length * HEADS * HEAD_DIM * 2  # linear in the length


def test_heads_split_over_chips_and_rows_merge():
    pattern = ShardPattern(128, 2, 4, num_heads=HEADS, num_kv_heads=4)
    attend = lambda *args: s2_pallas_tpu.attend(*args, block_q=512)
    found, _ = kernels_of("v5e:2x2", "data:2,model:2", attend, pattern, 4000)
    assert set(found) == {"s2_forward", "s2_backward_dq", "s2_backward_dkv"}


def test_launches_of_a_long_list_share_their_outputs():
    pattern = ShardPattern(256, 2, 4, num_heads=HEADS, num_kv_heads=4)
    attend = lambda *args: s2_pallas_tpu.attend(*args, max_steps=500)
    found, _ = kernels_of("v5e:2x2", "data:4", attend, pattern, 8192, jnp.float32)
    assert len(found) >= 3


def test_splash_gets_one_call_per_class_with_a_short_grid():
    pattern = ShardPattern(512, 1, 4, num_heads=4)
    found, _ = kernels_of("v5e:2x2", "data:4", s2_splash.attend, pattern, 16384)
    forward = [kernel for name, kernel in found.items() if name.startswith("splash")]
    assert sum(kernel.count for kernel in forward) >= 1
    assert all(kernel.grid_share < 0.35 for kernel in forward)  # of 32 columns, at most 9 visited
