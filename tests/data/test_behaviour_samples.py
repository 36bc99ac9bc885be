"""Samples from grouped behaviours: protocol, negatives, batches, resuming."""

import json

import numpy as np
import pytest

from jaxheads.data import group_events
from jaxheads.data.behaviour_logs import Events
from jaxheads.data.behaviour_samples import SampleConfig, Samples, eval_samples, make_samples


def log_of(users, categories=5):
    """One chunk of events: {user: items in order of time}."""
    rows = [
        (user, item, item % categories, time)
        for user, items in users.items()
        for time, item in enumerate(items)
    ]
    return [Events(*np.asarray(rows, np.int64).T)]


def group(tmp_path, users, **options):
    return group_events(log_of(users, **options), tmp_path / "grouped")


def config(**changes):
    small = dict(history=6, min_events=8, train_targets=3, stride=2, batch_size=8, prefetch=0)
    return SampleConfig(**(small | changes))


def raw_history(data, batch, row):
    return data.item_ids[batch["history_item"][row]].tolist()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """30 users of 5 to 34 events over 50 items."""
    rng = np.random.default_rng(0)
    users = {u: (rng.zipf(1.4, 5 + u) % 50).tolist() for u in range(30)}
    return group(tmp_path_factory.mktemp("small"), users), users


