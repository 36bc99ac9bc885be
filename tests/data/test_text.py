import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxheads.data import open_source
from jaxheads.data.text import _cut


def jsonl(rows, field="text"):
    return "".join(json.dumps({field: row}) + "\n" for row in rows)


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text if isinstance(text, bytes) else text.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "héllo\nyou", ["héllo\nyou"]),
        ("a.txt.gz", "héllo", ["héllo"]),
        ("a.py", "x = 1\n", ["x = 1\n"]),
        ("README", "no suffix", ["no suffix"]),
        ("a.jsonl", jsonl(["one", "twö\n2"]), ["one", "twö\n2"]),
        ("a.jsonl.gz", jsonl(["one", "two"]) + "\n\n", ["one", "two"]),
        ("a.ndjson", jsonl(["one", "  ", ""]) + '{"text": "last"}', ["one", "last"]),
    ],
)
def test_formats(tmp_path, name, content, expected):
    source = open_source(put(tmp_path / name, content))
    assert list(source) == expected
    assert len(source) == len(expected)
    assert source[-1] == expected[-1]
    with pytest.raises(IndexError):
        source[len(expected)]


def test_field(tmp_path):
    path = put(tmp_path / "a.jsonl", jsonl(["x"], field="story"))
    assert list(open_source(path, field="story")) == ["x"]


def test_directory_is_recursive_sorted_and_text_only(tmp_path):
    for name in ("b.txt", "a/z.md", "a/c.py", "a.txt", "d/x.jsonl.gz"):
        put(tmp_path / name, jsonl([name]) if ".jsonl" in name else name)
    for name in ("x.png", ".hidden.txt", ".git/config.txt", "model.bin"):
        put(tmp_path / name, b"\xff\xfe")
    expected = ["a/c.py", "a/z.md", "a.txt", "b.txt", "d/x.jsonl.gz"]
    assert list(open_source(str(tmp_path))) == expected


def test_globs_and_lists(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "sub/c.txt", "d.log"):
        put(tmp_path / name, name)
    monkeypatch.chdir(tmp_path)
    assert list(open_source("*.txt")) == ["a.txt", "b.txt"]
    assert list(open_source("**/*.txt")) == ["a.txt", "b.txt", "sub/c.txt"]
    assert list(open_source(["d.log", "*.txt", "a.txt"])) == ["d.log", "a.txt", "b.txt"]


@given(st.text(alphabet="ab \né日😀", max_size=300), st.integers(16, 64))
def test_pieces_join_to_the_file(tmp_path_factory, text, max_bytes):
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_bytes(text.encode())
    if not text.strip():
        with pytest.raises(ValueError, match="corpus is empty"):
            open_source(str(path), max_document_bytes=max_bytes)
        return
    source = open_source(str(path), max_document_bytes=max_bytes)
    assert all(len(piece.encode()) <= max_bytes for piece in source)
    # Pieces of white space only are left out; nothing else is.
    assert "".join("".join(source).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"aaaa\nbb\n\ncc\nd", 9),  # after the blank line
        (b"aaaa\nbb\ncc", 8),  # after the last line
        (b"a\n\nbbbbbbbb", 10),  # the blank line is too early
        ("aaaa日".encode(), 4),  # before a character that may be incomplete
        ("aaaa日".encode()[:-1], 4),
        ("aaa😀".encode()[:-1], 3),
    ],
)
def test_cut(data, expected):
    assert _cut(data) == expected


def test_split_is_disjoint_complete_and_stable(tmp_path):
    texts = [f"document {i}" for i in range(1000)]
    source = open_source(put(tmp_path / "a.jsonl", jsonl(texts)))
    train, held_out = source.split("train", 0.1), source.split("validation", 0.1)
    assert sorted([*train, *held_out]) == sorted(texts)
    assert not set(train) & set(held_out)
    assert 70 < len(held_out) < 130  # binomial, three standard deviations
    # Recorded: the split may not change between machines or versions.
    assert list(held_out)[:3] == HELD_OUT
    # The order, the format and the other documents do not matter.
    other = open_source(put(tmp_path / "b.jsonl.gz", jsonl(texts[500::-1])))
    assert set(other.split("validation", 0.1)) == set(held_out) & set(texts[:501])
    # A larger share holds out the same documents and more.
    assert set(held_out) < set(source.split("validation", 0.2))
    assert source.split("all", 0.1) is source
    assert source.digest != train.digest != held_out.digest


HELD_OUT = ["document 17", "document 18", "document 20"]


