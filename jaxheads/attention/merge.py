"""Attention over a union of key sets, from attention over each of them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxheads.typing import Array


def merge_partitions(
    outs: Array | Sequence[Array], lses: Array | Sequence[Array]
) -> tuple[Array, Array]:
    """Softmax attention over all keys from its results over disjoint parts of them.

        lse = log sum_c exp(lse_c),    out = sum_c exp(lse_c - lse) out_c

    Exact, associative and independent of the order of the parts; ``(0, -inf)``, attention over no
    key at all, is the identity element. Computed in float32, differentiable in both arguments.

    Args:
      outs: [C,B,T,H,D], or a sequence of C arrays [B,T,H,D]: the normalised outputs.
      lses: [C,B,H,T], or a sequence of C arrays [B,H,T]: log of the softmax denominators.
    Returns:
      out [B,T,H,D] in the dtype of `outs` and lse [B,H,T] float32. A query that sees no key in any
      part has out 0 and lse -inf.
    Raises:
      ValueError: no parts, or shapes that do not fit together.
    Example:
      >>> merge_partitions([jnp.ones((1, 3, 2, 4))] * 2, [jnp.zeros((1, 2, 3))] * 2)[1][0, 0, 0]
      Array(0.6931472, dtype=float32)

    References: Milakov & Gimelshein, 2018, arXiv:1805.02867; Liu et al., 2023, arXiv:2310.01889.
    """
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"got {len(outs)} outputs and {len(lses)} log-sum-exps; each part has one of both, and "
            "there is at least one part."
        )
    outs, lses = jnp.asarray(_stack(outs)), jnp.asarray(_stack(lses), jnp.float32)
    if outs.ndim != 5 or lses.shape != tuple(outs.shape[i] for i in (0, 1, 3, 2)):
        raise ValueError(
            f"outs {outs.shape} and lses {lses.shape} do not fit; they must be [C,B,T,H,D] and "
            "[C,B,H,T]."
        )
    out, lse = merge(jnp.einsum("cbthd->cbhtd", outs), lses)
    return jnp.einsum("bhtd->bthd", out).astype(outs.dtype), lse


def merge(outs: Array, lses: Array) -> tuple[Array, Array]:
    """`merge_partitions` for any layout: outs [C,...,D] and lses [C,...], both results float32."""
    weights, lse = shares(lses)
    return (weights[..., None] * outs.astype(jnp.float32)).sum(axis=0), lse


def shares(lses: Array) -> tuple[Array, Array]:
    """exp(lse_c - lse) [C,...], 0 for an empty part, and lse = log sum_c exp(lse_c) [...]."""
    highest = jax.lax.stop_gradient(lses.max(axis=0))
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    weights = jnp.exp(lses - highest)
    total = weights.sum(axis=0)
    is_empty = total == 0
    total = jnp.where(is_empty, 1, total)
    return weights / total, jnp.where(is_empty, -jnp.inf, highest + jnp.log(total))


def _stack(parts: Array | Sequence[Array]) -> Array:
    return jnp.stack(parts) if isinstance(parts, list | tuple) else jnp.asarray(parts)


def merge_pair(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """`merge` of two parts (out [...,D], lse [...]) without stacking them; float32."""
    highest = jnp.maximum(a[1], b[1])
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    weight_a, weight_b = jnp.exp(a[1] - highest), jnp.exp(b[1] - highest)
    total = weight_a + weight_b
    is_empty = total == 0
    total = jnp.where(is_empty, 1, total)
    out = (weight_a / total)[..., None] * a[0] + (weight_b / total)[..., None] * b[0]
    return out, jnp.where(is_empty, -jnp.inf, highest + jnp.log(total))
