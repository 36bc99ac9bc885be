"""`load` and `save`: models as Hugging Face directories, config.json and safetensors.

Loading maps the files and lets every shard of every parameter copy just its bytes, so no host
holds more of the model than its devices do. Saving streams one tensor at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding

from jaxheads import parallel
from jaxheads.checkpoints import names, safetensors, vision
from jaxheads.checkpoints.directory import (
    CONFIG,
    INDEX,
    WEIGHTS,
    check_inside,
    locate,
    open_weights,
    raise_all,
    read_json,
)
from jaxheads.checkpoints.families import from_hf, to_hf
from jaxheads.checkpoints.names import NAME_MAPS, NameMap, Row
from jaxheads.checkpoints.safetensors import DTYPES, Stored, Tensor
from jaxheads.fields import shorten
from jaxheads.models import Decoder, ModelConfig, vit, with_config
from jaxheads.models.vit import ViT, ViTConfig
from jaxheads.parallel.multihost import is_main_process
from jaxheads.typing import PyTree


class ModelKind(NamedTuple):
    """A kind of model that has directories."""

    model: Any
    """Its class: (cfg, *, rngs) -> model."""
    from_hf: Callable[[Mapping[str, Any]], Any]
    """config.json -> the configuration."""
    to_hf: Callable[[Any], dict[str, Any]]
    names_of: Callable[[Mapping[str, Any]], NameMap | None]
    """config.json -> the names of its tensors; None: our own names."""
    with_config: Callable[..., Any]


def _text_names(config: Mapping[str, Any]) -> NameMap | None:
    return NAME_MAPS.get(config["model_type"])


TEXT = ModelKind(Decoder, from_hf, to_hf, _text_names, with_config)
VISION = ModelKind(ViT, vision.from_hf, vision.to_hf, vision.name_map, vit.with_config)


def load(path_or_name: str | Path, *, dtype: Any = None, mesh: Mesh | None = None) -> Any:
    """A model from disk, from the Hugging Face hub, or shipped with the package.

    A `Decoder`; for a directory of a vision transformer (ViT, DeiT) a `ViT`.

    Args:
      path_or_name: a Hugging Face directory (config.json, safetensors), a directory written by
        `save`, the directory of a training run or one of its checkpoints, the name of a shipped
        model, or a hub id "org/name" (needs ``pip install jaxheads[hub]``).
      dtype: float32, bfloat16 or float16 for parameters and computation; default: parameters as
        stored, computation as `ModelConfig.compute_dtype` "auto" says.
      mesh: where the parameters go, by their axis names; each shard reads only its own bytes.
        Default: the first device.

    Raises:
      ValueError: for anything wrong with the files, listing all of it; no pickle is ever read.
      NotImplementedError: for a model whose configuration asks for maths we do not have.
      ImportError: for a hub id without huggingface_hub.
    """
    name = None if dtype is None else _dtype_name(dtype)
    directory = locate(path_or_name)
    has_weights = (directory / WEIGHTS).is_file() or (directory / INDEX).is_file()
    is_run = (directory / "checkpoints").is_dir() and not has_weights
    if is_run or not (directory / CONFIG).is_file():
        return _load_training(directory, name, mesh)
    check_inside(directory, CONFIG)
    config = read_json(directory / CONFIG)
    kind = VISION if vision.is_vision(config) else TEXT
    try:
        cfg, names_of = kind.from_hf(config), kind.names_of(config)
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{directory}: {shorten(error)}") from error
    abstract = jax.eval_shape(lambda: kind.model(cfg, rngs=nnx.Rngs(0)))
    homes = _homes(cfg, names_of, _flatten(abstract)[0])
    tensors = _match(cfg, names_of, homes, open_weights(directory), str(directory))
    model = _build(abstract, homes, tensors, None if name is None else jnp.dtype(name), mesh)
    return kind.with_config(model, **_dtypes(tensors, name))


def _dtype_name(dtype: Any) -> str:
    allowed = ("float32", "bfloat16", "float16")
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in allowed:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(allowed)}.")
    return name


def _load_training(directory: Path, dtype: str | None, mesh: Mesh | None) -> Decoder:
    from jaxheads.checkpoints import orbax

    if orbax.is_checkpoint(directory):
        return orbax.load_model(directory, dtype=dtype, mesh=mesh)
    if (directory / "adapter_config.json").exists():
        raise NotImplementedError(
            f"{directory} holds an adapter (LoRA), not a model; merge it into its base model "
            "(peft: merge_and_unload) and save that."
        )
    raise ValueError(
        f"{directory} is no model: it has neither {CONFIG} nor a complete training checkpoint; "
        f"it holds {', '.join(sorted(os.listdir(directory))[:20]) or 'nothing'}."
    )


class Home(NamedTuple):
    """Where a parameter lives in files."""

    rows: list[Row]
    """One, or one per layer."""
    stacked: bool
    sizes: Mapping[str, int]
    """Of the letters in the rows' layouts."""


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _flatten(model: PyTree) -> tuple[dict[str, nnx.Variable], Any]:
    """Parameters by path ("layers.attention.wq") and the structure to put them back into."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_variable)
    key = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return {key(path): leaf for path, leaf in leaves}, structure


def _homes(
    cfg: ModelConfig | ViTConfig, names_of: NameMap | None, leaves: Mapping[str, Any]
) -> dict[str, Home]:
    """The home of each parameter in a family's files, or under our own names without one."""
    if names_of is None:
        letters = "abcdefghij"
        same = lambda n: f"{' '.join(letters[:n])} -> {' '.join(letters[:n])}"
        return {
            path: Home([Row(path, path, same(x.ndim))], False, dict(zip(letters, x.shape)))
            for path, x in leaves.items()
        }
    table = {row.path: row for row in names_of.rows}
    sizes = names.axis_sizes(cfg)
    homes = {}
    for path in leaves:
        stacked = "{l}" in table[path].name
        count = cfg.num_layers if stacked else 1
        rows = [table[path]._replace(name=table[path].name.format(l=i)) for i in range(count)]
        homes[path] = Home(rows, stacked, sizes)
    return homes


