"""Scaling heads at every site that has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import models
from jaxheads.interventions import scale_heads
from jaxheads.models import ModelConfig
from jaxheads.taps import record
from tests.tiny import tiny_model

L, H, K = 2, 4, 2
CFG = ModelConfig(
    vocab_size=17, num_layers=L, model_dim=16, num_heads=H, num_kv_heads=K, mlp_dim=16
)
TOKENS = np.arange(10).reshape(2, 5)


@pytest.fixture(scope="module")
def model():
    return tiny_model(CFG, scale=0.2)


@pytest.mark.parametrize(
    ("site", "axis", "count"),
    [
        ("z", 2, H),
        ("q", 2, H),
        ("q_rot", 2, H),
        ("head_out", 2, H),
        ("pattern", 1, H),
        ("scores", 1, H),
        ("k", 2, K),
        ("k_rot", 2, K),
        ("v", 2, K),
    ],
)
def test_gates_multiply_their_heads(model, site, axis, count):
    gates = np.random.default_rng(0).uniform(0.5, 2, (L, count)).astype(np.float32)
    forward = record(scale_heads(models.forward, gates, site=site), site)
    after = np.asarray(jax.jit(lambda m: forward(m, TOKENS))(model).seen[site])[0]
    before = np.asarray(record(models.forward, site)(model, TOKENS).seen[site])[0]
    shape = [1] * 4
    shape[axis] = count
    want = before * gates[0].reshape(shape)
    shown = np.abs(before) < 1e30  # masked scores stay masked
    np.testing.assert_allclose(after[shown], want[shown], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("site", "shape", "message"),
    [
        ("v", (L, H), r"\[2, 2\], layers x key/value heads.*query head h reads h // 2"),
        ("z", (L, K), r"\[2, 4\], layers x query heads.*repeat each column 2 times"),
        ("z", (H, L), "transposed"),
        ("z", (L, 1), r"\[2, 4\]"),
        ("z", (L,), r"\[2, 4\]"),
        ("z", (), r"\[2, 4\]"),
    ],
)
def test_gates_that_do_not_fit_are_refused(model, site, shape, message):
    with pytest.raises(ValueError, match=message):
        scale_heads(models.forward, np.ones(shape), site=site)(model, TOKENS)


@pytest.mark.parametrize(
    ("site", "message"),
    [("resid_pre", "has no head axis"), ("zz", "unknown site"), ("lse", "read-only")],
)
def test_sites_without_heads_are_refused(site, message):
    with pytest.raises(ValueError, match=message):
        scale_heads(models.forward, np.ones((L, H)), site=site)


def test_nested_lists_are_gates(model):
    rows = [[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 2.0, 1.0]]
    out = scale_heads(models.forward, rows)(model, TOKENS).logits
    np.testing.assert_array_equal(out, scale_heads(models.forward, np.array(rows, np.float32))(
        model, TOKENS).logits)  # fmt: skip


def test_bfloat16_stays_bfloat16(model):
    model = models.with_config(model, compute_dtype="bfloat16")
    out = record(scale_heads(models.forward, jnp.ones((L, H))), "z")(model, TOKENS)
    assert out.seen["z"].dtype == jnp.bfloat16
