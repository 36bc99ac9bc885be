"""Where an edit acts: which heads or layers, and at which positions of the text.

A wrapper does not know the model yet, and the positions it was given may belong to a text that
arrives piece by piece through a cache. `Place` holds both as data. `Place.fit` checks the heads
against the model; `Place.weights` turns the rest into weights once a value is at hand.

**Positions are columns of the text**: column t of `tokens`, padding included. Under a cache they
count from its first slot, so column 5 is the same token in a full forward, in a prefill and in the
decode step that reads it. Columns that a call does not read are left alone by that call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads import heads as head_sets
from jaxheads.interventions.per_head import head_axis, num_heads_of
from jaxheads.models import ModelConfig
from jaxheads.taps import OUTER_SITES, SITES, TapContext, resolve_site
from jaxheads.typing import Array, ArrayLike, is_traced

PositionsLike: TypeAlias = Any
"""None = all; an int, [N] or [B,N] columns (negative: from the end); a bool array [T] or [B,T]."""

LayersLike: TypeAlias = Any
"""None = all; an int or [N] layers; a bool or float array [L]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadSet:
    """Heads as data: a mask [L,H] of numbers from 0 (leave) to 1 (act), or pairs [N,2]."""

    values: Any
    is_mask: bool = field(metadata={"static": True})

    @classmethod
    def of(cls, heads: head_sets.Heads) -> HeadSet:
        """Heads given as an array [L,H], or as a list such as ``[(9, 6)]`` or ``["9.6"]``."""
        if head_sets.is_mask(heads):
            return cls(heads, is_mask=True)
        pairs = np.asarray(head_sets.parse_heads(heads), np.int32).reshape(-1, 2)
        return cls(pairs, is_mask=False)

    def mask(self, site: str, cfg: ModelConfig) -> Array:
        """[L,H] float32, or [L,K] at a site of key/value heads; checked against the model."""
        count, kind = num_heads_of(site, cfg)
        if self.is_mask:
            check_heads(jnp.shape(self.values), site, cfg, "the head mask has")
            return jnp.asarray(self.values, jnp.float32)
        if not is_traced(self.values):
            for head in np.asarray(self.values).tolist():
                if kind == "key/value heads" and count <= head[1] < cfg.num_heads:
                    raise ValueError(
                        f"head {head_sets.label(tuple(head))} is out of range: site {site!r} "
                        f"counts {count} key/value heads; query head {head[1]} reads key/value "
                        f"head {head[1] // cfg.num_groups}, shared by {cfg.num_groups} query heads."
                    )
            head_sets.check_range(np.asarray(self.values).tolist(), cfg.num_layers, count)
        return _mask_of_pairs(self.values, cfg.num_layers, count)


def check_heads(
    shape: tuple[int, ...],
    site: str,
    cfg: ModelConfig,
    what: str,
    given: tuple[int, ...] | None = None,
) -> None:
    """Raise unless an array is [L,H] ([L,K] at a site of key/value heads), saying what it may be.

    Args:
      shape: of the array.
      site: where its heads are.
      cfg: of the model.
      what: the array and its verb, for the message ("gates have").
      given: the shape to show, when `shape` is only the last part of it.
    """
    count, kind = num_heads_of(site, cfg)
    if tuple(shape) == (cfg.num_layers, count):
        return
    group, hint = cfg.num_groups, ""
    if tuple(shape) == (cfg.num_layers, cfg.num_heads):
        hint = (
            f" It counts the {cfg.num_heads} query heads, {group} of which share a key/value head "
            f"(query head h reads h // {group}): act on 'z', 'q' or 'pattern' to reach single "
            "query heads."
        )
    elif tuple(shape) == (cfg.num_layers, cfg.num_kv_heads):
        hint = (
            f" It counts the {cfg.num_kv_heads} key/value heads: act on 'k' or 'v', or repeat "
            f"each column {group} times."
        )
    elif tuple(shape) == (count, cfg.num_layers):
        hint = " It looks transposed."
    elif len(shape) == 2 and shape[1] == 2:
        hint = " For a list of (layer, head) pairs pass a list, not an array (`.tolist()`)."
    raise ValueError(
        f"{what} shape {tuple(given or shape)}; site {site!r} of this model needs "
        f"[{cfg.num_layers}, {count}], layers x {kind}.{hint}"
    )


