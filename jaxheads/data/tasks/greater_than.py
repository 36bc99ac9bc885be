"""Greater-than: a span of years ends later than it begins.

    clean     The war lasted from the year 1732 to the year 17   -> 33, 34, ... 59
    corrupt   The war lasted from the year 1714 to the year 17

Every two digits above the start are right (`accepted`). The wrong answer lies between the corrupt
and the clean start. Marks: ``start`` (the two digits of the start).

References: Hanna et al., 2023, arXiv:2305.00586. Sentences are our own.
"""

from __future__ import annotations

import numpy as np

from jaxheads.data.tasks.question import Question, Task, Words, choose
from jaxheads.data.tasks.words import NUMBERS

TEMPLATE = "The {noun} lasted from the year {c}{yy} to the year {c2}"
NOUNS = ("war", "journey", "trial", "strike", "project", "siege", "reign", "voyage")
CENTURIES = ("11", "12", "13", "14", "15", "16", "17", "18")


def draw(rng: np.random.Generator, words: Words) -> Question:
    """Held out are (noun, century, start) combinations."""
    del words
    low, high = int(NUMBERS[0]), int(NUMBERS[-1])
    start = int(rng.integers(low + 2, high))
    earlier = int(rng.integers(low, start))
    noun, century = choose(rng, NOUNS), choose(rng, CENTURIES)
    right = tuple(str(n) for n in range(start + 1, high + 1))
    return Question(
        template=TEMPLATE,
        clean={"noun": noun, "c": century, "yy": str(start), "c2": century},
        corrupt={"yy": str(earlier)},
        answer=choose(rng, right),
        wrong=str(rng.integers(earlier + 1, start + 1)),
        content=f"{noun} {century} {start}",
        marks={"start": "yy"},
        distractors=tuple(str(n) for n in range(low, start + 1)),
        accepted=right,
    )


TASK = Task(draw, (TEMPLATE, *NOUNS, *NUMBERS))
