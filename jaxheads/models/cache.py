"""The key/value cache of autoregressive decoding: an argument and a result, never hidden state."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxheads.models.configs import ModelConfig
from jaxheads.parallel import constrain
from jaxheads.typing import Array

CACHE_AXES = ("layers", "batch", None, "act_kv_heads", None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Preallocated keys and values of `S` slots. Slot s holds the s-th token of every row.

    Attributes:
      k: [L,B,S,K,D] keys, rotated where the layer's variant caches rotated keys.
      v: [L,B,S,K,D] values.
      segment_ids: [B,S] int32; 0 marks padding and slots not written yet.
      positions: [B,S] int32 position of each token.
      index: int32 scalar, the next free slot.
    """

    k: Array
    v: Array
    segment_ids: Array
    positions: Array
    index: Array

    @property
    def num_slots(self) -> int:
        """S, the tokens the cache can hold."""
        return self.k.shape[2]

    def write_tokens(self, segment_ids: Array, positions: Array) -> Cache:
        """The cache with T tokens' bookkeeping written at `index`, and `index` advanced by T."""
        put = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, self.index))
        return Cache(
            self.k,
            self.v,
            put(self.segment_ids, segment_ids),
            put(self.positions, positions),
            self.index + segment_ids.shape[1],
        )


def init_cache(cfg: ModelConfig, batch_size: int, num_slots: int, dtype=jnp.float32) -> Cache:
    """An empty cache, sharded like the activations when a mesh is set.

    Raises:
      ValueError: when `num_slots` exceeds the learned positions of the model.
    """
    if cfg.positions == "learned" and num_slots > cfg.max_positions:
        raise ValueError(
            f"a cache of {num_slots} tokens exceeds the {cfg.max_positions} learned positions of "
            "the model; shorten the prompt or generate fewer tokens."
        )
    shape = (cfg.num_layers, batch_size, num_slots, cfg.num_kv_heads, cfg.head_dim)
    empty = constrain(jnp.zeros(shape, dtype), CACHE_AXES)
    ids = jnp.zeros((batch_size, num_slots), jnp.int32)
    return Cache(empty, empty, ids, ids, jnp.int32(0))
