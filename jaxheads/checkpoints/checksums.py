"""Checksums of a checkpoint's files, so that bytes which change on disk are noticed.

    STEP/checksums-0-of-2.json      {"files": {"model/manifest.ocdbt": [117, 2868423211], ...}}
Each process writes one for its share of the files once the checkpoint is complete, and compares a
share when the checkpoint is opened. The names decide the shares, so every file has one owner.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_GLOB = "checksums-*-of-*.json"
_BLOCK = 1 << 22
_THREADS = 8  # zlib lets others run while it counts


def write(directory: Path, part: int = 0, parts: int = 1) -> None:
    """Writes the size and CRC-32 of every file in this part of `directory`."""
    names = [name for name in _names(directory) if _owner(name, parts) == part]
    content = {"files": dict(zip(names, _sums(directory, names)))}
    path = directory / f"checksums-{part}-of-{parts}.json"
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def is_complete(directory: Path) -> bool:
    """Whether all processes wrote their checksums."""
    names = {path.name for path in directory.glob(_GLOB)}
    counts = {name.removesuffix(".json").rpartition("-")[2] for name in names}
    return len(counts) == 1 and len(names) == int(counts.pop())


def problems(
    directory: Path,
    part: int = 0,
    parts: int = 1,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
) -> list[str]:
    """What is wrong with the files in this part of `directory`; empty when they are as written.

    Files without a checksum pass. Checksums that cannot be read count as a damaged file.

    Args:
      wanted: says by name ("model/manifest.ocdbt") which files matter.
    """
    found: list[str] = []
    expected: dict[str, tuple[int, int]] = {}
    for path in sorted(directory.glob(_GLOB)):
        try:
            for name, (size, checksum) in json.loads(path.read_bytes())["files"].items():
                expected[name] = size, checksum
        except (ValueError, TypeError, KeyError, AttributeError, OSError):
            found.append(f"{path.name} cannot be read")
    present = set(_names(directory))
    names = [n for n in sorted(expected) if wanted(n) and _owner(n, parts) == part]
    found += [f"{name} is missing" for name in names if name not in present]
    names = [name for name in names if name in present]
    for name, actual in zip(names, _sums(directory, names)):
        if actual != expected[name]:
            found.append(f"{name} has other bytes than were written")
    return found


def _names(directory: Path) -> list[str]:
    """The files of a directory, without the checksums themselves."""
    files = (path for path in directory.rglob("*") if path.is_file())
    own = ("checksums-", ".json", ".part")
    return sorted(
        path.relative_to(directory).as_posix()
        for path in files
        if not (path.parent == directory and path.name.startswith(own[0]) and path.suffix in own)
    )


def _owner(name: str, parts: int) -> int:
    return zlib.crc32(name.encode()) % parts


def _sums(directory: Path, names: Iterable[str]) -> list[tuple[int, int]]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda name: _sum(directory / name), names))


def _sum(path: Path) -> tuple[int, int]:
    """(size, CRC-32)."""
    size, checksum = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum
