"""Mixers that are causal convolutions of each channel: a free kernel, or a state space's.

        y_t = sum_{s <= t} kappa_{t-s} x_s        M_ij = kappa_{i-j}, Toeplitz and lower triangular

The whole sequence goes through transforms of length 2T (so that nothing wraps around); token by
token, a state takes its place.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxheads.attention.masks import Mask
from jaxheads.attention.mixing.protocol import (
    Mixer,
    MixerCost,
    accumulator,
    fits,
    hide,
    hide_columns,
    normal,
    width_of,
)
from jaxheads.typing import Array, PyTree


def fft_convolve(x: Array, kernel: Array) -> Array:
    """Causal convolution of each channel by transforms of length 2T.

    Args:
      x: [B,T,M].
      kernel: [T,M], kappa_0 first.
    Returns:
      [B,T,M].
    """
    length = x.shape[1]
    transform = lambda a, axis: jnp.fft.rfft(a, n=2 * length, axis=axis)
    product = transform(x, 1) * transform(kernel, 0)
    return jnp.fft.irfft(product, n=2 * length, axis=1)[:, :length]


def toeplitz(kernel: Array) -> Array:
    """The matrix of a causal convolution: [T,M] -> [M,T,T] with entries kappa_{i-j}, j <= i."""
    t = jnp.arange(kernel.shape[0])
    ago = t[:, None] - t[None, :]
    entries = jnp.where((ago >= 0)[..., None], kernel[jnp.maximum(ago, 0)], 0)  # [T,T,M]
    return jnp.moveaxis(entries, -1, 0)


def _fft_flops(length: int, channels: int) -> float:
    """Three real transforms of length 2T and a complex product, per channel."""
    transform = 2.5 * (2 * length) * math.log2(2 * length)
    return channels * (3 * transform + 6 * (length + 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convolution(Mixer):
    """What causal convolutions share; they differ in kappa."""

    is_data_dependent = False

    def kernel(self, params: PyTree, length: int) -> Array:
        """kappa [T,M]."""
        raise NotImplementedError

    def apply(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """See `Mixer.apply`."""
        parts = self._check(params, x, causal, mask)
        seen = hide(x.astype(accumulator(x)), parts)
        kernel = self.kernel(params, x.shape[1]).astype(seen.dtype)
        return fft_convolve(seen, kernel).astype(x.dtype)

    def matrix(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """[B,M,T,T]."""
        parts = self._check(params, x, causal, mask)
        matrix = toeplitz(self.kernel(params, x.shape[1]).astype(accumulator(x)))
        return hide_columns(jnp.broadcast_to(matrix, (x.shape[0], *matrix.shape)), parts)

    def values(self, params: PyTree, x: Array) -> Array:
        """X, [B,M,T,1]."""
        return jnp.swapaxes(x, 1, 2)[..., None]

    def _check(self, params: PyTree, x: Array, causal: bool, mask: Array | None) -> Mask:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongConvolution(Convolution):
    """A free kernel as long as the sequence for each channel; T log(T) M.

    References: Poli et al., 2023, arXiv:2302.10866 (long convolutions as mixers).
    """

    name = "long_conv"

    def init(self, key: Array) -> PyTree:
        """kernel [T,M], normal with deviation 1/sqrt(T)."""
        return {"kernel": normal(key, (self.length, self.model_dim), self.length**-0.5)}

    def kernel(self, params: PyTree, length: int) -> Array:
        """kappa [T,M]."""
        return params["kernel"][:length]

    def _check(self, params: PyTree, x: Array, causal: bool, mask: Array | None) -> Mask:
        parts = self.check(x, causal=causal, mask=mask)
        width_of(x, params["kernel"].shape[1], "the kernels")
        fits(x, params["kernel"].shape[0], self.name)
        return parts

    def init_state(self, params: PyTree, batch_size: int, dtype=jnp.float32) -> Array:
        """The last inputs, [B,T,M], oldest first: a free kernel has no smaller state."""
        return jnp.zeros((batch_size, *params["kernel"].shape), dtype)

    def step(self, params: PyTree, state: Array, x: Array) -> tuple[Array, Array]:
        """One token, [B,M] -> [B,M], T M operations."""
        state = jnp.concatenate([state[:, 1:], x[:, None].astype(state.dtype)], axis=1)
        kernel = params["kernel"][::-1].astype(state.dtype)
        return state, jnp.einsum("btm,tm->bm", state, kernel).astype(x.dtype)

    def cost(self, length: int, *, causal: bool = False, itemsize: int = 4) -> MixerCost:
        """Transforms of length 2T of inputs, kernel and outputs."""
        numbers = 3.0 * length * self.model_dim
        return MixerCost(_fft_flops(length, self.model_dim), numbers * itemsize)


@dataclasses.dataclass(frozen=True, kw_only=True)
class S4D(Convolution):
    """A diagonal state space per channel, discretised by zero-order hold; scan or FFT.

        s_t = Abar s_{t-1} + Bbar x_t     y_t = 2 Re(C . s_t)     kappa_t = 2 Re(C . Abar^t Bbar)
        Abar = exp(dt A)                  Bbar = (Abar - 1) / A B

    States come in conjugate pairs, one of each is kept and the 2 Re(.) stands for the other.
    ``A_n = -1/2 + i pi n`` at the start (S4D-Lin), n = 0, 1, ...; the real part stays negative.

    Attributes:
      num_states: N, the states of a channel, both of every pair; even.
      dt_min, dt_max: range of the initial step sizes, drawn evenly on a logarithmic scale.
    References: Gu et al., 2022, arXiv:2206.11893.
    """

    num_states: int = 64
    dt_min: float = 1e-3
    dt_max: float = 1e-1

    name = "s4d"

    def __post_init__(self):
        super().__post_init__()
        if self.num_states % 2:
            raise ValueError(f"num_states={self.num_states} is odd; states come in pairs.")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(
                f"dt_min={self.dt_min} and dt_max={self.dt_max}; step sizes need "
                "0 < dt_min <= dt_max."
            )

    def init(self, key: Array) -> PyTree:
        """log_dt [M]; log_decay, frequency [M,N/2] (A = -exp(log_decay) + i frequency); b, c
        [M,N/2,2], real and imaginary part."""
        dt_key, c_key = jax.random.split(key)
        shape = (self.model_dim, self.num_states // 2)
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        one = jnp.broadcast_to(jnp.array([1.0, 0.0], jnp.float32), (*shape, 2))
        return {
            "log_dt": jax.random.uniform(dt_key, shape[:1], jnp.float32, low, high),
            "log_decay": jnp.full(shape, math.log(0.5), jnp.float32),
            "frequency": jnp.broadcast_to(math.pi * jnp.arange(shape[1], dtype=jnp.float32), shape),
            "b": one,
            "c": normal(c_key, (*shape, 2), math.sqrt(0.5)),
        }

    def discretise(self, params: PyTree) -> tuple[Array, Array]:
        """dt A [M,N/2] and C Bbar [M,N/2], both complex: kappa_t = 2 Re(C Bbar . exp(t dt A))."""
        a = jax.lax.complex(-jnp.exp(params["log_decay"]), params["frequency"])
        step = jnp.exp(params["log_dt"])[:, None] * a
        return step, _complex(params["c"]) * jnp.expm1(step) / a * _complex(params["b"])

    def kernel(self, params: PyTree, length: int) -> Array:
        """kappa [T,M]."""
        step, weights = self.discretise(params)
        powers = jnp.exp(jnp.arange(length)[:, None, None] * step)  # [T,M,N/2]
        return 2 * jnp.einsum("mn,tmn->tm", weights, powers).real

    def _check(self, params: PyTree, x: Array, causal: bool, mask: Array | None) -> Mask:
        width_of(x, params["log_dt"].shape[0], "the state spaces")
        return self.check(x, causal=causal, mask=mask)

    def init_state(self, params: PyTree, batch_size: int, dtype=jnp.complex64) -> Array:
        """s = 0, [B,M,N/2] complex."""
        return jnp.zeros((batch_size, *params["frequency"].shape), dtype)

    def step(self, params: PyTree, state: Array, x: Array) -> tuple[Array, Array]:
        """One token, [B,M] -> [B,M]: the recurrence. The state holds C s, as C is diagonal too."""
        step, weights = self.discretise(params)
        state = jnp.exp(step) * state + weights * x[..., None]
        return state, (2 * state.sum(axis=-1).real).astype(x.dtype)

    def cost(self, length: int, *, causal: bool = False, itemsize: int = 4) -> MixerCost:
        """The kernel (8 operations per state pair and token), then the convolution."""
        kernel = 8.0 * length * self.model_dim * self.num_states / 2
        flops = kernel + _fft_flops(length, self.model_dim)
        return MixerCost(flops, 2.0 * length * self.model_dim * itemsize)


def _complex(pairs: Array) -> Array:
    """[...,2] real and imaginary part -> [...] complex."""
    return jax.lax.complex(pairs[..., 0], pairs[..., 1])
