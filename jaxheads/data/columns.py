"""Fields of comma-separated lines as arrays: a block of bytes is parsed without a loop over rows.

Fields are plain: no quotes, no blanks. What is no number or none of the words is told apart, never
guessed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MAX_DIGITS = 18  # of a number: more may not fit int64
_NEWLINE, _RETURN, _COMMA, _MINUS, _ZERO = b"\n\r,-0"


def lines(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where lines begin and end, without their line breaks."""
    ends = np.flatnonzero(data == _NEWLINE)
    starts = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
    return starts, ends - ((ends > starts) & (data[ends - 1] == _RETURN))


def split(
    data: np.ndarray, starts: np.ndarray, ends: np.ndarray, num_fields: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fields per line [n]; begin and end [m,F] of every field of the m lines that have F."""
    commas = np.flatnonzero(data == _COMMA)
    first = np.searchsorted(commas, starts)
    count = np.searchsorted(commas, ends) - first
    is_row = count == num_fields - 1
    inner = commas[first[is_row, None] + np.arange(num_fields - 1)]  # [m,F-1]
    begins = np.concatenate([starts[is_row, None], inner + 1], axis=1)
    stops = np.concatenate([inner, ends[is_row, None]], axis=1)
    return count + 1, begins, stops


def integers(
    data: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Values of decimal fields [m], and which fields are decimal numbers."""
    negative = (ends > starts) & (data[starts] == _MINUS)
    starts = starts + negative
    lengths = ends - starts
    fits = (lengths >= 1) & (lengths <= _MAX_DIGITS)
    values = np.zeros(len(starts), np.int64)
    for j in range(int(lengths[fits].max(initial=0))):
        inside = fits & (j < lengths)
        digits = data[np.where(inside, starts + j, 0)] - np.uint8(_ZERO)  # others wrap above 9
        fits &= ~inside | (digits <= 9)
        values = np.where(inside, 10 * values + digits, values)
    return np.where(negative, -values, values), fits


def words(
    data: np.ndarray, starts: np.ndarray, ends: np.ndarray, words: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Which of `words` a field [m] holds, and whether it holds one."""
    found = np.full(len(starts), -1)
    for number, word in enumerate(words):
        at = np.flatnonzero(ends - starts == len(word))
        for j, byte in enumerate(word.encode()):
            at = at[data[starts[at] + j] == byte]
        found[at] = number
    return found, found >= 0
