"""Needles: where they are put, where they are found, how an answer is judged."""

import numpy as np
import pytest

from jaxheads.discovery import (
    NeedleInstance,
    batch_instances,
    find_span,
    make_needle_instances,
    unigram_recall,
)

STOP = 9
TEXT = [1, 2, 3, STOP] * 10
NEEDLE, QUESTION = [20, 21, 22, 23, STOP], [30, 31]


def make(lengths=(45,), depths=(0, 30, 55, 100), span=(2, 4), **changes):
    options = {"sentence_end_ids": [STOP], "buffer": 10} | changes
    return make_needle_instances(TEXT, NEEDLE, span, QUESTION, lengths, depths, **options)


def test_the_needle_follows_a_sentence_at_every_depth():
    made = make(lengths=(25, 45))
    assert [(one.length, one.depth) for one in made] == [
        (length, depth) for length in (25, 45) for depth in (0, 30, 55, 100)
    ]
    for one in made:
        ids, start = one.prompt_ids.tolist(), one.needle_start - 2
        size = one.length - 10 - len(NEEDLE)
        assert ids == [*TEXT[:start], *NEEDLE, *TEXT[start:size], *QUESTION]
        assert ids[one.needle_start : one.needle_end] == one.answer_ids.tolist() == [22, 23]
        wanted = int(size * one.depth / 100)
        ends = [n + 1 for n in range(wanted) if TEXT[n] == STOP]
        assert start == (size if one.depth == 100 else max(ends, default=0))


def test_a_prefix_stays_in_front():
    one = make(depths=[0], prefix_ids=[50])[0]
    assert one.prompt_ids[:4].tolist() == [50, 20, 21, 22]
    assert one.prompt_ids[one.needle_start : one.needle_end].tolist() == [22, 23]


def test_a_batch_keeps_every_span():
    made = make(lengths=(25, 45))
    batch = batch_instances(made, 50)
    assert batch.prompt_ids.shape == (8, 50)
    for n, one in enumerate(made):
        row = batch.prompt_ids[n]
        np.testing.assert_array_equal(row[row >= 0], one.prompt_ids)
        span = slice(batch.needle_start[n], batch.needle_end[n])
        np.testing.assert_array_equal(row[span], [22, 23])
    assert batch_instances(made).prompt_ids.shape == (8, len(made[-1].prompt_ids))


def test_find_span():
    assert find_span([5, 1, 2, 1, 2, 3], [1, 2, 3]) == (3, 6)
    assert find_span([1, 2, 1, 2], [1, 2]) == (0, 2)
    answer = list(range(100, 112))
    prompt = [1, 2, *answer, 3]
    # The first window above 0.9 of twelve distinct ids begins a token early.
    assert find_span(prompt, answer, "fuzzy") == (2, 14)
    assert find_span([1, 2, *answer[:-1], 3], answer, "fuzzy") == (1, 13)
    assert find_span([7, 8, 9], [8, 7], "fuzzy", overlap=0.4) == (0, 2)


def test_unigram_recall():
    assert unigram_recall([1, 2, 3, 3], [3, 2, 7]) == 2 / 4
    assert unigram_recall([3], [3, 3, 3]) == 1
    assert unigram_recall("The Patient Heron", "she named it the patient  heron!") == 1
    assert unigram_recall("pine smoke", "") == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NeedleInstance(np.arange(5), 3, 3, [1], 5, 0), r"\[3, 3\) is empty or outside"),
        (lambda: NeedleInstance([1, 2, 3], 1, 4, [1], 3, 0), "prompt of 3 tokens"),
        (lambda: NeedleInstance([1, 2, 3], -1, 2, [1], 3, 0), "empty or outside"),
        (lambda: make(span=(2, 2)), r"answer_span=\(2, 2\) is empty"),
        (lambda: make(span=(2, 6)), "outside the needle of 5 tokens"),
        (lambda: make(lengths=[14]), "do not fit a context of 14 tokens"),
        (lambda: make(lengths=[99]), "needs a haystack of 84 tokens; there are 40"),
        (lambda: make(depths=[101]), "depth=101 is not in percent"),
        (lambda: batch_instances([]), "there are no instances"),
        (lambda: batch_instances(make(), 30), "pad_to=30 is shorter than the longest prompt, 37"),
        (lambda: find_span([1, 2], [3]), "does not stand in the prompt of 2 tokens"),
        (lambda: find_span([1, 2], [1, 2, 3]), "does not stand"),
        (lambda: find_span([1, 2, 3], [1, 9], "fuzzy"), "shares 50% of its ids"),
        (lambda: find_span([1], [1], "near"), "mode='near' is not 'exact' or 'fuzzy'"),
        (lambda: find_span([1], []), "the answer is empty"),
        (lambda: unigram_recall([], [1]), "the reference is empty"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
