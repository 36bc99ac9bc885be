"""The runs behind `path_patch`: every sender of a model in one program.

With the output of every other head fixed, nothing moves between slots and no attention is computed
on the way from a sender to its receivers. On a bare model that part runs on the patched slots
alone, from the sender's layer up; what follows the receivers starts at the first of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.discovery.metrics import Metric
from jaxheads.discovery.prompts import Prompts, Slots
from jaxheads.discovery.reuse import put
from jaxheads.models import Decoder, forward, run_layer
from jaxheads.models.decoder import default_positions
from jaxheads.models.layers import add_bias, normalize
from jaxheads.taps import Edit, Record, TapContext, TappedForward, Taps, intervene, record, sweep
from jaxheads.typing import Array, PyTree


class Values(NamedTuple):
    """The metric of each prompt in the three runs."""

    patched: Array
    """[L,H,B]; the clean value for heads that no receiver follows"""
    clean: Array
    """[B]"""
    corrupt: Array
    """[B]"""


class Held(NamedTuple):
    """The clean run with the output of every head fixed, and what senders write."""

    positions: Array
    """[B,P]: P slots of each prompt, all of them or one"""
    segment_ids: Array | None
    """[B,P]"""
    gate: Array
    """[B,P] bool: where a sender writes"""
    entering: Array
    """[L,B,P,M]: the residual stream before each layer"""
    z: Array
    """[L,B,P,H,D]"""
    donor: Array
    """[L,B,P,H,D]"""
    attn_out: Array
    """[L,B,P,M]"""
    mlp_out: Array
    """[L,B,P,M]"""
    final: Array
    """[B,P,M]: the residual stream before the final norm"""

    def at(self, slots: Array) -> Held:
        """The part of the run at one slot [B] of each prompt."""
        rows = lambda x: take_slots(x, slots)
        layers = jax.vmap(rows)
        return Held(
            rows(self.positions),
            None if self.segment_ids is None else rows(self.segment_ids),
            rows(self.gate),
            layers(self.entering),
            layers(self.z),
            layers(self.donor),
            layers(self.attn_out),
            layers(self.mlp_out),
            rows(self.final),
        )

    @property
    def inputs(self) -> dict[str, Any]:
        """What the functions that run layers are told about the slots."""
        return {"positions": self.positions, "segment_ids": self.segment_ids}


@partial(
    jax.jit, static_argnames=("freeze_mlps", "sender_batch", "sender_value", "reads_where_patched")
)
def sweep_parts(
    model: Decoder,
    clean: Prompts,
    corrupt: Prompts,
    metric: Metric,
    slots: Slots,
    receivers: dict[str, Array] | None,
    *,
    freeze_mlps: bool,
    sender_batch: int,
    sender_value: str,
    reads_where_patched: bool,
) -> Values:
    """All senders of a bare model; only what an edit can change is recomputed.

    Args:
      model: a `Decoder`.
      clean: the clean prompts.
      corrupt: the corrupt prompts.
      metric: what is measured.
      slots: where senders write and receivers are written.
      receivers: for each component a mask [L,H] or [L,K]; None for the logits.
      freeze_mlps: as `path_patch`.
      sender_batch: as `path_patch`, at most H.
      sender_value: as `path_patch`.
      reads_where_patched: the metric reads the one slot that is patched, so no other matters.
    """
    cfg = model.cfg
    cfg.require_transformer("path patching")
    sites = ("resid_pre", "z", "attn_out", "mlp_out", "final_norm_in")
    out = record(forward, *sites)(model, clean.tokens, **clean.inputs)
    other = record(forward, "z")(model, corrupt.tokens, **corrupt.inputs)
    held = hold(out.seen, donor_of(other.seen["z"], sender_value), clean, slots.mask)
    before, after = (metric.from_hidden(model, o.hidden) for o in (out, other))
    entering = out.seen["resid_pre"]

    at = slots.single
    if receivers is None:
        at = None if metric.positions is None else metric.slots(*clean.tokens.shape)
    if any(spec.attention != "dense" for spec in cfg.pattern):
        at = None  # other variants may need more than one slot, even where z is replaced
    held = held if at is None else held.at(at)

    def to_logits(layer: Array, head: Array) -> Array:
        if freeze_mlps and cfg.norm_placement != "post":
            last = held.final + written(model, held, layer, head)
        else:
            last = send(model, held, layer, head, freeze_mlps)
            last = climb(model, held, last, layer + 1, cfg.num_layers, freeze_mlps)
        hidden = normed(model, last)
        if at is None:
            return metric.from_hidden(model, hidden)
        return metric.from_gathered(model, hidden[:, 0])

    def to_heads(layer: Array, head: Array) -> Array:
        reached = reach(model, held, layer, head, last_layer, freeze_mlps)
        is_later = (jnp.arange(cfg.num_layers) > layer) & has_receiver
        reads = slots.single if reads_where_patched and at is not None else None
        hidden = receive(
            model, held, reached, entering, receivers or {}, slots, clean,
            start=jnp.argmax(is_later), stop=last_layer, reads=reads,
        )  # fmt: skip
        hidden = normed(model, hidden)
        if reads is None:
            return metric.from_hidden(model, hidden)
        return metric.from_gathered(model, hidden[:, 0])

    one, last_layer = to_logits, jnp.int32(cfg.num_layers)
    has_receiver = jnp.zeros(cfg.num_layers, bool)
    if receivers is not None:
        one = to_heads
        for mask in receivers.values():
            has_receiver = has_receiver | jnp.any(mask, axis=1)
        last_layer = jnp.max(jnp.where(has_receiver, jnp.arange(cfg.num_layers), 0))

    def of_layer(layer: Array) -> Array:
        each = lambda: sweep(
            lambda head: one(layer, head), jnp.arange(cfg.num_heads), batch_size=sender_batch
        )
        none = lambda: jnp.broadcast_to(before, (cfg.num_heads, *before.shape))
        return jax.lax.cond(layer < last_layer, each, none)

    return Values(jax.lax.map(of_layer, jnp.arange(cfg.num_layers)), before, after)


def hold(seen: dict[str, Array], donor: Array, prompts: Prompts, gate: Array) -> Held:
    """The recorded clean run, at every slot."""
    batch, length = prompts.tokens.shape
    positions = prompts.positions
    if positions is None:
        positions = default_positions((batch, length), prompts.segment_ids, None)
    return Held(
        jnp.broadcast_to(positions, (batch, length)),
        prompts.segment_ids,
        gate,
        seen["resid_pre"],
        seen["z"],
        donor,
        seen["attn_out"],
        seen["mlp_out"],
        seen["final_norm_in"],
    )


def normed(model: Decoder, x: Array) -> Array:
    """[B,P,M]: `final_norm_out` of the last residual stream."""
    return x if model.final_norm is None else normalize(model.final_norm, x, model.cfg)


def donor_of(z: Array, sender_value: str) -> Array:
    """[L,B,T,H,D]: what senders write, of the corrupt run's z."""
    if sender_value == "corrupt":
        return z
    return jnp.broadcast_to(jnp.mean(z, axis=1, keepdims=True), z.shape)


