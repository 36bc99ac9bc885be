"""How a model is trained: one frozen configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxheads.fields import unknown
from jaxheads.training.optimizers import check_optimizer

SCHEDULES = ("constant", "linear", "cosine", "wsd")
"""Shapes of the learning rate after the warm-up (`optimizers.learning_rate`)."""

# field -> (smallest value, whether the smallest value itself is allowed)
_AT_LEAST: Mapping[str, tuple[float, bool]] = {
    "steps": (1, True),
    "lr": (0, True),
    "warmup_steps": (0, True),
    "final_lr_fraction": (0, True),
    "decay_fraction": (0, False),
    "b1": (0, True),
    "b2": (0, True),
    "eps": (0, True),
    "weight_decay": (0, True),
    "grad_clip": (0, True),
    "grad_accum": (1, True),
    "z_loss": (0, True),
    "loss_chunks": (0, True),
    "aux_weight": (0, True),
    "seed": (0, True),
    "log_every": (1, True),
    "eval_every": (0, True),
    "eval_batches": (1, True),
    "checkpoint_every": (0, True),
    "keep_last": (1, True),
    "keep_best": (0, True),
    "profile_start": (0, True),
    "profile_steps": (0, True),
}
_BELOW_ONE = ("b1", "b2")
_AT_MOST_ONE = ("final_lr_fraction", "decay_fraction")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. Hashable, so a safe static argument.

    Raises:
      ValueError, TypeError: for a value that breaks its rule, naming field, value and rule.
    """

    steps: int = 1000  # optimiser steps of the whole run; schedules end here
    seed: int = 0  # of the initial parameters and the order of the data

    optimizer: str = "adamw"  # any optimiser of optax or optax.contrib that has a learning rate
    lr: float = 1e-3  # peak learning rate
    schedule: str = "cosine"  # constant | linear | cosine | wsd (warm-up, stable, decay)
    warmup_steps: int = 0  # steps of linear warm-up
    final_lr_fraction: float = 0.1  # learning rate at the end, as a share of the peak
    decay_fraction: float = 0.2  # share of the steps in which "wsd" decays
    b1: float | None = None  # None: optax's default for the optimiser
    b2: float | None = None  # None: 0.95 for adamw, else optax's default
    eps: float | None = None  # None: optax's default
    weight_decay: float | None = None  # None: 0.1 for adamw, else optax's default
    decay_norms_and_biases: bool = False  # weight decay also on norms and biases
    grad_clip: float = 1.0  # largest global gradient norm; 0 = no clipping
    grad_accum: int = 1  # microbatches a step is computed in
    trainable: tuple[str, ...] = ("*",)  # globs over names such as "layers.attention.wq"

    z_loss: float = 0.0  # weight of the squared log-normaliser of the logits
    loss_chunks: int = 0  # chunks of the vocabulary in the cross-entropy; 0 = by size
    aux_weight: float = 0.01  # weight of the attention variants' auxiliary losses

    log_every: int = 10  # steps between lines of metrics
    eval_every: int = 0  # steps between evaluations; 0 = only at the end
    eval_batches: int = 8  # batches of one evaluation
    checkpoint_every: int = 0  # steps between checkpoints; 0 = only at the end
    keep_last: int = 2  # most recent checkpoints kept
    keep_best: int = 1  # checkpoints of lowest evaluation loss kept besides; 0 = none
    profile_start: int = 5  # first profiled step
    profile_steps: int = 0  # steps in the trace; 0 = no profile

    def __post_init__(self):
        for name, (low, inclusive) in _AT_LEAST.items():
            _check_number(name, getattr(self, name), low, inclusive)
        for name in (*_BELOW_ONE, *_AT_MOST_ONE):
            value = getattr(self, name)
            if value is not None and (value > 1 or (value == 1 and name in _BELOW_ONE)):
                most = "below 1" if name in _BELOW_ONE else "at most 1"
                raise ValueError(f"{name}={value!r} must be {most}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(unknown("schedule", self.schedule, SCHEDULES))
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is more than steps={self.steps}: the learning "
                "rate would never reach its peak; shorten the warm-up or train longer."
            )
        if not isinstance(self.trainable, tuple) or not self.trainable:
            raise ValueError(
                f"trainable={self.trainable!r} must be a tuple of globs such as ('*attention*',)."
            )
        check_optimizer(self)


def _check_number(name: str, value, low: float, inclusive: bool) -> None:
    annotation = TrainConfig.__annotations__[name]
    if value is None and "None" in annotation:
        return
    kinds = (int,) if annotation == "int" else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        kind = "an integer" if annotation == "int" else "a number"
        raise TypeError(f"{name}={value!r} must be {kind}.")
    if not math.isfinite(value) or value < low or (value == low and not inclusive):
        raise ValueError(f"{name}={value!r} must be {'at least' if inclusive else 'above'} {low}.")