def _match(
    cfg: ModelConfig | ViTConfig,
    names_of: NameMap | None,
    homes: Mapping[str, Home],
    stored: Mapping[str, Stored],
    where: str,
) -> dict[str, Stored]:
    """The stored tensors by the names in `homes`.

    Raises:
      ValueError: listing every missing, unexpected or misshapen tensor.
    """
    needed = {
        row.name: names.stored_shape(row, home.sizes)
        for home in homes.values()
        for row in home.rows
    }
    problems: list[str] = []
    found = _canonical(cfg, names_of, stored, needed, problems)
    for name, shape in needed.items():
        tensor = found.get(name)
        if tensor is None:
            problems.append(f"{name} {list(shape)} is missing")
            continue
        if tensor.shape != shape:
            problems.append(
                f"{name} has shape {list(tensor.shape)}, the configuration needs {list(shape)}"
            )
        if tensor.dtype not in DTYPES:
            problems.append(f"{name} is stored as {tensor.dtype}, needed {', '.join(DTYPES)}")
    head = found.pop(_TIED, None)
    if head is not None and not problems:
        # A tied model may store its output matrix, but only as a copy of the embedding.
        embed = homes["embed.table"].rows[0].name
        if not safetensors.equal(head, found[embed]):
            problems.append(
                f"the stored output matrix differs from {embed} although tie_word_embeddings is "
                f"true; set it to false in {CONFIG} if the matrix is meant to be used"
            )
    raise_all(f"the tensors in {where} do not fit its {CONFIG}", problems)
    return found


_HEADS = ("lm_head.weight", "embed_out.weight")
_TIED = "the output matrix of a tied model"


