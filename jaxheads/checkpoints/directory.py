"""Directories of weights: which one a name means, and what its safetensors files hold."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxheads.checkpoints.safetensors import MappedFile, Stored
from jaxheads.fields import shorten

ASSETS = Path(__file__).parents[1] / "assets"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".pkl")
_LISTED = 20  # problems that an error spells out


def locate(path_or_name: str | Path) -> Path:
    """The directory that a user's argument means, downloaded where it is a hub id."""
    if not isinstance(path_or_name, str | os.PathLike):
        raise TypeError(f"load needs a path or a name, got {path_or_name!r}.")
    text = os.fspath(path_or_name)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{text} is a file; give the directory that holds it and {CONFIG}.")
    shipped = sorted(p.parent.name for p in ASSETS.glob(f"*/{CONFIG}"))
    if text in shipped:
        return ASSETS / text
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None
    if isinstance(path_or_name, str) and is_id and not Path(text).parent.exists():
        return _download(text)
    raise ValueError(
        f"{text!r} is no directory and no shipped model (shipped: {', '.join(shipped) or 'none'}); "
        "a model of the Hugging Face hub is written org/name."
    )


def _download(hub_id: str) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ImportError(
            f"{hub_id!r} is no local directory; to fetch it from the Hugging Face hub, "
            "pip install jaxheads[hub]."
        )
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors"]))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; one `ValueError` for anything else, NaN and infinity included."""

    def refuse(text: str):
        raise ValueError(f"the number {text} is not allowed")

    try:
        value = json.loads(path.read_text("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, needed a JSON object.")
    return value


def raise_all(where: str, problems: Sequence[str]) -> None:
    """One error for everything wrong with a directory."""
    if problems:
        shown = "\n  ".join(shorten(problem, 240) for problem in problems[:_LISTED])
        more = len(problems) - _LISTED
        rest = f"\n  ... and {more} more" if more > 0 else ""
        s = "s" if len(problems) > 1 else ""
        raise ValueError(f"{where}: {len(problems)} problem{s}:\n  {shown}{rest}")


def open_weights(directory: Path) -> dict[str, Stored]:
    """The tensors of a directory, by the names in its files."""
    problems: list[str] = []
    index: dict[str, str] | None = None
    for name in (INDEX, WEIGHTS):
        check_inside(directory, name)
    if (directory / INDEX).is_file():
        index = _read_index(directory, problems)
        files = sorted(set(index.values()))
    elif (directory / WEIGHTS).is_file():
        files = [WEIGHTS]
    else:
        raise ValueError(_no_weights(directory))
    raise_all(str(directory), problems)

    stored: dict[str, Stored] = {}
    for name in files:
        try:
            tensors = MappedFile(directory / name).tensors
        except ValueError as error:
            problems.append(str(error))
            continue
        for key, tensor in tensors.items():
            if key in stored:
                problems.append(f"{key} is in {stored[key].file.path.name} and again in {name}")
            if index is not None and index.get(key) != name:
                problems.append(f"{key} is in {name}, where the index has {index.get(key)}")
            stored[key] = tensor
        problems += [
            f"{key} is not in {name}, where the index has it"
            for key in (k for k, v in (index or {}).items() if v == name)
            if key not in tensors
        ]
    raise_all(str(directory), problems)
    return stored


def _read_index(directory: Path, problems: list[str]) -> dict[str, str]:
    """``{tensor: file}``; complains about files that are missing or outside the directory."""
    index = read_json(directory / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()):
        raise ValueError(f"{directory / INDEX} has no weight_map of file names.")
    for name in sorted(set(index.values())):
        path = directory / name
        if name != Path(name).name or name in ("", ".", "..") or "\\" in name or "\0" in name:
            problems.append(f"{INDEX} names {name!r}, which is not a file of this directory")
        elif (problem := _link_problem(directory, name)) is not None:
            problems.append(problem)
        elif not path.is_file():
            problems.append(f"{name}, named by {INDEX}, is missing")
    return index


def check_inside(directory: Path, name: str) -> None:
    """Raise for a file that is a link to somewhere else: what lies there is not the model's."""
    problem = _link_problem(directory, name)
    if problem is not None:
        raise ValueError(f"{directory}: {problem}; copy the file here if it is meant.")


def _link_problem(directory: Path, name: str) -> str | None:
    path = directory / name
    if not path.is_symlink():
        return None
    # The hub's cache keeps a snapshot's files as links into the blobs of the same repository.
    inside = [directory.resolve()]
    if directory.resolve().parent.name == "snapshots":
        inside.append(directory.resolve().parents[1] / "blobs")
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # Python 3.11 and 3.12 raise RuntimeError for loops
        return f"{name} is a link to itself"
    if not any(target.is_relative_to(place) for place in inside):
        return f"{name} is a link to {target}, outside the directory"
    return None


def _no_weights(directory: Path) -> str:
    present = sorted(p.name for p in directory.iterdir())
    if "adapter_config.json" in present:
        return f"{directory} holds an adapter (LoRA); merge it into its base model and save that."
    other = [name for name in present if name.endswith(_OTHER_FORMATS)]
    if other:
        return (
            f"{directory} holds weights only as {', '.join(other[:3])}, formats that are not read "
            "(loading a pickle runs code from the file); convert them once where you trust them: "
            "transformers' AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW, "
            "safe_serialization=True)."
        )
    return (
        f"{directory} has neither {WEIGHTS} nor {INDEX}; it holds "
        f"{', '.join(present[:_LISTED]) or 'nothing'}."
    )
