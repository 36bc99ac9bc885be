"""Scaling what heads compute by one gate each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.interventions.per_head import head_axis, intervene_per_head
from jaxheads.interventions.places import check_heads
from jaxheads.models import ModelConfig
from jaxheads.taps import Edit, TapContext, TappedForward
from jaxheads.typing import Array, ArrayLike, is_traced


def scale_heads(forward: Callable[..., Any], gates: ArrayLike, *, site: str = "z") -> TappedForward:
    """A forward with each head's value at `site` multiplied by its gate.

        value[..., h, ...] <- gates[l, h] * value[..., h, ...]

    At ``z`` a gate of 0 removes the head's contribution to the residual stream, 1 leaves it as it
    is. z is linear in the values, so a gate on ``z`` scales the value vectors of that query head
    alone, its bias included; a gate on ``v`` scales those of the whole group that shares them.
    Gates are data: any two share one compiled program, and gradients with respect to them are
    the heads' attributions.

    Args:
      forward: a forward, wrapped or not.
      gates: [L,H] numbers, or [B,L,H] for gates of each row; K in place of H at the sites of
        key/value heads (``k``, ``v``, ``k_rot``).
      site: a site with a head axis.

    Raises:
      ValueError: for a site without heads, for NaN; when called, for gates that do not fit the
        model or the batch.

    Example:
      >>> import jax, numpy as np
      >>> from flax import nnx
      >>> from jaxheads.models import Decoder, ModelConfig, forward
      >>> model = Decoder(ModelConfig(num_layers=2, num_heads=4), rngs=nnx.Rngs(0))
      >>> silent = scale_heads(forward, np.zeros((2, 4)))
      >>> silent(model, np.array([[1, 2, 3]])).logits.shape
      (1, 3, 384)

    References: Yu et al., 2023, arXiv:2310.15910 (one head's values); Michel et al., 2019,
    arXiv:1905.10650 (gates).
    """
    gates = jnp.asarray(gates)
    if not is_traced(gates) and gates.is_fully_addressable and np.isnan(np.asarray(gates)).any():
        raise ValueError("gates hold NaN; give a finite number for every head.")
    edit = Edit(site, _SCALE[head_axis(site)], Gates(gates))
    return intervene_per_head(forward, edit)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gates:
    """Gates [L,H] or [B,L,H] (or K for H); see `scale_heads`."""

    values: ArrayLike

    def fit(self, site: str, cfg: ModelConfig) -> Array:
        """The gates [L,1,H] or [L,B,H], checked against the heads of the site."""
        values = jnp.asarray(self.values)
        by_row = values if values.ndim == 3 else values[None]
        check_heads(by_row.shape[1:], site, cfg, "gates have", values.shape)
        return jnp.swapaxes(by_row, 0, 1)


def _rows(value: Array, gates: Array) -> Array:
    if gates.shape[0] not in (1, value.shape[0]):
        raise ValueError(f"gates are given for {gates.shape[0]} rows; the batch has "
                         f"{value.shape[0]}.")  # fmt: skip
    return gates.astype(value.dtype)


def scale_bthd(value: Array, gates: Array, ctx: TapContext) -> Array:
    """Edit of a value [B,T,H,...] by gates [1,H] or [B,H]."""
    del ctx
    return value * _rows(value, gates)[:, None, :, None]


def scale_bhts(value: Array, gates: Array, ctx: TapContext) -> Array:
    """Edit of a value [B,H,T,S] by gates [1,H] or [B,H]."""
    del ctx
    return value * _rows(value, gates)[:, :, None, None]


_SCALE = {2: scale_bthd, 1: scale_bhts}
