"""Agent attention in a trained vision transformer, without training, as a wrapper."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxheads.models import Output
from jaxheads.models.agent_merged import MergedAgentOptions
from jaxheads.models.vit import ViT, with_config
from jaxheads.taps import TappedForward, as_tapped


def agent_plugin(
    forward: Callable[..., Any],
    layers: Sequence[int] | None = None,
    *,
    ratio: float = 0.4,
    agent_ratio: float = 0.95,
    k2: float = 0.3,
    shortcut: float = 0.075,
    stride: tuple[int, int] = (2, 2),
    agents: str = "merged",
    seed: int | None = None,
) -> TappedForward:
    """A forward whose layers attend on merged tokens, through agents: cheaper, and approximate.

        O = softmax(c A K^T) V seen by softmax(c^k2 Q A^T), + shortcut V;   c = 1/sqrt(D)

    of Q, K, V of the merged tokens, every token a copy of its cluster's output. A layer gets agents
    only where twice their number is less than the number of merged tokens; otherwise it is plain
    softmax attention on merged tokens. Class tokens are never merged. Sites q, k, v, scores and
    pattern, which exist for merged tokens only, can be neither edited nor recorded.

    Args:
      forward: a forward of `models.vit`, wrapped or not.
      layers: the layers to change; None: all.
      ratio: share of the tokens that is merged into others.
      agent_ratio: the same for agents; the rest are the agents, at least one a cell of `stride`.
      k2: exponent of the scale of the second softmax; 0.3 and `shortcut`=0.075 are published for
        diffusion models.
      shortcut: k_sc.
      stride: (sy, sx); one token of each cell takes others in. Divides the grid.
      agents: "merged", or a control: "random" (as many tokens at random), "pooled" (means of cells)
        or "none" (merging alone).
      seed: draws the tokens that take others in; None: the top left ones.

    Warns:
      UserWarning: for `agent_ratio` <= `ratio`, which leaves no layer with agents.
    Raises:
      ValueError: ratios, strides or layers that do not fit; when called, a model that is no `ViT`
        or has other attention than "softmax".
    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxheads.models.vit import ViT, ViTConfig, forward
      >>> model = ViT(ViTConfig(num_layers=1), rngs=nnx.Rngs(0))
      >>> cheaper = agent_plugin(forward, ratio=0.4, agent_ratio=0.75)
      >>> cheaper(model, jnp.ones((1, 28, 28, 1))).logits.shape
      (1, 10)

    References: Han et al., 2024, arXiv:2312.08874, section on Stable Diffusion.
    """
    chosen = () if layers is None else tuple(int(n) for n in layers)
    if layers is not None and not chosen:
        raise ValueError("layers=[] changes nothing; name some, or None for all.")
    options = MergedAgentOptions(
        ratio, agent_ratio, k2, shortcut, tuple(stride), seed, agents, chosen
    )
    if agents != "none" and agent_ratio <= ratio:
        warnings.warn(
            f"agent_ratio={agent_ratio} is not above ratio={ratio}: there would be as many agents "
            "as tokens, so layers are plain softmax attention on merged tokens.",
            stacklevel=2,
        )
    inner = as_tapped(forward)
    return TappedForward(AgentForward(inner.forward, options), inner.taps)


@dataclass(frozen=True)
class AgentForward:
    """A forward that changes the attention of its model before it runs; see `agent_plugin`."""

    forward: Callable[..., Output]
    options: MergedAgentOptions

    def __call__(self, model: ViT, images: Any, **kwargs: Any) -> Output:
        """`forward` of the changed model."""
        if not isinstance(model, ViT):
            raise ValueError(
                f"agent_plugin changes vision transformers, got a {type(model).__name__}: agents "
                "would show later tokens to a causal model's queries."
            )
        if model.cfg.attention != "softmax":
            raise ValueError(
                f"the model has attention={model.cfg.attention!r}; agent_plugin changes layers "
                "trained with 'softmax'."
            )
        return self.forward(with_config(model, attention=self.options.text), images, **kwargs)
