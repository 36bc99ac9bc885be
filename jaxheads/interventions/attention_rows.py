"""Acting on attention itself: writing its rows, biasing its scores, cutting edges."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads import heads as head_sets
from jaxheads.attention import MASK_VALUE
from jaxheads.interventions.patch import Written, align_values, check_values, write
from jaxheads.interventions.per_head import intervene_per_head
from jaxheads.interventions.places import (
    LayersLike,
    Place,
    Positions,
    PositionsLike,
    align,
    mix,
    over_layers,
)
from jaxheads.models import ModelConfig
from jaxheads.taps import Edit, TapContext, TappedForward
from jaxheads.typing import Array, ArrayLike, is_traced

SUM_TOLERANCE = 1e-3


def override_pattern(
    forward: Callable[..., Any],
    heads: head_sets.Heads | None,
    rows: ArrayLike,
    *,
    positions: PositionsLike = None,
    layers: LayersLike = None,
) -> TappedForward:
    """A forward in which chosen heads attend as told: rows of their pattern are replaced.

        pattern[b, h, t, :] <- rows[l, b, h, t, :]     at the heads and query positions

    Values are not touched. Needs an implementation that forms the pattern (dense, or auto).

    Args:
      forward: a forward, wrapped or not.
      heads: as for `patch`; query heads.
      rows: [L,B,H,T,S], a recorded pattern or one like it; axes of size one (but L) hold for every
        index. Rows sum to 1. A row may look ahead: nothing masks it.
      positions: the query positions, as for `patch`.
      layers: as for `patch`.

    Raises:
      ValueError: for rows of another shape, or that do not sum to 1 where they are used.
    """
    place = Place.of("pattern", heads, layers, positions)
    rows = jnp.asarray(rows)
    _check_rows(rows, place)
    return intervene_per_head(forward, Edit("pattern", write, Written(place, rows)))


def _check_rows(rows: Array, place: Place) -> None:
    """Raise where known rows that are written do not sum to 1."""
    if rows.ndim != 5:
        raise ValueError(f"rows have shape {rows.shape}; needed [L,B,H,T,S].")
    if is_traced(rows) or not rows.is_fully_addressable:
        return
    sums = np.asarray(jnp.sum(rows, axis=-1, dtype=jnp.float32))  # [L,B,H,T]
    wrong = ~(np.abs(sums - 1) <= SUM_TOLERANCE)
    if place.positions is not None:  # rows left out are zero in rows made for some positions
        wrong &= sums != 0
    if place.heads is not None and not place.heads.is_mask and sums.shape[2] > 1:
        listed = np.zeros_like(wrong)
        for layer, head in np.asarray(place.heads.values).tolist():
            listed[layer : layer + 1, :, head : head + 1] = True
        wrong &= listed
    elif place.heads is not None and not is_traced(place.heads.values):
        chosen = np.asarray(place.heads.values) != 0
        if chosen.shape == sums.shape[::2]:
            wrong &= chosen[:, None, :, None]
    if wrong.any():
        layer, row, head, t = (int(n) for n in np.argwhere(wrong)[0])
        raise ValueError(
            f"the row [layer {layer}, batch {row}, head {head}, query {t}] sums to "
            f"{sums[layer, row, head, t]:.4g}; a row of attention sums to 1."
        )


def override_rows(
    forward: Callable[..., Any],
    heads: head_sets.Heads,
    targets: ArrayLike | Iterable[Iterable[int]],
    *,
    mask: ArrayLike | None = None,
    query: str | int | ArrayLike = "last",
) -> TappedForward:
    """A forward in which chosen heads attend evenly to given tokens, from one query position.

        pattern[b, h, query, :] <- 0,   then pattern[b, h, query, targets[b, :m]] <- 1/m

    The hand repair of a circuit: every other position, head and layer runs as usual.

    Args:
      forward: a forward, wrapped or not.
      heads: as for `patch`; query heads.
      targets: [B,m] columns of the keys, or a list of one list a row. -1 pads.
      mask: [B,m] bool, True where `targets` counts, if it is padded otherwise.
      query: ``"last"`` (the last token of each row that is not padding), or the column: an int or
        [B]. With a cache give the column.

    Raises:
      ValueError: for an empty list of targets, one listed twice, or one outside the text or after
        its query; for ``"last"`` with a cache.

    References: Merullo et al., 2023, arXiv:2310.08744, section 5.
    """
    targets = _targets(targets, mask)
    place = Place.of("pattern", heads)
    if isinstance(query, str):
        if query != "last":
            raise ValueError(f"query={query!r} must be 'last', a column, or columns [B].")
        column = None
    else:
        column = query if isinstance(query, jax.Array) else np.asarray(query, np.int32)
        if jnp.ndim(column) > 1 or not jnp.issubdtype(jnp.result_type(column), jnp.integer):
            raise ValueError(f"query has shape {jnp.shape(column)}; needed 'last', an int or [B].")
        column = column.reshape(-1)
        _check_order(targets, column)
    return intervene_per_head(forward, Edit("pattern", write_rows, Rows(place, targets, column)))


def _targets(targets: Any, mask: ArrayLike | None) -> Any:
    """[B,m] int32 with -1 where nothing is meant, checked."""
    if not isinstance(targets, jax.Array | np.ndarray):
        lists = [list(row) for row in targets]
        longest = max((len(row) for row in lists), default=0)
        targets = np.asarray([row + [-1] * (longest - len(row)) for row in lists], np.int32)
        targets = targets.reshape(len(lists), longest)
    if jnp.ndim(targets) != 2 or not jnp.issubdtype(jnp.result_type(targets), jnp.integer):
        raise ValueError(f"targets have shape {jnp.shape(targets)}; needed integer columns [B,m].")
    if mask is not None:
        if jnp.shape(mask) != jnp.shape(targets):
            raise ValueError(
                f"mask has shape {jnp.shape(mask)}, targets {jnp.shape(targets)}; both are [B,m]."
            )
        where = jnp.where if is_traced(targets) or is_traced(mask) else np.where
        targets = where(mask, targets, -1)
    if not is_traced(targets):
        for row, columns in enumerate(np.asarray(targets)):
            columns = columns[columns >= 0].tolist()
            if not columns:
                raise ValueError(f"row {row} has no target; a row of attention needs at least one.")
            if len(set(columns)) < len(columns):
                raise ValueError(f"row {row} lists a target twice: {columns}.")
    return targets


def _check_order(targets: Any, column: Any) -> None:
    if is_traced(targets) or is_traced(column) or np.any(np.asarray(column) < 0):
        return
    ahead = np.asarray(targets) > np.asarray(column)[:, None]
    if ahead.any():
        row, n = np.argwhere(ahead)[0]
        raise ValueError(
            f"target {np.asarray(targets)[row, n]} of row {row} comes after its query at column "
            f"{np.broadcast_to(column, ahead.shape[:1])[row]}; a causal model does not look ahead."
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Targets [B,m] of each row, from one query: the payload of `override_rows`."""

    place: Place
    targets: Any
    query: Any

    def fit(self, site: str, cfg: ModelConfig) -> Rows:
        """The same as arrays that lead with [L]."""
        spread = lambda x: None if x is None else over_layers(jnp.asarray(x), cfg.num_layers)
        return Rows(self.place.fit(site, cfg), spread(self.targets), spread(self.query))

    def check(self, length: int, is_cached: bool) -> None:
        """Raise for targets and queries known to lie outside a text of this length."""
        if self.query is None and is_cached:
            raise ValueError(
                "query='last' is the end of a text, and a text that is read through a cache has "
                "no end yet; give the column of the query, counted from 0."
            )
        for name, columns in (("target", self.targets), ("query", self.query)):
            if columns is None or is_traced(columns) or is_cached:
                continue
            if int(np.max(columns)) >= length or (name == "query" and np.min(columns) < -length):
                worst = int(np.max(columns))
                raise ValueError(f"{name} {worst} is outside the text of {length} tokens.")


