"""Logs of behaviours: rows and what is wrong with them, and grouping against a plain reference."""

import gzip
import json
import re
import tracemalloc
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxheads.data import behaviour_logs, group_events, open_behaviours
from jaxheads.data.behaviour_logs import Events, open_log
from tests.data.behaviour_files import (
    movielens_lines,
    random_events,
    taobao_lines,
    tmall_lines,
    write,
)

MOVIELENS = Path(__file__).parents[2] / "../shared/data/movielens-latest-small"


def read(log):
    """All events [n,4] of a log."""
    return np.concatenate([np.stack(events[:4], 1) for events in log])


def reference(events):
    """Per user (item, category, time) in order of (time, place in the log), by plain sorting."""
    found = defaultdict(list)
    for place, (user, item, category, time) in enumerate(events.tolist()):
        found[user].append((time, place, item, category))
    return {user: [(i, c, t) for t, _, i, c in sorted(rows)] for user, rows in found.items()}


def grouped(data):
    """The same from a data set, in the ids of the log."""
    found = {}
    for u, user in enumerate(data.users.tolist()):
        here = slice(data.offsets[u], data.offsets[u + 1])
        item, category = data.item_ids[data.item[here]], data.category_ids[data.category[here]]
        found[user] = list(zip(item.tolist(), category.tolist(), data.time[here].tolist()))
    return found


EVENTS = random_events(0, users=40, items=60, categories=7, rows=3000)


@pytest.mark.parametrize("block_bytes", [1, 37, 4096, 1 << 22])
def test_taobao_rows_do_not_depend_on_blocks(tmp_path, block_bytes):
    write(tmp_path / "UserBehavior.csv", taobao_lines(EVENTS[:300]))
    log = open_log("taobao", tmp_path, block_bytes=block_bytes)
    np.testing.assert_array_equal(read(log), EVENTS[:300])
    assert (log.report.rows, log.report.kept, log.report.malformed) == (300, 300, 0)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tmall_rows(tmp_path, end):
    write(tmp_path / "user_log_format1.csv", tmall_lines(EVENTS), end)
    np.testing.assert_array_equal(read(open_log("tmall", tmp_path)), EVENTS)


def test_gzip_and_a_file_without_a_last_line_break(tmp_path):
    text = "\n".join(taobao_lines(EVENTS))
    (tmp_path / "UserBehavior.csv.gz").write_bytes(gzip.compress(text.encode()))
    np.testing.assert_array_equal(read(open_log("taobao", tmp_path)), EVENTS)
    damaged = gzip.compress(text.encode())[:-2000]
    (tmp_path / "UserBehavior.csv.gz").write_bytes(damaged)
    with pytest.raises(ValueError, match="truncated or is not gzip"):
        read(open_log("taobao", tmp_path))


def test_movielens_takes_ratings_of_4_and_the_first_genre(tmp_path):
    write(
        tmp_path / "movies.csv",
        [
            "movieId,title,genres",
            "5,Old (1995),Drama|War",
            '16,"Comma, A (1996)",War',
            "27,None (1997),",
            "28,Unquoted, comma (1997),War",
        ],
    )
    rows = ["1,5,4.0,9", "1,16,3.5,10", "1,16,5,8", "2,27,4.5,7", "2,28,5.0,7", "2,5,4.7,1"]
    write(tmp_path / "ratings.csv", ["userId,movieId,rating,timestamp", *rows])
    log = open_log("movielens", tmp_path)
    events = read(log)
    names = [log.category_names[c] for c in events[:, 2]]
    assert events[:, [0, 1, 3]].tolist() == [[1, 5, 9], [1, 16, 8], [2, 27, 7]]
    assert names == ["Drama", "War", "(no genres listed)"]
    assert [str(row) for row in log.report.first_malformed] == [
        "movies.csv, line 5: '28,Unquoted, comma (1997),War' is not movieId,title,genres",
        "ratings.csv, line 6: movieId is not in movies.csv",
        "ratings.csv, line 7: unknown rating",
    ]


