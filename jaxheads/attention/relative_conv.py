"""Relative convolutional attention: convolved queries, keys and values; positions in the score.

    q, k, v <- conv(q), conv(k), conv(v)                                     MDHA, RCMHA
    s_ij = [q_i.k_j + u.k_j + q_i.R[d] + S[d]] / sqrt(D),   d = q_offset + i - j    RMHA, RCMHA
    z_i = sum_j softmax_j(s_ij, d >= 0) v_j

With neither switch this is causal multi-head attention. `rcmha_variant.py` puts it into decoders,
`models/transformer_xl.py` into a model with a memory of the previous segments.

References: Sugiharto et al., 2023, arXiv:2308.03429; Dai et al., 2019, arXiv:1901.02860; So et al.,
2021, arXiv:2109.08668.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.attention.api import attend
from jaxheads.attention.contract import AttentionContext
from jaxheads.attention.masks import Mask, as_4d
from jaxheads.taps import NO_TAP, Record, Tap, Taps
from jaxheads.typing import Array, is_traced

TERMS = ("content", "key_bias", "position", "position_bias")
QUERY_CONVS = ("segment", "carry")


class RelConvParams(NamedTuple):
    """Parameters of `rcmha`; those of a switch that is off may be None."""

    q_kernel: Array | None = None
    """[W,D], or [W,H,D] with a kernel per head."""
    q_bias: Array | None = None
    """[D] or [H,D]"""
    k_kernel: Array | None = None
    k_bias: Array | None = None
    v_kernel: Array | None = None
    v_bias: Array | None = None
    rel_key: Array | None = None
    """[P,H,D] R, one key per distance."""
    rel_bias: Array | None = None
    """[P,H] S, one bias per distance."""
    query_bias: Array | None = None
    """[H,D] u, the query that every token adds to its own."""


class WeightedOutput(NamedTuple):
    """What `relative_attention` and `rcmha` return with ``return_weights=True``."""

    z: Array
    """[B,Q,H,D]"""
    weights: Array
    """[B,H,Q,K] float32"""


def init_rel_conv(
    key: Array,
    num_heads: int,
    head_dim: int,
    *,
    num_kv_heads: int | None = None,
    use_conv: bool = True,
    use_relative: bool = True,
    width: int = 3,
    max_distance: int = 4096,
    per_head_kernel: bool = False,
) -> RelConvParams:
    """Kernels and their biases uniform within 1/sqrt(W); R, S and u zero; float32.

    Args:
      key: PRNG key.
      num_heads: H.
      head_dim: D.
      num_kv_heads: heads of k and v; None = H.
      use_conv: whether there are kernels.
      use_relative: whether there are R, S and u.
      width: W, 3 as published.
      max_distance: P, distances 0 to P - 1.
      per_head_kernel: kernels [W,H,D] rather than [W,D] for all heads.
    Raises:
      ValueError: for a width or distance below 1.
    """
    check_sizes(width, max_distance)
    params = RelConvParams()
    if use_conv:
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, heads, one in zip(
            "qkv", (num_heads, kv_heads, kv_heads), jax.random.split(key, 3), strict=True
        ):
            tail = (heads, head_dim) if per_head_kernel else (head_dim,)
            drawn = jax.random.uniform(one, (width + 1, *tail), jnp.float32, -1, 1) * width**-0.5
            kernel = {f"{name}_kernel": drawn[:width], f"{name}_bias": drawn[width]}
            params = params._replace(**kernel)
    if use_relative:
        params = params._replace(
            rel_key=jnp.zeros((max_distance, num_heads, head_dim), jnp.float32),
            rel_bias=jnp.zeros((max_distance, num_heads), jnp.float32),
            query_bias=jnp.zeros((num_heads, head_dim), jnp.float32),
        )
    return params


def check_sizes(width: int, max_distance: int) -> None:
    """Raise unless a kernel has a tap and a table a row."""
    if width < 1:
        raise ValueError(f"width={width} must be at least 1: a kernel of one tap sees its token.")
    if max_distance < 1:
        raise ValueError(f"max_distance={max_distance} must be at least 1: a token sees itself.")


def relative_table(official: Array) -> Array:
    """R [P,H,D] or S [P,H] of a released table [2P,...], ``rel[d] = official[P - d]``.

    The release also has rows for keys after the query, which a causal model never reads.
    """
    if official.shape[0] < 2 or official.shape[0] % 2:
        raise ValueError(
            f"official has {official.shape[0]} rows; a released table has 2P of them, for the "
            "distances P down to 1 - P."
        )
    half = official.shape[0] // 2
    return official[half:0:-1]


def depthwise_causal_conv(
    x: Array,
    kernel: Array,
    bias: Array,
    *,
    state: Array | None = None,
    segment_ids: Array | None = None,
) -> tuple[Array, Array]:
    """A convolution along the tokens, channel by channel, that never looks ahead.

        y[t,h,c] = bias[c] + sum_j w[j,c] x[t - (W-1) + j, h, c],   j = 0..W-1

    Args:
      x: [B,T,H,D].
      kernel: w [W,D], the same for every head, or [W,H,D].
      bias: [D] or [H,D].
      state: [B,W-1,H,D] the inputs before x, oldest first; None = zeros.
      segment_ids: [B,T], with `state` [B,W-1+T]: tokens of another id count as zeros.
    Returns:
      y [B,T,H,D] in the dtype of x, and the state after its last token.
    Raises:
      ValueError: for a kernel, bias, state or segment ids that do not fit.
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}; it must be [B,T,H,D].")
    batch, length, heads, dim = x.shape
    width = kernel.shape[0]
    if width < 1 or kernel.shape[1:] not in ((dim,), (heads, dim)):
        raise ValueError(
            f"kernel has shape {kernel.shape}; for x {x.shape} it must be [W,D] = [W,{dim}] or "
            f"[W,H,D] = [W,{heads},{dim}], W at least 1."
        )
    if bias.shape not in ((dim,), (heads, dim)):
        raise ValueError(f"bias has shape {bias.shape}; it must be [{dim}] or [{heads},{dim}].")
    wanted = (batch, width - 1, heads, dim)
    if state is not None and state.shape != wanted:
        raise ValueError(
            f"state has shape {state.shape}; a kernel of width {width} needs the W-1 = {width - 1} "
            f"inputs before x, {wanted}."
        )
    past = jnp.zeros(wanted, x.dtype) if state is None else state.astype(x.dtype)
    padded = jnp.concatenate([past, x], axis=1)  # [B,W-1+T,H,D]
    if segment_ids is not None:
        known = length if state is None else length + width - 1
        if segment_ids.shape != (batch, known):
            raise ValueError(
                f"segment_ids has shape {segment_ids.shape}; it must be {(batch, known)}, an id "
                "for each token of x and of its state."
            )
        segment_ids = jnp.pad(segment_ids, ((0, 0), (length + width - 1 - known, 0)))
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.broadcast_to(bias.astype(dtype), x.shape)
    for j in range(width):
        shifted = padded[:, j : j + length].astype(dtype)
        if segment_ids is not None:
            is_same = segment_ids[:, j : j + length] == segment_ids[:, width - 1 :]
            shifted = jnp.where(is_same[..., None, None], shifted, 0)
        y = y + kernel[j].astype(dtype) * shifted
    return y.astype(x.dtype), padded[:, length:]


