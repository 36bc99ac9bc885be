"""DuoAttention: some kv heads keep the whole context, the others a few first tokens and a window.

Which heads may stream is learned by one gate a kv head that mixes full and streaming attention
(`duo_attention_train`, `discovery.train_gates`). To decode, a layer keeps two caches
(`duo_attention_step`): every token of the retrieval heads, and sink + recent tokens of the others,
whatever the length. `duo_streaming` has the mask, `duo_cache` the caches, `duo_variant` the row of
`VARIANTS` that decoders use.

References: Xiao et al., 2024, arXiv:2410.10819; released code: mit-han-lab/duo-attention.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.attention.duo_cache import (
    DuoCache,
    KeysValues,
    Stepped,
    duo_attention_step,
    evict_last,
    init_cache,
)
from jaxheads.attention.duo_streaming import masked, streaming_attention, streaming_mask
from jaxheads.attention.masks import Mask
from jaxheads.typing import Array

__all__ = [
    "DuoCache",
    "KeysValues",
    "Stepped",
    "Streams",
    "clip_gates",
    "duo_attention_step",
    "duo_attention_train",
    "evict_last",
    "init_cache",
    "mix_heads",
    "streaming_attention",
    "streaming_mask",
]

MIX_SOURCES = ("teacher", "self")


class Streams(NamedTuple):
    """Two runs of one text: the model as it is, and with heads that stream in part."""

    full: Array
    mixed: Array


def clip_gates(alpha: Array) -> Array:
    """Gates within [0,1]; those on or inside the bounds keep their gradient."""
    inside = (alpha >= 0) & (alpha <= 1)
    return jnp.where(inside, alpha, jax.lax.stop_gradient(jnp.clip(alpha, 0, 1)))


def mix_heads(streaming: Array, full: Array, gates: Array) -> Array:
    """(1 - a) streaming + a full for z [B,T,H,D] and a [H], in float32."""
    a = gates.astype(jnp.float32)[:, None]
    mixed = (1 - a) * streaming.astype(jnp.float32) + a * full.astype(jnp.float32)
    return mixed.astype(streaming.dtype)


def duo_attention_train(
    q_f: Array,
    k_f: Array,
    v_f: Array,
    q_m: Array,
    k_m: Array,
    v_m: Array,
    alpha: Array,
    *,
    sink: int,
    recent: int,
    mix_source: str = "teacher",
    impl: str = "dense",
) -> Streams:
    """Heads of one layer in both streams, the second mixed by the gates:

        full = causal(q_f, k_f, v_f)
        mixed = (1 - a) streaming(q_m, k_m, v_m) + a F,    a = alpha[h // (H/K)] in [0,1]

    F is `full` without its gradient ("teacher", the released code) or causal(q_m, k_m, v_m)
    ("self", the formula of the paper).

    Args:
      q_f: [B,T,H,D], k_f and v_f: [B,T,K,D] of the full stream, rotated.
      q_m: the same of the mixed stream, with k_m and v_m.
      alpha: [K] float32 gates.
      sink, recent: see `streaming_mask`.
      mix_source: "teacher" or "self".
      impl: of the streaming part, see `streaming_attention`.
    Returns:
      Streams(full, mixed), both [B,T,H,D].
    """
    if mix_source not in MIX_SOURCES:
        raise ValueError(f"mix_source={mix_source!r} is not one of {', '.join(MIX_SOURCES)}.")
    heads, kv_heads = q_m.shape[2], k_m.shape[2]
    if jnp.shape(alpha) != (kv_heads,):
        raise ValueError(
            f"alpha has shape {jnp.shape(alpha)}, needed ({kv_heads},): one gate a kv head, which "
            f"its {heads // kv_heads} query heads share."
        )
    causal = Mask(is_causal=True)
    full = jax.lax.stop_gradient(masked(q_f, k_f, v_f, causal))
    streaming = streaming_attention(q_m, k_m, v_m, sink=sink, recent=recent, impl=impl)
    source = full if mix_source == "teacher" else masked(q_m, k_m, v_m, causal)
    gates = jnp.repeat(clip_gates(jnp.asarray(alpha)), heads // kv_heads)
    return Streams(full, mix_heads(streaming, source, gates))
