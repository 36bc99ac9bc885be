"""Metrics of ranked predictions, exact and as sums over batches that can be added and merged.

    auc, grouped_auc, log_loss                          all predictions at once, exact
    StreamingAUC, StreamingGroupedAUC, StreamingMean    batch by batch, device by device

    state = StreamingAUC.create()
    for ...: state = state.add(probability, label)      # works under jax.jit; a pytree
    state.merge(other_state).result()

A state is a sum over samples: merging is adding, `jax.lax.psum` over devices included.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.embeddings.diagnostics import ndcg
from jaxheads.typing import Array, ArrayLike, is_traced

NUM_BINS = 8192
_FLOOR = 1e-15


def check_labels(label: ArrayLike) -> None:
    """Raise ValueError for labels that are neither 0 nor 1, where they are known (not in a jit)."""
    if is_traced(label):
        return
    label = np.asarray(label)
    is_bad = ~np.isin(label, (0, 1))
    if is_bad.any():
        raise ValueError(f"label {label[is_bad][0]} is neither 0 nor 1.")


def _pair(score: ArrayLike, label: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    score, label = np.asarray(score, np.float64), np.asarray(label)
    if score.ndim != 1 or score.shape != label.shape:
        raise ValueError(f"scores {score.shape} and labels {label.shape}; both must be [N].")
    if np.isnan(score).any():
        raise ValueError("a score is NaN: there is no ranking with it.")
    check_labels(label)
    return score, label == 1


def auc(score: ArrayLike, label: ArrayLike) -> float:
    """The share of (positive, negative) pairs that the score orders rightly; ties count a half.

    Computed from average ranks: ``(sum of the positives' ranks - P (P + 1) / 2) / (P N)``.

    Args:
      score: [N] any monotone score.
      label: [N] of 0 and 1.
    Raises:
      ValueError: for labels of one class only, labels that are not 0 or 1, NaN.
    """
    score, is_positive = _pair(score, label)
    return _rank_auc(score, is_positive, where="labels")


def _rank_auc(score: np.ndarray, is_positive: np.ndarray, *, where: str) -> float:
    positives = int(is_positive.sum())
    negatives = len(is_positive) - positives
    _check_classes(positives, negatives, where)
    _, inverse, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # average rank of each value, from 1
    total = rank[inverse][is_positive].sum()
    return float((total - positives * (positives + 1) / 2) / (positives * negatives))


def _check_classes(positives: int, negatives: int, where: str) -> None:
    if positives == 0 or negatives == 0:
        raise ValueError(
            f"{where}: {positives} positives and {negatives} negatives; AUC compares the two and "
            "needs at least one of each."
        )


def grouped_auc(score: ArrayLike, label: ArrayLike, group: ArrayLike) -> float:
    """AUC within each group (a user, say), averaged with the groups' sizes as weights.

    Groups with one class only are left out.

    Args:
      score, label: as `auc`.
      group: [N] any ids.
    Raises:
      ValueError: as `auc`, and when no group has both classes.
    """
    score, is_positive = _pair(score, label)
    group = np.asarray(group)
    if group.shape != score.shape:
        raise ValueError(f"groups {group.shape} and scores {score.shape}; both must be [N].")
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order])) + 1
    total = weight = 0.0
    for rows in np.split(order, starts):
        if is_positive[rows].any() and not is_positive[rows].all():
            total += len(rows) * _rank_auc(score[rows], is_positive[rows], where="group")
            weight += len(rows)
    if weight == 0:
        raise ValueError("no group has both a positive and a negative; there is nothing to order.")
    return total / weight


def log_loss(probability: ArrayLike, label: ArrayLike) -> float:
    """``-mean log p(label)`` in nats; probabilities are kept 1e-15 away from 0 and 1."""
    probability, is_positive = _pair(probability, label)
    _check_probabilities(probability)
    clipped = np.clip(probability, _FLOOR, 1 - _FLOOR)
    return float(-np.mean(np.log(np.where(is_positive, clipped, 1 - clipped))))


def _check_probabilities(probability: ArrayLike) -> None:
    if is_traced(probability):
        return
    probability = np.asarray(probability)
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError(
            f"values from {probability.min()} to {probability.max()} are no probabilities; apply "
            "a sigmoid to logits first."
        )


def _bin(probability: Array, num_bins: int) -> Array:
    return jnp.clip((probability * num_bins).astype(jnp.int32), 0, num_bins - 1)


class StreamingAUC(NamedTuple):
    """AUC from a histogram of probabilities per class.

    Pairs that fall into the same bin count a half, so the result differs from `auc` by at most half
    the share of pairs that share a bin: `result` is exact for probabilities that are multiples of
    1 / bins.
    """

    positive: Array
    """[bins] int32"""
    negative: Array
    """[bins] int32"""

    @classmethod
    def create(cls, num_bins: int = NUM_BINS) -> StreamingAUC:
        """Empty, with bins of equal width over [0,1]."""
        if num_bins < 2:
            raise ValueError(f"num_bins={num_bins} orders nothing; give 2 or more.")
        return cls(*jnp.zeros((2, num_bins), jnp.int32))

    def add(self, probability: Array, label: Array) -> StreamingAUC:
        """With the samples [N] of a batch; probabilities, not logits.

        Raises:
          ValueError: for labels that are not 0 or 1 or values outside [0,1], where known.
        """
        check_labels(label)
        _check_probabilities(probability)
        bins = _bin(jnp.asarray(probability), len(self.positive))
        clicked = (jnp.asarray(label) > 0.5).astype(jnp.int32)
        return StreamingAUC(
            self.positive.at[bins].add(clicked), self.negative.at[bins].add(1 - clicked)
        )

    def merge(self, other: StreamingAUC) -> StreamingAUC:
        """Both sets of samples together."""
        return jax.tree.map(jnp.add, self, other)

    def result(self) -> float:
        """The AUC.

        Raises:
          ValueError: for one class only.
        """
        positive, negative = (np.asarray(x, np.int64) for x in self)
        _check_classes(int(positive.sum()), int(negative.sum()), "samples so far")
        return float(_histogram_auc(positive, negative))


def _histogram_auc(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """[...] from histograms [..., bins]."""
    below = np.cumsum(negative, axis=-1) - negative
    wins = (positive * (below + negative / 2)).sum(axis=-1)
    return wins / (positive.sum(axis=-1) * negative.sum(axis=-1))


class StreamingGroupedAUC(NamedTuple):
    """`grouped_auc` over groups 0..G-1 from one histogram each: G x bins counts per class."""

    positive: Array
    """[G,bins] int32"""
    negative: Array
    """[G,bins] int32"""

    @classmethod
    def create(cls, num_groups: int, num_bins: int = 256) -> StreamingGroupedAUC:
        """Empty."""
        if num_groups < 1 or num_bins < 2:
            raise ValueError(f"num_groups={num_groups} must be 1 or more, num_bins={num_bins} 2.")
        return cls(*jnp.zeros((2, num_groups, num_bins), jnp.int32))

    def add(self, probability: Array, label: Array, group: Array) -> StreamingGroupedAUC:
        """With the samples [N] of a batch; groups outside 0..G-1 are an error where known."""
        check_labels(label)
        _check_probabilities(probability)
        if not is_traced(group):
            ids = np.asarray(group)
            if ids.size and (ids.min() < 0 or ids.max() >= len(self.positive)):
                raise ValueError(f"group ids {ids.min()}..{ids.max()} of {len(self.positive)}.")
        at = (jnp.asarray(group), _bin(jnp.asarray(probability), self.positive.shape[1]))
        clicked = (jnp.asarray(label) > 0.5).astype(jnp.int32)
        return StreamingGroupedAUC(
            self.positive.at[at].add(clicked), self.negative.at[at].add(1 - clicked)
        )

    def merge(self, other: StreamingGroupedAUC) -> StreamingGroupedAUC:
        """Both sets of samples together."""
        return jax.tree.map(jnp.add, self, other)

    def result(self) -> float:
        """The mean over groups with both classes, weighted by their sizes.

        Raises:
          ValueError: when there is none.
        """
        positive, negative = (np.asarray(x, np.int64) for x in self)
        both = (positive.sum(axis=1) > 0) & (negative.sum(axis=1) > 0)
        if not both.any():
            raise ValueError("no group has both a positive and a negative so far.")
        sizes = (positive + negative).sum(axis=1)[both]
        return float(np.average(_histogram_auc(positive[both], negative[both]), weights=sizes))


class StreamingMean(NamedTuple):
    """A mean over samples; `add_log_loss` and `add_ndcg` say of what."""

    total: Array
    """float32 scalar"""
    count: Array
    """int32 scalar"""

    @classmethod
    def create(cls) -> StreamingMean:
        """Empty."""
        return cls(jnp.zeros(()), jnp.zeros((), jnp.int32))

    def add(self, values: Array, where: Array | None = None) -> StreamingMean:
        """With values [N], or those of them that `where` keeps."""
        values = jnp.asarray(values, jnp.float32)
        kept = jnp.ones(values.shape, bool) if where is None else where
        total = self.total + jnp.sum(jnp.where(kept, values, 0))
        return StreamingMean(total, self.count + jnp.sum(kept, dtype=jnp.int32))

    def add_log_loss(self, logit: Array, label: Array) -> StreamingMean:
        """With ``-log p(label)`` of logits [N], in nats."""
        check_labels(label)
        signed = jnp.where(jnp.asarray(label) > 0.5, logit, -jnp.asarray(logit))
        return self.add(-jax.nn.log_sigmoid(signed))

    def add_ndcg(self, scores: Array, gains: Array, k: int) -> StreamingMean:
        """With NDCG@k of samples [N,T] that have a gain at all."""
        values = ndcg(scores, gains, k)
        return self.add(values, ~jnp.isnan(values))

    def merge(self, other: StreamingMean) -> StreamingMean:
        """Both sets of samples together."""
        return jax.tree.map(jnp.add, self, other)

    def result(self) -> float:
        """The mean.

        Raises:
          ValueError: without samples.
        """
        if int(self.count) == 0:
            raise ValueError("a mean over no samples.")
        return float(self.total) / int(self.count)
