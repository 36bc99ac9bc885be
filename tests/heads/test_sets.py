"""Head lists, masks and heads.json."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxheads import heads


@pytest.mark.parametrize(
    "given_heads",
    [
        [(1, 0), (2, 3)],
        [[1, 0], [2, 3]],
        ["1.0", "2.3"],
        ["L1.H0", " 2.3 "],
        ((np.int64(1), np.int64(0)), "2.3"),
        "1.0,2.3",
        iter([(1, 0), (2, 3)]),
    ],
)
def test_every_way_of_writing_a_list(given_heads):
    want = np.zeros((3, 4), bool)
    want[1, 0] = want[2, 3] = True
    out = heads.mask(given_heads, 3, 4)
    assert out.dtype == bool
    np.testing.assert_array_equal(out, want)


def test_masks_pass_through_and_an_empty_list_is_no_head():
    values = np.eye(3, 4)
    np.testing.assert_array_equal(heads.mask(values, 3, 4), values.astype(bool))
    assert not heads.mask([], 3, 4).any()


@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 7))))
def test_mask_and_list_are_inverse(chosen):
    assert heads.from_mask(heads.mask(list(chosen), 6, 8)) == sorted(chosen)


@pytest.mark.parametrize(
    ("given_heads", "message"),
    [
        ([(3, 0)], "head 3.0 is out of range: the model has layers 0 to 2 with heads 0 to 3"),
        ([(0, 4)], "head 0.4 is out of range"),
        ([(0, -1)], "names no head"),
        ([(1, 0), "1.0"], "head 1.0 is listed twice"),
        (["1-0"], "'1-0' names no head"),
        ([(1, 2, 3)], "names no head"),
        ([(1.0, 2)], "names no head"),
        ([True], "names no head"),
        ([(True, False)], "names no head"),
        (np.zeros((4, 3)), "transposed"),
        (np.zeros((3, 2)), r"\.tolist\(\)"),
        (np.zeros((3, 1)), "key/value heads"),
        (np.zeros(4), r"shape \(4,\)"),
        (np.full((3, 4), 0.5), "top_k"),
    ],
)
def test_bad_heads_say_what_is_wrong(given_heads, message):
    with pytest.raises(ValueError, match=message):
        heads.mask(given_heads, 3, 4)


def test_leave_one_out_drops_each_head_once():
    gates = heads.leave_one_out(3, 4)
    assert gates.shape == (12, 3, 4)
    for n, gate in enumerate(gates):
        assert heads.from_mask(1 - gate) == [divmod(n, 4)]


def test_top_k_is_sorted_and_breaks_ties_in_order():
    scores = np.array([[0.1, 0.7, 0.7], [0.9, -1.0, 0.2]])
    assert heads.top_k(scores, 3) == [(1, 0), (0, 1), (0, 2)]
    assert heads.top_k(scores, 6)[-1] == (1, 1)


@pytest.mark.parametrize(
    ("scores", "k", "message"),
    [
        (np.zeros((2, 2)), 0, "k=0"),
        (np.zeros((2, 2)), 5, "k=5"),
        (np.zeros(4), 1, r"\[L,H\]"),
        (np.full((2, 2), np.nan), 1, "NaN"),
    ],
)
def test_top_k_refuses(scores, k, message):
    with pytest.raises(ValueError, match=message):
        heads.top_k(scores, k)


def test_heads_file_round_trip(tmp_path):
    file = tmp_path / "heads.json"
    size = {"num_layers": 3, "num_heads": 4}
    heads.to_json(file, heads=["2.3", (1, 0)], model="lab", meta={"metric": "copying"}, **size)
    back = heads.from_json(file)
    assert back.heads == ((2, 3), (1, 0))  # the order of a list is kept
    assert (back.model, back.meta) == ("lab", {"metric": "copying"})
    np.testing.assert_array_equal(back.gates(), heads.mask([(1, 0), (2, 3)], 3, 4))
    back.check(3, 4)
    with pytest.raises(ValueError, match=r"3 layers x 4 heads \(lab\); this model has 2 x 4"):
        back.check(2, 4)

    scores = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    heads.to_json(file, scores=scores, **size)
    np.testing.assert_array_equal(heads.from_json(file).gates(), scores)  # to the last bit


GOOD = {"num_layers": 2, "num_heads": 2, "heads": [[0, 1]]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "must be an object"),
        ({**GOOD, "head": []}, "unknown field 'head'"),
        ({**GOOD, "num_layers": "2"}, "'num_layers' is '2'"),
        ({"num_layers": 2, "num_heads": 2}, "exactly one"),
        ({**GOOD, "scores": [[1, 2], [3, 4]]}, "exactly one"),
        ({**GOOD, "heads": [[0, 2]]}, "head 0.2 is out of range"),
        ({**GOOD, "heads": "0.1"}, "must be a list"),
        ({"num_layers": 2, "num_heads": 2, "scores": [[1, 2]]}, "layers x heads"),
        ({"num_layers": 2, "num_heads": 2, "scores": [[1], [1, 2]]}, "2 rows of 2 numbers"),
        ({"num_layers": 2, "num_heads": 2, "scores": [[1, float("nan")], [0, 0]]}, "finite"),
        ({**GOOD, "meta": 3}, "'meta' an object"),
    ],
)
def test_bad_heads_files_are_named(tmp_path, row, message):
    file = tmp_path / "heads.json"
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message) as caught:
        heads.from_json(file)
    assert str(file) in str(caught.value)


def test_missing_or_broken_heads_file(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        heads.from_json(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        heads.from_json(tmp_path / "broken.json")


def test_to_json_refuses_what_it_cannot_write(tmp_path):
    size = {"num_layers": 2, "num_heads": 2}
    with pytest.raises(ValueError, match="exactly one"):
        heads.to_json(tmp_path / "h.json", **size)
    with pytest.raises(ValueError, match="NaN or infinity"):
        heads.to_json(tmp_path / "h.json", scores=np.full((2, 2), np.inf), **size)
    with pytest.raises(ValueError, match="out of range"):
        heads.to_json(tmp_path / "h.json", heads=[(2, 0)], **size)
    assert not (tmp_path / "h.json").exists()
