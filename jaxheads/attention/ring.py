"""Exact attention of one device's queries over the keys of all: the schedules `ring` and `gather`.

Both walk over the n blocks of keys that the devices of the sequence axis hold. In step t device r
attends to the block that came from device (r - t) mod n and merges (`merge.merge_pair`). `ring`
passes the blocks on to the right neighbour, the next one travelling while this one is computed;
`gather` collects them all first. Blocks of which no query sees a key are skipped, by a branch that
each device takes for itself.

The backward pass is a rule of our own for the whole walk. It keeps q, k, v, out and lse; with
p = exp(scores - lse) and delta = sum(out dout) - dlse every block's gradients follow from that
block alone, and in the ring dk and dv travel with their block until they are home.

These functions run inside `jax.shard_map`.
References: Liu et al., 2023, arXiv:2310.01889; Dao, 2023, arXiv:2307.08691.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxheads.attention import ring_kernels as kernels
from jaxheads.attention.api import platform
from jaxheads.attention.blocked import (
    Operands,
    Tiling,
    backward_tiles,
    forward_tiles,
    tile,
    untile,
    untile_lse,
)
from jaxheads.attention.dense import group_rows
from jaxheads.attention.layouts import local_index
from jaxheads.attention.masks import Mask
from jaxheads.attention.merge import merge_pair
from jaxheads.typing import Array, PyTree, vary_like

UNROLLED_STEPS = 8  # a longer walk is a scan: a small program rather than the best overlap


class Walk(NamedTuple):
    """The static part of a call on one device."""

    schedule: str
    axis: str | tuple[str, ...] | None  # the mesh axis of the sequence; None = one device
    size: int  # devices along it
    layout: str
    is_causal: bool
    window: int | tuple[int, int] | None
    scale: float
    soft_cap: float | None
    block_q: int
    block_k: int
    local: str
    needs_lse: bool
    mask_fn: Callable[[Array, Array], Array] | None = None
    bias_fn: Callable[[Array, Array], Array] | None = None


class Heads(NamedTuple):
    """The differentiable part: what this device holds."""

    q: Array  # [B,T,H,D]
    k: Array  # [B,S,K,D]
    v: Array  # [B,S,K,W]
    slopes: Array | None = None  # [H]


class Marks(NamedTuple):
    """What hides keys besides their index; no gradients."""

    q_segment_ids: Array | None = None  # [B,T]
    k_segment_ids: Array | None = None  # [B,S]
    kv_lengths: Array | None = None  # [B]
    prefix_lengths: Array | None = None  # [B]
    q_index: Array | None = None  # [T], where the queries are not those of the layout


class Block(NamedTuple):
    """The keys of one device, as they travel: [B,K,S,...], padded to whole tiles."""

    k: Array
    v: Array
    segment_ids: Array | None  # [B,S], not padded


def walk_attention(walk: Walk, heads: Heads, marks: Marks) -> tuple[Array, Array]:
    """out [B,T,H,W] in the dtype of q and lse [B,H,T] float32, for this device's queries."""
    walk = walk._replace(local=kernels.choose_local(walk, heads, marks, platform()))
    # One type of variation over the mesh for everything: loops and branches then agree.
    heads, marks = vary_like((heads, marks), heads, marks, _rank(walk))
    return cast(tuple[Array, Array], _attend(walk, heads, marks))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(walk: Walk, heads: Heads, marks: Marks) -> tuple[Array, Array]:
    return _forward(walk, heads, marks)


def _forward(walk: Walk, heads: Heads, marks: Marks) -> tuple[Array, Array]:
    if walk.local != "xla":
        return _forward_by_kernel(walk, heads, marks)
    tiling, operands, block = _tiles(walk, heads, marks)
    masks = functools.partial(_mask, walk, heads, marks)

    def attend(block: Block, step) -> tuple[Array, Array]:
        mask = masks(block.segment_ids, _source(walk, step))
        return forward_tiles(
            tiling, operands._replace(k=block.k, v=block.v), _pad(mask, tiling, operands)
        )

    def visit(block: Block, step, state):
        sees = _sees(masks(block.segment_ids, _source(walk, step)), heads)
        add = lambda state: merge_pair(state, attend(block, step))
        return jax.lax.cond(sees, add, lambda state: state, state)

    state = attend(block, 0)
    z, lse = _FORWARD[walk.schedule](walk, num_steps(walk, heads, marks), block, state, visit)
    num_queries = heads.q.shape[1]
    out = untile(z, num_queries, tiling).astype(heads.q.dtype)
    return out, untile_lse(lse, num_queries, tiling)


