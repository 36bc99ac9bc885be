"""How an answer reaches the last token: knock-outs of attention, saliency, a lens on layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.discovery.metrics import Metric, as_metric, log_probability, measure
from jaxheads.discovery.passes import normed, take_slots
from jaxheads.discovery.prompts import Prompts, as_prompts, select_slots
from jaxheads.interventions import knock_out
from jaxheads.models import Decoder, check_token_ids, unembed, with_config
from jaxheads.taps import Edit, TapContext, TappedForward, as_tapped, intervene, record, sweep
from jaxheads.typing import Array, ArrayLike


def knockout_profile(
    forward: Callable[..., Any],
    model: Decoder,
    tokens: Any,
    targets: ArrayLike,
    sources: ArrayLike,
    query: Any = "last",
    window: int | None = None,
) -> Array:
    """How much of an answer's probability goes when attention to some tokens is cut, by layer.

        profile[l] = mean_b (p~_l(target) - p(target)) / p(target)

    In run l, the window of `window` consecutive layers centred at l cannot attend from the query
    to the sources (their scores are -inf; the softmax renormalises). The cut is a comparison of
    positions inside each layer; all runs are one program.

    Args:
      forward: a forward, wrapped or not.
      model: a `Decoder`.
      tokens: tokens [B,T], or a mapping with `tokens` and optionally `segment_ids`, `positions`.
      targets: [B] token ids, read at the last slot that is no padding.
      sources: [B,S] bool, the keys that are cut; a row without any is left as it is.
      query: the slots that lose them, ``"last"`` or as `prompts.select_slots` takes them.
      window: layers cut together; default max(1, round(L / 5)), one reading of the paper.

    Returns:
      [L] float32; -1 where nothing is left of the probability.

    Raises:
      ValueError: for sources that are padding only, or every key that a query sees.

    References: Geva et al., 2023, arXiv:2304.14767; Jin et al., 2024, arXiv:2402.18154.
    """
    prompts = as_prompts(tokens, "tokens")
    count = model.cfg.num_layers
    window = max(1, round(count / 5)) if window is None else window
    if not 1 <= window <= count:
        raise ValueError(f"window={window} must be from 1 to {count}, the number of layers.")
    keys = np.asarray(sources)
    if keys.shape != prompts.tokens.shape or keys.dtype != bool:
        raise ValueError(
            f"sources has shape {list(keys.shape)} and dtype {keys.dtype}; "
            f"needed bool {list(prompts.tokens.shape)}, one entry for each token."
        )
    queries = select_slots(query, prompts).mask
    _check_keys(prompts, keys, np.asarray(queries))
    check_token_ids(np.asarray(targets), model.cfg.vocab_size)
    reads = log_probability(targets, positions=select_slots("last", prompts).single)
    distance = np.arange(count) - (np.arange(count) - (window - 1) // 2)[:, None]
    windows = (distance >= 0) & (distance < window)  # [L,L]: run, layer
    edges = (queries, jnp.asarray(keys), jnp.asarray(windows, jnp.float32))
    return _profile(as_tapped(forward), model, prompts, reads, *edges)


@jax.jit
def _profile(forward, model, prompts: Prompts, reads: Metric, queries, sources, windows):
    before = measure(reads, forward, model, prompts)

    def one(window: Array) -> Array:
        cut = knock_out(forward, queries=queries, keys=sources, layers=window)
        return jnp.mean(jnp.expm1(measure(reads, cut, model, prompts) - before))

    return sweep(one, windows)


def _check_keys(prompts: Prompts, sources: np.ndarray, queries: np.ndarray) -> None:
    length = sources.shape[1]
    segments = np.ones_like(sources, int)
    if prompts.segment_ids is not None:
        segments = np.asarray(prompts.segment_ids)
    is_text = segments != 0
    hollow = np.flatnonzero(sources.any(1) & ~(sources & is_text).any(1))
    if hollow.size:
        raise ValueError(f"the sources of prompt {hollow[0]} are padding only; mark its tokens.")
    sees = (segments[:, :, None] == segments[:, None]) & np.tri(length, dtype=bool)  # [B,T,S]
    left = (sees & ~sources[:, None]).any(-1)
    bad = np.argwhere(queries & is_text & ~left)
    if bad.size:
        raise ValueError(
            f"query {bad[0, 1]} of prompt {bad[0, 0]} would lose every key it sees; leave it one, "
            "such as itself."
        )


def attention_saliency(
    forward: Callable[..., Any],
    model: Decoder,
    tokens: Any,
    loss: Metric | Callable[[Array], Array],
) -> Array:
    """Which attention matters to first order: the pattern times its gradient, over heads.

        I[l,b,t,s] = sum_h | A[l,b,h,t,s]  dL_b / dA[l,b,h,t,s] |

    Heads are summed inside the backward pass of each layer, whose forward is recomputed: a map
    [B,H,T,S] exists for one layer at a time. Short prompts only, all the same.

    Args:
      forward: a forward, wrapped or not, over an implementation that forms the pattern.
      model: a `Decoder`.
      tokens: tokens [B,T], or a mapping with `tokens` and optionally `segment_ids`, `positions`.
      loss: a `Metric` such as ``log_probability(answer)`` (signs do not matter), or a function of
        logits [B,T,V] -> [B].

    Returns:
      [L,B,T,S] float32.

    References: Wang et al., 2023, arXiv:2305.14160; Jin et al., 2024, arXiv:2402.18154.
    """
    model = model if model.cfg.remat != "none" else with_config(model, remat="full")
    return _saliency(as_tapped(forward), model, as_prompts(tokens, "tokens"), as_metric(loss))


@jax.jit
def _saliency(forward: TappedForward, model: Decoder, prompts: Prompts, loss: Metric) -> Array:
    batch, length = prompts.tokens.shape

    def total(taken: Array) -> Array:
        watched = intervene(forward, Edit("pattern", watch, taken))
        return jnp.sum(measure(loss, watched, model, prompts))

    return jax.grad(total)(jnp.zeros((model.cfg.num_layers, batch, length, length)))


def watch(pattern: Array, payload: Array, ctx: TapContext) -> Array:
    """Edit of pattern [B,H,T,S] that changes nothing; the payload's gradient is the saliency."""
    del ctx
    return _watched(pattern, payload)


