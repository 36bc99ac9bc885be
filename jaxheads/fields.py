"""Frozen configuration dataclasses from text and JSON, and back.

One walk over the type annotations serves ``--set model.rope.theta=1e6`` and the configurations
stored in checkpoints.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

C = TypeVar("C")
_NONE_WORDS = ("none", "null")
_BOOL_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not in a list, with the nearest one that is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}."


def shorten(message: Any, most: int = 2000) -> str:
    """A message that quotes a damaged file, without its middle where that is long."""
    text = str(message)
    return text if len(text) <= most else f"{text[: most * 3 // 4]} [...] {text[-most // 4 :]}"


def parse(text: str, annotation: Any, name: str) -> Any:
    """`text` as a value of the annotated type: bool, int, float, str, tuples of them, or None.

    Raises:
      ValueError: for text that is not of the type, naming `name`, the text and the type.
    """
    members = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    if type(None) in members and text.strip().lower() in _NONE_WORDS:
        return None
    members = [m for m in members if m is not type(None)]
    for member in sorted(members, key=_strictness):
        try:
            return _parse_one(text.strip(), member)
        except ValueError:
            continue
    raise ValueError(f"{name}={text!r} is not {describe(annotation)}.")


def describe(annotation: Any) -> str:
    """A type in words: ``int | None`` gives "an integer or none"."""
    if _is_union(annotation):
        return " or ".join(describe(m) for m in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        inner = typing.get_args(annotation)
        what = describe(inner[0]) if inner[1:] == (...,) else ", ".join(map(describe, inner))
        return f"a comma-separated list ({what} each)"
    words = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "none",
    }
    return words.get(annotation, "settable as text (give one of its own fields, or use --config)")


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (types.UnionType, typing.Union)


def _strictness(annotation: Any) -> int:
    order = (bool, int, float)
    return order.index(annotation) if annotation in order else len(order)


def _parse_one(text: str, annotation: Any) -> Any:
    if annotation is bool:
        if text.lower() not in _BOOL_WORDS:
            raise ValueError(text)
        return _BOOL_WORDS[text.lower()]
    if annotation in (int, float):
        return annotation(text)
    if annotation is str:
        return text
    if typing.get_origin(annotation) is tuple:
        inner = typing.get_args(annotation)
        items = [t.strip() for t in text.strip("()").split(",")]
        items = items[:-1] if items[-1] == "" else items
        if inner[1:] == (...,) and typing.get_origin(inner[0]) is not tuple:
            return tuple(parse(t, inner[0], "item") for t in items)
    raise ValueError(text)


def override(config: C, settings: Mapping[str, str], *, section: str = "") -> C:
    """`config` with fields replaced from text, all at once: ``{"rope.theta": "1e6"}``.

    A field whose default is None stands for a derived value (ModelConfig.head_dim). When it held
    that value and is not set here, it is derived anew: ``model_dim=256`` also changes embed_dim.

    Args:
      section: put before the names in messages.
    Raises:
      ValueError: for an unknown field, with the nearest one, and for text of a wrong type.
    """
    hints = typing.get_type_hints(type(config))
    here = f"{section}." if section else ""
    nested: dict[str, dict[str, str]] = {}
    changes: dict[str, Any] = {}
    for name, text in settings.items():
        first, _, rest = name.partition(".")
        if first not in hints:
            kind = f"field of {section or type(config).__name__}"
            raise ValueError(unknown(kind, first, hints))
        if rest:
            nested.setdefault(first, {})[rest] = text
        else:
            changes[first] = parse(text, hints[first], here + first)
    for first, inner in nested.items():
        held = getattr(config, first)
        held = _default_of(hints[first]) if held is None else held
        if not dataclasses.is_dataclass(held):
            raise ValueError(f"{here}{first}.{next(iter(inner))}: {first!r} has no fields.")
        changes[first] = override(held, inner, section=here + first)
    derived = {f: None for f in _derived(config) if f not in changes}
    return dataclasses.replace(config, **(derived | changes)) if changes else config  # type: ignore


def _default_of(annotation: Any) -> Any:
    members = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    kinds = [m for m in members if isinstance(m, type) and dataclasses.is_dataclass(m)]
    return kinds[0]() if kinds else None


def _derived(config: Any) -> list[str]:
    """Fields with default None that hold the value `config` would derive for them."""
    names = []
    for field in dataclasses.fields(config):
        if field.default is None and getattr(config, field.name) is not None:
            try:
                again = dataclasses.replace(config, **{field.name: None})
            except ValueError:
                continue
            if again == config:
                names.append(field.name)
    return names


def to_json(config: Any) -> Any:
    """Plain dicts, lists and scalars; `from_json` reads them back."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_json(v) for v in config]
    return config


def from_json(cls: type[C], data: Any, *, section: str = "") -> C:
    """A dataclass from `to_json`'s output. Fields left out keep their defaults.

    Raises:
      ValueError: for an unknown field, with the nearest one.
      TypeError: for a value of a wrong type.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"{section or cls.__name__} must be a JSON object, got {data!r}.")
    hints = typing.get_type_hints(cls)
    for name in data:
        if name not in hints:
            raise ValueError(unknown(f"field of {section or cls.__name__}", name, hints))
    here = f"{section}." if section else ""
    return cls(**{n: _from_json(v, hints[n], here + n) for n, v in data.items()})


def _from_json(value: Any, annotation: Any, name: str) -> Any:
    if _is_union(annotation):
        members = typing.get_args(annotation)
        if value is None and type(None) in members:
            return None
        for member in sorted(members, key=_strictness):
            try:
                return _from_json(value, member, name)
            except TypeError:
                continue
    elif dataclasses.is_dataclass(annotation):
        return from_json(annotation, value, section=name)  # type: ignore[arg-type]
    elif typing.get_origin(annotation) is tuple and isinstance(value, list | tuple):
        inner = typing.get_args(annotation)
        kinds = [inner[0]] * len(value) if inner[1:] == (...,) else inner
        if len(kinds) == len(value):
            return tuple(_from_json(v, k, name) for v, k in zip(value, kinds))
    elif annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif annotation is type(None) and value is None:
        return None
    elif annotation in (int, str, bool) and type(value) is annotation:
        return value
    raise TypeError(f"{name}={value!r} is not {describe(annotation)}.")


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Fields in which two dataclasses of one kind differ: ``["num_layers: 4 -> 6"]``."""
    lines = []
    for field in dataclasses.fields(old):
        a, b = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            lines += differences(a, b, f"{prefix}{field.name}.")
        elif a != b:
            lines.append(f"{prefix}{field.name}: {a!r} -> {b!r}")
    return lines
