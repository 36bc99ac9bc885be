"""Retrieval heads: which heads copy a fact out of a long prompt into the answer.

While the model answers greedily, a head earns a hit whenever the position it attends to most lies
in the needle's answer span and holds the very token that is generated:

    hit_t = s <= j < e  and  x[j] = w_t,   j = argmax_k a_t[k],   a_t the row that produces w_t
    R     = sum_t hit_t / (e - s)                            kind="count"
    R     = |{w_t : hit_t}| / |{x_s, ..., x_(e-1)}|          kind="set"

and its score is the mean of R over the prompts that were answered. A decode step hands out one
integer a head (the site `attn_argmax`), so no attention map is kept however long the prompt.

    instances = make_needle_instances(text, needle, (7, 11), question, [1000, 2000], [0, 50, 100],
                                      sentence_end_ids=[13])
    found = retrieval_scores(jh.forward, model, instances, stop_ids=[13])
    quiet = jh.mask_heads(jh.forward, found.score > 0.1, "uniform_decode")

References: Wu et al., 2024, arXiv:2404.15574.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.discovery.needles import (
    PADDING,
    NeedleInstance,
    batch_instances,
    find_span,
    make_needle_instances,
    unigram_recall,
)
from jaxheads.heads import HeadScores, correlation
from jaxheads.models import Decoder, check_token_ids, compute_dtype, init_cache
from jaxheads.parallel import constrain
from jaxheads.taps import TappedForward, as_tapped, record
from jaxheads.typing import Array, ArrayLike

__all__ = [
    "NeedleInstance",
    "RetrievalResult",
    "batch_instances",
    "copy_hits",
    "correlate",
    "find_span",
    "make_needle_instances",
    "retrieval_scores",
    "split_half",
    "unigram_recall",
]

KINDS = ("count", "set")


def copy_hits(
    argmax_pos: ArrayLike, token: ArrayLike, prompt: ArrayLike, start: ArrayLike, end: ArrayLike
) -> Array:
    """Whether each head's most attended key is in the span and holds the generated token.

    Args:
      argmax_pos: [L,B,H] the key each head attends to most; beyond the prompt is never a hit.
      token: [B] the token generated from these rows.
      prompt: [B,S].
      start: [B] first column of the span.
      end: [B] the column after it.
    Returns:
      [L,B,H] bool.
    """
    at, prompt = jnp.asarray(argmax_pos), jnp.asarray(prompt)
    start, end, token = (jnp.asarray(x)[:, None] for x in (start, end, token))
    rows = jnp.arange(prompt.shape[0])[:, None]
    held = prompt[rows, jnp.clip(at, 0, prompt.shape[1] - 1)]  # [L,B,H]
    return (start <= at) & (at < jnp.minimum(end, prompt.shape[1])) & (held == token)


class RetrievalResult(NamedTuple):
    """What `retrieval_scores` found."""

    score: np.ndarray
    """[L,H] float32: mean R over the instances kept."""
    freq: np.ndarray
    """[L,H] float32: the share of them with at least one hit (activation frequency)."""
    kept: int
    """How many instances were answered; report it beside the scores."""
    recall: np.ndarray
    """[N] float32: unigram recall of the answer, every instance."""
    is_kept: np.ndarray
    """[N] bool"""
    examples: np.ndarray
    """[N,L,H] float32: R of every instance."""
    tokens: np.ndarray
    """[N,max_new] int32: what was generated, -1 after the end."""

    def to_scores(self, **fields: Any) -> HeadScores:
        """`HeadScores` (for heads.json) with an interval over the instances kept.

        `fields` are those of `HeadScores`, such as ``model=`` and ``meta=``.
        """
        meta = {"method": "retrieval score", "kept": self.kept, "instances": len(self.recall)}
        fields["meta"] = {**meta, **fields.get("meta", {})}
        if self.kept < 2:
            return HeadScores(self.score, **fields)
        return HeadScores.from_examples(self.examples[self.is_kept], **fields)


def retrieval_scores(
    forward: Callable[..., Any],
    model: Decoder,
    instances: Sequence[NeedleInstance] | NeedleInstance,
    *,
    max_new: int = 50,
    stop_ids: Iterable[int],
    kind: str = "count",
    min_recall: float = 0.5,
    batch_size: int = 8,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> RetrievalResult:
    """The retrieval score of every head: the mean of R (see the module) over answered prompts.

    Args:
      forward: a forward, wrapped or not; two payloads of one wrapper share the programs.
      model: a `Decoder`, sharded or not (set its mesh with `jax.set_mesh`).
      instances: a list, which is padded to at most four lengths; or a batch, padded as it is.
      max_new: tokens generated at most. The paper takes 50.
      stop_ids: a prompt ends with the first of these it generates (the paper: a newline).
      kind: ``"count"`` (the released code: a token copied twice counts twice) or ``"set"``
        (equation 1 of the paper). Equal where no token repeats.
      min_recall: instances count whose unigram recall exceeds this; -1 keeps all.
      batch_size: prompts at once, over all devices.
      decode: ids -> text. Recall is then of words instead of ids.

    Raises:
      ValueError: for an unknown kind, ids outside the vocabulary, a model without `attn_argmax`,
        and where no instance was answered.

    References: Wu et al., 2024, arXiv:2404.15574, section 2. (Recall there stems words.)
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}.")
    if max_new < 1 or batch_size < 1:
        raise ValueError(f"max_new={max_new} and batch_size={batch_size} must be at least 1.")
    stops = [int(i) for i in stop_ids]
    tapped, cfg = as_tapped(forward), model.cfg
    parts: list[tuple[Any, ...]] = []
    for rows, batch in _batches(instances, batch_size):
        check_token_ids(np.maximum(batch.prompt_ids, 0), cfg.vocab_size)
        spans = (batch.prompt_ids, batch.needle_start, batch.needle_end)
        out = _decode(tapped, model, *spans, jnp.asarray(stops, jnp.int32), max_new=max_new)
        new, hits = (np.asarray(x) for x in out)
        for n, row in enumerate(rows):
            ids = new[:, n]
            span = batch.prompt_ids[n, batch.needle_start[n] : batch.needle_end[n]]
            texts = [_real(batch.answer_ids[n]), [int(i) for i in _real(ids) if i not in stops]]
            texts = texts if decode is None else [decode([int(i) for i in ids]) for ids in texts]
            examples = _one_score(hits[:, :, n], ids, span, kind)
            parts.append((row, unigram_recall(*texts), examples, ids))
    _, recall, examples, tokens = (np.stack(x) for x in zip(*sorted(parts, key=lambda p: p[0])))
    is_kept = recall > min_recall
    if not is_kept.any():
        raise ValueError(
            f"none of {len(recall)} instances was answered: the highest unigram recall is "
            f"{recall.max():.2f}, needed more than {min_recall}. Easier needles or shorter "
            "contexts, or min_recall=-1 to score unanswered prompts too."
        )
    return RetrievalResult(
        examples[is_kept].mean(axis=0),
        (examples[is_kept] > 0).mean(axis=0, dtype=np.float32),
        int(is_kept.sum()),
        recall.astype(np.float32),
        is_kept,
        examples,
        tokens,
    )