@jax.custom_vjp
def _watched(pattern: Array, taken: Array) -> Array:
    """`pattern` [B,H,T,S]; the "gradient" of `taken` [B,T,S] is sum_h |pattern * gradient|."""
    del taken
    return pattern


def _watched_fwd(pattern: Array, taken: Array) -> tuple[Array, Array]:
    del taken
    return pattern, pattern


def _watched_bwd(pattern: Array, gradient: Array) -> tuple[Array, Array]:
    product = pattern.astype(jnp.float32) * gradient.astype(jnp.float32)
    return gradient, jnp.sum(jnp.abs(product), axis=1)


_watched.defvjp(_watched_fwd, _watched_bwd)


class LayerLens(NamedTuple):
    """Probabilities of tokens read off what each layer writes."""

    attention: Array
    """[L,B,N]"""
    mlp: Array
    """[L,B,N]"""

    def conflict_layer(self, threshold: float) -> int | None:
        """The first layer whose attention writes both of two tokens: mean p > threshold.

        1 / V, what a uniform guess gives, is a natural threshold. None where no layer does.
        """
        both = np.asarray(self.attention.mean(1) > threshold).all(-1)
        return int(np.argmax(both)) if both.any() else None


def layer_lens(
    forward: Callable[..., Any], model: Decoder, tokens: Any, targets: ArrayLike
) -> LayerLens:
    """A logit lens on what attention and MLP of each layer write at the last position.

        p[l,b,n] = softmax(unembed(final_norm(x[l,b])))[targets[b,n]],   x = attn_out or mlp_out

    One layer is unembedded at a time.

    Args:
      forward: a forward, wrapped or not.
      model: a `Decoder`.
      tokens: tokens [B,T], or a mapping with `tokens` and optionally `segment_ids`, `positions`.
      targets: [B,N] token ids, for example the memorised and the stated answer.

    References: Jin et al., 2024, arXiv:2402.18154.
    """
    prompts = as_prompts(tokens, "tokens")
    targets = jnp.asarray(targets)
    if targets.ndim != 2 or targets.shape[0] != prompts.tokens.shape[0]:
        raise ValueError(
            f"targets has shape {list(targets.shape)}; needed [{prompts.tokens.shape[0]}, N]."
        )
    check_token_ids(targets, model.cfg.vocab_size)
    return _lens(as_tapped(forward), model, prompts, targets, select_slots("last", prompts).single)


@jax.jit
def _lens(forward: TappedForward, model, prompts: Prompts, targets: Array, slots: Array):
    run = record(forward, "attn_out", "mlp_out", reduce=partial(take_slots, slots=slots))
    seen = run(model, prompts.tokens, **prompts.inputs).seen

    def read(x: Array) -> Array:
        logits = unembed(model, normed(model, x)[:, 0])
        chosen = jnp.take_along_axis(logits, targets, axis=-1)
        return jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True))

    return LayerLens(*(jax.lax.map(read, seen[site]) for site in ("attn_out", "mlp_out")))
