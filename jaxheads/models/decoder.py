"""The decoder language model: one module and one forward for every family.

A step through `forward`: tokens -> embedding -> for each layer, in one `lax.scan`,
norm -> q, k, v -> attention variant -> z -> output projection -> MLP -> final norm -> logits.
Every stage is a named tap (`jaxheads.taps`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxheads import attention
from jaxheads.attention.rope import inverse_frequencies, rotate
from jaxheads.models.cache import Cache
from jaxheads.models.configs import LayerSpec, ModelConfig, parse_remat
from jaxheads.models.layers import (
    MLP,
    Attention,
    Norm,
    add_bias,
    apply_mlp,
    layer_norm,
    normal,
    normalize,
    param,
    stack_layers,
    zeros,
)
from jaxheads.parallel import constrain
from jaxheads.taps import NO_TAPS, OUTER_SITES, SITES, STACK_SITES, Tap, TapContext, Taps
from jaxheads.typing import Array, ArrayLike, PyTree, is_traced

RESIDUAL = ("batch", "length", "act_embed")


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
    """Auxiliary losses of attention variants, summed over layers."""


class Table(nnx.Module):
    """A lookup table [N,M]."""

    def __init__(self, cfg: ModelConfig, rows: int, width: int, axis: str, *, rngs: nnx.Rngs):
        self.table = param(rngs, (rows, width), (axis, "embed"), normal(0.02), cfg.param_dtype)


class Block(nnx.Module):
    """Parameters of one layer."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        sandwich = cfg.norm_placement == "sandwich"
        self.ln1 = layer_norm(cfg, rngs=rngs)
        self.attention = Attention(cfg, rngs=rngs)
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
        init = attention.VARIANTS[spec.attention].init
        one = jax.eval_shape(lambda key, init=init: init(key, cfg), keys[0])
        stacks.append(
            None if one is None else jax.vmap(lambda key, init=init: init(key, cfg))(keys)
        )
    return stacks


def with_config(model: Decoder, **changes: Any) -> Decoder:
    """The same parameters under a changed configuration (``remat="full"``, an implementation)."""
    new = copy.copy(model)
    new.cfg = dataclasses.replace(model.cfg, **changes)
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
    return tuple(s for s in SITES if s not in missing)


def embed_tokens(model: Decoder, tokens: Array) -> Array:
    """[B,T] ids -> [B,T,M] scaled embeddings, the value of the site `embed` before edits."""
    cfg, dtype = model.cfg, compute_dtype(model.cfg)
    # Rows whole on each device: looking ids up in a table split over its width as well as the
    # batch would make the compiler replicate the result.
    table = constrain(model.embed.table[...].astype(dtype), ("vocab", None))
    # An id past the table reads NaN rather than another token's row.
    x = jnp.take(table, tokens, axis=0, mode="fill")
    x = constrain(x, RESIDUAL)
    x = x * jnp.asarray(cfg.embed_scale, dtype) if cfg.embed_scale != 1 else x
    if model.project_in is not None:
        x = jnp.einsum("bte,em->btm", x, model.project_in[...].astype(dtype))
    return x


def unembed(model: Decoder, hidden: Array) -> Array:
    """[...,M] values of `final_norm_out` -> [...,V] float32 logits."""
    cfg, dtype = model.cfg, hidden.dtype
    if model.project_out is not None:
        hidden = jnp.einsum("...m,me->...e", hidden, model.project_out[...].astype(dtype))
    if model.unembed.kernel is None:
        spec, kernel = "...e,ve->...v", model.embed.table[...]
    else:
        spec, kernel = "...e,ev->...v", model.unembed.kernel[...]
    logits = jnp.einsum(spec, hidden, kernel.astype(dtype), preferred_element_type=jnp.float32)
    logits = add_bias(logits, model.unembed.bias)
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
    tap = Tap(taps.only(OUTER_SITES), TapContext(None, positions, segment_ids))

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
        slots = cache.index + jnp.arange(length, dtype=jnp.int32)
        cache = cache.write_tokens(segment_ids, jnp.broadcast_to(positions, (batch, length)))
        run = _Run(
            cfg, positions, cache.positions, segment_ids, cache.segment_ids, slots, cache.num_slots
        )
        kv = (cache.k, cache.v)
    else:
        run = _Run(cfg, positions, positions, segment_ids, segment_ids, None, length)
        kv = None
    x, kv, seen, aux = _run_layers(model, x, kv, run, taps.only(STACK_SITES))
    if cache is not None and kv is not None:
        cache = dataclasses.replace(cache, k=kv[0], v=kv[1])

    x = tap("final_norm_in", x)
    if model.final_norm is not None:
        x = normalize(model.final_norm, x, cfg, tap, "final_norm")
    else:
        x = tap("final_norm_out", x)
    logits = constrain(unembed(model, x), ("batch", "length", "act_vocab"))
    logits = tap("logits", logits)
    seen = seen | tap.finish(f"the {cfg.family} decoder")
    return Output(logits, cache, seen, x, aux)


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


