"""Click models online: search a long history by attention rows alone, then look up K + 1 others.

`recommender.apply` looks up attention and representation rows of all T behaviours, which training
needs. `serve` gives the same probabilities from T + 1 attention rows and K + 1 representation rows,
and can split the history over the mesh axis `context`.

    with jax.set_mesh(mesh):
        served = jax.jit(serve)(model, stats, batch)
    served.probability, served.index, served.weights
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from jaxheads.embeddings import dare
from jaxheads.embeddings.search import Best, split_topk
from jaxheads.models import recommender
from jaxheads.models.recommender import LongSequenceRecommender, RecommenderConfig, check_batch
from jaxheads.models.recommender_configs import Batch
from jaxheads.models.recommender_layers import Stats
from jaxheads.typing import Array

AXIS = "context"
"""The mesh axis that splits histories."""
_BATCH_AXES = ("data", "fsdp")
_FLOAT_BYTES = 4
_NOW = np.zeros((), np.int32)  # the time id of a candidate


class Served(NamedTuple):
    """What `serve` returns."""

    probability: Array
    """[B] of a click."""
    logit: Array
    """[B] its log odds."""
    index: Array
    """[B,K] positions of the behaviours that the prediction rests on, best first."""
    weights: Array
    """[B,K] their weights; 0 for padding."""


def serve(model: LongSequenceRecommender, stats: Stats, batch: Batch) -> Served:
    """The click probabilities of a batch, in two stages; equal to `apply(train=False)`.

    On a mesh (`jax.set_mesh`), samples are split over data and fsdp and histories over context:
    each device searches its part, and the best of the parts are exchanged. The tables are whole on
    every device.

    Args:
      model: the parameters.
      stats: running statistics of the batch norms.
      batch: item, category [B], history_item, history_category [B,T], as for `apply`.
    Raises:
      ValueError: as `apply`, and for B or T that the mesh does not divide.
      NotImplementedError: for models that read the representation of the whole history.
    """
    cfg = model.cfg
    check_servable(cfg)
    check_batch(cfg, batch)
    best = _search(model, batch)
    item, category, times = best.carried
    weights = dare.pool_weights(best.scores)

    ahead = model.tables("representation", of_candidate=True)
    candidate = dare.embed(
        ahead, batch["item"], batch["category"], jnp.asarray(_NOW), cfg.time_mode
    )
    past = model.tables("representation")
    values = dare.embed(past, item, category, times, cfg.time_mode)  # [B,K,Dr]
    if model.projections is not None:
        candidate, values = model.projections.candidate(candidate), model.projections.value(values)
    features = dare.target_aware_features(
        candidate,
        jnp.einsum("bk,bkd->bd", weights, values),
        target_aware=cfg.target_aware,
        only_product=cfg.only_product,
    )
    logit, _ = model.main(features, stats["main"], train=False)
    return Served(jax.nn.sigmoid(logit), logit, best.index, weights)


def serve_one_stage(model: LongSequenceRecommender, stats: Stats, batch: Batch) -> Served:
    """The same through `apply`, which looks up both rows of every behaviour: for comparison."""
    check_servable(model.cfg)
    out = recommender.apply(model, stats, batch, train=False)
    weights = dare.pool_weights(jnp.take_along_axis(out.scores, out.index, axis=1))
    return Served(jax.nn.sigmoid(out.logit), out.logit, out.index, weights)


def check_servable(cfg: RecommenderConfig) -> None:
    """Raise for a model that has no second stage to save on.

    Raises:
      NotImplementedError: for a model that pools the representation of the whole history.
    """
    for name, value, needed in (
        ("pooling", cfg.pooling, "attention"),
        ("history_mean", cfg.history_mean, False),
    ):
        if value != needed:
            raise NotImplementedError(
                f"{name}={value!r} reads the representation of every behaviour, so two stages "
                f"save nothing; serve a model with {name}={needed!r}, or call recommender.apply."
            )


def _search(model: LongSequenceRecommender, batch: Batch) -> Best:
    """Stage 1: the K best behaviours with their item, category and time ids."""
    mesh = jax.sharding.get_abstract_mesh()
    names = ("item", "category", "history_item", "history_category")
    arrays = [jnp.asarray(batch[name]) for name in names]
    arrays.append(jnp.broadcast_to(dare.history_times(arrays[2].shape[1]), arrays[2].shape))
    if mesh.empty or mesh.size == 1:
        return _search_part(model, *arrays, axis_name=None)
    rows, columns = arrays[2].shape
    parts = mesh.shape[_BATCH_AXES[0]] * mesh.shape[_BATCH_AXES[1]]
    for what, size, n, axes in (
        ("samples", rows, parts, " and ".join(_BATCH_AXES)),
        ("behaviours", columns, mesh.shape[AXIS], AXIS),
    ):
        if size % n:
            raise ValueError(
                f"{size} {what} are not divisible by {n}, the size of the mesh's {axes}; pad them."
            )
    one, two = P(_BATCH_AXES), P(_BATCH_AXES, AXIS)
    search = jax.shard_map(
        lambda *given: tuple(_search_part(*given, axis_name=AXIS)),
        in_specs=(P(), one, one, two, two, two),
        out_specs=(one, one, (one, one, one)),
        check_vma=False,  # the result of an all-gather is the same everywhere
    )
    found: Any = search(model, *arrays)
    return Best(*found)


def _search_part(
    model: LongSequenceRecommender,
    item: Array,
    category: Array,
    history_item: Array,
    history_category: Array,
    times: Array,
    *,
    axis_name: str | None,
) -> Best:
    """The search in the part of the histories that this device has."""
    cfg = model.cfg
    ahead = model.tables("attention", of_candidate=True)
    q = dare.embed(ahead, item, category, jnp.asarray(_NOW), cfg.time_mode)
    past = model.tables("attention")
    # One row of time ids serves all samples.
    keys = dare.embed(past, history_item, history_category, times[0], cfg.time_mode)
    if model.projections is not None:
        q, keys = model.projections.query(q), model.projections.key(keys)
    part = {"category": category, "history_category": history_category}
    scores = recommender.score_vectors(model, q, keys, part, history_item > 0)
    return split_topk(
        scores,
        (history_item, history_category, times),
        cfg.top_k,
        axis_name=axis_name,
        approximate=cfg.approximate_search,
    )


class LookupBytes(NamedTuple):
    """Bytes of table rows that one request reads."""

    two_stage: int
    one_stage: int


def lookup_bytes(cfg: RecommenderConfig, length: int) -> LookupBytes:
    """What a request with a history of T behaviours reads of the tables, in two stages and in one.

        two stages  (T+1) Da + (K+1) Dr          one  (T+1) (Da + Dr)          times 4 bytes

    Da and Dr are the widths of whole vectors. One set of tables for both uses (TWIN) is read once
    in one stage.
    References: Feng et al., 2024, arXiv:2410.02604, section 4.
    """
    attention_dim = cfg.attention_dim or cfg.representation_dim
    attention, representation = cfg.width(attention_dim), cfg.width(cfg.representation_dim)
    if cfg.time_mode == "add":  # time rows have the width of item and category together
        attention, representation = 2 * attention, 2 * representation
    first = (length + 1) * attention
    whole = first if cfg.is_shared else first + (length + 1) * representation
    two = first + (cfg.top_k + 1) * representation
    return LookupBytes(_FLOAT_BYTES * two, _FLOAT_BYTES * whole)
