"""Meshes from strings."""

from __future__ import annotations

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxheads.parallel import MESH_AXES, make_mesh, parse_mesh


@given(st.dictionaries(st.sampled_from(MESH_AXES), st.integers(1, 99)))
def test_parse_reads_back_what_was_written(sizes):
    assert parse_mesh(",".join(f"{a}:{n}" for a, n in sizes.items())) == sizes


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("", (1, 1, 1, 1, 1)),
        ("1", (1, 1, 1, 1, 1)),
        ("data:8", (8, 1, 1, 1, 1)),
        ("data:2, model:4", (2, 1, 4, 1, 1)),
        ("fsdp:-1,model:2", (1, 4, 2, 1, 1)),
        ({"context": 4, "expert": 2}, (1, 1, 1, 4, 2)),
        ("data:3", (3, 1, 1, 1, 1)),
    ],
)
def test_shapes(spec, shape):
    mesh = make_mesh(spec)
    assert mesh.axis_names == MESH_AXES
    assert tuple(mesh.shape.values()) == shape


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("foo:2", "unknown axis 'foo'"),
        ("data:2,data:2", "'data' is given twice"),
        ("data:x", "needs an integer size"),
        ("data", "needs an integer size"),
        ("data:0", "has size 0"),
        ("data:-2", "has size -2"),
        ("data:-1,fsdp:-1", "at most one axis may be -1"),
        ("data:16", "needs 16 devices but there are 8"),
        ("data:3,model:-1", "not a multiple of 3"),
        ("data:2,", "unknown axis ''"),
        ({"heads": 2}, "unknown mesh axis 'heads'"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(spec)


def test_exact_refuses_idle_devices():
    with pytest.raises(ValueError, match="uses 2 of 8 devices"):
        make_mesh("data:2", exact=True)
    assert make_mesh("data:2", jax.devices()[:2], exact=True).size == 2
