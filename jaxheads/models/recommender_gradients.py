"""Do attention and representation fight over the tables they share?

A model with one set of tables is run as two tied copies, one that attention reads and one that
representation reads. The loss is the same function of both, so its two gradients are what each use
asks of the shared tables, and their sum is the gradient the shared tables get.

Feng et al., 2024, arXiv:2410.02604, section 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.embeddings.diagnostics import RowConflict, row_conflict
from jaxheads.models.recommender import LongSequenceRecommender, RecommenderOut, loss
from jaxheads.models.recommender_configs import Batch
from jaxheads.models.recommender_layers import FIELDS, Stats
from jaxheads.typing import Array


def tied_copies(model: LongSequenceRecommender) -> LongSequenceRecommender:
    """The same function with two sets of tables, equal in value: a TWIN as a DARE.

    Raises:
      ValueError: for a model that is not decoupling="shared".
    """
    if model.cfg.decoupling != "shared":
        raise ValueError(
            f"decoupling={model.cfg.decoupling!r}; only decoupling='shared' has one set of tables "
            "that attention and representation read directly."
        )
    tied = jax.tree.map(lambda x: x, model)
    tied.cfg = dataclasses.replace(model.cfg, decoupling="dare")
    tied.attention = nnx.data(jax.tree.map(lambda x: x, model.representation))
    return tied


class Conflict(NamedTuple):
    """What `gradient_conflict` returns."""

    by_field: Mapping[str, RowConflict]
    """Field -> row norms of representation over attention, and the mean cosine of the two."""
    value: Array
    """The loss."""
    grads: LongSequenceRecommender
    """The gradient of the shared model: the sum of the two."""
    out: RecommenderOut


def gradient_conflict(model: LongSequenceRecommender, stats: Stats, batch: Batch) -> Conflict:
    """Compares what attention and representation ask of the tables that they share.

    Take steps with `grads`, and the copies remain one set: this is training the shared model.

    Raises:
      ValueError: as `tied_copies` and `loss`.
    """
    take = jax.value_and_grad(loss, has_aux=True)
    (value, out), both = take(tied_copies(model), stats, batch)
    by_field = {
        name: row_conflict(both.attention.arrays()[name], both.representation.arrays()[name])
        for name in FIELDS
        if name in both.representation.arrays()
    }
    grads = jax.tree.map(lambda x: x, model)  # of its structure
    for part in ("projections", "scorer", "main", "aux"):
        setattr(grads, part, getattr(both, part))
    grads.representation = jax.tree.map(jnp.add, both.representation, both.attention)
    return Conflict(by_field, value, grads, out)
