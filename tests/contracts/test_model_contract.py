"""What every decoder configuration must show, whatever its family."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import parallel
from jaxheads.models import forward, init_cache, sites, with_config
from jaxheads.taps import OUTER_SITES, READ_ONLY, SITES, Edit, intervene, record
from tests.configs import CONFIGS, model_of, tokens_of

EVERY = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def _reference(name: str):
    return jax.jit(forward)(model_of(name), tokens_of(name))


@EVERY
def test_number_of_parameters(name):
    count = sum(x.size for x in jax.tree.leaves(model_of(name)))
    assert count == CONFIGS[name].num_params


@EVERY
def test_every_site_has_its_documented_shape(name):
    cfg = CONFIGS[name]
    out = jax.jit(record(forward, *sites(cfg)))(model_of(name), tokens_of(name))
    size = dict(
        B=2, T=11, S=11, H=cfg.num_heads, K=cfg.num_kv_heads, D=cfg.head_dim, M=cfg.model_dim,
        F=cfg.mlp_dim, V=cfg.vocab_size, L=cfg.num_layers,
    )  # fmt: skip
    size["1"] = 1
    assert set(out.seen) == set(sites(cfg))
    for site, value in out.seen.items():
        axes = SITES[site] if site in OUTER_SITES else "L " + SITES[site]
        assert value.shape == tuple(size[a] for a in axes.split()), site
    chex.assert_trees_all_close(out.logits, _reference(name).logits, atol=1e-5)


@EVERY
def test_sites_satisfy_their_definitions(name):
    cfg, model = CONFIGS[name], model_of(name)
    seen = jax.jit(record(forward, *sites(cfg)))(model, tokens_of(name)).seen
    rows = seen["pattern"].sum(-1)
    if cfg.attn_sinks:
        assert (rows < 1).all()
    else:
        chex.assert_trees_all_close(rows, jnp.ones_like(rows), atol=1e-5)
    v = jnp.repeat(seen["v"], cfg.num_groups, axis=3)
    z = jnp.einsum("lbhts,lbshd->lbthd", seen["pattern"], v)
    chex.assert_trees_all_close(seen["z"], z, atol=1e-5)
    per_head = jnp.einsum("lbthd,lhdm->lbthm", z, model.layers.attention.wo[...])
    chex.assert_trees_all_close(seen["head_out"], per_head, atol=1e-5)
    if cfg.norm_placement != "sandwich":
        bias = model.layers.attention.bo
        total = per_head.sum(3) + (0 if bias is None else bias[...][:, None, None])
        chex.assert_trees_all_close(seen["attn_out"], total, atol=1e-5)
    shifted = jnp.exp(seen["scores"] - seen["lse"][..., None])
    chex.assert_trees_all_close(seen["pattern"], shifted, atol=1e-5)
    if cfg.norm_placement != "post":
        chex.assert_trees_all_close(
            seen["resid_post"], seen["resid_pre"] + seen["attn_out"] + seen["mlp_out"], atol=1e-5
        )
        chex.assert_trees_all_close(seen["resid_pre"][1:], seen["resid_post"][:-1])


@EVERY
def test_cached_decoding_equals_the_full_forward(name):
    model, tokens = model_of(name), tokens_of(name)
    step = jax.jit(forward)
    out = step(model, tokens[:, :4], cache=init_cache(CONFIGS[name], 2, 16))
    logits = [out.logits]
    for t in range(4, 11):
        out = step(model, tokens[:, t : t + 1], cache=out.cache)
        logits.append(out.logits)
    chex.assert_trees_all_close(
        jnp.concatenate(logits, 1), _reference(name).logits, atol=1e-5, rtol=1e-5
    )


@EVERY
def test_left_padding_does_not_change_a_row(name):
    model, tokens = model_of(name), tokens_of(name)
    padded = jnp.concatenate([jnp.zeros((2, 3), int), tokens], 1)
    ids = jnp.concatenate([jnp.zeros((2, 3), int), jnp.ones_like(tokens)], 1)
    out = jax.jit(forward)(model, padded, segment_ids=ids)
    chex.assert_trees_all_close(out.logits[:, 3:], _reference(name).logits, atol=1e-5, rtol=1e-5)


def test_a_padded_cache_goes_on_without_being_told():
    """Positions after left padding count tokens, not slots."""
    model, tokens = model_of("gpt2"), tokens_of("gpt2")
    padded = jnp.pad(tokens[:, :6], ((0, 0), (3, 0)))
    ids = (jnp.arange(9) >= 3).astype(int) * jnp.ones((2, 1), int)
    cache = forward(model, padded, segment_ids=ids, cache=init_cache(CONFIGS["gpt2"], 2, 16)).cache
    out = forward(model, tokens[:, 6:], cache=cache)
    chex.assert_trees_all_close(out.logits, _reference("gpt2").logits[:, 6:], atol=1e-5)


def test_nested_lists_are_tokens():
    tokens = tokens_of("llama")
    out = forward(model_of("llama"), tokens.tolist())
    chex.assert_trees_all_close(out.logits, _reference("llama").logits, atol=1e-5)


@EVERY
def test_packed_documents_do_not_see_each_other(name):
    model, tokens = model_of(name), tokens_of(name)
    ids = jnp.array([[1] * 5 + [2] * 6] * 2)
    out = jax.jit(forward)(model, tokens, segment_ids=ids)
    first, second = forward(model, tokens[:, :5]), forward(model, tokens[:, 5:])
    want = jnp.concatenate([first.logits, second.logits], 1)
    chex.assert_trees_all_close(out.logits, want, atol=1e-5, rtol=1e-5)


@EVERY
def test_no_position_depends_on_later_tokens(name):
    model = model_of(name)
    embed = jax.random.normal(jax.random.key(0), (1, 7, CONFIGS[name].model_dim))
    read = lambda e: forward(model, None, embeddings=e).logits[0, 3].sum()
    grad = jnp.abs(jax.jit(jax.grad(read))(embed))[0].max(-1)
    assert (grad[4:] == 0).all()
    assert (grad[:4] > 0).sum() >= 1


@EVERY
def test_embeddings_stand_in_for_tokens(name):
    model, tokens = model_of(name), tokens_of(name)
    embed = record(forward, "embed")(model, tokens).seen["embed"]
    out = jax.jit(lambda e: forward(model, None, embeddings=e))(embed)
    chex.assert_trees_all_close(out.logits, _reference(name).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "remat"),
    [("llama", "full"), ("llama", "dots"), ("neox", "names:z,mlp_post"), ("gemma", "full")],
)
def test_rematerialisation_changes_no_gradient(name, remat):
    model, tokens = model_of(name), tokens_of(name)
    loss = lambda m: jnp.square(forward(m, tokens).logits).mean()
    want = jax.jit(jax.grad(loss))(model)
    got = jax.jit(jax.grad(loss))(with_config(model, remat=remat))
    chex.assert_trees_all_close(jax.tree.leaves(got), jax.tree.leaves(want), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("gpt2", "data:2,model:4"),
        ("gpt2", "context:8"),
        ("neox", "fsdp:8"),
        ("gptj", "model:2"),
        ("llama", "data:2,fsdp:2,model:2"),
        ("llama", "context:4,model:2"),
        ("gemma", "data:2,fsdp:4"),
    ],
)
def test_sharded_equals_single(name, spec):
    mesh = parallel.make_mesh(spec)
    model = parallel.shard(model_of(name), mesh)
    tokens = jnp.tile(tokens_of(name, length=16), (4, 1))
    want = jax.jit(forward)(model_of(name), tokens).logits
    with jax.set_mesh(mesh):
        got = jax.jit(forward)(model, tokens).logits
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=1e-5, rtol=1e-5)


def _perturb(value, amount, ctx):
    """A change no norm or softmax is blind to, as scaling or shifting would be."""
    del ctx
    return value + amount * jnp.sin(1 + jnp.arange(value.size, dtype=value.dtype)).reshape(
        value.shape
    )


@EVERY
def test_every_editable_site_reaches_the_logits(name):
    cfg, model, tokens = CONFIGS[name], model_of(name), tokens_of(name)
    editable = [s for s in sites(cfg) if s not in READ_ONLY]

    @jax.jit
    def run(amounts):  # one program for all sites: amounts [sites]
        shape = lambda site: () if site in OUTER_SITES else (cfg.num_layers,)
        edits = [
            Edit(site, _perturb, jnp.broadcast_to(a, shape(site)))
            for site, a in zip(editable, amounts)
        ]
        return intervene(forward, *edits)(model, tokens).logits

    reference = _reference(name).logits
    chex.assert_trees_all_close(run(jnp.zeros(len(editable))), reference, atol=1e-5)
    for site, amount in zip(editable, 0.1 * jnp.eye(len(editable))):
        assert jnp.abs(run(amount) - reference).max() > 1e-3, site