def write_rows(pattern: Array, payload: Rows, ctx: TapContext) -> Array:
    """Edit of pattern [B,H,T,S]: even attention to the targets, from one query."""
    batch, _, length, num_keys = pattern.shape
    targets = payload.targets
    if targets.shape[0] not in (1, batch):
        raise ValueError(f"targets are given for {targets.shape[0]} rows; the batch has {batch}.")
    chosen = jax.nn.one_hot(targets, num_keys, dtype=jnp.float32).sum(axis=1)  # [B|1,S]
    rows = chosen / jnp.maximum(chosen.sum(axis=-1, keepdims=True), 1)
    if payload.query is None:
        ids = ctx.segment_ids
        index = jnp.arange(length)
        last = jnp.full(1, length - 1) if ids is None else jnp.max(jnp.where(ids != 0, index, 0), 1)
    else:
        last = payload.query
    columns = last if last.shape[0] == 1 else last[:, None]  # [1], or [B,1]
    at_query = Positions(columns, from_end=False).weights((batch, length), ctx)
    at_query = at_query.reshape(-1, 1, length, 1)
    weights = payload.place.weights(pattern, ctx) * at_query
    return mix(pattern, weights, rows[:, None, None, :])


def bias_scores(forward: Callable[..., Any], bias: ArrayLike) -> TappedForward:
    """A forward with a bias on the attention scores, before the softmax; -inf cuts an edge.

        scores[b, h, t, s] <- scores[b, h, t, s] + bias[l, b, h, t, s]

    Masked keys stay masked. A query whose every key is cut attends to nothing: its row is zero.

    Args:
      forward: a forward, wrapped or not.
      bias: [L,B,H,T,S]; axes of size one (but L) hold for every index. Under a cache T and S are
        those of the whole text, and nothing is added beyond it.
    """
    return intervene_per_head(forward, ScoreBias(bias))


