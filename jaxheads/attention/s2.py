"""S2-attention: every head sees a local window and one key block in `stride` beyond it.

Heads keep different residue classes of blocks, so that each costs about 1/V of dense attention
while together they cover the context. `ShardPattern` (`s2_pattern`) says which blocks; the back
ends compute softmax attention over exactly those:

    dense       the whole mask in memory: the reference
    blocked     plain JAX, O(T (L B + T/V)) time, never T x T (`s2_blocked`; `s2_lists` for
                patterns other than causal local-stride)
    splash, pallas_tpu, pallas_gpu   kernels
"""

from __future__ import annotations

import importlib.util
import math

import jax
import jax.numpy as jnp

from jaxheads.attention.api import platform
from jaxheads.attention.blocked import blocked_attention
from jaxheads.attention.dense import dense_attention
from jaxheads.attention.masks import Mask
from jaxheads.attention.merge import merge_partitions
from jaxheads.attention.s2_blocks import attend_sparse_heads
from jaxheads.attention.s2_cache import S2Cache, s2_decode
from jaxheads.attention.s2_lists import attend_lists
from jaxheads.attention.s2_parallel import s2_context_parallel
from jaxheads.attention.s2_pattern import ShardPattern, WorkList
from jaxheads.typing import Array

__all__ = [
    "S2_IMPLEMENTATIONS",
    "S2Cache",
    "ShardPattern",
    "WorkList",
    "merge_partitions",
    "s2_attention",
    "s2_context_parallel",
    "s2_decode",
]

KERNELS = {
    "splash": ("jaxheads.attention.s2_splash", "tpu"),
    "pallas_tpu": ("jaxheads.attention.s2_pallas_tpu", "tpu"),
    "pallas_gpu": ("jaxheads.attention.s2_pallas_gpu", "gpu"),
}
"""Back end -> the module whose `attend(q, k, v, pattern, *, scale)` it is, and its platform."""

S2_IMPLEMENTATIONS = ("dense", "blocked", *KERNELS)
DENSE_SCORES = 256 * 256  # up to so many scores a head, one matrix product beats tiles on CPU
MIN_TPU_TILE = 128


