"""Click samples from grouped behaviours: who is asked about what, after which history.

A user with events 1..n, n >= min_events, gives positives
    test        event n
    validation  event n-1
    train       events n-2, n-2-stride, ..., train_targets of them   (n-2, n-7, ..., n-92)
each with the `history` events before it (fewer at the beginning; an event without any before it is
left out). Every positive brings `negatives` other items, drawn with probability proportional to
their events in the whole log, never one that the user has an event with, each with its own
category. Draws are independent of each other and a function of (seed, split, positive), not of the
order in which samples are read.

A batch is a dict of arrays, b = batch_size / process_count:
  item, category                  [b] int32            the candidate
  history_item, history_category  [b,history] int32    oldest first; 0 is padding, at the front
  label                           [b] float32          1 for the positive
  user                            [b] int32            number of the user; -1 fills up a last batch
References: Feng et al., 2024, arXiv:2410.02604, section 5.1 and its released code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxheads.data.behaviours import Behaviours
from jaxheads.data.readahead import ReadAhead

SPLITS = ("train", "validation", "test")
Batch = dict[str, np.ndarray]
_DRAWS = 16  # items proposed for a positive; if the user knows too many, all others are weighed
_GOLDEN = 0x9E3779B97F4A7C15


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Which samples, and how they are laid out. The defaults are the paper's."""

    split: str = "train"  # 'train', 'validation' or 'test'
    history: int = 200  # T
    min_events: int = 210  # users with fewer give no samples
    train_targets: int = 19  # positives of a user in 'train'
    stride: int = 5  # events between two of them
    negatives: int = 2  # for each positive
    batch_size: int = 2048  # global: rows over all processes
    seed: int = 0  # of the order and the negatives
    prefetch: int = 2  # batches read ahead in a thread; 0 reads in the caller

    def __post_init__(self):
        for name, least in (
            ("history", 1),
            ("min_events", 1),
            ("train_targets", 1),
            ("stride", 1),
            ("negatives", 0),
            ("batch_size", 1),
            ("seed", 0),
            ("prefetch", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}={value!r} must be an integer.")
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed} must be below 2**32.")
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r} is not one of {', '.join(SPLITS)}.")


