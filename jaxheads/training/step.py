"""The train step: one pure function, and its compiled form on a mesh."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxheads import parallel
from jaxheads.models import Decoder
from jaxheads.models import forward as model_forward
from jaxheads.parallel import compiler_options, constrain
from jaxheads.taps import as_tapped
from jaxheads.training.configs import TrainConfig
from jaxheads.training.loss import LossSums, check_entries, loss_sums, mean_metrics, nonzero
from jaxheads.training.optimizers import learning_rate, trainable
from jaxheads.typing import Array, PyTree

Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step changes."""

    step: Array
    """int32 scalar: the steps taken."""
    model: Any
    """The model; parameters in their master dtype."""
    opt_state: PyTree
    """The optimiser's state, sharded like the parameters it belongs to."""


def init_state(
    source: Decoder | Callable[[], Decoder],
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> TrainState:
    """A state at step 0.

    Args:
      source: a constructor, compiled so that every parameter and every moment is born in its
        shard; or a model, whose buffers the state takes over (a train step donates them: copy
        the model first to keep it).
      mesh: where to place the state; None leaves it on the default device.
    """
    begin = lambda model: TrainState(
        jnp.zeros((), jnp.int32), model, optimizer.init(_split(model, ("*",))[0])
    )
    if not isinstance(source, nnx.Module):
        build = lambda: begin(source())
        if mesh is None:
            return jax.jit(build)()
        places = state_shardings(jax.eval_shape(build), mesh)
        return jax.jit(build, out_shardings=places)()
    if mesh is None:
        return TrainState(
            jnp.zeros((), jnp.int32), source, jax.jit(lambda m: begin(m).opt_state)(source)
        )
    places = state_shardings(jax.eval_shape(begin, source), mesh)
    model = jax.device_put(source, places.model)
    opt_state = jax.jit(lambda m: begin(m).opt_state, out_shardings=places.opt_state)(model)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), places.step), model, opt_state)


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """A `NamedSharding` for every leaf of a state (arrays or `jax.ShapeDtypeStruct`).

    Moments follow their parameters. State of another shape (Adafactor's factors) is replicated.
    """
    is_variable = lambda x: isinstance(x, nnx.Variable)
    kind = lambda v: (v.get_metadata().get("axes"), getattr(v.get_raw_value(), "shape", None))
    variables = jax.tree.leaves(state.model, is_leaf=is_variable)
    known = {kind(v) for v in variables if is_variable(v)}
    whole = NamedSharding(mesh, P())

    def of(leaf):
        if is_variable(leaf) and kind(leaf) in known:
            return parallel.shardings(leaf, mesh)
        return jax.tree.map(lambda _: whole, leaf)

    return dataclasses.replace(
        state,
        step=whole,
        model=parallel.shardings(state.model, mesh),
        opt_state=jax.tree.map(of, state.opt_state, is_leaf=is_variable),
    )


def _split(model: PyTree, globs: tuple[str, ...]) -> tuple[PyTree, PyTree]:
    """(leaves with gradients, the other leaves), each None where the other has an array."""
    wanted = jax.tree.map(
        lambda x, yes: yes and jnp.issubdtype(x.dtype, jnp.inexact), model, trainable(model, globs)
    )
    pick = lambda keep: jax.tree.map(lambda x, w: x if w == keep else None, model, wanted)
    return pick(True), pick(False)


def _merge(a: PyTree, b: PyTree) -> PyTree:
    """The tree of which `_split` gave two parts."""
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)


def train_step(
    state: TrainState,
    batch: Mapping[str, Array],
    *,
    cfg: TrainConfig,
    optimizer: optax.GradientTransformation,
    forward: Callable = model_forward,
) -> tuple[TrainState, Metrics]:
    """One optimiser step; pure.

    Gradients are those of `next_token_loss` over the whole batch. With `cfg.grad_accum` = A they
    are summed over A microbatches (rows i, i+A, ...), each weighted by its tokens, so the result
    is that of the big batch; only an auxiliary loss that is not a mean over tokens can differ.

    Args:
      state: from `init_state`.
      batch: arrays [B,T]: tokens, targets, and optionally positions, segment_ids, weights.
      optimizer: from `make_optimizer(cfg)`, or any optax transformation.
      forward: a forward, wrapped or not.
    Returns:
      (state, metrics): float32 scalars loss, accuracy, z_loss, aux, weights (the token count),
      grad_norm (before clipping), param_norm (after the step) and lr.
    """
    params, rest = _split(state.model, cfg.trainable)
    weights = batch.get("weights")
    weights = jnp.ones(batch["tokens"].shape, jnp.float32) if weights is None else weights
    total = nonzero(jnp.sum(weights, dtype=jnp.float32))

    def objective(params, micro):
        sums, aux = loss_sums(forward, _merge(params, rest), micro, cfg)
        aux = aux * sums.weight_sum / total
        return sums.loss_sum / total + cfg.aux_weight * aux, (sums, aux)

    gradient = jax.grad(objective, has_aux=True)
    if cfg.grad_accum == 1:
        grads, (sums, aux) = gradient(params, batch)
    else:
        grads, (sums, aux) = _accumulate(gradient, params, batch, cfg.grad_accum)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

    # Frozen parameters: the optimiser sees their place and leaves it alone.
    everything, fixed = _split(state.model, ("*",))
    grads = jax.tree.map(
        lambda g, p: jnp.zeros_like(p) if g is None and p is not None else g,
        grads,
        everything,
        is_leaf=lambda x: x is None,
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, everything)
    new = optax.apply_updates(everything, updates)
    metrics = mean_metrics(sums, aux, cfg) | {
        "grad_norm": global_norm(grads),
        "param_norm": global_norm(new),
        "lr": learning_rate(cfg)(state.step),
    }
    return TrainState(state.step + 1, _merge(new, fixed), opt_state), metrics


