"""The training run: data, mesh, state, steps, evaluation, checkpoints.

    train(RunConfig(model=ModelConfig(...), workdir="runs/x"))

While step n runs on the devices, the host prepares batch n + 1 and sends it; the numbers of a step
are read when two later steps have been started, so the devices never wait for the host to look.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxheads import parallel
from jaxheads.checkpoints import orbax
from jaxheads.data import BatchIterator, DataConfig, Tokenizer, eval_batches, make_dataset
from jaxheads.fields import to_json
from jaxheads.models import Decoder, ModelConfig, check_token_ids, forward
from jaxheads.parallel import partition_spec
from jaxheads.training.configs import TrainConfig
from jaxheads.training.optimizers import make_optimizer
from jaxheads.training.step import TrainState, init_state, make_train_step
from jaxheads.training.writers import RunWriter
from jaxheads.typing import Array, PyTree

Batch = Mapping[str, np.ndarray]
_IN_FLIGHT = 2  # steps started before the numbers of an earlier one are read


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What happens around the steps."""

    log_every: int = 10  # steps between lines of metrics.jsonl; each holds means over them
    eval_every: int = 200  # steps between evaluations on held-out text; 0: only at the end
    eval_batches: int = 16  # batches of one evaluation; 0: no evaluation
    checkpoint_every: int = 200  # steps between checkpoints; 0: only at the end
    keep_last: int = 2  # newest checkpoints kept
    keep_best: int = 1  # checkpoints of lowest evaluation loss kept besides
    sample_tokens: int = 200  # length of the text sampled at the end; 0: none
    sample_prompt: str = "def "  # what it begins with
    sample_temperature: float = 0.8  # 0 takes the likeliest token

    def __post_init__(self):
        for name, least in {
            "log_every": 1,
            "eval_every": 0,
            "eval_batches": 0,
            "checkpoint_every": 0,
            "keep_last": 1,
            "keep_best": 0,
            "sample_tokens": 0,
            "sample_temperature": 0,
        }.items():
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(f"{name}={value!r} must be at least {least}.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole training run."""

    model: ModelConfig
    data: DataConfig = DataConfig()  # noqa: RUF009 (frozen)
    train: TrainConfig = TrainConfig()  # noqa: RUF009 (frozen)
    loop: LoopConfig = LoopConfig()  # noqa: RUF009 (frozen)
    mesh: str = ""  # "data:2,model:4"
    seed: int = 0  # of the initial parameters and of sampling
    workdir: str = "runs/default"
    profile: str = ""  # "START:STOP": steps to trace into WORKDIR/profile

    def __post_init__(self):
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed={self.seed!r} must be an integer of at least 0.")
        if not self.workdir.strip():
            raise ValueError("workdir='' is empty; give a directory for checkpoints and metrics.")
        parallel.parse_mesh(self.mesh)
        parse_profile(self.profile)


class Result(NamedTuple):
    """What a run ended with."""

    step: int
    """Steps done in all."""
    state: TrainState
    metrics: dict[str, float]
    """The last training and evaluation numbers."""
    stopped_by: str | None
    """The signal that ended the run early, None when it is finished."""


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient norm of a step is not a number; nothing was saved after it."""


def parse_profile(text: str) -> tuple[int, int] | None:
    """Steps to trace: ``"10:15"`` gives ``(10, 15)``, the empty string None."""
    if not text:
        return None
    start, colon, stop = text.partition(":")
    if not (colon and start.isdigit() and stop.isdigit() and 1 <= int(start) < int(stop)):
        raise ValueError(
            f"profile={text!r} cannot be read; write START:STOP with 1 <= START < STOP, for "
            "example 10:15."
        )
    return int(start), int(stop)


def check_run(run: RunConfig, mesh: Mesh) -> None:
    """Raise for settings that do not fit each other or the mesh, before anything is allocated."""
    rows, length = run.data.batch_size, run.data.seq_len
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = run.train.accumulate
    if rows % (ways * parts):
        raise ValueError(
            f"batch_size={rows} is not divisible by {ways * parts}: the mesh splits it over "
            f"data x fsdp = {ways} devices"
            + (f", in {parts} accumulated parts." if parts > 1 else ".")
        )
    if length % mesh.shape["context"]:
        raise ValueError(
            f"seq_len={length} is not divisible by the mesh axis context:{mesh.shape['context']}."
        )
    if run.model.positions == "learned" and length > run.model.max_positions:
        raise ValueError(
            f"seq_len={length} exceeds the {run.model.max_positions} learned positions of the "
            "model; shorten it, or raise model.max_positions."
        )


def check_vocabulary(tokenizer: Tokenizer, cfg: ModelConfig) -> None:
    """Raise when the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids but the model's "
            f"vocab_size={cfg.vocab_size}; use the model's own tokenizer (--set data.tokenizer=...)"
            ", or a larger model.vocab_size."
        )


def prepare_workdir(workdir: str | Path) -> Path:
    """Make the directory and see that it can be written."""
    path = Path(workdir).expanduser()
    probe = path / ".writable"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"workdir={str(workdir)!r} cannot be written ({error.strerror}); give a directory of "
            "your own."
        ) from error
    return path


