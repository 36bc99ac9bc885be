import json
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxheads.data import DataConfig, Tokenizer, eval_batches, make_dataset, merge_states
from jaxheads.data.packing import FIELDS, Document, PackedBatches, pack_once
from jaxheads.data.pipeline import parse_mixture

BOS, EOS = 257, 258


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def corpus(tmp_path):
    """37 documents of 5 to 77 bytes, all different."""
    return write(tmp_path / "a.jsonl", [f"<{i}>" + "x" * (2 * i) for i in range(37)])


def config(path, **overrides):
    defaults = {"seq_len": 16, "batch_size": 4, "split": "all", "seed": 3}
    return DataConfig(path=path, **(defaults | overrides))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def check_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def differ(left, right):
    return any((a["tokens"] != b["tokens"]).any() for a, b in zip(left, right, strict=True))


def segments(batches, pad_id=256):
    """Per global row: the segments as (tokens, targets), with every layout rule checked."""
    found = []
    for batch in batches:
        for name, dtype in FIELDS.items():
            assert batch[name].dtype == dtype
        for row in range(len(batch["tokens"])):
            ids = batch["segment_ids"][row]
            is_token = ids > 0
            # Padding only at the end; segments count 1, 2, ... without gaps.
            count = int(is_token.sum())
            assert is_token[:count].all()
            assert set(np.diff(ids[:count], prepend=0).tolist()) <= {0, 1}
            assert (batch["weights"][row] == is_token).all()
            assert (batch["tokens"][row, count:] == pad_id).all()
            assert (batch["targets"][row, count:] == pad_id).all()
            assert (batch["positions"][row, count:] == 0).all()
            for segment in range(1, ids.max(initial=0) + 1):
                here = ids == segment
                tokens, targets = batch["tokens"][row, here], batch["targets"][row, here]
                assert (batch["positions"][row, here] == np.arange(len(tokens))).all()
                assert (tokens[1:] == targets[:-1]).all()  # inside a segment: the next token
                found.append((tokens.tolist(), targets.tolist()))
    return found


def documents(found):
    """Joins segments into documents: a segment that does not end in EOS goes on in the next."""
    joined, current = [], []
    for tokens, targets in found:
        if current:
            assert current[-1] == tokens[0]  # continues exactly where the row was cut
        else:
            assert tokens[0] == BOS
            current = tokens[:1]
        current += targets
        if targets[-1] == EOS:
            joined.append(Tokenizer.load("bytes").decode(current))
            current = []
    return joined, current


def lane_rows(batches, row, slot, interleave):
    """The rows one lane fills, as batches of one row."""
    return [{k: v[row : row + 1] for k, v in b.items()} for b in batches[slot::interleave]]


def test_batch_layout(corpus):
    batch = next(make_dataset(config(corpus)))
    assert set(batch) == set(FIELDS)
    assert all(value.shape == (4, 16) for value in batch.values())
    segments([batch])


