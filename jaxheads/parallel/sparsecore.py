"""Lookups by the SparseCores of a TPU: `lookup(..., method="sparsecore")`, for v5p and later.

A SparseCore gathers rows while the rest of the chip computes. The optional package
`jax-tpu-embedding` drives them. It sorts ids on the host, so they must be known: pass numpy arrays
outside `jax.jit`. Every SparseCore, not every chip, is an owner: the table is in round-robin order
over n c of them, ``to_round_robin(table, n * c)``, with rows that 8 n c divides and a width that 8
divides. Training on SparseCores goes through the package's own update, not through gradients.

The program has been compiled for v5p ahead of time and its layout checked on the host; it has not
run on hardware.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxheads.typing import Array, is_traced

P = jax.P


def cores_per_device(mesh: Mesh) -> int:
    """c.

    Raises:
      NotImplementedError: for devices without SparseCores, and without the package.
    """
    _package()
    from jax_tpu_embedding.sparsecore.utils import utils  # type: ignore[import-not-found]

    device = mesh.devices.flat[0]
    try:
        return utils.num_sparsecores_per_device(device)
    except ValueError as error:
        raise NotImplementedError(
            "method='sparsecore' needs a TPU v5p or later, but the mesh is of "
            f"{device.device_kind!r}; use method='all_to_all'."
        ) from error


def sparsecore_lookup(table: Array, ids: Any, mesh: Mesh, axes: tuple[str, ...]) -> Array:
    """``table[ids]``, [...,d], for known ids inside the table.

    Raises:
      NotImplementedError: without the package or SparseCores, and for ids under `jax.jit`.
      ValueError: for tables that do not divide over the SparseCores.
    """
    if is_traced(ids) or is_traced(table):
        raise NotImplementedError(
            "method='sparsecore' sorts ids on the host; call lookup outside jax.jit, or use "
            "method='all_to_all'."
        )
    cores = cores_per_device(mesh)
    ids = np.asarray(ids, np.int32)
    padded = pad_known_ids(ids, mesh.size * cores)
    limit = needed_limit(padded, mesh.size * cores)
    specs, program = make_program(mesh, axes, cores, *table.shape, len(padded), limit)
    rows = program(prepare(specs, padded, mesh.size, cores), table)
    return rows[: ids.size].reshape(*ids.shape, table.shape[1])


def pad_known_ids(ids: np.ndarray, owners: int) -> np.ndarray:
    """The ids as a vector that 8 times the SparseCores divide; padding reads row 0."""
    flat = ids.reshape(-1)  # [...] -> [N]
    return np.pad(flat, (0, -flat.size % (8 * owners)))


def needed_limit(ids: np.ndarray, owners: int) -> int:
    """Room between two SparseCores in which all ids fit: a power of two."""
    asking = np.repeat(np.arange(owners), len(ids) // owners)
    counts = np.bincount(asking * owners + ids % owners, minlength=1)
    return max(8, 1 << math.ceil(math.log2(max(1, counts.max(initial=1)))))


@functools.lru_cache(maxsize=32)
def make_program(
    mesh: Mesh, axes: tuple[str, ...], cores: int, num_rows: int, width: int, count: int, limit: int
) -> tuple[Any, Any]:
    """(feature specifications, the jitted program: (prepared ids, table) -> rows [count,width])."""
    embedding, specification = _package()
    owners = mesh.size * cores
    if math.prod(mesh.shape[a] for a in axes) != mesh.size:
        raise ValueError(f"SparseCores need tables over all of the mesh, not only over {axes}.")
    if num_rows % (8 * owners) or width % 8:
        raise ValueError(
            f"a table [{num_rows},{width}] does not divide over {owners} SparseCores; rows must be "
            f"a multiple of {8 * owners} and the width of 8."
        )
    table = specification.TableSpec(
        name="table",
        vocabulary_size=num_rows,
        embedding_dim=width,
        initializer=jax.nn.initializers.zeros,
        optimizer=specification.SGDOptimizerSpec(learning_rate=0.0),  # not used by a lookup
        combiner="sum",
        max_ids_per_partition=limit,
        max_unique_ids_per_partition=limit,
    )
    specs = {
        "ids": specification.FeatureSpec(
            name="ids", table_spec=table, input_shape=[count, 1], output_shape=[count, width]
        )
    }
    embedding.prepare_feature_specs_for_training(
        specs, global_device_count=mesh.size, num_sc_per_device=cores
    )

    def local(prepared: Any, shard: Array) -> Array:
        variables = {"table": embedding.EmbeddingVariables(table=shard, slot=())}
        return embedding.tpu_sparse_dense_matmul(
            prepared,
            variables,
            specs,
            global_device_count=mesh.size,
            num_sc_per_device=cores,
            sharding_strategy="MOD",
        )["ids"]

    split = jax.shard_map(
        local, mesh=mesh, in_specs=(P(axes), P(axes)), out_specs=P(axes), check_vma=False
    )
    return specs, jax.jit(split)


def prepare(specs: Any, ids: np.ndarray, devices: int, cores: int) -> Any:
    """Ids [N] sorted by owner, as the program takes them."""
    embedding, _ = _package()
    prepared, _ = embedding.preprocess_sparse_dense_matmul_input(
        {"ids": ids[:, None]},
        None,
        specs,
        local_device_count=devices,
        global_device_count=devices,
        num_sc_per_device=cores,
        sharding_strategy="MOD",
    )
    return jax.tree.map(jnp.asarray, prepared)


def _package() -> tuple[Any, Any]:
    try:
        from jax_tpu_embedding.sparsecore.lib.nn import (  # type: ignore[import-not-found]
            embedding,
            embedding_spec,
        )
    except ImportError as error:
        raise NotImplementedError(
            "method='sparsecore' needs the package jax-tpu-embedding (0.1.0 is known to work): "
            "pip install jax-tpu-embedding; or use method='all_to_all'."
        ) from error
    return embedding, embedding_spec
