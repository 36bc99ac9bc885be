"""The attention part of a transformer layer: projections, rotation, cache, variant, output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads import attention
from jaxheads.attention.rope import inverse_frequencies, rotate
from jaxheads.models.configs import LayerSpec, ModelConfig
from jaxheads.models.layers import Attention, Norm, add_bias, normalize
from jaxheads.models.order import in_order
from jaxheads.models.run import Rows, Run
from jaxheads.parallel import constrain
from jaxheads.taps import Tap
from jaxheads.typing import Array, PyTree


class Mixed(NamedTuple):
    """What the part of a layer that mixes tokens returns."""

    y: Array
    """[B,T,M], what is added to the residual stream."""
    state: PyTree
    """What the layer keeps for the next call; None without a cache."""
    aux: dict[str, Array]
    """As `HeadsOut.aux`."""


def attend(
    spec: LayerSpec,
    run: Run,
    weights: Attention,
    variant_params: PyTree,
    x: Array,
    state: PyTree,
    layer: Array,
    tap: Tap,
) -> Mixed:
    """Attention of one layer.

    Args:
      spec: the layer's variant, its options and its window.
      run: what the layers share.
      weights: the layer's projections.
      variant_params: parameters of the layer's variant, or None.
      x: [B,T,M] the normed input.
      state: `Rows` of the cache, or the variant's own state; None without a cache.
      layer: int32 scalar, the index of the layer.
      tap: applies edits and records.
    """
    cfg, dtype = run.cfg, x.dtype
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
    plain = lambda leaf: leaf[...] if is_variable(leaf) else leaf
    variant_params = jax.tree.map(plain, variant_params, is_leaf=is_variable)
    variant = attention.VARIANTS[spec.attention]
    head_axes = ("batch", "length", "act_heads", None)
    kv_axes = ("batch", "length", "act_kv_heads", None)

    def project(name, w, bias, axes, norm: Norm | None = None, x: Array = x):
        num_heads, head_dim = w.shape[1:]
        matrix = constrain(merge_heads(w[...], 1).astype(dtype), (None, axes[2]))
        y = jnp.einsum("btm,mn->btn", x, matrix)
        y = add_bias(y.reshape(*y.shape[:2], num_heads, head_dim), bias)  # [B,T,H,D]
        y = y if norm is None else normalize(norm, y, cfg)
        return tap(name, constrain(y, axes))

    asking = run.at_reads(x)
    q = project("q", weights.wq, weights.bq, head_axes, weights.q_norm, asking)  # [B,T,H,D]
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
        x=asking,
        layer=layer,
        options=in_order(spec.options, run.layout),
        implementation=cfg.implementation,
    )
    if isinstance(state, Rows) and run.slots is not None:
        if rotation is not None and variant.supports.caches_rotated_keys:
            k = tap("k_rot", rotation(k, run.positions))
            ctx = dataclasses.replace(ctx, k_is_rotated=True)
        state, k, v = state.append(k, v, run.slots[0])
    elif state is not None:
        ctx = dataclasses.replace(ctx, state=state, slots=run.slots, k_positions=run.positions)
    out = variant.apply(variant_params, q, k, v, ctx)
    z = tap("z", constrain(out.z, head_axes))

    wo = weights.wo[...].astype(dtype)
    if tap.wants("head_out"):
        y = jnp.sum(tap("head_out", jnp.einsum("bthd,hdm->bthm", z, wo)), axis=2)
    else:
        matrix = jax.lax.optimization_barrier(merge_heads(wo, 0))  # or its stack is turned
        y = jnp.einsum("btn,nm->btm", merge_heads(z, 2), matrix)
    state = state if isinstance(state, Rows) else out.state
    return Mixed(add_bias(y, weights.bo), state, out.aux)


def merge_heads(a: Array, axis: int) -> Array:
    """[..., H,D, ...] -> [..., H*D, ...], heads at `axis`.

    Projections are written as products of matrices, gathered over fsdp before the product: given
    three axes, or left to gather where it likes, XLA for TPU turns the whole float32 stack of
    weights into another layout first, and holds both; and the backward pass gathers twice.
    """
    return a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :])


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
