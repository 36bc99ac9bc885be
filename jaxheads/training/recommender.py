"""Training of click models from batches: sharded steps, validation, and the best model on disk.

    result = fit(cfg, train_batches, lambda: eval_samples(data, validation), "runs/dare",
                 TrainSettings(steps=1000), mesh=mesh)
    model, stats = checkpoints.recommender.load("runs/dare/best")

Samples are split over the mesh axes data and fsdp, the rows of every table over all devices; the
networks are whole on each. A batch norm sees the whole batch.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxheads import parallel
from jaxheads.checkpoints import recommender as files
from jaxheads.models.recommender import (
    LongSequenceRecommender,
    RecommenderConfig,
    apply,
    init_stats,
    loss,
)
from jaxheads.parallel.multihost import is_main_process
from jaxheads.training.feed import local_block
from jaxheads.training.ranking import auc, grouped_auc, log_loss
from jaxheads.training.recommender_rows import (
    init_recommender,
    make_join,
    make_recommender_step,
)
from jaxheads.training.sparse_step import row_optimizer

BEST, METRICS = "best", "metrics.jsonl"
_log = logging.getLogger(__name__)
Batch = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. The defaults are the paper's."""

    steps: int = 1000
    """Updates."""
    lr: float = 0.01
    """Adam's learning rate, constant; that of rows too."""
    eval_every: int = 150
    """Updates between two validations; there is one after the last update too."""
    seed: int = 0
    """Of the initial parameters."""
    sparse_rows: str = ""
    """How rows of item and category tables learn: "" by dense Adam, or only those that a batch
    touches, by "adam" (lazy) or "rowwise_adagrad"."""

    def __post_init__(self):
        for name in ("steps", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr={self.lr} must be above 0.")
        if self.sparse_rows:
            row_optimizer(self.sparse_rows)


class Scores(NamedTuple):
    """How well a model tells clicks from the rest."""

    auc: float
    gauc: float
    """AUC inside each user, averaged with the users' samples as weights."""
    logloss: float


class Fitted(NamedTuple):
    """What `fit` returns."""

    scores: Scores
    """Of the best model on the validation batches."""
    step: int
    """After which it was found."""
    seconds: float


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples over data and fsdp."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def data_process(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """(index, count) of this process among those that read different samples.

    Raises:
      ValueError: for a batch that the mesh does not divide.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ValueError(
            f"batch_size={batch_size} is not divisible by {ways}, the mesh's data and fsdp axes."
        )
    rows = local_block(batch_sharding(mesh), (batch_size, 1))[0]
    size = rows.stop - rows.start
    return rows.start // size, batch_size // size


def put(batch: Batch, mesh: Mesh, count: int) -> dict[str, jax.Array]:
    """This process's samples, one of `count` parts, as a global batch on the devices."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(
            sharding, np.asarray(value), (len(value) * count, *value.shape[1:])
        )
        for name, value in batch.items()
    }


def _score_batch(model: LongSequenceRecommender, stats: Any, batch: Any) -> tuple[Any, ...]:
    logit = apply(model, stats, batch, train=False).logit
    return logit, batch["label"], batch["user"]


def evaluate(
    model: LongSequenceRecommender, stats: Any, batches: Iterable[Batch], *, mesh: Mesh
) -> Scores:
    """AUC, grouped AUC and log-loss over batches; rows of user -1 do not count.

    Args:
      model, stats: on the mesh.
      batches: this process's samples.
    Raises:
      FloatingPointError: for a model that is no longer finite.
    """
    count = data_process(mesh, mesh.shape["data"] * mesh.shape["fsdp"])[1]
    score = jax.jit(_score_batch, out_shardings=NamedSharding(mesh, P()))
    parts = []
    with jax.set_mesh(mesh):
        for batch in batches:
            parts.append(jax.device_get(score(model, stats, put(batch, mesh, count))))
    logit, label, user = (np.concatenate(column) for column in zip(*parts))
    real = user >= 0
    logit, label, user = logit[real].astype(np.float64), label[real], user[real]
    if not np.isfinite(logit).all():
        raise FloatingPointError("a logit is not finite; lower lr.")
    return Scores(
        auc=auc(logit, label),
        gauc=grouped_auc(logit, label, user),
        logloss=log_loss(1 / (1 + np.exp(-logit)), label),
    )


def fit(
    cfg: RecommenderConfig,
    batches: Iterator[Batch],
    validation: Callable[[], Iterable[Batch]],
    workdir: str | Path,
    settings: TrainSettings,
    *,
    mesh: Mesh,
    extra: Mapping[str, Any] | None = None,
) -> Fitted:
    """Trains a model and keeps the one of the highest validation AUC in WORKDIR/best.

    Args:
      cfg: the model; rows of the tables must be multiples of the mesh's size (`row_multiple`).
      batches: this process's training samples, without end.
      validation: gives the samples to validate on, anew at every call.
      workdir: gets best/ (`checkpoints.recommender`) and metrics.jsonl.
      settings: steps, learning rate, and how rows learn.
      mesh: of all devices.
      extra: JSON values to keep beside the model.
    Raises:
      ValueError: for batches and tables that the mesh does not divide.
      FloatingPointError: when the loss is no longer finite.
    """
    start = time.perf_counter()
    workdir = Path(workdir)
    if is_main_process():
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / METRICS).write_text("")
    begin = _train_by_rows if settings.sparse_rows else _train_densely
    state, step_fn, model_of = begin(cfg, settings, mesh)
    count = data_process(mesh, mesh.shape["data"] * mesh.shape["fsdp"])[1]
    best, best_step, values = Scores(-1.0, -1.0, math.inf), 0, []
    for step in range(1, settings.steps + 1):
        with jax.set_mesh(mesh):
            batch = put(next(batches), mesh, count)
            state, value = step_fn(state, batch)
        values.append(value)
        if step % settings.eval_every and step < settings.steps:
            continue
        mean = float(np.mean(jax.device_get(values)))
        values = []
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is {mean} at step {step}; lower lr.")
        model, stats = model_of(state)
        scores = evaluate(model, stats, validation(), mesh=mesh)
        line = {"step": step, "loss": mean, **scores._asdict()}
        _tell(workdir, line | {"seconds": round(time.perf_counter() - start, 1)})
        if scores.auc > best.auc:
            best, best_step = scores, step
            files.save(model, stats, workdir / BEST, extra={**(extra or {}), **line})
    return Fitted(best, best_step, time.perf_counter() - start)


class _Training(NamedTuple):
    state: Any
    step: Callable[[Any, Any], tuple[Any, jax.Array]]
    """(state, batch) -> (state, loss); the state given is used up."""
    model_of: Callable[[Any], tuple[LongSequenceRecommender, Any]]
    """state -> (model, stats)."""


def _train_densely(cfg: RecommenderConfig, settings: TrainSettings, mesh: Mesh) -> _Training:
    tx = optax.adam(settings.lr)

    def begin() -> tuple[Any, Any, Any]:
        model = LongSequenceRecommender(cfg, rngs=nnx.Rngs(settings.seed))
        return model, tx.init(model), init_stats(cfg)  # type: ignore[arg-type]

    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        model, opt_state, stats = state
        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(model, stats, batch)
        updates, opt_state = tx.update(grads, opt_state, model)
        return (optax.apply_updates(model, updates), opt_state, out.stats), value

    state = parallel.initialize(begin, mesh)
    return _Training(state, jax.jit(step, donate_argnums=0), lambda state: (state[0], state[2]))


def _train_by_rows(cfg: RecommenderConfig, settings: TrainSettings, mesh: Mesh) -> _Training:
    tx, how = optax.adam(settings.lr), settings.sparse_rows
    learn = make_recommender_step(cfg, mesh, optimizer=tx, row_lr=settings.lr, rows=how)
    join = make_join(cfg, mesh)

    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        tables, stats = state
        out = learn(tables, stats, batch)
        return (out.state, out.stats), out.loss

    begun = init_recommender(cfg, mesh, optimizer=tx, rows=how, seed=settings.seed)
    stats = parallel.initialize(lambda: init_stats(cfg), mesh)
    return _Training((begun, stats), step, lambda state: (join(state[0]), state[1]))


def _tell(workdir: Path, line: dict[str, Any]) -> None:
    if is_main_process():
        _log.info("%s", line)
        with (workdir / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
