"""Circuits: heads found stage by stage with path patching, and how much two circuits share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxheads import heads as head_sets
from jaxheads.discovery.path import COMPONENTS, Receiver, path_patch
from jaxheads.models import Decoder

STAGES = ("logits", "q", "kv", "qkv")
"""Through what each stage's heads act: the logits, then inputs of the heads of the stage before."""

CUTS = (0.01, 0.02, 0.05, 0.10)
"""Shares of all heads kept in a stage; an overlap depends on the cut, so report all of them."""


class Stage(NamedTuple):
    """One stage of a discovery."""

    receivers: str | tuple[Receiver, ...]
    """What its heads feed."""
    scores: np.ndarray
    """[L,H] path-patching scores."""
    heads: tuple[head_sets.Head, ...]
    """The heads kept, largest |score| first."""


@dataclass(frozen=True)
class Circuit:
    """Heads kept at each stage of a discovery."""

    stages: tuple[Stage, ...]
    frac: float
    """The share of all heads kept in a stage."""
    freeze_mlps: bool
    """Whether paths through MLPs were excluded."""

    @property
    def heads(self) -> tuple[head_sets.Head, ...]:
        """The heads of all stages."""
        return tuple(head for stage in self.stages for head in stage.heads)

    def mask(self, frac: float | None = None) -> np.ndarray:
        """[L,H] bool: the heads kept; at another cut of the same scores when `frac` is given.

        The receivers of later stages stay those found at `self.frac`.
        """
        frac = self.frac if frac is None else frac
        kept = np.zeros_like(self.stages[0].scores, bool)
        for stage in self.stages:
            for head in keep_top(stage.scores, frac, kept):
                kept[head] = True
        return kept


class Overlap(NamedTuple):
    """How many heads two sets share, and what chance would give."""

    n: int
    """|A and B|"""
    frac: float
    """n / |A|"""
    null_mean: float
    """The expected n / |A| when B is drawn at random."""
    p_value: float
    """The chance of sharing n heads or more under that draw."""


def discover_circuit(
    forward: Callable[..., Any],
    model: Decoder,
    clean: Any,
    corrupt: Any,
    metric: Any,
    *,
    stages: Sequence[str] = STAGES,
    frac: float = 0.02,
    positions: Any = None,
    freeze_mlps: bool = False,
    sender_batch: int | None = None,
) -> Circuit:
    """Heads found backwards from the logits, stage by stage, with `path_patch`.

    Stage 1 keeps the heads with the largest |score| along paths to the logits; each later stage
    those along paths to the heads of the stage before it, through the components it names. A head
    kept once is not kept again, so circuits of one model have equal sizes; heads that score 0 are
    never kept.

    Args:
      forward: a forward, wrapped or not.
      model: a `Decoder`.
      clean: as for `path_patch`.
      corrupt: as for `path_patch`.
      metric: as for `path_patch`.
      stages: ``"logits"``, then letters of q, k and v. The default follows the paper: movers,
        what sets their queries, the values and keys those read, and what feeds these.
      frac: the share of all heads to keep in a stage, rounded, at least one. The paper: 2 %.
      positions: as for `path_patch`; None: the last slot for the logits and stages of queries
        alone, all slots where keys or values are patched (the last one's are hardly read).
      freeze_mlps: as for `path_patch`.
      sender_batch: as for `path_patch`.

    Returns:
      A `Circuit`. It ends early when every head of a stage is in layer 0.

    References: Wang et al., 2022, arXiv:2211.00593; Merullo et al., 2023, arXiv:2310.08744.
    """
    stages = tuple(stages)
    bad = [s for s in stages[1:] if not s or set(s) - set(COMPONENTS)]
    if not stages or stages[0] != "logits" or bad:
        raise ValueError(
            f"stages={stages!r}: the first must be 'logits' and each other one letters of q, k, v, "
            f"for example {STAGES}."
        )
    _check_frac(frac)
    cfg = model.cfg
    kept = np.zeros((cfg.num_layers, cfg.num_heads), bool)
    found: list[Stage] = []
    for components in stages:
        receivers: str | tuple[Receiver, ...] = "logits"
        default = "last" if components in ("logits", "q") else "all"
        if components != "logits":
            receivers = receivers_of(found[-1].heads, components, cfg.num_groups)
            if not receivers:
                break
        scores = path_patch(
            forward,
            model,
            clean,
            corrupt,
            metric,
            receivers=receivers,
            positions=default if positions is None else positions,
            freeze_mlps=freeze_mlps,
            sender_batch=sender_batch,
        )
        scores = np.asarray(scores)
        chosen = keep_top(scores, frac, kept)
        for head in chosen:
            kept[head] = True
        found.append(Stage(receivers, scores, chosen))
    return Circuit(tuple(found), frac, freeze_mlps)


