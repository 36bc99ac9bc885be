"""Sets of heads edited together: against single heads, and against a set edited by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxheads as jh
from jaxheads.discovery import logit_difference, sweep_heads
from jaxheads.discovery.sets import edit_sets, read_metric
from tests.tiny import tiny_model

L, H, K, B, T = 2, 4, 2, 3, 6
CFG = jh.ModelConfig(
    vocab_size=32, num_layers=L, model_dim=16, num_heads=H, num_kv_heads=K, mlp_dim=16
)
MODEL = tiny_model(CFG)
RNG = np.random.default_rng(0)
SEGMENTS = np.array([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
BATCH, DONOR = ({"tokens": RNG.integers(0, 32, (B, T)), "segment_ids": SEGMENTS} for _ in range(2))
METRIC = logit_difference([3, 4, 5], [6, 7, 8], positions=SEGMENTS.sum(1) - 1)


def single(count):
    return np.eye(L * count, dtype=np.float32).reshape(-1, L, count)


@pytest.mark.parametrize(
    ("edit", "site"),
    [("patch", "z"), ("zero", "z"), ("mean", "z"), ("resample", "z"), ("patch", "v")],
)
def test_one_head_at_a_time_is_a_sweep(edit, site):
    count = K if site == "v" else H
    donor = DONOR if edit in ("patch", "mean") else None
    common = {"edit": edit, "donor": donor, "site": site}
    want = sweep_heads(jh.forward, MODEL, BATCH, metric=METRIC, per_example=True, **common)
    got = edit_sets(jh.forward, MODEL, BATCH, single(count), METRIC, set_batch=3, **common)
    assert got.shape == (L * count, B) and want.shape == (L, count, B)
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=2e-5)
    mean = sweep_heads(jh.forward, MODEL, BATCH, metric=METRIC, **common)
    np.testing.assert_allclose(mean, want.mean(-1), atol=1e-5)


def test_sets_are_edited_together_at_the_positions_asked():
    masks = np.zeros((2, L, H), np.float32)
    masks[0, 0, 1] = masks[0, 1, 2] = masks[1, 0, 0] = 1
    slots = SEGMENTS.sum(1)[:, None] - 1
    got = edit_sets(
        jh.forward, MODEL, BATCH, masks, METRIC, edit="patch", donor=DONOR, positions=slots
    )
    z = jh.record(jh.forward, "z")(MODEL, **DONOR).seen["z"]
    for mask, value in zip(masks, got):
        edited = jh.intervene(jh.forward, jh.Edit("z", _replace, (jnp.asarray(mask), z)))
        want = [METRIC(edited(MODEL, **BATCH).logits)[b] for b in range(B)]
        assert np.abs(np.asarray(want) - value).max() < 2e-5
    base = read_metric(jh.forward, MODEL, BATCH, METRIC)
    np.testing.assert_allclose(base, METRIC(jh.forward(MODEL, **BATCH).logits), atol=1e-5)


def _replace(value, payload, ctx):
    """z of the chosen heads from the donor, at the last token of each prompt."""
    mask, donor = payload
    last = jnp.arange(T) == (SEGMENTS.sum(1) - 1)[:, None]
    pick = last[:, :, None, None] & (mask != 0)[:, None]
    return jnp.where(pick, donor, value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": "swap"}, "'swap' is not one of zero, mean, resample, patch"),
        ({"edit": "patch"}, "edit='patch' needs donor"),
        ({"edit": "zero", "donor": DONOR}, "edit='zero' takes no donor"),
    ],
)
def test_bad_edits(options, message):
    with pytest.raises(ValueError, match=message):
        edit_sets(jh.forward, MODEL, BATCH, single(H), METRIC, **options)


def _negate(value, payload, ctx):
    return -value


def test_edits_of_the_logits_count():
    forward = jh.intervene(jh.forward, jh.Edit("logits", _negate))
    options = {"edit": "zero", "set_batch": 2}
    plain = edit_sets(jh.forward, MODEL, BATCH, single(H)[:2], METRIC, **options)
    assert np.abs(plain).min() > 1e-4
    got = edit_sets(forward, MODEL, BATCH, single(H)[:2], METRIC, **options)
    np.testing.assert_allclose(got, -plain, atol=2e-5)
    clean = read_metric(jh.forward, MODEL, BATCH, METRIC)
    np.testing.assert_allclose(read_metric(forward, MODEL, BATCH, METRIC), -clean, atol=2e-5)
