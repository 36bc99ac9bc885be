"""Behaviours grouped by user, on disk: from a log of any size to a mapped data set.

    data = group_events(open_log("taobao", "data/"), "grouped/")     # once
    data = open_behaviours("grouped/")                               # any time after
    item, category = data.user_events(7)                             # one user's, oldest first

The directory holds flat .npy arrays, events grouped by user:
  item, category int32 [N], time int64 [N]       of every event
  offsets int64 [U+1], users int64 [U]           user u has the events offsets[u]:offsets[u+1]
  item_ids, category_ids int64                   ids of the log, by our number
  item_category int32, item_counts int64         of every item: its first category, its events
and dataset.json with the sizes and what was found on the way.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

DATASET = "dataset.json"
FORMAT = "jaxheads behaviours 1"
ARRAYS = {
    "item": np.dtype("<i4"),
    "category": np.dtype("<i4"),
    "time": np.dtype("<i8"),
    "offsets": np.dtype("<i8"),
    "users": np.dtype("<i8"),
    "item_ids": np.dtype("<i8"),
    "category_ids": np.dtype("<i8"),
    "item_category": np.dtype("<i4"),
    "item_counts": np.dtype("<i8"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Behaviours:
    """A data set on disk, mapped; see the module's docstring for its arrays."""

    directory: Path
    item: np.ndarray
    category: np.ndarray
    time: np.ndarray
    offsets: np.ndarray
    users: np.ndarray
    item_ids: np.ndarray
    category_ids: np.ndarray
    item_category: np.ndarray
    item_counts: np.ndarray
    info: dict[str, Any]
    """What dataset.json holds."""

    def __repr__(self) -> str:
        sizes = f"{self.num_users} users, {self.num_items} items, {self.num_categories} categories"
        return f"Behaviours({len(self.item)} events, {sizes})"

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.users)

    @property
    def num_items(self) -> int:
        """Items without padding."""
        return len(self.item_ids) - 1

    @property
    def num_categories(self) -> int:
        """Categories without padding."""
        return len(self.category_ids) - 1

    def user_events(self, user: int) -> tuple[np.ndarray, np.ndarray]:
        """Items and categories [n] of a user's events, oldest first.

        Raises:
          ValueError: for a number that is not in 0 to U-1.
        """
        if not 0 <= user < self.num_users:
            raise ValueError(f"user {user} is not in 0 to {self.num_users - 1}.")
        here = slice(int(self.offsets[user]), int(self.offsets[user + 1]))
        return self.item[here], self.category[here]


def open_behaviours(directory: str | Path) -> Behaviours:
    """The data set that `group_events` wrote into a directory.

    Raises:
      ValueError: for a directory without one, or with arrays that do not fit together.
    """
    directory = Path(directory).expanduser()
    try:
        info = json.loads((directory / DATASET).read_text("utf-8"))
        if not isinstance(info, dict) or info.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        files = {name: directory / f"{name}.npy" for name in ARRAYS}
        # Plain views of the maps: slices of `np.memmap` cost ten times as much.
        arrays = {
            name: np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
            for name, file in files.items()
        }
        data = Behaviours(directory, info=info, **arrays)
        _check_sizes(data)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{directory} holds no complete grouped data set ({error}); write it with group_events."
        ) from error
    return data


def _check_sizes(data: Behaviours) -> None:
    info = data.info
    items, categories = int(info["num_items"]) + 1, int(info["num_categories"]) + 1
    events, users = int(info["num_events"]), int(info["num_users"])
    needed = {
        "item": events,
        "category": events,
        "time": events,
        "offsets": users + 1,
        "users": users,
        "item_ids": items,
        "category_ids": categories,
        "item_category": items,
        "item_counts": items,
    }
    for name, size in needed.items():
        array = getattr(data, name)
        if array.shape != (size,) or array.dtype != ARRAYS[name]:
            raise ValueError(
                f"{name}.npy holds {array.dtype}{list(array.shape)}, needed {ARRAYS[name]}[{size}]"
            )
