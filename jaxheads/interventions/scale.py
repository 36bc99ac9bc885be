"""Scaling what heads compute by one gate each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.interventions.per_head import head_axis, intervene_per_head, num_heads_of
from jaxheads.models import ModelConfig
from jaxheads.taps import Edit, TapContext, TappedForward
from jaxheads.typing import Array, ArrayLike


def scale_heads(forward: Callable[..., Any], gates: ArrayLike, *, site: str = "z") -> TappedForward:
    """A forward with each head's value at `site` multiplied by its gate.

        value[..., h, ...] <- gates[l, h] * value[..., h, ...]

    At ``z`` a gate of 0 removes the head's contribution to the residual stream, 1 leaves it as it
    is. Gates are data: any two share one compiled program, and gradients with respect to them are
    the heads' attributions.

    Args:
      forward: a forward, wrapped or not.
      gates: [L,H] numbers; [L,K] at the sites of key/value heads (``k``, ``v``, ``k_rot``).
      site: a site with a head axis.

    Raises:
      ValueError: for a site without heads; when called, for gates that do not fit the model.

    Example:
      >>> import jax, numpy as np
      >>> from flax import nnx
      >>> from jaxheads.models import Decoder, ModelConfig, forward
      >>> model = Decoder(ModelConfig(num_layers=2, num_heads=4), rngs=nnx.Rngs(0))
      >>> silent = scale_heads(forward, np.zeros((2, 4)))
      >>> silent(model, np.array([[1, 2, 3]])).logits.shape
      (1, 3, 384)
    """
    edit = Edit(site, _SCALE[head_axis(site)], Gates(jnp.asarray(gates)))
    return intervene_per_head(forward, edit)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gates:
    """Gates [L,H] (or [L,K]); see `scale_heads`."""

    values: ArrayLike

    def fit(self, site: str, cfg: ModelConfig) -> Array:
        """The gates, checked against the heads of the site."""
        values = jnp.asarray(self.values)
        count, kind = num_heads_of(site, cfg)
        if values.shape != (cfg.num_layers, count):
            raise ValueError(
                f"gates have shape {values.shape}; site {site!r} of this model needs "
                f"[{cfg.num_layers}, {count}], layers x {kind}.{_hint(values.shape, cfg, count)}"
            )
        return values


def _hint(shape: tuple[int, ...], cfg: ModelConfig, count: int) -> str:
    """What gates of another shape may have been meant for."""
    group = cfg.num_groups
    if shape == (cfg.num_layers, cfg.num_heads):
        return (
            f" These count the {cfg.num_heads} query heads, {group} of which share a key/value "
            "head (query head h reads h // "
            f"{group}): scale 'z', 'q' or 'pattern' to act on single query heads."
        )
    if shape == (cfg.num_layers, cfg.num_kv_heads):
        return (
            f" These count the {cfg.num_kv_heads} key/value heads: scale 'k' or 'v', or repeat "
            f"each column {group} times."
        )
    return " They look transposed." if shape == (count, cfg.num_layers) else ""


def scale_bthd(value: Array, gates: Array, ctx: TapContext) -> Array:
    """Edit of a value [B,T,H,...] by gates [H]."""
    del ctx
    return value * gates.astype(value.dtype)[:, None]


def scale_bhts(value: Array, gates: Array, ctx: TapContext) -> Array:
    """Edit of a value [B,H,T,S] by gates [H]."""
    del ctx
    return value * gates.astype(value.dtype)[:, None, None]


_SCALE = {2: scale_bthd, 1: scale_bhts}
