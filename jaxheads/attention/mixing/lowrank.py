"""Mixers whose matrix has low rank: keys and values are first gathered into a few rows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxheads.attention.masks import Mask
from jaxheads.attention.mixing.protocol import (
    Mixer,
    MixerCost,
    accumulator,
    fits,
    head_values,
    hide,
    hide_columns,
    init_qkv,
    merge_heads,
    normal,
    project,
)
from jaxheads.attention.mixing.smoothers import masked_softmax, scaled_scores
from jaxheads.typing import Array, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linformer(Mixer):
    """``softmax(Q (E K)^T / sqrt(D)) F V`` with learned E, F [R,T] shared by the heads; T R M.

    The matrix over the tokens is ``softmax(Q (E K)^T / sqrt(D)) F``. Every gathered key is made of
    all tokens, so there is no causal form.

    Attributes:
      rank: R.
    References: Wang et al., 2020, arXiv:2006.04768.
    """

    rank: int = 64

    name = "linformer"
    is_data_dependent = True
    has_causal_form = False

    def init(self, key: Array) -> PyTree:
        """wq, wk, wv [M,H,D]; e, f [R,T], normal with deviation 1/sqrt(T)."""
        qkv, *gathers = jax.random.split(key, 3)
        shape = (self.rank, self.length)
        rows = {w: normal(k, shape, self.length**-0.5) for w, k in zip(("e", "f"), gathers)}
        return {**init_qkv(qkv, self), **rows}

    def _density(self, params: PyTree, x: Array, mask: Mask) -> Array:
        """softmax(Q (E K)^T / sqrt(D)), [B,H,T,R]."""
        fits(x, params["e"].shape[1], self.name)
        q, k = project(params, x, "wq", "wk")
        e = params["e"][:, : x.shape[1]].astype(x.dtype)
        gathered = jnp.einsum("rs,bshd->brhd", e, hide(k, mask))
        return masked_softmax(scaled_scores(q, gathered), None)

    def apply(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """See `Mixer.apply`."""
        parts = self.check(x, causal=causal, mask=mask)
        weights = self._density(params, x, parts)
        (v,) = project(params, x, "wv")
        f = params["f"][:, : x.shape[1]].astype(x.dtype)
        gathered = jnp.einsum("rs,bshd->brhd", f, hide(v, parts))
        z = jnp.einsum("bhtr,brhd->bthd", weights, gathered.astype(weights.dtype))
        return merge_heads(z).astype(x.dtype)

    def matrix(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """[B,H,T,T]."""
        parts = self.check(x, causal=causal, mask=mask)
        weights = self._density(params, x, parts)
        rows = params["f"][:, : x.shape[1]].astype(weights.dtype)
        return hide_columns(jnp.einsum("bhtr,rs->bhts", weights, rows), parts)

    def values(self, params: PyTree, x: Array) -> Array:
        """X W_v, [B,H,T,D]."""
        return head_values(params, x)

    def cost(self, length: int, *, causal: bool = False, itemsize: int = 4) -> MixerCost:
        """Four products of 2 T R M operations."""
        tokens, rows = 4.0 * length * self.model_dim, 2.0 * self.rank * length
        return MixerCost(8.0 * length * self.rank * self.model_dim, (tokens + rows) * itemsize)


def pseudo_inverse(a: Array, iterations: int) -> Array:
    """Approximate pseudo-inverse of [...,R,R] by matrix products only (for accelerators).

    Z <- 1/4 Z (13 I - A Z (15 I - A Z (7 I - A Z))),   Z_0 = A^T / (|A|_1 |A|_inf)
    """
    eye = jnp.eye(a.shape[-1], dtype=a.dtype)
    magnitude = jnp.abs(a)
    bound = magnitude.sum(axis=-1).max(axis=-1) * magnitude.sum(axis=-2).max(axis=-1)
    z = jnp.swapaxes(a, -1, -2) / bound[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nystrom(Mixer):
    """``S1 pinv(S2) S3 V``, the softmax matrix rebuilt from R landmarks; T R M.

        S1 = softmax(Q Kl^T / sqrt(D))   S2 = softmax(Ql Kl^T / sqrt(D))   S3 = softmax(Ql K^T / ..)

    The landmarks Ql, Kl are the means of R segments of equal length, and R divides T. With R = T
    the matrix is that of softmax attention. A landmark is made of later tokens too, so there is no
    causal form.

    Attributes:
      num_landmarks: R.
      pinv_iterations: None = the exact pseudo-inverse (singular values); a number = that many
        steps of `pseudo_inverse` (the paper takes 6).
    References: Xiong et al., 2021, arXiv:2102.03902.
    """

    num_landmarks: int = 32
    pinv_iterations: int | None = None

    name = "nystrom"
    is_data_dependent = True
    has_causal_form = False

    def init(self, key: Array) -> PyTree:
        """wq, wk, wv [M,H,D]."""
        return init_qkv(key, self)

    def _factors(self, params: PyTree, x: Array, parts: Mask) -> tuple[Array, Array]:
        """S1 pinv(S2) [B,H,T,R] and S3 [B,H,R,T]."""
        batch, length, _ = x.shape
        if length % self.num_landmarks:
            padded = -(-length // self.num_landmarks) * self.num_landmarks
            raise ValueError(
                f"T={length} is not divisible by num_landmarks={self.num_landmarks}; pad to "
                f"{padded} tokens with a mask, or choose another number of landmarks."
            )
        q, k = (z.astype(accumulator(z)) for z in project(params, x, "wq", "wk"))
        there = jnp.ones((batch, length), bool) if parts.key_mask is None else parts.key_mask
        members = there.reshape(batch, self.num_landmarks, -1)  # [B,R,T/R]
        q_marks, k_marks = (_segment_means(hide(z, parts), members) for z in (q, k))
        used = members.any(axis=-1)  # [B,R]; a segment without tokens is no landmark
        s1 = masked_softmax(scaled_scores(q, k_marks), used[:, None, None, :])
        s2 = masked_softmax(scaled_scores(q_marks, k_marks), used[:, None, None, :])
        s2 = jnp.where(used[:, None, :, None], s2, 0)
        s3 = masked_softmax(scaled_scores(q_marks, k), there[:, None, None, :])
        if self.pinv_iterations is None:
            return s1 @ jnp.linalg.pinv(s2), s3
        return s1 @ pseudo_inverse(s2, self.pinv_iterations), s3

    def apply(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """See `Mixer.apply`."""
        left, right = self._factors(params, x, self.check(x, causal=causal, mask=mask))
        (v,) = project(params, x, "wv")
        gathered = jnp.einsum("bhrs,bshd->bhrd", right, v.astype(right.dtype))
        return merge_heads(jnp.einsum("bhtr,bhrd->bthd", left, gathered)).astype(x.dtype)

    def matrix(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """[B,H,T,T]."""
        left, right = self._factors(params, x, self.check(x, causal=causal, mask=mask))
        return left @ right

    def values(self, params: PyTree, x: Array) -> Array:
        """X W_v, [B,H,T,D]."""
        return head_values(params, x)

    def cost(self, length: int, *, causal: bool = False, itemsize: int = 4) -> MixerCost:
        """Four products of 2 T R M operations, and the pseudo-inverse of R x R for each head."""
        rank = self.num_landmarks
        products = 8.0 * length * rank * self.model_dim + 2.0 * rank**2 * self.model_dim
        per_cube = 24.0 if self.pinv_iterations is None else 8.0 * self.pinv_iterations
        inverse = per_cube * self.num_heads * rank**3
        return MixerCost(products + inverse, 4.0 * length * self.model_dim * itemsize)


def _segment_means(z: Array, members: Array) -> Array:
    """[B,T,H,D] -> [B,R,H,D], the mean over the tokens of each segment that are there."""
    batch, count, _ = members.shape
    sums = z.reshape(batch, count, -1, *z.shape[2:]).sum(axis=2)
    counts = jnp.maximum(members.sum(axis=-1), 1).astype(z.dtype)
    return sums / counts[:, :, None, None]
