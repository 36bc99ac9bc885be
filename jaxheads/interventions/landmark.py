"""Landmarks in what a model says: never where text comes next, always where one is due."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxheads.attention.landmark_tokens import check_block_size
from jaxheads.attention.masks import MASK_VALUE
from jaxheads.taps import Edit, TapContext, TappedForward, intervene
from jaxheads.typing import Array


def place_landmarks(
    forward: Callable[..., Any], landmark_id: int, block_size: int | None = None
) -> TappedForward:
    """A forward whose logits leave no doubt about landmarks.

    Without `block_size` the landmark is out of question everywhere: what perplexity and answers are
    taken from. With it, the token after every l tokens of text is certainly a landmark, and no
    other is: what text is generated with. That goes by positions, which count landmarks from 0.

        text = insert_landmarks(prompt, 50, landmark_id)
        out = generate(model, text[None], max_new_tokens=100,
                       forward=place_landmarks(forward, landmark_id, 50))
        answer = strip_landmarks(out[0], landmark_id)

    Args:
      forward: a forward, wrapped or not, of a model trained with landmarks.
      landmark_id: their id.
      block_size: l.
    Raises:
      ValueError: a negative id, an empty block.

    References: Mohtashami and Jaggi, 2023, arXiv:2305.16300.
    """
    if landmark_id < 0:
        raise ValueError(f"landmark_id={landmark_id} is no token id.")
    if block_size is not None:
        check_block_size(block_size)
    period = 0 if block_size is None else block_size + 1
    return intervene(forward, Edit("logits", _place, (jnp.int32(landmark_id), jnp.int32(period))))


def _place(logits: Array, payload: tuple[Array, Array], ctx: TapContext) -> Array:
    landmark, period = payload
    positions = jnp.zeros(logits.shape[1], jnp.int32) if ctx.positions is None else ctx.positions
    is_due = (period > 0) & ((positions + 2) % jnp.maximum(period, 1) == 0)  # the next token
    is_due = jnp.broadcast_to(is_due, logits.shape[:2])[..., None]
    is_landmark = jnp.arange(logits.shape[-1]) == landmark
    return jnp.where(is_landmark == is_due, logits, MASK_VALUE)
