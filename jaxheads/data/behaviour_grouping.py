"""Grouping a log of behaviours by user without holding it in memory.

The log is read once. Its events go to files by a hash of the user, each of those is sorted in
memory by (user, time, place in the log), and too large ones are divided again first. In memory at a
time: a block of the log, one such file, and the tables of items and categories. Items and
categories are numbered from 1 in the order of their first event; 0 is padding.
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
from jaxheads.data.behaviours import ARRAYS, DATASET, FORMAT, Behaviours, open_behaviours

_BUCKET_BITS = 6
_NUM_BUCKETS = 1 << _BUCKET_BITS
_MAX_DEPTH = 64 // _BUCKET_BITS
_RECORD = np.dtype(
    [("user", "<i8"), ("time", "<i8"), ("line", "<i8"), ("item", "<i4"), ("category", "<i4")]
)
_LISTED = 10  # lines of odd events that are kept


def group_events(
    log: Iterable[Events], directory: str | Path, *, bucket_rows: int = 1 << 22
) -> Behaviours:
    """Groups the events of a log by user into a new directory.

    Events of equal user and time keep the order of the log; repeated events are kept (the time of a
    log may be as coarse as a day) and counted, as are events that come before an earlier one of
    their user, and events of an item under another category than its first. `info` of the result
    has the counts and the first lines of each.

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
        tables, num_events, odd = _distribute(log, buckets)
        if not num_events:
            report = f": {log.report}" if isinstance(log, BehaviourLog) else "."
            raise ValueError(f"the log holds no events{report}")
        num_users = _write_groups(buckets, building, tables, bucket_rows, odd)
        shutil.rmtree(buckets)
        info = {
            "format": FORMAT,
            "num_events": num_events,
            "num_users": num_users,
            "num_items": len(tables.items),
            "num_categories": len(tables.categories),
            **{f"{kind}_events": lines.count for kind, lines in odd.items()},
            **{f"first_{kind}_lines": lines.first for kind, lines in odd.items()},
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


class _Lines:
    """Counts odd events and keeps the first of their lines."""

    def __init__(self):
        self.count = 0
        self.first: list[int] = []

    def add(self, lines: np.ndarray) -> None:
        self.count += len(lines)
        self.first = sorted([*self.first, *np.sort(lines)[:_LISTED].tolist()])[:_LISTED]


_Odd = dict[str, _Lines]


def _distribute(log: Iterable[Events], buckets: Path) -> tuple[_Tables, int, _Odd]:
    """Writes numbered events into files by user; also their number, and what is odd about them."""
    tables = _Tables(_Vocabulary(), _Vocabulary(), np.zeros(1, np.int32))
    odd = {kind: _Lines() for kind in ("unsorted", "repeated", "other_category")}
    num_events = 0
    with _Buckets(buckets, depth=0) as files:
        for events in log:
            before = len(tables.items)
            item, category = tables.items(events.item), tables.categories(events.category)
            more = np.zeros(len(tables.items) - before, np.int32)
            tables.item_category = np.concatenate([tables.item_category, more])
            new = np.flatnonzero(item > before)[::-1]  # the first event of an item is written last
            tables.item_category[item[new]] = category[new]
            line = num_events + 1 + np.arange(len(item)) if events.line is None else events.line
            odd["other_category"].add(line[tables.item_category[item] != category])
            num_events += len(item)
            records = np.empty(len(item), _RECORD)
            records["line"] = line
            records["user"], records["time"] = events.user, events.time
            records["item"], records["category"] = item, category
            files.append(records)
    return tables, num_events, odd


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
    buckets: Path, directory: Path, tables: _Tables, bucket_rows: int, odd: _Odd
) -> int:
    """Writes all arrays, adds to `odd`, and returns the number of users."""
    with contextlib.ExitStack() as stack:
        columns = {
            name: stack.enter_context(_Column(directory / f"{name}.npy", ARRAYS[name]))
            for name in ("item", "category", "time", "offsets", "users")
        }
        counts = np.zeros(len(tables.items) + 1, np.int64)
        num_users = _fill(columns, counts, _small_buckets(buckets, bucket_rows), odd)
    arrays = {
        "item_ids": np.append(0, tables.items.raw()),
        "category_ids": np.append(0, tables.categories.raw()),
        "item_category": tables.item_category,
        "item_counts": counts,
    }
    for name, value in arrays.items():
        np.save(directory / f"{name}.npy", value.astype(ARRAYS[name]))
    return num_users


def _fill(
    columns: Mapping[str, _Column],
    counts: np.ndarray,
    parts: Iterable[np.ndarray],
    odd: _Odd,
) -> int:
    """Sorts the parts into the columns, counts events by item and user, and finds odd ones."""
    num_users = num_events = 0
    columns["offsets"].append(np.zeros(1))
    for records in parts:
        by_user = records[np.argsort(records["user"], kind="stable")]
        same = by_user["user"][1:] == by_user["user"][:-1]
        is_late = same & (by_user["time"][1:] < by_user["time"][:-1])
        odd["unsorted"].add(by_user["line"][1:][is_late])
        records = by_user[np.lexsort((by_user["time"], by_user["user"]))]  # stable
        odd["repeated"].add(_repeated(records))
        ends = np.flatnonzero(np.append(records["user"][1:] != records["user"][:-1], True)) + 1
        columns["offsets"].append(num_events + ends)
        columns["users"].append(records["user"][ends - 1])
        for name in ("item", "category", "time"):
            columns[name].append(records[name])
        np.add.at(counts, records["item"], 1)
        num_users += len(ends)
        num_events += len(records)
    return num_users


def _repeated(records: np.ndarray) -> np.ndarray:
    """Lines of events whose user, time and item an earlier line has."""
    order = np.lexsort((records["item"], records["time"], records["user"]))
    later, earlier = records[order[1:]], records[order[:-1]]
    same = [later[name] == earlier[name] for name in ("user", "time", "item")]
    return later["line"][np.logical_and.reduce(same)]


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
