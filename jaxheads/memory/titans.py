"""A neural memory that learns at test time: gradient descent inside the forward pass.

Per head a small network `M` maps keys to values. Each token takes one step on its own loss, with
momentum and forgetting, and reads with its query:

    u_t = grad_M 1/2 ||M_ref(k_t) - v_t||^2
    S_t = eta_t S_{t-1} - theta_t u_t
    M_t = (1 - alpha_t) M_{t-1} + S_t
    y_t = M_t(q_t)

`M_ref` is the memory at the end of the previous chunk of `chunk` tokens. `impl="dual"` computes
this chunk by chunk with matrix products only (`dual.py`), at a cost linear in T.

    params = init_memory(key, num_heads, head_dim)
    y, state = neural_memory(k, v, q, theta, eta, alpha, params)
    y, state = neural_memory(k2, v2, q2, theta2, eta2, alpha2, params, state=state)  # goes on
    y, state = memory_step(state, k3, v3, q3, theta3, eta3, alpha3)  # one token

References: Behrouz, Zhong, Mirrokni, 2024, arXiv:2501.00663.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from jaxheads.memory.linear import check_linear
from jaxheads.memory.network import Inner, apply_memory, init_memory
from jaxheads.memory.passes import Gates, MemoryOut, layer_alphas, run_aligned, run_placed
from jaxheads.memory.placement import place
from jaxheads.memory.state import (
    MemoryState,
    check_gates,
    check_options,
    check_params,
    check_state,
    check_tokens,
    check_unit_interval,
    init_state,
    inner_dtype,
    is_at_chunk_start,
)
from jaxheads.typing import Array, vary_like

__all__ = [
    "MemoryOut",
    "MemoryState",
    "init_memory",
    "init_state",
    "memory_read",
    "memory_step",
    "neural_memory",
    "run_memory",
]


def neural_memory(
    k: Array,
    v: Array,
    q: Array,
    theta: Array,
    eta: Array,
    alpha: Array,
    params: Sequence[Array],
    *,
    chunk: int = 16,
    loss: str = "half",
    residual_norm: bool = True,
    read: str = "post",
    state: MemoryState | None = None,
    impl: str = "dual",
    stop_inner_grad: bool = False,
    max_grad_norm: float | None = None,
    max_outer_growth: float | None = None,
    channel_alpha: Array | None = None,
    mask: Array | None = None,
    reset: Array | None = None,
    pad: bool = True,
    precision: str = "highest",
) -> tuple[Array, MemoryState]:
    """Write keys and values into the memory token by token, and read with the queries.

    The inner loop runs in float32 whatever the dtype of the inputs (in float64 when `k` or
    `params` is). The backward pass goes through the inner updates; it keeps the states between
    chunks and recomputes the rest.

    Args:
      k, v, q: [B,T,H,D] keys, values, queries. Keys and queries of unit length keep the inner loop
        stable.
      theta, eta, alpha: [B,T,H], or [B,T,H,L] with a gate per layer: step size, momentum,
        forgetting, in [0, 1].
      params: `M_0`, [H,d_in,d_out] of each layer (`init_memory`).
      chunk: b, tokens whose gradients are taken at the same weights; 1 is the exact online rule.
      loss: "half" 1/2 ||.||^2, "sum" ||.||^2 or "mean" ||.||^2 / D.
      residual_norm: the memory is `x + LN(mlp(x))` instead of `mlp(x)`.
      read: "post" reads after the token's own write, "pre" before it.
      state: where an earlier call ended. Pieces of any length give what one pass gives. Known to
        stand at the start of a chunk (outside jit, or None) saves moving tokens on the grid.
      impl: "dual"; "associative" (all chunks at once; linear memory without norm); or the oracles
        "scan" (every token's weights of a chunk) and "naive" (a loop).
      stop_inner_grad: treat the gradients `u_t` as constants in the backward pass. Keys and values
        then learn nothing from being written.
      max_grad_norm: c, limits `u_t` softly: `u_t c tanh(|u_t| / c) / |u_t|`, |.| over all layers.
      max_outer_growth: limits what the backward pass hands from chunk to chunk to this multiple of
        what later tokens read (`outer.py`); smaller derivatives, and all values, are exact.
        `impl="dual"` only.
      channel_alpha: [B,T,H,D] forgetting of the rows of the first layer's matrix (its input
        channels), in place of `alpha` there.
      mask: [B,T] bool, False for padding: neither written nor counted; `y` is 0 there.
      reset: [B,T] bool, True where a document begins: the row's memory starts again at `params`.
        The grid of chunks stays; until it begins a new chunk, the document's gradients are taken
        at `params`. A document at a multiple of `chunk` is as if it were alone.
      pad: allow a last chunk that is not full; False raises.
      precision: of the inner matrix products ("default" rounds to bfloat16 on TPU).
    Returns:
      y [B,T,H,D] in the dtype of `q`, and the state after the last token.
    Raises:
      ValueError, TypeError: shapes that do not fit, options that do not exist, gates outside
        [0, 1] (outside jit), a state of another memory, batch, chunk or dtype.
    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxheads.memory import init_memory, neural_memory
      >>> params = init_memory(jax.random.key(0), num_heads=2, head_dim=4)
      >>> x = jnp.ones((1, 20, 2, 4)) / 2
      >>> gate = jnp.full((1, 20, 2), 0.1)
      >>> y, state = neural_memory(x, x, x, gate, gate, gate, params)
      >>> y.shape, state.offset
      ((1, 20, 2, 4), Array([4], dtype=int32))

    References: Behrouz et al., 2024, arXiv:2501.00663, sections 3.1-3.3.
    """
    out = run_memory(
        k,
        v,
        q,
        theta,
        eta,
        alpha,
        params,
        chunk=chunk,
        loss=loss,
        residual_norm=residual_norm,
        read=read,
        state=state,
        impl=impl,
        stop_inner_grad=stop_inner_grad,
        max_grad_norm=max_grad_norm,
        max_outer_growth=max_outer_growth,
        channel_alpha=channel_alpha,
        mask=mask,
        reset=reset,
        pad=pad,
        precision=precision,
    )
    return out.y, out.state


def run_memory(
    k: Array,
    v: Array,
    q: Array,
    theta: Array,
    eta: Array,
    alpha: Array,
    params: Sequence[Array],
    *,
    chunk: int = 16,
    state: MemoryState | None = None,
    impl: str = "dual",
    channel_alpha: Array | None = None,
    mask: Array | None = None,
    reset: Array | None = None,
    pad: bool = True,
    aligned: bool = False,
    initial_momentum: Sequence[Array] | None = None,
    **options,
) -> MemoryOut:
    """`neural_memory` that also tells each token's surprise.

    Args: as `neural_memory`, and
      aligned: the caller's word that `state` stands at the start of a chunk, where that cannot be
        seen (inside jit).
      initial_momentum: [H,d_in,d_out] of each layer, with which documents at `reset` begin; None:
        none. `impl="dual"` only.
    """
    inner = Inner(**options)
    check_options(inner, chunk, impl)
    check_tokens(k, v, q, 4)
    batch, length, heads, head_dim = k.shape
    check_params(params, head_dim, heads)
    params = list(params)
    dtype = inner_dtype(k, *params)
    check_gates(dict(theta=theta, eta=eta, alpha=alpha), (batch, length, heads), len(params))
    if channel_alpha is not None:
        if channel_alpha.shape != k.shape:
            raise ValueError(
                f"channel_alpha has shape {tuple(channel_alpha.shape)}; needed {k.shape}."
            )
        check_unit_interval("channel_alpha", channel_alpha)
    for name, flags in (("mask", mask), ("reset", reset)):
        if flags is not None and (flags.shape != (batch, length) or flags.dtype != bool):
            raise ValueError(
                f"{name} must be bool {(batch, length)}, got {flags.dtype} {tuple(flags.shape)}."
            )
    if not pad and length % chunk:
        raise ValueError(
            f"T={length} is not divisible by chunk={chunk}; pass pad=True, or whole chunks."
        )
    if state is not None:
        check_state(state, params, batch, dtype, chunk)
    if inner.max_outer_growth is not None and impl != "dual":
        raise NotImplementedError(f"impl={impl!r} takes no max_outer_growth; use impl='dual'.")
    if initial_momentum is not None and impl != "dual":
        raise NotImplementedError(f"impl={impl!r} takes no initial_momentum; use impl='dual'.")
    aligned = mask is None and (aligned or is_at_chunk_start(state))
    if impl == "associative":
        check_linear(len(params), inner)
        if not aligned or reset is not None:
            raise NotImplementedError(
                "impl='associative' takes neither mask nor reset, and a state only where it is "
                "known to stand at the start of a chunk; use impl='dual'."
            )

    out_dtype = q.dtype
    initial = [w.astype(dtype) for w in params]
    start = init_state(initial, batch) if state is None else state
    start = vary_like(start, (start, k, v, q, theta, eta, alpha, mask, reset))
    k, v, q, theta, eta = (x.astype(dtype) for x in (k, v, q, theta, eta))
    gates = Gates(theta, eta, layer_alphas(alpha.astype(dtype), channel_alpha, len(params)))
    if impl in ("dual", "associative") and aligned and reset is None:
        associative = impl == "associative"
        out = run_aligned(start, k, v, q, gates, chunk, inner, associative=associative)
    else:
        where = place(start.offset, length, chunk, mask, aligned=aligned)
        anew = None if initial_momentum is None else list(initial_momentum)
        out = run_placed(start, initial, k, v, q, gates, reset, where, chunk, impl, inner, anew)
    return out._replace(y=out.y.astype(out_dtype))


def memory_read(state: MemoryState, q: Array, *, residual_norm: bool = True) -> Array:
    """Read without writing: `M(q)` with the memory as it is.

    Args:
      state: of `neural_memory`.
      q: [B,T,H,D], or [B,H,D] for one token.
      residual_norm: as in the pass that made the state.
    Returns:
      The shape and dtype of `q`.
    """
    one = q.ndim == 3
    tokens = q[:, None] if one else q
    batch, heads, head_dim = *state.weights[0].shape[:2], state.weights[0].shape[-2]
    if q.ndim not in (3, 4) or (tokens.shape[0], *tokens.shape[2:]) != (batch, heads, head_dim):
        raise ValueError(
            f"q has shape {tuple(q.shape)}; needed [B,T,H,D] or [B,H,D] with B={batch}, "
            f"H={heads}, D={head_dim} of the state."
        )
    x = jnp.swapaxes(tokens, 1, 2).astype(state.weights[0].dtype)  # [B,H,T,D]
    y = apply_memory(state.weights, x, Inner(residual_norm=residual_norm))
    y = jnp.swapaxes(y, 1, 2).astype(q.dtype)
    return y[:, 0] if one else y


def memory_step(
    state: MemoryState,
    k: Array,
    v: Array,
    q: Array,
    theta: Array,
    eta: Array,
    alpha: Array,
    *,
    chunk: int = 16,
    **options,
) -> tuple[Array, MemoryState]:
    """One token: write `k`, `v`, read with `q`. The cost does not depend on what came before.

    Args:
      state: of `init_state`, `neural_memory` or an earlier step.
      k, v, q: [B,H,D].
      theta, eta, alpha: [B,H] or [B,H,L].
      chunk: as in `neural_memory`; the reference weights are renewed every `chunk` tokens.
      **options: `loss`, `residual_norm`, `read`, `stop_inner_grad`, `max_grad_norm`,
        `max_outer_growth`, `channel_alpha` [B,H,D], `precision` of `neural_memory`.
    Returns:
      y [B,H,D] and the new state.
    """
    check_tokens(k, v, q, 3)
    one = lambda x: x[:, None]
    if options.get("channel_alpha") is not None:
        options["channel_alpha"] = one(options["channel_alpha"])
    params = [w[0] for w in state.weights]  # shapes only: nothing starts anew here
    out = run_memory(
        one(k),
        one(v),
        one(q),
        one(theta),
        one(eta),
        one(alpha),
        params,
        chunk=chunk,
        state=state,
        **options,
    )
    return out.y[:, 0], out.state
