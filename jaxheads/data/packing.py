"""Rows of tokens from documents, with a position in the data that two integers per lane describe.

Every row `[T]` is filled from a *lane*: an endless stream of documents that only this row position
reads. A document that does not fit continues in the lane's next row. Lanes make rows independent of
each other, so a process computes only its own rows, any number of processes produce the same
global batch, and the state is small: per lane, which document and how many of its tokens are used.
(`grain.experimental.ConcatThenSplitIterDataset` packs one stream per process instead; there the
rows depend on the number of processes.)
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Batch = dict[str, np.ndarray]
FIELDS = {
    "tokens": np.int32,
    "targets": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "weights": np.float32,
}
_MAX_EMPTY = 10_000  # documents in a row without a single (token, target) pair
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: multiples of it spread evenly modulo 2^64


class Document(NamedTuple):
    """One document as tokens."""

    ids: np.ndarray
    """[N] int32"""
    weights: np.ndarray | float = 1.0
    """[N], or one number: how much each token counts as a target."""


def empty_batch(num_rows: int, seq_len: int, pad_id: int) -> Batch:
    """A batch of padding: segment 0, weight 0."""
    batch = {name: np.zeros((num_rows, seq_len), dtype) for name, dtype in FIELDS.items()}
    batch["tokens"][:] = pad_id
    batch["targets"][:] = pad_id
    return batch


def write_segment(
    batch: Batch, row: int, start: int, segment: int, document: Document, used: int
) -> int:
    """Writes ids[used:-1] and their successors as one segment, as far as the row reaches.

    Inputs and targets come from the same document, so no target crosses a document boundary.
    Returns the number of tokens written.
    """
    ids, weights = document
    count = min(batch["tokens"].shape[1] - start, len(ids) - 1 - used)
    end = start + count
    batch["tokens"][row, start:end] = ids[used : used + count]
    batch["targets"][row, start:end] = ids[used + 1 : used + count + 1]
    batch["segment_ids"][row, start:end] = segment
    batch["positions"][row, start:end] = np.arange(count, dtype=np.int32)
    if isinstance(weights, np.ndarray):
        weights = weights[used + 1 : used + count + 1]
    batch["weights"][row, start:end] = weights
    return count


class PackedBatches:
    """An endless, checkpointable iterator over the rows `rows` of the global batches.

    Lane (c, s, r) serves row r of the batches with step % interleave == s from component c, and
    reads the documents (k * interleave + s) * batch_size + r, k = 0, 1, ... of that component.
    Which component fills a row is a low-discrepancy sequence over the global rows: after n rows
    component c has had n * weight_c of them, up to a few. Weights are thus shares of *tokens*,
    however long the documents are.

    Args:
      components: endless random-access streams of `Document`, one per mixture component.
      weights: share of each component; they sum to 1.
      description: what the batches depend on; part of the state, compared by `set_state`.
    """

    def __init__(
        self,
        components: Sequence[Any],
        weights: Sequence[float],
        *,
        rows: range,
        batch_size: int,
        seq_len: int,
        interleave: int,
        pack: bool,
        pad_id: int,
        description: Mapping[str, Any],
    ):
        self._components = components
        self._thresholds = [int(w * 2**64) for w in itertools.accumulate(weights)][:-1]
        self._rows = rows
        self._batch_size = batch_size
        self._seq_len = seq_len
        self._interleave = interleave
        self._pack = pack
        self._pad_id = pad_id
        self._description = dict(description)
        shape = (len(components), interleave, len(rows))
        self._step = 0
        self._documents = np.zeros(shape, np.int64)  # k of each lane
        self._used = np.zeros(shape, np.int64)  # tokens of that document already given out
        self._open: dict[tuple[int, int, int], Document] = {}  # the documents lanes are in

    @property
    def rows(self) -> range:
        """The rows of the global batch that this iterator gives."""
        return self._rows

    @property
    def step(self) -> int:
        """How many batches came before the next one."""
        return self._step

    def __iter__(self) -> PackedBatches:
        return self

    def __next__(self) -> Batch:
        batch = empty_batch(len(self._rows), self._seq_len, self._pad_id)
        slot = self._step % self._interleave
        before = self._documents.copy(), self._used.copy()
        try:
            for row, global_row in enumerate(self._rows):
                draw = (self._step * self._batch_size + global_row) * _GOLDEN % 2**64
                self._fill(batch, row, (bisect.bisect_right(self._thresholds, draw), slot, row))
        except BaseException:  # a batch is made whole or not at all
            self._documents, self._used = before
            self._open.clear()
            raise
        self._step += 1
        return batch

    def _fill(self, batch: Batch, row: int, lane: tuple[int, int, int]) -> None:
        filled, segment = 0, 1
        while filled < self._seq_len:
            document = self._document(lane)
            count = write_segment(batch, row, filled, segment, document, int(self._used[lane]))
            filled, segment = filled + count, segment + 1
            self._used[lane] += count
            if self._used[lane] >= len(document.ids) - 1 or not self._pack:
                self._advance(lane)
            if not self._pack:
                return

    def _advance(self, lane: tuple[int, int, int]) -> None:
        self._documents[lane] += 1
        self._used[lane] = 0
        self._open.pop(lane, None)

    def _document(self, lane: tuple[int, int, int]) -> Document:
        """The document the lane is in, after skipping those without a token to predict."""
        component, slot, row = lane
        for _ in range(_MAX_EMPTY):
            if lane not in self._open:
                index = int(self._documents[lane]) * self._interleave + slot
                index = index * self._batch_size + self._rows[row]
                self._open[lane] = self._components[component][index]
            if len(self._open[lane].ids) >= 2:
                return self._open[lane]
            self._advance(lane)
        raise ValueError(
            f"{_MAX_EMPTY} documents one after the other have fewer than two tokens; the corpus "
            "needs longer documents, or a tokenizer with EOS"
        )

    def close(self) -> None:
        """Nothing to stop; a read-ahead iterator around this one has a thread to end."""

    def get_state(self) -> dict[str, Any]:
        """Where the data stands, as JSON values."""
        return {
            "description": self._description,
            "step": self._step,
            "rows": [self._rows.start, self._rows.stop],
            "documents": self._documents.tolist(),
            "used": self._used.tolist(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues exactly where `get_state` was called.

        The state may cover more rows than this process has (see `merge_states`), so a run can
        resume on another number of processes.
        """
        missing = {"description", "step", "rows", "documents", "used"} - set(state)
        if missing:
            raise ValueError(
                f"not a data state: {', '.join(sorted(missing))} missing; pass what get_state gave"
            )
        old, new = state["description"], self._description
        changed = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
        if changed:
            lines = "; ".join(f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in changed)
            raise ValueError(
                f"the data state was saved with other settings: {lines}; use the same data and "
                "settings, or start the data from the beginning"
            )
        start, stop = state["rows"]
        if not (start <= self._rows.start and self._rows.stop <= stop):
            raise ValueError(
                f"the data state covers rows {start} to {stop - 1} of the global batch, this "
                f"process needs rows {self._rows.start} to {self._rows.stop - 1}; merge the states "
                "of all processes with merge_states"
            )
        mine = slice(self._rows.start - start, self._rows.stop - start)
        self._step = int(state["step"])
        self._documents = np.asarray(state["documents"], np.int64)[:, :, mine].copy()
        self._used = np.asarray(state["used"], np.int64)[:, :, mine].copy()
        self._open.clear()


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of the whole batch from the states of all processes at the same step.

    The result can be given to `set_state` under any number of processes.
    """
    if not states:
        raise ValueError("merge_states needs the state of every process, got none")
    states = sorted(states, key=lambda state: state["rows"][0])
    for left, right in itertools.pairwise(states):
        if left["rows"][1] != right["rows"][0]:
            raise ValueError(
                f"the states do not join: rows end at {left['rows'][1]} and go on at "
                f"{right['rows'][0]}; pass exactly one state per process"
            )
        if (left["step"], left["description"]) != (right["step"], right["description"]):
            raise ValueError(
                f"the states are of different runs or steps ({left['step']} and {right['step']})"
            )
    return {
        "description": states[0]["description"],
        "step": states[0]["step"],
        "rows": [states[0]["rows"][0], states[-1]["rows"][1]],
        "documents": np.concatenate([s["documents"] for s in states], axis=2).tolist(),
        "used": np.concatenate([s["used"] for s in states], axis=2).tolist(),
    }


def pack_once(
    documents: Iterable[Document],
    *,
    batch_size: int,
    seq_len: int,
    pack: bool,
    pad_id: int,
) -> Iterator[Batch]:
    """Every document once, in order, as global batches; the last one is filled up with padding."""
    batch, row, filled, segment = empty_batch(batch_size, seq_len, pad_id), 0, 0, 1
    for document in documents:
        used = 0
        while used < len(document.ids) - 1:
            count = write_segment(batch, row, filled, segment, document, used)
            used, filled, segment = used + count, filled + count, segment + 1
            if filled == seq_len or not pack:
                row, filled, segment = row + 1, 0, 1
            if row == batch_size:
                yield batch
                batch, row = empty_batch(batch_size, seq_len, pad_id), 0
            if not pack:
                break
    if row or filled:
        yield batch
