"""The intervention core: what `jaxheads/taps.py` promises."""

from __future__ import annotations

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import parallel, taps
from jaxheads.models import forward, with_config
from jaxheads.taps import SITES, Edit, Tap, Taps, intervene, record, resolve_site, sweep
from tests.configs import CONFIGS, model_of, tokens_of

NAME = "llama"
L, H, K, D = 3, 4, 2, 8


def _multiply(value, gates, ctx):
    del ctx
    return value * gates


def _add(value, amount, ctx):
    del ctx
    return value + amount


def gates_edit(gates):
    """An edit scaling head h of layer l by gates[l, h]."""
    return Edit("z", _multiply, gates[:, None, None, :, None])


def _logits(gates, model=None, **kwargs):
    model = model_of(NAME) if model is None else model
    return intervene(forward, gates_edit(gates))(model, tokens_of(NAME), **kwargs).logits


def random_gates(seed=0, shape=(L, H)):
    """Gates between 0 and 1."""
    return jax.random.uniform(jax.random.key(seed), shape)


def test_gating_heads_equals_scaling_their_output_weights():
    gates, model = random_gates(), model_of(NAME)
    wo = model.layers.attention.wo
    scaled = jax.tree.map(lambda x: x, model)
    scaled.layers.attention.wo = wo.replace(wo[...] * gates[:, :, None, None])
    want = forward(scaled, tokens_of(NAME)).logits
    chex.assert_trees_all_close(_logits(gates), want, atol=1e-5)


def test_edits_apply_in_wrapping_order_and_record_sees_the_result():
    inner = intervene(forward, Edit("z", _add, jnp.ones(L)))
    outer = record(intervene(inner, Edit("z", _multiply, 3 * jnp.ones(L))), "z")
    other = record(intervene(forward, Edit("z", _multiply, jnp.zeros(L))), "z")
    first = outer(model_of(NAME), tokens_of(NAME)).seen["z"][0]
    plain = record(forward, "z")(model_of(NAME), tokens_of(NAME)).seen["z"][0]
    chex.assert_trees_all_close(first, 3 * (plain + 1), atol=1e-5)
    assert (other(model_of(NAME), tokens_of(NAME)).seen["z"] == 0).all()


def test_taps_argument_applies_outside_the_wrapped_edits():
    edits = [Edit("z", _add, jnp.ones(L)), Edit("z", _multiply, 3 * jnp.ones(L))]
    model, tokens = model_of(NAME), tokens_of(NAME)
    split = intervene(forward, edits[0])(model, tokens, taps=Taps(edits[1:]))
    chex.assert_trees_all_close(split.logits, intervene(forward, *edits)(model, tokens).logits)


def test_same_program_with_taps_off(monkeypatch):
    """No edit and no record: the tap calls leave nothing behind in the compiled program."""

    def program():
        # A new function each time, so that nothing traced earlier is reused.
        run = jax.jit(lambda model, tokens: forward(model, tokens).logits)
        jax.clear_caches()
        return run.lower(model_of(NAME), tokens_of(NAME)).compile()

    with_calls = program()
    monkeypatch.setattr(Tap, "__call__", lambda self, site, value: value)
    without = program()
    count = lambda c: len(re.findall(r"^\s+(?:ROOT )?%", c.as_text(), re.M))
    assert count(with_calls) == count(without) > 50
    assert with_calls.cost_analysis()["flops"] == without.cost_analysis()["flops"]
    temp = lambda c: c.memory_analysis().temp_size_in_bytes
    assert temp(with_calls) == temp(without)


def test_jit_compiles_once_for_two_payloads():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(fwd, model, tokens):
        return fwd(model, tokens).logits

    for seed in (0, 1):
        gates = random_gates(seed)
        fwd = intervene(forward, gates_edit(gates))
        out = run(fwd, model_of(NAME), tokens_of(NAME))
        chex.assert_trees_all_close(out, _logits(gates), atol=1e-5)
    assert jnp.abs(_logits(random_gates(0)) - _logits(random_gates(1))).max() > 1e-3


def test_vmap_and_sweep_equal_a_loop():
    gates = random_gates(shape=(5, L, H))
    loop = jnp.stack([_logits(g) for g in gates])
    chex.assert_trees_all_close(jax.jit(jax.vmap(_logits))(gates), loop, atol=1e-5)
    for batch_size in (None, 2, 5):
        chex.assert_trees_all_close(sweep(_logits, gates, batch_size=batch_size), loop, atol=1e-5)


