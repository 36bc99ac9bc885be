"""What mixes the tokens of a vision transformer's layer: one table, `VISION_ATTENTIONS`.

A row is a module that holds a layer's parameters and a pure function that applies them:

    class AgentAttention(Attention):                      # or any nnx.Module made of `layers.param`
        def __init__(self, cfg: ViTConfig, *, rngs): ...  # options: cfg.mixer.options

    def attend(weights, x, cfg, tap) -> y                 # x [B,T,M], y [B,T,M]

    VISION_ATTENTIONS["agent"] = VisionAttention(AgentAttention, attend, AgentOptions, SITES)

and ``ViTConfig(attention="agent(num_agents=9)")`` builds a model with it. Of the T tokens the first
``cfg.extra_tokens`` are the class token (and the distillation token), the rest are the patches of
``cfg.grid`` = (Hg, Wg), row by row. Attention is over all tokens, in both directions. A layer's
parameters are stacked over layers and sliced by the scan (`layers.stack_layers`), so a module only
ever describes one layer; `project_heads` and `merge_out` are the projections, taps included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from jaxheads import attention
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
    attend: Callable[[Any, Array, ViTConfig, Tap], Array]
    """(module, x [B,T,M] the normed input, cfg, tap) -> [B,T,M], added to the residual stream."""
    options: type | None = None
    """A frozen dataclass with defaults: what parentheses after the name may set."""
    sites: frozenset[str] = HEAD_SITES
    """The tap sites it forms, of those of the part of a layer that mixes tokens."""


def project_heads(weights: Attention, x: Array, tap: Tap) -> tuple[Array, Array, Array]:
    """x [B,T,M] -> q, k, v [B,T,H,D], each through its tap."""

    def project(site: str, w: nnx.Param, bias: nnx.Param | None) -> Array:
        y = add_bias(jnp.einsum("btm,mhd->bthd", x, w[...].astype(x.dtype)), bias)
        return tap(site, constrain(y, ("batch", "length", "act_heads", None)))

    return (
        project("q", weights.wq, weights.bq),
        project("k", weights.wk, weights.bk),
        project("v", weights.wv, weights.bv),
    )


def merge_out(weights: Attention, z: Array, tap: Tap) -> Array:
    """Heads' outputs z [B,T,H,D] -> [B,T,M], through the taps `z` and, on demand, `head_out`."""
    z = tap("z", constrain(z, ("batch", "length", "act_heads", None)))
    wo = weights.wo[...].astype(z.dtype)
    if tap.wants("head_out"):
        y = jnp.sum(tap("head_out", jnp.einsum("bthd,hdm->bthm", z, wo)), axis=2)
    else:
        y = jnp.einsum("bthd,hdm->btm", z, wo)
    return add_bias(y, weights.bo)


def _softmax_module(cfg: ViTConfig, *, rngs: nnx.Rngs) -> Attention:
    return Attention(cfg.block, rngs=rngs)


def softmax_attend(weights: Attention, x: Array, cfg: ViTConfig, tap: Tap) -> Array:
    """Softmax attention of every token over every token.

        y = sum_h softmax(q_h k_h^T / sqrt(D)) v_h W_O,h + b_O

    Args:
      weights: the projections of a layer.
      x: [B,T,M] the normed input.
      cfg: of the model.
      tap: called at q, k, v, scores, pattern, lse, z and head_out, where these are asked for.
    Returns:
      [B,T,M].
    """
    q, k, v = project_heads(weights, x, tap)
    ctx = attention.AttentionContext(
        mask=attention.Mask(is_causal=False), tap=tap, implementation=cfg.implementation
    )
    z, *_ = attention.VARIANTS["dense"].apply(None, q, k, v, ctx)
    return merge_out(weights, z, tap)


VISION_ATTENTIONS: Mapping[str, VisionAttention] = {
    "softmax": VisionAttention(
        _softmax_module,
        softmax_attend,
        sites=HEAD_SITES | {"scores", "pattern", "lse", "attn_argmax"},
    ),
}
"""What ``ViTConfig.attention`` may name. A new one is a new file and a row here."""
