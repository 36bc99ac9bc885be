"""Statements against world knowledge, made from a file of facts, for any tokenizer.

    The capital of Poland is London. Q: What is the capital of Poland? A:

`cross_product` states every other object of the relation about every subject; `pair_up` gives each
prompt a corrupt twin of the same length about another subject.

References: Yu et al., 2023, arXiv:2310.15910.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxheads.data.tokenizer import Tokenizer

TEMPLATE = "The capital of {subject} is {stated}. Q: What is the capital of {subject}? A:"


class Conflict(NamedTuple):
    """A prompt that contradicts a fact."""

    subject: str
    memory: str
    """The object that is true of the subject."""
    stated: str
    """The one that the prompt states."""
    prompt: str
    corrupt: str = ""
    """A prompt of as many tokens about another subject and another object; see `pair_up`."""


def load_facts(path: str | Path) -> dict[str, str]:
    """subject -> object of a file.

    JSON: an object ``{"Poland": "Warsaw"}``, or one with `samples`, each with `subject` and
    `object`. CSV: subject and object in the first two columns; a heading is left out.

    Raises:
      ValueError: for other content, and a subject with two objects.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        rows = [(row[0], row[1]) for row in csv.reader(text.splitlines()) if len(row) > 1]
        rows = rows[1:] if rows and rows[0][0].lower() in ("subject", "country") else rows
    else:
        content = json.loads(text)
        try:
            samples = content.get("samples")
            rows = [(s["subject"], s["object"]) for s in samples] if samples else content.items()
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} holds no facts; needed {{subject: object}}, or samples that have both."
            ) from error
    # Some files write \u00ed as six characters.
    plain = lambda s: re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), str(s)).strip()
    facts: dict[str, str] = {}
    for subject, value in rows:
        if facts.setdefault(plain(subject), plain(value)) != plain(value):
            raise ValueError(f"{path}: {subject!r} has two objects; keep one.")
    if len(set(facts.values())) < 2:
        raise ValueError(f"{path} holds {len(facts)} facts; a conflict needs two other objects.")
    return facts


def cross_product(
    facts: Mapping[str, str],
    template: str = TEMPLATE,
    aliases: Mapping[str, Collection[str]] | None = None,
) -> list[Conflict]:
    """Every subject with every object that is not its own.

    Args:
      facts: subject -> object.
      template: with ``{subject}`` and ``{stated}``.
      aliases: other names of a subject's object, which are not stated about it.

    Example:
      >>> cross_product({"Peru": "Lima", "Cuba": "Havana"}, "{subject}: {stated}.")[0].prompt
      'Peru: Havana.'
    """
    if "{subject}" not in template or "{stated}" not in template:
        raise ValueError(f"template {template!r} must name {{subject}} and {{stated}}.")
    objects = sorted(set(facts.values()))
    known = lambda subject, memory: {memory, *(aliases or {}).get(subject, ())}
    return [
        Conflict(subject, memory, stated, template.format(subject=subject, stated=stated))
        for subject, memory in facts.items()
        for stated in objects
        if stated not in known(subject, memory)
    ]


def pair_up(
    conflicts: Sequence[Conflict], tokenizer: Tokenizer, count: int, seed: int = 0
) -> list[Conflict]:
    """`count` of the conflicts in random order, each with a corrupt twin; fewer where they run out.

    The twin has other words and equally many tokens for subject and statement, so that prompts
    correspond token by token. Prompts without one are left out.
    """
    rng = np.random.default_rng(seed)
    size = lambda text: len(tokenizer.encode(f" {text}", add_bos=False))
    sizes = {word: size(word) for c in conflicts for word in (c.subject, c.stated)}
    alike: dict[tuple[int, int], list[Conflict]] = {}
    for c in conflicts:
        alike.setdefault((sizes[c.subject], sizes[c.stated]), []).append(c)
    chosen: list[Conflict] = []
    for n in rng.permutation(len(conflicts)):
        c = conflicts[n]
        others = alike[sizes[c.subject], sizes[c.stated]]
        for k in rng.permutation(len(others))[:50]:
            twin = others[k]
            if twin.subject != c.subject and not {twin.stated, twin.memory} & {c.stated, c.memory}:
                chosen.append(c._replace(corrupt=twin.prompt))
                break
        if len(chosen) == count:
            break
    return chosen
