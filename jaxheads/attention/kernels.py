"""Fused kernels written by others, behind our masks: splash (TPU), cuDNN (GPU) and XLA's own.

Each kernel is a pair: `<name>_reason_not(request)` says in words why a call does not fit (None when
it does), `<name>_attention(request)` runs one that fits.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxheads.attention.contract import Request
from jaxheads.attention.masks import Mask, as_4d
from jaxheads.typing import Array

P = jax.P
LANES = 128  # width of a TPU vector register; splash blocks are multiples of it
SPLASH_BLOCK = 512  # positions in a block where the length allows it, as in MaxText
BATCH_AXES, CONTEXT_AXIS, HEADS_AXIS = ("data", "fsdp"), "context", "model"


def splash_reason_not(request: Request) -> str | None:
    """Why splash attention cannot honour a call; None when it can."""
    mask, mesh = request.mask, jax.sharding.get_abstract_mesh()
    num_queries, num_keys, head_dim = request.num_queries, request.num_keys, request.q.shape[-1]
    context = mesh.shape.get(CONTEXT_AXIS, 1) if _is_auto(mesh) else 1
    reasons = (
        (request.platform != "tpu", f"it runs on TPU, not on {request.platform}"),
        (request.bias is not None, "it takes no bias"),
        (request.alibi_slopes is not None, "it takes no ALiBi slopes"),
        (mask.head_mask is not None, "it takes no mask that differs per head or is dense"),
        (mask.prefix_lengths is not None, "it takes no prefix that every query sees"),
        (
            mask.q_index is not None or mask.k_index is not None,
            "its causality compares positions in the arrays, not index arrays",
        ),
        (request.needs_lse, "its log-sum-exp has no derivative"),
        (
            num_queries % (LANES * context) or num_keys % LANES,
            f"it needs lengths that are multiples of {LANES} on every shard, not "
            f"{num_queries} queries (over {context} context shards) and {num_keys} keys",
        ),
        (
            head_dim > LANES and head_dim % LANES,
            f"it needs head_dim up to {LANES} or a multiple of it, not {head_dim}",
        ),
        *((True, reason) for reason in _mesh_reasons(request, mesh)),
    )
    return next((reason for holds, reason in reasons if holds), None)


def _mesh_reasons(request: Request, mesh) -> list[str]:
    """Array axes that the mesh does not divide."""
    if not _is_auto(mesh):
        return []
    batch, heads = _size(mesh, BATCH_AXES), _size(mesh, (HEADS_AXIS,))
    num_kv_heads = request.k.shape[2]
    reasons = []
    if request.q.shape[0] % batch:
        reasons.append(
            f"batch {request.q.shape[0]} does not divide over {batch} data and fsdp shards"
        )
    if num_kv_heads % heads:
        reasons.append(f"{num_kv_heads} kv heads do not divide over {heads} model shards")
    return reasons


def splash_attention(request: Request) -> tuple[Array, None]:
    """Splash attention: block-sparse flash attention written in Pallas for TPU.

    Under `jax.set_mesh` the kernel runs in a `shard_map`, because GSPMD cannot partition a Pallas
    call: batch over data and fsdp, heads over model, queries over context. Each context shard
    reads all keys; its part of the mask carries the global position of its queries.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    mask, mesh = request.mask, jax.sharding.get_abstract_mesh()
    is_sharded = _is_auto(mesh) and mesh.size > 1
    context = mesh.shape.get(CONTEXT_AXIS, 1) if is_sharded else 1
    kernel = _splash_kernel(request, context)
    segments = _splash_segments(mask, request.num_queries, request.num_keys)

    def attend(kernel, q, k, v, segments, sinks):
        q = jnp.einsum("bthd->bhtd", q * jnp.asarray(request.scale, q.dtype))
        k, v = jnp.einsum("bskd->bksd", k), jnp.einsum("bskw->bksw", v)
        ids = None if segments is None else SegmentIds(*segments)
        run = lambda q, k, v, ids: kernel(q, k, v, ids, sinks)
        in_axes = (0, 0, 0, None if ids is None else 0)
        return jnp.einsum("bhtw->bthw", jax.vmap(run, in_axes=in_axes)(q, k, v, ids))

    args = (request.q, request.k, request.v, segments, request.sinks)
    if is_sharded:
        batch = tuple(a for a in BATCH_AXES if a in mesh.shape) or None
        heads = HEADS_AXIS if HEADS_AXIS in mesh.shape else None
        length = CONTEXT_AXIS if CONTEXT_AXIS in mesh.shape else None
        query_spec, key_spec = P(batch, length, heads, None), P(batch, None, heads, None)
        kernel_spec = kernel.manual_sharding_spec(jax.sharding.NamedSharding(mesh, P(None, length)))
        attend = jax.shard_map(
            attend,
            in_specs=(
                kernel_spec,
                query_spec,
                key_spec,
                key_spec,
                None if segments is None else (P(batch, length), P(batch, None)),
                None if request.sinks is None else P(heads),
            ),
            out_specs=query_spec,
            check_vma=False,  # Pallas calls do not state how their outputs vary over the mesh
        )
    return _zero_empty_rows(attend(kernel, *args), request), None


