"""Batches made in a thread while the accelerator works, without losing the exact position."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

from jaxheads.data.packing import Batch

_POLL_SECONDS = 0.1  # how often a blocked thread looks whether it should stop


class Batches(Protocol):
    """What can be read ahead: an iterator whose position is a value."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: Mapping[str, Any]) -> None: ...


class ReadAhead:
    """Keeps up to `depth` batches ready.

    Each batch travels with the state after it, so `get_state` is the position of the caller and
    not of the thread. (Grain's thread prefetch does the same but copies the state deeply for every
    batch, and prints an ignored exception when the interpreter ends before it is closed.)
    """

    def __init__(self, batches: Batches, depth: int):
        self._batches = batches
        self._depth = depth
        self._state = batches.get_state()
        self._ready: queue.Queue = queue.Queue(depth)
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        # The thread must not hold `self`, or an abandoned iterator would never end it.
        self._finalizer = weakref.finalize(self, self._stop.set)

    def __iter__(self) -> ReadAhead:
        return self

    def __next__(self) -> Batch:
        if self._thread is None:
            self._start()
        batch, state, error = self._ready.get()
        if error is not None:
            self._rewind(self._state)
            raise error
        self._state = state
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch that was handed out."""
        return self._state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """See `set_state` of the batches; a state that is refused changes nothing."""
        try:
            self._rewind(state)
        except Exception:
            self._rewind(self._state)
            raise
        self._state = self._batches.get_state()

    def close(self) -> None:
        """Ends the thread; the next batch would start it again."""
        self._rewind(self._state)

    def _start(self) -> None:
        self._stop = threading.Event()
        self._ready = queue.Queue(self._depth)
        self._finalizer.detach()
        self._finalizer = weakref.finalize(self, self._stop.set)
        self._thread = threading.Thread(
            target=_produce,
            args=(self._batches, self._ready, self._stop),
            name="jaxheads-read-ahead",
            daemon=True,
        )
        self._thread.start()

    def _rewind(self, state: Mapping[str, Any]) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._batches.set_state(state)


def _produce(batches: Batches, ready: queue.Queue, stop: threading.Event) -> None:
    error = None
    while error is None and not stop.is_set():
        try:
            item = (next(batches), batches.get_state(), None)
        except Exception as caught:  # handed to the caller of __next__
            error = caught
            item = (None, None, error)
        while not stop.is_set():
            try:
                ready.put(item, timeout=_POLL_SECONDS)
                break
            except queue.Full:
                continue