def _forward_by_kernel(walk: Walk, heads: Heads, marks: Marks) -> tuple[Array, Array]:
    """`_forward` with the blocks computed by a fused kernel."""
    run, rank = kernels.RUNS[walk.local](walk), _rank(walk)
    num_queries, num_keys = heads.q.shape[1], heads.k.shape[1]
    q, k, v = (jnp.einsum("bthd->bhtd", x) for x in (heads.q, heads.k, heads.v))
    queries = kernels.cut(walk, (q,), kernels.query_ids(marks, num_queries))
    block = Block(k, v, marks.k_segment_ids)

    def visit(block: Block, step, state):
        ids = kernels.key_ids(walk, marks, num_keys, block.segment_ids, _source(walk, step))
        keys = kernels.cut(walk, (block.k, block.v), ids)
        return kernels.visit_pieces(walk, run, queries, keys, step, rank, state)

    state = visit(block, 0, None)
    state = _FORWARD[walk.schedule](walk, num_steps(walk, heads, marks), block, state, visit)
    out = jnp.concatenate([out for out, _ in state], axis=2)
    lse = jnp.concatenate([lse for _, lse in state], axis=2)
    return jnp.einsum("bhtd->bthd", out).astype(heads.q.dtype), lse


def _attend_fwd(walk: Walk, heads: Heads, marks: Marks):
    out, lse = _forward(walk, heads, marks)
    # remat="names:lse" keeps these, as it does for the fused kernels: one walk less.
    out, lse = checkpoint_name(out, "lse"), checkpoint_name(lse, "lse")
    return (out, lse), (heads, marks, out, lse)


def _attend_bwd(walk: Walk, residuals, cotangents):
    heads, marks, out, lse = residuals
    dout, dlse = cotangents
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=-1)  # [B,T,H]
    delta = delta - jnp.einsum("bht->bth", dlse)
    backward = _backward_by_kernel if walk.local in kernels.GRADIENTS else _backward
    grads = backward(walk, heads, marks, dout, lse, delta)
    return jax.tree.map(lambda x, dx: dx.astype(x.dtype), heads, grads), None


def _backward(walk: Walk, heads: Heads, marks: Marks, dout, lse, delta) -> Heads:
    """The gradients of everything: dout [B,T,H,W], lse [B,H,T], delta [B,T,H]."""
    tiling, operands, block = _tiles(walk, heads, marks)
    masks = functools.partial(_mask, walk, heads, marks)
    rows = functools.partial(_rows, tiling, operands)
    dz = rows(dout)
    lse = rows(jnp.einsum("bht->bth", lse)[..., None])[..., 0]
    delta = rows(delta[..., None])[..., 0]

    def gradients(block: Block, step) -> Operands:
        """Those of everything, from one block."""
        mask = masks(block.segment_ids, _source(walk, step))
        these = operands._replace(k=block.k, v=block.v)
        return backward_tiles(tiling, these, _pad(mask, tiling, operands), dz, lse, delta)

    def visit(block: Block, step) -> Operands:
        sees = _sees(masks(block.segment_ids, _source(walk, step)), heads)
        compute = lambda block: gradients(block, step)
        skip = lambda block: vary_like(zeros, block, dz, lse, delta)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, block))
        return jax.lax.cond(sees, compute, skip, block)

    found = gradients(block, 0)
    found = _BACKWARD[walk.schedule](walk, num_steps(walk, heads, marks), block, found, visit)
    num_queries, num_keys = heads.q.shape[1], heads.k.shape[1]
    keys = lambda x: jnp.einsum("bksd->bskd", x)[:, :num_keys]
    return Heads(untile(found.q, num_queries, tiling), keys(found.k), keys(found.v), found.slopes)


