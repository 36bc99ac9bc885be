"""Memory as context: attention within segments over persistent tokens and what the memory recalls.

For every segment S of C tokens, with the memory M carried over segments:

    h = readout(M(q(S)))                       the memory as it stood when the segment began
    a = attention of S over [P; h; S]
    M <- update with keys, values and gates of a
    out = gate(a, readout(M(q(a))))

In the causal form token i sees S_j and h_j for j <= i (of pooled queries only groups that end at or
before i), and the last line reads the memory as it is after the write of token i. The literal form
(all of h, and the memory after the whole segment) lets tokens see later ones.

Segments follow one another in a scan. Tokens of a row are first moved to places on the grid of
segments, so that padding and calls of any length change nothing. A document that begins inside a
segment recalls from the memory at the start of a document.

References: Behrouz, Zhong, Mirrokni, 2024, arXiv:2501.00663, section 4.1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads import attention
from jaxheads.memory.outer import norm
from jaxheads.memory.placement import place
from jaxheads.memory.titans import MemoryOut, MemoryState, memory_read, run_memory
from jaxheads.models.configs import ModelConfig
from jaxheads.models.titans_documents import Documents, Progress, documents, no_progress
from jaxheads.models.titans_layers import (
    STATE,
    LayerInput,
    TitansParams,
    choose_rows,
    init_reading,
    inner_options,
    lead_of,
    persistent_of,
)
from jaxheads.models.titans_masks import mac_mask
from jaxheads.models.titans_modules import (
    HEADS,
    KV_HEADS,
    Links,
    Tails,
    Tokens,
    from_heads,
    gate,
    l2_normalize,
    links,
    project,
    project_one,
    to_heads,
)
from jaxheads.models.titans_options import MacOptions
from jaxheads.models.titans_window import Prefix, prefix_of
from jaxheads.parallel import constrain
from jaxheads.taps import Tap, TapContext
from jaxheads.typing import Array


class Buffer(NamedTuple):
    """The tokens of the segment in progress, at their places in it."""

    k: Array  # [B,C,K,D], rotated
    v: Array
    ids: Array
    """[B,C] int32 documents; 0 where nothing is written yet."""
    h: Prefix
    """[B,N_l,K,D] keys and values of the memory tokens recalled so far."""
    queries: Array
    """[B,G,H,D] queries of the group that is being pooled."""


class MacState(NamedTuple):
    """Memory as context between calls."""

    memory: MemoryState
    at_start: list[Array]
    """[B,H,d_in,d_out]: the memory at the start of the segment, or of the document if later."""
    tail: Array | None
    """[B,w-1,H,D] of the queries of the layer's input."""
    tail_ids: Array
    """[B,w-1] their documents."""
    tails: Tails
    """The same of what the attention gave."""
    tails_ids: Array
    buffer: Buffer
    filled: Array
    """[B] int32 tokens of the segment in progress."""
    progress: Progress


class Segment(NamedTuple):
    """Tokens; leaves lead with [B,T], or with [B,C] at their places in one segment."""

    q: Array
    k: Array
    v: Array
    recall: Array
    ids: Array
    """0: no token of this call."""