def receivers_of(
    heads: Iterable[head_sets.Head], components: str, num_groups: int
) -> tuple[Receiver, ...]:
    """Inputs of query heads as receivers of `path_patch`; keys and values of their kv heads.

    Heads of layer 0 are left out: no head precedes them.
    """
    out = {
        (layer, head if c == "q" else head // num_groups, c)
        for layer, head in heads
        for c in components
        if layer > 0
    }
    return tuple(sorted(out))


def keep_top(
    scores: np.ndarray, frac: float, taken: np.ndarray | None = None
) -> tuple[head_sets.Head, ...]:
    """The heads with the largest |score|, a share `frac` of all; none that is `taken` or 0."""
    _check_frac(frac)
    size = np.abs(np.asarray(scores, np.float64))
    if taken is not None:
        size = np.where(taken, 0, size)
    count = min(max(1, round(frac * size.size)), int(np.count_nonzero(size)))
    return tuple(head_sets.top_k(size, count)) if count else ()


def _check_frac(frac: float) -> None:
    if not 0 < frac <= 1:
        raise ValueError(f"frac={frac} must be above 0 and at most 1: a share, 0.02 for 2 %.")


def circuit_overlap(
    a: Any, b: Any, *, shape: tuple[int, int] | None = None, within_layers: bool = False
) -> Overlap:
    """How many heads two circuits share, against the permutation null.

    Permuting the heads of one set at random makes n hypergeometric:

        P(n) = C(|A|, n) C(N - |A|, |B| - n) / C(N, |B|),    N = L * H

    computed exactly, without drawing permutations.

    Args:
      a: a `Circuit`, a mask [L,H], or a list of heads (then `shape` is needed).
      b: the same.
      shape: (L, H).
      within_layers: permute heads only within their layer, which keeps how many each layer holds:
        a stricter null, since circuits crowd into the same depths.

    Returns:
      `Overlap(n, frac, null_mean, p_value)`; `frac` is n / |A|.

    Raises:
      ValueError: for an empty set, or sets of models of different sizes.

    References: Merullo et al., 2023, arXiv:2310.08744, section 4.
    """
    mask_a, mask_b = _as_mask(a, shape, "a"), _as_mask(b, shape, "b")
    if mask_a.shape != mask_b.shape:
        raise ValueError(
            f"the circuits are of models of {mask_a.shape} and {mask_b.shape} layers x heads."
        )
    if not mask_a.any() or not mask_b.any():
        raise ValueError("a circuit without heads has no overlap; keep at least one head.")
    rows_a, rows_b = (mask_a, mask_b) if within_layers else (mask_a.reshape(1, -1),
                                                             mask_b.reshape(1, -1))  # fmt: skip
    chances = np.ones(1)
    for row_a, row_b in zip(rows_a, rows_b, strict=True):
        chances = np.convolve(chances, _hypergeometric(row_a.size, row_a.sum(), row_b.sum()))
    n, size = int((mask_a & mask_b).sum()), int(mask_a.sum())
    mean = float(chances @ np.arange(len(chances)))
    return Overlap(n, n / size, mean / size, min(1.0, float(chances[n:].sum())))


def overlap_at_cuts(
    a: Circuit, b: Circuit, cuts: Sequence[float] = CUTS, **options: Any
) -> dict[float, Overlap]:
    """`circuit_overlap` at several cuts of the two circuits' scores."""
    return {cut: circuit_overlap(a.mask(cut), b.mask(cut), **options) for cut in cuts}


def _hypergeometric(total: int, size_a: int, size_b: int) -> np.ndarray:
    """[n] chance that n of `size_b` heads drawn from `total` are among `size_a` given ones."""
    total, size_a, size_b = int(total), int(size_a), int(size_b)
    ways = [
        math.comb(size_a, n) * math.comb(total - size_a, size_b - n)
        if size_b - n <= total - size_a
        else 0
        for n in range(min(size_a, size_b) + 1)
    ]
    return np.array([w / math.comb(total, size_b) for w in ways])


def _as_mask(heads: Any, shape: tuple[int, int] | None, what: str) -> np.ndarray:
    if isinstance(heads, Circuit):
        return heads.mask()
    if head_sets.is_mask(heads):
        if np.ndim(heads) != 2:
            raise ValueError(f"{what} has shape {np.shape(heads)}; needed a mask [L,H].")
        return head_sets.mask(heads, *(shape or np.shape(heads)))
    if shape is None:
        raise ValueError(
            f"{what} is a list of heads; pass shape=(num_layers, num_heads) as well, or a mask."
        )
    return head_sets.mask(heads, *shape)
