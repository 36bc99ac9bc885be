"""The decoder language model: one module and one forward for every family.

A step through `forward`: tokens -> embedding -> for each layer, in one `lax.scan`,
norm -> q, k, v -> attention variant -> z -> output projection -> MLP -> final norm -> logits.
Every stage is a named tap (`jaxheads.taps`).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxheads import attention
from jaxheads.models.architectures import ARCHITECTURES
from jaxheads.models.cache import Cache
from jaxheads.models.configs import LayerSpec, ModelConfig
from jaxheads.models.layers import (
    MLP,
    add_bias,
    layer_norm,
    normal,
    normalize,
    param,
    stack_layers,
    zeros,
)
from jaxheads.models.order import layout_of, to_layout, to_text
from jaxheads.models.run import Run
from jaxheads.models.stack import RESIDUAL, Held, run_stack
from jaxheads.parallel import constrain
from jaxheads.taps import (
    GATE_SITES,
    MEMORY_SITES,
    MIXER_SITES,
    NO_TAPS,
    OUTER_SITES,
    SITES,
    STACK_SITES,
    Tap,
    TapContext,
    Taps,
)
from jaxheads.typing import Array, ArrayLike, PyTree, is_traced


class Output(NamedTuple):
    """What a forward returns."""

    logits: Array
    """[B,T,V] float32. Under `jax.jit`, logits that nobody reads are never computed."""
    cache: Cache | None = None
    """The cache with this call's tokens written, when one was given."""
    seen: dict[str, PyTree] = {}  # noqa: RUF012 (never mutated)
    """Recorded values by the name they were asked for; [L, ...] for sites in the stack."""
    hidden: Array | None = None
    """[B,T,M] `final_norm_out`: what `unembed` turns into logits."""
    aux: dict[str, Array] = {}  # noqa: RUF012 (never mutated)
    """Auxiliary losses of attention variants, each a mean over the layers that have it, and their
    counts (``num_...``), summed over layers."""


class Table(nnx.Module):
    """A lookup table [N,M]."""

    def __init__(self, cfg: ModelConfig, rows: int, width: int, axis: str, *, rngs: nnx.Rngs):
        init = normal(cfg.embed_std)
        self.table = param(rngs, (rows, width), (axis, "embed"), init, cfg.param_dtype)


class Block(nnx.Module):
    """Parameters of one layer."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        sandwich = cfg.norm_placement == "sandwich"
        self.ln1 = layer_norm(cfg, rngs=rngs)
        self.attention = ARCHITECTURES[cfg.mixer.name].module(cfg, rngs=rngs)
        self.ln1_post = layer_norm(cfg, rngs=rngs) if sandwich else None
        shared = cfg.residual == "parallel_shared_norm"
        self.ln2 = None if shared else layer_norm(cfg, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)
        self.ln2_post = layer_norm(cfg, rngs=rngs) if sandwich else None


class Unembed(nnx.Module):
    """Output projection of an untied model, and the output bias."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        shape, axes = (cfg.embed_dim, cfg.vocab_size), ("embed", "vocab")
        self.kernel = (
            None if cfg.tie_embeddings else param(rngs, shape, axes, normal(0.02), cfg.param_dtype)
        )
        self.bias = (
            param(rngs, (cfg.vocab_size,), ("vocab",), zeros, cfg.param_dtype)
            if cfg.unembed_bias
            else None
        )


class Decoder(nnx.Module):
    """A decoder language model: parameters and a configuration, nothing else.

    Build it where its parameters belong: ``parallel.initialize(lambda: Decoder(cfg, rngs=...),
    mesh)``. `forward` runs it.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        m, e = cfg.model_dim, cfg.embed_dim
        self.embed = Table(cfg, cfg.vocab_size, e, "vocab", rngs=rngs)
        learned = cfg.positions == "learned"
        rows = cfg.max_positions + cfg.position_offset
        self.position = Table(cfg, rows, m, "positions", rngs=rngs) if learned else None
        project = lambda a, b: param(rngs, (a, b), ("embed", None), normal(0.02), cfg.param_dtype)
        self.project_in = project(e, m) if e != m else None
        self.project_out = project(m, e) if e != m else None
        self.layers = stack_layers(lambda r: Block(cfg, rngs=r), cfg.num_layers, rngs)
        self.variants = nnx.List(_variant_params(cfg, rngs))
        self.final_norm = None if cfg.norm_placement == "post" else layer_norm(cfg, rngs=rngs)
        self.unembed = Unembed(cfg, rngs=rngs)

    def __repr__(self) -> str:
        return f"Decoder({self.cfg.family}, {self.cfg.num_params:,} parameters, {self.cfg})"


def _variant_params(cfg: ModelConfig, rngs: nnx.Rngs) -> list[PyTree]:
    """For each place of the layer pattern, its variant's parameters stacked over the repeats."""
    period = len(cfg.pattern)
    stacks: list[PyTree] = []
    for place, spec in enumerate(cfg.pattern):
        repeats = len(range(place, cfg.num_layers, period))
        keys = jax.random.split(rngs.params(), repeats)
        init = partial(_init_variant, cfg, spec)
        one = jax.eval_shape(init, keys[0])
        stacks.append(None if one is None else nnx.data(jax.tree.map(_whole, jax.vmap(init)(keys))))
    return stacks


