"""Mixers whose matrix does not depend on the tokens: transforms, learned weights, pooling."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

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
)
from jaxheads.fields import unknown
from jaxheads.typing import Array, PyTree


def _square(matrix: Array, x: Array, parts: Mask) -> Array:
    """A matrix [T,T] for every sequence, [B,1,T,T], without columns of tokens that are away."""
    length = x.shape[1]
    return hide_columns(jnp.broadcast_to(matrix, (x.shape[0], 1, length, length)), parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity(Mixer):
    """``M = I``: no token reads another."""

    name = "identity"
    is_data_dependent = False

    def apply(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """See `Mixer.apply`."""
        return hide(x, self.check(x, causal=causal, mask=mask))

    def matrix(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """[B,1,T,T]."""
        parts = self.check(x, causal=causal, mask=mask)
        return _square(jnp.eye(x.shape[1], dtype=accumulator(x)), x, parts)

    def values(self, params: PyTree, x: Array) -> Array:
        """X, [B,1,T,M]."""
        return x[:, None]

    def cost(self, length: int, *, causal: bool = False, itemsize: int = 4) -> MixerCost:
        """Nothing."""
        return MixerCost(0.0, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pooling(Mixer):
    """Mean over a window of tokens, minus the token itself; T M.

    The window is centred (causal: it ends at the token) and counts only tokens that are there.

    Attributes:
      window: tokens in it, odd so that it has a centre.
    References: Yu et al., 2021, arXiv:2111.11418.
    """

    window: int = 3

    name = "pooling"
    is_data_dependent = False

    def __post_init__(self):
        super().__post_init__()
        if self.window % 2 == 0:
            raise ValueError(f"window={self.window} has no centre; take an odd number of tokens.")

    def _window_sum(self, x: Array, causal: bool) -> Array:
        """[B,T,_] -> the sum over each token's window."""
        before = self.window - 1 if causal else self.window // 2
        padded = jnp.pad(x, ((0, 0), (before, self.window - 1 - before), (0, 0)))
        shifted = (padded[:, n : n + x.shape[1]] for n in range(self.window))
        return functools.reduce(jnp.add, shifted)

    def apply(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """See `Mixer.apply`."""
        parts = self.check(x, causal=causal, mask=mask)
        seen = hide(x.astype(accumulator(x)), parts)
        counts = self._window_sum(hide(jnp.ones((*x.shape[:2], 1), seen.dtype), parts), causal)
        mean = self._window_sum(seen, causal) / jnp.maximum(counts, 1)
        return (mean - seen).astype(x.dtype)

    def matrix(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """[B,1,T,T]."""
        parts = self.check(x, causal=causal, mask=mask)
        t = jnp.arange(x.shape[1])
        ahead = t[:, None] - t[None, :]
        near = (ahead >= 0) & (ahead < self.window)
        near = near if causal else jnp.abs(ahead) <= self.window // 2
        near = _square(near.astype(accumulator(x)), x, parts)
        mean = near / jnp.maximum(near.sum(axis=-1, keepdims=True), 1)
        return mean - _square(jnp.eye(len(t), dtype=near.dtype), x, parts)

    def values(self, params: PyTree, x: Array) -> Array:
        """X, [B,1,T,M]."""
        return x[:, None]

    def cost(self, length: int, *, causal: bool = False, itemsize: int = 4) -> MixerCost:
        """A window of additions, a division and a subtraction per number."""
        size = float(length * self.model_dim)
        return MixerCost((self.window + 1) * size, 2 * size * itemsize)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FNet(Mixer):
    """``Re(F^s X F^h)``, unnormalised discrete Fourier transforms over tokens and channels.

    The matrix is F^s, complex, and the values are X F^h, complex; Y is the real part of their
    product. T M log(T M), no parameters, and no causal form.

    References: Lee-Thorp et al., 2021, arXiv:2105.03824.
    """

    name = "fnet"
    is_data_dependent = False
    has_causal_form = False

    def apply(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """See `Mixer.apply`."""
        seen = hide(x.astype(accumulator(x)), self.check(x, causal=causal, mask=mask))
        return jnp.fft.fft2(seen, axes=(1, 2)).real.astype(x.dtype)

    def matrix(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """F^s, [B,1,T,T] complex."""
        parts = self.check(x, causal=causal, mask=mask)
        transform = jnp.fft.fft(jnp.eye(x.shape[1], dtype=accumulator(x)), axis=0)
        return _square(transform, x, parts)

    def values(self, params: PyTree, x: Array) -> Array:
        """X F^h, [B,1,T,M] complex."""
        return jnp.fft.fft(x.astype(accumulator(x)), axis=2)[:, None]

    def cost(self, length: int, *, causal: bool = False, itemsize: int = 4) -> MixerCost:
        """5 N log2 N operations for transforms of N = T M numbers."""
        size = float(length * self.model_dim)
        return MixerCost(5.0 * size * math.log2(max(size, 2.0)), 2 * size * itemsize)


_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": jax.nn.gelu,
    "identity": lambda x: x,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPMixer(Mixer):
    """``W2 gelu(W1 X)`` over the tokens, W1 [R,T], W2 [T,R], the same for all channels; T R M.

    With the nonlinearity there is no single matrix, and `matrix` refuses; with
    ``activation="identity"`` it is W2 W1. GELU in its tanh form, as in the published model.

    Attributes:
      hidden: R.
      activation: "gelu" or "identity".
    References: Tolstikhin et al., 2021, arXiv:2105.01601.
    """

    hidden: int = 128
    activation: str = "gelu"

    name = "mlp_mixer"
    is_data_dependent = False
    has_causal_form = False

    def __post_init__(self):
        super().__post_init__()
        if self.activation not in _ACTIVATIONS:
            raise ValueError(unknown("activation", self.activation, _ACTIVATIONS))

    def init(self, key: Array) -> PyTree:
        """w1 [R,T] and w2 [T,R], normal with deviations 1/sqrt(T) and 1/sqrt(R)."""
        k1, k2 = jax.random.split(key)
        return {
            "w1": normal(k1, (self.hidden, self.length), self.length**-0.5),
            "w2": normal(k2, (self.length, self.hidden), self.hidden**-0.5),
        }

    def _weights(self, params: PyTree, x: Array) -> tuple[Array, Array]:
        length = x.shape[1]
        fits(x, params["w2"].shape[0], self.name)
        return params["w1"][:, :length].astype(x.dtype), params["w2"][:length].astype(x.dtype)

    def apply(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """See `Mixer.apply`."""
        seen = hide(x, self.check(x, causal=causal, mask=mask))
        w1, w2 = self._weights(params, x)
        hidden = _ACTIVATIONS[self.activation](jnp.einsum("rs,bsm->brm", w1, seen))
        return jnp.einsum("tr,brm->btm", w2, hidden)

    def matrix(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """W2 W1, [B,1,T,T], when linear."""
        if self.activation != "identity":
            raise NotImplementedError(
                f"mixer {self.name!r} with activation={self.activation!r} is no product of one "
                "matrix and values; activation='identity' has the matrix W2 W1."
            )
        parts = self.check(x, causal=causal, mask=mask)
        w1, w2 = self._weights(params, x)
        return _square(w2 @ w1, x, parts)

    def values(self, params: PyTree, x: Array) -> Array:
        """X, [B,1,T,M]."""
        return x[:, None]

    def cost(self, length: int, *, causal: bool = False, itemsize: int = 4) -> MixerCost:
        """Two products of 2 T R M operations."""
        tokens, weights = 2.0 * length * self.model_dim, 2.0 * length * self.hidden
        flops = 4.0 * length * self.hidden * self.model_dim
        return MixerCost(flops, (tokens + weights) * itemsize)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GMLP(Mixer):
    """``U * (W V + b)``: half of the channels gates the other half, mixed over tokens; T^2 M.

    X = [U, V] along the channels; W [T,T] starts near 0 and b [T] at 1, so that the mixer starts
    as the identity on U. Causal: the lower triangle of W. As an operator on V it is
    ``M_cij = U_ic W_ij`` for each channel c, and `offset` is ``U * b``.

    References: Liu et al., 2021, arXiv:2105.08050.
    """

    name = "gmlp"
    is_data_dependent = True

    def __post_init__(self):
        super().__post_init__()
        if self.model_dim % 2:
            raise ValueError(f"model_dim={self.model_dim} is odd; gMLP splits it into two halves.")

    @property
    def output_dim(self) -> int:
        """M / 2."""
        return self.model_dim // 2

    def init(self, key: Array) -> PyTree:
        """w [T,T], normal with deviation 1e-3 / sqrt(T), and b [T] of ones."""
        shape = (self.length, self.length)
        return {
            "w": normal(key, shape, 1e-3 * self.length**-0.5),
            "b": jnp.ones(self.length, jnp.float32),
        }

    def _parts(self, params: PyTree, x: Array, causal: bool) -> tuple[Array, Array, Array, Array]:
        """U, V [B,T,M/2], w [T,T], b [T]."""
        fits(x, params["b"].shape[0], self.name)
        if x.shape[-1] % 2:
            raise ValueError(f"x has {x.shape[-1]} channels; gMLP splits them into two halves.")
        u, v = jnp.split(x, 2, axis=-1)
        length = x.shape[1]
        w = params["w"][:length, :length].astype(x.dtype)
        return u, v, jnp.tril(w) if causal else w, params["b"][:length].astype(x.dtype)

    def apply(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """See `Mixer.apply`; Y is [B,T,M/2]."""
        parts = self.check(x, causal=causal, mask=mask)
        u, v, w, b = self._parts(params, x, causal)
        return u * (jnp.einsum("ts,bsc->btc", w, hide(v, parts)) + b[:, None])

    def matrix(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """U_ic W_ij, [B,M/2,T,T]."""
        parts = self.check(x, causal=causal, mask=mask)
        u, _, w, _ = self._parts(params, x, causal)
        return hide_columns(jnp.einsum("btc,ts->bcts", u, w), parts)

    def values(self, params: PyTree, x: Array) -> Array:
        """V, [B,M/2,T,1]."""
        v = jnp.split(x, 2, axis=-1)[1]
        return jnp.swapaxes(v, 1, 2)[..., None]

    def offset(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """U * b, [B,T,M/2]."""
        u, _, _, b = self._parts(params, x, causal)
        return u * b[:, None]

    def cost(self, length: int, *, causal: bool = False, itemsize: int = 4) -> MixerCost:
        """T^2 M operations for the product, T M for bias and gate."""
        flops = float(length * length * self.model_dim) / (2 if causal else 1)
        numbers = 1.5 * length * self.model_dim + length * length / (2 if causal else 1) + length
        return MixerCost(flops + length * self.model_dim, numbers * itemsize)
