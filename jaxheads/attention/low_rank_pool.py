"""Low-rank attention pooling: a text as m vectors, one per head, at a cost linear in its length.

    g_t = tanh((P^T c) * (Q^T u_t))      the bilinear scores c^T p_i q_i^T u_t of m rank-one heads
    f_t = g_t / max(|g_t|, eps)          over heads
    A_i = softmax_t(scale f_ti),   S = A H

Every |f_ti| <= 1, so with ``logit_scale=1`` (as published) no weight exceeds
``e^2 / (e^2 + T - 1)``: on long texts heads are nearly uniform, the more so the more of them there
are, and a single head has f = +-1. A larger `logit_scale`, an extension, removes the bound.

References: Mehta et al., 2019, arXiv:1912.00835.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.attention.masks import FLOOR, MASK_VALUE
from jaxheads.typing import Array, ArrayLike, is_traced

ACTIVATIONS = ("tanh", "linear")
KINDS = ("lama", "lama_ctx", "additive", "structured", "transformer", "mean", "max")


class Pooled(NamedTuple):
    """What `low_rank_attention_pool` returns."""

    S: Array
    """[B,m,D] one summary per head."""
    A: Array
    """[B,m,T] float32 weights; rows sum to 1 over the tokens that are there."""


def low_rank_attention_scores(
    u: Array, context: Array, P: Array, Q: Array, *, activation: str = "tanh", eps: float = 1e-12
) -> Array:
    """Scores of m rank-one heads, of norm 1 over heads.

        f_t = g_t / max(|g_t|_2, eps),   g_t = act((P^T c) * (Q^T u_t))

    Args:
      u: [B,T,D] views of the tokens.
      context: c [C], or [B,C] with one per text.
      P: [C,m].
      Q: [D,m].
      activation: "tanh" or "linear".
      eps: a token whose g is smaller has smaller scores; 0 scores and gradients for g = 0.
    Returns:
      f [B,T,m] float32 (or u's dtype if wider).
    Raises:
      ValueError: for shapes that do not fit.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}.")
    if u.ndim != 3:
        raise ValueError(f"u has shape {u.shape}; it must be [B,T,D].")
    if P.ndim != 2 or Q.ndim != 2 or P.shape[1] != Q.shape[1] or P.shape[1] < 1:
        raise ValueError(
            f"P has shape {P.shape} and Q {Q.shape}; they must be [C,m] and [D,m] with the same "
            "m, at least 1."
        )
    if Q.shape[0] != u.shape[2]:
        raise ValueError(f"Q has shape {Q.shape}; for u {u.shape} it must be [{u.shape[2]},m].")
    if context.shape not in ((P.shape[0],), (u.shape[0], P.shape[0])):
        raise ValueError(
            f"context has shape {context.shape}; for P {P.shape} and u {u.shape} it must be "
            f"[{P.shape[0]}] or [{u.shape[0]},{P.shape[0]}]."
        )
    dtype = jnp.promote_types(u.dtype, jnp.float32)
    u, context, P, Q = (a.astype(dtype) for a in (u, context, P, Q))
    asked = jnp.atleast_2d(jnp.einsum("...c,cm->...m", context, P))  # [B|1,m]
    g = asked[:, None] * jnp.einsum("btd,dm->btm", u, Q)
    g = jnp.tanh(g) if activation == "tanh" else g
    squares = jnp.sum(jnp.square(g), axis=-1, keepdims=True)
    is_small = squares <= eps**2  # where the root has no derivative, or a useless one
    norm = jnp.where(is_small, eps, jnp.sqrt(jnp.where(is_small, 1, squares)))
    return g / norm


