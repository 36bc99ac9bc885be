"""Which heads write the answer of the prompt, and which the answer from memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxheads.discovery.attribution import logit_attribution
from jaxheads.discovery.metrics import Metric, logit_difference
from jaxheads.discovery.prompts import Prompts, as_prompts
from jaxheads.heads import Head, top_k
from jaxheads.models import Decoder, check_token_ids
from jaxheads.typing import Array, ArrayLike, is_traced


class HeadRanks(NamedTuple):
    """Heads of the strongest attribution on either side, strongest first."""

    memory: list[Head]
    context: list[Head]


def head_attribution(
    forward: Callable[..., Any],
    model: Decoder,
    tokens: Any,
    a_ctx: ArrayLike,
    a_mem: ArrayLike,
    *,
    norm: str = "frozen",
    position: Any = -1,
) -> Array:
    """What each head adds to the context answer's logit over the memorised one's.

        delta[l,h,b] = r . (u_ctx - u_mem),     r = z[l,b,position,h] W_O[l,h]

    without output biases. Negative: a *memory head*, positive: an *in-context head*, on these
    prompts. The mode decides the ranking: ``"frozen"`` (gain and scale of the final norm at their
    values) adds up to the logit difference with the other parts of the model
    (`logit_attribution`); ``"gain"`` takes the gain alone; ``"raw"`` takes the columns as they are
    stored, and so changes with how a checkpoint folds its norms.

    Args:
      forward: a forward, wrapped or not.
      model: a `Decoder`.
      tokens: tokens [B,T], or a mapping with `tokens` and optionally `segment_ids`, `positions`.
      a_ctx: [B] the first token of the answer that the prompt states.
      a_mem: [B] the first token of the memorised answer.
      norm: ``"frozen"``, ``"gain"`` or ``"raw"``.
      position: the slot read; [B] where prompts are padded.

    Returns:
      [L,H,B] float32.

    Raises:
      ValueError: for two answers with the same token, ids outside the vocabulary, and a position
        that is padding.

    References: Yu et al., 2023, arXiv:2310.15910 (raw).
    """
    prompts = as_prompts(tokens, "tokens")
    a_mem, a_ctx = check_answers(a_mem, a_ctx, model.cfg.vocab_size)
    _check_is_text(prompts, logit_difference(a_ctx, a_mem, positions=position))
    return logit_attribution(
        forward, model, prompts, a_ctx, a_mem, norm=norm, position=position
    ).heads


def rank_heads(delta: ArrayLike, k: int) -> HeadRanks:
    """The `k` most negative (memory) and most positive (context) heads of delta [L,H] or [L,H,B].

    Prompts are averaged over. A head of the wrong sign is no member of a list, which may then be
    shorter than `k`.
    """
    scores = np.asarray(delta, np.float32)
    scores = scores.mean(-1) if scores.ndim == 3 else scores
    ranked = (top_k(sign * scores, k) for sign in (-1, 1))
    return HeadRanks(
        *([h for h in heads if sign * scores[h] > 0] for sign, heads in zip((-1, 1), ranked))
    )


def check_answers(a_mem: ArrayLike, a_ctx: ArrayLike, vocab_size: int) -> tuple[Array, Array]:
    """The two answers [B] of every prompt as int32 ids.

    Raises:
      ValueError: for other shapes, ids outside the vocabulary, and a prompt whose two answers have
        the same (first) token.
    """
    pair = logit_difference(a_mem, a_ctx).entries  # [B,2], shapes checked
    check_token_ids(pair, vocab_size)
    if not is_traced(pair):
        same = np.flatnonzero(np.asarray(pair[:, 0] == pair[:, 1]))
        if same.size:
            raise ValueError(
                f"memorised and context answer of prompt {same[0]} ({same.size} such prompts) have "
                f"the same first token, id {int(pair[same[0], 0])}: nothing tells them apart. "
                "Leave these prompts out."
            )
    return pair[:, 0], pair[:, 1]


def _check_is_text(prompts: Prompts, reads: Metric) -> None:
    reads.slots(*prompts.tokens.shape)  # raises for slots outside the text
    if prompts.segment_ids is None or is_traced(prompts.segment_ids):
        return
    at = reads.gather(prompts.segment_ids)  # [B]
    rows = np.flatnonzero([] if is_traced(at) else np.asarray(at) == 0)
    if rows.size:
        raise ValueError(
            f"the slot read in prompt {rows[0]} is padding; give the last slot of each prompt, "
            "position=[B], or pad on the left."
        )