class Samples:
    """The samples of one split, by number: positive 0 and its negatives, positive 1, ...

    Args:
      data: grouped behaviours.
      cfg: which samples.
    Raises:
      ValueError: when no user has enough events.
    """

    def __init__(self, data: Behaviours, cfg: SampleConfig):
        self._data = data
        self._cfg = cfg
        events = np.diff(data.offsets)
        self._users = np.flatnonzero(events >= cfg.min_events)
        if not len(self._users):
            raise ValueError(
                f"none of {data.num_users} users has min_events={cfg.min_events} events (the most "
                f"is {events.max(initial=0)}); lower min_events."
            )
        last = events[self._users] - 1  # the place of event n among its user's
        if cfg.split == "train":
            # places last - 2 - stride * j, as far as they are 1 or more
            per_user = np.clip((last - 3) // cfg.stride + 1, 0, cfg.train_targets)
            self._newest, self._stride = last - 2, cfg.stride
        else:
            self._newest, self._stride = last - (cfg.split == "validation"), 0
            per_user = (self._newest >= 1).astype(np.int64)
        self._ends = np.cumsum(per_user)
        self._starts = self._ends - per_user
        if not len(self):
            raise ValueError(
                f"users with min_events={cfg.min_events} events have none for {cfg.split!r} that "
                "others come before; raise min_events."
            )
        self._item_ends = np.cumsum(np.asarray(data.item_counts))  # [items+1]; 0 for padding

    def __len__(self) -> int:
        return int(self._ends[-1]) * (1 + self._cfg.negatives)

    @property
    def num_users(self) -> int:
        """Users with enough events."""
        return len(self._users)

    def batch(self, numbers: np.ndarray) -> Batch:
        """The samples of these numbers [b].

        Raises:
          ValueError: for a user who knows all items, so that there is no negative.
        """
        data, cfg = self._data, self._cfg
        positive, order = np.divmod(np.asarray(numbers, np.int64), 1 + cfg.negatives)
        at = np.searchsorted(self._ends, positive, "right")
        users = self._users[at]
        places = self._newest[at] - self._stride * (positive - self._starts[at])
        starts = np.asarray(data.offsets[users])
        stops = np.asarray(data.offsets[users + 1])
        batch = empty_batch(len(users), cfg.history)
        batch["user"][:] = users
        batch["label"][:] = order == 0
        proposals = self._proposals(positive)
        for row, target in enumerate((starts + places).tolist()):
            begin = max(int(starts[row]), target - cfg.history)
            size = target - begin
            batch["history_item"][row, cfg.history - size :] = data.item[begin:target]
            batch["history_category"][row, cfg.history - size :] = data.category[begin:target]
            if order[row] == 0:
                batch["item"][row] = data.item[target]
                batch["category"][row] = data.category[target]
                continue
            known = data.item[starts[row] : stops[row]]
            item = self._negative(known, proposals[row], int(order[row]), int(users[row]))
            batch["item"][row] = item
            batch["category"][row] = data.item_category[item]
        return batch

    def _proposals(self, positive: np.ndarray) -> np.ndarray:
        """Uniform numbers [b, draws + negatives] in [0, 1) that belong to each positive."""
        width = _DRAWS + self._cfg.negatives
        stream = self._cfg.seed * len(SPLITS) + SPLITS.index(self._cfg.split)
        start = _mix(np.asarray([stream], np.uint64))[0]
        count = positive.astype(np.uint64)[:, None] * np.uint64(width)
        count = count + np.arange(width, dtype=np.uint64)
        return (_mix(start ^ _mix(count)) >> np.uint64(11)) * 2.0**-53

    def _negative(self, known: np.ndarray, uniform: np.ndarray, order: int, user: int) -> int:
        """The `order`-th (from 1) negative of a positive."""
        draws = _draw(self._item_ends, uniform[:_DRAWS])
        unknown = draws[~(draws[:, None] == known).any(axis=1)]
        if order <= len(unknown):
            return int(unknown[order - 1])
        weights = np.array(self._data.item_counts)
        weights[known] = 0
        ends = np.cumsum(weights)
        if not ends[-1]:
            raise ValueError(
                f"user {user} (id {self._data.users[user]}) has events with all "
                f"{self._data.num_items} items, so there is no negative item to draw; leave such "
                "users out, or give negatives=0."
            )
        return int(_draw(ends, uniform[_DRAWS + order - 1]))


def _draw(ends: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Which interval of the cumulative counts `ends` (int64) numbers in [0, 1) fall into."""
    # As an integer: a float would have the whole of `ends` converted.
    return np.searchsorted(ends, (uniform * ends[-1]).astype(np.int64), "right")


def empty_batch(num_rows: int, history: int) -> Batch:
    """Rows of padding: no candidate, no history, user -1."""
    return {
        "item": np.zeros(num_rows, np.int32),
        "category": np.zeros(num_rows, np.int32),
        "history_item": np.zeros((num_rows, history), np.int32),
        "history_category": np.zeros((num_rows, history), np.int32),
        "label": np.zeros(num_rows, np.float32),
        "user": np.full(num_rows, -1, np.int32),
    }


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that spreads every bit (splitmix64)."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SampleBatches:
    """An endless, checkpointable iterator over shuffled batches; see `make_samples`."""

    def __init__(self, samples: Samples, cfg: SampleConfig, rows: slice, description: dict):
        import grain

        shuffled = grain.MapDataset.range(len(samples)).shuffle(seed=cfg.seed).repeat()
        batches = shuffled.batch(cfg.batch_size).map(lambda n: samples.batch(n[rows]))
        self._batches: Any = batches
        self._description = description
        self._step = 0

    def __iter__(self) -> SampleBatches:
        return self

    def __next__(self) -> Batch:
        batch = self._batches[self._step]
        self._step += 1
        return batch

    def close(self) -> None:
        """Nothing to stop; a read-ahead iterator around this one has a thread to end."""

    def get_state(self) -> dict[str, Any]:
        """Where the data stands, as JSON values; the same on every process."""
        return {"description": self._description, "step": self._step}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues exactly where `get_state` was called, under any number of processes.

        Raises:
          ValueError: for the state of other data or settings.
        """
        missing = {"description", "step"} - set(state)
        if missing:
            raise ValueError(
                f"not a data state: {', '.join(sorted(missing))} missing; pass what get_state gave."
            )
        old, new = state["description"], self._description
        changed = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
        if changed:
            lines = "; ".join(f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in changed)
            raise ValueError(
                f"the data state was saved with other settings: {lines}; use the same data and "
                "settings, or start the data from the beginning."
            )
        self._step = int(state["step"])


def make_samples(
    data: Behaviours, cfg: SampleConfig, *, process_index: int = 0, process_count: int = 1
) -> SampleBatches | ReadAhead:
    """An endless iterator of batches (see the module's docstring), every epoch in another order.

    Row r of batch n depends on the data and the configuration, not on the number of processes.
    `get_state()` gives JSON values after any batch; `set_state` continues bit for bit.

    Args:
      process_index, process_count: this process reads rows
        [process_index * b, (process_index + 1) * b) of the global batch.
    """
    rows = _rows_of(cfg, process_index, process_count)
    samples = Samples(data, cfg)
    names = ("split", "history", "min_events", "train_targets", "stride", "negatives")
    description = {name: getattr(cfg, name) for name in (*names, "batch_size", "seed")}
    sizes = ("num_events", "num_users", "num_items", "num_categories")
    description |= {name: data.info[name] for name in sizes}
    batches = SampleBatches(samples, cfg, rows, description)
    return ReadAhead(batches, cfg.prefetch) if cfg.prefetch else batches


def eval_samples(
    data: Behaviours,
    cfg: SampleConfig,
    limit: int | None = None,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """One pass over the samples of a split, in order; rows of user -1 fill up the last batch.

    Args:
      limit: at most this many batches; None: all.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None for everything.")
    rows = _rows_of(cfg, process_index, process_count)
    samples = Samples(data, cfg)
    starts = range(0, len(samples), cfg.batch_size)[:limit]

    def batch(start: int) -> Batch:
        stop = min(start + rows.stop, len(samples))
        real = samples.batch(np.arange(min(start + rows.start, stop), stop))
        full = empty_batch(rows.stop - rows.start, cfg.history)
        for name, value in real.items():
            full[name][: len(value)] = value
        return full

    return map(batch, starts)


def _rows_of(cfg: SampleConfig, process_index: int, process_count: int) -> slice:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} is not in 0 to {process_count - 1}.")
    if cfg.batch_size % process_count:
        raise ValueError(
            f"batch_size={cfg.batch_size} is not divisible by process_count={process_count}; the "
            "global batch is split evenly over the processes."
        )
    size = cfg.batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)
