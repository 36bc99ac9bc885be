"""Watching the steps of a run: their numbers, a trace, and signals that ask the run to end."""

from __future__ import annotations

import collections
import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxheads.data import DataConfig
from jaxheads.models import ModelConfig
from jaxheads.training.configs import TrainConfig
from jaxheads.training.feed import Batch, Feed
from jaxheads.training.metrics import throughput
from jaxheads.training.writers import RunWriter
from jaxheads.typing import Array


class NonFiniteLossError(RuntimeError):
    """Loss, gradient or parameters of a step are not finite; nothing was saved since."""


class Window:
    """The numbers of the steps under way, and their means over a line of the log."""

    def __init__(
        self,
        model: ModelConfig,
        data: DataConfig,
        train: TrainConfig,
        *,
        feed: Feed,
        writer: RunWriter,
        workdir: Path,
        step: int,
    ):
        self._model, self._data, self._train = model, data, train
        self._feed, self._writer, self._workdir = feed, writer, workdir
        self._waiting: collections.deque = collections.deque()
        self._read: list[dict[str, float]] = []
        self._began = time.perf_counter()
        self._waited = feed.wait_seconds
        self._timed = 0  # steps since then
        self._first = step + 1
        self._step = step  # the last one that was read
        self.last: dict[str, float] = {}

    def add(self, step: int, metrics: Mapping[str, Array], rows: Batch) -> None:
        """A step that was started, with its numbers to come."""
        self._waiting.append((step, metrics, rows))

    def read(self, in_flight: int) -> None:
        """Wait for all but the newest `in_flight` steps; look at their numbers.

        Raises:
          NonFiniteLossError: the rows of the step's batch are saved first.
        """
        if self._waiting and self._waiting[0][0] == self._first:
            in_flight = 0  # the clock starts when it is done, and no other step runs
        while len(self._waiting) > in_flight:
            step, metrics, rows = self._waiting.popleft()
            numbers = {name: float(v) for name, v in jax.device_get(dict(metrics)).items()}
            if not all(map(math.isfinite, numbers.values())):
                self._fail(step, numbers, rows)
            self._read.append(numbers)
            if step == self._first:  # compiled; its time tells nothing about the next ones
                self._writer.say(f"first step after {self._seconds():.1f} s, with compilation")
                self._restart()
            else:
                self._timed += 1
            self._step = step
            if step % self._train.log_every == 0:
                self._log()

    def finish(self) -> None:
        """Wait for all steps, and log those since the last line."""
        self.read(0)
        if self._read:
            self._log()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside does not count as training."""
        begin = time.perf_counter()
        yield
        self._began += time.perf_counter() - begin

    def _seconds(self) -> float:
        return time.perf_counter() - self._began

    def _restart(self) -> None:
        self._began, self._waited, self._timed = time.perf_counter(), self._feed.wait_seconds, 0

    def _log(self) -> None:
        names = self._read[-1]
        line = {n: sum(r[n] for r in self._read) / len(self._read) for n in names}
        line["lr"] = self._read[-1]["lr"]
        if self._timed:
            seconds = self._seconds()
            speed = throughput(
                self._model,
                tokens=self._data.batch_size * self._data.seq_len * self._timed,
                seq_len=self._data.seq_len,
                seconds=seconds,
                devices=self._feed.devices,
            )
            line |= {n: v for n, v in speed.items() if v is not None}
            waited = self._feed.wait_seconds - self._waited
            line["input_wait_seconds"] = waited / self._timed  # per step
            line["input_wait_share"] = waited / seconds
        self.last = line
        self._writer.write(self._step, line)
        self._writer.progress(self._step, line)
        self._read.clear()
        self._restart()

    def _fail(self, step: int, numbers: Mapping[str, float], rows: Batch) -> None:
        path = self._workdir / f"nonfinite-step-{step}-process-{jax.process_index()}.npz"
        arrays: dict[str, Any] = {"step": np.asarray(step), **rows}
        np.savez(path, **arrays)
        self._writer.write(step, numbers)
        bad = ", ".join(f"{n} is {v}" for n, v in numbers.items() if not math.isfinite(v))
        raise NonFiniteLossError(
            f"step {step}: {bad}. Its batch is saved in {path}; checkpoints are of earlier steps. "
            "Try a lower train.lr, more train.warmup_steps, or a smaller train.grad_clip."
        )


class Profile:
    """A trace of some steps, written to WORKDIR/profile for xprof and TensorBoard."""

    def __init__(self, cfg: TrainConfig, workdir: Path, step: int):
        self._start = max(cfg.profile_start, 1)
        self._last = self._start + cfg.profile_steps - 1
        self._wanted = cfg.profile_steps > 0 and step < self._start
        self._directory = workdir / "profile"
        self._running = False

    def before(self, step: int) -> None:
        if self._wanted and step == self._start:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def ends_at(self, step: int) -> bool:
        return self._running and step == self._last

    def stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


class Stop:
    """Remembers a signal that asks the run to end."""

    name: str | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """SIGTERM, and the first SIGINT, are noted instead of ending the process at once.

    A second SIGINT interrupts as usual. Signals reach only the main thread; elsewhere this does
    nothing. With several processes SIGTERM belongs to JAX's preemption service, which makes all of
    them stop at the same step.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number, _frame):
        stop.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, previous[signal.SIGINT] or signal.default_int_handler)

    signals = [signal.SIGINT] + ([signal.SIGTERM] if jax.process_count() == 1 else [])
    previous = {s: signal.signal(s, note) for s in signals}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