def send(model: Decoder, held: Held, layer: Array, head: Array, freeze_mlps: bool) -> Array:
    """[B,P,M]: the residual stream after the sender's own layer."""
    pick = jnp.arange(model.cfg.num_heads) == head
    gate, z, donor = held.gate, held.z[layer], held.donor[layer]
    edits = [Edit("z", write_sender, (z, donor, gate, pick))]
    if freeze_mlps:
        edits.append(Edit("mlp_out", put, held.mlp_out[layer]))
    x = held.entering[layer]
    return run_layer(model, x, layer, **held.inputs, edits=tuple(edits)).hidden


def climb_one(model: Decoder, held: Held, x: Array, layer: Array, freeze_mlps: bool) -> Array:
    """[B,P,M]: the residual stream after one more layer whose heads are all clean."""
    edits = [Edit("attn_out", put, held.attn_out[layer])]
    if freeze_mlps:
        edits.append(Edit("mlp_out", put, held.mlp_out[layer]))
    return run_layer(model, x, layer, **held.inputs, edits=tuple(edits)).hidden


def climb(model, held: Held, x: Array, start: Array, stop: Any, freeze_mlps: bool) -> Array:
    """[B,P,M]: the residual stream before layer `stop`, from the one before `start`."""
    return jax.lax.fori_loop(start, stop, lambda n, x: climb_one(model, held, x, n, freeze_mlps), x)


def reach(model, held: Held, layer: Array, head: Array, stop: Array, freeze_mlps: bool) -> Array:
    """[L,B,P,M]: the residual stream before each layer up to `stop` in pass C."""
    put = lambda all_, x, n: jax.lax.dynamic_update_index_in_dim(all_, x, n, axis=0)
    x = send(model, held, layer, head, freeze_mlps)

    def step(n: Array, carry):
        x, reached = carry
        x = climb_one(model, held, x, n, freeze_mlps)
        return x, put(reached, x, n + 1)

    return jax.lax.fori_loop(layer + 1, stop, step, (x, put(held.entering, x, layer + 1)))[1]


