"""What mixes the tokens of a vision transformer's layer: one table, `VISION_ATTENTIONS`.

A row is a module that holds a layer's parameters and a pure function that applies them:

    class AgentAttention(Attention):                      # or any nnx.Module made of `layers.param`
        def __init__(self, cfg: ViTConfig, *, rngs): ...  # options: cfg.mixer.options

    def attend(weights, x, cfg, tap) -> y                 # x [B,T,M], y [B,T,M]; has_aux: y, aux

    VISION_ATTENTIONS["agent"] = VisionAttention(AgentAttention, attend, AgentOptions, SITES)

and ``ViTConfig(attention="agent(num_agents=9)")`` builds a model with it. Of the T tokens the first
``cfg.extra_tokens`` are the class token (and the distillation token), the rest are the patches of
``cfg.grid`` = (Hg, Wg), row by row. Attention is over all tokens, in both directions. A layer's
parameters are stacked over layers and sliced by the scan (`layers.stack_layers`), so a module only
ever describes one layer; `project_heads` and `merge_out` are the projections, taps included.
"""

from __future__ import annotations

from collections.abc import Mapping

from flax import nnx

from jaxheads import attention
from jaxheads.models.agent import AGENT, LINEAR
from jaxheads.models.agent_merged import MERGED_AGENT
from jaxheads.models.layers import Attention
from jaxheads.models.vit_configs import ViTConfig
from jaxheads.models.vit_heads import HEAD_SITES, VisionAttention, merge_out, project_heads
from jaxheads.models.vit_moh import MOH_HEADS
from jaxheads.taps import Tap
from jaxheads.typing import Array

__all__ = [
    "HEAD_SITES",
    "VISION_ATTENTIONS",
    "VisionAttention",
    "merge_out",
    "project_heads",
    "softmax_attend",
]


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
    "agent": AGENT,
    "linear": LINEAR,
    "merged-agent": MERGED_AGENT,
    "moh": MOH_HEADS,
    "softmax": VisionAttention(
        _softmax_module,
        softmax_attend,
        sites=HEAD_SITES | {"scores", "pattern", "lse", "attn_argmax"},
    ),
}
"""What ``ViTConfig.attention`` may name. A new one is a new file and a row here."""
