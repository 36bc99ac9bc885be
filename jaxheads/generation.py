"""Generating text: prefill, then one single-token step per new token over a preallocated cache.

The prompt but for its last column fills the cache; then every step feeds one token a row and
samples the next. `generate` runs the steps as one `jax.lax.while_loop`, which ends when every row
has met a stop token; with a `callback` the same step runs from a Python loop.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from jaxheads.models import (
    Cache,
    Decoder,
    check_token_ids,
    compute_dtype,
    init_cache,
    with_config,
)
from jaxheads.models import forward as _forward
from jaxheads.models.cache import cache_shape
from jaxheads.taps import TappedForward, as_tapped
from jaxheads.typing import Array, ArrayLike

Callback = Callable[[int, np.ndarray], None]


def generate(
    model: Decoder,
    tokens: ArrayLike | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    key: Array | None = None,
    temperature: ArrayLike = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: int | Iterable[int] = (),
    lengths: ArrayLike | None = None,
    pad_id: int = 0,
    forward: Callable[..., Any] = _forward,
    callback: Callback | None = None,
    cache_dtype: Any = None,
    cache_policy: str | None = None,
    prefill_chunk: int | None = None,
) -> Array:
    """Prompts continued by up to `max_new_tokens` tokens each.

    A token is drawn from softmax(logits / temperature), cut to the `top_k` most likely tokens and
    then to the smallest set of them whose probability reaches `top_p`; temperature 0 takes the
    most likely token. Row b of step n draws with ``fold_in(fold_in(key, n), b)``, so a row's text
    does not depend on how many rows follow it.

    Args:
      model: a `Decoder`, sharded or not (set its mesh with `jax.set_mesh`).
      tokens: [B,T] prompts padded on the left, or a list of B id lists of unequal lengths, which
        are padded here.
      max_new_tokens: N, at least 1.
      key: a typed random key; needed when temperature > 0.
      temperature: 0 is greedy. Changing a positive temperature or `top_p` compiles nothing new.
      top_k: how many of the most likely tokens may be drawn.
      top_p: probability mass in (0, 1] that may be drawn; at least one token always may.
      stop_tokens: a row ends with the first of these it draws; `pad_id` follows.
      lengths: [B] real tokens of each row of an array `tokens`; the columns before them are
        padding. None: all of them.
      pad_id: id written in padded places, a valid token id.
      forward: `models.forward` or any wrapped forward. Payloads of `intervene` are traced: two
        payloads share one program. A step runs on one token, so edits whose payload has a
        position axis [T] do not fit; make their positions data instead (`ctx.positions`).
      callback: called with (step, tokens [B]) as soon as each step is done.
      cache_dtype: of keys and values kept; default the dtype the model computes in.
      cache_policy: attention whose cache is used instead of the model's, such as the text of
        `attention.duo_layers(pattern)`: the same as ``with_config(model, attention=...)``.
      prefill_chunk: tokens of the prompt read at once; None: all. Less memory, and with a cache
        policy another result: tokens of one chunk see each other.

    Returns:
      [B, T + N] int32: the padded prompts and what follows them.

    Raises:
      ValueError: for an empty prompt, ids outside the vocabulary, more tokens than the model has
        learned positions, and sampling options outside their ranges.
    """
    if cache_policy is not None:
        model = with_config(model, attention=cache_policy)
    if prefill_chunk is not None and operator.index(prefill_chunk) < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk} must be at least 1, or None for all.")
    cfg = model.cfg
    _check_options(cfg.vocab_size, max_new_tokens, key, temperature, top_k, top_p, pad_id)
    stop_ids = _stop_ids(stop_tokens, cfg.vocab_size)
    prompt = _prompt(tokens, lengths, pad_id, cfg.vocab_size)
    length = prompt.tokens.shape[1]
    if cfg.positions == "learned" and length + max_new_tokens > cfg.max_positions:
        raise ValueError(
            f"a prompt of {length} tokens and max_new_tokens={max_new_tokens} exceed the "
            f"{cfg.max_positions} learned positions of the model; shorten one of them."
        )
    plan = _Plan(
        num_new=operator.index(max_new_tokens),
        top_k=None if top_k is None else min(operator.index(top_k), cfg.vocab_size),
        cache_dtype=jnp.dtype(compute_dtype(cfg) if cache_dtype is None else cache_dtype).name,
        prefill_chunk=prefill_chunk,
    )
    draw = None
    if key is not None and (isinstance(temperature, Tracer) or float(temperature) > 0):
        draw = _Draw(key, jnp.asarray(temperature, jnp.float32), _nucleus(top_p))
    numbers = _Numbers(draw, stop_ids, jnp.int32(pad_id))
    forward = as_tapped(forward)
    if callback is None:
        return _run(forward, model, prompt, numbers, plan)
    return _stream(forward, model, prompt, numbers, plan, callback)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What decides the program."""

    num_new: int
    top_k: int | None
    cache_dtype: str
    prefill_chunk: int | None = None


