"""Task files: a prompt, its right continuation, and wrong ones.

A file is JSON Lines (one row per line), a JSON list of rows, or a JSON object with the list under
`examples`; all may be gzipped. A row is one of

  {"prompt": ..., "answer": ..., "distractors": [...]}   distractors may be left out
  {"input": ..., "output": ...}                          word pairs
  {"input": ..., "target": "(B)"}                        lettered options "(A) ..." in the input:
                                                         the other letters are the distractors
  {"clean": ..., "answer": ..., "wrong": ...}            minimal prompts
  {"good": ..., "bad": ...}                              minimal pairs: empty prompt
  [prompt, answer]

Other fields of a row are ignored. Texts are used as they are: a space between prompt and answer
belongs to the answer.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Fields of each kind of row: (prompt, answer, distractors). None: absent in this kind.
_LAYOUTS = (
    ("prompt", "answer", "distractors"),
    ("input", "output", None),
    ("input", "target", None),
    ("clean", "answer", "wrong"),
    (None, "good", "bad"),
)
_OPTION = re.compile(r"^\([A-Z]\)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class TaskExample:
    """One question: the answer should be more likely after the prompt than any distractor."""

    prompt: str
    answer: str
    distractors: tuple[str, ...] = ()


def load_tasks(path: str | Path) -> list[TaskExample]:
    """Reads a task file (the module's docstring lists the rows it may hold).

    Errors name the file and the line (of JSON Lines) or the row (of a JSON list).
    """
    examples = [_example(row, where) for where, row in read_rows(path)]
    if not examples:
        raise ValueError(f"task file {path} holds no examples")
    return examples


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The rows of a task file, JSON values, each with the place that an error about it names."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"task file {path} does not exist; give a .json or .jsonl file")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"task file {path} is truncated or is not gzip ({error}); copy it again"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"task file {path} is not UTF-8 ({error}); convert it") from error
    lines = path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson"))
    return _json_lines(text, path) if lines else _json_rows(text, path)


def _json_lines(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not valid JSON ({error})") from error


def _json_rows(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"task file {path} is not valid JSON ({error}); a file with one object per line must "
            "be named .jsonl"
        ) from error
    rows = data.get("examples") if isinstance(data, Mapping) else data
    if not isinstance(rows, list):
        raise ValueError(
            f"task file {path} must hold a list of rows, or an object with the list under "
            f"'examples'; it holds a {type(data).__name__}"
        )
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def _example(row: Any, where: str) -> TaskExample:
    if isinstance(row, list):
        if len(row) != 2:
            raise ValueError(f"{where} is a list of {len(row)}; it must be [prompt, answer]")
        row = {"prompt": row[0], "answer": row[1]}
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is a {type(row).__name__}; it must be an object")
    layout = next((kind for kind in _LAYOUTS if all(f in row for f in kind[:2] if f)), None)
    if layout is None:
        raise ValueError(
            f"{where} has the fields {', '.join(map(repr, row)) or '(none)'}; it needs 'prompt' "
            "and 'answer' (and 'distractors', a list of wrong answers)"
        )
    prompt_field, answer_field, wrong_field = layout
    prompt = "" if prompt_field is None else _text(row, prompt_field, where)
    answer = _text(row, answer_field, where)
    wrong = row.get(wrong_field, []) if wrong_field else []
    wrong = [wrong] if isinstance(wrong, str) else wrong
    if not isinstance(wrong, list) or not all(isinstance(w, str) for w in wrong):
        raise ValueError(f"{where}: {wrong_field!r} must be a list of strings")
    if answer_field == "target":
        wrong = [option for option in _OPTION.findall(prompt) if option != answer]
    if not answer:
        raise ValueError(f"{where}: {answer_field!r} is empty; there is nothing to score")
    if answer in wrong and answer_field != "good":  # BLiMP as published holds one equal pair
        raise ValueError(f"{where}: the answer {answer!r} is also among {wrong_field!r}")
    return TaskExample(prompt, answer, tuple(wrong))


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    if not isinstance(row[field], str):
        raise ValueError(f"{where}: {field!r} is a {type(row[field]).__name__}, not a string")
    return row[field]
