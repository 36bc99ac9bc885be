"""Which ids a model may say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxheads.attention import landmarks_of
from jaxheads.attention.masks import MASK_VALUE
from jaxheads.interventions.landmark import place_landmarks
from jaxheads.taps import Edit, TapContext, TappedForward, intervene
from jaxheads.typing import Array, ArrayLike


def only_tokens(forward: Callable[..., Any], allowed: ArrayLike) -> TappedForward:
    """A forward for which other ids are out of question: their logits are -1e30 or so.

    Vocabularies are padded to round sizes, and a padded id that is drawn has no text:

        named = only_tokens(forward, np.arange(model.cfg.vocab_size) < tokenizer.vocab_size)
        generate(model, prompt, max_new_tokens=100, temperature=1.0, key=key, forward=named)

    Args:
      forward: a forward, wrapped or not.
      allowed: [V] bool, True where an id may be said.
    Raises:
      ValueError: not one row, or no id is allowed.
    """
    allowed = jnp.asarray(allowed, bool)
    if allowed.ndim != 1 or not allowed.any():
        raise ValueError(
            f"allowed is an array of shape {allowed.shape} with {int(allowed.sum())} true entries; "
            "it needs one entry for each id of the vocabulary, [V], and at least one true."
        )
    return intervene(forward, Edit("logits", _keep, allowed))


def for_text(forward: Callable[..., Any], cfg: Any, vocab_size: int) -> Callable[..., Any]:
    """The forward to generate text with: ids a tokenizer can read, landmarks where they are due.

    Args:
      forward: a forward, wrapped or not, of a model of `cfg`.
      cfg: the model's configuration.
      vocab_size: ids of the tokenizer, at most the model's.
    """
    marks = landmarks_of(cfg)
    allowed = np.arange(cfg.vocab_size) < vocab_size
    if marks is not None:
        allowed[marks.token] = True
    if not allowed.all():
        forward = only_tokens(forward, allowed)
    return forward if marks is None else place_landmarks(forward, marks.token, marks.block_size)


def _keep(logits: Array, allowed: Array, ctx: TapContext) -> Array:
    del ctx
    return jnp.where(allowed, logits, MASK_VALUE)
