"""Array aliases and the axis letters used in every docstring and einsum string.

    B batch            M model (residual) width     L layers
    T query positions  F MLP hidden width           V vocabulary
    S key positions    D head dim                   E experts
    H query heads      K key/value heads            G query heads per kv head (H = K * G)

Query head ``h`` reads key/value head ``h // G``. Layout is batch, position, head, head dim.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import numpy as np
from jax.core import Tracer

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.Array | np.ndarray | float | int | bool
PyTree: TypeAlias = Any


def is_traced(x: Any) -> bool:
    """Whether a value is not known until the program runs: an argument under `jax.jit` and such."""
    return isinstance(x, Tracer)


def vary_like(tree: PyTree, *others: PyTree) -> PyTree:
    """Inside shard_map, `tree` marked as varying over every mesh axis that `others` vary over.

    The carry of a loop must be typed like its results, and cotangents like their primals.
    """
    axes = frozenset().union(*(_varying(x) for x in jax.tree.leaves(others)))
    return jax.tree.map(lambda x: _vary(x, axes - _varying(x)), tree)


def _varying(x: Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def _vary(x: Array, axes: frozenset[str]) -> Array:
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x
