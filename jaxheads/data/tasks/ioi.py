"""Indirect object identification: two people, one of whom gives something to the other.

    clean     When Mary and John arrived at the station, John handed the letter to   -> Mary
    corrupt   When Mary and John arrived at the station, Mary handed the letter to   -> John

The corrupt prompt swaps so that the second subject is the indirect object's name; the answer is
the name that occurs once in the clean prompt, the wrong token is the subject. Half of the pairs
name the indirect object first (ABBA), half the subject (BABA). Marks: ``io`` (indirect object),
``s1`` and ``s2`` (the subject's first and second mention).

References: Wang et al., 2022, arXiv:2211.00593; the pairing of Merullo et al., 2023,
arXiv:2310.08744. Sentences and word lists are our own.
"""

from __future__ import annotations

import numpy as np

from jaxheads.data.tasks.question import Question, Task, Words, choose
from jaxheads.data.tasks.words import NAMES, PLACES, THINGS

TEMPLATES = (
    "When {a} and {b} arrived at the {place}, {s} handed the {thing} to",
    "After {a} and {b} had eaten at the {place}, {s} passed a {thing} to",
    "This morning {a} and {b} met at the {place}, and then {s} brought a {thing} to",
    "While {a} and {b} were waiting outside the {place}, {s} offered the {thing} to",
    "Yesterday {a} and {b} talked about the {place}. Later {s} sent a {thing} to",
    "Because {a} and {b} had to leave the {place} early, {s} left the {thing} to",
)


def draw(rng: np.random.Generator, words: Words) -> Question:
    """Held out are pairs of people."""
    io, subject = choose(rng, words["names"], 2)
    io_first = bool(rng.integers(2))
    first, second = (io, subject) if io_first else (subject, io)
    place, thing = choose(rng, PLACES), choose(rng, THINGS)
    return Question(
        template=choose(rng, TEMPLATES),
        clean={"a": first, "b": second, "s": subject, "place": place, "thing": thing},
        corrupt={"s": io},
        answer=f" {io}",
        wrong=f" {subject}",
        content=" ".join(sorted((io, subject))),
        marks={"io": "a" if io_first else "b", "s1": "b" if io_first else "a", "s2": "s"},
        distractors=(f" {subject}",),
    )


TASK = Task(draw, (*TEMPLATES, *NAMES, *PLACES, *THINGS), {"names": NAMES}, ("names",))
