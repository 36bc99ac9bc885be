"""Batches of prompts as finders take them, and which of their slots an edit concerns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxheads.typing import Array, is_traced

_FIELDS = ("tokens", "segment_ids", "positions")


class Prompts(NamedTuple):
    """A batch of prompts: what a forward reads."""

    tokens: Array
    """[B,T]"""
    segment_ids: Array | None = None
    """[B,T]; 0 is padding."""
    positions: Array | None = None
    """[T] or [B,T]"""

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of a forward, tokens left out."""
        return {"segment_ids": self.segment_ids, "positions": self.positions}


def as_prompts(batch: Any, what: str = "batch") -> Prompts:
    """Prompts from an array of tokens [B,T] or a mapping with `tokens` and what goes with them.

    Raises:
      ValueError: for a mapping without tokens or with other fields, or tokens that are not [B,T].
    """
    if isinstance(batch, Prompts):
        return batch
    if isinstance(batch, Mapping):
        unknown = sorted(set(batch) - set(_FIELDS))
        if unknown or "tokens" not in batch:
            problem = f"has a field {unknown[0]!r}" if unknown else "has no 'tokens'"
            raise ValueError(f"{what} {problem}; it holds tokens, segment_ids and positions.")
        optional = (None if batch.get(n) is None else jnp.asarray(batch[n]) for n in _FIELDS[1:])
        prompts = Prompts(jnp.asarray(batch["tokens"]), *optional)
    else:
        prompts = Prompts(jnp.asarray(batch))
    if jnp.ndim(prompts.tokens) != 2 or not jnp.issubdtype(prompts.tokens.dtype, jnp.integer):
        raise ValueError(
            f"{what} has tokens of shape {jnp.shape(prompts.tokens)} and dtype "
            f"{prompts.tokens.dtype}; needed integer ids [B,T]."
        )
    return prompts


def check_pair(clean: Prompts, corrupt: Prompts) -> None:
    """Raise unless the tokens of two batches correspond slot by slot."""
    if clean.tokens.shape != corrupt.tokens.shape:
        raise ValueError(
            f"clean prompts are {list(clean.tokens.shape)} and corrupt prompts "
            f"{list(corrupt.tokens.shape)}; patching needs pairs of equal length, whose tokens "
            "correspond slot by slot. Write minimal pairs, or pad each pair alike."
        )
    a, b = clean.segment_ids, corrupt.segment_ids
    if (a is None) != (b is None):
        raise ValueError("give segment_ids with both batches or with neither.")
    if a is not None and b is not None and not is_traced(a) and not is_traced(b):
        rows = np.flatnonzero((np.asarray(a) != np.asarray(b)).any(axis=1))
        if rows.size:
            raise ValueError(
                f"clean and corrupt prompts differ in segment_ids (padding) in row {rows[0]}; the "
                "two prompts of a pair must have the same length."
            )


class Slots(NamedTuple):
    """The slots an edit concerns."""

    mask: Array
    """[B,T] bool"""
    single: Array | None
    """[B] int32 where each prompt has exactly one, else None."""


def select_slots(positions: Any, prompts: Prompts) -> Slots:
    """The slots meant by `positions`.

    Args:
      positions: ``"last"`` (the last slot that is no padding), ``"all"``, an integer (that slot of
        every prompt; negative ones count from the end), integers [B] (one for each prompt, as a
        `Metric` counts them), integers [N] with N other than B (these slots of every prompt),
        integers [B,N], or a bool mask [T] or [B,T].

    Raises:
      ValueError: for another form, or a slot outside the prompts.
    """
    batch, length = prompts.tokens.shape
    index = jnp.arange(length, dtype=jnp.int32)
    if isinstance(positions, str):
        if positions == "all":
            return Slots(jnp.ones((batch, length), bool), None)
        if positions != "last":
            raise ValueError(f"positions={positions!r} is not 'last', 'all' or an array.")
        slots = jnp.full((batch,), length - 1, jnp.int32)
        if prompts.segment_ids is not None:
            slots = jnp.max(jnp.where(prompts.segment_ids != 0, index, -1), axis=1)
        return Slots(index == slots[:, None], slots)

    values = jnp.asarray(positions)
    if values.dtype == bool:
        if values.shape not in ((length,), (batch, length)):
            raise ValueError(
                f"positions is a mask of shape {list(values.shape)}; needed [{length}] or "
                f"[{batch}, {length}], one entry for each token."
            )
        return Slots(jnp.broadcast_to(values, (batch, length)), None)
    if not jnp.issubdtype(values.dtype, jnp.integer) or values.ndim > 2 or values.size == 0:
        raise ValueError(
            f"positions has shape {list(values.shape)} and dtype {values.dtype}; needed 'last', "
            f"'all', integers ([B]=[{batch}]: one for each prompt) or a bool mask [B,T]."
        )
    if values.ndim == 2 and values.shape[0] != batch:
        raise ValueError(
            f"positions has shape {list(values.shape)}; needed [{batch}, N], a row for each prompt."
        )
    if not is_traced(values):
        low, high = int(np.min(values)), int(np.max(values))
        if low < -length or high >= length:
            raise ValueError(
                f"position {low if low < -length else high} is outside the prompts of {length} "
                f"tokens; needed -{length} to {length - 1}."
            )
    values = jnp.where(values < 0, values + length, values).astype(jnp.int32)
    if values.ndim == 0 or values.shape == (batch,):
        single = jnp.broadcast_to(values, (batch,))
        return Slots(index == single[:, None], single)
    values = jnp.broadcast_to(values, (batch, values.shape[-1]))
    return Slots(jnp.any(index == values[..., None], axis=1), None)
