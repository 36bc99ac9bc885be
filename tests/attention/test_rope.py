"""Rotary embeddings and ALiBi against transformers, complex numbers and limit cases."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention import RopeConfig, alibi_slopes, inverse_frequencies, rotate

HEAD_DIM = 64
HALF = HEAD_DIM // 2
SHORT = tuple(1.0 + 0.01 * i for i in range(HALF))
LONG = tuple(1.0 + 0.5 * i for i in range(HALF))

# our fields, transformers' rope_parameters, length
SCALINGS = {
    "linear": ({"scaling": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}, None),
    "linear-partial": (
        {"scaling": "linear", "factor": 2.0, "fraction": 0.25},
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25},
        None,
    ),
    "llama3": (
        {"scaling": "llama3", "factor": 8.0, "original_max_positions": 512, "theta": 500000.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
            "rope_theta": 500000.0,
        },
        None,
    ),
    "yarn": (
        {"scaling": "yarn", "factor": 4.0, "original_max_positions": 2048},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        None,
    ),
    "yarn-untruncated": (
        {
            "scaling": "yarn",
            "factor": 32.0,
            "original_max_positions": 4096,
            "truncate": False,
            "theta": 150000.0,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
            "rope_theta": 150000.0,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
        None,
    ),
    "yarn-mscale": (
        {
            "scaling": "yarn",
            "factor": 40.0,
            "original_max_positions": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
        None,
    ),
    "yarn-attention-factor": (
        {"scaling": "yarn", "factor": 4.0, "original_max_positions": 2048, "attention_factor": 1.5},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
            "attention_factor": 1.5,
        },
        None,
    ),
    **{
        f"longrope-{length}": (
            {
                "scaling": "longrope",
                "factor": 32.0,
                "original_max_positions": 4096,
                "short_factor": SHORT,
                "long_factor": LONG,
            },
            {
                "rope_type": "longrope",
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "short_factor": list(SHORT),
                "long_factor": list(LONG),
            },
            length,
        )
        for length in (None, 4096, 4097)
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(name):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ours, theirs, length = SCALINGS[name]
    config = transformers.LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 10000.0, **theirs},
    )
    init = ROPE_INIT_FUNCTIONS[theirs["rope_type"]]
    expected, expected_scaling = init(config, "cpu", seq_len=length)
    inv_freq, scaling = inverse_frequencies(RopeConfig(**ours), HEAD_DIM, length=length)
    assert inv_freq.dtype == np.float32
    np.testing.assert_allclose(inv_freq, expected.numpy(), rtol=1e-6)
    assert scaling == pytest.approx(expected_scaling, rel=1e-12)


def test_unscaled_frequencies_are_the_geometric_series():
    inv_freq, scaling = inverse_frequencies(RopeConfig(theta=100.0), 8)
    expected = [100.0 ** (-2 * i / 8) for i in range(4)]
    np.testing.assert_allclose(inv_freq, expected, rtol=1e-7)
    assert scaling == 1.0


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_rotation_is_multiplication_by_a_unit_complex_number(interleaved, fraction, shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = rng.integers(0, 1000, shape)
    cfg = RopeConfig(fraction=fraction, interleaved=interleaved)
    inv_freq, _ = inverse_frequencies(cfg, 8)
    got = rotate(jnp.asarray(x), jnp.asarray(positions), inv_freq, interleaved=interleaved)

    expected = x.astype(np.float64)
    half = int(8 * fraction) // 2
    for i, frequency in enumerate(np.float64(inv_freq)):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turn = np.exp(1j * np.broadcast_to(positions, (2, 5)) * frequency)[:, :, None]
        turned = (x[..., a] + 1j * x[..., b]) * turn
        expected[..., a], expected[..., b] = turned.real, turned.imag
    # Angles near 1000 carry a float32 rounding of 3e-5.
    np.testing.assert_allclose(got, expected, atol=2e-4)
    np.testing.assert_array_equal(got[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_relative_positions_only(interleaved):
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 4, 1, 16)), jnp.float32) for _ in range(2))
    inv_freq, _ = inverse_frequencies(RopeConfig(), 16)
    turn = lambda x, p: rotate(x, p, inv_freq, interleaved=interleaved, scaling=1.1)
    score = lambda p: jnp.einsum("bthd,bshd->ts", turn(q, p), turn(k, p))
    np.testing.assert_allclose(score(jnp.arange(4)), score(jnp.arange(4) + 7), atol=1e-5)
    np.testing.assert_allclose(
        jnp.diag(score(jnp.arange(4))), 1.21 * (q * k).sum(-1)[0, :, 0], rtol=1e-5
    )


def test_rotation_keeps_the_dtype_and_works_in_float32():
    x = jnp.ones((1, 3, 1, 4), jnp.bfloat16)
    inv_freq, _ = inverse_frequencies(RopeConfig(), 4)
    positions = jnp.array([0, 4097, 70000])
    got = rotate(x, positions, inv_freq, interleaved=False)
    assert got.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), positions, inv_freq, interleaved=False)
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("num_heads", [1, 2, 8, 16, 12, 20, 3])
def test_alibi_slopes(num_heads):
    below = 2 ** math.floor(math.log2(num_heads))
    expected = [2 ** (-8 * (h + 1) / below) for h in range(below)]
    expected += [2 ** (-8 * (2 * h + 1) / (2 * below)) for h in range(num_heads - below)]
    np.testing.assert_allclose(alibi_slopes(num_heads), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"theta": 0.0}, "theta=0.0 must be positive"),
        ({"fraction": 0.0}, r"fraction=0.0 must be in \(0, 1\]"),
        ({"scaling": "ntk"}, "unknown scaling 'ntk'; known: none, linear"),
        ({"factor": -1.0}, "factor=-1.0 must be positive"),
        ({"scaling": "yarn"}, "needs original_max_positions"),
        (
            {"scaling": "llama3", "original_max_positions": 8, "high_freq_factor": 1.0},
            "must be larger than",
        ),
        ({"scaling": "longrope", "original_max_positions": 8}, "short_factor and long_factor"),
    ],
)
def test_bad_config_says_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**fields)


def test_bad_sizes_say_what_is_wrong():
    with pytest.raises(ValueError, match="rotates 3 channels"):
        inverse_frequencies(RopeConfig(), 3)
    cfg = RopeConfig(
        scaling="longrope", original_max_positions=8, short_factor=(1.0,), long_factor=(1.0,)
    )
    with pytest.raises(ValueError, match="short_factor has 1 entries; 2 channel pairs"):
        inverse_frequencies(cfg, 4)


def test_config_is_hashable_and_replaceable():
    cfg = RopeConfig(short_factor=(1.0, 2.0))
    assert hash(cfg) == hash(dataclasses.replace(cfg))
