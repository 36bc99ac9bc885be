"""Parameters of Titans layers, and the small pure functions that apply them.

`jaxheads.memory.titans` has the recurrence itself; here are what stands around it: projections, the
causal depthwise convolution, gates, persistent tokens, read-out and the gate that joins branches.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.memory.titans import init_memory
from jaxheads.models.configs import ModelConfig
from jaxheads.models.layers import Initializer, fan_in, normal, ones, param
from jaxheads.models.titans_options import MemoryOptions
from jaxheads.parallel import constrain
from jaxheads.taps import NO_TAP, Tap
from jaxheads.typing import Array

GATE_BIAS: Mapping[str, float] = {"theta": 0.0, "eta": 0.0}
"""Before training: step theta_max / 2, half of the momentum kept. Forgetting: `forget_bias`."""
L2_EPS = 1e-6
HEADS = ("batch", "length", "act_heads", None)
KV_HEADS = ("batch", "length", "act_kv_heads", None)


def constant(value: float) -> Initializer:
    """All entries equal."""
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


class NeuralMemory(nnx.Module):
    """Projections, gates and the learned start `M_0` of the memories of H heads.

        k, v, q = silu(conv(x W)),  k and q of unit length per head
        theta, eta, alpha = sigmoid(x w + b),  theta times theta_max

    Args:
      cfg: widths and heads.
      options: see `MemoryOptions`.
    References: Behrouz et al., 2024, arXiv:2501.00663, section 3.
    """

    def __init__(self, cfg: ModelConfig, options: MemoryOptions, *, rngs: nnx.Rngs):
        m, h, d, dtype = cfg.model_dim, cfg.num_heads, cfg.head_dim, cfg.param_dtype
        axes = ("embed", "heads", "head_dim")
        into = lambda: param(rngs, (m, h, d), axes, fan_in(1), dtype)
        self.wk, self.wv, self.wq = into(), into(), into()
        kernel = lambda: (
            param(rngs, (options.conv, h, d), (None, "heads", "head_dim"), fan_in(1), dtype)
            if options.conv > 1
            else None
        )
        self.conv_k, self.conv_v, self.conv_q = kernel(), kernel(), kernel()
        gates = (options.depth,) if options.per_layer_gates else ()
        gate_axes = (None,) * len(gates)
        weight = lambda: param(
            rngs, (m, h, *gates), ("embed", "heads", *gate_axes), fan_in(1), dtype
        )
        bias = lambda value: param(rngs, (h, *gates), ("heads", *gate_axes), constant(value), dtype)
        self.w_theta, self.b_theta = weight(), bias(GATE_BIAS["theta"])
        self.w_eta, self.b_eta = weight(), bias(GATE_BIAS["eta"])
        self.w_alpha, self.b_alpha = weight(), bias(options.forget_bias)
        by_channel = options.channelwise_alpha
        channels = partial(param, rngs, (h, d), ("heads", "head_dim"))
        self.w_channels = into() if by_channel else None
        self.b_channels = channels(constant(options.forget_bias), dtype) if by_channel else None
        start = init_memory(rngs.params(), h, d, options.depth, options.expansion)
        self.start = nnx.List(
            [nnx.Param(w.astype(dtype), axes=("heads", None, None)) for w in start]
        )

    def initial(self) -> list[Array]:
        """`M_0`: [H,d_in,d_out] a layer, float32."""
        return [w[...].astype(jnp.promote_types(w[...].dtype, jnp.float32)) for w in self.start]


class WindowAttention(nnx.Module):
    """Projections of the attention branch."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        m, h, k, d = cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        dtype, kv_axes = cfg.param_dtype, ("embed", "kv_heads", "head_dim")
        self.wq = param(rngs, (m, h, d), ("embed", "heads", "head_dim"), fan_in(1), dtype)
        self.wk = param(rngs, (m, k, d), kv_axes, fan_in(1), dtype)
        self.wv = param(rngs, (m, k, d), kv_axes, fan_in(1), dtype)
        self.wo = out_projection(cfg, rngs)


