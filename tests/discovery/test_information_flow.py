"""Knock-outs against biases that are written out, saliency against differences, a lens by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.discovery import attention_saliency, knockout_profile, layer_lens, log_probability
from jaxheads.discovery.edges import add
from jaxheads.discovery.information_flow import LayerLens
from jaxheads.interventions import bias_scores
from jaxheads.models import forward
from jaxheads.taps import Edit, intervene, record
from tests.configs import CONFIGS, model_of, tokens_of

BATCH, LENGTH = 2, 5
TARGETS = np.array([5, 6])
L, H, V = (getattr(CONFIGS["llama"], n) for n in ("num_layers", "num_heads", "vocab_size"))
ROWS = np.arange(BATCH)
SOURCES = np.zeros((BATCH, LENGTH), bool)
SOURCES[0, 1:3] = SOURCES[1, 0] = True


def case(name="llama"):
    return model_of(name), tokens_of(name, BATCH, LENGTH)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("name", "window"),
    [pytest.param("gpt2", 2, marks=pytest.mark.slow), ("neox", 1), ("llama", 3)],
)
def test_a_profile_is_one_run_a_window(name, window):
    model, tokens = case(name)
    p = lambda out: softmax(np.asarray(out.logits[:, -1], np.float64))[ROWS, TARGETS]
    before, want = p(forward(model, tokens)), []
    for centre in range(L):
        first = centre - (window - 1) // 2
        bias = np.zeros((L, BATCH, 1, LENGTH, LENGTH), np.float32)
        for layer in range(max(first, 0), min(first + window, L)):
            bias[layer, :, 0, -1] = np.where(SOURCES, -1e9, 0)
        want.append(np.mean(p(bias_scores(forward, bias)(model, tokens)) / before - 1))
    got = knockout_profile(forward, model, tokens, TARGETS, SOURCES, window=window)
    assert np.abs(want).max() > 0.01
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_without_sources_nothing_changes():
    model, tokens = case()
    got = knockout_profile(forward, model, tokens, TARGETS, np.zeros_like(SOURCES), window=3)
    np.testing.assert_allclose(got, np.zeros(L), atol=1e-6)


def test_saliency_is_the_pattern_times_how_much_the_loss_moves():
    model, tokens = case()
    loss = log_probability(TARGETS)
    got = attention_saliency(forward, model, tokens, loss)
    assert got.shape == (L, BATCH, LENGTH, LENGTH)
    pattern = np.asarray(record(forward, "pattern")(model, tokens).seen["pattern"])
    run = jax.jit(
        lambda shift: loss(intervene(forward, Edit("pattern", add, shift))(model, tokens).logits)
    )
    step = 0.02
    for layer, row, t, s in [(0, 0, 2, 1), (0, 1, 4, 0), (1, 0, 4, 3), (2, 1, 4, 2)]:
        want = 0.0
        for head in range(H):
            shift = jnp.zeros(pattern.shape).at[layer, row, head, t, s].set(step)
            slope = float((run(shift) - run(-shift))[row]) / (2 * step)
            want += abs(pattern[layer, row, head, t, s] * slope)
        np.testing.assert_allclose(got[layer, row, t, s], want, rtol=0.02, atol=1e-5)
    assert float(jnp.abs(jnp.triu(got, 1)).max()) == 0  # nothing looks ahead
    assert float(jnp.abs(got[-1, :, :-1]).max()) == 0  # and only the last token is read


def test_a_lens_norms_and_unembeds_what_a_layer_writes():
    model, tokens = case()
    targets = np.stack([TARGETS, TARGETS + 1], 1)
    got = layer_lens(forward, model, tokens, targets)
    seen = record(forward, "attn_out", "mlp_out")(model, tokens).seen
    gain = np.asarray(model.final_norm.weight[...], np.float64)
    table = np.asarray(model.embed.table[...], np.float64)
    for site, value in (("attn_out", got.attention), ("mlp_out", got.mlp)):
        x = np.asarray(seen[site][:, :, -1], np.float64)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.cfg.norm_eps) * gain
        want = np.take_along_axis(softmax(x @ table.T), targets[None], -1)
        np.testing.assert_allclose(value, want, atol=1e-6)


def test_the_conflict_layer_writes_both_answers():
    attention = np.array([[[0.5, 0.0]], [[0.3, 0.3]], [[0.9, 0.9]]])
    lens = LayerLens(attention, attention)
    assert lens.conflict_layer(0.2) == 1
    assert lens.conflict_layer(0.95) is None


PADDED = {
    "tokens": np.ones((BATCH, LENGTH), np.int32),
    "segment_ids": np.array([[1] * 4 + [0]] * 2),
}
ONLY_PADDING = np.arange(LENGTH)[None] == np.array([[4], [4]])
EVERYTHING = np.ones((BATCH, LENGTH), bool)


@pytest.mark.parametrize(
    ("tokens", "sources", "options", "message"),
    [
        (PADDED, ONLY_PADDING, {}, "prompt 0 are padding only"),
        (PADDED, EVERYTHING, {}, "query 3 of prompt 0 would lose every key"),
        (PADDED, SOURCES[:1], {}, r"needed bool \[2, 5\]"),
        (PADDED, SOURCES.astype(int), {}, "needed bool"),
        (PADDED, SOURCES, {"window": 0}, "window=0"),
        (PADDED, SOURCES, {"window": L + 1}, "number of layers"),
        (PADDED, SOURCES, {"query": "subject"}, "positions='subject'"),
    ],
)
def test_bad_knockouts(tokens, sources, options, message):
    with pytest.raises(ValueError, match=message):
        knockout_profile(forward, model_of("llama"), tokens, TARGETS, sources, **options)


def test_answers_outside_the_vocabulary_are_refused():
    model, tokens = case()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        knockout_profile(forward, model, tokens, [5, V], SOURCES)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        layer_lens(forward, model, tokens, [[5], [V]])
    with pytest.raises(ValueError, match=r"needed \[2, N\]"):
        layer_lens(forward, model, tokens, TARGETS)
