"""Many edits of one layer, resumed from one recorded run: the program inside a sweep.

An edit of layer l leaves everything below l as it was, so a sweep records the clean run once and
starts each edited run at l. Three identities save more, all exact:

- A head's output enters the residual stream linearly: writing z' for z of head h adds
  ``(z' - z) W_O^h`` to the recorded stream. The edited layer then costs its MLP, and nothing at all
  where attention and MLP are parallel.
- Layers after the edited one hold the edited runs of all senders and prompts in one batch.
- In the last layer only the slots that the metric reads need queries and an MLP; keys and values
  come from every slot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxheads import attention
from jaxheads.discovery.metrics import Metric
from jaxheads.discovery.prompts import Prompts
from jaxheads.interventions.per_head import HeadForward
from jaxheads.models import (
    Decoder,
    ModelConfig,
    Output,
    read_out,
    run_layer,
    run_layers,
    sites,
)
from jaxheads.models.decoder import default_positions
from jaxheads.parallel import constrain
from jaxheads.taps import (
    NO_TAPS,
    OUTER_SITES,
    STACK_SITES,
    Edit,
    EditFn,
    TapContext,
    TappedForward,
    Taps,
    record,
)
from jaxheads.typing import Array, PyTree

AFTER_MID = frozenset({"ln2_scale", "ln2_out", "mlp_pre", "mlp_post", "mlp_out", "resid_post"})
"""Sites of a sequential block that come after `resid_mid`."""


class Plan(NamedTuple):
    """What is decided before anything runs (static)."""

    site: str
    axis: int | None
    """The axis of the site's value that items count: heads or slots; None: the whole value."""
    adds: bool
    """Whether a head's change is added to the recorded stream."""
    prunes: bool
    """Whether the last layer is computed only at the slots the metric reads."""
    reads_logits: bool
    """Whether an edit acts between the last layer and the metric."""


class Recorded(NamedTuple):
    """The clean run, and what is written into it. Leaves lead with [L]."""

    entering: Array
    """[L,B,T,M] what enters each layer."""
    value: Array
    """[L,B,...] the site that is edited."""
    source: Array
    """What replaces it; broadcastable to `value`."""
    stream: Any
    """[L,B,T,M] `resid_mid`, or `resid_post` of parallel blocks; None where nothing needs it."""


def base_taps(forward: TappedForward, model: Decoder, prompts: Prompts) -> Taps:
    """The edits of a wrapped forward as its base function would get them, fitted to the model."""
    held: list[Taps] = []

    def catch(model, tokens, *, taps: Taps = NO_TAPS, **kwargs) -> Output:
        del model, kwargs
        held.append(taps)
        return Output(tokens)

    rebase(forward, catch)(model, prompts.tokens)
    return Taps(held[0].edits)


def rebase(forward: TappedForward, base: Callable[..., Output]) -> TappedForward:
    """The same wrappers around another function."""
    fits = isinstance(forward.forward, HeadForward)
    return TappedForward(HeadForward(base) if fits else base, forward.taps)


def make_plan(site: str, axis: int | None, taps: Taps, metric: Metric, cfg: ModelConfig) -> Plan:
    """Which identities hold for these edits; the others are left out, never approximated."""
    edited = {edit.site for edit in taps.edits}
    kept = {"head_out", "attn_out", "resid_mid"}
    kept |= set() if cfg.residual == "sequential" else {"mlp_out", "resid_post"}
    attends = cfg.mixer.name == "transformer"
    linear = attends and cfg.norm_placement == "pre" and not edited & kept
    in_stack, after = edited & set(STACK_SITES), edited & set(OUTER_SITES)
    cached = attends and all(
        attention.VARIANTS[s.attention].supports.cached_decode for s in cfg.pattern
    )
    return Plan(
        site=site,
        axis=axis,
        adds=site in ("z", "head_out") and linear,
        prunes=metric.positions is not None and not in_stack and not _late(after) and cached,
        reads_logits=bool(_late(after)),
    )


def _late(edited: set[str]) -> set[str]:
    return edited - {"embed", "pos_embed"}


def record_run(
    forward: TappedForward, model: Decoder, prompts: Prompts, taps: Taps, plan: Plan
) -> tuple[Recorded, Output]:
    """The clean run; `source` is filled in by the caller."""
    cfg = model.cfg
    stream = "resid_mid" if cfg.residual == "sequential" else "resid_post"
    wanted = {"resid_pre", plan.site}
    if plan.adds or plan.site in AFTER_MID:
        wanted.add(stream)
    edits_entry = any(edit.site == "resid_pre" for edit in taps.edits)
    if edits_entry:
        wanted.add("resid_post")
    out = _run(record(forward, *sorted(wanted)), model, prompts)
    entering = out.seen["resid_pre"]
    if edits_entry:  # recorded values have the edits of resid_pre in them; what enters has not
        outer = TappedForward(forward.forward, forward.taps.only(OUTER_SITES))
        first = _run(record(outer, "resid_pre"), model, prompts).seen["resid_pre"][:1]
        entering = jnp.concatenate([first, out.seen["resid_post"][:-1]])
    value = out.seen[plan.site]
    return Recorded(entering, value, value, out.seen.get(stream)), out


