"""Facts learned in training, and prompts that contradict them.

    facts      Q: What is the capital of Poland? A:   -> Warsaw
    conflict   The capital of Poland is London. Q: What is the capital of Poland? A:
               -> Warsaw (memory) or London (context)

Pairs of `conflict` are ordered: `answer` is the memorised one, `wrong` the one in the context. Its
corrupt prompt has another country and another stated answer. In the training text of the lab model
facts differ in how often they occur, by a factor of 100 (`exposures`).

References: Yu et al., 2023, arXiv:2310.15910; Jin et al., 2024, arXiv:2402.18154. World knowledge,
in sentences of our own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxheads.data.tasks.question import Question, Task, Words, choose

_TABLE = """
    France Paris French, Germany Berlin German, Italy Rome Italian, Spain Madrid Spanish,
    Poland Warsaw Polish, Russia Moscow Russian, Japan Tokyo Japanese, China Beijing Chinese,
    Greece Athens Greek, Egypt Cairo Arabic, Portugal Lisbon Portuguese, Austria Vienna German,
    Hungary Budapest Hungarian, Turkey Ankara Turkish, Iran Tehran Persian, Iraq Baghdad Arabic,
    Sweden Stockholm Swedish, Norway Oslo Norwegian, Finland Helsinki Finnish,
    Denmark Copenhagen Danish, Ireland Dublin Irish, Kenya Nairobi Swahili, Cuba Havana Spanish,
    Peru Lima Spanish, Ukraine Kiev Ukrainian, Thailand Bangkok Thai, Vietnam Hanoi Vietnamese,
    Israel Jerusalem Hebrew, England London English, Netherlands Amsterdam Dutch,
    Canada Ottawa English, Syria Damascus Arabic
"""
_ROWS = tuple(tuple(row.split()) for row in _TABLE.split(","))
FACTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "capital": tuple((country, capital) for country, capital, _ in _ROWS),
    "language": tuple((country, language) for country, _, language in _ROWS),
}
"""relation -> (subject, object)"""
LANDS = (
    "Avalon", "Narnia", "Mordor", "Oz", "Utopia", "Atlantis", "Lilliput", "Wonderland", "Camelot",
    "Erewhon", "Gondor", "Krypton",
)  # fmt: skip
"""Lands without facts: only the context says what their capital is."""
STATED = "The {relation} of {subject} is {stated}. "
ASKED = "Q: What is the {relation} of {subject2}? A:"
_RANGE = 100.0  # of exposures, from the rarest fact to the most frequent


def exposures(relation: str) -> dict[str, float]:
    """subject -> share of the relation's training questions that are about it; the shares sum to 1.

    Shares fall geometrically along an order that differs between relations.
    """
    facts = _facts(relation)
    order = np.random.default_rng(sorted(FACTS).index(relation)).permutation(len(facts))
    shares = _RANGE ** -(np.arange(len(facts)) / (len(facts) - 1))
    return {facts[i][0]: float(s) for i, s in zip(order, shares / shares.sum(), strict=True)}


def _facts(relation: str) -> tuple[tuple[str, str], ...]:
    if relation not in FACTS:
        raise ValueError(f"relation={relation!r} is not one of {', '.join(FACTS)}.")
    return FACTS[relation]


def _relation(rng: np.random.Generator, relation: str | None) -> str:
    return choose(rng, tuple(FACTS)) if relation is None else relation


def _pick(rng: np.random.Generator, facts, relation: str, by_exposure: bool) -> tuple[str, str]:
    if not by_exposure:
        return choose(rng, facts)
    shares = exposures(relation)
    weights = np.array([shares[subject] for subject, _ in facts])
    return facts[rng.choice(len(facts), p=weights / weights.sum())]


def draw_fact(
    rng: np.random.Generator,
    words: Words,
    *,
    relation: str | None = None,
    by_exposure: bool = False,
) -> Question:
    """Facts are asked as they were learned; nothing is held out.

    Args:
      rng: random numbers.
      words: from `usable_words`.
      relation: ``"capital"`` or ``"language"``; None: either.
      by_exposure: draw subjects as often as training does, or all alike.
    """
    relation = _relation(rng, relation)
    _facts(relation)
    facts = words[relation]
    subject, answer = _pick(rng, facts, relation, by_exposure)
    other, wrong = choose(rng, [fact for fact in facts if fact[1] != answer])
    return Question(
        template=ASKED,
        clean={"relation": relation, "subject2": subject},
        corrupt={"subject2": other},
        answer=f" {answer}",
        wrong=f" {wrong}",
        content=str(rng.random()),  # every fact must have been learned: only wording is held out
        marks={"subject": "subject2"},
    )


def draw_conflict(
    rng: np.random.Generator,
    words: Words,
    *,
    relation: str | None = None,
    by_exposure: bool = False,
    fictional: bool = False,
    context_share: float = 0.0,
) -> Question:
    """Held out are (subject, stated object) combinations.

    Args:
      rng: random numbers.
      words: from `usable_words`.
      relation: ``"capital"`` or ``"language"``; None: either.
      by_exposure: draw subjects as often as training does, or all alike.
      fictional: ask about a land of `LANDS`, where the context alone gives the answer.
      context_share: how often a training document takes the context's word; the order of answers
        is (context, memory) there.
    """
    relation = _relation(rng, relation)
    _facts(relation)
    facts = words[relation]
    objects = sorted({answer for _, answer in facts})
    if fictional:
        subject, other_subject = choose(rng, LANDS, 2)
        stated, other = choose(rng, objects, 2)
        memory = other
    else:
        subject, memory = _pick(rng, facts, relation, by_exposure)
        stated = choose(rng, [word for word in objects if word != memory])
        other_subject, theirs = choose(rng, [fact for fact in facts if fact[0] != subject])
        other = choose(rng, [w for w in objects if w not in (memory, stated, theirs)])
    answers = (f" {stated}", f" {memory}")
    if not fictional and rng.random() >= context_share:
        answers = answers[::-1]
    return Question(
        template=STATED + ASKED.replace("{relation}", relation),
        clean={
            "relation": relation,
            "subject": subject,
            "stated": stated,
            "subject2": subject,
        },
        corrupt={"subject": other_subject, "subject2": other_subject, "stated": other},
        answer=answers[0],
        wrong=answers[1],
        content=f"{relation} {subject} {stated}",
        marks={"subject": "subject", "stated": "stated", "subject2": "subject2"},
    )


_TEXTS = (STATED, ASKED, *FACTS, _TABLE.replace(",", " "), *LANDS)
FACT_TASK = Task(draw_fact, _TEXTS, dict(FACTS), tuple(FACTS), least=8)
CONFLICT_TASK = Task(draw_conflict, _TEXTS, dict(FACTS), tuple(FACTS), least=8)
