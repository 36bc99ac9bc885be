"""S2 attention on TPU: Pallas kernels that step through a flat list of visible tiles.

The grid has one step per visible tile and none for invisible ones. Each step's tile is one int32
in scalar memory, which the index maps read to fetch the right blocks:

    bits, low to high: first of its row | last of its row | needs a mask | rows - 1 | key tile |
                       query tile | kv head

Accumulators stay in VMEM from a row's first step to its last. Lists too long for scalar memory
become several launches that write into the same arrays.

Reference: Lin et al. 2024, arXiv:2407.17678; the online softmax and its gradient are those of
Dao 2023, arXiv:2307.08691.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxheads.attention import s2_kernels as kernels
from jaxheads.attention import s2_worklist as worklist
from jaxheads.attention.s2_kernels import (
    LOG2E,
    MASKED,
    dot,
    row_dot,
    softmax_step,
    visible,
)
from jaxheads.typing import Array

if TYPE_CHECKING:
    from jaxheads.attention.s2 import ShardPattern

LANES = 128  # width of a vector register, and the smallest tile
TILE = 512  # a larger tile gains little and its scores crowd VMEM
MAX_STEPS = 180_000  # int32 of a launch's list: 0.7 of the 1 MiB of scalar memory of a v5e
VMEM_LIMIT = 64 * 2**20


def attend(
    q: Array,
    k: Array,
    v: Array,
    pattern: ShardPattern,
    *,
    scale: float | None = None,
    block_q: int | None = None,
    max_steps: int = MAX_STEPS,
    interpret: bool | None = None,
) -> tuple[Array, Array]:
    """S2 attention of whole sequences, with derivatives for z and lse.

        z = softmax(scale q.k, over the keys that `pattern` lets a head see) v

    Args:
      q: [B,T,H,D], bfloat16 or float32.
      k: [B,T,K,D].
      v: [B,T,K,D].
      pattern: blocks of at least 128 tokens.
      scale: factor on q.k; None = 1/sqrt(D).
      block_q: queries in a tile, at least 128; a multiple of the pattern's block merges rows
        (patterns that are KV-cache efficient only). None = the block, 512 at most.
      max_steps: tiles in one launch; longer lists are split.
      interpret: True runs the kernel's operations as plain JAX; None = everywhere but on TPU.
    Returns:
      z [B,T,H,D] in the dtype of q, lse [B,H,T] float32.
    Raises:
      ValueError: a tile below 128, or shapes that do not fit the pattern.
    """
    kernels.check_arrays(q, k, v, pattern)
    block_k = min(pattern.block, TILE)
    block_q = block_k if block_q is None else block_q
    if min(block_q, block_k) < LANES:
        raise ValueError(
            f"tiles of {block_q} x {block_k} positions were asked of the TPU kernel, which needs "
            f"at least {LANES} of each; use a pattern with block >= {LANES} or impl='blocked'."
        )
    shape = worklist.shape_of(pattern, q.shape[1], block_q, block_k, max(block_q, block_k))
    static = Static(
        shape=shape,
        group=q.shape[2] // k.shape[2],
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
    )

    def run(lists, q, k, v, interpret):
        static_here = static._replace(interpret=interpret)
        length = shape.padded - shape.num_tokens
        heads_first = lambda x: jnp.einsum("bthd->bhtd", kernels.pad_tokens(x, length))
        z, lse = cast(
            tuple[Array, Array],
            _attend(static_here, lists, heads_first(q), heads_first(k), heads_first(v)),
        )
        z = jnp.einsum("bhtd->bthd", z[:, :, : shape.num_tokens])
        return z, lse[:, :, 0, : shape.num_tokens]

    lists_of = functools.partial(make_lists, pattern, shape, max_steps)
    return kernels.launch(run, lists_of, q, k, v, platform="tpu", interpret=interpret)


class Static(NamedTuple):
    """The part of a call that shapes the program."""

    shape: worklist.Shape
    group: int  # query heads per kv head
    scale: float
    interpret: bool = False


class Lists(NamedTuple):
    """[shards, launches, 1 + steps] int32: the number of visits, then the visits."""

    rows: Array | np.ndarray
    columns: Array | np.ndarray


class _Visit(NamedTuple):
    """The fields of one entry of a worklist."""

    head: Any
    q: Any
    k: Any
    rows: Any
    is_partial: Any
    is_last: Any
    is_first: Any


def _widths(shape: worklist.Shape) -> tuple[int, ...]:
    """Bits of each field of a `_Visit`; the head takes what is left."""
    bits = lambda n: (n - 1).bit_length()
    return (32, bits(shape.num_q), bits(shape.num_k), bits(shape.merged), 1, 1, 1)


def _unpack(shape: worklist.Shape, word: Array) -> _Visit:
    fields = []
    for width in reversed(_widths(shape)):
        fields.append(word & ((1 << width) - 1) if width < 32 else word)
        word = jax.lax.shift_right_logical(word, jnp.int32(width)) if width < 32 else word
    head, q, k, rows, *flags = reversed(fields)
    return _Visit(head, q, k, rows + 1, *(flag != 0 for flag in flags))


def _pack(shape: worklist.Shape, visit: _Visit) -> np.ndarray:
    heads = int(visit.head.max()) + 1
    bits = sum(_widths(shape)[1:]) + (heads - 1).bit_length()
    if bits > 32:
        raise ValueError(
            f"{heads} kv heads of {shape.num_q} x {shape.num_k} tiles take {bits} bits of the 32 "
            "of a worklist entry; use a larger block, or spread the heads over devices."
        )
    word = visit.head.astype(np.uint32)
    fields = visit._replace(rows=visit.rows - 1)
    for field, width in zip(fields[1:], _widths(shape)[1:], strict=True):
        word = word << np.uint32(width) | field.astype(np.uint32)
    return word.view(np.int32)


@functools.lru_cache(maxsize=16)
def make_lists(pattern: ShardPattern, shape: worklist.Shape, max_steps: int, shards: int) -> Lists:
    """The worklists of every shard of the heads, by rows (forward, dq) and by columns (dk, dv)."""
    tiles = worklist.tiles_of(pattern, shape)
    heads = shape.num_heads // shards
    rows, columns = [], []
    for shard in range(shards):
        part = tiles.take(tiles.head // heads == shard)
        part = part._replace(head=part.head % heads)
        rows.append(_words(part, shape, part.q, heads, shape.num_q))
        part = worklist.by_column(part)
        columns.append(_words(part, shape, part.k, heads, shape.num_k))
    return Lists(_launches(rows, max_steps), _launches(columns, max_steps))


def _words(tiles: worklist.Tiles, shape: worklist.Shape, inner, heads: int, num_inner: int):
    """(one int32 per visit, where rows end); `inner` is the tile that is accumulated."""
    group = tiles.head * num_inner + inner
    worklist.check_no_empty(group, heads * num_inner, "rows or columns of tiles")
    first, last = worklist.ends(group)
    visit = _Visit(tiles.head, tiles.q, tiles.k, tiles.rows, tiles.is_partial, last, first)
    return _pack(shape, visit), np.flatnonzero(last) + 1


def _launches(shards: list[tuple[np.ndarray, np.ndarray]], max_steps: int) -> np.ndarray:
    """Lists cut into launches between rows; short ones repeat their last visit, uncounted."""
    launches = -(-max(len(words) for words, _ in shards) // max_steps)
    pieces = []
    for all_words, stops in shards:
        wanted = np.arange(1, launches + 1) * len(all_words) / launches
        stops = stops[np.searchsorted(stops, wanted)]
        starts = np.r_[0, stops[:-1]]
        if np.any(stops == starts):
            raise ValueError(
                f"max_steps={max_steps} is less than the tiles of one row; a launch holds "
                "whole rows."
            )
        pieces.append([all_words[a:b] for a, b in zip(starts, stops, strict=True)])
    steps = max(len(x) for shard in pieces for x in shard)
    fill = lambda x: np.r_[len(x), x, np.full(steps - len(x), x[-1])]
    return np.stack([[fill(x) for x in shard] for shard in pieces]).astype(np.int32)


class _Kernel(NamedTuple):
    """One kernel: what it accumulates over the visits of a row or column, and how."""

    name: str
    products: int  # matrix products of a tile
    by_column: bool  # rows accumulate for one query head, columns over all that share a kv head
    inputs: tuple[str, ...]  # kinds, see `_spec`
    outputs: tuple[str, ...]
    scratch: Callable[[Static, int], tuple[tuple[tuple[int, int], float], ...]]
    """Shapes and first values of the accumulators."""
    visit: Callable[..., None]
    """(static, visit or None where nothing is masked, input refs, accumulator refs)."""
    write: Callable[..., None]
    """(output refs, accumulator refs)."""


def _scores(static: Static, visit: _Visit | None, q: Array, k: Array, *, q_axis: int) -> Array:
    """Scaled scores of a tile, base 2, masked where the tile is partial."""
    scores = dot(q, k, (1, 1)) if q_axis == 0 else dot(k, q, (1, 1))
    scores = scores * (static.scale * LOG2E)
    if visit is None:
        return scores
    seen = visible(static.shape, visit.q, visit.k, visit.rows, q_axis=q_axis)
    return jnp.where(seen, scores, MASKED)


def _forward_visit(static, visit, inputs, scratch) -> None:
    q, k, v = (ref[...] for ref in inputs)
    z, highest, total = scratch
    scores = _scores(static, visit, q, k, q_axis=0)
    weights, keep, new_highest, new_total = softmax_step(scores, highest[:, :1], total[:, :1])
    z[...] = z[...] * keep + dot(weights.astype(v.dtype), v)
    highest[...] = jnp.broadcast_to(new_highest, highest.shape)
    total[...] = jnp.broadcast_to(new_total, total.shape)


def _forward_write(outputs, scratch) -> None:
    z_ref, lse_ref = outputs
    z, highest, total = scratch
    z_ref[...] = (z[...] / total[:, :1]).astype(z_ref.dtype)
    lse = (highest[...] + jnp.log2(total[...])) / LOG2E
    lse_ref[...] = jnp.transpose(lse)[:1]  # a column into a row


def _dq_visit(static, visit, inputs, scratch) -> None:
    q, k, v, dz, lse, delta = (ref[...] for ref in inputs)
    column = lambda row: jnp.expand_dims(row[0], -1)
    p = jnp.exp2(_scores(static, visit, q, k, q_axis=0) - column(lse))
    ds = p * (dot(dz, v, (1, 1)) - column(delta)) * static.scale
    scratch[0][...] += dot(ds.astype(k.dtype), k)


def _dkv_visit(static, visit, inputs, scratch) -> None:
    q, k, v, dz, lse, delta = (ref[...] for ref in inputs)
    p = jnp.exp2(_scores(static, visit, q, k, q_axis=1) - lse)
    ds = p * (dot(v, dz, (1, 1)) - delta) * static.scale
    dk, dv = scratch
    dk[...] += dot(ds.astype(q.dtype), q)
    dv[...] += dot(p.astype(dz.dtype), dz)


def _write_sums(outputs, scratch) -> None:
    for out, total in zip(outputs, scratch, strict=True):
        out[...] = total[...].astype(out.dtype)


def _forward_scratch(static: Static, head_dim: int):
    rows = static.shape.block_q
    return ((rows, head_dim), 0.0), ((rows, LANES), MASKED), ((rows, LANES), 0.0)


_FORWARD = _Kernel(
    name="s2_forward",
    products=2,
    by_column=False,
    inputs=("q", "k", "k"),
    outputs=("q", "lse"),
    scratch=_forward_scratch,
    visit=_forward_visit,
    write=_forward_write,
)
_DQ = _Kernel(
    name="s2_backward_dq",
    products=3,
    by_column=False,
    inputs=("q", "k", "k", "q", "lse", "lse"),
    outputs=("q",),
    scratch=lambda static, head_dim: (((static.shape.block_q, head_dim), 0.0),),
    visit=_dq_visit,
    write=_write_sums,
)
_DKV = _Kernel(
    name="s2_backward_dkv",
    products=4,
    by_column=True,
    inputs=("q", "k", "k", "q", "lse", "lse"),
    outputs=("k", "k"),
    scratch=lambda static, head_dim: (((static.shape.block_k, head_dim), 0.0),) * 2,
    visit=_dkv_visit,
    write=_write_sums,
)


def _spec(static: Static, kernel: _Kernel, kind: str, head_dim: int) -> pl.BlockSpec:
    """Which part of an array a step holds: "q" [B,H,T,D], "k" [B,K,T,D] or "lse" [B,H,1,T]."""
    shape = static.shape

    def place(batch, second, third, words):
        step, member = (second, third) if kernel.by_column else (third, second)
        visit = _unpack(shape, words[step + 1])
        head = visit.head * static.group + member
        return {
            "q": (batch, head, visit.q, 0),
            "k": (batch, visit.head, visit.k, 0),
            "lse": (batch, head, 0, visit.q),
        }[kind]

    block = {
        "q": (shape.block_q, head_dim),
        "k": (shape.block_k, head_dim),
        "lse": (1, shape.block_q),
    }[kind]
    return pl.BlockSpec((None, None, *block), place)


def _run(
    static: Static, kernel: _Kernel, words: Array | np.ndarray, *arrays: Array
) -> tuple[Array, ...]:
    """Launches a kernel once per list; every launch after the first writes into the same arrays."""
    q, k = arrays[:2]
    batch, num_heads, length, head_dim = q.shape
    shape, steps = static.shape, words.shape[-1] - 1
    num_inputs, num_outputs = len(arrays), len(kernel.outputs)
    step_axis, member_axis = (1, 2) if kernel.by_column else (2, 1)

    def body(words, *refs):
        inputs = refs[:num_inputs]
        outputs, scratch = refs[-num_outputs - len(starts) : -len(starts)], refs[-len(starts) :]
        step, member = pl.program_id(step_axis), pl.program_id(member_axis)
        visit, counts = _unpack(shape, words[step + 1]), step < words[0]
        is_first, is_last = counts & visit.is_first, counts & visit.is_last
        if kernel.by_column:
            is_first, is_last = is_first & (member == 0), is_last & (member == static.group - 1)

        @pl.when(is_first)
        def _():
            for ref, (_, start) in zip(scratch, starts, strict=True):
                ref[...] = jnp.full(ref.shape, start, ref.dtype)

        @pl.when(counts & visit.is_partial)
        def _():
            kernel.visit(static, visit, inputs, scratch)

        @pl.when(counts & jnp.logical_not(visit.is_partial))
        def _():
            kernel.visit(static, None, inputs, scratch)

        @pl.when(is_last)
        def _():
            kernel.write(outputs, scratch)

    starts = kernel.scratch(static, head_dim)
    out_shapes = {
        "q": jax.ShapeDtypeStruct(q.shape, q.dtype),
        "k": jax.ShapeDtypeStruct(k.shape, k.dtype),
        "lse": jax.ShapeDtypeStruct((batch, num_heads, 1, length), jnp.float32),
    }
    spec = functools.partial(_spec, static, kernel, head_dim=head_dim)
    in_specs = [spec(kind) for kind in kernel.inputs]
    visits = batch * static.group * steps
    pairs = visits * shape.block_q * shape.block_k
    moved = shape.block_q if kernel.by_column else shape.block_k  # the side that changes each step
    grid = (batch, steps, static.group) if kernel.by_column else (batch, static.group, steps)
    inner = "arbitrary" if kernel.by_column else "parallel"
    outs: tuple[Array, ...] = ()
    for launch in words:
        outs = pl.pallas_call(
            body,
            out_shape=[out_shapes[kind] for kind in kernel.outputs],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=grid,
                in_specs=in_specs + [pl.BlockSpec(memory_space=pl.ANY)] * len(outs),
                out_specs=[spec(kind) for kind in kernel.outputs],
                scratch_shapes=[pltpu.VMEM(size, jnp.float32) for size, _ in starts],
            ),
            input_output_aliases={1 + num_inputs + n: n for n in range(len(outs))},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", inner, "arbitrary"),
                vmem_limit_bytes=VMEM_LIMIT if shape.block_q > TILE else None,
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * kernel.products * pairs * head_dim,
                bytes_accessed=sum(x.nbytes for x in arrays)
                + 2 * visits * moved * head_dim * q.dtype.itemsize,
                transcendentals=pairs,
            ),
            interpret=static.interpret,
            name=kernel.name,
        )(launch, *arrays, *outs)
    return tuple(outs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, lists: Lists, q: Array, k: Array, v: Array) -> tuple[Array, ...]:
    """q [B,H,T,D], k and v [B,K,T,D] -> z [B,H,T,D] and lse [B,H,1,T] float32."""
    return _run(static, _FORWARD, lists.rows, q, k, v)


def _attend_fwd(static: Static, lists: Lists, q: Array, k: Array, v: Array):
    # remat="names:lse" keeps both results, so that the kernel does not run again.
    out = cast(tuple[Array, Array], _attend(static, lists, q, k, v))
    z, lse = (checkpoint_name(x, "lse") for x in out)
    return (z, lse), (lists, q, k, v, z, lse)


def backward(static: Static, residuals, cotangents):
    """Gradients from (lists, q, k, v, z, lse) and (dz, dlse), laid out as in `_attend`."""
    lists, q, k, v, z, lse = residuals
    dz, dlse = cotangents
    arrays = (q, k, v, dz, lse * LOG2E, row_dot(z, dz)[:, :, None] - dlse)
    (dq,) = _run(static, _DQ, lists.rows, *arrays)
    dk, dv = _run(static, _DKV, lists.columns, *arrays)
    return None, dq, dk, dv


_attend.defvjp(_attend_fwd, backward)
