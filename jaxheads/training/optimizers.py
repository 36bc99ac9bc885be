"""Optimisers and learning-rate schedules from a `TrainConfig`.

Every optimiser of optax that needs nothing but gradients and a learning rate is available under
its own name; the few fields below are translated to its argument names.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx

from jaxheads.fields import unknown
from jaxheads.typing import Array, PyTree

if TYPE_CHECKING:
    from jaxheads.training.configs import TrainConfig

Schedule = Callable[[Array], Array]

_UNUSABLE: Mapping[str, str] = {
    "lbfgs": "needs the loss function itself",
    "momo": "needs the loss value",
    "momo_adam": "needs the loss value",
    "sophia": "needs the loss function itself",
    "dpsgd": "needs the gradient of each example",
    "noisy_sgd": "needs a random key",
    "schedule_free_adamw": "evaluates at other weights than it trains",
    "schedule_free_sgd": "evaluates at other weights than it trains",
    "sm3": "cannot follow a schedule",
    "optimistic_adam": "cannot follow a schedule (optimistic_adam_v2 can)",
}
"""Optimisers of optax that a train step cannot drive, and why."""

_DEFAULTS: Mapping[str, Mapping[str, float]] = {"adamw": {"b2": 0.95, "weight_decay": 0.1}}
"""Where language models are commonly trained with other values than optax's defaults."""

# field -> the names it has in optax
_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "b1": ("b1", "beta", "momentum"),
    "b2": ("b2", "adam_b2"),
    "eps": ("eps",),
    "weight_decay": ("weight_decay", "weight_decay_rate"),
}
_MASK_ARGUMENTS = ("mask", "weight_decay_mask")


@functools.cache
def optimizers() -> Mapping[str, Callable[..., optax.GradientTransformation]]:
    """Every optimiser a `TrainConfig` may name."""
    return dict(sorted(_find_optimizers()))


def _find_optimizers() -> Iterator[tuple[str, Callable]]:
    for module in (optax.contrib, optax):
        for name in dir(module):
            fn = getattr(module, name)
            if name.startswith(("_", "scale_by_")) or name in _UNUSABLE:
                continue
            if not (inspect.isfunction(fn) or isinstance(fn, functools.partial)):
                continue
            wanted = inspect.signature(fn).parameters
            others = [p for n, p in wanted.items() if n != "learning_rate"]
            if "learning_rate" in wanted and all(p.default is not p.empty for p in others):
                yield name, fn


def check_optimizer(cfg: TrainConfig) -> None:
    """Raise when `cfg.optimizer` is unknown or cannot honour an option that was set."""
    if cfg.optimizer in _UNUSABLE:
        raise ValueError(
            f"optimizer={cfg.optimizer!r} {_UNUSABLE[cfg.optimizer]}, which the train step does "
            "not offer; choose another, such as 'adamw'."
        )
    if cfg.optimizer not in optimizers():
        raise ValueError(unknown("optimizer", cfg.optimizer, optimizers()))
    accepted = inspect.signature(optimizers()[cfg.optimizer]).parameters
    for field, names in _ARGUMENTS.items():
        value = getattr(cfg, field)
        if value is not None and not any(n in accepted for n in names):
            raise ValueError(
                f"{field}={value!r} was given but optimizer={cfg.optimizer!r} has no such option; "
                f"leave {field} unset, or choose another optimizer."
            )
    masked = any(n in accepted for n in _MASK_ARGUMENTS)
    if cfg.weight_decay and not masked and not cfg.decay_norms_and_biases:
        raise ValueError(
            f"optimizer={cfg.optimizer!r} can only decay every parameter; set "
            "decay_norms_and_biases=True, or leave weight_decay unset."
        )


def learning_rate(cfg: TrainConfig) -> Schedule:
    """The schedule, step -> learning rate (float32), for steps 0 to `cfg.steps` - 1.

    With W = `warmup_steps`, N = `steps`, f = `final_lr_fraction`, d = `decay_fraction`:

        lr(s) = lr * min(1, (s + 1) / W) * shape(s)
        linear:  shape = 1 - (1 - f) p,                     p = (s - W) / (N - W) in [0, 1]
        cosine:  shape = f + (1 - f) (1 + cos(pi p)) / 2
        wsd:     as linear, with p = (s - (1 - d) N) / (d N): stable, then a linear decay
    """
    steps, warmup, final = cfg.steps, cfg.warmup_steps, cfg.final_lr_fraction
    start = steps * (1 - cfg.decay_fraction) if cfg.schedule == "wsd" else warmup

    def at(step: Array) -> Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        p = jnp.clip((step - start) / max(steps - start, 1e-9), 0, 1)
        fall = {
            "constant": lambda: jnp.ones_like(p),
            "linear": lambda: 1 - (1 - final) * p,
            "cosine": lambda: final + (1 - final) * (1 + jnp.cos(jnp.pi * p)) / 2,
            "wsd": lambda: 1 - (1 - final) * p,
        }[cfg.schedule]()
        return cfg.lr * rise * fall

    return at


