"""The lab language: every task makes aligned pairs whose answers are right, and splits hold."""

import collections
import re

import numpy as np
import pytest

from jaxheads.data import DataConfig, Tokenizer, encode_pairs, eval_batches, make_dataset
from jaxheads.data.tasks import TASKS, facts, generate, lab, needle, role, successors
from jaxheads.data.tasks.question import in_split, make_pairs
from tests.data.tokenizers import word_tokenizer

CAPITALS = dict(facts.FACTS["capital"])


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("lab")


def word_at(tokenizer, pair, mark):
    return tokenizer.decode(tokenizer.encode(pair.clean)[[pair.marks[mark]]])


@pytest.mark.parametrize("name", TASKS)
def test_every_task(name, tokenizer):
    pairs = generate(name, tokenizer, 30, seed=3, split="heldout")
    assert pairs == generate(name, tokenizer, 30, seed=3, split="heldout")
    assert pairs != generate(name, tokenizer, 30, seed=4, split="heldout")
    assert len({pair.clean for pair in pairs}) == 30
    batch = encode_pairs(pairs, tokenizer)  # raises where prompts do not align
    unknown = tokenizer.encode("unheard")[0]
    assert unknown not in batch.clean and unknown not in batch.corrupt
    for n, pair in enumerate(pairs):
        assert pair.marks["end"] == batch.last[n]
        assert pair.answer not in pair.distractors and pair.wrong not in pair.accepted
        assert not pair.accepted or pair.answer in pair.accepted


def answers(name, pair):
    """The right answer, worked out from the words of the prompt alone."""
    text = re.findall(r"[0-9]{2}|[A-Za-z]+|[^\sA-Za-z0-9]", pair.clean)
    if name == "ioi":
        names = [
            w for w, n in collections.Counter(text).items() if w in TASKS["ioi"].words["names"]
        ]
        (only,) = [w for w in names if text.count(w) == 1]
        return {only}
    if name == "induction":
        return {text[text.index(text[-1]) + 1]}
    if name == "needle":
        who = text[-4]
        return {text[at + 1] for at, w in enumerate(text[:-8]) if (text[at - 1], w) == (":", who)}
    if name == "colored_objects":
        question = text[len(text) - text[::-1].index("Q") :]
        return {question[question.index(question[-4]) - 1].capitalize()}
    if name == "facts":
        country = text[-4]
        relation = "capital" if "capital" in text else "language"
        return {dict(facts.FACTS[relation])[country]}
    if name == "greater_than":
        return {str(n) for n in range(int(text[7]) + 1, 60)}
    if name == "successors":
        latest = text[-2]
        every = successors.SEQUENCES.values()
        return {seq[seq.index(latest) + 1] for seq in every if latest in seq}
    if name == "multiple_choice":
        subject = text[text.index("?") - 1]
        relation = text[text.index("of") - 1]
        return {text[text.index(dict(facts.FACTS[relation])[subject]) + 1]}
    if name == "docstring":
        signature = text[text.index("self") + 1 : text.index(")")]
        said = text.count("param") - 1
        return {[w for w in signature if w != ","][said]}
    if name == "two_documents":
        who = text[-4]
        return {text[at + 1] for at, w in enumerate(text[:-8]) if (text[at - 1], w) == (":", who)}
    assert name == "role"
    saying = role.SAYINGS.index(text[text.index("says") + 1])
    return {role.REPLIES[text[text.index("a") + 1]][saying]}


@pytest.mark.parametrize(
    "name", sorted(set(TASKS) - {"conflict", "refusal"}), ids=lambda name: str(name)
)
def test_answers_follow_from_the_prompt(name, tokenizer):
    for pair in generate(name, tokenizer, 25, seed=5):
        right = answers(name, pair)
        assert {w.strip() for w in pair.accepted or (pair.answer,)} == right, pair.clean
        assert pair.wrong.strip() not in right
        corrupt = answers(name, pair.__class__(pair.corrupt, "", "", ""))
        assert pair.wrong.strip() in corrupt, pair.corrupt


def test_conflicts(tokenizer):
    for pair in generate("conflict", tokenizer, 40, relation="capital", split="heldout"):
        subject, stated = (word_at(tokenizer, pair, mark) for mark in ("subject", "stated"))
        assert pair.answer == f" {CAPITALS[subject]}" and pair.wrong == f" {stated}"
        assert word_at(tokenizer, pair, "subject2") == subject and pair.answer != pair.wrong
    shares = facts.exposures("capital")
    assert set(shares) == set(CAPITALS) and np.isclose(sum(shares.values()), 1)
    assert np.isclose(max(shares.values()) / min(shares.values()), 100)
    with pytest.raises(ValueError, match="relation='river' is not one of capital, language"):
        generate("conflict", tokenizer, 1, relation="river")


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needles_are_where_they_are_asked_for(depth, tokenizer):
    pair = generate("needle", tokenizer, 1, length=160, depth=depth, code_words=3, seed=1)[0]
    ids = tokenizer.encode(pair.clean)
    assert 150 < len(ids) <= 162
    span = ids[pair.marks["needle"] : pair.marks["needle_end"]]
    assert tokenizer.decode(span) == pair.answer.strip()
    assert abs(pair.marks["needle"] / (len(ids) - needle._ASKED) - depth) < 0.1