def _canonical(
    cfg: ModelConfig | ViTConfig,
    names_of: NameMap | None,
    stored: Mapping[str, Stored],
    needed: Mapping[str, Any],
    problems: list[str],
) -> dict[str, Stored]:
    """Tensors by the names of the family's table; complains about those it does not have."""
    prefix, aliases = (names_of.prefix, names_of.aliases) if names_of else ("", {})
    is_tied = isinstance(cfg, ModelConfig) and cfg.tie_embeddings
    found: dict[str, Stored] = {}
    for name, tensor in stored.items():
        candidates = (name, aliases.get(name), prefix + name)
        target = next((c for c in candidates if c in needed), None)
        if target is None and names_of and is_tied and name in _HEADS:
            target = _TIED
        if target is None:
            if not names.IGNORED.search(name):
                problems.append(f"{name} {list(tensor.shape)} is not part of the model")
        elif target in found:
            problems.append(f"{name} is stored twice, under two names")
        else:
            found[target] = tensor
    return found


def _dtypes(tensors: Mapping[str, Stored], name: str | None) -> dict[str, str]:
    """The dtypes of the configuration: as asked for, or else what most weights are stored in."""
    if name is not None:
        return {"param_dtype": name, "compute_dtype": name}
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        dtype = DTYPES[tensor.dtype].name
        sizes[dtype] = sizes.get(dtype, 0) + tensor.num_bytes
    return {"param_dtype": max(sizes, key=lambda d: sizes[d])}


def _build(
    abstract: PyTree,
    homes: Mapping[str, Home],
    tensors: Mapping[str, Stored],
    dtype: np.dtype | None,
    mesh: Mesh | None,
) -> Any:
    """The model with every shard of every parameter read from its tensors."""
    leaves, structure = _flatten(abstract)
    places: dict[str, Sharding | None] = dict.fromkeys(leaves)
    if mesh is not None:
        shardings = _flatten(parallel.shardings(abstract, mesh))[0]
        places = {path: leaf.get_raw_value() for path, leaf in shardings.items()}
    built: dict[str, nnx.Variable] = {}
    # Largest first: what copying takes on top is then on top of little else.
    for path in sorted(leaves, key=lambda p: -leaves[p].size):
        stored = [tensors[row.name] for row in homes[path].rows]
        to = dtype or np.result_type(*(DTYPES[s.dtype] for s in stored))
        shape, place = leaves[path].shape, places[path]
        read = _reader(homes[path], stored, shape, to)
        if place is None:
            value = jax.device_put(read((slice(None),) * len(shape)))
        else:
            value = jax.make_array_from_callback(shape, place, read)
        built[path] = leaves[path].replace(value)
    return jax.tree.unflatten(structure, [built[path] for path in leaves])


def _reader(
    home: Home, stored: list[Stored], shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[Any], np.ndarray]:
    """A function from an index of the parameter (slices) to a new array with that part of it."""
    done: dict[tuple, np.ndarray] = {}  # parts that several devices hold alike

    def copy(target: np.ndarray, i: int, index: tuple[slice, ...]) -> None:
        part = names.view(stored[i].array(), home.rows[i], home.sizes)[index]
        safetensors.copy(target, part, stored[i])

    def read(index: tuple[slice, ...]) -> np.ndarray:
        spans = tuple(range(*s.indices(n)) for s, n in zip(index, shape))
        if spans not in done:
            out = safetensors.aligned_empty(tuple(map(len, spans)), dtype)
            if home.stacked:
                for target, layer in zip(out, spans[0]):
                    copy(target, layer, index[1:])
            else:
                copy(out, 0, index)
            done[spans] = out
        return done[spans]

    return read