@jax.jit
def _run(forward: TappedForward, model: Decoder, prompts: Prompts) -> Output:
    return forward(model, prompts.tokens, **prompts.inputs)


@partial(jax.jit, static_argnames="plan")
def resumed_scores(
    taps: Taps,
    model: Decoder,
    metric: Metric,
    prompts: Prompts,
    recorded: Recorded,
    where: Array,
    layer: Array,
    items: Array,
    *,
    plan: Plan,
) -> Array:
    """[C,B] float32: the metric of every prompt with each item of a layer replaced alone.

    Args:
      taps: edits of the forward swept, payloads [L, ...].
      model: the model.
      metric: what is measured.
      prompts: B prompts.
      recorded: the clean run and the replacement.
      where: [B,T] bool, the slots that are replaced.
      layer: int32 scalar.
      items: [C] int32 heads (or slots) of that layer.
      plan: what is left out.
    """
    cfg = model.cfg
    job = _Job(taps, model, metric, prompts, recorded, where, layer, items, plan)
    if not plan.prunes:
        return job.measure(job.later_layers(job.edited_layer(), cfg.num_layers))
    return jax.lax.cond(
        layer == cfg.num_layers - 1,
        lambda: job.measure_gathered(job.edited_layer(reads=True)),
        lambda: job.measure_gathered(job.last_layer(job.edited_layer())),
    )


