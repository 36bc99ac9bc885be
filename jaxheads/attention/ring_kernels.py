"""A device's blocks in the ring by fused kernels: splash (TPU) and cuDNN (NVIDIA).

Kernels know few masks, so a block is cut into pieces between which there are four: in a causal
ring a piece of queries sees a piece of keys whole, up to the diagonal, below it, or not at all.

    contiguous   one piece;     step 0 is the diagonal, later a block is seen whole or not at all
    zigzag       two chunks;    the same for each pair, whole or not at all after step 0
    striped      one piece;     the diagonal where source <= rank, else below it

Which one holds in a later step depends on the device, so each takes its own branch. The kernels
also return the log-sum-exp, which has no derivative there: the backward pass has kernels of its own
on TPU (`ring_backward.py`) and recomputes tiles in XLA on GPU (`ring.py`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.attention.layouts import local_index
from jaxheads.attention.masks import FLOOR
from jaxheads.attention.merge import merge_pair
from jaxheads.attention.ring_backward import piece_gradients
from jaxheads.typing import Array

logger = logging.getLogger(__name__)
LANES = 128  # lengths and blocks of splash are multiples of it


class Piece(NamedTuple):
    """Queries, or keys and values, as the kernels take them."""

    arrays: tuple[Array, ...]  # [B,heads,length,D]
    segment_ids: Array | None  # [B,length]


Run = Callable[[str, Piece, Piece], tuple[Array, Array]]
"""(mask, queries, keys) -> out [B,H,t,W] float32 and lse [B,H,t]; masks are those of `relation`."""


def choose_local(walk, heads, marks, platform: str) -> str:
    """The kernel for a walk: "xla", "splash" or "cudnn".

    Raises:
      NotImplementedError: a kernel asked for by name that cannot do the call.
    """
    if walk.local == "xla":
        return "xla"
    if walk.local != "auto":
        asked = "splash" if walk.local == "pallas" else str(walk.local)
        reason = _reason_not(asked, walk, heads, marks, platform)
        if reason is not None:
            raise NotImplementedError(
                f"local_impl={walk.local!r} cannot compute the blocks of this call: {reason}; pass "
                "local_impl='auto' or 'xla'."
            )
        return asked
    if platform not in ("tpu", "gpu"):
        return "xla"
    fused = "splash" if platform == "tpu" else "cudnn"
    reason = _reason_not(fused, walk, heads, marks, platform)
    if reason is None:
        return fused
    _log_once(fused, reason)
    return "xla"


@functools.cache
def _log_once(name: str, reason: str) -> None:
    logger.warning("distributed attention: blocks by XLA, not %s: %s.", name, reason)


def _reason_not(name: str, walk, heads, marks, platform: str) -> str | None:
    length, num_keys, width = heads.q.shape[1], heads.k.shape[1], heads.q.shape[-1]
    piece = length // (2 if walk.layout == "zigzag" and walk.size > 1 else 1)
    tpu = name == "splash"
    is_typed = bool(jax.typeof(heads.q).manual_axis_type.varying)
    reasons: tuple[tuple[Any, str], ...] = (
        (platform != ("tpu" if tpu else "gpu"), f"it does not run on {platform}"),
        (walk.window is not None, "it takes no window between blocks of a ring"),
        (heads.slopes is not None or walk.bias_fn is not None, "it takes no bias"),
        (walk.mask_fn is not None, "it takes no mask function"),
        (marks.prefix_lengths is not None, "it takes no prefix"),
        (marks.q_index is not None, "it takes no queries numbered by hand"),
        (walk.is_causal and length != num_keys, "its causality needs as many keys as queries"),
        (heads.v.shape[-1] != width, "it needs values as wide as the keys"),
        (is_typed, "it cannot say how its results vary in a shard_map with check_vma=True"),
        (
            tpu and (piece % LANES or num_keys % LANES),
            f"it needs pieces that are multiples of {LANES}, not {piece} queries and {num_keys} "
            "keys",
        ),
        (
            tpu and width > LANES and width % LANES,
            f"it needs head_dim up to {LANES} or a multiple of it, not {width}",
        ),
        (
            not tpu and heads.q.dtype not in (jnp.bfloat16, jnp.float16),
            f"it computes in bfloat16 or float16, not {heads.q.dtype}",
        ),
        (
            not tpu and (marks.q_segment_ids is not None or marks.kv_lengths is not None),
            "it takes segment ids and lengths only as a dense mask",
        ),
        (not tpu and walk.soft_cap is not None, "it has no soft_cap"),
        (not tpu and (width % 8 or width > 128), f"it needs head_dim up to 128, not {width}"),
        (
            not tpu and walk.is_causal and walk.layout == "striped" and walk.size > 1,
            "it has no mask below the diagonal, which layout='striped' needs",
        ),
    )
    return next((reason for holds, reason in reasons if holds), None)


def relation(walk, i: int, j: int, step, rank, source):
    """How piece i of the queries sees piece j of the keys.

    Returns:
      "full", "causal", "below" (the diagonal excluded), "none"; or (which, a, b): a where the
      traced `which` holds, else b.
    """
    if not walk.is_causal:
        return "full"
    is_first = isinstance(step, int) and step == 0
    if walk.layout == "striped" and walk.size > 1:
        return "causal" if is_first else (source < rank, "causal", "below")
    if is_first:
        return "causal" if i == j else "full" if i > j else "none"
    chunk = lambda piece, device: device if piece == 0 else 2 * walk.size - 1 - device
    return chunk(i, rank) > chunk(j, source), "full", "none"


def visit_pieces(walk, run: Run, queries: list[Piece], keys: list[Piece], step, rank, state):
    """Merges a block of keys into the state: one (out, lse) per piece of queries; None before."""
    source = (rank - step) % walk.size
    new = []
    for i, query in enumerate(queries):
        total = None if state is None else state[i]
        for j, key in enumerate(keys):
            total = _visit(relation(walk, i, j, step, rank, source), run, query, key, total)
        new.append(total)
    return tuple(new)


def _visit(kind, run: Run, query: Piece, key: Piece, total):
    if isinstance(kind, str):
        if kind == "none":
            return total
        found = run(kind, query, key)
        return found if total is None else merge_pair(total, found)
    which, a, b = kind

    def add(kind: str) -> Callable:
        if kind == "none":
            return lambda total: total
        return lambda total: merge_pair(total, run(kind, query, key))

    return jax.lax.cond(which, add(a), add(b), total)


def cut(walk, arrays: tuple[Array, ...], segment_ids: Array | None) -> list[Piece]:
    """Arrays [B,heads,length,D] of one device as the pieces of its layout."""
    num_pieces = 2 if walk.layout == "zigzag" and walk.size > 1 else 1
    parts = [jnp.split(x, num_pieces, axis=2) for x in arrays]
    ids = [None] * num_pieces
    if segment_ids is not None:
        ids = jnp.split(segment_ids, num_pieces, axis=1)
    return [Piece(tuple(p[i] for p in parts), ids[i]) for i in range(num_pieces)]


def key_ids(walk, marks, num_keys: int, segment_ids: Array | None, source) -> Array | None:
    """Segment ids [B,S] of a block's keys in which no query has the id of an invisible key."""
    if segment_ids is None and marks.kv_lengths is None:
        return None
    if segment_ids is None:
        segment_ids = jnp.ones((marks.kv_lengths.shape[0], num_keys), jnp.int32)
    visible = segment_ids != 0
    if marks.kv_lengths is not None:
        index = local_index(walk.layout, num_keys, walk.size, source)
        visible = visible & (index < marks.kv_lengths[:, None])
    return jnp.where(visible, segment_ids, -1)


