"""Documents from files: a random-access sequence of texts that stays on disk.

What a document is:
- one line of a `.jsonl`/`.ndjson` file (the string under `field`);
- a text file (`.txt`, `.py`, `.md`, ...), when it is at most `max_document_bytes` long;
- a piece of a longer text file, cut after the last blank line that fits, else after the last line
  that fits, else between two characters.
Any of them may be compressed with gzip (`.gz`); it is then unpacked once to a temporary file.
Files are read through once to index them (offset, length and hash of every document) and to find
errors before training starts. Documents of white space only are left out.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import glob
import gzip
import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

STDLIB = "stdlib"
SPLITS = ("train", "validation", "all")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".tsv"),
    *(".py", ".pyi", ".c", ".cc", ".cpp", ".h", ".hpp", ".css", ".go", ".java", ".js", ".rs"),
    *(".sh", ".toml", ".ts", ".yaml", ".yml"),
)
_UNREADABLE = {
    ".json": "write one JSON object per line and name it .jsonl",
    ".parquet": "convert it to .jsonl",
    ".arrow": "convert it to .jsonl",
    ".bz2": "unpack it, or compress it with gzip",
    ".xz": "unpack it, or compress it with gzip",
    ".zst": "unpack it, or compress it with gzip",
    ".zip": "unpack it and give the directory",
    ".tar": "unpack it and give the directory",
    ".npy": "token arrays are not read; give the text",
    ".bin": "binary files are not read; give the text",
    ".pt": "pickles are never read; give the text",
    ".safetensors": "this holds weights; give the text",
}
# Directories of the standard library that hold other packages, or tests in odd encodings.
_STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class _File:
    name: str  # what the user gave, for messages
    path: str  # where the plain bytes are: the file, or its unpacked copy
    is_jsonl: bool


class Source(Sequence[str]):
    """A random-access sequence of documents; `source[i]` reads one document from disk.

    Make one with `open_source`. Holds 32 bytes per document in memory, never the text.
    """

    def __init__(
        self,
        files: Sequence[_File],
        index: np.ndarray,
        hashes: np.ndarray,
        field: str,
        owner: Source | None = None,
    ):
        self._owner = owner  # a split keeps the whole source, and so its unpacked copies, alive
        self._files = tuple(files)
        self._index = index  # [N,3] int64: file, offset, length
        self._hashes = hashes  # [N] uint64
        self._field = field

    def __repr__(self) -> str:
        return f"Source({len(self)} documents, {self.num_bytes} bytes, {len(self._files)} files)"

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> str:  # type: ignore[override]
        if not -len(self) <= i < len(self):
            raise IndexError(f"document {i} of a source of {len(self)} documents")
        number, offset, length = self._index[i].tolist()
        file = self._files[number]
        with open(file.path, "rb") as stream:
            stream.seek(offset)
            data = stream.read(length)
        try:
            if len(data) != length:
                raise ValueError(f"{length} bytes wanted at {offset}, {len(data)} found")
            return json.loads(data)[self._field] if file.is_jsonl else data.decode("utf-8")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file.name} changed after it was indexed ({error}); leave the data alone while "
                "it is in use and start again"
            ) from error

    @property
    def num_bytes(self) -> int:
        """Bytes of all documents on disk (JSON lines with their syntax)."""
        return int(self._index[:, 2].sum())

    @property
    def digest(self) -> str:
        """A short hash of the documents and their order."""
        return hashlib.blake2b(self._hashes.tobytes(), digest_size=8).hexdigest()

    def split(self, split: str, validation_fraction: float) -> Source:
        """The training or the held-out documents.

        A document is held out when hash(text) / 2^64 < validation_fraction: a property of its
        text alone, so the same on every machine, in every order, and for every copy of it.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
        if not 0 <= validation_fraction < 1:
            raise ValueError(
                f"validation_fraction={validation_fraction} must be at least 0 and below 1"
            )
        if split == "all":
            return self
        held_out = self._hashes < np.uint64(validation_fraction * 2**64)
        keep = held_out if split == "validation" else ~held_out
        if not keep.any():
            raise ValueError(
                f"split={split!r} with validation_fraction={validation_fraction} is empty: the "
                f"corpus has {len(self)} documents; change validation_fraction, lower "
                "max_document_bytes, or use split='all' with a separate file"
            )
        return Source(self._files, self._index[keep], self._hashes[keep], self._field, owner=self)


def open_source(
    paths: str | Sequence[str], *, field: str = "text", max_document_bytes: int = 16384
) -> Source:
    """Finds and indexes the documents of files, directories and globs.

    Args:
      paths: each a file, a directory (searched recursively for text-like and .jsonl files; hidden
        ones are skipped), a glob pattern, or 'stdlib': the source of the Python standard library
        on this machine, without its tests. Files keep the order of `paths`, sorted within one.
      field: key of the text in .jsonl files.
      max_document_bytes: longer text files are cut into pieces (see the module's docstring).
    """
    if max_document_bytes < 16:
        raise ValueError(f"max_document_bytes={max_document_bytes} must be at least 16")
    paths = [paths] if isinstance(paths, str) else list(paths)
    found = dict.fromkeys(name for path in paths for name in _find_files(path))
    skip_undecodable = paths == [STDLIB]  # not ours to repair; most releases have one or two
    files: list[_File] = []
    index, hashes, copies = array.array("q"), bytearray(), []
    try:
        for name in found:
            file = _open_file(name, copies)
            start, start_hashes = len(index), len(hashes)
            try:
                for offset, length, text in _scan(file, field, max_document_bytes):
                    if text.strip():
                        index.extend((len(files), offset, length))
                        hashes += hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
            except _UndecodableError:
                if not skip_undecodable:
                    raise
                del index[start:], hashes[start_hashes:]
            files.append(file)
        if not index:
            raise ValueError(
                f"the corpus is empty: {len(found)} file(s) in {', '.join(paths)} hold no text"
            )
    except BaseException:
        _remove(copies)
        raise
    rows = np.asarray(index, np.int64).reshape(-1, 3)  # [N,3]
    source = Source(files, rows, np.frombuffer(bytes(hashes), "<u8"), field)
    weakref.finalize(source, _remove, copies)
    return source


