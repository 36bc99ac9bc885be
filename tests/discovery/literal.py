"""Path patching as its definition reads: four whole runs a sender, one sender at a time."""

from __future__ import annotations

import jax.numpy as jnp

from jaxheads.models import forward
from jaxheads.taps import Edit, intervene, record


def put(value, payload, ctx):
    """The payload in place of the value."""
    del value, ctx
    return payload


def put_at(value, payload, ctx):
    """The payload at some slots and heads."""
    del ctx
    where, other = payload
    return jnp.where(where, other, value)


def path_scores(model, clean, corrupt, metric, *, receivers, where, freeze_mlps):
    """[L,H] differences of the mean metric (pass D or C, minus clean); `where` [B,T] bool."""
    cfg = model.cfg
    base = record(forward, "z", "mlp_out")(model, clean)
    donor = record(forward, "z")(model, corrupt).seen["z"]
    before = metric(base.logits).mean()
    out = jnp.zeros((cfg.num_layers, cfg.num_heads))
    top = cfg.num_layers if receivers == "logits" else max(r[0] for r in receivers)
    for layer in range(top):
        for head in range(cfg.num_heads):
            if receivers != "logits" and _feeds(receivers, layer, head, cfg.num_groups):
                continue
            z = base.seen["z"]
            mixed = jnp.where(where[..., None], donor[layer, :, :, head], z[layer, :, :, head])
            edits = [Edit("z", put, z.at[layer, :, :, head].set(mixed))]
            if freeze_mlps:
                edits.append(Edit("mlp_out", put, base.seen["mlp_out"]))
            pass_c = intervene(forward, *edits)
            if receivers == "logits":
                value = metric(pass_c(model, clean).logits).mean()
            else:
                seen = record(pass_c, "q", "k", "v")(model, clean).seen
                value = metric(_pass_d(model, clean, seen, receivers, where).logits).mean()
            out = out.at[layer, head].set(value - before)
    return out


def _feeds(receivers, layer, head, num_groups):
    """Whether a head is itself a receiver (any query head of a receiving key/value head is)."""
    return any(
        layer == r[0] and (head if r[2] == "q" else head // num_groups) == r[1] for r in receivers
    )


def _pass_d(model, clean, seen, receivers, where):
    edited = forward
    for layer, head, site in receivers:
        is_head = jnp.arange(seen[site].shape[3]) == head
        chosen = where[:, :, None, None] & is_head[:, None]
        edited = intervene(edited, Edit(site, put_at, (chosen, seen[site][layer]), layer=layer))
    return edited(model, clean)
