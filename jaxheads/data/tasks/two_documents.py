"""Two documents: only one of them speaks of the person asked about.

    Document one: The code of Mary is cup. Document two: The code of John is map.
    Q: What is the code of John? A:   -> map

The training text of the lab model asks for the first document far more often: a bias by position.
With ``ambiguous=True`` both documents speak of the same person, and the bias alone decides.
The corrupt prompt has the codes swapped. Marks: ``first``, ``second`` (the codes).

References: Wang et al., 2024, arXiv:2407.01100 (position bias between documents).
"""

from __future__ import annotations

import numpy as np

from jaxheads.data.tasks.question import Question, Task, Words, choose
from jaxheads.data.tasks.words import CODES, NAMES

TEMPLATE = (
    "Document one: The code of {n0} is {c0}. Document two: The code of {n1} is {c1}. "
    "Q: What is the code of {asked}? A:"
)


def draw(
    rng: np.random.Generator,
    words: Words,
    *,
    place: int | None = None,
    first_share: float = 0.5,
    ambiguous: bool = False,
) -> Question:
    """Held out are (person, code) combinations.

    Args:
      rng: random numbers.
      words: from `usable_words`.
      place: which document answers, 0 or 1; None: drawn.
      first_share: how often a drawn place is the first.
      ambiguous: both documents speak of the person, with different codes.
    """
    place = int(rng.random() >= first_share) if place is None else place
    people, codes = choose(rng, words["names"], 2), choose(rng, words["codes"], 2)
    asked = people[place]
    people = [asked, asked] if ambiguous else people
    return Question(
        template=TEMPLATE,
        clean={"n0": people[0], "n1": people[1], "c0": codes[0], "c1": codes[1], "asked": asked},
        corrupt={"c0": codes[1], "c1": codes[0]},
        answer=f" {codes[place]}",
        wrong=f" {codes[1 - place]}",
        content=f"{asked} {codes[place]}",
        marks={"first": "c0", "second": "c1"},
        distractors=(f" {codes[1 - place]}",),
    )


TASK = Task(
    draw,
    (TEMPLATE, *NAMES, *CODES),
    {"names": NAMES, "codes": CODES},
    ("names", "codes"),
)
