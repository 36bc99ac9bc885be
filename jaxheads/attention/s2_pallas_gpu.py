"""S2 attention on GPUs: Pallas kernels for the Triton compiler.

One program per query tile and head loops over the tiles that its row sees, read from a list in
global memory: tiles without a mask first, then the partial ones. The backward pass is two kernels,
one over the rows for dq and one over the columns for dk and dv, so nothing is added atomically.

An entry of a list is (tile index) * (merged rows) + (leading rows that see the key tile) - 1.

Reference: Lin et al. 2024, arXiv:2407.17678; the online softmax and its gradient are those of
Dao 2023, arXiv:2307.08691.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

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

SMALLEST = 16  # the smallest side of a product on tensor cores


class Launch(NamedTuple):
    """How a kernel is cut and compiled."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


# By bytes of an element: (forward, backward). Tiles of two-byte elements as in the Triton tutorial
# on fused attention; float32 halves them to fit shared memory.
LAUNCHES = {
    2: (Launch(128, 64, 8, 3), Launch(64, 64, 4, 2)),
    4: (Launch(64, 32, 4, 2), Launch(32, 32, 4, 2)),
}


def attend(
    q: Array,
    k: Array,
    v: Array,
    pattern: ShardPattern,
    *,
    scale: float | None = None,
    forward: Launch | None = None,
    backward: Launch | None = None,
    interpret: bool | None = None,
) -> tuple[Array, Array]:
    """S2 attention of whole sequences, with derivatives for z and lse.

        z = softmax(scale q.k, over the keys that `pattern` lets a head see) v

    Args:
      q: [B,T,H,D], bfloat16, float16 or float32.
      k: [B,T,K,D].
      v: [B,T,K,D].
      pattern: blocks of any size; smaller than `block_q`, rows are merged where the pattern is
        KV-cache efficient.
      scale: factor on q.k; None = 1/sqrt(D).
      forward: tile sizes and compiler options; None = by the dtype, cut to the pattern.
      backward: the same for both backward kernels.
      interpret: True runs the kernel's operations as plain JAX; None = everywhere but on CUDA.
    Returns:
      z [B,T,H,D] in the dtype of q, lse [B,H,T] float32.
    Raises:
      ValueError: tiles or shapes that do not fit the pattern.
    """
    kernels.check_arrays(q, k, v, pattern)
    head_dim = q.shape[-1]
    padded_dim = max(SMALLEST, 1 << (head_dim - 1).bit_length())
    defaults = (_fit(x, pattern) for x in LAUNCHES[q.dtype.itemsize])
    launches = tuple(x or y for x, y in zip((forward, backward), defaults, strict=True))
    align = max(max(x.block_q, x.block_k) for x in launches)
    shapes = tuple(
        worklist.shape_of(pattern, q.shape[1], x.block_q, x.block_k, align) for x in launches
    )
    static = _Static(
        launches=launches,
        shapes=shapes,
        group=q.shape[2] // k.shape[2],
        visits=tuple(len(worklist.tiles_of(pattern, x).head) / k.shape[2] for x in shapes),
        scale=1 / math.sqrt(head_dim) if scale is None else scale,
    )
    length = shapes[0].padded

    def run(lists, q, k, v, interpret):
        pads = ((0, 0), (0, length - q.shape[1]), (0, 0), (0, padded_dim - head_dim))
        arrays = (jnp.pad(x, pads) if any(map(any, pads)) else x for x in (q, k, v))
        z, lse = cast(
            tuple[Array, Array], _attend(static._replace(interpret=interpret), lists, *arrays)
        )
        return z[:, : q.shape[1], :, :head_dim], lse[..., : q.shape[1]]

    make_lists = functools.partial(_lists, pattern, shapes)
    return kernels.launch(run, make_lists, q, k, v, platform="cuda", interpret=interpret)


def _fit(launch: Launch, pattern: ShardPattern) -> Launch:
    """Tiles no larger than the pattern allows."""
    block_q = launch.block_q
    if pattern.block < block_q and not pattern.is_kv_cache_efficient():
        block_q = pattern.block
    return launch._replace(block_q=block_q, block_k=min(launch.block_k, pattern.block))


class _Static(NamedTuple):
    """The part of a call that shapes the program."""

    launches: tuple[Launch, ...]  # forward, backward
    shapes: tuple[worklist.Shape, ...]
    group: int  # query heads per kv head
    scale: float
    visits: tuple[float, ...]  # tiles of a head, on average
    interpret: bool = False


class _List(NamedTuple):
    """[shards,K,rows,S] words and [shards,K,rows,2] counts: visits without a mask, all visits."""

    words: Array
    counts: Array