def save(model: Decoder | ViT, directory: str | Path, *, max_shard_bytes: float = 5e9) -> None:
    """Write a model as a Hugging Face directory: config.json and safetensors.

    `load` reads it back bit for bit, and so does transformers where the family can express the
    configuration; otherwise config.json has model_type "jaxheads" and the tensors our names. Each
    file appears under its name only when complete. In a run of many processes all must call this;
    process 0 writes.

    Args:
      model: what to save.
      directory: made when missing; other files in it, such as a tokenizer, stay.
      max_shard_bytes: largest file; more is split, with an index.
    """
    kind = next((k for k in (TEXT, VISION) if isinstance(model, k.model)), None)
    if kind is None:
        raise TypeError(f"save needs a Decoder or a ViT, got {type(model).__name__}.")
    if not max_shard_bytes > 0:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive.")
    path = Path(directory).expanduser()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; save needs a directory.")
    config = kind.to_hf(model.cfg)
    shards = _split(_tensors(model, kind.names_of(config)), max_shard_bytes)
    files = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    if is_main_process():
        path.mkdir(parents=True, exist_ok=True)
        write_files(path, config, dict(zip(files, shards)))
    else:
        for tensor in (t for shard in shards for t in shard):
            tensor.value()  # fetching what lies on other processes takes all of them
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jaxheads: saved {path}")


def write_files(path: Path, config: dict[str, Any], shards: Mapping[str, list[Tensor]]) -> None:
    """Write the files of a model, then give them their names, then remove older ones."""
    texts = {CONFIG: config}
    if len(shards) > 1:
        texts[INDEX] = _index(shards)
    parts = {name: path / f".{name}.part" for name in (*shards, *texts)}
    try:
        for name, shard in shards.items():
            safetensors.write(parts[name], shard)
        for name, value in texts.items():
            parts[name].write_text(json.dumps(value, indent=2) + "\n")
        for name, part in parts.items():
            os.replace(part, path / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    for old in (*path.glob("model-*-of-*.safetensors"), path / WEIGHTS, path / INDEX):
        if old.name not in parts:
            old.unlink(missing_ok=True)


def _index(shards: Mapping[str, list[Tensor]]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(t.num_bytes for shard in shards.values() for t in shard)},
        "weight_map": {t.name: name for name, shard in shards.items() for t in shard},
    }


def _split(tensors: list[Tensor], max_bytes: float) -> list[list[Tensor]]:
    """Consecutive tensors in groups of at most `max_bytes`; a larger one has its own."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _tensors(model: Decoder | ViT, names_of: NameMap | None) -> list[Tensor]:
    """The tensors of a model's files: the outer ones, then layer by layer."""
    leaves = {path: leaf.get_raw_value() for path, leaf in _flatten(model)[0].items()}
    homes = _homes(model.cfg, names_of, leaves)
    readers: dict[str, list[tuple[Row, int | None]]] = {}
    for home in homes.values():
        for i, row in enumerate(home.rows):
            readers.setdefault(row.name, []).append((row, i if home.stacked else None))
    order = {name: -1 if held[0][1] is None else held[0][1] for name, held in readers.items()}
    sizes = {row.name: home.sizes for home in homes.values() for row in home.rows}
    return [
        _tensor(name, readers[name], sizes[name], leaves)
        for name in sorted(readers, key=order.__getitem__)
    ]


def _tensor(
    name: str,
    readers: list[tuple[Row, int | None]],
    sizes: Mapping[str, int],
    leaves: Mapping[str, jax.Array],
) -> Tensor:
    """A tensor of a file from the parameters (or layers of them) that it holds."""
    rows = [row for row, _ in readers]

    def value() -> np.ndarray:
        arrays = [(leaves[row.path], layer) for row, layer in readers]
        parts = [fetch(a if layer is None else a[layer]) for a, layer in arrays]
        return names.assemble(rows, parts, sizes)

    dtype = np.result_type(*(leaves[row.path].dtype for row in rows))
    return Tensor(name, names.stored_shape(rows[0], sizes), dtype, value)


def fetch(array: jax.Array) -> np.ndarray:
    """A whole array on this host, from all processes where they share it."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
