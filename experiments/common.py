"""What the experiments share: claims, flags, a small training loop, and the files a run leaves.

    flags      --workdir --seeds --size (and those of every launcher)
    Claim      one statement with the number measured, the number needed and whether it holds
    fit        trains small models, one per seed, in one compiled program
    finish     writes claims.json, table.md and figure.png, prints them, gives the exit code

An experiment is a script:

    def define_flags():
        common.define_flags("recall")

    def main():
        run = common.options()
        trained = common.fit(loss, init, batch, steps=20 if run.quick else 800, seeds=run.seeds)
        accuracy = common.evaluate(metric, trained.params, batch, seeds=run.seeds)     # [N]
        claims = [common.at_least("recall", accuracy, 0.9)]
        return common.finish(claims, run.workdir, table=rows, figure=draw)

    if __name__ == "__main__":
        define_flags()
        flags.run(main)

It exits with 0 when every claim holds and with 1 otherwise. `experiments/run_all.py` makes
RESULTS.md from the claims.json files kept in `experiments/results/`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags as absl_flags
from absl import logging

from jaxheads.models import ModelConfig
from jaxheads.typing import Array, ArrayLike, PyTree
from launch import flags

EXIT_CLAIM_FAILED = 1
_STARTED = time.perf_counter()
_INIT, _TRAIN, _EVALUATE = range(3)  # what the keys of one seed are for
_OVER_SEEDS = ("vmap", "map")
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement of an experiment.

    Attributes:
      name: what is claimed, in words.
      measured: the number that decides, or several (one a seed).
      needed: the condition as text, for example ">= 0.95".
      holds: whether `measured` meets `needed`.
    """

    name: str
    measured: float | Sequence[float]
    needed: str
    holds: bool


def at_least(name: str, measured: ArrayLike, bound: float) -> Claim:
    """The claim that the mean over `measured` is `bound` or more; NaN fails."""
    mean = float(np.mean(measured))
    return Claim(name, mean, f">= {bound:g}", mean >= bound)


def at_most(name: str, measured: ArrayLike, bound: float) -> Claim:
    """The claim that the mean over `measured` is `bound` or less; NaN fails."""
    mean = float(np.mean(measured))
    return Claim(name, mean, f"<= {bound:g}", mean <= bound)


SIZES = ("smoke", "default", "real")


class Options(NamedTuple):
    """The flags that every experiment has."""

    workdir: Path
    seeds: tuple[int, ...]
    size: str
    """One of `SIZES`."""

    @property
    def quick(self) -> bool:
        """Whether only seconds are wanted."""
        return self.size == "smoke"


def define_flags(name: str = "experiment") -> None:
    """Defines --workdir (runs/`name` by default), --seeds, --size and the launchers' flags."""
    flags.define_common()
    absl_flags.DEFINE_string("workdir", f"runs/{name}", "Where claims, table and figure go.")
    absl_flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds that are reported, comma-separated.")
    absl_flags.DEFINE_enum(
        "size", "default", SIZES, "smoke: seconds, it runs and shows nothing; real: as the paper."
    )
    absl_flags.DEFINE_bool("quick", False, "The same as --size=smoke.")


def options(*, has_real_size: bool = False) -> Options:
    """The values of the flags.

    Args:
      has_real_size: whether the experiment knows the size of its paper; otherwise --size=real is an
        error rather than the default under another name.

    Raises:
      ValueError: for seeds that are no integers, given twice or missing; for --size=real where
        there is none.
    """
    given = absl_flags.FLAGS
    size = "smoke" if given.quick else given.size
    if size == "real" and not has_real_size:
        raise ValueError(
            "--size=real: this experiment trains its own models and has one size; use default."
        )
    try:
        seeds = tuple(int(seed) for seed in given.seeds)
    except ValueError:
        raise ValueError(
            f"--seeds={','.join(given.seeds)} needs integers, such as 0,1,2."
        ) from None
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds={','.join(given.seeds)} needs different seeds, such as 0,1,2.")
    return Options(Path(given.workdir), seeds, size)


class Fitted(NamedTuple):
    """Models trained by `fit`."""

    params: PyTree
    """Leaves [N, ...], one entry per seed."""
    losses: np.ndarray
    """[N, steps] loss of every step, before its update."""


def small_config(**changes: Any) -> ModelConfig:
    """The decoder of most experiments: two layers of width 64, four heads."""
    size = dict(num_layers=2, model_dim=64, mlp_dim=128, num_heads=4)
    start = dict(embed_std=0.3, tie_embeddings=False)
    return ModelConfig(**{**size, **start, **changes})


