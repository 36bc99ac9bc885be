"""heads.json: the heads or the scores that one program found, for another to act on."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxheads.fields import shorten
from jaxheads.heads.sets import (
    Head,
    Heads,
    check_range,
    check_shape,
    from_mask,
    is_mask,
    mask,
    parse_heads,
)
from jaxheads.typing import ArrayLike

_MOST = 10_000  # layers, and heads of a layer, in a file: masks are made of these sizes
_FIELDS = ("model", "num_layers", "num_heads", "heads", "scores", "meta")


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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"heads file {path} is not valid JSON ({error}).") from error
    try:
        return _from_row(row)
    except ValueError as error:
        raise ValueError(f"heads file {path}: {shorten(error)}") from error


def _from_row(row: Any) -> HeadsFile:
    if not isinstance(row, Mapping):
        raise ValueError(f"it holds a {type(row).__name__}; it must be an object.")
    unknown = sorted(set(row) - set(_FIELDS))
    if unknown:
        raise ValueError(f"unknown field {unknown[0][:60]!r}; fields: {', '.join(_FIELDS)}.")
    for key in ("num_layers", "num_heads"):
        value = row.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
            raise ValueError(
                f"{key!r} is {reprlib.repr(value)}; it must be a positive integer, at most {_MOST}."
            )
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
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"'scores' must be {size[0]} rows of {size[1]} numbers.") from error
    check_shape(scores.shape, *size, "'scores'")
    if not np.isfinite(scores).all():
        raise ValueError("'scores' holds values that are not finite.")
    return HeadsFile(scores=scores, **common)