def _mask_of_pairs(pairs: ArrayLike, num_layers: int, num_heads: int) -> Array:
    """[N,2] pairs as a mask [L,H]. Traced pairs out of range give NaN, as bad token ids do."""
    layer, head = jnp.asarray(pairs)[:, 0], jnp.asarray(pairs)[:, 1]
    mask = jnp.zeros((num_layers, num_heads), jnp.float32).at[layer, head].set(1.0, mode="drop")
    is_known = jnp.all((layer < num_layers) & (head < num_heads))
    return jnp.where(is_known, mask, jnp.nan)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Positions:
    """Columns of the text as data; see the top of this file."""

    values: Any
    """int32 [N] or [B,N] columns, or bool [T] or [B,T]"""
    from_end: bool = field(metadata={"static": True})
    """Whether some columns are negative and count from the end of the text."""

    @classmethod
    def of(cls, positions: PositionsLike) -> Positions | None:
        """Positions as a caller writes them; None stays None and means everywhere."""
        if positions is None:
            return None
        if not isinstance(positions, jax.Array):
            listed = isinstance(positions, Iterable) and not isinstance(positions, np.ndarray)
            positions = np.atleast_1d(np.asarray(list(positions) if listed else positions))
            positions = positions.astype(np.int32) if positions.size == 0 else positions
        positions = positions[None] if jnp.ndim(positions) == 0 else positions
        shape, dtype = jnp.shape(positions), jnp.result_type(positions)
        is_bool = jnp.issubdtype(dtype, jnp.bool_)
        if len(shape) > 2 or not (is_bool or jnp.issubdtype(dtype, jnp.integer)):
            raise ValueError(
                f"positions have shape {shape} and dtype {dtype}; needed columns of the text as "
                "integers [N] or [B,N], or a bool array [T] or [B,T]."
            )
        known = not is_bool and not is_traced(positions)
        from_end = known and bool(np.any(np.asarray(positions) < 0))
        return cls(positions, from_end)

    def check(self, length: int, is_cached: bool) -> None:
        """Raise where columns are known to lie outside a text of this length."""
        values = self.values
        if is_cached or is_traced(values) or jnp.issubdtype(jnp.result_type(values), jnp.bool_):
            return
        values = np.asarray(values)
        if values.size and (values.min() < -length or values.max() >= length):
            worst = values.max() if values.max() >= length else values.min()
            raise ValueError(
                f"position {worst} is outside the text of {length} tokens (0 to {length - 1}, or "
                f"-{length} to -1 from its end)."
            )

    def weights(self, shape: tuple[int, ...], ctx: TapContext) -> Array:
        """[T] or [B,T] float32 for a value of batch and length `shape`: 1 at the columns.

        Columns traced and outside the text give NaN.
        """
        values, length = jnp.asarray(self.values), shape[-1]
        if values.ndim == 2 and (len(shape) == 1 or values.shape[0] != shape[0]):
            batch = shape[0] if len(shape) == 2 else "none"
            raise ValueError(
                f"positions are given for {values.shape[0]} rows; the batch has {batch}. Positions "
                "of one axis hold for every row."
            )
        if values.dtype == bool:
            return align(values, -1, length, ctx, "positions")[0].astype(jnp.float32)
        slots = slots_of(length, ctx)
        if slots is not None and self.from_end:
            raise ValueError(
                "negative positions count from the end of the text, and a text that is read "
                "through a cache has no end yet; give the columns, counted from 0."
            )
        if slots is None:
            values = jnp.where(values < 0, values + length, values)
        columns = jnp.arange(length) if slots is None else slots
        chosen = jnp.any(columns[..., :, None] == values[..., None, :], axis=-1)
        is_known = values >= 0 if slots is not None else (values >= 0) & (values < length)
        return jnp.where(jnp.all(is_known), chosen.astype(jnp.float32), jnp.nan)


def slots_of(length: int, ctx: TapContext) -> Array | None:
    """[T] (or [B,T]) the column of each of `length` tokens; None when they are 0..T-1."""
    slots = ctx.slots
    return slots if slots is not None and slots.shape[-1] == length else None


