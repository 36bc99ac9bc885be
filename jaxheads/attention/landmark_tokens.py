"""Landmark tokens in a text: where they stand, putting them in, taking them out.

A landmark follows every `block_size` tokens and closes their block, so that the tokens of a text
with landmarks come in periods of block_size + 1.
Mohtashami and Jaggi, 2023, arXiv:2305.16300.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxheads.typing import Array, is_traced


def check_block_size(block_size: int) -> None:
    """Raise for a block without tokens."""
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(
            f"block_size={block_size!r} must be at least 1: the text tokens of a block, without "
            "its landmark."
        )


def landmark_places(length: int, block_size: int, phase: int = 0) -> np.ndarray:
    """[length] bool: where landmarks stand in a text that goes on a block of `phase` tokens."""
    check_block_size(block_size)
    return (np.arange(length) + phase) % (block_size + 1) == block_size


def insert_landmarks(
    tokens: Any, block_size: int, landmark_id: int, phase: int = 0
) -> np.ndarray | Array:
    """The tokens with a landmark after every block.

    A block that the last token completes has its landmark. Pieces of a text join: with n tokens in
    the pieces before, the phase of the next is n % block_size.

    Args:
      tokens: [...,N] integers without landmarks.
      block_size: l, text tokens of a block.
      landmark_id: the id of a landmark, which no text has.
      phase: tokens that the running block already has, 0 to block_size - 1.
    Returns:
      [..., N + (N + phase) // block_size], of the kind and dtype of `tokens`.
    Raises:
      ValueError: for sizes out of range, or tokens that have the id (where they are known): they
        are not text, or were given their landmarks before.
    Example:
      >>> insert_landmarks([5, 6, 7, 8, 9], 2, 0).tolist()
      [5, 6, 0, 7, 8, 0, 9]
    """
    check_block_size(block_size)
    if not 0 <= phase < block_size:
        raise ValueError(f"phase={phase} must be from 0 to block_size - 1 = {block_size - 1}.")
    xp: Any = jnp if is_traced(tokens) else np
    tokens = xp.asarray(tokens)
    if not xp.issubdtype(tokens.dtype, xp.integer):
        raise TypeError(f"tokens has dtype {tokens.dtype}; landmarks go between integer ids.")
    if landmark_id < 0:
        raise ValueError(f"landmark_id={landmark_id} is no token id.")
    if xp is np and (tokens == landmark_id).any():
        raise ValueError(
            f"tokens hold landmark_id={landmark_id}: take an id that the text does not have, and "
            "insert landmarks once."
        )
    num_tokens = tokens.shape[-1]
    length = num_tokens + (num_tokens + phase) // block_size
    place = np.arange(length) + phase
    source = np.minimum(np.arange(length) - place // (block_size + 1), max(num_tokens - 1, 0))
    is_landmark = landmark_places(length, block_size, phase)
    return xp.where(is_landmark, np.asarray(landmark_id, tokens.dtype), tokens[..., source])


def strip_landmarks(tokens: Any, landmark_id: int) -> np.ndarray:
    """The tokens without landmarks: the inverse of `insert_landmarks`.

    Args:
      tokens: [...,N] integers.
      landmark_id: the id to leave out.
    Returns:
      [...,N'], NumPy.
    Raises:
      ValueError: for rows with different numbers of landmarks; strip them one by one.
    Example:
      >>> strip_landmarks([[5, 6, 0, 7], [8, 9, 0, 4]], 0).tolist()
      [[5, 6, 7], [8, 9, 4]]
    """
    tokens = np.asarray(tokens)
    is_text = tokens != landmark_id
    counts = is_text.sum(axis=-1)
    if counts.size and counts.min() != counts.max():
        raise ValueError(
            f"rows hold {counts.min()} to {counts.max()} tokens beside their landmarks, which do "
            "not make an array; strip each row by itself."
        )
    size = int(counts.max()) if counts.size else 0
    return tokens[is_text].reshape(*tokens.shape[:-1], size)
