"""The variant `dmha` in a decoder: split sequences, split caches, layouts, options."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxheads as jh
from jaxheads import parallel
from jaxheads.attention import VARIANTS, AttentionContext, Mask, shard_sequence, unshard_sequence
from jaxheads.attention.dmha import Options
from jaxheads.models import Decoder, ModelConfig, init_cache

CFG = ModelConfig(
    num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=32, vocab_size=32
)
LENGTH = 16


def model_of(**changes):
    return Decoder(dataclasses.replace(CFG, **changes), rngs=nnx.Rngs(0))


def tokens_of(length=LENGTH):
    return jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, length)))


@pytest.mark.parametrize("mesh", ["", "model:2", "context:4", "data:2,model:2,context:2"])
def test_a_decoder_with_it_is_the_dense_decoder(mesh):
    wanted = jh.forward(model_of(), tokens_of()).logits
    mesh = parallel.make_mesh(mesh)
    model = parallel.shard(model_of(attention="dmha(schedule=ring,block_q=4)"), mesh)
    with jax.set_mesh(mesh):
        found = jh.forward(model, tokens_of()).logits
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_layouts_stay_inside_the_decoder(layout):
    """Tokens and logits are in the order of the text; layers see them in that of the layout."""
    wanted = jh.forward(model_of(), tokens_of()).logits
    mesh = parallel.make_mesh("context:4")
    model = parallel.shard(model_of(attention=f"dmha(schedule=ring,layout={layout})"), mesh)
    with jax.set_mesh(mesh):
        found = jh.forward(model, tokens_of()).logits
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_variant_takes_tokens_in_the_order_of_its_layout():
    rng = np.random.default_rng(0)
    normal = lambda heads: jnp.asarray(rng.normal(size=(2, LENGTH, heads, 8)), jnp.float32)
    q, k, v = normal(4), normal(2), normal(2)
    deal = lambda x: shard_sequence(x, "zigzag", 4)
    ctx = AttentionContext(mask=Mask(is_causal=True), options=Options(layout="zigzag"))
    wanted = VARIANTS["dense"].apply(None, q, k, v, ctx).z
    with jax.set_mesh(parallel.make_mesh("context:4")):
        found = VARIANTS["dmha"].apply(None, deal(q), deal(k), deal(v), ctx).z
    np.testing.assert_allclose(unshard_sequence(found, "zigzag", 4), wanted, atol=1e-5)


def run_cached(model, tokens, prompt):
    """Logits of a prompt and of the tokens after it, one at a time."""
    out = jh.forward(model, tokens[:, :prompt], cache=init_cache(model.cfg, 2, LENGTH))
    logits = [out.logits]
    for t in range(prompt, tokens.shape[1]):
        out = jh.forward(model, tokens[:, t : t + 1], cache=out.cache)
        logits.append(out.logits)
    return jnp.concatenate(logits, axis=1)


@pytest.mark.parametrize("prompt", [3, 12], ids=["queries travel", "keys travel"])
def test_a_split_cache_gives_the_rows_of_the_full_forward(prompt):
    """Whatever the layout of training: a cache is in the order of the text."""
    tokens = tokens_of(14)
    wanted = jh.forward(model_of(), tokens).logits
    mesh = parallel.make_mesh("context:4,model:2")
    model = parallel.shard(model_of(attention="dmha(layout=zigzag)"), mesh)
    with jax.set_mesh(mesh):
        found = jax.jit(run_cached, static_argnums=2)(model, tokens, prompt)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_no_device_gathers_the_cache(num_tokens):
    mesh = parallel.make_mesh("context:4")
    model, slots = parallel.shard(model_of(attention="dmha"), mesh), 2048
    tokens = tokens_of(num_tokens)
    with jax.set_mesh(mesh):
        cache = init_cache(model.cfg, 2, slots)
        assert cache.k.sharding.spec[2] == "context"
        step = jax.jit(lambda m, t, c: jh.forward(m, t, cache=c), donate_argnums=2)
        text = step.lower(model, tokens, cache).compile().as_text()
    moved = re.findall(
        r"= \S*?\[([\d,]+)\]\S* (?:all-gather|all-to-all|collective-permute)\(", text
    )
    assert "all-reduce" in text
    for shape in moved:
        assert not {str(slots), str(slots // 4)} & set(shape.split(",")), shape


def context(mask, **fields):
    return AttentionContext(mask=mask, options=Options(schedule="ring"), **fields)


@pytest.mark.parametrize("feature", ["sinks", "soft_cap", "alibi_slopes", "window"])
def test_features_of_decoders_on_a_split_sequence(feature):
    rng = np.random.default_rng(0)
    normal = lambda heads: jnp.asarray(rng.normal(size=(2, LENGTH, heads, 8)), jnp.float32)
    q, k, v = normal(4), normal(2), normal(2)
    fields = {
        "sinks": {"sinks": jnp.asarray(rng.normal(size=4), jnp.float32)},
        "soft_cap": {"soft_cap": 1.5},
        "alibi_slopes": {"alibi_slopes": jnp.asarray([0.5, 0.2, 0.1, 0.05])},
        "window": {},
    }[feature]
    mask = Mask(is_causal=True, window=5 if feature == "window" else None)

    def run(name):
        fn = lambda q, k, v, extra: jnp.sum(
            jnp.sin(VARIANTS[name].apply(None, q, k, v, context(mask, **extra)).z)
        )
        arrays = {n: x for n, x in fields.items() if n != "soft_cap"}
        rest = {n: x for n, x in fields.items() if n == "soft_cap"}
        closed = lambda q, k, v, arrays: fn(q, k, v, {**arrays, **rest})
        return jax.jit(jax.value_and_grad(closed, (0, 1, 2, 3)))(q, k, v, arrays)

    sum_wanted, wanted = run("dense")
    with jax.set_mesh(parallel.make_mesh("context:2,model:2,data:2")):
        sum_found, found = run("dmha")
    np.testing.assert_allclose(sum_found, sum_wanted, atol=1e-4)  # of a thousand terms
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, wanted)


def test_what_a_split_sequence_cannot_have_is_refused():
    x = jnp.ones((1, 8, 2, 4))
    apply = lambda mask, **fields: VARIANTS["dmha"].apply(None, x, x, x, context(mask, **fields))
    with jax.set_mesh(parallel.make_mesh("context:2")):
        with pytest.raises(NotImplementedError, match="a bias array"):
            apply(Mask(is_causal=True), bias=jnp.zeros((8, 8)))
        with pytest.raises(NotImplementedError, match="a per-head mask"):
            apply(Mask(head_mask=jnp.ones((8, 8), bool)))
        with pytest.raises(NotImplementedError, match="implementation='dense'"):
            apply(Mask(is_causal=True), implementation="dense")


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="contiguous, zigzag, striped"):
        model_of(attention="dmha(layout=spiral)")
    with pytest.raises(ValueError, match="ring, all_to_all, gather"):
        model_of(attention="dmha(schedule=tree)")
    with pytest.raises(ValueError, match="block_q"):
        model_of(attention="dmha(block_q=0)")
    for mixed in ("dmha(layout=zigzag)+dense", "dmha(layout=zigzag)+dmha"):
        with pytest.raises(ValueError, match="mixes layouts"):
            model_of(attention=mixed)
    assert model_of(attention="dmha(layout=zigzag)").cfg.layout == "zigzag"
    assert model_of().cfg.layout == "contiguous"
