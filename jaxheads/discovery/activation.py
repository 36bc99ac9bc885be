"""Activation patching: one run's values written into another, one head or position at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxheads.discovery.metrics import Metric
from jaxheads.discovery.prompts import Prompts, as_prompts, select_slots
from jaxheads.discovery.sweeps import sweep_heads, sweep_positions
from jaxheads.interventions import base_forward
from jaxheads.interventions.patch import donor_values
from jaxheads.models import Decoder, Output
from jaxheads.models import forward as decoder_forward
from jaxheads.taps import OUTER_SITES, SITES, resolve_site
from jaxheads.typing import Array


def activation_patch(
    forward: Callable[..., Any],
    model: Decoder,
    run_on: Any,
    source_cache: Output | Mapping[str, Array] | Array,
    site: str,
    *,
    positions: Any = None,
    metric: Metric | Callable[[Array], Array],
    batch_size: int | None = None,
) -> Array:
    """The metric of a run into which values of another run are written, for each place alone.

    Clean values into the corrupt run show what restores the answer (denoising); corrupt values
    into the clean run what breaks it (noising).

    Args:
      forward: a forward, wrapped or not; patches apply after its own edits.
      model: a `Decoder`.
      run_on: the prompts that run: tokens [B,T], or a mapping as for `path_patch`.
      source_cache: what is written: an `Output` (or its `seen`) that recorded `site`, or the array
        of the site, [L,B,T,...].
      site: a site of the layer stack. With heads (``z``, ``q``, ``k``, ``v``, ``pattern``, ...) one
        head of one layer is patched at a time, at all `positions` together; without
        (``resid_pre``, ``mlp_out``, ...) one slot of one layer.
      positions: slots as `prompts.select_slots` takes them, None for all; for `pattern` and
        `scores` those of the queries. Only for sites with heads.
      metric: a `Metric`, or a function of logits [B,T,V] -> [B].
      batch_size: as `sweep_heads`.

    Returns:
      float32 [L,H] ([L,K] at sites of key/value heads), or [L,T]: the metric's mean over prompts.

    Raises:
      ValueError: for a site outside the stack, a source that does not fit, or positions at a site
        without heads.
    """
    prompts = as_prompts(run_on, "run_on")
    places = find_places(site, positions, prompts)
    options: dict[str, Any] = {
        "edit": "patch",
        "donor": values_at(source_cache, places.site, model.cfg.num_layers, prompts),
        "metric": metric,
        "site": places.site,
        "batch_size": batch_size,
        "prefix_reuse": base_forward(forward) is decoder_forward,
    }
    if places.kind == "T":
        return sweep_positions(forward, model, prompts, **options)
    return sweep_heads(forward, model, prompts, positions=places.where, **options)


class Places(NamedTuple):
    """Where single values of a site lie: its heads, or its slots where it has no heads."""

    site: str
    kind: str
    """How the site's value begins: ``BTH``, ``BHT`` or, without heads, ``T``."""
    where: Array
    """[B,T] bool: the slots concerned"""


def find_places(site: str, positions: Any, prompts: Prompts) -> Places:
    """What the scores of a site run over, checked; arguments as `activation_patch`."""
    site = resolve_site(site)[0]
    if site in OUTER_SITES:
        raise ValueError(f"site {site!r} has no layers; name a site in the layer stack.")
    letters = SITES[site].split()
    kind = "T"
    if {"H", "K"} & set(letters):
        kind = "BHT" if letters[1] == "H" else "BTH"
    elif positions is not None:
        raise ValueError(
            f"site {site!r} has no heads: every slot counts alone, giving [L,T]; leave out "
            "positions and take the columns you need."
        )
    where = select_slots("all" if positions is None else positions, prompts).mask
    return Places(site, kind, where)


def values_at(source: Any, site: str, num_layers: int, prompts: Prompts) -> Array:
    """The recorded values [L,B,T,...] of a site, checked."""
    batch, length = prompts.tokens.shape
    values = donor_values(source, site)
    slots = 3 if SITES[site].split()[1] == "H" else 2  # the axis of query positions
    given = values.shape
    if len(given) <= slots or (given[0], given[1], given[slots]) != (num_layers, batch, length):
        raise ValueError(
            f"the source at {site!r} has shape {list(given)}; needed [{num_layers}, {batch}, "
            f"{length}, ...]: {SITES[site]} under a layer axis, of as many prompts of the same "
            "length."
        )
    return values