def test_gradient_with_respect_to_a_payload_is_the_finite_difference():
    weights = jax.random.normal(jax.random.key(9), (2, 11, 61))
    metric = jax.jit(lambda g: jnp.sum(_logits(g) * weights))
    gates, direction = random_gates(0), random_gates(1)
    got = jnp.sum(jax.grad(metric)(gates) * direction)
    step = 1e-2
    want = (metric(gates + step * direction) - metric(gates - step * direction)) / (2 * step)
    np.testing.assert_allclose(got, want, rtol=2e-3)


@pytest.mark.parametrize("remat", ["full", "names:z"])
def test_edits_and_records_work_under_rematerialisation(remat):
    model = with_config(model_of(NAME), remat=remat)
    loss = lambda g, m: jnp.square(_logits(g, m)).mean()
    got = jax.jit(jax.grad(loss))(random_gates(), model)
    want = jax.jit(jax.grad(loss))(random_gates(), model_of(NAME))
    chex.assert_trees_all_close(got, want, atol=1e-5)
    seen = jax.jit(record(forward, "z"))(model, tokens_of(NAME)).seen["z"]
    chex.assert_trees_all_close(
        seen, record(forward, "z")(model_of(NAME), tokens_of(NAME)).seen["z"], atol=1e-5
    )


def test_inside_shard_map_payloads_are_arguments():
    mesh = parallel.make_mesh("data:8")
    tokens, gates = tokens_of(NAME, batch=8), random_gates(shape=(L, 8, H))

    def local(model, tokens, gates):  # gates [L,B/8,H]: one set of gates an example
        edit = Edit("z", _multiply, gates[:, :, None, :, None])
        out = record(intervene(forward, edit), "z")(model, tokens)
        return out.logits, out.seen["z"]

    P = jax.P
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("data"), P(None, "data")),
        out_specs=(P("data"), P(None, "data")),
    )  # fmt: skip
    logits, z = jax.jit(run)(model_of(NAME), tokens, gates)
    want, want_z = local(model_of(NAME), tokens, gates)
    np.testing.assert_allclose(np.asarray(logits), np.asarray(want), atol=1e-5)
    np.testing.assert_allclose(np.asarray(z), np.asarray(want_z), atol=1e-5)


@pytest.mark.parametrize("spec", ["model:2", "data:2,fsdp:2,model:2"])
def test_on_a_mesh_head_indices_are_global(spec):
    mesh = parallel.make_mesh(spec)
    model = parallel.shard(model_of(NAME), mesh)
    gates = jnp.ones((L, H)).at[1, 3].set(0.0)
    tokens = jnp.tile(tokens_of(NAME), (4, 1))
    run = jax.jit(lambda g, m: intervene(forward, gates_edit(g))(m, tokens).logits)
    with jax.set_mesh(mesh):
        got = run(gates, model)
    np.testing.assert_allclose(
        np.asarray(got[:2]), np.asarray(_logits(gates)), atol=1e-5, rtol=1e-5
    )


def test_an_alias_with_a_layer_acts_on_that_layer_only():
    zero = Edit("blocks.1.attn.hook_z", _multiply, jnp.zeros(()))
    gates = jnp.ones((L, H)).at[1].set(0.0)
    got = intervene(forward, zero)(model_of(NAME), tokens_of(NAME)).logits
    chex.assert_trees_all_close(got, _logits(gates), atol=1e-5)
    out = record(forward, "z", "blocks.1.attn.hook_z")(model_of(NAME), tokens_of(NAME))
    chex.assert_trees_all_equal(out.seen["blocks.1.attn.hook_z"], out.seen["z"][1])


def test_the_layer_of_an_edit_is_data():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(layer):
        edit = Edit("z", _multiply, jnp.zeros(()), layer=layer)
        return intervene(forward, edit)(model_of(NAME), tokens_of(NAME)).logits

    for layer in range(L):
        want = _logits(jnp.ones((L, H)).at[layer].set(0.0))
        chex.assert_trees_all_close(run(jnp.int32(layer)), want, atol=1e-5)


def test_reduce_runs_inside_the_layer():
    fwd = record(forward, "pattern", "z", reduce={"pattern": _entropy})
    out = jax.jit(fwd)(model_of(NAME), tokens_of(NAME, length=13))
    assert out.seen["pattern"].shape == (L, 2, H, 13)
    assert out.seen["z"].shape == (L, 2, 13, H, D)
    text = jax.jit(fwd).lower(model_of(NAME), tokens_of(NAME, length=13)).compile().as_text()
    assert "f32[3,2,4,13,13]" not in text


