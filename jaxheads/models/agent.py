"""Agent attention as a layer of vision transformers, and plain linear attention beside it.

    model = ViT(ViTConfig(attention="agent(num_agents=9)"), rngs=nnx.Rngs(0))

    y = W_O (softmax(Q A^T + B2) softmax(A K^T + B1) V + conv3x3(V)),   A = pool(Q)

(scaled by 1/sqrt(D) inside both softmaxes). Class tokens attend like all others, but are neither
pooled nor convolved. Attention dropout is left out, as in the published models, which use none.
Han et al., 2024, arXiv:2312.08874.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxheads.attention import (
    AgentBias,
    agent_attention,
    agent_bias,
    depthwise_conv,
    init_agent_bias,
    pool_agents,
)
from jaxheads.attention.agent_grid import pooling_matrix, resize_bilinear
from jaxheads.attention.mixing.features import elu_features, normalised_product
from jaxheads.models.configs import ModelConfig, check_choices
from jaxheads.models.layers import Attention, Initializer, Norm, add_bias, normal, normalize, param
from jaxheads.models.vit_configs import ViTConfig
from jaxheads.models.vit_heads import VisionAttention, merge_out, project_heads
from jaxheads.taps import NO_TAP, Tap
from jaxheads.typing import Array

AGENTS = ("pooled", "strided", "learned", "frozen")
_NORM_EPS = 1e-5  # of reduced keys, whatever the model's is
Grid = tuple[int, int]


@dataclass(frozen=True)
class AgentOptions:
    """What parentheses after ``agent`` may set.

    Attributes:
      num_agents: n; a perfect square unless agents are parameters. Published: 49, or 81 (base).
      agents: "pooled" queries, "strided" (the query in the middle of each pooling cell), "learned"
        (parameters), or "frozen" (drawn once and never trained: a control).
      use_dwc: add the depth-wise convolution of V.
      use_bias: add the agent biases to both softmaxes.
      sr_ratio: keys and values are those of an image reduced by this factor.
    """

    num_agents: int = 9
    agents: str = "pooled"
    use_dwc: bool = True
    use_bias: bool = True
    sr_ratio: int = 1

    def __post_init__(self):
        check_choices(self, {"agents": AGENTS})
        if self.num_agents < 1 or self.sr_ratio < 1:
            raise ValueError(
                f"num_agents={self.num_agents} and sr_ratio={self.sr_ratio} must be 1 or more."
            )
        if self.is_gridded and math.isqrt(self.num_agents) ** 2 != self.num_agents:
            raise ValueError(
                f"num_agents={self.num_agents} is not a perfect square; {self.agents} agents form "
                "a p x p grid, such as 9, 16 or 49. agents=learned takes any number."
            )

    @property
    def is_gridded(self) -> bool:
        """Whether agents are cells of the image."""
        return self.agents in ("pooled", "strided")


class AgentSelfAttention(Attention):
    """Projections, agent biases and convolution of one layer; calling it applies them.

    Args:
      cfg: widths, heads and projection biases (`ViTConfig.block`).
      grid: (Hg, Wg) of the tokens.
      extra_tokens: t class tokens before those of the grid.
      options: see `AgentOptions`.
      rngs: random keys.
    Raises:
      ValueError: more agents along a side than tokens; a reduction that does not divide the grid,
        or with class tokens.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        grid: Grid,
        extra_tokens: int = 0,
        options: AgentOptions = AgentOptions(),
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(cfg, rngs=rngs)
        self.cfg, self.grid, self.extra_tokens, self.options = cfg, grid, extra_tokens, options
        h, d, n, dtype = cfg.num_heads, cfg.head_dim, options.num_agents, cfg.param_dtype
        if cfg.num_kv_heads != h:
            raise ValueError(
                f"num_kv_heads={cfg.num_kv_heads} must equal num_heads={h}: values are convolved "
                "head by head."
            )
        if options.is_gridded:
            for side in grid:
                pooling_matrix(side, math.isqrt(n))
        key_grid = self.key_grid
        self.conv = ValueConv(cfg, rngs=rngs) if options.use_dwc else None
        axes = (None, "heads", "head_dim")
        is_param = options.agents in ("learned", "frozen")
        self.agents = param(rngs, (n, h, d), axes, normal(1.0), dtype) if is_param else None
        sizes = (h, n, grid, key_grid, extra_tokens)
        start = init_agent_bias(rngs.params(), *sizes) if options.use_bias else None
        for name in AgentBias._fields:
            value, heads = getattr(start, name, None), int(name not in ("an", "na"))
            made = None
            if value is not None:
                axes = tuple("heads" if i == heads else None for i in range(value.ndim))
                made = param(rngs, value.shape, axes, _given(value), dtype)
            setattr(self, name, made)
        is_reduced = options.sr_ratio > 1
        self.reduction = Reduction(cfg, options.sr_ratio, rngs=rngs) if is_reduced else None

    @property
    def key_grid(self) -> Grid:
        """(Hk, Wk)."""
        r, (rows, columns) = self.options.sr_ratio, self.grid
        if rows % r or columns % r:
            raise ValueError(
                f"sr_ratio={r} does not divide grid={self.grid}; keys are those of whole cells of "
                f"{r} x {r} tokens."
            )
        if r > 1 and self.extra_tokens:
            raise ValueError(
                f"sr_ratio={r} reduces an image, which class tokens ({self.extra_tokens} here) are "
                "no part of; use sr_ratio=1, or a model without class tokens."
            )
        return rows // r, columns // r

    def __call__(self, x: Array, tap: Tap = NO_TAP) -> Array:
        """The layer.

        Args:
          x: [B,t+Hg Wg,M] normed input, class tokens first.
          tap: called at q, k, v, z and head_out.
        Returns:
          [B,t+Hg Wg,M].
        """
        extra, options, key_grid = self.extra_tokens, self.options, self.key_grid
        reduced = None if self.reduction is None else self.reduction(x, self.grid)
        q, k, v = project_heads(self, x, tap, reduced)
        bias_qa = bias_ak = None
        if options.use_bias:
            made = {name: getattr(self, name) for name in AgentBias._fields}
            values = {n: p[...].astype("float32") for n, p in made.items() if p is not None}
            bias_qa, bias_ak = agent_bias(AgentBias(**values), self.grid, key_grid, extra)
        agents = self._agents(q[:, extra:])
        z = agent_attention(q, k, v, agents, bias_qa=bias_qa, bias_ak=bias_ak)
        if self.conv is not None:
            z = self.conv.add_to(z, _enlarged(v, key_grid, self.grid), self.grid, extra)
        return merge_out(self, z, tap)

    def _agents(self, q: Array) -> Array:
        """A [B,n,H,D] or [n,H,D]."""
        kind, n = self.options.agents, self.options.num_agents
        if self.agents is not None:
            given = self.agents[...].astype(q.dtype)
            return given if kind == "learned" else jax.lax.stop_gradient(given)
        if kind == "pooled":
            return pool_agents(q, self.grid, n)
        side = math.isqrt(n)
        rows, columns = (((np.arange(side) + 0.5) * m / side).astype(int) for m in self.grid)
        return q[:, (rows[:, None] * self.grid[1] + columns).reshape(n)]