def init_mac(cfg: ModelConfig, batch_size: int, num_slots: int, dtype, options) -> MacState:
    """The state of `mac` before the first token."""
    del num_slots
    reading = init_reading(cfg, options, batch_size, dtype)
    h, k, d, c = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, options.segment
    empty = lambda count, heads: jnp.zeros((batch_size, count, heads, d), dtype)
    return MacState(
        reading.memory,
        reading.memory.weights,
        reading.tails.q,
        reading.tail_ids,
        reading.tails,
        reading.tail_ids,
        Buffer(
            empty(c, k),
            empty(c, k),
            jnp.zeros((batch_size, c), jnp.int32),
            Prefix(empty(options.num_memory, k), empty(options.num_memory, k)),
            empty(c // options.num_memory, h),
        ),
        jnp.zeros((batch_size,), jnp.int32),
        no_progress(batch_size),
    )


INNER_SITES = (
    "z", "mem_k", "mem_v", "mem_q", "mem_theta", "mem_eta", "mem_alpha", "mem_surprise", "mem_out",
)  # fmt: skip


class _Layer(NamedTuple):
    """What every segment of a call shares."""

    module: TitansParams
    options: MacOptions
    cfg: ModelConfig
    prefix: Prefix | None
    start: MemoryState
    """Of one row: where a document begins."""

    @property
    def group(self) -> int:
        """Queries pooled into one memory token."""
        return self.options.segment // self.options.num_memory

    def recall(self, at_start: list[Array], queries: Array, begun: Array | None) -> Prefix:
        """Keys and values of h for pooled queries [B,N,H,D].

        Args:
          at_start: the memory when the segment began.
          begun: [B,N] queries of documents that began later.
        """
        residual = self.options.residual_norm
        read = lambda w: memory_read(_resting(w), queries, residual_norm=residual)
        y = read(at_start)
        if begun is not None:
            batch = queries.shape[0]
            fresh = [jnp.broadcast_to(w, (batch, *w.shape[1:])) for w in self.start.weights]
            y = jnp.where(begun[..., None, None], read(fresh), y)
        return prefix_of(self.module.attention, from_heads(y, self.module.readout))

    def attend(self, q: Array, h: Prefix, k: Array, v: Array, visible: Array, tap: Tap) -> Array:
        """Attention over [P; h; S]; visible broadcasts to [B,T,N_p+N_l+C]."""
        parts = [h, Prefix(k, v)]
        if self.prefix is not None:
            widen = lambda a: jnp.broadcast_to(a, (q.shape[0], *a.shape[1:])).astype(q.dtype)
            parts.insert(0, Prefix(*map(widen, self.prefix)))
        keys, values = (jnp.concatenate(x, axis=1) for x in zip(*parts))
        ctx = attention.AttentionContext(
            mask=attention.Mask(head_mask=visible[:, None]),
            scale=self.cfg.score_scale,
            implementation=self.cfg.implementation,
        )
        z, _ = attention.attend(q, keys, values, ctx)
        return from_heads(tap("z", constrain(z, HEADS)), self.module.attention.wo)

    def join(self, a: Array, y: Array) -> Array:
        """The layer's output from its two branches."""
        m = from_heads(y, self.module.readout)
        return gate(self.module.branches, a, m, self.options.gate, self.cfg.norm_eps)


def _resting(weights: list[Array]) -> MemoryState:
    """A state that is only read."""
    return MemoryState(weights, weights, weights, jnp.zeros(weights[0].shape[:1], jnp.int32))


def mac(module: TitansParams, options: MacOptions, call: LayerInput, held: MacState | None):
    """Memory as context: ([B,T,M], state)."""
    x, cfg, tap = call.x, call.cfg, call.tap
    length = x.shape[1]
    q = tap("q", to_heads(x, module.attention.wq))
    k = tap("k", to_heads(x, module.attention.wk, KV_HEADS))
    v = tap("v", to_heads(x, module.attention.wv, KV_HEADS))
    rotate = call.rotation()
    if rotate is not None:
        q, k = rotate(q, call.positions), rotate(k, call.positions)
    persistent = persistent_of(module, x)
    prefix = None if persistent is None else prefix_of(module.attention, persistent[None])
    shared = _Layer(module, options, cfg, prefix, lead_of(module.memory, options, None).memory)
    if held is None and call.segment_ids is None:
        recall, _ = _recall_queries(module, x, None, None)
        out, memory = _whole(shared, call, q, k, v, recall)
        if tap.wants("mem_norm"):
            tap("mem_norm", norm(memory.weights))
        return out, None
    if options.mode == "literal":
        raise NotImplementedError(
            "mode='literal' reads whole segments and has no packed rows and no cache; call the "
            "layer without segment_ids and state, or use mode='causal'."
        )
    goes_on = held is not None
    if held is None:
        held = init_mac(cfg, x.shape[0], length, x.dtype, options)
    docs, progress = documents(
        call.segment_ids, length, held.progress, carry=options.documents == "carry"
    )
    assert docs.ids is not None and docs.fresh is not None and progress is not None
    widen = lambda a: jnp.broadcast_to(a, (x.shape[0], *a.shape[1:]))
    start = jax.tree.map(widen, shared.start)
    joined = links(docs.ids, held.tail_ids) if options.conv > 1 else None
    recall, tail = _recall_queries(module, x, held.tail, joined)
    held = held._replace(
        memory=choose_rows(docs.fresh, start, held.memory),
        at_start=choose_rows(docs.fresh, start.weights, held.at_start),
        tail=tail,
        tail_ids=held.tail_ids if joined is None else joined.ids,
        progress=progress,
    )
    run = _one if length == 1 else _placed
    out, new = run(shared, call, docs, Segment(q, k, v, recall, docs.ids), held)
    if tap.wants("mem_norm"):
        tap("mem_norm", norm(new.memory.weights))
    return out, new if goes_on else None


def _recall_queries(module: TitansParams, x: Array, tail: Array | None, joined: Links | None):
    """The queries with which segments recall, [B,T,H,D] of unit length; and the new tail."""
    q, tail = project_one(module.memory, "q", x, tail, joined, None)
    return l2_normalize(q), tail


def _pool(queries: Array, group: int) -> Array:
    """[B,C,H,D] -> [B,C/G,H,D] means of groups."""
    b, c, *rest = queries.shape
    return queries if group == 1 else jnp.mean(queries.reshape(b, c // group, group, *rest), 2)


def _keep_inner(inner: Tap, out: MemoryOut) -> Array:
    inner("mem_surprise", out.surprise)
    return inner("mem_out", constrain(out.y, HEADS))


def _whole(shared: _Layer, call: LayerInput, q: Array, k: Array, v: Array, recall: Array):
    """Rows that begin here and end here, without padding: ([B,T,M], memory after them)."""
    options, memory, tap = shared.options, shared.module.memory, call.tap
    batch, length = q.shape[:2]
    size = options.segment
    if shared.group == 1:  # a shorter text is one shorter segment
        size = min(size, length + -length % options.chunk)
    if options.mode == "literal" and length % size:
        raise ValueError(
            f"mode='literal' reads whole segments: T={length} is not a multiple of "
            f"segment={size}; pad the text with tokens of its own, or use mode='causal'."
        )
    num, spare = -(-length // size), -length % size
    cut = lambda x: jnp.moveaxis(
        jnp.pad(x, ((0, 0), (0, spare), *((0, 0),) * (x.ndim - 2)))
        .reshape(batch, num, size, *x.shape[2:]), 1, 0)  # fmt: skip
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, num * size, *x.shape[3:])[:, :length]
    positions = jnp.broadcast_to(call.positions, (batch, length))
    real = (jnp.arange(num * size) < length).reshape(num, 1, size)
    num_prefix = 0 if shared.prefix is None else shared.prefix.k.shape[1]
    visible = jnp.asarray(mac_mask(num_prefix, size // shared.group, size, mode=options.mode)[None])
    params = memory.initial()

    def body(carry: tuple[MemoryState, Tails], xs):
        state, tails = carry
        q, k, v, recall, positions, real = xs
        inner = tap.inside(TapContext(tap.ctx.layer, positions))
        h = shared.recall(state.weights, _pool(recall, shared.group), None)
        a = shared.attend(q, h, k, v, visible, inner)
        tokens, tails = project(memory, options, a, tails=tails, tap=inner)
        if spare:
            tokens = _only_real(tokens, real)
        out = run_memory(
            **tokens._asdict(), params=params, state=state, aligned=True, **inner_options(options)
        )
        y = _keep_inner(inner, out)
        if options.mode == "literal":
            y = memory_read(out.state, tokens.q, residual_norm=options.residual_norm)
        return (out.state, tails), (shared.join(a, y), inner.seen)

    widen = lambda a: jnp.broadcast_to(a, (batch, *a.shape[1:]))
    start = _placed_state(jax.tree.map(widen, shared.start))
    d, reach = shared.cfg.head_dim, options.conv - 1
    none = jnp.zeros((batch, reach, shared.cfg.num_heads, d), q.dtype) if reach else None
    xs = (*map(cut, (q, k, v, recall, positions)), real)
    body = jax.checkpoint(body, prevent_cse=False)
    (state, _), (out, seen) = jax.lax.scan(body, (start, Tails(none, none, none)), xs)
    tap.collect(INNER_SITES, {site: join(value) for site, value in seen.items()})
    return join(out), state


def _only_real(tokens: Tokens, real: Array) -> Tokens:
    """Tokens of which the unreal ones change nothing: no step, nothing forgotten."""
    at = lambda gate: real.reshape(*real.shape, *(1,) * (gate.ndim - 2))
    set_to = lambda gate, value: jnp.where(at(gate), gate, value)
    return tokens._replace(
        theta=set_to(tokens.theta, 0.0),
        eta=set_to(tokens.eta, 1.0),
        alpha=set_to(tokens.alpha, 0.0),
        channel_alpha=None if tokens.channel_alpha is None else set_to(tokens.channel_alpha, 0.0),
    )


def _placed_state(state: MemoryState) -> MemoryState:
    place = lambda ws: [constrain(w, STATE) for w in ws]
    return MemoryState(
        place(state.weights), place(state.momentum), place(state.ref_weights), state.offset
    )


def _rows(index: Array, x: Array) -> Array:
    """x [B,S,...] at index [B,N]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def _placed(shared: _Layer, call: LayerInput, docs: Documents, tokens: Segment, held: MacState):
    """Rows from wherever they stand in their segments: ([B,T,M], what is kept)."""
    tap, size = call.tap, shared.options.segment
    batch, length = tokens.ids.shape
    where = place(held.filled, length, size, docs.real)
    num = where.real.shape[1] // size
    cut = lambda x: jnp.moveaxis(where.to_slots(x).reshape(batch, num, size, *x.shape[2:]), 1, 0)
    join = lambda x: where.to_tokens(jnp.moveaxis(x, 0, 1).reshape(batch, num * size, *x.shape[3:]))
    reset = jnp.zeros_like(tokens.ids, bool) if docs.reset is None else docs.reset
    positions = jnp.broadcast_to(call.positions, (batch, length))

    def body(carry: MacState, xs):
        segment, reset, positions = xs
        inner = tap.inside(TapContext(tap.ctx.layer, positions, segment.ids))
        carry, out = _segment(shared, carry, segment, reset, docs.reset is not None, inner)
        return carry, (out, inner.seen)

    xs = (jax.tree.map(cut, tokens), cut(reset), cut(positions))
    held, (out, seen) = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), held, xs)
    tap.collect(INNER_SITES, {site: join(value) for site, value in seen.items()})
    return join(out), held


def _segment(
    shared: _Layer, held: MacState, new: Segment, reset: Array, has_resets: bool, inner: Tap
) -> tuple[MacState, Array]:
    """One segment of every row; `new.ids` [B,C] is 0 at places without a token of this call."""
    options, group, old = shared.options, shared.group, held.buffer
    size, slot = options.segment, jnp.arange(options.segment)
    is_new = new.ids != 0
    pick = lambda a, b: jnp.where(is_new.reshape(*is_new.shape, *(1,) * (b.ndim - 2)), a, b)
    k, v = pick(new.k, old.k.astype(new.k.dtype)), pick(new.v, old.v.astype(new.v.dtype))
    ids = pick(new.ids, old.ids)  # [B,C]
    begun = jnp.cumsum(reset, axis=1) > 0  # [B,C] of a document that began in this call

    # Memory tokens: a group is pooled over the queries of the document of its last token.
    begin = held.filled - held.filled % group
    earlier = _rows(jnp.clip(slot - begin[:, None], 0, group - 1), old.queries)
    queries = pick(new.recall, earlier.astype(new.recall.dtype))
    by_group = lambda x: x.reshape(x.shape[0], size // group, group, *x.shape[2:])
    group_ids = by_group(ids)
    end_ids, whole = group_ids[:, :, -1], by_group(is_new)[:, :, -1]  # [B,N_l]
    of_end = (group_ids == end_ids[..., None]).astype(queries.dtype)
    pooled = jnp.einsum("bnghd,bng->bnhd", by_group(queries), of_end)
    pooled = pooled / jnp.sum(of_end, axis=-1)[..., None, None]
    recalled = shared.recall(
        held.at_start, pooled, by_group(begun)[:, :, -1] if has_resets else None
    )
    choose = lambda a, b: jnp.where(whole[..., None, None], a, b.astype(a.dtype))
    h = jax.tree.map(choose, recalled, old.h)

    num_prefix = 0 if shared.prefix is None else shared.prefix.k.shape[1]
    structure = mac_mask(num_prefix, size // group, size)
    held_ids = jnp.concatenate([end_ids, ids], axis=1)
    same = held_ids[:, None, :] == ids[:, :, None]
    seen = jnp.pad(same, ((0, 0), (0, 0), (num_prefix, 0)), constant_values=True)
    a = shared.attend(new.q, h, k, v, seen & structure & (ids != 0)[..., None], inner)

    # What is written follows what was written: tokens to the front, padding behind.
    count = jnp.sum(is_new, axis=1, dtype=jnp.int32)
    forward = jnp.clip(slot + held.filled[:, None], 0, size - 1)
    back = jnp.clip(slot - held.filled[:, None], 0, size - 1)
    front = slot < count[:, None]
    packed_ids = jnp.where(front, _rows(forward, new.ids), 0)
    held, y = _write(shared, held, _rows(forward, a), packed_ids, _rows(forward, reset), inner,
                     has_resets, count)  # fmt: skip
    out = shared.join(a, _rows(back, y))
    for site in inner.seen.keys() - {"z"}:  # which stands at its places already
        inner.seen[site] = _rows(back, inner.seen[site])

    total = held.filled + count
    complete = total == size
    latest = _rows(
        jnp.clip((total - total % group)[:, None] + jnp.arange(group), 0, size - 1), queries
    )
    buffer = Buffer(k, v, jnp.where(complete[:, None], 0, ids), h, latest)
    return _advance(held, buffer, total, complete), out


def _write(shared, held: MacState, a, ids, reset, inner: Tap, has_resets: bool, count):
    """The memory's update from a [B,T,M], tokens before padding: (state, y [B,T,H,D])."""
    options, memory = shared.options, shared.module.memory
    joined = links(ids, held.tails_ids, count) if options.conv > 1 else None
    tokens, tails = project(memory, options, a, tails=held.tails, joined=joined, tap=inner)
    out = run_memory(
        **tokens._asdict(),
        params=memory.initial(),
        state=held.memory,
        mask=ids != 0,
        reset=reset if has_resets else None,
        **inner_options(options),
    )
    at_start = held.at_start
    if has_resets:
        fresh = jnp.any(reset & (ids != 0), axis=1)
        at_start = choose_rows(fresh, shared.start.weights, at_start)
    kept = held._replace(
        memory=out.state,
        at_start=at_start,
        tails=jax.tree.map(lambda new, old: new.astype(old.dtype), tails, held.tails),
        tails_ids=held.tails_ids if joined is None else joined.ids,
    )
    return kept, _keep_inner(inner, out)


def _advance(held: MacState, buffer: Buffer, filled: Array, complete: Array) -> MacState:
    """The state after tokens that may complete a segment."""
    dtypes = lambda new, old: new.astype(old.dtype)
    return held._replace(
        at_start=choose_rows(complete, held.memory.weights, held.at_start),
        buffer=jax.tree.map(dtypes, buffer, held.buffer),
        filled=jnp.where(complete, 0, filled),
    )


def _one(shared: _Layer, call: LayerInput, docs: Documents, token: Segment, held: MacState):
    """One token of every row: ([B,1,M], what is kept)."""
    options, group, old, tap = shared.options, shared.group, held.buffer, call.tap
    size, at, row = options.segment, held.filled, jnp.arange(held.filled.shape[0])
    ids_now = token.ids  # [B,1]
    put = lambda x, index, new: x.at[row, index].set(new[:, 0].astype(x.dtype))
    k, v = put(old.k, at, token.k), put(old.v, at, token.v)
    ids = put(old.ids, at, ids_now)
    if docs.reset is not None:
        held = held._replace(
            at_start=choose_rows(docs.reset[:, 0], shared.start.weights, held.at_start)
        )

    queries = put(old.queries, at % group, token.recall)
    members = jnp.arange(group) + (at - at % group)[:, None]  # [B,G] places of the group
    of_now = (_rows(members, ids) == ids_now) & (members <= at[:, None])
    of_now = of_now.astype(token.recall.dtype)
    pooled = jnp.einsum("bghd,bg->bhd", queries.astype(of_now.dtype), of_now)
    pooled = pooled / jnp.maximum(jnp.sum(of_now, axis=-1), 1)[:, None, None]
    recalled = shared.recall(held.at_start, pooled[:, None], None)
    ends = ((at + 1) % group == 0) & (ids_now[:, 0] != 0)
    write = lambda a, b: jnp.where(ends[:, None, None, None], put(b, at // group, a), b)
    h = jax.tree.map(write, recalled, old.h)

    num_prefix = 0 if shared.prefix is None else shared.prefix.k.shape[1]
    last = (jnp.arange(options.num_memory) + 1) * group - 1
    held_ids = jnp.concatenate([jnp.where(last <= at[:, None], ids[:, last], 0), ids], axis=1)
    seen = jnp.pad(held_ids == ids_now, ((0, 0), (num_prefix, 0)), constant_values=True)
    inner = tap.inside(tap.ctx)
    as_now = lambda x: jax.tree.map(lambda a: a.astype(token.q.dtype), x)
    visible = seen[:, None] & (ids_now != 0)[..., None]
    a = shared.attend(token.q, as_now(h), as_now(k), as_now(v), visible, inner)
    reset = jnp.zeros_like(ids_now, bool) if docs.reset is None else docs.reset
    count = (ids_now[:, 0] != 0).astype(jnp.int32)
    held, y = _write(shared, held, a, ids_now, reset, inner, docs.reset is not None, count)
    tap.collect(INNER_SITES, inner.seen)
    total = at + count
    complete = total == size
    buffer = Buffer(k, v, jnp.where(complete[:, None], 0, ids), h, queries)
    return shared.join(a, y), _advance(held, buffer, total, complete)
