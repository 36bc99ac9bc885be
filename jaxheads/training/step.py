"""The train step: one pure function, and its compiled form on a mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from jaxheads.models import forward as model_forward
from jaxheads.typing import Array, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step changes."""

    step: Array
    model: Any
    opt_state: PyTree


def init_state(source, optimizer, mesh=None) -> TrainState:
    """A state at step 0, sharded at birth. `source`: a model, or a constructor of one."""
    raise NotImplementedError


def train_step(state, batch, *, cfg, optimizer, forward=model_forward):
    """(state, batch) -> (state, metrics). Pure."""
    raise NotImplementedError


def make_train_step(cfg, optimizer, mesh=None, forward=model_forward):
    """Compiled ``step(state, batch) -> (state, metrics)``; `state` is donated.

    `batch` may be numpy or already sharded arrays. Metrics are float32 scalars, replicated:
    loss, accuracy, grad_norm, param_norm, lr, weights, z_loss, aux.
    """
    raise NotImplementedError


def make_eval_step(cfg, mesh=None, forward=model_forward):
    """Compiled ``eval(model, batch) -> LossSums`` for means over several batches."""
    raise NotImplementedError


def batch_sharding(mesh):
    """NamedSharding of a [B,T] batch array: P(("data","fsdp"), "context")."""
    raise NotImplementedError
