"""Attention over keys that lie split over the sequence axis, with the same queries everywhere.

What decoding over a long cache needs: the queries of a few new tokens go to all devices, each
attends to the slots it holds, and the results are merged where the scores are highest:

    m = pmax lse_r,  w_r = exp(lse_r - m),  z = psum w_r z_r / psum w_r,  lse = m + log psum w_r
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxheads.attention.api import DENSE_SCORES
from jaxheads.attention.blocked import blocked_attention
from jaxheads.attention.dense import dense_attention
from jaxheads.attention.masks import Mask
from jaxheads.typing import Array

P = jax.P


def attention_over_split_keys(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    *,
    axes: tuple,
    scale: float,
    soft_cap: float | None = None,
    alibi_slopes: Array | None = None,
) -> tuple[Array, Array]:
    """Softmax attention on global arrays, on the mesh of `jax.set_mesh`.

    Args:
      q: [B,T,H,D] queries, rotated; every device of the sequence axis gets all T.
      k: [B,S,K,D] keys; S is split.
      v: [B,S,K,W] values.
      mask: causality, window, `q_index` [T] or [B,T], segment ids and `key_mask`.
      axes: the mesh axes (batch, heads, sequence), None for no split.
      scale: factor on q.k.
      soft_cap: as in `dense_attention`.
      alibi_slopes: [H].
    Returns:
      z [B,T,H,W] and lse [B,H,T] float32.
    """
    data, heads, seq = axes
    some = lambda x, spec: None if x is None else spec
    per_query = None if mask.q_index is None else P(data) if mask.q_index.ndim == 2 else P()
    spec = Mask(
        is_causal=mask.is_causal,
        window=mask.window,
        q_index=per_query,  # type: ignore[arg-type]
        q_segment_ids=some(mask.q_segment_ids, P(data)),
        k_segment_ids=some(mask.k_segment_ids, P(data, seq)),
        key_mask=some(mask.key_mask, P(data, seq)),
    )

    def local(q, k, v, mask: Mask, slopes):
        slots = jax.lax.axis_index(seq) * k.shape[1] + jnp.arange(k.shape[1], dtype=jnp.int32)
        mask = Mask(
            is_causal=mask.is_causal,
            window=mask.window,
            q_index=mask.q_index,
            k_index=slots,
            q_segment_ids=mask.q_segment_ids,
            k_segment_ids=mask.k_segment_ids,
            key_mask=mask.key_mask,
        )
        is_small = q.shape[1] * k.shape[1] <= DENSE_SCORES
        attend = dense_attention if is_small else blocked_attention
        z, lse = attend(q, k, v, mask, scale=scale, soft_cap=soft_cap, alibi_slopes=slopes)
        return merge_over(z, lse, seq)

    keys = P(data, seq, heads, None)
    queries = P(data, None, heads, None)
    return jax.shard_map(
        local,
        in_specs=(queries, keys, keys, spec, some(alibi_slopes, P(heads))),
        out_specs=(queries, P(data, heads, None)),
        check_vma=False,
    )(q, k, v, mask, alibi_slopes)


def merge_over(z: Array, lse: Array, axis: str | tuple[str, ...]) -> tuple[Array, Array]:
    """`merge.merge_partitions` of one part per device of a mesh axis: z [B,T,H,W], lse [B,H,T]."""
    highest = jax.lax.pmax(jax.lax.stop_gradient(lse), axis)
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    weight = jnp.exp(lse - highest)
    total = jax.lax.psum(weight, axis)
    is_empty = total == 0
    total = jnp.where(is_empty, 1, total)
    share = jnp.einsum("bht->bth", weight / total)[..., None]
    merged = jax.lax.psum(share * z.astype(jnp.float32), axis).astype(z.dtype)
    return merged, jnp.where(is_empty, -jnp.inf, highest + jnp.log(total))
