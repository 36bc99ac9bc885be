"""Minimal pairs of prompts: a clean one and a corrupt one that differ in what decides the answer.

A file of pairs is JSON Lines (or a JSON list), one object a pair, gzipped or not:

    {"clean": "Lily said that", "corrupt": "Tim said that", "answer": " she", "wrong": " he"}

`answer` continues the clean prompt and `wrong`, which may be left out, the corrupt one. Both are
one token, with their leading space. Clean and corrupt prompt have equally many tokens, so that a
position means the same in both; different pairs may differ in length. ``corrupted`` is read as
`corrupt`; other fields are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxheads.data.tasks.files import read_rows
from jaxheads.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TaskPair:
    """A clean prompt, its corrupt twin, and the tokens that tell them apart."""

    clean: str
    corrupt: str
    answer: str
    """What follows the clean prompt."""
    wrong: str | None = None
    """What follows the corrupt prompt."""
    marks: Mapping[str, int] = field(default_factory=dict)
    """Named token positions of the clean prompt, as its tokenizer counts them (BOS included)."""
    distractors: tuple[str, ...] = ()
    """Other answers that would be wrong after the clean prompt."""
    accepted: tuple[str, ...] = ()
    """All answers that are right, where there are several; otherwise `answer` alone is."""
    where: str = field(default="", compare=False)
    """The place that an error names, such as a file and its line."""


@dataclass(frozen=True)
class PairBatch:
    """Encoded pairs, padded on the right to one length."""

    clean: np.ndarray
    """[B,T] int32 token ids."""
    corrupt: np.ndarray
    """[B,T] int32 token ids."""
    segment_ids: np.ndarray
    """[B,T] int32: 1, and 0 on padding; the same for both prompts of a pair."""
    last: np.ndarray
    """[B] int32: the last position of each prompt, where its answer is read."""
    answer: np.ndarray
    """[B] int32"""
    wrong: np.ndarray | None
    """[B] int32; None when a pair has no wrong token."""

    def __len__(self) -> int:
        return len(self.last)

    def __getitem__(self, rows: slice | np.ndarray) -> PairBatch:
        """The pairs of a slice or of indices [N], still of one length."""
        return PairBatch(
            self.clean[rows],
            self.corrupt[rows],
            self.segment_ids[rows],
            self.last[rows],
            self.answer[rows],
            None if self.wrong is None else self.wrong[rows],
        )

    def run(self, which: str) -> dict[str, np.ndarray]:
        """What a forward takes for the ``"clean"`` or the ``"corrupt"`` prompts."""
        if which not in ("clean", "corrupt"):
            raise ValueError(f"which={which!r} is not one of clean, corrupt.")
        tokens = self.clean if which == "clean" else self.corrupt
        return {"tokens": tokens, "segment_ids": self.segment_ids}


def load_pairs(path: str | Path) -> list[TaskPair]:
    """Reads a file of pairs (see the module's docstring).

    Raises:
      ValueError: naming the file and the line (of JSON Lines) or the row (of a JSON list).
    """
    pairs = [_pair(row, where) for where, row in read_rows(path)]
    if not pairs:
        raise ValueError(f"task file {path} holds no pairs of prompts")
    return pairs


def _pair(row: Any, where: str) -> TaskPair:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is a {type(row).__name__}; it must be an object")
    row = {("corrupt" if name == "corrupted" else name): value for name, value in row.items()}
    for name in ("clean", "corrupt", "answer"):
        if name not in row:
            raise ValueError(
                f"{where} has no {name!r}; a pair needs 'clean', 'corrupt' and 'answer' (and "
                "'wrong' for the logit difference)"
            )
    texts = {name: row.get(name) for name in ("clean", "corrupt", "answer", "wrong")}
    for name, text in texts.items():
        if name == "wrong" and text is None:
            continue
        if not isinstance(text, str) or not text:
            raise ValueError(f"{where}: {name!r} is {text!r}; it must be text that is not empty")
    if texts["clean"] == texts["corrupt"]:
        raise ValueError(
            f"{where}: clean and corrupt are the same prompt; nothing tells them apart"
        )
    if texts["answer"] == texts["wrong"]:
        raise ValueError(f"{where}: answer and wrong are the same, {texts['answer']!r}")
    return TaskPair(**texts, where=where)


def encode_pairs(pairs: Sequence[TaskPair], tokenizer: Tokenizer) -> PairBatch:
    """Token ids of all pairs, padded on the right to the longest.

    A causal model gives the same numbers at the real positions whatever follows them; segment id 0
    keeps padding apart from text all the same.

    Args:
      pairs: from `load_pairs` or a generator.
      tokenizer: the model's. BOS goes in front where the tokenizer puts one by itself.

    Raises:
      ValueError: naming the pair, when its prompts differ in length, or an answer is not one token.
    """
    if not pairs:
        raise ValueError("there are no pairs of prompts to encode.")
    rows = []
    for number, pair in enumerate(pairs):
        where = pair.where or f"pair {number}"
        clean, corrupt = tokenizer.encode(pair.clean), tokenizer.encode(pair.corrupt)
        if len(clean) != len(corrupt):
            raise ValueError(
                f"{where}: clean has {len(clean)} tokens and corrupt {len(corrupt)}; they must "
                "align position by position. Change the words until tokenizer "
                f"{tokenizer.name!r} splits both alike"
            )
        if not len(clean):
            raise ValueError(f"{where}: the prompts have no tokens")
        if np.array_equal(clean, corrupt):
            raise ValueError(f"{where}: clean and corrupt are the same tokens")
        answer = next_token(tokenizer, pair.clean, pair.answer, f"{where}: answer")
        wrong = None
        if pair.wrong is not None:
            wrong = next_token(tokenizer, pair.clean, pair.wrong, f"{where}: wrong")
            if wrong == answer:
                raise ValueError(f"{where}: answer and wrong are the same token, id {wrong}")
        rows.append((clean, corrupt, answer, wrong))
    lengths = np.array([len(row[0]) for row in rows], np.int32)
    pad = lambda ids: np.pad(ids, (0, lengths.max() - len(ids)))
    has_wrong = all(row[3] is not None for row in rows)
    return PairBatch(
        clean=np.stack([pad(row[0]) for row in rows]).astype(np.int32),
        corrupt=np.stack([pad(row[1]) for row in rows]).astype(np.int32),
        segment_ids=np.stack([pad(np.ones(n, np.int32)) for n in lengths]),
        last=lengths - 1,
        answer=np.array([row[2] for row in rows], np.int32),
        wrong=np.array([row[3] for row in rows], np.int32) if has_wrong else None,
    )


def next_token(tokenizer: Tokenizer, prompt: str, text: str, what: str = "the answer") -> int:
    """The one token id that ``encode(prompt + text)`` has after ``encode(prompt)``.

    The two are encoded together, because a tokenizer may split a text differently on its own.

    Raises:
      ValueError: when it is not one token, or merges with the end of the prompt.
    """
    before, ids = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
    if not np.array_equal(ids[: len(before)], before):
        raise ValueError(
            f"{what} {text!r} merges with the end of the prompt {prompt[-20:]!r}; begin it with a "
            "space, or end the prompt before the space"
        )
    if len(ids) != len(before) + 1:
        raise ValueError(
            f"{what} {text!r} is {len(ids) - len(before)} tokens of tokenizer {tokenizer.name!r}; "
            "it must be one. Use a word that is one token, with its leading space"
        )
    return int(ids[-1])