def _entropy(pattern):
    return -jnp.sum(jax.scipy.special.xlogy(pattern, pattern), -1)


ALIASES = {
    "blocks.9.attn.hook_z": ("z", 9),
    "blocks.0.hook_resid_pre": ("resid_pre", 0),
    "blocks.2.ln1.hook_scale": ("ln1_scale", 2),
    "blocks.2.attn.hook_rot_k": ("k_rot", 2),
    "blocks.2.attn.hook_result": ("head_out", 2),
    "ln_final.hook_normalized": ("final_norm_out", None),
    "hook_embed": ("embed", None),
    "attn.probs": ("pattern", None),
    "mlp.hook_post": ("mlp_post", None),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases(alias):
    assert resolve_site(alias) == ALIASES[alias]


def test_every_site_is_its_own_alias():
    assert [resolve_site(s) for s in SITES] == [(s, None) for s in SITES]


def _run(*edits, name=NAME, records=(), **config):
    model = with_config(model_of(name), **config)
    fwd = intervene(forward, *edits)
    fwd = record(fwd, *records) if records else fwd
    return fwd(model, tokens_of(name))


def _transpose(value, payload, ctx):
    del payload, ctx
    return value.swapaxes(1, 2)


def _to_half(value, payload, ctx):
    del payload, ctx
    return value.astype(jnp.bfloat16)


BAD = {
    "unknown site": (lambda: record(forward, "patern"), "did you mean 'pattern'"),
    "unknown alias": (lambda: Edit("blocks.1.attn.hook_zz", _add), "unknown site"),
    "outer site of a layer": (lambda: Edit("blocks.1.embed", _add), "unknown site"),
    "site the model lacks": (
        lambda: _run(name="neox", records=("resid_mid",)),
        "gpt_neox decoder has no site 'resid_mid'",
    ),
    "no learned positions": (lambda: _run(records=("pos_embed",)), "no site 'pos_embed'"),
    "no rotation": (lambda: _run(name="gpt2", records=("q_rot",)), "no site 'q_rot'"),
    "payload without layers": (
        lambda: _run(Edit("z", _multiply, jnp.ones((H, 1)))),
        r"must lead with the layer axis, \[3, ...\]",
    ),
    "scalar payload": (lambda: _run(Edit("z", _multiply, 1.0)), "lead with the layer axis"),
    "changed shape": (lambda: _run(Edit("z", _transpose)), "must keep shape and dtype"),
    "changed dtype": (lambda: _run(Edit("z", _to_half)), "must keep shape and dtype"),
    "layer out of range": (
        lambda: _run(Edit("blocks.3.attn.hook_z", _multiply, jnp.ones(()))),
        "layer 3 of site 'z' is out of range",
    ),
    "layer given twice": (
        lambda: Edit("blocks.1.attn.hook_z", _multiply, jnp.ones(()), layer=2),
        "names a layer and layer=2",
    ),
    "read-only site": (lambda: Edit("lse", _add, jnp.ones(L)), "read-only"),
    "recorded twice": (lambda: record(record(forward, "z"), "z"), "recorded twice"),
    "nothing to record": (lambda: record(forward), "at least one site"),
    "sweep of unequal axes": (
        lambda: sweep(lambda x: x, (jnp.ones(3), jnp.ones(4))),
        "sharing their leading axis",
    ),
    "sweep of scalars": (lambda: sweep(lambda x: x, 1.0), "sharing their leading axis"),
    "empty chunk": (lambda: sweep(lambda x: x, jnp.ones(3), batch_size=0), "at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_site_the_implementation_never_forms_is_an_error():
    with pytest.raises(NotImplementedError, match="pattern"):
        _run(records=("pattern",), implementation="blocked")
    assert _run(records=("lse",), implementation="blocked").seen["lse"].shape == (L, 2, H, 11)


def test_auto_forms_the_pattern_when_it_is_wanted():
    out = _run(records=("pattern",), implementation="auto")
    assert out.seen["pattern"].shape == (L, 2, H, 11, 11)


def test_remat_names_only_sites_of_the_stack():
    with pytest.raises(ValueError, match="outside the layer stack"):
        with_config(model_of(NAME), remat="names:logits")


def test_an_unreached_site_is_named():
    tap = Tap(Taps(record=(taps.Record("scores"),)))
    tap("z", jnp.ones(2))
    with pytest.raises(NotImplementedError, match="never formed the site 'scores'"):
        tap.finish("this kernel")


def test_configs_agree_with_the_constants_of_this_file():
    cfg = CONFIGS[NAME]
    assert (cfg.num_layers, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim) == (L, H, K, D)