def s2_attention(
    q: Array,
    k: Array,
    v: Array,
    pattern: ShardPattern,
    *,
    scale: float | None = None,
    segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    q_start: int | Array = 0,
    kv_start: int | Array = 0,
    impl: str = "auto",
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Softmax attention of each head over the blocks its pattern keeps.

        z_t = sum_s softmax_s(scale q_t.k_s) v_s   over s <= t with visible(h, t // B, s // B)

    Args:
      q: [B,T,H,D] queries, already rotated.
      k: [B,S,K,D] keys; query head h reads kv head h // (H / K).
      v: [B,S,K,W] values.
      pattern: which blocks each head sees; built for these H and K.
      scale: factor on q.k; None = 1/sqrt(D).
      segment_ids: [B,T] ids of packed documents; equal ids see each other, 0 is padding.
      kv_segment_ids: [B,S]; None = `segment_ids` (then T = S).
      q_start: position of the first query, a multiple of the block, for a chunk of a longer
        sequence. Results over several chunks of keys combine with `merge_partitions`.
      kv_start: position of the first key, a multiple of the block. Both may be traced.
      impl: "dense", "blocked", "splash", "pallas_tpu", "pallas_gpu", or "auto": the platform's
        kernel where it can serve the call, else blocked (dense for short inputs).
      return_lse: also return the log of the softmax denominators.
    Returns:
      z [B,T,H,W] in the dtype of q; with `return_lse` also lse [B,H,T] float32. A query that sees
      no key of the chunk gets zeros and -inf. Differentiable, the lse too.
    Raises:
      ValueError: shapes, chunk starts or heads that do not fit the pattern.
      NotImplementedError: the named back end cannot honour the call.
    Example:
      >>> q = k = v = jnp.ones((1, 64, 4, 8))
      >>> s2_attention(q, k, v, ShardPattern(16, 1, 2, num_heads=4)).shape
      (1, 64, 4, 8)

    References: Lin et al., 2024, arXiv:2407.17678.
    """
    _check(q, k, v, pattern, segment_ids, kv_segment_ids, q_start, kv_start)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if segment_ids is not None and kv_segment_ids is None:
        kv_segment_ids = segment_ids
    is_whole = _is_zero(q_start) and _is_zero(kv_start) and q.shape[1] == k.shape[1]
    if is_whole:
        pattern.check_no_empty_row(pattern.num_blocks(q.shape[1]))
    name = select_s2(q, k, pattern, impl, is_plain=is_whole and segment_ids is None)
    with jax.named_scope(f"attention.s2.{name}"):
        if name in KERNELS:
            attend = importlib.import_module(KERNELS[name][0]).attend
            z, lse = attend(q, k, v, pattern, scale=scale)
        else:
            attend = _dense if name == "dense" else _blocked
            segments = (segment_ids, kv_segment_ids)
            z, lse = attend(q, k, v, pattern, scale, segments, q_start, kv_start)
    return (z, lse) if return_lse else z


def select_s2(q: Array, k: Array, pattern: ShardPattern, impl: str, *, is_plain: bool) -> str:
    """The back end for a call; `is_plain`: whole sequences without segment ids.

    Raises:
      ValueError: unknown name.
      NotImplementedError: the named back end cannot honour the call.
    """
    if impl in ("dense", "blocked"):
        return impl
    if impl in KERNELS:
        reason = _kernel_reason_not(impl, pattern, is_plain)
        if reason is not None:
            raise NotImplementedError(
                f"impl={impl!r} cannot honour this call: {reason}; pass impl='blocked' or 'auto'."
            )
        return impl
    if impl != "auto":
        known = ", ".join(("auto", *S2_IMPLEMENTATIONS))
        raise ValueError(f"unknown impl {impl!r} of S2-attention; known: {known}.")
    kernel = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}.get(platform())
    if kernel is not None and _kernel_reason_not(kernel, pattern, is_plain) is None:
        return kernel
    return "dense" if q.shape[1] * k.shape[1] <= DENSE_SCORES else "blocked"


def _kernel_reason_not(name: str, pattern: ShardPattern, is_plain: bool) -> str | None:
    module, needed = KERNELS[name]
    if platform() != needed:
        return f"it runs on {needed} and the platform is {platform()}"
    if importlib.util.find_spec(module) is None:
        return "this installation does not have it"
    if not is_plain:
        return "it takes whole sequences without segment ids"
    if not pattern.is_local_stride:
        return "it takes causal local-stride patterns only"
    if needed == "tpu" and pattern.block < MIN_TPU_TILE:
        return f"block={pattern.block} is below the TPU's tile of {MIN_TPU_TILE}"
    return None


def visible_tokens(pattern: ShardPattern, q_index: Array, k_index: Array) -> Array:
    """Which keys each query of each head sees by position, bool [H,T,S]; indices may be traced."""
    i, j = q_index[:, None], k_index[None, :]
    mask = pattern.visible(i // pattern.block, j // pattern.block, xp=jnp)
    mask = jnp.repeat(mask, pattern.group_size, axis=0)
    return mask & (j <= i) if pattern.causal else mask


def _dense(q, k, v, pattern, scale, segments, q_start, kv_start) -> tuple[Array, Array]:
    q_index = q_start + jnp.arange(q.shape[1])
    k_index = kv_start + jnp.arange(k.shape[1])
    visible = visible_tokens(pattern, q_index, k_index)[None]
    mask = Mask(q_segment_ids=segments[0], k_segment_ids=segments[1], head_mask=visible)
    return dense_attention(q, k, v, mask, scale=scale)


def _blocked(q, k, v, pattern, scale, segments, q_start, kv_start) -> tuple[Array, Array]:
    is_static = isinstance(q_start, int) and isinstance(kv_start, int)
    if not pattern.is_local_stride:
        if not is_static:
            raise NotImplementedError(
                "patterns other than causal local-stride need chunk starts that are known while "
                "tracing; pass Python integers, or impl='dense'."
            )
        return attend_lists(q, k, v, pattern, scale, segments, q_start=q_start, kv_start=kv_start)
    heads, kv_heads = pattern.group_size * pattern.num_sparse_heads, pattern.num_sparse_heads
    is_whole = is_static and q_start == kv_start == 0 and q.shape[1] == k.shape[1]
    sees_all = pattern.stride == 1 or pattern.num_blocks(q.shape[1]) <= pattern.window[0]
    if is_whole and sees_all:
        heads = kv_heads = 0
    parts = []
    if kv_heads:
        args = (q[:, :, :heads], k[:, :, :kv_heads], v[:, :, :kv_heads])
        starts = (q_start, kv_start)
        parts.append(attend_sparse_heads(*args, pattern, scale, segments, starts))
    if kv_heads < pattern.kv_heads:
        mask = Mask(
            is_causal=True,
            q_index=None if is_whole else q_start - kv_start + jnp.arange(q.shape[1]),
            q_segment_ids=segments[0],
            k_segment_ids=segments[1],
        )
        args = (q[:, :, heads:], k[:, :, kv_heads:], v[:, :, kv_heads:])
        parts.append(blocked_attention(*args, mask, scale=scale))
    if len(parts) == 1:
        return parts[0]
    (z, lse), (dense_z, dense_lse) = parts
    return jnp.concatenate([z, dense_z], axis=2), jnp.concatenate([lse, dense_lse], axis=1)


def _is_zero(start: int | Array) -> bool:
    return isinstance(start, int) and start == 0


def _check(q, k, v, pattern, segment_ids, kv_segment_ids, q_start, kv_start) -> None:
    if not isinstance(pattern, ShardPattern):
        raise TypeError(f"pattern is a {type(pattern).__name__}; needed a ShardPattern.")
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} must be [B,T,H,D], [B,S,K,D] and [B,S,K,W]."
        )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} do not fit: they share the batch, k and v "
            "share positions and heads, and q and k share the head dim."
        )
    heads = (q.shape[2], k.shape[2])
    if heads != (pattern.num_heads, pattern.kv_heads):
        raise ValueError(
            f"the pattern was built for {pattern.num_heads} query and {pattern.kv_heads} kv heads, "
            f"q and k have {heads[0]} and {heads[1]}; build it with the model's numbers and, for a "
            "slice of its heads, take pattern.for_heads(start, stop)."
        )
    for name, start in (("q_start", q_start), ("kv_start", kv_start)):
        if isinstance(start, int) and (start % pattern.block or start < 0):
            raise ValueError(
                f"{name}={start} is not a multiple of block={pattern.block}; chunks begin where "
                "blocks do."
            )
    if kv_segment_ids is not None and segment_ids is None:
        raise ValueError("kv_segment_ids was given without segment_ids; pass the queries' as well.")
    kv_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    for name, ids, shape in (
        ("segment_ids", segment_ids, q.shape[:2]),
        ("kv_segment_ids", kv_ids, k.shape[:2]),
    ):
        if ids is not None and jnp.shape(ids) != shape:
            raise ValueError(f"{name} has shape {jnp.shape(ids)}, needed {shape}.")
    if _is_zero(q_start) and _is_zero(kv_start) and q.shape[1] > k.shape[1] and pattern.causal:
        raise ValueError(
            f"T={q.shape[1]} queries and S={k.shape[1]} keys from position 0: the last queries "
            "have no keys of their own; pass q_start and kv_start for chunks."
        )
