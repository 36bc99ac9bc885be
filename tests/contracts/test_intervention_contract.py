"""What every wrapper must show, on every kind of decoder; a new wrapper is one row of `WRAPPERS`.

The rows run on a GPT-2-style, a NeoX-style (parallel residual) and a grouped-query Llama-style
model. The default run takes each wrapper alone on one of them, and all wrappers nested through the
mesh and the cache. The slow run takes the nest through every transform on all three, and every
wrapper through every transform on one of the three in turn.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import heads, models, parallel
from jaxheads.attention import RopeConfig
from jaxheads.generation import generate
from jaxheads.interventions import (
    AffineEdit,
    PatternOverride,
    ScoreBias,
    ablate,
    bias_scores,
    keep_subspace,
    knock_out,
    mask_heads,
    mean_activation,
    orthonormal_basis,
    override_pattern,
    override_rows,
    patch,
    project_out,
    prune_heads,
    scale_heads,
    steer,
)
from jaxheads.interventions.per_head import intervene_per_head
from jaxheads.models import ModelConfig, init_cache
from jaxheads.taps import SITES, as_tapped, record, sweep
from tests.tiny import tiny_model

L, B, T = 3, 2, 7
_SIZES = dict(vocab_size=31, num_layers=L, model_dim=32, mlp_dim=24, max_positions=24)
_OLD = dict(norm="layernorm", gated_mlp=False, qkv_bias=True, attn_out_bias=True, mlp_bias=True)
CONFIGS = {
    "llama": ModelConfig(**_SIZES, num_heads=8, num_kv_heads=4, window=(3,)),
    "gpt2": ModelConfig(**_SIZES, **_OLD, num_heads=4, family="gpt2", positions="learned"),
    "neox": ModelConfig(
        **_SIZES, **_OLD, num_heads=4, family="gpt_neox", rope=RopeConfig(fraction=0.5),
        residual="parallel", tie_embeddings=False,
    ),
}  # fmt: skip
DONATED = ("z", "v", "pattern", "resid_pre", "final_norm_in")
KEY = jax.random.key(3)


class Env(NamedTuple):
    """A model, a batch, and the data that wrappers need."""

    model: Any
    tokens: Any
    base: dict
    """site -> [L,...] float64 of the plain forward"""
    logits: Any
    donor: Any
    means: Any
    rng_rows: Any
    """[L,B,H,T,T] random rows of attention, causal"""
    basis: Any
    """[L,K,D,2]"""
    wide: Any
    """[L,M,3]"""
    vector: Any
    """[L,M]"""
    bias: Any
    """[L,1,H,T,T]"""

    @property
    def shape(self):
        return L, self.model.cfg.num_heads


@cache
def env_of(name: str) -> Env:
    cfg, rng = CONFIGS[name], np.random.default_rng(1)
    model = tiny_model(cfg, scale=0.2)
    tokens, other = rng.integers(0, 31, (2, B, T))
    sites = sorted({row.site for row in WRAPPERS.values()} | {"z"})
    out = run(record(models.forward, *sites), model, tokens)
    h, k, d = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    rows = rng.uniform(0.1, 1, (L, B, h, T, T)) * np.tril(np.ones((T, T)))
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return Env(
        model,
        tokens,
        {site: np.asarray(value, np.float64) for site, value in out.seen.items()},
        np.asarray(out.logits),
        run(record(models.forward, *DONATED), model, other),
        np.asarray(mean_activation(models.forward, model, other)),
        (rows / rows.sum(-1, keepdims=True)).astype(np.float32),
        np.asarray(orthonormal_basis(normal(L, k, d, 2))),
        np.asarray(orthonormal_basis(normal(L, cfg.model_dim, 3))),
        normal(L, cfg.model_dim),
        normal(L, 1, h, T, T),
    )


@jax.jit
def run(forward, model, tokens):
    return forward(model, tokens)


def of_head(change: Callable, axis: int = 2) -> Callable:
    """``want(value, l, h, env)`` from a change of one head's values."""

    def want(value, l, h, env):
        out = np.moveaxis(value.copy(), axis, 0)
        out[h] = change(out[h], l, h, env)
        return np.moveaxis(out, 0, axis)

    return want


