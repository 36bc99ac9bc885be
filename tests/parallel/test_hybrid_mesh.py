"""Meshes over slices: which device stands where, and which axes cross from slice to slice."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads.models import Decoder, ModelConfig
from jaxheads.parallel import MESH_AXES, make_mesh
from jaxheads.training import TrainConfig, init_state, make_optimizer, make_train_step
from jaxheads.training.step import batch_sharding, state_shardings


@dataclasses.dataclass(frozen=True)
class Fake:
    """As much of a device as a mesh looks at."""

    id: int
    process_index: int
    slice_index: int | None
    platform: str = "cpu"
    device_kind: str = "fake"


def slices(num, size, per_process=4):
    return [Fake(i, i // per_process, i // size) for i in range(num * size)]


def processes(num, size):
    return [Fake(i, i // size, None) for i in range(num * size)]


def crossing(mesh, group_of):
    """The axes along which neighbours lie in different groups."""
    groups = np.vectorize(group_of)(mesh.devices)
    return {a for i, a in enumerate(MESH_AXES) if np.any(np.diff(groups, axis=i))}


@pytest.mark.parametrize(
    ("spec", "dcn", "num", "size", "shape", "over"),
    [
        ("fsdp:2,model:4", "data:4", 4, 8, {"data": 4, "fsdp": 2, "model": 4}, {"data"}),
        ("data:2,model:4", "data:3", 3, 8, {"data": 6, "model": 4}, {"data"}),
        ("fsdp:-1", "data:2", 2, 8, {"data": 2, "fsdp": 8}, {"data"}),
        ("model:8", "data:-1", 2, 8, {"data": 2, "model": 8}, {"data"}),
        ("model:8", "data:2,fsdp:2", 4, 8, {"data": 2, "fsdp": 2, "model": 8}, {"data", "fsdp"}),
        ({"expert": 4}, {"context": 2}, 2, 4, {"context": 2, "expert": 4}, {"context"}),
    ],
)
def test_only_the_axes_over_slices_cross_them(spec, dcn, num, size, shape, over):
    mesh = make_mesh(spec, slices(num, size), dcn=dcn, exact=True)
    assert dict(mesh.shape) == dict.fromkeys(MESH_AXES, 1) | shape
    assert len(set(mesh.devices.flat)) == num * size
    assert crossing(mesh, lambda d: d.slice_index) == over


def test_slices_are_outermost_in_an_axis_that_both_name():
    ids = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    for devices in (slices(2, 8), slices(2, 8)[::-1]):  # whatever order the devices come in
        mesh = make_mesh("data:2,model:4", sorted(devices, key=lambda d: d.id), dcn="data:2")
        data_by_model = mesh.devices.reshape(4, 4)
        assert [[d.id for d in row] for row in data_by_model] == ids
    mixed = make_mesh("data:2,model:4", slices(2, 8)[::-1], dcn="data:2")
    assert {d.slice_index for d in mixed.devices[:2].flat} == {0}  # slices keep their numbers


def test_processes_stand_for_slices_where_devices_know_of_none():
    mesh = make_mesh("data:2,model:2", processes(2, 4), dcn="data:2")
    assert crossing(mesh, lambda d: d.process_index) == {"data"}
    mesh = make_mesh("model:8", processes(4, 4), dcn="data:2")  # two processes a slice
    groups = [{d.process_index for d in half.flat} for half in mesh.devices]
    assert groups == [{0, 1}, {2, 3}]
    assert make_mesh("model:4", processes(3, 4), dcn="data:-1").shape["data"] == 3


def test_unused_devices_are_left_out_of_every_slice():
    mesh = make_mesh("model:4", slices(2, 8), dcn="data:2")
    assert [d.id for d in mesh.devices.flat] == [0, 1, 2, 3, 8, 9, 10, 11]
    with pytest.raises(ValueError, match="uses 4 of 8 devices"):
        make_mesh("model:4", slices(2, 8), dcn="data:2", exact=True)


@pytest.mark.parametrize(
    ("spec", "dcn", "devices", "message"),
    [
        ("model:8", "", slices(2, 8), "lie in 2 slices; say which .* --dcn_mesh=data:2"),
        ("model:8", "data:3", slices(2, 8), "is over 3 slices but there are 2"),
        ("model:8", "data:2,fsdp:-1", slices(3, 8), "is over 2 slices but there are 3"),
        ("model:16", "data:2", slices(2, 8), "needs 16 devices but there are 8"),
        ("model:4", "data:2", slices(2, 8)[:-4], r"different sizes, \[4, 8\] devices"),
        ("model:4", "data:2", processes(3, 4), "needs 2 slices, .* belong to 3 processes"),
        ("model:4", "data:2", processes(1, 8), "belong to 1 process;"),
        ("model:4", "pods:2", slices(2, 8), "unknown axis 'pods'"),
    ],
)
def test_slices_that_do_not_fit(spec, dcn, devices, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(spec, devices, dcn=dcn)


def test_without_slices_nothing_changes():
    assert make_mesh("data:2,model:4", dcn="").devices.tolist() == (
        make_mesh("data:2,model:4").devices.tolist()
    )


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_a_train_step_over_two_slices_compiles():
    """Gradients cross slices; what the model axis exchanges stays inside one."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:2x2", num_slices=2
    ).devices
    mesh = make_mesh("fsdp:2,model:2", devices, dcn="data:2", exact=True)
    assert crossing(mesh, lambda d: d.slice_index) == {"data"}
    model_cfg = ModelConfig(
        vocab_size=256, num_layers=2, model_dim=128, num_heads=8, compute_dtype="bfloat16"
    )
    cfg = TrainConfig()
    optimizer = make_optimizer(cfg)
    shapes = jax.eval_shape(
        lambda: init_state(lambda: Decoder(model_cfg, rngs=nnx.Rngs(0)), optimizer)
    )
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    state = jax.tree.map(place, shapes, state_shardings(shapes, mesh))
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32, sharding=batch_sharding(mesh, (8, 128)))
    batch = dict.fromkeys(("tokens", "targets"), tokens)
    text = make_train_step(cfg, optimizer, mesh).lower(state, batch).compile().as_text()
    # Each slice runs its own program: groups of devices are within it, and what crosses to other
    # slices over the data-centre network goes through the host.
    groups = re.findall(r"replica_groups=\{(\{[\d,{}]*\})\}", text)
    members = {int(i) for group in groups for i in re.findall(r"\d+", group)}
    assert members == {0, 1, 2, 3}
    crossings = re.findall(r'xla_megascale_transfer_type="(\w+)"', text)
    assert crossings and set(crossings) == {"ALL_REDUCE"}  # of gradients and sums
