"""Identities of recording and patching on each kind of model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.discovery import activation_patch, logit_difference
from jaxheads.discovery.edges import add
from jaxheads.models import forward
from jaxheads.taps import Edit, intervene, record
from tests.configs import model_of, tokens_of
from tests.discovery.literal import put

MODELS = ("gpt2", "neox", "llama")
BATCH, LENGTH = 2, 6
METRIC = logit_difference([5, 6], [8, 9])


def pair(name):
    """(model, clean tokens, corrupt tokens)"""
    clean, corrupt = (tokens_of(name, BATCH, LENGTH, seed=s) for s in (3, 4))
    return model_of(name), clean, corrupt


@pytest.mark.parametrize("name", MODELS)
def test_heads_add_up_and_rows_sum_to_one(name):
    model, tokens, _ = pair(name)
    sites = ("attn_out", "head_out", "pattern", "z", "v")
    seen = record(forward, *sites)(model, tokens).seen
    bias = model.layers.attention.bo
    bias = 0 if bias is None else bias[...][:, None, None]
    np.testing.assert_allclose(seen["attn_out"], seen["head_out"].sum(3) + bias, atol=1e-5)
    np.testing.assert_allclose(seen["pattern"].sum(-1), 1, atol=1e-5)
    v = jnp.repeat(seen["v"], model.cfg.num_groups, axis=3)
    np.testing.assert_allclose(
        seen["z"], jnp.einsum("lbhts,lbshd->lbthd", seen["pattern"], v), atol=1e-5
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_run_is_what_its_parts_make_it(name):
    model, clean, corrupt = pair(name)
    outer = ("embed", "pos_embed") if name == "gpt2" else ("embed",)
    sites = ("z", "mlp_out", *outer)
    want = record(forward, *sites)(model, clean)
    nothing = [Edit(s, add, jnp.zeros_like(want.seen[s])) for s in sites]
    np.testing.assert_array_equal(intervene(forward, *nothing)(model, clean).logits, want.logits)
    everything = [Edit(s, put, want.seen[s]) for s in sites]
    got = intervene(forward, *everything)(model, corrupt)
    np.testing.assert_allclose(got.logits, want.logits, atol=1e-5)
    heads_alone = intervene(forward, everything[0])(model, corrupt)
    assert not np.allclose(heads_alone.logits, want.logits, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_a_runs_own_values_change_nothing(name):
    model, _, corrupt = pair(name)
    out = record(forward, "z")(model, corrupt)
    got = activation_patch(forward, model, corrupt, out, "z", metric=METRIC)
    np.testing.assert_allclose(got, METRIC(out.logits).mean(), atol=1e-5)


CASES = [
    ("gpt2", "z", None),
    ("llama", "v", "all"),
    ("neox", "z", "last"),
    ("llama", "pattern", None),
    ("neox", "resid_pre", None),
    ("llama", "mlp_out", None),
]


@pytest.mark.parametrize(("name", "site", "positions"), CASES)
def test_every_patch_is_a_run_with_one_value_replaced(name, site, positions):
    model, clean, corrupt = pair(name)
    run = record(forward, site)
    source = run(model, clean)
    held, other = run(model, corrupt).seen[site], source.seen[site]
    got = activation_patch(
        forward, model, corrupt, source, site, positions=positions, metric=METRIC
    )
    slots = slice(LENGTH - 1, None) if positions == "last" else slice(None)
    axis = {"pattern": 2, "z": 3, "v": 3}.get(site, 2)
    assert got.shape == (held.shape[0], held.shape[axis])

    @jax.jit
    def value(payload, layer):
        edited = intervene(forward, Edit(site, put, payload, layer=layer))
        return METRIC(edited(model, corrupt).logits).mean()

    for layer in range(got.shape[0]):
        for n in range(got.shape[1]):
            place = {2: (slice(None), n), 3: (slice(None), slots, n)}[axis]
            want = value(held[layer].at[place].set(other[layer][place]), jnp.int32(layer))
            np.testing.assert_allclose(got[layer, n], want, atol=1e-5)
    assert np.ptp(got) > 1e-3


@pytest.mark.parametrize(
    ("site", "options", "message"),
    [
        ("embed", {}, "no layers"),
        ("patern", {}, "did you mean"),
        ("resid_pre", {"positions": "last"}, "leave out"),
        ("q", {}, "did not record 'q'"),
        ("z", {"positions": 9}, "outside the prompts"),
    ],
)
def test_bad_requests_say_what_to_do(site, options, message):
    model, clean, corrupt = pair("llama")
    source = {s: jnp.zeros((3, BATCH, LENGTH, 32)) for s in ("resid_pre", "z")}
    with pytest.raises(ValueError, match=message):
        activation_patch(forward, model, corrupt, source, site, metric=METRIC, **options)
    with pytest.raises(ValueError, match="has shape"):
        activation_patch(forward, model, clean[:, :3], source, "z", metric=METRIC)