class _UndecodableError(ValueError):
    """A file that is not UTF-8."""


def _remove(copies: Sequence[str]) -> None:
    for copy in copies:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(copy)


def _suffix(name: str) -> str:
    return Path(name.removesuffix(".gz")).suffix.lower()


def _find_files(path: str) -> list[str]:
    """The files one entry of `paths` means, in a deterministic order."""
    if path == STDLIB:
        root = sysconfig.get_path("stdlib")
        return _walk(root, lambda name: name.endswith(".py"), _STDLIB_SKIP)
    path = os.path.expanduser(path)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        suffixes = TEXT_SUFFIXES + JSONL_SUFFIXES
        files = _walk(path, lambda name: _suffix(name) in suffixes, set())
        if not files:
            raise ValueError(
                f"directory {path} holds no text files; searched it recursively for "
                f"{' '.join(suffixes)} (and the same with .gz); name other files by a glob, "
                f"for example '{path}/**/*.log'"
            )
        return files
    if not glob.has_magic(path):
        raise ValueError(
            f"data file {path} does not exist (looked from {os.getcwd()}); give a file, a "
            f"directory, a glob, or {STDLIB!r}"
        )
    files = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    if not files:
        raise ValueError(
            f"no file matches the glob {path!r} (looked from {os.getcwd()}); ** spans "
            "directories, and quote the pattern in a shell"
        )
    return files


def _walk(root: str, accepts: Callable[[str], bool], skip: set[str]) -> list[str]:
    """Accepted files below `root`, sorted by path, without hidden ones."""
    found = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(
            d for d in subdirectories if d not in skip and not d.startswith(".")
        )
        found += [os.path.join(directory, n) for n in names if not n.startswith(".") and accepts(n)]
    return sorted(found, key=lambda name: Path(name).relative_to(root).parts)


def _open_file(name: str, copies: list[str]) -> _File:
    suffix = _suffix(name)
    if suffix in _UNREADABLE:
        raise ValueError(f"cannot read {name} as text: {_UNREADABLE[suffix]}")
    if not name.endswith(".gz"):
        return _File(name, name, suffix in JSONL_SUFFIXES)
    handle, copy = tempfile.mkstemp(prefix="jaxheads-", suffix=suffix)
    copies.append(copy)
    try:
        with os.fdopen(handle, "wb") as unpacked, gzip.open(name) as packed:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{name} is truncated or is not gzip ({error}); copy it again (`gzip -t` checks it)"
        ) from error
    return _File(name, copy, suffix in JSONL_SUFFIXES)


def _scan(file: _File, field: str, max_bytes: int) -> Iterator[tuple[int, int, str]]:
    """Offset, length and text of every document of a file."""
    with open(file.path, "rb") as stream:
        if file.is_jsonl:
            yield from _scan_jsonl(stream, file.name, field)
        else:
            yield from _scan_text(stream, file.name, max_bytes)


def _scan_jsonl(stream: IO[bytes], name: str, field: str) -> Iterator[tuple[int, int, str]]:
    offset = 0
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield offset, len(line), _json_text(line, f"{name}, line {number}", field)
        offset += len(line)


def _json_text(line: bytes, where: str, field: str) -> str:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise _UndecodableError(f"{where} is not UTF-8 ({error}); convert the file") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} is not valid JSON ({error}); each line must hold one object such as "
            f'{{"{field}": "..."}}'
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} holds a {type(row).__name__}; it must hold a JSON object")
    if field not in row:
        raise ValueError(
            f"{where} has no field {field!r}; its fields are {', '.join(map(repr, row)) or 'none'}"
            "; name the one with the text (field=...)"
        )
    if not isinstance(row[field], str):
        raise ValueError(
            f"{where}: field {field!r} holds a {type(row[field]).__name__}; it must be a string"
        )
    try:
        row[field].encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair: "\\ud83d"
        raise ValueError(
            f"{where}: field {field!r} is not Unicode text ({error}); remove the line or write the "
            "file again with whole characters"
        ) from error
    return row[field]


def _scan_text(stream: IO[bytes], name: str, max_bytes: int) -> Iterator[tuple[int, int, str]]:
    offset, data = 0, b""
    while True:
        data += stream.read(max_bytes + 1 - len(data))  # one more byte tells whether this is all
        if not data:
            return
        length = len(data) if len(data) <= max_bytes else _cut(data[:max_bytes])
        try:
            text = data[:length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _UndecodableError(
                f"{name} is not UTF-8 text (byte {offset + error.start} is "
                f"{data[error.start]:#04x}); convert it, for example "
                "`iconv -f latin1 -t utf-8 OLD > NEW`, or leave it out"
            ) from error
        yield offset, length, text
        offset, data = offset + length, data[length:]


def _cut(data: bytes) -> int:
    """Where to end a piece that must be shorter than the file: as late as a good place allows."""
    for separator in (b"\n\n", b"\n"):
        end = data.rfind(separator, len(data) // 2)
        if end >= 0:
            return end + len(separator)
    end = len(data)
    while end > len(data) - 3 and data[end - 1] & 0xC0 == 0x80:  # continuation bytes
        end -= 1
    # `end - 1` is now the first byte of the last character, which may be incomplete.
    return end - 1
