"""Where a run's numbers go: metrics.jsonl, TensorBoard, and the terminal.

Only process 0 writes; on the others every call does nothing.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_SHOWN = ("loss", "accuracy", "lr", "grad_norm", "tokens_per_second", "mfu")
# A bar has one line: what fits beside it, under short names.
_ON_BAR = {"loss": "loss", "accuracy": "acc", "tokens_per_second": "tokens/s", "mfu": "mfu"}


class RunWriter:
    """Writes the scalars of one run.

    Args:
      workdir: gets ``metrics.jsonl`` and ``tensorboard/``.
      first_step: lines of this step and later ones, left by a run that was interrupted after its
        last checkpoint, are dropped: every step is told once.
      total_steps: the end of the progress bar.
      active: whether this process writes at all.
    """

    def __init__(self, workdir: Path, *, first_step: int, total_steps: int, active: bool = True):
        self._active = active
        self._total = total_steps
        self._bar = None
        if not active:
            return
        from tensorboardX import SummaryWriter

        path = workdir / METRICS
        _drop_steps_from(path, first_step)
        self._lines = path.open("a", encoding="utf-8")
        purge = first_step if first_step > 1 else None
        self._board = SummaryWriter(
            str(workdir / TENSORBOARD), purge_step=purge, flush_secs=10, write_to_disk=True
        )
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps, initial=first_step - 1, unit="step", dynamic_ncols=True
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of JSON, and one TensorBoard scalar for each value."""
        if not self._active:
            return
        numbers = {name: float(value) for name, value in values.items()}
        # JSON has no NaN.
        line = {n: v if math.isfinite(v) else None for n, v in numbers.items()}
        self._lines.write(json.dumps({"step": step, **line}) + "\n")
        self._lines.flush()
        for name, value in numbers.items():
            self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Shows a training step: on the bar, or as a line."""
        if not self._active:
            return
        shown = {n: _short(n, values[n]) for n in _SHOWN if n in values}
        if self._bar is not None:
            beside = {_ON_BAR[n]: text for n, text in shown.items() if n in _ON_BAR}
            self._bar.set_postfix(beside, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {step}/{self._total}  {text}", flush=True)

    def say(self, text: str) -> None:
        """A line of text that does not break the bar."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the bar and flushes the files."""
        if self._active:
            if self._bar is not None:
                self._bar.close()
            self._board.close()
            self._lines.close()
            self._active = False


def _short(name: str, value: float) -> str:
    if name in ("accuracy", "mfu"):
        return f"{100 * value:.1f}%"
    if name == "tokens_per_second":
        return f"{value / 1000:.1f}k" if value >= 1e4 else f"{value:.0f}"
    return f"{value:.2e}" if name == "lr" else f"{value:.4f}"


def _drop_steps_from(path: Path, first_step: int) -> None:
    """Keep the complete lines of earlier steps."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        step = _step_of(line)
        if step is not None and step < first_step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _step_of(line: str) -> int | None:
    try:
        content: Any = json.loads(line)
    except ValueError:  # cut off when the process was killed
        return None
    return content.get("step") if isinstance(content, dict) else None
