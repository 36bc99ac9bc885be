"""Landmarks in packed rows: after every l tokens of a row, whatever documents it holds.

A landmark belongs to the document of the token before it. Its target is that token's, whose own
target becomes the landmark: the loss is next-token cross-entropy over the text with landmarks.
Positions may jump ahead at landmarks: then a model meets distances beyond the length of its rows.
Mohtashami and Jaggi, 2023, arXiv:2305.16300.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxheads.attention.landmark_tokens import landmark_places
from jaxheads.data.packing import Batch, PackedBatches


def add_landmarks(
    batch: Batch,
    block_size: int,
    landmark_id: int,
    count_targets: bool = True,
    jumps: np.ndarray | None = None,
) -> Batch:
    """A batch [b,N] of the text with landmarks: [b,T], T the columns that hold N tokens of text.

    Args:
      batch: as `make_dataset` gives it.
      block_size: l, text tokens before each landmark.
      landmark_id: its id, which the text does not have.
      count_targets: landmarks count as targets, as much as the token that follows them; False:
        their weight is 0.
      jumps: [b, N // l] integers, one for each landmark: what the positions after it, in its
        document, are increased by, on top of what the landmarks before have added.
    Raises:
      ValueError: for a text that has the id.
    """
    if (batch["tokens"] == landmark_id).any():
        raise ValueError(
            f"the text holds landmark_id={landmark_id}; give an id that its tokenizer does not use"
        )
    num_tokens = batch["tokens"].shape[1]
    length = num_tokens + num_tokens // block_size
    is_landmark = landmark_places(length, block_size)
    source = np.arange(length) - np.cumsum(is_landmark)  # the last text token up to each place
    out = {name: value[:, source] for name, value in batch.items()}
    out["tokens"] = np.where(is_landmark, landmark_id, out["tokens"]).astype(np.int32)
    before = np.append(is_landmark[1:], False)  # tokens whose target is a landmark
    is_real = out["segment_ids"] != 0
    targets = np.where(before & is_real, landmark_id, out["targets"])
    out["targets"] = targets.astype(np.int32)
    if not count_targets:
        out["weights"] = np.where(before, 0, out["weights"]).astype(np.float32)
    place = np.broadcast_to(np.arange(length), out["tokens"].shape)
    if jumps is not None:
        ahead = np.zeros(place.shape, np.int64)
        ahead[:, is_landmark] = jumps
        place = place + np.cumsum(ahead, axis=1) - ahead  # those of the landmarks before
    out["positions"] = _positions(out["segment_ids"], place)
    return out


def _positions(segment_ids: np.ndarray, place: np.ndarray) -> np.ndarray:
    """[b,T] how far each token is from the first of its document, by places; 0 in padding."""
    begins = np.diff(segment_ids, axis=1, prepend=-1) != 0
    start = np.maximum.accumulate(np.where(begins, place, 0), axis=1)  # places grow
    return np.where(segment_ids != 0, place - start, 0).astype(np.int32)


class LandmarkBatches:
    """Packed batches with landmarks; the position in the data is that of the text.

    Args:
      batches: of the text.
      block_size, landmark_id, count_targets: as in `add_landmarks`.
      num_jumps: J; positions jump ahead at every landmark by 0 to J - 1, drawn for each row from
        seed, step and row alone.
      seed: of the jumps.
    """

    def __init__(
        self,
        batches: PackedBatches,
        block_size: int,
        landmark_id: int,
        count_targets: bool,
        num_jumps: int = 1,
        seed: int = 0,
    ):
        self._batches = batches
        self._num_jumps, self._seed, self._block_size = num_jumps, seed, block_size
        self._add = lambda batch, jumps: add_landmarks(
            batch, block_size, landmark_id, count_targets, jumps
        )

    def __iter__(self) -> LandmarkBatches:
        return self

    def __next__(self) -> Batch:
        step = self._batches.step
        batch = next(self._batches)
        if self._num_jumps == 1:
            return self._add(batch, None)
        count = batch["tokens"].shape[1] // self._block_size
        draw = lambda row: np.random.default_rng((self._seed, step, row)).integers(
            self._num_jumps, size=count
        )
        return self._add(batch, np.stack([draw(row) for row in self._batches.rows]))

    def get_state(self) -> dict[str, Any]:
        """Where the data stands, as JSON values."""
        return self._batches.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues exactly where `get_state` was called."""
        self._batches.set_state(state)

    def close(self) -> None:
        """Nothing to stop."""
