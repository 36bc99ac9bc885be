"""Titans decoders: streaming is one pass, no token sees a later one, every tool takes them."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxheads as jh
from jaxheads import parallel
from jaxheads.models import Decoder, ModelConfig, forward, init_cache, sites
from jaxheads.models.titans import MacOptions, MagOptions, MemoryOptions, TitansLayer, TitansLM
from jaxheads.taps import SITES, Edit, intervene, record
from tests.models.titans_cases import CASES, EASY, config_of, model_of, tokens_of

EVERY = pytest.mark.parametrize("name", CASES)
ONE_OF_EACH = pytest.mark.parametrize("name", EASY)


def _quickly(*names: str):
    """Every case, but only the named ones in the quick run."""
    marks = lambda name: () if name in names else pytest.mark.slow
    return pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in CASES])


@functools.cache
def _whole(name: str):
    return forward(model_of(name), tokens_of()).logits


@EVERY
def test_number_of_parameters(name):
    count = sum(x.size for x in jax.tree.leaves(model_of(name)))
    assert count == config_of(name).num_params


@_quickly("lmm", "mag", "mac")
def test_token_by_token_equals_one_pass(name):
    model, tokens = model_of(name), tokens_of()
    step = jax.jit(lambda token, cache: forward(model, token, cache=cache))
    cache, logits = init_cache(config_of(name), 2, 21), []
    for t in range(21):
        out = step(tokens[:, t : t + 1], cache)
        cache = out.cache
        logits.append(out.logits)
    chex.assert_trees_all_close(jnp.concatenate(logits, 1), _whole(name), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@EVERY
def test_pieces_of_any_length_equal_one_pass(name):
    model, tokens = model_of(name), tokens_of()
    cache, logits = init_cache(config_of(name), 2, 21), []
    for begin, end in ((0, 7), (7, 8), (8, 19), (19, 21)):
        out = forward(model, tokens[:, begin:end], cache=cache)
        cache = out.cache
        logits.append(out.logits)
    chex.assert_trees_all_close(jnp.concatenate(logits, 1), _whole(name), atol=1e-5, rtol=1e-5)


@_quickly("mac")
def test_left_padding_does_not_change_a_row(name):
    model, tokens = model_of(name), tokens_of()
    padded = jnp.pad(tokens, ((0, 0), (3, 0)))
    ids = (jnp.arange(24) >= jnp.array([[3], [3]])).astype(int)
    out = forward(model, padded, segment_ids=ids)
    chex.assert_trees_all_close(out.logits[:, 3:], _whole(name), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@EVERY
def test_packed_documents_do_not_see_each_other(name):
    """A change to the first document leaves the second as it is, to the bit."""
    model, tokens = model_of(name), tokens_of()
    ids = jnp.array([[1] * 10 + [2] * 11] * 2)
    run = jax.jit(lambda t: forward(model, t, segment_ids=ids).logits)
    before, after = run(tokens), run(tokens.at[:, 4].set((tokens[:, 4] + 1) % 61))
    np.testing.assert_array_equal(before[:, 10:], after[:, 10:])
    assert (before[:, 4:10] != after[:, 4:10]).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lmm", "mal", "mac"])
def test_a_document_at_a_chunk_is_as_if_alone(name):
    """Where the grid of chunks and segments begins anew with the document, nothing differs."""
    text = (
        CASES[name].replace("persistent=5", "persistent=4").replace("persistent=3", "persistent=4")
    )
    cfg = config_of(name, architecture=text)
    model = parallel.initialize(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))
    tokens = tokens_of()
    ids = jnp.array([[1] * 8 + [2] * 13] * 2)
    out = forward(model, tokens, segment_ids=ids).logits
    want = [forward(model, part).logits for part in (tokens[:, :8], tokens[:, 8:])]
    chex.assert_trees_all_close(out, jnp.concatenate(want, 1), atol=1e-5, rtol=1e-5)


@_quickly("lmm", "mag", "mac")
def test_no_output_depends_on_a_later_token(name):
    model = model_of(name)
    x = jax.random.normal(jax.random.key(0), (1, 13, 16))
    run = jax.jit(lambda e: forward(model, None, embeddings=e).logits)
    before = run(x)
    for j in (5, 8, 12):
        after = run(x.at[0, j].add(1.0))
        np.testing.assert_array_equal(before[:, :j], after[:, :j])
        assert (before[:, j] != after[:, j]).any()


def _layer(variant, options=None):
    cfg = ModelConfig(model_dim=16, num_heads=2, num_layers=1)
    return TitansLayer(cfg, variant, options=options, rngs=nnx.Rngs(0))


def test_the_literal_equations_of_mac_see_the_future():
    x = jax.random.normal(jax.random.key(0), (1, 16, 16))
    for mode, differs in (("literal", True), ("causal", False)):
        layer = _layer("mac", MacOptions(chunk=4, segment=8, persistent=2, mode=mode))
        run = jax.jit(lambda e, layer=layer: layer(e)[0])
        before, after = run(x), run(x.at[0, 7].add(1.0))
        assert bool((before[:, :7] != after[:, :7]).any()) == differs
        assert (before[:, 8:] != after[:, 8:]).any()


def test_mag_is_its_formula():
    """A window over [P; x] with a mask, the recurrence over [P; x], and the product of the two."""
    from jaxheads.memory import neural_memory
    from jaxheads.models.titans_masks import swa_prefix_mask
    from jaxheads.models.titans_modules import project

    options = MagOptions(chunk=4, persistent=3, window=4)
    cfg = ModelConfig(model_dim=16, num_heads=2, num_layers=1, positions="none")
    layer = TitansLayer(cfg, "mag", options=options, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 10, 16))

    def formula(x):
        xt = jnp.concatenate([layer.persistent.tokens[...][None], x], axis=1)
        w = layer.attention
        q, k, v = (jnp.einsum("btm,mhd->bthd", xt, m[...]) for m in (w.wq, w.wk, w.wv))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(8)
        scores = jnp.where(swa_prefix_mask(10, 4, 3), scores, -jnp.inf)
        z = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
        a = jnp.einsum("bthd,hdm->btm", z, w.wo[...])
        tokens, _ = project(layer.memory, options, xt)
        y, _ = neural_memory(*tokens[:6], layer.memory.initial(), chunk=4, max_grad_norm=1.0)
        m = jnp.einsum("bthd,hdm->btm", y, layer.readout[...])
        norm = lambda u: u / jnp.sqrt(jnp.mean(u**2, -1, keepdims=True) + cfg.norm_eps)
        return norm(a) * jax.nn.sigmoid(norm(m))

    got, want = jax.jit(lambda x: layer(x)[0])(x), jax.jit(formula)(x)
    chex.assert_trees_all_close(got, want[:, 3:], atol=1e-5)


def test_gates_lie_where_they_should_and_keys_have_unit_length():
    layer = _layer("lmm")
    from jaxheads.models.titans_modules import project

    tokens, _ = project(
        layer.memory, layer.options, jax.random.normal(jax.random.key(0), (1, 9, 16))
    )
    for x in (tokens.k, tokens.q):
        chex.assert_trees_all_close(jnp.linalg.norm(x, axis=-1), jnp.ones(x.shape[:-1]), atol=1e-3)
    assert tokens.theta.min() > 0 and tokens.theta.max() < layer.options.theta_max
    assert tokens.alpha.mean() < 0.2 < tokens.eta.mean()


@pytest.mark.slow
def test_without_the_inner_gradient_keys_and_values_learn_nothing_from_being_written():
    def slopes(stop):
        options = MemoryOptions(chunk=4, persistent=2, stop_inner_grad=stop)
        layer = _layer("lmm", options)
        x = jax.random.normal(jax.random.key(1), (1, 9, 16))
        grads = nnx.grad(lambda layer: jnp.sum(layer(x)[0]))(layer)
        return [jnp.abs(grads["memory"][name][...]).max() for name in ("wk", "wv", "wq")]

    assert slopes(True)[:2] == [0, 0] and slopes(True)[2] > 0
    assert min(slopes(False)) > 0


@_quickly("mac")
def test_every_site_is_recorded_with_its_shape(name):
    cfg, model, tokens = config_of(name), model_of(name), tokens_of()
    wanted = [s for s in sites(cfg) if s.startswith("mem_") or s in ("q", "k", "v", "z")]
    out = jax.jit(record(forward, *wanted))(model, tokens)
    size = dict(B=2, T=21, S=21, H=2, K=2, D=8)
    for site in wanted:
        assert out.seen[site].shape == (2, *(size[a] for a in SITES[site].split())), site
        assert jnp.isfinite(out.seen[site]).all()
    chex.assert_trees_all_close(out.logits, _whole(name), atol=1e-5, rtol=1e-5)
    assert out.seen["mem_theta"].min() >= 0 and out.seen["mem_theta"].max() <= 0.1


def _scale(value, payload, ctx):
    del ctx
    return value * payload


def test_switching_the_gates_off_freezes_the_memory():
    model, tokens = model_of("mac"), tokens_of()
    stop = Edit("mem_theta", _scale, jnp.zeros((2, 1, 1, 1)))
    keep = Edit("mem_alpha", _scale, jnp.zeros((2, 1, 1, 1)))
    seen = record(intervene(forward, stop, keep), "mem_theta", "mem_norm")(model, tokens).seen
    assert (seen["mem_theta"] == 0).all()
    start = model.layers.attention.memory.start
    squares = sum(jnp.sum(jnp.square(w[...]), axis=(-2, -1)) for w in start)  # [L,H]
    want = jnp.broadcast_to(jnp.sqrt(squares)[:, None], (2, 2, 2))
    chex.assert_trees_all_close(seen["mem_norm"], want, rtol=1e-6)


@_quickly("mac")
def test_generation_is_greedy_decoding_with_a_state_of_constant_size(name):
    model = model_of(name)
    prompts = [[5, 7, 9, 11, 13, 2], [8, 1, 4]]
    out = jh.generate(model, prompts, max_new_tokens=4)
    for prompt, row in zip(prompts, out):
        tokens = jnp.asarray([prompt])
        for _ in range(2):
            new = jnp.argmax(forward(model, tokens).logits[:, -1:], axis=-1)
            tokens = jnp.concatenate([tokens, new], axis=1)
        np.testing.assert_array_equal(row[6:8], tokens[0, -2:])
    sizes = [
        sum(x.size for x in jax.tree.leaves(jax.eval_shape(
            lambda n=n: init_cache(config_of(name), 1, n).states)))
        for n in (8, 1 << 20)
    ]  # fmt: skip
    assert sizes[0] == sizes[1] > 0


@pytest.mark.slow
@ONE_OF_EACH
@pytest.mark.parametrize("spec", ["data:2,model:2,fsdp:2"])
def test_sharded_equals_single(name, spec):
    mesh = parallel.make_mesh(spec)
    tokens = jnp.tile(tokens_of(length=12), (2, 1))
    loss = lambda m, t: jnp.square(forward(m, t).logits).mean()
    want = jax.jit(jax.value_and_grad(loss))(model_of(name), tokens)
    model = parallel.shard(model_of(name), mesh)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(loss))(model, tokens)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert jnp.isfinite(b).all()
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5, rtol=1e-4)


def test_a_titans_language_model_is_a_decoder():
    cfg = ModelConfig(vocab_size=31, num_layers=1, model_dim=16, num_heads=2)
    model = TitansLM("mag", cfg, options=MagOptions(window=4, persistent=2), rngs=nnx.Rngs(0))
    assert model.cfg.mixer.options == MagOptions(window=4, persistent=2)
    tokens = tokens_of(1, 6) % 31
    chex.assert_trees_all_close(model(tokens), forward(model, tokens).logits)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("titans-mac(segment=10,chunk=4)", "segment=10 is not a multiple of chunk=4"),
        ("titans-mac(segment=16,memory_tokens=5)", "5 memory tokens do not divide"),
        ("titans-mag(window=0)", "window=0"),
        ("titans-lmm(depth=0)", "depth=0"),
        ("titans-lmm(chunk=0)", "chunk=0"),
        ("titans-lmm(theta_max=2)", "theta_max=2"),
        ("titans-lmm(windows=3)", "windows"),
        ("titans-mix", "titans-mix"),
    ],
)
def test_options_that_do_not_fit(text, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(architecture=text)


def test_a_causal_language_model_refuses_the_literal_form():
    cfg = ModelConfig(num_layers=1, architecture="titans-mac(mode=literal)")
    with pytest.raises(ValueError, match="mode='literal'"):
        jax.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))


def test_what_rests_on_added_heads_is_refused():
    model = jax.eval_shape(lambda: Decoder(config_of("mag"), rngs=nnx.Rngs(0)))
    with pytest.raises(NotImplementedError, match="titans-mag"):
        jh.interventions.prune.fold_pruned(model, jnp.ones((2, 2)))


def test_settings_that_a_titans_layer_would_ignore_are_refused():
    cfg = ModelConfig(num_layers=1, architecture="titans-mag", window=(8,))
    with pytest.raises(ValueError, match=r"window=.*options"):
        jax.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))


def test_a_deep_plain_memory_with_large_steps_warns():
    with pytest.warns(UserWarning, match="theta_max=0.5"):
        _ = ModelConfig(architecture="titans-lmm(residual_norm=false,theta_max=0.5)").mixer


def test_a_state_of_another_batch_is_refused():
    layer = _layer("lmm")
    x = jnp.ones((2, 4, 16))
    with pytest.raises((ValueError, TypeError)):
        layer(x, state=layer.init_state(3))