def low_rank_attention_pool(
    values: Array,
    u: Array,
    context: Array,
    P: Array,
    Q: Array,
    *,
    mask: Array | None = None,
    activation: str = "tanh",
    logit_scale: ArrayLike = 1.0,
) -> Pooled:
    """m weighted sums of `values`, weighted by a softmax over tokens of `logit_scale` f.

    Args:
      values: H [B,T,D'] what is summed: the encoder's states, not u.
      u, context, P, Q, activation: as for `low_rank_attention_scores`.
      mask: [B,T] bool, or 0 and 1; True (1) on tokens that are there. None: all.
      logit_scale: a positive number or [m]; 1 is the paper's.
    Returns:
      `Pooled`. Under jit a text without tokens has weights and summaries of 0.
    Raises:
      ValueError: for shapes that do not fit and, where values are known, a mask with other numbers
        or an empty text, or a scale that is not positive.
    """
    f = low_rank_attention_scores(u, context, P, Q, activation=activation)
    if values.ndim != 3 or values.shape[:2] != u.shape[:2]:
        raise ValueError(f"values has shape {values.shape}; for u {u.shape} it must be [B,T,D].")
    if not is_traced(logit_scale) and not (np.asarray(logit_scale) > 0).all():
        raise ValueError(f"logit_scale={logit_scale} must be positive.")
    scale = jnp.asarray(logit_scale, f.dtype)
    if scale.shape not in ((), (f.shape[-1],)):
        raise ValueError(f"logit_scale has shape {scale.shape}; it must be a number or [m].")
    A = token_softmax(jnp.einsum("btm->bmt", f * scale), mask)
    return Pooled(jnp.einsum("bmt,btd->bmd", A.astype(values.dtype), values), A)


def token_softmax(scores: Array, mask: Array | None) -> Array:
    """Softmax of [B,m,T] over the tokens of the mask [B,T]; exactly 0 elsewhere."""
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    here = check_token_mask(mask, (scores.shape[0], scores.shape[2]))[:, None]
    scores = jnp.where(here, scores, MASK_VALUE)
    highest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), FLOOR)
    weights = jnp.exp(scores - jax.lax.stop_gradient(highest))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


def check_token_mask(mask: Array, shape: tuple[int, ...]) -> Array:
    """The mask as bool; raises for another shape and, where known, other numbers or empty texts."""
    if mask.shape != shape:
        raise ValueError(f"mask has shape {mask.shape}; it must be [B,T] = {shape}.")
    if not is_traced(mask):
        known = np.asarray(mask)
        if not np.isin(known, (0, 1)).all():
            raise ValueError("mask has values other than 0 and 1; use 1 for tokens that are there.")
        empty = np.flatnonzero(~known.astype(bool).any(-1))
        if len(empty):
            raise ValueError(
                f"mask leaves text {empty[0]} without a token; drop empty texts, or give them one."
            )
    return mask.astype(bool)


def lengths_to_mask(lengths: Array, T: int) -> Array:
    """[B] numbers of tokens -> [B,T] bool.

    Raises:
      ValueError: for known lengths outside 1..T.
    """
    if not is_traced(lengths):
        known = np.asarray(lengths)
        if known.ndim != 1 or (known < 1).any() or (known > T).any():
            raise ValueError(f"lengths={known.tolist()} must be [B] numbers from 1 to T = {T}.")
    return jnp.arange(T) < jnp.asarray(lengths)[:, None]


def attention_pool_flops(kind: str, T: int, D: int, m: int, a: int | None = None) -> int:
    """Operations of one text's pooling, without the encoder and without the view u of the words.

    Args:
      kind: one of lama, lama_ctx, additive, structured, transformer, mean, max.
      T: tokens.
      D: width of the states.
      m: heads.
      a: hidden width of "structured"; None = D.
    """
    a = D if a is None else a
    return _of_kind(
        kind,
        lama=2 * D * m + 2 * T * D * m + 3 * T * m + 2 * m * T * D,
        additive=4 * T * D,
        structured=2 * T * D * a + 2 * T * a * m + 2 * m * T * D,
        transformer=8 * T * D * D + 4 * T * T * D + T * D,
        mean=T * D,
    )


def attention_pool_params(kind: str, D: int, m: int, a: int | None = None) -> int:
    """Parameters of the pooling: P, Q and c; c; W_1 and W_2; or the projections q, k, v and o.

    The view of the words (W_w) of lama and additive, D^2 + D more, and biases are not counted.
    """
    a = D if a is None else a
    if kind == "lama_ctx":
        return 2 * D * m  # c is the mean of the embeddings, here of width D
    return _of_kind(
        kind, lama=2 * D * m + D, additive=D, structured=a * D + a * m, transformer=4 * D * D,
        mean=0,
    )  # fmt: skip


def _of_kind(kind: str, **numbers: int) -> int:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}.")
    return numbers[{"lama_ctx": "lama", "max": "mean"}.get(kind, kind)]
