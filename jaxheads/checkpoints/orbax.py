"""Training checkpoints: written asynchronously with Orbax, restored on any mesh.

    WORKDIR/checkpoints/STEP/
      model/      parameters by name ("layers.attention.wq"), each process writes its shards
      training/   step, random key and optimiser state by name ("opt_state.0.mu.embed.table")
      config/     JSON: the configurations the run was started with
      data/       JSON: where the data stands, for all processes
      checksums-*  of all these files
A checkpoint appears under its step only when it is complete; what an interrupted save leaves
behind is recognised and skipped, and so is a checkpoint whose bytes have changed since.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxheads import parallel
from jaxheads.checkpoints import checksums
from jaxheads.data import DataConfig, merge_states
from jaxheads.fields import differences, from_json
from jaxheads.models import Decoder, ModelConfig
from jaxheads.parallel.multihost import all_agree, is_main_process, wait_for_all
from jaxheads.typing import PyTree

T = TypeVar("T")
_log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
ITEMS = ("model", "training", "config", "data")
_TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written
_DELETED = "deleted"  # where old checkpoints are moved at once, to be removed file by file


class Restored(NamedTuple):
    """What `Checkpoints.restore` returns."""

    step: int
    model: Decoder
    training: PyTree
    data_state: dict[str, Any]


def flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves of `tree` by name: ``{"layers.attention.wq": array, ...}``."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): leaf for path, leaf in leaves}


def unflatten(like: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """A tree of the structure of `like` from the output of `flatten`."""
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(structure, [leaves[_name(path)] for path, _ in paths])


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def abstract(constructor: Callable[[], T], mesh: Mesh) -> T:
    """What ``constructor()`` makes, as `jax.ShapeDtypeStruct`s placed by their axis names."""
    shapes = jax.eval_shape(constructor)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        parallel.shardings(shapes, mesh),
    )


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Orbax warns twice that what is opened for reading cannot be written."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class Checkpoints:
    """The checkpoints of one training run.

    Args:
      directory: WORKDIR/checkpoints; made when missing.
      keep_last: newest checkpoints to keep.
      keep_best: checkpoints of lowest `eval_loss` to keep besides.
      read_only: nothing is written, renamed or deleted.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        read_only: bool = False,
    ):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        for name, value, least in (("keep_last", keep_last, 1), ("keep_best", keep_best, 0)):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        self._ocp = ocp
        self._directory = Path(directory).resolve()
        if not read_only:
            if is_main_process():
                _clear_incomplete(self._directory)
            wait_for_all("jaxheads: incomplete checkpoints cleared")
            damaged = _damaged_steps(self._directory)
            if is_main_process():
                for number in damaged:
                    _set_aside(self._directory / str(number), "damaged")
            wait_for_all("jaxheads: damaged checkpoints set aside")
        self._read_only = read_only
        self._damaged: set[int] | None = None if read_only else set()  # None: not looked yet
        self._intact: set[int] = set()
        self._writing: tuple[int, Future[None]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checksums")
        keep: list[policies.PreservationPolicy] = [policies.LatestN(keep_last)]
        if keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=_eval_loss,
                    reverse=True,  # the policy keeps the end of the list
                    n=keep_best,
                )
            )
        with _no_warnings() if read_only else contextlib.nullcontext():
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policies.AnyPreservationPolicy(keep),
                    best_fn=_eval_loss,  # without it Orbax does not store metrics
                    best_mode="min",
                    todelete_subdir=None if read_only else _DELETED,
                    read_only=read_only,
                    create=not read_only,
                ),
                item_handlers={
                    "model": ocp.StandardCheckpointHandler(),
                    "training": ocp.StandardCheckpointHandler(),
                    "config": ocp.JsonCheckpointHandler(),
                    "data": ocp.JsonCheckpointHandler(),
                },
            )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        elif jax.process_count() == 1:  # else the others may never come to where this one waits
            with contextlib.suppress(Exception):  # what went wrong first is on its way up
                self.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints that are complete, in order; not those found damaged."""
        return sorted(set(self._manager.all_steps()) - (self._damaged or set()))

    @property
    def best_step(self) -> int | None:
        """The step of lowest `eval_loss` among the checkpoints that are kept."""
        losses = {step: self.eval_loss(step) for step in self.steps}
        best = min(losses, key=losses.__getitem__, default=None)
        return None if best is None or math.isinf(losses[best]) else best

    def eval_loss(self, step: int) -> float:
        """The evaluation that was saved with a checkpoint, infinite when there was none."""
        return float((self._manager.metrics(step) or {}).get("eval_loss", math.inf))

    def save(
        self,
        step: int,
        *,
        model: Decoder,
        training: PyTree,
        config: Mapping[str, Any],
        data_state: Mapping[str, Any],
        eval_loss: float | None = None,
    ) -> None:
        """Starts to write a checkpoint and returns; the arrays may be donated right after.

        Waits first for the checkpoint before it, and raises what went wrong there (`check`).

        Args:
          training: whatever the run needs besides the model, as a pytree of arrays.
          config: JSON values.
          data_state: of this process; the states of all processes are merged.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        args = self._ocp.args
        with self._explained(step):
            self._manager.save(
                step,
                args=args.Composite(
                    model=args.StandardSave(flatten(model)),
                    training=args.StandardSave(flatten(training)),
                    config=args.JsonSave(dict(config)),
                    data=args.JsonSave(gather_states(data_state)),
                ),
                # Checkpoints without an evaluation rank last, the newest of them first.
                metrics={"eval_loss": math.inf if eval_loss is None else eval_loss},
            )
        self._writing = step, self._thread.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        """In a thread: when the checkpoint is complete, adds the checksums of its files."""
        self._manager.wait_until_finished()
        if is_main_process():
            shutil.rmtree(self._directory / _DELETED, ignore_errors=True)
        directory = self._directory / str(step)
        checksums.write(directory, jax.process_index(), jax.process_count())

    def check(self) -> None:
        """Raises what went wrong in the last `save`, if anything; does not wait for it.

        Raises:
          OSError: when the disk is full or refuses to be written.
        """
        if self._writing is not None and self._writing[1].done():
            self.wait()

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Turns what Orbax says about a disk into one clear error."""
        try:
            yield
        except Exception as error:
            reason = _disk_error(error)
            if reason is None:
                raise
            rest = [s for s in _complete_steps(self._directory) if s != step]
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self._directory}: "
                f"{reason}. "
                + (f"The one of step {rest[-1]} is complete. " if rest else "")
                + "Make room and start again; the run goes on from its newest complete checkpoint."
            ) from error

    def config(self, step: int | None = None) -> dict[str, Any]:
        """The JSON configurations inside a checkpoint; default: the newest."""
        return self._read(self._step(step), "config")

    def restore(self, model: Decoder, training: PyTree, step: int | None = None) -> Restored:
        """The newest checkpoint, or that of `step`, in the shards that the arguments name.

        Args:
          model, training: as `abstract` gives them: shapes, dtypes and shardings. A model without
            `cfg` (tables) is compared by its arrays alone.
        Raises:
          ValueError: when the checkpoint is of another model or another optimiser, naming the
            fields or arrays that differ, and when its files are damaged.
        """
        step = self._step(step)
        cfg, changed = getattr(model, "cfg", None), []  # a tree of tables has none
        if cfg is not None:
            stored = from_json(type(cfg), self._read(step, "config")["model"], section="model")
            changed = differences(stored, cfg)
        changed = [line for line in changed if line.partition(":")[0] not in _FREE_FIELDS]
        if changed:
            raise ValueError(
                f"checkpoint {self._directory / str(step)} is of another model: "
                f"{'; '.join(changed)} (checkpoint -> now). Give the settings of the checkpoint, "
                "or another workdir."
            )
        like = {"model": flatten(model), "training": flatten(training)}
        for item, arrays in like.items():
            self._compare(step, item, arrays)
        args = self._ocp.args
        read = self._manager.restore(
            step,
            args=args.Composite(
                model=args.StandardRestore(like["model"]),
                training=args.StandardRestore(like["training"]),
                data=args.JsonRestore(),
            ),
        )
        return Restored(
            step,
            unflatten(model, read["model"]),
            unflatten(training, read["training"]),
            read["data"],
        )

    def restore_model(self, model: Decoder, step: int | None = None) -> Decoder:
        """Only the parameters of a checkpoint, in the dtypes and shards of `model`."""
        step, like = self._step(step), flatten(model)
        self._compare(step, "model", like)
        args = self._ocp.args
        read = self._manager.restore(step, args=args.Composite(model=args.StandardRestore(like)))
        return unflatten(model, read["model"])

    def reached_preemption(self, step: int) -> bool:
        """Whether the machines will be taken away and all processes should stop after `step`."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns when the last `save` is on disk; raises as `check`."""
        if self._writing is not None:
            step, finished = self._writing
            with self._explained(step):
                finished.result()
            self._writing = None

    def close(self) -> None:
        """Waits for the last `save` and ends the threads."""
        try:
            self.wait()
        except Exception:
            with contextlib.suppress(Exception):  # it would tell the same, less clearly
                self._manager.close()
            raise
        finally:
            self._thread.shutdown()
        self._manager.close()

    def _step(self, step: int | None) -> int:
        if step is None and self._damaged is None:
            self._damaged = _damaged_steps(self._directory, only_model=True)
        if step is None and self.steps:
            return self.steps[-1]
        if step not in self.steps:
            raise ValueError(
                f"{self._directory} holds no checkpoint{'' if step is None else f' of step {step}'}"
                f"; complete ones: {', '.join(map(str, self.steps)) or 'none'}."
            )
        if step not in self._intact:  # an older one; the newest was looked at in the beginning
            checkpoint = self._directory / str(step)
            found = _problems(checkpoint, only_model=self._read_only)
            if found is not None:
                raise ValueError(f"checkpoint {checkpoint} is damaged ({found}); take another.")
            self._intact.add(step)
        return step

    def _read(self, step: int, item: str) -> dict[str, Any]:
        args = self._ocp.args
        return self._manager.restore(step, args=args.Composite(**{item: args.JsonRestore()}))[item]

    def _compare(self, step: int, item: str, like: Mapping[str, Any]) -> None:
        """Raise when names or shapes of the stored arrays are not those of `like`."""
        # The manager would open all items, of which a reader of models needs one.
        path = self._directory / str(step) / item
        metadata = self._ocp.StandardCheckpointHandler().metadata(path)  # type: ignore[arg-type]
        stored = {name: tuple(array.shape) for name, array in metadata.tree.items()}
        wanted = {name: tuple(array.shape) for name, array in like.items()}
        # Random keys are stored as the integers they are made of.
        keys = {n for n, a in like.items() if jnp.issubdtype(a.dtype, jax.dtypes.prng_key)}
        lines = [f"no {n}" for n in sorted(wanted.keys() - stored.keys())]
        lines += [f"a spare {n}" for n in sorted(stored.keys() - wanted.keys())]
        lines += [
            f"{n} of shape {stored[n]}, needed {wanted[n]}"
            for n in sorted(wanted.keys() & stored.keys() - keys)
            if stored[n] != wanted[n]
        ]
        if lines:
            shown = "; ".join(lines[:8]) + (f"; {len(lines) - 8} more" if len(lines) > 8 else "")
            raise ValueError(
                f"checkpoint {self._directory / str(step)} does not fit this run: its {item} has "
                f"{shown}. Use the optimizer settings it was saved with, or another workdir."
            )


