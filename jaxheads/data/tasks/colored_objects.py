"""Coloured objects: a worked example, then the colour of one of three objects.

    Q: On the table, there is a blue pencil, a black mug, and a yellow cup. What color is the mug?
    A: black. Q: On the desk, I see a red hat, a green pen, and a brown fan. What color is the hat?
    A:   -> red

The corrupt prompt asks for another object of the same list; the wrong answer is its colour.
Marks: ``right``, ``wrong_1``, ``wrong_2``: the three colours of the last question, and ``object``
(what is asked for).

References: Merullo et al., 2023, arXiv:2310.08744; the task is of Srivastava et al., 2022,
arXiv:2206.04615. Sentences are our own.
"""

from __future__ import annotations

import numpy as np

from jaxheads.data.tasks.question import Question, Task, Words, choose
from jaxheads.data.tasks.words import COLORS, OBJECTS
from jaxheads.fields import unknown

OPENERS = ("there is", "I see", "you see")
SURFACES = ("table", "desk", "floor")
ASKED = "What color is the"


ORDERS = {
    "before": "Q: On the {s}, {o} {a0} {c0} {t0}, {a1} {c1} {t1}, and {a2} {c2} {t2}. " + ASKED,
    "after": "Q: On the {s}, {o} {a0} {t0} {c0}, {a1} {t1} {c1}, and {a2} {t2} {c2}. " + ASKED,
}
"""where colours stand -> the list"""


def _listed(
    rng: np.random.Generator, colors: list[str], objects: list[str], order: str
) -> dict[str, str]:
    slots = {"s": choose(rng, SURFACES), "o": choose(rng, OPENERS)}
    for i, (color, thing) in enumerate(zip(colors, objects, strict=True)):
        first = thing if order == "after" else color
        article = "an" if first[0] in "aeiou" else "a"
        slots |= {f"a{i}": article, f"c{i}": color, f"t{i}": thing}
    return slots


def draw(
    rng: np.random.Generator,
    words: Words,
    *,
    capitalised: bool = True,
    follow_up: bool = False,
    direct: bool = False,
    order: str = "before",
) -> Question:
    """Held out are (object, colour) bindings of what is asked for.

    Args:
      rng: random numbers.
      words: from `usable_words`.
      capitalised: " Red" as in the paper, or " red", which stands in the prompt.
      follow_up: whether a training document asks for the other objects too.
      direct: end with the object, before the question mark.
      order: colours stand ``"before"`` their objects, ``"after"`` them ("a hat red", as the lab
        language may say), or ``"either"`` way, the same one in both lists.
    """
    if order not in (*ORDERS, "either"):
        raise ValueError(unknown("order", order, (*ORDERS, "either")))
    order = choose(rng, tuple(ORDERS)) if order == "either" else order
    say = str.capitalize if capitalised else str
    colors, shown = choose(rng, words["colors"], 3), choose(rng, words["colors"], 3)
    objects = choose(rng, OBJECTS, 6)
    asked, example = rng.choice(3, 2, replace=False)
    other = int(rng.integers(3))
    worked = ORDERS[order].format(**_listed(rng, shown, objects[3:], order))
    worked = f"{worked} {objects[3 + other]}? A: {say(shown[other])}. "
    rest = [i for i in range(3) if i != asked]
    end = "" if direct else "? A:"
    return Question(
        template=worked + ORDERS[order] + " {asked}" + end,
        clean={**_listed(rng, colors, objects[:3], order), "asked": objects[asked]},
        corrupt={"asked": objects[example]},
        answer=f" {say(colors[asked])}",
        wrong=f" {say(colors[example])}",
        content=f"{colors[asked]} {objects[asked]}",
        marks={
            "right": f"c{asked}",
            "wrong_1": f"c{rest[0]}",
            "wrong_2": f"c{rest[1]}",
            "object": "asked",
        },
        distractors=tuple(f" {say(colors[i])}" for i in rest),
        more=tuple((f". {ASKED} {objects[i]}{end}", f" {say(colors[i])}") for i in rest)
        if follow_up
        else (),
    )


TASK = Task(
    draw,
    (
        *OPENERS,
        *SURFACES,
        *ORDERS.values(),
        "? A: . a an",
        *COLORS,
        *OBJECTS,
        *map(str.capitalize, COLORS),
    ),
    {"colors": COLORS},
    ("colors",),
)
