"""Writing the values of a recorded run into another: activation patching."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads import heads as head_sets
from jaxheads.attention.masks import MASK_VALUE
from jaxheads.interventions.per_head import intervene_per_head
from jaxheads.interventions.places import (
    LayersLike,
    Place,
    PositionsLike,
    align,
    mix,
    position_axis,
)
from jaxheads.models import ModelConfig
from jaxheads.taps import OUTER_SITES, SITES, Edit, TapContext, TappedForward, resolve_site
from jaxheads.typing import Array


def patch(
    forward: Callable[..., Any],
    donor: Any,
    heads: head_sets.Heads | None = None,
    *,
    site: str = "z",
    positions: PositionsLike = None,
    layers: LayersLike = None,
) -> TappedForward:
    """A forward in which a site takes the values that it had in another run.

        value[b, t, h] <- (1 - w) value[b, t, h] + w donor[l, b, t, h],  w = mask[l, h] there

    The donor is a run on a text of equal length, position by position. Under a cache its positions
    are those of the whole text; tokens after its end are left alone.

    Args:
      forward: a forward, wrapped or not.
      donor: an `Output` whose `seen` holds the site (``record(forward, "z")(model, tokens)``), a
        mapping from sites to arrays, or the array: [L,B,T,...] inside the layers, [B,T,...]
        outside.
      heads: an array [L,H] of numbers from 0 (keep) to 1 (patch), or a list such as ``[(9, 6)]``
        or ``["9.6"]``; key/value heads at ``k`` and ``v``. None: all heads. Sites without heads
        (the residual stream) take None.
      site: where; any site that can be edited.
      positions: None for all; columns of the text (an int, [N] or [B,N], negative from the end),
        or a bool array [T] or [B,T].
      layers: None for all; an int, a list, or a mask [L].

    Raises:
      ValueError: for a donor that did not record the site or whose size is not that of the model
        and the text; for heads, layers and positions that are not there.

    References: Meng et al., 2022, arXiv:2202.05262; Wang et al., 2022, arXiv:2211.00593.
    """
    place = Place.of(site, heads, layers, positions)
    values = donor_values(donor, place.site)
    return intervene_per_head(forward, Edit(place.site, write, Written(place, values)))


def donor_values(donor: Any, site: str) -> Array:
    """The values of a site in a recorded run: an `Output`, a mapping from sites, or the array.

    Raises:
      ValueError: when the run did not record the site.
    """
    seen = getattr(donor, "seen", donor)
    if not isinstance(seen, Mapping):
        return jnp.asarray(seen)
    for name, value in seen.items():
        if resolve_site(name) == (site, None):
            if not isinstance(value, jax.Array | np.ndarray):
                raise ValueError(
                    f"the donor recorded {site!r} through a reduction; patch needs its values: "
                    f"record(forward, {site!r}) without reduce."
                )
            return jnp.asarray(value)
    held = ", ".join(seen) or "nothing"
    raise ValueError(
        f"the donor run did not record {site!r} (it holds {held}); make it with "
        f"record(forward, {site!r})(model, tokens)."
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Written:
    """Values to write at a place: the payload of `patch` and of whatever replaces values."""

    place: Place
    values: Array
    """[L, *site]; axes of size one hold for every index."""

    def fit(self, site: str, cfg: ModelConfig) -> Written:
        """The same with a place of arrays; the values' layers and widths checked."""
        check_values(jnp.shape(self.values), site, cfg, "the donor")
        return Written(self.place.fit(site, cfg), self.values)

    def check(self, length: int, is_cached: bool) -> None:
        """Raise for positions known to lie outside a text of this length."""
        self.place.check(length, is_cached)


def check_values(shape: tuple[int, ...], site: str, cfg: ModelConfig, what: str) -> None:
    """Raise unless an array has the axes of a site, [L,...] in the layers, and the model's sizes.

    Batch and lengths are checked later, against the value that is replaced.
    """
    axes = [*([] if site in OUTER_SITES else ["L"]), *SITES[site].split()]
    sizes = {
        "L": cfg.num_layers,
        "H": cfg.num_heads,
        "K": cfg.num_kv_heads,
        "D": cfg.head_dim,
        "M": cfg.model_dim,
        "V": cfg.vocab_size,
    }
    fits = len(shape) == len(axes) and all(
        n == sizes.get(a, n) or (n == 1 and a != "L") for a, n in zip(axes, shape)
    )
    if not fits:
        needed = ",".join(f"{a}={sizes[a]}" if a in sizes else a for a in axes)
        raise ValueError(f"{what} has shape {tuple(shape)} at site {site!r}; needed [{needed}].")


def write(value: Array, payload: Written, ctx: TapContext) -> Array:
    """Edit of any site: the payload's values at its place."""
    place = payload.place
    new, known = align_values(jnp.asarray(payload.values), place.site, value, ctx, "the donor")
    return mix(value, place.weights(value, ctx) * known, new)


def align_values(
    x: Array, site: str, value: Array, ctx: TapContext, what: str, fill: float | None = None
) -> tuple[Array, Array]:
    """Values of a whole text as this call needs them.

    Args:
      x: with the axes of the site; size one holds for every index.
      site: the site.
      value: what the site holds in this call.
      ctx: of the edit.
      what: `x`, for messages.
      fill: what keys past the text of `x` hold; default what an invisible key has.
    Returns:
      `x` broadcastable to `value`, and weights (broadcastable too): 0 where the text of `x` ends
      before the position.
    """
    axes = SITES[site].split()
    if axes[0] == "B" and x.shape[0] not in (1, value.shape[0]):
        raise ValueError(
            f"{what} has {x.shape[0]} rows at site {site!r}; the batch has {value.shape[0]}. Row b "
            "takes the values of row b."
        )
    axis = position_axis(site)
    x, known = align(x, axis, value.shape[axis], ctx, what)
    weights = jnp.ones((), jnp.float32)
    if known is not True:
        shape = [value.shape[axis] if n == axis else 1 for n in range(value.ndim)]
        weights = jnp.asarray(known, jnp.float32).reshape(shape)
    if axes[-1] == "S":
        if fill is None:
            fill = MASK_VALUE if site == "scores" else 0.0
        x = align_keys(x, value.shape[-1], ctx, fill, what)
    return x, weights


def align_keys(x: Array, num_keys: int, ctx: TapContext, fill: float, what: str) -> Array:
    """Data about keys [..., S_given] for S keys.

    The slots of a cache past its end hold `fill`; keys for which a cache has no slot are cut off.
    """
    size = x.shape[-1]
    if size in (1, num_keys):
        return x
    if ctx.slots is None:
        raise ValueError(f"{what} covers {size} keys; this call has {num_keys}.")
    widths = [(0, 0)] * (x.ndim - 1) + [(0, max(num_keys - size, 0))]
    return jnp.pad(x, widths, constant_values=fill)[..., :num_keys]
