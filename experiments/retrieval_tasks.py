"""Needles for `experiments.retrieval_heads`: in the lab language, or from files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxheads.data import open_source
from jaxheads.data.tasks import generate
from jaxheads.data.tasks.pairs import next_token
from jaxheads.discovery import NeedleInstance, find_span, make_needle_instances

CODE_WORDS = 3
"""Of a needle in the lab language: a span is more than one token."""
NUM_ASKED = 60
"""Questions of each other kind."""
_ASKED = {
    "facts": ("facts", {}),
    "choices": ("multiple_choice", {"split": "heldout"}),
    "scratchpad": ("multiple_choice", {"split": "heldout", "scratchpad": True}),
}  # where a choice has a scratchpad, its answer stands there in words
MAX_NEW = 50
_BESIDE = Path(__file__).parents[1] / "../shared/data"  # real needles and text, where there are any
_QUESTION = "\n\nAnswer with words of the text above.\nQuestion: {}\nAnswer:"


class Task(NamedTuple):
    """What a model is asked."""

    instances: list[NeedleInstance]
    misplaced: list[NeedleInstance]
    """The same with a span of equal length that does not answer."""
    max_new: int
    stop_ids: list[int]
    decode: Callable[[Sequence[int]], str] | None
    """How answers become words; None compares tokens."""
    asked: dict[str, list[tuple[list[int], int]]]
    """Other questions by name: prompts, and the token that answers. None for files."""


def lab_task(tokenizer: Any, lengths: Sequence[int], depths: Sequence[float], *, people: int,
             num_needles: int, max_new: int | None, seed: int) -> Task:  # fmt: skip
    """Codes of three words that no training text had, and questions without a long text.

    A text has the codes of several `people`, one of whom is asked about. A wrong span is the code
    of another, or with one person anywhere else.
    """
    rng = np.random.default_rng(seed)
    made, misplaced = [], []
    cells = [(length, depth) for length in lengths for depth in depths]
    for number, (length, depth) in enumerate(cells):
        pairs = generate(
            "needle",
            tokenizer,
            num_needles,
            seed=seed * len(cells) + number,
            split="heldout",
            length=length,
            depth=depth / 100,
            code_words=CODE_WORDS,
            needles=people,
        )
        for pair in pairs:
            ids = tokenizer.encode(pair.clean)
            span = (pair.marks["needle"], pair.marks["needle_end"])
            one = NeedleInstance(ids, *span, ids[slice(*span)], length, depth)
            wrong = elsewhere(one, rng)
            if people > 1:
                begin, end = find_span(ids, tokenizer.encode(pair.distractors[0]))
                wrong = dataclasses.replace(one, needle_start=begin, needle_end=end)
            made.append(one)
            misplaced.append(wrong)
    asked = {
        name: [
            (tokenizer.encode(pair.clean).tolist(), next_token(tokenizer, pair.clean, pair.answer))
            for pair in generate(kind, tokenizer, NUM_ASKED, seed=seed, **options)
        ]
        for name, (kind, options) in _ASKED.items()
    }
    return Task(made, misplaced, max_new or CODE_WORDS, [], None, asked)


def file_task(tokenizer: Any, lengths: Sequence[int], depths: Sequence[float],
              needles: str | None, haystack: str | None, *, num_needles: int,
              max_new: int | None, seed: int) -> Task:  # fmt: skip
    """Needles of a file in text of files; each seed reads another part of the text.

    A wrong span is anywhere in the prompt outside the needle's answer.

    Raises:
      ValueError: without files, or for needles that cannot be read.
    """
    needles = needles or _found("needles/needles.json", "needles")
    haystack = haystack or _found("wikitext-2/train.txt.gz", "haystack")
    rows = read_needles(needles)[:num_needles]
    encode = lambda text: tokenizer.encode(text, add_bos=False)
    text = encode("".join(f"{part}\n" for part in open_source(haystack)))
    start = seed * max(lengths)
    text = text[start if len(text) >= start + max(lengths) else 0 :]
    newlines = {int(encode(f"{before}\n")[-1]) for before in ("a", "a.")}
    stops = {int(encode(f"a{mark}")[-1]) for mark in (".", "!", "?")}
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    prefix = [] if not tokenizer.adds_bos else [tokenizer.bos_id]
    made = []
    for row in rows:
        ids, span = needle_ids(encode, row)
        made += make_needle_instances(
            text, ids, span, encode(_QUESTION.format(row["question"])), lengths, depths,
            sentence_end_ids=stops, prefix_ids=prefix,
        )  # fmt: skip
    rng = np.random.default_rng(seed)
    misplaced = [elsewhere(one, rng) for one in made]
    decode = lambda ids: tokenizer.decode(np.asarray(ids, np.int32))
    return Task(made, misplaced, max_new or MAX_NEW, [*newlines, *eos], decode, {})


def _found(name: str, flag: str) -> str:
    path = _BESIDE / name
    if not path.exists():
        raise ValueError(f"--{flag} is missing; this model does not speak the lab language.")
    return str(path)


def read_needles(path: str) -> list[dict[str, str]]:
    """Rows of needle, question and answer.

    Raises:
      ValueError: naming the file and what is wrong with it.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"needles {path}: not JSON ({error}).") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"needles {path}: needed a list of objects.")
    for number, row in enumerate(rows):
        texts = [row.get(name) for name in ("needle", "question", "answer")] if isinstance(
            row, dict) else [None]  # fmt: skip
        if not all(isinstance(text, str) and text for text in texts) or texts[2] not in texts[0]:
            raise ValueError(
                f"needles {path}: row {number} needs text for needle, question and answer, and the "
                "answer must stand in the needle."
            )
    return rows


def needle_ids(
    encode: Callable[[str], np.ndarray], row: dict[str, str]
) -> tuple[np.ndarray, tuple[int, int]]:
    """Ids of a needle between two sentences, and the span of its answer."""
    ids = encode(f" {row['needle']}")
    before = f" {row['needle'].split(row['answer'])[0]}"
    # Where the text before the answer, and with it, go on alike: tokens may merge at the edges.
    alike = lambda text: _common(ids, encode(text.rstrip()))
    return ids, (alike(before), alike(before + row["answer"]))


def _common(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    differs = np.flatnonzero(a[:size] != b[:size])
    return int(differs[0]) if len(differs) else size


def elsewhere(one: NeedleInstance, rng: np.random.Generator) -> NeedleInstance:
    """The same prompt with a span of equal length that does not touch the needle's."""
    width = one.needle_end - one.needle_start
    starts = np.arange(len(one.prompt_ids) - width + 1)
    apart = (starts + width <= one.needle_start) | (starts >= one.needle_end)
    start = int(rng.choice(starts[apart]))
    return dataclasses.replace(one, needle_start=start, needle_end=start + width)
