"""Texts with several pass-keys, and all questions about them at the end.

    haystack ... The first pass key is: oscar kilo ... .  haystack ... The second ...  haystack
    What is the first pass key? It is oscar kilo ... .  What is the second pass key? It is ...

The tokens of questions and answers are marked: there a model has to reach far back.

References: Xiao et al., 2024, arXiv:2410.10819, section 2.3 and appendix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxheads.data.tasks.needle import NEEDLE, QUESTION, hay
from jaxheads.data.tasks.words import CODES, NAMES
from jaxheads.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Wording:
    """How keys are introduced and asked for.

    Attributes:
      needle: names ``{who}`` and ``{key}``.
      question: names ``{who}``; the key follows, then `end`.
      end: after an answer.
      names: whose keys they are.
      words: of which keys are made, drawn with replacement.
      num_words: of a key.
      in_order: the i-th key has the i-th name; otherwise names are drawn.
    """

    needle: str
    question: str
    end: str
    names: tuple[str, ...]
    words: tuple[str, ...]
    num_words: int
    in_order: bool


ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
            "tenth")  # fmt: skip
SPELLING = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett",
    "kilo", "lima", "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango",
    "uniform", "victor", "whiskey", "xray", "yankee", "zulu",
)  # fmt: skip
TEXT = Wording(
    "\n\nRemember this: the {who} pass key is {key}.",
    "\n\nWhat is the {who} pass key? The {who} pass key is",
    ".",
    ORDINALS,
    SPELLING,
    32,
    True,
)
"""For any text and tokenizer: ten keys of 32 words of the spelling alphabet."""
LAB = Wording(f" {NEEDLE} {{key}}.", f" {QUESTION}", ".", NAMES, CODES, 3, False)
"""In the lab language: codes of people."""


def lab_paragraphs(count: int = 2000, seed: int = 0) -> list[str]:
    """Sentences of the lab language that answer nothing."""
    return [f" {sentence}" for sentence in hay(np.random.default_rng(seed), count)]


class PassKeyBatch(NamedTuple):
    """What `discovery.train_gates` reads."""

    tokens: np.ndarray
    """[B,T] int32"""
    answers: np.ndarray
    """[B,T] bool: tokens of questions and answers."""


def passkeys(
    tokenizer: Tokenizer,
    paragraphs: Sequence[str],
    wording: Wording = TEXT,
    *,
    lengths: Sequence[int],
    num_keys: int = 10,
    batch_size: int = 1,
    multiple_of: int = 16,
    seed: int = 0,
) -> Iterator[PassKeyBatch]:
    """Batches without end; all rows of one have the same length.

    Keys stand between paragraphs at `num_keys` depths drawn from 1000 values in [0.05, 0.95] of the
    context. Between context and questions more of the haystack fills up to `multiple_of` tokens.

    Args:
      tokenizer: the model's.
      paragraphs: the haystack, with the white space that splits paragraphs.
      wording: `TEXT`, `LAB` or another.
      lengths: tokens of context, keys included; each batch takes one, in shuffled rounds.
      num_keys: keys in a text.
      batch_size: B.
      multiple_of: T is a multiple of it.
      seed: of lengths, depths, keys and where the haystack begins.

    Raises:
      ValueError: a context that its keys fill, too short a haystack, more keys than names.
    """
    if not 1 <= num_keys <= len(wording.names):
        raise ValueError(f"num_keys={num_keys}: needed 1 to {len(wording.names)}, one a name.")
    encode = lambda text: tokenizer.encode(text, add_bos=False)
    hay_ids = [encode(paragraph) for paragraph in paragraphs]
    bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
    return _batches(encode, hay_ids, bos, wording, list(lengths), num_keys, batch_size,
                    multiple_of, np.random.default_rng(seed))  # fmt: skip


def _batches(encode, hay_ids, bos, wording, lengths, num_keys, batch_size, multiple_of, rng):
    while True:
        for length in rng.permutation(lengths):
            drawn = [_draw(encode, wording, num_keys, rng) for _ in range(batch_size)]
            longest = max(sum(map(len, asked)) for _, asked in drawn)
            total = -(-(len(bos) + length + longest) // multiple_of) * multiple_of
            rows = [_row(hay_ids, bos, *one, length, total, rng) for one in drawn]
            yield PassKeyBatch(*(np.stack(column) for column in zip(*rows, strict=True)))


def _draw(encode, wording: Wording, num_keys: int, rng) -> tuple[list, list]:
    """Ids of the needles, and of the questions with their answers."""
    order = np.arange(num_keys)
    if not wording.in_order:
        order = rng.permutation(len(wording.names))[:num_keys]
    needles, asked = [], []
    for n in order:
        who = wording.names[n]
        key = " ".join(rng.choice(wording.words, wording.num_words))
        needles.append(encode(wording.needle.format(who=who, key=key)))
        asked.append(encode(f"{wording.question.format(who=who)} {key}{wording.end}"))
    return needles, asked


def _row(hay_ids, bos, needles, asked, length: int, total: int, rng):
    num_hay = length - sum(map(len, needles))
    questions = np.concatenate(asked)
    wanted = total - len(bos) - len(questions) - sum(map(len, needles))
    if num_hay < 1 or sum(map(len, hay_ids)) < wanted:
        raise ValueError(
            f"a context of {length} tokens with keys of {sum(map(len, needles))} needs {wanted} of "
            f"haystack, which has {sum(map(len, hay_ids))}; give longer contexts, fewer keys or "
            "more text."
        )
    start = rng.integers(len(hay_ids))
    rolled = [hay_ids[(start + n) % len(hay_ids)] for n in range(len(hay_ids))]
    grid = np.linspace(0.05, 0.95, 1000)
    depths = np.sort(rng.choice(grid, len(needles), replace=False)) * num_hay
    parts, used, waiting = [np.asarray(bos, np.int32)], 0, list(zip(depths, needles, strict=True))
    for ids in rolled:
        while waiting and used >= min(waiting[0][0], num_hay):
            parts.append(waiting.pop(0)[1])
        if used >= wanted:
            break
        parts.append(ids[: wanted - used])
        used += len(parts[-1])
    parts += [ids for _, ids in waiting]
    tokens = np.concatenate([*parts, questions]).astype(np.int32)
    return tokens, np.arange(total) >= total - len(questions)
