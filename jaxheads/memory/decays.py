"""How much of each write is left at each token of a chunk: small matrices made of the gates.

Unrolled from the start `(W, S)` of a chunk, the recurrence

    S_t = eta_t S_{t-1} - theta_t u_t,    M_t = (1 - alpha_t) M_{t-1} + S_t

is linear in the start and in the gradients of the chunk's tokens:

    M_t = weights_t W + momentum_t S - sum_j mix[t, j] u_j

The coefficients obey the recurrence themselves, row by row, so they are computed by b steps of
elementwise products over all chunks at once. There is no logarithm and no division, hence gates of
exactly 0 and 1 and their derivatives are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.typing import Array, vary_like


class Decays(NamedTuple):
    """Coefficients of one layer of the memory; C is 1, or d_in with a decay per channel."""

    weights: Array
    """[..., b, C] what is left of the start weights where token t reads."""
    momentum: Array
    """[..., b, C] how often the start momentum has been added."""
    mix: Array
    """[..., b, b, C] what is left of the gradient of token j where token t reads."""
    initial: Array | None
    """[..., b, C] what is left of the initial weights of a document that began in the chunk."""
    initial_momentum: Array | None
    """[..., b, C] how often the initial momentum of that document has been added."""
    end: EndDecays


class EndDecays(NamedTuple):
    """The same after the last token."""

    weights: Array  # [..., C]
    momentum: Array  # [..., C]
    mix: Array  # [..., b, C]
    initial: Array | None  # [..., C]
    initial_momentum: Array | None  # [..., C]
    initial_left: Array | None  # [..., 1] of the initial momentum in the momentum
    momentum_left: Array  # [..., 1] of the start momentum in the momentum
    momentum_mix: Array  # [..., b, 1] of the gradient of token j in the momentum


def decays(
    theta: Array,
    eta: Array,
    alpha: Array,
    *,
    real: Array | None = None,
    reset: Array | None = None,
    read: str = "post",
) -> Decays:
    """Coefficients of chunks of b tokens.

    Args:
      theta, eta: [..., b] step sizes and momenta.
      alpha: [..., b, C] forgetting.
      real: [..., b] 1 for tokens; 0 for empty slots, which change nothing.
      reset: [..., b] 1 where a document begins: the memory starts anew before that token.
      read: "post" reads after the token's own write, "pre" before it.
    """
    length = theta.shape[-1]
    lead, channels = alpha.shape[:-2], alpha.shape[-1]
    if real is not None:
        theta, eta = theta * real, jnp.where(real > 0, eta, 1.0)
        alpha = alpha * real[..., None]
    keep = 1.0 - alpha
    by_token = lambda x: None if x is None else jnp.moveaxis(x, -1, 0)
    rows = (
        jnp.moveaxis(keep, -2, 0),
        by_token(eta),
        by_token(real),
        by_token(reset),
        jnp.eye(length, dtype=theta.dtype),
    )

    def step(carry: EndDecays, row: tuple) -> tuple[EndDecays, tuple]:
        weights, momentum, mix, initial, added, born, left, trace = carry
        keep, eta, real, reset, here = row
        if reset is not None:
            stays = (1.0 - reset)[..., None]
            weights, momentum, mix = stays * weights, stays * momentum, stays[..., None] * mix
            initial = stays * initial + reset[..., None]
            added, born = stays * added, stays * born + reset[..., None]
            left, trace = stays * left, stays[..., None] * trace
        before = (weights, momentum, mix, initial, added)
        left = eta[..., None] * left
        trace = eta[..., None, None] * trace + here[:, None]
        new_left, new_trace = left, trace
        if real is not None:
            new_left, new_trace = real[..., None] * left, real[..., None, None] * trace
        weights, momentum = keep * weights, keep * momentum + new_left
        mix = keep[..., None, :] * mix + new_trace
        if reset is not None:
            born = eta[..., None] * born
            initial = keep * initial
            added = keep * added + (born if real is None else real[..., None] * born)
        after = (weights, momentum, mix, initial, added)
        return EndDecays(*after, born, left, trace), before if read == "pre" else after

    ones = jnp.ones((*lead, channels), theta.dtype)
    zeros = jnp.zeros((*lead, length, 1), theta.dtype)
    start = EndDecays(
        ones,
        0.0 * ones,
        jnp.broadcast_to(zeros, (*lead, length, channels)),
        None if reset is None else 0.0 * ones,
        None if reset is None else 0.0 * ones,
        None if reset is None else jnp.zeros((*lead, 1), theta.dtype),
        jnp.ones((*lead, 1), theta.dtype),
        zeros,
    )
    start = vary_like(start, rows)
    end, (weights, momentum, mix, initial, added) = jax.lax.scan(step, start, rows)
    sizes = theta[..., None]
    return Decays(
        jnp.moveaxis(weights, 0, -2),
        jnp.moveaxis(momentum, 0, -2),
        jnp.moveaxis(mix, 0, -3) * sizes[..., None, :, :],
        None if initial is None else jnp.moveaxis(initial, 0, -2),
        None if added is None else jnp.moveaxis(added, 0, -2),
        end._replace(mix=end.mix * sizes, momentum_mix=end.momentum_mix * sizes),
    )
