"""A needle in a haystack: one sentence of a long text answers the question at its end.

    ... Tom found the ball near the park. The code of Mary is red cup map. Ann hid the key ...
    Q: What is the code of Mary? A:   -> red cup map

The corrupt prompt has another code in the same place. Marks: ``needle``, the first token of the
code, and ``needle_end``, the token after its last.
"""

from __future__ import annotations

import numpy as np

from jaxheads.data.tasks.question import Question, Task, Words, choose
from jaxheads.data.tasks.words import CODES, NAMES, PLACES, THINGS

HAY = "{name} {verb} the {thing} {where} the {place}."
NEEDLE = "The code of {who} is"
QUESTION = "Q: What is the code of {who}? A:"
VERBS = ("found", "lost", "hid", "kept", "sold", "painted")
WHERE = ("near", "behind", "outside", "at")
SENTENCE = 8
"""Words and stops in a sentence of hay, and about as many tokens of most tokenizers."""
_ASKED = 11  # words and stops of the question


def hay(rng: np.random.Generator, count: int) -> list[str]:
    """Sentences that answer nothing."""
    pick = lambda: {
        "name": choose(rng, NAMES),
        "verb": choose(rng, VERBS),
        "thing": choose(rng, THINGS),
        "where": choose(rng, WHERE),
        "place": choose(rng, PLACES),
    }
    return [HAY.format(**pick()) for _ in range(count)]


def draw(
    rng: np.random.Generator,
    words: Words,
    *,
    length: int | None = None,
    depth: float | None = None,
    code_words: int | None = 1,
    needles: int | None = 1,
    follow_up: bool = False,
    direct: bool = False,
) -> Question:
    """The code is new every time, and so is the text.

    Args:
      rng: random numbers.
      words: from `usable_words`.
      length: words and stops of the whole prompt, to within one sentence; None: 30 to 240, short
        ones more often.
      depth: where the needle is, from 0 (first) to 1 (last before the question); None: anywhere.
      code_words: words of a code; None: 1 to 3.
      needles: how many people have codes, one of whom is asked about; None: 1 to 4.
      follow_up: whether a training document asks for the others too.
      direct: end with the needle's own words, up to the code, in place of a question.
    """
    length = int(30 * 8 ** rng.random() ** 2) if length is None else length
    code_words = int(rng.integers(1, 4)) if code_words is None else code_words
    needles = int(rng.integers(1, 5)) if needles is None else needles
    people = choose(rng, words["names"], needles)
    codes = [choose(rng, words["codes"], code_words) for _ in people]
    other = choose(rng, [w for w in words["codes"] if w not in codes[0]], code_words)
    used = _ASKED + needles * (len(NEEDLE.split()) + code_words + 1)
    sentences = hay(rng, max(0, (length - used) // SENTENCE))
    places = rng.integers(0, len(sentences) + 1, needles)
    if depth is not None:
        places[0] = round(depth * len(sentences))
    order = rng.permutation(needles)  # of needles at one place
    text, slots = [], {}
    for number, sentence in enumerate([*sentences, ""]):
        for n in order[places[order] == number]:
            slots |= {f"who{n}": people[n]} | {f"c{n}_{i}": w for i, w in enumerate(codes[n])}
            code = " ".join(f"{{c{n}_{i}}}" for i in range(code_words))
            stop = "{stop}" if n == 0 else "."
            text.append(NEEDLE.replace("{who}", f"{{who{n}}}") + f" {code}{stop}")
        text.append(sentence)
    question = NEEDLE if direct else QUESTION
    asked = question.replace("{who}", "{asked}")
    return Question(
        template=" ".join([*filter(None, text), asked]),
        clean={**slots, "stop": ".", "asked": people[0]},
        corrupt={f"c0_{i}": word for i, word in enumerate(other)},
        answer=f" {' '.join(codes[0])}",
        wrong=f" {' '.join(other)}",
        content=" ".join(codes[0]) + people[0],
        marks={"needle": "c0_0", "needle_end": "stop"},
        distractors=tuple(f" {' '.join(code)}" for code in codes[1:]),
        more=tuple(
            (f". {question.format(who=who)}", f" {' '.join(code)}")
            for who, code in zip(people[1:], codes[1:], strict=True)
        )
        if follow_up
        else (),
    )


TASK = Task(
    draw,
    (HAY, NEEDLE, QUESTION, *VERBS, *WHERE, *NAMES, *PLACES, *THINGS, *CODES),
    {"names": NAMES, "codes": CODES},
    ("names", "codes"),
)
