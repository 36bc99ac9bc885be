"""The four Titans layers: what mixes tokens in a decoder, with a memory that learns as it reads.

    lmm   out = (rms(y) * silu(x W_G)) W_O,           y = memory over [P; x]
    mag   out = gate(window attention over [P; x], readout(memory over [P; x]))
    mal   out = window attention(readout(memory over [P; x]))
    mac   `titans_mac.py`

P are learned persistent tokens. They do not depend on the input, so the memory after them is one
state for all rows: each document begins there.

References: Behrouz, Zhong, Mirrokni, 2024, arXiv:2501.00663, sections 3 and 4.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.attention.rope import inverse_frequencies, rotate
from jaxheads.memory.outer import norm
from jaxheads.memory.titans import MemoryOut, MemoryState, init_state, run_memory
from jaxheads.models.configs import ModelConfig
from jaxheads.models.layers import normal, param
from jaxheads.models.titans_documents import Documents, Progress, documents, no_progress
from jaxheads.models.titans_modules import (
    HEADS,
    Branches,
    NeuralMemory,
    OutputGate,
    Tails,
    Tokens,
    WindowAttention,
    from_heads,
    gate,
    links,
    out_projection,
    project,
    rms,
    to_heads,
)
from jaxheads.models.titans_options import MemoryOptions
from jaxheads.models.titans_window import (
    Prefix,
    Ring,
    init_ring,
    prefix_of,
    window_attention,
)
from jaxheads.parallel import constrain
from jaxheads.taps import Tap
from jaxheads.typing import Array

STATE = ("batch", "act_heads", None, None)


class Reading(NamedTuple):
    """What the memory of a layer keeps between calls."""

    memory: MemoryState
    tails: Tails
    tail_ids: Array
    """[B,w-1] documents of the tokens in `tails`."""
    progress: Progress


class Lead(NamedTuple):
    """Where every document begins: what the persistent tokens leave behind."""

    memory: MemoryState
    """Of one row."""
    tails: Tails
    """[w-1,H,D]"""
    y: Array | None
    """[1,N_p,H,D] what the memory reads out at the persistent tokens."""


def init_reading(cfg: ModelConfig, options: MemoryOptions, batch_size: int, dtype: Any) -> Reading:
    """Before the first token; rows take their start from the parameters with the first call."""
    h, d, reach = cfg.num_heads, cfg.head_dim, options.conv - 1
    widths = [d, *[options.expansion * d] * (options.depth - 1), d]
    shapes = list(itertools.pairwise(widths))
    zeros = lambda: [jnp.zeros((batch_size, h, *s), jnp.float32) for s in shapes]
    offset = jnp.zeros((batch_size,), jnp.int32)
    tail = lambda: jnp.zeros((batch_size, reach, h, d), dtype) if reach else None
    return Reading(
        MemoryState(zeros(), zeros(), zeros(), offset),
        Tails(tail(), tail(), tail()),
        jnp.zeros((batch_size, reach), jnp.int32),
        no_progress(batch_size),
    )


def inner_options(options: MemoryOptions) -> dict[str, Any]:
    """The settings of the recurrence."""
    names = ("chunk", "loss", "residual_norm", "read", "stop_inner_grad")
    settings = {name: getattr(options, name) for name in names}
    limits = {n: getattr(options, n) or None for n in ("max_grad_norm", "max_outer_growth")}
    return settings | limits


def choose_rows(rows: Array, new: Any, old: Any) -> Any:
    """`new` in the rows [B] that are True, `old` elsewhere; leaves lead with [B] or [1]."""
    pick = lambda a, b: jnp.where(rows.reshape(-1, *(1,) * (b.ndim - 1)), a.astype(b.dtype), b)
    return jax.tree.map(pick, new, old)


def lead_of(memory: NeuralMemory, options: MemoryOptions, persistent: Array | None) -> Lead:
    """The memory after the persistent tokens [N_p,M]."""
    start = init_state(memory.initial(), 1)
    if persistent is None:
        return Lead(start, Tails(None, None, None), None)
    tokens, tails = project(memory, options, persistent[None])
    out = run_memory(
        **tokens._asdict(),
        params=memory.initial(),
        state=start,
        aligned=True,
        **inner_options(options),
    )
    one = lambda a: None if a is None else a[0]
    return Lead(out.state, Tails(*map(one, tails)), out.y)


def lead_if_needed(
    memory: NeuralMemory, options, persistent: Array | None, docs: Documents, *, goes_on: bool
) -> Lead:
    """`lead_of`, or zeros in a call that is past the beginning of every document."""
    compute = lambda: lead_of(memory, options, persistent)
    if not goes_on or docs.real is None or persistent is None:
        return compute()
    # Convolutions of the first tokens still reach back to it.
    needed = jnp.any(docs.real & (docs.index < max(options.conv - 1, 1)))
    none = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(compute))
    return jax.lax.cond(needed, compute, none)


def remember(
    memory: NeuralMemory,
    options: MemoryOptions,
    tokens: Tokens,
    docs: Documents,
    lead: Lead,
    held: MemoryState | None,
    *,
    aligned: bool = False,
) -> MemoryOut:
    """The recurrence over a call's tokens, each row from where it stands.

    Args:
      held: where an earlier call ended; None: every row begins.
      aligned: rows are known to stand at the start of a chunk.
    """
    batch = tokens.k.shape[0]
    widen = lambda a: jnp.broadcast_to(a, (batch, *a.shape[1:]))
    start = jax.tree.map(widen, lead.memory)
    if held is not None:
        start = start if docs.fresh is None else choose_rows(docs.fresh, start, held)
    place = lambda ws: [constrain(w, STATE) for w in ws]
    start = MemoryState(
        place(start.weights), place(start.momentum), place(start.ref_weights), start.offset
    )
    return run_memory(
        **tokens._asdict(),
        params=[w[0] for w in lead.memory.weights],
        state=start,
        mask=docs.real,
        reset=docs.reset,
        aligned=aligned and docs.real is None,
        initial_momentum=[s[0] for s in lead.memory.momentum],
        **inner_options(options),
    )


def tap_memory(tap: Tap, out: MemoryOut) -> Array:
    """The taps of what a memory gave: the read-outs [B,T,H,D] after edits."""
    if tap.wants("mem_surprise"):
        tap("mem_surprise", out.surprise)
    if tap.wants("mem_norm"):
        tap("mem_norm", norm(out.state.weights))
    return tap("mem_out", constrain(out.y, HEADS))


class LayerInput(NamedTuple):
    """A layer's call, whatever its variant."""

    cfg: ModelConfig
    x: Array
    """[B,T,M] normed input"""
    positions: Array
    segment_ids: Array | None
    slots: Array | None
    tap: Tap

    def rotation(self):
        """(x, positions) -> x of the attention branch; None without rotary positions."""
        cfg = self.cfg
        if cfg.positions != "rope":
            return None
        inv_freq, scaling = inverse_frequencies(cfg.rope, cfg.head_dim, length=self.x.shape[1])
        return partial(
            rotate,
            inv_freq=jnp.asarray(inv_freq),
            interleaved=cfg.rope.interleaved,
            scaling=scaling,
        )


