"""Attention a block of keys at a time (online softmax), and the two one-device references.

    m' = max(m, max_s S),  l' = l e^(m-m') + sum_s e^(S-m'),  acc' = acc e^(m-m') + e^(S-m') v
    out = acc / l,         lse = m + log l

`attention_block` is the update with positions, masks and biases as plain functions, for schedules
of one's own; the schedules here run on `blocked.forward_tiles`, the same update in tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.attention.api import AttentionOutput, check_arrays
from jaxheads.attention.blocked import blocked_attention
from jaxheads.attention.dense import dense_attention
from jaxheads.attention.masks import Mask, as_4d
from jaxheads.typing import Array

Pairwise = Callable[[Array, Array], Array]


class State(NamedTuple):
    """Softmax attention over the keys seen so far; float32."""

    acc: Array
    """[B,H,T,W] sum of e^(S - m) v."""
    m: Array
    """[B,H,T] the highest score, -inf before any."""
    l: Array
    """[B,H,T] sum of e^(S - m)."""


def attention_block(
    q: Array,
    k: Array,
    v: Array,
    state: State | None = None,
    *,
    q_pos: Array,
    k_pos: Array,
    mask_fn: Pairwise | None = None,
    scale: float | None = None,
    bias_fn: Pairwise | None = None,
) -> State:
    """Takes one block of keys into a running softmax attention; `finalize` ends it.

    Args:
      q: [B,T,H,D] queries.
      k: [B,S,K,D] the keys of this block; K divides H.
      v: [B,S,K,W] their values.
      state: what earlier blocks left; None for the first.
      q_pos: [T] or [B,T] global positions of the queries.
      k_pos: [S] or [B,S] global positions of the keys, in any order.
      mask_fn: (q_pos [...,T,1], k_pos [...,1,S]) -> bool, True where visible, broadcastable to
        [B,H,T,S]; None = everything is.
      scale: factor on q.k; None = 1/sqrt(D).
      bias_fn: the same arguments -> float, added to the scaled scores.
    Returns:
      The new state.
    Raises:
      TypeError: `mask_fn` or `bias_fn` does not take two arguments.
      ValueError: shapes that do not fit.
    """
    check_arrays(q, k, v)
    num_queries, num_keys = q.shape[1], k.shape[1]
    batch, _, num_heads, head_dim = q.shape
    q_index = _column(q_pos, num_queries, batch, "q_pos")[..., :, None]
    k_index = _column(k_pos, num_keys, batch, "k_pos")[..., None, :]
    if max(q_index.ndim, k_index.ndim) == 3:  # [B,T,1]: an axis for the heads
        q_index, k_index = (x[:, None] if x.ndim == 3 else x for x in (q_index, k_index))
    full = (batch, num_heads, num_queries, num_keys)

    grouped = q.reshape(batch, num_queries, k.shape[2], -1, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(full) * (1 / math.sqrt(head_dim) if scale is None else scale)
    scores = scores.astype(jnp.float32)
    if bias_fn is not None:
        scores = scores + _call(bias_fn, q_index, k_index, full, "bias_fn").astype(jnp.float32)
    if mask_fn is not None:
        visible = _call(mask_fn, q_index, k_index, full, "mask_fn")
        scores = jnp.where(visible, scores, -jnp.inf)
    if state is None:
        empty = jnp.full(full[:3], -jnp.inf, jnp.float32)
        zeros = jnp.zeros_like(empty)
        state = State(jnp.zeros((*full[:3], v.shape[-1]), jnp.float32), empty, zeros)
    # The result does not depend on m, so nothing is differentiated through it.
    m = jax.lax.stop_gradient(jnp.maximum(state.m, scores.max(axis=-1)))
    safe = jnp.where(jnp.isfinite(m), m, 0)
    p = jnp.exp(scores - safe[..., None])
    keep = jnp.exp(jax.lax.stop_gradient(state.m) - safe)
    by_group = p.reshape(batch, k.shape[2], -1, num_queries, num_keys).astype(v.dtype)
    new = jnp.einsum("bkgts,bskw->bkgtw", by_group, v, preferred_element_type=jnp.float32)
    acc = state.acc * keep[..., None] + new.reshape(state.acc.shape)
    return State(acc, m, state.l * keep + p.sum(axis=-1))


def finalize(state: State) -> tuple[Array, Array]:
    """out [B,T,H,W] and lse [B,H,T], float32; out 0 and lse -inf where no key was visible."""
    is_empty = state.l == 0
    total = jnp.where(is_empty, 1, state.l)
    out = jnp.einsum("bhtw->bthw", state.acc / total[..., None])
    highest = jnp.where(is_empty, 0, state.m)
    return out, jnp.where(is_empty, -jnp.inf, highest + jnp.log(total))


def blockwise_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    block_q: int = 512,
    block_k: int = 512,
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
    segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Array | AttentionOutput:
    """Attention on one device in tiles: linear memory, its own backward pass.

    The arguments are those of `distributed_attention`; the work is `blocked_attention`'s.
    """
    check_arrays(q, k, v)
    mask = self_mask(q, k, causal, window, segment_ids, kv_segment_ids)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    z, lse = blocked_attention(q, k, v, mask, scale=scale, block_q=block_q, block_k=block_k)
    return AttentionOutput(z, lse) if return_lse else z


def vanilla_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
    segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Array | AttentionOutput:
    """Attention on one device with scores and pattern [B,H,T,S] in memory: the baseline."""
    check_arrays(q, k, v)
    mask = self_mask(q, k, causal, window, segment_ids, kv_segment_ids)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    z, lse = dense_attention(q, k, v, mask, scale=scale)
    return AttentionOutput(z, lse) if return_lse else z


def self_mask(q, k, causal, window, segment_ids, kv_segment_ids) -> Mask:
    """The mask of a call on one device; raises for segment ids that cannot serve the keys."""
    if segment_ids is not None and kv_segment_ids is None:
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"segment_ids serve {q.shape[1]} queries but there are {k.shape[1]} keys; pass "
                "kv_segment_ids [B,S] as well."
            )
        kv_segment_ids = segment_ids
    return Mask(
        is_causal=causal, window=window, q_segment_ids=segment_ids, k_segment_ids=kv_segment_ids
    )


def _column(positions: Array, length: int, batch: int, name: str) -> Array:
    positions = jnp.asarray(positions)
    if positions.shape not in ((length,), (batch, length)):
        raise ValueError(f"{name} has shape {positions.shape}; it must be {(length,)} or [B,·].")
    return positions


def _call(function: Pairwise, q_index: Array, k_index: Array, full: tuple, name: str) -> Array:
    """The function's values, broadcastable to [B,H,T,S]."""
    values = jnp.asarray(_call_with_two(function, q_index, k_index, name))
    if values.ndim == 3 and q_index.ndim == 2 and values.shape == (full[2], 1, full[3]):
        values = values[:, 0]  # the function made the axes itself: q[:, None] >= k[None, :]
    values = as_4d(values)
    if any(n not in (1, m) for n, m in zip(values.shape, full, strict=True)):
        raise ValueError(
            f"{name} returned shape {values.shape}, which does not broadcast to [B,H,T,S] = "
            f"{full}; it works elementwise on q_pos [T,1] and k_pos [1,S]."
        )
    return values


def _call_with_two(function: Pairwise, q_index: Array, k_index: Array, name: str) -> Array:
    check_arity(function, name)
    return function(q_index, k_index)


def check_arity(function: Pairwise, name: str) -> None:
    """Raise unless the function can be called with two positions."""
    import inspect

    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"{name} must take two arguments, (q_pos, k_pos), and work elementwise: {error}."
        ) from None
    except ValueError:  # a builtin without a signature
        return
