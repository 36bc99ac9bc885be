"""What `launch.plan` plans: a request, and the library's own programs lowered for it.

Nothing is allocated: parameters, batches and caches are `jax.ShapeDtypeStruct` with the shardings
that the trainer, `generate` and `sweep` give them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxheads import generation, parallel
from jaxheads.data.packing import FIELDS
from jaxheads.discovery import log_probability, sweep_heads
from jaxheads.fields import override, unknown
from jaxheads.models import PRESETS, Decoder, ModelConfig, forward
from jaxheads.models.configs import LayerSpec
from jaxheads.parallel.mesh import MESH_AXES, mesh_shape, parse_mesh
from jaxheads.parallel.topology import Topology, parse_topology
from jaxheads.training import TrainConfig, init_state, make_optimizer, make_train_step
from jaxheads.training.step import batch_sharding, check_batch, state_shardings
from launch import plan_recommender


@dataclass(frozen=True, kw_only=True)
class Request:
    """A job on a machine. Hashable; variations come from `dataclasses.replace`."""

    name: str
    """What the model was called."""
    model: Any
    """A `ModelConfig`, or what the job's row of `JOBS` resolves names to."""
    train: TrainConfig = TrainConfig()
    topology: str = "cpu:1"
    mesh: str = ""
    job: str = "train"
    batch_size: int = 8
    """Rows, over all devices."""
    seq_len: int = 1024
    """Tokens of a training row, or of a prompt."""
    new_tokens: int = 128
    """Tokens generated after the prompt: with it the slots of the cache."""
    sweep_batch: int = 1
    """Heads that a sweep ablates at once."""
    compiler_options: tuple[tuple[str, str], ...] = ()

    @property
    def slice(self) -> Topology:
        """The machine."""
        return parse_topology(self.topology)

    @property
    def mesh_shape(self) -> dict[str, int]:
        """Sizes of all mesh axes.

        Raises:
          ValueError: for a mesh that does not use the whole slice.
        """
        count = self.slice.num_devices
        try:
            sizes = mesh_shape(parse_mesh(self.mesh), count, exact=True)
        except ValueError as error:
            chips = self.slice.num_chips
            per = f" ({self.slice.chip.devices_per_chip} a chip)" if count != chips else ""
            raise ValueError(
                f"topology {self.topology} has {count} devices{per}: {error}"
            ) from None
        return dict(zip(MESH_AXES, sizes, strict=True))

    @property
    def unknown_trips(self) -> float:
        """Turns of a loop whose count depends on data.

        A sweep's runs begin at the edited layer, (L + 1) / 2 layers from the end on average.
        Distributed attention visits the tiles of keys that a tile of queries sees: half of a
        device's keys on average over the steps of a ring, whatever the layout. A recommender
        looks rows up again where they did not fit: never, when its capacity is well chosen.
        """
        if self.job == "sweep":
            return (self.model.num_layers + 1) / 2
        if self.job == "recommender":
            return 0.0
        found = self._distributed
        if found is None:
            return 1.0
        keys = self.seq_len / (1 if found.options.schedule == "all_to_all" else self._context)
        return max(1.0, min(keys / 2, found.window or keys) / found.options.block_k)

    @property
    def kernel_share(self) -> float:
        """How often a branch with a Pallas kernel is taken: in a causal ring, half of the pairs of
        pieces see each other; striped pieces all do."""
        found = self._distributed
        return 1.0 if found is None or found.options.layout == "striped" else 0.5

    @property
    def _context(self) -> int:
        return self.mesh_shape["context"]

    @property
    def _distributed(self) -> LayerSpec | None:
        """The first layer whose attention splits the sequence over the mesh."""
        if self.job in ("decode", "recommender") or self._context == 1:
            return None
        return next((s for s in self.model.pattern if s.attention == "dmha"), None)

    @property
    def grad_accum(self) -> int:
        """Microbatches of a step."""
        return self.train.grad_accum if self.job == "train" else 1


