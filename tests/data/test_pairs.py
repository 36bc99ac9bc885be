"""Pairs of prompts: files, encoding, and the indirect-object generator."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxheads.data import Tokenizer, encode_pairs, load_pairs
from jaxheads.data.tasks import TaskPair, generate, ioi
from tests.data.tokenizers import word_tokenizer

MODELS = Path(__file__).parents[2] / "../shared/models"
PAIR = {"clean": "Lily said that", "corrupt": "Tim said that", "answer": " she", "wrong": " he"}
LONG = {"clean": "Then Lily ran home", "corrupt": "Then Tim ran home", "answer": " and"}
TEXTS = [
    *(text.format(a="Mary", b="John", s="John", place="school", thing="map")
      for text in ioi.TEMPLATES),
    *(f" {word}" for word in (*ioi.NAMES[:7], *ioi.PLACES, *ioi.THINGS)),
    *(text for row in (PAIR, LONG) for text in row.values()),
]  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["no bos", "bos"])
def words(request, tmp_path_factory):
    return word_tokenizer(tmp_path_factory.mktemp("words"), TEXTS, bos=request.param)


def put(tmp_path, *rows):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return file


def test_files(tmp_path):
    alias = {**{k: v for k, v in PAIR.items() if k != "corrupt"}, "corrupted": "Tim said that"}
    pairs = load_pairs(put(tmp_path, PAIR, "", LONG, {**alias, "task": "other fields are ignored"}))
    assert pairs == [TaskPair(**PAIR), TaskPair(**LONG), TaskPair(**PAIR)]
    assert pairs[1].wrong is None and pairs[1].where.endswith("pairs.jsonl, line 3")


def test_encoding_pads_on_the_right(tmp_path, words):
    batch = encode_pairs(load_pairs(put(tmp_path, PAIR, LONG)), words)
    bos = int(words.adds_bos)
    assert batch.clean.shape == batch.corrupt.shape == (2, 4 + bos) and len(batch) == 2
    np.testing.assert_array_equal(batch.last, [2 + bos, 3 + bos])
    np.testing.assert_array_equal(batch.segment_ids, [[1] * (3 + bos) + [0], [1] * (4 + bos)])
    assert words.decode(batch.clean[0, : 3 + bos]) == PAIR["clean"]
    assert words.decode(batch.corrupt[1]) == LONG["corrupt"]
    assert words.decode(batch.answer) == " she and"
    assert batch.wrong is None  # the second pair has none
    only = encode_pairs([TaskPair(**PAIR)], words)
    assert words.decode(only.wrong) == " he"
    part = batch[1:]
    assert len(part) == 1 and part.run("corrupt")["tokens"] is part.corrupt
    with pytest.raises(ValueError, match="'dirty' is not one of"):
        batch.run("dirty")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ([1, 2], "line 2 is a list; it must be an object"),
        ({"clean": "a", "answer": " b"}, "line 2 has no 'corrupt'; a pair needs"),
        ({"prompt": "a", "answer": " b"}, "line 2 has no 'clean'"),
        ({**PAIR, "answer": ""}, "line 2: 'answer' is ''; it must be text"),
        ({**PAIR, "wrong": 3}, "line 2: 'wrong' is 3"),
        ({**PAIR, "corrupt": PAIR["clean"]}, "line 2: clean and corrupt are the same"),
        ({**PAIR, "wrong": " she"}, "line 2: answer and wrong are the same"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_pairs(put(tmp_path, PAIR, row))
    assert "pairs.jsonl" in str(caught.value)


def test_empty_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="holds no pairs"):
        load_pairs(put(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        load_pairs(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no pairs of prompts to encode"):
        encode_pairs([], Tokenizer.load("bytes"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corrupt": "Tim ran said that"}, "line 1: clean has 3 tokens and corrupt 4; they must"),
        ({"answer": " she ran"}, "line 1: answer ' she ran' is 2 tokens of tokenizer"),
        ({"wrong": " he ran"}, "line 1: wrong ' he ran' is 2 tokens"),
        ({"answer": "ly"}, "line 1: answer 'ly' merges with the end of the prompt"),
        ({"corrupt": "Zoe said that", "clean": "Bo said that"}, "are the same tokens"),  # unknown
        ({"answer": " Bo", "wrong": " Zoe"}, "answer and wrong are the same token"),
    ],
)
def test_pairs_that_do_not_fit_the_tokenizer(tmp_path, words, change, message):
    if words.adds_bos:
        pytest.skip("the same without BOS")
    pairs = load_pairs(put(tmp_path, {**PAIR, **change}))
    with pytest.raises(ValueError, match=message):
        encode_pairs(pairs, words)


def test_bytes_count_bytes():
    batch = encode_pairs([TaskPair("2+2=", "2+3=", "4", "5")], Tokenizer.load("bytes"))
    assert batch.answer.tolist() == [ord("4")] and batch.last.tolist() == [4]  # BOS in front


def test_indirect_objects(words):
    pairs = generate("ioi", words, 60, seed=1)
    assert len({pair.clean for pair in pairs}) == 60
    assert pairs == generate("ioi", words, 60, seed=1) != generate("ioi", words, 60, seed=2)
    batch = encode_pairs(pairs, words)
    abba = 0
    for n, pair in enumerate(pairs):
        io, subject = pair.answer, pair.wrong
        assert (pair.clean.count(io), pair.clean.count(subject)) == (1, 2)
        assert (pair.corrupt.count(io), pair.corrupt.count(subject)) == (2, 1)
        at = {name: words.decode(batch.clean[n, [i]]) for name, i in pair.marks.items()}
        assert (at["io"], at["s1"], at["s2"]) == (io, subject, subject)
        assert pair.marks["s1"] < pair.marks["s2"] < pair.marks["end"] == batch.last[n]
        changed = np.flatnonzero(batch.clean[n] != batch.corrupt[n])
        assert changed.tolist() == [pair.marks["s2"]]  # a minimal pair
        assert batch.corrupt[n, pair.marks["s2"]] == batch.answer[n]
        abba += pair.marks["io"] < pair.marks["s1"]
    assert 20 < abba < 40


def test_tokenizers_without_names_are_refused():
    with pytest.raises(ValueError, match=r"'bytes' writes 0 of 78 names as one token"):
        generate("ioi", Tokenizer.load("bytes"), 4)


def test_counts_are_checked(words):
    with pytest.raises(ValueError, match="count=0"):
        generate("ioi", words, 0)
    with pytest.raises(ValueError, match="count=2000 exceeds what these words make: 960"):
        generate("refusal", Tokenizer.load("lab"), 2000)


@pytest.mark.parametrize(("name", "works"), [("neox-stories-tiny", True), ("stories260K", False)])
def test_real_tokenizers(name, works):
    if not (MODELS / name).exists():
        pytest.skip("no shared models")
    tokenizer = Tokenizer.load(MODELS / name)
    if not works:
        with pytest.raises(ValueError, match="names as one token"):
            generate("ioi", tokenizer, 8)
        return
    batch = encode_pairs(generate("ioi", tokenizer, 40), tokenizer)
    assert len(batch) == 40 and np.all(batch.answer != batch.wrong)


def test_different_words_of_one_length_align_in_a_sentencepiece_vocabulary():
    """There a text on its own begins with a piece that it does not have after a word."""
    if not (MODELS / "stories260K").exists():
        pytest.skip("no shared models")
    tokenizer = Tokenizer.load(MODELS / "stories260K")
    batch = encode_pairs([TaskPair(**PAIR)], tokenizer)
    assert tokenizer.decode([*batch.clean[0], *batch.answer]) == "Lily said that she"