BAD = {
    "1,2,3,pv": "4 fields, needed 5",
    "1,2,3,pv,4,5": "6 fields, needed 5",
    "x,2,3,pv,4": "user is not a number",
    "-1,2,3,pv,4": "user is not a number",
    "1,2.5,3,pv,4": "item is not a number",
    "1,,3,pv,4": "item is not a number",
    "1, 2,3,pv,4": "item is not a number",
    "1,2,1234567890123456789,pv,4": "category is not a number",
    "1,2,3,view,4": "unknown behaviour",
    "1,2,3,p,4": "unknown behaviour",
    "1,2,3,pv,-": "timestamp is not a number",
    "1,2,3,pv,٤": "timestamp is not a number",
    '"1",2,3,pv,4': "user is not a number",
    "\x00\x00\x00": "1 fields, needed 5",
}


@pytest.mark.parametrize("block_bytes", [50, 1 << 20])
def test_malformed_rows_are_counted_with_their_lines(tmp_path, block_bytes):
    good = taobao_lines(EVENTS[:200])
    lines = list(good)
    for number, row in enumerate(BAD):
        lines.insert(10 * number, row)  # line 10 * number + 1
    lines[5] += "\n"  # an empty line moves all later ones
    write(tmp_path / "UserBehavior.csv", [*lines, "7,8,9,buy,5", "7,8,9,pv,-5"])
    log = open_log("taobao", tmp_path, block_bytes=block_bytes)
    events = read(log)
    np.testing.assert_array_equal(events, [*EVENTS[:200].tolist(), [7, 8, 9, -5]])
    report = log.report
    assert (report.rows, report.kept, report.other) == (len(lines) + 2, 201, 1)
    assert report.malformed == len(BAD)
    want = [
        f"UserBehavior.csv, line {10 * n + 1 + (n > 0)}: {reason}"
        for n, reason in enumerate(BAD.values())
    ]
    assert [str(row) for row in report.first_malformed] == want[:10]
    assert f"and {len(BAD) - 10} more" in str(report)
    with pytest.raises(ValueError, match="more than max_bad_rows=3 malformed rows") as error:
        read(open_log("taobao", tmp_path, max_bad_rows=3, block_bytes=block_bytes))
    assert "line 12: 6 fields, needed 5" in str(error.value)
    assert len(read(open_log("taobao", tmp_path, max_bad_rows=len(BAD)))) == 201


def naive(text):
    """(kept rows, lines of malformed rows) of a Taobao file, line by line."""
    kept, malformed = [], []
    for number, line in enumerate(text.split("\n"), 1):
        fields = line.removesuffix("\r").split(",")
        if fields == [""]:
            continue
        ids = [*fields[:3], *fields[4:5]]
        is_good = len(fields) == 5 and all(re.fullmatch(r"-?[0-9]{1,18}", f) for f in ids)
        is_good = is_good and all(int(f) >= 0 for f in ids[:3])
        if not is_good or fields[3] not in ("pv", "buy", "cart", "fav"):
            malformed.append(number)
        elif fields[3] == "pv":
            kept.append([int(f) for f in ids])
    return kept, malformed


FIELDS = st.sampled_from(
    ["0", "7", "-1", "-0", "12", "", "-", "9" * 18, "9" * 19, " 1", "1.0", "é"]
)
ROWS = st.tuples(FIELDS, FIELDS, FIELDS, st.sampled_from(["pv", "buy", "p", ""]), FIELDS)
LINES = st.one_of(ROWS.map(",".join), st.text("01-,pv\r", max_size=12), st.just("3,4,5,pv,6"))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(LINES, max_size=8), st.sampled_from(["\n", "\r\n"]), st.integers(1, 40))
def test_any_text_is_read_as_line_by_line(tmp_path_factory, lines, end, block_bytes):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    text = end.join(lines)
    path.write_bytes(text.encode())
    log = open_log("taobao", path, block_bytes=block_bytes)
    chunks = [np.stack(events[:4], 1) for events in log]
    kept, malformed = naive(text)
    assert (np.concatenate(chunks).tolist() if chunks else []) == kept
    assert log.report.malformed == len(malformed)
    assert [row.line for row in log.report.first_malformed] == malformed[:10]


