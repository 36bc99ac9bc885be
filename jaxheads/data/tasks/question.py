"""What the tasks are made of: questions in words, before any tokenizer has seen them.

A task is one file with a `Task`: the words it needs, and `draw`, which makes one question from
random numbers. Everything else is here: rendering for a tokenizer, checks that answers are single
tokens and that clean and corrupt prompts align, marked positions, and splits by content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxheads.data.tasks.pairs import TaskPair
from jaxheads.data.tokenizer import Tokenizer

SPLITS = ("train", "heldout", "all")
HELD_OUT = 0.2
"""Share of contents that no training document has."""
_TRIES = 50  # draws per question wanted before giving up


class Question(NamedTuple):
    """One question of a task, with its corrupt twin."""

    template: str
    """The prompt with slots: ``"{a} gave it to"``; every slot is named once."""
    clean: Mapping[str, str]
    """slot -> words"""
    corrupt: Mapping[str, str]
    """The slots that differ in the corrupt prompt."""
    answer: str
    """What follows the clean prompt, with its leading space."""
    wrong: str
    """What follows the corrupt prompt."""
    content: str
    """What decides the split: questions of equal content are on the same side."""
    marks: Mapping[str, str] = {}
    """mark -> slot; the position of a mark is that of the slot's last token."""
    distractors: tuple[str, ...] = ()
    """Other answers that would be wrong."""
    accepted: tuple[str, ...] = ()
    """All answers that are right, when there are several."""
    more: tuple[tuple[str, str], ...] = ()
    """Further (prompt, answer) about the same text; training documents go on with them."""

    @property
    def prompt(self) -> str:
        return self.template.format(**self.clean)

    @property
    def corrupt_prompt(self) -> str:
        return self.template.format(**{**self.clean, **self.corrupt})


Words = Mapping[str, Any]
"""The word lists of a task that a tokenizer can use."""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      draw: (rng, words, **options) -> `Question`.
      texts: every template and word of the task; the lab vocabulary is made of them.
      words: word lists that are offered to `draw`.
      single: names of the lists whose words must be one token; longer ones are left out.
      least: the fewest words of a list in `single` that make a task.
    """

    draw: Callable[..., Question]
    texts: Iterable[str]
    words: Words = field(default_factory=dict)
    single: tuple[str, ...] = ()
    least: int = 4


def is_single(tokenizer: Tokenizer, word: str) -> bool:
    """Whether a word after another is one token that reads as that word."""
    before, ids = tokenizer.encode("When"), tokenizer.encode(f"When {word}")
    one = len(ids) == len(before) + 1 and np.array_equal(ids[:-1], before)
    return one and tokenizer.decode(ids[-1:]).strip() == word  # not a token for unknown words


def usable_words(task: Task, tokenizer: Tokenizer) -> dict[str, Any]:
    """The word lists of a task without words that the tokenizer splits.

    An entry of a list may be a tuple of words; all of them must be single tokens then.

    Raises:
      ValueError: when a list is left with fewer than `task.least` entries.
    """
    words = dict(task.words)
    for name in task.single:
        entries = words[name]
        parts = lambda entry: (entry,) if isinstance(entry, str) else entry
        kept = tuple(e for e in entries if all(is_single(tokenizer, w) for w in parts(e)))
        if len(kept) < min(task.least, len(entries)):
            raise ValueError(
                f"tokenizer {tokenizer.name!r} writes {len(kept)} of {len(entries)} {name} as one "
                f"token; the task needs at least {task.least}. Take a model with a word-level "
                "vocabulary, or a task file of your own (.jsonl)."
            )
        words[name] = kept
    return words


def in_split(content: str, split: str) -> bool:
    """Whether a content belongs to ``"train"``, ``"heldout"`` or ``"all"``: a hash decides."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}.")
    digest = hashlib.blake2b(content.encode("utf-8"), digest_size=8).digest()
    held_out = int.from_bytes(digest, "little") < HELD_OUT * 2**64
    return split == "all" or held_out == (split == "heldout")


def make_pairs(
    task: Task,
    tokenizer: Tokenizer,
    count: int,
    *,
    seed: int = 0,
    split: str = "all",
    **options: Any,
) -> list[TaskPair]:
    """`count` different pairs whose prompts align token by token.

    Args:
      task: what is asked.
      tokenizer: words that it splits are not used.
      count: how many pairs.
      seed: the same arguments give the same pairs.
      split: ``"train"`` has the contents the lab model may have seen, ``"heldout"`` the others.
      options: of the task's `draw`.

    Returns:
      Pairs whose `marks` are token positions of the clean prompt; ``end`` is the last.

    Raises:
      ValueError: for a tokenizer without enough single-token words, or more pairs than exist.
      TypeError: for an option the task does not have.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1.")
    in_split("", split)  # a wrong name is an error before anything is drawn
    words, rng = usable_words(task, tokenizer), np.random.default_rng(seed)
    pairs: dict[str, TaskPair] = {}
    for _ in range(_TRIES * count + 1000):
        question = task.draw(rng, words, **options)
        if question.prompt in pairs or not in_split(question.content, split):
            continue
        if _aligns(tokenizer, question):
            pairs[question.prompt] = render(question, tokenizer)
        if len(pairs) == count:
            return list(pairs.values())
    raise ValueError(
        f"count={count} exceeds what these words make: {len(pairs)} different prompts of split "
        f"{split!r} were found that tokenizer {tokenizer.name!r} can take."
    )


def render(question: Question, tokenizer: Tokenizer) -> TaskPair:
    """The question as a pair of prompts with marked positions."""
    marks = {name: _position(question, slot, tokenizer) for name, slot in question.marks.items()}
    marks["end"] = len(tokenizer.encode(question.prompt)) - 1
    return TaskPair(
        question.prompt,
        question.corrupt_prompt,
        question.answer,
        question.wrong,
        marks,
        question.distractors,
        question.accepted,
    )


def _position(question: Question, slot: str, tokenizer: Tokenizer) -> int:
    place = f"{{{slot}}}"
    before = question.template[: question.template.index(place) + len(place)]
    return len(tokenizer.encode(before.format(**question.clean))) - 1


def _aligns(tokenizer: Tokenizer, question: Question) -> bool:
    """Equal lengths, and answers that go on where the prompt ends."""
    clean = tokenizer.encode(question.prompt)
    if len(clean) != len(tokenizer.encode(question.corrupt_prompt)):
        return False
    counts = set()
    for answer in (question.answer, question.wrong):
        ids = tokenizer.encode(question.prompt + answer)
        if not np.array_equal(ids[: len(clean)], clean):
            return False
        counts.add(len(ids) - len(clean))
    return counts == {len(question.answer.split())}


def choose(rng: np.random.Generator, words: Any, count: int | None = None) -> Any:
    """One entry, or `count` different ones."""
    if count is None:
        return words[rng.integers(len(words))]
    return [words[i] for i in rng.choice(len(words), count, replace=False)]
