"""What a click model has learned: does it find the behaviours that matter, and what hinders it?

    mutual_information_table   how much the category at a place says about the click (ground truth)
    relevance_gains            the same for the behaviours of given samples, poor estimates left out
    learned_relevance          what the attention tables say without the item field
    retrieval_ndcg             how good the K behaviours retrieved are
    row_conflict               do two gradients of one table dominate or fight each other?
    discriminability           what clusters of the features say about the click

References: Feng et al., 2024, arXiv:2410.02604, sections 3 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.embeddings.dare import PADDED_SCORE, Tables, history_times
from jaxheads.typing import Array, ArrayLike

_NEVER = 1e-5  # stands for a count of zero, as in the released code
MIN_SAMPLES = 700
MIN_COUNT = 50
MOST_POOR = 20


class MutualInformation(NamedTuple):
    """Table of `mutual_information_table`, and the counts behind it."""

    bits: np.ndarray
    """[C+1, C+1, T]: candidate category, category of the behaviour, position - 1 (newest first)."""
    clicked: np.ndarray
    """x_1, as `bits`: samples with a click in which the position holds the category."""
    unclicked: np.ndarray
    """x_0: the same without a click."""
    num_clicked: np.ndarray
    """t_1 [C+1]"""
    num_unclicked: np.ndarray
    """t_0 [C+1]"""


def mutual_information_table(
    label: ArrayLike, category: ArrayLike, history_category: ArrayLike, num_categories: int
) -> MutualInformation:
    """How many bits "position p holds category b" gives about the click, per candidate category.

    With s samples of the candidate's category, t_1 of them clicked, and x_1 (x_0) of the clicked
    (the others) that hold b at p:

        MI = sum_y [ x_y/s log2(x_y s / ((x_1 + x_0) t_y))
                   + (t_y - x_y)/s log2((t_y - x_y) s / ((s - x_1 - x_0) t_y)) ]

    A count of zero is 1e-5; terms with t_y - x_y = 0 are 0. Candidates that were always or never
    clicked have 0 bits.

    Args:
      label: [N] of 0 and 1.
      category: [N] of the candidates, from 1.
      history_category: [N,T], oldest first, 0 for padding (never counted).
      num_categories: C; the table has (C + 1)^2 T entries, so renumber the most frequent first
        where there are thousands.
    Raises:
      ValueError: for ids above C or labels that are not 0 or 1.
    References: the ground-truth relevance of arXiv:2410.02604, section 5.2.
    """
    label, category, past = (np.asarray(x) for x in (label, category, history_category))
    if not np.isin(label, (0, 1)).all():
        raise ValueError("labels must be 0 or 1.")
    if max(category.max(), past.max()) > num_categories or min(category.min(), past.min()) < 0:
        raise ValueError(f"category ids must lie between 0 and num_categories={num_categories}.")
    size, length = num_categories + 1, past.shape[1]
    place = np.broadcast_to(np.arange(length)[::-1], past.shape)  # position - 1
    cell = (category[:, None] * size + past) * length + place

    def count(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        real = past[rows] > 0
        x = np.bincount(cell[rows][real], minlength=size * size * length)
        return x.reshape(size, size, length), np.bincount(category[rows], minlength=size)

    (x1, t1), (x0, t0) = count(label == 1), count(label == 0)
    return MutualInformation(_bits(x1, x0, t1, t0), x1, x0, t1, t0)


def _bits(x1: np.ndarray, x0: np.ndarray, t1: np.ndarray, t0: np.ndarray) -> np.ndarray:
    t1, t0 = t1[:, None, None].astype(float), t0[:, None, None].astype(float)
    known = (t1 > 0) & (t0 > 0)
    t1, t0 = np.where(known, t1, 1.0), np.where(known, t0, 1.0)
    s = t1 + t0
    x1, x0 = np.where(x1 > 0, x1, _NEVER), np.where(x0 > 0, x0, _NEVER)

    def term(x: np.ndarray, both: np.ndarray, t: np.ndarray) -> np.ndarray:
        x = np.maximum(x, 0)
        return x / s * np.log2(np.where(x > 0, x * s, 1) / np.where(x > 0, both * t, 1))

    absent = s - x1 - x0
    total = term(x1, x1 + x0, t1) + term(x0, x1 + x0, t0)
    total += term(t1 - x1, absent, t1) + term(t0 - x0, absent, t0)
    return np.where(known, total, 0.0)


class Gains(NamedTuple):
    """What `relevance_gains` returns."""

    bits: np.ndarray
    """[N,T] oldest first, 0 for padding."""
    kept: np.ndarray
    """[N] whether the sample passes the filters."""


def relevance_gains(
    table: MutualInformation,
    category: ArrayLike,
    history_category: ArrayLike,
    *,
    min_samples: int = MIN_SAMPLES,
    min_count: int = MIN_COUNT,
    most_poor: int = MOST_POOR,
) -> Gains:
    """The mutual information of each behaviour with the click, and which samples to trust.

    A sample is left out when its candidate's category has fewer than `min_samples` samples, or
    more than `most_poor` of its behaviours were counted fewer than `min_count` times among the
    clicked or among the others (the filters of the released code).

    Args:
      table: of `mutual_information_table`.
      category: [N] of the candidates.
      history_category: [N,T], oldest first.
    """
    category, past = np.asarray(category), np.asarray(history_category)
    place = np.arange(past.shape[1])[::-1]
    at = (category[:, None], past, place)
    poor = (table.clicked[at] < min_count) | (table.unclicked[at] < min_count)
    is_real = past > 0
    samples = (table.num_clicked + table.num_unclicked)[category]
    kept = (samples >= min_samples) & ((poor & is_real).sum(axis=1) <= most_poor)
    return Gains(np.where(is_real, table.bits[at], 0.0), kept)


def learned_relevance(
    tables: Tables,
    category: ArrayLike,
    history_category: ArrayLike,
    *,
    candidate: Tables | None = None,
) -> Array:
    """[N,T] scores of stage 1 without the item field: what the model makes of category and place.

        <c_t, c_p> / sqrt(2 d) + <time_0, time_p> / sqrt(d)

    The divisor stays sqrt(2 d) although half of the semantic part is missing, as in the released
    code, so that the two parts keep their proportion.

    Args:
      tables: attention tables, category [C+1,d] and time [n_times,d] (left out without one).
      category, history_category: [N], [N,T]; padding gets `dare.PADDED_SCORE`.
      candidate: the candidate's own tables, where it has some (TWIN-4E).
    """
    ahead = tables if candidate is None else candidate
    past = jnp.asarray(history_category)
    d = tables["category"].shape[-1]
    q, k = ahead["category"][jnp.asarray(category)], tables["category"][past]
    scores = jnp.einsum("nd,ntd->nt", q, k) / math.sqrt(2 * d)
    if "time" in tables:
        times = tables["time"][history_times(past.shape[1])]
        scores += times @ ahead["time"][0] / math.sqrt(times.shape[-1])
    return jnp.where(past > 0, scores, PADDED_SCORE)


def ndcg(scores: ArrayLike, gains: ArrayLike, k: int) -> Array:
    """[N] gain of the K highest scores, discounted, over the best possible; NaN where that is 0.

        sum_i gain(pick i) / log2(i + 1)  /  sum_i gain(best pick i) / log2(i + 1),   i = 1..K

    Args:
      scores, gains: [N,T]; K is at most T. Equal scores count in order of position.
    Raises:
      ValueError: for shapes that differ, or K outside 1..T.
    """
    scores, gains = jnp.asarray(scores), jnp.asarray(gains)
    if scores.shape != gains.shape or not 1 <= k <= scores.shape[-1]:
        raise ValueError(
            f"scores {scores.shape} and gains {gains.shape} with k={k}: needs two [N,T] and k "
            "between 1 and T."
        )
    discount = 1 / jnp.log2(jnp.arange(2.0, k + 2))
    picks = jax.lax.top_k(scores, k)[1]
    got = jnp.take_along_axis(gains, picks, axis=-1) @ discount
    best = jax.lax.top_k(gains, k)[0] @ discount
    return jnp.where(best > 0, got / jnp.where(best > 0, best, 1), jnp.nan)


def retrieval_ndcg(scores: ArrayLike, gains: ArrayLike, k: int = 20) -> float:
    """Mean `ndcg` over the samples that have something to find.

    Args:
      scores: [N,T] of stage 1.
      gains: [N,T] true relevance: `relevance_gains`, or the known weights of a synthetic log.
      k: K, 20 in the paper.
    Raises:
      ValueError: as `ndcg`, and when no sample has a gain.
    """
    values = np.asarray(ndcg(scores, gains, k), np.float64)
    if np.isnan(values).all():
        raise ValueError("no sample has a positive gain: there is nothing to retrieve.")
    return float(np.nanmean(values))


class RowConflict(NamedTuple):
    """How two gradients of the same rows relate."""

    first_norm: Array
    """Mean row norm of the first."""
    second_norm: Array
    """Mean row norm of the second."""
    cosine: Array
    """Mean cosine of the rows; negative means that they pull apart."""

    @property
    def ratio(self) -> Array:
        """Norm of the second over that of the first."""
        return self.second_norm / self.first_norm


def row_conflict(first: Array, second: Array) -> RowConflict:
    """Compares the gradients that two uses of one table send to its rows.

    Rows that a gradient does not reach are left out of its mean, and of the cosines.

    Args:
      first, second: [rows,d], for example of the attention and of the representation copy.
    """
    norms = [jnp.linalg.norm(g, axis=-1) for g in (first, second)]
    both = (norms[0] > 0) & (norms[1] > 0)
    products = jnp.where(both, norms[0] * norms[1], 1.0)
    cosine = jnp.einsum("rd,rd->r", first, second) / products
    first_norm, second_norm = (_mean_where(n, n > 0) for n in norms)
    return RowConflict(first_norm, second_norm, _mean_where(cosine, both))


def _mean_where(x: Array, where: Array) -> Array:
    return jnp.sum(jnp.where(where, x, 0.0)) / jnp.maximum(jnp.sum(where), 1)


def discriminability(
    features: ArrayLike,
    label: ArrayLike,
    num_clusters: Sequence[int] = (2, 5, 10, 20, 30, 50, 100, 200, 300, 500, 700, 1000),
    key: Array | None = None,
    *,
    iterations: int = 25,
) -> np.ndarray:
    """Nats that the k-means cluster of the features says about the label, for each k.

    Args:
      features: [N,F]; N is at least the largest k.
      label: [N] of 0 and 1.
      num_clusters: the values of k.
      key: of the first centres; `jax.random.key(0)` unless given.
    References: the discriminability of representations in arXiv:2410.02604, section 5.3.
    """
    features, label = jnp.asarray(features, jnp.float32), np.asarray(label)
    if max(num_clusters) > len(features):
        raise ValueError(f"{max(num_clusters)} clusters of {len(features)} samples.")
    key = jax.random.key(0) if key is None else key
    found = [kmeans(features, k, key, iterations=iterations) for k in num_clusters]
    return np.array([_nats(np.asarray(cluster), label) for cluster in found])


def _nats(a: np.ndarray, b: np.ndarray) -> float:
    joint = np.zeros((int(a.max()) + 1, int(b.max()) + 1))
    np.add.at(joint, (a.astype(int), b.astype(int)), 1 / len(a))
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / independent[seen])).sum())


def kmeans(x: Array, k: int, key: Array, *, iterations: int = 25) -> Array:
    """[N] int32 cluster of each row after Lloyd's iterations from k random rows.

    A centre that loses all its rows stays where it is.
    """

    def assign(centres: Array) -> Array:
        cross = x @ centres.T
        return jnp.argmin(jnp.sum(jnp.square(centres), axis=-1) - 2 * cross, axis=-1)

    def step(centres: Array, _) -> tuple[Array, None]:
        member = jax.nn.one_hot(assign(centres), k, dtype=x.dtype)  # [N,k]
        count = jnp.sum(member, axis=0)[:, None]
        return jnp.where(count > 0, member.T @ x / jnp.maximum(count, 1), centres), None

    first = jax.random.choice(key, x, (k,), replace=False)
    centres, _ = jax.lax.scan(step, first, length=iterations)
    return assign(centres).astype(jnp.int32)
