"""Ways to damage a file, as hypothesis strategies: every one gives the new bytes."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

DEEP = 60_000
NASTY = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1", "0", "1", "2", "3", "1.5", "true", "false",
    "null", "[]", "{}", '""', '"../bait/model.safetensors"', '"/etc/passwd"', '"a/../../b"',
    '"x"', '"\\u0000"', '"\\ud800"', "2147483647", "2147483648", "4294967296",
    "9223372036854775807", "18446744073709551615", "9" * 40, "9" * 400, "9" * 5000,
    "1e308", "1e-320",
    "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, '"' + "x" * 100_000 + '"',
    "[0, 1]", "[null]", '["F32"]', '{"a": {"b": []}}', "[" + "1," * 20_000 + "1]",
)  # fmt: skip
"""Values as JSON text, the last resort of a parser among them."""
LENGTHS = (0, 1, 7, 8, 2**16, 2**31, 2**40, 2**62, 2**63, 2**64 - 1)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "X", "", "f32")


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Paths to everything in a JSON value."""
    found = [path]
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        found += places(value, (*path, key))
    return found


def _edit(tree: Any, path: tuple, change) -> Any:
    """A copy of `tree` in which `change(container, key)` was applied to the place of `path`."""
    tree = json.loads(json.dumps(tree))
    at = tree
    for key in path[:-1]:
        at = at[key]
    change(at, path[-1])
    return tree


@st.composite
def damaged_json(draw, tree: Any, *, most: int = 3) -> bytes:
    """A JSON value with some of its parts replaced, removed, renamed or repeated."""
    raw: dict[str, str] = {}
    for number in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(places(tree)))
        value = draw(st.sampled_from(NASTY))
        mark = f"@@{number}@@"
        if not path:
            return value.encode()
        kind = draw(st.sampled_from(("set", "set", "set", "remove", "rename", "add")))
        if kind == "set":
            raw[mark] = value
            tree = _edit(tree, path, lambda at, key, mark=mark: at.__setitem__(key, mark))
        elif kind == "remove":
            tree = _edit(tree, path, lambda at, key: at.__delitem__(key))
        elif kind == "rename":
            name = draw(st.sampled_from(("", "x", "../x", "a" * 5000, "\x00", "__metadata__")))
            tree = _edit(tree, path, lambda at, key, name=name: _rename(at, key, name))
        else:
            raw[mark] = value
            tree = _edit(tree, path, lambda at, key, mark=mark: _add(at, key, mark))
        if not isinstance(tree, dict | list) or not tree:
            break
    text = json.dumps(tree)
    for mark, value in raw.items():
        text = text.replace(f'"{mark}"', value)
    if draw(st.booleans()) and text.startswith("{") and len(text) > 2:
        # Objects with a name twice.
        text = "{" + text[1:-1] + ", " + text[1:]
    return text.encode()


def _rename(at, key, name):
    if isinstance(at, dict):
        at[name] = at.pop(key)
    else:
        at.insert(0, at.pop(key))


def _add(at, key, mark):
    if isinstance(at, dict):
        at[f"{key}_more"] = mark
    else:
        at.insert(key, mark)


@st.composite
def damaged_bytes(draw, data: bytes) -> bytes:
    """Bytes flipped, cut off, put in, zeroed, or put in front."""
    size = max(len(data) - 1, 0)
    kind = draw(st.sampled_from(("flip", "flip", "cut", "insert", "zero", "empty", "front")))
    at = draw(st.integers(0, size) | st.integers(0, min(size, 200)))
    if kind == "flip":
        out = bytearray(data)
        for _ in range(draw(st.integers(1, 8))):
            at = draw(st.integers(0, size) | st.integers(0, min(size, 200)))
            if out:
                out[at] ^= draw(st.integers(1, 255))
        return bytes(out)
    if kind == "cut":
        return data[:at]
    if kind == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=40)) + data[at:]
    if kind == "zero":
        end = min(len(data), at + draw(st.integers(1, 400)))
        return data[:at] + bytes(end - at) + data[end:]
    return b"" if kind == "empty" else draw(st.binary(min_size=1, max_size=9)) + data


@st.composite
def damaged_safetensors(draw, data: bytes) -> bytes:
    """A file whose header lies: about its length, shapes, types, and where tensors are."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = sorted(n for n in header if n != "__metadata__")
    kind = draw(st.sampled_from(("length", "shape", "dtype", "offsets", "overlap", "json", "twice",
                                 "bytes", "body")))  # fmt: skip
    if kind == "bytes":
        return draw(damaged_bytes(data))
    if kind == "body":
        return data[: 8 + length] + draw(damaged_bytes(body))
    if kind == "length":
        lie = draw(st.sampled_from(LENGTHS) | st.integers(max(0, length - 9), length + 9))
        return lie.to_bytes(8, "little") + data[8:]
    if kind == "json":
        return _pack(draw(damaged_json(header)), body)
    name = draw(st.sampled_from(names))
    entry = dict(header[name])
    if kind == "shape":
        sizes = st.sampled_from((0, 1, -1, 2**31, 2**40, 2**63, 1.5)) | st.integers(0, 64)
        entry["shape"] = draw(st.lists(sizes, max_size=6))
    elif kind == "dtype":
        entry["dtype"] = draw(st.sampled_from(DTYPES))
    elif kind == "offsets":
        ends = st.sampled_from((0, 1, -1, 2**31, 2**63, len(body), len(body) + 1))
        entry["data_offsets"] = draw(st.lists(ends | st.integers(0, len(body)), max_size=3))
    elif kind == "overlap":
        entry["data_offsets"] = header[draw(st.sampled_from(names))]["data_offsets"]
    text = json.dumps(header | {name: entry})
    if kind == "twice":
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    return _pack(text.encode(), body)


def _pack(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body
