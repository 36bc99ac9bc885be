"""Agent attention: n tokens stand between queries and keys, at a cost linear in both.

    V_A = softmax(scale A K^T + B1) V         the agents read from all keys
    O   = softmax(scale2 Q A^T + B2) V_A      every query reads from the agents

Every query sees every key, through an [T,S] matrix of rank n that is never formed: linear attention
whose feature maps are the two softmaxes. `agent_grid.py` makes agents of images, the biases on both
softmaxes and the depth-wise convolution of V; `token_merge.py` makes agents of similar tokens.

    agents = pool_agents(q, grid=(14, 14), num_agents=49)
    z = agent_attention(q, k, v, agents)

Bidirectional only: an agent that has read a key shows it to every query.
Han et al., 2024, arXiv:2312.08874.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxheads.attention.agent_grid import (
    AgentBias,
    adaptive_avg_pool_2d,
    agent_bias,
    depthwise_conv,
    init_agent_bias,
    pool_agents,
    resize_agent_bias,
    resize_bilinear,
)
from jaxheads.attention.api import check_arrays
from jaxheads.attention.masks import FLOOR, MASK_VALUE
from jaxheads.typing import Array, ArrayLike

__all__ = [
    "AgentBias",
    "adaptive_avg_pool_2d",
    "agent_attention",
    "agent_attention_matrix",
    "agent_bias",
    "agent_flops",
    "depthwise_conv",
    "init_agent_bias",
    "pool_agents",
    "resize_agent_bias",
    "resize_bilinear",
]


def agent_attention(
    q: Array,
    k: Array,
    v: Array,
    agents: Array,
    *,
    bias_qa: Array | None = None,
    bias_ak: Array | None = None,
    key_mask: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    scale2: float | None = None,
    shortcut: ArrayLike = 0.0,
    axis_name: str | None = None,
) -> Array:
    """Attention of every query to every key through n agents.

        O = softmax(scale2 Q A^T + B2) softmax(scale A K^T + B1) V + shortcut V

    Softmax in float32. With `axis_name`, inside a `shard_map` that splits the tokens: every device
    reads its own keys for all agents, and the parts are merged exactly by sums of n (W + 2) numbers
    a head, however long the text is. q, k, v, `bias_qa`, `bias_ak` and `key_mask` are then this
    device's tokens, and `agents` are whole (`pool_agents` with the same `axis_name`).

    Args:
      q: [B,T,H,D] queries.
      k: [B,S,K,D] keys; K divides H.
      v: [B,S,K,W] values.
      agents: A [B,n,H,D], or [n,H,D] for all images; one set a query head.
      bias_qa: B2, broadcastable to [H,T,n] or [B,H,T,n].
      bias_ak: B1, broadcastable to [H,n,S] or [B,H,n,S].
      key_mask: [B,S] bool, False for padding, which no agent reads. Where an image has no key, its
        output is 0 (and `shortcut` V).
      causal: refused; there is no causal form.
      scale: factor on A K^T; None = 1/sqrt(D).
      scale2: factor on Q A^T; None = `scale`.
      shortcut: factor on V added to the output (self-attention); the published one for trained
        models is 0.075, and 0 elsewhere.
      axis_name: the mesh axis that the tokens are split over.
    Returns:
      [B,T,H,W] in the dtype of q.
    Raises:
      ValueError: shapes that do not fit, a mask other than [B,S], `causal`.
    Example:
      >>> x = jnp.ones((1, 16, 2, 8))
      >>> agent_attention(x, x, x, pool_agents(x, grid=(4, 4), num_agents=4)).shape
      (1, 16, 2, 8)

    References: Han et al., 2024, arXiv:2312.08874.
    """
    agents = _checked(q, k, v, agents, bias_qa, bias_ak, key_mask, causal)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    with jax.named_scope("attention.agent"):
        weights, total = _weights_of_keys(agents, k, bias_ak, key_mask, scale, axis_name)
        read = jnp.einsum("bkgns,bskw->bkgnw", weights.astype(v.dtype), v,
                          preferred_element_type=weights.dtype)  # fmt: skip
        if axis_name is not None:
            read = jax.lax.psum(read, axis_name)
        read = (read / total[..., None]).reshape(q.shape[0], q.shape[2], -1, v.shape[-1])
        shown = _weights_of_agents(q, agents, bias_qa, scale if scale2 is None else scale2)
        z = jnp.einsum("bhtn,bhnw->bthw", shown, read).astype(q.dtype)
        if isinstance(shortcut, (int, float)) and shortcut == 0:
            return z
        if q.shape[1] != v.shape[1]:
            raise ValueError(
                f"shortcut adds values to outputs, but there are {q.shape[1]} queries and "
                f"{v.shape[1]} values; it is for self-attention. Pass shortcut=0."
            )
        own = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
        return z + (jnp.asarray(shortcut, jnp.float32) * own).astype(q.dtype)


def agent_attention_matrix(
    q: Array,
    k: Array,
    agents: Array,
    *,
    bias_qa: Array | None = None,
    bias_ak: Array | None = None,
    key_mask: Array | None = None,
    scale: float | None = None,
    scale2: float | None = None,
) -> Array:
    """The matrix P with P V = `agent_attention`, for analysis: O(T S) memory.

        P = phi_q(Q) phi_k(K)^T,   phi_q(Q) = softmax(scale2 Q A^T + B2),
                                   phi_k(K) = softmax(scale A K^T + B1)^T

    Arguments as `agent_attention`.

    Returns:
      [B,H,T,S] float32, non-negative; rows sum to 1 (0 where no key may be read), rank at most n.
    """
    agents = _checked(q, k, k, agents, bias_qa, bias_ak, key_mask, False)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    weights, total = _weights_of_keys(agents, k, bias_ak, key_mask, scale, None)
    phi_k = (weights / total[..., None]).reshape(q.shape[0], q.shape[2], -1, k.shape[1])
    phi_q = _weights_of_agents(q, agents, bias_qa, scale if scale2 is None else scale2)
    return jnp.einsum("bhtn,bhns->bhts", phi_q, phi_k)


def agent_flops(
    num_tokens: int, num_agents: int, width: int, *, has_conv: bool = False
) -> tuple[float, float]:
    """Operations of a layer's attention for one image of N tokens and all heads: (agent, softmax).

        agent  8 N n C  (+ 18 N C with the 3x3 convolution of V),      softmax  4 N^2 C

    (Four products of N n C, two operations a multiply and add; projections are the same for both.)

    Args:
      num_tokens: N.
      num_agents: n.
      width: C, the sum over heads.
      has_conv: whether V is convolved.
    """
    agent = 8.0 * num_tokens * num_agents * width + has_conv * 18.0 * num_tokens * width
    return agent, 4.0 * num_tokens**2 * width


def _weights_of_keys(
    agents: Array,
    k: Array,
    bias: Array | None,
    key_mask: Array | None,
    scale: float,
    axis_name: str | None,
) -> tuple[Array, Array]:
    """exp(scores - highest) [B,K,G,n,S] and their sum [B,K,G,n], both over all devices' keys."""
    batch, num_agents, num_heads, head_dim = agents.shape
    num_keys, kv_heads = k.shape[1:3]
    dtype = jnp.promote_types(agents.dtype, jnp.float32)
    split = agents.reshape(batch, num_agents, kv_heads, num_heads // kv_heads, head_dim)
    scores = scale * jnp.einsum("bnkgd,bskd->bkgns", split, k, preferred_element_type=dtype)
    if bias is not None:
        whole = jnp.broadcast_to(bias, (*jnp.shape(bias)[:-3], num_heads, num_agents, num_keys))
        scores += whole.reshape(*whole.shape[:-3], *scores.shape[1:])
    if key_mask is not None:
        scores = jnp.where(key_mask.astype(bool)[:, None, None, None], scores, MASK_VALUE)
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    if axis_name is not None:
        highest = jax.lax.pmax(highest, axis_name)
    highest = jnp.maximum(highest, FLOOR)  # without a key every exponential is exactly 0
    weights = jnp.exp(scores - highest[..., None])
    total = jnp.sum(weights, axis=-1)
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    return weights, jnp.where(total == 0, 1, total)


def _weights_of_agents(q: Array, agents: Array, bias: Array | None, scale: float) -> Array:
    """softmax(scale2 Q A^T + B2) [B,H,T,n] float32."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = scale * jnp.einsum("bthd,bnhd->bhtn", q, agents, preferred_element_type=dtype)
    return jax.nn.softmax(scores if bias is None else scores + bias, axis=-1)


def _checked(q, k, v, agents, bias_qa, bias_ak, key_mask, causal) -> Array:
    """The agents [B,n,H,D]; raises ValueError for what does not fit."""
    if causal:
        raise ValueError(
            "agent attention has no causal form: agents that have read a later token show it to "
            "every query. Use a variant of VARIANTS in causal models."
        )
    check_arrays(q, k, v)
    batch, num_queries, num_heads, head_dim = q.shape
    agents = jnp.asarray(agents)
    if agents.ndim not in (3, 4) or agents.shape[-2:] != (num_heads, head_dim):
        raise ValueError(
            f"agents has shape {agents.shape}; for q {q.shape} it must be "
            f"[B,n,H,D] = [{batch},n,{num_heads},{head_dim}], or [n,H,D]: one set a query head."
        )
    agents = agents[None] if agents.ndim == 3 else agents
    if agents.shape[0] == 1:
        agents = jnp.broadcast_to(agents, (batch, *agents.shape[1:]))
    if agents.shape[0] != batch or agents.shape[1] < 1:
        raise ValueError(
            f"agents has shape {agents.shape}; it must be [{batch},n,{num_heads},{head_dim}] with "
            "at least one agent."
        )
    if key_mask is not None and jnp.shape(key_mask) != k.shape[:2]:
        raise ValueError(
            f"key_mask has shape {jnp.shape(key_mask)}, needed [B,S] = {k.shape[:2]}: only padding "
            "can be hidden. A mask [T,S] of pairs cannot be pushed through the agents."
        )
    n = agents.shape[1]
    for name, bias, axes, shape in (
        ("bias_qa", bias_qa, "[H,T,n]", (batch, num_heads, num_queries, n)),
        ("bias_ak", bias_ak, "[H,n,S]", (batch, num_heads, n, k.shape[1])),
    ):
        if bias is not None and not _broadcasts(jnp.shape(bias), shape):
            raise ValueError(
                f"{name} has shape {jnp.shape(bias)}, which does not broadcast to {axes} = "
                f"{shape[1:]}, or to {shape} with one an image."
            )
    return agents


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(to))
    return len(shape) <= len(to) and all(a in (1, b) for a, b in pairs)
