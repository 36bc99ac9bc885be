"""Agent attention as a layer of a vision transformer, against its definition in loops."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxheads as jh
from jaxheads.models.agent import AgentOptions, AgentSelfAttention
from jaxheads.models.vit import VIT_PRESETS, ViT, ViTConfig, forward
from jaxheads.parallel import make_mesh, shard
from tests.attention.test_agent import bilinear, by_hand, convolved

GRID, EXTRA, M, H = (4, 4), 1, 16, 2
D, N = M // H, 4
CFG = ViTConfig(image_size=8, patch_size=2, num_layers=2, model_dim=M, num_heads=H, mlp_dim=16)


def loud(make, seed=0):
    """A module with every parameter drawn here, large enough that each matters."""
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype)
    return jax.tree.map(draw, jax.eval_shape(make))


def layer(extra=EXTRA, grid=GRID, **options):
    given = AgentOptions(**{"num_agents": N, **options})
    return loud(lambda: AgentSelfAttention(CFG.block, grid, extra, given, rngs=nnx.Rngs(0)))


def tokens(extra=EXTRA, grid=GRID):
    size = (2, extra + grid[0] * grid[1], M)
    return np.random.default_rng(9).normal(size=size).astype(np.float32)


def raw(module, name):
    return np.asarray(getattr(module, name)[...], np.float64)


def projected(module, x, names="qkv"):
    return [np.einsum("btm,mhd->bthd", x, raw(module, f"w{n}")) + raw(module, f"b{n}")
            for n in names]  # fmt: skip


def tables(module, grid, key_grid, extra):
    """B2 and B1 in loops over places."""
    p = {n: raw(module, n) for n in ("an", "na", "ah", "aw", "ha", "wa")}
    an, na = bilinear(p["an"], key_grid), bilinear(p["na"], grid)
    qa = np.zeros((H, extra + math.prod(grid), N))
    ak = np.zeros((H, N, extra + math.prod(key_grid)))
    for y, x in np.ndindex(*grid):
        qa[:, extra + y * grid[1] + x] = na[:, :, y, x] + p["ha"][0, :, y, 0] + p["wa"][0, :, 0, x]
    for y, x in np.ndindex(*key_grid):
        at = extra + y * key_grid[1] + x
        ak[:, :, at] = an[:, :, y, x] + p["ah"][0, :, :, y, 0] + p["aw"][0, :, :, 0, x]
    if extra:
        qa[:, :extra], ak[:, :, :extra] = raw(module, "ca")[0], raw(module, "ac")[0]
    return qa, ak


def pooled(q, grid):
    cells = q.reshape(q.shape[0], 2, grid[0] // 2, 2, grid[1] // 2, H, D)
    return cells.mean((2, 4)).reshape(-1, N, H, D)


def out(module, z):
    return np.einsum("bthd,hdm->btm", z, raw(module, "wo")) + raw(module, "bo")


RUN = jax.jit(lambda module, x: module(x))


def test_layer_equals_the_definition():
    module, x = layer(), tokens()
    q, k, v = projected(module, x)
    qa, ak = tables(module, GRID, GRID, EXTRA)
    z = by_hand(q, k, v, pooled(q[:, EXTRA:], GRID), qa, ak, np.ones(q.shape[:2]),
                D**-0.5, D**-0.5)  # fmt: skip
    class_only = z[:, :EXTRA].copy()
    conv = raw(module.conv, "weight"), raw(module.conv, "bias")
    z[:, EXTRA:] += convolved(v[:, EXTRA:], *conv, GRID)
    np.testing.assert_array_equal(z[:, :EXTRA], class_only)  # the class token is not convolved
    np.testing.assert_allclose(RUN(module, x), out(module, z), atol=2e-5)


def test_reduced_keys_equal_the_definition():
    grid = (4, 8)
    module, x = layer(extra=0, grid=grid, sr_ratio=2), tokens(0, grid)
    kernel, reduced = raw(module.reduction, "kernel"), np.zeros((2, 2, 4, M))
    image = x.reshape(2, *grid, M).astype(float)
    for y, c, i, j in np.ndindex(2, 4, 2, 2):
        reduced[:, y, c] += image[:, 2 * y + i, 2 * c + j] @ kernel[i, j]
    reduced += raw(module.reduction, "bias")
    reduced -= reduced.mean(-1, keepdims=True)
    reduced /= np.sqrt((reduced**2).mean(-1, keepdims=True) + 1e-5)
    reduced = reduced * raw(module.reduction.norm, "weight") + raw(module.reduction.norm, "bias")
    (q,) = projected(module, x, "q")
    k, v = projected(module, reduced.reshape(2, 8, M), "kv")
    qa, ak = tables(module, grid, (2, 4), 0)
    z = by_hand(q, k, v, pooled(q, grid), qa, ak, np.ones((2, 8)), D**-0.5, D**-0.5)
    large = bilinear(np.moveaxis(v.reshape(2, 2, 4, H, D), (1, 2), (-2, -1)), grid)
    large = np.moveaxis(large, (-2, -1), (1, 2)).reshape(2, 32, H, D)
    z += convolved(large, raw(module.conv, "weight"), raw(module.conv, "bias"), grid)
    np.testing.assert_allclose(RUN(module, x), out(module, z), atol=2e-5)


@pytest.mark.parametrize("agents", ["strided", "frozen"])
def test_other_agents(agents):
    module, x = layer(agents=agents, use_dwc=False, use_bias=False), tokens()
    q, k, v = projected(module, x)
    if agents == "strided":  # the middle of cells of 2 x 2: their last token
        chosen = q[:, EXTRA:].reshape(2, *GRID, H, D)[:, 1::2, 1::2].reshape(2, N, H, D)
    else:
        chosen = np.stack([raw(module, "agents")] * 2)
    zeros = np.zeros((H, 17, N)), np.zeros((H, N, 17))
    z = by_hand(q, k, v, chosen, *zeros, np.ones((2, 17)), D**-0.5, D**-0.5)
    np.testing.assert_allclose(RUN(module, x), out(module, z), atol=2e-5)


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 1)), jnp.float32)


def build(attention):
    cfg = dataclasses.replace(CFG, attention=attention)
    return loud(lambda: ViT(cfg, rngs=nnx.Rngs(0)))


def test_every_parameter_learns_unless_frozen():
    slope = jax.jit(jax.grad(lambda module, x: jnp.sum(jnp.sin(module(x)))))
    grads = slope(layer(), tokens())
    for name in ("wq", "wk", "wv", "an", "na", "ah", "aw", "ha", "wa", "ac", "ca"):
        assert np.abs(getattr(grads, name)[...]).min() > 0, name
    assert np.abs(grads.conv.weight[...]).min() > 0
    fixed = slope(layer(num_agents=3, agents="frozen", use_bias=False, use_dwc=False), tokens())
    assert (fixed.agents[...] == 0).all() and (fixed.wq[...] != 0).any()


def test_linear_row_equals_a_double_loop():
    from jaxheads.models.vit_attention import VISION_ATTENTIONS
    from jaxheads.taps import NO_TAP

    cfg = dataclasses.replace(CFG, attention="linear(use_dwc=true)")
    row = VISION_ATTENTIONS["linear"]
    module, x = loud(lambda: row.module(cfg, rngs=nnx.Rngs(0))), tokens()
    q, k, v = projected(module, x)
    phi = lambda a: np.where(a > 0, a + 1, np.exp(np.minimum(a, 0)))
    z = np.zeros_like(q)
    for b, t, h in np.ndindex(*q.shape[:3]):
        weights = np.array([phi(q[b, t, h]) @ phi(k[b, s, h]) for s in range(17)])
        z[b, t, h] = weights / weights.sum() @ v[b, :, h]
    conv = raw(module.conv, "weight"), raw(module.conv, "bias")
    z[:, EXTRA:] += convolved(v[:, EXTRA:], *conv, GRID)
    y = jax.jit(lambda m, x: row.attend(m, x, cfg, NO_TAP))(module, x)
    np.testing.assert_allclose(y, out(module, z), atol=2e-5)


def test_split_over_devices(images):
    """Batch and heads over a mesh."""
    model = build("agent(num_agents=4)")
    wanted = forward(model, images).logits
    mesh = make_mesh("data:2,model:2")
    with jax.set_mesh(mesh):
        logits = forward(shard(model, mesh), images).logits
    np.testing.assert_allclose(logits, wanted, atol=1e-4)


def test_start():
    """Biases are drawn from a cut normal; parameters have the shapes of the options."""

    @jax.jit
    def start(key):
        rngs = nnx.Rngs(params=key)
        module = AgentSelfAttention(CFG.block, (8, 8), 2, AgentOptions(16), rngs=rngs)
        return module.an[...], module.ca[...], module.conv.weight[...]

    an, ca, weight = map(np.asarray, start(jax.random.key(0)))
    assert an.shape == (H, 16, 7, 7) and 0.016 < an.std() < 0.0195 and np.abs(an).max() <= 0.04
    assert ca.shape == (1, H, 2, 16) and 0.2 < np.abs(weight).max() <= 1 / 3
    assert build("agent(num_agents=5,agents=learned)").layers.attention.agents.shape == (2, 5, H, D)


def test_saved_and_loaded(tmp_path):
    model = build("agent(num_agents=3,agents=learned)")
    jh.save(model, tmp_path)
    again = jh.load(tmp_path)
    assert again.cfg == model.cfg
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(one, other)


def test_published_size():
    """Agent-DeiT-T has 6.0 million parameters, DeiT-T 5.7."""
    count = lambda name: sum(
        x.size for x in jax.tree.leaves(jax.eval_shape(
            lambda: ViT(VIT_PRESETS[name](), rngs=nnx.Rngs(0))
        ))
    )  # fmt: skip
    assert round(count("agent-deit-t") / 1e6, 1) == 6.0 and round(count("deit-t") / 1e6, 1) == 5.7
    assert VIT_PRESETS["agent-deit-b"]().mixer.options.num_agents == 81


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build("agent(num_agents=5)"), "num_agents=5 is not a perfect square"),
        (lambda: build("agent(num_agents=25)"), "5 cells along a side of 4"),
        (lambda: build("agent(agents=mean)"), "agents='mean'"),
        (lambda: build("agent(num_agents=0)"), "num_agents=0"),
        (lambda: build("agent(num_agents=4,sr_ratio=2)"), "class tokens"),
        (lambda: layer(extra=0, sr_ratio=3), "sr_ratio=3 does not divide grid"),
        (lambda: build("agent(num_agent=4)"), "did you mean 'num_agents'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