class ValueConv(nnx.Module):
    """The 3x3 convolution of each channel of V, a bias included."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        h, d, dtype = cfg.num_heads, cfg.head_dim, cfg.param_dtype
        axes = (None, None, "heads", "head_dim")
        self.weight = param(rngs, (3, 3, h, d), axes, _uniform(1 / 3), dtype)
        self.bias = param(rngs, (h, d), ("heads", "head_dim"), _uniform(1 / 3), dtype)

    def add_to(self, z: Array, v: Array, grid: Grid, extra_tokens: int) -> Array:
        """z plus the convolution of v, both [B,t+Hg Wg,H,D]; class tokens get none."""
        y = depthwise_conv(v[:, extra_tokens:], self.weight[...], self.bias[...], grid)
        return z.at[:, extra_tokens:].add(y)


class Reduction(nnx.Module):
    """LayerNorm of an r x r convolution with stride r."""

    def __init__(self, cfg: ModelConfig, ratio: int, *, rngs: nnx.Rngs):
        m, dtype = cfg.model_dim, cfg.param_dtype
        bound, axes = (ratio * ratio * m) ** -0.5, (None, None, "embed", "act_embed")
        self.kernel = param(rngs, (ratio, ratio, m, m), axes, _uniform(bound), dtype)
        self.bias = param(rngs, (m,), ("act_embed",), _uniform(bound), dtype)
        self.cfg = replace(cfg, norm_eps=_NORM_EPS)
        self.norm = Norm(self.cfg, m, "act_embed", rngs=rngs, rms=False)

    def __call__(self, x: Array, grid: Grid) -> Array:
        """[B,Hg Wg,M] -> [B,Hg Wg / r^2,M]."""
        r, width = self.kernel.shape[0], x.shape[-1]
        cut = x.reshape(x.shape[0], grid[0] // r, r, grid[1] // r, r, width)
        y = jnp.einsum("byixjm,ijmc->byxc", cut, self.kernel[...].astype(x.dtype))
        y = add_bias(y.reshape(x.shape[0], -1, width), self.bias)
        return normalize(self.norm, y, self.cfg)


def _enlarged(v: Array, key_grid: Grid, grid: Grid) -> Array:
    """Values of a reduced image at every query; v as it is where nothing was reduced."""
    if key_grid == grid:
        return v
    image = jnp.moveaxis(v.reshape(v.shape[0], *key_grid, *v.shape[2:]), (1, 2), (-2, -1))
    return jnp.moveaxis(resize_bilinear(image, grid), (-2, -1), (1, 2)).reshape(
        v.shape[0], -1, *v.shape[2:]
    )


def _uniform(bound: float) -> Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _given(value: Array) -> Initializer:
    return lambda key, shape, dtype: value.astype(dtype)


def _agent_module(cfg: ViTConfig, *, rngs: nnx.Rngs) -> AgentSelfAttention:
    options = cfg.mixer.options
    return AgentSelfAttention(cfg.block, cfg.grid, cfg.extra_tokens, options, rngs=rngs)


def _agent_attend(weights: AgentSelfAttention, x: Array, cfg: ViTConfig, tap: Tap) -> Array:
    del cfg
    return weights(x, tap)


@dataclass(frozen=True)
class LinearOptions:
    """What parentheses after ``linear`` may set.

    Attributes:
      use_dwc: add the depth-wise convolution of V that agent attention has.
    """

    use_dwc: bool = False


class LinearSelfAttention(Attention):
    """Projections, and a convolution of V if asked for."""

    def __init__(self, cfg: ModelConfig, use_dwc: bool, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        self.conv = ValueConv(cfg, rngs=rngs) if use_dwc else None


def _linear_module(cfg: ViTConfig, *, rngs: nnx.Rngs) -> LinearSelfAttention:
    return LinearSelfAttention(cfg.block, cfg.mixer.options.use_dwc, rngs=rngs)


def linear_attend(weights: LinearSelfAttention, x: Array, cfg: ViTConfig, tap: Tap) -> Array:
    """Linear attention with the features elu + 1 (Katharopoulos et al., 2020, arXiv:2006.16236).

    z_t = phi(q_t) sum_s phi(k_s) v_s^T / phi(q_t) sum_s phi(k_s)
    """
    q, k, v = project_heads(weights, x, tap)
    features = elu_features(q), elu_features(k)
    z = normalised_product(*features, v.astype(features[0].dtype), causal=False, chunk=1)
    z = z.astype(v.dtype)
    if weights.conv is not None:
        z = weights.conv.add_to(z, v, cfg.grid, cfg.extra_tokens)
    return merge_out(weights, z, tap)


AGENT = VisionAttention(_agent_module, _agent_attend, AgentOptions)
LINEAR = VisionAttention(_linear_module, linear_attend, LinearOptions)
