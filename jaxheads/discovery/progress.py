"""Running a sweep's chunks: a progress bar, and partial results that survive an interruption."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxheads.parallel.multihost import is_main_process
from jaxheads.typing import PyTree

SECONDS_BETWEEN_SAVES = 1.0


class Partial:
    """Scores [L,N,B] that fill up chunk by chunk; with a path they are kept there.

    The file holds the scores (NaN where still to come) and a fingerprint of the sweep, so that
    one sweep never continues another.
    """

    def __init__(
        self, shape: tuple[int, int, int], path: str | os.PathLike | None, fingerprint: str
    ):
        self.values = np.full(shape, np.nan, np.float32)
        self.is_done = np.zeros(shape[:2], bool)
        self._path = None if path is None else Path(path).expanduser()
        self._fingerprint = fingerprint
        self._saved = -np.inf
        if self._path is not None and self._path.exists():
            self._load(self._path)

    def _load(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as held:
                values, done = held["values"], held["is_done"]
                fingerprint = str(held["fingerprint"])
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(
                f"resume_file {path} cannot be read as partial results of a sweep ({error}); "
                "delete it, or name another file."
            ) from error
        if fingerprint != self._fingerprint or values.shape != self.values.shape:
            raise ValueError(
                f"resume_file {path} holds another sweep: other prompts, edit, metric, site or "
                "model; delete it, or name another file."
            )
        self.values, self.is_done = values, done

    def put(self, layer: int, items: np.ndarray, scores: np.ndarray) -> None:
        """Scores of some items of a layer; saved when the last save is a while ago."""
        self.values[layer, items] = scores
        self.is_done[layer, items] = True
        if time.monotonic() - self._saved > SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        """Write the file, whole or not at all; only process 0 writes."""
        if self._path is None or not is_main_process():
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(self._path.name + ".part")
        with part.open("wb") as file:
            np.savez(
                file,
                values=self.values,
                is_done=self.is_done,
                fingerprint=np.asarray(self._fingerprint),
            )
        os.replace(part, self._path)
        self._saved = time.monotonic()


def run_chunks(
    step: Callable[[int, np.ndarray], jax.Array],
    chunks: Iterable[tuple[int, np.ndarray]],
    partial: Partial,
    *,
    progress: bool | None,
    label: str,
) -> np.ndarray:
    """Scores [L,N,B] from ``step(layer, items) -> scores [C,B]``, chunk by chunk.

    Args:
      step: may return before its result is computed.
      chunks: (layer, items); padded items repeat the last.
      partial: where results go; chunks already there are not run.
      progress: show a bar; None: where standard error is a terminal.
      label: of the bar.
    """
    waiting = [(n, items) for n, items in chunks if not partial.is_done[n, items].all()]
    disable = None if progress is None else not progress
    total = partial.is_done.size
    with tqdm(total=total, desc=label, unit="run", disable=disable, dynamic_ncols=True) as bar:
        bar.update(int(partial.is_done.sum()))
        ahead: list[tuple[int, np.ndarray, jax.Array]] = []

        def collect() -> None:
            layer, items, scores = ahead.pop(0)
            before = int(partial.is_done.sum())
            partial.put(layer, items, np.asarray(scores))
            bar.update(int(partial.is_done.sum()) - before)

        try:
            for layer, items in waiting:
                ahead.append((layer, items, step(layer, items)))
                if len(ahead) > 1:  # one chunk is computed while the one before it is collected
                    collect()
            while ahead:
                collect()
        finally:
            partial.save()
    return partial.values


def fingerprint(*parts: PyTree) -> str:
    """A digest of strings, numbers and arrays, equal where all of them are."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(parts):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array | np.ndarray):
            array = np.asarray(leaf)
            digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        else:
            digest.update(repr(leaf).encode())
        digest.update(b"|")
    return digest.hexdigest()
