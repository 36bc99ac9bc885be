"""A synthetic click log in which the relevance of every past behaviour is known.

    batch, world = make_click_log(seed=0, n=60_000)

*Which* behaviours matter is a matter of category and recency, *what* they say is a matter of taste:
a model has to find the first to use the second.

    w_p   = R[c_t, c_p] 2^(-(p - 1) / 12),  over the history's sum      (p = 1 is the newest)
    logit = 4 sum_p w_p mean(taste_p * taste_t),      y ~ Bernoulli(sigmoid(logit))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

Log = dict[str, np.ndarray]

_WORLD_SEED = 0
HALF_LIFE = 12
STRENGTH = 4.0
PARTNER_RELEVANCE = 0.5


@dataclass(frozen=True, eq=False)
class World:
    """What does not change between users; row 0 of every table is padding."""

    item_category: np.ndarray
    """[items+1] category of each item, from 1."""
    taste: np.ndarray
    """[items+1, 4] of -1 and 1, independent of category."""
    relevance: np.ndarray
    """R [categories+1, categories+1]: 1 for the same, 0.5 for partners, 0 otherwise."""
    bayes_auc: float = float("nan")
    """AUC that the true probabilities reach on the log they came with, in expectation."""

    @property
    def num_items(self) -> int:
        """Items, without padding."""
        return len(self.item_category) - 1

    @property
    def num_categories(self) -> int:
        """Categories, without padding."""
        return len(self.relevance) - 1


def make_world(
    seed: int = _WORLD_SEED, *, num_items: int = 600, num_categories: int = 30, num_tastes: int = 4
) -> World:
    """Items of equally many categories, tastes, and a symmetric relevance between categories.

    Every category draws two partners at random; being partners is mutual, so that a category that
    others drew has more than two.

    Raises:
      ValueError: for fewer than 4 categories, or items that categories do not divide.
    """
    if num_categories < 4 or num_items % num_categories or num_items < num_categories:
        raise ValueError(
            f"num_items={num_items}, num_categories={num_categories}: needs 4 categories or more "
            "and equally many items in each."
        )
    rng = np.random.default_rng(seed)
    item_category = np.zeros(num_items + 1, np.int32)
    item_category[1:] = 1 + np.arange(num_items) // (num_items // num_categories)
    taste = np.zeros((num_items + 1, num_tastes), np.float32)
    taste[1:] = rng.choice([-1.0, 1.0], (num_items, num_tastes))
    relevance = np.zeros((num_categories + 1,) * 2, np.float32)
    categories = np.arange(1, num_categories + 1)
    for own in categories:
        partners = rng.choice(categories[categories != own], 2, replace=False)
        relevance[own, partners] = relevance[partners, own] = PARTNER_RELEVANCE
    relevance[categories, categories] = 1.0
    return World(item_category, taste, relevance)


def make_click_log(
    seed: int,
    n: int,
    world: World | None = None,
    *,
    length: int = 64,
    num_favourites: int = 6,
) -> tuple[Log, World]:
    """`n` users with a history and one candidate each, and the world they live in.

    A user has favourite categories; each event and the candidate take one of them at random and an
    item of it at random.

    Args:
      seed: of users and clicks; the world has its own.
      n: users.
      world: `make_world()` unless given.
      length: T, events per user.
      num_favourites: categories per user.
    Returns:
      (batch, world). The batch holds item, category, user [n] int32, history_item,
      history_category [n,T] int32 (oldest first), label [n] float32, and the truth: true_weights
      [n,T] (w, 0 where nothing is relevant) and true_logit [n] float32. `world.bayes_auc` is that
      of this log.
    Raises:
      ValueError: for n < 1, length < 1, or more favourites than categories.
    References: the controlled world proposed for arXiv:2410.02604.
    """
    world = make_world() if world is None else world
    num_categories = world.num_categories
    if n < 1 or length < 1 or not 1 <= num_favourites <= num_categories:
        raise ValueError(
            f"n={n}, length={length}, num_favourites={num_favourites}: n and length must be at "
            f"least 1 and favourites between 1 and the {num_categories} categories."
        )
    rng = np.random.default_rng([seed, 1])
    favourites = rng.random((n, num_categories)).argpartition(num_favourites - 1, axis=1)
    favourites = 1 + favourites[:, :num_favourites]
    choice = rng.integers(0, num_favourites, (n, length + 1))
    category = np.take_along_axis(favourites, choice, axis=1).astype(np.int32)
    per_category = world.num_items // num_categories
    item = 1 + (category - 1) * per_category + rng.integers(0, per_category, category.shape)
    past, past_item = category[:, :-1], item[:, :-1].astype(np.int32)
    weights = true_weights(world, category[:, -1], past)
    agreement = np.einsum("ntd,nd->nt", world.taste[past_item], world.taste[item[:, -1]])
    logit = STRENGTH * np.einsum("nt,nt->n", weights, agreement) / world.taste.shape[1]
    click = 1 / (1 + np.exp(-logit))
    log = {
        "item": item[:, -1].astype(np.int32),
        "category": category[:, -1],
        "user": np.arange(1, n + 1, dtype=np.int32),
        "history_item": past_item,
        "history_category": past,
        "label": (rng.random(n) < click).astype(np.float32),
        "true_weights": weights,
        "true_logit": logit.astype(np.float32),
    }
    return log, replace(world, bayes_auc=bayes_auc(click))


def true_weights(world: World, category: np.ndarray, history_category: np.ndarray) -> np.ndarray:
    """[B,T] ``R[c_t, c_p] 2^(-(p - 1) / 12)`` over its sum; zeros where nothing is relevant."""
    length = history_category.shape[1]
    recency = 0.5 ** (np.arange(length)[::-1] / HALF_LIFE)
    raw = world.relevance[category[:, None], history_category] * recency
    total = raw.sum(axis=1, keepdims=True)
    return (raw / np.where(total > 0, total, 1)).astype(np.float32)


def bayes_auc(probability: np.ndarray) -> float:
    """The AUC of true click probabilities, in expectation over the labels drawn from them.

    ``sum_ij p_i (1 - p_j) [p_i > p_j] / sum_ij p_i (1 - p_j)``, ties counted as a half.
    """
    values, inverse = np.unique(np.asarray(probability, np.float64), return_inverse=True)
    clicks = np.bincount(inverse, probability, len(values))
    others = np.bincount(inverse, 1 - probability, len(values))
    below = np.cumsum(others) - others
    return float((clicks * (below + others / 2)).sum() / (clicks.sum() * others.sum()))


def batches(
    log: Mapping[str, np.ndarray], batch_size: int, *, epochs: int = 1, seed: int | None = None
) -> Iterator[Log]:
    """Batches of a log, a new order each epoch (as it is without a seed); the rest is left out.

    Raises:
      ValueError: for a log smaller than a batch.
    """
    n = len(log["label"])
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size={batch_size} of a log of {n}; needs 1 to {n}.")
    for epoch in range(epochs):
        order = np.arange(n)
        if seed is not None:
            np.random.default_rng([seed, epoch]).shuffle(order)
        for start in range(0, n - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            yield {name: column[rows] for name, column in log.items()}
