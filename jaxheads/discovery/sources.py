"""What a sweep writes into a run: zeros, means, or the values of other prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jaxheads.discovery.prompts import Prompts, as_prompts, check_pair
from jaxheads.interventions.patch import donor_values
from jaxheads.models import Decoder, Output
from jaxheads.taps import SITES, record
from jaxheads.typing import Array

MODES = ("zero", "mean", "resample", "patch")


def source_of(
    mode: str,
    donor: Any,
    forward: Callable[..., Any],
    model: Decoder,
    prompts: Prompts,
    site: str,
    clean: Array,
) -> Array:
    """Replacement values of a site, broadcastable to `clean` [L,B,...].

    Args:
      mode: ``"zero"``; ``"mean"``: the mean over prompts and tokens of the donor, or of the batch
        itself; ``"resample"``: the donor's values, or those of the next prompt of the batch;
        ``"patch"``: the donor's values.
      donor: prompts, or a recorded run: an `Output`, its `seen`, or the array of the site.
      forward: runs the donor's prompts.
      model: the model.
      prompts: the batch swept.
      site: where.
      clean: [L,B,...] the batch's own values.
    """
    if mode not in MODES:
        raise ValueError(
            f"edit={mode!r} is not one of {', '.join(MODES)}, nor a wrapper (forward, mask) -> "
            "forward."
        )
    if mode == "zero":
        if donor is not None:
            raise ValueError("edit='zero' takes no donor.")
        return jnp.zeros_like(clean)
    if mode == "patch" and donor is None:
        raise ValueError(
            "edit='patch' needs donor=: prompts of the batch's shape, or a recorded run."
        )
    if mode == "mean":
        return _mean(donor, forward, model, prompts, site, clean)
    if donor is None:
        if clean.shape[1] < 2:
            raise ValueError(
                "edit='resample' takes values of another prompt; the batch has one. Give donor=."
            )
        return jnp.roll(clean, -1, axis=1)
    values = recorded_values(donor, site)
    if values is None:
        other = as_prompts(donor, "donor")
        check_pair(prompts, other)
        values = record(forward, site)(model, other.tokens, **other.inputs).seen[site]
    if values.shape != clean.shape:
        raise ValueError(
            f"the donor's values at {site!r} have shape {list(values.shape)}; needed "
            f"{list(clean.shape)}: {SITES[site]} under a layer axis, of prompts that correspond to "
            "the batch slot by slot."
        )
    return values


def recorded_values(donor: Any, site: str) -> Array | None:
    """[L,B,...] of a recorded run; None where `donor` is prompts still to be run."""
    if isinstance(donor, Mapping):
        is_run = "tokens" not in donor
    elif isinstance(donor, Prompts | Output):
        is_run = isinstance(donor, Output)
    else:
        is_run = jnp.issubdtype(jnp.result_type(donor), jnp.floating)
    return donor_values(donor, site) if is_run else None


def _mean(donor, forward, model, prompts, site, clean) -> Array:
    """[L,1,1,...]: the mean over prompts and tokens, padding left out."""
    if SITES[site].split()[:2] not in (["B", "T"], ["B", "S"]):
        raise NotImplementedError(
            f"edit='mean' averages over prompts and tokens; site {site!r} is [{SITES[site]}]. Give "
            "the values with edit='patch', donor=array."
        )
    values, segment_ids = clean, prompts.segment_ids
    if donor is not None:
        recorded = recorded_values(donor, site)
        if recorded is None:
            other = as_prompts(donor, "donor")
            segment_ids = other.segment_ids
            recorded = record(forward, site)(model, other.tokens, **other.inputs).seen[site]
        else:
            segment_ids = None
        values = recorded
        if values.shape[0] != clean.shape[0] or values.shape[3:] != clean.shape[3:]:
            raise ValueError(
                f"the donor's values at {site!r} have shape {list(values.shape)}; needed "
                f"[{clean.shape[0]}, B, T, ...{list(clean.shape[3:])}]."
            )
    if segment_ids is None:
        return jnp.mean(values, axis=(1, 2), keepdims=True, dtype=jnp.float32)
    weights = (segment_ids != 0).astype(jnp.float32)
    total = jnp.einsum("lbt...,bt->l...", values.astype(jnp.float32), weights)
    return (total / jnp.maximum(jnp.sum(weights), 1))[:, None, None]
