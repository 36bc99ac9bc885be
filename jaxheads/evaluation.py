"""Evaluation: loss and accuracy over text, and multiple choice over task files.

Everything runs under any wrapped forward; two payloads of one wrapper share the compiled programs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads import models
from jaxheads.attention import Landmarks, insert_landmarks, landmarks_of
from jaxheads.data import TaskExample, TaskPair, Tokenizer
from jaxheads.interventions import base_forward, place_landmarks
from jaxheads.models import Decoder
from jaxheads.parallel import constrain
from jaxheads.taps import TappedForward, as_tapped
from jaxheads.typing import Array

Batch: TypeAlias = Mapping[str, jax.Array | np.ndarray]

MAX_LOGITS = 2**26
"""Logits formed at once, over all devices (256 MB): longer batches go through in chunks."""
_MIN_WIDTH = 16  # shortest padded length of a scored text; the others are powers of two


class TokenScores(NamedTuple):
    """How a model judges given next tokens."""

    log_probs: Array
    """[B,T] float32 log-probability of each target"""
    is_best: Array
    """[B,T] bool: the target is the most likely token"""


def score_tokens(forward: Callable[..., Any], model: Decoder, batch: Batch) -> TokenScores:
    """Scores of ``batch["targets"]`` [B,T] after ``batch["tokens"]`` [B,T].

        log_probs[b, t] = log softmax(logits[b, t])[targets[b, t]]

    Logits are formed for a few positions at a time, never all of [B,T,V], unless the forward
    changes the logits themselves. Works inside `jax.jit`.

    Args:
      forward: a forward, wrapped or not.
      model: a `Decoder`.
      batch: `tokens` and `targets` [B,T]; optionally `positions` and `segment_ids`.
    """
    out = forward(
        model,
        batch["tokens"],
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
    )
    targets = jnp.asarray(batch["targets"])
    if not _hidden_gives_logits(forward):
        return _score_logits(out.logits, targets)
    hidden = out.hidden
    rows, length = targets.shape
    chunk = max(1, min(length, MAX_LOGITS // (rows * model.cfg.vocab_size)))
    count = -(-length // chunk)
    if count == 1:
        return _score_logits(models.unembed(model, hidden), targets)

    # Chunk j holds positions j, j + N, ...: a sequence split over devices stays split.
    def chunks(a: Array) -> Array:  # [B,T,...] -> [N,B,C,...]
        a = jnp.pad(a, ((0, 0), (0, count * chunk - length), *((0, 0),) * (a.ndim - 2)))
        return jnp.moveaxis(a.reshape(rows, chunk, count, *a.shape[2:]), 2, 0)

    def score(part: tuple[Array, Array]) -> TokenScores:
        return _score_logits(models.unembed(model, part[0]), part[1])

    scores = jax.lax.map(score, (chunks(hidden), chunks(targets)))
    join = lambda a: jnp.moveaxis(a, 0, 2).reshape(rows, chunk * count)[:, :length]
    return jax.tree.map(join, scores)


def _hidden_gives_logits(forward: Callable[..., Any]) -> bool:
    """Whether logits are ``unembed(hidden)``: our forward, and nobody touches the logits."""
    tapped = as_tapped(forward)
    return base_forward(tapped) is models.forward and not tapped.taps.only(["logits"]).edits


def _score_logits(logits: Array, targets: Array) -> TokenScores:
    logits = constrain(logits, ("batch", "length", "act_vocab")).astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    log_probs = chosen - jax.nn.logsumexp(logits, axis=-1)
    return TokenScores(log_probs, jnp.argmax(logits, axis=-1) == targets)


@jax.jit
def _text_sums(forward: TappedForward, model: Decoder, batch: dict[str, Array]) -> Array:
    """[3]: sums of w * loss, w * correct and w over a batch."""
    scores = score_tokens(forward, model, batch)
    weights = batch.get("weights")
    weights = jnp.ones(scores.log_probs.shape) if weights is None else weights
    weigh = lambda values: jnp.sum(jnp.where(weights != 0, values * weights, 0))
    return jnp.stack([weigh(-scores.log_probs), weigh(scores.is_best), jnp.sum(weights)])


def evaluate_text(
    forward: Callable[..., Any], model: Decoder, batches: Iterable[Batch]
) -> dict[str, float]:
    """Next-token loss, perplexity and accuracy over batches of text.

        loss = sum w * -log p(target) / sum w,   perplexity = exp(loss)

    Args:
      forward: a forward, wrapped or not.
      model: a `Decoder`, sharded or not.
      batches: dicts of arrays [B,T]: `tokens` and `targets`; optionally `segment_ids`,
        `positions` and `weights` (0 = not counted), as `data.eval_batches` gives them. Batches of
        one shape share a program.

    Returns:
      ``loss`` (nats per token), ``perplexity``, ``accuracy`` (share of targets that are the most
      likely token) and ``tokens`` (sum of weights).

    Raises:
      ValueError: for a batch without tokens or targets, ids outside the vocabulary, or nothing to
        score.
    """
    forward = as_tapped(forward)
    known = ("tokens", "targets", "segment_ids", "positions", "weights")
    totals = np.zeros(3)
    pending = None
    for batch in batches:
        for name in ("tokens", "targets"):
            if name not in batch:
                raise ValueError(f"a batch has no {name!r}; it holds {', '.join(batch)}.")
            models.check_token_ids(batch[name], model.cfg.vocab_size)
        arrays = {n: jnp.asarray(v) for n, v in batch.items() if n in known and v is not None}
        sums = _text_sums(forward, model, arrays)
        # Reading the sums of the batch before keeps one batch in flight, not all of them.
        totals += 0 if pending is None else np.asarray(pending, np.float64)
        pending = sums
    totals += 0 if pending is None else np.asarray(pending, np.float64)
    loss, correct, tokens = totals
    if not tokens > 0:
        raise ValueError("there is no token to score: the batches are empty or all padding.")
    loss = float(loss / tokens)
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "accuracy": float(correct / tokens),
        "tokens": int(tokens),
    }


class _Row(NamedTuple):
    """One continuation to score."""

    example: int
    candidate: int
    ids: np.ndarray
    """[N] prompt and continuation, with landmarks where the model takes them"""
    counts: np.ndarray
    """[N] bool: the ids of the continuation; landmarks do not count."""


@jax.jit
def _row_sums(forward: TappedForward, model: Decoder, batch: dict[str, Array]):
    """(sum of log-probabilities [B], every scored target is the most likely token [B])."""
    scores = score_tokens(forward, model, batch)
    counts = batch["weights"] != 0
    total = jnp.sum(jnp.where(counts, scores.log_probs, 0), axis=-1)
    return constrain(total, (None,)), constrain(jnp.all(scores.is_best | ~counts, axis=-1), (None,))


def evaluate_tasks(
    forward: Callable[..., Any],
    model: Decoder,
    tokenizer: Tokenizer,
    examples: Sequence[TaskExample],
    *,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Multiple choice: is the answer more likely after its prompt than every distractor?

        score(c) = sum_t log p(c_t | prompt, c_<t)

    The ids of a continuation are those of ``encode(prompt + continuation)`` after what it shares
    with ``encode(prompt)`` in all candidates of the example. Where a tokenizer merges the end of
    the prompt with the beginning of a continuation, all candidates are scored from before the
    merged token on, so their scores stay comparable; ``merged_boundaries`` counts such examples.
    The first token of a text without BOS has no context and is not scored.

    Where the model takes landmarks (`attention="landmark"`), prompt and continuation have one after
    every block, counted from the first token of the prompt; landmarks are out of the logits and
    their log-probabilities out of the sum.

    Args:
      forward: a forward, wrapped or not.
      model: a `Decoder`, sharded or not.
      tokenizer: the tokenizer of the model.
      examples: from `data.load_tasks`.
      batch_size: continuations scored at once. Lengths are padded to powers of two, so that few
        programs are compiled.

    Returns:
      accuracy: share of examples whose answer beats every distractor (a tie is a loss); examples
        without distractors count when greedy decoding would write the answer.
      accuracy_per_token: the same with scores divided by their number of tokens.
      exact_match: share of examples whose answer greedy decoding would write.
      answer_log_prob: mean score of the answer.
      margin: mean lead of the answer over the best distractor; None without distractors.
      examples, merged_boundaries: counts.
      per_example: a list of dicts: prompt, answer, correct, choice (index of the best candidate, 0
        is the answer), log_probs and num_tokens of all candidates, greedy.

    Raises:
      ValueError: for no examples, a continuation without tokens, a text longer than the learned
        positions, or one that has the id of a landmark.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    if not examples:
        raise ValueError("there are no examples to evaluate.")
    marks = landmarks_of(model.cfg)
    forward = as_tapped(forward if marks is None else place_landmarks(forward, marks.token))
    rows, merged = [], 0
    for number, example in enumerate(examples):
        new, is_merged = _encode(tokenizer, example, number, marks)
        rows += new
        merged += is_merged
    log_probs: dict[tuple[int, int], float] = {}
    is_greedy: dict[tuple[int, int], bool] = {}
    for group, batch in _task_batches(rows, batch_size, model.cfg):
        models.check_token_ids(batch["tokens"], model.cfg.vocab_size)
        models.check_token_ids(batch["targets"], model.cfg.vocab_size)
        sums, greedy = map(np.asarray, _row_sums(forward, model, batch))
        for row, total, best in zip(group, sums, greedy, strict=False):  # the rest is padding
            log_probs[row.example, row.candidate] = float(total)
            is_greedy[row.example, row.candidate] = bool(best)
    lengths = {(row.example, row.candidate): int(row.counts.sum()) for row in rows}
    details = [
        _judge(
            example,
            [log_probs[number, c] for c in range(1 + len(example.distractors))],
            [lengths[number, c] for c in range(1 + len(example.distractors))],
            is_greedy[number, 0],
        )
        for number, example in enumerate(examples)
    ]
    margins = [d["margin"] for d in details if d["margin"] is not None]
    mean = lambda name: float(np.mean([d[name] for d in details]))
    return {
        "accuracy": mean("correct"),
        "accuracy_per_token": mean("correct_per_token"),
        "exact_match": mean("greedy"),
        "answer_log_prob": float(np.mean([d["log_probs"][0] for d in details])),
        "margin": float(np.mean(margins)) if margins else None,
        "examples": len(details),
        "merged_boundaries": merged,
        "per_example": details,
    }


def answers_right(
    forward: Callable[..., Any],
    model: Decoder,
    tokenizer: Tokenizer,
    pairs: Sequence[TaskPair],
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """Whether greedy decoding answers each clean prompt: the most likely of all tokens is right.

    Args:
      forward: a forward, wrapped or not.
      model: a `Decoder`, sharded or not.
      tokenizer: the tokenizer of the model.
      pairs: from `data.tasks.generate` or `data.load_pairs`. An answer of several tokens is right
        when all are; any of `accepted` is right where a pair has it.
      batch_size: prompts at once. Lengths are padded to powers of two.

    Returns:
      [N] bool
    """
    if not pairs:
        raise ValueError("there are no pairs to evaluate.")
    examples, owners = [], []
    for number, pair in enumerate(pairs):
        answers = pair.accepted or (pair.answer,)
        examples += [TaskExample(pair.clean, answer) for answer in answers]
        owners += [number] * len(answers)
    found = evaluate_tasks(forward, model, tokenizer, examples, batch_size=batch_size)
    right = np.zeros(len(pairs), bool)
    np.logical_or.at(right, owners, [detail["greedy"] for detail in found["per_example"]])
    return right


def _encode(
    tokenizer: Tokenizer, example: TaskExample, number: int, marks: Landmarks | None
) -> tuple[list[_Row], bool]:
    """The candidates of an example, answer first, and whether a boundary merged."""
    encode = lambda text: tokenizer.encode(text, add_bos=tokenizer.adds_bos)
    prompt = encode(example.prompt)
    texts = [encode(example.prompt + c) for c in (example.answer, *example.distractors)]
    shared = min(_common_prefix(prompt, ids) for ids in texts)
    start = max(shared, 1)
    for ids, text in zip(texts, (example.answer, *example.distractors)):
        if len(ids) <= start:
            raise ValueError(
                f"example {number}: {text!r} after the prompt {example.prompt[-40:]!r} leaves no "
                "token to score; without BOS the first token has no context: give a prompt."
            )
    rows = [_Row(number, c, *_mark(ids, start, marks)) for c, ids in enumerate(texts)]
    return rows, shared < len(prompt)


def _mark(ids: np.ndarray, start: int, marks: Landmarks | None) -> tuple[np.ndarray, np.ndarray]:
    """The ids with landmarks, and which of them count: those of the text from `start` on."""
    if marks is None:
        return ids, np.arange(len(ids)) >= start
    marked = np.asarray(insert_landmarks(ids, marks.block_size, marks.token))
    is_text = marked != marks.token
    return marked, is_text & (np.cumsum(is_text) > start)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    differs = np.flatnonzero(a[:size] != b[:size])
    return int(differs[0]) if differs.size else size


def _task_batches(rows: Sequence[_Row], batch_size: int, cfg) -> Iterator[tuple[list[_Row], Batch]]:
    """Rows grouped by padded length, each group with its batch [batch_size, width]."""
    longest = cfg.max_positions if cfg.positions == "learned" else None
    by_width: dict[int, list[_Row]] = defaultdict(list)
    for row in rows:
        length = len(row.ids) - 1
        if longest is not None and length > longest:
            raise ValueError(
                f"example {row.example} has {length} tokens, more than the {longest} learned "
                "positions of the model; shorten its prompt."
            )
        width = max(_MIN_WIDTH, 1 << (length - 1).bit_length())
        by_width[width if longest is None else min(width, longest)].append(row)
    for width, members in sorted(by_width.items()):
        for first in range(0, len(members), batch_size):
            group = members[first : first + batch_size]
            yield group, _task_batch(group, batch_size, width)


def _task_batch(group: Sequence[_Row], batch_size: int, width: int) -> Batch:
    shape = (batch_size, width)
    batch: dict[str, np.ndarray] = {
        name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment_ids")
    }
    batch["weights"] = np.zeros(shape, np.float32)
    for number, row in enumerate(group):
        length = len(row.ids) - 1
        batch["tokens"][number, :length] = row.ids[:-1]
        batch["targets"][number, :length] = row.ids[1:]
        batch["segment_ids"][number, :length] = 1
        batch["weights"][number, :length] = row.counts[1:]
    return batch


def _judge(example: TaskExample, log_probs: list[float], lengths: list[int], greedy: bool):
    """The verdict on one example; candidate 0 is the answer."""

    def beats(scores: list[float]) -> bool:
        return scores[0] > max(scores[1:]) if len(scores) > 1 else greedy

    return {
        "prompt": example.prompt,
        "answer": example.answer,
        "correct": beats(log_probs),
        "correct_per_token": beats([p / n for p, n in zip(log_probs, lengths)]),
        "greedy": greedy,
        "choice": int(np.argmax(log_probs)),
        "margin": log_probs[0] - max(log_probs[1:]) if len(log_probs) > 1 else None,
        "log_probs": log_probs,
        "num_tokens": lengths,
    }
