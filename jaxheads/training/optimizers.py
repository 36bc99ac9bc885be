"""Optimisers and learning-rate schedules from a `TrainConfig`."""

from __future__ import annotations


def check_optimizer(cfg) -> None:
    """Raise when `cfg.optimizer` is unknown or cannot honour an option that was set."""


def learning_rate(cfg):
    """The schedule: step -> learning rate (float32)."""
    raise NotImplementedError


def make_optimizer(cfg):
    """The optax transformation: clip -> optimiser(learning_rate(cfg))."""
    raise NotImplementedError
