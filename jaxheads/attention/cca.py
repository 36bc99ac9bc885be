"""CCA-attention: exact attention to the newest tokens, and to one core token per group before them.

    j(t) = max(0, floor((t + 1 - s) / g)),   lo(t) = g j(t)
    z[t] = softmax( scale q[t] . [KG[0:j]; k[lo:t+1]] ) [VG[0:j]; v[lo:t+1]]

Every earlier token is seen once, as itself or inside a core (`cca_pooling`), by one softmax: cost
O(T (T/g + s)), a decode cache of T/g + s tokens, no parameters of its own. The definition follows
the published equations; where these leave a choice, `CCAOptions` names it.

    dense       all scores in memory: the reference
    blocked     two tiled products, over cores and over the window, merged by their lse
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.attention.cca_cache import CCACache, decode_step, init_cache, prefill
from jaxheads.attention.cca_parts import attend_row, check_heads, core_mask, exact_mask
from jaxheads.attention.cca_pooling import CCAOptions, Rotate, places, pool_found, pool_row
from jaxheads.attention.masks import MASK_VALUE
from jaxheads.attention.rope import RopeConfig, inverse_frequencies
from jaxheads.attention.rope import rotate as rotate_by
from jaxheads.typing import Array, is_traced

__all__ = [
    "CCACache",
    "CCACosts",
    "CCAOptions",
    "cca_attention",
    "cca_costs",
    "cca_effective_attention",
    "core_tokens",
    "decode_step",
    "init_cache",
    "prefill",
]


def core_tokens(
    q: Array,
    k: Array,
    v: Array,
    *,
    group_size: int,
    pool_func: str = "cca",
    gqa_pool: str = "mean",
    rope: str = "rotated",
    positions: Array | None = None,
    rotate: Rotate | None = None,
    scale: float | None = None,
    seed: int = 0,
) -> tuple[Array, Array, Array]:
    """One key and value for every complete group of g tokens; a trailing rest is left out.

        KG[i] = sum_u a[i,u] k[ig+u],  VG[i] = sum_u a[i,u] v[ig+u],
        a[i]  = softmax_{u<g}( scale q[ig+g-1] . k[ig+u] )

    Args:
      q: [B,L,H,D] queries, rotated unless ``rope="group_end"``.
      k: [B,L,K,D] keys, likewise; K divides H.
      v: [B,L,K,W] values.
      group_size: g.
      pool_func: "cca", or a control: "mean", "max", "random", "last".
      gqa_pool: "mean" of a over the query heads of a kv head, or "per_query_head".
      rope: "rotated", or "group_end": q and k come unrotated, and pooled keys have the position of
        their group's last token.
      positions: [L] or [B,L], consecutive inside groups; for ``rope="group_end"``.
      rotate: (x, positions) -> x; default the plain rotation of `RopeConfig()`.
      scale: factor on q.k; None = 1/sqrt(D).
      seed: of ``pool_func="random"``.
    Returns:
      KG [B,m,C,D], VG [B,m,C,W] and the weights [B,m,C,g] float32 that made them, m = L // g;
      C = K, or H under ``gqa_pool="per_query_head"``.
    Raises:
      ValueError: shapes or options that do not fit.

    References: Chen et al., 2024, arXiv:2412.12465.
    """
    options = CCAOptions(group_size, pool_func=pool_func, gqa_pool=gqa_pool, rope=rope, seed=seed)
    check_shapes(q, k, v)
    q, k, rotate = _rotated(q, k, options, positions, rotate)
    cores, weights = pool_row(q, k, v, options, _scale(q, scale), rotate)
    return cores.k, cores.v, weights


def cca_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    group_size: int,
    window_size: int,
    pool_func: str = "cca",
    gqa_pool: str = "mean",
    boundary: str = "disjoint",
    impl: str = "auto",
    segment_ids: Array | None = None,
    rope: str = "rotated",
    positions: Array | None = None,
    rotate: Rotate | None = None,
    scale: float | None = None,
    seed: int = 0,
) -> Array:
    """Causal attention over core tokens and a window of at least `window_size` exact tokens.

    Args:
      q: [B,L,H,D], k: [B,L,K,D], v: [B,L,K,W], and the options of `core_tokens`.
      group_size: g; g = 1 is full causal attention.
      window_size: s; s >= L is full causal attention.
      boundary: "disjoint", or "printed": the window begins one token earlier, which sees that token
        twice (the index as printed in the paper).
      impl: "dense", "blocked" (no [L,L] array, backward too), or "auto" by size.
      segment_ids: [B,L] ids of packed documents, 0 for padding. Groups are counted from each
        document's first token; documents begin at multiples of g, and L is one.
    Returns:
      [B,L,H,W] in the dtype of q; zeros for padding.
    Raises:
      ValueError: shapes, options, or (where ids are known) documents that do not fit.
    Example:
      >>> x = jnp.ones((1, 64, 2, 8))
      >>> cca_attention(x, x, x, group_size=4, window_size=16).shape
      (1, 64, 2, 8)

    References: Chen et al., 2024, arXiv:2412.12465.
    """
    options = CCAOptions(group_size, window_size, pool_func, gqa_pool, boundary, rope, seed, impl)
    check_shapes(q, k, v)
    check_segments(segment_ids, q, options)
    q, k, rotate = _rotated(q, k, options, positions, rotate)
    return attend_row(q, k, v, options, _scale(q, scale), segment_ids, rotate)[0]


def cca_effective_attention(
    q: Array,
    k: Array,
    v: Array | None = None,
    *,
    group_size: int,
    window_size: int,
    pool_func: str = "cca",
    gqa_pool: str = "mean",
    boundary: str = "disjoint",
    segment_ids: Array | None = None,
    rope: str = "rotated",
    positions: Array | None = None,
    rotate: Rotate | None = None,
    scale: float | None = None,
    seed: int = 0,
) -> Array:
    """A with A v = `cca_attention`: [B,H,L,L] float32, O(L^2) memory.

        A[t,ig+u] = p(core i) a[i,u] + p(token ig+u),  one of them 0 (both, where printed overlaps)

    Lower-triangular, non-negative; rows sum to 1 (0 for padding). Arguments as `cca_attention`;
    `v` is not read.
    """
    del v
    options = CCAOptions(group_size, window_size, pool_func, gqa_pool, boundary, rope, seed)
    check_shapes(q, k, k)
    check_segments(segment_ids, q, options)
    q, k, rotate = _rotated(q, k, options, positions, rotate)
    scale = _scale(q, scale)
    (batch, length, num_heads, _), size = q.shape, options.group_size
    if segment_ids is None:
        where = None
        cores, weights = pool_row(q, k, k, options, scale, rotate)
        tokens = jnp.arange(weights.shape[1] * size).reshape(1, -1, size)
    else:
        where = places(jnp.asarray(segment_ids), size)
        cores, _, tokens, _ = found = pool_found(q, k, k, where, options, scale, rotate)
        weights = found.weights
    by_head = lambda x: jnp.repeat(x, num_heads // x.shape[2], axis=2)
    keys = jnp.concatenate([by_head(cores.k), by_head(k)], axis=1)
    scores = scale * jnp.einsum("bthd,bshd->bhts", q, keys, preferred_element_type=jnp.float32)
    num_cores = weights.shape[1]
    visible = jnp.concatenate(
        [
            jnp.broadcast_to(cast(Array, mask.materialize(length, n)), (batch, 1, length, n))
            for mask, n in (
                (core_mask(options, cores, length, where), num_cores),
                (exact_mask(options, where, where, length, length), length),
            )
        ],
        axis=-1,
    )
    probs = jax.nn.softmax(jnp.where(visible, scores, MASK_VALUE), axis=-1) * visible
    weights = by_head(weights)
    spread = weights[..., None] * jax.nn.one_hot(tokens, length)[:, :, None]  # [B,m,H,g,L]
    return probs[..., num_cores:] + jnp.einsum("bhti,bihul->bhtl", probs[..., :num_cores], spread)


class CCACosts(NamedTuple):
    """What CCA-attention takes for one sequence of L tokens, and full attention beside it."""

    pooling_flops: float
    core_flops: float
    local_flops: float
    flops: float
    """Forward, all heads: the sum of the three."""
    full_flops: float
    """Causal softmax attention, half of all pairs."""
    cache_elements: int
    """Numbers in the decode cache of one layer, keys and values."""
    full_cache_elements: int


def cca_costs(
    length: int,
    group_size: int,
    window_size: int,
    *,
    num_heads: int = 1,
    num_kv_heads: int | None = None,
    head_dim: int = 1,
    gqa_pool: str = "mean",
    boundary: str = "disjoint",
) -> CCACosts:
    """Operations and cache, exactly: every visible pair of query and key is 4 D operations.

        pooling 4 m g D,  cores 4 D sum_t j(t) ~ 2 L^2 D / g,  window 4 D sum_t (t + 1 - lo(t))

    for each query head; cache 2 D (C ceil(L/g) + K (s + g - 1)), C = K or H.

    Args:
      length: L.
      group_size: g; window_size: s.
      num_heads: H; num_kv_heads: K (None: H); head_dim: D.
      gqa_pool: "mean" (C = K) or "per_query_head" (C = H).
      boundary: "printed" holds one more exact token.
    """
    options = CCAOptions(group_size, window_size, gqa_pool=gqa_pool, boundary=boundary)
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    check_heads(num_heads, kv_heads)
    seen = np.maximum(0, (np.arange(length) + 1 - window_size) // group_size)
    exact = np.arange(length) + 1 - seen * group_size + (boundary == "printed") * (seen > 0)
    each = 4.0 * num_heads * head_dim
    parts = (
        each * (length // group_size * group_size),
        each * float(seen.sum()),
        each * float(exact.sum()),
    )
    core_heads = kv_heads if gqa_pool == "mean" else num_heads
    window = min(options.reach, length)
    return CCACosts(
        *parts,
        sum(parts),
        each * length * (length + 1) / 2,
        2 * head_dim * (core_heads * -(-length // group_size) + kv_heads * window),
        2 * head_dim * kv_heads * length,
    )


def _rotated(q, k, options: CCAOptions, positions, rotate: Rotate | None):
    """q, k as attention uses them, and the rotation that pooling may use."""
    if options.rope == "rotated":
        return q, k, None
    if positions is None:
        raise ValueError(
            "cca: rope='group_end' takes q and k unrotated and needs positions [L] or [B,L]; pass "
            "positions=jnp.arange(L), or rotate q and k and pass rope='rotated'."
        )
    positions = jnp.asarray(positions)
    if positions.shape not in (q.shape[1:2], q.shape[:2]):
        raise ValueError(
            f"positions has shape {positions.shape}, needed {q.shape[1:2]} or {q.shape[:2]}."
        )
    if rotate is None:
        inv_freq, scaling = inverse_frequencies(RopeConfig(), q.shape[-1])
        rotate = functools.partial(
            rotate_by, inv_freq=jnp.asarray(inv_freq), interleaved=False, scaling=scaling
        )
    return rotate(q, positions), rotate(k, positions), rotate


def _scale(q: Array, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


def check_shapes(q: Array, k: Array, v: Array) -> None:
    """Raises ValueError for arrays that do not fit."""
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} must be [B,L,H,D], [B,L,K,D] and [B,L,K,W]."
        )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} do not fit: they share the batch, k and v "
            "share tokens and heads, and q and k share the head dim."
        )
    check_heads(q.shape[2], k.shape[2])
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} tokens and k {k.shape[1]}; the parallel form takes the same "
            "tokens as queries and keys. To go on after earlier tokens, use a CCACache."
        )


def check_segments(segment_ids: Array | None, q: Array, options: CCAOptions) -> None:
    """Raises ValueError for ids of a wrong shape and, where known, documents off the grid."""
    if segment_ids is None:
        return
    if jnp.shape(segment_ids) != q.shape[:2]:
        raise ValueError(f"segment_ids has shape {jnp.shape(segment_ids)}, needed {q.shape[:2]}.")
    size = options.group_size
    if q.shape[1] % size:
        raise ValueError(
            f"rows of {q.shape[1]} tokens with segment_ids are not a multiple of group_size={size};"
            " pad every document to whole groups."
        )
    if is_traced(segment_ids):
        return
    ids = np.asarray(segment_ids)
    begins = np.diff(ids, axis=1, prepend=0) != 0
    row, token = np.nonzero(begins & (ids != 0))
    if (off := token % size != 0).any():
        raise ValueError(
            f"a document of row {row[off][0]} begins at token {token[off][0]}, which is not a "
            f"multiple of group_size={size}; pad every document to whole groups."
        )
