"""Training batches: from the rows of one process to global arrays on the mesh."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxheads.data import BatchIterator
from jaxheads.models import check_token_ids
from jaxheads.training.step import batch_sharding
from jaxheads.typing import Array, PyTree

Batch = Mapping[str, np.ndarray]


class FedBatch(NamedTuple):
    """A batch on its way into a step."""

    rows: Batch
    """The rows of this process, on the host."""
    arrays: dict[str, Array]
    """The global batch, on the devices."""
    data_state: dict[str, Any]
    """The position in the data after it."""


class Feed:
    """Training batches on the mesh, with the position in the data that belongs to each.

    Args:
      data: this process's rows.
      mesh: batches are split over it: rows over data and fsdp, columns over context.
      vocab_size: every id of every batch is compared with it.
    """

    def __init__(self, data: BatchIterator, mesh: Mesh, shape: tuple[int, int], vocab_size: int):
        self._data = data
        self._sharding = batch_sharding(mesh, shape)
        self._shape = shape
        self._vocab_size = vocab_size
        self.devices = list(mesh.devices.flat)
        self.wait_seconds = 0.0
        """Time in which the devices may have had nothing to do, because no batch was there."""

    def after(self, running: PyTree) -> FedBatch:
        """The next batch, made and sent while the step with the results `running` computes.

        Where that step ends before the batch is there, the next one waits for its input. All of
        this call then counts as waiting: at most that long were the devices idle.
        """
        start = time.perf_counter()
        batch = next(self)
        if all(array.is_ready() for array in jax.tree.leaves(running)):
            self.wait_seconds += time.perf_counter() - start
        return batch

    def __next__(self) -> FedBatch:
        batch = next(self._data)
        for name in ("tokens", "targets"):
            check_token_ids(batch[name], self._vocab_size)
        arrays = put(batch, self._sharding, self._shape)
        return FedBatch(batch, arrays, self._data.get_state())


def local_block(
    sharding: NamedSharding, shape: tuple[int, int], process_index: int | None = None
) -> tuple[slice, slice]:
    """The rows and columns of a global batch that the devices of one process hold."""
    process_index = jax.process_index() if process_index is None else process_index
    blocks = [
        index
        for device, index in sharding.devices_indices_map(shape).items()
        if device.process_index == process_index
    ]
    if not blocks:
        raise ValueError(f"process {process_index} has no device in mesh {sharding.mesh.shape}.")
    spans = [
        (min(b[i].indices(n)[0] for b in blocks), max(b[i].indices(n)[1] for b in blocks))
        for i, n in enumerate(shape)
    ]
    return slice(*spans[0]), slice(*spans[1])


def put(batch: Batch, sharding: NamedSharding, shape: tuple[int, int]) -> dict[str, Array]:
    """This process's rows [b,T] as part of a global batch [B,T] on the devices."""
    columns = local_block(sharding, shape)[1]
    return {
        name: jax.make_array_from_process_local_data(sharding, rows[:, columns], shape)
        for name, rows in batch.items()
    }


def data_process(mesh: Mesh, shape: tuple[int, int]) -> tuple[int, int]:
    """(index, count) of this process among those that read different rows.

    Processes that a model or context axis spans hold the same rows and must read the same text.
    """
    rows = local_block(batch_sharding(mesh, shape), shape)[0]
    size = rows.stop - rows.start
    return rows.start // size, shape[0] // size