class Feed:
    """Training batches on the mesh, with the position in the data that belongs to each.

    Args:
      data: this process's rows.
      mesh: batches are split over it: rows over data and fsdp, columns over context.
      vocab_size: every id of every batch is compared with it.
    """

    def __init__(self, data: BatchIterator, mesh: Mesh, shape: tuple[int, int], vocab_size: int):
        self._data = data
        self._sharding = batch_sharding(mesh, shape)
        self._shape = shape
        self._vocab_size = vocab_size
        self.wait_seconds = 0.0

    def __next__(self) -> tuple[Batch, dict[str, Array], dict[str, Any]]:
        """(this process's rows, the global batch, the position after it)."""
        start = time.perf_counter()
        batch = next(self._data)
        self.wait_seconds += time.perf_counter() - start
        for name in ("tokens", "targets"):
            check_token_ids(batch[name], self._vocab_size)
        return batch, put(batch, self._sharding, self._shape), self._data.get_state()


def batch_sharding(mesh: Mesh, shape: tuple[int, int]) -> NamedSharding:
    """How a batch [B,T] lies on the mesh."""
    return NamedSharding(mesh, partition_spec(("batch", "length"), shape, mesh, name="batch"))


def local_block(
    sharding: NamedSharding, shape: tuple[int, int], process_index: int | None = None
) -> tuple[slice, slice]:
    """The rows and columns of a global batch that the devices of one process hold."""
    process_index = jax.process_index() if process_index is None else process_index
    blocks = [
        index
        for device, index in sharding.devices_indices_map(shape).items()
        if device.process_index == process_index
    ]
    if not blocks:
        raise ValueError(f"process {process_index} has no device in mesh {sharding.mesh.shape}.")
    spans = [
        (min(b[i].indices(n)[0] for b in blocks), max(b[i].indices(n)[1] for b in blocks))
        for i, n in enumerate(shape)
    ]
    return slice(*spans[0]), slice(*spans[1])


def put(batch: Batch, sharding: NamedSharding, shape: tuple[int, int]) -> dict[str, Array]:
    """This process's rows [b,T] as part of a global batch [B,T] on the devices."""
    columns = local_block(sharding, shape)[1]
    return {
        name: jax.make_array_from_process_local_data(sharding, rows[:, columns], shape)
        for name, rows in batch.items()
    }


def _data_process(mesh: Mesh, shape: tuple[int, int]) -> tuple[int, int]:
    """(index, count) of this process among those that read different rows.

    Processes that a model or context axis spans hold the same rows and must read the same text.
    """
    rows = local_block(batch_sharding(mesh, shape), shape)[0]
    size = rows.stop - rows.start
    return rows.start // size, shape[0] // size


class _Stop:
    """Remembers a signal that asks the run to end."""

    name: str | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[_Stop]:
    """SIGTERM, and the first SIGINT, are noted instead of ending the process at once.

    A second SIGINT interrupts as usual. Signals reach only the main thread; elsewhere this does
    nothing. With several processes SIGTERM belongs to JAX's preemption service, which makes all of
    them stop at the same step.
    """
    stop = _Stop()
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


def train(
    run: RunConfig,
    *,
    model: Decoder | None = None,
    forward: Callable[..., Any] = forward,
    resume: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> Result:
    """Train until `run.train.steps`, a signal, or a loss that is not finite.

    Args:
      model: parameters to start from, placed on the mesh of `run`; default: initialised from
        `run.seed`. A checkpoint in the workdir comes before both.
      forward: what is trained under; wrap it to train with interventions.
      resume: go on from the newest complete checkpoint of the workdir.
      provenance: JSON values written to WORKDIR/config.json beside the settings.

    Raises:
      ValueError: for settings that do not fit together, and checkpoints that do not fit them.
      NonFiniteLossError: the batch is saved in the workdir, the last checkpoint stays as it is.
    """
    mesh = parallel.make_mesh(run.mesh)
    check_run(run, mesh)
    tokenizer = Tokenizer.load(run.data.tokenizer)
    check_vocabulary(tokenizer, run.model)
    workdir = prepare_workdir(run.workdir)
    shape = (run.data.batch_size, run.data.seq_len)
    index, count = _data_process(mesh, shape)
    data = make_dataset(run.data, tokenizer=tokenizer, process_index=index, process_count=count)
    with contextlib.ExitStack() as stack:
        stack.callback(data.close)
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = stack.enter_context(
            orbax.Checkpoints(
                workdir / orbax.CHECKPOINTS,
                keep_last=run.loop.keep_last,
                keep_best=run.loop.keep_best,
            )
        )
        if not resume and checkpoints.steps:
            raise ValueError(
                f"workdir={run.workdir!r} holds checkpoints up to step {checkpoints.steps[-1]}; "
                "resume, or give another workdir."
            )
        trainer = _Trainer(run, mesh, checkpoints, data, tokenizer, workdir, forward)
        trainer.start(model)
        if jax.process_index() == 0:
            content = to_json(run) | dict(provenance or {})
            (workdir / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        trainer.writer = RunWriter(
            workdir,
            first_step=trainer.step + 1,
            total_steps=run.train.steps,
            active=jax.process_index() == 0,
        )
        stack.callback(trainer.writer.close)
        stop = stack.enter_context(stop_on_signals())
        return trainer.run_steps(stop)
