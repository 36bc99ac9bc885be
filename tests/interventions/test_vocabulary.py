"""Which ids a model may say."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from jaxheads.attention import insert_landmarks
from jaxheads.generation import generate
from jaxheads.interventions import for_text, only_tokens
from jaxheads.models import Decoder, ModelConfig, forward

SIZE, NAMED = 32, 6
CONFIG = dict(vocab_size=SIZE, num_layers=1, model_dim=16, num_heads=2, head_dim=8)


def build(**changes):
    return Decoder(ModelConfig(**CONFIG, **changes), rngs=nnx.Rngs(0))


def test_only_tokens_that_are_allowed_are_said():
    model, tokens = build(), np.arange(8)[None] % NAMED
    allowed = np.arange(SIZE) < NAMED
    said = jax.nn.softmax(only_tokens(forward, allowed)(model, tokens).logits)
    plain = np.asarray(jax.nn.softmax(forward(model, tokens).logits))[..., :NAMED]
    assert (said[..., NAMED:] == 0).all()
    np.testing.assert_allclose(said[..., :NAMED], plain / plain.sum(-1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("attention", ["dense", "landmark(block=3,token=20)"])
def test_text_has_named_tokens_and_landmarks_where_they_are_due(attention):
    model = build(attention=attention)
    prompt, has_marks = np.arange(6, dtype=np.int32) % NAMED, attention != "dense"
    prompt = insert_landmarks(prompt, 3, 20) if has_marks else prompt
    out = generate(model, prompt[None], max_new_tokens=30, temperature=5.0,
                   key=jax.random.key(0), forward=for_text(forward, model.cfg, NAMED))  # fmt: skip
    ids = np.asarray(out[0])
    due = (np.arange(len(ids)) % 4 == 3) & has_marks
    np.testing.assert_array_equal(ids == 20, due)
    assert (ids[~due] < NAMED).all() and len(set(ids.tolist())) > 3


@pytest.mark.parametrize("allowed", [np.zeros(4, bool), np.ones((2, 4), bool)])
def test_nobody_is_silenced(allowed):
    with pytest.raises(ValueError, match="at least one true"):
        only_tokens(forward, allowed)