def softmax_of(change: Callable) -> Callable:
    """A change of the pattern of one head [B,T,S] through its scores."""

    def changed(pattern, l, h, env):
        with np.errstate(divide="ignore"):
            scores = np.log(pattern) + change(l, h, env)
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
        return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)

    return of_head(changed, axis=1)


def edges(l, h, env):
    out = np.zeros((T, T))
    out[np.ix_([2, 5], [0, 2])] = -np.inf
    return out


class Wrapper(NamedTuple):
    """One wrapper, made from weights [L,H]: 0 leaves a head alone, 1 acts on it fully."""

    make: Callable[[Any, Any, Env], Any]
    want: Callable[[np.ndarray, int, int, Env], np.ndarray]
    """(site's value of layer l in the plain forward, float64; l; h; env) -> under weight 1."""
    site: str = "z"
    smooth: bool = True
    """Whether the weights between 0 and 1 have a finite gradient."""
    cached: bool = True
    """Whether it means the same when tokens come one at a time."""


def _out(x, basis):
    return x - x @ basis @ basis.T


def _rows_to_targets(pattern, l, h, env):
    pattern[0, 5], pattern[1, 6] = 0, 0
    pattern[0, 5, [1, 4]], pattern[1, 6, 3] = 0.5, 1
    return pattern


def _layers(w):
    """[L] weights of a wrapper without heads: those of head 0."""
    return w[:, 0]


def _kv(w, env):
    return w[:, : env.model.cfg.num_kv_heads]


