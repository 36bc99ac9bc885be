"""How sure a score map is: intervals over prompts, correlation of two maps, random-head controls.

Everything here is numpy on maps [L,H] (or [L,K], key/value heads) and runs on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxheads.heads.sets import Heads, check_shape, from_mask, mask, random_heads
from jaxheads.typing import ArrayLike

_CELLS = 2**24  # resampled numbers held at once


class Interval(NamedTuple):
    """A confidence interval for every head."""

    low: np.ndarray
    """[L,H] float32"""
    high: np.ndarray
    """[L,H] float32"""


def bootstrap(
    examples: ArrayLike,
    *,
    denominator: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a mean over prompts, or of a ratio of two means.

        score* = mean_n examples[n*] / mean_n denominator[n*],   n* drawn with replacement

    The interval runs from the (1-c)/2 to the (1+c)/2 quantile of score* over the resamples. A
    prompt is drawn whole: all heads and the denominator see the same draw. Normalised scores are
    ratios of batch means (the ratios of single prompts explode where the denominator is small), so
    both parts are resampled together. Runs with several seeds take the place of prompts alike.

    Args:
      examples: [N, ...], N >= 2: one score map a prompt.
      denominator: [N]: one number a prompt; None leaves the mean as it is.
      confidence: c, in (0, 1).
      resamples: how many draws.
      seed: of the draws.

    Returns:
      `low` and `high` of the shape of one example, float32.

    Example:
      >>> low, high = bootstrap(np.array([[0.0, 1.0], [0.0, 3.0]]))
      >>> float(low[0]), float(high[0]), float(low[1]), float(high[1])
      (0.0, 0.0, 1.0, 3.0)

    References: Efron, 1979, doi:10.1214/aos/1176344552.
    """
    values = np.asarray(examples, np.float64)
    if values.ndim < 1 or len(values) < 2:
        raise ValueError(
            f"examples has shape {values.shape}; a bootstrap needs at least two prompts, [N, ...]."
        )
    if not np.isfinite(values).all():
        raise ValueError("examples holds NaN or infinity; there is no interval.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1.")
    if resamples < 1:
        raise ValueError(f"resamples={resamples} must be at least 1.")
    count = len(values)
    flat = values.reshape(count, -1)
    divide = None if denominator is None else np.asarray(denominator, np.float64)
    if divide is not None and divide.shape != (count,):
        raise ValueError(f"denominator has shape {divide.shape}; it must be [{count}].")
    rng = np.random.default_rng(seed)
    # A resample is a count of each prompt, so a mean over it is one row of a matrix product.
    draws = rng.multinomial(count, np.full(count, 1 / count), size=resamples) / count
    scale = np.ones(resamples) if divide is None else draws @ divide
    if not np.all(scale != 0):
        raise ValueError(
            "the denominator is zero in a resample: the clean and the corrupt prompts score alike."
        )
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    columns = max(1, _CELLS // resamples)
    parts = [
        np.quantile(draws @ flat[:, i : i + columns] / scale[:, None], tails, axis=0)
        for i in range(0, flat.shape[1], columns)
    ]
    low, high = np.concatenate(parts, axis=1).astype(np.float32).reshape(2, *values.shape[1:])
    return Interval(low, high)


def correlation(
    a: ArrayLike, b: ArrayLike, *, method: str = "pearson", where: ArrayLike | None = None
) -> float:
    """How alike two maps are, over heads: Pearson's r, or Spearman's (that of the ranks).

        r = sum (a - mean a)(b - mean b) / sqrt(sum (a - mean a)^2 sum (b - mean b)^2)

    Ties share the mean of their ranks.

    Args:
      a, b: maps of one shape.
      method: ``"pearson"`` or ``"spearman"``.
      where: bool array of the same shape: the heads that count; None means all.

    Example:
      >>> correlation([[1, 2], [3, 4]], [[1, 4], [9, 16]], method="spearman")
      1.0
    """
    if method not in ("pearson", "spearman"):
        raise ValueError(f"method={method!r} is not one of pearson, spearman.")
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape:
        raise ValueError(f"the maps have shapes {x.shape} and {y.shape}; they must be the same.")
    counts = np.ones(x.shape, bool) if where is None else np.asarray(where, bool)
    if counts.shape != x.shape:
        raise ValueError(f"where has shape {counts.shape}; it must be {x.shape}.")
    x, y = x[counts], y[counts]
    if x.size < 2:
        raise ValueError(f"{x.size} heads are compared; a correlation needs at least two.")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a map holds NaN or infinity; leave such heads out with where=.")
    if method == "spearman":
        x, y = _ranks(x), _ranks(y)
    if x.min() == x.max() or y.min() == y.max():
        raise ValueError(f"a map is constant over the {x.size} heads: correlation is undefined.")
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + last - 1) / 2)[group]


