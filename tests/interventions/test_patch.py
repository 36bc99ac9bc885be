"""Patching: values of one run in another, at heads, layers and positions, with a cache too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.interventions import patch
from jaxheads.models import forward, init_cache, sites
from jaxheads.taps import OUTER_SITES, READ_ONLY, record
from tests.configs import CONFIGS, model_of, tokens_of

NAMES = ["gpt2", "neox", "llama"]
T = 11


@jax.jit
def run(fwd, model, tokens):
    return fwd(model, tokens)


def clean_and_corrupt(name):
    return model_of(name), tokens_of(name, seed=3), tokens_of(name, seed=4)


def taped(name, tokens, *names, fwd=forward):
    return run(record(fwd, *names), model_of(name), tokens)


@pytest.mark.parametrize("name", NAMES)
def test_patching_a_run_into_itself_changes_nothing(name):
    model, tokens, _ = clean_and_corrupt(name)
    every = [s for s in sites(CONFIGS[name]) if s not in READ_ONLY]
    out = taped(name, tokens, *every)
    fwd = forward
    for site in every:
        fwd = patch(fwd, out, site=site)
    np.testing.assert_allclose(run(fwd, model, tokens).logits, out.logits, atol=5e-6)


@pytest.mark.parametrize("name", NAMES)
def test_patching_everything_gives_the_other_run(name):
    """Embeddings, all heads and all MLPs at all positions."""
    model, clean, corrupt = clean_and_corrupt(name)
    learned = "pos_embed" in sites(CONFIGS[name])
    donor = taped(name, clean, "embed", "z", "mlp_out")
    fwd = patch(patch(patch(forward, donor, site="embed"), donor), donor, site="mlp_out")
    assert learned == (name == "gpt2")
    got = run(fwd, model, corrupt).logits
    np.testing.assert_allclose(got, donor.logits, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_chosen_heads_and_positions_change(name):
    model, clean, corrupt = clean_and_corrupt(name)
    donor, base = taped(name, clean, "z").seen["z"], taped(name, corrupt, "z").seen["z"]
    fwd = record(patch(forward, donor, ["0.1", (0, 3)], positions=[2, -1]), "z")
    got = np.asarray(run(fwd, model, corrupt).seen["z"])[0]
    want = np.array(base[0])
    for t in (2, T - 1):
        want[:, t, [1, 3]] = np.asarray(donor)[0, :, t, [1, 3]].swapaxes(0, 1)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    "positions",
    [
        [1, 4],
        np.array([[1, 4], [1, 4]]),
        np.isin(np.arange(T), [1, 4]),
        np.tile(np.isin(np.arange(T), [1, 4]), (2, 1)),
        [1 - T, 4],
    ],
)
def test_ways_to_say_positions(positions):
    model, clean, corrupt = clean_and_corrupt("llama")
    donor = taped("llama", clean, "resid_pre")
    patched = lambda p: (
        run(patch(forward, donor, site="resid_pre", layers=[1], positions=p), model, corrupt).logits
    )
    np.testing.assert_array_equal(patched(positions), patched(jnp.array([4, 1])))


def test_positions_of_each_row():
    model, clean, corrupt = clean_and_corrupt("llama")
    donor = taped("llama", clean, "attn_out")
    fwd = lambda p: record(patch(forward, donor, site="attn_out", positions=p), "attn_out")
    got = run(fwd(np.array([[2], [5]])), model, corrupt).seen["attn_out"][0]
    for row, t in enumerate((2, 5)):
        one = run(fwd(t), model, corrupt).seen["attn_out"][0]
        np.testing.assert_allclose(got[row], one[row], atol=1e-6)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "mlp_out"])
def test_layers(site):
    model, clean, corrupt = clean_and_corrupt("gpt2")
    donor = taped("gpt2", clean, site)
    one = run(patch(forward, donor, site=site, layers=1), model, corrupt).logits
    for same in ([1], np.array([False, True, False]), jnp.array([0.0, 1.0, 0.0])):
        out = run(patch(forward, donor, site=site, layers=same), model, corrupt).logits
        np.testing.assert_array_equal(out, one)
    by_name = run(patch(forward, donor, site=f"blocks.1.hook_{site}"), model, corrupt).logits
    np.testing.assert_array_equal(by_name, one)
    if site == "resid_post":
        whole = run(patch(forward, donor, site=site, layers=2), model, corrupt).logits
        np.testing.assert_allclose(whole, donor.logits, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_with_a_cache(name):
    """Prefill, then single tokens: positions are those of the whole text; the donor is shorter."""
    model, clean, corrupt = clean_and_corrupt(name)
    where = {"q": 0, "v": 0, "resid_pre": 1, "scores": 1, "pattern": 2}
    donor = taped(name, clean[:, :7], *where)
    want_fwd, fwd = forward, forward
    for site, layer in where.items():
        full = donor.seen[site]
        axes = (3, 4) if site in ("pattern", "scores") else (2,)
        # Padded to the whole text, so that the uncached forward can take it.
        widths = [(0, T - 7) if n in axes else (0, 0) for n in range(full.ndim)]
        whole = jnp.pad(full, widths, constant_values=-1e38 if site == "scores" else 0)
        chosen = dict(site=site, layers=[layer], positions=[2, 3, 6])
        want_fwd, fwd = patch(want_fwd, whole, **chosen), patch(fwd, donor, **chosen)
    want = run(want_fwd, model, corrupt).logits
    assert np.abs(want - taped(name, corrupt, "z").logits).max() > 1e-2
    cache, got = init_cache(model.cfg, 2, 16), []
    step = jax.jit(lambda tokens, cache: fwd(model, tokens, cache=cache))
    for start, stop in [(0, 5), *((t, t + 1) for t in range(5, T))]:
        out = step(corrupt[:, start:stop], cache)
        cache = out.cache
        got.append(out.logits)
    np.testing.assert_allclose(jnp.concatenate(got, 1), want, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(site="v", heads=[(0, 3)]), r"query head 3 reads key/value head 1"),
        (dict(site="v", heads=np.zeros((3, 4))), r"\[3, 2\], layers x key/value heads.*query head"),
        (dict(site="resid_pre", heads=[(0, 0)]), "no head axis"),
        (dict(site="q"), r"did not record 'q' \(it holds "),
        (dict(layers=3), "layer 3 is out of range"),
        (dict(layers=np.ones(2, bool)), r"layer mask has shape \(2,\)"),
        (dict(site="embed", layers=1), "outside the layers"),
        (dict(positions=11), "position 11 is outside the text of 11 tokens"),
        (dict(positions=[-12]), "position -12 is outside"),
        (dict(positions=np.zeros((3, 2), int)), "3 rows; the batch has 2"),
        (dict(positions=np.ones(5, bool)), "positions cover 5 positions; .* has 11"),
        (dict(positions=1.5), "dtype float32"),
        (dict(heads=[(0, 4)]), "head 0.4 is out of range"),
        (dict(heads=[(0, 1), "0.1"]), "listed twice"),
        (dict(site="zz"), "unknown site"),
        (dict(site="lse"), "read-only"),
        (dict(site="blocks.1.attn.hook_v", layers=1), "names a layer and"),
    ],
)
def test_what_does_not_fit(options, message):
    model, clean, corrupt = clean_and_corrupt("llama")
    donor = taped("llama", clean, "z", "v", "resid_pre")
    if options.get("site") in ("embed", "lse", "zz"):
        donor = np.zeros((2, T, 32))
    with pytest.raises(ValueError, match=message):
        patch(forward, donor, **options)(model, corrupt)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 2, 9, 4, 8), "cover 9 positions; the text of this call has 11"),
        ((3, 5, T, 4, 8), "5 rows at site 'z'; the batch has 2"),
        ((2, 2, T, 4, 8), r"\[L=3,B,T,H=4,D=8\]"),
        ((2, T, 4, 8), r"\[L=3,B,T,H=4,D=8\]"),
    ],
)
def test_donors_that_do_not_fit(shape, message):
    model, _, corrupt = clean_and_corrupt("gpt2")
    with pytest.raises(ValueError, match=message):
        patch(forward, np.zeros(shape, np.float32))(model, corrupt)


def test_negative_positions_need_an_end():
    model, clean, corrupt = clean_and_corrupt("llama")
    fwd = patch(forward, taped("llama", clean, "z"), positions=-1)
    with pytest.raises(ValueError, match="no end yet"):
        fwd(model, corrupt, cache=init_cache(model.cfg, 2, 16))


def test_traced_positions_outside_the_text_give_nan():
    model, clean, corrupt = clean_and_corrupt("llama")
    fwd = patch(forward, taped("llama", clean, "z"), positions=jnp.array([50]))
    assert np.isnan(run(fwd, model, corrupt).logits).all()


def test_outer_sites_have_no_layer_axis():
    model, clean, corrupt = clean_and_corrupt("llama")
    for site in ("embed", "final_norm_in", "logits"):
        assert site in OUTER_SITES
        donor = taped("llama", clean, site)
        out = run(patch(forward, donor, site=site), model, corrupt).logits
        np.testing.assert_allclose(out, donor.logits, atol=1e-5)