def resolve_model(name: str, settings: Mapping[str, str]) -> ModelConfig:
    """The configuration of a preset, or of a Hugging Face config.json or its directory.

    Raises:
      ValueError: for a name that is neither, or settings that do not fit.
    """
    from jaxheads.checkpoints.directory import locate, read_json
    from jaxheads.checkpoints.families import from_hf

    if name in PRESETS:
        return override(PRESETS[name](), settings, section="model")
    path = Path(name).expanduser()
    if not path.is_file():
        try:
            path = locate(name) / "config.json"
        except ValueError as error:
            raise ValueError(
                f"model={name!r}: {unknown('preset', name, PRESETS)} Nor is it a config.json or a "
                f"directory with one: {error}"
            ) from error
    return override(from_hf(read_json(path)), settings, section="model")


def platform_defaults(request: Request, given: Sequence[str]) -> Request:
    """The request with what depends on the machine decided by the topology, not by this host.

    Args:
      given: model fields set by the user, which stay.
    """
    changes: dict[str, Any] = {}
    is_cpu = request.slice.chip.platform == "cpu"
    if request.model.compute_dtype == "auto":
        changes["compute_dtype"] = "float32" if is_cpu else "bfloat16"
    is_training = request.job in ("train", "recommender")
    if not is_training and "param_dtype" not in given and not is_cpu:
        changes["param_dtype"] = "bfloat16"  # as checkpoints are stored
    return dataclasses.replace(request, model=dataclasses.replace(request.model, **changes))


def check(request: Request) -> None:
    """Raise for a request that cannot run, before anything is built."""
    if request.job not in JOBS:
        raise ValueError(unknown("job", request.job, JOBS))
    for field in ("batch_size", "seq_len", "new_tokens", "sweep_batch"):
        if getattr(request, field) < 1:
            raise ValueError(f"{field}={getattr(request, field)} must be at least 1.")
    JOBS[request.job].check(request)


def _check_decoder(request: Request) -> None:
    cfg, shape = request.model, request.mesh_shape
    length = request.seq_len + (request.new_tokens if request.job in ("prefill", "decode") else 0)
    if cfg.positions == "learned" and length > cfg.max_positions:
        raise ValueError(
            f"{length} tokens exceed the {cfg.max_positions} learned positions of {request.name}; "
            "plan a shorter sequence."
        )
    parts = shape["model"]
    for field in ("num_heads", "num_kv_heads", "mlp_dim"):
        size = getattr(cfg, field)
        if size % parts:
            most = max(d for d in range(1, parts + 1) if size % d == 0 and parts % d == 0)
            raise ValueError(
                f"{field}={size} of {request.name} does not split over the mesh axis model:{parts};"
                f" use model:{most} and give the other devices to fsdp."
            )
    if cfg.model_dim % (shape["fsdp"] * shape["context"]):
        axes = ", ".join(f"{a}:{shape[a]}" for a in ("fsdp", "context") if shape[a] > 1)
        raise ValueError(
            f"model_dim={cfg.model_dim} of {request.name} does not split over the mesh axes {axes};"
            " use sizes that divide it, and data for the rest."
        )
    if request.job == "train":
        rows = jax.ShapeDtypeStruct((request.batch_size, request.seq_len), jnp.int32)
        mesh = abstract_mesh(request)
        check_batch({"tokens": rows, "targets": rows}, mesh, request.grad_accum)  # type: ignore


def abstract_mesh(request: Request) -> AbstractMesh:
    """The request's mesh without devices: enough for shapes and shardings."""
    shape = request.mesh_shape
    kinds = (AxisType.Auto,) * len(shape)
    return AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=kinds)


def concrete_mesh(request: Request) -> Mesh:
    """The request's mesh, of devices that can be compiled for."""
    return parallel.make_mesh(request.mesh_shape, devices=request.slice.devices(), exact=True)


def _place(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


class Arguments(NamedTuple):
    """What the job's program is called with, as `jax.ShapeDtypeStruct` with shardings."""

    state: Any
    """A `TrainState`, or the model."""
    batch: Any


def arguments(request: Request, mesh: Mesh | AbstractMesh) -> Arguments:
    """The job's arguments on `mesh` (`decode`: without the cache, see `cache_bytes`)."""
    return Arguments(*JOBS[request.job].arguments(request, mesh))


def _decoder_arguments(request: Request, mesh: Mesh | AbstractMesh) -> Arguments:
    shape = (request.batch_size, request.seq_len)
    shapes = _shapes(request.model, request.train if request.job == "train" else None)
    if request.job == "train":
        state = _place(shapes, state_shardings(shapes, mesh))  # type: ignore[arg-type]
        rows = batch_sharding(mesh, shape)  # type: ignore[arg-type]
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
            for name, dtype in FIELDS.items()
        }
        return Arguments(state, batch)
    model = _place(shapes, parallel.shardings(shapes, mesh))  # type: ignore[arg-type]
    return Arguments(model, jax.ShapeDtypeStruct(shape, jnp.int32))