def _whole(stack: Array) -> nnx.Param:
    """A variant's parameter [R, ...], on every device whole."""
    return nnx.Param(stack, axes=("layers", *(None,) * (stack.ndim - 1)))


def _init_variant(cfg: ModelConfig, spec: LayerSpec, key: Array) -> PyTree:
    return attention.VARIANTS[spec.attention].init(key, cfg, spec.options)


def with_config(model: Decoder, **changes: Any) -> Decoder:
    """The same parameters under a changed configuration (``remat="full"``, ``attention="cca"``).

    Raises:
      ValueError: for a change of attention that changes the parameters of variants.
    """
    new = jax.tree.map(lambda leaf: leaf, model)  # of this trace, where NNX allows to set fields
    new.cfg = dataclasses.replace(model.cfg, **changes)
    if new.cfg.pattern != model.cfg.pattern:
        own = jax.eval_shape(lambda: _variant_params(new.cfg, nnx.Rngs(0)))
        shapes = lambda stacks: [leaf.shape for leaf in jax.tree.leaves(stacks)]
        if shapes(own) != shapes(list(model.variants)):
            raise ValueError(
                f"attention={new.cfg.attention!r} has other parameters than the "
                f"{model.cfg.attention!r} that the model was built with; build a Decoder and copy "
                "the weights."
            )
        if not shapes(own):  # nothing to keep, but as many places as layers in the pattern
            new.variants = nnx.List(own)
    return new


def compute_dtype(cfg: ModelConfig) -> jnp.dtype:
    """The dtype activations are computed in; ``auto`` asks the default device's platform."""
    if cfg.compute_dtype != "auto":
        return jnp.dtype(cfg.compute_dtype)
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")


def sites(cfg: ModelConfig) -> tuple[str, ...]:
    """The tap sites a model of this configuration has."""
    missing = set()
    if cfg.positions != "rope":
        missing |= {"q_rot", "k_rot"}
    if cfg.positions != "learned":
        missing |= {"pos_embed"}
    if cfg.residual != "sequential":
        missing |= {"resid_mid"}
    if cfg.residual == "parallel_shared_norm":
        missing |= {"ln2_scale", "ln2_out"}
    if cfg.norm_placement == "post":
        missing |= {"final_norm_scale"}
    own = ARCHITECTURES[cfg.mixer.name].sites
    missing |= MEMORY_SITES if own is None else MIXER_SITES - own
    offered = (attention.VARIANTS[spec.attention].supports.taps for spec in cfg.pattern)
    missing |= GATE_SITES.difference(*offered)
    return tuple(s for s in SITES if s not in missing)


def embed_tokens(model: Decoder, tokens: Array) -> Array:
    """[B,T] ids -> [B,T,M] scaled embeddings, the value of the site `embed` before edits."""
    cfg, dtype = model.cfg, compute_dtype(model.cfg)
    # Where the table lies, every device looks up its columns of all tokens of its fsdp and context
    # group, and the columns then travel to the tokens' devices: less by far than gathering the
    # table would move. First over fsdp, then over context: XLA exchanges one mesh axis at a time.
    tokens = constrain(tokens, ("lookup_batch", "lookup_length"))
    # An id past the table reads NaN rather than another token's row. Cast after the lookup, so
    # that the gradients of a row are summed in float32.
    x = jnp.take(model.embed.table[...], tokens, axis=0, mode="fill").astype(dtype)
    x = constrain(x, ("lookup_batch", "lookup_length", "embed"))
    x = constrain(constrain(x, ("batch", "lookup_length", "lookup_embed")), RESIDUAL)
    x = x * jnp.asarray(cfg.embed_scale, dtype) if cfg.embed_scale != 1 else x
    if model.project_in is not None:
        x = jnp.einsum("bte,em->btm", x, model.project_in[...].astype(dtype))
    return x