class _Lists(NamedTuple):
    forward: _List
    rows: _List
    columns: _List


@functools.lru_cache(maxsize=16)
def _lists(pattern: ShardPattern, shapes: tuple[worklist.Shape, ...], shards: int) -> _Lists:
    forward, backward = (worklist.tiles_of(pattern, shape) for shape in shapes)
    by_row = lambda tiles, shape: _list(tiles, shape, tiles.q, tiles.k, shape.num_q, shards)
    columns = worklist.by_column(backward)
    return _Lists(
        by_row(forward, shapes[0]),
        by_row(backward, shapes[1]),
        _list(columns, shapes[1], columns.k, columns.q, shapes[1].num_k, shards),
    )


def _list(tiles, shape: worklist.Shape, inner, other, num_inner: int, shards: int) -> _List:
    word = other * shape.merged + tiles.rows - 1
    groups = shape.num_heads * num_inner
    lists = worklist.padded_lists(tiles.head * num_inner + inner, word, tiles.is_partial, groups)
    split = lambda x: x.reshape(shards, shape.num_heads // shards, num_inner, -1)
    return _List(*map(split, lists))


def _visits(shape: worklist.Shape, words, counts, visit, carry):
    """Folds `visit(other tile, leading rows or None, carry)` over a list."""

    def step(is_partial, n, carry):
        word = words[n]
        tile = jax.lax.shift_right_logical(word, jnp.int32(shape.merged.bit_length() - 1))
        rows = (word & (shape.merged - 1)) + 1
        return visit(tile, rows if is_partial else None, carry)

    num_full, num_all = counts[0], counts[1]
    carry = jax.lax.fori_loop(0, num_full, functools.partial(step, False), carry)
    return jax.lax.fori_loop(num_full, num_all, functools.partial(step, True), carry)


def _scores(static: _Static, shape, q, k, q_tile, k_tile, rows, *, q_axis: int) -> Array:
    """Scaled scores of a tile, base 2, masked unless `rows` is None."""
    scores = dot(q, k, (1, 1)) if q_axis == 0 else dot(k, q, (1, 1))
    scores = scores * (static.scale * LOG2E)
    if rows is None:
        return scores
    return jnp.where(visible(shape, q_tile, k_tile, rows, q_axis=q_axis), scores, MASKED)


def _forward_kernel(static: _Static, words, counts, q_ref, k_ref, v_ref, z_ref, lse_ref) -> None:
    shape = static.shapes[0]
    q_tile = shape.num_q - 1 - pl.program_id(0)
    q = q_ref[...]

    def visit(k_tile, rows, carry):
        z, highest, total = carry
        keys = pl.ds(k_tile * shape.block_k, shape.block_k)
        scores = _scores(static, shape, q, k_ref[keys, :], q_tile, k_tile, rows, q_axis=0)
        weights, keep, highest, total = softmax_step(scores, highest, total)
        v = v_ref[keys, :]
        return z * keep + dot(weights.astype(v.dtype), v), highest, total

    start = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full((shape.block_q, 1), MASKED, jnp.float32),
        jnp.zeros((shape.block_q, 1), jnp.float32),
    )
    z, highest, total = _visits(shape, words, counts, visit, start)
    z_ref[...] = (z / total).astype(z_ref.dtype)
    lse_ref[...] = jnp.sum((highest + jnp.log2(total)) / LOG2E, axis=1)


def _dq_kernel(static, words, counts, q_ref, k_ref, v_ref, dz_ref, lse_ref, delta_ref, dq_ref):
    shape = static.shapes[1]
    q_tile = shape.num_q - 1 - pl.program_id(0)
    q, dz = q_ref[...], dz_ref[...]
    lse, delta = lse_ref[...][:, None], delta_ref[...][:, None]

    def visit(k_tile, rows, dq):
        keys = pl.ds(k_tile * shape.block_k, shape.block_k)
        k = k_ref[keys, :]
        p = jnp.exp2(_scores(static, shape, q, k, q_tile, k_tile, rows, q_axis=0) - lse)
        ds = p * (dot(dz, v_ref[keys, :], (1, 1)) - delta)
        return dq + dot(ds.astype(k.dtype), k)

    dq = _visits(shape, words, counts, visit, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * static.scale).astype(dq_ref.dtype)


