"""safetensors files: mapped for reading, streamed for writing.

The format: 8 bytes with the length of a JSON header, the header ``{name: {dtype, shape,
data_offsets}}``, the tensors' bytes (https://github.com/huggingface/safetensors). The library
checks files; reading through our own map lets a shard take only its bytes, and gives pages back.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": jnp.dtype("bfloat16"),
}
"""Stored types that weights may have."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SLAB = 32 << 20  # bytes of a file that are mapped in at a time


class Stored(NamedTuple):
    """A tensor in a file."""

    file: MappedFile
    dtype: str
    """As the format spells it."""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    num_bytes: int

    def array(self) -> np.ndarray:
        """The tensor as a view of the file; nothing is read yet."""
        flat = np.frombuffer(
            self.file.pages, DTYPES[self.dtype], self.num_bytes // DTYPES[self.dtype].itemsize,
            self.start,
        )  # fmt: skip
        return flat.reshape(self.shape)

    def forget(self) -> None:
        """Give back the memory that reading it took; the file still has it."""
        self.file.forget(self.start, self.num_bytes)


class MappedFile:
    """An open safetensors file.

    Raises:
      ValueError: for a file that is not safetensors, or not all of one.
    """

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with safe_open(path, framework="numpy"):
                pass  # the library checks header, offsets and length
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{path.name} is not a complete safetensors file ({error}); fetch it again."
            ) from error
        with open(path, "rb") as file:
            self.pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        begin = 8 + int.from_bytes(self.pages[:8], "little")
        header = json.loads(self.pages[8:begin])
        header.pop("__metadata__", None)
        self.tensors = {
            name: Stored(
                self,
                entry["dtype"],
                tuple(entry["shape"]),
                begin + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }

    def forget(self, start: int, num_bytes: int) -> None:
        """Give back the memory that reading these bytes took."""
        if hasattr(mmap, "MADV_DONTNEED") and num_bytes:
            first = start - start % mmap.PAGESIZE
            self.pages.madvise(mmap.MADV_DONTNEED, first, start + num_bytes - first)


def copy(target: np.ndarray, source: np.ndarray, stored: Stored) -> None:
    """``target[...] = source``, a part of `stored`, with few of the file's pages in memory."""
    order = np.argsort([-s for s in source.strides], kind="stable")  # as it lies in the file
    target, source = target.transpose(order), source.transpose(order)
    if source.ndim == 0:
        target[...] = source
        return
    rows = max(1, _SLAB // max(1, source[:1].nbytes))
    for i in range(0, len(source), rows):
        np.copyto(target[i : i + rows], source[i : i + rows], casting="unsafe")
        stored.forget()


def equal(a: Stored, b: Stored) -> bool:
    """Whether two tensors hold the same values."""
    if a.shape != b.shape:
        return False
    x, y = a.array(), b.array()
    rows = max(1, _SLAB // max(1, x[:1].nbytes))
    for i in range(0, len(x), rows):
        if not np.array_equal(x[i : i + rows], y[i : i + rows]):
            return False
        a.forget()
        b.forget()
    return True


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that a CPU device can take over as it is instead of copying (64-byte aligned)."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


class Tensor(NamedTuple):
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    value: Callable[[], np.ndarray]
    """Called when its turn comes, so that one tensor is in memory at a time."""

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def header(tensors: list[Tensor]) -> bytes:
    """The first bytes of a file with these tensors, in this order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in tensors:
        start, end = end, end + t.num_bytes
        entries[t.name] = {
            "dtype": _NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def chunks(tensors: list[Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a file with these tensors."""
    yield header(tensors)
    for t in tensors:
        value = np.ascontiguousarray(t.value())
        yield value.reshape(-1).view(np.uint8).data


def write(path: Path, tensors: list[Tensor]) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        for chunk in chunks(tensors):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
