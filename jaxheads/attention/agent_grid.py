"""What agent attention needs of an image: pooled agents, biases by place, a convolution of V.

Tokens are the cells of a grid, row by row; class tokens stand in front and are left out before
pooling and convolving. All functions work on a grid whose rows are split over devices.

Han et al., 2024, arXiv:2312.08874.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.typing import Array

Grid = tuple[int, int]
"""Rows and columns."""
BIAS_GRID = 7


def adaptive_avg_pool_2d(x: Array, size: Grid) -> Array:
    """Means over the cells of a coarser grid, which overlap where the sizes do not divide.

        cell (i, j): rows floor(i Hg / p) .. ceil((i + 1) Hg / p) - 1, columns likewise

    Args:
      x: [B,Hg,Wg,...].
      size: (p, p'), rows and columns of the result, at most Hg and Wg.
    Returns:
      [B,p,p',...] in the dtype of x; computed in float32.
    Raises:
      ValueError: for a size larger than the grid.
    """
    rows, columns = (pooling_matrix(n, p) for n, p in zip(x.shape[1:3], size))
    pooled = jnp.einsum("ih,bhw...->biw...", rows, x, preferred_element_type=_wide(x))
    return jnp.einsum("jw,biw...->bij...", columns, pooled).astype(x.dtype)


def pooling_matrix(length: int, num_cells: int) -> np.ndarray:
    """[p,n] float32: the weights of n rows in the mean of each of p cells."""
    if not 1 <= num_cells <= length:
        raise ValueError(
            f"{num_cells} cells along a side of {length} tokens: a cell needs a token of its own; "
            "use fewer agents or a finer grid."
        )
    cell, token = np.arange(num_cells)[:, None], np.arange(length)
    first, after = cell * length // num_cells, -(-(cell + 1) * length // num_cells)
    inside = (first <= token) & (token < after)
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)


def pool_agents(
    q: Array,
    grid: Grid,
    num_agents: int,
    *,
    mask: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Agents as means of the queries over a p x p grid of cells, n = p^2; no parameters.

    Args:
      q: [B,Hg Wg,H,D] queries, row by row, without class tokens.
      grid: (Hg, Wg), of the whole image.
      num_agents: n, a perfect square.
      mask: [B,Hg Wg] bool, False for padding, which is left out of the means; the agent of a cell
        without any other token is 0.
      axis_name: inside a `shard_map` that gives each device as many rows of the grid: the mesh axis
        of the rows. q and mask are then this device's, and the agents are those of the image.
    Returns:
      [B,n,H,D], row by row.
    Raises:
      ValueError: n that is no square or larger than the grid, or tokens that are not the grid's.
    """
    side = math.isqrt(max(num_agents, 0))
    if num_agents < 1 or side * side != num_agents:
        raise ValueError(
            f"num_agents={num_agents} is not a perfect square; pooled agents form a p x p grid, "
            "such as 9, 16 or 49. Other numbers: pass agents of your own."
        )
    shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    rows, columns = (pooling_matrix(n, side) for n in grid)
    if grid[0] % shards:
        raise ValueError(
            f"grid={grid}: {grid[0]} rows are not a multiple of the {shards} devices of "
            f"{axis_name!r}; each device holds whole rows."
        )
    check_grid(q, (grid[0] // shards, grid[1]))
    rows = jnp.asarray(rows)
    if axis_name is not None:
        mine = grid[0] // shards
        rows = jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(axis_name) * mine, mine, 1)

    def means(x: Array) -> Array:
        cells = x.reshape(x.shape[0], -1, grid[1], *x.shape[2:])  # [B,Hg,Wg,...]
        part = jnp.einsum("ih,bhw...->biw...", rows, cells, preferred_element_type=_wide(x))
        part = jnp.einsum("jw,biw...->bij...", columns, part)
        part = part if axis_name is None else jax.lax.psum(part, axis_name)
        return part.reshape(x.shape[0], num_agents, *x.shape[2:])

    if mask is None:
        return means(q).astype(q.dtype)
    if mask.shape != q.shape[:2]:
        raise ValueError(f"mask has shape {mask.shape}; for q {q.shape} it must be {q.shape[:2]}.")
    seen = mask.astype(q.dtype)[..., None, None]
    share = means(seen)
    return (means(q * seen) / jnp.where(share == 0, 1, share)).astype(q.dtype)


class AgentBias(NamedTuple):
    """Parameters of both biases; `init_agent_bias` makes them, `agent_bias` reads them."""

    an: Array
    """[H,n,7,7] of agents to places among the keys, in a coarse image."""
    na: Array
    """[H,n,7,7] of queries' places to agents, likewise."""
    ah: Array
    """[1,H,n,Hk,1] of agents to rows of keys."""
    aw: Array
    """[1,H,n,1,Wk] of agents to columns of keys."""
    ha: Array
    """[1,H,Hq,1,n] of rows of queries to agents."""
    wa: Array
    """[1,H,1,Wq,n] of columns of queries to agents."""
    ac: Array | None = None
    """[1,H,n,t] of agents to the t class tokens in front; None without any."""
    ca: Array | None = None
    """[1,H,t,n] of class tokens to agents."""


def bias_shapes(
    num_heads: int, num_agents: int, query_grid: Grid, key_grid: Grid, extra_tokens: int = 0
) -> dict[str, tuple[int, ...]]:
    """The shape of every array of `AgentBias`, without those there are none of."""
    h, n, t = num_heads, num_agents, extra_tokens
    shapes = {
        "an": (h, n, BIAS_GRID, BIAS_GRID),
        "na": (h, n, BIAS_GRID, BIAS_GRID),
        "ah": (1, h, n, key_grid[0], 1),
        "aw": (1, h, n, 1, key_grid[1]),
        "ha": (1, h, query_grid[0], 1, n),
        "wa": (1, h, 1, query_grid[1], n),
    }
    return shapes | ({"ac": (1, h, n, t), "ca": (1, h, t, n)} if t else {})


def init_agent_bias(
    key: Array,
    num_heads: int,
    num_agents: int,
    query_grid: Grid,
    key_grid: Grid | None = None,
    extra_tokens: int = 0,
) -> AgentBias:
    """Biases drawn from a normal of deviation 0.02 cut at two deviations.

    Args:
      key: random key.
      num_heads: H.
      num_agents: n.
      query_grid: (Hq, Wq).
      key_grid: (Hk, Wk); None: the queries'.
      extra_tokens: t class tokens in front.
    """
    shapes = bias_shapes(num_heads, num_agents, query_grid, key_grid or query_grid, extra_tokens)
    sizes = [math.prod(shape) for shape in shapes.values()]
    # One draw for all arrays: a sampler for each takes the compiler for CPU seconds.
    drawn = 0.02 * jax.random.truncated_normal(key, -2, 2, (sum(sizes),))
    pieces = jnp.split(drawn, np.cumsum(sizes)[:-1].tolist())
    return AgentBias(**{n: x.reshape(shapes[n]) for n, x in zip(shapes, pieces)})


def agent_bias(
    params: AgentBias, query_grid: Grid, key_grid: Grid, extra_tokens: int = 0
) -> tuple[Array, Array]:
    """The biases of both softmaxes: B2 of queries to agents, B1 of agents to keys.

        B1[h,a,(y,x)] = resize(an)[h,a,y,x] + ah[h,a,y] + aw[h,a,x]
        B2[h,(y,x),a] = resize(na)[h,a,y,x] + ha[h,y,a] + wa[h,x,a]

    with `resize_bilinear` to the grid. Class tokens come first: columns `ac` of B1, rows `ca` of
    B2.

    Args:
      params: arrays of `AgentBias`.
      query_grid: (Hq, Wq).
      key_grid: (Hk, Wk).
      extra_tokens: t.
    Returns:
      (B2 [H,t+Hq Wq,n], B1 [H,n,t+Hk Wk]): `bias_qa` and `bias_ak` of `agent_attention`.
    Raises:
      ValueError: for arrays of other shapes; for another resolution see `resize_agent_bias`.
    """
    num_heads, num_agents = params.an.shape[:2]
    shapes = bias_shapes(num_heads, num_agents, query_grid, key_grid, extra_tokens)
    for name, array in params._asdict().items():
        found = None if array is None else array.shape
        if found != shapes.get(name):
            raise ValueError(
                f"bias {name} has shape {found}, needed {shapes.get(name)} for query_grid="
                f"{query_grid}, key_grid={key_grid}, extra_tokens={extra_tokens}; a layer made for "
                "another resolution is changed by resize_agent_bias."
            )
    of_keys = resize_bilinear(params.an, key_grid) + params.ah[0] + params.aw[0]
    bias_ak = of_keys.reshape(num_heads, num_agents, -1)
    of_queries = jnp.moveaxis(resize_bilinear(params.na, query_grid), 1, -1)  # [H,Hq,Wq,n]
    bias_qa = (of_queries + params.ha[0] + params.wa[0]).reshape(num_heads, -1, num_agents)
    if params.ac is not None and params.ca is not None:
        bias_ak = jnp.concatenate([params.ac[0], bias_ak], axis=2)
        bias_qa = jnp.concatenate([params.ca[0], bias_qa], axis=1)
    return bias_qa, bias_ak


def resize_agent_bias(params: AgentBias, query_grid: Grid, key_grid: Grid) -> AgentBias:
    """The biases of a trained layer for images of another resolution.

    `ah`, `aw`, `ha` and `wa` hold a number per row or column and are stretched linearly; `an` and
    `na` fit every grid as they are.
    """
    num_heads, num_agents = params.an.shape[:2]
    to = bias_shapes(num_heads, num_agents, query_grid, key_grid)
    stretch = lambda name: jax.image.resize(
        getattr(params, name), to[name], "linear", antialias=False
    )
    return params._replace(**{name: stretch(name) for name in ("ah", "aw", "ha", "wa")})


def resize_bilinear(x: Array, size: Grid) -> Array:
    """The last two axes resized: bilinear, pixels have centres at halves, no anti-aliasing."""
    if x.shape[-2:] == tuple(size):
        return x
    return jax.image.resize(x, (*x.shape[:-2], *size), "bilinear", antialias=False)


def depthwise_conv(
    v: Array, weight: Array, bias: Array, grid: Grid, *, axis_name: str | None = None
) -> Array:
    """A 3x3 convolution of every channel with itself; zeros surround the image.

        y[y,x] = sum_{i,j} weight[i,j] v[y+i-1,x+j-1] + bias

    Args:
      v: [B,Hg Wg,H,D] values of the image's tokens, without class tokens.
      weight: [3,3,H,D].
      bias: [H,D].
      grid: (Hg, Wg).
      axis_name: inside a `shard_map` that gives each device as many rows (`grid` is the part of
        this device): the mesh axis of the rows. One row travels each way.
    Returns:
      [B,Hg Wg,H,D] in the dtype of v.
    Raises:
      ValueError: for tokens that are not the grid's, or weights of other shapes.
    """
    check_grid(v, grid)
    if weight.shape != (3, 3, *v.shape[2:]) or bias.shape != v.shape[2:]:
        raise ValueError(
            f"weight {weight.shape} and bias {bias.shape} must be [3,3,H,D] and [H,D] with "
            f"H, D = {v.shape[2:]}."
        )
    rows, columns = grid
    image = v.reshape(v.shape[0], rows, columns, *v.shape[2:])
    above = below = jnp.zeros_like(image[:, :1])
    if axis_name is not None:
        last = jax.lax.axis_size(axis_name) - 1
        down, up = ([(i, i + 1) for i in range(last)], [(i + 1, i) for i in range(last)])
        if last:
            above = jax.lax.ppermute(image[:, -1:], axis_name, down)
            below = jax.lax.ppermute(image[:, :1], axis_name, up)
    image = jnp.concatenate([above, image, below], axis=1)
    image = jnp.pad(image, ((0, 0), (0, 0), (1, 1), (0, 0), (0, 0)))
    weight = weight.astype(v.dtype)
    shifted = lambda i, j: image[:, i : i + rows, j : j + columns]
    y = sum(weight[i, j] * shifted(i, j) for i in range(3) for j in range(3))
    return (y + bias.astype(v.dtype)).reshape(v.shape)


def check_grid(x: Array, grid: Grid) -> None:
    """Raise unless the tokens of x [B,T,...] are those of the grid."""
    if x.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"grid={grid} has {grid[0] * grid[1]} cells but there are {x.shape[1]} tokens; leave "
            "out class tokens, and give the grid of this image (of a text: (T, 1) or (1, T))."
        )


def _wide(x: Array):
    return jnp.promote_types(x.dtype, jnp.float32)
