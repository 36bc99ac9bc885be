"""Induction: a list of words is said again, and goes on as before.

clean     ball red cup map key ball red cup   -> map
corrupt   ball red cup pen key ball red cup   -> pen
"""

from __future__ import annotations

import numpy as np

from jaxheads.data.tasks.facts import FACTS
from jaxheads.data.tasks.question import Question, Task, Words, choose
from jaxheads.data.tasks.words import CODES, LETTERS, NAMES

WORDS = (*CODES, *NAMES, *LETTERS, *(capital for _, capital in FACTS["capital"]))
MAX_WORDS = 16


def draw(
    rng: np.random.Generator,
    words: Words,
    *,
    listed: int | None = None,
    repeat: int | None = None,
    answer_words: int = 1,
) -> Question:
    """The list never occurs in training: it is new every time.

    Args:
      rng: random numbers.
      words: from `usable_words`.
      listed: words in the list; None: 4 to 16.
      repeat: words of it that the prompt says again, 1 to listed - 1; None: any.
      answer_words: how many words the answer has; 0: the rest of the list.
    """
    listed = int(rng.integers(4, MAX_WORDS + 1)) if listed is None else listed
    repeat = int(rng.integers(1, listed)) if repeat is None else repeat
    most = len(words["words"]) - 1
    if not 1 <= repeat < listed <= most:
        raise ValueError(f"repeat={repeat}, listed={listed} need 1 <= repeat < listed <= {most}.")
    *said, other = choose(rng, words["words"], listed + 1)
    before, after = " ".join(said[:repeat]), " ".join(said[repeat + 1 :])
    end = listed if answer_words == 0 else repeat + answer_words
    rest = " ".join(said[repeat + 1 : end])
    answer = lambda word: f" {word} {rest}".rstrip()
    return Question(
        template="{list} {next} {after} {again}" if after else "{list} {next} {again}",
        clean={"list": before, "next": said[repeat], "after": after, "again": before},
        corrupt={"next": other},
        answer=answer(said[repeat]),
        wrong=answer(other),
        content=" ".join(said),
        marks={"source": "next"},
    )


TASK = Task(draw, WORDS, {"words": WORDS}, ("words",), least=20)
