"""Records reduced inside the layer, with and without a pattern anywhere."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import models, parallel, reductions
from jaxheads.interventions import ablate, bias_scores, scale_heads
from jaxheads.models import forward, init_cache
from jaxheads.taps import as_tapped, record
from tests.configs import CONFIGS, model_of, tokens_of
from tests.tiny import tiny_model

REDUCTIONS = {
    "entropy": reductions.entropy,
    "argmax": reductions.argmax,
    "top_k": reductions.top_k(2),
    "mass": reductions.mass([[0, 1], [3, -1]]),
}


def everything(pattern, keys):
    """One summary of all kinds, so that a model compiles once."""
    named = {**REDUCTIONS, "mass": reductions.mass(keys)}
    return {name: reduction(pattern) for name, reduction in named.items()}


ALL = reductions.Reduction(everything, np.array([[0, 1], [3, -1]]), by_row=True)


@jax.jit
def run(fwd, model, tokens):
    return fwd(model, tokens)


def summary(fwd, model, tokens, reduce=ALL, **config):
    model = models.with_config(model, **config)
    return run(record(fwd, "pattern", reduce=reduce), model, tokens).seen["pattern"]


@pytest.mark.parametrize(
    "name",
    ["llama", "gemma", *(pytest.param(n, marks=pytest.mark.slow) for n in ("alibi-sinks", "gpt2"))],
)
def test_without_a_pattern_as_with_it(name):
    """Soft caps, windows, sinks, ALiBi, grouped heads: blocked and dense agree."""
    model, tokens = model_of(name), tokens_of(name)
    dense = summary(forward, model, tokens, implementation="dense")
    blocked = summary(forward, model, tokens, implementation="blocked")
    pattern = np.asarray(run(record(forward, "pattern"), model, tokens).seen["pattern"])
    np.testing.assert_array_equal(blocked["argmax"], pattern.argmax(-1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), blocked, dense)


def test_packed_text():
    model, tokens = model_of("llama"), tokens_of("llama")
    ids = jnp.array([[1] * 5 + [2] * 6, [1] * 8 + [0] * 3])
    fwd = record(forward, "pattern", reduce=ALL)
    seen = [
        fwd(models.with_config(model, implementation=i), tokens, segment_ids=ids).seen
        for i in ("dense", "blocked")
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *seen)
    assert (seen[1]["pattern"]["entropy"][:, 1, :, 8:] == 0).all()


def test_edits_upstream_are_seen_and_edits_of_the_pattern_form_it():
    model, tokens = model_of("llama"), tokens_of("llama")
    quiet = ablate(forward, [(0, 1)], site="q")
    entropy = summary(quiet, model, tokens, reductions.entropy, implementation="blocked")
    np.testing.assert_allclose(entropy[0, :, 1], np.log(np.arange(1, 12)) * np.ones((2, 1)),
                               atol=1e-5)  # fmt: skip
    scaled = scale_heads(forward, np.full((3, 4), 0.5), site="pattern")
    plain = summary(forward, model, tokens, reductions.mass(np.arange(11)))
    np.testing.assert_allclose(plain, np.ones_like(plain), atol=1e-5)
    halved = summary(scaled, model, tokens, reductions.mass(np.arange(11)))
    np.testing.assert_allclose(halved[0], 0.5 * np.asarray(plain)[0], atol=1e-5)
    for fwd in (scaled, bias_scores(forward, np.zeros((3, 1, 1, 1, 1)))):
        with pytest.raises(NotImplementedError, match=r"never forms '(pattern|scores)'"):
            summary(fwd, model, tokens, implementation="blocked")


def test_a_reduction_that_needs_the_whole_pattern_is_refused_by_blocks():
    received = reductions.Reduction(lambda pattern: pattern.sum(axis=2))
    with pytest.raises(NotImplementedError, match="never forms 'pattern'"):
        summary(forward, model_of("llama"), tokens_of("llama"), received, implementation="blocked")


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("implementation", ["dense", "blocked"])
def test_attn_argmax_is_that_of_the_newest_query(name, implementation):
    model = models.with_config(model_of(name), implementation=implementation)
    tokens = tokens_of(name)
    out = run(record(forward, "attn_argmax"), model, tokens).seen["attn_argmax"]
    pattern = run(record(forward, "pattern"), model_of(name), tokens).seen["pattern"]
    np.testing.assert_array_equal(out, jnp.argmax(pattern[:, :, :, -1], -1))
    assert out.shape == (CONFIGS[name].num_layers, 2, 4) and out.dtype == jnp.int32


def test_attn_argmax_while_decoding():
    model, tokens = model_of("llama"), tokens_of("llama")
    pattern = run(record(forward, "pattern"), model, tokens).seen["pattern"]
    step = jax.jit(lambda tokens, cache: record(forward, "attn_argmax")(model, tokens, cache=cache))
    cache = step(tokens[:, :6], init_cache(CONFIGS["llama"], 2, 16)).cache
    for t in range(6, 11):
        out = step(tokens[:, t : t + 1], cache)
        cache = out.cache
        np.testing.assert_array_equal(out.seen["attn_argmax"], jnp.argmax(pattern[..., t, :], -1))


def test_head_norms():
    model, tokens = model_of("llama"), tokens_of("llama")
    z = np.asarray(run(record(forward, "z"), model, tokens).seen["z"], np.float64)
    out = run(record(forward, "z", reduce=reductions.norm), model, tokens).seen["z"]
    np.testing.assert_allclose(out, np.linalg.norm(z, axis=-1), atol=1e-5)


def test_on_a_mesh():
    model, tokens = model_of("gpt2"), tokens_of("gpt2")
    model = models.with_config(model, implementation="blocked")
    want = summary(forward, model, tokens)
    mesh = parallel.make_mesh("data:2,model:4")
    with jax.set_mesh(mesh):
        got = summary(forward, parallel.shard(model, mesh), tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def compiled_record(length, reduce=reductions.entropy):
    """A one-layer model's forward on `length` tokens, whose entropies alone are kept."""
    cfg = models.ModelConfig(
        vocab_size=17, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, mlp_dim=16
    )
    model = tiny_model(cfg)
    fwd = as_tapped(record(forward, "pattern", reduce=reduce))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.jit(lambda m, t: fwd(m, t).seen).lower(model, tokens).compile()


@pytest.mark.slow
def test_memory_is_linear_in_the_length():
    temp = {n: compiled_record(n).memory_analysis().temp_size_in_bytes for n in (4096, 8192, 32768)}
    assert temp[32768] < 2**28  # a map of 32k x 32k would take 8 GiB
    # A block holds a fixed number of scores, the rest doubles with the length.
    assert temp[8192] - temp[4096] < temp[4096]
    assert temp[32768] - temp[8192] < 8 * temp[4096]


@pytest.mark.slow
@pytest.mark.parametrize("length", [4096, 32768])
def test_no_map_of_queries_by_keys_is_formed(length):
    text = compiled_record(length).as_text()
    sizes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\d+\[([\d,]+)\]", text)]
    assert any(length in shape for shape in sizes)
    padded = range(length, length + 512)
    maps = [s for s in sizes if sum(n in padded for n in s) > 1 or np.prod(s) >= length * length]
    assert not maps, maps[:3]
