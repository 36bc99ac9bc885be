"""The parts of LongHeads: what a chunk is like, which chunks a query reads, attention over them.

Keys are held rotated by their place in their chunk. A query of chunk c at offset r reads n_t
chunks, the one of rank j as if it began at position j w. Rotations being relative, its scores with
them are those of the query rotated to

    (n_t - 1 - j) w + r

so that no key is ever rotated again. Positions stay below A = n w, however long the text.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.attention.contract import Rotate
from jaxheads.attention.dense import TINY
from jaxheads.attention.masks import FLOOR, penalty
from jaxheads.fields import unknown
from jaxheads.typing import Array

REPRESENTATIONS = ("longheads", "mean_key", "mean_output")
IMPLS = ("gather", "masked")
_GATHERED = 2**22  # elements of keys that a block of queries may gather


@dataclasses.dataclass(frozen=True)
class LongHeadsOptions:
    """What parentheses after `longheads` may set, and `longheads_attention` takes by name.

    Attributes:
      chunk: w, tokens in a chunk.
      window: A = n w, the tokens a query sees, at most the length the model was trained on (the
        authors use half of it for base models).
      begin: tokens before this one see everything; None: `window`, and any smaller number gives
        the same result. A multiple of `chunk`.
      num_sink: first chunks that every query reads.
      num_recent: last chunks that it reads, its own included.
      include_self: a query sees its own key; False is the prefill of the released code.
      repr: what stands for a chunk: "longheads", or "mean_key" or "mean_output" (ablations).
      repr_per: "query": a vector for each query head; "kv": one from the mean query of a group.
      at_random: read other chunks at random rather than by score (a control).
      impl: "gather" collects the chunks of each query, "masked" goes through all; "auto": gather
        on CPU and for few queries.
      force: accept a window beyond the length the model was trained on.
    """

    chunk: int = 256
    window: int = 2048
    begin: int | None = None
    num_sink: int = 1
    num_recent: int = 2
    include_self: bool = True
    repr: str = "longheads"
    repr_per: str = "query"
    at_random: bool = False
    impl: str = "auto"
    force: bool = False

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"longheads: chunk={self.chunk} tokens must be at least 1.")
        for name, tokens in (("window", self.window), ("begin", self.start)):
            if tokens % self.chunk or tokens < 0:
                raise ValueError(
                    f"longheads: {name}={tokens} must be a multiple of chunk={self.chunk}, such as "
                    f"{max(1, tokens // self.chunk) * self.chunk}."
                )
        if self.num_sink < 0 or self.num_recent < 1:
            raise ValueError(
                f"longheads: num_sink={self.num_sink} must be at least 0 and "
                f"num_recent={self.num_recent} at least 1, the query's own chunk."
            )
        check_room(self.num_chunks, self.num_sink, self.num_recent)
        for name, known in (
            ("repr", REPRESENTATIONS),
            ("repr_per", ("query", "kv")),
            ("impl", ("auto", *IMPLS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"longheads: {unknown(name, getattr(self, name), known)}")

    @property
    def num_chunks(self) -> int:
        """n, chunks that a query reads."""
        return self.window // self.chunk

    @property
    def start(self) -> int:
        """S0, the first token that selects."""
        return self.window if self.begin is None else self.begin


def check_room(num_chunks: int, num_sink: int, num_recent: int) -> None:
    """Raise where the first and last chunks do not fit, warn where they leave no room."""
    fixed = f"num_sink={num_sink} and num_recent={num_recent} chunks"
    if num_chunks < num_sink + num_recent:
        raise ValueError(
            f"longheads: a window of {num_chunks} chunks cannot hold {fixed}; widen the window or "
            "take smaller chunks."
        )
    if num_chunks == num_sink + num_recent:
        warnings.warn(
            f"longheads: a window of {num_chunks} chunks has room for {fixed} only: nothing is "
            "retrieved.",
            stacklevel=3,
        )


def rotate_at(rotate: Rotate, x: Array, positions: Array) -> Array:
    """x [B,T,H,D] at positions [T] or [B,T]; `rotate` is given them as [B,T,H]."""
    return rotate(x, jnp.broadcast_to(positions[..., None], x.shape[:3]))


def represent(
    q: Array, k: Array, v: Array, chunk: int, valid: Array | None, options: Any, scale: float
) -> Array:
    """One vector per chunk and head; `chunk_representations` for inputs rotated inside chunks.

    Args:
      q: [B,G*w,H,D]; k: [B,G*w,K,D]; v: [B,G*w,K,D].
      valid: [B,G*w] bool.
      options: has `repr` and `repr_per`.
    Returns:
      [B,G,H,D] float32.
    """
    batch, length, num_heads, width = q.shape
    num_chunks, num_kv_heads = length // chunk, k.shape[2]
    groups = num_heads // num_kv_heads
    if num_chunks == 0:
        return jnp.zeros((batch, 0, num_heads, width), jnp.float32)
    cut = lambda x: x.reshape(batch, num_chunks, chunk, *x.shape[2:]).astype(jnp.float32)
    if valid is None:
        valid = jnp.ones((batch, length), bool)

    def of_chunks(args: tuple[Array, ...]) -> Array:
        q, k, v, real = args  # [B,w,...]
        q = q.reshape(batch, chunk, num_kv_heads, groups, width)
        if options.repr_per == "kv":
            q = q.mean(axis=3, keepdims=True)
        hidden = penalty(real)[:, None, None, None]  # of keys
        rows = real / jnp.maximum(real.sum(axis=1, keepdims=True), 1)  # weights of the mean
        mean_key = jnp.einsum("bskd,bs->bkd", k, rows)[:, :, None]
        if options.repr == "mean_key":
            rep = jnp.broadcast_to(mean_key, (batch, num_kv_heads, q.shape[3], width))
        else:
            scores = scale * jnp.einsum("btkgd,bskd->bkgts", q, k) + hidden
            pattern = jax.nn.softmax(scores, axis=-1)
            rep = jnp.einsum("bkgts,bskd,bt->bkgd", pattern, v, rows)
        if options.repr == "longheads":
            scores = scale * jnp.einsum("bkgd,bskd->bkgs", rep, k) + hidden[:, :, 0]
            rep = jnp.einsum("bkgs,bskd->bkgd", jax.nn.softmax(scores, axis=-1), k)
        rep = jnp.where(real.any(axis=1)[:, None, None, None], rep, 0)
        rep = jnp.broadcast_to(rep, (batch, num_kv_heads, groups, width))
        return rep.reshape(batch, num_heads, width)

    size = max(1, _GATHERED // (batch * num_heads * chunk * chunk))
    stacked = [jnp.moveaxis(cut(x), 1, 0) for x in (q, k, v)]
    real = jnp.moveaxis(valid.reshape(batch, num_chunks, chunk), 1, 0)
    reps = jax.lax.map(of_chunks, (*stacked, real), batch_size=size)
    return jnp.moveaxis(reps, 0, 1)


def pick(
    scores: Array, chunk_of_query: Array, num_chunks: int, num_sink: int, num_recent: int
) -> Array:
    """The chunks of each query from scores [B,T,H,G]; see `select_chunks`."""
    c = chunk_of_query[..., None, None]  # [T,1,1] or [B,T,1,1]
    shape = scores.shape[:3]
    spread = lambda x: jnp.broadcast_to(x, (*shape, x.shape[-1])).astype(jnp.int32)
    free = num_chunks - num_sink - num_recent
    g = jnp.arange(scores.shape[-1])
    is_candidate = (g >= num_sink) & (g <= c - num_recent)
    scores = jnp.where(is_candidate, jax.lax.stop_gradient(scores), -jnp.inf)
    # With fewer chunks than free places every query reads all it has.
    top = jax.lax.top_k(scores, min(free, scores.shape[-1]))[1]
    top = jnp.pad(top, ((0, 0),) * 3 + ((0, free - top.shape[-1]),))
    first, last = jnp.arange(num_sink), c + jnp.arange(1 - num_recent, 1)
    chosen = jnp.concatenate([spread(first), jnp.sort(top, axis=-1), spread(last)], axis=-1)
    every = jnp.arange(num_chunks)
    every = jnp.where(every <= c, every, -1)
    return jnp.where(c < num_chunks, every, chosen).astype(jnp.int32)


def attend_chunks(
    q: Array,
    t: Array,
    k: Array,
    v: Array,
    reps: Array,
    rotate: Rotate,
    options: LongHeadsOptions,
    *,
    impl: str,
    scale: float,
    key: Array | None = None,
) -> tuple[Array, Array]:
    """Attention of queries over the chunks that they select.

    Args:
      q: [B,T,H,D] unrotated.
      t: [B,T] int32, the place of each query in its text.
      k: [B,S,K,D] rotated inside chunks, v: [B,S,K,W]; S a multiple of w.
      reps: [B,G,H,D] of the complete chunks; what lies beyond them is not read.
      impl: a name of `IMPLS`.
      key: for `options.at_random`.
    Returns:
      y [B,T,H,W] and the chunks read [B,T,H,n].
    """
    batch, length, num_heads, head_dim = q.shape
    chunk, n = options.chunk, options.num_chunks
    kv_heads = k.shape[2]
    cut = lambda x: jnp.einsum("bgwkd->bkgwd", x.reshape(batch, -1, chunk, kv_heads, x.shape[-1]))
    blocks = (cut(k), cut(v))
    attend = {"gather": _gather, "masked": _masked}[impl]

    def one_block(args: tuple[Array, Array]) -> tuple[Array, Array]:
        q, t = args
        c = t // chunk
        if options.at_random:
            drawn = jax.random.fold_in(jax.random.key(0) if key is None else key, t[0, 0])
            scores = jax.random.uniform(drawn, (*q.shape[:3], reps.shape[1]))
        else:
            scores = score(q, reps)
        chunks = pick(scores, c, n, options.num_sink, options.num_recent)
        own = jnp.minimum(c, n - 1)  # the rank of a query's own chunk
        ranks = jnp.maximum(own[..., None] - jnp.arange(n), 0)
        places = (ranks * chunk + (t % chunk)[..., None]).reshape(batch, -1)  # [B,t*n]
        many = jnp.broadcast_to(q[:, :, None], (*q.shape[:2], n, num_heads, head_dim))
        turned = rotate_at(rotate, many.reshape(batch, -1, num_heads, head_dim), places)
        turned = turned.reshape(batch, -1, n, kv_heads, num_heads // kv_heads, head_dim)
        offset, r = jnp.arange(chunk), (t % chunk)[..., None]
        upto = offset < r if not options.include_self else offset <= r
        upto = upto | (offset == r) & (t < options.start)[..., None]  # [B,t,w]
        y = attend(turned, *blocks, chunks, own, upto, scale)
        return y.reshape(*q.shape[:3], -1).astype(q.dtype), chunks

    size = batch * num_heads * n * chunk * head_dim if impl == "gather" else 64 * num_heads
    block = max(1, min(length, _GATHERED // size))
    return _in_blocks(one_block, (q, t), block)


def score(q: Array, reps: Array) -> Array:
    """q [B,T,H,D] . reps [B,G,H,D] -> [B,T,H,G] float32; neither rotated nor scaled."""
    q, reps = (x.astype(jnp.float32) for x in (q, reps))
    return jnp.einsum("bthd,bghd->bthg", q, reps)


def _in_blocks(fn: Any, xs: tuple[Array, ...], block: int) -> Any:
    """fn over [B,T,...] arrays, `block` of T at a time."""
    length = xs[0].shape[1]
    if length <= block:
        return fn(xs)
    more = -length % block
    padded = [jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2)) for x in xs]
    split = [jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0) for x in padded]
    out = jax.lax.map(fn, tuple(split))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]
    return jax.tree.map(join, out)


def _gather(q, k, v, chunks, own, upto, scale) -> Array:
    """The chunks of each query side by side.

    Args:
      q: [B,T,n,K,g,D], the query rotated for each rank; k, v: [B,K,G,w,D]; chunks: [B,T,H,n];
        own: [B,T]; upto: [B,T,w], what is visible of the own chunk.
    Returns:
      [B,T,K,g,W]
    """
    index = jnp.einsum("btkgn->bkgtn", chunks.reshape(*q.shape[:2], *q.shape[3:5], -1))
    take = jax.vmap(jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="clip")))
    k, v = take(k, index), take(v, index)  # [B,K,g,T,n,w,D]
    scores = scale * jnp.einsum(
        "btnkgd,bkgtnwd->bkgtnw", q, k.astype(q.dtype), preferred_element_type=jnp.float32
    )
    rank = jnp.arange(chunks.shape[-1])
    before, mine = (rank < own[..., None])[..., None], (rank == own[..., None])[..., None]
    visible = before | mine & upto[:, :, None]  # [B,T,n,w]
    scores = scores + penalty(visible)[:, None, None]
    highest = jnp.maximum(scores.max(axis=(-2, -1), keepdims=True), FLOOR)
    weights = jnp.exp(scores - highest)
    total = jnp.maximum(weights.sum(axis=(-2, -1)), TINY)
    y = jnp.einsum(
        "bkgtnw,bkgtnwd->bkgtd",
        weights.astype(q.dtype),
        v.astype(q.dtype),
        preferred_element_type=jnp.float32,
    )
    return jnp.einsum("bkgtd->btkgd", y / total[..., None])


def _masked(q, k, v, chunks, own, upto, scale) -> Array:
    """The same function, a chunk of keys at a time: no gathers of keys, O(T S) operations."""
    batch, length, n, kv_heads, groups, _ = q.shape
    chunks = chunks.reshape(batch, length, kv_heads, groups, n)
    mine = jnp.take_along_axis(chunks, own[:, :, None, None, None], axis=-1)[..., 0]
    q = jnp.einsum("btnkgd->bkgtnd", q)

    def visit(state: tuple[Array, ...], g: Array, k: Array, v: Array) -> tuple[Array, ...]:
        acc, highest, total = state
        is_read = jnp.einsum("btkgn->bkgtn", chunks == g)
        rank = jnp.argmax(is_read, axis=-1)
        turned = jnp.take_along_axis(q, rank[..., None, None], axis=-2)[..., 0, :]
        scores = scale * jnp.einsum(
            "bkgtd,bkwd->bkgtw", turned, k.astype(q.dtype), preferred_element_type=jnp.float32
        )
        of_mine = jnp.einsum("btkg->bkgt", mine == g)[..., None]
        visible = is_read.any(axis=-1)[..., None] & (~of_mine | upto[:, None, None])
        scores = scores + penalty(visible)
        new = jnp.maximum(highest, scores.max(axis=-1))
        weights, keep = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
        gained = jnp.einsum(
            "bkgtw,bkwd->bkgtd",
            weights.astype(q.dtype),
            v.astype(q.dtype),
            preferred_element_type=jnp.float32,
        )
        return acc * keep[..., None] + gained, new, total * keep + weights.sum(axis=-1)

    def step(state: tuple[Array, ...], xs: tuple[Array, ...]):
        g, k, v = xs
        return jax.lax.cond(g <= mine.max(), visit, lambda s, *_: s, state, g, k, v), None

    rows = (batch, kv_heads, groups, length)
    state = (jnp.zeros((*rows, v.shape[-1])), jnp.full(rows, FLOOR), jnp.zeros(rows))
    by_chunk = tuple(jnp.moveaxis(x, 2, 0) for x in (k, v))
    (acc, _, total), _ = jax.lax.scan(step, state, (jnp.arange(k.shape[2]), *by_chunk))
    return jnp.einsum("bkgtd->btkgd", acc / jnp.maximum(total, TINY)[..., None])
