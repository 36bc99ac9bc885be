"""Titans: layers and language models with a neural memory that learns while it reads.

    layer = TitansLayer(cfg, "mag", options=MagOptions(window=64), rngs=nnx.Rngs(0))
    y, _ = layer(x)                                            # [B,T,M] -> [B,T,M]
    y, state = layer(x, state=layer.init_state(batch_size))    # goes on with state=state

    model = TitansLM("mac", ModelConfig(...), options=MacOptions(segment=64), rngs=nnx.Rngs(0))
    logits = model(tokens)

A language model is the library's decoder with ``architecture="titans-mac(segment=64)"``: training,
generation, checkpoints and taps are those of every decoder.

References: Behrouz, Zhong, Mirrokni, 2024, arXiv:2501.00663 (no official code).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxheads.models import titans_masks
from jaxheads.models.configs import ModelConfig
from jaxheads.models.decoder import Decoder, forward
from jaxheads.models.titans_layers import LayerInput, TitansParams
from jaxheads.models.titans_modules import NeuralMemory
from jaxheads.models.titans_options import MacOptions, MagOptions, MalOptions, MemoryOptions
from jaxheads.models.titans_rows import TITANS, check
from jaxheads.taps import NO_TAP, Tap
from jaxheads.typing import Array, PyTree

__all__ = [
    "MacOptions",
    "MagOptions",
    "MalOptions",
    "MemoryOptions",
    "NeuralMemory",
    "TitansLM",
    "TitansLayer",
    "titans_masks",
]


def _variant(name: str):
    if name not in TITANS:
        raise ValueError(f"variant={name!r} is not one of {', '.join(TITANS)}.")
    return TITANS[name]


class TitansLayer(TitansParams):
    """The part of a Titans layer between its norm and the residual stream, on its own.

    Args:
      cfg: widths, heads and rotary positions.
      variant: "mac" (memory as context), "mag" (as gate), "mal" (as layer) or "lmm" (alone).
      options: of the variant: `MacOptions`, `MagOptions`, `MalOptions`, `MemoryOptions`.
      rngs: of the parameters.
    Raises:
      ValueError: for settings of `cfg` that such a layer does not have.
    References: Behrouz et al., 2024, arXiv:2501.00663, section 4.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        variant: str = "mac",
        *,
        options: MemoryOptions | None = None,
        rngs: nnx.Rngs,
    ):
        kind = _variant(variant).options
        options = kind() if options is None else options
        if type(options) is not kind:
            raise TypeError(
                f"variant={variant!r} needs options of type {kind.__name__}, got "
                f"{type(options).__name__}."
            )
        check(cfg, variant)
        super().__init__(cfg, options, variant, rngs=rngs)
        self.cfg, self.variant, self.options = cfg, variant, options

    def init_state(self, batch_size: int, dtype: Any = jnp.float32) -> PyTree:
        """What the layer keeps between calls, before the first token: constant in their number."""
        return TITANS[self.variant].init_state(self.cfg, batch_size, 0, dtype, self.options)

    def __call__(
        self,
        x: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        state: PyTree = None,
        start: int | Array = 0,
        tap: Tap = NO_TAP,
    ) -> tuple[Array, PyTree]:
        """Mix the tokens of x [B,T,M].

        Args:
          positions: [T] or [B,T] for rotary positions; default start, start + 1, ...
          segment_ids: [B,T] documents of packed rows; 0 is padding.
          state: of `init_state` or an earlier call, whose pieces then make one pass.
          start: tokens of earlier calls (with `state`).
        Returns:
          (y [B,T,M], the new state or None).
        """
        if x.ndim != 3 or x.shape[-1] != self.cfg.model_dim or 0 in x.shape:
            raise ValueError(f"x has shape {x.shape}; needed [B,T,{self.cfg.model_dim}].")
        slots = start + jnp.arange(x.shape[1], dtype=jnp.int32)
        if state is not None and segment_ids is None:
            segment_ids = jnp.ones(x.shape[:2], jnp.int32)
        positions = slots if positions is None else positions
        call = LayerInput(self.cfg, x, positions, segment_ids, slots, tap)
        return TITANS[self.variant].apply(self, self.options, call, state)


class TitansLM(Decoder):
    """A language model of Titans layers: a `Decoder`, so everything of the library takes it.

    Args:
      variant: "mac", "mag", "mal" or "lmm".
      cfg: the decoder's other settings.
      options: of the variant; `MacOptions(mode="literal")` is refused, it is not causal.
      rngs: of the parameters.
    """

    def __init__(
        self,
        variant: str,
        cfg: ModelConfig,
        *,
        options: MemoryOptions | None = None,
        rngs: nnx.Rngs,
    ):
        text = f"titans-{variant}"
        if options is not None:
            kind = _variant(variant).options
            if type(options) is not kind:
                raise TypeError(
                    f"variant={variant!r} needs options of type {kind.__name__}, got "
                    f"{type(options).__name__}."
                )
            fields = dataclasses.asdict(options)
            text += "(" + ",".join(f"{name}={value}" for name, value in fields.items()) + ")"
        _variant(variant)
        super().__init__(dataclasses.replace(cfg, architecture=text), rngs=rngs)

    def __call__(self, tokens: Array, **kwargs: Any) -> Array:
        """Logits [B,T,V] float32; keywords as of `forward`."""
        return forward(self, tokens, **kwargs).logits
