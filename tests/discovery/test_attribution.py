"""Attribution: sums that must come out exactly, and edges against derivatives taken literally."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.discovery import logit_difference
from jaxheads.discovery.activation import activation_patch
from jaxheads.discovery.attribution import attribution_patch, edge_attribution, logit_attribution
from jaxheads.discovery.edges import add
from jaxheads.models import forward
from jaxheads.models.layers import apply_mlp, normalize
from jaxheads.taps import Edit, intervene, record
from tests.configs import CONFIGS, model_of, tokens_of

MODELS = ("gpt2", "neox", "llama")
BATCH, LENGTH = 2, 5
ANSWER, WRONG = [5, 6], [8, 9]
METRIC = logit_difference(ANSWER, WRONG)


def prompts(name):
    """(model, clean tokens, corrupt tokens)"""
    return (
        model_of(name),
        tokens_of(name, BATCH, LENGTH, seed=3),
        tokens_of(name, BATCH, LENGTH, seed=4),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_terms_add_up_to_the_logit_difference(name):
    model, tokens, _ = prompts(name)
    out = forward(model, tokens)
    cap = CONFIGS[name].logit_soft_cap
    logits = out.logits if cap is None else cap * jnp.arctanh(out.logits / cap)
    got = logit_attribution(forward, model, tokens, ANSWER, WRONG)
    assert got.heads.shape == (CONFIGS[name].num_layers, CONFIGS[name].num_heads, BATCH)
    np.testing.assert_allclose(got.total, METRIC(logits), atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_head_is_worth_what_its_output_adds(name):
    model, tokens, _ = prompts(name)
    cfg = model.cfg
    seen = record(forward, "head_out", "final_norm_scale")(model, tokens).seen
    scale = np.asarray(seen["final_norm_scale"][:, -1], np.float64)
    gain = np.asarray(model.final_norm.weight[...], np.float64)
    table = model.embed.table[...] if cfg.tie_embeddings else model.unembed.kernel[...].T
    table = np.asarray(table, np.float64)
    want = {"raw": [], "gain": [], "frozen": []}
    for layer in range(cfg.num_layers):
        for head in range(cfg.num_heads):
            r = np.asarray(seen["head_out"][layer, :, -1, head], np.float64)
            u = table[ANSWER] - table[WRONG]
            want["raw"].append((r * u).sum(-1))
            want["gain"].append((r * gain * u).sum(-1))
            r = r - r.mean(-1, keepdims=True) if cfg.norm == "layernorm" else r
            want["frozen"].append((r / scale * gain * u).sum(-1))
    for norm, rows in want.items():
        got = logit_attribution(forward, model, tokens, ANSWER, WRONG, norm=norm).heads
        np.testing.assert_allclose(got.reshape(-1, BATCH), rows, atol=1e-5)


def test_the_position_read_is_a_choice():
    model, tokens, _ = prompts("llama")
    at = jnp.array([2, 4])
    got = logit_attribution(forward, model, tokens, ANSWER, WRONG, position=at)
    want = logit_difference(ANSWER, WRONG, positions=at)(forward(model, tokens).logits)
    np.testing.assert_allclose(got.total, want, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "site"), [("gpt2", "z"), ("llama", "k"), ("neox", "pattern"), ("llama", "mlp_out")]
)
def test_attribution_is_the_linear_limit_of_patching(name, site):
    model, clean, corrupt = prompts(name)
    run = record(forward, site)
    held, other = run(model, clean).seen[site], run(model, corrupt).seen[site]
    base = METRIC(forward(model, clean).logits).mean()
    got = attribution_patch(forward, model, clean, {site: other}, site, metric=METRIC)
    step = 1e-2
    ends = [
        activation_patch(
            forward, model, clean, {site: held + s * (other - held)}, site, metric=METRIC
        )
        for s in (step, -step)
    ]
    want = (ends[0] - ends[1]) / (2 * step)
    assert got.shape == want.shape
    assert float(jnp.abs(got).max()) > 0.01
    np.testing.assert_allclose(got, want, atol=2e-3 * float(jnp.abs(got).max()) + 1e-4)
    assert not np.allclose(got, ends[0] - base)


EDGES = {
    "gpt2": [("0.1", "1.2.q"), ("1.3", "mlp1"), ("mlp0", "2.1.k"), ("embed", "0.0.v"),
             ("2.2", "logits"), ("1.0", "2.3.v")],
    "neox": [("0.1", "1.2.q"), ("0.3", "mlp1"), ("mlp0", "2.1.k"), ("embed", "mlp0"),
             ("mlp2", "logits")],
    "llama": [("0.1", "1.2.q"), ("1.3", "mlp1"), ("mlp0", "2.1.k"), ("embed", "1.0.v"),
              ("2.2", "logits")],
    "gptj": [("0.1", "mlp1"), ("mlp0", "2.1.k")],
    "gemma": [("0.1", "2.2.q"), ("1.3", "mlp1"), ("0.2", "3.0.k"), ("mlp2", "4.0.v")],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in ("gemma", "gptj") else n for n in EDGES],
)
def test_an_edge_is_the_derivative_of_moving_one_input_alone(name):
    model, clean, corrupt = prompts(name)
    got = edge_attribution(forward, model, clean, corrupt, METRIC)
    sites = ["q", "k", "v", "resid_pre", "mlp_out", "final_norm_in", "z", "embed"]
    sites += ["resid_mid"] if model.cfg.residual == "sequential" else []
    run = record(forward, *sites)
    seen, other = run(model, clean).seen, run(model, corrupt).seen

    @jax.jit
    @jax.grad
    def derivatives(amounts, model, seen, other):
        edits = [
            _move(model, seen, down, amount * _written(model, seen, other, up))
            for amount, (up, down) in zip(amounts, EDGES[name])
        ]
        return METRIC(intervene(forward, *edits)(model, clean).logits).mean()

    want = derivatives(jnp.zeros(len(EDGES[name])), model, seen, other)
    columns = {node: i for i, node in enumerate(got.upstream_names)}
    scores = [_row(got, down)[columns[up]] for up, down in EDGES[name]]
    np.testing.assert_allclose(scores, want, atol=1e-5, rtol=1e-4)
    assert float(jnp.abs(want).min()) > 1e-5


def _block(model, layer):
    return jax.tree.map(lambda a: a[layer], model.layers)


def _written(model, seen, other, node):
    """[B,T,M]: what corrupting a node adds to the residual stream; to first order past a norm."""
    if node == "embed":
        return other["embed"] - seen["embed"]
    if node.startswith("mlp"):
        return (other["mlp_out"] - seen["mlp_out"])[int(node[3:])]
    layer, head = map(int, node.split("."))
    block, clean = _block(model, layer), seen["z"][layer]
    wo = block.attention.wo[...]
    change = (other["z"][layer] - clean)[:, :, head] @ wo[head]
    if block.ln1_post is None:
        return change
    written = jnp.einsum("bthd,hdm->btm", clean, wo)
    post = lambda s: normalize(block.ln1_post, written + s * change, model.cfg)
    return jax.jvp(post, (0.0,), (1.0,))[1]


def _row(scores, name):
    if name == "logits":
        return scores.logits
    if name.startswith("mlp"):
        return scores.mlp[int(name[3:])]
    layer, head, site = name.split(".")
    return getattr(scores, site)[int(layer), int(head)]


def _move(model, seen, name, change):
    """The edit that adds a change to the residual stream as one input alone reads it."""
    cfg = model.cfg
    if name == "logits":
        return Edit("final_norm_in", add, change)
    if name.startswith("mlp"):
        layer = int(name[3:])
        block = _block(model, layer)
        x = seen["resid_mid" if cfg.residual == "sequential" else "resid_pre"][layer]

        def read_mlp(x):
            norm = block.ln1 if block.ln2 is None else block.ln2
            out = apply_mlp(block.mlp, normalize(norm, x, cfg), cfg)
            return out if block.ln2_post is None else normalize(block.ln2_post, out, cfg)

        return Edit("mlp_out", add, read_mlp(x + change) - read_mlp(x), layer=layer)
    layer, head, site = name.split(".")
    layer, head = int(layer), int(head)
    weights = _block(model, layer).attention
    bias, norm = getattr(weights, f"b{site}"), getattr(weights, f"{site}_norm", None)

    def read_head(x):
        x = normalize(_block(model, layer).ln1, x, cfg)
        y = jnp.einsum("btm,mhd->bthd", x, getattr(weights, f"w{site}")[...])
        y = y if bias is None else y + bias[...]
        return y if norm is None else normalize(norm, y, cfg)

    x = seen["resid_pre"][layer]
    move = read_head(x + change) - read_head(x)
    alone = (jnp.arange(move.shape[2]) == head)[:, None]
    return Edit(site, add, jnp.where(alone, move, 0), layer=layer)


@pytest.mark.parametrize("name", [*MODELS, pytest.param("gemma", marks=pytest.mark.slow)])
def test_edges_of_a_head_add_up_to_its_attribution(name):
    model, clean, corrupt = prompts(name)
    edges = edge_attribution(forward, model, clean, corrupt, METRIC)
    source = record(forward, "z")(model, corrupt)
    want = attribution_patch(forward, model, clean, source, metric=METRIC)
    np.testing.assert_allclose(edges.heads(), want, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_integrated_gradients_are_complete():
    model, clean, corrupt = prompts("llama")
    gap = METRIC(forward(model, corrupt).logits) - METRIC(forward(model, clean).logits)
    gap = float(gap.mean())
    misses = []
    for steps in (16, 64, 256):
        edges = edge_attribution(
            forward, model, clean, corrupt, METRIC, method="eap-ig", num_steps=steps
        )
        misses.append(abs(float(edges.embed()) - gap))
    assert misses[-1] < 0.01 * abs(gap)
    assert misses[1] < misses[0] / 2
    assert misses[2] < misses[1] / 2


def test_one_step_is_plain_edge_attribution():
    model, clean, corrupt = prompts("gpt2")
    plain = edge_attribution(forward, model, clean, corrupt, METRIC)
    one = edge_attribution(forward, model, clean, corrupt, METRIC, method="eap-ig", num_steps=1)
    for a, b in zip(plain, one, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
