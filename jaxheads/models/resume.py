"""Parts of a forward: single layers, runs of layers, and the read-out.

`forward` = embedding, layers 0 to L, read-out. The functions here start where an earlier run was
recorded, so that a finder recomputes only what its edit can change. They run the same layer body
as `forward` and are meant for use inside `jax.jit`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.models.decoder import (
    Decoder,
    Output,
    default_positions,
    final_logits,
    sites,
)
from jaxheads.models.run import Run
from jaxheads.models.stack import run_block, run_stack
from jaxheads.taps import NO_TAPS, OUTER_SITES, STACK_SITES, Edit, Tap, TapContext, Taps
from jaxheads.typing import Array, PyTree


class Layers(NamedTuple):
    """What a part of the layer stack returns."""

    hidden: Array
    """[B,T,M] the residual stream after the last layer that was run."""
    seen: dict[str, PyTree] = {}  # noqa: RUF012 (never mutated)
    """Recorded values by name; leading axis: the layers run (none for a single layer)."""
    aux: dict[str, Array] = {}  # noqa: RUF012 (never mutated)
    """Auxiliary losses of attention variants."""


def resume(
    model: Decoder,
    hidden: Array,
    *,
    start: int | Array,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    taps: Taps = NO_TAPS,
) -> Output:
    """The rest of a forward, from the residual stream that enters layer `start`.

        forward(model, tokens) = resume(model, x, start=l),   x = what enters layer l

    Args:
      model: a `Decoder`.
      hidden: [B,T,M] the residual stream before layer `start`: the record of ``resid_post`` of
        the layer before it. (``resid_pre`` is recorded after its edits; it serves where none of
        `taps` edits ``resid_pre``.)
      start: an index from 0 to L. An integer slices the stack and is differentiable. A traced
        int32 scalar loops over a range known only at run time: one program for every layer, no
        reverse-mode derivative, no records in the stack.
      positions: as `forward`.
      segment_ids: as `forward`.
      taps: as `forward`, payloads [L, ...]; what concerns layers below `start` or the embedding is
        not run.

    Returns:
      `Output`; what it recorded in the stack leads with the layers run, [L - start].

    Raises:
      ValueError: for shapes or a range of layers that do not fit, and taps the model cannot honour.
      NotImplementedError: for records in the stack under a traced `start`.
    """
    ran = run_layers(
        model, hidden, start=start, positions=positions, segment_ids=segment_ids, taps=taps
    )
    out = read_out(model, ran.hidden, positions=positions, segment_ids=segment_ids, taps=taps)
    return out._replace(seen=ran.seen | out.seen, aux=ran.aux)


def run_layers(
    model: Decoder,
    hidden: Array,
    *,
    start: int | Array = 0,
    stop: int | Array | None = None,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    taps: Taps = NO_TAPS,
) -> Layers:
    """Layers `start` to `stop` - 1 (default: to the last) on a residual stream [B,T,M].

    Arguments and errors as `resume`; `stop` may be traced too.
    """
    cfg = model.cfg
    stop = cfg.num_layers if stop is None else stop
    taps = _checked(model, hidden, taps)
    if isinstance(start, int) and isinstance(stop, int):
        if not 0 <= start <= stop <= cfg.num_layers:
            raise ValueError(
                f"layers {start} to {stop} are no part of a model of {cfg.num_layers} layers."
            )
        for item in taps.record:
            if start == stop or (item.layer is not None and not start <= item.layer < stop):
                raise ValueError(
                    f"{item.name!r} is recorded outside layers {start} to {stop}, the ones run."
                )
        if start == stop:
            return Layers(hidden)
        run = _run_of(model, hidden, positions, segment_ids)
        x, _, seen, aux = run_stack(model, hidden, None, run, taps, start, stop)
        return Layers(x, seen, aux)
    if taps.record:
        raise NotImplementedError(
            f"{taps.record[0].name!r} cannot be recorded under a traced range of layers, whose "
            "number is not known; give `start` as an integer, or record with run_layer."
        )
    one = partial(run_layer, model, positions=positions, segment_ids=segment_ids, taps=taps)
    return Layers(jax.lax.fori_loop(start, stop, lambda n, x: one(x, n).hidden, hidden))


def run_layer(
    model: Decoder,
    hidden: Array,
    layer: int | Array,
    *,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    reads: Array | None = None,
    taps: Taps = NO_TAPS,
    edits: tuple[Edit, ...] = (),
) -> Layers:
    """One layer on a residual stream [B,T,M]; its index may be traced.

    An edit that replaces a site's value without reading it leaves what came before without a
    reader, and the compiler drops it: replacing ``resid_mid`` costs the MLP alone.

    Args:
      model: a `Decoder`.
      hidden: [B,T,M] what enters the layer.
      layer: its index.
      positions: as `forward`.
      segment_ids: as `forward`.
      reads: [B,N] slots to compute; keys and values come from every slot, and everything from the
        queries on has N in place of T. Default: all.
      taps: as `forward`, payloads [L, ...].
      edits: further edits of this layer alone, applied after `taps`; payloads without [L].

    Returns:
      `Layers` with hidden [B,T,M], or [B,N,M] with `reads`; records without a leading axis.
    """
    cfg = model.cfg
    taps = _checked(model, hidden, taps)
    run = _run_of(model, hidden, positions, segment_ids, reads)
    own = tuple(jax.tree.map(lambda a: a[layer], p) for p in taps.layer_payloads())
    block = jax.tree.map(lambda a: a[layer], model.layers)
    payloads = (*own, *(e.payload for e in edits))
    taps = Taps(taps.edits + edits, taps.record)
    period = len(cfg.pattern)

    def run_as(place: int) -> Layers:
        params = jax.tree.map(lambda a: a[layer // period], model.variants[place])
        index = jnp.asarray(layer, jnp.int32)
        ran = run_block(cfg.pattern[place], run, taps, hidden, None, block, params, payloads, index)
        return Layers(ran.x, ran.seen, ran.aux)

    if isinstance(layer, int):
        return run_as(layer % period)
    if all(v is None for v in model.variants):  # places of one kind are one branch
        kinds = list(dict.fromkeys(cfg.pattern))
        places = [cfg.pattern.index(kind) for kind in kinds]
        branch = jnp.asarray([kinds.index(spec) for spec in cfg.pattern])[layer % period]
    else:
        places, branch = list(range(period)), layer % period
    if len(places) == 1:
        return run_as(places[0])
    return jax.lax.switch(branch, [partial(run_as, place) for place in places])


def read_out(
    model: Decoder,
    hidden: Array,
    *,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    taps: Taps = NO_TAPS,
) -> Output:
    """Final norm and unembedding of the last residual stream [B,T,M]."""
    taps = taps.only(set(OUTER_SITES) - {"embed", "pos_embed"})
    taps.check(sites(model.cfg), model.cfg.num_layers, f"{model.cfg.family} decoder")
    batch, length = hidden.shape[:2]
    if positions is None:
        positions = default_positions((batch, length), segment_ids, None)
    tap = Tap(taps, TapContext(None, positions, segment_ids))
    x, logits = final_logits(model, hidden, tap)
    return Output(logits, None, tap.finish(f"the {model.cfg.family} decoder"), x)


def _checked(model: Decoder, hidden: Array, taps: Taps) -> Taps:
    """The taps of the stack, after the checks that `forward` makes."""
    cfg = model.cfg
    if hidden.ndim != 3 or hidden.shape[-1] != cfg.model_dim:
        raise ValueError(
            f"hidden has shape {hidden.shape}; needed [B,T,{cfg.model_dim}], a residual stream."
        )
    taps = taps.only(STACK_SITES)
    taps.check(sites(cfg), cfg.num_layers, f"{cfg.family} decoder")
    return taps


def _run_of(model, hidden, positions, segment_ids, reads=None) -> Run:
    batch, length = hidden.shape[:2]
    if positions is None:
        positions = default_positions((batch, length), segment_ids, None)
    keys = Run(model.cfg, positions, positions, segment_ids, segment_ids, None, length)
    if reads is None:
        return keys
    pick = lambda a: jnp.take_along_axis(jnp.broadcast_to(a, (batch, length)), reads, axis=1)
    own = None if segment_ids is None else pick(segment_ids)
    return keys._replace(positions=pick(positions), segment_ids=own, slots=reads, reads=reads)