def relative_position_scores(
    q: Array, rel_key: Array, rel_bias: Array, *, num_keys: int, q_offset: int | Array = 0
) -> Array:
    """``q_i . R[d] + S[d]``, d = q_offset + i - j, and 0 for keys after the query.

    Queries meet the Q + K - 1 distances that occur, in order; a row of the result is a window of
    K of them, one further left for each next query, which a pad and a reshape take: no gather.

    Args:
      q: [B,Q,H,D] queries.
      rel_key: R [P,H,D].
      rel_bias: S [P,H].
      num_keys: K.
      q_offset: position of the first query among the keys; may be traced.
    Returns:
      [B,H,Q,K] float32 (or q's dtype if wider), not scaled.
    Raises:
      ValueError: for tables of other heads or widths, or fewer rows than distances.
    """
    _check_tables(q, rel_key, rel_bias, num_keys, q_offset)
    num_queries = q.shape[1]
    keys, biases = (_window(t, num_queries, num_keys, q_offset) for t in (rel_key, rel_bias))
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    by_distance = jnp.einsum(
        "bqhd,chd->bhqc", q, keys.astype(q.dtype), preferred_element_type=dtype
    )
    return _skew(by_distance + jnp.einsum("ch->hc", biases)[:, None].astype(dtype), num_keys)