WRAPPERS = {
    "scale_heads": Wrapper(lambda f, w, e: scale_heads(f, 1 + w), of_head(lambda z, *_: 2 * z)),
    "scale_heads of each row": Wrapper(
        lambda f, w, e: scale_heads(f, 1 - w * jnp.array([1.0, 0.5])[:, None, None]),
        of_head(lambda z, *_: z * np.array([0, 0.5])[:, None, None]),
    ),
    "prune_heads": Wrapper(lambda f, w, e: prune_heads(f, 1 - w), of_head(lambda z, *_: 0 * z)),
    "ablate zero": Wrapper(lambda f, w, e: ablate(f, w), of_head(lambda z, *_: 0 * z)),
    "ablate mean": Wrapper(
        lambda f, w, e: ablate(f, w, mode="mean", means=e.means),
        of_head(lambda z, l, h, e: 0 * z + e.means[l, h]),
    ),
    "ablate resample": Wrapper(
        lambda f, w, e: ablate(f, w, mode="resample", key=KEY),
        of_head(lambda z, *_: z[::-1]),
    ),
    "ablate resample from another batch": Wrapper(
        lambda f, w, e: ablate(f, w, mode="resample", donor=e.donor),
        of_head(lambda z, l, h, e: np.asarray(e.donor.seen["z"])[l, :, :, h]),
    ),
    "ablate position_mean": Wrapper(
        lambda f, w, e: ablate(f, w, mode="position_mean"),
        of_head(lambda z, *_: 0 * z + z.mean(axis=1, keepdims=True)),
        cached=False,
    ),
    "ablate head_mean of k": Wrapper(
        lambda f, w, e: ablate(f, _kv(w, e), mode="head_mean", site="k"),
        lambda k, l, h, e: of_head(lambda *_: k.mean(axis=2))(k, l, h, e),
        site="k",
    ),
    "patch": Wrapper(
        lambda f, w, e: patch(f, e.donor, w, positions=[1, 4]),
        of_head(lambda z, l, h, e: np.where(np.isin(np.arange(T), [1, 4])[:, None],
                                            np.asarray(e.donor.seen["z"])[l, :, :, h], z)),
    ),
    "patch v": Wrapper(
        lambda f, w, e: patch(f, e.donor, _kv(w, e), site="v"),
        of_head(lambda v, l, h, e: np.asarray(e.donor.seen["v"])[l, :, :, h]),
        site="v",
    ),
    "patch the residual stream": Wrapper(
        lambda f, w, e: patch(f, e.donor, site="resid_pre", layers=_layers(w),
                              positions=np.arange(T) > 3),
        lambda x, l, h, e: np.where((np.arange(T) > 3)[:, None],
                                    np.asarray(e.donor.seen["resid_pre"])[l], x),
        site="resid_pre",
    ),
    "override_pattern": Wrapper(
        lambda f, w, e: override_pattern(f, w, e.rng_rows),
        of_head(lambda p, l, h, e: e.rng_rows[l, :, h], axis=1),
        site="pattern",
    ),
    "override_rows": Wrapper(
        lambda f, w, e: override_rows(f, w, [[1, 4], [3]], query=np.array([5, 6])),
        of_head(_rows_to_targets, axis=1),
        site="pattern",
    ),
    "PatternOverride": Wrapper(
        lambda f, w, e: intervene_per_head(
            f, PatternOverride(w[:, :, None] * (jnp.arange(T) == 5), e.rng_rows)
        ),
        of_head(lambda p, l, h, e: np.where((np.arange(T) == 5)[:, None],
                                            e.rng_rows[l, :, h], p), axis=1),
        site="pattern",
    ),
    "bias_scores": Wrapper(
        lambda f, w, e: bias_scores(f, w[:, None, :, None, None] * e.bias),
        softmax_of(lambda l, h, e: e.bias[l, 0, h]),
        site="pattern",
    ),
    "ScoreBias": Wrapper(
        lambda f, w, e: intervene_per_head(f, ScoreBias(-w[:, None, :, None, None] * e.bias)),
        softmax_of(lambda l, h, e: -e.bias[l, 0, h]),
        site="pattern",
    ),
    "knock_out": Wrapper(
        lambda f, w, e: knock_out(f, w, queries=[2, 5], keys=[0, 2]),
        softmax_of(edges),
        site="pattern",
        smooth=False,
    ),
    "AffineEdit": Wrapper(
        lambda f, w, e: intervene_per_head(f, AffineEdit(
            "z", 1 - w[:, None, None, :, None], w[:, None, None, :, None] * e.donor.seen["z"])),
        of_head(lambda z, l, h, e: np.asarray(e.donor.seen["z"])[l, :, :, h]),
    ),
    "steer": Wrapper(
        lambda f, w, e: steer(f, e.vector, layers=_layers(w), scale=0.5, positions=[0, 3]),
        lambda x, l, h, e: x + 0.5 * e.vector[l] * np.isin(np.arange(T), [0, 3])[:, None],
        site="resid_post",
    ),
    "project_out of v": Wrapper(
        lambda f, w, e: project_out(f, e.basis, _kv(w, e), site="v"),
        of_head(lambda v, l, h, e: _out(v, e.basis[l, h])),
        site="v",
    ),
    "keep_subspace of the residual stream": Wrapper(
        lambda f, w, e: keep_subspace(f, e.wide, site="resid_pre", layers=_layers(w),
                                      mean=e.vector),
        lambda x, l, h, e: e.vector[l] + (x - e.vector[l]) @ e.wide[l] @ e.wide[l].T,
        site="resid_pre",
    ),
    "mask_heads zero_output": Wrapper(
        lambda f, w, e: mask_heads(f, w, "zero_output"), of_head(lambda z, *_: 0 * z)
    ),
    "mask_heads uniform from a column": Wrapper(
        lambda f, w, e: mask_heads(f, w, "uniform_decode", where=4),
        of_head(lambda q, *_: q * (np.arange(T) < 4)[:, None]),
        site="q",
    ),
}  # fmt: skip
FIRST = "llama"
every = [
    pytest.param(row, name, id=f"{key}-{name}", marks=[] if name == FIRST else pytest.mark.slow)
    for key, row in WRAPPERS.items()
    for name in CONFIGS
]
all_rows = pytest.mark.parametrize(("row", "name"), every)


def nested(forward, weights, env, keep=lambda row: True):
    """Every wrapper around one forward, each at half strength."""
    for row in WRAPPERS.values():
        if keep(row):
            forward = row.make(forward, 0.5 * weights, env)
    return forward


def one_head(env, l, h):
    return jnp.zeros(env.shape).at[l, h].set(1.0)


def has_heads(row):
    return bool({"H", "K"} & set(SITES[row.site].split()))


