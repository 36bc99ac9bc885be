"""Turning dense models into mixtures of heads, routed by the norms of their queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

from jaxheads.attention.moh import check_norm_router, check_split, moh_combine, norm_router_gates
from jaxheads.models import Decoder, with_config
from jaxheads.taps import Edit, TapContext, TappedForward, intervene
from jaxheads.typing import Array, PyTree


@overload
def to_moh(
    forward_or_model: Decoder, num_shared: int, top_k: int, *, straight_through: bool = True
) -> Decoder: ...
@overload
def to_moh(
    forward_or_model: Callable[..., Any],
    num_shared: int,
    top_k: int,
    *,
    straight_through: bool = True,
) -> TappedForward: ...
def to_moh(forward_or_model, num_shared, top_k, *, straight_through=True):
    """A dense model, or its forward, in which each token uses only some of the heads.

        z_h <- g_h z_h,   g = 1 (shared heads), the top-k mask of softmax(||q|| / std) (the others)

    The router has no parameters: a dense checkpoint is one of the converted model. Given a forward,
    the conversion is an edit of `z` that reads `q`, and nests with other wrappers. Given a model,
    it is the same parameters under ``attention="moh(router=query_norm,...)"``, whose training adds
    the balance loss: what continue-tuning starts from.

    Args:
      forward_or_model: a forward, wrapped or not, or a `Decoder` with ``attention="dense"``.
      num_shared: hs, the first so many query heads of each layer are always active.
      top_k: k, how many of the others a token activates.
      straight_through: hand gradients of the gates to the probabilities (`norm_router_gates`);
        False: the mask is a constant. A model always has them.

    Raises:
      ValueError: for counts that do not fit the heads (of a forward when it is called), and for a
        model that is not dense.

    Example:
      >>> from flax import nnx
      >>> from jaxheads.models import ModelConfig
      >>> model = to_moh(Decoder(ModelConfig(num_heads=8), rngs=nnx.Rngs(0)), 4, 2)
      >>> model.cfg.attention
      'moh(router=query_norm,num_shared=4,top_k=2)'

    References: Jin et al., 2024, arXiv:2410.11842, eq. 8 to 10.
    """
    if not isinstance(forward_or_model, Decoder):
        gate = QueryNormGate(num_shared, top_k, straight_through)
        return intervene(forward_or_model, Edit("z", gate, reads=("q",)))
    cfg = forward_or_model.cfg
    cfg.require_transformer("to_moh")
    if cfg.attention != "dense":
        raise ValueError(
            f"attention={cfg.attention!r}: only a model with attention='dense' is converted; its "
            "parameters are those of the mixture."
        )
    check_split(num_shared, top_k, cfg.num_heads)
    check_norm_router(num_shared, cfg.num_heads)
    options = f"router=query_norm,num_shared={num_shared},top_k={top_k}"
    return with_config(forward_or_model, attention=f"moh({options})")


@dataclass(frozen=True)
class QueryNormGate:
    """Edit of ``z`` [B,T,H,D]: the gates of `norm_router_gates` on each head."""

    num_shared: int
    top_k: int
    straight_through: bool

    def __call__(self, value: Array, payload: PyTree, ctx: TapContext) -> Array:
        """`value` with gated heads; reads ``q``."""
        del payload
        gates, _ = norm_router_gates(
            ctx.read["q"],
            num_shared=self.num_shared,
            top_k=self.top_k,
            straight_through=self.straight_through,
        )
        return moh_combine(value, gates)
