"""Variants with options and with a cache of their own, in a pattern with others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxheads as jh
from jaxheads.attention import VARIANTS, HeadsOut
from jaxheads.models import Decoder, ModelConfig, forward, init_cache
from jaxheads.models.cache import cache_shape
from jaxheads.models.configs import parse_attention, parse_named


@dataclasses.dataclass(frozen=True)
class Options:
    gain: float = 1.0
    keep: int | None = None


def apply(params, q, k, v, ctx):
    """Softmax attention that keeps its keys heads first, rotated late, and scales its output."""
    k = ctx.rotate(k, ctx.k_positions)
    mask, state = ctx.mask, None
    if ctx.state is not None:
        put = lambda old, new: jax.lax.dynamic_update_slice(
            old, jnp.moveaxis(new, 1, 2).astype(old.dtype), (0, 0, ctx.slots[0], 0)
        )
        state = {"k": put(ctx.state["k"], k), "v": put(ctx.state["v"], v)}
        k, v = (jnp.moveaxis(state[name], 1, 2) for name in ("k", "v"))
        mask = dataclasses.replace(ctx.mask, q_index=ctx.slots)
    z = jh.attention.attention(ctx.rotate(q, ctx.q_positions), k, v, mask, scale=ctx.scale)
    return HeadsOut(ctx.options.gain * z, None, {}, state)


def init_state(cfg, batch_size, num_slots, dtype, options):
    empty = jnp.zeros((batch_size, cfg.num_kv_heads, num_slots, cfg.head_dim), dtype)
    return {"k": empty, "v": empty}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    row = VARIANTS["dense"]._replace(
        name="toy",
        apply=apply,
        options=Options,
        init_state=init_state,
        state_axes=lambda options: dict.fromkeys("kv", ("batch", "act_kv_heads", None, None)),
    )
    monkeypatch.setitem(VARIANTS, "toy", row)


def model_of(attention, layers=5):
    cfg = ModelConfig(
        vocab_size=40, num_layers=layers, model_dim=32, num_heads=4, num_kv_heads=2,
        attention=attention,
    )  # fmt: skip
    return Decoder(cfg, rngs=nnx.Rngs(0))


TOKENS = np.random.default_rng(0).integers(0, 40, (2, 12))


@pytest.mark.parametrize("attention", ["toy", "dense+toy(gain=2)", "toy(gain=0.5)+dense*2"])
def test_a_cached_run_equals_a_whole_one(attention):
    model = model_of(attention)
    want = forward(model, TOKENS).logits
    cache, got = init_cache(model.cfg, 2, 16), []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 12)):
        out = forward(model, TOKENS[:, start:stop], cache=cache)
        cache = out.cache
        got.append(out.logits)
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=2e-5)


def test_options_of_each_place_are_used():
    model = model_of("toy(gain=2)+dense")
    plain = Decoder(dataclasses.replace(model.cfg, attention="toy+dense"), rngs=nnx.Rngs(0))
    z, half = (jh.record(forward, "z")(m, TOKENS).seen["z"][0] for m in (model, plain))
    np.testing.assert_allclose(z, 2 * half, rtol=1e-6)


def test_only_the_layers_that_need_rows_have_them():
    cache = init_cache(model_of("toy+dense").cfg, 2, 16)  # layers 0, 2, 4 and 1, 3
    assert cache.k.shape == (2, 2, 16, 2, 8)
    assert cache.states[0]["k"].shape == (3, 2, 2, 16, 8)
    assert cache.states[1] is None


def test_states_are_split_by_their_axes():
    mesh = jh.parallel.make_mesh("data:2,model:2", devices=jax.devices()[:4])
    shapes = cache_shape(model_of("toy+dense").cfg, 2, 16, mesh=mesh)
    assert shapes.states[0]["k"].sharding.spec == jax.P(None, "data", "model", None, None)
    assert shapes.k.sharding.spec == jax.P(None, "data", None, "model", None)


def test_generation_is_the_same_with_either_cache():
    a = jh.generate(model_of("toy", 2), TOKENS, max_new_tokens=5)
    model = model_of("dense", 2)
    np.testing.assert_array_equal(a, jh.generate(model, TOKENS, max_new_tokens=5))


def test_text_with_options():
    assert parse_attention("toy(gain=2,keep=3)*2 + dense") == (
        ("toy", Options(2.0, 3)),
        ("toy", Options(2.0, 3)),
        ("dense", None),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("toy(gian=2)", "unknown field of toy 'gian'; did you mean 'gain'"),
        ("toy(gain=x)", "toy.gain='x' is not a number"),
        ("toy(gain)", "options are written option=value"),
        ("dense(block=2)", "'dense' has no options"),
        ("toy(gain=2", "cannot read 'toy(gain=2'"),
        ("tay", "did you mean 'toy'"),
    ],
)
def test_bad_text_is_named(text, message):
    with pytest.raises(ValueError) as caught:
        parse_named(text, VARIANTS, "attention")
    assert message in str(caught.value)


def test_unknown_architectures_are_named():
    with pytest.raises(ValueError, match="did you mean 'transformer'"):
        ModelConfig(architecture="transfomer")
