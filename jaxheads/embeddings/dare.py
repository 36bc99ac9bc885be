"""Decoupled attention and representation embeddings: the arithmetic, as pure functions.

A click model over a long history of behaviours works in two stages. Stage 1 scores every behaviour
against the candidate with *attention* vectors and keeps the best K; stage 2 pools the K
*representation* vectors with the softmax of the same scores:

    s_p = <a_t, a_p>_semantic / sqrt(2 d)  +  <a_t, a_p>_time / sqrt(d)
    h   = sum_p softmax(s)_p r_p           over the K highest s_p

TWIN takes both vectors from one set of tables, DARE from two. Letters: B samples, T behaviours
(oldest first), K kept, d the width of a field, Da and Dr the widths of whole vectors.

References: Feng et al., 2024, arXiv:2410.02604; the single set of tables is TWIN, Chang et al.,
2023, arXiv:2302.02352; the learned scorer is DIN, Zhou et al., 2018, arXiv:1706.06978.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.fields import unknown
from jaxheads.typing import Array

TIME_MODES = ("concat", "add", "none")
PADDED_SCORE = -(2.0**32) + 1
"""The score of a padded behaviour: below every real one, finite."""

Tables = Mapping[str, Array]
Lookup = Callable[[Array, Array], Array]


def take_rows(table: Array, ids: Array) -> Array:
    """``table[ids]``; NaN for an id that the table does not have, instead of its nearest row."""
    rows = jnp.asarray(table).at[ids]
    return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def embed(
    tables: Tables,
    item: Array,
    category: Array,
    time: Array | None,
    mode: str = "concat",
    *,
    lookup: Lookup = take_rows,
) -> Array:
    """The vector of each id: its item, category and time rows side by side.

        concat:  [item, category, time]        add:  [item, category] + time

    Args:
      tables: item [n_items+1, d], category [n_cats+1, d], time [n_times, d] ([n_times, 2d] in
        mode "add", not read in mode "none"). Row 0 is padding.
      item, category: [...] int32 ids.
      time: ids that broadcast against them: how many places before the candidate, which is 0. A
        history of T behaviours, oldest first, has ``T - arange(T)`` ([T] is enough).
      mode: one of `TIME_MODES`.
      lookup: (table, ids) -> rows; the way into tables whose rows lie on several devices.
    Returns:
      [..., 3d], or [..., 2d] in modes "add" and "none".
    Raises:
      ValueError: for an unknown mode, and in mode "add" when the time rows are not as wide as item
        and category rows together.
    References: Feng et al., 2024, arXiv:2410.02604, section 4.
    """
    if mode not in TIME_MODES:
        raise ValueError(unknown("time mode", mode, TIME_MODES))
    semantic = [lookup(tables["item"], item), lookup(tables["category"], category)]
    if mode == "none":
        return jnp.concatenate(semantic, axis=-1)
    if time is None:
        raise ValueError(f"mode={mode!r} needs time ids; pass them, or mode='none'.")
    times = lookup(tables["time"], time)
    if mode == "concat":
        times = jnp.broadcast_to(times, (*item.shape, times.shape[-1]))
        return jnp.concatenate([*semantic, times], axis=-1)
    vectors = jnp.concatenate(semantic, axis=-1)
    if times.shape[-1] != vectors.shape[-1]:
        raise ValueError(
            f"mode='add' adds time rows of width {times.shape[-1]} to item and category rows of "
            f"width {vectors.shape[-1]} together; give the time table that width, or use 'concat'."
        )
    return vectors + times


def history_times(length: int) -> Array:
    """[T] time ids of a history, oldest first: T, T-1, ..., 1."""
    return length - jnp.arange(length, dtype=jnp.int32)


def relevance_scores(
    q: Array, k: Array, d_field: int, mask: Array | None = None, *, item_only: bool = False
) -> Array:
    """Stage 1: how relevant each behaviour is to the candidate.

        s_p = <q, k_p>_(item, category) / sqrt(2 d)  +  <q, k_p>_time / sqrt(d)

    Args:
      q: [B,Da] attention vector of the candidate; Da is 3d, or 2d when there is no time part.
      k: [B,T,Da] attention vectors of the behaviours.
      d_field: d, the width of one field.
      mask: [B,T], true (or 1) where there is a behaviour; the others get `PADDED_SCORE`.
      item_only: leave out the category part and divide the item part by sqrt(d), as under hard
        search, where all behaviours scored have the candidate's category.
    Returns:
      [B,T] in the dtype of q.
    Raises:
      ValueError: for widths that are neither 2d nor 3d.
    References: Feng et al., 2024, arXiv:2410.02604, equation 1.
    """
    _check_widths(q, k, d_field)
    part = d_field if item_only else 2 * d_field
    scores = _dot(q[:, :part], k[..., :part]) / math.sqrt(part)
    if q.shape[-1] == 3 * d_field:
        scores += _dot(q[:, 2 * d_field :], k[..., 2 * d_field :]) / math.sqrt(d_field)
    return mask_scores(scores, mask)


def relevance_of_ids(
    tables: Tables,
    item: Array,
    category: Array,
    history_item: Array,
    history_category: Array,
    *,
    candidate: Tables | None = None,
    item_only: bool = False,
    lookup: Lookup = take_rows,
) -> Array:
    """Stage 1 from ids: `relevance_scores` of what `embed` gives, without forming [B,T,3d].

    The same sum field by field; the time part, the same for all samples, is computed once.

    Args:
      tables: attention tables, all of one width; without "time" there is no time part.
      item, category: [B] of the candidates.
      history_item, history_category: [B,T], oldest first; item 0 is padding.
      candidate: the candidate's own tables, where it has some.
      item_only, lookup: as in `relevance_scores` and `embed`.
    Returns:
      [B,T], `PADDED_SCORE` for padding.
    """
    ahead = tables if candidate is None else candidate
    rows = lambda name, ids: lookup(tables[name], ids)
    d = tables["item"].shape[-1]
    scores = _dot(lookup(ahead["item"], item), rows("item", history_item))
    if not item_only:
        q = lookup(ahead["category"], category)
        scores += _dot(q, rows("category", history_category))
    scores /= math.sqrt(d if item_only else 2 * d)
    if "time" in tables:
        now = lookup(ahead["time"], jnp.zeros((), jnp.int32))
        times = rows("time", history_times(history_item.shape[-1]))  # [T,d]
        scores += times @ now / math.sqrt(d)
    return mask_scores(scores, history_item > 0)


def _dot(q: Array, k: Array) -> Array:
    return jnp.einsum("bd,btd->bt", q, k)


def _check_widths(q: Array, k: Array, d_field: int) -> None:
    if q.shape[-1] != k.shape[-1] or q.shape[-1] not in (2 * d_field, 3 * d_field):
        raise ValueError(
            f"vectors of widths {q.shape[-1]} (candidate) and {k.shape[-1]} (behaviours) with "
            f"d_field={d_field}; both need 3 * d_field = {3 * d_field} (item, category, time) or "
            f"2 * d_field = {2 * d_field} (without a time part)."
        )


def mask_scores(scores: Array, mask: Array | None) -> Array:
    """`scores` with `PADDED_SCORE` where the mask is false."""
    return scores if mask is None else jnp.where(mask.astype(bool), scores, PADDED_SCORE)


def is_valid(scores: Array) -> Array:
    """Where a score belongs to a behaviour and not to padding."""
    return scores > PADDED_SCORE / 2


def search_topk(
    scores: Array, k: int, *, approximate: bool = False, recall: float = 0.95
) -> tuple[Array, Array]:
    """The K highest scores and where they stand; equal scores in order of position.

    The choice is not differentiated, the scores chosen are.

    Args:
      scores: [B,T].
      k: K, at most T.
      approximate: use `jax.lax.approx_max_k`, faster on TPU for T in the thousands and above.
      recall: expected share of the true K that the approximate search finds.
    Returns:
      (values [B,K], index [B,K] int32).
    Raises:
      ValueError: for K < 1 or K > T.
    """
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(
            f"k={k} of {scores.shape[-1]} behaviours; k must be between 1 and the length of the "
            "history. Lower top_k or pad the histories in front."
        )
    if approximate:
        values, index = jax.lax.approx_max_k(scores, k, recall_target=recall)
    else:
        values, index = jax.lax.top_k(scores, k)
    return values, index


def pool_weights(values: Array) -> Array:
    """Softmax over the last axis in which padding has weight 0; all padding gives all zeros."""
    valid = is_valid(values)
    highest = jnp.max(jnp.where(valid, values, PADDED_SCORE), axis=-1, keepdims=True)
    shifted = jnp.where(valid, values - jax.lax.stop_gradient(highest), 0.0)
    raw = jnp.where(valid, jnp.exp(shifted), 0.0)
    return raw / jnp.maximum(jnp.sum(raw, axis=-1, keepdims=True), jnp.finfo(raw.dtype).tiny)


class Pooled(NamedTuple):
    """What `two_stage_pool` returns."""

    h: Array
    """[B,Dr] sum of weights times values."""
    weights: Array
    """[B,K], zero for padding."""
    index: Array
    """[B,K] int32 positions of the behaviours kept, best first."""


def two_stage_pool(scores: Array, values: Array, k: int, *, approximate: bool = False) -> Pooled:
    """Keep the K highest scores and pool their vectors: ``h = sum_p softmax(s)_p r_p``.

    Padding (`PADDED_SCORE`) has weight 0 even when fewer than K behaviours are there (the released
    code lets it in with its raw score); a history of padding alone gives h = 0.

    Args:
      scores: [B,T] of `relevance_scores`.
      values: [B,T,Dr] representation vectors.
      k: K, at most T. With K = T this is the full softmax.
      approximate: as in `search_topk`.
    """
    chosen, index = search_topk(scores, k, approximate=approximate)
    weights = pool_weights(chosen)
    kept = jnp.take_along_axis(values, index[..., None], axis=1)  # [B,K,Dr]
    return Pooled(jnp.einsum("bk,bkd->bd", weights, kept), weights, index)


def pool_all(scores: Array, values: Array) -> Array:
    """[B,Dr] the full softmax without stage 1: what the auxiliary head sees."""
    return jnp.einsum("bt,btd->bd", pool_weights(scores), values)


def masked_mean(values: Array, mask: Array) -> Array:
    """[B,Dr] the vectors of a history over its count plus one: ``sum_p r_p / (n + 1)``."""
    mask = mask.astype(values.dtype)
    total = jnp.einsum("bt,btd->bd", mask, values)
    return total / (jnp.sum(mask, axis=-1, keepdims=True) + 1)


def target_aware_features(
    r: Array, *pooled: Array, target_aware: bool = True, only_product: bool = False
) -> Array:
    """What the head sees: the candidate, each pooled history, and their products.

        [r, h_1, ..., h_1 * r, ...]    without target-aware representation: [r, h_1, ...]

    Multiplying each behaviour by the candidate before pooling is the same as multiplying h.

    Args:
      r: [B,Dr] representation vector of the candidate.
      *pooled: one or more [B,Dr].
      target_aware: append the products.
      only_product: the products alone.
    References: Feng et al., 2024, arXiv:2410.02604, equation 3.
    """
    products = [h * r for h in pooled]
    if only_product:
        return jnp.concatenate(products, axis=-1)
    return jnp.concatenate([r, *pooled, *(products if target_aware else [])], axis=-1)
