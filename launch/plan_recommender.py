"""The job `recommender`: a training step on tables split by rows, for `launch.plan`.

    python -m launch.plan --job=recommender --topology=v5e:16x16 --model=dare-100m \\
        --mesh=data:256 --batch_size=16384 --seq_len=200

A row of the batch is a candidate item and `seq_len` past ones. The step is `make_sparse_step`'s:
all-to-all lookup of attention and representation vectors, best K behaviours by dot product,
pooling, a small head, row-wise update. Both vectors of an item are one row, side by side: 128 wide,
as the registers of a TPU, which would pad narrow tables to that. Sharding, lookup and update are
those of any recommender; the head is the least that reads both vectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jaxheads.fields import override, unknown
from jaxheads.parallel.embedding import padded_rows
from jaxheads.parallel.embedding_routes import capacity, check_options
from jaxheads.training.sparse_step import (
    begin_state,
    make_sparse_step,
    row_optimizer,
    sparse_shardings,
)
from jaxheads.typing import Array, PyTree

if TYPE_CHECKING:
    from launch.plan_jobs import Request

P = jax.P
OPTIMIZER = optax.adam(1e-3)
NOTES = (
    "the compiler gives no cycles for gathers, scatters and sorts of rows; the estimated time "
    "leaves them out.",
)


@dataclass(frozen=True, kw_only=True)
class TableModel:
    """Attention and representation vectors of items, side by side, and a head."""

    num_rows: int = 100_000_000
    attention_dim: int = 16
    representation_dim: int = 112
    top_k: int = 20
    """Behaviours that are pooled."""
    hidden_dim: int = 200
    row_optimizer: str = "rowwise_adagrad"
    method: str = "all_to_all"
    capacity_factor: float = 2.0
    on_overflow: str = "fallback"
    param_dtype: str = "float32"
    """Of the table."""
    compute_dtype: str = "auto"
    """Of the head."""
    remat: str = "none"

    def __post_init__(self):
        for field in ("num_rows", "attention_dim", "representation_dim", "top_k", "hidden_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1.")
        check_options(self.method, self.capacity_factor, self.on_overflow)
        row_optimizer(self.row_optimizer)

    @property
    def row_dim(self) -> int:
        """Width of the table."""
        return self.attention_dim + self.representation_dim

    @property
    def num_params(self) -> int:
        """Of table and head."""
        head = (3 * self.representation_dim + 2) * self.hidden_dim + 1
        return self.num_rows * self.row_dim + head


PRESETS = {
    "dare-100m": TableModel(),
    "dare-1b": TableModel(num_rows=1_000_000_000),
}


def resolve_model(name: str, settings: Mapping[str, str]) -> TableModel:
    """The configuration of a preset, with settings."""
    if name not in PRESETS:
        raise ValueError(f"model={name!r}: {unknown('recommender', name, PRESETS)}")
    return override(PRESETS[name], settings, section="model")


def check(request: Request) -> None:
    """Raise for batches that do not split over the mesh, and histories shorter than K."""
    count = math.prod(request.mesh_shape.values())
    if request.batch_size % count:
        raise ValueError(
            f"batch_size={request.batch_size} does not split over {count} devices; use a multiple."
        )
    if request.model.top_k > request.seq_len:
        raise ValueError(
            f"top_k={request.model.top_k} behaviours cannot be chosen from seq_len="
            f"{request.seq_len}; make the history longer or set model.top_k."
        )


def arguments(request: Request, mesh: Mesh | AbstractMesh) -> tuple[PyTree, PyTree]:
    """(state, batch) as `jax.ShapeDtypeStruct` with shardings."""
    cfg, rows = request.model, request.batch_size
    count = math.prod(request.mesh_shape.values())
    struct = lambda shape, dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    table_rows = padded_rows(cfg.num_rows, count)
    tables = {"item": struct((table_rows, cfg.row_dim), cfg.param_dtype)}
    width, hidden = 3 * cfg.representation_dim, cfg.hidden_dim
    params = {
        "w_in": struct((width, hidden), "float32"),
        "b_in": struct((hidden,), "float32"),
        "w_out": struct((hidden,), "float32"),
        "b_out": struct((), "float32"),
    }
    begin = lambda p, t: begin_state(p, t, optimizer=OPTIMIZER, rows=cfg.row_optimizer)
    state = jax.eval_shape(begin, params, tables)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    state = jax.tree.map(place, state, sparse_shardings(state, mesh))  # type: ignore[arg-type]
    over_all = NamedSharding(mesh, P(mesh.axis_names))  # type: ignore[arg-type]
    ids = place(struct((rows, request.seq_len + 1), "int32"), over_all)
    return state, {"ids": ids, "label": place(struct((rows,), "float32"), over_all)}


def pooled_loss(cfg: TableModel, params: PyTree, rows: Mapping[str, Array], label: Array):
    """Cross-entropy of a head on the K best behaviours of a history; candidate at index 0.

    s_p = a_0.a_p / sqrt(d_A);  h = sum over top K of softmax(s)_p r_p;  f = [r_0, h, h * r_0]
    """
    found = rows["item"].astype(cfg.compute_dtype)
    a, r = jnp.split(found, [cfg.attention_dim], axis=-1)
    scores = jnp.einsum("bd,btd->bt", a[:, 0], a[:, 1:]).astype(jnp.float32)
    scores, index = jax.lax.top_k(scores * cfg.attention_dim**-0.5, cfg.top_k)  # [B,K]
    chosen = jnp.take_along_axis(r[:, 1:], index[..., None], axis=1)  # [B,K,D]
    weights = jax.nn.softmax(scores, axis=-1).astype(r.dtype)
    h = jnp.einsum("bk,bkd->bd", weights, chosen)
    features = jnp.concatenate([r[:, 0], h, h * r[:, 0]], axis=-1)
    w_in, w_out = (params[n].astype(r.dtype) for n in ("w_in", "w_out"))
    hidden = jax.nn.relu(features @ w_in + params["b_in"].astype(r.dtype))
    logit = jnp.einsum("bf,f->b", hidden, w_out).astype(jnp.float32) + params["b_out"]
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logit, label)), {}


def make_step(cfg: TableModel, mesh: Mesh):
    """The compiled step: (state, {"item": ids}, label) -> result."""
    return make_sparse_step(
        lambda params, rows, label: pooled_loss(cfg, params, rows, label),
        mesh,
        optimizer=OPTIMIZER,
        lr=0.05,
        rows=cfg.row_optimizer,
        method=cfg.method,
        capacity_factor=cfg.capacity_factor,
        on_overflow=cfg.on_overflow,
        num_rows={"item": cfg.num_rows},
    )


def lower(request: Request, mesh: Mesh, args: tuple[PyTree, PyTree]) -> Any:
    """The step lowered for the request's machine."""
    state, batch = args
    return make_step(request.model, mesh).lower(state, {"item": batch["ids"]}, batch["label"])


def flops(request: Request) -> float:
    """FLOPs of scores, pooling and head, forward and backward."""
    cfg = request.model
    head = (3 * cfg.representation_dim + 1) * cfg.hidden_dim
    pooled = request.seq_len * cfg.attention_dim + cfg.top_k * cfg.representation_dim
    return 6.0 * request.batch_size * (pooled + head)


def describe(request: Request) -> dict[str, Any]:
    """What the report says of the lookup."""
    cfg = request.model
    count = math.prod(request.mesh_shape.values())
    ids = request.batch_size // count * (request.seq_len + 1)
    return {
        "rows": cfg.num_rows,
        "rows_per_device": padded_rows(cfg.num_rows, count) // count,
        "row_dim": cfg.row_dim,
        "method": cfg.method,
        "on_overflow": cfg.on_overflow,
        "ids_per_device": ids,
        "places_per_pair": capacity(ids, count, cfg.capacity_factor),
    }
