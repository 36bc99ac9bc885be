"""Requests for click probabilities: JSON lines in, padded batches and JSON lines out.

A request is one JSON object on a line:
    {"user": 17, "item": 4203}
    {"history": [[12, 3], [40, 1]], "item": 7, "category": 3}
The first asks about a user of the data set; the second brings its behaviours [item, category],
oldest first, or in any order with "times": [9, 8]. With a data set, ids are those of its log and
an item's category is known; without one, they are the model's own (from 1). A request that cannot
be answered gets {"line": n, "error": "..."}; what was odd about the others is in their "notes".
Both are counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxheads.data import Behaviours

_MAX_LINE = 64 << 20  # bytes: a history of 10^5 behaviours is 2 MB
_LISTED = 10


class Request(NamedTuple):
    """A request in the model's own ids."""

    line: int
    item: int
    category: int
    history: np.ndarray
    """[n,2] int32 item and category, oldest first."""
    raw: np.ndarray
    """[n] items as they were given."""
    notes: tuple[str, ...] = ()


class Refused(NamedTuple):
    """A line that no answer is possible for."""

    line: int
    error: str


class Ids:
    """What the ids of requests mean: those of a data set's log, or the model's own."""

    def __init__(self, data: Behaviours | None, num_items: int, num_categories: int):
        if data is not None and (data.num_items, data.num_categories) != (
            num_items,
            num_categories,
        ):
            raise ValueError(
                f"the data set has {data.num_items} items and {data.num_categories} categories, "
                f"the model {num_items} and {num_categories}; give the data set it was trained on."
            )
        self.data = data
        self._sizes = {"item": num_items, "category": num_categories}
        self._sorted: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        if data is not None:
            for name in ("item_ids", "category_ids", "users"):
                values = np.asarray(getattr(data, name))
                order = np.argsort(values, kind="stable")
                self._sorted[name] = values[order], order

    def _find(self, table: str, ids: np.ndarray, what: str) -> np.ndarray:
        values, order = self._sorted[table]
        at = np.minimum(np.searchsorted(values, ids), len(values) - 1)
        missing = (values[at] != ids) | ((table != "users") & (order[at] == 0))
        if missing.any():
            raise ValueError(f"{what} {ids[missing][0]} is not in the data set")
        return order[at]

    def numbers(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Our numbers of items or categories; `ValueError` for one that is not known."""
        if self.data is not None:
            return self._find(f"{name}_ids", ids, name)
        outside = (ids < 1) | (ids > self._sizes[name])
        if outside.any():
            raise ValueError(f"{name} {ids[outside][0]} is not in 1 to {self._sizes[name]}")
        return ids

    def user(self, user: int) -> tuple[np.ndarray, np.ndarray]:
        """[n,2] behaviours of a user, and [n] its items as in the log."""
        if self.data is None:
            raise ValueError("'user' needs a data set (--data); give the 'history' itself")
        number = int(self._find("users", np.asarray([user]), "user")[0])
        item, category = self.data.user_events(number)
        return np.stack([item, category], axis=1), self.data.item_ids[item]


def parse(line: str, number: int, ids: Ids, max_history: int) -> Request | Refused:
    """One line as a request; the newest `max_history` behaviours of a longer history are kept."""
    try:
        return _parse(json.loads(line), number, ids, max_history)
    except RecursionError:
        return Refused(number, "not valid JSON: nested too deeply")
    except json.JSONDecodeError as error:
        return Refused(number, f"not valid JSON: {error}")
    except (ValueError, OverflowError) as error:
        return Refused(number, str(error))


_FIELDS = {"user", "item", "category", "history", "times"}


def _parse(given: Any, number: int, ids: Ids, max_history: int) -> Request:
    if not isinstance(given, dict):
        raise ValueError(f"holds a {type(given).__name__}, needed an object such as " + _EXAMPLE)
    unknown = sorted(given.keys() - _FIELDS)
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; known: {', '.join(sorted(_FIELDS))}")
    if ("user" in given) == ("history" in given):
        raise ValueError("give either 'user' or 'history', as in " + _EXAMPLE)
    notes = []
    if "user" in given:
        history, raw = ids.user(_integer(given, "user"))
    else:
        pairs = _pairs(given["history"])
        if "times" in given:
            pairs, is_sorted = _in_order(pairs, given["times"])
            notes += [] if is_sorted else ["unsorted times"]
        columns = [ids.numbers(name, pairs[:, i]) for i, name in enumerate(("item", "category"))]
        history, raw = np.stack(columns, axis=1), pairs[:, 0]
    item = int(ids.numbers("item", np.asarray([_integer(given, "item")]))[0])
    if "category" in given:
        category = int(ids.numbers("category", np.asarray([_integer(given, "category")]))[0])
    elif ids.data is not None:
        category = int(ids.data.item_category[item])
    else:
        raise ValueError("'category' of the item is missing, and there is no data set to know it")
    if not len(history):
        notes.append("empty history")
    if len(history) > max_history:
        notes.append(f"history cut to the newest {max_history}")
        history, raw = history[-max_history:], raw[-max_history:]
    return Request(number, item, category, history.astype(np.int32), raw, tuple(notes))


_EXAMPLE = '{"history": [[12, 3], [40, 1]], "item": 7, "category": 3}'


def _integer(given: dict[str, Any], name: str) -> int:
    if name not in given:
        raise ValueError(f"{name!r} is missing, as in {_EXAMPLE}")
    if type(given[name]) is not int:
        raise ValueError(f"{name}={given[name]!r} is not an integer")
    return given[name]


def _integers(values: list[Any], what: str) -> np.ndarray:
    if not all(type(value) is int for value in values):
        raise ValueError(f"{what} must hold integers")
    return np.asarray(values, np.int64)


def _pairs(history: Any) -> np.ndarray:
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise ValueError("'history' must be a list of [item, category]")
    return _integers([x for pair in history for x in pair], "'history'").reshape(-1, 2)


def _in_order(pairs: np.ndarray, times: Any) -> tuple[np.ndarray, bool]:
    if not isinstance(times, list) or len(times) != len(pairs):
        raise ValueError("'times' must be a list with one time for each behaviour")
    stamps = _integers(times, "'times'")
    return pairs[np.argsort(stamps, kind="stable")], bool((np.diff(stamps) >= 0).all())


def read(lines: Iterable[str], ids: Ids, max_history: int) -> Iterator[Request | Refused]:
    """The requests of a stream of lines; empty lines are passed over."""
    for number, line in enumerate(lines, 1):
        if len(line) > _MAX_LINE:
            yield Refused(number, f"longer than {_MAX_LINE} characters")
        elif line.strip():
            yield parse(line, number, ids, max_history)


def synthetic(
    count: int, length: int, num_items: int, num_categories: int, seed: int
) -> Iterator[Request]:
    """Requests of random users with `length` behaviours each."""
    rng = np.random.default_rng(seed)
    for number in range(1, count + 1):
        history = np.stack(
            [rng.integers(1, n + 1, length) for n in (num_items, num_categories)], axis=1
        ).astype(np.int32)
        item, category = (int(rng.integers(1, n + 1)) for n in (num_items, num_categories))
        yield Request(number, item, category, history, history[:, 0])


def bucket(length: int, *, shortest: int, longest: int, multiple: int) -> int:
    """The padded length of a history: the next of shortest, 2 shortest, 4 shortest, ..., longest.

    Few lengths mean few programs to compile. All are multiples of `multiple`, and so must `longest`
    be.
    """
    size = -(-shortest // multiple) * multiple
    while size < length:
        size *= 2
    return min(size, longest)


def pad(requests: Sequence[Request], rows: int, length: int) -> dict[str, np.ndarray]:
    """A batch [rows] of the requests, histories [rows, length] padded in front with 0."""
    batch = {
        "item": np.zeros(rows, np.int32),
        "category": np.zeros(rows, np.int32),
        "history_item": np.zeros((rows, length), np.int32),
        "history_category": np.zeros((rows, length), np.int32),
    }
    for row, request in enumerate(requests):
        batch["item"][row], batch["category"][row] = request.item, request.category
        size = len(request.history)
        batch["history_item"][row, length - size :] = request.history[:, 0]
        batch["history_category"][row, length - size :] = request.history[:, 1]
    return batch


def answer(
    request: Request, probability: float, index: np.ndarray, weights: np.ndarray, length: int
) -> dict[str, Any]:
    """The answer to one request; `index` counts from the padded front of `length` behaviours.

    `top` lists the behaviours that the probability rests on: place from the newest (1), item and
    weight, heaviest first.
    """
    size = len(request.history)
    top = [
        {
            "position": length - at,
            "item": int(request.raw[at - (length - size)]),
            "weight": round(weight, 6),
        }
        for at, weight in zip(index.tolist(), weights.tolist())
        if weight > 0
    ]
    found = {"line": request.line, "probability": round(probability, 6), "top": top}
    return found | ({"notes": list(request.notes)} if request.notes else {})


class Oddities:
    """Counts what was wrong or odd, with the first lines of each kind."""

    def __init__(self):
        self._counts: Counter[str] = Counter()
        self._lines: dict[str, list[int]] = {}
        self.refused = 0

    def add(self, request: Request | Refused) -> None:
        """Counts one request's error or notes."""
        if isinstance(request, Refused):
            self.refused += 1
        kinds = ("refused",) if isinstance(request, Refused) else request.notes
        for kind in kinds:
            self._counts[kind] += 1
            lines = self._lines.setdefault(kind, [])
            if len(lines) < _LISTED:
                lines.append(request.line)

    def __str__(self) -> str:
        return "\n".join(
            f"{count} requests: {kind} (lines {', '.join(map(str, self._lines[kind]))}"
            f"{', ...' if count > len(self._lines[kind]) else ''})"
            for kind, count in self._counts.items()
        )