def _real(ids: np.ndarray) -> np.ndarray:
    return ids[ids != PADDING]


def _batches(
    instances: Sequence[NeedleInstance] | NeedleInstance, batch_size: int
) -> Iterator[tuple[np.ndarray, NeedleInstance]]:
    """(rows, batch): batches of one size and few lengths, the last one filled by repetition."""
    if isinstance(instances, NeedleInstance):
        groups = [(np.arange(len(instances.prompt_ids)), instances)]
    else:
        longest = max((len(one.prompt_ids) for one in instances), default=0)
        quarter = max(1, -(-longest // 4))
        needed = np.array([-(-len(one.prompt_ids) // quarter) for one in instances])
        groups = []
        for quarters in sorted(set(needed.tolist())) or [0]:
            rows = np.flatnonzero(needed == quarters)
            chosen = [instances[n] for n in rows.tolist()]
            groups.append((rows, batch_instances(chosen, min(quarters * quarter, longest))))
    for rows, batch in groups:
        for start in range(0, len(rows), batch_size):
            at = np.arange(start, min(start + batch_size, len(rows)))
            filled = np.resize(at, min(batch_size, len(rows)))
            yield rows[at], jax.tree.map(partial(np.take, indices=filled, axis=0), batch)


@partial(jax.jit, static_argnames="max_new")
def _decode(forward: TappedForward, model, prompt, start, end, stop_ids, *, max_new: int):
    """Greedy continuations: tokens [N,B] (-1 after the end), and hits [N,L,B,H]."""
    batch, length = prompt.shape
    prompt = jnp.asarray(prompt)
    is_text = prompt != PADDING
    ids, positions = jnp.maximum(prompt, 0), jnp.cumsum(is_text, axis=1) - 1
    cache = init_cache(model.cfg, batch, length + max_new - 1, compute_dtype(model.cfg))
    if length > 1:
        cache = forward(
            model,
            ids[:, :-1],
            positions=jnp.maximum(positions[:, :-1], 0),
            segment_ids=is_text[:, :-1].astype(jnp.int32),
            cache=cache,
        ).cache
    look = record(forward, "attn_argmax")

    def step(carry, t):
        cache, last, done = carry
        out = look(
            model,
            last[:, None],
            positions=positions[:, -1:] + t,
            segment_ids=jnp.ones((batch, 1), jnp.int32),
            cache=cache,
        )
        if "attn_argmax" not in out.seen:
            raise ValueError(
                "the forward reports no 'attn_argmax' for a decode step; wrap jaxheads.forward, "
                "or return the key each head attends to most in Output.seen."
            )
        new = jnp.argmax(out.logits[:, 0], axis=-1).astype(jnp.int32)
        hits = copy_hits(out.seen["attn_argmax"], new, prompt, start, end) & ~done[:, None]
        stops = jnp.any(new[:, None] == stop_ids, axis=-1)
        return (out.cache, new, done | stops), (jnp.where(done, PADDING, new), hits)

    begin = (cache, ids[:, -1], jnp.zeros(batch, bool))
    _, (new, hits) = jax.lax.scan(step, begin, jnp.arange(max_new))
    return constrain(new, (None, None)), constrain(hits, (None,) * 4)  # whole on every process


def _one_score(hits: np.ndarray, tokens: np.ndarray, span: np.ndarray, kind: str) -> np.ndarray:
    """R [L,H] of one instance from its hits [N,L,H], tokens [N] and the ids of its span."""
    if kind == "count":
        return hits.sum(axis=0, dtype=np.float32) / np.float32(len(span))
    copied = [hits[tokens == token].any(axis=0) for token in set(span.tolist())]
    return np.stack(copied).mean(axis=0, dtype=np.float32)


def split_half(result: RetrievalResult) -> tuple[np.ndarray, np.ndarray]:
    """Score maps [L,H] of two disjoint halves of the instances kept, every other one in each.

    ``correlate(*split_half(result))`` says how far the scores depend on the instances.
    """
    if result.kept < 2:
        raise ValueError(f"{result.kept} instance was kept; two halves need at least two.")
    kept = result.examples[result.is_kept]
    return kept[::2].mean(axis=0), kept[1::2].mean(axis=0)


def correlate(a: Any, b: Any) -> float:
    """Pearson's r over heads of two maps: arrays [L,H], `HeadScores` or `RetrievalResult`s."""
    maps = (x.score if isinstance(x, RetrievalResult) else np.asarray(x) for x in (a, b))
    return correlation(*maps)
