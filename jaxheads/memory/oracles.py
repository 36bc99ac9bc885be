"""The recurrence as it is written: for checking the dual form, not for speed.

`token_loop` takes `jax.grad` of the loss of one token after the other. `chunk_scan` forms all
gradients of a chunk, `[b, d_in, d_out]`, and runs the two linear recurrences by
`jax.lax.associative_scan`, as the paper describes it. Both take the same slots as `dual.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.memory.dual import ChunkOut, Weights
from jaxheads.memory.network import Inner, apply_memory, clamp_factor, token_loss
from jaxheads.typing import Array


class Slots(NamedTuple):
    """Tokens of rows and heads in their places on the grid of chunks; N = chunks * b."""

    k: Array  # [B,H,N,D]
    v: Array
    q: Array
    theta: Array  # [B,H,N,L]
    eta: Array
    alpha: tuple[Array, ...]  # per layer [B,H,N,C]
    real: Array  # [B,N] bool
    reset: Array  # [B,N] bool


def surprise_of(ref: Weights, k: Array, v: Array, inner: Inner) -> tuple[Weights, Array]:
    """The gradient of one token at weights `[d_in, d_out]`, limited, and its norm."""
    grads = jax.grad(token_loss)(ref, k, v, inner)
    squared = sum(jnp.sum(g * g) for g in grads)
    squared = jnp.asarray(squared)
    if inner.max_grad_norm is not None:
        factor = clamp_factor(squared, inner.max_grad_norm)
        grads = [factor * g for g in grads]
    if inner.stop_inner_grad:
        grads = jax.lax.stop_gradient(grads)
    return grads, jnp.sqrt(jax.lax.stop_gradient(squared))


def _read(weights: Weights, q: Array, inner: Inner) -> Array:
    return apply_memory(weights, q[None], inner)[0]


def token_loop(
    weights: Weights,
    momentum: Weights,
    ref: Weights,
    initial: Weights,
    slots: Slots,
    chunk: int,
    inner: Inner,
    filled: Array,
) -> tuple[Weights, Weights, Weights, ChunkOut]:
    """One token after the other; `filled [B]` is where the chunk in progress ends its tokens."""

    def one_head(weights, momentum, ref, initial, slots: Slots, first: Array):
        def step(carry, xs):
            weights, momentum, ref, count = carry
            token, real, reset = xs
            k, v, q, theta, eta, alpha = token
            fresh = real & reset
            weights = [jnp.where(fresh, m, w) for w, m in zip(weights, initial)]
            ref = [jnp.where(fresh, m, w) for w, m in zip(ref, initial)]
            momentum = [jnp.where(fresh, 0.0, s) for s in momentum]
            before = weights
            grads, norm = surprise_of(ref, k, v, inner)
            new_s = [e * s - t * u for e, s, t, u in zip(eta, momentum, theta, grads)]
            new_w = [(1 - a)[:, None] * w + s for a, w, s in zip(alpha, weights, new_s)]
            weights = [jnp.where(real, new, old) for new, old in zip(new_w, weights)]
            momentum = [jnp.where(real, new, old) for new, old in zip(new_s, momentum)]
            y = _read(before if inner.read == "pre" else weights, q, inner)
            count = count + real
            done = count == chunk
            ref = [jnp.where(done, w, r) for w, r in zip(weights, ref)]
            return (weights, momentum, ref, jnp.where(done, 0, count)), ChunkOut(y, norm)

        token = (slots.k, slots.v, slots.q, slots.theta, slots.eta, slots.alpha)
        carry, out = jax.lax.scan(
            step, (weights, momentum, ref, first), (token, slots.real, slots.reset)
        )
        return *carry[:3], out

    over_heads = Slots(0, 0, 0, 0, 0, 0, None, None)  # type: ignore[arg-type]
    per_head = jax.vmap(one_head, in_axes=(0, 0, 0, 0, over_heads, None))
    return jax.vmap(per_head, in_axes=(0, 0, 0, None, 0, 0))(
        weights, momentum, ref, initial, slots, filled
    )


def chunk_scan(
    weights: Weights,
    momentum: Weights,
    ref: Weights,
    initial: Weights,
    slots: Slots,
    chunk: int,
    inner: Inner,
    complete: Array,
) -> tuple[Weights, Weights, Weights, ChunkOut]:
    """Chunk by chunk with every token's weights; `complete [chunks, B]` as in `dual.scan_slots`."""

    def affine(first, second):
        """First x -> a x + b, then the second."""
        (a, b), (c, d) = first, second
        return a * c, c * b + d

    def one_head(weights, momentum, ref, initial, chunk_slots: Slots, complete):
        k, v, q, theta, eta, alpha, real, reset = chunk_slots
        reset = reset & real
        fresh = jnp.cumsum(reset) > 0
        at = [jnp.where(fresh[:, None, None], m, r) for m, r in zip(initial, ref)]
        grads, norms = jax.vmap(surprise_of, in_axes=(0, 0, 0, None))(at, k, v, inner)
        cell = lambda x: x[:, None, None]
        after, momenta, before = [], [], []
        for layer, (w, s, m, u) in enumerate(zip(weights, momentum, initial, grads)):
            e = jnp.where(real, jnp.where(reset, 0.0, eta[:, layer]), 1.0)
            t = jnp.where(real, theta[:, layer], 0.0)
            e, add = jax.lax.associative_scan(affine, (cell(e), -cell(t) * u))
            s = e * s + add  # S_t [b,d_in,d_out]
            left = jnp.where(real[:, None], 1.0 - alpha[layer], 1.0)[:, :, None]
            a = jnp.where(cell(reset), 0.0, left)
            born = jnp.where(cell(reset), left * m, 0.0)
            a, add = jax.lax.associative_scan(affine, (a, born + jnp.where(cell(real), s, 0.0)))
            after.append(a * w + add)
            momenta.append(s)
            previous = jnp.concatenate([w[None], after[-1][:-1]])
            before.append(jnp.where(cell(reset), m, previous))
        y = jax.vmap(_read, in_axes=(0, 0, None))(
            before if inner.read == "pre" else after, q, inner
        )
        last = lambda xs: [x[-1] for x in xs]
        kept = [jnp.where(fresh[-1], m, r) for m, r in zip(initial, ref)]
        ref = [jnp.where(complete, w, r) for w, r in zip(last(after), kept)]
        return last(after), last(momenta), ref, ChunkOut(y, norms)

    over_heads = Slots(0, 0, 0, 0, 0, 0, None, None)  # type: ignore[arg-type]
    heads = jax.vmap(one_head, in_axes=(0, 0, 0, 0, over_heads, None))
    rows = jax.vmap(heads, in_axes=(0, 0, 0, None, 0, 0))

    def body(carry, xs):
        weights, momentum, ref = carry
        weights, momentum, ref, out = rows(weights, momentum, ref, initial, *xs)
        return (weights, momentum, ref), out

    by_chunk = lambda x, axis: jnp.moveaxis(
        x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :]), axis, 0
    )
    tokens = jax.tree.map(lambda x: by_chunk(x, 2), slots._replace(real=None, reset=None))
    tokens = tokens._replace(real=by_chunk(slots.real, 1), reset=by_chunk(slots.reset, 1))
    carry, out = jax.lax.scan(body, (weights, momentum, ref), (tokens, complete))
    merge = lambda x: jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, *x.shape[4:])
    return *carry, jax.tree.map(merge, out)
