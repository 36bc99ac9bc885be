"""Mixers whose rows are densities over the tokens: softmax, kernel smoothers, sparse softmax.

Row i of the matrix is p(j | i) and Y_i the expectation of the values under it. All pairs that a
mask leaves are compared: T^2 of them, or those of a sparse pattern.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.attention.api import attention
from jaxheads.attention.masks import Mask
from jaxheads.attention.mixing.protocol import (
    Mixer,
    MixerCost,
    accumulator,
    combine,
    head_values,
    init_qkv,
    merge_heads,
    project,
)
from jaxheads.fields import unknown
from jaxheads.typing import Array, PyTree


def masked_softmax(scores: Array, visible: Array | None) -> Array:
    """Softmax over the last axis and what is visible of it; zeros where nothing is."""
    if visible is None:
        return jax.nn.softmax(scores, axis=-1)
    hidden = jnp.finfo(scores.dtype).min / 2
    return jnp.where(visible, jax.nn.softmax(jnp.where(visible, scores, hidden), axis=-1), 0)


def scaled_scores(q: Array, k: Array) -> Array:
    """q_i . k_j / sqrt(D): [B,T,H,D], [B,S,H,D] -> [B,H,T,S], accumulated in float32 or better."""
    wide = accumulator(q)
    return jnp.einsum("bthd,bshd->bhts", q.astype(wide), k.astype(wide)) / math.sqrt(q.shape[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax(Mixer):
    """``M_ij = softmax_j(q_i . k_j / sqrt(D))``, the attention of transformers; T^2 M.

    `apply` runs the library's own attention, so long sequences are computed in blocks and
    accelerators use their kernels.
    """

    name = "softmax"
    is_data_dependent = True
    takes_pair_mask = True

    def init(self, key: Array) -> PyTree:
        """wq, wk, wv [M,H,D]."""
        return init_qkv(key, self)

    def apply(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """See `Mixer.apply`."""
        parts = self.check(x, causal=causal, mask=mask)
        q, k, v = project(params, x, "wq", "wk", "wv")
        return merge_heads(_attend(q, k, v, parts))

    def matrix(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """[B,H,T,T]."""
        visible = self.check(x, causal=causal, mask=mask).materialize(x.shape[1], x.shape[1])
        return masked_softmax(scaled_scores(*project(params, x, "wq", "wk")), visible)

    def values(self, params: PyTree, x: Array) -> Array:
        """X W_v, [B,H,T,D]."""
        return head_values(params, x)

    def cost(self, length: int, *, causal: bool = False, itemsize: int = 4) -> MixerCost:
        """Two products of 2 T^2 M operations; half the pairs when causal."""
        return _pairs_cost(self, length, _all_pairs(length, causal), itemsize)


def _attend(q: Array, k: Array, v: Array, mask: Mask) -> Array:
    return cast(Array, attention(q, k, v, mask))


def _all_pairs(length: int, causal: bool) -> float:
    return length * (length + 1) / 2 if causal else float(length * length)


def _pairs_cost(mixer: Mixer, length: int, pairs: float, itemsize: int) -> MixerCost:
    return MixerCost(4.0 * pairs * mixer.model_dim, 4.0 * length * mixer.model_dim * itemsize)


def log_rbf(q: Array, k: Array) -> Array:
    """-|q_i - k_j|^2 / (2 sqrt(D)), [B,H,T,S]."""
    wide = accumulator(q)
    half = 0.5 / math.sqrt(q.shape[-1])
    q_norms, k_norms = (
        half * jnp.swapaxes(jnp.sum(jnp.square(z.astype(wide)), axis=-1), 1, 2) for z in (q, k)
    )  # [B,H,T]
    return scaled_scores(q, k) - q_norms[..., :, None] - k_norms[..., None, :]


_LOG_KERNELS: Mapping[str, Callable[[Array, Array], Array]] = {
    "exp": scaled_scores,
    "rbf": log_rbf,
}
_KERNELS = (*_LOG_KERNELS, "poly")


def polynomial_density(q: Array, k: Array, visible: Array | None, degree: int) -> Array:
    """(1 + q.k / sqrt(D))^degree, rows normalised; zeros for a row without weight."""
    weights = (1.0 + scaled_scores(q, k)) ** degree
    weights = weights if visible is None else jnp.where(visible, weights, 0)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelSmoother(Mixer):
    """``M_ij = k(q_i, k_j) / sum_j k(q_i, k_j)`` for a positive kernel k; T^2 M.

        exp    exp(q.k / sqrt(D))                softmax attention
        rbf    exp(-|q - k|^2 / (2 sqrt(D)))     the Nadaraya-Watson estimator
        poly   (1 + q.k / sqrt(D))^degree        even degrees are positive

    Attributes:
      kernel: "exp", "rbf" or "poly".
      degree: of the polynomial, even.
    References: Tsai et al., 2019, arXiv:1908.11775.
    """

    kernel: str = "rbf"
    degree: int = 2

    name = "kernel"
    is_data_dependent = True
    takes_pair_mask = True

    def __post_init__(self):
        super().__post_init__()
        if self.kernel not in _KERNELS:
            raise ValueError(unknown("kernel", self.kernel, _KERNELS))
        if self.degree % 2:
            raise ValueError(
                f"degree={self.degree} makes some weights negative, and a density has none; the "
                "degree of the polynomial kernel must be even."
            )

    def init(self, key: Array) -> PyTree:
        """wq, wk, wv [M,H,D]."""
        return init_qkv(key, self)

    def apply(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """See `Mixer.apply`."""
        y = combine(self.matrix(params, x, causal=causal, mask=mask), self.values(params, x))
        return y.astype(x.dtype)

    def matrix(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """[B,H,T,T]."""
        visible = self.check(x, causal=causal, mask=mask).materialize(x.shape[1], x.shape[1])
        q, k = project(params, x, "wq", "wk")
        if self.kernel in _LOG_KERNELS:
            return masked_softmax(_LOG_KERNELS[self.kernel](q, k), visible)
        return polynomial_density(q, k, visible, self.degree)

    def values(self, params: PyTree, x: Array) -> Array:
        """X W_v, [B,H,T,D]."""
        return head_values(params, x)

    def cost(self, length: int, *, causal: bool = False, itemsize: int = 4) -> MixerCost:
        """Two products of 2 T^2 M operations; half the pairs when causal."""
        return _pairs_cost(self, length, _all_pairs(length, causal), itemsize)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse(Mixer):
    """Softmax over a fixed pattern of pairs.

        local           |i - j| < window
        strided         (i - j) divisible by stride
        local+strided   either, the pattern of sparse transformers

    Strided attention of T divisible by the stride is computed per residue class: T^2 / stride.

    Attributes:
      pattern: "local", "strided" or "local+strided".
      window: w.
      stride: distance between the tokens of a residue class.
    References: Child et al., 2019, arXiv:1904.10509.
    """

    pattern: str = "local+strided"
    window: int = 32
    stride: int = 16

    name = "sparse"
    is_data_dependent = True
    takes_pair_mask = True

    def __post_init__(self):
        super().__post_init__()
        if self.pattern not in _PATTERNS:
            raise ValueError(unknown("pattern", self.pattern, _PATTERNS))

    def init(self, key: Array) -> PyTree:
        """wq, wk, wv [M,H,D]."""
        return init_qkv(key, self)

    def apply(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """See `Mixer.apply`."""
        parts = self.check(x, causal=causal, mask=mask)
        q, k, v = project(params, x, "wq", "wk", "wv")
        length = x.shape[1]
        if self.pattern == "local":
            z = _attend(q, k, v, dataclasses.replace(parts, window=self.window))
        elif self.pattern == "strided" and length % self.stride == 0 and parts.head_mask is None:
            z = self._by_residue(q, k, v, parts)
        else:
            z = _attend(q, k, v, dataclasses.replace(parts, head_mask=self._visible(parts, length)))
        return merge_heads(z)

    def _by_residue(self, q: Array, k: Array, v: Array, parts: Mask) -> Array:
        """Attention inside each class of equal positions modulo the stride."""

        def fold(a: Array) -> Array:  # [B,T,...] -> [B*stride,T/stride,...]
            a = a.reshape(a.shape[0], -1, self.stride, *a.shape[2:])
            return jnp.swapaxes(a, 1, 2).reshape(-1, a.shape[1], *a.shape[3:])

        keys = None if parts.key_mask is None else fold(parts.key_mask)
        z = _attend(fold(q), fold(k), fold(v), dataclasses.replace(parts, key_mask=keys))
        z = z.reshape(q.shape[0], self.stride, -1, *z.shape[2:])  # [B,stride,T/stride,H,D]
        return jnp.swapaxes(z, 1, 2).reshape(q.shape)

    def _visible(self, parts: Mask, length: int) -> Array:
        """The pattern, and what the caller's own pairs leave of it: broadcasts to [B,H,T,T]."""
        distance = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
        pattern = jnp.asarray(_PATTERNS[self.pattern](distance, self.window, self.stride))
        return pattern[None, None] if parts.head_mask is None else pattern & parts.head_mask

    def matrix(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """[B,H,T,T]."""
        parts = self.check(x, causal=causal, mask=mask)
        length = x.shape[1]
        pattern = dataclasses.replace(parts, head_mask=self._visible(parts, length))
        scores = scaled_scores(*project(params, x, "wq", "wk"))
        return masked_softmax(scores, pattern.materialize(length, length))

    def values(self, params: PyTree, x: Array) -> Array:
        """X W_v, [B,H,T,D]."""
        return head_values(params, x)

    def cost(self, length: int, *, causal: bool = False, itemsize: int = 4) -> MixerCost:
        """As softmax for the pairs of the pattern, counted."""
        distance = np.arange(length)
        there = _PATTERNS[self.pattern](distance, self.window, self.stride)
        earlier = float(np.sum((length - distance) * there))
        pairs = earlier if causal else 2 * earlier - length * bool(there[0])
        return _pairs_cost(self, length, pairs, itemsize)


# (|i - j|, window, stride) -> whether i and j see each other
_PATTERNS: Mapping[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "local": lambda distance, window, stride: distance < window,
    "strided": lambda distance, window, stride: distance % stride == 0,
    "local+strided": lambda distance, window, stride: (
        (distance < window) | (distance % stride == 0)
    ),
}
