"""Landmarks in packed rows: after every l tokens of a row, whatever documents it holds.

A landmark belongs to the document of the token before it. Its target is that token's, whose own
target becomes the landmark: the loss is next-token cross-entropy over the text with landmarks.
Mohtashami and Jaggi, 2023, arXiv:2305.16300.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxheads.attention.landmark_tokens import landmark_places
from jaxheads.data.packing import Batch, PackedBatches


def add_landmarks(
    batch: Batch, block_size: int, landmark_id: int, count_targets: bool = True
) -> Batch:
    """A batch [b,N] of the text with landmarks: [b,T], T the columns that hold N tokens of text.

    Args:
      batch: as `make_dataset` gives it.
      block_size: l, text tokens before each landmark.
      landmark_id: its id, which the text does not have.
      count_targets: landmarks count as targets, as much as the token that follows them; False:
        their weight is 0.
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
    out["positions"] = _positions(out["segment_ids"])
    return out


def _positions(segment_ids: np.ndarray) -> np.ndarray:
    """[b,N] places in documents, from 0; 0 in padding."""
    index = np.arange(segment_ids.shape[1])
    begins = np.diff(segment_ids, axis=1, prepend=-1) != 0
    start = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    return np.where(segment_ids != 0, index - start, 0).astype(np.int32)


class LandmarkBatches:
    """Packed batches with landmarks; the position in the data is that of the text."""

    def __init__(
        self, batches: PackedBatches, block_size: int, landmark_id: int, count_targets: bool
    ):
        self._batches = batches
        self._add = lambda batch: add_landmarks(batch, block_size, landmark_id, count_targets)

    def __iter__(self) -> LandmarkBatches:
        return self

    def __next__(self) -> Batch:
        return self._add(next(self._batches))

    def get_state(self) -> dict[str, Any]:
        """Where the data stands, as JSON values."""
        return self._batches.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues exactly where `get_state` was called."""
        self._batches.set_state(state)

    def close(self) -> None:
        """Nothing to stop."""
