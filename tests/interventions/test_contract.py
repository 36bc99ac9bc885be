"""What every wrapper of heads must show; a new wrapper is a new row of `WRAPPERS`."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import heads, models, parallel
from jaxheads.interventions import ablate, mean_z, scale_heads
from jaxheads.models import ModelConfig
from jaxheads.taps import as_tapped, record, sweep
from tests.tiny import tiny_model

L, H, K, D = 3, 4, 2, 4
CFG = ModelConfig(
    vocab_size=31, num_layers=L, model_dim=16, num_heads=H, num_kv_heads=K, mlp_dim=24, window=(3,)
)
TOKENS = np.random.default_rng(0).integers(0, 31, (4, 7))
RNG = np.random.default_rng(1)
CHOSEN = [(0, 1), (2, 0), (2, 3)]
MASK = heads.mask(CHOSEN, L, H)
MEANS = RNG.normal(size=(L, H, D)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return tiny_model(CFG, scale=0.2)


class Wrapper(NamedTuple):
    """How to make the wrapper from a float array [L,H] with 0 = leave alone, 1 = act fully."""

    make: Callable[[Callable, Any], Callable]
    replace: Callable[[np.ndarray], np.ndarray]
    """What full strength turns z [B,T,D] of head (l, h) into, given z [L,B,T,H,D]."""


WRAPPERS = {
    "scale z": Wrapper(lambda f, m: scale_heads(f, 1 - m), lambda z, l, h: 0 * z),
    "scale z by two": Wrapper(lambda f, m: scale_heads(f, 1 + m), lambda z, l, h: 2 * z),
    "ablate zero": Wrapper(ablate, lambda z, l, h: 0 * z),
    "ablate mean": Wrapper(
        partial(ablate, mode="mean", means=MEANS), lambda z, l, h: 0 * z + MEANS[l, h]
    ),
    "ablate resample": Wrapper(
        partial(ablate, mode="resample", key=jax.random.key(3)),
        lambda z, l, h: np.roll(
            z, int(jax.random.randint(jax.random.key(3), (), 1, z.shape[0])), axis=0
        ),
    ),
}
rows = pytest.mark.parametrize("row", WRAPPERS.values(), ids=WRAPPERS.keys())


@jax.jit
def run(forward, model, tokens=TOKENS):
    return forward(model, tokens)


def logits(forward, model):
    return np.asarray(run(as_tapped(forward), model).logits)


@rows
def test_identity_payload_changes_nothing(row, model):
    forward = row.make(models.forward, jnp.zeros((L, H)))
    np.testing.assert_array_equal(logits(forward, model), logits(models.forward, model))


@rows
def test_full_strength_replaces_the_heads_and_only_those(row, model):
    forward = record(row.make(models.forward, MASK.astype(np.float32)), "z")
    after = np.asarray(run(forward, model).seen["z"])
    before = np.array(run(record(models.forward, "z"), model).seen["z"])
    layer = 0  # deeper layers see the change of this one
    for head in range(H):
        want = before[layer, :, :, head]
        if MASK[layer, head]:
            want = row.replace(want, layer, head)
        np.testing.assert_allclose(after[layer, :, :, head], want, atol=1e-6)


@pytest.mark.parametrize("name", ["scale z", "ablate zero"])
def test_full_mask_equals_removing_the_weights(name, model):
    edited = logits(WRAPPERS[name].make(models.forward, MASK.astype(np.float32)), model)
    cut = jax.tree.map(lambda a: a, model)
    cut.layers.attention.wo[...] = cut.layers.attention.wo[...] * (~MASK)[:, :, None, None]
    np.testing.assert_allclose(edited, logits(models.forward, cut), atol=1e-5)
    assert np.abs(edited - logits(models.forward, model)).max() > 1e-3


def test_inner_edits_apply_first(model):
    seen = lambda f: np.asarray(run(record(f, "z"), model).seen["z"])[0, :, :, 1]
    mean = partial(ablate, heads=[(0, 1)], mode="mean", means=MEANS)
    double = partial(scale_heads, gates=np.full((L, H), 2.0))
    np.testing.assert_allclose(seen(double(mean(models.forward)))[0, 0], 2 * MEANS[0, 1], atol=1e-6)
    np.testing.assert_allclose(seen(mean(double(models.forward)))[0, 0], MEANS[0, 1], atol=1e-6)


@rows
def test_vmap_and_sweep_equal_a_loop(row, model):
    payloads = jnp.asarray(1 - heads.leave_one_out(L, H)[:3])
    fn = lambda m: row.make(models.forward, m)(model, TOKENS).logits
    loop = np.stack([logits(row.make(models.forward, m), model) for m in payloads])
    np.testing.assert_allclose(jax.jit(jax.vmap(fn))(payloads), loop, atol=1e-5)
    swept = jax.jit(lambda p: sweep(fn, p, batch_size=2))(payloads)
    np.testing.assert_allclose(swept, loop, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "remat"), [*((name, "none") for name in WRAPPERS), ("ablate mean", "full")]
)
def test_gradient_is_the_finite_difference(name, remat, model):
    row = WRAPPERS[name]
    strengths = jnp.full((L, H), 0.3)
    direction = jnp.asarray(RNG.normal(size=(L, H)), jnp.float32)
    model = models.with_config(model, remat=remat)

    def loss(m):
        out = row.make(models.forward, m)(model, TOKENS).logits
        return jnp.sum(jax.nn.log_softmax(out)[..., 0])

    slope = float(jnp.sum(jax.jit(jax.grad(loss))(strengths) * direction))
    step = 1e-2
    value = jax.jit(loss)
    difference = value(strengths + step * direction) - value(strengths - step * direction)
    assert slope == pytest.approx(float(difference) / (2 * step), rel=2e-2, abs=1e-2)


@rows
def test_on_a_mesh_equals_one_device(row, model):
    forward = row.make(models.forward, MASK.astype(np.float32))
    want = logits(forward, model)
    mesh = parallel.make_mesh("data:2,model:2", devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        out = run(forward, parallel.shard(model, mesh)).logits
    np.testing.assert_allclose(out, want, atol=1e-5)


@pytest.mark.parametrize("name", ["scale z", "ablate zero", "ablate mean"])
def test_inside_shard_map_equals_outside(name, model):
    make = WRAPPERS[name].make
    mesh = parallel.make_mesh("data:2", devices=jax.devices()[:2])
    fn = lambda model, tokens, m: make(models.forward, m)(model, tokens).logits
    sharded = jax.shard_map(
        fn, mesh=mesh, in_specs=(jax.P(), jax.P("data"), jax.P()), out_specs=jax.P("data"),
        check_vma=False,
    )  # fmt: skip
    mask = jnp.asarray(MASK, jnp.float32)
    out = jax.jit(sharded)(model, TOKENS, mask)
    np.testing.assert_allclose(out, logits(make(models.forward, mask), model), atol=1e-5)


@rows
def test_two_payloads_share_one_program(row, model):
    traces = []

    @jax.jit
    def traced(forward, model):
        traces.append(1)
        return forward(model, TOKENS).logits

    first = traced(row.make(models.forward, MASK.astype(np.float32)), model)
    second = traced(row.make(models.forward, 1 - MASK.astype(np.float32)), model)
    assert len(traces) == 1
    assert np.abs(first - second).max() > 1e-4


@rows
def test_gates_of_another_model_are_refused(row, model):
    with pytest.raises(ValueError, match=r"3, 4\], layers x"):
        row.make(models.forward, jnp.zeros((L + 1, H)))(model, TOKENS)


def test_mean_z_leaves_padding_out(model):
    ids = np.array([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [1, 1, 1, 0, 0, 0, 0], [0] * 7])
    z = record(models.forward, "z")(model, TOKENS, segment_ids=ids).seen["z"]
    want = np.asarray(z, np.float64)[:, ids == 1].mean(axis=1)
    out = mean_z(models.forward, model, TOKENS, segment_ids=ids)
    assert out.shape == (L, H, D)
    np.testing.assert_allclose(out, want, atol=1e-5)
    plain = mean_z(models.forward, model, TOKENS)
    np.testing.assert_allclose(plain, mean_z(models.forward, model, TOKENS,
                                             segment_ids=np.ones_like(ids)), atol=1e-6)  # fmt: skip