def _eval_loss(metrics: Mapping[str, float]) -> float:
    return metrics["eval_loss"]


# How the maths is carried out, not what it is: free to change from run to run.
_FREE_FIELDS = frozenset({"implementation", "remat", "compute_dtype", "scan_unroll"})


def load_model(path: str | Path, *, dtype: str | None = None, mesh: Mesh | None = None) -> Decoder:
    """The model of a training run. In a run of many processes all must call this.

    Args:
      path: a workdir, its `checkpoints` directory (both: the newest checkpoint), or one checkpoint.
      dtype: of the parameters; default: as stored.
      mesh: where to place them; default: the first device.
    Raises:
      ValueError: when there is no complete checkpoint.
    """
    directory, step = _locate(Path(path).expanduser().resolve())
    with _damage_named(directory), Checkpoints(directory, read_only=True) as checkpoints:
        cfg = from_json(ModelConfig, checkpoints.config(step)["model"], section="model")
        cfg = cfg if dtype is None else dataclasses.replace(cfg, param_dtype=dtype)
        mesh = parallel.make_mesh("") if mesh is None else mesh
        like = abstract(lambda: Decoder(cfg, rngs=nnx.Rngs(0)), mesh)
        return checkpoints.restore_model(like, step)


def load_config(path: str | Path) -> dict[str, Any]:
    """The configurations stored in a checkpoint: ``{"model": ModelConfig, "data": DataConfig}``.

    Args:
      path: as for `load_model`.
    """
    directory, step = _locate(Path(path).expanduser().resolve())
    kinds = {"model": ModelConfig, "data": DataConfig}
    with _damage_named(directory), Checkpoints(directory, read_only=True) as checkpoints:
        stored = checkpoints.config(step)
        return {n: from_json(k, stored[n], section=n) for n, k in kinds.items() if n in stored}