class _Draw(NamedTuple):
    """How tokens are drawn at random."""

    key: Array
    temperature: Array
    top_p: Array | None


class _Numbers(NamedTuple):
    """What only changes values."""

    draw: _Draw | None
    """None takes the most likely token."""
    stop_ids: Array
    pad_id: Array


class _Prompt(NamedTuple):
    tokens: Array
    """[B,T] padded on the left"""
    lengths: Array
    """[B]"""


class _State(NamedTuple):
    step: Array
    """Tokens generated so far."""
    tokens: Array
    """[B,T+N], `pad_id` where nothing is written yet"""
    done: Array
    """[B] bool"""
    cache: Cache


def _start(forward: TappedForward, model, prompt: _Prompt, numbers: _Numbers, plan: _Plan):
    """The state before the first step: everything but the last prompt token is in the cache."""
    batch, length = prompt.tokens.shape
    cache = init_cache(model.cfg, batch, length + plan.num_new - 1, plan.cache_dtype)
    if length > 1:
        index = jnp.arange(length - 1, dtype=jnp.int32) - (length - prompt.lengths)[:, None]

        def read(cache: Cache, chunk: tuple[Array, Array]) -> tuple[Cache, None]:
            tokens, index = chunk
            # Nobody reads these logits, so the compiler drops the [B,T,V] product.
            out = forward(
                model,
                tokens,
                positions=jnp.maximum(index, 0),
                segment_ids=(index >= 0).astype(jnp.int32),
                cache=cache,
            )
            return out.cache, None

        text = (prompt.tokens[:, :-1], index)
        size = min(plan.prefill_chunk or length - 1, length - 1)
        whole = (length - 1) // size
        if whole > 1:
            cut = lambda a: jnp.moveaxis(
                a[:, : whole * size].reshape(batch, whole, size), 1, 0
            )  # [chunks,B,size]
            cache, _ = jax.lax.scan(read, cache, jax.tree.map(cut, text))
        else:
            cache, _ = read(cache, jax.tree.map(lambda a: a[:, :size], text))
        if whole * size < length - 1:
            cache, _ = read(cache, jax.tree.map(lambda a: a[:, whole * size :], text))
    tokens = jnp.full((batch, length + plan.num_new), numbers.pad_id, jnp.int32)
    tokens = tokens.at[:, :length].set(prompt.tokens)
    return _State(jnp.int32(0), tokens, jnp.zeros(batch, bool), cache)


def _advance(forward: TappedForward, model, prompt: _Prompt, numbers: _Numbers, plan: _Plan,
             state: _State):  # fmt: skip
    """One step: (state, the tokens [B] it wrote)."""
    batch, length = prompt.tokens.shape
    last = jax.lax.dynamic_slice_in_dim(state.tokens, length - 1 + state.step, 1, axis=1)
    out = forward(
        model,
        last,
        positions=(prompt.lengths - 1 + state.step)[:, None],
        segment_ids=jnp.ones((batch, 1), jnp.int32),
        cache=state.cache,
    )
    logits = out.logits[:, 0].astype(jnp.float32)  # [B,V]
    if numbers.draw is None:
        new = jnp.argmax(logits, axis=-1)
    else:
        key, temperature, top_p = numbers.draw
        key = jax.random.fold_in(key, state.step)
        new = sample(logits, key, temperature, top_k=plan.top_k, top_p=top_p)
    new = jnp.where(state.done, numbers.pad_id, new.astype(jnp.int32))
    done = state.done | jnp.any(new[:, None] == numbers.stop_ids, axis=-1)
    tokens = jax.lax.dynamic_update_slice(state.tokens, new[:, None], (0, length + state.step))
    return _State(state.step + 1, tokens, done, out.cache), new


