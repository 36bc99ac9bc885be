"""The same training run on every kind of mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from jaxheads.models import Decoder
from jaxheads.parallel import make_mesh
from jaxheads.training import TrainConfig, init_state, make_optimizer, make_train_step
from tests.training.cases import TINY, random_batch, random_model

MESHES = ["data:8", "fsdp:8", "model:4", "data:2,fsdp:2,model:2", "fsdp:2,context:4"]
MODELS = {
    "tied-rope-gqa": TINY,
    "untied-learned-bias": dataclasses.replace(
        TINY,
        positions="learned",
        max_positions=16,
        tie_embeddings=False,
        unembed_bias=True,
        norm="layernorm",
        qkv_bias=True,
        mlp_bias=True,
        gated_mlp=False,
        num_kv_heads=8,
    ),
}
STEPS = 20
CFG = TrainConfig(steps=STEPS, lr=1e-2, warmup_steps=2, z_loss=1e-3)


def run(name: str, spec: str):
    cfg = MODELS[name]
    optimizer = make_optimizer(CFG)
    mesh = make_mesh(spec)
    state = init_state(random_model(cfg), optimizer, mesh)
    step = make_train_step(CFG, optimizer, mesh)
    losses, norms = [], []
    for i in range(STEPS):
        state, metrics = step(state, random_batch(cfg, seed=i % 4))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return state, np.array(losses), np.array(norms), metrics


@functools.cache
def single(name: str):
    return run(name, "1")[1:3]


@pytest.mark.parametrize("spec", MESHES)
@pytest.mark.parametrize(
    "name", ["tied-rope-gqa", pytest.param("untied-learned-bias", marks=pytest.mark.slow)]
)
def test_twenty_losses_agree_with_one_device(name, spec):
    losses, norms = single(name)
    assert losses[-1] < 0.8 * losses[0]  # it does train
    state, sharded, sharded_norms, metrics = run(name, spec)
    np.testing.assert_allclose(sharded, losses, rtol=1e-5)
    np.testing.assert_allclose(sharded_norms, norms, rtol=1e-4)
    assert all(m.sharding.is_fully_replicated for m in metrics.values())

    # Parameters and both moments occupy one shard, not a copy, per device.
    sizes = dict(part.split(":") for part in spec.split(","))
    model = int(sizes.get("model", 1))
    fsdp = int(sizes.get("fsdp", 1)) * int(sizes.get("context", 1))
    moments = state.opt_state[1][0]
    for owner in (state.model, moments.mu, moments.nu):
        w = owner.layers.mlp.w_in[...]  # [L,M,F]
        assert w.addressable_shards[0].data.shape == (2, 32 // fsdp, 64 // model)
        w = owner.layers.attention.wo[...]  # [L,H,D,M]
        assert w.addressable_shards[0].data.shape == (2, 8 // model, 8, 32 // fsdp)
        table = owner.embed.table[...]
        assert table.addressable_shards[0].data.shape == (64 // model, 32 // fsdp)


def test_state_is_born_in_its_shards_and_equals_one_device():
    optimizer = make_optimizer(CFG)
    build = lambda: Decoder(TINY, rngs=nnx.Rngs(3))
    here = init_state(build, optimizer)
    there = init_state(build, optimizer, make_mesh("fsdp:4,model:2"))
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    for tree in (there.model, there.opt_state[1][0].mu):
        assert tree.layers.mlp.w_in[...].addressable_shards[0].data.shape == (2, 8, 32)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_state_unlike_the_parameters_finds_a_place(optimizer):
    """Factored moments have the axis names of their parameter but not its shape."""
    cfg = TrainConfig(optimizer=optimizer, lr=1e-2)
    optimizer = make_optimizer(cfg)
    losses = {}
    for spec in ("1", "fsdp:2,model:4"):
        mesh = make_mesh(spec)
        state = init_state(random_model(TINY), optimizer, mesh)
        step = make_train_step(cfg, optimizer, mesh)
        for _ in range(3):
            state, metrics = step(state, random_batch(TINY))
        losses[spec] = float(metrics["loss"])
    np.testing.assert_allclose(losses["fsdp:2,model:4"], losses["1"], rtol=1e-4)


@pytest.mark.parametrize(
    ("spec", "shape", "accum", "message"),
    [
        ("data:8", (4, 16), 1, "multiple of 8"),
        ("data:2", (6, 16), 2, "multiple of 4"),
        ("context:4", (4, 18), 1, "context=4"),
    ],
)
def test_batches_that_do_not_split_are_errors(spec, shape, accum, message):
    cfg = TrainConfig(grad_accum=accum)
    step = make_train_step(cfg, make_optimizer(cfg), make_mesh(spec))
    with pytest.raises(ValueError, match=message):
        step(None, {"tokens": np.zeros(shape, np.int32), "targets": np.zeros(shape, np.int32)})