@functools.lru_cache(maxsize=64)
def _shapes(model: ModelConfig, train: TrainConfig | None) -> Any:
    """The shapes of a train state, or of the model alone."""
    build = lambda: Decoder(model, rngs=nnx.Rngs(0))
    if train is None:
        return jax.eval_shape(build)
    optimizer = make_optimizer(train)
    return jax.eval_shape(lambda: init_state(build, optimizer))


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of placed `jax.ShapeDtypeStruct` on one device, without tile padding."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * jnp.dtype(leaf.dtype).itemsize
    return total


class LoweredJob(NamedTuple):
    """A job ready to compile."""

    lowered: Any
    mesh: Mesh
    argument_bytes: int
    """Of the parameters, optimiser state and batch, per device, from the shardings."""
    seconds: float


def lower(request: Request) -> LoweredJob:
    """The job's own program, lowered for the request's machine.

    Raises:
      ValueError: for a request that cannot run.
    """
    check(request)
    start = time.perf_counter()
    mesh = concrete_mesh(request)
    args = arguments(request, mesh)
    lowered = JOBS[request.job].lower(request, mesh, args)
    return LoweredJob(lowered, mesh, bytes_per_device(args), time.perf_counter() - start)


def _lower_train(request: Request, mesh: Mesh, args: Arguments):
    step = make_train_step(request.train, make_optimizer(request.train), mesh)
    return step.lower(args.state, args.batch)


def _lower_generate(request: Request, mesh: Mesh, args: Arguments):
    return generation.lower(
        request.job,
        args.state,
        batch_size=request.batch_size,
        prompt_length=request.seq_len,
        max_new_tokens=request.new_tokens,
        mesh=mesh,
    )


def ablation_sweep(model: Decoder, tokens, answers, *, batch_size: int):
    """log p(answer) after every prompt with each head switched off in turn, [L,H] float32."""
    metric = log_probability(answers)
    return sweep_heads(
        forward, model, tokens, edit="zero", metric=metric, batch_size=batch_size, progress=False
    )


def _lower_sweep(request: Request, mesh: Mesh, args: Arguments):
    answers = jax.ShapeDtypeStruct((request.batch_size,), jnp.int32)
    with jax.set_mesh(mesh):
        return jax.jit(ablation_sweep, static_argnames="batch_size").lower(
            args.state, args.batch, answers, batch_size=request.sweep_batch
        )


class Job(NamedTuple):
    """What a job does, at each place where jobs differ."""

    lower: Callable[[Request, Mesh, Any], Any]
    model: Callable[[str, Mapping[str, str]], Any] = resolve_model
    """A name and settings to a configuration."""
    check: Callable[[Request], None] = _check_decoder
    arguments: Callable[[Request, Any], tuple[Any, Any]] = _decoder_arguments
    flops: Callable[[Request], float] | None = None
    """None: a decoder's (`plan_report.model_flops`); only those have formulas besides."""
    describe: Callable[[Request], dict[str, Any]] | None = None
    """More for the report."""
    unit: str = "tokens"
    """What a row of the batch has `seq_len` of."""
    notes: tuple[str, ...] = ()


JOBS: Mapping[str, Job] = {
    "train": Job(_lower_train),
    "prefill": Job(_lower_generate),
    "decode": Job(_lower_generate),
    "sweep": Job(_lower_sweep),
    "recommender": Job(
        plan_recommender.lower,
        plan_recommender.resolve_model,
        plan_recommender.check,
        plan_recommender.arguments,
        plan_recommender.flops,
        plan_recommender.describe,
        "behaviours",
        plan_recommender.NOTES,
    ),
}
