"""Needles in haystacks: prompts that hold one fact, where it stands, and whether it was answered.

An instance is data: prompts of one padded length share a program, wherever their needles lie.

References: Wu et al., 2024, arXiv:2404.15574, section 2.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxheads.typing import is_traced

PADDING = -1  # in the ids of a batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class NeedleInstance:
    """A prompt that holds a needle and ends with its question; or a batch [B] of them.

    Raises:
      ValueError: for a span that is empty or lies outside the prompt.
    """

    prompt_ids: Any
    """[S] token ids; in a batch [B,S], with -1 on the left of shorter prompts."""
    needle_start: Any
    """First column of the answer inside the needle."""
    needle_end: Any
    """The column after its last one."""
    answer_ids: Any
    """[A] the reference answer; in a batch [B,A], with -1 on the right of shorter ones."""
    length: Any
    """Tokens of context it was made for: a label."""
    depth: Any
    """Where the needle lies, in percent of the context: a label."""

    def __post_init__(self):
        ids = self.prompt_ids
        is_known = isinstance(ids, np.ndarray | jax.Array | list | tuple) and not is_traced(ids)
        if not is_known or np.ndim(ids) != 1:
            return  # a batch, or leaves that a transformation put here
        start, end, size = self.needle_start, self.needle_end, len(ids)
        if not 0 <= start < end <= size:
            raise ValueError(
                f"the answer span [{start}, {end}) is empty or outside the prompt of {size} "
                "tokens; needed 0 <= needle_start < needle_end <= S."
            )


def batch_instances(
    instances: Sequence[NeedleInstance], pad_to: int | None = None
) -> NeedleInstance:
    """Instances as one batch, padded on the left to `pad_to` tokens (default: the longest).

    Spans move with the padding: ``prompt_ids[b, needle_start[b] : needle_end[b]]`` stays the same.
    """
    if not instances:
        raise ValueError("there are no instances; make some with make_needle_instances.")
    longest = max(len(one.prompt_ids) for one in instances)
    width = longest if pad_to is None else pad_to
    if width < longest:
        raise ValueError(f"pad_to={pad_to} is shorter than the longest prompt, {longest} tokens.")
    answers = max(len(one.answer_ids) for one in instances)
    rows = []
    for one in instances:
        free = width - len(one.prompt_ids)
        put = lambda ids, before, after: np.pad(
            np.asarray(ids, np.int32), (before, after), constant_values=PADDING
        )
        rows.append(
            NeedleInstance(
                put(one.prompt_ids, free, 0),
                np.int32(one.needle_start + free),
                np.int32(one.needle_end + free),
                put(one.answer_ids, 0, answers - len(one.answer_ids)),
                np.int32(one.length),
                np.float32(one.depth),
            )
        )
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def make_needle_instances(
    haystack_ids: Sequence[int] | np.ndarray,
    needle_ids: Sequence[int] | np.ndarray,
    answer_span: tuple[int, int],
    question_ids: Sequence[int] | np.ndarray,
    lengths: Iterable[int],
    depths: Iterable[float],
    *,
    sentence_end_ids: Iterable[int],
    buffer: int = 200,
    prefix_ids: Sequence[int] | np.ndarray = (),
) -> list[NeedleInstance]:
    """One needle at every depth of every length of a haystack, followed by the question.

    The haystack is cut to ``length - buffer - len(needle)`` tokens. The needle enters at
    ``int(depth / 100 * tokens)``, moved back to just after a sentence end (to the front if there
    is none); at depth 100 it is appended.

    Args:
      haystack_ids: text, as long as the longest context needs.
      needle_ids: a sentence.
      answer_span: (start, end) within the needle: what answers the question, without the words
        that repeat it.
      question_ids: instruction, question and the start of the answer, such as ``Answer:``.
      lengths: context lengths, in tokens.
      depths: in percent, 0 to 100.
      sentence_end_ids: tokens that end a sentence.
      buffer: tokens of the context left for question and answer.
      prefix_ids: what stands before the haystack, such as a BOS.

    Raises:
      ValueError: for a span outside the needle, a needle longer than the context, a haystack that
        is too short, or a depth outside 0 to 100.
    """
    haystack, needle, question, prefix = (
        np.asarray(ids, np.int32) for ids in (haystack_ids, needle_ids, question_ids, prefix_ids)
    )
    start, end = answer_span
    if not 0 <= start < end <= len(needle):
        raise ValueError(
            f"answer_span={tuple(answer_span)} is empty or outside the needle of {len(needle)} "
            "tokens."
        )
    if not len(question):
        raise ValueError("question_ids is empty; the prompt must end with its question.")
    ends, depths, made = np.asarray([*sentence_end_ids]), [*depths], []
    for length in map(int, lengths):
        size = length - buffer - len(needle)
        if size < 0:
            raise ValueError(
                f"a needle of {len(needle)} tokens and buffer={buffer} do not fit a context of "
                f"{length} tokens; give longer contexts or a smaller buffer."
            )
        if size > len(haystack):
            raise ValueError(
                f"length={length} needs a haystack of {size} tokens; there are {len(haystack)}."
            )
        text = haystack[:size]
        for depth in depths:
            if not 0 <= depth <= 100:
                raise ValueError(f"depth={depth} is not in percent, 0 to 100.")
            at = int(size * depth / 100)
            while depth < 100 and at > 0 and text[at - 1] not in ends:
                at -= 1
            prompt = np.concatenate([prefix, text[:at], needle, text[at:], question])
            first = len(prefix) + at
            span = (first + start, first + end)
            made.append(NeedleInstance(prompt, *span, needle[start:end], length, depth))
    return made


def find_span(
    prompt: Sequence[int] | np.ndarray,
    answer: Sequence[int] | np.ndarray,
    mode: str = "exact",
    overlap: float = 0.9,
) -> tuple[int, int]:
    """[start, end) of the first place where `answer` stands in `prompt`.

    ``"fuzzy"`` is for a prompt that was tokenized as a whole, so that tokens at the edges of the
    answer may differ: the window of ``len(answer)`` tokens that shares most distinct ids with it
    (the first on ties), more than `overlap` of them. (The released code takes the first window
    above 0.9, which begins early for answers of more than ten distinct ids.)

    Raises:
      ValueError: where there is none.
    """
    if mode not in ("exact", "fuzzy"):
        raise ValueError(f"mode={mode!r} is not 'exact' or 'fuzzy'.")
    text, wanted = [int(i) for i in prompt], [int(i) for i in answer]
    if not wanted:
        raise ValueError("the answer is empty; there is nothing to find.")
    size, distinct, best = len(wanted), set(wanted), (0.0, 0)
    for start in range(len(text) - size + 1):
        window = text[start : start + size]
        if mode == "exact" and window == wanted:
            return start, start + size
        share = len(distinct.intersection(window)) / len(distinct)
        best = max(best, (share, -start))
    if mode == "fuzzy" and best[0] > overlap:
        return -best[1], size - best[1]
    raise ValueError(
        f"the answer of {size} tokens does not stand in the prompt of {len(text)} tokens (the "
        f"nearest window shares {best[0]:.0%} of its ids). Tokenizers split a text differently "
        "inside another: keep the position at which the needle was inserted, or mode='fuzzy'."
    )


def unigram_recall(
    reference: str | Iterable[Hashable], hypothesis: str | Iterable[Hashable]
) -> float:
    """The share of the reference's unigrams that the hypothesis has (ROUGE-1 recall).

        sum_w min(count in reference, count in hypothesis) / length of reference

    Text is compared word by word in lower case (no stemming), other sequences item by item.

    Example:
      >>> unigram_recall("a blue teapot", "Inside the blue teapot.")
      0.6666666666666666
    """
    split = lambda x: Counter(re.findall(r"\w+", x.lower()) if isinstance(x, str) else x)
    wanted, got = split(reference), split(hypothesis)
    if not wanted:
        raise ValueError("the reference is empty; recall is a share of its unigrams.")
    return (wanted & got).total() / wanted.total()
