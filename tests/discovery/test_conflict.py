"""Who wins a conflict, counted by hand; scores of heads against the runs that define them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxheads as jh
from jaxheads import parallel
from jaxheads.decoding import context_aware_logits
from jaxheads.discovery import (
    conflict_rates,
    conflict_scores,
    rates,
    search_alpha,
    select,
    sweep_rates,
)
from jaxheads.discovery.conflict import RHOS
from jaxheads.interventions import fold_pruned, prune_heads, scale_heads
from jaxheads.models import forward, init_cache
from jaxheads.taps import Edit, intervene, record
from tests.configs import CONFIGS, model_of, tokens_of
from tests.discovery.literal import path_scores, put_at

BATCH, LENGTH = 3, 5
MEM, CTX = [5, 6, 7], [8, 9, 10]
L, H = CONFIGS["gpt2"].num_layers, CONFIGS["gpt2"].num_heads
ROWS = np.arange(BATCH)
slow = pytest.mark.slow
WHERE = jnp.broadcast_to(jnp.arange(LENGTH) == LENGTH - 1, (BATCH, LENGTH))


def case(name):
    """(model, clean tokens, corrupt tokens)"""
    return model_of(name), *(tokens_of(name, BATCH, LENGTH, seed=n) for n in (3, 4))


def gap(logits, weights=(1.0, 1.0)):
    """[B]: p(memory) weights[0] - p(context) weights[1]."""
    p = jax.nn.softmax(logits[:, -1])
    return p[ROWS, jnp.array(MEM)] * weights[0] - p[ROWS, jnp.array(CTX)] * weights[1]


@pytest.mark.slow
def test_split_over_devices_nothing_changes():
    model, clean, corrupt = case("llama")
    gates = np.random.default_rng(0).normal(1, 2, (3, L, H)).astype(np.float32)
    rows = slice(0, 2)
    run = lambda model: (
        conflict_scores(forward, model, clean[rows], corrupt[rows], MEM[rows], CTX[rows]),
        *rates(forward, model, clean[rows], MEM[rows], CTX[rows], gates=gates),
    )
    want = run(model)
    mesh = parallel.make_mesh("data:2,model:2")
    with jax.set_mesh(mesh):
        got = run(parallel.shard(model, mesh))
    for a, b in zip(got, want):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_the_score_is_that_of_a_forward_with_everything_else_frozen(name):
    model, clean, corrupt = case(name)
    frozen = dict(receivers="logits", where=WHERE, freeze_mlps=True)
    want = -path_scores(model, clean, corrupt, gap, **frozen)
    got = conflict_scores(forward, model, clean, corrupt, MEM, CTX)
    assert float(jnp.abs(want).max()) > 1e-3
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.slow
def test_relative_scores_logits_and_the_other_group():
    model, clean, corrupt = case("llama")
    frozen = dict(receivers="logits", where=WHERE, freeze_mlps=True)
    score = partial(conflict_scores, forward, model, clean, corrupt)
    p = jax.nn.softmax(forward(model, clean).logits[:, -1])
    weights = (1 / p[ROWS, jnp.array(MEM)], 1 / p[ROWS, jnp.array(CTX)])
    want = -path_scores(model, clean, corrupt, partial(gap, weights=weights), **frozen)
    np.testing.assert_allclose(score(MEM, CTX, relative=True), want, rtol=1e-4, atol=1e-5)
    at = lambda logits: logits[ROWS, -1, jnp.array(MEM)] - logits[ROWS, -1, jnp.array(CTX)]
    want = -path_scores(model, clean, corrupt, at, **frozen)
    np.testing.assert_allclose(score(MEM, CTX, quantity="logit"), want, atol=1e-5)
    memory, context = score(MEM, CTX), score(CTX, MEM)
    np.testing.assert_allclose(context, -memory, atol=1e-7)
    np.testing.assert_array_equal(select(memory, 0.2, "context"), select(context, 0.2, "memory"))


@pytest.mark.slow
def test_the_total_effect_holds_nothing():
    model, clean, corrupt = case("llama")
    donor = record(forward, "z")(model, corrupt).seen["z"]
    base, want = gap(forward(model, clean).logits).mean(), np.zeros((L, H))
    for layer, head in np.ndindex(L, H):
        where = WHERE[:, :, None, None] & (jnp.arange(H) == head)[:, None]
        edited = intervene(forward, Edit("z", put_at, (where, donor[layer]), layer=layer))
        want[layer, head] = base - gap(edited(model, clean).logits).mean()
    got = conflict_scores(forward, model, clean, corrupt, MEM, CTX, effect="total")
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_nothing_changes_where_both_prompts_are_the_same():
    model, clean, _ = case("llama")
    got = conflict_scores(forward, model, clean, clean, MEM, CTX)
    np.testing.assert_allclose(got, 0, atol=1e-7)


def test_a_pruning_rate_is_a_share_of_all_heads_with_positive_scores():
    scores = np.array([[0.3, -0.4, 0.2, 0.0], [-0.1, 0.1, -0.2, -0.3]])
    heads = lambda *args: jh.heads.from_mask(select(scores, *args))
    assert heads(0.01, "memory") == [(0, 0)]  # never none
    assert heads(0.25, "memory") == [(0, 0), (0, 2)]
    assert heads(0.9, "memory") == [(0, 0), (0, 2), (1, 1)]  # a score of 0 is not positive
    assert heads(0.25, "context") == [(0, 1), (1, 3)]


@pytest.fixture(scope="module")
def answers():
    """A GQA model, prompts, and answers of which some are the most likely token."""
    model, clean, _ = case("llama")
    top = np.asarray(forward(model, clean).logits[:, -1].argmax(-1))
    mem, ctx = np.array([top[0], 1, 2]), np.array([3, top[1], 4])
    return model, clean, mem, ctx


def count(logits, mem, ctx):
    top = np.asarray(logits[:, -1]).argmax(-1)
    return [np.mean(top == mem), np.mean(top == ctx), np.mean((top != mem) & (top != ctx))]


def test_rates_count_the_next_token(answers):
    model, tokens, mem, ctx = answers
    want = [1 / 3] * 3
    np.testing.assert_allclose(rates(forward, model, tokens, mem, ctx), want)
    np.testing.assert_allclose(conflict_rates(jh.generate, model, tokens, mem, ctx), want)
    with pytest.warns(UserWarning, match=r"only the first token .* prompts \[1\]"):
        lists = [[int(n)] for n in mem]
        lists[1] += [7]
        got = conflict_rates(jh.generate, model, tokens, lists, ctx)
    np.testing.assert_allclose(got, want)


def test_every_edit_of_a_sweep_is_its_own_forward(answers):
    model, tokens, mem, ctx = answers
    gates = np.random.default_rng(0).normal(1, 2, (5, L, H)).astype(np.float32)
    gates[0] = 1
    gates[1, :2] = 1  # starts at the last layer
    want = [count(scale_heads(forward, g)(model, tokens).logits, mem, ctx) for g in gates]
    got = rates(forward, model, tokens, mem, ctx, gates=gates)
    np.testing.assert_allclose(np.stack(got, 1), want)
    assert len(np.unique(want, axis=0)) > 1
    whole = rates(scale_heads(forward, np.ones((L, H))), model, tokens, mem, ctx, gates=gates)
    np.testing.assert_allclose(np.stack(whole, 1), want)


def test_a_search_is_one_program_and_names_the_best(answers):
    model, tokens, mem, ctx = answers
    traces = []

    def counted(model, tokens, **kwargs):
        traces.append(1)
        return forward(model, tokens, **kwargs)

    search = partial(search_alpha, counted, model, tokens, mem, ctx)
    search([(0, 1), (2, 3)], (1, 3, -20))
    before = len(traces)
    table = search([(2, 1), (2, 0)], (1, -20, 30))
    assert len(traces) == before
    assert table.rates.mem.shape == (2, 3)
    np.testing.assert_allclose(sum(table.rates), 1)
    best = table.best("context")
    assert best.rates.ctx == table.rates.ctx.max()
    assert best.head in table.heads
    assert table.best("context", [(2, 0)]).head == (2, 0)
    level = table._replace(rates=type(table.rates)(*(np.full((2, 3), 1 / 3),) * 3))
    assert level.best("memory").alpha == 1  # the mildest of equals


def test_a_rate_sweep_prunes_what_select_takes(answers):
    model, tokens, mem, ctx = answers
    scores = np.random.default_rng(1).normal(size=(L, H))
    got = sweep_rates(forward, model, tokens, mem, ctx, scores, group="memory", rhos=(0.05, 0.3))
    for n, rho in enumerate(got.rhos):
        mask = select(scores, rho, "memory")
        np.testing.assert_array_equal(got.masks[n], mask)
        want = count(prune_heads(forward, ~mask)(model, tokens).logits, mem, ctx)
        np.testing.assert_allclose([x[n] for x in got.rates], want)
    assert got.best("memory") == int(np.argmax(got.rates.mem))
    assert RHOS[0] == 0.01


@pytest.mark.parametrize(
    "name", [pytest.param("gpt2", marks=slow), pytest.param("neox", marks=slow), "llama"]
)
def test_pruning_is_folding_in_prefill_and_decode(name):
    model, tokens, _ = case(name)
    keep = np.ones((L, H), bool)
    keep[1, 2] = keep[2, 0] = False
    folded = fold_pruned(model, keep)

    def both(fwd, model):
        cache = init_cache(model.cfg, BATCH, LENGTH)
        out = fwd(model, tokens[:, :-1], cache=cache)
        return out.logits, fwd(model, tokens[:, -1:], cache=out.cache).logits

    for got, want in zip(both(prune_heads(forward, keep), model), both(forward, folded)):
        np.testing.assert_allclose(got, want, atol=1e-5)
    whole, plain = (f(model, tokens).logits for f in (prune_heads(forward, keep | True), forward))
    np.testing.assert_array_equal(whole, plain)
    assert not np.allclose(forward(folded, tokens).logits, plain, atol=1e-3)


def test_context_aware_decoding_weighs_two_runs():
    a, b = np.array([1.0, 2.0]), np.array([0.0, 4.0])
    np.testing.assert_array_equal(context_aware_logits(a, b, 0.0), a)
    np.testing.assert_array_equal(context_aware_logits(a, b, -1.0), b)
    np.testing.assert_allclose(context_aware_logits(a, b, 0.5), [1.5, 1.0])
    with pytest.raises(ValueError, match="shapes"):
        context_aware_logits(a, b[:1], 0.5)


SCORES = np.array([[1.0, -1.0]])
CLEAN = np.zeros((BATCH, LENGTH), np.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: conflict_scores(forward, m, CLEAN, CLEAN, MEM, MEM), "same first token"),
        (lambda m: conflict_scores(forward, m, CLEAN, CLEAN[:, 1:], MEM, CTX), "equal length"),
        (lambda m: conflict_scores(forward, m, CLEAN, CLEAN, MEM, [8, 9, 99]), "99 is outside"),
        (
            lambda m: conflict_scores(
                forward, m, CLEAN, CLEAN, MEM, CTX, quantity="logit", relative=True
            ),
            "relative",
        ),
        (
            lambda m: conflict_scores(forward, m, CLEAN, CLEAN, MEM, CTX, effect="all"),
            "effect='all'",
        ),
        (lambda m: select(SCORES, 5), "between 0 and 1. For 5 % write 0.05"),
        (lambda m: select(SCORES, 0), "between 0 and 1"),
        (lambda m: select(SCORES, 1.0), "between 0 and 1"),
        (lambda m: select(-np.ones((1, 2)), 0.5), "nothing to prune"),
        (lambda m: select(SCORES, 0.5, "both"), "'memory' or 'context'"),
        (lambda m: select(SCORES * np.nan, 0.5), "NaN"),
        (lambda m: prune_heads(forward, np.ones((L, 2)))(m, CLEAN), "repeat each column 2"),
        (lambda m: rates(forward, m, CLEAN, MEM, CTX, gates=np.ones((1, L, 1))), r"\[3, 4\]"),
        (lambda m: rates(forward, m, CLEAN, MEM, CTX, gates=np.ones((L, H))), r"\[N,L,H\]"),
        (
            lambda m: search_alpha(forward, m, CLEAN, MEM, CTX, [(0, 1)], [np.nan]),
            "finite factors",
        ),
        (lambda m: search_alpha(forward, m, CLEAN, MEM, CTX, [(0, 4)]), "0.4 is out of range"),
        (lambda m: conflict_rates(jh.generate, m, CLEAN, [[], [1], [2]], CTX), "without tokens"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(model_of("llama"))