def ScoreBias(bias: ArrayLike) -> Edit:
    """The `Edit` that adds bias [L,B,H,T,S] to the scores; see `bias_scores`."""
    bias = jnp.asarray(bias)
    if bias.ndim != 5:
        raise ValueError(f"bias has shape {bias.shape}; needed [L,B,H,T,S].")
    return Edit("scores", add_bias, Bias(bias))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bias:
    """A bias [L,B,H,T,S], size one (but L) for every index."""

    values: Array

    def fit(self, site: str, cfg: ModelConfig) -> Bias:
        """The same, its layers and heads checked."""
        check_values(jnp.shape(self.values), site, cfg, "bias")
        return self


def add_bias(scores: Array, payload: Bias, ctx: TapContext) -> Array:
    """Edit of scores [B,H,T,S] by a bias [B|1,H|1,T|1,S|1]."""
    bias, known = align_values(payload.values, "scores", scores, ctx, "bias", fill=0.0)
    bias = jnp.where(known > 0, jnp.maximum(bias, MASK_VALUE), 0.0)
    # Two cuts of one edge, or a cut of a masked key, must not overflow to -inf.
    return jnp.maximum(scores + bias.astype(scores.dtype), MASK_VALUE)


def knock_out(
    forward: Callable[..., Any],
    heads: head_sets.Heads | None = None,
    *,
    queries: PositionsLike = None,
    keys: PositionsLike = None,
    layers: LayersLike = None,
) -> TappedForward:
    """A forward in which queries cannot attend to keys: attention knockout.

        scores[b, h, t, s] <- -inf   for t in queries, s in keys, at the heads and layers

    The softmax renormalises over the keys that remain; a query that keeps none attends to nothing.

    Args:
      forward: a forward, wrapped or not.
      heads: query heads, as for `patch`; None for all.
      queries: query positions, as for `patch`; None for all.
      keys: key positions, written the same way; None for all.
      layers: None for all; an int, a list, a range, or a mask [L].

    References: Geva et al., 2023, arXiv:2304.14767; Jin et al., 2024, arXiv:2402.18154.
    """
    place = Place.of("scores", heads, layers, queries)
    return intervene_per_head(forward, Edit("scores", cut_edges, Edges(place, Positions.of(keys))))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Edges:
    """Queries (of a place) and the keys they lose."""

    place: Place
    keys: Positions | None

    def fit(self, site: str, cfg: ModelConfig) -> Edges:
        """The same as arrays that lead with [L]."""
        keys = jax.tree.map(lambda x: over_layers(x, cfg.num_layers), self.keys)
        return Edges(self.place.fit(site, cfg), keys)

    def check(self, length: int, is_cached: bool) -> None:
        """Raise for positions known to lie outside a text of this length."""
        self.place.check(length, is_cached)
        if self.keys is not None:
            self.keys.check(length, is_cached)


