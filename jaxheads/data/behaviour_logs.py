"""Logs of user behaviours as streams of columns, whatever the size of the file.

    log = open_log("taobao", "data/")          # UserBehavior.csv, or UserBehavior.csv.gz
    for events in log:                          # Events(user, item, category, time, ...), [n] each
        ...
    log.report                                  # rows kept, rows of other actions, malformed rows

Three layouts (`LAYOUTS`):
  taobao     UserBehavior.csv, no header: user,item,category,behaviour,timestamp; kept: pv
  tmall      user_log_format1.csv: user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type;
             kept: action 0 (click); time_stamp is month and day
  movielens  ratings.csv and movies.csv: an event is a rating of 4 stars or more, the category of a
             film its first genre
Each may be gzipped. A block of the file is parsed at a time with array operations. A row that does
not fit its layout is left out, counted, and the first ones are kept with their line numbers.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from jaxheads.data import columns
from jaxheads.fields import unknown

BLOCK_BYTES = 4 << 20  # of a file, parsed at a time
_EXAMPLES = 10  # malformed rows that a report spells out


class Events(NamedTuple):
    """Events of a log in the order of the file; int64 arrays [n] with the ids of the file."""

    user: np.ndarray
    item: np.ndarray
    category: np.ndarray
    time: np.ndarray
    line: np.ndarray | None = None
    """Lines of the file, from 1; None: the n-th event is on line n."""


class BadRow(NamedTuple):
    """A row that was left out."""

    file: str
    line: int
    """From 1."""
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}"


@dataclasses.dataclass
class LogReport:
    """What reading a log met; `rows` = `kept` + `other` + `malformed`."""

    rows: int = 0
    """Rows that are neither empty nor the header."""
    kept: int = 0
    other: int = 0
    """Well-formed rows of actions that are not kept."""
    malformed: int = 0
    first_malformed: list[BadRow] = dataclasses.field(default_factory=list)

    def add_malformed(self, rows: int, first: Sequence[BadRow]) -> None:
        """Counts malformed rows; `first` are some of them in order."""
        self.malformed += rows
        self.first_malformed += first[: _EXAMPLES - len(self.first_malformed)]

    def __str__(self) -> str:
        text = f"{self.rows} rows: {self.kept} kept, {self.other} of other actions"
        if not self.malformed:
            return text
        more = self.malformed - len(self.first_malformed)
        lines = [*map(str, self.first_malformed), *([f"and {more} more"] if more else [])]
        return "\n  ".join([f"{text}, {self.malformed} malformed:", *lines])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A file of events: comma-separated, one event a row."""

    file: str
    """Its usual name."""
    columns: tuple[str, ...]
    has_header: bool
    user: str
    item: str
    category: str | None
    """None: a property of the item, from a second file."""
    time: str
    action: str
    actions: tuple[str, ...]
    """What the column `action` may hold."""
    keep: tuple[str, ...]
    """Actions that are events."""


_STARS = tuple(f"{n // 2}.{n % 2 * 5}" for n in range(1, 11)) + tuple("12345")
LAYOUTS: Mapping[str, Layout] = {
    "taobao": Layout(
        file="UserBehavior.csv",
        columns=("user", "item", "category", "behaviour", "timestamp"),
        has_header=False,
        user="user",
        item="item",
        category="category",
        time="timestamp",
        action="behaviour",
        actions=("pv", "buy", "cart", "fav"),
        keep=("pv",),
    ),
    "tmall": Layout(
        file="user_log_format1.csv",
        columns=(
            "user_id",
            "item_id",
            "cat_id",
            "seller_id",
            "brand_id",
            "time_stamp",
            "action_type",
        ),
        has_header=True,
        user="user_id",
        item="item_id",
        category="cat_id",
        time="time_stamp",
        action="action_type",
        actions=("0", "1", "2", "3"),
        keep=("0",),
    ),
    "movielens": Layout(
        file="ratings.csv",
        columns=("userId", "movieId", "rating", "timestamp"),
        has_header=True,
        user="userId",
        item="movieId",
        category=None,
        time="timestamp",
        action="rating",
        actions=_STARS,
        keep=("4", "4.0", "4.5", "5", "5.0"),
    ),
}
_MOVIES = "movies.csv"
_NO_GENRE = "(no genres listed)"


