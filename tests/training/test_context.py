"""Long sequences: layouts, the MLP in chunks and offloading give the step of one device."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention.layouts import LAYOUTS, shard_sequence
from jaxheads.models import forward
from jaxheads.models.order import layout_of, to_layout, to_text
from jaxheads.parallel import make_mesh, shard
from jaxheads.taps import record
from jaxheads.training import TrainConfig, init_state, make_optimizer, make_train_step
from jaxheads.training.loss import loss_sums, next_token_loss
from launch.plan import resolve
from launch.plan_jobs import Request
from launch.plan_report import model_flops, plan, sparse_rows
from tests.training.cases import TINY, random_batch, random_model

MODEL = dataclasses.replace(TINY, num_kv_heads=4)
CFG = TrainConfig()
ROWS, LENGTH = 2, 64


def batch_of(*, segments: bool = False) -> dict[str, np.ndarray]:
    batch = random_batch(MODEL, ROWS, LENGTH)
    if segments:
        ids = np.repeat(np.array([[1] * 5 + [2] * 3, [1] * 2 + [2] * 6]), LENGTH // 8, axis=1)
        batch["segment_ids"] = ids.astype(np.int32)
    return batch


@functools.cache
def loss_and_gradients(spec: str, segments: bool = False, **changes):
    """Loss and gradients by parameter, computed on a mesh."""
    model = random_model(dataclasses.replace(MODEL, **changes))
    mesh = make_mesh(spec)
    loss = lambda model, batch: next_token_loss(forward, model, batch, CFG)[0]
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(loss))(shard(model, mesh), batch_of(segments=segments))
    return jax.device_get((found[0], jax.tree.leaves(found[1])))


def agree(one, other):
    np.testing.assert_allclose(other[0], one[0], rtol=1e-5)
    for a, b in zip(one[1], other[1], strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * max(1.0, np.abs(a).max()), rtol=1e-4)


@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=() if x == "zigzag" else pytest.mark.slow) for x in LAYOUTS]
)
@pytest.mark.parametrize(
    "spec", ["context:4,model:2", pytest.param("context:8", marks=pytest.mark.slow)]
)
def test_every_layout_trains_as_one_device_does(layout, spec):
    attention = f"dmha(schedule=ring,layout={layout})"
    agree(loss_and_gradients("1", True), loss_and_gradients(spec, True, attention=attention))


@pytest.mark.parametrize(
    "spec", [pytest.param("1", marks=pytest.mark.slow), "fsdp:2,context:2,model:2"]
)
def test_an_mlp_in_chunks_is_the_mlp(spec):
    agree(loss_and_gradients("1"), loss_and_gradients(spec, mlp_chunk=5, remat="full"))


@pytest.mark.slow
def test_an_mlp_in_chunks_keeps_its_biases():
    kind = dict(gated_mlp=False, mlp_bias=True, activation="gelu")
    agree(
        loss_and_gradients("1", **kind),
        loss_and_gradients("context:4,model:2", mlp_chunk=4, **kind),
    )


@pytest.mark.parametrize("remat", ["offload:lse,mlp_out"])
def test_offloaded_layer_inputs_give_the_same_step(remat):
    agree(loss_and_gradients("1"), loss_and_gradients("context:4,model:2", remat=remat))


def test_layer_inputs_are_what_is_moved_to_the_host():
    def trace(remat):
        model = random_model(dataclasses.replace(MODEL, remat=remat))
        loss = lambda model: next_token_loss(forward, model, batch_of(), CFG)[0]
        return str(jax.make_jaxpr(jax.grad(loss))(model))

    inputs = f"f32<host>[{ROWS},{LENGTH},{MODEL.model_dim}]"
    assert inputs in trace("offload") and "<host>" not in trace("full")


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
@pytest.mark.parametrize("shape", [(16,), (2, 16), (2, 16, 3)])
def test_tokens_travel_to_their_places_and_back(layout, shape):
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    with jax.set_mesh(make_mesh("context:4,model:2")):
        dealt = jax.jit(to_layout, static_argnums=1)(x, layout)
        back = jax.jit(to_text, static_argnums=1)(dealt, layout)
    np.testing.assert_array_equal(
        dealt, shard_sequence(np.asarray(x), layout, 4, axis=min(1, x.ndim - 1))
    )
    np.testing.assert_array_equal(back, x)


def test_what_leaves_the_model_is_in_the_order_of_the_text():
    cfg = dataclasses.replace(MODEL, attention="dmha(layout=zigzag)")
    model, tokens = random_model(cfg), batch_of()["tokens"]
    with jax.set_mesh(make_mesh("1")):
        want = record(forward, "z", "embed")(model, tokens)
    mesh = make_mesh("context:4")
    with jax.set_mesh(mesh):
        split = shard(model, mesh)
        got = forward(split, tokens)
        seen = record(forward, "z", "embed")(split, tokens).seen
        sums = [loss_sums(forward, m, batch_of(), CFG)[0] for m in (model, split)]
    np.testing.assert_allclose(got.logits, want.logits, atol=2e-5)
    for site in ("z", "embed"):
        np.testing.assert_allclose(seen[site], want.seen[site], atol=1e-5)
    np.testing.assert_allclose(*(s.loss_sum for s in sums), rtol=1e-5)


def test_lengths_that_do_not_fit_are_refused():
    cfg = dataclasses.replace(MODEL, attention="dmha(layout=zigzag)")
    assert layout_of(cfg, 68) == "contiguous"  # one device
    with jax.set_mesh(make_mesh("context:4")):
        assert layout_of(cfg, 64) == "zigzag"
        with pytest.raises(ValueError, match="multiple of 8"):
            layout_of(cfg, 68)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_chunk": -1}, "mlp_chunk=-1"),
        ({"remat": "offload:logits"}, "outside the layer stack"),
        ({"remat": "offloaded"}, "offload"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MODEL, **changes)


def step_memory(length: int, devices: int) -> int:
    """Temporary bytes a device of the train step, compiled and not run."""
    cfg = dataclasses.replace(
        MODEL, attention="dmha(schedule=ring,layout=zigzag,block_q=64,block_k=64)", num_heads=2,
        num_kv_heads=1, remat="full", mlp_chunk=64,
    )  # fmt: skip
    request = Request(
        name="small", model=dataclasses.replace(cfg, compute_dtype="float32"), train=CFG,
        topology=f"cpu:{devices}", mesh=f"context:{devices}", batch_size=1, seq_len=length,
    )  # fmt: skip
    return plan(request).memory.temporaries or 0


@pytest.mark.slow
def test_memory_of_a_device_follows_its_share_of_the_text():
    short, long, split = step_memory(4096, 4), step_memory(16384, 4), step_memory(16384, 8)
    assert abs(np.log(long / short) / np.log(4) - 1) < 0.15
    assert abs(np.log(long / split) / np.log(2) - 1) < 0.15


@pytest.mark.slow
def test_a_split_text_trains():
    cfg = dataclasses.replace(
        MODEL, attention="dmha(schedule=ring,layout=zigzag)", remat="offload", mlp_chunk=64
    )
    train = TrainConfig(steps=8, lr=1e-2, warmup_steps=1)
    optimizer, mesh = make_optimizer(train), make_mesh("context:8")
    state = init_state(random_model(cfg), optimizer, mesh)
    step = make_train_step(train, optimizer, mesh)
    losses = []
    for _ in range(8):
        state, metrics = step(state, random_batch(cfg, 1, 1024))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]


def million(topology: str, mesh: str, length: int, layers: int, attention: str) -> Request:
    return resolve(
        topology=topology,
        model="lm-7b",
        mesh=mesh,
        remat="offload",
        set=[f"model.num_layers={layers}", f"model.attention={attention}", "model.mlp_chunk=1024"],
        sizes={"seq_len": length, "batch_size": 1},
    )


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_million_token_job_in_small_compiles_for_a_slice():
    asked = million("v5e:2x4", "context:4,model:2", 16384, 2, "dmha(schedule=ring,layout=zigzag)")
    report = plan(asked)
    rows = report.to_json()["collectives"]
    cfg, tokens = asked.model, 16384 // 4
    inputs = 2 * cfg.num_layers * tokens * cfg.model_dim
    # bfloat16 inputs of both layers, and here one buffer of that size more than at full depth.
    assert report.fits and inputs <= report.memory.host <= 1.5 * inputs
    # The ring: n - 1 passes of k and v forward, twice (recomputed), and once backward; dk and dv
    # in float32 n times.
    held = 2 * tokens * cfg.num_kv_heads // 2 * cfg.head_dim  # entries of k and v on a chip
    ring = cfg.num_layers * held * (3 * 3 * 2 + 4 * 4)
    # The residual stream to the zigzag's order and back, and the same for its gradients.
    dealt = 4 * 2 * tokens * cfg.model_dim
    sent = {(r["kind"], r["axes"]): r["wire_bytes"] for r in rows}
    assert ring <= sent["collective-permute", "context"] <= ring + dealt
    gathered = sum(r["payload_bytes"] for r in rows if r["kind"] == "all-gather")
    assert gathered < 3 * 2 * cfg.num_params  # weights, never a sequence
    assert 0.6 < report.model_flops / (8 * report.compiled_flops) < 1.1


@pytest.mark.parametrize(
    ("attention", "trips"),
    [("dmha(block_k=256)", 8.0), ("dmha(schedule=all_to_all,block_k=512)", 16.0), ("dense", 1.0)],
)
def test_plans_count_the_tiles_that_a_ring_visits(attention, trips):
    asked = million("cpu:8", "context:4,model:2", 16384, 2, attention)
    assert asked.unknown_trips == trips
    assert asked.kernel_share == (1.0 if attention == "dense" else 0.5)


def test_model_flops_follow_what_sparse_layers_see():
    attention = "s2(block=512,local_blocks=2,stride=8)*3+dmha"
    sparse = million("cpu:8", "context:4,model:2", 65536, 4, attention)
    dense = million("cpu:8", "context:4,model:2", 65536, 4, "dmha")
    (row,) = sparse_rows(sparse)
    assert row["layers"] == 3 and row["dense_tiles"] == 32 * 128 * 129 // 2
    size = 12.0 * 32 * 128  # FLOPs per visible key and token, forward and backward
    fewer = size * 65536 * 3 * (65537 / 2 - row["tiles"] * 512**2 / 32 / 65536)
    assert model_flops(dense) - model_flops(sparse) == pytest.approx(fewer, rel=1e-6)