def read_tokens(
    memory: NeuralMemory,
    options: MemoryOptions,
    persistent: Array | None,
    call: LayerInput,
    held: Reading | None,
) -> tuple[Array, Documents, Lead, Reading | None]:
    """The memory over [P; x]: read-outs y [B,T,H,D] at x, and what it keeps."""
    docs, progress = documents(
        call.segment_ids,
        call.x.shape[1],
        None if held is None else held.progress,
        carry=options.documents == "carry",
    )
    lead = lead_if_needed(memory, options, persistent, docs, goes_on=held is not None)
    joined = None
    if docs.ids is not None and options.conv > 1:
        width = (docs.ids.shape[0], options.conv - 1)
        joined = links(docs.ids, jnp.zeros(width, jnp.int32) if held is None else held.tail_ids)
    tokens, tails = project(
        memory,
        options,
        call.x,
        tails=None if held is None else held.tails,
        joined=joined,
        leads=lead.tails,
        tap=call.tap,
    )
    aligned = options.persistent % options.chunk == 0
    state = None if held is None else held.memory
    out = remember(memory, options, tokens, docs, lead, state, aligned=aligned and held is None)
    y = tap_memory(call.tap, out)
    if held is None:
        return y, docs, lead, None
    ids = held.tail_ids if joined is None else joined.ids
    assert progress is not None
    return y, docs, lead, Reading(out.state, tails, ids, progress)


class Persistent(nnx.Module):
    """Learned tokens [N_p,M] before every document."""

    def __init__(self, cfg: ModelConfig, count: int, *, rngs: nnx.Rngs):
        self.tokens = param(rngs, (count, cfg.model_dim), (None, "embed"), normal(1.0),
                            cfg.param_dtype)  # fmt: skip


def persistent_of(module: Any, x: Array) -> Array | None:
    """The persistent tokens of a layer in the dtype of x, or None."""
    return None if module.persistent is None else module.persistent.tokens[...].astype(x.dtype)