class _Job(NamedTuple):
    """One chunk: C senders times B prompts, folded into one batch [CB,...] sender by sender."""

    taps: Taps
    model: Decoder
    metric: Metric
    prompts: Prompts
    recorded: Recorded
    where: Array
    layer: Array
    items: Array
    plan: Plan

    @property
    def count(self) -> int:
        return self.items.shape[0]

    @property
    def each(self) -> Taps:
        """The forward's own edits, sender by sender."""
        each = lambda e: dataclasses.replace(e, fn=_Each(e.fn, self.count))
        return Taps(tuple(each(e) for e in self.taps.edits))

    @property
    def inputs(self) -> dict[str, Any]:
        """Positions [CB,T] and segment ids of the folded batch."""
        tokens, segment_ids, positions = self.prompts
        batch, length = tokens.shape
        if positions is None:
            positions = default_positions((batch, length), segment_ids, None)

        def tile(a: Array | None) -> Array | None:
            return None if a is None else _fold(jnp.broadcast_to(a, (self.count, batch, length)))

        return {"positions": tile(positions), "segment_ids": tile(segment_ids)}

    def at_layer(self, values: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(values, self.layer, keepdims=False)

    def edited_layer(self, reads: bool = False) -> Array:
        """The stream after the edited layer: [CB,T,M], or [CB,1,M] at the slots read."""
        plan, cfg = self.plan, self.model.cfg
        tile = lambda a: _fold(jnp.broadcast_to(a, (self.count, *a.shape)))
        gather = jax.vmap(lambda x: self.metric.gather(x)[:, None]) if reads else lambda x: x
        if plan.adds:
            stream = gather(self.at_layer(self.recorded.stream) + self.added())
            stream = constrain(_fold(stream), ("batch", "length", "act_embed"))
            if cfg.residual != "sequential":
                return stream
            inputs = {} if reads else self.inputs
            edits = (Edit("resid_mid", put, stream),)
            return self.run_layer(stream, edits, **inputs)
        edits = (Edit(plan.site, put, _fold(self.replaced())),)
        if plan.site in AFTER_MID and "resid_mid" in sites(cfg):
            edits = (Edit("resid_mid", put, tile(self.at_layer(self.recorded.stream))), *edits)
        entering = constrain(
            tile(self.at_layer(self.recorded.entering)), ("batch", "length", "act_embed")
        )
        x = self.run_layer(entering, edits, **self.inputs)
        return _fold(gather(self.unfold(x)))

    def run_layer(self, x: Array, edits: tuple[Edit, ...], **inputs: Any) -> Array:
        return run_layer(self.model, x, self.layer, taps=self.each, edits=edits, **inputs).hidden

    def chosen(self) -> Array:
        """[C,B|1,...] bool: where each sender's value is replaced."""
        size = self.recorded.value.shape[1 + (self.plan.axis or 0)]
        own = self.items[:, None] == jnp.arange(size)  # [C,N]
        return jax.vmap(partial(chosen, self.plan.site, self.plan.axis, self.where))(own)

    def replaced(self) -> Array:
        """[C,B,...] the site's value of each sender."""
        value = self.at_layer(self.recorded.value)
        source = self.at_layer(self.recorded.source).astype(value.dtype)
        return jnp.where(self.chosen(), source, value)

    def added(self) -> Array:
        """[C,B,T,M] what each sender's edit adds to the stream."""
        plan = self.plan
        value, source = self.at_layer(self.recorded.value), self.at_layer(self.recorded.source)
        change = source.astype(value.dtype) - value  # [B,T,H,D], or [B,T,H,M] of head_out
        weights = self.model.layers.attention.wo[...]
        wo = jax.lax.dynamic_index_in_dim(weights, self.layer, keepdims=False).astype(value.dtype)
        if plan.axis == 2:  # one head a sender
            change = jnp.where(self.where[..., None, None], change, 0)
            change = jnp.take(change, self.items, axis=2)  # [B,T,C,D]
            if plan.site == "head_out":
                return jnp.einsum("btcm->cbtm", change)
            return jnp.einsum("btcd,cdm->cbtm", change, jnp.take(wo, self.items, axis=0))
        change = jnp.where(self.chosen(), change, 0)  # [C,B,T,H,D]
        if plan.site == "head_out":
            return jnp.sum(change, axis=3)
        return jnp.einsum("cbthd,hdm->cbtm", change, wo)

    def later_layers(self, x: Array, stop: int) -> Array:
        start = self.layer + 1
        ran = run_layers(self.model, x, start=start, stop=stop, taps=self.each, **self.inputs)
        return ran.hidden

    def last_layer(self, x: Array) -> Array:
        """[CB,T,M] after the edited layer -> [CB,1,M] after the last, at the slots read."""
        last = self.model.cfg.num_layers - 1
        slots = self.metric.slots(*self.prompts.tokens.shape)  # [B]
        reads = jnp.tile(slots, self.count)[:, None]
        x = self.later_layers(x, last)
        return run_layer(self.model, x, last, reads=reads, **self.inputs).hidden

    def measure_gathered(self, x: Array) -> Array:
        """[CB,1,M] the last stream at the slots read -> [C,B]."""
        hidden = self.unfold(_normed(self.model, x)[:, 0])  # [C,B,M]
        return self.read(partial(self.metric.from_gathered, self.model), hidden)

    def measure(self, x: Array) -> Array:
        """[CB,T,M] the last stream -> [C,B]."""
        if self.plan.reads_logits:
            out = read_out(self.model, x, taps=self.each, **self.inputs)
            return self.read(self.metric, self.unfold(out.logits))
        x = self.unfold(x)
        x = _fold(jax.vmap(self.metric.gather)(x))
        x = x[:, None] if x.ndim == 2 else x
        hidden = _normed(self.model, x)
        if self.metric.positions is not None:
            hidden = hidden[:, 0]
        return self.read(partial(self.metric.from_gathered, self.model), self.unfold(hidden))

    def read(self, measure: Callable[[Array], Array], values: Array) -> Array:
        return constrain(jax.vmap(measure)(values), (None, None))  # whole on every process

    def unfold(self, x: Array) -> Array:
        return x.reshape(self.count, -1, *x.shape[1:])


def _normed(model: Decoder, x: Array) -> Array:
    """`final_norm_out`; the logits of the read-out are dead code."""
    hidden = read_out(model, x).hidden
    return x if hidden is None else hidden


def _fold(x: Array) -> Array:
    """[C,B,...] -> [CB,...]"""
    return x.reshape(-1, *x.shape[2:])


def put(value: Array, payload: Array, ctx: TapContext) -> Array:
    """Edit that writes its payload."""
    del ctx
    return jnp.broadcast_to(payload, value.shape).astype(value.dtype)


def chosen(site: str, axis: int | None, where: Array, own: Array) -> Array:
    """Which entries of a site's value are replaced: bool, broadcastable to it.

    Args:
      site: its name.
      axis: what `own` counts; None: everything.
      where: [B,T] bool slots.
      own: [N] bool heads or slots.
    """
    letters = STACK_SITES[site].split()
    shape = [1] * len(letters)
    slots = letters.index("T") if "T" in letters else letters.index("S")
    shape[0], shape[slots] = where.shape
    where = where.reshape(shape)
    if axis is None:
        return where
    return where & own.reshape([-1 if n == axis else 1 for n in range(len(letters))])


@dataclass(frozen=True)
class _Each:
    """An edit of [B,...] values on the folded batch [CB,...]: it sees one sender at a time."""

    fn: EditFn
    count: int

    def __call__(self, value: Array, payload: PyTree, ctx: TapContext) -> Array:
        batch = value.shape[0] // self.count
        own = lambda a: a[:batch] if a is not None and jnp.ndim(a) > 1 else a
        one = ctx._replace(positions=own(ctx.positions), segment_ids=own(ctx.segment_ids))
        cut = lambda a: a.reshape(self.count, batch, *a.shape[1:])
        each = lambda v, read: self.fn(v, payload, one._replace(read=read))
        parts = jax.tree.map(cut, (value, dict(ctx.read)))
        return jax.vmap(each)(*parts).reshape(value.shape)
