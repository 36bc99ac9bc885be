"""Masking heads as the retrieval-head experiments do, and the random heads to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads import heads as head_sets
from jaxheads.interventions.per_head import intervene_per_head
from jaxheads.interventions.places import Place, over_layers, slots_of
from jaxheads.models import ModelConfig
from jaxheads.taps import Edit, TapContext, TappedForward
from jaxheads.typing import Array, ArrayLike

MODES = {"uniform_decode": "q", "zero_output": "z"}


def mask_heads(
    forward: Callable[..., Any],
    heads: head_sets.Heads,
    mode: str,
    where: str | int | ArrayLike | None = None,
) -> TappedForward:
    """A forward in which query heads are switched off.

    ``uniform_decode``: their query becomes zero, so every visible key gets the same attention and
    the head puts out the mean of its values. ``zero_output``: their z becomes zero. Keys and
    values, which other query heads may share, are untouched in both.

    (A zero query stays zero under the rotation, so it is written before it. ALiBi's penalty and
    attention sinks remain: there the row is not uniform.)

    Args:
      forward: a forward, wrapped or not.
      heads: an array [L,H] from 0 (keep) to 1 (mask), or a list such as ``[(9, 6)]``.
      mode: ``"uniform_decode"`` or ``"zero_output"``.
      where: ``"decode"``: in calls that read one token through a cache, which in `generate` are the
        last prompt token and all that follow (a prefill of one token counts as well).
        ``"all"``: at every token. A column (int, or [B]): from it on, with or without a cache.
        Default: decode for uniform_decode, all for zero_output.

    Raises:
      ValueError: for an unknown mode, and for ``"decode"`` in a call without a cache.

    References: Wu et al., 2024, arXiv:2404.15574.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not one of {', '.join(MODES)}.")
    if where is None:
        where = "decode" if mode == "uniform_decode" else "all"
    start = None
    if not isinstance(where, str):
        start = jnp.asarray(where).reshape(-1)
        if not jnp.issubdtype(start.dtype, jnp.integer) or jnp.ndim(where) > 1:
            raise ValueError(f"where={where!r} must be a column, or columns [B].")
    elif where not in ("decode", "all"):
        raise ValueError(f"where={where!r} must be 'decode', 'all', or a column of the text.")
    site = MODES[mode]
    payload = Masked(Place.of(site, heads), start, where == "decode" if start is None else False)
    return intervene_per_head(forward, Edit(site, silence, payload))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Masked:
    """Heads to silence, from which column on, or only while decoding."""

    place: Place
    start: Array | None
    decode: bool = field(metadata={"static": True})

    def fit(self, site: str, cfg: ModelConfig) -> Masked:
        """The same as arrays that lead with [L]."""
        start = None if self.start is None else over_layers(self.start, cfg.num_layers)
        return Masked(self.place.fit(site, cfg), start, self.decode)


def silence(value: Array, payload: Masked, ctx: TapContext) -> Array:
    """Edit of q or z [B,T,H,D]: the heads become zero where the payload says."""
    length = value.shape[1]
    weights = payload.place.weights(value, ctx)
    if payload.decode:
        if ctx.slots is None or ctx.slots.ndim > 1:
            raise ValueError(
                "where='decode' masks heads in calls that read one token through a cache, and this "
                "call has no cache; pass where='all', or the column to start from."
            )
        if length > 1:  # prefill
            return value
    if payload.start is not None:
        slots = slots_of(length, ctx)
        columns = jnp.arange(length) if slots is None else slots
        weights = weights * (columns >= payload.start[:, None])[:, :, None, None]  # [B|1,T,1,1]
    return value * (1 - weights).astype(value.dtype)


def random_heads(
    key: Array, k: int, exclude: head_sets.Heads | None, shape: tuple[int, int]
) -> Array:
    """A mask [L,H] (bool) of `k` heads drawn without replacement: the control for chosen heads.

    Args:
      key: a typed random key.
      k: how many.
      exclude: heads never drawn: a mask [L,H] or a list; None for none.
      shape: (L, H).

    Raises:
      ValueError: when fewer than `k` heads are left.
    """
    drawn = head_sets.random_heads(*shape, k, key, exclude=() if exclude is None else exclude)
    return jnp.asarray(head_sets.mask(drawn, *shape))
