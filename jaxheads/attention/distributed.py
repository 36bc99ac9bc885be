"""Exact multi-head attention over any mesh: batch, heads and sequence may each be split.

    z = softmax(scale q.k + bias, over visible keys) v        the same numbers as on one device

A device holds q [B,T/n,H/m,D] and k, v [B,S/n,K/m,D], n devices share the sequence and m the heads;
the result is split like q. Memory per device is linear in T/n. Three schedules over the sequence
axis give the same result:

    ring         keys and values go round, one block at a time                  (`ring.py`)
    gather       every device collects all keys and values                      (`ring.py`)
    all_to_all   devices exchange heads for positions, attend, exchange back    (`exchange.py`)

Reference: He & Kabic, 2023, arXiv:2302.06218, whose text leaves partitioning open; the schedules
are those of Liu et al., 2023, arXiv:2310.01889 and Jacobs et al., 2023, arXiv:2309.14509.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.attention.api import AttentionOutput, check_arrays
from jaxheads.attention.blocked import BLOCK_K, BLOCK_Q
from jaxheads.attention.costs import Cost, attention_cost, comm_bytes
from jaxheads.attention.exchange import check_exchange, exchange_attention, heads_of
from jaxheads.attention.layouts import (
    LAYOUTS,
    check_layout,
    ring_schedule,
    shard_sequence,
    unshard_sequence,
)
from jaxheads.attention.masks import Mask
from jaxheads.attention.merge import merge_partitions
from jaxheads.attention.online import (
    attention_block,
    blockwise_attention,
    check_arity,
    finalize,
    vanilla_attention,
)
from jaxheads.attention.places import AXES, AxisNames, Place, Sizes, find_place
from jaxheads.attention.ring import Heads, Marks, Walk, walk_attention
from jaxheads.typing import Array, is_traced

__all__ = [
    "AxisNames",
    "Cost",
    "attention_block",
    "attention_cost",
    "blockwise_attention",
    "distributed_attention",
    "finalize",
    "merge_partitions",
    "ring_schedule",
    "shard_sequence",
    "unshard_sequence",
    "vanilla_attention",
]

P = jax.P
SCHEDULES = ("ring", "all_to_all", "gather")
LOCAL_IMPLS = ("auto", "xla", "splash", "cudnn", "pallas")


def distributed_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mesh: Any = None,
    axis_names: AxisNames = AXES,
    schedule: str = "auto",
    layout: str = "contiguous",
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
    segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    kv_lengths: Array | None = None,
    prefix_lengths: Array | None = None,
    q_index: Array | None = None,
    alibi_slopes: Array | None = None,
    bias_fn: Callable[[Array, Array], Array] | None = None,
    mask_fn: Callable[[Array, Array], Array] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    local_impl: str = "auto",
    return_lse: bool = False,
) -> Array | AttentionOutput:
    """Grouped-query softmax attention with batch, heads and sequence split over a mesh.

    Call it on global arrays, eagerly or under `jax.jit`: it runs `jax.shard_map` over `mesh`, or
    over the mesh of `jax.set_mesh`. Or call it inside a `shard_map` over these axes with the local
    arrays. Without a mesh it is `blockwise_attention`.

    Masks and biases speak of token numbers in the text, 0 to T-1 and 0 to S-1, whatever the layout.

    Args:
      q: [B,T,H,D] queries, already rotated, with T in the order of `layout`.
      k: [B,S,K,D] keys; K divides H, query head h reads kv head h // (H / K).
      v: [B,S,K,W] values.
      mesh: the mesh of global arrays; None = the one that is set, or the surrounding `shard_map`.
      axis_names: which mesh axes split batch, heads and sequence.
      schedule: "ring", "all_to_all", "gather", or "auto": the least communication by
        `attention_cost`.
      layout: "contiguous", "zigzag" or "striped" (`shard_sequence`).
      causal: query t sees keys s <= t.
      window: keys in a sliding window, the query's own included; or (left, right), how many keys
        before and after it a query sees.
      segment_ids: [B,T] ids of packed documents, in the order of the layout; 0 is padding.
      kv_segment_ids: [B,S]; None = `segment_ids`.
      kv_lengths: [B] keys from this token number on are padding.
      prefix_lengths: [B] the first tokens, which causality and window hide from nobody.
      q_index: [T] the token numbers of the queries where they are not 0 to T-1, as for new tokens
        over a cache; in layout "contiguous".
      alibi_slopes: [H] penalty per token of distance.
      bias_fn: (q_index [t,1], k_index [1,s]) -> [t,s] or [H,t,s], added to the scores; computed one
        tile at a time. It may close over constants, not over traced arrays.
      mask_fn: the same arguments -> bool; hides keys besides the masks above.
      scale: factor on q.k; None = 1/sqrt(D).
      soft_cap: bound of a tanh cap on the scaled scores.
      block_q: queries in a tile of the XLA path.
      block_k: keys in a tile.
      local_impl: what computes a device's blocks: "xla", "splash" (alias "pallas"; TPU), "cudnn"
        (NVIDIA), or "auto": the platform's kernel where it can.
      return_lse: return `AttentionOutput(z, lse)`; lse has derivatives.
    Returns:
      z [B,T,H,W] in the dtype of q (with lse [B,H,T] float32), in the order of the layout. A query
      that sees no key gets z = 0, lse = -inf and zero gradients. Scores, softmax and sums over
      blocks are float32.
    Raises:
      ValueError: lengths, heads or batch that the mesh does not divide (saying what would), unknown
        names, a window without keys, `kv_lengths` past the keys.
      TypeError: integer q, k or v.
      NotImplementedError: a named `local_impl` that cannot do the call.
    Example:
      >>> x = jnp.ones((1, 8, 2, 4))
      >>> distributed_attention(x, x, x, causal=True).shape
      (1, 8, 2, 4)
    """
    check_arrays(q, k, v)
    _check_names(schedule, layout, local_impl)
    for name, function in (("mask_fn", mask_fn), ("bias_fn", bias_fn)):
        if function is not None:
            check_arity(function, name)
    place = find_place(mesh, axis_names)
    segments = _segments(q, k, segment_ids, kv_segment_ids, is_local=place.is_inside)
    _check_q_index(q_index, q, layout)
    marks = Marks(*segments, _lengths(kv_lengths, k, place), prefix_lengths, q_index)
    shape = _check_shapes(q, k, v, place, layout, alibi_slopes)
    Mask(is_causal=causal, window=window)  # refuses windows without a key
    if layout == "zigzag" and not causal:
        warnings.warn(
            "layout='zigzag' balances causal work; without causal=True it only reorders tokens.",
            stacklevel=2,
        )
    schedule = _schedule(schedule, shape, q.dtype.itemsize)
    walk = Walk(
        schedule=schedule,
        axis=place.axes.seq if place.sizes.seq > 1 else None,
        size=place.sizes.seq,
        layout=layout,
        is_causal=causal,
        window=window,
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        soft_cap=soft_cap,
        block_q=block_q,
        block_k=block_k,
        local=local_impl,
        needs_lse=return_lse,
        mask_fn=mask_fn,
        bias_fn=bias_fn,
    )
    heads = Heads(q, k, v, alibi_slopes)
    if place.is_inside or place.mesh is None:
        out = _attend_local(walk, place, heads, marks)
    else:
        out = _attend_global(place, walk, heads, marks)
    z, lse = out
    return AttentionOutput(z, cast(Array, lse)) if return_lse else z


class _Shape(NamedTuple):
    """The whole call in numbers, over all devices."""

    batch: int
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sizes: Sizes


def _attend_local(walk: Walk, place: Place, heads: Heads, marks: Marks):
    """On one device: arrays of this device, inside the shard_map (or without one)."""
    num_heads = heads.q.shape[2]
    ways = place.sizes.heads
    if ways > 1:
        first = lambda: jax.lax.axis_index(place.axes.heads) * num_heads
        of = lambda f: None if f is None else heads_of(f, first, num_heads, num_heads * ways)
        walk = walk._replace(mask_fn=of(walk.mask_fn), bias_fn=of(walk.bias_fn))
    attend = exchange_attention if walk.schedule == "all_to_all" else walk_attention
    z, lse = attend(walk, heads, marks)
    return z, lse if walk.needs_lse else None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attend_global(place: Place, walk: Walk, heads: Heads, marks: Marks):
    """On global arrays: the same inside a `shard_map` over the mesh."""
    axes = place.axes
    tokens, kv = P(axes.data, axes.seq), P(axes.data, axes.seq, axes.heads, None)
    rows = P(axes.data)
    some = lambda x, spec: None if x is None else spec
    make: Any = Heads  # of specifications in place of arrays
    in_specs = (
        make(kv, kv, kv, some(heads.slopes, P(axes.heads))),
        Marks(
            some(marks.q_segment_ids, tokens),
            some(marks.k_segment_ids, tokens),
            some(marks.kv_lengths, rows),
            some(marks.prefix_lengths, rows),
            some(marks.q_index, P(axes.seq)),
        ),
    )
    lse = P(axes.data, axes.heads, axes.seq) if walk.needs_lse else None
    inside = place._replace(is_inside=True)
    attend = jax.shard_map(
        lambda heads, marks: _attend_local(walk, inside, heads, marks),
        mesh=place.mesh,
        in_specs=in_specs,
        out_specs=(kv, lse),
        check_vma=False,
    )
    return attend(heads, marks)


def _check_names(schedule: str, layout: str, local_impl: str) -> None:
    for name, value, known in (
        ("schedule", schedule, ("auto", *SCHEDULES)),
        ("layout", layout, LAYOUTS),
        ("local_impl", local_impl, LOCAL_IMPLS),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}.")


def _segments(q, k, ids, kv_ids, *, is_local: bool) -> tuple[Array | None, Array | None]:
    if ids is None and kv_ids is None:
        return None, None
    if ids is None:
        raise ValueError("kv_segment_ids was given without segment_ids of the queries [B,T].")
    if kv_ids is None:
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"segment_ids serve {q.shape[1]} queries but there are {k.shape[1]} keys; pass "
                "kv_segment_ids [B,S] as well."
            )
        kv_ids = ids
    for name, x, of in (("segment_ids", ids, q), ("kv_segment_ids", kv_ids, k)):
        if jnp.shape(x) != of.shape[:2]:
            raise ValueError(f"{name} has shape {jnp.shape(x)}; it must be {of.shape[:2]}.")
    return jnp.asarray(ids, jnp.int32), jnp.asarray(kv_ids, jnp.int32)


def _lengths(kv_lengths, k: Array, place: Place) -> Array | None:
    if kv_lengths is None:
        return None
    num_keys = k.shape[1] * (place.sizes.seq if place.is_inside else 1)
    if jnp.shape(kv_lengths) != (k.shape[0],):
        raise ValueError(
            f"kv_lengths has shape {jnp.shape(kv_lengths)}; it must be [B] = ({k.shape[0]},)."
        )
    if not is_traced(kv_lengths) and (np.asarray(kv_lengths) > num_keys).any():
        raise ValueError(
            f"kv_lengths {np.asarray(kv_lengths).tolist()} exceed the {num_keys} keys that were "
            "given."
        )
    return jnp.asarray(kv_lengths, jnp.int32)


def _check_q_index(q_index, q: Array, layout: str) -> None:
    if q_index is None:
        return
    if layout != "contiguous":
        raise ValueError(
            f"q_index was given with layout={layout!r}, which numbers the queries itself; use "
            "layout='contiguous'."
        )
    if jnp.shape(q_index) != (q.shape[1],):
        raise ValueError(
            f"q_index has shape {jnp.shape(q_index)}; it must be [T] = ({q.shape[1]},)."
        )


def _check_shapes(q, k, v, place: Place, layout: str, slopes) -> _Shape:
    """The call in numbers; raises for what the mesh does not divide."""
    sizes, inside = place.sizes, place.is_inside
    times = lambda n, ways: n * ways if inside else n
    shape = _Shape(
        times(q.shape[0], sizes.data),
        times(q.shape[1], sizes.seq),
        times(k.shape[1], sizes.seq),
        times(q.shape[2], sizes.heads),
        times(k.shape[2], sizes.heads),
        q.shape[3],
        sizes,
    )
    for name, n, ways, axes in (
        ("batch", shape.batch, sizes.data, place.axes.data),
        ("num_heads", shape.num_heads, sizes.heads, place.axes.heads),
        ("num_kv_heads", shape.num_kv_heads, sizes.heads, place.axes.heads),
    ):
        if n % ways:
            raise ValueError(
                f"{name}={n} is not divisible by the {ways} devices of mesh axis {axes!r}; choose "
                "another mesh, or name other axes in axis_names."
            )
    check_layout(layout, shape.num_queries, sizes.seq, "a query sequence")
    check_layout(layout, shape.num_keys, sizes.seq, "a key sequence")
    if slopes is not None and jnp.shape(slopes) != (q.shape[2],):
        raise ValueError(
            f"alibi_slopes has shape {jnp.shape(slopes)}; it must be [H] = ({q.shape[2]},)."
        )
    return shape


def _schedule(schedule: str, shape: _Shape, itemsize: int) -> str:
    """The schedule to run; raises where all_to_all cannot."""
    n, m = shape.sizes.seq, shape.sizes.heads
    reason = check_exchange(shape.num_heads // m, shape.num_kv_heads // m, n)
    if schedule == "all_to_all" and reason is not None:
        raise ValueError(
            f"schedule='all_to_all': {reason}; use schedule='ring' or 'gather', or another mesh."
        )
    if schedule != "auto":
        return schedule

    def received(name: str) -> float:
        return comm_bytes(
            name,
            tokens=shape.num_queries / n,
            keys=shape.num_keys / n,
            num_heads=shape.num_heads / m,
            num_kv_heads=shape.num_kv_heads / m,
            head_dim=shape.head_dim,
            seq=n,
            itemsize=itemsize,
        )

    # What `gather` receives is what `ring` does, and it holds more.
    is_less = reason is None and received("all_to_all") < received("ring")
    return "all_to_all" if is_less else "ring"
