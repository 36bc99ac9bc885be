"""Next-token cross-entropy that never forms the logits of a whole batch."""

from __future__ import annotations

from typing import NamedTuple

from jaxheads.typing import Array


class LossSums(NamedTuple):
    """Sums over the weighted tokens of a batch; divide by `weight_sum` for means."""

    loss_sum: Array
    """sum w (cross-entropy + z_loss * lse^2)"""
    weight_sum: Array
    """sum w"""
    correct_sum: Array
    """sum w [argmax logits = target]"""
    z_sum: Array
    """sum w lse^2"""


def chunked_cross_entropy(hidden, kernel, targets, weights=None, *, num_chunks=0, z_loss=0.0,
                          soft_cap=None, bias=None, vocab_first=False) -> LossSums:  # fmt: skip
    """hidden [B,T,E], kernel [E,V] ([V,E] with vocab_first), targets [B,T], weights [B,T]."""
    raise NotImplementedError


def next_token_loss(forward, model, batch, cfg) -> tuple[Array, dict[str, Array]]:
    """Mean loss of a batch (dict of [B,T] arrays: tokens, targets; optional positions,
    segment_ids, weights) and its metrics: loss, accuracy, weights, z_loss, aux.
    """
    raise NotImplementedError