@all_rows
def test_what_it_does(row, name):
    """Weight zero changes nothing; weight one is the formula at that head; one program for all."""
    env, traces = env_of(name), []

    @jax.jit
    def traced(weights):
        traces.append(1)
        out = record(row.make(models.forward, weights, env), row.site)(env.model, env.tokens)
        return out.logits, out.seen[row.site]

    logits, _ = traced(jnp.zeros(env.shape))
    np.testing.assert_allclose(logits, env.logits, atol=1e-5)
    for l, h in [(0, 1), (2, 0)] if has_heads(row) else [(0, 0), (2, 0)]:
        logits, seen = traced(one_head(env, l, h))
        np.testing.assert_allclose(seen[l], row.want(env.base[row.site][l], l, h, env), atol=1e-5)
        assert np.abs(logits - env.logits).max() > 1e-3
    assert len(traces) == 1


def check_vmap(make, env):
    payloads = jnp.stack([one_head(env, 0, 0), 0.5 * one_head(env, 2, 1), jnp.ones(env.shape)])
    fn = lambda w: make(models.forward, w, env)(env.model, env.tokens).logits
    one = jax.jit(fn)
    loop = np.stack([one(w) for w in payloads])
    np.testing.assert_allclose(jax.jit(jax.vmap(fn))(payloads), loop, atol=2e-5)
    swept = jax.jit(lambda p: sweep(fn, p, batch_size=2))(payloads)
    np.testing.assert_allclose(swept, loop, atol=2e-5)


def check_gradient(make, env, remat):
    model = models.with_config(env.model, remat=remat)
    weights = jnp.full(env.shape, 0.3)
    direction = jnp.asarray(np.random.default_rng(2).normal(size=env.shape), jnp.float32)

    @jax.jit
    @jax.value_and_grad
    def loss(w):
        out = make(models.forward, w, env)(model, env.tokens).logits
        return jnp.sum(jax.nn.log_softmax(out)[..., 0])

    slope = float(jnp.sum(loss(weights)[1] * direction))
    value = lambda step: float(loss(weights + step * direction)[0])
    difference = lambda step: (value(step) - value(-step)) / (2 * step)
    # Extrapolated over two steps: small slopes lie beside large third derivatives.
    wanted = (4 * difference(1e-2) - difference(2e-2)) / 3
    assert slope == pytest.approx(wanted, rel=3e-2, abs=2e-2)


def check_mesh(make, env):
    weights = one_head(env, 0, 1) + one_head(env, 1, 0)
    forward = as_tapped(make(models.forward, weights, env))
    want = run(forward, env.model, env.tokens).logits
    mesh = parallel.make_mesh("data:2,model:4")
    with jax.set_mesh(mesh):
        out = run(forward, parallel.shard(env.model, mesh), env.tokens).logits
    np.testing.assert_allclose(out, want, atol=2e-5)


def check_cache(make, env):
    weights = one_head(env, 0, 1) + one_head(env, 1, 0)
    forward = as_tapped(make(models.forward, weights, env))
    want = run(forward, env.model, env.tokens).logits
    step = jax.jit(lambda forward, model, token, cache: forward(model, token, cache=cache))
    cache, got = init_cache(env.model.cfg, B, T + 3), []
    for t in range(T):
        out = step(forward, env.model, env.tokens[:, t : t + 1], cache)
        cache = out.cache
        got.append(out.logits)
    np.testing.assert_allclose(jnp.concatenate(got, 1), want, atol=2e-5)


def check_generation(make, env):
    """Greedy text equals a loop of whole forwards."""
    forward = as_tapped(make(models.forward, one_head(env, 0, 1) + one_head(env, 1, 0), env))
    text = np.asarray(generate(env.model, env.tokens[:, :4], max_new_tokens=3, forward=forward))
    assert text.shape == (B, T)
    logits = run(forward, env.model, text).logits
    np.testing.assert_array_equal(text[:, 4:], np.argmax(logits[:, 3:-1], -1))


CHECKS = {
    "vmap": check_vmap,
    "gradient": partial(check_gradient, remat="none"),
    "gradient under remat": partial(check_gradient, remat="full"),
    "mesh": check_mesh,
    "cache": check_cache,
    "generation": check_generation,
}


