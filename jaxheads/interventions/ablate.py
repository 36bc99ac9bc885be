"""Taking heads out: zero, mean and resample ablation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxheads import heads as head_sets
from jaxheads.interventions.patch import align_values, check_values, donor_values
from jaxheads.interventions.per_head import head_axis, intervene_per_head, num_tokens_of
from jaxheads.interventions.places import Place, PositionsLike, mix, over_layers, position_axis
from jaxheads.models import ModelConfig
from jaxheads.taps import SITES, Edit, Reduction, TapContext, TappedForward, record, resolve_site
from jaxheads.typing import Array, ArrayLike, PyTree


def ablate(
    forward: Callable[..., Any],
    heads: head_sets.Heads,
    *,
    mode: str = "zero",
    site: str = "z",
    means: ArrayLike | None = None,
    donor: Any = None,
    key: Array | None = None,
    positions: PositionsLike = None,
) -> TappedForward:
    """A forward in which what the given heads hold at `site` is replaced.

        value[:, t, h] <- (1 - mask[l, h]) value[:, t, h] + mask[l, h] replacement

    ==============  ============================================================================
    ``mode``        replacement
    ==============  ============================================================================
    zero            0
    mean            ``means[l, h]``, or ``means[l, t, h]``: averages over reference text
    position_mean   the head's average over the tokens of the same text (padding left out)
    head_mean       the average over the heads of the layer at the same token
    resample        with `key`, the same head and token in another row of the batch (rows roll by
                    one random offset, the same for all heads and layers, so none meets itself);
                    with `donor`, in the same row of a recorded run on other text; with both, in a
                    random row of that run
    ==============  ============================================================================

    Args:
      forward: a forward, wrapped or not.
      heads: an array [L,H], bool or numbers from 0 (keep) to 1 (replace), or a list such as
        ``[(9, 6)]`` or ``["9.6"]``. Arrays of one model and lists of one length share a compiled
        program. At ``k``, ``k_rot`` and ``v`` these are key/value heads, [L,K].
      mode: see above.
      site: a site with heads.
      means: [L,H,D] or [L,T,H,D] for ``mean`` (at ``pattern`` [L,H,S] or [L,H,T,S]);
        `mean_activation` computes them.
      donor: a recorded run, as for `patch`.
      key: a typed random key.
      positions: where in the text, as for `patch`; None everywhere.

    Raises:
      ValueError: for an unknown mode, a missing or needless argument, a head listed twice; when
        called, for heads, means or a donor that do not fit the model.

    References: Wang et al., 2022, arXiv:2211.00593 (mean); Zhou et al., 2024, arXiv:2410.13708
    (head mean).
    """
    if mode not in _MODES:
        raise ValueError(f"mode={mode!r} is not one of {', '.join(_MODES)}.")
    _check_arguments(mode, means=means, donor=donor, key=key)
    place = Place.of(site, heads, None, positions)
    head_axis(place.site)
    if place.site == "scores":
        raise ValueError(
            "ablating 'scores' would uncover masked keys; ablate 'q' (mode='zero' makes attention "
            "uniform over the visible keys), or add to scores with bias_scores."
        )
    source = Source(
        None if means is None else jnp.asarray(means),
        None if donor is None else donor_values(donor, place.site),
        key,
    )
    return intervene_per_head(forward, Edit(place.site, _MODES[mode].fn, Ablation(place, source)))


class Source(NamedTuple):
    """What a replacement is made of."""

    means: Any = None
    donor: Any = None
    key: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ablation:
    """Where, and what the replacement needs: the payload of `ablate`."""

    place: Place
    source: Source

    def fit(self, site: str, cfg: ModelConfig) -> Ablation:
        """The same as arrays that lead with [L], checked against the model."""
        means, donor, key = self.source
        if means is not None:
            means = _full_means(means, site, cfg)
        if donor is not None:
            check_values(jnp.shape(donor), site, cfg, "the donor")
        if key is not None:
            key = over_layers(key, cfg.num_layers)
        return Ablation(self.place.fit(site, cfg), Source(means, donor, key))

    def check(self, length: int, is_cached: bool) -> None:
        """Raise for positions known to lie outside a text of this length."""
        self.place.check(length, is_cached)


def _full_means(means: Array, site: str, cfg: ModelConfig) -> Array:
    """Means with all axes of the site, [L,1,...], from [L,H,D] or [L,T,H,D] and their likes."""
    axes = SITES[site].split()
    at = axes.index("T" if "T" in axes else "S")
    sizes = {"H": cfg.num_heads, "K": cfg.num_kv_heads, "D": cfg.head_dim, "M": cfg.model_dim}
    needed = [cfg.num_layers, *(sizes.get(a, a) for n, a in enumerate(axes) if n not in (0, at))]
    full = means[:, None] if means.ndim else means
    if full.ndim == len(axes):
        full = jnp.expand_dims(full, at + 1)
    fits = full.ndim == len(axes) + 1 and full.shape[0] == cfg.num_layers
    if not fits or any(n != sizes.get(a, n) for a, n in zip(axes, full.shape[1:])):
        raise ValueError(
            f"means has shape {means.shape}; site {site!r} of this model needs {needed}, or one "
            "more axis of positions after the layers (after the heads at 'pattern')."
        )
    return full


def zero_heads(value: Array, payload: Ablation, ctx: TapContext) -> Array:
    """Edit of a site with heads: those of the place become 0."""
    return mix(value, payload.place.weights(value, ctx), jnp.zeros((), value.dtype))


def mean_heads(value: Array, payload: Ablation, ctx: TapContext) -> Array:
    """Edit of a site with heads: those of the place become given means."""
    return _take_from(value, payload.source.means, payload.place, ctx, "means")


def position_mean_heads(value: Array, payload: Ablation, ctx: TapContext) -> Array:
    """Edit of a site with heads: those of the place become their mean over the text."""
    if ctx.slots is not None:
        raise ValueError(
            "mode='position_mean' averages over the whole text, and a call with a cache has only "
            "a piece of it; compute means first (mean_activation) and pass mode='mean'."
        )
    axis = position_axis(payload.place.site)
    shape = [n if a in (0, axis) else 1 for a, n in enumerate(value.shape)]
    weights = jnp.ones(shape, jnp.float32)
    if ctx.segment_ids is not None:
        weights = (ctx.segment_ids != 0).astype(jnp.float32).reshape(shape)
    total = jnp.sum(value * weights, axis=axis, keepdims=True, dtype=jnp.float32)
    count = jnp.sum(weights, axis=axis, keepdims=True)
    mean = total / jnp.maximum(count, 1)
    return mix(value, payload.place.weights(value, ctx), mean)


def head_mean_heads(value: Array, payload: Ablation, ctx: TapContext) -> Array:
    """Edit of a site with heads: those of the place become the mean over the heads."""
    axis = head_axis(payload.place.site)
    mean = jnp.mean(value, axis=axis, keepdims=True, dtype=jnp.float32)
    return mix(value, payload.place.weights(value, ctx), mean)


def resample_heads(value: Array, payload: Ablation, ctx: TapContext) -> Array:
    """Edit of a site with heads: those of the place take the values of another row."""
    place, (_, donor, key) = payload.place, payload.source
    if donor is None:
        if value.shape[0] < 2:
            raise ValueError(
                "mode='resample' takes values of another row; the batch has one row. Pass a donor: "
                "a recorded run on other text."
            )
        rolled = jnp.roll(value, jax.random.randint(key, (), 1, value.shape[0]), axis=0)
        return mix(value, place.weights(value, ctx), rolled)
    if key is not None:
        donor = donor[jax.random.randint(key, value.shape[:1], 0, donor.shape[0])]
    return _take_from(value, donor, place, ctx, "the donor")


def _take_from(value: Array, values: Array, place: Place, ctx: TapContext, what: str) -> Array:
    values, known = align_values(values, place.site, value, ctx, what)
    return mix(value, place.weights(value, ctx) * known, values)


class _Mode(NamedTuple):
    fn: Callable[[Array, PyTree, TapContext], Array]
    needs: tuple[tuple[str, ...], ...]
    """The sets of arguments that serve it."""


_MODES = {
    "zero": _Mode(zero_heads, ((),)),
    "mean": _Mode(mean_heads, (("means",),)),
    "resample": _Mode(resample_heads, (("key",), ("donor",), ("donor", "key"))),
    "position_mean": _Mode(position_mean_heads, ((),)),
    "head_mean": _Mode(head_mean_heads, ((),)),
}

_HINTS = {
    "means": "Compute them with interventions.mean_activation.",
    "key": "Pass key=jax.random.key(0), or donor=: a recorded run on other text.",
}


def _check_arguments(mode: str, **arguments: Any) -> None:
    given = tuple(name for name, value in arguments.items() if value is not None)
    needs = _MODES[mode].needs
    if given in needs:
        return
    for name in given:
        if not any(name in need for need in needs):
            raise ValueError(f"mode={mode!r} takes no {name}.")
    missing = needs[0][0]
    raise ValueError(f"mode={mode!r} needs {missing}. {_HINTS[missing]}")


def mean_activation(
    forward: Callable[..., Any],
    model: Any,
    tokens: Array,
    *,
    site: str = "z",
    segment_ids: Array | None = None,
    per_position: bool = False,
) -> Array:
    """A site averaged over a batch of reference text, padding left out; float32.

    Summed inside the layers: no activation is kept for more than one layer at a time.

    Args:
      forward: a forward, wrapped or not.
      model: a model.
      tokens: [B,T], or images [B,H,W,C] of a vision transformer.
      site: a site with the axes B and T (or S), such as ``z`` or ``resid_pre``.
      segment_ids: [B,T]; 0 marks padding.
      per_position: keep the axis of positions; average over the batch only.
    Returns:
      [L,H,D] for ``z``, [L,T,H,D] with `per_position`; what `ablate` takes as `means`.
    """
    name, _ = resolve_site(site)
    axis = position_axis(name)
    shape = (jnp.shape(tokens)[0], num_tokens_of(model.cfg, tokens))
    weights = jnp.ones(shape) if segment_ids is None else jnp.asarray(segment_ids) != 0
    reduce = Reduction(_Sums(axis, per_position), weights.astype(jnp.float32))
    padding: dict[str, Any] = {} if segment_ids is None else {"segment_ids": segment_ids}
    return record(forward, site, reduce=reduce)(model, tokens, **padding).seen[site]


@dataclass(frozen=True)
class _Sums:
    """A value averaged with weights [B,T] over the batch, and over positions unless told."""

    axis: int
    per_position: bool

    def __call__(self, value: Array, weights: Array) -> Array:
        shape = [n if a in (0, self.axis) else 1 for a, n in enumerate(value.shape)]
        weights = weights.reshape(shape)
        over = (0,) if self.per_position else (0, self.axis)
        total = jnp.sum(value * weights, axis=over, dtype=jnp.float32)
        return total / jnp.maximum(jnp.sum(weights, axis=over), 1)


def mean_z(
    forward: Callable[..., Any],
    model: Any,
    tokens: Array,
    *,
    segment_ids: Array | None = None,
) -> Array:
    """[L,H,D] float32: each head's z averaged over the tokens of a batch, padding left out."""
    return mean_activation(forward, model, tokens, segment_ids=segment_ids)