def fit(
    loss_fn: Callable[[PyTree, PyTree], Array],
    init: Callable[[Array], PyTree],
    batches_fn: Callable[[Array], PyTree],
    *,
    steps: int,
    seeds: Sequence[int],
    lr: float | optax.Schedule = 1e-3,
    weight_decay: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    start: PyTree | None = None,
    over_seeds: str = "vmap",
) -> Fitted:
    """Trains one model per seed; initialisation, batches and steps are one compiled program.

    Each step draws a fresh batch. AdamW (b2 = 0.95) with gradients clipped to norm 1; a number for
    `lr` is the peak of a schedule that warms up over a twentieth of the steps and decays to 0 along
    a cosine.

    Args:
      loss_fn: (params, batch) -> scalar.
      init: key -> params, any pytree of arrays (an NNX module is one).
      batches_fn: key -> batch.
      steps: updates.
      seeds: one integer per model; the seed fixes initialisation and batches.
      lr: peak learning rate, or a schedule step -> rate.
      weight_decay: AdamW's.
      optimizer: instead of AdamW; `lr` and `weight_decay` are then not used.
      start: parameters [N, ...] to go on from, of an earlier call; `init` is then not used.
      over_seeds: "vmap" trains the models side by side, "map" one after another in the same
        program (less memory).
    Returns:
      Fitted(params with a leading [N], losses [N, steps]).
    """
    if over_seeds not in _OVER_SEEDS:
        raise ValueError(f"over_seeds={over_seeds!r} is not one of {', '.join(_OVER_SEEDS)}.")
    if steps < 1:
        raise ValueError(f"steps={steps} trains nothing; give 1 or more.")
    update = optimizer or adamw(lr, steps=steps, weight_decay=weight_decay)

    def step(carry: tuple[PyTree, PyTree], key: Array) -> tuple[tuple[PyTree, PyTree], Array]:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batches_fn(key))
        updates, state = update.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    def train(args: tuple[Array, PyTree]) -> tuple[PyTree, Array]:
        key, params = args
        params = init(jax.random.fold_in(key, _INIT)) if params is None else params
        keys = jax.random.split(jax.random.fold_in(key, _TRAIN), steps)
        (params, _), losses = jax.lax.scan(step, (params, update.init(params)), keys)
        return params, losses

    params, losses = _each_seed(train, over_seeds)((_keys(seeds), start))
    return Fitted(params, np.asarray(losses))


def adamw(
    lr: float | optax.Schedule, *, steps: int, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """What `fit` uses: AdamW behind clipping, `lr` with warm-up and cosine decay if a number."""
    if not callable(lr):
        lr = optax.warmup_cosine_decay_schedule(0.0, lr, max(1, steps // 20), steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(lr, b2=0.95, weight_decay=weight_decay)
    )


def evaluate(
    metric_fn: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    batches_fn: Callable[[Array], PyTree],
    *,
    seeds: Sequence[int],
    num_batches: int = 8,
    over_seeds: str = "vmap",
) -> Any:
    """Mean of `metric_fn(params, batch)` over batches that `fit` did not draw.

    Args:
      metric_fn: (params, batch) -> pytree of arrays.
      params: leaves [N, ...] as `fit` returns them.
      batches_fn: key -> batch.
      seeds: the N seeds of `fit`.
      num_batches: batches averaged over.
    Returns:
      The metrics as NumPy arrays [N, ...].
    """

    def measure(args: tuple[PyTree, Array]) -> PyTree:
        one, key = args
        keys = jax.random.split(jax.random.fold_in(key, _EVALUATE), num_batches)
        metrics = jax.lax.map(lambda k: metric_fn(one, batches_fn(k)), keys)
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), metrics)

    return jax.tree.map(np.asarray, _each_seed(measure, over_seeds)((params, _keys(seeds))))


def _keys(seeds: Sequence[int]) -> Array:
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def _each_seed(fn: Callable[[Any], Any], over_seeds: str) -> Callable[[Any], Any]:
    every = jax.vmap(fn) if over_seeds == "vmap" else lambda xs: jax.lax.map(fn, xs)
    return jax.jit(every)


def finish(
    claims: Sequence[Claim],
    workdir: str | Path,
    *,
    table: Sequence[Row] | None = None,
    figure: Callable[[Any], None] | None = None,
    data: Mapping[str, Any] | None = None,
) -> int:
    """Writes and prints what an experiment found.

    Args:
      claims: what the experiment decides.
      workdir: claims.json, table.md and figure.png go here; made when missing.
      table: rows with the same keys, written as a Markdown table and into claims.json.
      figure: draws on the matplotlib `Figure` it is given; without matplotlib (extra `viz`) the
        figure is left out with a log line.
      data: more results for claims.json, plain numbers and lists.
    Returns:
      0 when every claim holds, otherwise 1.
    Raises:
      ValueError: without claims.
    """
    if not claims:
        raise ValueError("an experiment without claims decides nothing; give at least one Claim.")
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    content = {
        **flags.provenance(),
        "machine": machine(),
        "seconds": round(time.perf_counter() - _STARTED, 1),
        "claims": [dataclasses.asdict(claim) for claim in claims],
        "table": [dict(row) for row in table or ()],
        **(data or {}),
    }
    flags.write_json(workdir / "claims.json", _plain(content))
    if table:
        text = markdown(table)
        (workdir / "table.md").write_text(text, encoding="utf-8")
        print(f"\n{text}")
    if figure is not None:
        _draw(figure, workdir / "figure.png")
    for claim in claims:
        verdict = "holds" if claim.holds else "FAILS"
        print(f"{verdict}: {claim.name}: {_text(claim.measured)} (needed {claim.needed})")
    return 0 if all(claim.holds for claim in claims) else EXIT_CLAIM_FAILED


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table whose columns are the keys of the first row."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([_text(row[n]) for n in names] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    devices = jax.devices()
    return {
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }


def _draw(figure: Callable[[Any], None], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logging.warning("no figure: matplotlib is missing; pip install 'jaxheads[viz]'")
        return
    page = Figure(figsize=(7.0, 4.0), layout="constrained")
    figure(page)
    page.savefig(path, dpi=110)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple, np.ndarray)):
        return " ".join(_text(x) for x in value)
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def _plain(x: Any) -> Any:
    """Arrays and NumPy scalars as lists and numbers; NaN and infinities as text (JSON has none)."""
    if isinstance(x, Mapping):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if isinstance(x, (np.ndarray, jax.Array, np.generic)):
        return _plain(x.tolist())
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return x
