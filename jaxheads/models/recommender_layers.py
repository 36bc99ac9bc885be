"""Modules of the click models: tables, linear maps, batch norm and heads.

Batch norms keep no state: running statistics are arguments and results.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.models.layers import Initializer, normal, ones, param, zeros
from jaxheads.models.recommender_configs import RecommenderConfig
from jaxheads.typing import Array

Stats = dict[str, dict[str, Array]]
FIELDS = ("item", "category", "time")
BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1
_SLOPE = 0.1  # PReLU's at the start


def _uniform(fan_in: int) -> Initializer:
    limit = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)


class Tables(nnx.Module):
    """One row per id for each field; rows are what a mesh splits."""

    def __init__(self, cfg: RecommenderConfig, field_dim: int, *, rngs: nnx.Rngs):
        def table(rows: int, width: int) -> nnx.Param:
            rows = -(-rows // cfg.row_multiple) * cfg.row_multiple
            return param(rngs, (rows, width), ("table_rows", None), normal(cfg.init_std))

        self.item = table(cfg.num_items + 1, field_dim)
        self.category = table(cfg.num_categories + 1, field_dim)
        time_dim = 2 * field_dim if cfg.time_mode == "add" else field_dim
        self.time = None if cfg.time_mode == "none" else table(cfg.num_times, time_dim)

    def arrays(self) -> dict[str, Array]:
        """The tables as `embeddings.dare.embed` takes them."""
        found = {name: getattr(self, name) for name in FIELDS}
        return {name: table[...] for name, table in found.items() if table is not None}


class Linear(nnx.Module):
    """Weight and bias of ``x W + b``."""

    def __init__(self, width_in: int, width_out: int, std: float, *, rngs: nnx.Rngs):
        self.weight = param(rngs, (width_in, width_out), (None, None), normal(std))
        self.bias = param(rngs, (width_out,), (None,), _uniform(width_in))

    def __call__(self, x: Array) -> Array:
        return x @ self.weight[...] + self.bias[...]


class BatchNorm(nnx.Module):
    """Scale and bias of a batch norm; the running statistics live outside."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.scale = param(rngs, (width,), (None,), ones)
        self.bias = param(rngs, (width,), (None,), zeros)


class MLP(nnx.Module):
    """Linear layers with a PReLU of one slope after all but the last."""

    def __init__(self, widths: tuple[int, ...], std: float, *, rngs: nnx.Rngs):
        pairs = list(itertools.pairwise(widths))
        self.layers = nnx.List([Linear(a, b, std, rngs=rngs) for a, b in pairs])
        slope = lambda key, shape, dtype: jnp.full(shape, _SLOPE, dtype)
        self.slopes = nnx.List([param(rngs, (), (), slope) for _ in pairs[1:]])

    def __call__(self, x: Array) -> Array:
        for layer, slope in zip(self.layers, self.slopes):
            y = layer(x)
            x = jnp.where(y >= 0, y, slope[...] * y)
        return self.layers[-1](x)


class Head(nnx.Module):
    """Batch norm, then the network that gives the logit."""

    def __init__(
        self, cfg: RecommenderConfig, width: int, hidden: tuple[int, ...], *, rngs: nnx.Rngs
    ):
        self.norm = BatchNorm(width, rngs=rngs)
        self.mlp = MLP((width, *hidden, cfg.num_logits), cfg.init_std, rngs=rngs)

    def __call__(
        self,
        features: Array,
        running: dict[str, Array],
        *,
        train: bool,
        axis_name: str | tuple[str, ...] | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """[B] log odds of a click, and the running statistics after this batch."""
        x, running = batch_norm(self.norm, features, running, train=train, axis_name=axis_name)
        z = self.mlp(x)  # [B, num_logits]
        return (z[:, 0] if z.shape[-1] == 1 else z[:, 0] - z[:, 1]), running


class Projections(nnx.Module):
    """TWIN with projections: square maps of the whole vector, one for each of its four uses."""

    def __init__(self, width: int, std: float, *, rngs: nnx.Rngs):
        self.query, self.key, self.candidate, self.value = (
            Linear(width, width, std, rngs=rngs) for _ in range(4)
        )


def batch_norm(
    norm: BatchNorm,
    x: Array,
    running: dict[str, Array],
    *,
    train: bool,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """``(x - mean) / sqrt(var + 1e-5) * scale + bias`` over the batch, and the running statistics.

    When training, mean and variance (over n) are the batch's and the running ones move a tenth of
    the way towards them, the variance towards that over n - 1.

    Args:
      x: [B,F].
      running: {"mean" [F], "var" [F]}.
      axis_name: as in `apply`.
    """
    mean, var = running["mean"], running["var"]
    if train:
        average = lambda y: y if axis_name is None else jax.lax.pmean(y, axis_name)
        count = x.shape[0] * (1 if axis_name is None else jax.lax.axis_size(axis_name))
        mean = average(jnp.mean(x, axis=0))
        var = average(jnp.mean(jnp.square(x - mean), axis=0))
        move = lambda old, new: old + BATCH_NORM_MOMENTUM * (jax.lax.stop_gradient(new) - old)
        unbiased = var * (count / max(count - 1, 1))
        running = {"mean": move(running["mean"], mean), "var": move(running["var"], unbiased)}
    y = (x - mean) * jax.lax.rsqrt(var + BATCH_NORM_EPS)
    return y * norm.scale[...] + norm.bias[...], running