@contextlib.contextmanager
def _damage_named(directory: Path) -> Iterator[None]:
    """Errors about damaged files, which Orbax raises as almost anything, as one that names them."""
    try:
        yield
    except NotImplementedError:
        raise
    except Exception as error:  # tensorstore's own are plain Exceptions
        text = str(error)
        if isinstance(error, ValueError) and str(directory) in text:
            raise
        reason = text.partition("\n")[0][:300] or type(error).__name__
        raise ValueError(
            f"a checkpoint in {directory} cannot be read: its files are damaged or of another "
            f"version ({type(error).__name__}: {reason}). Take another step, or a copy."
        ) from error


def is_checkpoint(path: str | Path) -> bool:
    """Whether `load_model` can read this path."""
    try:
        directory, _ = _locate(Path(path).expanduser().resolve())
    except ValueError:
        return False
    return any(_is_complete(entry) for entry in directory.iterdir())


def _locate(path: Path) -> tuple[Path, int | None]:
    """(directory of checkpoints, step or None for the newest) that a user's path means."""
    if path.name.isdigit() and _is_complete(path):
        return path.parent, int(path.name)
    for directory in (path / CHECKPOINTS, path):
        if directory.is_dir() and any(_is_complete(entry) for entry in directory.iterdir()):
            return directory, None
    raise ValueError(
        f"{path} holds no complete checkpoint; give the workdir of a training run, or "
        f"WORKDIR/{CHECKPOINTS}/STEP."
    )