def relative_position_scores_gather(
    q: Array, rel_key: Array, rel_bias: Array, *, num_keys: int, q_offset: int | Array = 0
) -> Array:
    """`relative_position_scores` with a row of R fetched for every pair: O(Q K H D) memory."""
    _check_tables(q, rel_key, rel_bias, num_keys, q_offset)
    distance = q_offset + jnp.arange(q.shape[1])[:, None] - jnp.arange(num_keys)  # [Q,K]
    rows = jnp.clip(distance, 0)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum(
        "bqhd,qkhd->bhqk", q, rel_key[rows].astype(q.dtype), preferred_element_type=dtype
    )
    scores = scores + jnp.einsum("qkh->hqk", rel_bias[rows]).astype(dtype)
    return jnp.where(distance >= 0, scores, 0)


def _window(table: Array, num_queries: int, num_keys: int, q_offset: int | Array) -> Array:
    """[Q+K-1,...]: rows of the distances q_offset + Q - 1 down to q_offset + 1 - K, absent ones 0.

    The pairs of query i and key j read entry ``Q - 1 - i + j``.
    """
    length = num_queries + num_keys - 1
    turned = table[::-1]  # distance P - 1 first
    widths = ((length, length), *(((0, 0),) * (table.ndim - 1)))
    start = length + table.shape[0] - q_offset - num_queries
    padded = jnp.pad(turned, widths)
    if is_traced(start):
        return jax.lax.dynamic_slice_in_dim(padded, start, length)
    start = int(start)
    return padded[start : start + length]


def _skew(by_distance: Array, num_keys: int) -> Array:
    """[...,Q,C] -> [...,Q,K], entry (i, j) from (i, Q - 1 - i + j); C = Q + K - 1."""
    *lead, num_queries, count = by_distance.shape
    flat = jnp.pad(by_distance, [(0, 0)] * (len(lead) + 1) + [(0, 1)])
    flat = flat.reshape(*lead, num_queries * (count + 1))
    flat = flat[..., num_queries - 1 : num_queries - 1 + num_queries * count]
    return flat.reshape(*lead, num_queries, count)[..., :num_keys]


def relative_score_terms(
    q: Array,
    k: Array,
    *,
    rel_key: Array,
    rel_bias: Array,
    query_bias: Array,
    q_offset: int = 0,
    terms: tuple[str, ...] = TERMS,
) -> dict[str, Array]:
    """The parts of the scores, each [B,H,Q,K] over sqrt(D); they add up to the scores.

    Args:
      q, k, rel_key, rel_bias, query_bias, q_offset: as for `relative_attention`.
      terms: of content q.k, key_bias u.k, position q.R, position_bias S.
    """
    for term in terms:
        if term not in TERMS:
            raise ValueError(f"terms: {term!r} is not one of {', '.join(TERMS)}.")
    dim, num_keys = q.shape[-1], k.shape[1]
    content = lambda queries: jnp.einsum(
        "bqhd,bkhd->bhqk", queries, k, preferred_element_type=jnp.promote_types(q.dtype, "float32")
    )
    place = functools.partial(relative_position_scores, num_keys=num_keys, q_offset=q_offset)
    found = {
        "content": lambda: content(q),
        "key_bias": lambda: content(jnp.broadcast_to(query_bias.astype(q.dtype), q.shape)),
        "position": lambda: place(q, rel_key, jnp.zeros_like(rel_bias)),
        "position_bias": lambda: place(q, jnp.zeros_like(rel_key), rel_bias),
    }
    return {term: found[term]() / math.sqrt(dim) for term in terms}


