"""Pass keys: a number told once in a long dull text, and asked for at its end.

    There is a pass key hidden in this text. Find it and keep it in mind. <filler> The pass key is
    40213. Keep 40213 in mind. <filler> What is the pass key? The pass key is   ->  40213

Any tokenizer will do. The task is that of Mohtashami and Jaggi, 2023, arXiv:2305.16300, in other
words.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxheads.data.tokenizer import Tokenizer

TASK = "There is a pass key hidden in this text. Find it and keep it in mind."
FILLER = "The road is long and the hill is low. The rain has stopped. We walk on and then we rest."
KEY = "The pass key is {key}. Keep {key} in mind."
QUESTION = "What is the pass key? The pass key is"


class PassKey(NamedTuple):
    """One prompt."""

    tokens: np.ndarray
    """[T] int32, to the end of the question."""
    answer: np.ndarray
    """[N] int32, the tokens of the key that follow."""
    key: str
    """The digits."""
    span: tuple[int, int]
    """[first, last) tokens of the key where it is first told."""
    depth: float
    """Where that is, from 0 (first) to 1 (just before the question)."""


def make_passkeys(
    tokenizer: Tokenizer,
    count: int,
    *,
    length: int,
    depth: float | None = None,
    digits: int = 5,
    seed: int = 0,
) -> list[PassKey]:
    """`count` prompts with a key each.

    Args:
      tokenizer: of the model.
      count: how many.
      length: tokens of a prompt and its answer at most; it is reached to within one round of
        filler.
      depth: where the key is told, from 0 to 1; None: anywhere, evenly over the prompts.
      digits: of a key; the first is not 0.
      seed: the same arguments give the same prompts.

    Raises:
      ValueError: a length with no room for the question, a depth outside 0 to 1, or a tokenizer
        that glues the key to the text around it.

    Example:
      >>> told = make_passkeys(Tokenizer.load("bytes"), 1, length=400)[0]
      >>> bytes(told.tokens[slice(*told.span)].tolist()).decode() == f" {told.key}"
      True
    """
    if count < 1 or digits < 1:
        raise ValueError(f"count={count} and digits={digits} must be at least 1.")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} must be from 0 (first) to 1 (before the question).")
    rng = np.random.default_rng(seed)
    even = (rng.permutation(count) + rng.random(count)) / count
    keys = rng.integers(10 ** (digits - 1), 10**digits, count)
    per_filler = len(tokenizer.encode(f"{FILLER} {FILLER}")) - len(tokenizer.encode(FILLER))
    return [
        _prompt(tokenizer, length, str(key), float(even[n]) if depth is None else depth, per_filler)
        for n, key in enumerate(keys)
    ]


def _prompt(tokenizer: Tokenizer, length: int, key: str, depth: float, per_filler: int) -> PassKey:
    def text(fillers: int) -> tuple[str, str]:
        """The prompt, and its part in front of the key."""
        first = round(depth * fillers)
        told = [TASK, *[FILLER] * first, KEY.format(key=key)]
        rest = [*[FILLER] * (fillers - first), QUESTION]
        before = " ".join(told).removesuffix(KEY.format(key=key)) + KEY.split(" {key}")[0]
        return " ".join([*told, *rest]), before

    size = lambda fillers: len(tokenizer.encode(f"{text(fillers)[0]} {key}"))
    fillers = (length - size(0)) // per_filler
    if fillers < 0:
        raise ValueError(
            f"length={length} leaves no room: question and key take {size(0)} tokens of tokenizer "
            f"{tokenizer.name!r}."
        )
    while fillers and size(fillers) > length:
        fillers -= 1
    prompt, before = text(fillers)
    tokens, whole = tokenizer.encode(prompt), tokenizer.encode(f"{prompt} {key}")
    start, stop = len(tokenizer.encode(before)), len(tokenizer.encode(f"{before} {key}"))
    glued = not np.array_equal(whole[: len(tokens)], tokens)
    if glued or tokenizer.decode(tokens[start:stop]).strip() != key:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} does not keep the key {key} apart from the text around "
            "it; pass keys need one that splits at spaces."
        )
    return PassKey(tokens, whole[len(tokens) :], key, (start, stop), depth)
