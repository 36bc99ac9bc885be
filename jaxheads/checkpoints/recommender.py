"""Click models on disk: config.json and model.safetensors, batch norm statistics included.

save(model, stats, "runs/dare")
model, stats = load("runs/dare", mesh=mesh)     # bit for bit
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxheads import parallel
from jaxheads.checkpoints.directory import (
    CONFIG,
    WEIGHTS,
    check_inside,
    open_weights,
    raise_all,
    read_json,
)
from jaxheads.checkpoints.huggingface import fetch, write_files
from jaxheads.checkpoints.orbax import flatten, unflatten
from jaxheads.checkpoints.safetensors import DTYPES, Tensor
from jaxheads.fields import from_json, to_json
from jaxheads.models.recommender import LongSequenceRecommender, RecommenderConfig, init_stats
from jaxheads.models.recommender_layers import Stats
from jaxheads.parallel.multihost import is_main_process, wait_for_all

MODEL_TYPE = "jaxheads-recommender"
_STATS = "stats"


class Loaded(NamedTuple):
    """What `load` returns."""

    model: LongSequenceRecommender
    stats: Stats


def save(
    model: LongSequenceRecommender,
    stats: Stats,
    directory: str | Path,
    *,
    extra: dict[str, Any] | None = None,
) -> None:
    """Writes a click model as config.json and model.safetensors.

    In a run of many processes all must call this; process 0 writes. Files appear under their names
    only when they are complete.

    Args:
      model: the parameters.
      stats: running statistics of its batch norms.
      directory: made when missing.
      extra: JSON values to keep in config.json, such as what the model was trained on.
    """
    path = Path(directory).expanduser()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; save needs a directory.")
    leaves = {name: jnp.asarray(leaf) for name, leaf in flatten(_tree(model, stats)).items()}
    tensors = [
        Tensor(name, leaf.shape, leaf.dtype, lambda leaf=leaf: fetch(leaf))
        for name, leaf in leaves.items()
    ]
    config = {"model_type": MODEL_TYPE, "config": to_json(model.cfg), "extra": extra or {}}
    if is_main_process():
        path.mkdir(parents=True, exist_ok=True)
        write_files(path, config, {WEIGHTS: tensors})
    else:
        for tensor in tensors:
            tensor.value()  # fetching what lies on other processes takes all of them
    wait_for_all(f"saved {path}")


def load_config(directory: str | Path) -> tuple[RecommenderConfig, dict[str, Any]]:
    """The configuration and the `extra` values of a directory that `save` wrote.

    Raises:
      ValueError: for a directory without them, or of another kind of model.
    """
    path = Path(directory).expanduser()
    if not (path / CONFIG).is_file():
        raise ValueError(f"{path} holds no {CONFIG}; give a directory that a recommender is in.")
    check_inside(path, CONFIG)
    content = read_json(path / CONFIG)
    if content.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{path} holds a model of type {content.get('model_type')!r}, needed {MODEL_TYPE!r}."
        )
    cfg = from_json(RecommenderConfig, content.get("config"), section="config")
    extra = content.get("extra", {})
    return cfg, extra if isinstance(extra, dict) else {}


def load(directory: str | Path, *, mesh: Mesh | None = None) -> Loaded:
    """The click model that `save` wrote, and its statistics.

    Args:
      directory: with config.json and model.safetensors.
      mesh: tables are split over all its devices (which must divide their rows); None: one device.
    Raises:
      ValueError: for files that are missing, damaged, or do not fit the configuration.
    """
    path = Path(directory).expanduser()
    cfg, _ = load_config(path)
    stored = open_weights(path)
    like = jax.eval_shape(
        lambda: _tree(LongSequenceRecommender(cfg, rngs=nnx.Rngs(0)), init_stats(cfg))
    )
    needed = flatten(like)
    problems = [f"{name} is missing" for name in needed if name not in stored]
    problems += [f"{name} is not part of the model" for name in stored if name not in needed]
    for name in needed.keys() & stored.keys():
        shape, dtype = stored[name].shape, DTYPES.get(stored[name].dtype)
        if (shape, dtype) != (needed[name].shape, needed[name].dtype):
            problems.append(
                f"{name} is {stored[name].dtype}{list(shape)}, needed "
                f"{needed[name].dtype}{list(needed[name].shape)}"
            )
    raise_all(str(path), sorted(problems))
    arrays = {name: jnp.array(stored[name].array()) for name in needed}
    tree = unflatten(like, arrays)
    if mesh is not None:
        tree = parallel.shard(tree, mesh)
    return Loaded(tree["model"], tree[_STATS])


def _tree(model: LongSequenceRecommender, stats: Stats) -> dict[str, Any]:
    return {"model": model, _STATS: stats}
