"""The GRU against a loop; every pooling ignores padding; gates act on heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads.attention.low_rank_pool import KINDS
from jaxheads.models.text_pool import BiGRU, PoolingClassifier, PoolingConfig

LENGTHS = jnp.asarray([5, 2, 4])


def config(pool, **changes):
    size = dict(vocab_size=9, num_classes=3, embed_dim=4, gru_hidden=2, num_heads=2, mlp_dim=5)
    return PoolingConfig(pool=pool, **{**size, **changes})


def by_hand(gru, tokens):
    """States of one text, float64."""
    w, b, w_h, b_h = (
        np.asarray(p[...], float) for p in (gru.w_in, gru.b_in, gru.w_state, gru.b_state)
    )
    h, states = np.zeros(b.shape[1]), []
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    for x in np.asarray(tokens, float):
        i, s = (np.einsum("e,egh->gh", x, w) + b), (np.einsum("k,kgh->gh", h, w_h) + b_h)
        r, z = sigmoid(i[0] + s[0]), sigmoid(i[1] + s[1])
        h = (1 - z) * np.tanh(i[2] + r * s[2]) + z * h
        states.append(h)
    return np.asarray(states)


def test_gru_equals_a_loop_both_ways():
    gru = BiGRU(4, 3, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    states = np.asarray(jax.jit(gru.__call__)(x, LENGTHS))
    for text, length, found in zip(x, np.asarray(LENGTHS), states, strict=True):
        forth, back = by_hand(gru.forth, text[:length]), by_hand(gru.back, text[:length][::-1])
        wanted = np.concatenate([forth, back[::-1]], axis=-1)
        np.testing.assert_allclose(found[:length], wanted, atol=1e-6)
        assert (found[length:] == 0).all()


@pytest.mark.parametrize("pool", KINDS)
def test_padding_and_gates(pool):
    model = PoolingClassifier(config(pool, logit_scale=None), rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 9, (3, 8))
    other = np.where(np.arange(8) < LENGTHS[:, None], tokens, (tokens + 1) % 9)
    run = jax.jit(lambda m, t, g: m.run(t, LENGTHS, head_gates=g))
    summaries = model.cfg.num_summaries
    out = run(model, tokens, jnp.ones(summaries))
    np.testing.assert_allclose(run(model, other, jnp.ones(summaries)).logits, out.logits, atol=1e-6)
    assert out.summaries.shape == (3, summaries, 4)
    if out.weights is not None:
        np.testing.assert_allclose(out.weights.sum(-1), 1, atol=1e-6)
    off = run(model, tokens, jnp.arange(summaries))
    assert (off.summaries[:, 0] == 0).all() and abs(off.logits - out.logits).max() > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "lamma"}, "unknown pool 'lamma'; did you mean 'lama'"),
        ({"pool": "lama", "num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"pool": "lama", "logit_scale": -1.0}, "logit_scale=-1.0 must be positive"),
        ({"pool": "transformer", "num_heads": 3}, "num_heads=3 must divide D = 4"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
