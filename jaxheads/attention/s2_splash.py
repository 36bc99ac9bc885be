"""S2 attention by splash attention, one call per class of heads that see the same blocks.

Splash shrinks its grid to the visible tiles only where all heads of a call share one mask; with a
mask per head every call would step through all tiles. So heads are put in the order of their
classes and each class gets a kernel of its own: V of them, each with its short grid.

The kernel that returns lse has no derivative, so the rule is ours: forward by splash, backward by
the row and column kernels of `s2_pallas_tpu`, which take an lse cotangent.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from jaxheads.attention import s2_kernels as kernels
from jaxheads.attention import s2_pallas_tpu as tpu
from jaxheads.attention import s2_worklist as worklist
from jaxheads.typing import Array

if TYPE_CHECKING:
    from jaxheads.attention.s2 import ShardPattern


class BlockMask(splash.Mask):
    """Blocks that see each other, with causality inside blocks, as splash asks for masks."""

    def __init__(self, blocks: np.ndarray, block: int, num_tokens: int, *, is_causal: bool):
        self.blocks, self.block, self.num_tokens = blocks, block, num_tokens
        self.is_causal = is_causal
        self._key = (blocks.shape, blocks.tobytes(), block, num_tokens, is_causal)
        self._hash = hash(self._key)

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, T), padding included."""
        return (self.blocks.shape[0] * self.block, self.blocks.shape[1] * self.block)

    def __getitem__(self, idx) -> np.ndarray:
        query, key = (range(n)[i] for n, i in zip(self.shape, idx, strict=True))
        (i, last_i), (j, last_j) = ((x[0] // self.block, x[-1] // self.block) for x in (query, key))
        if (i, j) == (last_i, last_j):  # splash asks for single tiles, thousands of them
            is_whole = key[-1] <= query[0] if self.is_causal else key[-1] < self.num_tokens
            if is_whole or not self.blocks[i, j]:
                return _constant(len(query), len(key), bool(self.blocks[i, j]))
        query, key = np.asarray(query)[:, None], np.asarray(key)[None, :]
        seen = self.blocks[query // self.block, key // self.block]
        return seen & (key <= query if self.is_causal else key < self.num_tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockMask) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash


@functools.lru_cache(maxsize=8)
def _constant(rows: int, columns: int, value: bool) -> np.ndarray:
    return np.full((rows, columns), value)


class _Static(NamedTuple):
    """The part of a call that shapes the program."""

    pattern: ShardPattern
    tpu: tpu.Static


def attend(
    q: Array,
    k: Array,
    v: Array,
    pattern: ShardPattern,
    *,
    scale: float | None = None,
    interpret: bool | None = None,
) -> tuple[Array, Array]:
    """S2 attention of whole sequences, with derivatives for z and lse.

    Args:
      q: [B,T,H,D], bfloat16 or float32.
      k: [B,T,K,D].
      v: [B,T,K,D].
      pattern: blocks of at least 128 tokens.
      scale: factor on q.k; None = 1/sqrt(D).
      interpret: True runs the kernel's operations as plain JAX; None = everywhere but on TPU.
    Returns:
      z [B,T,H,D] in the dtype of q, lse [B,H,T] float32.
    Raises:
      ValueError: a block below 128, or shapes that do not fit the pattern.
      NotImplementedError: heads sharded over devices, whose classes differ.
    """
    kernels.check_arrays(q, k, v, pattern)
    if pattern.block < tpu.LANES:
        raise ValueError(
            f"block={pattern.block} is below the {tpu.LANES} positions of splash's smallest tile; "
            f"use a pattern with block >= {tpu.LANES} or impl='blocked'."
        )
    tile = min(pattern.block, tpu.TILE)
    shape = worklist.shape_of(pattern, q.shape[1], tile, tile, pattern.block)
    static = tpu.Static(
        shape=shape,
        group=q.shape[2] // k.shape[2],
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
    )

    def run(lists, q, k, v, interpret):
        here = _Static(pattern, static._replace(interpret=interpret))
        length = shape.padded - shape.num_tokens
        heads_first = lambda x: jnp.einsum("bthd->bhtd", kernels.pad_tokens(x, length))
        z, lse = cast(
            tuple[Array, Array],
            _attend(here, lists, heads_first(q), heads_first(k), heads_first(v)),
        )
        z = jnp.einsum("bhtd->bthd", z[:, :, : shape.num_tokens])
        return z, lse[:, :, 0, : shape.num_tokens]

    def lists_of(shards: int) -> tpu.Lists:
        if shards > 1:
            raise NotImplementedError(
                f"splash makes one kernel per class of heads, and the {shards} model shards of the "
                "mesh would each need other kernels; pass impl='pallas_tpu'."
            )
        return tpu.make_lists(pattern, shape, tpu.MAX_STEPS, 1)

    return kernels.launch(run, lists_of, q, k, v, platform="tpu", interpret=interpret)


def head_classes(pattern: ShardPattern, num_blocks: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(query heads, their mask [N,N]) of every class of heads that see the same blocks."""
    masks = pattern.block_mask(num_blocks)
    members: dict[bytes, list[int]] = {}
    for head, mask in enumerate(masks):
        members.setdefault(mask.tobytes(), []).append(head)
    return [(np.asarray(heads), masks[heads[0]]) for heads in members.values()]


def _kernel(static: _Static, mask: np.ndarray, num_heads: int):
    """The splash kernel of one class; its grid has the widest row's tiles."""
    shape = static.tpu.shape
    block_mask = BlockMask(mask, static.pattern.block, shape.num_tokens, is_causal=shape.is_causal)
    tile = shape.block_q
    return splash.make_splash_mha(
        splash.MultiHeadMask([block_mask] * num_heads),
        block_sizes=splash.BlockSizes(block_q=tile, block_kv=tile, block_kv_compute=tile),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
        interpret=static.tpu.interpret,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, lists: tpu.Lists, q: Array, k: Array, v: Array):
    """q [B,H,T,D], k and v [B,K,T,D] -> z [B,H,T,D] and lse [B,H,1,T] float32."""
    q = q * jnp.asarray(static.tpu.scale, q.dtype)
    num_blocks = q.shape[2] // static.pattern.block
    classes = head_classes(static.pattern, num_blocks)
    parts = []
    for heads, mask in classes:
        kv_heads = np.unique(heads // static.tpu.group)
        kernel = _kernel(static, mask, len(heads))
        z, (lse,) = jax.vmap(kernel)(q[:, heads], k[:, kv_heads], v[:, kv_heads])
        parts.append((z, lse))
    z, lse = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    back = np.argsort(np.concatenate([heads for heads, _ in classes]))
    return z[:, back], lse[:, back][:, :, None]


def _attend_fwd(static: _Static, lists: tpu.Lists, q: Array, k: Array, v: Array):
    # remat="names:lse" keeps both results, so that the kernels do not run again.
    out = cast(tuple[Array, Array], _attend(static, lists, q, k, v))
    z, lse = (checkpoint_name(x, "lse") for x in out)
    return (z, lse), (lists, q, k, v, z, lse)


def _attend_bwd(static: _Static, residuals, cotangents):
    return tpu.backward(static.tpu, residuals, cotangents)


_attend.defvjp(_attend_fwd, _attend_bwd)