SLOW = {"vmap", "gradient", "gradient under remat", "generation"}


def _applies(row: Wrapper, check: str) -> bool:
    if check.startswith("gradient"):
        return row.smooth
    return row.cached or check not in ("cache", "generation")


each = [
    pytest.param(row, check, name, id=f"{key}-{check}-{name}")
    for i, (key, row) in enumerate(WRAPPERS.items())
    for j, check in enumerate(CHECKS)
    if _applies(row, check)
    for name in [list(CONFIGS)[(i + j) % len(CONFIGS)]]
]


@pytest.mark.slow
@pytest.mark.parametrize(("row", "check", "name"), each)
def test_each_wrapper_through(row, check, name):
    CHECKS[check](row.make, env_of(name))


@pytest.mark.parametrize(
    "name", [FIRST, *(pytest.param(n, marks=pytest.mark.slow) for n in list(CONFIGS)[1:])]
)
@pytest.mark.parametrize(
    "check", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CHECKS]
)
def test_all_wrappers_nested_through(check, name):
    make = lambda f, w, env: nested(f, w, env, keep=lambda row: _applies(row, check))
    CHECKS[check](make, env_of(name))


def test_inside_shard_map_equals_outside():
    """Rows of the batch on two devices; data with a batch axis is split like the batch."""
    env = env_of(FIRST)
    chosen = ["scale_heads", "ablate mean", "knock_out", "steer", "project_out of v"]
    make = lambda w: nested(models.forward, w, env, lambda r: any(r is WRAPPERS[c] for c in chosen))
    mesh = parallel.make_mesh("data:2", devices=jax.devices()[:2])
    fn = lambda model, tokens, w: make(w)(model, tokens).logits
    sharded = jax.shard_map(
        fn, mesh=mesh, in_specs=(jax.P(), jax.P("data"), jax.P()), out_specs=jax.P("data"),
        check_vma=False,
    )  # fmt: skip
    weights = jnp.ones(env.shape)
    out = jax.jit(sharded)(env.model, env.tokens, weights)
    np.testing.assert_allclose(out, run(make(weights), env.model, env.tokens).logits, atol=1e-5)


def test_inner_edits_apply_first():
    env = env_of(FIRST)
    seen = lambda f: np.asarray(run(record(f, "z"), env.model, env.tokens).seen["z"])[0, :, :, 1]
    mean = partial(ablate, heads=[(0, 1)], mode="mean", means=env.means)
    double = partial(scale_heads, gates=np.full(env.shape, 2.0, np.float32))
    want = env.means[0, 1]
    np.testing.assert_allclose(seen(double(mean(models.forward)))[0, 0], 2 * want, atol=1e-6)
    np.testing.assert_allclose(seen(mean(double(models.forward)))[0, 0], want, atol=1e-6)


@pytest.mark.parametrize("key", ["prune_heads", "ablate zero", "mask_heads zero_output"])
def test_full_weight_equals_removing_the_parameters(key):
    env = env_of(FIRST)
    mask = heads.mask([(0, 1), (2, 0), (2, 3)], *env.shape)
    edited = WRAPPERS[key].make(models.forward, jnp.asarray(mask, jnp.float32), env)
    cut = jax.tree.map(lambda a: a, env.model)
    cut.layers.attention.wo[...] = cut.layers.attention.wo[...] * (~mask)[:, :, None, None]
    want = run(as_tapped(models.forward), cut, env.tokens).logits
    np.testing.assert_allclose(run(edited, env.model, env.tokens).logits, want, atol=1e-5)


# Rows whose weights are multiplied into other data before they reach the wrapper.
_MIXED = {"bias_scores", "ScoreBias", "AffineEdit"}
_MASKED = [key for key, row in WRAPPERS.items() if has_heads(row) and key not in _MIXED]


@pytest.mark.parametrize("key", _MASKED)
def test_weights_of_another_model_are_refused(key):
    env = env_of(FIRST)
    with pytest.raises(ValueError, match=r"needs? (\[3, ?[48]|\[L=3)|needed \[(3|L,H,T\])"):
        WRAPPERS[key].make(models.forward, jnp.zeros((L + 1, 8)), env)(env.model, env.tokens)
