"""Long context for a trained model, as a wrapper; and which head read which chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxheads.attention import (
    LongHeadsOptions,
    RopeConfig,
    chunk_representations,
    inverse_frequencies,
    rotate,
    select_chunks,
)
from jaxheads.models import Cache, Decoder, Output, forward, with_config
from jaxheads.models.configs import parse_attention
from jaxheads.taps import TappedForward, as_tapped, record
from jaxheads.typing import Array, ArrayLike


def with_longheads(
    forward: Callable[..., Any],
    window: int,
    chunk_size: int,
    layers: Sequence[int] | None = None,
) -> TappedForward:
    """A forward whose layers attend with LongHeads: texts may outgrow the trained length.

    Up to `window` tokens nothing changes. To generate, upgrade the model instead, so that its cache
    is the right one: ``models.with_config(model, attention="longheads(window=...,chunk=...)")``.

    Args:
      forward: a forward, wrapped or not.
      window: A, the tokens a query sees, at most the length the model was trained on.
      chunk_size: w, tokens in a chunk; divides the window.
      layers: the layers to change; None: all.

    Raises:
      ValueError: sizes that do not fit; when called, a model without rotary positions or with other
        attention than "dense", a window beyond its trained length, a layer it does not have, or a
        cache.

    References: Lu et al., 2024, arXiv:2402.10685.
    """
    LongHeadsOptions(chunk_size, window)
    inner = as_tapped(forward)
    chosen = None if layers is None else tuple(int(layer) for layer in layers)
    return TappedForward(LongForward(inner.forward, window, chunk_size, chosen), inner.taps)


@dataclass(frozen=True)
class LongForward:
    """A forward that upgrades its model before it runs; see `with_longheads`."""

    forward: Callable[..., Output]
    window: int
    chunk_size: int
    layers: tuple[int, ...] | None

    def __call__(
        self, model: Decoder, tokens: Any, *, cache: Cache | None = None, **kwargs: Any
    ) -> Output:
        """`forward` of the upgraded model."""
        attention = self.attention(model)
        if cache is not None:
            raise ValueError(
                "with_longheads takes no cache, which was made for the model as it is; upgrade "
                f"the model: with_config(model, attention={attention!r})."
            )
        return self.forward(with_config(model, attention=attention), tokens, **kwargs)

    def attention(self, model: Decoder) -> str:
        """The `attention` of the upgraded model."""
        cfg, long = model.cfg, f"longheads(window={self.window},chunk={self.chunk_size})"
        if any(name != "dense" for name, _ in parse_attention(cfg.attention)):
            raise ValueError(
                f"the model has attention={cfg.attention!r}; with_longheads changes layers of "
                "'dense' attention only."
            )
        if self.layers is None:
            return long
        wrong = [layer for layer in self.layers if not 0 <= layer < cfg.num_layers]
        if wrong or not self.layers:
            raise ValueError(
                f"layers={list(self.layers)} must name layers from 0 to {cfg.num_layers - 1}."
            )
        return "+".join(long if n in self.layers else "dense" for n in range(cfg.num_layers))


def chunks_read(
    model: Decoder, tokens: ArrayLike, *, forward: Callable[..., Any] = forward
) -> Array:
    """The chunks that each query of each head of each layer reads.

    Args:
      model: with LongHeads of one kind in every layer.
      tokens: [B,T], one document a row without padding in front.
      forward: a forward, wrapped or not.

    Returns:
      [L,B,T,H,n] int32, ascending, -1 where a query reads fewer than n; see `select_chunks`.

    Raises:
      ValueError: other attention in some layer.
    """
    cfg = model.cfg
    kinds = set(cfg.pattern)
    options = next(iter(kinds)).options
    if len(kinds) > 1 or not isinstance(options, LongHeadsOptions) or options.at_random:
        raise ValueError(
            f"the model has attention={cfg.attention!r}; chunks_read needs 'longheads(...)' in "
            "every layer, choosing by score."
        )
    return _chunks_read(as_tapped(record(forward, "q", "k", "v")), model, jnp.asarray(tokens))


@jax.jit
def _chunks_read(forward: TappedForward, model: Decoder, tokens: Array) -> Array:
    cfg = model.cfg
    (spec,) = set(cfg.pattern)
    options, rope = spec.options, cast(RopeConfig, cfg.rope_of(spec))
    inv_freq, scaling = inverse_frequencies(rope, cfg.head_dim, length=tokens.shape[1])
    turn = partial(
        rotate, inv_freq=jnp.asarray(inv_freq), interleaved=rope.interleaved, scaling=scaling
    )
    seen = forward(model, tokens).seen

    def of_layer(qkv: tuple[Array, Array, Array]) -> Array:
        reps = chunk_representations(
            *qkv,
            turn,
            chunk_size=options.chunk,
            repr=options.repr,
            repr_per=options.repr_per,
            scale=cfg.score_scale,
        )
        return select_chunks(
            qkv[0],
            reps,
            jnp.arange(tokens.shape[1]) // options.chunk,
            num_chunks=options.num_chunks,
            num_sink=options.num_sink,
            num_recent=options.num_recent,
        )

    return jax.lax.map(of_layer, (seen["q"], seen["k"], seen["v"]))