@dataclass(frozen=True, kw_only=True)
class Control:
    """Scores of sets of heads drawn at random, beside that of the chosen heads.

    Attributes:
      random: [N] float32: the score of each random set.
      chosen: the score of the chosen heads, measured the same way; None when not measured.
      num_heads: heads in each set.
      seeds: the seed of each draw.
      matched: the draws took as many heads from each layer as the chosen ones.
      method: how a set was scored.
    """

    random: np.ndarray
    chosen: float | None = None
    num_heads: int = 1
    seeds: tuple[int, ...] = ()
    matched: bool = False
    method: str = ""

    def __post_init__(self):
        random = np.asarray(self.random, np.float32).ravel()
        if not random.size or not np.isfinite(random).all():
            raise ValueError("random must hold at least one score, all of them finite.")
        if self.seeds and len(self.seeds) != random.size:
            raise ValueError(
                f"{len(self.seeds)} seeds were given for {random.size} random sets; give one each."
            )
        object.__setattr__(self, "random", random)
        object.__setattr__(self, "seeds", tuple(int(s) for s in self.seeds))

    @property
    def mean(self) -> float:
        """Mean score of the random sets."""
        return float(self.random.mean())

    @property
    def std(self) -> float:
        """Standard deviation over the random sets (N - 1 in the denominator; 0 for one set)."""
        return float(self.random.std(ddof=1)) if self.random.size > 1 else 0.0

    @property
    def p_value(self) -> float | None:
        """(1 + number of random sets that score at least as high as the chosen) / (1 + N)."""
        if self.chosen is None:
            return None
        return float((1 + (self.random >= self.chosen).sum()) / (1 + self.random.size))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `mean`, `std` and `p_value` are for the eye."""
        return {
            "chosen": self.chosen,
            "random": self.random.tolist(),
            "num_heads": self.num_heads,
            "seeds": list(self.seeds),
            "matched": self.matched,
            "method": self.method,
            "mean": self.mean,
            "std": self.std,
            "p_value": self.p_value,
        }


def random_control(
    score: Callable[[np.ndarray], ArrayLike],
    chosen: Heads,
    num_layers: int,
    num_heads: int,
    *,
    seeds: Sequence[int] = tuple(range(20)),
    match: bool = False,
    method: str = "",
) -> Control:
    """Scores of the chosen heads and of equally many random others.

    Args:
      score: masks [N,L,H] float32 -> [N]: the score of each set of heads, for example the loss
        with them ablated. It is called once, with the chosen heads in front.
      chosen: a list or a mask [L,H]. Random sets leave these heads out.
      num_layers: L.
      num_heads: H.
      seeds: one random set each.
      match: draw as many heads from each layer as `chosen` has there.
      method: how a set is scored, for the record.

    Example:
      >>> values = np.array([[0.0, 0.1], [0.9, 0.2]])
      >>> control = random_control(lambda m: (m * values).sum((1, 2)), [(1, 0)], 2, 2, seeds=(0, 1))
      >>> control.chosen, round(control.p_value, 2)
      (0.9, 0.33)
    """
    if not len(seeds):
        raise ValueError("seeds is empty; a control needs at least one random set.")
    where = mask(chosen, num_layers, num_heads)
    count = int(where.sum())
    if not count:
        raise ValueError("chosen holds no head; there is nothing to control for.")
    draws = [
        random_heads(
            num_layers, num_heads, count, seed, exclude=where, match=where if match else None
        )
        for seed in seeds
    ]
    masks = np.stack([where, *(mask(draw, num_layers, num_heads) for draw in draws)])
    scores = np.asarray(score(masks.astype(np.float32)), np.float64)
    if scores.shape != (len(masks),):
        raise ValueError(f"score returned shape {scores.shape}; it must be [{len(masks)}].")
    return Control(
        random=scores[1:],
        chosen=float(scores[0]),
        num_heads=count,
        seeds=tuple(seeds),
        matched=match,
        method=method,
    )


def interval(ci: Any, num_layers: int, num_heads: int) -> Interval:
    """`ci` ((low, high), or an array [2,L,H]) checked and as an `Interval`."""
    if len(ci) != 2:
        raise ValueError("ci must be (low, high), two maps [L,H].")
    low, high = (np.asarray(part, np.float32) for part in ci)
    for name, part in (("low", low), ("high", high)):
        check_shape(part.shape, num_layers, num_heads, f"ci.{name}")
    wrong = from_mask(~(low <= high))
    if wrong:
        raise ValueError(
            f"ci.low exceeds ci.high at head {wrong[0][0]}.{wrong[0][1]}, or one is NaN."
        )
    return Interval(low, high)