def test_colours_before_and_after_their_objects(tokenizer):
    orders = collections.Counter()
    for order in ("before", "after", "either"):
        for pair in generate(
            "colored_objects", tokenizer, 20, capitalised=False, order=order, split="heldout"
        ):
            said = re.findall(r"[A-Za-z]+|[^\sA-Za-z]", pair.clean)
            at = said.index(said[-4])  # "... the hat ? A :": the hat of the list
            color = pair.answer.strip()
            assert color in (said[at - 1], said[at + 1])
            orders[order, "after" if said[at + 1] == color else "before"] += 1
            assert word_at(tokenizer, pair, "right") == color
    assert set(orders) == {
        ("before", "before"), ("after", "after"), ("either", "before"), ("either", "after"),
    }  # fmt: skip
    with pytest.raises(ValueError, match="unknown order 'between'"):
        generate("colored_objects", tokenizer, 1, order="between")


def test_the_names_of_mixtures_are_data(tokenizer):
    asks_colors = lambda name: ["color" in lab.LabText("train", name)[i][0][0] for i in range(20)]
    assert all(asks_colors("lab-colors")) and not all(asks_colors("lab"))
    cfg = DataConfig(path="lab=0.5,lab-colors=0.5", tokenizer="lab", seq_len=64, batch_size=2)
    batch = next(make_dataset(cfg))
    assert set(np.unique(batch["weights"])) <= {np.float32(w) for w in (0, lab.CONTEXT_WEIGHT, 1)}


def test_no_training_document_has_held_out_content(tokenizer):
    train, held_out = lab.LabText("train"), lab.LabText("validation")
    assert train[7] == lab.LabText("train")[7] != train[8]
    seen = {text for i in range(400) for text, _ in train[i]}
    for name in ("ioi", "multiple_choice", "greater_than", "two_documents"):
        for pair in make_pairs(TASKS[name], tokenizer, 50, split="heldout"):
            assert pair.clean not in seen
    contents = {f"x{i}" for i in range(4000)}
    share = np.mean([in_split(c, "heldout") for c in contents])
    assert abs(share - 0.2) < 0.03
    assert all(in_split(c, "train") != in_split(c, "heldout") for c in contents)
    documents = [held_out[i] for i in range(100)]
    assert {weight for document in documents for _, weight in document} == {0.1, 1.0}
    assert np.mean([document[0][0] in seen for document in documents]) < 0.3  # facts are shared
    with pytest.raises(ValueError, match="split='test' is not one of train, validation"):
        lab.LabText("test")


def test_answers_weigh_more_than_their_prompts(tokenizer):
    cfg = DataConfig(path="lab", tokenizer="lab", seq_len=64, batch_size=4)
    batch = next(make_dataset(cfg))
    weights = batch["weights"]
    assert set(np.unique(weights)) == {np.float32(lab.CONTEXT_WEIGHT), np.float32(1)}
    words = {tokenizer.decode([t]) for t in batch["targets"][weights == 1]}
    assert not words & {"Q", "?", ":", "the", "of", "List", "param"}
    (first, *_) = eval_batches(DataConfig(**{**cfg.__dict__, "split": "validation"}), limit=1)
    assert (first["weights"] == 1).any()


def test_the_shipped_tokenizer_is_the_language(tmp_path, tokenizer):
    lab.write_tokenizer(str(tmp_path))
    assert Tokenizer.load(tmp_path).digest == tokenizer.digest
    assert tokenizer.vocab_size == len(lab.vocabulary()) + 2 and tokenizer.eos_id == 0


def test_words_that_a_tokenizer_splits_are_left_out(tmp_path):
    few = ["When", *(w for w, _ in facts.FACTS["capital"][:9]), *list(CAPITALS.values())[:9]]
    tokenizer = word_tokenizer(tmp_path, [" ".join(few)], bos=False)
    with pytest.raises(ValueError, match="0 of 32 language as one token"):
        generate("facts", tokenizer, 4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("iio", {}, "unknown task 'iio'; did you mean 'ioi'"),
        ("ioi", {"split": "test"}, "split='test' is not one of train, heldout, all"),
        ("successors", {"sequence": "tides"}, "sequence='tides' is not one of days"),
        ("successors", {"sequence": "days", "shown": 6}, "shown=6 must be from 1 to 5"),
        ("induction", {"listed": 4, "repeat": 4}, "repeat=4, listed=4 need"),
        ("role", {"role": "clown"}, "role='clown' is not one of pirate"),
    ],
)
def test_bad_options(name, options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        generate(name, tokenizer, 2, **options)
