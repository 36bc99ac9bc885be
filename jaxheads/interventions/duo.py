"""Streaming heads: attention to a few first tokens and a window, for some kv heads.

    streamed = stream_heads(jh.forward, pattern, sink=4, recent=16)       # masks; pattern [L,K]
    tokens = jh.generate(model, prompt, max_new_tokens=9,                 # saves memory
                         cache_policy=jh.attention.duo_layers(pattern, sink=4, recent=16))

References: Xiao et al., 2024, arXiv:2410.10819.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.attention.duo_streaming import check_sizes
from jaxheads.interventions.per_head import intervene_per_head
from jaxheads.models import Decoder, ModelConfig
from jaxheads.taps import Edit, TapContext, TappedForward
from jaxheads.typing import Array, ArrayLike, is_traced

_TINY = float(jnp.finfo(jnp.float32).tiny)


def stream_heads(
    forward: Callable[..., Any], pattern: ArrayLike, sink: int, recent: int
) -> TappedForward:
    """A forward in which some kv heads stream: masks alone, to study what a pattern costs.

        A <- a A + (1 - a) (A M) / sum(A M),     M[t,u] = u < sink or t - u < recent

    with a = pattern[l, h // (H/K)]: 1 leaves the attention A of a query head as it is, 0 makes it
    attention under the mask, and a number between mixes both (the gates of DuoAttention, with
    gradients). It needs the [T,S] map of every head and saves no memory; for that see
    `attention.duo_layers`. (Where all scores that the mask leaves lie 87 below a query's highest,
    float32 holds nothing of them, and z is 0.)

    Args:
      forward: a forward, wrapped or not.
      pattern: [L,K] numbers from 0 to 1, one a kv head; data, so any two share a program.
      sink: first tokens of a text that are always seen.
      recent: last tokens that are seen, the token itself included.

    Raises:
      ValueError: for sizes that see nothing; when called, for another shape than [L,K].

    References: Xiao et al., 2024, arXiv:2410.10819, section 2.2.
    """
    check_sizes(sink, recent)
    payload = _Streams(jnp.asarray(pattern, jnp.float32), jnp.int32(sink), jnp.int32(recent))
    return intervene_per_head(forward, Edit("pattern", _stream, payload))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Streams:
    pattern: Array
    sink: Array
    recent: Array

    def fit(self, site: str, cfg: ModelConfig) -> tuple[Array, Array, Array]:
        """The gates of query heads [L,H], and the sizes [L]."""
        del site
        check_gates(self.pattern, cfg)
        gates = jnp.repeat(self.pattern, cfg.num_groups, axis=1)
        over_layers = lambda x: jnp.broadcast_to(x, cfg.num_layers)
        return gates, over_layers(self.sink), over_layers(self.recent)


def check_gates(gates: ArrayLike, cfg: ModelConfig) -> None:
    """Raise unless there is one gate for each kv head [L,K]."""
    shape, needed = jnp.shape(gates), (cfg.num_layers, cfg.num_kv_heads)
    if shape != needed:
        is_by_query = shape == (cfg.num_layers, cfg.num_heads)
        raise ValueError(
            f"the pattern has shape {shape}, needed [L,K] = {needed}"
            + (
                ": one a kv head, not one a query head."
                if is_by_query
                else "; is it of this model?"
            )
        )


def _stream(value: Array, payload: tuple[Array, Array, Array], ctx: TapContext) -> Array:
    """Edit of a pattern [B,H,T,S]."""
    gates, sink, recent = payload
    num_queries, num_keys = value.shape[-2:]
    slots = jnp.arange(num_queries, dtype=jnp.int32) if ctx.slots is None else ctx.slots
    keys = jnp.arange(num_keys, dtype=jnp.int32)
    distance = slots[..., :, None] - keys  # [T,S] or [B,T,S]
    if ctx.segment_ids is not None and ctx.positions is not None:
        # Of the keys in the query's own text: the others have no weight.
        keys = ctx.positions[..., :, None] - distance
    seen = (keys < sink) | (distance < recent)
    seen = (seen if seen.ndim == 3 else seen[None])[:, None]  # [1|B,1,T,S]
    kept = jnp.where(seen, value, 0)
    streamed = kept / jnp.maximum(kept.sum(axis=-1, keepdims=True), _TINY)
    a = gates[:, None, None].astype(value.dtype)
    return a * value + (1 - a) * streamed


def reorder_heads(params: Decoder, pattern: ArrayLike) -> Decoder:
    """The same model with the retrieval kv heads of each layer first, and their query heads.

    Weights q, k, v, their biases, and the rows of the output projection change places: every output
    stays the same, and the caches of a sorted pattern are cut from neighbouring heads. The pattern
    of the new model is ``-np.sort(-pattern, axis=1)``.

    Args:
      params: a `Decoder`.
      pattern: [L,K] bool, True for the retrieval heads.

    Raises:
      ValueError: for another shape.
      NotImplementedError: for a model in which heads differ by their number.
    """
    cfg = params.cfg
    cfg.require_transformer("reordering heads")
    by_number = {spec.attention for spec in cfg.pattern} - {"dense", "dmha"}
    if cfg.positions == "alibi" or by_number:
        raise NotImplementedError(
            f"heads of positions={cfg.positions!r} and attention={cfg.attention!r} differ by their "
            "number, so they cannot change places; reorder a model of dense attention."
        )
    if is_traced(pattern):
        raise TypeError("pattern decides the order of weights; it cannot be traced.")
    check_gates(pattern, cfg)
    kv = jnp.asarray(np.argsort(~np.asarray(pattern, bool), axis=1, kind="stable"))  # [L,K]
    group = cfg.num_groups
    query = (kv[:, :, None] * group + jnp.arange(group)).reshape(cfg.num_layers, cfg.num_heads)
    new = jax.tree.map(lambda x: x, params)  # a copy that shares its arrays
    weights = new.layers.attention
    for names, order, axis in (
        (("wq",), query, 2), (("wk", "wv"), kv, 2), (("wo",), query, 1),
        (("bq", "sinks"), query, 1), (("bk", "bv"), kv, 1),
    ):  # fmt: skip
        for name in names:
            old = getattr(weights, name)
            if old is not None:
                at = jnp.expand_dims(order, tuple(n for n in range(old.ndim) if n not in (0, axis)))
                old[...] = jnp.take_along_axis(old[...], at, axis=axis)
    return new