def receive(
    model: Decoder,
    held: Held,
    reached: Array,
    entering: Array,
    receivers: dict[str, Array],
    slots: Slots,
    prompts: Prompts,
    *,
    start: Array,
    stop: Array,
    reads: Array | None,
) -> Array:
    """Pass D: the last residual stream, [B,T,M], or [B,1,M] at the slots `reads` [B].

    Args:
      model: a `Decoder`.
      held: the clean run at the patched slots.
      reached: [L,B,P,M] the residual stream of pass C before each layer.
      entering: [L,B,T,M] the same of the clean run, at every slot.
      receivers: masks of the receivers for each component.
      slots: the slots where receivers are written.
      prompts: the clean prompts.
      start: the first layer with a receiver that pass C changed.
      stop: the last layer with a receiver.
      reads: the one slot to compute; None for all.
    """
    options: dict[str, Any] = dict(prompts.inputs)
    if reads is not None:
        options["reads"] = reads[:, None]

    def into(n: Array, x: Array) -> Array:
        # Causal layers: of the slots that the one slot sees, only itself has changed.
        return x if reads is None else jnp.where(slots.mask[..., None], x, entering[n])

    def receiving(n: Array, x: Array) -> Array:
        asked = Taps(record=tuple(Record(name) for name in receivers))
        seen = run_layer(model, reached[n], n, **held.inputs, taps=asked).seen
        edits = []
        for name, mask in receivers.items():
            where = slots.mask if reads is None or name != "q" else jnp.ones_like(held.gate)
            edits.append(Edit(name, write_heads, (seen[name], mask[n], where)))
        return run_layer(model, into(n, x), n, **options, edits=tuple(edits)).hidden

    x = entering[start]
    x = x if reads is None else take_slots(x, reads)
    x = jax.lax.fori_loop(start, stop + 1, receiving, x)
    after = lambda n, x: run_layer(model, into(n, x), n, **options).hidden
    return jax.lax.fori_loop(stop + 1, model.cfg.num_layers, after, x)


def written(model: Decoder, held: Held, layer: Array, head: Array) -> Array:
    """[B,P,M]: what writing the sender's donor adds to the residual stream, MLPs frozen."""
    cfg = model.cfg
    block = jax.tree.map(lambda a: a[layer], model.layers)
    z = held.z[layer]
    gap = jnp.where(held.gate[..., None, None], held.donor[layer] - z, 0)[:, :, head]  # [B,P,D]
    wo = block.attention.wo[...].astype(z.dtype)
    delta = jnp.einsum("btd,dm->btm", gap, wo[head])
    if block.ln1_post is None:
        return delta
    own = add_bias(jnp.einsum("bthd,hdm->btm", z, wo), block.attention.bo)
    post = lambda y: normalize(block.ln1_post, y, cfg)
    return post(own + delta) - post(own)


@partial(jax.jit, static_argnames=("freeze_mlps", "sender_batch", "sender_value"))
def sweep_wholes(
    edited: TappedForward,
    model: Decoder,
    clean: Prompts,
    corrupt: Prompts,
    metric: Metric,
    slots: Slots,
    receivers: dict[str, Array] | None,
    *,
    freeze_mlps: bool,
    sender_batch: int,
    sender_value: str,
) -> Values:
    """As `sweep_parts` for a forward with edits of its own: every run is a whole one."""
    cfg = model.cfg
    out = record(edited, "z", "mlp_out")(model, clean.tokens, **clean.inputs)
    other = record(edited, "z")(model, corrupt.tokens, **corrupt.inputs)
    donor = donor_of(other.seen["z"], sender_value)
    where = jnp.broadcast_to(slots.mask, donor.shape[:3])

    def one(sender: Array) -> Array:
        pick = (jnp.arange(cfg.num_layers * cfg.num_heads) == sender).reshape(donor.shape[0], -1)
        edits = [Edit("z", write_sender, (out.seen["z"], donor, where, pick))]
        if freeze_mlps:
            edits.append(Edit("mlp_out", put, out.seen["mlp_out"]))
        patched = intervene(edited, *edits)
        if receivers is None:
            return metric(patched(model, clean.tokens, **clean.inputs).logits)
        seen = record(patched, *receivers)(model, clean.tokens, **clean.inputs).seen
        writes = [
            Edit(name, write_heads, (seen[name], mask, where)) for name, mask in receivers.items()
        ]
        return metric(intervene(edited, *writes)(model, clean.tokens, **clean.inputs).logits)

    senders = jnp.arange(cfg.num_layers * cfg.num_heads)
    patched = sweep(one, senders, batch_size=sender_batch)
    patched = patched.reshape(cfg.num_layers, cfg.num_heads, -1)
    return Values(patched, metric(out.logits), metric(other.logits))


def take_slots(values: Array, slots: Array) -> Array:
    """[B,T,...] at one slot [B] of each row -> [B,1,...]."""
    index = slots.reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.take_along_axis(values, index, axis=1)


def write_sender(z: Array, payload: PyTree, ctx: TapContext) -> Array:
    """Edit of z [B,T,H,D]: the clean values, the donor's for the picked head where gated."""
    del ctx
    clean, donor, gate, pick = payload
    return jnp.where(gate[:, :, None, None] & pick[:, None], donor, clean).astype(z.dtype)


def write_heads(value: Array, payload: PyTree, ctx: TapContext) -> Array:
    """Edit of a value [B,T,H,D]: given heads [H] at given slots [B,T] take other values.

    The other values are [B,T,H,D], or [B,1,H,D] for prompts that have one slot each.
    """
    del ctx
    other, heads, where = payload
    chosen = where[:, :, None, None] & heads[:, None]
    return jnp.where(chosen, other.astype(value.dtype), value)
