"""Decoders with landmark attention: whole texts, their cache, padding, generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxheads as jh
from jaxheads.attention import Landmarks, insert_landmarks, landmarks_of, strip_landmarks
from jaxheads.interventions import place_landmarks
from jaxheads.models import ModelConfig, forward, init_cache, with_config
from tests.tiny import tiny_model

MARK, BLOCK, LENGTH = 30, 3, 22
TEXT = np.random.default_rng(1).integers(1, MARK, (2, 17))
TOKENS = insert_landmarks(TEXT, BLOCK, MARK)


def text(**options):
    given = dict(block=BLOCK, chunk=8, top_k=20, force="true") | options
    return f"landmark({','.join(f'{name}={value}' for name, value in given.items())})"


CONFIG = ModelConfig(
    vocab_size=MARK + 1, num_layers=2, model_dim=16, mlp_dim=16, num_heads=2, num_kv_heads=1,
    attention=text(),
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_model(CONFIG)


@pytest.fixture(scope="module")
def whole(model):
    """Logits [2,22,V] of the whole texts."""
    return forward(model, TOKENS).logits


def test_fused_equals_dense_in_packed_and_padded_rows(model, whole):
    """Blocks count real tokens, wherever padding and documents begin."""
    padded = np.zeros((2, LENGTH + 4), int)
    ids = np.zeros_like(padded)
    padded[0, 4:], padded[1, :LENGTH] = TOKENS[0], TOKENS[1]
    ids[0, 4:], ids[1, :LENGTH] = 1, 1
    ids[1, 6:LENGTH] = 2  # a document that begins inside a block
    run = lambda model: forward(model, padded, segment_ids=jnp.asarray(ids)).logits
    fused, dense = run(model), run(with_config(model, attention=text(impl="dense")))
    np.testing.assert_allclose(fused, dense, atol=1e-4)
    np.testing.assert_allclose(fused[0, 4:], whole[0], atol=1e-4)
    np.testing.assert_allclose(fused[1, :6], whole[1, :6], atol=1e-4)
    assert not np.allclose(fused[1, 8:LENGTH], whole[1, 8:], atol=1e-2)
    assert not np.allclose(whole, forward(with_config(model, attention="dense"), TOKENS).logits,
                           atol=1e-2)  # fmt: skip


def test_positions_are_those_of_the_batch(model, whole):
    """Jumps change what stands before and after them, and a common shift changes nothing."""
    jumps = np.cumsum(np.where(TOKENS == MARK, [[5], [9]], 0), axis=1)
    place = np.arange(LENGTH) + np.pad(jumps, ((0, 0), (1, 0)))[:, :-1]
    run = lambda model, shift: forward(model, TOKENS, positions=jnp.asarray(place + shift)).logits
    jumped = run(model, 0)
    np.testing.assert_allclose(jumped[:, : BLOCK + 1], whole[:, : BLOCK + 1], atol=1e-4)
    assert (np.abs(jumped - whole).max(axis=-1)[:, BLOCK + 2 :] > 1e-3).all()
    np.testing.assert_allclose(run(model, 100), jumped, atol=1e-3)
    np.testing.assert_allclose(run(with_config(model, attention=text(impl="dense")), 0), jumped,
                               atol=1e-4)  # fmt: skip


def test_a_cache_with_enough_blocks_is_exact(model, whole):
    """Also in pieces that end anywhere; a single read block is another function."""
    cache, got = init_cache(CONFIG, 2, LENGTH), []
    for piece in np.split(TOKENS, [11], axis=1):
        out = forward(model, piece, cache=cache)
        cache, got = out.cache, [*got, out.logits]
    np.testing.assert_allclose(np.concatenate(got, axis=1), whole, atol=1e-4)
    few = with_config(model, attention=text(top_k=1))
    logits = forward(few, TOKENS, cache=init_cache(few.cfg, 2, LENGTH)).logits
    np.testing.assert_allclose(logits[:, :8], whole[:, :8], atol=1e-4)
    assert not np.allclose(logits[:, 16:], whole[:, 16:], atol=1e-3)


def test_a_cache_in_host_memory_reads_the_same(model):
    """Two layers share its arrays."""
    logits = []
    for more in ({}, {"offload": "true"}):
        few = with_config(model, attention=text(policy="max_over_tokens", top_k=1, **more))
        out = forward(few, TOKENS, cache=init_cache(few.cfg, 2, LENGTH))
        logits.append(out.logits)
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(out.cache)}
    np.testing.assert_allclose(*logits, atol=1e-5)
    assert kinds == {"device", "pinned_host"}


@pytest.mark.slow
def test_a_cache_in_host_memory_generates_the_same(model):
    prompts = [TOKENS[0, :13].tolist(), TOKENS[1, :9].tolist()]
    run = lambda **more: jh.generate(
        with_config(model, attention=text(policy="max_over_tokens", top_k=1, **more)), prompts,
        max_new_tokens=6, forward=place_landmarks(forward, MARK, BLOCK),
    )  # fmt: skip
    np.testing.assert_array_equal(run(offload="true"), run())


def test_generation_goes_on_with_landmarks(model):
    prompts = [TOKENS[0, :13].tolist(), TOKENS[1, :9].tolist()]
    placed = place_landmarks(forward, MARK, BLOCK)
    out = np.asarray(jh.generate(model, prompts, max_new_tokens=6, forward=placed))
    for row, begin in ((0, 0), (1, 4)):
        found = out[row, begin:]
        np.testing.assert_array_equal(np.flatnonzero(found == MARK), np.arange(3, len(found), 4))
        fixed = np.pad(found, (0, LENGTH - len(found)), constant_values=1)
        logits = np.array(forward(model, np.stack([fixed] * 2)).logits[0])
        for at in range(13 - begin, 19 - begin):
            if at % 4 != 3:
                assert logits[at - 1, :MARK].argmax() == found[at]
    text = strip_landmarks(out[0], MARK)
    np.testing.assert_array_equal(insert_landmarks(text, BLOCK, MARK)[:19], out[0])


def test_no_landmark_is_said(model, whole):
    quiet = place_landmarks(forward, MARK)(model, TOKENS).logits
    np.testing.assert_array_equal(quiet[..., :MARK], whole[..., :MARK])
    assert (jax.nn.softmax(quiet)[..., MARK] == 0).all()


def test_which_landmarks_a_model_takes():
    assert landmarks_of(CONFIG) == Landmarks(BLOCK, MARK)
    assert landmarks_of(ModelConfig()) is None
    both = f"{text(token=5)}+dense+{text(token=5, top_k=2)}"
    assert landmarks_of(ModelConfig(attention=both)) == Landmarks(BLOCK, 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": text(block=0)}, "block_size=0 must be at least 1"),
        ({"attention": text(top_k=0)}, "top_k=0 must be at least 1"),
        ({"attention": text(blocks=0)}, "blocks=0 must be at least 1"),
        ({"attention": text(policy="best")}, "'best'"),
        ({"attention": text(offload="true")}, "take policy='max_over_tokens'"),
        ({"attention": text(token=400)}, "token=400 is outside the vocabulary of 384"),
        ({"attention": f"{text()}+{text(block=4)}"}, "different landmarks"),
        ({"attention": "landmark(block=50)", "max_positions": 256}, "reach position 559"),
        ({"attention": text(), "positions": "learned"}, "needs a model with rotary positions"),
        ({"attention": text(), "window": (4,)}, "sliding window of 4 tokens"),
    ],
)
def test_models_it_cannot_serve(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)


def test_what_it_refuses(model):
    with pytest.raises(NotImplementedError, match="cannot honour a soft cap"):
        forward(with_config(model, attn_soft_cap=5.0), TOKENS)
    with pytest.raises(NotImplementedError, match="implementation='blocked'"):
        forward(with_config(model, implementation="blocked"), TOKENS)
    with pytest.raises(ValueError, match="is no token id"):
        place_landmarks(forward, -1)


@pytest.mark.slow
def test_random_blocks_are_a_control(model):
    run = functools.partial(forward, tokens=TOKENS)
    logits = [
        run(with_config(model, attention=text(top_k=1, at_random=at_random)),
            cache=init_cache(CONFIG, 2, LENGTH)).logits
        for at_random in ("true", "false")
    ]  # fmt: skip
    assert not np.allclose(*logits, atol=1e-3)
