"""Modules that own parameters, and the small pure functions that apply them.

Every parameter is an `nnx.Param` with one metadata key, `axes`: the logical name of each axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.models.configs import ModelConfig
from jaxheads.parallel import constrain, ways
from jaxheads.taps import NO_TAP, Tap
from jaxheads.typing import Array, PyTree

Initializer = Callable[..., Array]


def fan_in(num_axes: int) -> Initializer:
    """Normal with variance 1 / (product of the first `num_axes` axes)."""

    def init(key: Array, shape: tuple[int, ...], dtype) -> Array:
        size = 1
        for n in shape[:num_axes]:
            size *= n
        return (jax.random.normal(key, shape, jnp.float32) * size**-0.5).astype(dtype)

    return init


def normal(stddev: float) -> Initializer:
    """Normal with a fixed standard deviation."""
    return lambda key, shape, dtype: (jax.random.normal(key, shape, jnp.float32) * stddev).astype(
        dtype
    )


def zeros(key: Array, shape: tuple[int, ...], dtype) -> Array:
    """All zeros."""
    del key
    return jnp.zeros(shape, dtype)


def ones(key: Array, shape: tuple[int, ...], dtype) -> Array:
    """All ones."""
    del key
    return jnp.ones(shape, dtype)


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Initializer,
    dtype: str = "float32",
) -> nnx.Param:
    """A parameter with named axes; the names decide how it is sharded and how it is saved."""
    if len(shape) != len(axes):
        raise ValueError(f"a parameter of shape {shape} needs {len(shape)} axis names, got {axes}.")
    return nnx.Param(init(rngs.params(), shape, jnp.dtype(dtype)), axes=axes)


def stack_layers(constructor: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs):
    """`num_layers` modules with their parameters stacked, ``"layers"`` in front of the axes."""
    keys = jax.random.split(rngs.params(), num_layers)
    stack = jax.vmap(lambda key: constructor(nnx.Rngs(params=key)))(keys)

    def named(leaf: nnx.Variable) -> nnx.Variable:
        return leaf.replace(axes=("layers", *leaf.get_metadata()["axes"]))

    return jax.tree.map(named, stack, is_leaf=lambda x: isinstance(x, nnx.Variable))


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class Norm(nnx.Module):
    """Weight and bias of a LayerNorm, or the weight of an RMSNorm, over an axis of width `size`."""

    def __init__(self, cfg: ModelConfig, size: int, axis: str, *, rngs: nnx.Rngs, rms: bool):
        start = zeros if cfg.norm_offset else ones
        self.weight = param(rngs, (size,), (axis,), start, cfg.param_dtype)
        self.bias = None if rms else param(rngs, (size,), (axis,), zeros, cfg.param_dtype)


def layer_norm(cfg: ModelConfig, *, rngs: nnx.Rngs) -> Norm:
    """A norm of the residual stream, of the configuration's kind."""
    return Norm(cfg, cfg.model_dim, "act_embed", rngs=rngs, rms=cfg.norm == "rmsnorm")


def normalize(norm: Norm, x: Array, cfg: ModelConfig, tap: Tap = NO_TAP, site: str = "") -> Array:
    """``(x - mean) / scale * (offset + weight) + bias`` over the last axis, in float32.

    ``scale = sqrt(mean((x - mean)^2) + eps)``; an RMSNorm (no bias) leaves out the mean. With
    `site` given, the taps ``{site}_scale`` and ``{site}_out`` are called.
    """
    y = x.astype(jnp.float32)
    if norm.bias is not None:
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    scale = jnp.sqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + cfg.norm_eps)  # [B,T,1]
    if site:
        scale = tap(f"{site}_scale", scale)
    y = y / scale * (cfg.norm_offset + norm.weight[...].astype(jnp.float32))
    if norm.bias is not None:
        y = y + norm.bias[...].astype(jnp.float32)
    y = y.astype(x.dtype)
    return tap(f"{site}_out", y) if site else y


class Attention(nnx.Module):
    """Projections of grouped-query attention; weights keep heads as an axis."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        m, h, k, d = cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        dtype = cfg.param_dtype
        kv_axes = ("embed", "kv_heads", "head_dim")
        self.wq = param(rngs, (m, h, d), ("embed", "heads", "head_dim"), fan_in(1), dtype)
        self.wk = param(rngs, (m, k, d), kv_axes, fan_in(1), dtype)
        self.wv = param(rngs, (m, k, d), kv_axes, fan_in(1), dtype)
        # Outputs into the residual stream start smaller with depth (GPT-2's 1/sqrt(2L)).
        out_init = normal((h * d * 2 * cfg.num_layers) ** -0.5)
        self.wo = param(rngs, (h, d, m), ("heads", "head_dim", "embed"), out_init, dtype)
        bias = lambda heads, axis: (
            param(rngs, (heads, d), (axis, "head_dim"), zeros, dtype) if cfg.qkv_bias else None
        )
        self.bq, self.bk, self.bv = bias(h, "heads"), bias(k, "kv_heads"), bias(k, "kv_heads")
        self.bo = param(rngs, (m,), ("act_embed",), zeros, dtype) if cfg.attn_out_bias else None
        head_norm = lambda: Norm(cfg, d, "head_dim", rngs=rngs, rms=True) if cfg.qk_norm else None
        self.q_norm, self.k_norm = head_norm(), head_norm()
        self.sinks = param(rngs, (h,), ("heads",), zeros, dtype) if cfg.attn_sinks else None


class MLP(nnx.Module):
    """``w_out act(w_in x)``, or gated: ``w_out (act(w_gate x) * w_in x)``."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        m, f, dtype = cfg.model_dim, cfg.mlp_dim, cfg.param_dtype
        into = lambda: param(rngs, (m, f), ("embed", "mlp"), fan_in(1), dtype)
        bias_in = lambda: param(rngs, (f,), ("mlp",), zeros, dtype)
        self.w_in = into()
        self.w_gate = into() if cfg.gated_mlp else None
        out_init = normal((f * 2 * cfg.num_layers) ** -0.5)
        self.w_out = param(rngs, (f, m), ("mlp", "embed"), out_init, dtype)
        self.b_in = bias_in() if cfg.mlp_bias else None
        self.b_gate = bias_in() if cfg.mlp_bias and cfg.gated_mlp else None
        self.b_out = param(rngs, (m,), ("act_embed",), zeros, dtype) if cfg.mlp_bias else None


