"""Pruning heads: switching them off at run time, or in the weights for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads import heads as head_sets
from jaxheads.interventions.scale import scale_heads
from jaxheads.models import Decoder
from jaxheads.taps import TappedForward
from jaxheads.typing import ArrayLike


def prune_heads(forward: Callable[..., Any], keep: ArrayLike) -> TappedForward:
    """A forward without some heads: ``z[:, :, h] <- keep[l, h] * z[:, :, h]`` at every position.

    Args:
      forward: a forward, wrapped or not.
      keep: [L,H] bool, or numbers from 0 (prune) to 1 (keep). Other heads are not rescaled.

    References: Jin et al., 2024, arXiv:2402.18154.
    """
    return scale_heads(forward, jnp.asarray(keep, jnp.float32))


def fold_pruned(model: Decoder, keep: ArrayLike) -> Decoder:
    """The model with the output projection of each head times `keep`: pruned in its weights.

    The same function as `prune_heads` at no cost, and a checkpoint that any server can run. Heads
    are zeroed, not cut, so that shards keep equal sizes.

    Args:
      model: a `Decoder`.
      keep: [L,H], as for `prune_heads`.

    Raises:
      ValueError: for another shape.
      NotImplementedError: for architectures other than "transformer".
    """
    model.cfg.require_transformer("folding pruned heads into weights")
    keep = jnp.asarray(keep)
    head_sets.check_shape(keep.shape, model.cfg.num_layers, model.cfg.num_heads, "keep")
    pruned = jax.tree.map(lambda x: x, model)  # a copy that shares its arrays
    wo = model.layers.attention.wo[...]  # [L,H,D,M]
    pruned.layers.attention.wo[...] = wo * keep.astype(wo.dtype)[:, :, None, None]
    return pruned