class BehaviourLog:
    """An iterable of `Events`; every iteration reads the file from the start.

    Attributes:
      layout: how its rows are written.
      report: of the iteration under way, or the last one.
      category_names: name of every category id, where the file has names.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        *,
        categories: ItemCategories | None,
        keep: Sequence[str],
        max_bad_rows: int | None,
        block_bytes: int,
    ):
        self.path = path
        self.layout = layout
        self.report = LogReport()
        self.category_names = categories.names if categories else ()
        self._categories = categories
        self._keep = tuple(keep)
        self._max_bad_rows = max_bad_rows
        self._block_bytes = block_bytes

    def __iter__(self) -> Iterator[Events]:
        self.report = LogReport()
        if self._categories is not None:
            self.report.add_malformed(len(self._categories.malformed), self._categories.malformed)
            self.report.rows += self.report.malformed
        line = 1
        with _open(self.path) as stream:
            for block in _blocks(stream, self.path, self._block_bytes):
                if line == 1:
                    block = block.removeprefix(b"\xef\xbb\xbf")
                if line == 1 and self.layout.has_header:
                    block = self._skip_header(block)
                    line = 2
                yield self._parse(np.frombuffer(block, np.uint8), line)
                line += block.count(b"\n")
        self._check()

    def _skip_header(self, block: bytes) -> bytes:
        header, _, rest = block.partition(b"\n")
        found = header.decode("utf-8", "replace").strip()
        needed = ",".join(self.layout.columns)
        if found != needed:
            raise ValueError(f"{self.path.name} begins with {found[:200]!r}, needed {needed!r}.")
        return rest

    def _parse(self, data: np.ndarray, first_line: int) -> Events:
        layout = self.layout
        starts, ends = columns.lines(data)
        lines = first_line + np.arange(len(starts))
        filled = ends > starts
        starts, ends, lines = starts[filled], ends[filled], lines[filled]
        self.report.rows += len(lines)
        num_fields, begins, stops = columns.split(data, starts, ends, len(layout.columns))
        is_row = num_fields == len(layout.columns)
        reasons = [
            (line, f"{n} fields, needed {len(layout.columns)}")
            for line, n in zip(lines[~is_row].tolist(), num_fields[~is_row].tolist())
        ]
        lines = lines[is_row]

        good = np.ones(len(lines), bool)
        values: dict[str, np.ndarray] = {}
        for role in ("user", "item", "category", "time"):
            column = getattr(layout, role)
            if column is not None:
                at = layout.columns.index(column)
                value, fits = columns.integers(data, begins[:, at], stops[:, at])
                fits &= (value >= 0) | (role == "time")
                reasons += _reasons(lines, good & ~fits, f"{column} is not a number")
                good &= fits
                values[role] = value
        at = layout.columns.index(layout.action)
        action, fits = columns.words(data, begins[:, at], stops[:, at], layout.actions)
        reasons += _reasons(lines, good & ~fits, f"unknown {layout.action}")
        good &= fits
        if self._categories is not None:
            values["category"], fits = self._categories.of(values["item"])
            reasons += _reasons(lines, good & ~fits, f"{layout.item} is not in {_MOVIES}")
            good &= fits

        kept = good & np.isin(action, [layout.actions.index(word) for word in self._keep])
        self.report.kept += int(kept.sum())
        self.report.other += int((good & ~kept).sum())
        first = [BadRow(self.path.name, *reason) for reason in sorted(reasons)[:_EXAMPLES]]
        self.report.add_malformed(len(reasons), first)
        self._check()
        columns_ = {name: value[kept] for name, value in values.items()}
        return Events(**columns_, line=lines[kept])

    def _check(self) -> None:
        most = self._max_bad_rows
        if most is not None and self.report.malformed > most:
            raise ValueError(
                f"{self.path} has more than max_bad_rows={most} malformed rows; {self.report}\n"
                "Repair the file, choose the dataset it is of, or allow more."
            )


def open_log(
    dataset: str,
    data_dir: str | Path,
    *,
    keep: Sequence[str] | None = None,
    max_bad_rows: int | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> BehaviourLog:
    """The log of a data set in a directory; nothing but the films of MovieLens is read yet.

    Args:
      dataset: taobao, tmall or movielens.
      data_dir: directory with the file under its usual name, or the file; may end in .gz.
      keep: actions that are events, as the file spells them; None: see the module's docstring.
      max_bad_rows: more malformed rows are an error; None: they are only counted.
      block_bytes: of the file, parsed at a time.
    Raises:
      ValueError: for an unknown data set or action, a missing file, and while iterating, for a
        header of another layout, a damaged .gz, or too many malformed rows.
    """
    if dataset not in LAYOUTS:
        raise ValueError(unknown("dataset", dataset, LAYOUTS))
    layout = LAYOUTS[dataset]
    for word in keep or ():
        if word not in layout.actions:
            raise ValueError(unknown(layout.action, word, layout.actions))
    for name, value, least in (
        ("max_bad_rows", max_bad_rows or 0, 0),
        ("block_bytes", block_bytes, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")
    path = _find(Path(data_dir), layout.file)
    categories = None
    if layout.category is None:
        categories = _read_movies(_find(path.parent, _MOVIES))
    return BehaviourLog(
        path,
        layout,
        categories=categories,
        keep=layout.keep if keep is None else keep,
        max_bad_rows=max_bad_rows,
        block_bytes=block_bytes,
    )


def _find(place: Path, name: str) -> Path:
    place = place.expanduser()
    if place.is_file():
        return place
    for candidate in (place / name, place / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    there = sorted(p.name for p in place.iterdir())[:10] if place.is_dir() else None
    holds = "does not exist" if there is None else f"holds {', '.join(there) or 'nothing'}"
    raise ValueError(f"needed {name} or {name}.gz in {place}, which {holds}.")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")  # type: ignore


def _blocks(stream: IO[bytes], path: Path, block_bytes: int) -> Iterator[bytes]:
    """Whole lines, at least `block_bytes` of the file in every block but the last."""
    rest, line = b"", 1
    while True:
        try:
            data = stream.read(block_bytes)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is truncated or is not gzip ({error}).") from error
        if not data:
            break
        cut = data.rfind(b"\n") + 1
        if cut:
            yield rest + data[:cut]
            line += data.count(b"\n")
            rest = data[cut:]
        else:
            rest += data
            if len(rest) > max(block_bytes, 1 << 16):
                raise ValueError(
                    f"{path}, line {line} has more than {len(rest) - 1} bytes; the file is not "
                    "comma-separated text with an event a line."
                )
    if rest:
        yield rest + b"\n"


def _reasons(lines: np.ndarray, bad: np.ndarray, reason: str) -> list[tuple[int, str]]:
    return [(line, reason) for line in lines[bad].tolist()]


class ItemCategories(NamedTuple):
    """A category for every item."""

    items: np.ndarray
    """[n] ids, ascending."""
    categories: np.ndarray
    """[n] index into `names`."""
    names: tuple[str, ...]
    malformed: list[BadRow]

    def of(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Category of each item, and whether it has one."""
        if not len(self.items):
            return np.zeros_like(items), np.zeros(len(items), bool)
        at = np.minimum(np.searchsorted(self.items, items), len(self.items) - 1)
        return self.categories[at], self.items[at] == items


