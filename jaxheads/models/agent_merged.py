"""Agent attention in a vision transformer that was trained without it: merged tokens, no training.

    x' = merge(x)                                  similar tokens become one
    z' = softmax(c A K^T) V seen through agents:   O = softmax(c^k2 Q A^T) V_A + k_sc V
    z  = unmerge(z')                               each token a copy of its cluster's output

c = 1/sqrt(D). The agents A are the query projections of the same clusters, merged further. k2 < 1
is an *exponent*, so logits are larger: agents are means, and means are alike. k_sc V stands in for
the convolution of V that a trained layer has. Where twice the agents are not fewer than the merged
tokens, the layer is plain softmax attention over merged tokens.

Published for diffusion models (k2 = 0.3, k_sc = 0.075). The parameters are those of softmax
attention; `interventions.agent_plugin` wraps a forward. Han et al., 2024, arXiv:2312.08874.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.attention import agent_attention, attention, bipartite_soft_matching, pool_agents
from jaxheads.attention.token_merge import merge, sizes_after, unmerge
from jaxheads.models.configs import check_choices
from jaxheads.models.layers import Attention
from jaxheads.models.vit_configs import ViTConfig
from jaxheads.models.vit_heads import VisionAttention, merge_out, project, project_heads
from jaxheads.taps import NO_TAP, Tap
from jaxheads.typing import Array

MERGED_AGENTS = ("merged", "random", "pooled", "none")


@dataclass(frozen=True)
class MergedAgentOptions:
    """What parentheses after ``merged-agent`` may set.

    Attributes:
      ratio: of the tokens of the grid, this share is merged into others.
      agent_ratio: the same for agents; n is what it leaves (one a cell of `stride` at least).
      k2: exponent of the scale of the second softmax.
      shortcut: k_sc, factor on V.
      stride: (sy, sx), the cells of which one token each is a destination.
      seed: draws the destinations, the same for all images; None: the top left tokens.
      agents: "merged"; as controls, "random" (as many tokens of the grid, drawn with the seed, or
        with seed 0), "pooled" (means of cells; n must be a square) or "none" (merging alone).
      layers: the layers that are changed; empty: all.
    """

    ratio: float = 0.4
    agent_ratio: float = 0.95
    k2: float = 0.3
    shortcut: float = 0.075
    stride: tuple[int, ...] = (2, 2)
    seed: int | None = None
    agents: str = "merged"
    layers: tuple[int, ...] = ()

    def __post_init__(self):
        check_choices(self, {"agents": MERGED_AGENTS})
        if len(self.stride) != 2 or min(self.stride) < 1:
            raise ValueError(f"stride={self.stride} must be two numbers, 1 or more.")
        sizes_after(self.cell, self.cell, self.ratio, self.agent_ratio)

    @property
    def cell(self) -> tuple[int, int]:
        """(sy, sx)."""
        return self.stride[0], self.stride[1]

    @property
    def text(self) -> str:
        """What `ViTConfig.attention` says."""
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        said["stride"] = f"({self.stride[0]},{self.stride[1]})"
        said["layers"] = f"({','.join(map(str, self.layers))})"
        settings = (f"{name}={value}" for name, value in said.items() if value is not None)
        return f"merged-agent({','.join(settings)})"

    def sizes(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Merged tokens and agents of an image of this grid; 0 agents: plain softmax attention."""
        tokens, agents = sizes_after(grid, self.cell, self.ratio, self.agent_ratio)
        return tokens, agents if 2 * agents < tokens and self.agents != "none" else 0


def _module(cfg: ViTConfig, *, rngs: nnx.Rngs) -> Attention:
    wrong = [n for n in cfg.mixer.options.layers if not 0 <= n < cfg.num_layers]
    if wrong:
        raise ValueError(
            f"layers={cfg.mixer.options.layers} must name layers from 0 to {cfg.num_layers - 1}."
        )
    return Attention(cfg.block, rngs=rngs)


def merged_attend(weights: Attention, x: Array, cfg: ViTConfig, tap: Tap) -> Array:
    """The layer on merged tokens and with agents; see the top of this file.

    Args:
      weights: the projections of a layer trained with softmax attention.
      x: [B,T,M] the normed input, which similarity is measured on.
      cfg: of the model; `cfg.mixer.options` are `MergedAgentOptions`.
      tap: called at z and head_out, after tokens are unmerged.
    Returns:
      [B,T,M].
    """
    options: MergedAgentOptions = cfg.mixer.options
    layer = jnp.int32(0) if tap.ctx.layer is None else tap.ctx.layer
    if not options.layers:
        z = _merged(weights, x, cfg, layer)
    else:
        is_chosen = jnp.any(jnp.asarray(options.layers) == layer)
        branches = (lambda x: _merged(weights, x, cfg, layer), lambda x: _plain(weights, x))
        z = jax.lax.cond(is_chosen, *branches, x)
    return merge_out(weights, z, tap)


def _plain(weights: Attention, x: Array) -> Array:
    z = attention(*project_heads(weights, x, NO_TAP), is_causal=False)
    assert isinstance(z, jax.Array)  # no lse was asked for
    return z


def _merged(weights: Attention, x: Array, cfg: ViTConfig, layer: Array) -> Array:
    """z [B,T,H,D]."""
    options: MergedAgentOptions = cfg.mixer.options
    extra, y = x[:, : cfg.extra_tokens], x[:, cfg.extra_tokens :]
    length = y.shape[1]
    num_tokens, _ = sizes_after(cfg.grid, options.cell, options.ratio, options.agent_ratio)
    num_agents = options.sizes(cfg.grid)[1]
    drawn = lambda what: jax.random.fold_in(
        jax.random.fold_in(jax.random.key(options.seed or 0), layer), what
    )
    plan = bipartite_soft_matching(
        y,
        cfg.grid,
        options.cell,
        length - num_tokens,
        length - num_agents if num_agents else 0,
        None if options.seed is None else drawn(0),
    )
    few = jnp.concatenate([extra, merge(y, plan)], axis=1)
    if not num_agents:
        z = _plain(weights, few)
    else:
        q, k, v = project_heads(weights, few, NO_TAP)
        if options.agents == "merged":
            agents = merge(y, plan.for_agents)
        elif options.agents == "random":
            agents = y[:, jax.random.permutation(drawn(1), length)[:num_agents]]
        else:
            agents = pool_agents(y[:, :, None], cfg.grid, num_agents)[:, :, 0]
        scale = cfg.head_dim**-0.5
        z = agent_attention(
            q,
            k,
            v,
            project(weights.wq, weights.bq, agents),
            scale=scale,
            scale2=scale**options.k2,
            shortcut=options.shortcut,
        )
    z, of_extra = z[:, cfg.extra_tokens :], z[:, : cfg.extra_tokens]
    return jnp.concatenate([of_extra, unmerge(z, plan)], axis=1)


MERGED_AGENT = VisionAttention(
    _module, merged_attend, MergedAgentOptions, sites=frozenset({"z", "head_out"})
)
