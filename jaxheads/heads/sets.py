"""Sets of heads: lists such as ``[(9, 6)]`` or ``["9.6"]``, and masks [L,H].

Heads are counted from 0 and named ``layer.head``.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.typing import Array, ArrayLike

Head: TypeAlias = tuple[int, int]
"""(layer, head)"""

Heads: TypeAlias = jax.Array | np.ndarray | str | Iterable[Any]
"""An array [L,H], or a list of pairs or names."""


def parse_head(item: Any) -> Head:
    """``(layer, head)`` of a pair of integers or of text such as ``"9.6"``.

    Example:
      >>> parse_head("9.6")
      (9, 6)
    """
    if isinstance(item, str):
        match = re.fullmatch(r"\s*[Ll]?(\d+)\.[Hh]?(\d+)\s*", item)
        if match:
            return int(match[1]), int(match[2])
    elif isinstance(item, tuple | list | np.ndarray) and len(item) == 2:
        try:
            layer, head = (operator.index(n) for n in item)
        except TypeError:
            pass
        else:
            if layer >= 0 and head >= 0 and not any(isinstance(n, bool) for n in item):
                return layer, head
    raise ValueError(
        f"{item!r} names no head; write (layer, head), for example (9, 6), or '9.6', both counted "
        "from 0."
    )


def parse_heads(heads: str | Iterable[Any]) -> tuple[Head, ...]:
    """The heads of a list of pairs or names, or of comma-separated names; duplicates raise."""
    items = [part for part in heads.split(",") if part.strip()] if isinstance(heads, str) else heads
    parsed = tuple(parse_head(item) for item in items)
    twice = sorted(head for head, times in Counter(parsed).items() if times > 1)
    if twice:
        raise ValueError(f"head {label(twice[0])} is listed twice.")
    return parsed


def label(head: Head) -> str:
    """``"9.6"`` of ``(9, 6)``."""
    return f"{head[0]}.{head[1]}"


def check_range(heads: Iterable[Head], num_layers: int, num_heads: int) -> None:
    """Raise for a head the model does not have."""
    for head in heads:
        if head[0] >= num_layers or head[1] >= num_heads:
            raise ValueError(
                f"head {label(head)} is out of range: the model has layers 0 to {num_layers - 1} "
                f"with heads 0 to {num_heads - 1}."
            )


def is_mask(heads: Any) -> TypeGuard[jax.Array | np.ndarray]:
    """Whether `heads` is an array [L,H] rather than a list of heads."""
    return isinstance(heads, np.ndarray | jax.Array)


def check_shape(shape: tuple[int, ...], num_layers: int, num_heads: int, what: str) -> None:
    """Raise unless `shape` is [L,H], with a hint at what it may be instead."""
    if tuple(shape) == (num_layers, num_heads):
        return
    hint = ""
    if tuple(shape) == (num_heads, num_layers):
        hint = " It looks transposed."
    elif len(shape) == 2 and shape[1] == 2:
        hint = " For a list of (layer, head) pairs pass a list, not an array (`.tolist()`)."
    elif len(shape) == 2 and shape[0] == num_layers and num_heads % max(shape[1], 1) == 0:
        hint = (
            f" {shape[1]} columns are key/value heads; query head h reads key/value head h // "
            f"{num_heads // shape[1]}, so repeat every column {num_heads // shape[1]} times."
        )
    raise ValueError(
        f"{what} has shape {tuple(shape)}; it must be [{num_layers}, {num_heads}], layers x heads "
        f"of the model.{hint}"
    )


def mask(heads: Heads, num_layers: int, num_heads: int) -> np.ndarray:
    """A bool array [L,H], True at the given heads.

    Args:
      heads: a list such as ``[(9, 6), (9, 9)]`` or ``["9.6"]``, or an array [L,H] (bool, or 0/1).
      num_layers: L.
      num_heads: H.

    Raises:
      ValueError: for a head out of range or listed twice, or an array of another shape.

    Example:
      >>> mask([(1, 0)], 2, 3).astype(int).tolist()
      [[0, 0, 0], [1, 0, 0]]
    """
    if is_mask(heads):
        check_shape(np.shape(heads), num_layers, num_heads, "the head mask")
        values = np.asarray(heads)
        if not np.all((values == 0) | (values == 1)):
            raise ValueError(
                "the head mask holds values other than 0 and 1; choose heads of a score map with "
                "heads.top_k(scores, k)."
            )
        return values.astype(bool)
    parsed = parse_heads(heads)
    check_range(parsed, num_layers, num_heads)
    out = np.zeros((num_layers, num_heads), bool)
    for head in parsed:
        out[head] = True
    return out


def from_mask(values: ArrayLike) -> list[Head]:
    """The heads where an array [L,H] is not zero, in order."""
    return [(int(layer), int(head)) for layer, head in np.argwhere(np.asarray(values))]


def leave_one_out(num_layers: int, num_heads: int) -> np.ndarray:
    """Gates [L*H, L, H]: entry n is one everywhere but 0 at head ``(n // H, n % H)``."""
    size = num_layers * num_heads
    return (1 - np.eye(size, dtype=np.float32)).reshape(size, num_layers, num_heads)


def top_k(scores: ArrayLike, k: int) -> list[Head]:
    """The `k` heads of the highest scores [L,H], highest first; ties in order of layer and head.

    Example:
      >>> top_k([[0.1, 0.9], [0.5, 0.2]], 2)
      [(0, 1), (1, 0)]
    """
    scores = np.asarray(scores)
    if scores.ndim != 2:
        raise ValueError(f"scores has shape {scores.shape}; it must be [L,H], layers x heads.")
    if not 1 <= k <= scores.size:
        raise ValueError(f"k={k} must be from 1 to {scores.size}, the number of heads.")
    if np.isnan(scores).any():
        raise ValueError("scores holds NaN; there is no highest head.")
    order = np.argsort(-scores, axis=None, kind="stable")[:k]
    return [divmod(int(n), scores.shape[1]) for n in order]


def random_heads(
    num_layers: int,
    num_heads: int,
    k: int | None,
    seed: int | Array,
    *,
    exclude: Heads = (),
    match: Heads | None = None,
) -> list[Head]:
    """`k` different heads drawn uniformly: the control of a choice of `k` heads.

    Args:
      num_layers: L.
      num_heads: H.
      k: how many; None takes the number of heads in `match`.
      seed: an integer or a typed key (`jax.random.key`); the same one gives the same heads.
      exclude: heads that are not drawn, a list or a mask [L,H].
      match: a list or a mask [L,H]: as many heads are drawn from each layer as it has there.
        Effects grow with depth in most models, so a fair control keeps the layers.

    Raises:
      ValueError: when fewer than `k` heads are left to draw from.

    Example:
      >>> random_heads(2, 3, 2, seed=0, exclude=[(0, 0), (0, 1), (0, 2), (1, 1)])
      [(1, 0), (1, 2)]
    """
    rng = np.random.default_rng(_entropy(seed))
    free = ~mask(exclude, num_layers, num_heads)
    if match is None:
        if k is None:
            raise ValueError("k=None needs match, the heads whose number is drawn.")
        wanted = {None: k}
    else:
        chosen = from_mask(mask(match, num_layers, num_heads))
        if k is not None and k != len(chosen):
            raise ValueError(f"k={k} differs from the {len(chosen)} heads of match; leave one out.")
        wanted = dict(Counter(layer for layer, _ in chosen))
    drawn: list[Head] = []
    for layer, count in wanted.items():
        pool = [head for head in from_mask(free) if layer in (None, head[0])]
        if not 0 <= count <= len(pool):
            where = "" if layer is None else f" of layer {layer}"
            raise ValueError(
                f"{count} heads{where} cannot be drawn from {len(pool)}: L*H is "
                f"{num_layers * num_heads}, of which {int((~free).sum())} are excluded."
            )
        drawn += [pool[n] for n in rng.choice(len(pool), count, replace=False)]
    return sorted(drawn)


def _entropy(seed: int | Array) -> Any:
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(seed)).ravel().tolist()
    return operator.index(seed)  # type: ignore[arg-type]