def test_config_is_hashable_and_rebuilds(corpus):
    import dataclasses

    cfg = config(corpus)
    again = DataConfig(**json.loads(json.dumps(dataclasses.asdict(cfg))))
    assert again == cfg
    assert hash(again) == hash(cfg)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(max_size=40), min_size=1, max_size=12),
    seq_len=st.integers(1, 24),
    batch_size=st.integers(1, 3),
    interleave=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_documents_come_out_whole(tmp_path_factory, texts, seq_len, batch_size, interleave, seed):
    """Rebuilds every document from the packed rows: no leak, no loss, no mixing."""
    texts = [text for text in texts if text.strip()] or ["a"]
    path = write(tmp_path_factory.mktemp("docs") / "a.jsonl", texts)
    cfg = config(
        path,
        seq_len=seq_len,
        batch_size=batch_size,
        interleave=interleave,
        seed=seed,
        prefetch=0,
    )
    batches = take(make_dataset(cfg), 12 * interleave)
    for row in range(batch_size):
        for slot in range(interleave):
            whole, rest = documents(segments(lane_rows(batches, row, slot, interleave)))
            assert set(whole) <= set(texts)
            if rest:
                start = Tokenizer.load("bytes").decode(rest).removesuffix("\ufffd")
                assert any(text.startswith(start.rstrip("\ufffd")) for text in texts)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=12),
    seq_len=st.integers(1, 20),
    batch_size=st.integers(1, 3),
)
def test_one_pass_keeps_every_token_once(lengths, seq_len, batch_size):
    ids = [np.arange(n) + 1000 * i for i, n in enumerate(lengths)]
    sizes = dict(batch_size=batch_size, seq_len=seq_len)
    batches = list(pack_once(map(Document, ids), **sizes, pack=True, pad_id=-1))
    found = segments(batches, pad_id=-1)
    inputs = [t for tokens, _ in found for t in tokens]
    targets = [t for _, targets in found for t in targets]
    assert inputs == [t for doc in ids for t in doc[:-1].tolist()]
    assert targets == [t for doc in ids for t in doc[1:].tolist()]
    total = sum(max(n - 1, 0) for n in lengths)
    assert len(batches) == -(-total // (seq_len * batch_size))


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_visits_every_document_once(corpus, shuffle):
    cfg = config(corpus, batch_size=1, interleave=1, seq_len=64, shuffle=shuffle, prefetch=0)
    whole, _ = documents(segments(take(make_dataset(cfg), 80)))
    orders = [whole[start : start + 37] for start in (0, 37)]
    in_file_order = [f"<{i}>" + "x" * (2 * i) for i in range(37)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(in_file_order)
    assert (orders[0] == in_file_order) == (not shuffle)
    assert (orders[0] == orders[1]) == (not shuffle)


def test_deterministic_and_seeded(corpus):
    first = take(make_dataset(config(corpus)), 20)
    check_equal(first, take(make_dataset(config(corpus)), 20))
    check_equal(first, take(make_dataset(config(corpus, prefetch=0)), 20))
    assert differ(first, take(make_dataset(config(corpus, seed=4)), 20))


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("pack", [True, False])
def test_resume_bit_for_bit(corpus, prefetch, pack):
    # An epoch is 37 documents of about 45 tokens: 26 batches of 64 tokens when packed.
    cfg = config(corpus, prefetch=prefetch, pack=pack)
    iterator = make_dataset(cfg)
    states, batches = [], []
    for _ in range(70):
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    for point in (0, 1, 7, 25, 26, 27, 53, 60):
        resumed = make_dataset(cfg)
        if point % 2:  # also an iterator that is already under way
            take(resumed, 5)
        resumed.set_state(states[point])
        assert json.loads(json.dumps(resumed.get_state())) == states[point]
        check_equal(take(resumed, 10), batches[point : point + 10])
        resumed.close()
    iterator.close()
    check_equal([next(iterator)], take_after(cfg, states[-1], 2)[1:])


def take_after(cfg, state, count):
    iterator = make_dataset(cfg)
    iterator.set_state(state)
    return take(iterator, count)


@pytest.mark.parametrize("process_count", [2, 4])
@pytest.mark.parametrize("mixture", [False, True])
def test_processes_make_the_single_process_batch(corpus, tmp_path, process_count, mixture):
    other = write(tmp_path / "b.jsonl", ["other " * 4, "more"])
    cfg = config(f"{corpus}=2,{other}=1" if mixture else corpus)
    single = take(make_dataset(cfg), 15)
    parts = [
        take(make_dataset(cfg, process_index=i, process_count=process_count), 15)
        for i in range(process_count)
    ]
    joined = [{k: np.concatenate([p[k] for p in step]) for k in FIELDS} for step in zip(*parts)]
    check_equal(joined, single)


def test_resume_on_another_number_of_processes(corpus):
    cfg = config(corpus)
    single = make_dataset(cfg)
    parts = [make_dataset(cfg, process_index=i, process_count=2) for i in range(2)]
    for iterator in (single, *parts):
        take(iterator, 9)
    merged = merge_states([parts[1].get_state(), parts[0].get_state()])
    assert merged == single.get_state()
    expected = take(single, 5)
    for count in (1, 4):
        for i in range(count):
            iterator = make_dataset(cfg, process_index=i, process_count=count)
            iterator.set_state(merged)
            size = 4 // count
            mine = slice(i * size, (i + 1) * size)
            check_equal(take(iterator, 5), [{k: b[k][mine] for k in FIELDS} for b in expected])
    with pytest.raises(ValueError, match=r"covers rows 0 to 1 .* needs rows 0 to 3; merge"):
        make_dataset(cfg).set_state(parts[0].get_state())
    with pytest.raises(ValueError, match="exactly one state per process"):
        merge_states([parts[0].get_state()] * 2)
    next(parts[0])
    with pytest.raises(ValueError, match="different runs or steps"):
        merge_states([part.get_state() for part in parts])
    with pytest.raises(ValueError, match="got none"):
        merge_states([])


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 9), (1, 1, 2)])
def test_mixture_is_by_tokens(tmp_path, weights):
    # Documents of very different lengths: shares of documents would be far off.
    letters = "abc"[: len(weights)]
    entries = [
        f"{write(tmp_path / f'{letter}.jsonl', [letter * 10 * 30**i])}={weight}"
        for i, (letter, weight) in enumerate(zip(letters, weights))
    ]
    cfg = config(",".join(entries), seq_len=32, batch_size=4, prefetch=0)
    batches = take(make_dataset(cfg), 100)
    assert all((b["weights"] == 1).all() for b in batches)  # so a share of rows is one of tokens
    rows = Counter(chr(b["targets"][r].min()) for b in batches for r in range(4))
    for letter, weight in zip(letters, weights):
        share = weight / sum(weights)
        assert abs(rows[letter] - 400 * share) <= 3  # low discrepancy: a few rows of 400
    assert all(len({*b["targets"][r]} & {*map(ord, "abc")}) == 1 for b in batches for r in range(4))