def query_ids(marks, num_queries: int) -> Array | None:
    """Segment ids [B,T] of this device's queries, where its keys have any."""
    if marks.q_segment_ids is not None or marks.kv_lengths is None:
        return marks.q_segment_ids
    return jnp.ones((marks.kv_lengths.shape[0], num_queries), jnp.int32)


def splash_run(walk, interpret: bool = False) -> Run:
    """`Run` by splash attention."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    from jaxheads.attention.kernels import splash_block_size

    def run(kind: str, query: Piece, key: Piece) -> tuple[Array, Array]:
        (q,), (k, v) = query.arrays, key.arrays
        shape = (q.shape[2], k.shape[2])
        masks = {
            "full": lambda: splash.FullMask(shape),
            "causal": lambda: splash.CausalMask(shape),
            "below": lambda: splash.CausalMask(shape, offset=-1),
        }
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([masks[kind]()] * q.shape[1]),
            head_shards=1,
            q_seq_shards=1,
            save_residuals=True,
            attn_logits_soft_cap=walk.soft_cap,
            interpret=interpret,
            block_sizes=splash.BlockSizes(
                block_q=splash_block_size(shape[0]), block_kv=splash_block_size(shape[1])
            ),
        )
        ids = None
        if query.segment_ids is not None and key.segment_ids is not None:
            ids = splash.SegmentIds(query.segment_ids, key.segment_ids)
        q = q * jnp.asarray(walk.scale, q.dtype)
        axes = (0, 0, 0, None if ids is None else 0)
        out, (lse,) = jax.vmap(kernel, in_axes=axes)(q, k, v, ids)
        # A row without a visible key has averaged all: its scores are all the mask's value.
        is_empty = lse < FLOOR
        out = jnp.where(is_empty[..., None], 0, out.astype(jnp.float32))
        return out, jnp.where(is_empty, -jnp.inf, lse.astype(jnp.float32))

    return run


def cudnn_run(walk, implementation: str = "cudnn") -> Run:
    """`Run` by `jax.nn.dot_product_attention`."""

    def run(kind: str, query: Piece, key: Piece) -> tuple[Array, Array]:
        q, k, v = (jnp.einsum("bhtd->bthd", x) for x in (*query.arrays, *key.arrays))
        out, lse = jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=walk.scale,
            is_causal=kind == "causal",
            implementation=implementation,  # type: ignore[arg-type]
            return_residual=True,
        )
        out = jnp.einsum("bthd->bhtd", out).astype(jnp.float32)
        return out, jnp.einsum("bth->bht", lse).astype(jnp.float32)

    return run


def pieces_gradients(
    walk, queries: list[Piece], keys: list[Piece], step, rank, *, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """dq [B,H,T,D], dk and dv [B,K,S,D], float32, of one block of keys.

    Args:
      queries: pieces with arrays (q, dout [B,H,t,D], lse, delta [B,H,t]).
      keys: pieces with arrays (k, v).
    """
    from jaxheads.attention.kernels import splash_block_size

    source = (rank - step) % walk.size
    dqs: list = [None] * len(queries)
    dkvs: list = [None] * len(keys)

    def of(kind: str, query: Piece, key: Piece) -> tuple[Array, Array, Array]:
        q, dout, lse, delta = query.arrays
        k, v = key.arrays
        if kind == "none":
            return tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))  # type: ignore
        return piece_gradients(
            q,
            k,
            v,
            dout,
            lse,
            delta,
            query.segment_ids,
            key.segment_ids,
            kind=kind,
            scale=walk.scale,
            soft_cap=walk.soft_cap,
            block_q=splash_block_size(q.shape[2]),
            block_k=splash_block_size(k.shape[2]),
            interpret=interpret,
        )

    add = lambda old, new: new if old is None else jax.tree.map(jnp.add, old, new)
    for i, query in enumerate(queries):
        for j, key in enumerate(keys):
            kind = relation(walk, i, j, step, rank, source)
            if isinstance(kind, str):
                dq, dk, dv = of(kind, query, key)
            else:
                a, b = (functools.partial(of, each) for each in kind[1:])
                dq, dk, dv = jax.lax.cond(kind[0], a, b, query, key)
            dqs[i], dkvs[j] = add(dqs[i], dq), add(dkvs[j], (dk, dv))
    join = lambda parts: jnp.concatenate(parts, axis=2)
    return join(dqs), join([dk for dk, _ in dkvs]), join([dv for _, dv in dkvs])


RUNS: dict[str, Callable[..., Run]] = {"splash": splash_run, "cudnn": cudnn_run}
GRADIENTS: dict[str, Callable] = {"splash": pieces_gradients}
