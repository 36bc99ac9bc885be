"""The order in which the layers see the tokens of a sequence that the mesh splits.

Distributed attention may want them dealt to the devices so that all have the same causal work
(``--set model.attention="dmha(layout=zigzag)"``). The residual stream then changes order once in
front of the layers and once behind them; everything outside sees the order of the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.attention.layouts import check_layout, shard_sequence, unshard_sequence
from jaxheads.models.configs import ModelConfig
from jaxheads.parallel import constrain
from jaxheads.parallel.rules import constrained_spec
from jaxheads.typing import Array

AXIS = "context"
TEXT = "contiguous"


def layout_of(cfg: ModelConfig, length: int) -> str:
    """The layout in which the layers of `cfg` take `length` tokens on the mesh of `jax.set_mesh`.

    Raises:
      ValueError: for a length that does not divide.
    """
    size = _size()
    if size == 1:
        return TEXT
    if cfg.layout != TEXT:
        check_layout(cfg.layout, length, size)
    return cfg.layout


def in_order(options: Any, layout: str) -> Any:
    """A layer's options for tokens that lie in `layout`."""
    if getattr(options, "layout", layout) == layout:
        return options
    return dataclasses.replace(options, layout=layout)


def to_layout(x: Array, layout: str) -> Array:
    """[T], [B,T] or [B,T,M] in the order of the text -> in the order of the layout."""
    return _reorder(x, layout, _deal, shard_sequence)


def to_text(x: Array, layout: str) -> Array:
    """The inverse of `to_layout`."""
    return _reorder(x, layout, _collect, unshard_sequence)


def _size() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.manual_axes else mesh.shape.get(AXIS, 1)


def _reorder(x: Array, layout: str, exchange: Callable, reorder: Callable) -> Array:
    size = _size()
    if layout == TEXT or size == 1:
        return x
    axes = ("length",) if x.ndim == 1 else ("batch", "length", None)[: x.ndim]
    if x.ndim < 3 or layout != "zigzag":
        return constrain(reorder(x, layout, size, axis=len(axes[:2]) - 1), axes)
    # Left to the compiler, every device would gather the whole sequence.
    spec = constrained_spec(axes, x.shape)
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(
        partial(exchange, size), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )(x)


def _places(size: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(from, to) devices of the even and of the odd chunks of 2 `size`: two on each device, next
    to each other in the text, r and 2 size - 1 - r in the zigzag."""
    device = lambda chunk: min(chunk, 2 * size - 1 - chunk)
    return tuple([(c // 2, device(c)) for c in range(odd, 2 * size, 2)] for odd in (0, 1))  # type: ignore


def _swap_on_odd_devices(a: Array, b: Array) -> Array:
    """[a, b] along the tokens; [b, a] on devices whose first zigzag chunk is an odd one."""
    is_odd = jax.lax.axis_index(AXIS) % 2 == 1
    return jnp.concatenate([jnp.where(is_odd, b, a), jnp.where(is_odd, a, b)], axis=1)


def _deal(size: int, x: Array) -> Array:
    evens, odds = _places(size)
    even, odd = jnp.split(x, 2, axis=1)
    # Of the chunks r and 2 size - 1 - r of device r, one is even and one is odd.
    return _swap_on_odd_devices(
        jax.lax.ppermute(even, AXIS, evens), jax.lax.ppermute(odd, AXIS, odds)
    )


def _collect(size: int, x: Array) -> Array:
    evens, odds = (tuple((b, a) for a, b in pairs) for pairs in _places(size))
    even, odd = jnp.split(_swap_on_odd_devices(*jnp.split(x, 2, axis=1)), 2, axis=1)
    pair = (jax.lax.ppermute(even, AXIS, evens), jax.lax.ppermute(odd, AXIS, odds))
    return jnp.concatenate(pair, axis=1)
