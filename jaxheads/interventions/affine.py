"""Affine changes of any site: the ready-made edit, and steering the residual stream with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.interventions.patch import check_values
from jaxheads.interventions.per_head import intervene_per_head
from jaxheads.interventions.places import LayersLike, Place, PositionsLike, align, position_axis
from jaxheads.models import ModelConfig
from jaxheads.taps import (
    OUTER_SITES,
    SITES,
    Edit,
    TapContext,
    TappedForward,
    resolve_site,
)
from jaxheads.typing import Array, ArrayLike


def AffineEdit(site: str, gate: ArrayLike = 1.0, value: ArrayLike | None = None) -> Edit:
    """The `Edit` ``y <- gate * y + value``.

    Args:
      site: any site that can be edited.
      gate: broadcastable to the site's value, [L,B,T,H,1] at ``z``. Through `taps.intervene` it
        must lead with [L]; the wrappers of this package broadcast it.
      value: the same, [L,B,T,H,D] at ``z``, or None for nothing to add.

    With a cache, an axis of positions covers the whole text; tokens beyond it are left alone.
    """
    name, layer = resolve_site(site)
    if layer is not None:
        raise ValueError(
            f"{site!r} names a layer; an affine edit takes the site {name!r} and a gate [L,...] "
            "that is 1 (and a value that is 0) in the layers it leaves alone."
        )
    site = name
    axes = [*([] if site in OUTER_SITES else ["L"]), *SITES[site].split()]
    payload = Affine(_full(gate, site, axes, "gate"), None)
    if value is not None:
        payload = Affine(payload.gate, _full(value, site, axes, "value"))
    return Edit(site, _AFFINE[site], payload)


def _full(x: ArrayLike, site: str, axes: list[str], what: str) -> Array:
    """`x` with an axis for every letter; missing leading ones get size one."""
    x = jnp.asarray(x)
    if x.ndim > len(axes):
        raise ValueError(
            f"{what} has shape {x.shape} at site {site!r}; it must broadcast to [{','.join(axes)}]."
        )
    return x.reshape((1,) * (len(axes) - x.ndim) + x.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Affine:
    """Gate and value with the axes of a site; size one holds for every index."""

    gate: Array
    value: Array | None

    def fit(self, site: str, cfg: ModelConfig) -> Affine:
        """The same with L layers, checked against the model."""

        def spread(x: Array, what: str) -> Array:
            if site not in OUTER_SITES and x.shape[0] == 1:
                x = jnp.broadcast_to(x, (cfg.num_layers, *x.shape[1:]))
            check_values(x.shape, site, cfg, what)
            return x

        value = None if self.value is None else spread(jnp.asarray(self.value), "value")
        return Affine(spread(jnp.asarray(self.gate), "gate"), value)


def _affine_at(site: str) -> Callable[[Array, Affine, TapContext], Array]:
    axis = position_axis(site) if {"T", "S"} & set(SITES[site].split()) else None

    def affine(y: Array, payload: Affine, ctx: TapContext) -> Array:
        """Edit of any site: gate * y + value."""

        def at(x: Array, what: str, outside: float) -> Array:
            if axis is None:
                return x
            x, known = align(x, axis, y.shape[axis], ctx, what)
            if known is True:
                return x
            shape = [-1 if n == axis else 1 for n in range(y.ndim)]
            return jnp.where(jnp.reshape(known, shape), x, outside)

        new = y * at(jnp.asarray(payload.gate), "gate", 1.0).astype(y.dtype)
        if payload.value is None:
            return new
        return new + at(jnp.asarray(payload.value), "value", 0.0).astype(y.dtype)

    return affine


_AFFINE = {site: _affine_at(site) for site in SITES}


def steer(
    forward: Callable[..., Any],
    vector: ArrayLike,
    *,
    site: str = "resid_post",
    layers: LayersLike = None,
    positions: PositionsLike = None,
    scale: ArrayLike = 1.0,
) -> TappedForward:
    """A forward with a vector added to the residual stream.

        value[b, t] <- value[b, t] + scale * vector[l]     at the layers and positions

    Args:
      forward: a forward, wrapped or not.
      vector: [M], or [L,M] for one a layer (layers that are not steered are ignored).
      site: a site of the residual width, such as ``resid_post``, ``attn_out`` or ``embed``.
      layers: an int, a list, or a mask [L]; needed for a vector [M] inside the layers.
      positions: as for `patch`; None steers every token, generated ones too.
      scale: a number, or [B] for one a row; data, so that a search over it compiles once.

    Raises:
      ValueError: for a site of another width, a vector or layers that do not fit the model, and a
        vector [M] without layers.

    References: Turner et al., 2023, arXiv:2308.10248; Rimsky et al., 2023, arXiv:2312.06681.
    """
    place = Place.of(site, None, layers, positions)
    axes = SITES[place.site]
    if axes != "B T M":
        width = [s for s, a in SITES.items() if a == "B T M"]
        raise ValueError(
            f"site {place.site!r} is [{axes.replace(' ', ',')}]; a vector [M] is added at one of "
            f"{', '.join(width)}."
        )
    vector, scale = jnp.asarray(vector), jnp.asarray(scale, jnp.float32)
    if vector.ndim == 1 and place.layers is None and place.site not in OUTER_SITES:
        raise ValueError(
            f"layers= is needed with one vector: which layers get it at {place.site!r}? Pass an "
            "int or a list, range(L) for all, or a vector [L,M]."
        )
    if scale.ndim > 1:
        raise ValueError(f"scale has shape {scale.shape}; needed a number, or [B].")
    payload = Steering(place, vector, scale.reshape(-1))
    return intervene_per_head(forward, Edit(place.site, add_vector, payload))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Steering:
    """A vector, where it is added, and how strongly: the payload of `steer`."""

    place: Place
    vector: Array
    scale: Array

    def fit(self, site: str, cfg: ModelConfig) -> Steering:
        """Arrays that lead with [L], checked against the model."""
        outer = site in OUTER_SITES
        shapes = (
            [(cfg.model_dim,)] if outer else [(cfg.model_dim,), (cfg.num_layers, cfg.model_dim)]
        )
        if self.vector.shape not in shapes:
            allowed = " or ".join(str(list(s)) for s in shapes)
            raise ValueError(
                f"vector has shape {self.vector.shape}; site {site!r} of this model needs "
                f"{allowed}."
            )
        vector, scale = self.vector, self.scale
        if not outer:
            vector = jnp.broadcast_to(vector, (cfg.num_layers, cfg.model_dim))
            scale = jnp.broadcast_to(scale, (cfg.num_layers, *scale.shape))
        return Steering(self.place.fit(site, cfg), vector, scale)

    def check(self, length: int, is_cached: bool) -> None:
        """Raise for positions known to lie outside a text of this length."""
        self.place.check(length, is_cached)


def add_vector(value: Array, payload: Steering, ctx: TapContext) -> Array:
    """Edit of a value [B,T,M]: a vector [M] is added at the place."""
    scale = payload.scale
    if scale.shape[0] not in (1, value.shape[0]):
        raise ValueError(
            f"scale is given for {scale.shape[0]} rows; the batch has {value.shape[0]}."
        )
    weights = payload.place.weights(value, ctx) * scale[:, None, None]
    return value + (weights * payload.vector).astype(value.dtype)
