"""Reads one damaged input after another, with limits, and reports what came of each.

    python -m tests.fuzz.worker ROOT

Every line of standard input is ``{"kind": ..., "directory": ...}``, every line of standard output a
report. Address space is limited, so that a huge allocation is a MemoryError; files that are
written, or read outside the directory but below ROOT, are noted by an audit hook.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import sys
import time
from pathlib import Path

ROOM = 1 << 30  # bytes of address space that reading an input may take besides what is in use
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link",
            "os.truncate", "shutil.rmtree", "shutil.move"}  # fmt: skip


def read_model(directory: Path) -> str:
    import jaxheads as jh

    return str(jh.load(directory).cfg.num_params)


def read_tokenizer(directory: Path) -> str:
    from jaxheads.data import Tokenizer

    tokenizer = Tokenizer.load(directory)
    ids = tokenizer.encode("one two\nthree")
    tokenizer.decode(ids)
    return str(tokenizer.vocab_size)


def read_heads(directory: Path) -> str:
    from jaxheads import heads

    file = heads.from_json(directory / "heads.json")
    return str(file.gates().shape)


def read_checkpoint(directory: Path) -> str:
    from jaxheads.checkpoints import orbax

    return str(orbax.load_model(directory).cfg.num_params)


READERS = {
    "model": read_model,
    "tokenizer": read_tokenizer,
    "heads": read_heads,
    "checkpoint": read_checkpoint,
}


class Watch:
    """Notes which files Python opens and changes."""

    def __init__(self, root: str):
        self.root = os.path.realpath(root) + os.sep
        self.inside: str | None = None
        self.touched: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event, args):
        if self.inside is None:
            return
        if event in _CHANGES:
            self.touched.append(f"{event} {args[0]!r}")
        elif event == "open" and isinstance(args[0], str | bytes):
            path = os.path.realpath(os.fsdecode(args[0]))
            if isinstance(args[2], int) and args[2] & _WRITES and path != os.devnull:
                self.touched.append(f"written {path}")
            elif path.startswith(self.root) and not path.startswith(self.inside):
                self.touched.append(f"read {path}")


def attempt(watch: Watch, kind: str, directory: str) -> dict:
    """What reading one input came to."""
    watch.inside, watch.touched = os.path.realpath(directory) + os.sep, []
    begin = time.monotonic()
    report = {"error": None, "message": "", "also": []}
    try:
        report["message"] = READERS[kind](Path(directory))
    except BaseException as error:
        report["error"] = type(error).__name__
        report["also"] = [base.__name__ for base in type(error).__mro__]
        report["message"] = str(error)
    finally:
        watch.inside = None
    return report | {"seconds": time.monotonic() - begin, "touched": watch.touched}


def main() -> None:
    faulthandler.enable()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nobody else writes into the reports
    watch = Watch(sys.argv[1])
    for line in sys.stdin:
        job = json.loads(line)
        if job.get("limit"):  # everything is imported by now
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
            print(json.dumps({"limited": used + ROOM}), file=out, flush=True)
            continue
        print(json.dumps(attempt(watch, job["kind"], job["directory"])), file=out, flush=True)


if __name__ == "__main__":
    main()