def test_components_are_shuffled_differently(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [f"{i:02d}" for i in range(40)])
    path = f"{tmp_path}/a.jsonl=1,{tmp_path}/b.jsonl=1"
    cfg = config(path, batch_size=1, interleave=1, seq_len=3, prefetch=0)  # a document a row
    orders = [[], []]
    iterator = make_dataset(cfg)
    for _ in range(40):
        batch = next(iterator)
        used = [slots[0][0] for slots in iterator.get_state()["documents"]]  # by component
        component = 0 if used[0] > len(orders[0]) else 1
        orders[component].append(Tokenizer.load("bytes").decode(batch["tokens"][0]))
        assert used == [len(order) for order in orders]
    assert abs(len(orders[0]) - len(orders[1])) <= 2
    assert orders[0][:15] != orders[1][:15]


def test_unpacked_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", ["ab", "c" * 50])
    cfg = config(path, pack=False, shuffle=False, batch_size=2, interleave=1, seq_len=8)
    for batch in take(make_dataset(cfg), 3):
        assert batch["tokens"][0, :4].tolist() == [BOS, 97, 98, 256]
        assert batch["targets"][0, :4].tolist() == [97, 98, EOS, 256]
        assert batch["weights"].sum(1).tolist() == [3, 8]
        assert batch["tokens"][1].tolist() == [BOS] + [99] * 7
        segments([batch])


def test_held_out_split_is_not_trained_on(corpus):
    cfg = config(corpus, split="train", validation_fraction=0.3, batch_size=1, interleave=1)
    trained = set(documents(segments(take(make_dataset(cfg), 150)))[0])
    held_out_cfg = config(corpus, split="validation", validation_fraction=0.3)
    held_out = documents(segments(eval_batches(held_out_cfg)))[0]
    assert not trained & set(held_out)
    assert len(trained) + len(held_out) == 37


def test_eval_batches_pass_once_over_everything(corpus):
    cfg = config(corpus, seq_len=10, batch_size=3)
    batches = list(eval_batches(cfg))
    whole, rest = documents(segments(batches))
    assert whole == [f"<{i}>" + "x" * (2 * i) for i in range(37)]
    assert not rest
    assert all(batch["tokens"].shape == (3, 10) for batch in batches)
    assert batches[-1]["weights"].sum() < 30
    check_equal(list(eval_batches(cfg, limit=2)), batches[:2])
    parts = [list(eval_batches(cfg, process_index=i, process_count=3)) for i in range(3)]
    joined = [{k: np.concatenate([p[k] for p in step]) for k in FIELDS} for step in zip(*parts)]
    check_equal(joined, batches)


def test_add_bos(corpus):
    cfg = config(corpus, add_bos=False)
    assert all((batch["tokens"] != BOS).all() for batch in take(make_dataset(cfg), 10))


def test_read_error_reaches_the_caller_and_changes_nothing(corpus):
    iterator = make_dataset(config(corpus, prefetch=2))
    take(iterator, 3)
    state = iterator.get_state()
    content = Path(corpus).read_text()
    Path(corpus).write_text("")
    with pytest.raises(ValueError, match="changed after it was indexed"):
        take(iterator, 20)
    Path(corpus).write_text(content)
    iterator.set_state(state)
    reference = make_dataset(config(corpus))
    check_equal(take(iterator, 6), take(reference, 9)[3:])


def test_abandoned_read_ahead_ends_its_thread(corpus):
    def running():
        return [t for t in threading.enumerate() if t.name == "jaxheads-read-ahead"]

    before = set(running())
    iterator = make_dataset(config(corpus))
    next(iterator)
    (thread,) = set(running()) - before
    del iterator
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_state_refuses_other_data_and_settings(corpus, tmp_path):
    state = make_dataset(config(corpus)).get_state()
    iterator = make_dataset(config(corpus, seq_len=8, seed=9))
    message = "saved with other settings: seed was 3, is 9; seq_len was 16, is 8"
    with pytest.raises(ValueError, match=message):
        iterator.set_state(state)
    check_equal(take(iterator, 2), take(make_dataset(config(corpus, seq_len=8, seed=9)), 2))
    other = write(tmp_path / "b.jsonl", ["other"])
    with pytest.raises(ValueError, match=r"data was \['"):
        make_dataset(config(other)).set_state(state)
    with pytest.raises(ValueError, match="not a data state: documents, rows, used missing"):
        make_dataset(config(corpus)).set_state({"step": 1, "description": {}})
    # The same data elsewhere, read ahead differently, is the same run.
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(corpus).read_bytes())
    make_dataset(config(str(moved), prefetch=0)).set_state(state)


def test_tokens_to_predict_are_needed():
    batches = PackedBatches(
        [[Document(np.zeros(1, np.int32))] * 100_000],
        [1.0],
        rows=range(1),
        batch_size=1,
        seq_len=4,
        interleave=1,
        pack=True,
        pad_id=0,
        description={},
    )
    with pytest.raises(ValueError, match="fewer than two tokens"):
        next(batches)
    assert batches.get_state()["documents"] == [[[0]]]


def test_default_corpus():
    cfg = DataConfig(seq_len=128, batch_size=2)
    assert cfg.path == "stdlib"
    segments(take(make_dataset(cfg), 5))


def test_import_is_light():
    import subprocess

    code = (
        "import sys, jaxheads.data; print([m for m in ('grain', 'tokenizers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_parse_mixture(tmp_path):
    assert parse_mixture("a.txt, b") == ((("a.txt", "b"), 1.0),)
    assert parse_mixture("a.txt=3,b=1") == ((("a.txt",), 0.75), (("b",), 0.25))
    odd = tmp_path / "x=1,y=2.txt"
    odd.write_text("x")
    assert parse_mixture(str(odd)) == (((str(odd),), 1.0),)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"path": ""}, ValueError, "is empty; give a file"),
        ({"path": "a.txt,,b.txt"}, ValueError, "empty entry between commas"),
        ({"path": "a.txt=0.5,b.txt"}, ValueError, r"but not to b\.txt; give every entry a weight"),
        ({"path": "a.txt=x"}, ValueError, r"weight 'x' of 'a\.txt' is not a number"),
        ({"path": "a.txt=0,b.txt=1"}, ValueError, "must be finite and above 0"),
        ({"path": "a.txt=-1"}, ValueError, "above 0"),
        ({"path": "a.txt=nan"}, ValueError, "must be finite"),
        ({"path": "=0.5"}, ValueError, "must be finite and above 0"),
        ({"seq_len": 0}, ValueError, "seq_len=0 must be at least 1"),
        ({"seq_len": 1.5}, TypeError, r"seq_len=1\.5 must be an integer"),
        ({"batch_size": -4}, ValueError, "batch_size=-4"),
        ({"interleave": 0}, ValueError, "interleave=0"),
        ({"max_document_bytes": 1}, ValueError, "max_document_bytes=1 must be at least 16"),
        ({"prefetch": -1}, ValueError, "prefetch=-1"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"seed": 2**32}, ValueError, r"must be below 2\*\*32"),
        ({"split": "test"}, ValueError, "split='test' is not one of train, validation, all"),
        ({"validation_fraction": 1.0}, ValueError, r"validation_fraction=1\.0"),
    ],
)
def test_config_errors(fields, error, message):
    with pytest.raises(error, match=message):
        DataConfig(**fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: make_dataset(c, process_count=3), "batch_size=4 is not divisible by process_"),
        (lambda c: make_dataset(c, process_index=2, process_count=2), "process_index=2 is not in"),
        (lambda c: eval_batches(c, limit=0), "limit=0"),
        (lambda c: eval_batches(config("nowhere.txt")), r"nowhere\.txt does not exist"),
        (
            lambda c: make_dataset(config(c.path, split="validation", validation_fraction=0)),
            "empty",
        ),
        (lambda c: make_dataset(config(c.path, tokenizer="x")), "tokenizer x does not exist"),
    ],
)
def test_dataset_errors(corpus, make, message):
    with pytest.raises(ValueError, match=message):
        make(config(corpus))


def test_add_bos_needs_one(corpus, tmp_path):
    tokenizer = Tokenizer.load("bytes")
    tokenizer.bos_id = None
    with pytest.raises(ValueError, match="defines no BOS token"):
        make_dataset(config(corpus, add_bos=True), tokenizer=tokenizer)
