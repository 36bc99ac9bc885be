"""Sets of heads: lists such as ``[(9, 6)]`` or ``["9.6"]``, masks [L,H], scores, and heads.json.

A finder returns scores [L,H], a wrapper takes a mask or gates [L,H]; heads.json carries either
between programs. Heads are counted from 0 and named ``layer.head``.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import jax
import numpy as np

from jaxheads.typing import ArrayLike

Head: TypeAlias = tuple[int, int]
"""(layer, head)"""

Heads: TypeAlias = jax.Array | np.ndarray | str | Iterable[Any]
"""An array [L,H], or a list of pairs or names."""

_FIELDS = ("model", "num_layers", "num_heads", "heads", "scores", "meta")


def parse_head(item: Any) -> Head:
    """``(layer, head)`` of a pair of integers or of text such as ``"9.6"``.

    Example:
      >>> parse_head("9.6")
      (9, 6)
    """
    if isinstance(item, str):
        match = re.fullmatch(r"\s*[Ll]?(\d+)\.[Hh]?(\d+)\s*", item)
        if match:
            return int(match[1]), int(match[2])
    elif isinstance(item, tuple | list | np.ndarray) and len(item) == 2:
        try:
            layer, head = (operator.index(n) for n in item)
        except TypeError:
            pass
        else:
            if layer >= 0 and head >= 0 and not any(isinstance(n, bool) for n in item):
                return layer, head
    raise ValueError(
        f"{item!r} names no head; write (layer, head), for example (9, 6), or '9.6', both counted "
        "from 0."
    )


def parse_heads(heads: str | Iterable[Any]) -> tuple[Head, ...]:
    """The heads of a list of pairs or names, or of comma-separated names; duplicates raise."""
    items = [part for part in heads.split(",") if part.strip()] if isinstance(heads, str) else heads
    parsed = tuple(parse_head(item) for item in items)
    twice = sorted({head for head in parsed if parsed.count(head) > 1})
    if twice:
        raise ValueError(f"head {label(twice[0])} is listed twice.")
    return parsed


def label(head: Head) -> str:
    """``"9.6"`` of ``(9, 6)``."""
    return f"{head[0]}.{head[1]}"


def check_range(heads: Iterable[Head], num_layers: int, num_heads: int) -> None:
    """Raise for a head the model does not have."""
    for head in heads:
        if head[0] >= num_layers or head[1] >= num_heads:
            raise ValueError(
                f"head {label(head)} is out of range: the model has layers 0 to {num_layers - 1} "
                f"with heads 0 to {num_heads - 1}."
            )


def is_mask(heads: Any) -> TypeGuard[jax.Array | np.ndarray]:
    """Whether `heads` is an array [L,H] rather than a list of heads."""
    return isinstance(heads, np.ndarray | jax.Array)


def check_shape(shape: tuple[int, ...], num_layers: int, num_heads: int, what: str) -> None:
    """Raise unless `shape` is [L,H], with a hint at what it may be instead."""
    if tuple(shape) == (num_layers, num_heads):
        return
    hint = ""
    if tuple(shape) == (num_heads, num_layers):
        hint = " It looks transposed."
    elif len(shape) == 2 and shape[1] == 2:
        hint = " For a list of (layer, head) pairs pass a list, not an array (`.tolist()`)."
    elif len(shape) == 2 and shape[0] == num_layers and num_heads % max(shape[1], 1) == 0:
        hint = (
            f" {shape[1]} columns are key/value heads; query head h reads key/value head h // "
            f"{num_heads // shape[1]}, so repeat every column {num_heads // shape[1]} times."
        )
    raise ValueError(
        f"{what} has shape {tuple(shape)}; it must be [{num_layers}, {num_heads}], layers x heads "
        f"of the model.{hint}"
    )


def mask(heads: Heads, num_layers: int, num_heads: int) -> np.ndarray:
    """A bool array [L,H], True at the given heads.

    Args:
      heads: a list such as ``[(9, 6), (9, 9)]`` or ``["9.6"]``, or an array [L,H] (bool, or 0/1).
      num_layers: L.
      num_heads: H.

    Raises:
      ValueError: for a head out of range or listed twice, or an array of another shape.

    Example:
      >>> mask([(1, 0)], 2, 3).astype(int).tolist()
      [[0, 0, 0], [1, 0, 0]]
    """
    if is_mask(heads):
        check_shape(np.shape(heads), num_layers, num_heads, "the head mask")
        values = np.asarray(heads)
        if not np.all((values == 0) | (values == 1)):
            raise ValueError(
                "the head mask holds values other than 0 and 1; choose heads of a score map with "
                "heads.top_k(scores, k)."
            )
        return values.astype(bool)
    parsed = parse_heads(heads)
    check_range(parsed, num_layers, num_heads)
    out = np.zeros((num_layers, num_heads), bool)
    for head in parsed:
        out[head] = True
    return out


def from_mask(values: ArrayLike) -> list[Head]:
    """The heads where an array [L,H] is not zero, in order."""
    return [(int(layer), int(head)) for layer, head in np.argwhere(np.asarray(values))]


def leave_one_out(num_layers: int, num_heads: int) -> np.ndarray:
    """Gates [L*H, L, H]: entry n is one everywhere but 0 at head ``(n // H, n % H)``."""
    size = num_layers * num_heads
    return (1 - np.eye(size, dtype=np.float32)).reshape(size, num_layers, num_heads)


def top_k(scores: ArrayLike, k: int) -> list[Head]:
    """The `k` heads of the highest scores [L,H], highest first; ties in order of layer and head.

    Example:
      >>> top_k([[0.1, 0.9], [0.5, 0.2]], 2)
      [(0, 1), (1, 0)]
    """
    scores = np.asarray(scores)
    if scores.ndim != 2:
        raise ValueError(f"scores has shape {scores.shape}; it must be [L,H], layers x heads.")
    if not 1 <= k <= scores.size:
        raise ValueError(f"k={k} must be from 1 to {scores.size}, the number of heads.")
    if np.isnan(scores).any():
        raise ValueError("scores holds NaN; there is no highest head.")
    order = np.argsort(-scores, axis=None, kind="stable")[:k]
    return [divmod(int(n), scores.shape[1]) for n in order]


@dataclass(frozen=True, kw_only=True)
class HeadsFile:
    """What heads.json holds: heads or scores of a model's heads, and where they come from."""

    num_layers: int
    num_heads: int
    heads: tuple[Head, ...] | None = None
    scores: np.ndarray | None = None
    """[L,H] float32: scores of a finder, or gates."""
    model: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def gates(self) -> np.ndarray:
        """[L,H] float32: the scores, or 1 at the listed heads and 0 elsewhere."""
        if self.scores is not None:
            return np.asarray(self.scores, np.float32)
        return mask(self.heads or (), self.num_layers, self.num_heads).astype(np.float32)

    def check(self, num_layers: int, num_heads: int) -> None:
        """Raise unless the file was written for a model of this size."""
        if (self.num_layers, self.num_heads) != (num_layers, num_heads):
            raise ValueError(
                f"the heads are of a model with {self.num_layers} layers x {self.num_heads} heads"
                f"{f' ({self.model})' if self.model else ''}; this model has {num_layers} x "
                f"{num_heads}."
            )


def to_json(
    path: str | Path,
    *,
    num_layers: int,
    num_heads: int,
    heads: Heads | None = None,
    scores: ArrayLike | None = None,
    model: str = "",
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write heads.json with either `heads` (a list or a mask) or `scores` [L,H]."""
    if (heads is None) == (scores is None):
        raise ValueError("to_json takes either heads or scores, exactly one of them.")
    row: dict[str, Any] = {"model": model, "num_layers": num_layers, "num_heads": num_heads}
    if heads is not None:
        if is_mask(heads):
            chosen = from_mask(mask(heads, num_layers, num_heads))
        else:
            chosen = parse_heads(heads)
            check_range(chosen, num_layers, num_heads)
        row["heads"] = [list(head) for head in chosen]
    else:
        values = np.asarray(scores, np.float64)
        check_shape(values.shape, num_layers, num_heads, "scores")
        if not np.isfinite(values).all():
            raise ValueError("scores holds NaN or infinity, which JSON cannot carry.")
        row["scores"] = [[float(x) for x in line] for line in np.asarray(scores, np.float32)]
    row["meta"] = dict(meta or {})
    Path(path).write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


def from_json(path: str | Path) -> HeadsFile:
    """Read heads.json.

    Raises:
      ValueError: naming the file and what is wrong with it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"heads file {path} does not exist; heads.to_json writes one.")
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"heads file {path} is not valid JSON ({error}).") from error
    try:
        return _from_row(row)
    except ValueError as error:
        raise ValueError(f"heads file {path}: {error}") from error


