"""Options of the TPU compiler: on TPU meshes only."""

from types import SimpleNamespace

import numpy as np

from jaxheads.parallel import TPU_OPTIONS, compiler_options, make_mesh


def test_options_are_for_tpu_meshes_only():
    assert compiler_options(None) is None
    assert compiler_options(make_mesh("data:2")) is None
    chip = SimpleNamespace(platform="tpu")
    mesh = SimpleNamespace(devices=np.array([[chip]], dtype=object))
    options = compiler_options(mesh)  # type: ignore[arg-type]
    assert options == TPU_OPTIONS and options is not TPU_OPTIONS
