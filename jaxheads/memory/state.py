"""What a memory keeps between calls, and the checks of what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxheads.memory.network import LOSSES, Inner
from jaxheads.typing import Array, is_traced

IMPLS = ("dual", "associative", "scan", "naive")


class MemoryState(NamedTuple):
    """One memory per row and head; a pytree of constant size, to be saved and resumed as it is."""

    weights: list[Array]
    """[B,H,d_in,d_out] of each layer: `M_t`."""
    momentum: list[Array]
    """The same shapes: `S_t`."""
    ref_weights: list[Array]
    """The weights at the start of the chunk in progress, where its gradients are taken."""
    offset: Array
    """[B] int32: tokens of the chunk in progress that have been written, below `chunk`."""


def init_state(params: Sequence[Array], batch_size: int) -> MemoryState:
    """The state before the first token: every row starts at `M_0 = params` with no momentum.

    Args:
      params: [H,d_in,d_out] of each layer (`init_memory`).
      batch_size: B.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1.")
    start = lambda w: jnp.broadcast_to(w[None], (batch_size, *w.shape))
    weights = [start(jnp.asarray(w, inner_dtype(w))) for w in params]
    zeros = [jnp.zeros_like(w) for w in weights]
    return MemoryState(weights, zeros, weights, jnp.zeros((batch_size,), jnp.int32))


def inner_dtype(*arrays: Any) -> jnp.dtype:
    """float32; float64 when an input is (under `jax.enable_x64`)."""
    wide = any(jnp.asarray(x).dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def check_options(inner: Inner, chunk: int, impl: str) -> None:
    """Raise for options that do not exist."""
    for name, value, known in (
        ("loss", inner.loss, tuple(LOSSES)),
        ("read", inner.read, ("post", "pre")),
        ("impl", impl, IMPLS),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(known)}.")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be at least 1.")
    limit = inner.max_grad_norm
    if limit is not None and not limit > 0:
        raise ValueError(f"max_grad_norm={limit}: must be positive, or None for no limit.")
    growth = inner.max_outer_growth
    if growth is not None and not growth > 0:
        raise ValueError(f"max_outer_growth={growth}: must be positive, or None for no limit.")


def check_params(params: Sequence[Array], head_dim: int, num_heads: int) -> None:
    """Raise for weights that are not those of a memory of this width."""
    if not isinstance(params, list | tuple) or len(params) < 1:
        raise ValueError(
            "params must be a list of at least one matrix [H,d_in,d_out] per layer "
            f"(see init_memory), got {type(params).__name__} with depth "
            f"{len(params) if isinstance(params, list | tuple) else 'unknown'}."
        )
    width = head_dim
    for layer, w in enumerate(params):
        if w.ndim != 3 or w.shape[0] != num_heads or w.shape[1] != width:
            raise ValueError(
                f"params[{layer}] has shape {tuple(w.shape)}; needed [H,d_in,d_out] = "
                f"[{num_heads},{width},d_out] for inputs of {num_heads} heads of {head_dim}."
            )
        width = w.shape[2]
    if width != head_dim:
        raise ValueError(
            f"the last layer of params has {width} outputs; values have head_dim={head_dim}."
        )


def check_tokens(k: Array, v: Array, q: Array, ndim: int) -> None:
    """Raise where keys, values and queries do not fit each other."""
    if k.ndim != ndim or k.shape != v.shape or k.shape != q.shape:
        letters = {4: "[B,T,H,D]", 3: "[B,H,D]"}[ndim]
        raise ValueError(
            f"k, v and q must have one shape {letters}; got k {tuple(k.shape)}, "
            f"v {tuple(v.shape)}, q {tuple(q.shape)}."
        )
    if 0 in k.shape:
        raise ValueError(f"k, v and q are empty: {tuple(k.shape)}.")


def check_gates(gates: dict[str, Array], shape: tuple[int, ...], depth: int) -> None:
    """Raise for gates of another shape, or (outside jit) outside [0, 1]."""
    for name, gate in gates.items():
        if gate.shape not in (shape, (*shape, depth)):
            raise ValueError(
                f"{name} has shape {tuple(gate.shape)}; needed {shape}, or {(*shape, depth)} "
                f"for one gate per layer of a memory of depth {depth}."
            )
        check_unit_interval(name, gate)


def check_unit_interval(name: str, gate: Array) -> None:
    """Raise (outside jit) for values outside [0, 1]."""
    if is_traced(gate):
        return
    values = np.asarray(gate, np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(
            f"{name} must lie in [0, 1]; got values from {values.min():g} to {values.max():g}. "
            "Pass it through a sigmoid."
        )


def check_state(
    state: MemoryState, params: Sequence[Array], batch: int, dtype: jnp.dtype, chunk: int
) -> None:
    """Raise for a state of another memory, batch or dtype."""
    if not isinstance(state, MemoryState):
        raise TypeError(f"state must be a MemoryState, got {type(state).__name__}.")
    for field in ("weights", "momentum", "ref_weights"):
        arrays = getattr(state, field)
        if len(arrays) != len(params):
            raise ValueError(
                f"state.{field} has depth {len(arrays)}, the memory has depth {len(params)}: "
                "the state belongs to another memory."
            )
        for layer, (x, w) in enumerate(zip(arrays, params)):
            if x.shape != (batch, *w.shape):
                raise ValueError(
                    f"state.{field}[{layer}] has shape {tuple(x.shape)}; needed "
                    f"{(batch, *w.shape)} for a batch of {batch} rows of this memory."
                )
            if x.dtype != dtype:
                raise TypeError(
                    f"state.{field}[{layer}] is {x.dtype}; the inner loop runs in {dtype}: "
                    "keep the state in it (rounding it would be an update of its own)."
                )
    if state.offset.shape != (batch,) or not jnp.issubdtype(state.offset.dtype, jnp.integer):
        raise ValueError(
            f"state.offset must be integers [{batch}], got {state.offset.dtype} "
            f"{tuple(state.offset.shape)}."
        )
    if not is_traced(state.offset):
        offsets = np.asarray(state.offset)
        if ((offsets < 0) | (offsets >= chunk)).any():
            raise ValueError(
                f"state.offset={offsets.tolist()} must be at least 0 and below chunk={chunk}: "
                "the state was made with another chunk."
            )


def is_at_chunk_start(state: MemoryState | None) -> bool:
    """Whether all rows are known to stand at the start of a chunk."""
    if state is None:
        return True
    return not is_traced(state.offset) and not np.asarray(state.offset).any()
