"""A forward resumed in the middle equals the whole one, for every family."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.models import forward, read_out, resume, run_layer, run_layers
from jaxheads.taps import Edit, Taps, intervene, record
from tests.configs import CONFIGS, model_of, tokens_of

configs = pytest.mark.parametrize("config", CONFIGS)
POSITIONS = jnp.array([3, 0, 1, 7, 2, 9, 4, 5, 12, 6, 8])
SEGMENTS = jnp.array([[1] * 4 + [2] * 7, [0] * 3 + [1] * 8])
CONTEXTS = {
    "plain": {},
    "positions": {"positions": POSITIONS},
    "segments": {"segment_ids": SEGMENTS},
}
cases = pytest.mark.parametrize(
    ("config", "context"),
    [
        *(pytest.param(c, CONTEXTS["segments"], id=f"{c}-segments") for c in CONFIGS),
        *(pytest.param(c, CONTEXTS["plain"], id=f"{c}-plain") for c in ("gpt2", "gemma")),
        *(pytest.param(c, CONTEXTS["positions"], id=f"{c}-positions") for c in ("gpt2", "neox")),
    ],
)
close = lambda a, b: chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-5)


def _whole(config, context):
    model = model_of(config)
    wrapped = record(forward, "resid_pre", "resid_post", "final_norm_in")
    return model, wrapped(model, tokens_of(config), **context)


@cases
def test_every_start_gives_the_same_logits(config, context):
    model, whole = _whole(config, context)
    dynamic = jax.jit(lambda model, x, start: resume(model, x, start=start, **context))
    for start in range(CONFIGS[config].num_layers):
        close(dynamic(model, whole.seen["resid_pre"][start], start).logits, whole.logits)
    assert dynamic._cache_size() == 1
    static = jax.jit(lambda model, x: resume(model, x, start=1, **context))
    close(static(model, whole.seen["resid_pre"][1]).logits, whole.logits)
    close(read_out(model, whole.seen["final_norm_in"], **context).hidden, whole.hidden)


@cases
def test_single_layers_and_runs_of_layers(config, context):
    model, whole = _whole(config, context)
    count = CONFIGS[config].num_layers
    one = jax.jit(lambda model, x, n: run_layer(model, x, n, **context).hidden)
    for n in range(count):
        close(one(model, whole.seen["resid_pre"][n], n), whole.seen["resid_post"][n])
    middle = jax.jit(lambda model, x: run_layers(model, x, start=1, stop=count - 1, **context))
    between = middle(model, whole.seen["resid_pre"][1])
    close(between.hidden, whole.seen["resid_post"][count - 2])


@cases
def test_a_layer_read_at_few_slots(config, context):
    model, whole = _whole(config, context)
    reads = jnp.array([[10, 2], [7, 8]])
    last = CONFIGS[config].num_layers - 1
    run = jax.jit(lambda model, x: run_layer(model, x, last, reads=reads, **context))
    got = run(model, whole.seen["resid_pre"][last])
    needed = jnp.take_along_axis(whole.seen["resid_post"][last], reads[..., None], axis=1)
    close(got.hidden, needed)


def _add(value, payload, ctx):
    return value + payload.astype(value.dtype)


def _replace(value, payload, ctx):
    return jnp.broadcast_to(payload, value.shape).astype(value.dtype)


@configs
def test_taps_act_on_the_layers_that_run(config):
    model, tokens = model_of(config), tokens_of(config)
    cfg = model.cfg
    shift = jax.random.normal(jax.random.key(0), (cfg.num_layers, cfg.num_heads, cfg.head_dim))
    bias = jax.random.normal(jax.random.key(1), (cfg.vocab_size,))
    edits = Edit("z", _add, shift), Edit("logits", _add, bias)
    whole = record(intervene(forward, *edits), "resid_post", "z", "final_norm_out")(model, tokens)
    entering = whole.seen["resid_post"][0]
    taps = record(intervene(forward, *edits), "z", "final_norm_out").taps
    part = jax.jit(lambda taps, x: resume(model, x, start=1, taps=taps))(taps, entering)
    close(part.logits, whole.logits)
    close(part.seen["z"], whole.seen["z"][1:])
    close(part.seen["final_norm_out"], whole.seen["final_norm_out"])
    dynamic = jax.jit(lambda taps, x, n: resume(model, x, start=n, taps=taps).logits)
    close(dynamic(Taps(edits), entering, 1), whole.logits)
    named = record(forward, "blocks.2.attn.hook_z").taps
    close(run_layers(model, entering, start=1, taps=named + Taps(edits)).seen,
          {"blocks.2.attn.hook_z": whole.seen["z"][2]})  # fmt: skip


def test_replacing_a_value_drops_what_came_before():
    model, whole = _whole("gpt2", {})
    cfg, x = model.cfg, whole.seen["resid_pre"][1]

    def cost(*edits):
        run = lambda x, n: run_layer(model, x, n, edits=edits).hidden
        return jax.jit(run).lower(x, 1).compile().cost_analysis()["flops"]

    mlp = 2 * x.shape[0] * x.shape[1] * 2 * cfg.model_dim * cfg.mlp_dim
    assert mlp < cost(Edit("resid_mid", _replace, x)) < 1.3 * mlp < 0.7 * cost()


def test_gradients_flow_through_a_static_start():
    model, whole = _whole("gemma", {})
    entering = whole.seen["resid_pre"][2]
    score = jax.jit(lambda x: resume(model, x, start=2).logits[0, -1, 5])
    along = jax.random.normal(jax.random.key(5), entering.shape)
    gradient = jnp.vdot(jax.grad(score)(entering), along)
    step = 1e-2
    finite = (score(entering + step * along) - score(entering - step * along)) / (2 * step)
    np.testing.assert_allclose(gradient, finite, rtol=2e-3)


def test_bad_input_is_named():
    model, whole = _whole("llama", {})
    x = whole.seen["resid_pre"][0]
    with pytest.raises(ValueError, match="layers 2 to 4"):
        run_layers(model, x, start=2, stop=4)
    with pytest.raises(ValueError, match="hidden has shape"):
        resume(model, x[0], start=0)
    with pytest.raises(ValueError, match="recorded outside"):
        run_layers(model, x, start=1, taps=record(forward, "blocks.0.attn.hook_z").taps)
    with pytest.raises(NotImplementedError, match="traced range"):
        resume(model, x, start=jnp.int32(1), taps=record(forward, "z").taps)
    with pytest.raises(ValueError, match="no site 'pos_embed'"):
        forward(model, tokens_of("llama"), taps=record(forward, "pos_embed").taps)