def align(
    x: Array, axis: int, length: int, ctx: TapContext, what: str
) -> tuple[Array, Array | bool]:
    """Data about the columns of a whole text, at the columns that this call reads.

    Args:
      x: an array with one axis of columns; size 1 holds for every column and is left alone.
      axis: which one.
      length: T, the tokens of the call.
      ctx: knows the columns of these tokens when there is a cache.
      what: the array, for messages.
    Returns:
      `x` with T columns, and which of them it had ([T] bool; True for all). Others hold zeros.
    Raises:
      ValueError: for another length than T, without a cache.
    """
    size = x.shape[axis]
    slots = slots_of(length, ctx)
    if size == 1:
        return x, True
    if slots is None:
        if size != length:
            raise ValueError(
                f"{what} cover {size} positions; the text of this call has {length}. Texts must "
                "have equal lengths, position by position."
            )
        return x, True
    if slots.ndim > 1:
        raise NotImplementedError(
            f"{what} cover every position, and this part of a forward computes other ones in each "
            "row; give the positions as columns, or run the whole forward."
        )
    return jnp.take(x, slots, axis=axis, mode="fill", fill_value=0), slots < size


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Place:
    """Heads (or layers) and positions of one site. Fit, it holds [L,H] (or [L]) and [L,...]."""

    site: str = field(metadata={"static": True})
    heads: Any
    """A `HeadSet` or None; fit, the weights [L,H] or [L]."""
    layers: Any
    positions: Positions | None

    @classmethod
    def of(
        cls,
        site: str,
        heads: head_sets.Heads | None,
        layers: LayersLike = None,
        positions: PositionsLike = None,
    ) -> Place:
        """A place as a caller writes it.

        Raises:
          ValueError: for heads at a site without them, and layers at a site outside the layers.
        """
        name, layer = resolve_site(site)
        if layer is not None:
            if layers is not None:
                raise ValueError(f"{site!r} names a layer and layers={layers!r} was given too.")
            layers = layer
        if heads is not None:
            head_axis(name)
        if layers is not None and name in OUTER_SITES:
            raise ValueError(f"site {name!r} is outside the layers; it takes no layers.")
        return cls(
            name,
            None if heads is None else HeadSet.of(heads),
            _layers(layers),
            Positions.of(positions),
        )

    def fit(self, site: str, cfg: ModelConfig) -> Place:
        """Arrays that lead with [L] (with nothing outside the layers), checked."""
        del site
        if self.site in OUTER_SITES:
            return self
        count = cfg.num_layers
        weights = jnp.ones(count, jnp.float32)
        if self.layers is not None:
            weights = _mask_of_layers(self.layers, count)
        if self.heads is not None:
            weights = weights[:, None] * self.heads.mask(self.site, cfg)
        positions = jax.tree.map(lambda x: over_layers(x, count), self.positions)
        return Place(self.site, weights, None, positions)

    def check(self, length: int, is_cached: bool) -> None:
        """Raise for positions known to lie outside a text of this length."""
        if self.positions is not None:
            self.positions.check(length, is_cached)

    def weights(self, value: Array, ctx: TapContext) -> Array:
        """Weights from 0 (leave) to 1 (act), broadcastable to `value`; for a fit place."""
        axes = SITES[self.site].split()
        weights = jnp.ones((1,) * len(axes), jnp.float32)
        if self.heads is not None:
            shape = [1] * len(axes)
            if jnp.ndim(self.heads):
                shape[head_axis(self.site)] = jnp.shape(self.heads)[0]
            weights = weights * self.heads.reshape(shape)
        if self.positions is not None:
            axis = position_axis(self.site)
            shape = [n if a in ("B", axes[axis]) else 1 for a, n in zip(axes, value.shape)]
            size = value.shape[axis]
            batch = value.shape[:1] if axes[0] == "B" else ()
            chosen = self.positions.weights((*batch, size), ctx)
            if chosen.ndim == 1 and batch:
                shape[0] = 1
            weights = weights * chosen.reshape(shape)
        return weights


def position_axis(site: str) -> int:
    """Which axis of a site's value counts the tokens read: T, or S where keys are formed."""
    axes = SITES[site].split()
    return axes.index("T") if "T" in axes else axes.index("S")


def over_layers(x: ArrayLike, num_layers: int) -> Array:
    """`x` for each layer alike, [L, ...], as the layer scan slices it."""
    return jnp.broadcast_to(x, (num_layers, *jnp.shape(x)))


def _layers(layers: LayersLike) -> Any:
    if layers is None or isinstance(layers, jax.Array | np.ndarray):
        return layers
    if isinstance(layers, int | np.integer):
        layers = [int(layers)]
    return np.asarray(list(layers)).reshape(-1)


def _mask_of_layers(layers: Any, count: int) -> Array:
    """[L] float32 of layer numbers [N], or of a mask [L] (bool or float)."""
    layers = layers if jnp.ndim(layers) else jnp.asarray(layers)[None]
    if not jnp.issubdtype(jnp.result_type(layers), jnp.integer):
        if jnp.shape(layers) != (count,):
            raise ValueError(
                f"the layer mask has shape {jnp.shape(layers)}; this model needs [{count}]."
            )
        return jnp.asarray(layers, jnp.float32)
    if not is_traced(layers):
        numbers = np.asarray(layers)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= count):
            worst = numbers.min() if numbers.min() < 0 else numbers.max()
            raise ValueError(
                f"layer {worst} is out of range: the model has layers 0 to {count - 1}."
            )
    known = jnp.all((layers >= 0) & (layers < count))
    mask = jnp.zeros(count, jnp.float32).at[jnp.asarray(layers)].set(1.0, mode="drop")
    return jnp.where(known, mask, jnp.nan)


def mix(value: Array, weights: Array, new: Array) -> Array:
    """``(1 - w) value + w new`` in the dtype of `value`; exactly one of them where w is 0 or 1."""
    weights = weights.astype(value.dtype)
    return value * (1 - weights) + new.astype(value.dtype) * weights
