"""Attribution to two answers, and what scaling one head's values is equal to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.discovery import head_attribution, logit_attribution, rank_heads
from jaxheads.interventions import ablate, scale_heads
from jaxheads.models import forward, init_cache
from jaxheads.taps import record
from tests.configs import CONFIGS, model_of, tokens_of

MODELS = ("gpt2", "neox", "llama")  # sequential, parallel residual, grouped queries
BATCH, LENGTH = 2, 5
CTX, MEM = [5, 6], [8, 9]
L, H = CONFIGS["gpt2"].num_layers, CONFIGS["gpt2"].num_heads


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_the_other_parts_add_up_to_the_logit_difference(name):
    model, tokens = model_of(name), tokens_of(name, BATCH, LENGTH)
    heads = head_attribution(forward, model, tokens, CTX, MEM)
    rest = logit_attribution(forward, model, tokens, CTX, MEM)
    logits = np.asarray(forward(model, tokens).logits[:, -1], np.float64)
    rows = np.arange(BATCH)
    assert heads.shape == (L, H, BATCH)
    total = heads.sum((0, 1)) + rest.mlps.sum(0) + rest.embed + rest.bias
    np.testing.assert_allclose(total, logits[rows, CTX] - logits[rows, MEM], atol=1e-4)


def test_raw_attribution_is_each_head_dotted_with_two_columns():
    model, tokens = model_of("neox"), tokens_of("neox", BATCH, LENGTH)
    z = np.asarray(record(forward, "z")(model, tokens).seen["z"][:, :, -1], np.float64)
    wo = np.asarray(model.layers.attention.wo[...], np.float64)
    columns = np.asarray(model.unembed.kernel[...], np.float64)
    want = np.zeros((L, H, BATCH))
    for layer, head, row in np.ndindex(L, H, BATCH):
        written = z[layer, row, head] @ wo[layer, head]
        want[layer, head, row] = written @ (columns[:, CTX[row]] - columns[:, MEM[row]])
    got = head_attribution(forward, model, tokens, CTX, MEM, norm="raw")
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_padded_prompts_are_read_where_they_end():
    model, tokens = model_of("llama"), np.asarray(tokens_of("llama", BATCH, LENGTH))
    padded = {"tokens": tokens, "segment_ids": np.array([[1] * 5, [1] * 3 + [0] * 2])}
    got = head_attribution(forward, model, padded, CTX, MEM, position=[4, 2])
    want = head_attribution(forward, model, tokens[1:, :3], CTX[1:], MEM[1:])
    np.testing.assert_allclose(got[:, :, 1:], want, atol=1e-5)
    with pytest.raises(ValueError, match="prompt 1 is padding"):
        head_attribution(forward, model, padded, CTX, MEM)


def test_ranks_go_by_the_mean_and_keep_the_sign():
    delta = np.zeros((2, 2, 2), np.float32)
    delta[0, 0], delta[0, 1], delta[1, 0] = [-5, 1], [1, 1], [3, 4]
    ranks = rank_heads(delta, 3)
    assert ranks.memory == [(0, 0)]
    assert ranks.context == [(1, 0), (0, 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a_ctx": [5, 9]}, "prompt 1 .* same first token, id 9"),
        ({"a_ctx": [5, 61]}, "61 is outside the vocabulary"),
        ({"a_ctx": [[5, 6], [7, 8]]}, "one integer token id for each prompt.*first token"),
        ({"a_ctx": [5]}, "1 tokens? and|2 tokens and wrong 1|one of each"),
        ({"norm": "folded"}, "norm='folded'"),
        ({"position": 7}, "position 7"),
    ],
)
def test_bad_input(change, message):
    model, tokens = model_of("llama"), tokens_of("llama", BATCH, LENGTH)
    options = {"a_ctx": CTX, "a_mem": MEM, **change}
    with pytest.raises(ValueError, match=message):
        head_attribution(forward, model, tokens, **options)


def one_head(layer: int, head: int, alpha: float, heads: int = H) -> np.ndarray:
    gates = np.ones((L, heads), np.float32)
    gates[layer, head] = alpha
    return gates


@jax.jit
def logits_of(fwd, model, tokens):
    return fwd(model, tokens).logits


def test_scaling_values_scales_z_and_so_the_output_projection():
    model, tokens, alpha = model_of("gpt2"), tokens_of("gpt2", BATCH, LENGTH), -3.0
    gates = one_head(1, 2, alpha)
    by_z = logits_of(scale_heads(forward, gates), model, tokens)
    by_v = logits_of(scale_heads(forward, gates, site="v"), model, tokens)
    folded = jax.tree.map(lambda x: x, model)
    wo = model.layers.attention.wo[...]
    folded.layers.attention.wo[...] = wo.at[1, 2].multiply(alpha)
    plain = forward(model, tokens).logits
    assert not np.allclose(by_z, plain, atol=1e-2)
    np.testing.assert_allclose(by_v, by_z, atol=1e-5)
    np.testing.assert_allclose(forward(folded, tokens).logits, by_z, atol=1e-5)
    silent = logits_of(scale_heads(forward, one_head(1, 2, 0.0)), model, tokens)
    np.testing.assert_allclose(forward_without(model, tokens), silent, atol=1e-5)
    same = logits_of(scale_heads(forward, np.ones((L, H))), model, tokens)
    np.testing.assert_array_equal(same, plain)


def forward_without(model, tokens):
    return ablate(forward, [(1, 2)])(model, tokens).logits


def test_a_query_head_is_scaled_alone_and_shared_values_for_the_group():
    model, tokens, alpha = model_of("llama"), tokens_of("llama", BATCH, LENGTH), 3.0
    kv = CONFIGS["llama"].num_kv_heads
    shared = logits_of(scale_heads(forward, one_head(1, 1, alpha, kv), site="v"), model, tokens)
    alone = logits_of(scale_heads(forward, one_head(1, 2, alpha)), model, tokens)
    group = one_head(1, 2, alpha) * one_head(1, 3, alpha)
    np.testing.assert_allclose(
        logits_of(scale_heads(forward, group), model, tokens), shared, atol=1e-5
    )
    assert not np.allclose(alone, shared, atol=1e-2)
    with pytest.raises(ValueError, match="repeat each column"):
        scale_heads(forward, one_head(1, 1, alpha, kv))(model, tokens)
    with pytest.raises(ValueError, match="NaN"):
        scale_heads(forward, one_head(1, 1, np.nan))


def test_decoding_scales_as_the_whole_text_does():
    model, tokens = model_of("llama"), tokens_of("llama", BATCH, LENGTH)
    fwd = scale_heads(forward, one_head(0, 2, 4.0))
    cache = init_cache(model.cfg, BATCH, LENGTH)
    out = fwd(model, tokens[:, :-1], cache=cache)
    last = fwd(model, tokens[:, -1:], cache=out.cache).logits[:, 0]
    np.testing.assert_allclose(last, logits_of(fwd, model, tokens)[:, -1], atol=1e-5)
    assert not np.allclose(last, forward(model, tokens).logits[:, -1], atol=1e-2)
    assert jnp.isfinite(last).all()