def _splash_kernel(request: Request, context: int) -> Any:
    """The kernel object for a call: static mask structure and block sizes."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    mask = request.mask
    shape = (request.num_queries, request.num_keys)
    if mask.window is not None:
        structure = splash.LocalMask(shape, window_size=mask.reach, offset=0)
    elif mask.is_causal:
        structure = splash.CausalMask(shape)
    else:
        structure = splash.FullMask(shape)
    block_q = splash_block_size(request.num_queries // context)
    block_k = splash_block_size(request.num_keys)
    return splash.make_splash_mha(
        splash.MultiHeadMask([structure] * request.q.shape[2]),
        head_shards=1,  # every head has the same mask, so shards of heads share its tables
        q_seq_shards=context,
        attn_logits_soft_cap=request.soft_cap,
        residual_checkpoint_name="lse",  # remat="names:lse" keeps its results: one run less
        interpret=request.platform != "tpu",  # for tests; selection never gets here off TPU
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            block_q_dq=block_q,
            block_kv_dq=block_k,
        ),
    )


def splash_block_size(length: int) -> int:
    """The largest block that divides a length, which is a multiple of `LANES`."""
    return next(size for size in (SPLASH_BLOCK, 384, 256, LANES) if length % size == 0)


def _splash_segments(mask: Mask, num_queries: int, num_keys: int) -> tuple[Array, Array] | None:
    """Segment ids that also say what key padding says: (queries [B,T], keys [B,S]).

    Splash lets equal ids see each other, so an invisible key gets an id that no query has.
    """
    if mask.q_segment_ids is not None:
        q_ids = mask.q_segment_ids
        k_ids = q_ids if mask.k_segment_ids is None else mask.k_segment_ids
    elif mask.key_mask is not None:
        q_ids = jnp.ones((mask.key_mask.shape[0], num_queries), jnp.int32)
        k_ids = jnp.ones((1, num_keys), jnp.int32)
    else:
        return None
    is_key = k_ids != 0
    if mask.key_mask is not None:
        is_key = is_key & mask.key_mask
    return q_ids.astype(jnp.int32), jnp.where(is_key, k_ids, -1).astype(jnp.int32)


def cudnn_reason_not(request: Request) -> str | None:
    """Why cuDNN's fused attention cannot honour a call; None when it can."""
    head_dim = request.q.shape[-1]
    reasons = (
        (request.platform != "gpu", f"it runs on NVIDIA GPUs, not on {request.platform}"),
        (
            request.q.dtype not in (jnp.bfloat16, jnp.float16),
            f"it computes in bfloat16 or float16, not {request.q.dtype}",
        ),
        (
            head_dim % 8 or head_dim > 128 or request.v.shape[-1] != head_dim,
            f"it needs one head_dim for q, k and v, a multiple of 8 up to 128, not {head_dim}",
        ),
        (request.bias is not None, "its bias gradient is limited to some shapes"),
        (request.alibi_slopes is not None, "it takes ALiBi only as a dense bias"),
    )
    return next((reason for holds, reason in reasons if holds), None) or xla_reason_not(request)


def xla_reason_not(request: Request) -> str | None:
    """Why `jax.nn.dot_product_attention` cannot honour a call; None when it can."""
    reasons = (
        (request.soft_cap is not None, "it has no soft_cap"),
        (request.sinks is not None, "it has no sinks"),
        (request.needs_lse, "it keeps its log-sum-exp"),
        (request.v.shape[-1] != request.q.shape[-1], "it needs values as wide as the keys"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def jax_nn_attention(
    request: Request, implementation: Literal["xla", "cudnn"]
) -> tuple[Array, None]:
    """`jax.nn.dot_product_attention`; causality and windows stay structure where it has them."""
    mask = request.mask
    num_queries, num_keys = request.num_queries, request.num_keys
    has_indices = mask.q_index is not None or mask.k_index is not None
    structure: dict[str, Any] = {}
    is_plain = not has_indices and mask.prefix_lengths is None
    if mask.is_causal and num_queries == num_keys and is_plain:
        structure = {"is_causal": True}
        if mask.window is not None:
            structure["local_window_size"] = mask.reach
        rest = Mask(
            q_segment_ids=mask.q_segment_ids,
            k_segment_ids=mask.k_segment_ids,
            key_mask=mask.key_mask,
            head_mask=mask.head_mask,
        )
    else:
        rest = mask
    visible = rest.materialize(num_queries, num_keys)
    bias = None if request.bias is None else as_4d(request.bias)
    if request.alibi_slopes is not None:
        distance = jnp.abs(mask.relative_index((0, num_queries), (0, num_keys)))
        slopes = request.alibi_slopes[:, None, None]
        alibi = -slopes * distance.reshape(-1, 1, num_queries, num_keys)
        bias = alibi if bias is None else bias + alibi
    z = jax.nn.dot_product_attention(
        request.q,
        request.k,
        request.v,
        bias,
        visible,
        scale=request.scale,
        implementation=implementation,
        **structure,
    )
    return _zero_empty_rows(z, request), None


cudnn_attention = functools.partial(jax_nn_attention, implementation="cudnn")
xla_attention = functools.partial(jax_nn_attention, implementation="xla")


def _zero_empty_rows(z: Array, request: Request) -> Array:
    """Zeros, with zero gradients, for queries that see no key; these kernels average there."""
    rows = request.mask.visible_rows(request.num_queries, request.num_keys)
    return z if rows is None else jnp.where(jnp.einsum("bht->bth", rows)[..., None], z, 0)


def _is_auto(mesh) -> bool:
    """Whether a mesh is set whose axes the compiler partitions (not already inside shard_map)."""
    return not mesh.empty and not mesh.manual_axes


def _size(mesh, axes: tuple[str, ...]) -> int:
    size = 1
    for axis in axes:
        size *= mesh.shape.get(axis, 1)
    return size
