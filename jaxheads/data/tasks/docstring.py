"""Docstring arguments: the next argument of a function, in the order of its signature.

    clean     def run(self, ball, cup, map): param ball, param cup, param   -> map
    corrupt   def run(self, hat, pen, key): param ball, param cup, param    -> key

Marks: ``argument`` (where the signature has the answer).

References: Heimersheim and Janiak, 2023, "A circuit for Python docstrings in a 4-layer
attention-only transformer".
"""

from __future__ import annotations

import numpy as np

from jaxheads.data.tasks.question import Question, Task, Words, choose
from jaxheads.data.tasks.words import CODES

HEAD = "def {f}(self, {a0}, {a1}, {a2}): "
FUNCTIONS = ("run", "load", "save", "send")


def draw(rng: np.random.Generator, words: Words, *, said: int | None = None) -> Question:
    """Held out are pairs of arguments in a row.

    Args:
      rng: random numbers.
      words: from `usable_words`.
      said: how many arguments the docstring has named, 1 or 2; None: either.
    """
    said = int(rng.integers(1, 3)) if said is None else said
    listed = choose(rng, words["arguments"], 6)
    return Question(
        template=HEAD + "".join(f"param {{b{i}}}, " for i in range(said)) + "param",
        clean={
            "f": choose(rng, FUNCTIONS),
            **{f"a{i}": listed[i] for i in range(3)},
            **{f"b{i}": listed[i] for i in range(said)},
        },
        corrupt={f"a{i}": listed[3 + i] for i in range(3)},
        answer=f" {listed[said]}",
        wrong=f" {listed[3 + said]}",
        content=f"{listed[said - 1]} {listed[said]}",
        marks={"argument": f"a{said}", "latest": f"b{said - 1}"},
        distractors=tuple(f" {w}" for i, w in enumerate(listed[:3]) if i != said),
    )


TASK = Task(
    draw, (HEAD, "param,", *FUNCTIONS, *CODES), {"arguments": CODES}, ("arguments",), least=12
)