class _Run(NamedTuple):
    """What every layer of one forward shares."""

    cfg: ModelConfig
    positions: Array
    """[T] or [B,T]"""
    k_positions: Array
    """[S] or [B,S]"""
    segment_ids: Array | None
    """[B,T]"""
    k_segment_ids: Array | None
    """[B,S]"""
    slots: Array | None
    """[T] the cache slots of the tokens; None without a cache."""
    num_keys: int
    """S: the slots of the cache, or T."""

    def mask(self, spec: LayerSpec) -> attention.Mask:
        """Who sees whom in a layer of this kind."""
        return attention.Mask(
            is_causal=True,
            window=spec.window,
            q_index=self.slots,
            q_segment_ids=self.segment_ids,
            k_segment_ids=self.k_segment_ids,
        )


def _run_layers(model: Decoder, x: Array, kv, run: _Run, taps: Taps):
    """All layers: a scan over repeats of the layer pattern, then the cut last repeat if any.

    Returns (x, kv, seen, aux); `seen` leaves lead with [L].
    """
    cfg = model.cfg
    period = len(cfg.pattern)
    repeats, rest = divmod(cfg.num_layers, period)
    layers = jnp.arange(cfg.num_layers, dtype=jnp.int32)
    per_layer = (model.layers, taps.layer_payloads(), layers)

    def places(num_places: int):
        def body(carry, xs):
            stacked, variant_params = xs
            outs = []
            for place in range(num_places):
                block, payloads, layer = jax.tree.map(lambda a, p=place: a[p], stacked)
                step = _rematerialize(partial(_layer, cfg.pattern[place], run, taps), cfg.remat)
                carry, out = step(carry, block, variant_params[place], payloads, layer)
                outs.append(out)
            return carry, jax.tree.map(lambda *a: jnp.stack(a), *outs)

        return body

    def grouped(first: int, groups: int, size: int):
        cut = lambda a: a[first : first + groups * size].reshape(groups, size, *a.shape[1:])
        return jax.tree.map(cut, per_layer)

    variants = list(model.variants)
    carry = (x, kv)
    xs = (grouped(0, repeats, period), [jax.tree.map(lambda a: a[:repeats], v) for v in variants])
    carry, outs = jax.lax.scan(places(period), carry, xs)
    outs = jax.tree.map(lambda a: a.reshape(repeats * period, *a.shape[2:]), outs)
    if rest:
        last = jax.tree.map(lambda a: a[0], grouped(repeats * period, 1, rest))
        tail = [jax.tree.map(lambda a: a[repeats], v) for v in variants[:rest]]
        carry, more = places(rest)(carry, (last, tail))
        outs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outs, more)
    (x, kv), (seen, aux) = carry, outs
    for item in taps.record:
        if item.layer is not None:
            seen[item.name] = jax.tree.map(lambda a, n=item.layer: a[n], seen[item.name])
    return x, kv, seen, {name: jnp.sum(value) for name, value in aux.items()}


def _rematerialize(step: Callable, remat: str) -> Callable:
    """`step` with what its backward pass keeps decided by the policy's text."""
    kind, names = parse_remat(remat)
    policies = jax.checkpoint_policies
    if kind == "none":
        return step
    policy = {
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "names": policies.save_only_these_names(*names),
    }[kind]
    # Inside a scan the compiler cannot merge the recomputation with the first computation.
    return jax.checkpoint(step, policy=policy, prevent_cse=False)


