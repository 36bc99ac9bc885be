"""What a sweep measures: a number for each prompt, read from few positions and few tokens.

A `Metric` says which positions and which vocabulary entries it reads, so that a finder can leave
out the rest: `Metric.from_hidden` unembeds no more than that. Token ids, positions and reference
distributions are data (leaves of the pytree); only the function is static.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.discovery.prompts import Prompts
from jaxheads.interventions import base_forward
from jaxheads.models import Decoder, check_token_ids, unembed
from jaxheads.models import forward as decoder_forward
from jaxheads.taps import TappedForward
from jaxheads.typing import Array, ArrayLike, PyTree, is_traced


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metric:
    """A number for each prompt: ``fn(selected, payload) -> [B]``.

    `selected` holds the logits at `positions` and `entries`: [B,N] float32, or [B,T,N] when
    `positions` is None, with N = V when `entries` is None.
    """

    fn: Callable[[Array, PyTree], Array] = field(metadata={"static": True})
    """A module-level function (a new lambda at each call compiles anew at each call)."""
    payload: PyTree = None
    """Arrays that `fn` needs; leaves lead with [B]."""
    positions: Any = None
    """[B] slots, or one for all prompts; negative ones count from the end; None: every slot."""
    entries: Any = None
    """[B,N] token ids, None for the whole vocabulary."""
    name: str = field(default="metric", metadata={"static": True})

    def __call__(self, logits: Array) -> Array:
        """[B,T,V] logits -> [B] float32."""
        selected = self.gather(logits)
        if self.entries is not None:
            entries = self._entries(logits.shape[0], logits.shape[-1])
            entries = entries if selected.ndim == 2 else entries[:, None]
            selected = jnp.take_along_axis(selected, entries, axis=-1, mode="fill")
        return self._apply(selected)

    def from_hidden(self, model: Decoder, hidden: Array) -> Array:
        """[B,T,M] values of `final_norm_out` -> [B] float32, unembedding only what is read.

        Equal to ``self(unembed(model, hidden))`` up to rounding.
        """
        return self.from_gathered(model, self.gather(hidden))

    def from_gathered(self, model: Decoder, hidden: Array) -> Array:
        """As `from_hidden`, for hidden states already at the positions read: ``gather(hidden)``."""
        if self.entries is None:
            return self._apply(unembed(model, hidden))
        entries = self._entries(hidden.shape[0], model.cfg.vocab_size)
        entries = entries if hidden.ndim == 2 else entries[:, None]
        return self._apply(unembed(model, hidden, entries))

    def slots(self, batch: int, length: int) -> Array:
        """[B] int32: the slots read, counted from the start; raises where `positions` is None."""
        if self.positions is None:
            raise ValueError(f"metric {self.name!r} reads every position, not one for each prompt.")
        shape = jnp.shape(self.positions)
        if shape not in ((), (batch,)):
            raise ValueError(
                f"positions of metric {self.name!r} has shape {shape}; needed one slot, or one for "
                f"each of the {batch} prompts."
            )
        if not is_traced(self.positions):
            known = np.asarray(self.positions)
            if known.min() < -length or known.max() >= length:
                raise ValueError(
                    f"metric {self.name!r} reads position {known.min()} to {known.max()} of "
                    f"prompts of {length} tokens; needed -{length} to {length - 1}."
                )
        slots = jnp.asarray(self.positions, jnp.int32)
        return jnp.broadcast_to(jnp.where(slots < 0, slots + length, slots), (batch,))

    def gather(self, values: Array) -> Array:
        """[B,T,...] -> [B,...] at the slots read; unchanged where every slot is read."""
        if self.positions is None:
            return values
        slots = self.slots(*values.shape[:2])
        slots = slots.reshape(-1, *(1,) * (values.ndim - 1))
        return jnp.take_along_axis(values, slots, axis=1, mode="fill")[:, 0]

    def _entries(self, batch: int, vocab_size: int) -> Array:
        shape = jnp.shape(self.entries)
        if len(shape) != 2 or shape[0] != batch:
            raise ValueError(
                f"metric {self.name!r} names tokens of shape {shape}; needed [{batch}, N], one row "
                "for each prompt."
            )
        check_token_ids(self.entries, vocab_size)
        return jnp.asarray(self.entries)

    def _apply(self, selected: Array) -> Array:
        batch = selected.shape[0]
        value = jnp.asarray(self.fn(selected, self.payload), jnp.float32)
        if value.shape not in ((), (batch,)):
            raise ValueError(
                f"metric {self.name!r} returned shape {value.shape}; needed a scalar or one number "
                f"for each of the {batch} prompts."
            )
        return jnp.broadcast_to(value, (batch,))


def logit_difference(answer: ArrayLike, wrong: ArrayLike, *, positions: Any = -1) -> Metric:
    """``logit[answer] - logit[wrong]``.

    Args:
      answer: [B] token ids.
      wrong: [B] token ids.
      positions: the slot it is read at; [B] where prompts are padded.

    Example:
      >>> logits = jnp.arange(6.0).reshape(1, 2, 3)
      >>> logit_difference([2], [0])(logits).tolist()
      [2.0]
    """
    answer, wrong = _ids(answer, "answer"), _ids(wrong, "wrong")
    if answer.shape != wrong.shape:
        raise ValueError(
            f"answer has {answer.shape[0]} tokens and wrong {wrong.shape[0]}; needed one of each "
            "for every prompt."
        )
    entries = jnp.stack([answer, wrong], axis=1)  # [B,2]
    return Metric(_difference, None, _slot(positions), entries, "logit_difference")


def log_probability(answer: ArrayLike, *, positions: Any = -1) -> Metric:
    """``log softmax(logits)[answer]``; arguments as `logit_difference`."""
    payload = _ids(answer, "answer")
    return Metric(_log_probability, payload, _slot(positions), None, "log_probability")


def kl_divergence(clean_logits: Array, *, positions: Any = -1) -> Metric:
    """``KL(clean || edited) = sum_v p_clean (log p_clean - log p_edited)`` in nats.

    Args:
      clean_logits: [B,T,V] of the unedited run.
      positions: as `logit_difference`; None averages over every slot of a prompt.
    """
    if jnp.ndim(clean_logits) != 3:
        raise ValueError(f"clean_logits has shape {jnp.shape(clean_logits)}; needed [B,T,V].")
    reads = Metric(_kl_divergence, None, _slot(positions), None, "kl_divergence")
    clean = jax.nn.log_softmax(reads.gather(jnp.asarray(clean_logits, jnp.float32)))
    return Metric(reads.fn, clean, reads.positions, None, reads.name)


def accuracy(answer: ArrayLike, *, positions: Any = -1) -> Metric:
    """1 where the most likely token of the whole vocabulary is `answer`, else 0."""
    return Metric(_is_top, _ids(answer, "answer"), _slot(positions), None, "accuracy")


def as_metric(metric: Metric | Callable[[Array], Array]) -> Metric:
    """`metric` itself, or a plain function of logits [B,T,V] (-> [B] or a scalar) as a `Metric`.

    A plain function is static: pass the same function object each time, and write a `Metric` where
    arrays (answers, positions) change between calls.
    """
    if isinstance(metric, Metric):
        return metric
    if not callable(metric):
        raise TypeError(
            f"metric is a {type(metric).__name__}; needed a Metric, such as "
            "logit_difference(answer, wrong), or a function of logits [B,T,V]."
        )
    return Metric(_OfLogits(metric), name=getattr(metric, "__name__", "metric"))


def measure(metric: Metric, forward: TappedForward, model: Decoder, prompts: Prompts) -> Array:
    """[B]: the metric of a run, unembedding only what it reads where nothing edits the logits."""
    out = forward(model, prompts.tokens, **prompts.inputs)
    return metric.from_hidden(model, out.hidden) if reads_hidden(forward) else metric(out.logits)


def reads_hidden(forward: TappedForward) -> bool:
    """Whether the logits of a forward are its `hidden` unembedded, and nothing else."""
    is_decoder = base_forward(forward) is decoder_forward
    return is_decoder and not any(edit.site == "logits" for edit in forward.taps.edits)


@dataclass(frozen=True)
class _OfLogits:
    """A function of logits as a function of (selected, payload); equal where the functions are."""

    fn: Callable[[Array], Array]

    def __call__(self, selected: Array, payload: PyTree) -> Array:
        del payload
        return self.fn(selected)


def _difference(selected: Array, payload: PyTree) -> Array:
    del payload
    return _over_slots(selected[..., 0] - selected[..., 1])


def _log_probability(selected: Array, answer: Array) -> Array:
    answer = answer if selected.ndim == 2 else answer[:, None]
    chosen = jnp.take_along_axis(selected, answer[..., None], axis=-1, mode="fill")[..., 0]
    return _over_slots(chosen - jax.nn.logsumexp(selected, axis=-1))


def _kl_divergence(selected: Array, clean: Array) -> Array:
    gap = jnp.where(clean > -jnp.inf, clean - jax.nn.log_softmax(selected), 0)
    return _over_slots(jnp.sum(jnp.exp(clean) * gap, axis=-1))


def _is_top(selected: Array, answer: Array) -> Array:
    answer = answer if selected.ndim == 2 else answer[:, None]
    return _over_slots((jnp.argmax(selected, axis=-1) == answer).astype(jnp.float32))


def _over_slots(values: Array) -> Array:
    """[B] as it is, [B,T] averaged over slots."""
    return values if values.ndim == 1 else jnp.mean(values, axis=1)


def _ids(tokens: ArrayLike, what: str) -> Array:
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 1 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"{what} has shape {tokens.shape} and dtype {tokens.dtype}; needed one integer token "
            "id for each prompt, [B]. An answer of several tokens has no single logit: choose its "
            "first token."
        )
    return tokens.astype(jnp.int32)


def _slot(positions: Any) -> Array | None:
    if positions is None:
        return None
    positions = jnp.asarray(positions)
    if positions.ndim > 1 or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(
            f"positions has shape {positions.shape} and dtype {positions.dtype}; needed an "
            "integer, one for each prompt [B], or None for every position."
        )
    return positions.astype(jnp.int32)