def _accumulate(gradient: Callable, params: PyTree, batch: Mapping[str, Array], count: int):
    """The sum of ``gradient(params, microbatch)`` over `count` microbatches, in float32."""
    rows = batch["tokens"].shape[0]
    if rows % count:
        raise ValueError(
            f"a batch of {rows} rows cannot be cut into grad_accum={count} equal microbatches; "
            "change one of them."
        )

    def cut(x):  # [B,T] -> [A,B/A,T]; interleaved, so that rows split over devices stay split
        x = jnp.moveaxis(jnp.asarray(x).reshape(rows // count, count, *x.shape[1:]), 1, 0)
        return constrain(x, (None, "batch", "length"))

    micro = jax.tree.map(cut, dict(batch))
    first = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), first)

    def body(total, one):
        return jax.tree.map(
            lambda t, g: t + g.astype(jnp.float32), total, gradient(params, one)
        ), None

    return jax.lax.scan(body, zeros, micro)[0]


def global_norm(tree: PyTree) -> Array:
    """sqrt of the sum of squares of every leaf, in float32."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """How a batch [B,T] lies on the mesh: rows over data and fsdp, positions over context."""
    spec = parallel.partition_spec(("batch", "length"), shape, mesh, name="batch")
    return NamedSharding(mesh, spec)


def check_batch(batch: Mapping[str, Any], mesh: Mesh | None, grad_accum: int = 1) -> None:
    """Raise unless the batch can be cut into microbatches and split over the mesh."""
    check_entries(batch)
    shape = np.shape(batch["tokens"])
    ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    if len(shape) != 2 or shape[0] % (ways * grad_accum):
        raise ValueError(
            f"a batch of tokens {shape} does not split over data*fsdp={ways} devices times "
            f"grad_accum={grad_accum}; its rows must be a multiple of {ways * grad_accum}."
        )
    context = 1 if mesh is None else mesh.shape["context"]
    if shape[1] % context:
        raise ValueError(
            f"sequences of {shape[1]} tokens do not split over context={context} devices; choose "
            f"a length that is a multiple of {context}."
        )


@dataclass(frozen=True)
class MeshFunction:
    """A jitted ``fn(tree, batch, forward)`` run on a mesh: ``call(tree, batch)``."""

    jitted: Any
    mesh: Mesh | None
    forward: Any
    grad_accum: int = 1

    def __call__(self, tree: PyTree, batch: Mapping[str, Any]):
        """Place the batch on the mesh where it is not there yet, and run."""
        check_batch(batch, self.mesh, self.grad_accum)
        if self.mesh is not None:
            place = batch_sharding(self.mesh, np.shape(batch["tokens"]))
            batch = {
                k: x if isinstance(x, jax.Array) else jax.device_put(x, place)
                for k, x in batch.items()
            }
        with self._on_mesh():
            return self.jitted(tree, dict(batch), self.forward)

    def lower(self, tree: PyTree, batch: Mapping[str, Any]):
        """`jax.jit(...).lower` for arrays or `jax.ShapeDtypeStruct` (give them shardings)."""
        check_batch(batch, self.mesh, self.grad_accum)
        with self._on_mesh():
            return self.jitted.lower(tree, dict(batch), self.forward)

    def _on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def make_train_step(
    cfg: TrainConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    forward: Callable = model_forward,
) -> MeshFunction:
    """`train_step` compiled: ``step(state, batch) -> (state, metrics)``; `state` is donated.

    The new state keeps the shardings of `state_shardings`; metrics are replicated. `batch` may
    hold numpy arrays, or arrays placed by `batch_sharding` already.
    """

    def step(state, batch, forward):
        new, metrics = train_step(state, batch, cfg=cfg, optimizer=optimizer, forward=forward)
        if mesh is not None:
            keep = jax.lax.with_sharding_constraint
            new = keep(new, state_shardings(new, mesh))
            metrics = keep(metrics, NamedSharding(mesh, P()))
        return new, metrics

    jitted = jax.jit(step, donate_argnums=0, compiler_options=compiler_options(mesh))
    return MeshFunction(jitted, mesh, as_tapped(forward), cfg.grad_accum)


def make_eval_step(
    cfg: TrainConfig, mesh: Mesh | None = None, forward: Callable = model_forward
) -> MeshFunction:
    """Compiled ``evaluate(model, batch) -> LossSums``; add them up over batches, then divide."""

    def evaluate(model, batch, forward) -> LossSums:
        return loss_sums(forward, model, batch, cfg)[0]

    jitted = jax.jit(evaluate, compiler_options=compiler_options(mesh))
    return MeshFunction(jitted, mesh, as_tapped(forward))
