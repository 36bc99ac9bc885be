"""Successors: what comes next in a sequence everybody knows.

    clean     List: Monday, Tuesday, Wednesday,   -> Thursday
    corrupt   List: Friday, Saturday, Sunday...   another place of the same sequence

References: Gould et al., 2023, arXiv:2312.09230.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxheads.data.tasks.question import Question, Task, Words, choose
from jaxheads.data.tasks.words import LETTERS, NUMBERS

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = tuple(
    "January February March April May June July August September October November December".split()  # noqa: SIM905
)
SEQUENCES: Mapping[str, tuple[str, ...]] = {
    "days": DAYS,
    "months": MONTHS,
    "letters": LETTERS,
    "numbers": NUMBERS,
}


def draw(
    rng: np.random.Generator, words: Words, *, sequence: str | None = None, shown: int | None = None
) -> Question:
    """Held out are (start, length) of a sequence; every successor itself occurs in training.

    Args:
      rng: random numbers.
      words: from `usable_words`.
      sequence: one of `SEQUENCES`; None: any.
      shown: how many elements the prompt lists; None: 1 to 4.
    """
    name = choose(rng, tuple(SEQUENCES)) if sequence is None else sequence
    if name not in SEQUENCES:
        raise ValueError(f"sequence={name!r} is not one of {', '.join(SEQUENCES)}.")
    elements = words[name]
    shown = int(rng.integers(1, 5)) if shown is None else shown
    if not 1 <= shown < len(elements) - 1:
        raise ValueError(f"shown={shown} must be from 1 to {len(elements) - 2} of {name}.")
    start, other = rng.choice(len(elements) - shown, 2, replace=False)
    say = lambda at: {f"e{i}": elements[at + i] for i in range(shown)}
    return Question(
        template="List: " + " ".join(f"{{e{i}}}," for i in range(shown)),
        clean=say(start),
        corrupt=say(other),
        answer=f" {elements[start + shown]}",
        wrong=f" {elements[other + shown]}",
        content=f"{name} {start} {shown}",
        marks={"latest": f"e{shown - 1}"},
    )


TASK = Task(
    draw,
    ("List: ,", *DAYS, *MONTHS, *LETTERS, *NUMBERS),
    dict(SEQUENCES),
    tuple(SEQUENCES),
)
