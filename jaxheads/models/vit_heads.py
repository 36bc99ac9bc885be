"""What every attention of a vision transformer is made of: a row of the table, and projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from jaxheads.models.layers import Attention, add_bias
from jaxheads.models.vit_configs import ViTConfig
from jaxheads.parallel import constrain
from jaxheads.taps import Tap
from jaxheads.typing import Array

HEAD_SITES = frozenset({"q", "k", "v", "z", "head_out"})
"""The sites of `project_heads` and `merge_out`."""


class VisionAttention(NamedTuple):
    """A row of `VISION_ATTENTIONS`."""

    module: Callable[..., Any]
    """(cfg: ViTConfig, *, rngs) -> the module that holds a layer's parameters."""
    attend: Callable[[Any, Array, ViTConfig, Tap], Any]
    """(module, x [B,T,M] the normed input, cfg, tap) -> [B,T,M], added to the residual stream."""
    options: type | None = None
    """A frozen dataclass with defaults: what parentheses after the name may set."""
    sites: frozenset[str] = HEAD_SITES
    """The tap sites it forms, of those of the part of a layer that mixes tokens."""
    has_aux: bool = False
    """Whether `attend` returns a pair: [B,T,M], and the layer's losses and counts by name
    (`HeadsOut.aux`), which reach training as `Output.aux`."""


def project_heads(
    weights: Attention, x: Array, tap: Tap, context: Array | None = None
) -> tuple[Array, Array, Array]:
    """x [B,T,M] -> q, k, v [B,T,H,D], each through its tap; k, v of `context` [B,S,M] if given."""
    context = x if context is None else context
    q = project(weights.wq, weights.bq, x)
    k, v = project(weights.wk, weights.bk, context), project(weights.wv, weights.bv, context)
    return tap("q", q), tap("k", k), tap("v", v)


def project(weight: nnx.Param, bias: nnx.Param | None, x: Array) -> Array:
    """[B,T,M] -> [B,T,H,D]."""
    y = add_bias(jnp.einsum("btm,mhd->bthd", x, weight[...].astype(x.dtype)), bias)
    return constrain(y, ("batch", "length", "act_heads", None))


def merge_out(weights: Attention, z: Array, tap: Tap) -> Array:
    """Heads' outputs z [B,T,H,D] -> [B,T,M], through the taps `z` and, on demand, `head_out`."""
    z = tap("z", constrain(z, ("batch", "length", "act_heads", None)))
    wo = weights.wo[...].astype(z.dtype)
    if tap.wants("head_out"):
        y = jnp.sum(tap("head_out", jnp.einsum("bthd,hdm->bthm", z, wo)), axis=2)
    else:
        y = jnp.einsum("bthd,hdm->btm", z, wo)
    return add_bias(y, weights.bo)