def noam_schedule(model_dim: int, *, warmup: int = 2000, factor: float = 1.0) -> Schedule:
    """``factor model_dim^-1/2 min(t^-1/2, t warmup^-3/2)``, t the update from 1 (the count is from
    0), of the release."""

    def rate(count):
        t = jnp.asarray(count, jnp.float32) + 1
        return factor * model_dim**-0.5 * jnp.minimum(t**-0.5, t * warmup**-1.5)

    return rate


def make_optimizer(cfg: TrainConfig) -> optax.GradientTransformation:
    """Clip by the global norm, then the named optimiser at `learning_rate(cfg)`.

    Weight decay leaves out norms and biases unless `cfg.decay_norms_and_biases`; parameters
    outside `cfg.trainable` are kept as they are and have no optimiser state.
    """
    make = optimizers()[cfg.optimizer]
    accepted = inspect.signature(make).parameters
    options: dict = {"learning_rate": learning_rate(cfg)}
    for field, names in _ARGUMENTS.items():
        value = getattr(cfg, field)
        if value is None:
            value = _DEFAULTS.get(cfg.optimizer, {}).get(field)
        name = next((n for n in names if n in accepted), None)
        if value is not None and name is not None:
            options[name] = value
    if not cfg.decay_norms_and_biases:
        options |= {n: decayed for n in _MASK_ARGUMENTS if n in accepted}
    if cfg.optimizer == "muon":
        options["muon_weight_dimension_numbers"] = _muon_dimensions
        options["adam_weight_decay"] = options.get("weight_decay", 0.0)
        options["consistent_rms"] = 0.2  # AdamW's learning rates carry over (arXiv:2502.16982)
    optimizer = make(**options)
    if cfg.trainable != ("*",):
        labels = lambda tree: jax.tree.map(
            lambda yes: "train" if yes else "freeze", trainable(tree, cfg.trainable)
        )
        optimizer = optax.partition({"train": optimizer, "freeze": optax.set_to_zero()}, labels)
    if cfg.grad_clip:
        optimizer = optax.chain(optax.clip_by_global_norm(cfg.grad_clip), optimizer)
    return optimizer


def _is_variable(x) -> bool:
    return isinstance(x, nnx.Variable)


def _map_params(fn: Callable[[str, tuple[str | None, ...] | None, PyTree], object], tree: PyTree):
    """A tree like `tree` holding ``fn(name, axes, leaf)`` for every parameter."""

    def of(path, leaf):
        axes = leaf.get_metadata().get("axes") if _is_variable(leaf) else None
        result = fn(jax.tree_util.keystr(path, simple=True, separator="."), axes, leaf)
        return jax.tree.map(lambda _: result, leaf)

    return jax.tree_util.tree_map_with_path(of, tree, is_leaf=_is_variable)


def trainable(tree: PyTree, globs: tuple[str, ...]) -> PyTree:
    """Which parameters match one of the globs: a tree of bools.

    Raises:
      ValueError: for a glob that matches nothing.
    """
    matched: set[str] = set()

    def of(name, axes, leaf):
        hits = [g for g in globs if fnmatch.fnmatchcase(name, g)]
        matched.update(hits)
        return bool(hits)

    result = _map_params(of, tree)
    for glob in globs:
        if glob not in matched:
            raise ValueError(
                f"trainable={glob!r} matches no parameter; names look like 'embed.table' and "
                "'layers.attention.wq'."
            )
    return result


def decayed(tree: PyTree) -> PyTree:
    """Which parameters weight decay acts on: a tree of bools.

    Those that mix features: an axis named "embed" (every matrix and table of a decoder), or at
    least three axes besides "layers". Norms and biases, [H,D] ones included, have neither.
    Arrays without axis names count when they have at least three axes (the first is the layers').
    """

    def of(name, axes, leaf):
        if axes is None:
            return getattr(leaf, "ndim", 0) >= 3
        return "embed" in axes or len([a for a in axes if a != "layers"]) >= 3

    return _map_params(of, tree)


def _muon_dimensions(tree: PyTree) -> PyTree:
    """Muon's view of each weight as a matrix; None sends the rest to its Adam.

    Between the model width and everything else: wq is M -> H*D, wo is H*D -> M. Tables, norms
    and biases are Adam's.
    """

    def of(name, axes, leaf):
        if axes is None or "embed" not in axes or {"vocab", "positions"} & set(axes):
            return None
        width = axes.index("embed")
        rest = tuple(i for i, a in enumerate(axes) if a != "layers" and i != width)
        from_width = width < rest[0]
        return optax.contrib.MuonDimensionNumbers(
            reduction_axis=(width,) if from_width else rest,
            output_axis=rest if from_width else (width,),
        )

    return _map_params(of, tree)
