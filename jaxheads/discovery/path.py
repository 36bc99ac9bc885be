"""Path patching: which heads feed which, along direct paths.

A path runs from a *sender* head to a *receiver* (the logits, or the query, key or value input of
later heads) through the residual stream, with the output of every other head held at its clean
value. Then nothing moves between positions and no attention is computed: a sender costs the output
projections and MLPs at the patched slots. Receivers other than the logits cost a forward on top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxheads.discovery import passes
from jaxheads.discovery.metrics import Metric, as_metric
from jaxheads.discovery.prompts import Prompts, Slots, as_prompts, check_pair, select_slots
from jaxheads.discovery.sweeps import senders_in_memory
from jaxheads.interventions import base_forward
from jaxheads.models import Decoder, ModelConfig
from jaxheads.models import forward as decoder_forward
from jaxheads.taps import TappedForward, Taps, as_tapped
from jaxheads.typing import Array, is_traced

Receiver = tuple[int, int, str]
"""(layer, head, "q" | "k" | "v"); heads of k and v are key/value heads."""

COMPONENTS = ("q", "k", "v")


def path_patch(
    forward: Callable[..., Any],
    model: Decoder,
    clean: Any,
    corrupt: Any,
    metric: Metric | Callable[[Array], Array],
    *,
    receivers: str | Iterable[Receiver] = "logits",
    positions: Any = "last",
    freeze_mlps: bool = False,
    normalise: bool = True,
    sender_batch: int | None = None,
    sender_value: str = "corrupt",
    per_example: bool = False,
) -> Array:
    """The effect of every head on the metric along its direct paths to the receivers.

    For a sender (l, h), with p the patched positions:

        A. run the corrupt prompts, keep z';  B. run the clean prompts, keep z;
        C. run the clean prompts with every head's z at its clean value, except the sender's, which
           is z' at p; keep what reaches the receivers: the residual stream before the final norm,
           or q, k or v at p. MLPs are recomputed, or frozen to clean as well;
        D. run the clean prompts with only those q, k, v written at p; nothing else is frozen.

        score = (metric_D - metric_clean) / (metric_corrupt - metric_clean)

    Each metric is averaged over the prompts before the ratio. 1 means that the path carries the
    whole effect of the corruption, 0 none; `percent` gives the papers' -100 * score, in which
    negative means that patching hurts. Where one call cannot hold all prompts, average the scores
    of batches. For the logits, C is read as it is and there is no D; since frozen heads carry
    nothing between positions, only a sender's z at the slots the metric reads matters.

    Args:
      forward: a forward, wrapped or not. Under edits every pass runs whole prompts.
      model: a `Decoder`.
      clean: tokens [B,T], or a mapping with `tokens` and optionally `segment_ids`, `positions`.
      corrupt: prompts that correspond to `clean` slot by slot.
      metric: a `Metric`, or a function of logits [B,T,V] -> [B].
      receivers: ``"logits"``, or (layer, head, component) triples that are patched together. The
        heads of ``"k"`` and ``"v"`` are key/value heads. Receivers are no senders: they score 0,
        as does every head in the layer of the last receiver or above.
      positions: ``"last"``, ``"all"``, or slots as `prompts.select_slots` takes them.
      freeze_mlps: hold MLP outputs at their clean values in C: strictly direct paths. The papers
        recompute them, so a path may run through MLPs.
      normalise: return scores; False returns metric_D - metric_clean.
      sender_batch: how many senders run at once, at most those of one layer on a bare model; None:
        as many of these as memory holds.
      sender_value: what is written for the sender: its own z' (``"corrupt"``), or the mean of z'
        over the corrupt prompts (``"mean"``).
      per_example: one value for each prompt, [L,H,B]. Ratios explode where a prompt's corrupt and
        clean metrics are close.

    Returns:
      [L,H] float32, or [L,H,B].

    Raises:
      ValueError: prompts that do not correspond, receivers the model does not have or that nothing
        precedes, an unknown component, or metric_corrupt equal to metric_clean under `normalise`.

    References: Wang et al., 2022, arXiv:2211.00593; Merullo et al., 2023, arXiv:2310.08744.
    """
    clean, corrupt = as_prompts(clean, "clean"), as_prompts(corrupt, "corrupt")
    check_pair(clean, corrupt)
    cfg = model.cfg
    wanted = _receiver_masks(receivers, cfg)
    if sender_value not in ("corrupt", "mean"):
        raise ValueError(f"sender_value={sender_value!r} is not 'corrupt' or 'mean'.")
    metric, slots = as_metric(metric), select_slots(positions, clean)
    masks = None if wanted is None else {c: jnp.asarray(m) for c, m in wanted.items()}
    runs = (model, clean, corrupt, metric, slots, masks)
    options = {"freeze_mlps": freeze_mlps, "sender_value": sender_value}
    inner = as_tapped(forward)
    is_bare = not inner.taps.edits and base_forward(forward) is decoder_forward
    if sender_batch is None:
        is_short = is_bare and masks is None and metric.positions is not None
        sender_batch = cfg.num_heads if is_short else _heads_at_once(model, clean)
    options["sender_batch"] = sender_batch
    if is_bare:
        options["sender_batch"] = min(sender_batch, cfg.num_heads)
        together = _reads_where_patched(metric, slots, clean)
        values = passes.sweep_parts(*runs, **options, reads_where_patched=together)
    else:
        bare = TappedForward(inner.forward, Taps(inner.taps.edits))
        values = passes.sweep_wholes(bare, *runs, **options)
    return _scores(values, cfg, wanted, normalise=normalise, per_example=per_example)


def percent(scores: Array) -> Array:
    """-100 * score, the unit of the papers: negative where patching hurts."""
    return -100 * scores


def _heads_at_once(model: Decoder, prompts: Prompts) -> int:
    """As many heads as fit; a divisor of their number, so that all chunks are alike."""
    fits = senders_in_memory(model, prompts)
    count = model.cfg.num_heads
    return max(n for n in range(1, count + 1) if count % n == 0 and (n <= fits or n == 1))


def _reads_where_patched(metric: Metric, slots: Slots, prompts: Prompts) -> bool:
    """Whether the metric is known to read the one slot that is patched."""
    if metric.positions is None or slots.single is None:
        return False
    read = metric.slots(*prompts.tokens.shape)
    if is_traced(read) or is_traced(slots.single):
        return False
    return read.is_fully_addressable and np.array_equal(read, slots.single)


def _scores(values: passes.Values, cfg: ModelConfig, wanted, *, normalise: bool, per_example: bool):
    average = (lambda x: x) if per_example else partial(jnp.mean, axis=-1)
    patched, clean, corrupt = (average(x) for x in values)
    out = patched - clean
    if normalise:
        _check_effect(clean, corrupt)
        out = out / (corrupt - clean)
    if wanted is None:
        return out
    is_silent = np.arange(cfg.num_layers)[:, None] >= _last_layer(wanted)
    for mask in wanted.values():
        is_silent = is_silent | np.repeat(mask, cfg.num_heads // mask.shape[1], axis=1)
    return jnp.where(is_silent.reshape(*is_silent.shape, *(1,) * (out.ndim - 2)), 0, out)


def _check_effect(clean: Array, corrupt: Array) -> None:
    """Raise where corrupting changes nothing, so that scores would be divided by zero."""
    if is_traced(clean) or not getattr(clean, "is_fully_addressable", True):
        return
    gap = np.abs(np.asarray(corrupt) - np.asarray(clean))
    size = np.maximum(np.abs(np.asarray(clean)), np.abs(np.asarray(corrupt)))
    if np.any(gap <= 4 * np.finfo(np.float32).eps * size):
        raise ValueError(
            f"the metric is {np.asarray(clean)} on the clean and {np.asarray(corrupt)} on the "
            "corrupt prompts: corrupting has no effect to normalise by. Choose corrupt prompts "
            "that change the answer, or pass normalise=False."
        )


def _receiver_masks(receivers: Any, cfg: ModelConfig) -> dict[str, np.ndarray] | None:
    """For each component in use, its receivers as a mask [L,H] or [L,K]; None for the logits."""
    if isinstance(receivers, str):
        if receivers == "logits":
            return None
        raise ValueError(
            f"receivers={receivers!r} is not 'logits'; name heads as [(layer, head, 'q')]."
        )
    receivers = list(receivers)
    if not receivers:
        raise ValueError("receivers is empty; name at least one, or pass 'logits'.")
    masks: dict[str, np.ndarray] = {}
    for item in receivers:
        layer, head, component = _parse_receiver(item)
        if component not in COMPONENTS:
            hint = " (give all three for everything that a head reads)" if component == "z" else ""
            raise ValueError(
                f"receiver {item!r}: component {component!r} is not one of q, k, v{hint}."
            )
        count = cfg.num_heads if component == "q" else cfg.num_kv_heads
        if not 0 <= layer < cfg.num_layers or not 0 <= head < count:
            hint = ""
            if component != "q" and count <= head < cfg.num_heads:
                hint = (
                    f" {cfg.num_groups} query heads share each key/value head: query head {head} "
                    f"reads key/value head {head // cfg.num_groups}, so name "
                    f"({layer}, {head // cfg.num_groups}, {component!r})."
                )
            kind = "query heads" if component == "q" else "key/value heads"
            raise ValueError(
                f"receiver {item!r} is out of range: the model has layers 0 to "
                f"{cfg.num_layers - 1} with {kind} 0 to {count - 1}.{hint}"
            )
        mask = masks.setdefault(component, np.zeros((cfg.num_layers, count), bool))
        if mask[layer, head]:
            raise ValueError(f"receiver {item!r} is listed twice.")
        mask[layer, head] = True
    if _last_layer(masks) == 0:
        raise ValueError("all receivers are in layer 0, which no head precedes.")
    return masks


def _parse_receiver(item: Any) -> Receiver:
    if isinstance(item, tuple | list) and len(item) == 3:
        layer, head, component = item
        integers = (int, np.integer)
        if isinstance(layer, integers) and isinstance(head, integers):
            return int(layer), int(head), component
    raise ValueError(f"receiver {item!r} must be (layer, head, 'q' | 'k' | 'v').")


def _last_layer(masks: dict[str, np.ndarray]) -> int:
    return max(int(np.flatnonzero(mask.any(axis=1))[-1]) for mask in masks.values())
