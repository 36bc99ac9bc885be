"""The optional SparseCore path: its layout, its program for a TPU that is not there, refusals."""

from __future__ import annotations

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxheads.parallel import make_mesh
from jaxheads.parallel.embedding import lookup, to_round_robin
from jaxheads.parallel.sparsecore import make_program, needed_limit, pad_known_ids, prepare
from jaxheads.parallel.topology import parse_topology

P = jax.P
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("jax_tpu_embedding") is None,
    reason="jax-tpu-embedding is not installed",
)


def test_without_the_package_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_tpu_embedding.sparsecore.lib.nn", None)
    with pytest.raises(NotImplementedError, match="pip install jax-tpu-embedding"):
        lookup(jnp.ones((64, 8)), np.arange(3), make_mesh("data:8"), method="sparsecore")


def test_ids_under_jit_are_refused():
    table = jnp.ones((64, 8))
    run = jax.jit(lambda ids: lookup(table, ids, make_mesh("data:8"), method="sparsecore").rows)
    with pytest.raises(NotImplementedError, match=r"outside jax\.jit"):
        run(np.arange(3))


def test_limits_hold_what_is_asked():
    ids = pad_known_ids(np.full((3, 5), 6, np.int32), 4)
    assert len(ids) % 32 == 0 and not ids[15:].any()
    assert needed_limit(ids, 4) == 8
    assert needed_limit(np.full(256, 6), 4) == 64  # each of 4 asks one owner 64 times


@needs_package
def test_a_mesh_without_sparsecores_is_refused():
    with pytest.raises(NotImplementedError, match="the mesh is of 'cpu'"):
        lookup(jnp.ones((64, 8)), np.arange(3), make_mesh("data:8"), method="sparsecore")


@needs_package
def test_round_robin_order_is_the_layout_of_sparsecores():
    from jax_tpu_embedding.sparsecore.utils import utils

    table = np.arange(64 * 8, dtype=np.float32).reshape(64, 8)
    theirs = utils.shard_emb_table(table, num_devices=4, num_sc_per_device=2)
    np.testing.assert_array_equal(to_round_robin(table, 8), np.reshape(theirs, (64, 8)))


@needs_package
@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_compiles_for_a_tpu_that_is_not_there():
    mesh = make_mesh("data:4", devices=parse_topology("v5p:2x2x1").devices())
    ids = pad_known_ids(np.random.default_rng(0).integers(0, 1024, 100).astype(np.int32), 16)
    specs, program = make_program(mesh, ("data",), 4, 1024, 128, len(ids), needed_limit(ids, 16))
    prepared = prepare(specs, ids, mesh.size, 4)
    place = NamedSharding(mesh, P("data"))
    struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    table = struct(jax.ShapeDtypeStruct((1024, 128), jnp.float32))
    lowered = program.lower(jax.tree.map(struct, prepared), table)
    assert "SparseDenseMatmul" in lowered.as_text()
    assert lowered.out_info.shape == (len(ids), 128)
    assert lowered.compile().memory_analysis().argument_size_in_bytes > 1024 * 128
    with pytest.raises(ValueError, match="multiple of 128"):
        make_program(mesh, ("data",), 4, 1000, 128, len(ids), 8)
