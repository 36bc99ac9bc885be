"""Click models over long histories of behaviours: DARE, and what the paper compares it with.

A batch is a dict of arrays (ids from 1, 0 is padding, oldest behaviour first):

    item, category [B]   history_item, history_category [B,T]   label [B] in {0,1}

    cfg    = RECOMMENDERS["dare"](num_items, num_categories, attention_dim=8)
    model  = LongSequenceRecommender(cfg, rngs=nnx.Rngs(0))
    stats  = init_stats(cfg)                            # running statistics of the batch norms
    out    = apply(model, stats, batch, train=False)    # RecommenderOut
    value, out = loss(model, stats, batch)              # the next statistics are out.stats

Feng et al., 2024, arXiv:2410.02604.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxheads.embeddings import dare
from jaxheads.models.recommender_configs import (
    RECOMMENDERS,
    Batch,
    RecommenderConfig,
    check_batch,
)
from jaxheads.models.recommender_layers import (
    MLP,
    Head,
    Projections,
    Stats,
    Tables,
)
from jaxheads.taps import NO_TAPS, Tap, Taps
from jaxheads.typing import Array, PyTree, is_traced

__all__ = [
    "RECOMMENDERS",
    "SITES",
    "LongSequenceRecommender",
    "RecommenderConfig",
    "RecommenderOut",
    "apply",
    "check_batch",
    "click_cross_entropy",
    "forward",
    "init_stats",
    "is_penalised",
    "loss",
    "score_vectors",
    "squared_norm",
]

SITES = ("embed",)
"""Taps: `embed` [B, T+1, M] holds the vectors of the history and, last, of the candidate: attention
and representation side by side (M = Da + Dr), or the one vector that serves as both."""

_PROBABILITY_FLOOR = 1e-8


class LongSequenceRecommender(nnx.Module):
    """The parameters; `apply` runs them.

    `attention.{item,category,time}` and `representation.{item,category,time}` are the tables. With
    one set of tables, `attention` is None; with four, `*_candidate` are the candidate's.
    """

    def __init__(self, cfg: RecommenderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        attention_dim = _attention_dim(cfg)
        tables = lambda dim: Tables(cfg, dim, rngs=rngs)
        is_four = cfg.decoupling == "four_tables"
        self.attention = None if cfg.is_shared else tables(attention_dim)
        self.representation = tables(cfg.representation_dim)
        self.attention_candidate = tables(attention_dim) if is_four else None
        self.representation_candidate = tables(cfg.representation_dim) if is_four else None
        is_projected = cfg.decoupling == "projection"
        width = cfg.width(cfg.representation_dim)
        self.projections = Projections(width, cfg.init_std, rngs=rngs) if is_projected else None
        widths = (4 * cfg.width(attention_dim), cfg.scorer_dim, 1)
        self.scorer = MLP(widths, cfg.init_std, rngs=rngs) if cfg.scorer == "mlp" else None
        head = lambda width, hidden: Head(cfg, width, hidden, rngs=rngs)
        self.main = head(cfg.num_features, cfg.head_dims)
        self.aux = head(cfg.num_aux_features, cfg.head_dims[:1]) if cfg.aux_loss else None

    def tables(self, use: str, *, of_candidate: bool = False) -> dict[str, Array]:
        """The arrays behind one use, "attention" or "representation", whatever is shared."""
        if self.cfg.is_shared:
            use = "representation"
        own = getattr(self, f"{use}_candidate")
        return (own if of_candidate and own is not None else getattr(self, use)).arrays()


def _attention_dim(cfg: RecommenderConfig) -> int:
    return cfg.representation_dim if cfg.attention_dim is None else cfg.attention_dim


def init_stats(cfg: RecommenderConfig) -> Stats:
    """Running mean 0 and variance 1 of each batch norm: ``{"main": {"mean", "var"}, ...}``."""
    widths = {"main": cfg.num_features} | ({"aux": cfg.num_aux_features} if cfg.aux_loss else {})
    return {name: {"mean": jnp.zeros(n), "var": jnp.ones(n)} for name, n in widths.items()}


class RecommenderOut(NamedTuple):
    """What `apply` returns."""

    logit: Array
    """[B] log odds of a click."""
    aux_logit: Array | None
    """[B] of the auxiliary head; None without it."""
    scores: Array
    """[B,T] of stage 1; `dare.PADDED_SCORE` for padding."""
    index: Array
    """[B,K] the behaviours kept, best first."""
    stats: Stats
    """The running statistics after this batch (as given unless training)."""
    seen: Mapping[str, Any]
    """Recorded taps."""


def apply(
    model: LongSequenceRecommender,
    stats: Stats,
    batch: Batch,
    *,
    train: bool,
    taps: Taps = NO_TAPS,
    axis_name: str | tuple[str, ...] | None = None,
    lookup: dare.Lookup = dare.take_rows,
) -> RecommenderOut:
    """Scores, search, pooling and the log odds of a click.

    Under `jax.jit`, results that are not returned cost nothing (the auxiliary head, for one).

    Args:
      model: the parameters.
      stats: running statistics of the batch norms (`init_stats`).
      batch: arrays as in the module's description; `label` is not read.
      train: normalise with the statistics of the batch, and move the running ones by a tenth;
        otherwise normalise with the running ones.
      taps: edits and records; the sites are `SITES`.
      axis_name: inside `jax.shard_map`, the mesh axes that the batch is split over: statistics are
        then those of the whole batch. Under `jax.jit` alone they are anyway.
      lookup: (table, ids) -> rows, where tables are split over devices by hand.
    Raises:
      ValueError: for arrays that are missing or do not fit, T < K, T >= num_times, and, where the
        arrays are known, ids outside the tables.
    References: Feng et al., 2024, arXiv:2410.02604.
    """
    cfg = model.cfg
    check_batch(cfg, batch)
    taps.check(SITES, 0, type(model).__name__)
    tap = Tap(taps)
    mask = batch["history_item"] > 0  # [B,T]
    by_field = _scores_by_field(cfg) and not tap.wants("embed")
    vectors = _vectors(model, batch, tap, lookup, has_attention=not by_field)
    if by_field:
        scores = dare.relevance_of_ids(
            model.tables("attention"),
            *(jnp.asarray(batch[n]) for n in ("item", "category")),
            *(jnp.asarray(batch[n]) for n in ("history_item", "history_category")),
            candidate=model.tables("attention", of_candidate=True),
            lookup=lookup,
        )
    else:
        scores = score_vectors(model, vectors.query, vectors.keys, batch, mask)
    k = scores.shape[-1] if cfg.pooling == "mean" else cfg.top_k
    pooled = dare.two_stage_pool(scores, vectors.values, k, approximate=cfg.approximate_search)
    histories = [pooled.h]
    if cfg.history_mean:
        histories.append(dare.masked_mean(vectors.values, mask))
    new_stats, aux_logit = {}, None

    def predict(name: str, *pooled: Array) -> Array:
        """[B] log odds of one head; its next statistics go to `new_stats`."""
        features = dare.target_aware_features(
            vectors.candidate,
            *pooled,
            target_aware=cfg.target_aware,
            only_product=cfg.only_product,
        )
        head = getattr(model, name)
        logit, new_stats[name] = head(features, stats[name], train=train, axis_name=axis_name)
        return logit

    logit = predict("main", *histories)
    if model.aux is not None:
        aux_logit = predict("aux", dare.pool_all(scores, vectors.values))
    index = pooled.index[:, : cfg.top_k]
    seen = tap.finish(type(model).__name__)
    return RecommenderOut(logit, aux_logit, scores, index, new_stats, seen)


def forward(
    model: LongSequenceRecommender,
    batch: Batch,
    *,
    stats: Stats,
    train: bool = False,
    taps: Taps = NO_TAPS,
) -> RecommenderOut:
    """`apply` with the signature that `intervene` and `record` wrap: model, inputs, ``taps=``."""
    return apply(model, stats, batch, train=train, taps=taps)


class _Vectors(NamedTuple):
    query: Array
    """[B,Da]"""
    keys: Array
    """[B,T,Da]"""
    candidate: Array
    """[B,Dr]"""
    values: Array
    """[B,T,Dr]"""


def _vectors(
    model: LongSequenceRecommender,
    batch: Batch,
    tap: Tap,
    lookup: dare.Lookup,
    *,
    has_attention: bool,
) -> _Vectors:
    """The vectors of a batch; without attention, those of representation stand in their place."""
    cfg = model.cfg
    item, category = batch["item"], batch["category"]
    past_item, past_category = batch["history_item"], batch["history_category"]
    times = dare.history_times(past_item.shape[-1])

    def of(use: str) -> tuple[Array, Array]:
        """Vectors of the candidate and of the history for one use."""
        ahead, past = model.tables(use, of_candidate=True), model.tables(use)
        zero = jnp.zeros((), jnp.int32)
        candidate = dare.embed(ahead, item, category, zero, cfg.time_mode, lookup=lookup)
        return candidate, dare.embed(
            past, past_item, past_category, times, cfg.time_mode, lookup=lookup
        )

    r, values = of("representation")
    q, keys = of("attention") if has_attention and not cfg.is_shared else (r, values)
    if tap.wants("embed"):
        q, keys, r, values = _tapped(tap, cfg, q, keys, r, values)
    if model.projections is not None:
        maps = model.projections
        q, keys, r, values = maps.query(q), maps.key(keys), maps.candidate(r), maps.value(values)
    return _Vectors(q, keys, r, values)


def _tapped(tap: Tap, cfg: RecommenderConfig, q: Array, keys: Array, r: Array, values: Array):
    """The vectors after the site `embed`, which holds history and candidate in one array."""
    whole = lambda past, candidate: jnp.concatenate([past, candidate[:, None]], axis=1)
    if cfg.is_shared:
        x = tap("embed", whole(values, r))  # [B,T+1,D]
        return x[:, -1], x[:, :-1], x[:, -1], x[:, :-1]
    x = jnp.concatenate([whole(keys, q), whole(values, r)], axis=-1)  # [B,T+1,Da+Dr]
    a, b = jnp.split(tap("embed", x), [q.shape[-1]], axis=-1)
    return a[:, -1], a[:, :-1], b[:, -1], b[:, :-1]


def _scores_by_field(cfg: RecommenderConfig) -> bool:
    """Whether nothing but the dot product reads the attention vectors.

    They need not be formed then. Shared tables have their vectors formed for pooling anyway.
    """
    return (
        cfg.decoupling in ("dare", "four_tables")
        and (cfg.scorer, cfg.search, cfg.pooling) == ("dot", "soft", "attention")
        and cfg.time_mode != "add"
    )


def score_vectors(
    model: LongSequenceRecommender, q: Array, keys: Array, batch: Batch, mask: Array
) -> Array:
    """Stage 1 of a model, from vectors: [B,T], `dare.PADDED_SCORE` where nothing may be kept.

    Args:
      q: [B,Da] of the candidate.
      keys: [B,T,Da] of the behaviours.
      batch: category [B] and history_category [B,T], read under hard search.
      mask: [B,T] true where there is a behaviour.
    """
    cfg = model.cfg
    if cfg.search == "hard":
        mask &= batch["history_category"] == batch["category"][:, None]
    if cfg.pooling == "mean":
        return dare.mask_scores(jnp.zeros(mask.shape, keys.dtype), mask)
    if model.scorer is None:
        item_only = cfg.search == "hard"
        return dare.relevance_scores(q, keys, _attention_dim(cfg), mask, item_only=item_only)
    q = jnp.broadcast_to(q[:, None], keys.shape)
    scores = model.scorer(jnp.concatenate([q, keys, q - keys, q * keys], axis=-1))[..., 0]
    return dare.mask_scores(scores / q.shape[-1], mask)


def loss(
    model: LongSequenceRecommender,
    stats: Stats,
    batch: Batch,
    *,
    taps: Taps = NO_TAPS,
    axis_name: str | tuple[str, ...] | None = None,
    lookup: dare.Lookup = dare.take_rows,
) -> tuple[Array, RecommenderOut]:
    """What training minimises, and the forward pass behind it (`out.stats` are the next stats).

        CE(main) + CE(aux) + weight_decay * sum ||theta||^2,    CE = -mean log(p(label) + 1e-8)

    theta runs over weights, batch norm scales and slopes: neither tables nor biases.

    Args:
      batch: as for `apply`, with label [B] in {0,1}.
      axis_name: as in `apply`; the cross-entropies are then means over the whole batch.
    Raises:
      ValueError: as `apply`, and for labels outside {0,1} where they are known.
    References: Feng et al., 2024, arXiv:2410.02604, and its released code.
    """
    label = _labels(batch)
    out = apply(model, stats, batch, train=True, taps=taps, axis_name=axis_name, lookup=lookup)
    value = click_cross_entropy(out.logit, label)
    if out.aux_logit is not None:
        value += click_cross_entropy(out.aux_logit, label)
    if axis_name is not None:
        value = jax.lax.pmean(value, axis_name)
    return value + model.cfg.weight_decay * squared_norm(model), out


def click_cross_entropy(logit: Array, label: Array) -> Array:
    """``-mean log(p(label) + 1e-8)`` with p = sigmoid(logit) for 1 and sigmoid(-logit) for 0."""
    signed = jnp.where(label > 0.5, logit, -logit)
    return -jnp.mean(jnp.log(jax.nn.sigmoid(signed) + _PROBABILITY_FLOOR))


def is_penalised(model: PyTree) -> PyTree:
    """Which parameters the quadratic penalty is over: a tree of bools."""

    def of(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        is_table = leaf.get_metadata()["axes"][:1] == ("table_rows",)
        return jax.tree.map(lambda _: not is_table and not name.endswith("bias"), leaf)

    is_variable = lambda x: isinstance(x, nnx.Variable)
    return jax.tree_util.tree_map_with_path(of, model, is_leaf=is_variable)


def squared_norm(model: LongSequenceRecommender) -> Array:
    """The sum of squares over the parameters of `is_penalised`."""
    chosen = jax.tree.map(
        lambda x, yes: jnp.sum(jnp.square(x)) if yes else jnp.zeros(()), model, is_penalised(model)
    )
    return sum(jax.tree.leaves(chosen), start=jnp.zeros(()))


def _labels(batch: Batch) -> Array:
    if "label" not in batch:
        raise ValueError("the batch has no 'label' [B]; the loss needs 1 for a click, otherwise 0.")
    label = batch["label"]
    if not is_traced(label) and not np.isin(np.asarray(label), (0, 1)).all():
        bad = np.asarray(label)[~np.isin(np.asarray(label), (0, 1))][0]
        raise ValueError(f"label {bad} is neither 0 nor 1; a label says whether there was a click.")
    return jnp.asarray(label, jnp.float32)