def test_unpacked_copies_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    os.mkdir(tmp_path / "tmp")
    source = open_source(put(tmp_path / "a.jsonl.gz", jsonl(["one", "two"])))
    part = source.split("train", 0.0)
    del source
    assert list(part) == ["one", "two"]
    assert len(os.listdir(tmp_path / "tmp")) == 1
    del part
    assert os.listdir(tmp_path / "tmp") == []
    with pytest.raises(ValueError, match="line 1"):
        open_source(put(tmp_path / "b.jsonl.gz", "{"))
    assert os.listdir(tmp_path / "tmp") == []


def test_stdlib():
    source = open_source("stdlib")
    assert source.num_bytes > 2_000_000
    assert any("def dataclass(" in text for text in source)
    assert all(len(text.encode()) <= 16384 for text in source)
    again = open_source("stdlib")
    assert again.digest == source.digest


def test_wikitext_is_cut_at_lines():
    path = Path(__file__).parents[2] / "../shared/data/wikitext-2/test.txt.gz"
    if not path.exists():
        pytest.skip("no shared data")
    source = open_source(str(path))
    assert len(source) >= 39  # 629,739 bytes in pieces of at most 16,384
    assert all(text.endswith("\n") for text in source)
    assert "".join(source) == gzip.decompress(path.read_bytes()).decode()


def test_changed_file(tmp_path):
    path = put(tmp_path / "a.txt", "some text")
    source = open_source(path)
    put(tmp_path / "a.txt", "some")
    with pytest.raises(ValueError, match="changed after it was indexed"):
        source[0]


BAD = {
    "missing file": (lambda d: "none.txt", r"none\.txt does not exist \(looked from "),
    "no glob match": (lambda d: f"{d}/*.txt", r"no file matches the glob"),
    "no text files": (lambda d: os.path.dirname(put(d / "s/x.png", "")), "searched it recursively"),
    "empty file": (lambda d: put(d / "a.txt", ""), r"corpus is empty: 1 file\(s\)"),
    "blank file": (lambda d: put(d / "a.jsonl", "\n \n"), "corpus is empty"),
    "field": (
        lambda d: put(d / "a.jsonl", '{"text": "x"}\n{"body": "y"}\n'),
        r"a\.jsonl, line 2 has no field 'text'; its fields are 'body'",
    ),
    "field type": (lambda d: put(d / "a.jsonl", '{"text": 3}'), "line 1: field 'text' holds a int"),
    "JSON": (lambda d: put(d / "a.jsonl", '{"text": "x"}\n\n{"te'), "line 3 is not valid JSON"),
    "surrogate": (lambda d: put(d / "a.jsonl", '{"text": "\\ud83d"}'), "is not Unicode text"),
    "not an object": (lambda d: put(d / "a.jsonl", "[1]"), "line 1 holds a list"),
    "JSON bytes": (lambda d: put(d / "a.jsonl", b'{"text": "\xff"}'), "line 1 is not UTF-8"),
    "bytes": (
        lambda d: put(d / "a.txt", ("é" * 30).encode() + b"caf\xe9 au lait"),
        r"a\.txt is not UTF-8 text \(byte 63 is 0xe9\); convert it",
    ),
    "gzip": (
        lambda d: _cut_file(put(d / "a.txt.gz", "word " * 9999)),
        "a.txt.gz is truncated or is not gzip",
    ),
    "not gzip": (lambda d: _rename(put(d / "a.txt", "x"), d / "a.txt.gz"), "is not gzip"),
    "json": (lambda d: put(d / "a.json", "[]"), r"write one JSON object per line"),
    "parquet": (lambda d: put(d / "a.parquet", "x"), r"convert it to \.jsonl"),
    "pickle": (lambda d: put(d / "a.pt", "x"), "pickles are never read"),
}


def _cut_file(path):
    with open(path, "r+b") as stream:
        stream.truncate(os.path.getsize(path) // 2)
    return path


def _rename(path, new):
    os.rename(path, new)
    return str(new)


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        open_source(make(tmp_path), max_document_bytes=16)


def test_bad_arguments(tmp_path):
    source = open_source(put(tmp_path / "a.txt", "x"))
    with pytest.raises(ValueError, match="split='test' is not one of train, validation, all"):
        source.split("test", 0.1)
    with pytest.raises(ValueError, match=r"validation_fraction=1\.5"):
        source.split("train", 1.5)
    with pytest.raises(ValueError, match="is empty: the corpus has 1 documents"):
        source.split("validation", 0.0)
    with pytest.raises(ValueError, match="max_document_bytes=3"):
        open_source(str(tmp_path / "a.txt"), max_document_bytes=3)
