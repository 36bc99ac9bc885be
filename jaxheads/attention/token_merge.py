"""Merging the tokens of an image that are alike, and undoing it: fewer tokens, same shapes.

In every sy x sx cell of the grid one token is a destination, the others are sources. Each source
points to the destination most like it (cosine); the r best matches are replaced by the mean of
their cluster. How many tokens are left is known from shapes, which are data: everything compiles.

    plan = bipartite_soft_matching(x, grid=(h, w), stride=(2, 2), r=100, r_agent=190)
    few = merge(x, plan)                    # [B,N-r,C]
    agents = merge(x, plan.for_agents)      # [B,N-r_agent,C]: the same matches, more of them
    y = unmerge(attend(few, agents), plan)  # [B,N,C]

Bolya & Hoffman, 2023, arXiv:2303.17604; as agents, Han et al., 2024, arXiv:2312.08874.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.typing import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MergePlan:
    """Which tokens are merged: those that share a slot."""

    slots: Array
    """[B,N] int32, the merged token that each token is part of: first the sources that stay, the
    ones most like a destination first, then the destinations."""
    agent_slots: Array
    """[B,N] int32, the agent that each token is part of."""
    num_tokens: int = field(metadata={"static": True})
    """N - r merged tokens."""
    num_agents: int = field(metadata={"static": True})
    """N - r_agent agents."""

    @property
    def for_agents(self) -> MergePlan:
        """The plan that merges tokens to agents."""
        return MergePlan(self.agent_slots, self.agent_slots, self.num_agents, self.num_agents)


def bipartite_soft_matching(
    metric: Array,
    grid: tuple[int, int],
    stride: tuple[int, int],
    r: int,
    r_agent: int,
    key: Array | None = None,
    *,
    crop: bool = False,
) -> MergePlan:
    """Matches every source token to its most similar destination and merges the best r.

    Args:
      metric: [B,N,C] what similarity is measured on, N = h w, row by row; no gradient flows to it.
      grid: (h, w).
      stride: (sy, sx), the size of a cell.
      r: how many sources are merged into tokens; at most all sources are.
      r_agent: the same for agents.
      key: draws the destination of every cell, the same for all images; None: the top left token.
      crop: allow a grid that is no multiple of the stride: cells cover its top left part, and
        tokens outside of them are sources.
    Returns:
      `MergePlan`. Of equally similar sources, and of equally similar destinations, the first in the
      grid comes first.
    Raises:
      ValueError: tokens that are not the grid's, a stride that does not divide it (without `crop`)
        or exceeds it, negative counts.
    """
    (h, w), (sy, sx) = grid, stride
    _check(metric, grid, stride, r, r_agent, crop)
    cells_y, cells_x = h // sy, w // sx
    place = jnp.zeros((cells_y, cells_x), jnp.int32)
    if key is not None:
        place = jax.random.randint(key, place.shape, 0, sy * sx, dtype=jnp.int32)
    rows = jnp.arange(cells_y, dtype=jnp.int32)[:, None] * sy + place // sx
    columns = jnp.arange(cells_x, dtype=jnp.int32) * sx + place % sx
    into = (rows * w + columns).reshape(-1)  # [M] destinations, cell by cell
    num_sources = h * w - cells_y * cells_x
    is_destination = jnp.zeros(h * w, bool).at[into].set(True)
    sources = jnp.argsort(is_destination, stable=True)[:num_sources]  # ascending
    x = jax.lax.stop_gradient(metric).astype(jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    alike = jnp.einsum("bnc,bmc->bnm", x[:, sources], x[:, into])
    best = jnp.argmax(alike, axis=-1)  # [B,N-M]
    rank = jnp.argsort(jnp.argsort(-jnp.max(alike, axis=-1), axis=-1, stable=True), axis=-1)
    slots = []
    for merged in (min(r, num_sources), min(r_agent, num_sources)):
        kept = num_sources - merged
        own = jnp.where(rank >= merged, rank - merged, kept + best)  # [B,N-M]
        slot = jnp.zeros(metric.shape[:2], jnp.int32).at[:, sources].set(own.astype(jnp.int32))
        slots.append(slot.at[:, into].set(kept + jnp.arange(len(into), dtype=jnp.int32)))
    sizes = (h * w - min(n, num_sources) for n in (r, r_agent))
    return MergePlan(*slots, *sizes)


def merge(x: Array, plan: MergePlan) -> Array:
    """The mean of the tokens of every slot, destinations included: [B,N,...] -> [B,N-r,...]."""
    _check_tokens(x, plan.slots.shape, "tokens")
    add = jax.vmap(lambda values, slot: jax.ops.segment_sum(values, slot, plan.num_tokens))
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    sizes = add(jnp.ones(plan.slots.shape, dtype), plan.slots)
    sizes = sizes.reshape(*sizes.shape, *(1,) * (x.ndim - 2))
    return (add(x.astype(dtype), plan.slots) / sizes).astype(x.dtype)


def unmerge(y: Array, plan: MergePlan) -> Array:
    """Every token gets a copy of what it was merged into: [B,N-r,...] -> [B,N,...]."""
    _check_tokens(y, (plan.slots.shape[0], plan.num_tokens), "merged tokens")
    return jax.vmap(lambda values, slot: values[slot])(y, plan.slots)


def sizes_after(
    grid: tuple[int, int], stride: tuple[int, int], ratio: float, agent_ratio: float
) -> tuple[int, int]:
    """How many merged tokens and how many agents `ratio` and `agent_ratio` of the tokens leave.

    Raises:
      ValueError: for a ratio of which a grid of such cells has too few sources; `agent_ratio` may
        be larger, and then leaves one agent a cell.
    """
    num_tokens = int(np.prod(grid))
    sources = num_tokens - (grid[0] // stride[0]) * (grid[1] // stride[1])
    most = 1 - 1 / (stride[0] * stride[1])
    if not 0 <= ratio <= most:
        raise ValueError(
            f"ratio={ratio} must lie in 0..{most:g}: of a cell of {stride[0]} x {stride[1]} tokens "
            "one stays. Use a larger stride or merge fewer."
        )
    if not 0 <= agent_ratio <= 1:
        raise ValueError(f"agent_ratio={agent_ratio} must lie in 0..1.")
    left = lambda share: num_tokens - min(int(num_tokens * share), sources)
    return left(ratio), left(agent_ratio)


def _check(metric, grid, stride, r, r_agent, crop) -> None:
    if metric.ndim != 3 or metric.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"metric has shape {metric.shape}; for grid={grid} it must be "
            f"[B,{grid[0] * grid[1]},C], without class tokens."
        )
    if not all(1 <= s <= n for n, s in zip(grid, stride)):
        raise ValueError(f"stride={stride} must lie between 1 and the grid's {grid}.")
    if not crop and any(n % s for n, s in zip(grid, stride)):
        raise ValueError(
            f"stride={stride} does not divide grid={grid}; choose one that does, or pass crop=True "
            "to leave the last rows and columns without destinations."
        )
    if r < 0 or r_agent < 0:
        raise ValueError(f"r={r} and r_agent={r_agent} are numbers of tokens, 0 or more.")


def _check_tokens(x: Array, shape: tuple[int, ...], what: str) -> None:
    if x.shape[:2] != tuple(shape):
        raise ValueError(f"the plan is for {shape} (B, {what}); got an array {x.shape}.")