def test_actions_to_keep(tmp_path):
    lines = [*taobao_lines(EVENTS[:5]), *taobao_lines(EVENTS[5:7], "buy"), *taobao_lines(
        EVENTS[7:8], "fav"
    )]  # fmt: skip
    write(tmp_path / "UserBehavior.csv", lines)
    np.testing.assert_array_equal(
        read(open_log("taobao", tmp_path, keep=["buy", "pv"])), EVENTS[:7]
    )


def bad_log(dataset="taobao", lines=(), name="UserBehavior.csv", **options):
    def case(tmp):
        write(tmp / name, lines)
        return read(open_log(dataset, tmp, **options))

    return case


CASES = {
    "data set": (bad_log("taobo"), "unknown dataset 'taobo'; did you mean 'taobao'?"),
    "action": (bad_log(keep=["view"]), "unknown behaviour 'view'"),
    "max_bad_rows": (bad_log(max_bad_rows=-1), "max_bad_rows=-1 must be at least 0"),
    "block": (bad_log(block_bytes=0), "block_bytes=0 must be at least 1"),
    "no file": (bad_log("tmall", name="x.csv"), "needed user_log_format1.csv or user_log_format1"),
    "no folder": (lambda tmp: open_log("tmall", tmp / "none"), "none, which does not exist"),
    "header": (
        bad_log("tmall", taobao_lines(EVENTS[:3]), "user_log_format1.csv"),
        "needed 'user_id,item_id,cat_id,seller_id",
    ),
    "no films": (
        bad_log("movielens", movielens_lines(EVENTS[:3]), "ratings.csv"),
        "needed movies.csv or movies.csv.gz",
    ),
    "no lines": (bad_log(lines=["1" * 200_000], block_bytes=64), "is not comma-separated text"),
    "empty": (
        lambda tmp: group_events(
            open_log("taobao", write(tmp / "a.csv", ["1,2,3,buy,4"])), tmp / "g"
        ),
        "the log holds no events: 1 rows: 0 kept, 1 of other actions",
    ),
    "exists": (lambda tmp: group_events([], tmp), "exists; give a new directory"),
    "bucket": (lambda tmp: group_events([], tmp / "g", bucket_rows=0), "bucket_rows=0 must be"),
    "no data set": (lambda tmp: open_behaviours(tmp), "holds no complete grouped data set"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, tmp_path):
    case, message = CASES[name]
    with pytest.raises(ValueError) as error:
        case(tmp_path)
    assert message in str(error.value)
    assert not list(tmp_path.glob(".g-*"))  # nothing half done stays


@pytest.mark.parametrize("bucket_rows", [1, 20, 1 << 20])
def test_grouping_is_that_of_a_plain_sort(tmp_path, bucket_rows):
    write(tmp_path / "UserBehavior.csv", ["no row", *taobao_lines(EVENTS)])
    log = open_log("taobao", tmp_path, block_bytes=1000)
    data = group_events(log, tmp_path / "grouped", bucket_rows=bucket_rows)
    want = reference(EVENTS)
    assert grouped(data) == want
    # Numbers follow the order of first events.
    item = EVENTS[:, 1]
    assert data.item_ids[1:].tolist() == list(dict.fromkeys(item.tolist()))
    assert data.category_ids[1:].tolist() == list(dict.fromkeys(EVENTS[:, 2].tolist()))
    for number, raw in enumerate(data.item_ids[1:].tolist(), 1):
        assert data.item_counts[number] == (item == raw).sum()
        assert data.category_ids[data.item_category[number]] == raw % 7 + 100
    assert data.item_counts[0] == 0 and data.item_category[0] == 0
    last, seen, unsorted, repeated = {}, set(), [], []
    for number, (user, raw, _, time) in enumerate(EVENTS.tolist(), 2):  # line 1 is not a row
        unsorted += [number] if time < last.get(user, time) else []
        repeated += [number] if (user, raw, time) in seen else []
        last[user] = time
        seen.add((user, raw, time))
    assert unsorted and repeated
    for kind, lines in (("unsorted", unsorted), ("repeated", repeated), ("other_category", [])):
        assert data.info[f"{kind}_events"] == len(lines)
        assert data.info[f"first_{kind}_lines"] == lines[:10]
    assert data.info["log"]["kept"] == data.info["num_events"] == len(EVENTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["UserBehavior.csv", "grouped"]


def test_an_item_of_two_categories_keeps_both_and_its_first(tmp_path):
    one = np.asarray([[1, 50, 7, 3], [1, 50, 8, 2], [2, 50, 8, 1]])
    data = group_events([Events(*one.T)], tmp_path / "grouped")
    assert data.info["other_category_events"] == 2
    assert data.info["first_other_category_lines"] == [2, 3]
    assert data.info["first_unsorted_lines"] == [2]
    assert data.category_ids[data.item_category[1]] == 7
    assert grouped(data)[1] == [(50, 8, 2), (50, 7, 3)]


def test_one_user_larger_than_a_bucket(tmp_path):
    events = EVENTS.copy()
    events[:, 0] = 9
    data = group_events([Events(*events.T)], tmp_path / "grouped", bucket_rows=100)
    assert grouped(data) == reference(events)


def test_a_damaged_data_set_is_refused(tmp_path):
    data = group_events([Events(*EVENTS.T)], tmp_path / "grouped")
    assert open_behaviours(tmp_path / "grouped").num_users == data.num_users
    np.save(tmp_path / "grouped/users.npy", np.asarray(data.users)[:-1])
    with pytest.raises(ValueError, match=r"users.npy holds int64\[\d+\], needed int64\[\d+\]"):
        open_behaviours(tmp_path / "grouped")
    info = tmp_path / "grouped/dataset.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"format": "other"}))
    with pytest.raises(ValueError, match="its format is not"):
        open_behaviours(tmp_path / "grouped")


def test_user_events_are_checked(tmp_path):
    data = group_events([Events(*EVENTS.T)], tmp_path / "grouped")
    item, category = data.user_events(3)
    assert len(item) == len(category) == data.offsets[4] - data.offsets[3]
    with pytest.raises(ValueError, match="user 40 is not in 0 to 39"):
        data.user_events(40)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_log(tmp_path):
    """Eight times the rows, and users, over the same items: the peak stays."""

    def peak(rows):
        folder = tmp_path / str(rows)
        folder.mkdir()
        events = random_events(1, users=rows // 50, items=100, categories=5, rows=rows)
        write(folder / "UserBehavior.csv", taobao_lines(events))
        del events
        tracemalloc.start()
        log = open_log("taobao", folder, block_bytes=1 << 15)
        group_events(log, folder / "grouped", bucket_rows=2000)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    small, large = peak(20_000), peak(160_000)
    file_size = (tmp_path / "160000/UserBehavior.csv").stat().st_size
    assert large < 1.1 * small
    assert large < file_size


def test_movielens_as_it_is(tmp_path):
    if not MOVIELENS.is_dir():
        pytest.skip("no shared data")
    log = open_log("movielens", MOVIELENS)
    data = group_events(log, tmp_path / "grouped")
    assert log.report.rows == 79_993 and log.report.malformed == 0
    assert (data.num_users, data.info["num_events"]) == (499, 39_347)
    toy_story = int(np.flatnonzero(data.item_ids == 1)[0])
    names = data.info["category_names"]
    assert names[data.item_category[toy_story] - 1] == "Adventure"
    assert (np.diff(data.time[data.offsets[0] : data.offsets[1]]) >= 0).all()


def test_every_layout_has_its_columns():
    for layout in behaviour_logs.LAYOUTS.values():
        names = (layout.user, layout.item, layout.time, layout.action)
        assert {*names, *([layout.category] if layout.category else [])} <= set(layout.columns)
        assert set(layout.keep) <= set(layout.actions)