def cut_edges(scores: Array, payload: Edges, ctx: TapContext) -> Array:
    """Edit of scores [B,H,T,S]: the edges of the payload go to the value of masked keys."""
    weights = payload.place.weights(scores, ctx)
    if payload.keys is not None:
        chosen = _key_weights(payload.keys, scores, ctx)
        weights = weights * chosen.reshape(-1, 1, 1, scores.shape[-1])
    return jnp.maximum(scores + weights * MASK_VALUE, MASK_VALUE)


def _key_weights(keys: Positions, scores: Array, ctx: TapContext) -> Array:
    """[S] or [B,S] float32: 1 at the keys. Keys are all the slots of a cache, in order."""
    batch, num_keys = scores.shape[0], scores.shape[-1]
    if ctx.slots is None:
        return keys.weights((batch, num_keys), ctx)
    ctx = ctx._replace(slots=jnp.arange(num_keys))
    return keys.weights((batch, num_keys), ctx)


def PatternOverride(mask: ArrayLike, rows: ArrayLike) -> Edit:
    """The `Edit` ``pattern <- where(mask, rows, pattern)``.

    Args:
      mask: [L,H,T] bool or numbers from 0 to 1: which rows.
      rows: [L,B,H,T,S], what they become; axes of size one (but L) hold for every index. Rows that
        are written sum to 1.
    """
    mask, rows = jnp.asarray(mask), jnp.asarray(rows)
    if mask.ndim != 3:
        raise ValueError(f"mask has shape {mask.shape}; needed [L,H,T].")
    if rows.ndim != 5:
        raise ValueError(f"rows have shape {rows.shape}; needed [L,B,H,T,S].")
    if rows.shape[0] != mask.shape[0] or any(
        n not in (1, m) for n, m in zip(rows.shape[2:4], mask.shape[1:])
    ):
        raise ValueError(
            f"mask {mask.shape} and rows {rows.shape} differ; needed [L,H,T] and [L,B,H,T,S]."
        )
    if not is_traced(mask) and not is_traced(rows):
        sums = np.asarray(rows.sum(axis=-1))  # [L,B,H,T]
        written = np.asarray(mask)[:, None] != 0
        wrong = written & (np.abs(sums - 1) > SUM_TOLERANCE)
        if wrong.any():
            layer, _, head, t = (int(n) for n in np.argwhere(wrong)[0])
            raise ValueError(
                f"a row that the mask writes (layer {layer}, head {head}, query {t}) does not sum "
                "to 1; a row of attention does."
            )
    return Edit("pattern", override, Override(mask.astype(jnp.float32), rows))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Override:
    """Rows [L,B,H,T,S] and which of them count, [L,H,T]."""

    mask: Array
    rows: Array

    def fit(self, site: str, cfg: ModelConfig) -> Override:
        """The same, its layers and heads checked."""
        check_values(jnp.shape(self.rows), site, cfg, "rows")
        wanted = (cfg.num_layers, cfg.num_heads)
        if jnp.shape(self.mask)[:2] != wanted:
            raise ValueError(
                f"mask has shape {jnp.shape(self.mask)}; needed [{wanted[0]},{wanted[1]},T]."
            )
        return self


def override(pattern: Array, payload: Override, ctx: TapContext) -> Array:
    """Edit of pattern [B,H,T,S] by mask [H,T] and rows [B|1,H|1,T|1,S|1]."""
    length = pattern.shape[2]
    mask, _ = align(payload.mask, -1, length, ctx, "mask")  # zeros outside its text
    rows, known = align_values(payload.rows, "pattern", pattern, ctx, "rows")
    return mix(pattern, mask[None, :, :, None] * known, rows)
