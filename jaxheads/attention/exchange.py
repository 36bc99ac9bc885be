"""The schedule `all_to_all`: devices trade heads for positions, attend, and trade back.

    q, k, v [B,T/n,H,D] -> all_to_all -> [B,T,H/n,D] -> attention over whole sequences
    z [B,T,H/n,W] -> all_to_all -> [B,T/n,H,W]

Attention itself is local, so a fused kernel serves with its own backward pass, and the collectives'
derivatives are collectives of the same kind. Runs inside `jax.shard_map`.
Reference: Jacobs et al., 2023, arXiv:2309.14509.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.attention import api
from jaxheads.attention.blocked import blocked_attention
from jaxheads.attention.contract import AttentionContext, Request
from jaxheads.attention.layouts import shard_sequence, unshard_sequence
from jaxheads.attention.masks import Mask, as_4d
from jaxheads.attention.ring import Heads, Marks, Walk
from jaxheads.taps import NO_TAP
from jaxheads.typing import Array

KERNELS = {"xla": "blocked", "splash": "splash", "pallas": "splash", "cudnn": "cudnn"}


def check_exchange(num_heads: int, num_kv_heads: int, n: int) -> str | None:
    """Why these heads (of one device) cannot be dealt to n devices; None when they can."""
    if num_heads % n:
        return f"{num_heads} query heads do not divide over {n} devices of the sequence axis"
    if num_kv_heads % n and n % num_kv_heads:
        return (
            f"{num_kv_heads} key/value heads neither divide over nor into {n} devices of the "
            "sequence axis"
        )
    return None


def exchange_attention(walk: Walk, heads: Heads, marks: Marks) -> tuple[Array, Array | None]:
    """out [B,T,H,W] and, where the kernel gives it, lse [B,H,T] for this device's queries."""
    n, axis = walk.size, walk.axis
    num_heads = heads.q.shape[2]
    repeats = max(1, n // heads.k.shape[2])
    k, v = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (heads.k, heads.v))

    def to_heads(x: Array) -> Array:  # [B,T/n,H,D] -> [B,T,H/n,D] in the order of the text
        if n == 1:
            return x
        x = jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)
        return unshard_sequence(x, walk.layout, n)

    def to_positions(x: Array) -> Array:
        if n == 1:
            return x
        x = shard_sequence(x, walk.layout, n)
        return jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True)

    def whole(ids: Array | None) -> Array | None:  # [B,T/n] -> [B,T]
        if ids is None or n == 1:
            return ids
        gathered = jax.lax.all_gather(ids, axis, axis=1, tiled=True)
        return unshard_sequence(gathered, walk.layout, n)

    q, k, v = (to_heads(x) for x in (heads.q, k, v))
    q_index = marks.q_index
    if q_index is not None and n > 1:
        q_index = jax.lax.all_gather(q_index, axis, tiled=True)
    lengths = marks.kv_lengths
    mask = Mask(
        is_causal=walk.is_causal,
        window=walk.window,
        q_index=q_index,
        q_segment_ids=whole(marks.q_segment_ids),
        k_segment_ids=whole(marks.k_segment_ids),
        key_mask=None if lengths is None else jnp.arange(k.shape[1]) < lengths[:, None],
        prefix_lengths=marks.prefix_lengths,
    )
    first = lambda: 0 if n == 1 else jax.lax.axis_index(axis) * (num_heads // n)
    slopes = heads.slopes
    if slopes is not None and n > 1:
        slopes = jax.lax.dynamic_slice_in_dim(slopes, first(), num_heads // n)
    functions: dict[str, Any] = {
        name: heads_of(function, first, num_heads // n, num_heads)
        for name, function in (("mask_fn", walk.mask_fn), ("bias_fn", walk.bias_fn))
        if function is not None
    }
    name = "blocked" if functions else _kernel(walk, q, k, v, mask, slopes)
    if name == "blocked":
        z, lse = blocked_attention(
            q,
            k,
            v,
            mask,
            scale=walk.scale,
            soft_cap=walk.soft_cap,
            alibi_slopes=slopes,
            block_q=walk.block_q,
            block_k=walk.block_k,
            **functions,
        )
    else:
        ctx = AttentionContext(
            mask=mask,
            scale=walk.scale,
            soft_cap=walk.soft_cap,
            alibi_slopes=slopes,
            implementation=name,
        )
        z, lse = api.attend(q, k, v, ctx, needs_lse=walk.needs_lse)
    if lse is not None:
        lse = jnp.einsum("bth->bht", to_positions(jnp.einsum("bht->bth", lse)))
    return to_positions(z), lse


def heads_of(function, first: Callable[[], Any], size: int, num_heads: int):
    """A function of positions that may differ by head, for `size` heads from ``first()``.

    `first` is called where the function is: a rule for derivatives must not close over its result.
    """

    def of_these(q_index: Array, k_index: Array) -> Array:
        values = as_4d(jnp.asarray(function(q_index, k_index)))
        if values.shape[1] != num_heads or size == num_heads:
            return values
        return jax.lax.dynamic_slice_in_dim(values, first(), size, axis=1)

    return of_these


def _kernel(walk: Walk, q, k, v, mask: Mask, slopes) -> str:
    """The implementation of `api.IMPLEMENTATIONS` to attend with."""
    if walk.local != "auto":
        return KERNELS[walk.local]
    platform = api.platform()
    request = Request(
        q=q,
        k=k,
        v=v,
        mask=mask,
        bias=None,
        scale=walk.scale,
        soft_cap=walk.soft_cap,
        sinks=None,
        alibi_slopes=slopes,
        tap=NO_TAP,
        needs_lse=walk.needs_lse,
        platform=platform,
    )
    fused = api.FUSED.get(platform)
    if fused is None or api.IMPLEMENTATIONS[fused].reason_not(request) is not None:
        return "blocked"
    return fused
