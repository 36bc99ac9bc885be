"""Ablation: lists and masks of heads, modes, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import heads, models
from jaxheads.interventions import ablate, mean_activation
from jaxheads.interventions.ablate import Ablation, Source, resample_heads
from jaxheads.interventions.places import Place
from jaxheads.models import ModelConfig, init_cache
from jaxheads.taps import TapContext, record
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


def test_resample_never_takes_its_own_row():
    z = jnp.arange(5.0)[:, None, None, None] * jnp.ones((5, 2, 1, 3))
    place = Place("z", jnp.ones(1), None, None)
    for seed in range(20):
        payload = Ablation(place, Source(key=jax.random.key(seed)))
        out = resample_heads(z, payload, TapContext())
        assert not np.any(out == z)
        assert sorted(np.asarray(out)[:, 0, 0, 0]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "nought"}, "zero, mean, resample"),
        ({"donor": np.zeros((2, 2, 5, 4, 4))}, "takes no donor"),
        ({"site": "resid_pre"}, "no head axis"),
        ({"site": "scores"}, "uncover masked keys; ablate 'q'"),
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


def seen(forward, model, site, **kwargs):
    return np.asarray(record(forward, site)(model, TOKENS, **kwargs).seen[site])


def test_position_mean_leaves_padding_out(model):
    ids = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    z = seen(models.forward, model, "z", segment_ids=ids)[0]
    out = seen(ablate(models.forward, [(0, 2)], mode="position_mean"), model, "z", segment_ids=ids)
    want = z.copy()
    want[0, :, 2] = z[0, 2:, 2].astype(np.float64).mean(axis=0)
    want[1, :, 2] = z[1, :, 2].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(out[0], want, atol=1e-6)


def test_head_mean(model):
    for site in ("z", "q", "k", "v", "pattern"):
        before = seen(models.forward, model, site)[0]
        axis = 1 if site == "pattern" else 2
        want = np.moveaxis(before.copy(), axis, 0)
        want[1] = np.moveaxis(before.astype(np.float64), axis, 0).mean(axis=0)
        out = seen(ablate(models.forward, [(0, 1)], mode="head_mean", site=site), model, site)[0]
        np.testing.assert_allclose(np.moveaxis(out, axis, 0), want, atol=1e-6, err_msg=site)


def test_means_of_positions(model):
    means = np.asarray(mean_activation(models.forward, model, TOKENS, per_position=True))
    np.testing.assert_allclose(means, seen(models.forward, model, "z").mean(axis=1), atol=1e-6)
    out = seen(ablate(models.forward, [(0, 1)], mode="mean", means=means, positions=[0, 3]),
               model, "z")[0]  # fmt: skip
    want = seen(models.forward, model, "z")[0].copy()
    for t in (0, 3):
        want[:, t, 1] = means[0, t, 1]
    np.testing.assert_allclose(out, want, atol=1e-6)


def test_resampling_from_another_batch(model):
    other = np.random.default_rng(0).integers(0, 17, (3, 5))
    donor = record(models.forward, "z")(model, other)
    key = jax.random.key(4)
    rows = np.asarray(jax.random.randint(key, (2,), 0, 3))
    drawn = seen(ablate(models.forward, [(0, 1)], mode="resample", donor=donor, key=key),
                 model, "z")[0]  # fmt: skip
    np.testing.assert_allclose(drawn[:, :, 1], donor.seen["z"][0][rows][:, :, 1], atol=1e-6)
    same_row = jax.tree.map(lambda a: a[:, :2], donor.seen)
    out = seen(ablate(models.forward, [(0, 1)], mode="resample", donor=same_row), model, "z")[0]
    np.testing.assert_allclose(out[:, :, 1], donor.seen["z"][0, :2, :, 1], atol=1e-6)
    with pytest.raises(ValueError, match="3 rows at site 'z'; the batch has 2"):
        ablate(models.forward, [(0, 1)], mode="resample", donor=donor)(model, TOKENS)


def test_position_mean_needs_the_whole_text(model):
    forward = ablate(models.forward, [(0, 1)], mode="position_mean")
    with pytest.raises(ValueError, match="has only a piece of it"):
        forward(model, TOKENS, cache=init_cache(CFG, 2, 8))


def test_an_ablated_query_attends_evenly(model):
    pattern = seen(ablate(models.forward, [(0, 1)], site="q"), model, "pattern")[0, :, 1]
    np.testing.assert_allclose(pattern, np.tril(np.ones((2, 5, 5))) / np.arange(1, 6)[:, None],
                               atol=1e-6)  # fmt: skip