def _backward_by_kernel(walk: Walk, heads: Heads, marks: Marks, dout, lse, delta) -> Heads:
    """`_backward` with the gradients of each block computed by a fused kernel."""
    rank, turn = _rank(walk), functools.partial(jnp.einsum, "bthd->bhtd")
    num_queries, num_keys = heads.q.shape[1], heads.k.shape[1]
    rows = (turn(heads.q), turn(dout), lse, jnp.einsum("bth->bht", delta))
    queries = kernels.cut(walk, rows, kernels.query_ids(marks, num_queries))
    block = Block(turn(heads.k), turn(heads.v), marks.k_segment_ids)

    def visit(block: Block, step) -> Operands:
        ids = kernels.key_ids(walk, marks, num_keys, block.segment_ids, _source(walk, step))
        keys = kernels.cut(walk, (block.k, block.v), ids)
        dq, dk, dv = kernels.GRADIENTS[walk.local](walk, queries, keys, step, rank)
        return Operands(dq, dk, dv, None, None, None)

    steps = num_steps(walk, heads, marks)
    found = _BACKWARD[walk.schedule](walk, steps, block, visit(block, 0), visit)
    back = functools.partial(jnp.einsum, "bhtd->bthd")
    return Heads(back(found.q), back(found.k), back(found.v), None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _ring_forward(walk: Walk, steps: int, block: Block, state, visit: Callable):
    if steps == 1:
        return state

    def step(carry, index):
        block, state = carry
        following = _pass_on(walk, block)  # on its way while this block is computed
        return (following, visit(block, index, state)), None

    carry, _ = _steps(step, (_pass_on(walk, block), state), range(1, steps - 1))
    block, state = carry
    return visit(block, steps - 1, state)


def _ring_backward(walk: Walk, steps: int, block: Block, found: Operands, visit: Callable):
    if steps == 1:
        return found

    def add(total: Operands, arriving: tuple[Array, Array], new: Operands) -> Operands:
        slopes = _add(total.slopes, new.slopes)
        return total._replace(
            q=total.q + new.q, k=arriving[0] + new.k, v=arriving[1] + new.v, slopes=slopes
        )

    def step(carry, index):
        block, total = carry
        following = _pass_on(walk, block)
        arriving = _pass_on(walk, (total.k, total.v))  # needed only after this block
        return (following, add(total, arriving, visit(block, index))), None

    carry, _ = _steps(step, (_pass_on(walk, block), found), range(1, steps - 1))
    block, total = carry
    arriving = _pass_on(walk, (total.k, total.v))
    total = add(total, arriving, visit(block, steps - 1))
    dk, dv = _pass_on(walk, (total.k, total.v), by=walk.size - (steps - 1))
    return total._replace(k=dk, v=dv)


def _gather_forward(walk: Walk, steps: int, block: Block, state, visit: Callable):
    everything = _all_gather(walk, block)

    def step(state, index):
        return visit(_of(everything, _source(walk, index)), index, state), None

    return _steps(step, state, range(1, steps))[0]


def _gather_backward(walk: Walk, steps: int, block: Block, found: Operands, visit: Callable):
    if walk.size == 1:
        return found
    everything = _all_gather(walk, block)

    def step(total, index):
        new = visit(_of(everything, _source(walk, index)), index)
        slopes = _add(total.slopes, new.slopes)
        return total._replace(q=total.q + new.q, slopes=slopes), (new.k, new.v)

    total, rest = _steps(step, found, range(1, steps))
    # What was found for the block of device s goes to device s: [n,...], by step -> by device.
    by_device = (_rank(walk) - jnp.arange(walk.size)) % walk.size

    def home(first: Array, others: Array | None) -> Array:
        by_step = first[None] if others is None else jnp.concatenate([first[None], others])
        missing = [(0, walk.size - steps)] + [(0, 0)] * first.ndim
        by_step = jnp.pad(by_step, missing)
        return jax.lax.psum_scatter(by_step[by_device], walk.axis, scatter_dimension=0)

    dk, dv = (home(a, b) for a, b in zip((found.k, found.v), rest or (None, None), strict=True))
    return total._replace(k=dk, v=dv)


_FORWARD: dict[str, Callable] = {"ring": _ring_forward, "gather": _gather_forward}
_BACKWARD: dict[str, Callable] = {"ring": _ring_backward, "gather": _gather_backward}


def num_steps(walk: Walk, heads: Heads, marks: Marks) -> int:
    """Blocks that some device sees: all of them, or the near ones of a causal window."""
    left, right = Mask(is_causal=walk.is_causal, window=walk.window).reach
    length = heads.k.shape[1]
    moved = marks.prefix_lengths is not None or marks.q_index is not None
    is_whole = walk.layout != "contiguous" or moved or heads.q.shape[1] != length
    if is_whole or right != 0 or left is None:
        return walk.size
    return min(walk.size, 1 + (left + length - 1) // length)


def _steps(step: Callable, carry: PyTree, indices: range) -> tuple[PyTree, Any]:
    """Like `jax.lax.scan` over `indices`, unrolled when they are few."""
    if len(indices) > UNROLLED_STEPS:
        return jax.lax.scan(step, carry, jnp.arange(indices.start, indices.stop))
    outs = []
    for index in indices:
        carry, out = step(carry, index)
        outs.append(out)
    if not outs or outs[0] is None:
        return carry, None
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *outs)


def _tiles(walk: Walk, heads: Heads, marks: Marks) -> tuple[Tiling, Operands, Block]:
    """Everything in the shape of tiles, once for all steps."""
    tiling, operands, _ = tile(
        heads.q,
        heads.k,
        heads.v,
        Mask(),
        scale=walk.scale,
        soft_cap=walk.soft_cap,
        alibi_slopes=heads.slopes,
        block_q=walk.block_q,
        block_k=walk.block_k,
        mask_fn=walk.mask_fn,
        bias_fn=walk.bias_fn,
    )
    return tiling, operands, Block(operands.k, operands.v, marks.k_segment_ids)


def _rows(tiling: Tiling, operands: Operands, x: Array) -> Array:
    """[B,T,H,...] -> rows [B,K,X,...] of padded queries."""
    padded = operands.q.shape[2] // tiling.groups[1]
    x = jnp.pad(x, ((0, 0), (0, padded - x.shape[1]), (0, 0), (0, 0)))
    return group_rows(x, tiling.groups[0])


def _mask(walk: Walk, heads: Heads, marks: Marks, k_segment_ids: Array | None, source) -> Mask:
    """Who sees whom between this device's queries and the keys of device `source`."""
    rank = _rank(walk)
    q_index = marks.q_index
    if q_index is None:
        q_index = local_index(walk.layout, heads.q.shape[1], walk.size, rank)
    k_index = local_index(walk.layout, heads.k.shape[1], walk.size, source)
    lengths = marks.kv_lengths
    mask = Mask(
        is_causal=walk.is_causal,
        window=walk.window,
        q_index=q_index,
        k_index=k_index,
        q_segment_ids=marks.q_segment_ids,
        k_segment_ids=k_segment_ids,
        key_mask=None if lengths is None else k_index < lengths[:, None],
        prefix_lengths=marks.prefix_lengths,
    )
    return vary_like(mask, heads, marks, rank)


def _pad(mask: Mask, tiling: Tiling, operands: Operands) -> Mask:
    return mask.pad(operands.q.shape[2] // tiling.groups[1], operands.k.shape[2])


def _sees(mask: Mask, heads: Heads) -> Array:
    """Whether some query may see some key, by causality, window, lengths and segments."""
    low, high = mask.key_range((0, heads.q.shape[1]), heads.k.shape[1])
    sees = jnp.asarray(high) > low
    if mask.key_mask is not None:
        sees = sees & mask.key_mask.any()
    q_ids, k_ids = mask.q_segment_ids, mask.k_segment_ids
    if q_ids is not None and k_ids is not None:
        is_later = q_ids.min(axis=1) > k_ids.max(axis=1)
        is_earlier = q_ids.max(axis=1) < k_ids.min(axis=1)
        sees = sees & ~(is_later | is_earlier).all()
    return sees


def _add(total: Array | None, new: Array | None) -> Array | None:
    return None if total is None or new is None else total + new


def _rank(walk: Walk) -> Array:
    return jnp.int32(0) if walk.axis is None else jax.lax.axis_index(walk.axis)


def _source(walk: Walk, step) -> Array:
    return (_rank(walk) - step) % walk.size


def _pass_on(walk: Walk, tree: PyTree, by: int = 1) -> PyTree:
    """Every device's arrays to the device `by` places on."""
    if by % walk.size == 0:
        return tree
    pairs = [(i, (i + by) % walk.size) for i in range(walk.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, walk.axis, pairs), tree)


def _all_gather(walk: Walk, tree: PyTree) -> PyTree:
    """[n,...] of every array."""
    if walk.axis is None:
        return jax.tree.map(lambda x: x[None], tree)
    return jax.tree.map(lambda x: jax.lax.all_gather(x, walk.axis), tree)


def _of(tree: PyTree, source) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, source, keepdims=False), tree)
