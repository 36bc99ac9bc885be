"""Editing one head, slot or layer at a time, and what each edit does to a metric.

    sweep_heads      [L,H]   every head of every layer
    sweep_positions  [L,T]   every slot of every layer
    sweep_layers     [L]     every layer

Each is one compiled program that the host calls chunk by chunk. `reuse.py` says what it leaves out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.discovery.metrics import Metric, as_metric, measure, reads_hidden
from jaxheads.discovery.progress import Partial, fingerprint, run_chunks
from jaxheads.discovery.prompts import Prompts, as_prompts, select_slots
from jaxheads.discovery.reuse import (
    Plan,
    base_taps,
    chosen,
    make_plan,
    rebase,
    record_run,
    resumed_scores,
)
from jaxheads.discovery.sources import MODES, source_of
from jaxheads.interventions import base_forward
from jaxheads.interventions.per_head import head_axis, num_heads_of
from jaxheads.models import Decoder, Output, resume, sites
from jaxheads.models import forward as decoder_forward
from jaxheads.parallel import RULES, constrain
from jaxheads.taps import (
    NO_TAPS,
    OUTER_SITES,
    READ_ONLY,
    STACK_SITES,
    Edit,
    TapContext,
    TappedForward,
    Taps,
    as_tapped,
    intervene,
    record,
    resolve_site,
    sweep,
)
from jaxheads.typing import Array, PyTree, is_traced

Wrapper = Callable[[Callable[..., Any], Array], TappedForward]
"""(forward, mask [L,H]) -> forward: edits the heads where the mask is 1."""


def sweep_heads(
    forward: Callable[..., Any],
    model: Decoder,
    batch: Any,
    *,
    edit: str | Wrapper,
    donor: Any = None,
    metric: Metric | Callable[[Array], Array],
    site: str = "z",
    positions: Any = "all",
    batch_size: int | None = None,
    prefix_reuse: bool = True,
    progress: bool | None = None,
    resume_file: str | os.PathLike | None = None,
    per_example: bool = False,
) -> Array:
    """The metric with each head edited alone, averaged over the prompts.

    Args:
      forward: a forward, wrapped or not; its own edits stay and come first.
      model: a `Decoder`.
      batch: tokens [B,T], or a mapping with `tokens` and optionally `segment_ids`, `positions`.
      edit: ``"zero"``; ``"mean"`` (over prompts and tokens of the donor, or of the batch);
        ``"resample"`` (the donor's values, or those of the next prompt of the batch); ``"patch"``
        (the donor's values); or a wrapper ``(forward, mask [L,H]) -> forward`` that edits the heads
        of the mask and nothing in lower layers, such as ``lambda f, m: scale_heads(f, 1 - m)``.
        A wrapper is static: pass the same function each time.
      donor: other prompts, which `forward` runs, or a recorded run: an `Output` of
        ``record(forward, site)``, its `seen`, or an array [L,B,T,...].
      metric: a `Metric`, or a function of logits [B,T,V].
      site: a site with heads: ``z``, ``q``, ``k``, ``v``, ``head_out``, ``pattern``, ...; those of
        key/value heads give [L,K].
      positions: the slots that are edited, as `prompts.select_slots` takes them.
      batch_size: how many heads run at once; default: as many of one layer as memory holds.
      prefix_reuse: start each run at the edited layer of a recorded one. False runs every forward
        whole, with the same result up to rounding.
      progress: show a bar; None: where standard error is a terminal.
      resume_file: keeps partial results; the same call continues an interrupted one.
      per_example: one value for each prompt, [L,H,B], instead of their mean.

    Returns:
      [L,H] float32, or [L,K] at sites of key/value heads. Under a mesh (`jax.set_mesh`) heads
      times prompts are split over its data axes.

    Raises:
      ValueError: for a site without heads, prompts and donor that do not correspond, an unknown
        mode, a wrapper that changes lower layers than its mask's.
      NotImplementedError: for `prefix_reuse` around a function that is not `models.forward`.

    Example:
      >>> import numpy as np
      >>> from flax import nnx
      >>> from jaxheads import models
      >>> from jaxheads.discovery import logit_difference
      >>> model = Decoder(models.ModelConfig(num_layers=2), rngs=nnx.Rngs(0))
      >>> metric = logit_difference([5], [7])
      >>> tokens = np.array([[1, 2, 3]])
      >>> sweep_heads(models.forward, model, tokens, edit="zero", metric=metric).shape
      (2, 8)
    """
    site = _stack_site(site)
    count, _ = num_heads_of(site, model.cfg)
    job = _Sweep(forward, model, batch, metric, site, head_axis(site), count, positions)
    scores = job.run(edit, donor, batch_size, prefix_reuse, progress, resume_file)
    return scores if per_example else jnp.mean(scores, axis=-1)


def sweep_positions(
    forward: Callable[..., Any],
    model: Decoder,
    batch: Any,
    *,
    edit: str = "patch",
    donor: Any = None,
    metric: Metric | Callable[[Array], Array],
    site: str = "resid_pre",
    batch_size: int | None = None,
    prefix_reuse: bool = True,
    progress: bool | None = None,
    resume_file: str | os.PathLike | None = None,
) -> Array:
    """The metric with each slot of each layer edited alone, averaged over the prompts: [L,T].

    Arguments as `sweep_heads`, without wrappers. `site` is any site of the layer stack (all its
    heads together): ``resid_pre``, ``attn_out``, ``mlp_out``, ``z``, ...; at ``scores`` and
    ``pattern`` slots are those of the queries.
    """
    site = _stack_site(site)
    prompts = as_prompts(batch)
    letters = STACK_SITES[site].split()
    axis = letters.index("T") if "T" in letters else letters.index("S")
    job = _Sweep(forward, model, prompts, metric, site, axis, prompts.tokens.shape[1], "all")
    scores = job.run(_mode(edit), donor, batch_size, prefix_reuse, progress, resume_file)
    return jnp.mean(scores, axis=-1)


def sweep_layers(
    forward: Callable[..., Any],
    model: Decoder,
    batch: Any,
    *,
    edit: str = "patch",
    donor: Any = None,
    metric: Metric | Callable[[Array], Array],
    site: str = "resid_pre",
    positions: Any = "all",
    prefix_reuse: bool = True,
    progress: bool | None = None,
    resume_file: str | os.PathLike | None = None,
) -> Array:
    """The metric with a site of each layer edited alone, averaged over the prompts: [L].

    Arguments as `sweep_positions`; all `positions` are edited together.
    """
    job = _Sweep(forward, model, batch, metric, _stack_site(site), None, 1, positions)
    scores = job.run(_mode(edit), donor, 1, prefix_reuse, progress, resume_file)
    return jnp.mean(scores[:, 0], axis=-1)


def _mode(edit: Any) -> str:
    if edit not in MODES:
        raise ValueError(f"edit={edit!r} is not one of {', '.join(MODES)}.")
    return edit


def _stack_site(name: str) -> str:
    site, layer = resolve_site(name)
    if site in OUTER_SITES or site in READ_ONLY or layer is not None:
        raise ValueError(
            f"site {name!r} is no site of every layer that can be edited; name one such as 'z', "
            "'q', 'attn_out' or 'resid_pre'."
        )
    return site


class _Sweep:
    """Checked arguments of one sweep over [L,N] items of a site."""

    def __init__(self, forward, model, batch, metric, site, axis, count, positions):
        self.model, self.site, self.axis, self.count = model, site, axis, count
        tapped = as_tapped(forward)
        self.forward = TappedForward(tapped.forward, Taps(tapped.taps.edits))
        self.prompts = as_prompts(batch)
        self.metric = as_metric(metric)
        self.where = select_slots(positions, self.prompts).mask
        record(decoder_forward, site).taps.check(
            sites(model.cfg), model.cfg.num_layers, f"{model.cfg.family} decoder"
        )

    def run(
        self,
        edit: str | Wrapper,
        donor: Any,
        batch_size: int | None,
        prefix_reuse: bool,
        progress: bool | None,
        resume_file: str | os.PathLike | None,
    ) -> Array:
        """[L,N,B]: the metric of every prompt with each item edited alone."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1, or None.")
        base = base_forward(self.forward)
        if prefix_reuse and base is not decoder_forward:
            raise NotImplementedError(
                f"prefix_reuse needs a forward built on models.forward, not {base!r}, whose layers "
                "cannot be run one by one; pass prefix_reuse=False."
            )
        if not isinstance(edit, str):
            if not callable(edit):
                raise TypeError(f"edit is a {type(edit).__name__}; needed a mode or a wrapper.")
            if donor is not None:
                raise ValueError("a wrapper brings its own values; donor= goes with edit='patch'.")
            step = self._wrapped(edit) if prefix_reuse else partial(self._whole, edit)
        else:
            step = self._mode(edit, donor, prefix_reuse)
        chunks = self._chunks(batch_size)
        arrays = (self.forward, self.model, self.prompts, self.metric, donor)
        if any(is_traced(leaf) for leaf in jax.tree.leaves(arrays)):
            if resume_file is not None:
                raise ValueError("resume_file cannot be used inside jax.jit; call it outside.")
            return self._inside_jit(step, chunks)
        name = edit if isinstance(edit, str) else getattr(edit, "__qualname__", "wrapper")
        mark = "" if resume_file is None else self._fingerprint(name, donor, step)
        shape = (self.model.cfg.num_layers, self.count, self.prompts.tokens.shape[0])
        held = Partial(shape, resume_file, mark)
        scores = run_chunks(step, chunks, held, progress=progress, label=f"sweep {self.site}")
        return jnp.asarray(scores)

    def _mode(self, edit: str, donor: Any, prefix_reuse: bool) -> Callable:
        """The step of a built-in edit."""
        taps = base_taps(self.forward, self.model, self.prompts)
        plan = make_plan(self.site, self.axis, taps, self.metric, self.model.cfg)
        recorded, _ = record_run(self.forward, self.model, self.prompts, taps, plan)
        source = source_of(
            edit, donor, self.forward, self.model, self.prompts, self.site, recorded.value
        )
        if not prefix_reuse:
            return partial(self._whole, _Write(self.site, self.axis), data=(self.where, source))
        recorded = recorded._replace(source=source)
        return lambda layer, items: resumed_scores(
            taps,
            self.model,
            self.metric,
            self.prompts,
            recorded,
            self.where,
            jnp.int32(layer),
            jnp.asarray(items),
            plan=plan,
        )

    def _wrapped(self, make: Wrapper) -> Callable:
        """The step of a wrapper, resumed at the layer of its mask."""
        taps = base_taps(self.forward, self.model, self.prompts)
        plan = Plan("resid_post", None, False, False, False)
        recorded, clean = record_run(self.forward, self.model, self.prompts, taps, plan)
        del clean
        _check_lower_layers(make, self.forward, self.model, self.prompts, self.count)
        return lambda layer, items: _wrapped_scores(
            self.forward,
            self.model,
            self.metric,
            self.prompts,
            recorded.entering,
            jnp.int32(layer),
            jnp.asarray(items),
            make=make,
            count=self.count,
        )

    def _whole(self, make: Callable, layer, items, data: PyTree = None) -> Array:
        """A step of whole forwards."""
        return _whole_scores(
            self.forward,
            self.model,
            self.metric,
            self.prompts,
            data,
            jnp.int32(layer),
            jnp.asarray(items),
            make=make,
            count=self.count,
        )

    def _chunks(self, batch_size: int | None) -> list[tuple[int, np.ndarray]]:
        """(layer, [C] items); every chunk has the same size, the last one repeats its last item."""
        rows = self.prompts.tokens.shape[0]
        size = min(self.count, batch_size or senders_in_memory(self.model, self.prompts))
        whole = _ways() // math.gcd(_ways(), rows)  # so that senders x prompts divide the mesh
        size = -(-self.count // -(-self.count // size))  # even chunks
        size = -(-size // whole) * whole
        starts = range(0, self.count, size)
        items = [np.minimum(np.arange(n, n + size), self.count - 1) for n in starts]
        layers = range(self.model.cfg.num_layers)
        return [(layer, i.astype(np.int32)) for layer in layers for i in items]

    def _inside_jit(self, step: Callable, chunks: list[tuple[int, np.ndarray]]) -> Array:
        layers = jnp.asarray([layer for layer, _ in chunks], jnp.int32)
        items = jnp.asarray(np.stack([i for _, i in chunks]))
        scores = jax.lax.map(lambda c: step(*c), (layers, items))
        shape = (self.model.cfg.num_layers, self.count, self.prompts.tokens.shape[0])
        out = jnp.zeros(shape, jnp.float32)
        return out.at[layers[:, None], items].set(scores)

    def _fingerprint(self, edit: str, donor: Any, step: Callable) -> str:
        """Of everything the scores depend on; of the weights, the score of the first head."""
        settings = (edit, self.site, self.axis, self.metric.name, repr(self.model.cfg))
        probe = np.asarray(step(0, self._chunks(None)[0][1])[:1])
        data = (self.prompts, self.where, self.metric, self.forward.taps, donor)
        return fingerprint(settings, data, np.round(probe, 4))


def senders_in_memory(model: Decoder, prompts: Prompts) -> int:
    """How many edited runs of the prompts fit: a fraction of what the device has left.

    Counts the widest moment of a layer in float32. On CPU larger batches than about 2,048 tokens
    gain nothing.
    """
    cfg = model.cfg
    batch, length = prompts.tokens.shape
    ways = _ways()
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return max(1, 2048 * ways // (batch * length))
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    widths = 6 * cfg.model_dim + 3 * cfg.mlp_dim + 4 * cfg.num_heads * cfg.head_dim
    widths += 3 * cfg.num_heads * min(length, 512)
    one = 4 * batch * (length * widths + 2 * cfg.vocab_size)
    return max(1, int(0.4 * free * ways // one))


def _ways() -> int:
    """Over how many devices the mesh that is set splits a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return math.prod(mesh.shape[a] for a in RULES["batch"] or ())


@partial(jax.jit, static_argnames=("make", "count"))
def _wrapped_scores(
    forward: TappedForward,
    model: Decoder,
    metric: Metric,
    prompts: Prompts,
    entering: Array,
    layer: Array,
    items: Array,
    *,
    make: Wrapper,
    count: int,
) -> Array:
    """[C,B]: a wrapper around each head of a layer, resumed at the layer."""
    x = jax.lax.dynamic_index_in_dim(entering, layer, keepdims=False)

    def rest(model, hidden, *, taps: Taps = NO_TAPS, **kwargs) -> Output:
        return resume(model, hidden, start=layer, taps=taps, **kwargs)

    def one(item: Array) -> Array:
        wrapped = _made(make, forward, _one_hot(model, layer, item, count))
        out = rebase(wrapped, rest)(model, x, **prompts.inputs)
        if reads_hidden(wrapped):
            return metric.from_hidden(model, out.hidden)
        return metric(out.logits)

    return constrain(jax.vmap(one)(items), (None, None))


@partial(jax.jit, static_argnames=("make", "count"))
def _whole_scores(
    forward: TappedForward,
    model: Decoder,
    metric: Metric,
    prompts: Prompts,
    data: PyTree,
    layer: Array,
    items: Array,
    *,
    make: Callable,
    count: int,
) -> Array:
    """[C,B]: whole forwards, one for each item of a layer."""

    def one(item: Array) -> Array:
        mask = _one_hot(model, layer, item, count)
        wrapped = make(forward, mask) if data is None else make(forward, mask, *data)
        return measure(metric, wrapped, model, prompts)

    return constrain(sweep(one, items, batch_size=items.shape[0]), (None, None))


def _one_hot(model: Decoder, layer: Array, item: Array, count: int) -> Array:
    return jnp.zeros((model.cfg.num_layers, count), jnp.float32).at[layer, item].set(1.0)


def _made(make: Wrapper, forward: TappedForward, mask: Array) -> TappedForward:
    wrapped = make(forward, mask)
    if not isinstance(wrapped, TappedForward):
        raise TypeError(
            f"edit returned a {type(wrapped).__name__}; needed a wrapped forward (intervene, "
            "ablate, scale_heads, ...), or pass prefix_reuse=False."
        )
    return wrapped


def _check_lower_layers(make, forward, model, prompts, count) -> None:
    """Raise when a wrapper of the last layer changes what enters that layer."""
    last = model.cfg.num_layers - 1
    edited, clean = _entering_last(forward, model, prompts, make=make, count=count, last=last)
    if is_traced(edited):
        return
    gap = float(jnp.max(jnp.abs(edited - clean)))
    scale = float(jnp.max(jnp.abs(clean)))
    if not gap <= 1e-5 * scale:
        raise ValueError(
            "edit changes layers below the head it is given (what enters the last layer moves by "
            f"{gap:.2g}), so the recorded run cannot stand in for them; pass prefix_reuse=False."
        )


@partial(jax.jit, static_argnames=("make", "count", "last"))
def _entering_last(forward, model, prompts, *, make, count: int, last: int):
    site = f"blocks.{last}.hook_resid_pre"
    mask = _one_hot(model, jnp.int32(last), jnp.int32(0), count)
    run = lambda f: record(f, site)(model, prompts.tokens, **prompts.inputs).seen[site]
    return run(_made(make, forward, mask)), run(forward)


@dataclass(frozen=True)
class _Write:
    """A built-in edit as a wrapper of whole forwards."""

    site: str
    axis: int | None

    def __call__(self, forward, mask: Array, where: Array, source: Array) -> TappedForward:
        fn = _WriteAt(self.site, self.axis)
        layers = mask.shape[0]
        everywhere = jnp.broadcast_to(where, (layers, *where.shape))
        return intervene(forward, Edit(self.site, fn, (mask != 0, everywhere, source)))


@dataclass(frozen=True)
class _WriteAt:
    """Edit: where(chosen, source, value), in the layers whose mask is not empty."""

    site: str
    axis: int | None

    def __call__(self, value: Array, payload: PyTree, ctx: TapContext) -> Array:
        del ctx
        own, where, source = payload
        pick = chosen(self.site, self.axis, where & jnp.any(own), own)
        return jnp.where(pick, source.astype(value.dtype), value)
