"""Agents in a model trained without them: the wrapper against a loop over tokens, its limits."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads.interventions import ablate, agent_plugin
from jaxheads.models import Decoder, ModelConfig
from jaxheads.models.vit import ViT, ViTConfig, forward
from jaxheads.taps import record
from tests.attention.test_token_merge import clusters_of

CFG = ViTConfig(image_size=8, patch_size=2, num_layers=2, model_dim=16, num_heads=2, mlp_dim=16)
GRID, N, H, D = (4, 4), 16, 2, 8


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    start = jax.eval_shape(lambda: ViT(CFG, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype), start)


IMAGES = np.random.default_rng(1).normal(size=(3, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def plain(model):
    return record(forward, "z", "ln1_out")(model, IMAGES)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(model, x, k2, k_sc, r=6, r_agent=12):
    """z of the first layer for one image [17,M], from clusters found in a loop."""
    into = [0, 2, 8, 10]
    get = lambda name: np.asarray(getattr(model.layers.attention, name)[...][0], np.float64)
    heads = lambda y, n: np.einsum("tm,mhd->htd", y, get(f"w{n}")) + get(f"b{n}")[:, None]
    members, groups = (clusters_of(x[1:], into, size) for size in (r, r_agent))
    few = np.array([x[0], *(x[1:][m].mean(0) for m in members)])
    agents = heads(np.array([x[1:][m].mean(0) for m in groups]), "q")
    q, k, v = (heads(few, n) for n in "qkv")
    c = D**-0.5
    read = softmax(c * agents @ k.swapaxes(1, 2)) @ v
    z = softmax(c**k2 * q @ agents.swapaxes(1, 2)) @ read + k_sc * v  # [H,1+N-r,D]
    whole = np.zeros((H, 17, D))
    whole[:, 0] = z[:, 0]
    for slot, m in enumerate(members):
        whole[:, 1 + np.array(m)] = z[:, 1 + slot, None]
    return whole.swapaxes(0, 1)


def test_equals_a_loop(model, plain):
    changed = agent_plugin(forward, ratio=0.4, agent_ratio=0.95, k2=0.3, shortcut=0.075)
    z = record(changed, "z")(model, IMAGES).seen["z"][0]
    x = np.asarray(plain.seen["ln1_out"][0], np.float64)
    wanted = [by_hand(model, one, 0.3, 0.075) for one in x]
    np.testing.assert_allclose(z, wanted, atol=1e-5)
    assert np.abs(z - plain.seen["z"][0]).max() > 0.1


def test_limits(model, plain):
    nothing = agent_plugin(forward, ratio=0.0, agents="none")(model, IMAGES)
    np.testing.assert_allclose(nothing.logits, plain.logits, atol=1e-4)
    merging = agent_plugin(forward, agents="none")(model, IMAGES).logits
    too_many = agent_plugin(forward, agent_ratio=0.5)(model, IMAGES).logits  # 2 * 8 of 10 tokens
    np.testing.assert_array_equal(merging, too_many)
    assert np.abs(merging - plain.logits).max() > 1e-3


def test_controls_differ(model):
    run = lambda **options: np.asarray(agent_plugin(forward, **options)(model, IMAGES).logits)
    merged, random, pooled = run(), run(agents="random", seed=1), run(agents="pooled")
    for one, other in ((merged, random), (merged, pooled), (random, pooled)):
        assert np.abs(one - other).max() > 1e-3


def test_chosen_layers_and_nesting(model, plain):
    last = record(agent_plugin(forward, layers=[1]), "z")(model, IMAGES).seen["z"]
    np.testing.assert_allclose(last[0], plain.seen["z"][0], atol=1e-5)
    assert np.abs(last[1] - plain.seen["z"][1]).max() > 0.1
    quiet = record(ablate(agent_plugin(forward), [(0, 1)]), "z")(model, IMAGES).seen["z"]
    assert (quiet[0, :, :, 1] == 0).all() and (quiet[0, :, :, 0] != 0).any()
    inner = record(agent_plugin(ablate(forward, [(0, 1)])), "z")(model, IMAGES).seen["z"]
    np.testing.assert_allclose(inner, quiet, atol=1e-6)


def test_warns_without_agents():
    with pytest.warns(UserWarning, match="not above ratio=0.4"):
        agent_plugin(forward, agent_ratio=0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent_plugin(forward, ratio=0.0, agents="none")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: agent_plugin(forward, ratio=0.8), r"ratio=0.8 must lie in 0..0.75"),
        (lambda m: agent_plugin(forward, stride=(3, 3))(m, IMAGES), "does not divide grid"),
        (lambda m: agent_plugin(forward, agents="mean"), "agents='mean'"),
        (lambda m: agent_plugin(forward, layers=[]), "changes nothing"),
        (lambda m: agent_plugin(forward, layers=[2])(m, IMAGES), "layers from 0 to 1"),
        (lambda m: agent_plugin(agent_plugin(forward))(m, IMAGES), "attention='merged-agent"),
        (lambda m: record(agent_plugin(forward), "q")(m, IMAGES), "no site 'q'"),
        (
            lambda m: agent_plugin(forward)(
                jax.eval_shape(lambda: Decoder(ModelConfig(), rngs=nnx.Rngs(0))), IMAGES
            ),
            "vision transformers",
        ),
    ],
)
def test_bad_input(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