def unembed(model: Decoder, hidden: Array, entries: Array | None = None) -> Array:
    """[...,M] values of `final_norm_out` -> [...,V] float32 logits.

    With `entries` [...,N] (token ids, their leading axes broadcastable to those of `hidden`) only
    the logits of those tokens are formed: [...,N].
    """
    cfg, dtype = model.cfg, hidden.dtype
    if model.project_out is not None:
        hidden = jnp.einsum("...m,me->...e", hidden, model.project_out[...].astype(dtype))
    untied, bias = model.unembed.kernel, model.unembed.bias
    tied = untied is None
    kernel = model.embed.table[...] if untied is None else untied[...]
    if entries is None:
        spec = "...e,ve->...v" if tied else "...e,ev->...v"
        logits = jnp.einsum(spec, hidden, kernel.astype(dtype), preferred_element_type=jnp.float32)
        logits = add_bias(logits, bias)
    else:
        rows = jnp.take(kernel, entries, axis=0 if tied else 1, mode="fill")
        rows = rows if tied else jnp.moveaxis(rows, 0, -1)  # [...,N,E]
        logits = jnp.einsum(
            "...e,...ne->...n", hidden, rows.astype(dtype), preferred_element_type=jnp.float32
        )
        if bias is not None:
            logits = logits + jnp.take(bias[...], entries, mode="fill").astype(logits.dtype)
    if cfg.logit_soft_cap is not None:
        logits = cfg.logit_soft_cap * jnp.tanh(logits / cfg.logit_soft_cap)
    return logits


def default_positions(shape: tuple[int, int], segment_ids: Array | None, cache: Cache | None):
    """Positions where none are given.

    Without segment ids [T], counting from 0. With them [B,T], counting each contiguous run of one
    id from 0, or from the tokens of that id already in the cache (padding does not count).
    """
    index = jnp.arange(shape[1], dtype=jnp.int32)
    if segment_ids is None:
        return index
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = jnp.pad(begins, ((0, 0), (1, 0)), constant_values=True)
    start = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)  # [B,T]
    positions = index - start
    if cache is not None:
        held = cache.segment_ids[:, None, :] == segment_ids[:, :, None]  # [B,T,S]
        positions += jnp.sum(held, axis=-1, dtype=jnp.int32)
    return positions


def forward(
    model: Decoder,
    tokens: ArrayLike | list[list[int]] | None,
    *,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    cache: Cache | None = None,
    embeddings: Array | None = None,
    taps: Taps = NO_TAPS,
) -> Output:
    """Run the model on a batch of token ids.

    Args:
      model: a `Decoder`.
      tokens: [B,T] integer ids; may be None when `embeddings` is given.
      positions: [T] or [B,T] positions for rotary or learned embeddings; default as
        `default_positions`. Causality and windows follow the order of tokens, not these.
      segment_ids: [B,T]; tokens see only their own segment, and 0 marks padding. Default: all
        tokens are of segment 1.
      cache: from `init_cache` or an earlier call; this call's tokens are appended.
      embeddings: [B,T,M] in place of the token embeddings (the site `embed`).
      taps: edits and records (`jaxheads.taps`).

    Returns:
      `Output` with logits [B,T,V] float32.

    Raises:
      ValueError: for shapes that do not fit, token ids outside the vocabulary (checked when their
        values are known, otherwise they embed as NaN), a sequence longer than the learned
        positions or than the room left in the cache, and taps the model cannot honour.
    """
    cfg = model.cfg
    if isinstance(tokens, list | tuple):
        tokens = np.asarray(tokens)
    _check_inputs(cfg, tokens, positions, segment_ids, cache, embeddings)
    taps.check(sites(cfg), cfg.num_layers, f"{cfg.family} decoder")
    return _forward(model, tokens, positions, segment_ids, cache, embeddings, taps)