def relative_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    rel_key: Array,
    rel_bias: Array,
    query_bias: Array,
    q_offset: int = 0,
    mask: Array | None = None,
    return_weights: bool = False,
    tap: Tap = NO_TAP,
) -> Array | WeightedOutput:
    """Causal softmax attention with relative positions, RMHA.

        s_ij = [q_i.k_j + u.k_j + q_i.R[d] + S[d]] / sqrt(D),   d = q_offset + i - j >= 0

    Unlike Transformer-XL, R is a free table and S stands for its product with a vector.

    Args:
      q: [B,Q,H,D] queries.
      k: [B,K,H,D] keys.
      v: [B,K,H,D] values.
      rel_key: R [P,H,D].
      rel_bias: S [P,H].
      query_bias: u [H,D].
      q_offset: position of the first query among the keys: the length of the memory before it.
      mask: bool, True where visible, broadcastable to [B,H,Q,K]; beside causality.
      return_weights: also return the weights [B,H,Q,K].
      tap: called at `scores`, `pattern` and `lse`.
    Returns:
      z [B,Q,H,D], or `WeightedOutput`. A query that sees no key gets zeros.
    Raises:
      ValueError: for shapes that do not fit, distances beyond the tables, or a mask (if its values
        are known) that leaves a query without a key.
    """
    params = RelConvParams(rel_key=rel_key, rel_bias=rel_bias, query_bias=query_bias)
    return rcmha(
        q, k, v, params, use_conv=False, q_offset=q_offset, mask=mask,
        return_weights=return_weights, tap=tap,
    )  # fmt: skip


def rcmha(
    q: Array,
    k: Array,
    v: Array,
    params: RelConvParams | None = None,
    *,
    use_conv: bool = True,
    use_relative: bool = True,
    q_offset: int = 0,
    conv_state: Array | None = None,
    mask: Array | None = None,
    return_weights: bool = False,
    tap: Tap = NO_TAP,
) -> Array | WeightedOutput:
    """Relative convolutional attention of one segment over its memory and itself.

    The convolutions act on projected heads. Keys and values are convolved over the K positions
    given, memory included; queries over their own segment: without `conv_state` the first W-1 of
    them meet zeros, as published.

    Args:
      q: [B,Q,H,D] projected queries.
      k: [B,K,H,D] projected keys, not convolved yet.
      v: [B,K,H,D] projected values.
      params: see `RelConvParams`; None where both switches are off.
      use_conv: convolve q, k and v.
      use_relative: add u, R and S to the scores.
      q_offset: position of the first query among the keys: the length of the memory.
      conv_state: [B,W-1,H,D] projected queries before the segment, ``query_conv="carry"``;
        `depthwise_causal_conv` says what follows.
      mask, return_weights, tap: as for `relative_attention`.
    Returns:
      z [B,Q,H,D], or `WeightedOutput`.
    Raises:
      ValueError: as `relative_attention`, and for parameters that a switch needs and are missing.
    """
    params = params or RelConvParams()
    _check_heads(q, k, v, q_offset)
    _check_given(params, use_conv, use_relative)
    if use_conv:
        q, k, v = convolve(params, q, k, v, conv_state)
    elif conv_state is not None:
        raise ValueError("conv_state was given with use_conv=False; there is nothing to continue.")
    scale, bias = 1 / math.sqrt(q.shape[-1]), None
    if use_relative:
        bias = positions_bias(params, q, k.shape[1], q_offset, scale)
        q = add_query_bias(params, q)
    _check_mask(mask, q, k, q_offset)
    slots = jnp.arange(q.shape[1], dtype=jnp.int32) + q_offset
    parts = Mask(is_causal=True, q_index=slots, head_mask=mask)
    if return_weights:
        if tap is not NO_TAP:
            raise ValueError("return_weights=True and a tap: record 'pattern' with the tap.")
        tap = Tap(Taps(record=(Record("pattern"),)))
    z, lse = attend(
        q, k, v, AttentionContext(mask=parts, bias=bias, tap=tap), needs_lse=tap.wants("lse")
    )
    if lse is not None and tap.wants("lse"):
        tap("lse", lse)
    return WeightedOutput(z, tap.seen["pattern"]) if return_weights else z


mha = functools.partial(rcmha, use_conv=False, use_relative=False)
"""`rcmha` with neither switch: causal multi-head attention."""
mdha = functools.partial(rcmha, use_conv=True, use_relative=False)
"""`rcmha` with the convolution alone, the attention of Primer."""
rmha = functools.partial(rcmha, use_conv=False, use_relative=True)
"""`rcmha` with relative positions alone."""