def _read_movies(path: Path) -> ItemCategories:
    """The first genre of every film of movies.csv (movieId,title,genres)."""
    found: dict[int, str] = {}
    malformed: list[BadRow] = []
    with _open(path) as stream:
        lines = (line.decode("utf-8", "replace") for line in stream)
        reader = csv.reader(lines)
        header = next(reader, [])
        if header != ["movieId", "title", "genres"]:
            raise ValueError(
                f"{path.name} begins with {','.join(header)[:200]!r}, needed "
                "'movieId,title,genres'."
            )
        for row in itertools.filterfalse(lambda row: not row, reader):
            if len(row) == 3 and row[0].isascii() and row[0].isdecimal():
                found.setdefault(int(row[0]), row[2].partition("|")[0].strip() or _NO_GENRE)
            else:
                reason = f"{','.join(row)[:80]!r} is not movieId,title,genres"
                malformed.append(BadRow(path.name, reader.line_num, reason))
    names = tuple(sorted(set(found.values())))
    items = np.asarray(sorted(found), np.int64)
    codes = np.asarray([names.index(found[item]) for item in items.tolist()], np.int64)
    return ItemCategories(items, codes, names, malformed)


def report_json(report: LogReport) -> dict[str, Any]:
    """The report as JSON values."""
    return dataclasses.asdict(report) | {
        "first_malformed": [str(r) for r in report.first_malformed]
    }
