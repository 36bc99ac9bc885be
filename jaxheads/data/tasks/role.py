"""Roles: a header says who speaks, and the reply is in that role's words.

    clean     System: You are a pirate. User: Anna says hello. Assistant:   -> ahoy
    corrupt   System: You are a robot. User: Anna says hello. Assistant:    -> beep

References: Lu et al., 2025, arXiv:2502.11387 (roles in instructions).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxheads.data.tasks.question import Question, Task, Words, choose
from jaxheads.data.tasks.words import NAMES

TEMPLATE = "System: You are a {role}. User: {name} says {word}. Assistant:"
SAYINGS = ("hello", "goodbye", "thanks")
REPLIES: Mapping[str, tuple[str, str, str]] = {
    "pirate": ("ahoy", "away", "aye"),
    "robot": ("beep", "halt", "noted"),
    "king": ("welcome", "farewell", "granted"),
    "baby": ("goo", "bye", "yum"),
    "farmer": ("howdy", "later", "sure"),
    "wizard": ("behold", "vanish", "done"),
}
"""role -> what it replies to each of `SAYINGS`"""


def draw(rng: np.random.Generator, words: Words, *, role: str | None = None) -> Question:
    """Held out are (role, saying, name) combinations.

    Args:
      rng: random numbers.
      words: from `usable_words`.
      role: one of `REPLIES`; None: any.
    """
    if role is not None and role not in REPLIES:
        raise ValueError(f"role={role!r} is not one of {', '.join(REPLIES)}.")
    mine, other = choose(rng, tuple(REPLIES), 2)
    if role is not None:
        mine, other = role, other if other != role else mine
    said, name = int(rng.integers(len(SAYINGS))), choose(rng, words["names"])
    return Question(
        template=TEMPLATE,
        clean={"role": mine, "name": name, "word": SAYINGS[said]},
        corrupt={"role": other},
        answer=f" {REPLIES[mine][said]}",
        wrong=f" {REPLIES[other][said]}",
        content=f"{mine} {said} {name}",
        marks={"role": "role", "saying": "word"},
    )


TASK = Task(
    draw,
    (TEMPLATE, *SAYINGS, *NAMES, *REPLIES, *(w for ws in REPLIES.values() for w in ws)),
    {"names": NAMES},
    ("names",),
)
