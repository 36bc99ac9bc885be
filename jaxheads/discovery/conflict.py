"""Conflicts between prompt and memory: who wins, which heads decide, what editing them does.

A prompt states something that the model has learned otherwise. `rates` counts which answer the
model gives, `conflict_scores` scores heads by their direct path to either answer, and two searches
act on heads: `search_alpha` scales one head at a time, `sweep_rates` prunes the highest scores.
Gates are data: every search is one program.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads import heads as head_sets
from jaxheads.discovery.head_attribution import check_answers
from jaxheads.discovery.metrics import (
    Metric,
    log_probability,
    logit_difference,
    measure,
    reads_hidden,
)
from jaxheads.discovery.path import path_patch
from jaxheads.discovery.prompts import Prompts, as_prompts, check_pair, select_slots
from jaxheads.discovery.sets import read_metric
from jaxheads.discovery.sweeps import sweep_heads
from jaxheads.heads import Head
from jaxheads.interventions import scale_heads
from jaxheads.models import Decoder, resume
from jaxheads.taps import TappedForward, as_tapped, record, sweep
from jaxheads.typing import Array, ArrayLike

ALPHAS = (-10.0, -8.0, -6.0, -4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0)
RHOS = (0.01, 0.03, 0.05, 0.07, 0.09, 0.15)
GROUPS = ("memory", "context")


class Rates(NamedTuple):
    """Shares of the prompts, which add up to 1: scalars, or arrays with one entry an edit."""

    mem: Any
    """The first token is that of the memorised answer."""
    ctx: Any
    """It is that of the answer the prompt states."""
    other: Any
    """It is neither."""


def rates(
    forward: Callable[..., Any],
    model: Decoder,
    prompts: Any,
    a_mem: ArrayLike,
    a_ctx: ArrayLike,
    *,
    gates: ArrayLike | None = None,
    gate_batch: int = 1,
) -> Rates:
    """How often the most likely next token is the memorised, the stated, or another answer.

    Args:
      forward: a forward, wrapped or not.
      model: a `Decoder`.
      prompts: tokens [B,T], or a mapping with `tokens` and optionally `segment_ids`, `positions`;
        read at the last slot that is no padding.
      a_mem: [B] first token of the memorised answer.
      a_ctx: [B] first token of the answer that the prompt states.
      gates: [N,L,H] gates of z as `scale_heads` takes them, one set an edit, all in one program;
        None for no edit. On a bare forward an edit starts at the first layer it changes.
      gate_batch: edits that run at once.

    Returns:
      `Rates` of floats, or of arrays [N].
    """
    batch = as_prompts(prompts, "prompts")
    a_mem, a_ctx = check_answers(a_mem, a_ctx, model.cfg.vocab_size)
    reads = Metric(_outcome, (a_mem, a_ctx), select_slots("last", batch).single, None, "outcome")
    if gates is None:
        found = read_metric(forward, model, batch, reads)
        return Rates(*(float(share) for share in _shares(found)))
    gates = np.asarray(gates, np.float32)
    if gates.ndim != 3 or not len(gates) or not np.isfinite(gates).all():
        raise ValueError(
            f"gates have shape {gates.shape}; needed finite numbers [N,L,H], one set an edit."
        )
    head_sets.check_shape(gates.shape[1:], model.cfg.num_layers, model.cfg.num_heads, "gates")
    found = _measure_gated(
        as_tapped(forward), model, batch, reads, jnp.asarray(gates), gate_batch=gate_batch
    )
    return _shares(found)


def conflict_rates(
    generate: Callable[..., Array],
    model: Decoder,
    prompts: Any,
    m_ids: ArrayLike | Sequence[Sequence[int]],
    g_ids: ArrayLike | Sequence[Sequence[int]],
) -> Rates:
    """As `rates`, by decoding: the first token that `generate` writes.

    Args:
      generate: `jaxheads.generate`, or one with its forward set:
        ``partial(jh.generate, forward=jh.scale_heads(jh.forward, gates))``.
      model: a `Decoder`.
      prompts: as `generate` takes them.
      m_ids: memorised answers: [B] ids, or B lists of ids whose first counts; longer ones warn.
      g_ids: stated answers, written the same way.
    """
    mem, ctx = _first_ids(m_ids, "m_ids"), _first_ids(g_ids, "g_ids")
    mem, ctx = check_answers(mem, ctx, model.cfg.vocab_size)
    new = generate(model, prompts, max_new_tokens=1)[:, -1]
    found = _shares(jnp.where(new == mem, 0, jnp.where(new == ctx, 1, 2)))
    return Rates(*(float(share) for share in found))


def _first_ids(ids: Any, what: str) -> Any:
    """[B]: the first ids; warns where there are more."""
    if hasattr(ids, "ndim") or all(np.ndim(row) == 0 for row in ids):
        return ids
    if any(len(row) == 0 for row in ids):
        raise ValueError(f"{what} holds an answer without tokens.")
    longer = [n for n, row in enumerate(ids) if len(row) > 1]
    if longer:
        warnings.warn(
            f"{what}: only the first token of an answer is compared; answers of prompts {longer} "
            "have several.",
            stacklevel=3,
        )
    return [int(row[0]) for row in ids]


def _outcome(selected: Array, answers: tuple[Array, Array]) -> Array:
    """[B]: 0 where the top token of [B,V] is the memorised answer, 1 the stated one, 2 neither."""
    top = jnp.argmax(selected, axis=-1)
    return jnp.where(top == answers[0], 0.0, jnp.where(top == answers[1], 1.0, 2.0))


def _shares(outcomes: ArrayLike) -> Rates:
    return Rates(*((np.asarray(outcomes) == n).mean(-1) for n in range(3)))


@partial(jax.jit, static_argnames="gate_batch")
def _measure_gated(
    forward: TappedForward,
    model: Decoder,
    batch: Prompts,
    reads: Metric,
    gates: Array,
    *,
    gate_batch: int,
) -> Array:
    """[N,B]: the metric under each set of gates."""
    is_bare = not forward.taps.edits and reads_hidden(forward)
    if not is_bare or gate_batch > 1:
        one = lambda g: measure(reads, scale_heads(forward, g), model, batch)
        return sweep(one, gates, batch_size=gate_batch)
    before = record(forward, "resid_pre")(model, batch.tokens, **batch.inputs).seen["resid_pre"]

    def from_first_change(g: Array) -> Array:
        start = jnp.argmax(jnp.any(g != 1, axis=1))
        gated = partial(resume, model, before[start], start=start)
        run = lambda model, tokens, taps, **inputs: gated(taps=taps, **inputs)
        out = scale_heads(run, g)(model, batch.tokens, **batch.inputs)
        return reads.from_hidden(model, out.hidden)

    return sweep(from_first_change, gates)


class AlphaChoice(NamedTuple):
    """One head, what its values are multiplied by, and the rates this gives."""

    head: Head
    alpha: float
    rates: Rates


class AlphaTable(NamedTuple):
    """Rates of every head and factor tried."""

    heads: tuple[Head, ...]
    alphas: np.ndarray
    """[A]"""
    rates: Rates
    """arrays [N,A]"""

    def best(self, goal: str, heads: Sequence[Head] | None = None) -> AlphaChoice:
        """The head (of `heads`) and factor of the highest rate of `goal`, the mildest of equals."""
        shares = self.rates[GROUPS.index(_check_group(goal, "goal"))]
        rows = [n for n, h in enumerate(self.heads) if heads is None or h in heads]
        order = [(-shares[n, a], abs(self.alphas[a] - 1), n, a)
                 for n in rows for a in range(len(self.alphas))]  # fmt: skip
        _, _, n, a = min(order)
        return AlphaChoice(
            self.heads[n], float(self.alphas[a]), Rates(*(float(x[n, a]) for x in self.rates))
        )


def search_alpha(
    forward: Callable[..., Any],
    model: Decoder,
    prompts: Any,
    a_mem: ArrayLike,
    a_ctx: ArrayLike,
    heads: Sequence[Any],
    alphas: Sequence[float] = ALPHAS,
) -> AlphaTable:
    """Rates with the values of one head multiplied by one factor, for all heads and factors.

        z[:, :, h] <- alpha z[:, :, h]      in layer l, at every position

    which is the same as scaling the value vectors that this query head reads, biases included.
    Choose on a tuning set (`AlphaTable.best`) and report the choice on prompts it has not seen.

    Args:
      forward, model, prompts, a_mem, a_ctx: as `rates`.
      heads: candidates such as ``[(3, 1)]`` or ``["3.1"]``; query heads.
      alphas: factors; 1 changes nothing, 0 removes the head. The grid of the paper is not known.

    References: Yu et al., 2023, arXiv:2310.15910.
    """
    cfg = model.cfg
    chosen = head_sets.parse_heads(heads)
    head_sets.check_range(chosen, cfg.num_layers, cfg.num_heads)
    factors = np.asarray(alphas, np.float32).reshape(-1)
    if not chosen or not factors.size or not np.isfinite(factors).all():
        raise ValueError(
            f"{len(chosen)} heads and alphas={list(alphas)}: give at least one of each, and finite "
            "factors."
        )
    gates = np.ones((len(chosen), factors.size, cfg.num_layers, cfg.num_heads), np.float32)
    for n, head in enumerate(chosen):
        gates[n, :, head[0], head[1]] = factors
    found = rates(forward, model, prompts, a_mem, a_ctx, gates=gates.reshape(-1, *gates.shape[2:]))
    return AlphaTable(chosen, factors, Rates(*(x.reshape(gates.shape[:2]) for x in found)))


def conflict_scores(
    forward: Callable[..., Any],
    model: Decoder,
    clean: Any,
    corrupt: Any,
    a_mem: ArrayLike,
    a_ctx: ArrayLike,
    *,
    quantity: str = "prob",
    relative: bool = False,
    effect: str = "direct",
) -> Array:
    """The memory score of every head: what it does for the memorised answer over the stated one.

    The head's z at the last position becomes that of the corrupt run:

        S[l,h] = mean_b (p(a_m) - p~(a_m)) - (p(a_c) - p~(a_c))

    Memory heads have the largest S, context heads the smallest: S_context = -S. On the direct path
    every other head and every MLP keeps its clean value, which is the clean residual stream plus
    (z' - z) W_O, normed and unembedded; heads go in chunks, and logits need two columns only.

    Args:
      forward: a forward, wrapped or not.
      model: a `Decoder`.
      clean: prompts in conflict: tokens [B,T], or a mapping as `rates` takes it.
      corrupt: the same template about another subject with another stated answer, slot by slot.
      a_mem: [B] first token of the memorised answer of the clean prompts.
      a_ctx: [B] first token of the answer they state.
      quantity: p is the probability (``"prob"``) or the logit. Where probabilities saturate, their
        drops vanish: use ``"logit"``.
      relative: divide the drops of probabilities by the clean ones.
      effect: ``"direct"``, or ``"total"``: nothing else is held.

    Returns:
      S_memory [L,H] float32, the mean over prompts.

    References: Jin et al., 2024, arXiv:2402.18154. The corruption and the exact score are one
    reading of the paper.
    """
    if quantity not in ("prob", "logit") or effect not in ("direct", "total"):
        raise ValueError(
            f"quantity={quantity!r} must be 'prob' or 'logit', effect={effect!r} 'direct' or "
            "'total'."
        )
    if relative and quantity == "logit":
        raise ValueError("relative=True divides by probabilities; a logit may be 0 or negative.")
    clean, corrupt = as_prompts(clean, "clean"), as_prompts(corrupt, "corrupt")
    check_pair(clean, corrupt)
    a_mem, a_ctx = check_answers(a_mem, a_ctx, model.cfg.vocab_size)
    slots = select_slots("last", clean).single
    if quantity == "logit":
        gap = logit_difference(a_mem, a_ctx, positions=slots)
    else:
        ids = jnp.stack([a_mem, a_ctx], axis=1)
        weights = jnp.broadcast_to(jnp.asarray([1.0, -1.0]), ids.shape)
        if relative:
            reads = [log_probability(a, positions=slots) for a in (a_mem, a_ctx)]
            logs = [read_metric(forward, model, clean, metric) for metric in reads]
            weights = weights / jnp.exp(jnp.stack(logs, axis=1))
        gap = Metric(_weighted_probabilities, (ids, weights), slots, None, "probability_gap")
    if effect == "direct":
        return -path_patch(forward, model, clean, corrupt, gap, freeze_mlps=True, normalise=False)
    patched = sweep_heads(
        forward, model, clean, edit="patch", donor=corrupt, metric=gap, positions="last",
        progress=False,
    )  # fmt: skip
    return jnp.mean(read_metric(forward, model, clean, gap)) - patched


def _weighted_probabilities(selected: Array, payload: tuple[Array, Array]) -> Array:
    """[B]: sum_n weights[b,n] p(ids[b,n]) of logits [B,V]."""
    ids, weights = payload
    chosen = jnp.take_along_axis(selected, ids, axis=-1)
    probs = jnp.exp(chosen - jax.nn.logsumexp(selected, axis=-1, keepdims=True))
    return jnp.sum(weights * probs, axis=-1)


def select(scores: ArrayLike, rho: float, group: str = "memory") -> np.ndarray:
    """The heads of a group that a pruning rate takes, as a mask [L,H].

    max(1, round(rho L H)) heads of the highest score: S for ``"memory"``, -S for ``"context"``.
    Heads with a score of 0 or less are never taken. Prune context heads for more memory, memory
    heads for more context: ``prune_heads(forward, ~select(scores, .05, "context"))``.

    Args:
      scores: [L,H] of `conflict_scores`.
      rho: the share of all heads, in (0, 1).
      group: ``"memory"`` or ``"context"``.
    """
    values = np.asarray(scores, np.float32)
    if values.ndim != 2:
        raise ValueError(f"scores has shape {values.shape}; it must be [L,H], layers x heads.")
    if not 0 < rho < 1:
        hint = f" For {rho:g} % write {rho / 100:g}." if 1 <= rho <= 100 else ""
        raise ValueError(f"rho={rho} must be a share of the heads between 0 and 1.{hint}")
    values = values if _check_group(group, "group") == "memory" else -values
    count = max(1, round(rho * values.size))
    chosen = [head for head in head_sets.top_k(values, count) if values[head] > 0]
    if not chosen:
        raise ValueError(f"no head has a positive {group} score; there is nothing to prune.")
    return head_sets.mask(chosen, *values.shape)


def _check_group(group: str, what: str) -> str:
    if group not in GROUPS:
        raise ValueError(f"{what}={group!r} must be 'memory' or 'context'.")
    return group


class PruneSweep(NamedTuple):
    """Rates under each pruning rate."""

    rhos: tuple[float, ...]
    masks: np.ndarray
    """[N,L,H] bool: the heads that were pruned"""
    rates: Rates
    """arrays [N]"""

    def best(self, goal: str) -> int:
        """Which pruning rate has the highest rate of `goal`, the fewest heads among equals."""
        shares = self.rates[GROUPS.index(_check_group(goal, "goal"))]
        return int(np.argmax(shares))


def sweep_rates(
    forward: Callable[..., Any],
    model: Decoder,
    prompts: Any,
    a_mem: ArrayLike,
    a_ctx: ArrayLike,
    scores: ArrayLike,
    *,
    group: str,
    rhos: Sequence[float] = RHOS,
) -> PruneSweep:
    """Rates with the heads of a group pruned at every pruning rate, in one program.

    Arguments as `rates` and `select`; `rhos` ascend. Choose on validation prompts: heads that help
    one by one may cancel.
    """
    masks = np.stack([select(scores, rho, group) for rho in rhos])
    found = rates(forward, model, prompts, a_mem, a_ctx, gates=1.0 - masks)
    return PruneSweep(tuple(float(rho) for rho in rhos), masks, found)