def _is_complete(directory: Path) -> bool:
    """Whether a save into `directory` came to its end."""
    if not directory.name.isdigit():
        return False
    try:
        metadata = json.loads((directory / "_CHECKPOINT_METADATA").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    there = all((directory / item).is_dir() for item in ITEMS)
    return there and isinstance(metadata, dict) and bool(metadata.get("commit_timestamp_nsecs"))


def _clear_incomplete(directory: Path) -> None:
    """Remove what interrupted saves left, and set damaged checkpoints aside, with a warning."""
    for entry in sorted(directory.iterdir()) if directory.is_dir() else []:
        if entry.name == _DELETED:
            shutil.rmtree(entry)
        elif _TEMPORARY in entry.name:
            _log.warning("%s is an unfinished save of an interrupted run: removed.", entry)
            shutil.rmtree(entry)
        elif entry.name.isdigit() and not _is_complete(entry):
            _set_aside(entry, "incomplete")


def _set_aside(checkpoint: Path, why: str) -> None:
    aside = checkpoint.with_name(f"{why}-{checkpoint.name}")
    _log.warning("checkpoint %s is %s: skipped, and renamed %s.", checkpoint, why, aside.name)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def _complete_steps(directory: Path) -> list[int]:
    entries = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(entry.name) for entry in entries if _is_complete(entry))


def _damaged_steps(directory: Path, *, only_model: bool = False) -> set[int]:
    """The newest checkpoints down to the first one whose files are as they were written.

    Raises:
      ValueError: when there are checkpoints and all of them are damaged.
    """
    damaged: dict[int, str] = {}
    for step in reversed(_complete_steps(directory)):
        checkpoint = directory / str(step)
        found = _problems(checkpoint, only_model=only_model)
        if found is None:
            break
        damaged[step] = found
        _log.warning("checkpoint %s is damaged (%s): the one before is used.", checkpoint, found)
    else:
        if damaged:
            step, found = next(iter(damaged.items()))
            raise ValueError(
                f"every checkpoint in {directory} is damaged; the newest, {step}: {found}. Restore "
                "the files from a copy, or start anew with another workdir or --resume=false."
            )
    return set(damaged)


def _problems(checkpoint: Path, *, only_model: bool) -> str | None:
    """What is wrong with the files of a checkpoint, None when they are as they were written.

    Each process reads a share of the files, and all come to the same result.
    """
    found = checksums.problems(
        checkpoint,
        jax.process_index(),
        jax.process_count(),
        wanted=lambda name: not (only_model and name.startswith("training/")),
    )
    if all_agree(not found):
        if not checksums.is_complete(checkpoint):
            _log.info("checkpoint %s has no checksums: taken as it is.", checkpoint)
        return None
    return "; ".join(found[:4]) or "found by another process"


_DISK = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|Read-only file system|"
    r"Input/output error|Permission denied|Stale file handle"
)


def _disk_error(error: BaseException | None) -> str | None:
    """What the disk said, None for an error of another kind."""
    while error is not None:
        found = _DISK.search(str(error))
        if found:
            return found[0]
        error = error.__cause__ or error.__context__
    return None


def gather_states(state: Mapping[str, Any]) -> dict[str, Any]:
    """The data states of all processes as one that any number of processes can restore."""
    if jax.process_count() == 1:
        return dict(state)
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray([len(text)])).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    states = [json.loads(bytes(row[:n])) for row, n in zip(rows, lengths)]
    # Processes that a model or context axis spans read the same rows.
    return merge_states(list({tuple(state["rows"]): state for state in states}.values()))
