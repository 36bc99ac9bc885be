"""Ablation: lists and masks of heads, modes, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import heads, models
from jaxheads.interventions import ablate
from jaxheads.models import ModelConfig
from tests.tiny import tiny_model

CFG = ModelConfig(vocab_size=17, num_layers=2, model_dim=16, num_heads=4, mlp_dim=16)
TOKENS = np.arange(10).reshape(2, 5)


@pytest.fixture(scope="module")
def model():
    return tiny_model(CFG, scale=0.2)


@jax.jit
def logits(forward, model):
    return forward(model, TOKENS).logits


@pytest.mark.parametrize("chosen", [[(1, 2), (0, 3)], ["1.2", "0.3"], "0.3,1.2"])
def test_a_list_equals_its_mask(model, chosen):
    want = logits(ablate(models.forward, heads.mask([(0, 3), (1, 2)], 2, 4)), model)
    np.testing.assert_array_equal(logits(ablate(models.forward, chosen), model), want)


def test_lists_of_one_length_share_a_program(model):
    before = logits._cache_size()
    one = logits(ablate(models.forward, [(1, 1)]), model)
    two = logits(ablate(models.forward, [(0, 0)]), model)
    assert logits._cache_size() == before + 1
    assert np.abs(one - two).max() > 1e-5


def test_an_empty_list_changes_nothing(model):
    plain = models.forward(model, TOKENS).logits
    np.testing.assert_array_equal(ablate(models.forward, [])(model, TOKENS).logits, plain)


def test_heads_out_of_range(model):
    forward = ablate(models.forward, [(1, 4)])
    with pytest.raises(ValueError, match=r"head 1\.4 is out of range"):
        forward(model, TOKENS)
    # As an argument of a jitted function the list is traced; then nothing sensible comes out.
    assert np.isnan(logits(forward, model)).all()


def test_resample_never_takes_its_own_row(model):
    z = jnp.arange(5.0)[:, None, None, None] * jnp.ones((5, 2, 1, 3))
    from jaxheads.interventions.ablate import resample_heads

    for seed in range(20):
        out = resample_heads(z, (jnp.ones(1), jax.random.key(seed)), None)
        assert not np.any(out == z)
        assert sorted(np.asarray(out)[:, 0, 0, 0]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "nought"}, "zero, mean, resample"),
        ({"mode": "mean"}, "needs means"),
        ({"mode": "resample"}, "needs key"),
        ({"means": np.zeros((2, 4, 4))}, "takes no means"),
        ({"mode": "mean", "means": np.zeros((2, 4, 4)), "key": 0}, "takes no key"),
    ],
)
def test_modes_say_what_they_need(options, message):
    with pytest.raises(ValueError, match=message):
        ablate(models.forward, [(0, 0)], **options)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (ablate(models.forward, np.zeros((4, 2))), "transposed"),
        (ablate(models.forward, [(0, 0)], mode="mean", means=np.zeros((2, 4, 5))), r"\[2, 4, 4\]"),
    ],
)
def test_what_does_not_fit_the_model(model, forward, message):
    with pytest.raises(ValueError, match=message):
        forward(model, TOKENS)


def test_resample_needs_two_rows(model):
    with pytest.raises(ValueError, match="one row"):
        ablate(models.forward, [(0, 0)], mode="resample", key=jax.random.key(0))(model, TOKENS[:1])


def test_a_head_twice():
    with pytest.raises(ValueError, match="listed twice"):
        ablate(models.forward, [(0, 0), "0.0"])
