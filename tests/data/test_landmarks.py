"""Landmarks in packed rows: the text is the same, and so is what follows what."""

import numpy as np
import pytest

from jaxheads.attention import landmark_places
from jaxheads.data import DataConfig, Tokenizer, eval_batches, make_dataset
from jaxheads.data.landmarks import add_landmarks
from jaxheads.models import ModelConfig
from jaxheads.training.loop import RunConfig, check_landmarks

BLOCK, MARK = 4, 384  # the byte tokenizer's ids end at 383


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"line {n}: " + "abc" * (n % 5) for n in range(40)))
    return str(path)


def config(corpus, **changes):
    fields = dict(path=corpus, seq_len=28, batch_size=2, prefetch=0, validation_fraction=0.0)
    return DataConfig(**{**fields, "max_document_bytes": 32, **changes})


def check_rows(batch, plain):
    """`batch` has the text of `plain`, landmarks in place, and the token after each as target."""
    is_landmark = landmark_places(28, BLOCK)
    np.testing.assert_array_equal(batch["tokens"] == MARK, [is_landmark] * 2)
    np.testing.assert_array_equal(batch["tokens"][:, ~is_landmark], plain["tokens"])
    np.testing.assert_array_equal(batch["segment_ids"][:, ~is_landmark], plain["segment_ids"])
    for row, t in np.ndindex(2, 27):
        if batch["segment_ids"][row, t] == batch["segment_ids"][row, t + 1] != 0:
            assert batch["targets"][row, t] == batch["tokens"][row, t + 1]
            assert batch["positions"][row, t + 1] == batch["positions"][row, t] + 1
    landmarks = np.flatnonzero(is_landmark)
    np.testing.assert_array_equal(
        batch["targets"][:, landmarks], plain["targets"][:, BLOCK - 1 :: BLOCK]
    )


def test_rows_have_the_text_and_its_landmarks(corpus):
    marked, plain = config(corpus, landmark_block=BLOCK), config(corpus, seq_len=23)
    assert marked.text_len == 23
    left, right = make_dataset(marked), make_dataset(plain)
    for _ in range(3):
        batch = next(left)
        assert {name: x.shape for name, x in batch.items()} == dict.fromkeys(batch, (2, 28))
        check_rows(batch, next(right))
    state = left.get_state()
    again = make_dataset(marked)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["tokens"], next(left)["tokens"])
    with pytest.raises(ValueError, match="landmark_block was 4, is None"):
        make_dataset(plain).set_state(state)


def test_evaluation_counts_the_text_alone(corpus):
    marked = config(corpus, landmark_block=BLOCK, landmark_targets=False, split="all")
    plain = config(corpus, seq_len=23, split="all")
    for batch, other in zip(eval_batches(marked), eval_batches(plain), strict=True):
        check_rows(batch, other)
        is_target = (batch["targets"] == MARK) & (batch["segment_ids"] != 0)
        assert (batch["weights"][is_target] == 0).all() and is_target.any()


def jumped_by_hand(batch, seed, step, rows, num_jumps):
    """[b,28] positions: a count that starts at each document and jumps after each landmark."""
    positions = np.zeros((len(rows), 28), int)
    for n, row in enumerate(rows):
        drawn = iter(np.random.default_rng((seed, step, row)).integers(num_jumps, size=5))
        at = 0
        for t in range(28):
            ids = batch["segment_ids"][n]
            at = 0 if t == 0 or ids[t] != ids[t - 1] else at
            positions[n, t] = at
            at += 1 + (next(drawn) if t % (BLOCK + 1) == BLOCK else 0)
    return positions * (batch["segment_ids"] != 0)


def test_positions_jump_after_landmarks(corpus):
    """Rows of every process and after a restart draw alike; evaluation never jumps."""
    fields = dict(landmark_block=BLOCK, batch_size=4, seed=3)
    jumping, still = config(corpus, landmark_jumps=50, **fields), config(corpus, **fields)
    left, right, half = make_dataset(jumping), make_dataset(still), None
    whole = []
    for step in range(3):
        half = left.get_state() if step == 2 else half
        batch, other = next(left), next(right)
        whole.append(batch)
        for name in ("tokens", "targets", "segment_ids", "weights"):
            np.testing.assert_array_equal(batch[name], other[name])
        want = jumped_by_hand(batch, 3, step, range(4), 50)
        np.testing.assert_array_equal(batch["positions"], want)
        assert batch["positions"].max() > 60
    lower = make_dataset(jumping, process_index=1, process_count=2)
    np.testing.assert_array_equal(next(lower)["positions"], whole[0]["positions"][2:])
    again = make_dataset(jumping)
    again.set_state(half)
    np.testing.assert_array_equal(next(again)["positions"], whole[2]["positions"])
    for one, other in zip(eval_batches(jumping, 2), eval_batches(still, 2), strict=True):
        np.testing.assert_array_equal(one["positions"], other["positions"])
    with pytest.raises(ValueError, match="landmark_jumps was 50, is None"):
        make_dataset(still).set_state(half)


def test_landmarks_of_model_and_data_fit(corpus):
    fields = dict(vocab_size=MARK + 1, attention=f"landmark(block={BLOCK})")
    run = lambda **data: RunConfig(model=ModelConfig(**fields), data=config(corpus, **data))
    tokenizer = Tokenizer.load("bytes")
    check_landmarks(run(landmark_block=BLOCK), tokenizer)
    with pytest.raises(ValueError, match=r"the data have none; set data.landmark_block=4"):
        check_landmarks(run(), tokenizer)
    with pytest.raises(ValueError, match="id 384 after every 3 tokens"):
        check_landmarks(run(landmark_block=3), tokenizer)


def test_bad_settings(corpus):
    with pytest.raises(ValueError, match="take seq_len=30, a multiple"):
        config(corpus, seq_len=29, landmark_block=BLOCK)
    with pytest.raises(ValueError, match="landmark_block=-1 must be at least 0"):
        config(corpus, landmark_block=-1)
    with pytest.raises(ValueError, match="landmark_jumps=8 without landmarks"):
        config(corpus, landmark_jumps=8)
    batch = next(make_dataset(config(corpus)))
    with pytest.raises(ValueError, match="the text holds landmark_id=97"):
        add_landmarks(batch, BLOCK, ord("a"))