@partial(jax.jit, static_argnames="plan")
def _run(forward, model, prompt, numbers, plan):
    def goes_on(state: _State):
        return (state.step < plan.num_new) & ~jnp.all(state.done)

    def body(state: _State):
        return _advance(forward, model, prompt, numbers, plan, state)[0]

    state = _start(forward, model, prompt, numbers, plan)
    return jax.lax.while_loop(goes_on, body, state).tokens


_jit_start = jax.jit(_start, static_argnames="plan")
_jit_advance = jax.jit(_advance, static_argnames="plan", donate_argnames="state")


def lower(
    part: str,
    model: Decoder,
    *,
    batch_size: int,
    prompt_length: int,
    max_new_tokens: int,
    mesh: Mesh | None = None,
    forward: Callable[..., Any] = _forward,
    cache_dtype: Any = None,
) -> Any:
    """One of the programs of `generate`, lowered but not run: what a plan compiles.

    Args:
      part: "prefill" (fill a fresh cache with the prompt) or "decode" (one token of every row).
      model: a `Decoder` of `jax.ShapeDtypeStruct`, placed on `mesh` by their shardings.
      batch_size: B.
      prompt_length: T.
      max_new_tokens: N; the cache has T+N-1 slots.
    Returns:
      `jax.jit(...).lower(...)` of greedy decoding without stop tokens.
    """
    if part not in ("prefill", "decode"):
        raise ValueError(f"part={part!r} is neither 'prefill' nor 'decode'.")
    dtype = compute_dtype(model.cfg) if cache_dtype is None else cache_dtype
    plan = _Plan(num_new=max_new_tokens, top_k=None, cache_dtype=jnp.dtype(dtype).name)
    struct: Any = jax.ShapeDtypeStruct
    ids = lambda *shape: struct(shape, jnp.int32)
    prompt = _Prompt(ids(batch_size, prompt_length), ids(batch_size))
    numbers = _Numbers(None, ids(0), ids())
    forward = as_tapped(forward)
    on_mesh = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    if part == "prefill":
        with on_mesh:
            return _jit_start.lower(forward, model, prompt, numbers, plan)
    cache = cache_shape(model.cfg, batch_size, prompt_length + max_new_tokens - 1, dtype, mesh)
    done = struct((batch_size,), jnp.bool_)
    state = _State(ids(), ids(batch_size, prompt_length + max_new_tokens), done, cache)
    with on_mesh:
        return _jit_advance.lower(forward, model, prompt, numbers, plan, state)


def _stream(forward, model, prompt, numbers, plan, callback: Callback) -> Array:
    state = _jit_start(forward, model, prompt, numbers, plan)
    for step in range(plan.num_new):
        state, new = _jit_advance(forward, model, prompt, numbers, plan, state)
        callback(step, np.asarray(new))
        if np.all(state.done):
            break
    return state.tokens


