"""Multiple choice: the label of the option that answers the question.

    Q: What is the capital of Poland? A. London B. Warsaw C. Rome D. Oslo Answer:   -> B

With ``scratchpad=True`` the text of the answer is worked out first, and the label looked up:

    Q: What is the capital of Poland? A. London B. Warsaw C. Rome D. Oslo A: Warsaw   -> B

The corrupt prompt has the same options in another order. Marks: ``label_0`` ... (the labels),
``right`` (the text of the right option).

References: Lieberum et al., 2023, arXiv:2307.09458.
"""

from __future__ import annotations

import numpy as np

from jaxheads.data.tasks.facts import FACTS
from jaxheads.data.tasks.question import Question, Task, Words, choose
from jaxheads.data.tasks.words import LETTERS

ASKED = "Q: What is the {relation} of {subject}?"
END = " Answer:"
SCRATCH = " A:"


def draw(
    rng: np.random.Generator,
    words: Words,
    *,
    relation: str = "capital",
    options: int | None = 4,
    labels: tuple[str, ...] = LETTERS,
    scratchpad: bool = False,
    follow_up: bool = False,
) -> Question:
    """Held out are (subject, place of the answer, one of the other options).

    Args:
      rng: random numbers.
      words: from `usable_words`.
      relation: what is asked.
      options: how many; None: 2 to 4.
      labels: the labels, in order.
      scratchpad: whether the prompt has the text of the answer.
      follow_up: whether a training document answers with the text first and then asks for the
        label.
    """
    options = int(rng.integers(2, 5)) if options is None else options
    facts = words[relation]
    subject, answer = choose(rng, facts)
    others = sorted({word for _, word in facts if word != answer})
    listed = choose(rng, others, options - 1)
    place, other_place = rng.choice(options, 2, replace=False)
    texts = [*listed[:place], answer, *listed[place:]]
    swapped = [*listed[:other_place], answer, *listed[other_place:]]
    slots = {f"l{i}": labels[i] for i in range(options)}
    label, listing = f" {labels[place]}", "".join(f" {{l{i}}}. {{o{i}}}" for i in range(options))
    end = f"{SCRATCH} {{text}}" if scratchpad else SCRATCH if follow_up else END
    return Question(
        template=ASKED + listing + end,
        clean={"relation": relation, "subject": subject, "text": answer, **slots}
        | {f"o{i}": text for i, text in enumerate(texts)},
        corrupt={f"o{i}": text for i, text in enumerate(swapped)},
        answer=f" {answer}" if follow_up else label,
        wrong=f" {labels[other_place]}",
        content=f"{subject} {place} {listed[0]}",
        marks={f"label_{i}": f"l{i}" for i in range(options)}
        | {"right": f"o{place}", "subject": "subject"},
        distractors=tuple(f" {labels[i]}" for i in range(options) if i != place),
        more=(("", label),) if follow_up else (),
    )


TASK = Task(draw, (ASKED, SCRATCH, END, *LETTERS, ".", *FACTS), dict(FACTS), tuple(FACTS), least=8)