class Branches(nnx.Module):
    """Learnable vectors of `gate(a, m) = rms(a) g_a * act(rms(m) g_m)`."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        vector = lambda: param(rngs, (cfg.model_dim,), ("act_embed",), ones, cfg.param_dtype)
        self.attention, self.memory = vector(), vector()


class OutputGate(nnx.Module):
    """`rms_d(y) g * silu(x W_G)`: what the memory alone puts before its output projection."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        m, h, d, dtype = cfg.model_dim, cfg.num_heads, cfg.head_dim, cfg.param_dtype
        self.weight = param(rngs, (m, h, d), ("embed", "heads", "head_dim"), fan_in(1), dtype)
        self.norm = param(rngs, (d,), ("head_dim",), ones, dtype)


def out_projection(cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.Param:
    """Heads [H,D] to the residual width, smaller with depth as the decoder's own."""
    h, d, m = cfg.num_heads, cfg.head_dim, cfg.model_dim
    init = normal((h * d * 2 * cfg.num_layers) ** -0.5)
    return param(rngs, (h, d, m), ("heads", "head_dim", "embed"), init, cfg.param_dtype)


def to_heads(x: Array, weight: nnx.Param, axes: tuple = HEADS) -> Array:
    """[B,T,M] and [M,H,D] -> [B,T,H,D], as one product of matrices."""
    w = weight[...].astype(x.dtype)
    y = jnp.einsum("btm,mn->btn", x, constrain(w.reshape(w.shape[0], -1), (None, axes[2])))
    return constrain(y.reshape(*x.shape[:2], *w.shape[1:]), axes)


def from_heads(z: Array, weight: nnx.Param) -> Array:
    """[B,T,H,D] and [H,D,M] -> [B,T,M]."""
    w = weight[...].astype(z.dtype)
    return jnp.einsum("btn,nm->btm", z.reshape(*z.shape[:2], -1), w.reshape(-1, w.shape[-1]))


def rms(x: Array, weight: Array, eps: float) -> Array:
    """RMSNorm over the last axis, in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


def l2_normalize(x: Array) -> Array:
    """Unit length along the last axis, in float32; the gradient at 0 is finite."""
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = y * jax.lax.rsqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True) + L2_EPS)
    return y.astype(x.dtype)


GATE_FNS = {"sigmoid": jax.nn.sigmoid, "silu": jax.nn.silu, "tanh": jnp.tanh}


def gate(branches: Branches, a: Array, m: Array, act_name: str, eps: float) -> Array:
    """`rms(a; g_a) * act(rms(m; g_m))`, [B,T,M]."""
    act = GATE_FNS[act_name]
    return rms(a, branches.attention[...], eps) * act(rms(m, branches.memory[...], eps))


class Links(NamedTuple):
    """Which earlier tokens the convolution of each token reaches."""

    reaches: Array
    """[B,T,w-1] bool: the j-th token before is of the same document, as are those between."""
    ids: Array
    """[B,w-1] document ids of the last tokens, for the next call."""
    count: Array | None = None
    """[B] tokens of the call where padding follows them; None: all."""


def links(ids: Array, tail_ids: Array, count: Array | None = None) -> Links:
    """Which tokens belong together.

    Args:
      ids: [B,T] documents, 0 for padding.
      tail_ids: [B,w-1] of the tokens before.
      count: [B] tokens of each row, when its padding is at the end and the next call goes on
        before it; None: what follows comes after all T.
    """
    width, length = tail_ids.shape[1], ids.shape[1]
    held = jnp.concatenate([tail_ids, ids], axis=1)
    reaches, so_far = [], ids != 0
    for j in range(1, width + 1):
        so_far = so_far & (held[:, width - j : width - j + length] == ids)
        reaches.append(so_far)
    return Links(jnp.stack(reaches, axis=-1), last(held, width, count), count)


def last(held: Array, width: int, count: Array | None) -> Array:
    """The `width` values of held [B,width+T,...] that end with token number `count`."""
    if count is None:
        return held[:, held.shape[1] - width :]
    at = count[:, None] + jnp.arange(width)
    return jnp.take_along_axis(held, at.reshape(*at.shape, *(1,) * (held.ndim - 2)), axis=1)


def convolve(
    u: Array,
    kernel: nnx.Param | None,
    tail: Array | None,
    joined: Links | None = None,
    lead: Array | None = None,
) -> tuple[Array, Array | None]:
    """Causal depthwise convolution `y_t = sum_j kernel_j u_{t-j}` over [B,T,H,D].

    Args:
      u: [B,T,H,D].
      kernel: [w,H,D], the current token's row first; None: the identity.
      tail: [B,w-1,H,D] values before `u`; None: zeros, or `lead`.
      joined: what of the past counts; None: all of it.
      lead: [w-1,H,D] values that stand before the first token of every document.
    Returns:
      (y, the last w-1 values).
    """
    if kernel is None:
        return u, tail
    w = kernel[...].astype(u.dtype)
    reach, (batch, length) = w.shape[0] - 1, u.shape[:2]
    if tail is None:
        before = jnp.zeros((reach, *u.shape[2:]), u.dtype) if lead is None else lead
        tail = jnp.broadcast_to(before.astype(u.dtype), (batch, *before.shape))
    held = jnp.concatenate([tail.astype(u.dtype), u], axis=1)
    y = w[0] * u
    for j in range(1, reach + 1):
        past = held[:, reach - j : reach - j + length]
        if joined is not None:
            past = jnp.where(joined.reaches[:, :, j - 1, None, None], past, 0)
        y = y + w[j] * past
    if joined is not None and lead is not None:
        count = jnp.sum(joined.reaches, axis=-1)  # [B,T]: tokens of the document within reach
        rows = [sum(w[j] * lead[reach - j + n].astype(u.dtype) for j in range(n + 1, reach + 1))
                for n in range(reach)]  # fmt: skip
        y = y + jnp.stack([*rows, jnp.zeros_like(w[0])])[count]
    return y, last(held, reach, None if joined is None else joined.count)


class Tails(NamedTuple):
    """[B,w-1,H,D] inputs of the convolutions before the next token; None without convolution."""

    k: Array | None
    v: Array | None
    q: Array | None


class Tokens(NamedTuple):
    """What the memory is given: k, v, q [B,T,H,D]; theta, eta, alpha [B,T,H] or [B,T,H,L]; and
    channel_alpha [B,T,H,D] where the first layer's input channels are forgotten one by one."""

    k: Array
    v: Array
    q: Array
    theta: Array
    eta: Array
    alpha: Array
    channel_alpha: Array | None = None


def project_one(memory, name: str, x: Array, tail, joined, lead) -> tuple[Array, Array | None]:
    """`silu(conv(x W))` for one of "k", "v", "q", before normalisation; and its tail."""
    u = to_heads(x, getattr(memory, f"w{name}"))
    y, tail = convolve(u, getattr(memory, f"conv_{name}"), tail, joined, lead)
    return jax.nn.silu(y), tail


def query(memory, x: Array, tail=None, joined=None) -> tuple[Array, Array | None]:
    """Queries of the memory alone, [B,T,H,D] of unit length; and their tail."""
    q, tail = project_one(memory, "q", x, tail, joined, None)
    return l2_normalize(q), tail


def project(
    memory: NeuralMemory,
    options: MemoryOptions,
    x: Array,
    *,
    tails: Tails | None = None,
    joined: Links | None = None,
    leads: Tails | None = None,
    tap: Tap = NO_TAP,
) -> tuple[Tokens, Tails]:
    """What the memory is given for tokens x [B,T,M]; and the tails for the next call."""
    none = Tails(None, None, None)
    tails, leads = tails or none, leads or none
    (k, tail_k), (v, tail_v), (q, tail_q) = (
        project_one(memory, n, x, getattr(tails, n), joined, getattr(leads, n)) for n in "kvq"
    )
    k, v = tap("mem_k", l2_normalize(k)), tap("mem_v", v)
    q = tap("mem_q", l2_normalize(q))

    def sigmoid_of(name: str) -> Array:
        weight, bias = getattr(memory, f"w_{name}")[...], getattr(memory, f"b_{name}")[...]
        wide = jnp.promote_types(x.dtype, jnp.float32)
        y = jnp.einsum("btm,mh...->bth...", x.astype(wide), weight.astype(wide))
        return jax.nn.sigmoid(y + bias.astype(wide))

    def gate_of(name: str, scale: float, use: bool, otherwise: float) -> Array:
        y = scale * sigmoid_of(name)
        y = y if use else jnp.full_like(y, otherwise)
        return tap(f"mem_{name}", y)

    theta = gate_of("theta", options.theta_max, options.learning, 0.0)
    eta = gate_of("eta", 1.0, options.momentum, 0.0)
    alpha = gate_of("alpha", 1.0, options.forgetting, 0.0)
    channels = None
    if memory.w_channels is not None:
        channels = sigmoid_of("channels")
    return Tokens(k, v, q, theta, eta, alpha, channels), Tails(tail_k, tail_v, tail_q)