def _layer(spec: LayerSpec, run: _Run, taps: Taps, carry, block: Block, variant_params, payloads,
           layer: Array):  # fmt: skip
    """One layer: ((x, kv), parameters, this layer's payloads) -> ((x, kv), (seen, aux))."""
    x, kv = carry
    cfg = run.cfg
    ctx = TapContext(layer, run.positions, run.segment_ids)
    tap = Tap(taps.with_layer_payloads(payloads), ctx)
    attend = lambda h: _attend(spec, run, block.attention, variant_params, h, kv, layer, tap)
    norm = lambda which, y, site="": normalize(which, y, cfg, tap, site)

    x = tap("resid_pre", x)
    if cfg.norm_placement == "post":
        y, kv, aux = attend(x)
        x = norm(block.ln1, tap("resid_mid", x + tap("attn_out", y)), "ln1")
        x = norm(block.ln2, x + tap("mlp_out", apply_mlp(block.mlp, x, cfg, tap)), "ln2")
    else:
        normed = norm(block.ln1, x, "ln1")
        y, kv, aux = attend(normed)
        y = y if block.ln1_post is None else norm(block.ln1_post, y)
        y = tap("attn_out", y)
        if cfg.residual == "sequential":
            x, y = tap("resid_mid", x + y), 0
        into_mlp = normed if block.ln2 is None else norm(block.ln2, x, "ln2")
        out = apply_mlp(block.mlp, into_mlp, cfg, tap)
        out = out if block.ln2_post is None else norm(block.ln2_post, out)
        x = x + y + tap("mlp_out", out)
    x = constrain(tap("resid_post", x), RESIDUAL)
    return (x, kv), (tap.finish(f"attention variant {spec.attention!r}"), aux)


def _attend(spec, run: _Run, weights: Attention, variant_params, x, kv, layer, tap):
    """Attention of one layer on its normed input [B,T,M] -> ([B,T,M], kv, aux)."""
    cfg, dtype = run.cfg, x.dtype
    variant = attention.VARIANTS[spec.attention]
    head_axes = ("batch", "length", "act_heads", None)
    kv_axes = ("batch", "length", "act_kv_heads", None)

    def project(name, w, bias, axes, norm: Norm | None = None):
        y = add_bias(jnp.einsum("btm,mhd->bthd", x, w[...].astype(dtype)), bias)
        y = y if norm is None else normalize(norm, y, cfg)
        return tap(name, constrain(y, axes))

    q = project("q", weights.wq, weights.bq, head_axes, weights.q_norm)  # [B,T,H,D]
    k = project("k", weights.wk, weights.bk, kv_axes, weights.k_norm)  # [B,T,K,D]
    v = project("v", weights.wv, weights.bv, kv_axes)  # [B,T,K,D]
    if cfg.scale_by_layer:
        q = q / (layer + 1).astype(dtype)

    rotation = _rotation(cfg, spec, run.num_keys)
    ctx = attention.AttentionContext(
        tap=tap,
        rotate=rotation,
        q_positions=run.positions,
        k_positions=run.k_positions,
        mask=run.mask(spec),
        scale=cfg.score_scale,
        soft_cap=cfg.attn_soft_cap,
        sinks=None if weights.sinks is None else weights.sinks[...],
        alibi_slopes=_alibi_slopes(cfg),
        x=x,
        layer=layer,
        implementation=cfg.implementation,
    )
    if kv is not None and run.slots is not None:
        if rotation is not None and variant.supports.caches_rotated_keys:
            k = tap("k_rot", rotation(k, run.positions))
            ctx = dataclasses.replace(ctx, k_is_rotated=True)
        kv, k, v = _append(kv, k, v, layer, run.slots[0])
    out = variant.apply(variant_params, q, k, v, ctx)
    z = tap("z", constrain(out.z, head_axes))

    wo = weights.wo[...].astype(dtype)
    if tap.wants("head_out"):
        y = jnp.sum(tap("head_out", jnp.einsum("bthd,hdm->bthm", z, wo)), axis=2)
    else:
        y = jnp.einsum("bthd,hdm->btm", z, wo)
    return add_bias(y, weights.bo), kv, out.aux


def _alibi_slopes(cfg: ModelConfig) -> Array | None:
    return jnp.asarray(attention.alibi_slopes(cfg.num_heads)) if cfg.positions == "alibi" else None


def _rotation(cfg: ModelConfig, spec: LayerSpec, num_keys: int) -> Callable | None:
    """The rotation (x, positions) -> x of a layer, None without rotary positions."""
    rope = cfg.rope_of(spec)
    if rope is None:
        return None
    inv_freq, scaling = inverse_frequencies(rope, cfg.head_dim, length=num_keys)
    return partial(
        rotate, inv_freq=jnp.asarray(inv_freq), interleaved=rope.interleaved, scaling=scaling
    )


def _append(kv, k: Array, v: Array, layer: Array, start: Array):
    """Write T new keys and values at slot `start` of a layer; returns (kv, all k, all v)."""
    write = lambda held, new: jax.lax.dynamic_update_slice(
        held, new[None].astype(held.dtype), (layer, 0, start, 0, 0)
    )
    kv = (write(kv[0], k), write(kv[1], v))
    read = lambda held, new: jax.lax.dynamic_index_in_dim(held, layer, keepdims=False).astype(
        new.dtype
    )
    return kv, read(kv[0], k), read(kv[1], v)
