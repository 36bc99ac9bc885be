"""The lab language: all tasks in one closed vocabulary, as text to train a small model on.

``--data=lab`` reads it like any corpus, ``--data=lab-colors`` coloured objects alone. A document is
one question of a task with its answer; answers weigh 1 in the loss and the words before them
`CONTEXT_WEIGHT`, since most of those are random and nothing can predict them. Documents are made
when they are read: document i of a split is the same on every machine. The content of its question
is of that split; what follows may ask about the rest of the same text.

    python -m jaxheads.data.tasks.lab DIRECTORY     writes the tokenizer of the language
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxheads.data.tasks import TASKS
from jaxheads.data.tasks.question import Question, in_split

Pieces = tuple[tuple[str, float], ...]
"""A document as (text, weight in the loss) in order."""

CONTEXT_WEIGHT = 0.1
NUM_DOCUMENTS = {"train": 1 << 20, "validation": 1 << 12}
_TOKEN = r"[0-9]{2}|[A-Za-z]+|[^\sA-Za-z0-9]"

Mixture = tuple[tuple[str, float, dict[str, Any]], ...]
"""(task, share of documents, options of its `draw`)"""

MIXTURE: Mixture = (
    ("induction", 10, {"repeat": 1, "answer_words": 0}),
    ("needle", 8, {"code_words": None, "needles": None, "follow_up": True, "direct": True}),
    ("needle", 14, {"code_words": None, "needles": None, "follow_up": True}),
    ("ioi", 9, {}),
    ("colored_objects", 6, {"capitalised": False, "follow_up": True}),
    ("facts", 11, {"by_exposure": True}),
    ("conflict", 3, {"fictional": True}),
    ("conflict", 3, {"by_exposure": True, "context_share": 0.5}),
    ("greater_than", 4, {}),
    ("successors", 7, {}),
    ("multiple_choice", 6, {"options": None, "follow_up": True}),
    ("multiple_choice", 10, {"options": None}),
    ("refusal", 2, {}),
    ("docstring", 4, {}),
    ("two_documents", 3, {"first_share": 0.85}),
    ("two_documents", 1, {"first_share": 0.85, "ambiguous": True}),
    ("role", 3, {}),
)
_COLORS = {"capitalised": False, "follow_up": True}
MIXTURES: Mapping[str, Mixture] = {
    "lab": MIXTURE,
    "lab-colors": (
        ("colored_objects", 2, {**_COLORS, "order": "after", "direct": True}),
        ("colored_objects", 3, {**_COLORS, "order": "after"}),
        ("colored_objects", 2, _COLORS),
    ),
}
"""Names for ``--data=``, alone or with shares."""


def vocabulary() -> list[str]:
    """Every word and stop of the language, sorted; two-digit numbers are words."""
    texts = (re.sub(r"\{\w+\}", " ", text) for task in TASKS.values() for text in task.texts)
    return sorted({word for text in texts for word in re.findall(_TOKEN, text)})


def write_tokenizer(directory: str) -> None:
    """Writes tokenizer.json and tokenizer_config.json: one token a word, EOS and padding."""
    import json
    from pathlib import Path

    import tokenizers
    from tokenizers import models, pre_tokenizers

    words = ["<eos>", "<unk>", *vocabulary()]
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(_TOKEN), "removed", invert=True)
    backend.add_special_tokens(["<eos>"])
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<eos>", "pad_token": "<eos>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def document(question: Question) -> Pieces:
    """A question as text with weights."""
    pieces = [(question.prompt, CONTEXT_WEIGHT), (question.answer, 1.0)]
    for prompt, answer in question.more:
        pieces += [(prompt, CONTEXT_WEIGHT), (answer, 1.0)]
    return tuple(pieces)


class LabText(Sequence[Pieces]):
    """Documents of a split of the lab language: ``"train"`` or ``"validation"`` (held out)."""

    def __init__(self, split: str = "train", name: str = "lab"):
        if split not in NUM_DOCUMENTS:
            raise ValueError(
                f"split={split!r} is not one of {', '.join(NUM_DOCUMENTS)} of the lab language."
            )
        self._split, self._mixture = split, MIXTURES[name]
        shares = np.array([share for _, share, _ in self._mixture], float)
        self._shares = shares / shares.sum()

    def __len__(self) -> int:
        return NUM_DOCUMENTS[self._split]

    @property
    def digest(self) -> str:
        """What the documents depend on."""
        import hashlib

        content = repr((self._mixture, CONTEXT_WEIGHT, self._split, vocabulary()))
        return hashlib.blake2b(content.encode("utf-8"), digest_size=8).hexdigest()

    def __getitem__(self, i: int) -> Pieces:  # type: ignore[override]
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)} documents")
        rng = np.random.default_rng((list(NUM_DOCUMENTS).index(self._split), i))
        name, _, options = self._mixture[rng.choice(len(self._shares), p=self._shares)]
        task = TASKS[name]
        wanted = "train" if self._split == "train" else "heldout"
        while True:
            question = task.draw(rng, task.words, **options)
            if in_split(question.content, wanted):
                return document(question)


if __name__ == "__main__":
    write_tokenizer(sys.argv[1])
