"""Mixers whose kernel is a product of features, ``k(q_i, k_j) = phi(q_i) . phi(k_j)``.

        y_i = phi(q_i) . sum_j phi(k_j) v_j^T  /  phi(q_i) . sum_j phi(k_j)

The sums over j do not depend on i (or only on where they stop), so T tokens cost T, and a causal
mixer can run token by token with a state of fixed size.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.attention.masks import Mask
from jaxheads.attention.mixing.protocol import (
    Mixer,
    MixerCost,
    accumulator,
    head_values,
    hide,
    init_qkv,
    merge_heads,
    project,
)
from jaxheads.typing import Array, PyTree


def prefix_products(fq: Array, fk: Array, v: Array, *, chunk: int) -> Array:
    """``y_t = fq_t . sum_{s <= t} fk_s v_s^T`` in chunks: pairs inside, a running sum between.

    Args:
      fq: [B,T,H,R] features of the queries.
      fk: [B,T,H,R] features of the keys.
      v: [B,T,H,W].
      chunk: tokens compared pairwise; time T * chunk + T * R, no [T,T].
    Returns:
      [B,T,H,W].
    """
    batch, length, num_heads, rank = fq.shape
    chunk = min(chunk, length)
    padded = -(-length // chunk) * chunk

    def cut(x: Array) -> Array:  # [B,T,H,_] -> [chunks,B,C,H,_]
        x = jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0)))
        return jnp.moveaxis(x.reshape(batch, -1, chunk, num_heads, x.shape[-1]), 1, 0)

    def step(total: Array, one: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q, k, values = one
        inside = jnp.tril(jnp.einsum("bthr,bshr->bhts", q, k))
        y = jnp.einsum("bhts,bshw->bthw", inside, values)
        y += jnp.einsum("bthr,bhrw->bthw", q, total)
        return total + jnp.einsum("bshr,bshw->bhrw", k, values), y

    start = jnp.zeros((batch, num_heads, rank, v.shape[-1]), v.dtype)
    _, y = jax.lax.scan(step, start, (cut(fq), cut(fk), cut(v)))
    return jnp.moveaxis(y, 0, 1).reshape(batch, padded, num_heads, -1)[:, :length]


def normalised_product(fq: Array, fk: Array, v: Array, *, causal: bool, chunk: int) -> Array:
    """The mean of the values under the weights ``fq_i . fk_j``; zeros where all weights are zero.

    Args:
      fq, fk: [B,T,H,R] features.
      v: [B,T,H,W].
      causal: sum over j <= i only.
      chunk: see `prefix_products`.
    Returns:
      [B,T,H,W].
    """
    with_ones = _with_ones(v)
    if causal:
        sums = prefix_products(fq, fk, with_ones, chunk=chunk)
    else:
        total = jnp.einsum("bshr,bshw->bhrw", fk, with_ones)
        sums = jnp.einsum("bthr,bhrw->bthw", fq, total)
    return _divide(sums)


def density(fq: Array, fk: Array, *, causal: bool) -> Array:
    """The weights as a matrix with normalised rows, [B,H,T,T]."""
    weights = jnp.einsum("bthr,bshr->bhts", fq, fk)
    weights = jnp.tril(weights) if causal else weights
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


def _with_ones(v: Array) -> Array:
    """A last channel of ones, whose weighted sum is the denominator."""
    return jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), v.dtype)], axis=-1)


def _divide(sums: Array) -> Array:
    """Weighted sums over their denominator; zeros where there is no weight that can be told from 0.

    Dividing by the denominator as a constant first keeps the derivative finite where it is small.
    """
    empty = sums[..., -1:] < 8 * jnp.finfo(sums.dtype).tiny
    sums = sums * jax.lax.stop_gradient(1 / jnp.where(empty, 1, sums[..., -1:]))
    return jnp.where(empty, 0, sums[..., :-1] / jnp.where(empty, 1, sums[..., -1:]))


def _sums_cost(
    mixer: Mixer, length: int, rank: int, feature_flops: float, itemsize: int
) -> MixerCost:
    sums = 4.0 * length * mixer.num_heads * rank * (mixer.head_dim + 1)
    return MixerCost(sums + feature_flops, 4.0 * length * mixer.model_dim * itemsize)


class FeatureState(NamedTuple):
    """What a causal mixer of features keeps between tokens: its size does not grow."""

    sums: Array
    """[B,H,R,D+1] sum of phi(k) v^T, and of phi(k) in the last column."""
    shift: Array
    """[B,H] log of the factor that the sums were divided by (0 for features without one)."""


def _empty_state(mixer: Mixer, rank: int, batch_size: int, dtype: jnp.dtype) -> FeatureState:
    shape = (batch_size, mixer.num_heads, rank, mixer.head_dim + 1)
    return FeatureState(jnp.zeros(shape, dtype), jnp.full(shape[:2], -jnp.inf, dtype))


def elu_features(x: Array) -> Array:
    """elu(x) + 1, positive; in float32 or better."""
    return jax.nn.elu(x.astype(accumulator(x))) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureMixer(Mixer):
    """What mixers of features share; they differ in phi.

    Attributes:
      chunk: tokens compared pairwise in the causal form.
    """

    chunk: int = 64

    is_data_dependent = True

    def _features(self, params: PyTree, x: Array, mask: Mask) -> tuple[Array, Array]:
        """phi(q), phi(k) [B,T,H,R]; keys that `mask` hides have none."""
        raise NotImplementedError

    def apply(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """See `Mixer.apply`."""
        fq, fk = self._features(params, x, self.check(x, causal=causal, mask=mask))
        (v,) = project(params, x, "wv")
        z = normalised_product(fq, fk, v.astype(fk.dtype), causal=causal, chunk=self.chunk)
        return merge_heads(z).astype(x.dtype)

    def matrix(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """[B,H,T,T]."""
        fq, fk = self._features(params, x, self.check(x, causal=causal, mask=mask))
        return density(fq, fk, causal=causal)

    def values(self, params: PyTree, x: Array) -> Array:
        """X W_v, [B,H,T,D]."""
        return head_values(params, x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttention(FeatureMixer):
    """Kernel smoother with ``k = phi(q) . phi(k)``, ``phi = elu + 1``; T M D.

    References: Katharopoulos et al., 2020, arXiv:2006.16236.
    """

    name = "linear"

    def init(self, key: Array) -> PyTree:
        """wq, wk, wv [M,H,D]."""
        return init_qkv(key, self)

    def _features(self, params: PyTree, x: Array, mask: Mask) -> tuple[Array, Array]:
        q, k = project(params, x, "wq", "wk")
        return elu_features(q), hide(elu_features(k), mask)

    def init_state(self, params: PyTree, batch_size: int, dtype=jnp.float32) -> FeatureState:
        """The state before the first token."""
        state = _empty_state(self, self.head_dim, batch_size, dtype)
        return state._replace(shift=jnp.zeros_like(state.shift))

    def step(self, params: PyTree, state: FeatureState, x: Array) -> tuple[FeatureState, Array]:
        """One token, [B,M] -> [B,M]: the causal form as a recurrence."""
        q, k, v = (z[:, 0] for z in project(params, x[:, None], "wq", "wk", "wv"))  # [B,H,D]
        fq, fk = elu_features(q), elu_features(k)
        sums = state.sums + jnp.einsum("bhr,bhw->bhrw", fk, _with_ones(v.astype(fk.dtype)))
        z = _divide(jnp.einsum("bhr,bhrw->bhw", fq, sums))
        return state._replace(sums=sums), z.reshape(x.shape).astype(x.dtype)

    def cost(self, length: int, *, causal: bool = False, itemsize: int = 4) -> MixerCost:
        """2 T M (D + 1) operations each to write the sums and to read them."""
        return _sums_cost(self, length, self.head_dim, 0.0, itemsize)


def orthogonal_rows(key: Array, num_rows: int, dim: int) -> Array:
    """[R,D] rows distributed as N(0, I), orthogonal to each other in blocks of D.

    The signs make the factorisation unique, and its directions uniform: Householder's choice of
    signs leaves half of the sphere empty, which would bias every kernel estimate.
    """
    block_key, norm_key = jax.random.split(key)
    blocks = -(-num_rows // dim)
    gaussians = jax.random.normal(block_key, (blocks, dim, dim))
    q, r = jnp.linalg.qr(gaussians)
    q = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None, :]
    directions = jnp.swapaxes(q, 1, 2).reshape(blocks * dim, dim)[:num_rows]
    norms = jnp.linalg.norm(jax.random.normal(norm_key, (num_rows, dim)), axis=-1)
    return directions * norms[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Performer(FeatureMixer):
    """Softmax attention with its kernel estimated by positive random features; T R M.

        phi(x) = exp(w . x' - |x'|^2 / 2) / sqrt(R),   x' = x / D^(1/4)

    The rows w are drawn at initialisation and not trained. Common factors of the features leave
    the mean of the values unchanged and are divided out before the exponential, so that nothing
    overflows.

    Attributes:
      num_features: R.
    References: Choromanski et al., 2020, arXiv:2009.14794.
    """

    num_features: int = 128

    name = "performer"

    def init(self, key: Array) -> PyTree:
        """wq, wk, wv [M,H,D] and the random rows `features` [R,D]."""
        qkv_key, feature_key = jax.random.split(key)
        rows = orthogonal_rows(feature_key, self.num_features, self.head_dim)
        return {**init_qkv(qkv_key, self), "features": rows}

    def log_features(self, params: PyTree, x: Array) -> Array:
        """log phi: [...,D] -> [...,R], without the factor 1/sqrt(R), which cancels."""
        x = x.astype(accumulator(x)) / math.sqrt(math.sqrt(x.shape[-1]))
        rows = jax.lax.stop_gradient(params["features"]).astype(x.dtype)
        return x @ rows.T - 0.5 * jnp.sum(jnp.square(x), axis=-1, keepdims=True)

    def _features(self, params: PyTree, x: Array, mask: Mask) -> tuple[Array, Array]:
        q, k = (self.log_features(params, z) for z in project(params, x, "wq", "wk"))
        if mask.key_mask is not None:  # tokens that are away have no say in the common factor
            k = jnp.where(mask.key_mask[:, :, None, None], k, jnp.finfo(k.dtype).min / 2)
        return _exp_below(q, axes=(3,)), hide(_exp_below(k, axes=(1, 3)), mask)

    def init_state(self, params: PyTree, batch_size: int, dtype=jnp.float32) -> FeatureState:
        """The state before the first token."""
        return _empty_state(self, self.num_features, batch_size, dtype)

    def step(self, params: PyTree, state: FeatureState, x: Array) -> tuple[FeatureState, Array]:
        """One token, [B,M] -> [B,M]: the causal form as a recurrence."""
        q, k, v = (z[:, 0] for z in project(params, x[:, None], "wq", "wk", "wv"))  # [B,H,D]
        log_k = self.log_features(params, k)  # [B,H,R]
        shift = jnp.maximum(state.shift, log_k.max(axis=-1))
        new = jnp.einsum(
            "bhr,bhw->bhrw", jnp.exp(log_k - shift[..., None]), _with_ones(v.astype(log_k.dtype))
        )
        sums = state.sums * jnp.exp(state.shift - shift)[..., None, None] + new
        fq = _exp_below(self.log_features(params, q), axes=(2,))
        z = _divide(jnp.einsum("bhr,bhrw->bhw", fq, sums))
        return FeatureState(sums, shift), z.reshape(x.shape).astype(x.dtype)

    def cost(self, length: int, *, causal: bool = False, itemsize: int = 4) -> MixerCost:
        """Features of queries and keys (4 T R M), then sums of rank R (4 T R M)."""
        features = 4.0 * length * self.num_features * self.model_dim
        return _sums_cost(self, length, self.num_features, features, itemsize)


def _exp_below(log_features: Array, axes: tuple[int, ...]) -> Array:
    """exp, divided by its largest value over `axes`, a factor that cancels in the mean."""
    highest = jnp.max(log_features, axis=axes, keepdims=True)
    return jnp.exp(log_features - jax.lax.stop_gradient(highest))