def add_bias(y: Array, bias: nnx.Param | None) -> Array:
    """``y + bias`` over the last axes of y, or y where the model has no such bias."""
    return y if bias is None else y + bias[...].astype(y.dtype)


def apply_mlp(mlp: MLP, x: Array, cfg: ModelConfig, tap: Tap = NO_TAP) -> Array:
    """The MLP [B,T,M] -> [B,T,M]; `mlp_pre` is what the activation acts on.

    With `cfg.mlp_chunk` the tokens are taken in chunks, so that [B,T,F] exists neither forward nor
    backward; unless `mlp_pre` or `mlp_post` are asked for, which are whole.
    """
    batch, length, _ = x.shape
    groups = (ways("batch", batch), ways("length", length))
    num_chunks = _num_chunks(cfg, batch // groups[0], length // groups[1])
    if num_chunks == 1 or tap.wants("mlp_pre") or tap.wants("mlp_post"):
        return _mlp(mlp, x, cfg, tap)
    # Every device loops over its own tokens with its own copy of the weights, whose gradients are
    # summed over devices once, after the loop.
    axes = ("batch", "length")

    def copy(w: nnx.Variable):
        value = w.get_raw_value()
        names = w.get_metadata()["axes"][-value.ndim :]
        names = (*axes, *(name if name == "mlp" else None for name in names))
        return w.replace(constrain(jnp.broadcast_to(value, (*groups, *value.shape)), names))

    copies = jax.tree.map(copy, mlp, is_leaf=lambda w: isinstance(w, nnx.Variable))
    cut = x.reshape(groups[0], -1, groups[1], num_chunks, length // groups[1] // num_chunks,
                    cfg.model_dim)  # fmt: skip
    chunks = constrain(jnp.transpose(cut, (3, 0, 2, 1, 4, 5)), (None, *axes, None, None, None))
    y: Array = _map_chunks(partial(_grouped_mlp, cfg), copies, chunks)  # type: ignore[assignment]
    return jnp.transpose(y, (1, 3, 2, 0, 4, 5)).reshape(x.shape)


def _num_chunks(cfg: ModelConfig, rows: int, length: int) -> int:
    """The fewest equal chunks of a device's positions with at most `cfg.mlp_chunk` tokens each."""
    if not cfg.mlp_chunk:
        return 1
    least = min(length, -(-rows * length // cfg.mlp_chunk))
    return next(n for n in range(least, length + 1) if length % n == 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _map_chunks(fn: Callable, weights: PyTree, chunks: Array) -> Array:
    """``fn(weights, chunk)`` of every chunk; the backward pass keeps nothing but its arguments.

    Gradients of the weights are summed over the chunks in float32.
    """
    return jax.lax.map(partial(fn, weights), chunks)


def _map_chunks_fwd(fn, weights, chunks):
    return _map_chunks(fn, weights, chunks), (weights, chunks)


def _map_chunks_bwd(fn, kept, cotangents):
    weights, chunks = kept

    def body(total, one):
        chunk, cotangent = one
        d_weights, d_chunk = jax.vjp(fn, weights, chunk)[1](cotangent)
        return jax.tree.map(lambda t, d: t + d.astype(t.dtype), total, d_weights), d_chunk

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    total, d_chunks = jax.lax.scan(body, zeros, (chunks, cotangents))
    return jax.tree.map(lambda t, w: t.astype(w.dtype), total, weights), d_chunks


_map_chunks.defvjp(_map_chunks_fwd, _map_chunks_bwd)


def _grouped_mlp(cfg: ModelConfig, copies: MLP, x: Array) -> Array:
    """`_mlp` of [b,n,B,T,M] with a copy [b,n, ...] of the weights for each group."""
    one = lambda mlp, x: _mlp(mlp, x, cfg, NO_TAP)
    return jax.vmap(jax.vmap(one))(copies, x)


def _mlp(mlp: MLP, x: Array, cfg: ModelConfig, tap: Tap) -> Array:
    act = ACTIVATIONS[cfg.activation]
    # The barriers keep the compiler for TPU from computing activations, and their gradients, inside
    # the products that read them: it would do so again for every tile.
    written = jax.lax.optimization_barrier
    into = lambda w, b: add_bias(jnp.einsum("btm,mf->btf", x, w[...].astype(x.dtype)), b)
    up = into(mlp.w_in, mlp.b_in)
    if mlp.w_gate is None:
        hidden = act(tap("mlp_pre", up))
    else:
        gate, up = written((into(mlp.w_gate, mlp.b_gate), up))
        hidden = written(act(tap("mlp_pre", gate)) * up)
    hidden = tap("mlp_post", hidden)
    return add_bias(jnp.einsum("btf,fm->btm", hidden, mlp.w_out[...].astype(x.dtype)), mlp.b_out)
