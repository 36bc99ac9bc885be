"""Dense models as mixtures of heads, and edits that read other sites."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import models
from jaxheads.discovery import logit_difference, sweep_heads
from jaxheads.interventions import ablate, to_moh
from jaxheads.models import ModelConfig, init_cache
from jaxheads.taps import Edit, intervene, record
from tests.tiny import tiny_model

L, H = 2, 4
CFG = ModelConfig(
    vocab_size=17, num_layers=L, model_dim=16, num_heads=H, num_kv_heads=2, mlp_dim=16
)
TOKENS = np.arange(10).reshape(2, 5)


@pytest.fixture(scope="module")
def model():
    return tiny_model(CFG, scale=0.4)


@pytest.fixture(scope="module")
def plain(model):
    return record(models.forward, "q", "z")(model, TOKENS)


@pytest.fixture(scope="module")
def moh(model):
    return record(to_moh(models.forward, 1, 1), "z")(model, TOKENS)


def test_each_token_keeps_the_shared_head_and_that_with_the_largest_query(plain, moh):
    q, z = (np.asarray(plain.seen[site][0], np.float64) for site in ("q", "z"))
    best = 1 + np.linalg.norm(q[:, :, 1:], axis=-1).argmax(-1)
    keep = (np.arange(H) == 0) | (np.arange(H) == best[..., None])
    assert len(np.unique(best)) > 1
    np.testing.assert_allclose(moh.seen["z"][0], z * keep[..., None], atol=1e-6)
    assert np.abs(moh.logits - plain.logits).max() > 1e-3


def test_the_model_is_the_same_function_with_a_balance_loss(model, moh):
    converted = to_moh(model, 1, 1)
    assert jax.tree.leaves(converted)[0] is jax.tree.leaves(model)[0]

    @jax.jit
    @jax.value_and_grad
    def balance(model):
        return models.forward(model, TOKENS).aux["moh_balance"]

    out = models.forward(converted, TOKENS)
    np.testing.assert_allclose(out.logits, moh.logits, atol=1e-5)
    value, slope = balance(converted)
    assert 1 <= value == out.aux["moh_balance"] < 3
    assert (np.abs(slope.layers.attention.wq[...]) > 0).any()


def test_every_head_active_changes_nothing(model, plain):
    out = to_moh(models.forward, 1, H - 1)(model, TOKENS)
    np.testing.assert_array_equal(out.logits, plain.logits)


def test_a_cache_changes_nothing(model, moh):
    cache, got = init_cache(CFG, 2, 5), []
    for start, stop in ((0, 4), (4, 5)):
        out = to_moh(models.forward, 1, 1)(model, TOKENS[:, start:stop], cache=cache)
        cache = out.cache
        got.append(out.logits)
    np.testing.assert_allclose(np.concatenate(got, 1), moh.logits, atol=2e-5)


def test_only_straight_through_reaches_heads_that_were_not_selected(model, moh):
    """The gradient at q of a routed head that no token selected."""

    def add(q, payload, ctx):
        return q + payload

    def at_q(shift, through):
        edit = Edit("q", add, shift)
        fwd = to_moh(intervene(models.forward, edit), 1, 1, straight_through=through)
        return jnp.sum(fwd(model, TOKENS).logits[..., 3])

    zeros = jnp.zeros((L, *TOKENS.shape, H, CFG.head_dim))
    both = jax.jit(lambda s: [jax.grad(at_q)(s, through) for through in (True, False)])(zeros)
    through, hard = (np.asarray(g[-1]) for g in both)
    silent = np.asarray(moh.seen["z"][-1] == 0).all(-1)  # [B,T,H]
    assert silent.any() and (hard[silent] == 0).all()
    assert (np.abs(through[silent]).max(-1) > 0).all()


def test_settings_that_are_equal_share_a_program():
    one, other = (jax.tree.structure(to_moh(models.forward, 2, 1)) for _ in range(2))
    assert one == other != jax.tree.structure(to_moh(models.forward, 1, 1))


@pytest.mark.slow
def test_a_sweep_over_converted_heads_equals_whole_forwards(model):
    """Reused layers split what an edit reads as they split its value."""
    options = dict(edit="zero", metric=logit_difference([4, 6], [5, 2]))
    fwd = ablate(to_moh(models.forward, 1, 1), [(0, 0)])
    batch = {"tokens": jnp.asarray(TOKENS)}
    fast = sweep_heads(fwd, model, batch, **options)
    slow = sweep_heads(fwd, model, batch, prefix_reuse=False, **options)
    assert np.std(slow) > 1e-4
    np.testing.assert_allclose(fast, slow, atol=1e-5)


def read_q(z, payload, ctx):
    return z + 0 * ctx.read["q"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: to_moh(m, 5, 1), r"num_shared=5 .*4 heads"),
        (lambda m: to_moh(m, 3, 1), "one routed head"),
        (lambda m: to_moh(m, 1, 4), r"top_k=4 .*3 routed"),
        (lambda m: to_moh(to_moh(m, 1, 1), 1, 1), "only a model with attention='dense'"),
        (lambda m: to_moh(models.forward, 6, 1)(m, TOKENS), r"num_shared=6 .*4 heads"),
        (
            lambda m: intervene(models.forward, Edit("q", read_q, reads=("z",)))(m, TOKENS),
            "reads 'z', which is not formed before it",
        ),
        (
            lambda m: intervene(models.forward, Edit("z", read_q, reads=("mem_q",)))(m, TOKENS),
            "no site 'mem_q'",
        ),
        (lambda m: Edit("z", read_q, reads=("embed",)), "inside the layers reads sites of its"),
        (lambda m: Edit("z", read_q, reads=("qq",)), "unknown site 'qq'"),
    ],
)
def test_bad_input_is_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