class TitansParams(nnx.Module):
    """Parameters of one Titans layer of any variant; None where a variant has no such part."""

    def __init__(self, cfg: ModelConfig, options: MemoryOptions, variant: str, *, rngs: nnx.Rngs):
        alone, gated = variant == "lmm", variant in ("mac", "mag")
        count = options.persistent
        self.memory = NeuralMemory(cfg, options, rngs=rngs)
        self.persistent = Persistent(cfg, count, rngs=rngs) if count else None
        self.readout = out_projection(cfg, rngs)
        self.output_gate: Any = OutputGate(cfg, rngs=rngs) if alone else None
        self.attention: Any = None if alone else WindowAttention(cfg, rngs=rngs)
        self.branches: Any = Branches(cfg, rngs=rngs) if gated else None


def lmm(module: TitansParams, options, call: LayerInput, held: Reading | None):
    """Memory alone: ([B,T,M], state)."""
    x = call.x
    y, _, _, held = read_tokens(module.memory, options, persistent_of(module, x), call, held)
    gated = rms(y, module.output_gate.norm[...], call.cfg.norm_eps)
    z = gated * jax.nn.silu(to_heads(x, module.output_gate.weight))
    return from_heads(call.tap("z", z), module.readout), held


class MagState(NamedTuple):
    """Memory as gate between calls."""

    reading: Reading
    ring: Ring


def mag(module: TitansParams, options, call: LayerInput, held: MagState | None):
    """Memory as gate: ([B,T,M], state)."""
    x, persistent = call.x, persistent_of(module, call.x)
    reading = None if held is None else held.reading
    y, docs, _, reading = read_tokens(module.memory, options, persistent, call, reading)
    prefix = None if persistent is None else prefix_of(module.attention, persistent[None])
    a, ring = _window(module, options, call, x, docs, prefix, held, prefix_in_window=False)
    out = gate(module.branches, a, from_heads(y, module.readout), options.gate, call.cfg.norm_eps)
    return out, None if reading is None or ring is None else MagState(reading, ring)


class MalState(NamedTuple):
    """Memory as layer between calls."""

    reading: Reading
    ring: Ring
    prefix: Prefix | None
    """[B,N_p,K,D] keys and values of what the memory reads out at the persistent tokens."""


def mal(module: TitansParams, options, call: LayerInput, held: MalState | None):
    """Memory as layer: ([B,T,M], state)."""
    persistent = persistent_of(module, call.x)
    reading = None if held is None else held.reading
    y, docs, lead, reading = read_tokens(module.memory, options, persistent, call, reading)
    prefix = None
    if lead.y is not None:
        prefix = prefix_of(module.attention, from_heads(lead.y, module.readout))
        if held is not None:
            assert docs.fresh is not None
            prefix = choose_rows(docs.fresh, prefix, held.prefix)
    z = from_heads(y, module.readout)
    out, ring = _window(module, options, call, z, docs, prefix, held, prefix_in_window=True)
    return out, None if reading is None or ring is None else MalState(reading, ring, prefix)


def _window(module, options, call: LayerInput, x, docs, prefix, held, *, prefix_in_window):
    return window_attention(
        module.attention,
        x,
        cfg=call.cfg,
        window=options.window,
        rotate=call.rotation(),
        positions=call.positions,
        segment_ids=call.segment_ids,
        index=docs.index,
        prefix=prefix,
        prefix_in_window=prefix_in_window,
        ring=None if held is None else held.ring,
        slots=call.slots,
        tap=call.tap,
    )


def init_lmm(cfg: ModelConfig, batch_size: int, num_slots: int, dtype, options) -> Reading:
    """The state of `lmm` before the first token."""
    del num_slots
    return init_reading(cfg, options, batch_size, dtype)


def init_mag(cfg: ModelConfig, batch_size: int, num_slots: int, dtype, options) -> MagState:
    """The state of `mag` before the first token."""
    del num_slots
    ring = init_ring(cfg, batch_size, options.window, dtype)
    return MagState(init_reading(cfg, options, batch_size, dtype), ring)


def init_mal(cfg: ModelConfig, batch_size: int, num_slots: int, dtype, options) -> MalState:
    """The state of `mal` before the first token."""
    del num_slots
    ring = init_ring(cfg, batch_size, options.window, dtype)
    shape = (batch_size, options.persistent, cfg.num_kv_heads, cfg.head_dim)
    prefix = Prefix(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) if shape[1] else None
    return MalState(init_reading(cfg, options, batch_size, dtype), ring, prefix)
