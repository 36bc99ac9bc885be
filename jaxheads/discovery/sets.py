"""The effect of editing several heads at once: what a random-head control compares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.discovery.metrics import Metric, as_metric, measure
from jaxheads.discovery.prompts import Prompts, as_prompts
from jaxheads.discovery.sources import MODES, source_of
from jaxheads.interventions import patch
from jaxheads.models import Decoder
from jaxheads.parallel import constrain
from jaxheads.taps import TappedForward, as_tapped, record, resolve_site, sweep
from jaxheads.typing import Array, ArrayLike


def edit_sets(
    forward: Callable[..., Any],
    model: Decoder,
    batch: Any,
    masks: ArrayLike,
    metric: Metric | Callable[[Array], Array],
    *,
    edit: str,
    donor: Any = None,
    site: str = "z",
    positions: ArrayLike | None = None,
    set_batch: int = 8,
) -> Array:
    """The metric of every prompt with each set of heads edited together, in one program.

        out[n, b] = metric_b(forward with value <- (1 - masks[n]) value + masks[n] new at `site`)

    Args:
      forward: a forward, wrapped or not.
      model: a `Decoder`.
      batch: the prompts that are edited, as `sweep_heads`.
      masks: [N,L,H] numbers from 0 (keep) to 1 (edit); [N,L,K] at sites of key/value heads.
      metric: what is read, see `discovery.metrics`.
      edit: ``"patch"``, ``"zero"``, ``"mean"`` or ``"resample"``, as `sweep_heads`.
      donor: as `sweep_heads`.
      site: ``"z"``, or another site with heads.
      positions: None for all; columns [B,N] or a bool array [B,T].
      set_batch: sets evaluated at once.

    Returns:
      [N,B] float32.
    """
    if edit not in MODES:
        raise ValueError(f"edit={edit!r} is not one of {', '.join(MODES)}.")
    masks = jnp.asarray(masks, jnp.float32)
    return _edit_sets(
        as_tapped(forward),
        model,
        as_prompts(batch),
        donor,
        masks,
        as_metric(metric),
        None if positions is None else jnp.asarray(positions),
        edit=edit,
        site=resolve_site(site)[0],
        set_batch=min(set_batch, len(masks)),
    )


@partial(jax.jit, static_argnames=("edit", "site", "set_batch"))
def _edit_sets(
    forward: TappedForward,
    model: Decoder,
    prompts: Prompts,
    donor: Any,
    masks: Array,
    metric: Metric,
    positions: Array | None,
    *,
    edit: str,
    site: str,
    set_batch: int,
) -> Array:
    seen = record(forward, site)(model, prompts.tokens, **prompts.inputs).seen[site]
    values = source_of(edit, donor, forward, model, prompts, site, seen)

    def value(mask: Array) -> Array:
        return measure(
            metric, patch(forward, values, mask, site=site, positions=positions), model, prompts
        )

    return constrain(sweep(value, masks, batch_size=set_batch), (None, None))


@jax.jit
def _read(forward: TappedForward, model: Decoder, prompts: Prompts, metric: Metric) -> Array:
    return constrain(measure(metric, forward, model, prompts), (None,))


def read_metric(
    forward: Callable[..., Any],
    model: Decoder,
    batch: Any,
    metric: Metric | Callable[[Array], Array],
) -> Array:
    """[B] float32: the metric of every prompt, without an edit; arguments as `sweep_heads`."""
    return _read(as_tapped(forward), model, as_prompts(batch), as_metric(metric))