def convolve(
    params: RelConvParams, q: Array, k: Array, v: Array, conv_state: Array | None = None
) -> tuple[Array, Array, Array]:
    """q, k and v after their convolutions; `conv_state` belongs to q."""
    kernels: Any = params  # none is None here
    return (
        depthwise_causal_conv(q, kernels.q_kernel, kernels.q_bias, state=conv_state)[0],
        depthwise_causal_conv(k, kernels.k_kernel, kernels.k_bias)[0],
        depthwise_causal_conv(v, kernels.v_kernel, kernels.v_bias)[0],
    )


def positions_bias(
    params: RelConvParams, q: Array, num_keys: int, q_offset: int | Array, scale: float
) -> Array:
    """What the positions add to the scaled scores, [B,H,Q,K]."""
    tables: tuple = (params.rel_key, params.rel_bias)
    return scale * relative_position_scores(q, *tables, num_keys=num_keys, q_offset=q_offset)


def add_query_bias(params: RelConvParams, q: Array) -> Array:
    """q + u."""
    query_bias: Any = params.query_bias
    if query_bias.shape != q.shape[2:]:
        raise ValueError(
            f"query_bias has shape {query_bias.shape}; it must be [H,D] = {q.shape[2:]}."
        )
    return q + query_bias.astype(q.dtype)


def _check_given(params: RelConvParams, use_conv: bool, use_relative: bool) -> None:
    for is_used, switch, names in (
        (use_conv, "use_conv", RelConvParams._fields[:6]),
        (use_relative, "use_relative", RelConvParams._fields[6:]),
    ):
        missing = [name for name in names if is_used and getattr(params, name) is None]
        if missing:
            raise ValueError(f"params lacks {', '.join(missing)}, which {switch}=True needs.")


def _check_heads(q: Array, k: Array, v: Array, q_offset: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape}; it must be [B,T,H,D].")
    if k.shape[2] != q.shape[2] or v.shape[2] != q.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads, k {k.shape[2]} and v {v.shape[2]}; they must have the "
            "same. Repeat keys and values, or use the decoder's variant 'rcmha', which shares them."
        )
    if k.shape[:2] != v.shape[:2] or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} do not fit: they need one batch, k and v "
            "one length, q and k one head dim."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype} and v {v.dtype}; cast them to one dtype.")
    if not is_traced(q_offset) and q_offset < 0:
        raise ValueError(
            f"q_offset={q_offset} puts query 0 before every key: it sees none. Give 0 or more."
        )


def _check_tables(
    q: Array, rel_key: Array, rel_bias: Array, num_keys: int, q_offset: int | Array
) -> None:
    rows, heads, dim = rel_key.shape[0], q.shape[2], q.shape[3]
    if rel_key.shape[1:] != (heads, dim):
        raise ValueError(
            f"rel_key has shape {rel_key.shape}; for q {q.shape} it must be [P,H,D] = "
            f"[P,{heads},{dim}]."
        )
    if rel_bias.shape != (rows, heads):
        raise ValueError(
            f"rel_bias has shape {rel_bias.shape}; it must be [P,H] = {(rows, heads)}."
        )
    needed = num_keys if is_traced(q_offset) else int(q_offset) + q.shape[1]
    if needed > rows:
        raise ValueError(
            f"rel_key has P = {rows} distances; {q.shape[1]} queries after an offset of "
            f"{q_offset} need {needed}. Shorten the segment or its memory, or give larger tables."
        )


def _check_mask(mask: Array | None, q: Array, k: Array, q_offset: int) -> None:
    if mask is None:
        return
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if mask.ndim > 4 or mask.dtype != bool or any(
        size not in (1, wanted) for size, wanted in zip(mask.shape[::-1], full[::-1], strict=False)
    ):  # fmt: skip
        raise ValueError(
            f"mask is {mask.dtype} {mask.shape}; it must be bool and broadcastable to [B,1|H,Q,K] "
            f"= {full}."
        )
    if is_traced(mask) or is_traced(q_offset):
        return
    near = np.arange(k.shape[1]) <= np.arange(q.shape[1])[:, None] + q_offset
    blind = np.argwhere(~(np.asarray(as_4d(mask)) & near).any(-1))
    if len(blind):
        b, h, i = (int(n) for n in blind[0])
        raise ValueError(
            f"mask leaves {len(blind)} rows without a visible key, the first at batch {b}, head "
            f"{h}, query {i}; let each query see a key at or before it (its own, for example)."
        )