def sample(
    logits: Array,
    key: Array,
    temperature: ArrayLike,
    *,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
) -> Array:
    """Ids [B] drawn from logits [B,V]; see `generate` for the distribution.

    Ties at the edge of `top_k` or `top_p` are kept in order of their ids, never more than asked.
    """
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = logits / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(logits.shape[0]))
    draw = jax.vmap(jax.random.categorical)
    if top_k is None and top_p is None:
        return draw(keys, logits)
    best, ids = jax.lax.top_k(logits, logits.shape[-1] if top_k is None else top_k)
    if top_p is not None:
        probs = jax.nn.softmax(best, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # mass of the more likely tokens
        before = before.at[:, 0].set(0.0)
        best = jnp.where(before < top_p, best, -jnp.inf)
    return jnp.take_along_axis(ids, draw(keys, best)[:, None], axis=-1)[:, 0]


def _nucleus(top_p: float | None) -> Array | None:
    """`top_p` as data; None where it keeps every token."""
    is_all = top_p is None or (not isinstance(top_p, Tracer) and float(top_p) == 1)
    return None if is_all else jnp.asarray(top_p, jnp.float32)


def _check_options(vocab_size, max_new_tokens, key, temperature, top_k, top_p, pad_id) -> None:
    try:
        operator.index(max_new_tokens)
    except TypeError:
        raise TypeError(f"max_new_tokens={max_new_tokens!r} must be an integer.") from None
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if not isinstance(temperature, Tracer):
        if jnp.ndim(temperature) or not 0 <= float(temperature) < math.inf:
            raise ValueError(f"temperature={temperature} must be a number of at least 0.")
        if float(temperature) > 0 and key is None:
            raise ValueError(
                f"temperature={temperature} draws tokens at random and needs a key; pass "
                "key=jax.random.key(0), or temperature=0 for the most likely tokens."
            )
    elif key is None:
        raise ValueError("a traced temperature needs a key; pass key=jax.random.key(0).")
    if key is not None and not (
        hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    ):
        raise TypeError(f"key={key!r} must be a typed key: jax.random.key(0).")
    if key is not None and jnp.ndim(key):
        raise ValueError(f"key has shape {jnp.shape(key)}; pass one key, rows are split from it.")
    if top_k is not None and operator.index(top_k) < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or None for all tokens.")
    if top_p is not None and not isinstance(top_p, Tracer) and not 0 < float(top_p) <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1, or None.")
    if not 0 <= operator.index(pad_id) < vocab_size:
        raise ValueError(f"pad_id={pad_id} is not an id of the vocabulary, 0 to {vocab_size - 1}.")


def _stop_ids(stop_tokens, vocab_size: int) -> Array:
    stop = stop_tokens if isinstance(stop_tokens, jax.Array | np.ndarray | int) else [*stop_tokens]
    ids = np.atleast_1d(np.asarray(stop))
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"stop_tokens={stop_tokens!r} must be token ids (encode the text first).")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(
            f"stop_tokens={ids.tolist()} holds an id outside the vocabulary, 0 to {vocab_size - 1}."
        )
    return jnp.asarray(ids, jnp.int32)


def _prompt(tokens, lengths, pad_id: int, vocab_size: int) -> _Prompt:
    """Prompts of any accepted form as left-padded ids and lengths, checked."""
    if not isinstance(tokens, jax.Array | np.ndarray):
        tokens, lengths = _pad_left(tokens, lengths, pad_id)
    if jnp.ndim(tokens) != 2 or not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
        raise ValueError(
            f"tokens has shape {jnp.shape(tokens)} and dtype {jnp.result_type(tokens)}; needed "
            "integer ids [B,T] (add a batch axis to a single prompt)."
        )
    batch, length = jnp.shape(tokens)
    if batch == 0 or length == 0:
        raise ValueError(
            f"tokens has shape {(batch, length)}: an empty prompt; give a token or a BOS."
        )
    if lengths is None:
        lengths = np.full(batch, length, np.int32)
    elif np.shape(lengths) != (batch,):
        raise ValueError(f"lengths has shape {np.shape(lengths)}, needed {(batch,)}: one a row.")
    if not isinstance(lengths, Tracer):
        low, high = int(np.min(lengths)), int(np.max(lengths))
        if low < 1 or high > length:
            raise ValueError(
                f"lengths run from {low} to {high}; every row has 1 to {length} tokens (an empty "
                "prompt needs at least a BOS)."
            )
    lengths = jnp.asarray(lengths, jnp.int32)
    tokens = jnp.where(
        jnp.arange(length) >= length - lengths[:, None], tokens, jnp.asarray(pad_id, jnp.int32)
    )
    check_token_ids(tokens, vocab_size)
    return _Prompt(tokens.astype(jnp.int32), lengths)


def _pad_left(rows, lengths, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    if lengths is not None:
        raise ValueError("lengths goes with an array of tokens; a list of prompts has its own.")
    rows = [np.asarray(row) for row in rows]
    if not rows:
        raise ValueError("tokens is an empty list; give at least one prompt.")
    for number, row in enumerate(rows):
        if row.ndim != 1:
            raise ValueError(
                f"prompt {number} has shape {row.shape}; tokens must be a list of id lists (add a "
                "batch axis to a single prompt)."
            )
        if not row.size:
            raise ValueError(f"prompt {number} is empty; give it at least a BOS token.")
        if not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"prompt {number} holds {row.dtype} values; needed integer ids.")
    length = max(len(row) for row in rows)
    padded = np.full((len(rows), length), pad_id, np.int32)
    for number, row in enumerate(rows):
        padded[number, length - len(row) :] = row
    return padded, np.asarray([len(row) for row in rows], np.int32)
