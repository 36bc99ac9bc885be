"""Logical axis names -> mesh axes: one table for parameters and activations.

A parameter carries the names of its axes (`models.layers.param`), an activation is named where it
is constrained. `RULES` says which mesh axes a name is split over; everything else follows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxheads.typing import PyTree

Rules: TypeAlias = Mapping[str, str | tuple[str, ...] | None]
T = TypeVar("T")
_log = logging.getLogger(__name__)

RULES: Rules = {
    # parameters
    "vocab": "model",
    "embed": ("fsdp", "context"),
    "heads": "model",
    "kv_heads": "model",
    "head_dim": None,
    "mlp": "model",
    "experts": "expert",
    "positions": None,
    "layers": None,
    "table_rows": ("data", "fsdp", "model", "context", "expert"),  # of tables looked up by id
    # activations
    "batch": ("data", "fsdp"),
    # of ids looked up in a table whose width is split over fsdp and context
    "lookup_batch": "data",
    "lookup_length": None,
    "lookup_embed": "context",
    "length": "context",
    "act_embed": None,
    "act_heads": "model",
    "act_kv_heads": "model",
    "act_mlp": "model",
    "act_vocab": "model",
}
"""Splits by default: batch over data and fsdp, sequence over context, heads, MLP and vocabulary
over model, and the model width of every weight over fsdp and context: the devices of a long
sequence hold a part of the weights each, as those of a batch do."""

MAY_REPLICATE = frozenset({"vocab", "act_vocab"})
"""Axes whose size is a fact of the tokenizer (GPT-2 has 50,257 tokens): kept whole, with one log
line, when the mesh axis does not divide them. Any other uneven axis is an error."""


def partition_spec(
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    rules: Rules = RULES,
    *,
    name: str = "array",
) -> P:
    """How an array with these logical axes and this shape is split over `mesh`.

    Raises:
      ValueError: for an axis name without a rule, two names on one array that map to the same
        mesh axis, or a dimension that its mesh axes do not divide.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name} has shape {tuple(shape)} but {len(axes)} axis names {axes}.")
    taken: dict[str, str] = {}
    spec: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape):
        if axis is None:
            spec.append(None)
            continue
        if axis not in rules:
            raise ValueError(f"{name}: no rule for logical axis {axis!r}; add it to the rules.")
        rule = rules[axis]
        wanted = (rule,) if isinstance(rule, str) else tuple(rule or ())
        mesh_axes = tuple(a for a in wanted if mesh.shape[a] > 1)
        ways = math.prod(mesh.shape[a] for a in mesh_axes)
        if size % ways:
            if axis in MAY_REPLICATE:
                _log_once(f"{axis}={size} is not divisible by {mesh_axes}={ways}: kept whole.")
                mesh_axes = ()
            else:
                raise ValueError(
                    f"{name}: axis {axis!r} has size {size}, which mesh axes {mesh_axes} of size "
                    f"{ways} do not divide; choose another mesh, or a rule {axis!r}: None to keep "
                    "that axis whole."
                )
        for a in mesh_axes:
            if a in taken:
                raise ValueError(
                    f"{name}: logical axes {taken[a]!r} and {axis!r} both map to mesh axis {a!r}; "
                    "an array can be split over a mesh axis only once."
                )
            taken[a] = axis
        spec.append(mesh_axes or None)
    return P(*(s[0] if s is not None and len(s) == 1 else s for s in spec))


_logged: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        _log.warning(message)


def _is_variable(x) -> bool:
    return isinstance(x, nnx.Variable)


def shardings(tree: PyTree, mesh: Mesh, rules: Rules = RULES) -> PyTree:
    """A `NamedSharding` for every leaf of `tree`, in a tree of the same structure.

    Args:
      tree: anything holding parameters with axis names: a model, its gradients, an optax state,
        or the same as `jax.ShapeDtypeStruct`. Leaves without axis names are replicated.
    """

    def of(path, leaf):
        axes = leaf.get_metadata().get("axes") if _is_variable(leaf) else None
        value = leaf.get_raw_value() if _is_variable(leaf) else leaf
        # A state may hold a variable emptied of its array (optax masks); nothing to place then.
        if axes is None or not hasattr(value, "shape"):
            spec = P()
        else:
            spec = partition_spec(
                axes, value.shape, mesh, rules, name=jax.tree_util.keystr(path).lstrip(".")
            )
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda _: sharding, leaf)

    return jax.tree_util.tree_map_with_path(of, tree, is_leaf=_is_variable)


def shard(tree: T, mesh: Mesh, rules: Rules = RULES) -> T:
    """`tree` (a model, an optimiser state) placed on `mesh` by its axis names."""
    return jax.device_put(tree, shardings(tree, mesh, rules))


def initialize(constructor: Callable[[], T], mesh: Mesh | None = None, rules: Rules = RULES) -> T:
    """``constructor()`` compiled so that every parameter is born in its shard.

    No host and no device ever holds the whole model.
    """
    if mesh is None:
        return jax.jit(constructor)()
    places = shardings(jax.eval_shape(constructor), mesh, rules)
    return jax.jit(constructor, out_shardings=places)()


def constrain(x: jax.Array, axes: Sequence[str | None], rules: Rules = RULES) -> jax.Array:
    """`x` pinned to the sharding of its logical axes on the mesh of `jax.set_mesh`.

    The identity without a mesh, on a mesh of one device, and inside `jax.shard_map` bodies.
    A dimension that its mesh axes do not divide is left to the compiler: a decode step of one
    token cannot be split over `context`, and must not fail.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, constrained_spec(axes, x.shape, rules))


def constrained_spec(axes: Sequence[str | None], shape: Sequence[int], rules: Rules = RULES) -> P:
    """How `constrain` splits an array of this shape on the mesh of `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    fitting = [
        a if a is not None and shape[i] % _ways(a, mesh, rules) == 0 else None
        for i, a in enumerate(axes)
    ]
    return partition_spec(fitting, shape, mesh, rules)


def ways(axis: str, size: int, rules: Rules = RULES) -> int:
    """How many devices of the mesh of `jax.set_mesh` an axis of this size is split over."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return 1
    count = _ways(axis, mesh, rules)
    return 1 if size % count else count


def _ways(axis: str, mesh: AbstractMesh, rules: Rules) -> int:
    rule = rules[axis]
    wanted = (rule,) if isinstance(rule, str) else tuple(rule or ())
    return math.prod(mesh.shape[a] for a in wanted)
