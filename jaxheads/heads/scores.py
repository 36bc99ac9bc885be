"""A score for every head, with what it takes to believe it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxheads.fields import shorten
from jaxheads.heads import files
from jaxheads.heads.sets import Head, mask, top_k
from jaxheads.heads.statistics import (
    Control,
    Interval,
    bootstrap,
    correlation,
    interval,
    random_control,
)
from jaxheads.typing import ArrayLike

_KINDS = ("query", "kv")
# HeadScores keeps these inside `meta` of heads.json, which readers of plain scores pass over.
_IN_META = ("control", "ci", "kind")


@dataclass(frozen=True, eq=False)
class HeadScores:
    """One number a head, its random-head control, its confidence interval and where it comes from.

    Scores are oriented so that a higher one means a head that matters more for the question asked;
    `top_k` and ``launch.evaluate --top_heads`` take the highest.

    Args:
      values: [L,H] float32, finite; [L,K] for ``kind="kv"``.
      control: scores of random sets of heads (a `Control`, or just its numbers).
      ci: (low, high), maps of the shape of `values`.
      meta: what JSON can hold: ``method``, ``metric``, ``seeds``, ``flags``, ``versions``.
      model: the model's name or path.
      kind: ``"query"`` or ``"kv"`` heads.

    Example:
      >>> scores = HeadScores([[0.0, 0.9], [0.2, 0.1]], meta={"method": "copying"})
      >>> scores.top_k(2)
      [(0, 1), (1, 0)]
    """

    values: np.ndarray
    control: Control | None = None
    ci: Interval | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    kind: str = "query"

    def __post_init__(self):
        values = np.asarray(self.values, np.float32)
        if values.ndim != 2 or not values.size:
            raise ValueError(f"values has shape {values.shape}; it must be [L,H], layers x heads.")
        if not np.isfinite(values).all():
            raise ValueError("values holds NaN or infinity; a score is a finite number.")
        if self.kind not in _KINDS:
            raise ValueError(f"kind={self.kind!r} is not one of {', '.join(_KINDS)}.")
        taken = [name for name in _IN_META if name in self.meta]
        if taken:
            raise ValueError(f"meta holds {taken[0]!r}; give it as {taken[0]}= instead.")
        object.__setattr__(self, "values", values)
        if self.control is not None and not isinstance(self.control, Control):
            object.__setattr__(self, "control", Control(random=np.asarray(self.control)))
        if self.ci is not None:
            object.__setattr__(self, "ci", interval(self.ci, *values.shape))

    @classmethod
    def from_examples(
        cls,
        examples: ArrayLike,
        *,
        denominator: ArrayLike | None = None,
        confidence: float = 0.95,
        resamples: int = 2000,
        seed: int = 0,
        meta: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> HeadScores:
        """Scores [L,H] of one map a prompt (or a seed) [N,L,H], with a bootstrap interval.

        ``values = mean_n examples / mean_n denominator``; see `bootstrap` for the arguments. The
        choices behind the interval are noted in ``meta["bootstrap"]``.
        """
        stack = np.asarray(examples, np.float64)
        ci = bootstrap(
            stack,
            denominator=denominator,
            confidence=confidence,
            resamples=resamples,
            seed=seed,
        )
        scale = 1.0 if denominator is None else np.asarray(denominator, np.float64).mean()
        noted = {
            "examples": len(stack),
            "confidence": confidence,
            "resamples": resamples,
            "seed": seed,
        }
        return cls(
            stack.mean(axis=0) / scale, ci=ci, meta={**(meta or {}), "bootstrap": noted}, **fields
        )

    @property
    def num_layers(self) -> int:
        """L"""
        return self.values.shape[0]

    @property
    def num_heads(self) -> int:
        """H (K for key/value heads)."""
        return self.values.shape[1]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.values, dtype=dtype, copy=copy)

    def top_k(self, k: int, *, by: str = "value") -> list[Head]:
        """The `k` heads of the highest ``value`` (default) or ``magnitude``, highest first."""
        if by not in ("value", "magnitude"):
            raise ValueError(f"by={by!r} is not one of value, magnitude.")
        return top_k(self.values if by == "value" else np.abs(self.values), k)

    def mask(self, k: int, *, by: str = "value") -> np.ndarray:
        """[L,H] bool: True at the `top_k` heads."""
        return mask(self.top_k(k, by=by), *self.values.shape)

    def above(self, threshold: float) -> np.ndarray:
        """[L,H] bool: True where the score exceeds `threshold`."""
        return self.values > threshold

    def significant(self) -> np.ndarray:
        """[L,H] bool: True where the confidence interval leaves out 0.

        With L*H intervals at 95 % about one head in twenty is marked without cause.
        """
        if self.ci is None:
            raise ValueError("these scores have no confidence interval; see from_examples.")
        return (self.ci.low > 0) | (self.ci.high < 0)

    def correlate(self, other: HeadScores | ArrayLike, *, method: str = "pearson") -> float:
        """`correlation` with another map of the same model, over its heads."""
        return correlation(self.values, np.asarray(other), method=method)

    def with_control(
        self,
        k: int,
        score: Callable[[np.ndarray], ArrayLike] | None = None,
        *,
        seeds: Sequence[int] = tuple(range(20)),
        match: bool = False,
        by: str = "value",
        method: str = "",
    ) -> HeadScores:
        """These scores with the `random_control` of their top `k` heads.

        Args:
          k: heads in the chosen set and in each random one.
          score: masks [N,L,H] -> [N]: the joint effect of a set. Without it a set scores the mean
            of its heads' values, which costs nothing and says only how far the map stands out.
          seeds, match: see `random_control`.
          by: which heads are chosen, see `top_k`.
          method: how a set is scored, for the record.
        """
        chosen = self.top_k(k, by=by)
        if score is None:
            values = self.values if by == "value" else np.abs(self.values)
            score = lambda masks: np.einsum("nlh,lh->n", masks, values) / k
            method = method or f"mean {by} of the heads of a set"
        control = random_control(
            score, chosen, *self.values.shape, seeds=seeds, match=match, method=method
        )
        return dataclasses.replace(self, control=control)

    def to_json(self, path: str | Path) -> None:
        """Write heads.json, which `from_json` and ``launch.evaluate --heads`` read."""
        meta = dict(self.meta)
        if self.kind != "query":
            meta["kind"] = self.kind
        if self.control is not None:
            meta["control"] = self.control.to_dict()
        if self.ci is not None:
            meta["ci"] = {"low": self.ci.low.tolist(), "high": self.ci.high.tolist()}
        files.to_json(
            path,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            scores=self.values,
            model=self.model,
            meta=meta,
        )

    @classmethod
    def from_json(cls, path: str | Path) -> HeadScores:
        """Read heads.json; a file that lists heads gives 1 at these and 0 elsewhere.

        Raises:
          ValueError: naming the file and what is wrong with it.
        """
        file = files.from_json(path)
        meta = dict(file.meta)
        noted = {name: meta.pop(name) for name in _IN_META if name in meta}
        try:
            return cls(
                file.gates(),
                control=_control(noted.get("control")),
                ci=_ci(noted.get("ci")),
                meta=meta,
                model=file.model,
                kind=noted.get("kind", "query"),
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"heads file {path}: {shorten(error)}") from error


def _control(row: Any) -> Control | None:
    if row is None:
        return None
    if not isinstance(row, Mapping) or "random" not in row:
        raise ValueError("'control' must be an object with 'random', a list of scores.")
    known = [f.name for f in dataclasses.fields(Control)]
    return Control(**{name: row[name] for name in known if name in row})


def _ci(row: Any) -> Any:
    if row is None:
        return None
    if not isinstance(row, Mapping) or not {"low", "high"} <= set(row):
        raise ValueError("'ci' must be an object with 'low' and 'high'.")
    return row["low"], row["high"]
