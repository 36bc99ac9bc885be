"""How the tokens of one sequence are dealt to the devices that share it.

    contiguous   device r holds tokens r L/n .. (r+1) L/n - 1
    zigzag       2n chunks; device r holds chunks r and 2n-1-r: the same causal work everywhere
    striped      device r holds tokens r, r+n, r+2n, ...

A sequence in a layout is an ordinary array in another order: cut into n equal parts, part r is
what device r holds. On one device every layout is the order of the text. Inside a part the tokens
stay in order, so the keys that a block of queries sees are one run of it.
"""

from __future__ import annotations

from typing import TypeVar, cast

import jax.numpy as jnp
import numpy as np

from jaxheads.typing import Array

LAYOUTS = ("contiguous", "zigzag", "striped")
X = TypeVar("X", bound=Array | np.ndarray)


def shard_sequence(x: X, layout: str, n: int, *, axis: int = 1) -> X:
    """A sequence in the order of a layout: entry i of the result is token `layout_order()[i]`.

    Args:
      x: an array (JAX or numpy) with a sequence axis: tokens, targets, positions, q, k, ...
        Shift targets and count positions before, not after.
      layout: "contiguous", "zigzag" or "striped".
      n: devices that share the sequence.
      axis: the sequence axis.
    Returns:
      The same shape; split evenly in n along `axis`, part r belongs to device r.
    Raises:
      ValueError: unknown layout, or a length that n (zigzag: 2n) does not divide.
    Example:
      >>> shard_sequence(jnp.arange(8), "zigzag", 2, axis=0)
      Array([0, 1, 6, 7, 2, 3, 4, 5], dtype=int32)
    """
    check_layout(layout, x.shape[axis], n)
    if layout == "contiguous" or n == 1:
        return x
    if layout == "striped":
        return _exchange(x, axis, x.shape[axis] // n, n)
    return _take_chunks(x, axis, _zigzag_chunks(n))


def unshard_sequence(x: X, layout: str, n: int, *, axis: int = 1) -> X:
    """The inverse of `shard_sequence`: from the order of a layout to the order of the text."""
    check_layout(layout, x.shape[axis], n)
    if layout == "contiguous" or n == 1:
        return x
    if layout == "striped":
        return _exchange(x, axis, n, x.shape[axis] // n)
    return _take_chunks(x, axis, np.argsort(_zigzag_chunks(n)))


def layout_order(layout: str, length: int, n: int) -> np.ndarray:
    """[length] int32: the token that lies at each place of a sequence in this layout."""
    return shard_sequence(np.arange(length, dtype=np.int32), layout, n, axis=0)


def local_index(layout: str, length: int, n: int, rank: int | Array) -> Array:
    """[length] int32: the tokens that device `rank` of `n` holds, `length` on each.

    `rank` may be traced; the result is increasing.
    """
    places = jnp.arange(length, dtype=jnp.int32)
    if layout == "contiguous" or n == 1:
        return rank * length + places
    if layout == "striped":
        return rank + n * places
    chunk = length // 2
    return jnp.where(places < chunk, rank * chunk, (2 * n - 2 - rank) * chunk) + places


def ring_schedule(n: int) -> np.ndarray:
    """[n,n] int32: the device whose keys device r holds in step t of a ring, (r - t) mod n.

    Row t is a permutation (every block is somewhere), column r too (every device sees every block).
    """
    if n < 1:
        raise ValueError(f"a ring of {n} devices; it needs at least one.")
    step, rank = np.ogrid[:n, :n]
    return ((rank - step) % n).astype(np.int32)


def check_layout(layout: str, length: int, n: int, name: str = "a sequence") -> None:
    """Raise unless `length` tokens can be dealt to `n` devices in this layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; layouts are {', '.join(LAYOUTS)}.")
    if n < 1:
        raise ValueError(f"a layout over {n} devices; it needs at least one.")
    unit = 2 * n if layout == "zigzag" and n > 1 else n
    if length % unit:
        raise ValueError(
            f"{name} of {length} tokens does not divide over {n} devices in layout {layout!r}: it "
            f"must be a multiple of {unit}. Pad it to {length + -length % unit} and hide the "
            "padding with kv_lengths or segment ids."
        )


def _zigzag_chunks(n: int) -> np.ndarray:
    ranks = np.arange(n)
    return np.stack([ranks, 2 * n - 1 - ranks], axis=1).reshape(-1)


def _take_chunks(x: X, axis: int, chunks: np.ndarray) -> X:
    axis = axis % x.ndim
    cut = x.reshape(*x.shape[:axis], len(chunks), -1, *x.shape[axis + 1 :])
    return cast(X, cut.take(chunks, axis=axis).reshape(x.shape))


def _exchange(x: X, axis: int, rows: int, columns: int) -> X:
    """The axis read as [rows, columns], transposed."""
    axis = axis % x.ndim
    cut = x.reshape(*x.shape[:axis], rows, columns, *x.shape[axis + 1 :])
    return cast(X, cut.swapaxes(axis, axis + 1).reshape(x.shape))
