"""Mixture-of-head attention in a vision transformer: a router gives each token a weight per head.

    model = ViT(ViTConfig(num_heads=8, attention="moh(num_shared=2,top_k=4)"), rngs=nnx.Rngs(0))

    y = sum_h g_h softmax(q_h k_h^T / sqrt(D)) v_h W_O,h + b_O

Gates, options and balance loss are those of the decoder's variant (`attention/moh_variant.py`);
class tokens are routed like patches. The loss is `Output.aux["moh_balance"]`, a mean over layers,
which training weighs by ``train.aux_weight``. With ``router=query_norm`` the parameters are those
of softmax attention: `vit.with_config` turns a trained model into a mixture.

Jin, Zhu, Yuan, Yan, 2024, arXiv:2410.11842.
"""

from __future__ import annotations

from flax import nnx

from jaxheads.attention import VARIANTS, AttentionContext, Mask
from jaxheads.attention.moh_variant import MOH, MoHOptions
from jaxheads.models.configs import ModelConfig
from jaxheads.models.layers import Attention
from jaxheads.models.vit_configs import ViTConfig
from jaxheads.models.vit_heads import HEAD_SITES, VisionAttention, merge_out, project_heads
from jaxheads.taps import GATE_SITES, Tap
from jaxheads.typing import Array


class RoutedAttention(Attention):
    """Projections and the matrices of a learned router of one layer.

    Args:
      cfg: widths and heads (`ViTConfig.block`).
      options: with ``router="learned"``.
      rngs: random keys.
    Raises:
      ValueError: for numbers of heads that do not fit.
    """

    def __init__(self, cfg: ModelConfig, options: MoHOptions, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        made = MOH.init(rngs.params(), cfg, options) or {}
        # Small, and every device needs the probabilities of all heads: whole on each of them.
        self.router = nnx.Dict({n: nnx.Param(w, axes=(None, None)) for n, w in made.items()})


def _module(cfg: ViTConfig, *, rngs: nnx.Rngs) -> Attention:
    options: MoHOptions = cfg.mixer.options
    options.split(cfg.num_heads)
    if options.router == "query_norm":
        return Attention(cfg.block, rngs=rngs)
    return RoutedAttention(cfg.block, options, rngs=rngs)


def moh_attend(
    weights: Attention, x: Array, cfg: ViTConfig, tap: Tap
) -> tuple[Array, dict[str, Array]]:
    """Softmax attention of every token over every token, head outputs multiplied by gates.

    Args:
      weights: a layer's projections, and its router unless that has no parameters.
      x: [B,T,M] the normed input, which a learned router reads.
      cfg: of the model; `cfg.mixer.options` are `MoHOptions`.
      tap: called at `active` and `gates` [B,T,H] beside the sites of softmax attention; an edit of
        `active` decides which heads a token uses. `z` holds gated outputs.
    Returns:
      [B,T,M], and losses and counts of the layer as `HeadsOut.aux`.
    """
    router = weights.router if isinstance(weights, RoutedAttention) else {}
    q, k, v = project_heads(weights, x, tap)
    ctx = AttentionContext(
        mask=Mask(is_causal=False),
        x=x,
        tap=tap,
        implementation=cfg.implementation,
        options=cfg.mixer.options,
    )
    z, _, aux, *_ = VARIANTS["moh"].apply({n: w[...] for n, w in router.items()}, q, k, v, ctx)
    return merge_out(weights, z, tap), aux


MOH_HEADS = VisionAttention(
    _module,
    moh_attend,
    MoHOptions,
    sites=HEAD_SITES | GATE_SITES | {"scores", "pattern", "lse", "attn_argmax"},
    has_aux=True,
)
