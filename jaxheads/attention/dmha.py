"""The variant `dmha`: softmax attention over a sequence that the mesh splits.

The same function of its inputs as `dense`. On a mesh without a context axis it is `dense`; with
one, `distributed_attention` computes it, and a cache is read where it lies (`decode.py`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxheads.attention import softmax
from jaxheads.attention.api import attend
from jaxheads.attention.contract import AttentionContext, Cost, HeadsOut, Supports, Variant
from jaxheads.attention.decode import attention_over_split_keys
from jaxheads.attention.distributed import LOCAL_IMPLS, SCHEDULES, distributed_attention
from jaxheads.attention.kernels import BATCH_AXES, CONTEXT_AXIS, HEADS_AXIS
from jaxheads.attention.layouts import LAYOUTS
from jaxheads.attention.masks import Mask
from jaxheads.attention.places import AxisNames
from jaxheads.typing import Array

LOCALS = {"blocked": "xla", "splash": "splash", "pallas_tpu": "splash", "cudnn": "cudnn"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What parentheses after `dmha` may set."""

    schedule: str = "auto"  # ring, all_to_all, gather, or auto: the least communication
    layout: str = "contiguous"  # contiguous, zigzag or striped: the order of the tokens given
    block_q: int = 256  # queries in a tile of the XLA path
    block_k: int = 512  # keys in a tile
    local_impl: str = "auto"  # what computes a device's blocks: auto, xla, splash, cudnn

    def __post_init__(self):
        for name, known in (
            ("schedule", ("auto", *SCHEDULES)),
            ("layout", LAYOUTS),
            ("local_impl", LOCAL_IMPLS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"dmha: {name}={value!r} is unknown; known: {', '.join(known)}.")
        for name in ("block_q", "block_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"dmha: {name}={getattr(self, name)} must be at least 1.")


def init(key: Array, cfg: Any, options: Options | None = None) -> None:
    """Softmax attention has no parameters of its own."""


def apply(params: None, q: Array, k: Array, v: Array, ctx: AttentionContext) -> HeadsOut:
    """Rotates queries and keys, then attends over all devices of the context axis.

    Without a cache T tokens lie in the order of the layout, which on one device is the order of the
    text. With `ctx.mask.q_index`, the slots of a cache, both queries and keys lie in the order of
    the text.

    Args:
      params: None.
      q: [B,T,H,D] unrotated queries.
      k: [B,S,K,D] keys, unrotated unless `ctx.k_is_rotated`.
      v: [B,S,K,W] values.
      ctx: see `AttentionContext`.
    Returns:
      HeadsOut with z [B,T,H,W].
    Raises:
      NotImplementedError: a bias or per-head mask where the sequence is split.
    """
    q, k = softmax.rotate_heads(q, k, ctx)
    wants_lse = ctx.tap.wants("lse")
    axes = _axes(q)
    if axes is None:
        z, lse = attend(q, k, v, ctx, needs_lse=wants_lse)
    else:
        z, lse = _attend_split(q, k, v, ctx, axes, wants_lse)
    if lse is not None and wants_lse:
        lse = ctx.tap("lse", lse)
    return HeadsOut(z, lse, {})


def _axes(q: Array) -> AxisNames | None:
    """The mesh axes to split over; None where the sequence is whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or mesh.shape.get(CONTEXT_AXIS, 1) == 1:
        return None
    data = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    divides = q.shape[0] % math.prod(mesh.shape[axis] for axis in data) == 0
    heads = HEADS_AXIS if HEADS_AXIS in mesh.shape else None
    return AxisNames(data if data and divides else None, heads, CONTEXT_AXIS)


def _attend_split(q, k, v, ctx: AttentionContext, axes: AxisNames, wants_lse: bool):
    options = ctx.options or Options()
    mask = _with_key_mask(ctx.mask, q.shape[1])
    local = _local(ctx, options)
    n = jax.sharding.get_abstract_mesh().shape[CONTEXT_AXIS]
    common: dict[str, Any] = dict(
        scale=1 / math.sqrt(q.shape[-1]) if ctx.scale is None else ctx.scale,
        soft_cap=ctx.soft_cap,
        alibi_slopes=ctx.alibi_slopes,
    )
    needs_lse = wants_lse or ctx.sinks is not None
    is_cached = mask.q_index is not None
    layout = "contiguous" if is_cached else options.layout
    if k.shape[1] % n and layout == "contiguous":  # such keys are not split either
        return attend(q, k, v, ctx, needs_lse=wants_lse)
    # Few new tokens travel to the keys; many, as in a prompt, have the keys come to them.
    are_few = 3 * q.shape[1] * q.shape[2] <= 2 * k.shape[1] * k.shape[2]
    if mask.q_index is not None and (mask.q_index.ndim == 2 or q.shape[1] % n or are_few):
        z, lse = attention_over_split_keys(q, k, v, mask, axes=axes, **common)
    else:
        out = distributed_attention(
            q,
            k,
            v,
            axis_names=axes,
            schedule=options.schedule,
            layout=layout,
            causal=mask.is_causal,
            window=mask.window,
            q_index=mask.q_index,
            segment_ids=mask.q_segment_ids,
            kv_segment_ids=mask.k_segment_ids,
            prefix_lengths=mask.prefix_lengths,
            block_q=options.block_q,
            block_k=options.block_k,
            local_impl=local,
            return_lse=needs_lse,
            **common,
        )
        z, lse = out if isinstance(out, tuple) else (out, None)
    if ctx.sinks is not None:
        z, lse = _add_sinks(z, cast(Array, lse), ctx.sinks)
    return z, lse


def _with_key_mask(mask: Mask, num_queries: int) -> Mask:
    """The same mask with what `key_mask` hides said by segment ids, of tokens in any layout."""
    q_ids, k_ids, key_mask = mask.q_segment_ids, mask.k_segment_ids, mask.key_mask
    if q_ids is not None:
        k_ids = q_ids if k_ids is None else k_ids
    elif key_mask is not None:
        q_ids = jnp.ones((key_mask.shape[0], num_queries), jnp.int32)
        k_ids = jnp.ones(key_mask.shape, jnp.int32)
    else:
        return mask
    if key_mask is not None:
        k_ids = jnp.where(key_mask, k_ids, 0)
    return dataclasses.replace(mask, key_mask=None, q_segment_ids=q_ids, k_segment_ids=k_ids)


def _local(ctx: AttentionContext, options: Options) -> str:
    """The `local_impl` to use; raises for what a split sequence cannot have."""
    for name, x in (("a bias array", ctx.bias), ("a per-head mask", ctx.mask.head_mask)):
        if x is not None:
            raise NotImplementedError(
                f"attention 'dmha' cannot take {name} where the mesh splits the sequence (it would "
                "be T x S); use attention='dense', or a mesh without a context axis."
            )
    if ctx.implementation == "auto":
        return options.local_impl
    if ctx.implementation not in LOCALS:
        raise NotImplementedError(
            f"implementation={ctx.implementation!r} cannot serve attention 'dmha' where the mesh "
            f"splits the sequence; pass 'auto' or one of {', '.join(LOCALS)}."
        )
    return LOCALS[ctx.implementation]


def _add_sinks(z: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """One more logit per head in the denominator."""
    total = jnp.logaddexp(lse, sinks.astype(jnp.float32)[:, None])
    share = jnp.einsum("bht->bth", jnp.exp(lse - total))[..., None]
    return (z * share).astype(z.dtype), total


def cost(
    cfg: Any,
    num_queries: int,
    num_keys: int,
    *,
    is_causal: bool = True,
    itemsize: int = 2,
    options: Options | None = None,
) -> Cost:
    """That of `dense`, over all devices; `attention_cost` counts one device and the network."""
    return softmax.cost(cfg, num_queries, num_keys, is_causal=is_causal, itemsize=itemsize)


DMHA = Variant(
    name="dmha",
    init=init,
    apply=apply,
    cost=cost,
    supports=Supports(
        causal=True,
        bidirectional=True,
        gqa=True,
        cached_decode=True,
        caches_rotated_keys=True,
        segment_ids=True,
        head_mask=False,
        taps=frozenset({"q_rot", "k_rot", "lse"}),
        implementations=("auto", *LOCALS),
        mesh_axes=frozenset({"data", "fsdp", "model", "context"}),
    ),
    options=Options,
)