def _from_row(row: Any) -> HeadsFile:
    if not isinstance(row, Mapping):
        raise ValueError(f"it holds a {type(row).__name__}; it must be an object.")
    unknown = sorted(set(row) - set(_FIELDS))
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; fields: {', '.join(_FIELDS)}.")
    for key in ("num_layers", "num_heads"):
        value = row.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key!r} is {value!r}; it must be a positive integer.")
    size = row["num_layers"], row["num_heads"]
    if ("heads" in row) == ("scores" in row):
        raise ValueError("it must hold either 'heads' or 'scores', exactly one of them.")
    model, meta = row.get("model", ""), row.get("meta", {})
    if not isinstance(model, str) or not isinstance(meta, Mapping):
        raise ValueError("'model' must be text and 'meta' an object.")
    common = {"num_layers": size[0], "num_heads": size[1], "model": model, "meta": dict(meta)}
    if "heads" in row:
        if not isinstance(row["heads"], list):
            raise ValueError("'heads' must be a list such as [[9, 6], [9, 9]].")
        chosen = parse_heads(row["heads"])
        check_range(chosen, *size)
        return HeadsFile(heads=chosen, **common)
    try:
        scores = np.asarray(row["scores"], np.float32)
    except (ValueError, TypeError) as error:
        raise ValueError(f"'scores' must be {size[0]} rows of {size[1]} numbers.") from error
    check_shape(scores.shape, *size, "'scores'")
    if not np.isfinite(scores).all():
        raise ValueError("'scores' holds values that are not finite.")
    return HeadsFile(scores=scores, **common)
