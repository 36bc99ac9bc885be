"""Rules that make the logits to decode from out of those of several runs."""

from __future__ import annotations

import jax.numpy as jnp

from jaxheads.typing import Array, ArrayLike


def context_aware_logits(with_ctx: Array, without_ctx: Array, alpha: ArrayLike) -> Array:
    """Context-aware decoding: logits that weigh what the context changed more, or less.

        (1 + alpha) with_ctx - alpha without_ctx

    alpha = 0 decodes as usual; 0.5 to 1 follow the context, negative values turn to memory, -1 is
    the run without the context.

    Args:
      with_ctx: [..., V] logits of the prompt with the context.
      without_ctx: [..., V] logits of the question alone.
      alpha: a number, or numbers that broadcast to the logits.

    References: Shi et al., 2023, arXiv:2305.14739; a baseline of Jin et al., 2024,
    arXiv:2402.18154.
    """
    if jnp.shape(with_ctx) != jnp.shape(without_ctx):
        raise ValueError(
            f"the two runs have logits of shapes {jnp.shape(with_ctx)} and "
            f"{jnp.shape(without_ctx)}; read both at the slot that is decoded."
        )
    alpha = jnp.asarray(alpha)
    return (1 + alpha) * with_ctx - alpha * without_ctx
