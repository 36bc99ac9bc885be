"""What a call asks beyond plain softmax is named, so that no variant ignores it."""

import jax.numpy as jnp
import pytest

from jaxheads.attention.contract import AttentionContext, asked_beyond
from jaxheads.attention.masks import Mask

ONES = jnp.ones((1, 2, 4, 4))
ASKED = {
    "a head mask": AttentionContext(mask=Mask(is_causal=True, head_mask=ONES > 0)),
    "a sliding window": AttentionContext(mask=Mask(is_causal=True, window=2)),
    "a prefix": AttentionContext(mask=Mask(is_causal=True, prefix_lengths=jnp.array([1]))),
    "a bias": AttentionContext(mask=Mask(is_causal=True), bias=ONES),
    "sinks": AttentionContext(mask=Mask(is_causal=True), sinks=jnp.ones(2)),
    "a soft cap": AttentionContext(mask=Mask(is_causal=True), soft_cap=5.0),
    "ALiBi": AttentionContext(mask=Mask(is_causal=True), alibi_slopes=jnp.ones(2)),
    "no causality": AttentionContext(mask=Mask(is_causal=False)),
}


@pytest.mark.parametrize("what", ASKED)
def test_every_extra_is_named(what):
    assert asked_beyond(ASKED[what]) == what


def test_plain_calls_ask_nothing_and_variants_add_their_own():
    ids = jnp.ones((1, 4), jnp.int32)
    plain = AttentionContext(mask=Mask(is_causal=True, q_segment_ids=ids, k_segment_ids=ids))
    assert asked_beyond(plain) is None
    others = ((False, "a colour"), (True, "a taste"))
    assert asked_beyond(plain, others) == "a taste"