@jax.jit  # so that a call outside any jit is one program too, not an op at a time
def _forward(model: Decoder, tokens, positions, segment_ids, cache, embeddings, taps: Taps):
    cfg = model.cfg
    batch, length = jnp.shape(tokens if embeddings is None else embeddings)[:2]
    if cache is not None and segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    if positions is None:
        positions = default_positions((batch, length), segment_ids, cache)
    slots = None if cache is None else cache.index + jnp.arange(length, dtype=jnp.int32)
    tap = Tap(taps.only(OUTER_SITES), TapContext(None, positions, segment_ids, slots))

    if embeddings is None:
        x = embed_tokens(model, tokens)
    else:
        x = jnp.asarray(embeddings, compute_dtype(cfg))
    x = tap("embed", x)
    if model.position is not None:
        rows = positions + cfg.position_offset
        x = x + tap("pos_embed", jnp.take(model.position.table[...], rows, axis=0, mode="fill")
                    .astype(x.dtype))  # fmt: skip
    x = constrain(x, RESIDUAL)

    if cache is not None:
        cache = cache.write_tokens(segment_ids, jnp.broadcast_to(positions, (batch, length)))
        run = Run(
            cfg, positions, cache.positions, segment_ids, cache.segment_ids, slots, cache.num_slots
        )
        held = Held(cache.k, cache.v, cache.states)
    else:
        # Payloads and records of the stack are in the order of the text.
        inside = taps.only(STACK_SITES)
        is_tapped = bool(inside.edits or inside.record)
        layout = "contiguous" if is_tapped else layout_of(cfg, length)
        x, positions = to_layout(x, layout), to_layout(positions, layout)
        segment_ids = None if segment_ids is None else to_layout(segment_ids, layout)
        run = Run(cfg, positions, positions, segment_ids, segment_ids, None, length, layout=layout)
        held = None
    x, held, seen, aux = run_stack(model, x, held, run, taps.only(STACK_SITES))
    x = to_text(x, run.layout)
    if cache is not None and held is not None:
        cache = dataclasses.replace(cache, k=held.k, v=held.v, states=held.states)
    x, logits = final_logits(model, x, tap)
    seen = seen | tap.finish(f"the {cfg.family} decoder")
    return Output(logits, cache, seen, x, aux)


def final_logits(model: Decoder, x: Array, tap: Tap) -> tuple[Array, Array]:
    """The last residual stream [B,T,M] -> (`final_norm_out` [B,T,M], logits [B,T,V])."""
    cfg = model.cfg
    x = tap("final_norm_in", x)
    if model.final_norm is not None:
        x = normalize(model.final_norm, x, cfg, tap, "final_norm")
    else:
        x = tap("final_norm_out", x)
    logits = constrain(unembed(model, x), ("batch", "length", "act_vocab"))
    return x, tap("logits", logits)


def _check_inputs(cfg, tokens, positions, segment_ids, cache, embeddings) -> None:
    """Raise for inputs that do not fit."""
    if embeddings is not None:
        if jnp.ndim(embeddings) != 3 or jnp.shape(embeddings)[-1] != cfg.model_dim:
            raise ValueError(
                f"embeddings has shape {jnp.shape(embeddings)}, needed [B,T,{cfg.model_dim}]."
            )
        batch, length = jnp.shape(embeddings)[:2]
    elif tokens is None:
        raise ValueError("forward needs tokens [B,T], or embeddings [B,T,M] in their place.")
    else:
        if jnp.ndim(tokens) != 2 or not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
            raise ValueError(
                f"tokens has shape {jnp.shape(tokens)} and dtype {jnp.result_type(tokens)}; needed "
                "integer ids [B,T] (add a batch axis to a single sequence)."
            )
        batch, length = jnp.shape(tokens)
        check_token_ids(tokens, cfg.vocab_size)
    if length == 0 or batch == 0:
        raise ValueError(f"tokens has shape {(batch, length)}: nothing to run.")
    if positions is not None and jnp.shape(positions) not in ((length,), (batch, length)):
        raise ValueError(
            f"positions has shape {jnp.shape(positions)}, needed ({length},) or {(batch, length)}."
        )
    if segment_ids is not None and jnp.shape(segment_ids) != (batch, length):
        raise ValueError(
            f"segment_ids has shape {jnp.shape(segment_ids)}, needed {(batch, length)}."
        )
    if cfg.positions == "learned" and length > cfg.max_positions:
        raise ValueError(
            f"a sequence of {length} tokens exceeds the {cfg.max_positions} learned positions of "
            "the model; shorten it, or use a model with rotary positions."
        )
    if cache is not None:
        if cache.k.shape[1] != batch:
            raise ValueError(f"the cache holds {cache.k.shape[1]} rows, tokens {batch}.")
        used = 0 if is_traced(cache.index) else int(cache.index)
        if used + length > cache.num_slots:
            raise ValueError(
                f"the cache has {cache.num_slots} slots, {used} of them used: no room for "
                f"{length} more tokens; make it longer with init_cache."
            )


def check_token_ids(tokens: Array | np.ndarray, vocab_size: int) -> None:
    """Raise when known token ids lie outside the vocabulary (traced ones are not looked at)."""
    if is_traced(tokens) or not getattr(tokens, "is_fully_addressable", True):
        return
    ids = np.asarray(tokens)
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size} "
            f"(0 to {vocab_size - 1}); the text was encoded with another tokenizer."
        )
