"""Gradients of one piece of keys and queries on TPU, given the log-sum-exp over all keys.

With p = exp(scores - lse), ds = p (dout v^T - delta), in tiles that stay in VMEM:

    dv = p^T dout,   dk = scale ds^T q   (a program per block of keys, over its heads' queries)
    dq = scale ds k                      (a program per block of queries, over the keys)

Splash attention has these products too, but only behind a derivative that takes its own
log-sum-exp; a ring needs the one over all blocks. Scores are held transposed, [keys, queries], so
that a query's lse and delta are rows and nothing is turned in registers.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.typing import Array

LANES = 128
EMPTY = 1e30  # in place of lse = -inf: every weight of such a row is zero


class Rule(NamedTuple):
    """The static part of a kernel."""

    kind: str  # "full", "causal" or "below"
    soft_cap: float | None
    block_q: int
    block_k: int
    steps_q: int  # blocks of queries in a head


def piece_gradients(
    q: Array,
    k: Array,
    v: Array,
    dout: Array,
    lse: Array,
    delta: Array,
    q_ids: Array | None,
    k_ids: Array | None,
    *,
    kind: str,
    scale: float,
    soft_cap: float | None,
    block_q: int,
    block_k: int,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """dq [B,H,T,D], dk and dv [B,K,S,D], float32.

    Args:
      q: [B,H,T,D]; T is a multiple of `block_q`, which is one of 128.
      k: [B,K,S,D]; S is a multiple of `block_k`, which is one of 128.
      v: [B,K,S,D].
      dout: [B,H,T,D] cotangent of the output over all keys.
      lse: [B,H,T] over all keys, -inf for rows that see none.
      delta: [B,H,T] sum(out dout) - dlse.
      q_ids: [B,T] segment ids; None = one segment.
      k_ids: [B,S].
      kind: "full", "causal" (query t sees keys s <= t of this piece) or "below" (s < t).
      scale: factor on q.k.
      soft_cap: bound of the tanh cap on the scaled scores.
      block_q: queries in a tile.
      block_k: keys in a tile.
      interpret: run without a TPU, for tests.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    batch, num_heads, num_queries, width = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    group = num_heads // num_kv_heads
    steps_q, steps_k = num_queries // block_q, num_keys // block_k
    rule = Rule(kind, soft_cap, block_q, block_k, steps_q)
    q = q * jnp.asarray(scale, q.dtype)  # rounded as in the forward pass
    row = lambda x: x[:, :, None, :]  # [B,H,1,T]
    lse = row(jnp.where(jnp.isneginf(lse), EMPTY, lse).astype(jnp.float32))
    args = [q, k, v, dout.astype(q.dtype), lse, row(delta.astype(jnp.float32))]
    has_ids = q_ids is not None and k_ids is not None
    if q_ids is not None and k_ids is not None:
        columns = jnp.broadcast_to(k_ids[:, :, None], (*k_ids.shape, LANES))
        args += [q_ids[:, None, :], columns]

    def call(kernel, grid, places, outs, scratch):
        """`places` maps a program to (query head, kv head, block of queries, block of keys)."""
        head = lambda pick: lambda b, *at: (b, places(*at)[pick[0]], places(*at)[pick[1]], 0)
        queries = pl.BlockSpec((1, 1, block_q, width), head((0, 2)))
        keys = pl.BlockSpec((1, 1, block_k, width), head((1, 3)))
        rows = pl.BlockSpec(
            (1, 1, 1, block_q), lambda b, *at: (b, places(*at)[0], 0, places(*at)[2])
        )
        in_specs = [queries, keys, keys, queries, rows, rows]
        if has_ids:
            in_specs += [
                pl.BlockSpec((1, 1, block_q), lambda b, *at: (b, 0, places(*at)[2])),
                pl.BlockSpec((1, block_k, LANES), lambda b, *at: (b, places(*at)[3], 0)),
            ]
        return pl.pallas_call(
            functools.partial(kernel, rule, has_ids),
            grid=grid,
            in_specs=in_specs,
            out_specs=[queries if name == "q" else keys for name in outs],
            out_shape=[
                jax.ShapeDtypeStruct((q if name == "q" else k).shape, jnp.float32) for name in outs
            ],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
            ),
            interpret=interpret,
            name=f"ring_backward_{''.join(outs)}_{kind}",
        )(*args)

    by_keys = lambda kv, j, i: (kv * group + i // steps_q, kv, i % steps_q, j)
    dk, dv = call(
        _key_kernel,
        (batch, num_kv_heads, steps_k, group * steps_q),
        by_keys,
        ("k", "v"),
        [(block_k, width)] * 2,
    )
    by_queries = lambda h, i, j: (h, h // group, i, j)
    (dq,) = call(
        _query_kernel,
        (batch, num_heads, steps_q, steps_k),
        by_queries,
        ("q",),
        [(block_q, width)],
    )
    return dq * scale, dk, dv


def _key_kernel(rule: Rule, has_ids: bool, *refs: Any) -> None:
    """dk and dv of a block of keys, over the blocks of queries of all heads that read it."""
    from jax.experimental import pallas as pl

    *inputs, dk_ref, dv_ref, dk_sum, dv_sum = refs
    key_block, step = pl.program_id(2), pl.program_id(3)
    query_block = step % rule.steps_q

    @pl.when(step == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when(_is_visible(rule, query_block, key_block))
    def _():
        p, ds = _weights(rule, has_ids, inputs, query_block, key_block)
        q, dout = inputs[0][0, 0], inputs[3][0, 0]
        dv_sum[...] += _dot(p.astype(dout.dtype), dout, ((1,), (0,)))
        dk_sum[...] += _dot(ds.astype(q.dtype), q, ((1,), (0,)))

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dk_ref[0, 0], dv_ref[0, 0] = dk_sum[...], dv_sum[...]


def _query_kernel(rule: Rule, has_ids: bool, *refs: Any) -> None:
    """dq of a block of queries, over the blocks of keys."""
    from jax.experimental import pallas as pl

    *inputs, dq_ref, dq_sum = refs
    query_block, key_block = pl.program_id(2), pl.program_id(3)

    @pl.when(key_block == 0)
    def _():
        dq_sum[...] = jnp.zeros_like(dq_sum)

    @pl.when(_is_visible(rule, query_block, key_block))
    def _():
        _, ds = _weights(rule, has_ids, inputs, query_block, key_block)
        k = inputs[1][0, 0]
        dq_sum[...] += _dot(ds.astype(k.dtype), k, ((0,), (0,)))

    @pl.when(key_block == pl.num_programs(3) - 1)
    def _():
        dq_ref[0, 0] = dq_sum[...]


def _weights(rule: Rule, has_ids: bool, inputs: list, query_block, key_block):
    """p and ds of one tile, both [keys, queries] float32."""
    q, k, v, dout = (ref[0, 0] for ref in inputs[:4])
    lse, delta = (ref[0, 0] for ref in inputs[4:6])  # [1, queries]
    scores = _dot(k, q, ((1,), (1,)))
    slope = None
    if rule.soft_cap is not None:
        capped = jnp.tanh(scores / rule.soft_cap)
        scores, slope = rule.soft_cap * capped, 1 - capped**2
    p = jnp.exp(scores - lse)
    visible = None
    if rule.kind != "full":
        shape = scores.shape
        key = key_block * rule.block_k + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        query = query_block * rule.block_q + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        visible = query >= key if rule.kind == "causal" else query > key
    if has_ids:
        same = inputs[7][0][:, :1] == inputs[6][0]
        visible = same if visible is None else visible & same
    if visible is not None:
        p = jnp.where(visible, p, 0.0)
    ds = p * (_dot(v, dout, ((1,), (1,))) - delta)
    return p, ds if slope is None else ds * slope


def _is_visible(rule: Rule, query_block, key_block):
    """Whether some query of a block sees some key of a block, by position."""
    if rule.kind == "full":
        return query_block >= 0
    last_query = (query_block + 1) * rule.block_q - 1
    first_key = key_block * rule.block_k
    return last_query >= first_key if rule.kind == "causal" else last_query > first_key


def _dot(a: Array, b: Array, contracted: tuple) -> Array:
    return jax.lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=jnp.float32)
