"""Pass-key prompts: lengths, marks and depths for byte and subword tokenizers."""

from pathlib import Path

import numpy as np
import pytest

from jaxheads.data import Tokenizer, make_passkeys

STORIES = Path(__file__).parents[2] / "../shared/models/stories260K"


@pytest.mark.parametrize("name", ["bytes", "stories260K"])
@pytest.mark.parametrize("length", [400, 1500])
def test_prompts_hold_their_key_where_the_marks_say(name, length):
    if name != "bytes" and not STORIES.exists():
        pytest.skip(f"{STORIES} is absent")
    tokenizer = Tokenizer.load(name if name == "bytes" else STORIES)
    told = make_passkeys(tokenizer, 8, length=length, seed=3)
    assert len({one.key for one in told}) == 8
    for one in told:
        size = len(one.tokens) + len(one.answer)
        assert length - 200 < size <= length
        start, stop = one.span
        assert tokenizer.decode(one.tokens[start:stop]).strip() == one.key
        assert tokenizer.decode(one.answer).strip() == one.key
        text = tokenizer.decode(one.tokens)
        assert text.count(one.key) == 2 and text.endswith("The pass key is")
    again = make_passkeys(tokenizer, 8, length=length, seed=3)
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(told, again, strict=True))


def test_depths():
    tokenizer = Tokenizer.load("bytes")
    where = lambda depth: make_passkeys(tokenizer, 1, length=3000, depth=depth)[0].span[0]
    places = [where(depth) for depth in (0.0, 0.25, 0.5, 1.0)]
    assert places == sorted(places) and places[0] < 150 and places[-1] > 2700
    depths = sorted(one.depth for one in make_passkeys(tokenizer, 10, length=600))
    assert all(n / 10 <= depth < (n + 1) / 10 for n, depth in enumerate(depths))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"length": 50}, "leaves no room: question and key take"),
        ({"length": 900, "depth": 1.5}, "must be from 0"),
        ({"length": 900, "digits": 0}, "must be at least 1"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(ValueError, match=message):
        make_passkeys(Tokenizer.load("bytes"), 1, **given)