def test_the_protocol_of_the_paper_on_one_user(tmp_path):
    """Events 1..215 of one user are items 1..215; another user knows other items."""
    n = 215
    users = {1: range(1, n + 1), 2: range(1000, 1300), 3: range(2000, 2209)}
    data = group(tmp_path, users)
    targets = {
        "test": [n],
        "validation": [n - 1],
        "train": [n - 2 - 5 * j for j in range(19)],
    }
    assert targets["train"][-1] == n - 92
    for split, want in targets.items():
        cfg = SampleConfig(split=split, batch_size=100, prefetch=0)
        samples = Samples(data, cfg)
        assert samples.num_users == 2  # the one with 209 events is left out
        assert len(samples) == 2 * 3 * len(want)
        found = []
        for batch in eval_samples(data, cfg):
            for row in np.flatnonzero(batch["user"] >= 0):
                item = int(data.item_ids[batch["item"][row]])
                assert batch["category"][row] == data.item_category[batch["item"][row]]
                if data.users[batch["user"][row]] != 1:
                    continue
                history = raw_history(data, batch, row)
                if batch["label"][row] == 1:
                    positive = item
                    found.append(item)
                else:
                    assert item >= 1000
                before = list(range(max(1, positive - 200), positive))
                assert history == [0] * (200 - len(before)) + before
                categories = batch["history_category"][row][200 - len(before) :]
                assert data.category_ids[categories].tolist() == [i % 5 for i in before]
                assert (batch["history_category"][row][: 200 - len(before)] == 0).all()
        assert found == want
        labels = np.concatenate([b["label"][b["user"] >= 0] for b in eval_samples(data, cfg)])
        np.testing.assert_array_equal(labels, np.tile([1, 0, 0], len(labels) // 3))


@pytest.mark.parametrize("num_events", range(2, 9))
def test_short_users_give_what_has_a_history(tmp_path, num_events):
    data = group(tmp_path, {1: range(1, num_events + 1), 2: range(50, 70)})
    for split, first in (("test", 0), ("validation", 1), ("train", 2)):
        cfg = config(split=split, min_events=num_events, stride=2, negatives=0)
        last = num_events - first
        want = [t for t in range(last, last - 6, -2) if t >= 2]
        want = want if split == "train" else want[:1] if last >= 2 else []
        rows = [
            (int(data.item_ids[b["item"][r]]), raw_history(data, b, r))
            for b in eval_samples(data, cfg)
            for r in np.flatnonzero((b["user"] >= 0) & (data.users[b["user"]] == 1))
        ]
        assert [item for item, _ in rows] == want
        for item, history in rows:
            before = list(range(max(1, item - 6), item))
            assert history == [0] * (6 - len(before)) + before


def test_negatives_are_never_known_and_follow_the_frequencies(tmp_path):
    """Chi-square over the items that the user does not know; seeds are fixed."""
    frequency = {10: 1, 11: 2, 12: 4, 13: 8, 14: 16, 15: 32}
    others = [item for item, count in frequency.items() for _ in range(count)]
    # Users 100.. ask about items 1, 2, 3, which make up most of the log: proposals miss often.
    users = {100 + u: [1, 2, 3] * 10 for u in range(100)} | {
        200: [*others, 1],
        201: others,
    }
    data = group(tmp_path, users)
    cfg = config(train_targets=15, min_events=30, stride=1, negatives=3, batch_size=64)
    drawn = []
    for batch in eval_samples(data, cfg):
        is_ours = (batch["label"] == 0) & (batch["user"] >= 0)
        is_ours &= np.isin(data.users[batch["user"]], range(100, 200))
        drawn.append(data.item_ids[batch["item"][is_ours]])
    drawn = np.concatenate(drawn)
    assert len(drawn) == 100 * 15 * 3
    assert set(drawn.tolist()) <= set(frequency)
    expected = np.asarray(list(frequency.values())) / 63 * len(drawn)
    observed = np.asarray([(drawn == item).sum() for item in frequency])
    chi_square = float((np.square(observed - expected) / expected).sum())
    assert chi_square < 15.1  # the 1 % point for 5 degrees of freedom
    # Drawing every item alike would not pass.
    uniform = np.full(6, len(drawn) / 6)
    assert (np.square(observed - uniform) / uniform).sum() > 100


def test_no_user_ever_gets_an_item_it_knows(small):
    data, users = small
    for split in ("train", "validation", "test"):
        for batch in eval_samples(data, config(split=split, min_events=5, negatives=4)):
            for row in np.flatnonzero(batch["user"] >= 0):
                user = int(data.users[batch["user"][row]])
                known = int(data.item_ids[batch["item"][row]]) in users[user]
                assert known == (batch["label"][row] == 1)


def test_a_user_who_knows_everything_is_an_error(tmp_path):
    data = group(tmp_path, {1: range(20), 2: range(10)})
    with pytest.raises(ValueError, match=r"\(id 1\) has events with all 20 items"):
        list(eval_samples(data, config()))
    assert list(eval_samples(data, config(negatives=0)))


def check_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resuming_in_the_middle_of_an_epoch(small, prefetch):
    cfg = config(prefetch=prefetch)
    epoch = -(-len(Samples(small[0], cfg)) // cfg.batch_size)
    whole = make_samples(small[0], cfg)
    want = take(whole, 2 * epoch + 3)
    for stop in (0, 1, epoch // 2, epoch, epoch + 1):
        first = make_samples(small[0], cfg)
        take(first, stop)
        state = json.loads(json.dumps(first.get_state()))
        second = make_samples(small[0], cfg)
        take(second, 3)
        second.set_state(state)
        check_equal(take(second, len(want) - stop), want[stop:])
        first.close()
        second.close()
    whole.close()


def test_an_epoch_holds_every_sample_once_and_the_next_is_in_another_order(small):
    cfg = config(batch_size=3)  # divides the number of samples
    size = len(Samples(small[0], cfg))
    batches = make_samples(small[0], cfg)
    key = lambda b, r: (int(b["user"][r]), int(b["item"][r]), *b["history_item"][r].tolist())
    epochs = [[key(b, r) for b in take(batches, size // 3) for r in range(3)] for _ in range(2)]
    ordered = [key(b, r) for b in eval_samples(small[0], cfg) for r in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(ordered)
    assert epochs[0] != epochs[1] and epochs[0] != ordered
    other = make_samples(small[0], config(batch_size=3, seed=1))
    assert [key(b, r) for b in take(other, size // 3) for r in range(3)] != epochs[0]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_split_the_global_batch(small, count):
    cfg = config()
    want = take(make_samples(small[0], cfg), 5)
    parts = [
        take(make_samples(small[0], cfg, process_index=i, process_count=count), 5)
        for i in range(count)
    ]
    joined = [{k: np.concatenate([p[n][k] for p in parts]) for k in want[n]} for n in range(5)]
    check_equal(joined, want)
    want = list(eval_samples(small[0], cfg))
    parts = [
        list(eval_samples(small[0], cfg, process_index=i, process_count=count))
        for i in range(count)
    ]
    joined = [{k: np.concatenate([p[n][k] for p in parts]) for k in b} for n, b in enumerate(want)]
    check_equal(joined, want)
    # A state of one process is the state of any.
    one = make_samples(small[0], cfg, process_index=1, process_count=count)
    take(one, 3)
    whole = make_samples(small[0], cfg)
    whole.set_state(one.get_state())
    check_equal(take(whole, 1), take(make_samples(small[0], cfg), 4)[3:])


def test_the_interface_of_a_batch(small):
    batch = next(make_samples(small[0], config()))
    kinds = {name: (value.dtype, value.shape) for name, value in batch.items()}
    assert kinds == {
        "item": (np.int32, (8,)),
        "category": (np.int32, (8,)),
        "history_item": (np.int32, (8, 6)),
        "history_category": (np.int32, (8, 6)),
        "label": (np.float32, (8,)),
        "user": (np.int32, (8,)),
    }
    last = list(eval_samples(small[0], config(batch_size=64)))[-1]
    filler = last["user"] < 0
    assert filler.any() and not filler.all()
    assert not last["history_item"][filler].any() and not last["item"][filler].any()


CASES = {
    "split": (dict(split="dev"), "split='dev' is not one of train, validation, test"),
    "history": (dict(history=0), "history=0 must be at least 1"),
    "stride": (dict(stride=-1), "stride=-1 must be at least 1"),
    "seed": (dict(seed=2**32), "seed=4294967296 must be below"),
    "users": (dict(min_events=99), "none of 30 users has min_events=99 events (the most is 34)"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_settings(name, small):
    changes, message = CASES[name]
    with pytest.raises(ValueError) as error:
        make_samples(small[0], config(**changes))
    assert message in str(error.value)


def test_more_bad_input(tmp_path, small):
    with pytest.raises(TypeError, match=r"stride=1.5 must be an integer"):
        config(stride=1.5)
    with pytest.raises(ValueError, match="batch_size=8 is not divisible by process_count=3"):
        make_samples(small[0], config(), process_count=3)
    with pytest.raises(ValueError, match="process_index=2 is not in 0 to 1"):
        make_samples(small[0], config(), process_index=2, process_count=2)
    with pytest.raises(ValueError, match="limit=0 must be at least 1"):
        eval_samples(small[0], config(), 0)
    lonely = group(tmp_path, {1: [1], 2: [2, 3]})
    with pytest.raises(ValueError, match="have none for 'train' that others come before"):
        make_samples(lonely, config(min_events=1))
    state = make_samples(small[0], config()).get_state()
    with pytest.raises(ValueError, match=r"other settings: seed was 0, is 5; use the same"):
        make_samples(small[0], config(seed=5)).set_state(state)
    with pytest.raises(ValueError, match="not a data state: description"):
        make_samples(small[0], config()).set_state({"step": 3})
