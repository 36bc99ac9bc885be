"""Reading a foreign configuration field by field, with everything wrong in it said at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


def _same(value: Any) -> Any:
    return value


def _always(value: Any) -> bool:
    del value
    return True


class Kind(NamedTuple):
    """What a field may hold, and how it turns into ours and back."""

    needed: str
    accepts: Callable[[Any], bool]
    read: Callable[[Any], Any] = _same
    write: Callable[[Any], Any] = _same
    supported: Callable[[Any], bool] = _always
    """False for values that are meaningful but ask for maths we do not have."""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(v) for v in value)


def or_null(kind: Kind) -> Kind:
    """The same kind, with null for "none"."""
    return Kind(
        f"{kind.needed} or null",
        lambda v: v is None or kind.accepts(v),
        lambda v: None if v is None else kind.read(v),
        lambda v: None if v is None else kind.write(v),
    )


def choice(values: Mapping[Any, Any]) -> Kind:
    """A field with few values, each of which is one value of ours."""
    back = {ours: theirs for theirs, ours in values.items()}
    return Kind(
        "one of " + ", ".join(repr(v).lower() for v in values),
        lambda v: any(v is theirs for theirs in values),
        values.__getitem__,
        lambda v: back.get(v),
    )


COUNT = Kind("a positive integer", _is_count)
COUNT_OR_NULL = or_null(COUNT)
NUMBER = Kind("a positive number", _is_number, float)
NUMBER_OR_NULL = or_null(NUMBER)
NUMBERS = Kind("a list of positive numbers", _numbers, tuple, list)
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
OBJECT_OR_NULL = Kind("an object or null", lambda v: v is None or isinstance(v, dict))


class Reader:
    """Takes fields out of a JSON object and collects what is wrong with them."""

    def __init__(self, fields: Mapping[str, Any], ignoring: Iterable[str] = (), where: str = ""):
        self.left = {name: value for name, value in fields.items() if name not in ignoring}
        self.where = where
        self.wrong: list[str] = []
        self.refused: list[str] = []

    def take(self, name: str, default: Any, kind: Kind) -> Any:
        """The field as ours; the default in its place after a complaint."""
        value = self.left.pop(name, default)
        if not kind.accepts(value):
            self.complain(f"{self.where}{name}={_short(value)} (needed {kind.needed})")
            value = default
        elif not kind.supported(value):
            self.refuse(f"{self.where}{name}", value, "not implemented")
            value = default
        return kind.read(value)

    def take_any(self, names: tuple[str, ...], default: Any, kind: Kind) -> Any:
        """A field that goes by several names; two of them may not disagree."""
        given = [n for n in names if self.left.get(n) is not None]
        values = [self.left[n] for n in given]
        if any(v != values[0] for v in values):
            pairs = ", ".join(f"{n}={_short(v)}" for n, v in zip(given, values))
            self.complain(f"{pairs} (two names of one field that disagree)")
        for name in names:
            if name not in given[:1]:
                self.left.pop(name, None)
        return self.take(given[0] if given else names[0], default, kind)

    def inner(self, fields: Mapping[str, Any], where: str) -> Reader:
        """A reader of a nested object whose complaints are kept here."""
        reader = Reader(fields, where=f"{where}.")
        reader.wrong, reader.refused = self.wrong, self.refused
        return reader

    def complain(self, what: str) -> None:
        """Keep something wrong for `finish`."""
        self.wrong.append(what)

    def refuse(self, name: str, value: Any, reason: str) -> None:
        """Keep a value that is not supported for `finish`."""
        self.refused.append(f"{name}={_short(value)} ({reason})")

    def finish(self, what: str) -> None:
        """Raise when anything was wrong, unknown or unsupported."""
        unknown = sorted(map(str, self.left))
        if self.refused and not self.wrong:
            more = f" Unknown besides: {', '.join(unknown)}." if unknown else ""
            raise NotImplementedError(
                f"config.json of {what} asks for what is not supported: "
                f"{'; '.join(self.refused)}.{more}"
            )
        if self.wrong or unknown:
            parts = list(self.wrong)
            if unknown:
                parts.append(
                    f"unknown fields {', '.join(unknown)} (remove them from config.json if they "
                    "do not change the forward pass)"
                )
            raise ValueError(f"config.json of {what}: {'; '.join(parts + self.refused)}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
