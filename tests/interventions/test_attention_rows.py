"""Writing rows of attention, biasing scores and cutting edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import models
from jaxheads.interventions import (
    PatternOverride,
    ScoreBias,
    bias_scores,
    knock_out,
    override_pattern,
    override_rows,
)
from jaxheads.models import ModelConfig, forward, init_cache
from jaxheads.taps import as_tapped, intervene, record
from tests.tiny import tiny_model

L, B, H, T = 2, 2, 4, 6
CFG = ModelConfig(
    vocab_size=17, num_layers=L, model_dim=16, num_heads=H, num_kv_heads=2, mlp_dim=16
)
TOKENS = np.arange(B * T).reshape(B, T)
EVEN = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
ROWS = np.broadcast_to(EVEN, (L, B, H, T, T)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return tiny_model(CFG, scale=0.3)


@jax.jit
def run(fwd, model, **kwargs):
    return fwd(model, TOKENS, **kwargs)


def pattern(fwd, model, **kwargs):
    out = run(record(fwd, "pattern"), model, **kwargs)
    assert np.isfinite(out.logits).all()
    return np.asarray(out.seen["pattern"])


def test_the_last_query_is_the_last_token_that_is_not_padding(model):
    """Row 0 ends with two padded columns."""
    ids = jnp.array([[1, 1, 1, 1, 0, 0], [1] * T])
    fwd = override_rows(forward, ["0.1"], [[0, 2], [3]])
    before, after = (pattern(f, model, segment_ids=ids)[0] for f in (as_tapped(forward), fwd))
    want = before.copy()
    want[0, 1, 3], want[1, 1, 5] = [0.5, 0, 0.5, 0, 0, 0], [0, 0, 0, 1, 0, 0]
    np.testing.assert_allclose(after, want, atol=1e-6)


def test_padded_targets_and_columns(model):
    """A mask, -1, and lists of unequal lengths say the same; so do ways to name the query."""
    fwds = [
        override_rows(forward, [(1, 2)], [[0, 2], [3]]),
        override_rows(forward, [(1, 2)], np.array([[2, 0], [3, -1]])),
        override_rows(
            forward, [(1, 2)], np.array([[2, 0], [3, 0]]), mask=np.arange(4).reshape(2, 2) < 3
        ),
        override_rows(forward, [(1, 2)], [[0, 2], [3]], query=-1),
        override_rows(forward, [(1, 2)], [[0, 2], [3]], query=np.array([5, 5])),
    ]  # fmt: skip
    first, *others = (pattern(f, model) for f in fwds)
    assert first[1, 0, 2, 5, 0] == 0.5
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-6)


def test_a_query_that_loses_every_key_attends_to_nothing(model):
    out = pattern(knock_out(forward, [(0, 1)], queries=3), model)
    assert (out[0, :, 1, 3] == 0).all()
    np.testing.assert_allclose(out[0, :, 1, [0, 1, 2, 4, 5]].sum(-1), 1, atol=1e-6)
    z = run(record(knock_out(forward, [(0, 1)], queries=3), "z"), model).seen["z"]
    assert (np.asarray(z)[0, :, 3, 1] == 0).all()
    grad = jax.grad(lambda b: run(bias_scores(forward, b), model).logits.sum())
    assert np.isfinite(grad(jnp.full((L, 1, 1, 1, T), -jnp.inf))).all()


def test_no_keys_cut_changes_nothing_and_all_but_self_leaves_self(model):
    plain = pattern(as_tapped(forward), model)
    np.testing.assert_allclose(pattern(knock_out(forward, keys=[]), model), plain, atol=1e-6)
    others = ~np.eye(T, dtype=bool)
    bias = np.where(others, -np.inf, 0)[None, None, None].repeat(L, 0)
    np.testing.assert_allclose(
        pattern(bias_scores(forward, bias), model), np.broadcast_to(np.eye(T), plain.shape)
    )


def test_rows_renormalise_over_the_keys_that_remain(model):
    plain = pattern(as_tapped(forward), model).astype(np.float64)
    keys = np.array([[0, 1], [2, 3]])
    out = pattern(knock_out(forward, queries=[-1], keys=keys, layers=[0]), model)
    want = plain[0, :, :, -1].copy()
    for row in range(B):
        want[row][:, keys[row]] = 0
    np.testing.assert_allclose(out[0, :, :, -1], want / want.sum(-1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(out[0, :, :, :-1], plain[0, :, :, :-1], atol=1e-6)


def test_cutting_an_edge_twice_is_cutting_it_once(model):
    once = knock_out(forward, queries=[4], keys=[0, 1])
    twice = bias_scores(knock_out(once, queries=[4], keys=[0, 1]), np.zeros((L, 1, 1, 1, 1)))
    np.testing.assert_allclose(pattern(twice, model), pattern(once, model), atol=1e-6)


def test_ready_made_edits_need_no_wrapper(model):
    """Through plain `intervene`, and inside a cache with columns past their text."""
    mask = np.zeros((L, H, T), bool)
    mask[1, 2, 4] = True
    out = pattern(intervene(forward, PatternOverride(mask, ROWS)), model)
    np.testing.assert_allclose(out[1, :, 2, 4], np.broadcast_to(EVEN[4], (B, T)), atol=1e-6)
    cut = np.zeros((L, 1, 1, T, T), np.float32)
    cut[:, :, :, 5, 0] = -np.inf
    out = pattern(intervene(forward, ScoreBias(cut)), model)
    assert (out[..., 5, 0] == 0).all() and (out[..., 4, 0] > 0).all()
    cache = init_cache(CFG, B, 10)
    longer = pattern(intervene(forward, ScoreBias(cut)), model, cache=cache)
    np.testing.assert_allclose(longer[..., :T], out, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: override_pattern(forward, [(0, 1)], 0.5 * ROWS), r"head 1, query 0\] sums to 0.5"),
        (lambda: override_pattern(forward, None, ROWS[0]), r"needed \[L,B,H,T,S\]"),
        (lambda: override_pattern(forward, [(0, 9)], ROWS), "head 0.9 is out of range"),
        (lambda: override_pattern(forward, [(0, 1)], ROWS[:, :, :, :4]), "4 positions.* has 6"),
        (lambda: override_pattern(forward, [(0, 1)], ROWS[:1]), r"\[L=2,B,H=4,T,S\]"),
        (lambda: override_rows(forward, [(0, 1)], [[1], []]), "row 1 has no target"),
        (lambda: override_rows(forward, [(0, 1)], [[1, 1], [2]]), "lists a target twice"),
        (lambda: override_rows(forward, [(0, 1)], [[1], [6]]), "target 6 is outside the text"),
        (lambda: override_rows(forward, [(0, 1)], [[1], [4]], query=3), "target 4 of row 1 comes"),
        (lambda: override_rows(forward, [(0, 1)], [[1], [2], [3]]), "3 rows; the batch has 2"),
        (lambda: override_rows(forward, [(0, 1)], [[1], [2]], query="first"), "must be 'last'"),
        (lambda: override_rows(forward, [(0, 1)], [[1], [2]], query=7), "query 7 is outside"),
        (lambda: bias_scores(forward, np.zeros((L, T, T))), r"needed \[L,B,H,T,S\]"),
        (lambda: bias_scores(forward, np.zeros((L, 1, 3, T, T))), r"\[L=2,B,H=4,T,S\]"),
        (lambda: bias_scores(forward, np.zeros((L, 1, 1, T, 4))), "4 keys; this call has 6"),
        (lambda: knock_out(forward, keys=9), "position 9 is outside the text"),
        (lambda: knock_out(forward, np.zeros((L, 2))), r"\[2, 4\], layers x query heads"),
        (lambda: intervene(forward, PatternOverride(np.ones((L, H, T)), 2 * ROWS)), "not sum to 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit(model, make, message):
    with pytest.raises(ValueError, match=message):
        make()(model, TOKENS)


def test_the_end_of_a_text_read_through_a_cache(model):
    fwd = override_rows(forward, [(0, 1)], [[1], [2]])
    with pytest.raises(ValueError, match="no end yet"):
        fwd(model, TOKENS, cache=init_cache(CFG, B, 8))


@pytest.mark.parametrize("make", [knock_out, lambda f: override_pattern(f, None, ROWS)])
def test_paths_without_a_pattern_refuse(model, make):
    blocked = models.with_config(model, implementation="blocked")
    with pytest.raises(NotImplementedError, match="never forms"):
        make(forward)(blocked, TOKENS)