def _dkv_kernel(
    static, words, counts, q_ref, k_ref, v_ref, dz_ref, lse_ref, delta_ref, dk_ref, dv_ref
):
    shape = static.shapes[1]
    k_tile = pl.program_id(0)
    k, v = k_ref[...], v_ref[...]

    def one_head(member, sums):
        def visit(q_tile, rows, sums):
            dk, dv = sums
            queries = pl.ds(q_tile * shape.block_q, shape.block_q)
            q, dz = q_ref[queries, member, :], dz_ref[queries, member, :]
            lse, delta = lse_ref[member, queries][None], delta_ref[member, queries][None]
            p = jnp.exp2(_scores(static, shape, q, k, q_tile, k_tile, rows, q_axis=1) - lse)
            ds = p * (dot(v, dz, (1, 1)) - delta)
            return dk + dot(ds.astype(q.dtype), q), dv + dot(p.astype(dz.dtype), dz)

        return _visits(shape, words, counts, visit, sums)

    zero = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, static.group, one_head, (zero, zero))
    dk_ref[...] = (dk * static.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _run(static: _Static, name: str, lists: _List, *arrays: Array) -> tuple[Array, ...]:
    """Launches one kernel over (tiles, heads, batch)."""
    kernel, products, which = {
        "s2_forward": (_forward_kernel, 2, 0),
        "s2_backward_dq": (_dq_kernel, 3, 1),
        "s2_backward_dkv": (_dkv_kernel, 4, 1),
    }[name]
    q, k = arrays[:2]
    launch, shape, group = static.launches[which], static.shapes[which], static.group
    batch, length, num_heads, head_dim = q.shape
    by_column = name == "s2_backward_dkv"
    num_tiles, heads = (shape.num_k, k.shape[2]) if by_column else (shape.num_q, num_heads)
    # Rows near the end see the most: they start first, so that the last to run are short.
    tile = (lambda n: n) if by_column else (lambda n: num_tiles - 1 - n)
    kv_head = (lambda h: h) if by_column else (lambda h: h // group)

    def listed(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, size), lambda n, h, b: (kv_head(h), tile(n), 0))

    def here(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, size, None, head_dim), lambda n, h, b: (b, tile(n), h, 0))

    stat = jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32)
    if by_column:
        keys = here(shape.block_k)
        queries = pl.BlockSpec((None, length, group, head_dim), lambda n, h, b: (b, 0, h, 0))
        stats = pl.BlockSpec((None, group, length), lambda n, h, b: (b, h, 0))
        out_shapes, out_specs = [k, k], [keys, keys]
    else:
        keys = pl.BlockSpec((None, length, None, head_dim), lambda n, h, b: (b, 0, kv_head(h), 0))
        queries = here(shape.block_q)
        stats = pl.BlockSpec((None, None, shape.block_q), lambda n, h, b: (b, h, tile(n)))
        out_shapes, out_specs = [q], [queries]
        if name == "s2_forward":
            out_shapes, out_specs = [q, stat], [queries, stats]
    in_specs = [queries, keys, keys, queries, stats, stats][: len(arrays)]
    pairs = int(batch * num_heads * static.visits[which]) * shape.block_q * shape.block_k
    return pl.pallas_call(
        functools.partial(kernel, static),
        grid=(num_tiles, heads, batch),
        in_specs=[listed(lists.words.shape[-1]), listed(2), *in_specs],
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out_shapes],
        compiler_params=plgpu.CompilerParams(
            num_warps=launch.num_warps, num_stages=launch.num_stages
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * pairs * head_dim,
            bytes_accessed=sum(x.nbytes for x in arrays),
            transcendentals=pairs,
        ),
        interpret=static.interpret,
        name=name,
    )(lists.words, lists.counts, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, lists: _Lists, q: Array, k: Array, v: Array) -> tuple[Array, ...]:
    """q [B,T,H,D], k and v [B,T,K,D], padded -> z [B,T,H,D] and lse [B,H,T] float32."""
    return tuple(_run(static, "s2_forward", lists.forward, q, k, v))


def _attend_fwd(static: _Static, lists: _Lists, q: Array, k: Array, v: Array):
    # remat="names:lse" keeps both results, so that the kernel does not run again.
    out = cast(tuple[Array, Array], _attend(static, lists, q, k, v))
    z, lse = (checkpoint_name(x, "lse") for x in out)
    return (z, lse), (lists, q, k, v, z, lse)


def _attend_bwd(static: _Static, residuals, cotangents):
    lists, q, k, v, z, lse = residuals
    dz, dlse = cotangents
    delta = jnp.einsum("bth->bht", row_dot(z, dz)) - dlse
    arrays = (q, k, v, dz, lse * LOG2E, delta)
    (dq,) = _run(static, "s2_backward_dq", lists.rows, *arrays)
    dk, dv = _run(static, "s2_backward_dkv", lists.columns, *arrays)
    return None, dq, dk, dv


_attend.defvjp(_attend_fwd, _attend_bwd)
