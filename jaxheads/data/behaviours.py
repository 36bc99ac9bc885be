"""Behaviours grouped by user, on disk: from a log of any size to a mapped data set.

    data = group_events(open_log("taobao", "data/"), "grouped/")     # once
    data = open_behaviours("grouped/")                               # any time after
    item, category = data.user_events(7)                             # one user's, oldest first

The log is read once. Its events go to files by a hash of the user, each of those is sorted in
memory by (user, time, place in the log), and too large ones are divided again first. In memory at a
time: a block of the log, one such file, and the tables of items and categories. Items and
categories are numbered from 1 in the order of their first event; 0 is padding.

The directory holds flat .npy arrays, events grouped by user:
  item, category int32 [N], time int64 [N]       of every event
  offsets int64 [U+1], users int64 [U]           user u has the events offsets[u]:offsets[u+1]
  item_ids, category_ids int64                   ids of the log, by our number
  item_category int32, item_counts int64         of every item: its first category, its events
and dataset.json with the sizes and what was found on the way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxheads.data.behaviour_logs import BehaviourLog, Events, report_json

DATASET = "dataset.json"
_FORMAT = "jaxheads behaviours 1"
_BUCKET_BITS = 6
_NUM_BUCKETS = 1 << _BUCKET_BITS
_MAX_DEPTH = 64 // _BUCKET_BITS
_RECORD = np.dtype([("user", "<i8"), ("time", "<i8"), ("item", "<i4"), ("category", "<i4")])
_ARRAYS = {
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
        if not isinstance(info, dict) or info.get("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT!r}")
        files = {name: directory / f"{name}.npy" for name in _ARRAYS}
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
        if array.shape != (size,) or array.dtype != _ARRAYS[name]:
            raise ValueError(
                f"{name}.npy holds {array.dtype}{list(array.shape)}, needed {_ARRAYS[name]}[{size}]"
            )


def group_events(
    log: Iterable[Events], directory: str | Path, *, bucket_rows: int = 1 << 22
) -> Behaviours:
    """Groups the events of a log by user into a new directory.

    Events of equal user and time keep the order of the log; repeated events are kept (the time of a
    log may be as coarse as a day) and counted, as are events that come before an earlier one of
    their user, and events of an item under another category than its first.

    Args:
      log: a `BehaviourLog`, or any iterable of `Events`.
      directory: is made; appears only when it is complete.
      bucket_rows: events that are sorted in memory at a time; a user with more is sorted alone.
    Raises:
      ValueError: for a directory that is there already, a log without events, and what reading the
        log raises.
    """
    directory = Path(directory).expanduser()
    if bucket_rows < 1:
        raise ValueError(f"bucket_rows={bucket_rows} must be at least 1.")
    if directory.exists():
        raise ValueError(
            f"{directory} exists; give a new directory, or open it with open_behaviours."
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        buckets = building / "buckets"
        tables, num_events, conflicts = _distribute(log, buckets)
        if not num_events:
            report = f": {log.report}" if isinstance(log, BehaviourLog) else "."
            raise ValueError(f"the log holds no events{report}")
        num_users, unsorted, repeated = _write_groups(buckets, building, tables, bucket_rows)
        shutil.rmtree(buckets)
        info = {
            "format": _FORMAT,
            "num_events": num_events,
            "num_users": num_users,
            "num_items": len(tables.items),
            "num_categories": len(tables.categories),
            "unsorted_events": unsorted,
            "repeated_events": repeated,
            "other_category_events": conflicts,
        }
        if isinstance(log, BehaviourLog):
            info |= {"file": log.path.name, "log": report_json(log.report)}
            named = (
                [log.category_names[i] for i in tables.categories.raw()]
                if (log.category_names)
                else []
            )
            info["category_names"] = named
        (building / DATASET).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        os.chmod(building, 0o755)  # mkdtemp keeps others out
        os.replace(building, directory)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return open_behaviours(directory)


class _Vocabulary:
    """Numbers ids from 1 in the order in which they are first seen."""

    def __init__(self):
        self._known = np.zeros(0, np.int64)  # ascending
        self._numbers = np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self._known)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        unique, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        at = np.searchsorted(self._known, unique)
        is_new = np.ones(len(unique), bool)
        old = np.flatnonzero(at < len(self))
        is_new[old] = self._known[at[old]] != unique[old]
        numbers = np.empty(len(unique), np.int32)
        numbers[~is_new] = self._numbers[at[~is_new]]
        new = np.flatnonzero(is_new)
        numbers[new[np.argsort(first[new])]] = len(self) + 1 + np.arange(len(new))
        self._numbers = np.insert(self._numbers, at[new], numbers[new])
        self._known = np.insert(self._known, at[new], unique[new])
        return numbers[inverse]

    def raw(self) -> np.ndarray:
        """The id that each number stands for, from number 1."""
        return self._known[np.argsort(self._numbers)]


@dataclasses.dataclass
class _Tables:
    items: _Vocabulary
    categories: _Vocabulary
    item_category: np.ndarray  # [items+1], of each item's first event


def _distribute(log: Iterable[Events], buckets: Path) -> tuple[_Tables, int, int]:
    """Writes numbered events into files by user; also their number and conflicting categories."""
    tables = _Tables(_Vocabulary(), _Vocabulary(), np.zeros(1, np.int32))
    num_events = conflicts = 0
    with _Buckets(buckets, depth=0) as files:
        for events in log:
            before = len(tables.items)
            item, category = tables.items(events.item), tables.categories(events.category)
            more = np.zeros(len(tables.items) - before, np.int32)
            tables.item_category = np.concatenate([tables.item_category, more])
            new = np.flatnonzero(item > before)[::-1]  # the first event of an item is written last
            tables.item_category[item[new]] = category[new]
            conflicts += int((tables.item_category[item] != category).sum())
            num_events += len(item)
            records = np.empty(len(item), _RECORD)
            records["user"], records["time"] = events.user, events.time
            records["item"], records["category"] = item, category
            files.append(records)
    return tables, num_events, conflicts


def _hash(users: np.ndarray) -> np.ndarray:
    """Well-mixed uint64 of each id (splitmix64)."""
    x = users.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _Buckets:
    """Files of records, divided by the hash of their users."""

    def __init__(self, directory: Path, depth: int):
        directory.mkdir()
        self._shift = np.uint64(depth * _BUCKET_BITS)
        self._files = [open(directory / f"{i:02d}", "wb") for i in range(_NUM_BUCKETS)]  # noqa: SIM115

    def __enter__(self) -> _Buckets:
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self._files:
            file.close()

    def append(self, records: np.ndarray) -> None:
        """Adds records; those of one user stay in their order."""
        bucket = (_hash(records["user"]) >> self._shift) & np.uint64(_NUM_BUCKETS - 1)
        order = np.argsort(bucket, kind="stable")
        ends = np.searchsorted(bucket[order], np.arange(_NUM_BUCKETS, dtype=np.uint64), "right")
        for file, part in zip(self._files, np.split(records[order], ends[:-1])):
            file.write(part.tobytes())


def _small_buckets(directory: Path, bucket_rows: int, depth: int = 0) -> Iterator[np.ndarray]:
    """The records of all files, those of a user together; large files are divided further."""
    for path in sorted(directory.iterdir()):
        rows = path.stat().st_size // _RECORD.itemsize
        mapped = np.memmap(path, _RECORD, "r", shape=(rows,)) if rows else np.zeros(0, _RECORD)
        is_large = rows > bucket_rows and depth + 1 < _MAX_DEPTH
        if is_large and _has_other_users(mapped, bucket_rows):
            inner = path.with_name(f"{path.name}-divided")
            with _Buckets(inner, depth + 1) as files:
                for start in range(0, rows, bucket_rows):
                    files.append(np.array(mapped[start : start + bucket_rows]))
            yield from _small_buckets(inner, bucket_rows, depth + 1)
            shutil.rmtree(inner)
        elif rows:
            yield np.array(mapped)
        path.unlink()


def _has_other_users(records: np.ndarray, step: int) -> bool:
    parts = (records["user"][start : start + step] for start in range(0, len(records), step))
    return any((part != records["user"][0]).any() for part in parts)


def _write_groups(
    buckets: Path, directory: Path, tables: _Tables, bucket_rows: int
) -> tuple[int, int, int]:
    """Writes all arrays; the number of users, of unsorted and of repeated events."""
    with contextlib.ExitStack() as stack:
        columns = {
            name: stack.enter_context(_Column(directory / f"{name}.npy", _ARRAYS[name]))
            for name in ("item", "category", "time", "offsets", "users")
        }
        counts, num_users, unsorted, repeated = _fill(
            columns, buckets, len(tables.items), bucket_rows
        )
    arrays = {
        "item_ids": np.append(0, tables.items.raw()),
        "category_ids": np.append(0, tables.categories.raw()),
        "item_category": tables.item_category,
        "item_counts": counts,
    }
    for name, value in arrays.items():
        np.save(directory / f"{name}.npy", value.astype(_ARRAYS[name]))
    return num_users, unsorted, repeated


def _fill(
    columns: Mapping[str, _Column], buckets: Path, num_items: int, bucket_rows: int
) -> tuple[np.ndarray, int, int, int]:
    """Sorts the files into the columns; events of each item, and what `_write_groups` counts."""
    counts = np.zeros(num_items + 1, np.int64)
    num_users = num_events = unsorted = repeated = 0
    columns["offsets"].append(np.zeros(1))
    for records in _small_buckets(buckets, bucket_rows):
        by_user = records[np.argsort(records["user"], kind="stable")]
        same = by_user["user"][1:] == by_user["user"][:-1]
        unsorted += int((same & (by_user["time"][1:] < by_user["time"][:-1])).sum())
        records = by_user[np.lexsort((by_user["time"], by_user["user"]))]  # stable
        repeated += _num_repeated(records)
        ends = np.flatnonzero(np.append(records["user"][1:] != records["user"][:-1], True)) + 1
        columns["offsets"].append(num_events + ends)
        columns["users"].append(records["user"][ends - 1])
        for name in ("item", "category", "time"):
            columns[name].append(records[name])
        np.add.at(counts, records["item"], 1)
        num_users += len(ends)
        num_events += len(records)
    return counts, num_users, unsorted, repeated


def _num_repeated(records: np.ndarray) -> int:
    """Events whose user, time and item an earlier one has."""
    order = np.lexsort((records["item"], records["time"], records["user"]))
    later, earlier = records[order[1:]], records[order[:-1]]
    same = [later[name] == earlier[name] for name in ("user", "time", "item")]
    return int(np.logical_and.reduce(same).sum())


class _Column:
    """A one-dimensional .npy file that grows."""

    def __init__(self, path: Path, dtype: np.dtype):
        self._dtype = dtype
        self._length = 0
        self._file = open(path, "wb")  # noqa: SIM115
        self._header()
        self._start = self._file.tell()

    def _header(self) -> None:
        description = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._length,),
        }
        # NumPy leaves room in a header for the length to grow.
        np.lib.format.write_array_header_1_0(self._file, description)

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self._dtype).tobytes())
        self._length += len(values)

    def __enter__(self) -> _Column:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.seek(0)
        self._header()
        if self._file.tell() != self._start:
            raise RuntimeError(f"the header of {self._file.name} grew over its data.")
        self._file.close()
