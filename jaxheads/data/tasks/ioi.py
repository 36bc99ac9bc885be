"""Indirect object identification: two people, one of whom gives something to the other.

    clean     When Mary and John arrived at the station, John handed the letter to   -> Mary
    corrupt   When Mary and John arrived at the station, Mary handed the letter to   -> John

The corrupt prompt swaps so that the second subject is the indirect object's name; the answer is
the name that occurs once in the clean prompt, the wrong token is the subject. Half of the pairs
name the indirect object first (ABBA), half the subject (BABA).

References: Wang et al., 2022, arXiv:2211.00593; the pairing of Merullo et al., 2023,
arXiv:2310.08744. Sentences and word lists are our own.
"""

from __future__ import annotations

import numpy as np

from jaxheads.data.tasks.pairs import TaskPair
from jaxheads.data.tokenizer import Tokenizer

_TEMPLATES = (
    "When{a} and{b} arrived at the{place},{s} handed the{thing} to",
    "After{a} and{b} had eaten at the{place},{s} passed a{thing} to",
    "This morning{a} and{b} met at the{place}, and then{s} brought a{thing} to",
    "While{a} and{b} were waiting outside the{place},{s} offered the{thing} to",
    "Yesterday{a} and{b} talked about the{place}. Later{s} sent a{thing} to",
    "Because{a} and{b} had to leave the{place} early,{s} left the{thing} to",
)
_NAMES = tuple(
    """
    Mary John Tom James Robert Michael David William Richard Joseph Thomas Charles Daniel Matthew
    Anthony Mark Paul Steven Andrew Kevin Brian George Edward Jason Ryan Jacob Gary Eric Jonathan
    Stephen Larry Justin Scott Brandon Benjamin Samuel Frank Patrick Jack Dennis Jerry Tyler Aaron
    Henry Adam Peter Kyle Walter Jeremy Sean Christian Ben Max Sam Tim Jim Bob Lily Lucy Anna Jane
    Sarah Lisa Emily Amy Laura Emma Alice Rachel Julia Grace Rose Kate Sue Mia Ellen Helen Maria
    """.split()  # noqa: SIM905
)
_PLACES = (
    "station", "market", "school", "library", "garden", "hospital", "museum", "office", "park",
    "theater",
)  # fmt: skip
_THINGS = ("letter", "book", "ring", "ball", "phone", "bag", "key", "map", "card", "picture")

MIN_NAMES = 4
"""Fewer single-token names than this leave no choice of prompts."""


def single_token_names(tokenizer: Tokenizer) -> list[str]:
    """Our names that this tokenizer writes as one token after a word, each with its space."""
    before = tokenizer.encode("When")
    names = []
    for name in _NAMES:
        ids = tokenizer.encode(f"When {name}")
        one = len(ids) == len(before) + 1 and np.array_equal(ids[:-1], before)
        if one and tokenizer.decode(ids[-1:]).strip() == name:  # not a token for unknown words
            names.append(f" {name}")
    return names


def generate(tokenizer: Tokenizer, count: int, *, seed: int = 0) -> list[TaskPair]:
    """`count` different pairs, alternately ABBA and BABA.

    Args:
      tokenizer: names that it splits are not used.
      count: how many pairs.
      seed: the same seed, tokenizer and count give the same pairs.

    Returns:
      Pairs whose `marks` are the token positions ``io`` (indirect object), ``s1`` and ``s2`` (the
      subject's first and second mention) and ``end`` (the last token) of the clean prompt.

    Raises:
      ValueError: for a tokenizer without enough single-token names, or more pairs than exist.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1.")
    names = single_token_names(tokenizer)
    if len(names) < MIN_NAMES:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} writes {len(names)} of {len(_NAMES)} names as one "
            f"token; indirect objects need at least {MIN_NAMES}. Take a model with a word-level "
            "vocabulary, or a task file of your own (.jsonl)."
        )
    limit = len(_TEMPLATES) * len(names) * (len(names) - 1) * len(_PLACES) * len(_THINGS) // 2
    if count > limit:
        raise ValueError(f"count={count} exceeds the {limit} prompts that {len(names)} names make.")
    rng = np.random.default_rng(seed)
    pick = lambda words: words[rng.integers(len(words))]
    pairs: dict[str, TaskPair] = {}
    while len(pairs) < count:
        io, subject = (names[n] for n in rng.choice(len(names), 2, replace=False))
        first, second = (io, subject) if len(pairs) % 2 == 0 else (subject, io)
        words = {
            "a": first,
            "b": second,
            "place": f" {pick(_PLACES)}",
            "thing": f" {pick(_THINGS)}",
        }
        template = pick(_TEMPLATES)
        clean = template.format(s=subject, **words)
        corrupt = template.format(s=io, **words)
        marks = _marks(tokenizer, template, words | {"s": subject}, io)
        pairs.setdefault(clean, TaskPair(clean, corrupt, io, subject, marks))
    return list(pairs.values())


def _marks(tokenizer: Tokenizer, template: str, words: dict[str, str], io: str) -> dict[str, int]:
    def position(slot: str) -> int:  # of the last token of a word in the template
        before = template[: template.index(f"{{{slot}}}") + len(slot) + 2]
        return len(tokenizer.encode(before.format(**words))) - 1

    io_slot, subject_slot = ("a", "b") if words["a"] == io else ("b", "a")
    return {
        "io": position(io_slot),
        "s1": position(subject_slot),
        "s2": position("s"),
        "end": len(tokenizer.encode(template.format(**words))) - 1,
    }
