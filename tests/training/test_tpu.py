"""The train step of a Llama compiled for TPUs that are not there."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxheads import parallel
from jaxheads.models import PRESETS, Decoder
from jaxheads.parallel.program import analyze
from jaxheads.training import TrainConfig, init_state, make_optimizer, make_train_step
from jaxheads.training.step import batch_sharding, state_shardings

# Sizes whose product no weight happens to share.
BATCH, LENGTH, VOCAB = 16, 2304, 32128


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.parametrize("spec", ["fsdp:16", "fsdp:4,model:2,context:2"])
def test_the_train_step_compiles_for_a_slice_of_16_chips(spec):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    mesh = parallel.make_mesh(spec, devices=devices, exact=True)
    model_cfg = dataclasses.replace(
        PRESETS["llama3-8b"](),
        vocab_size=VOCAB,
        num_layers=2,
        remat="full",
        compute_dtype="bfloat16",
    )
    cfg = TrainConfig()
    optimizer = make_optimizer(cfg)
    shapes = jax.eval_shape(
        lambda: init_state(lambda: Decoder(model_cfg, rngs=nnx.Rngs(0)), optimizer)
    )
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    state = jax.tree.map(place, shapes, state_shardings(shapes, mesh))
    tokens = jax.ShapeDtypeStruct(
        (BATCH, LENGTH), jnp.int32, sharding=batch_sharding(mesh, (BATCH, LENGTH))
    )
    batch = dict.fromkeys(("tokens", "targets"), tokens)
    compiled = make_train_step(cfg, optimizer, mesh).lower(state, batch).compile()

    text = compiled.as_text()
    assert text.count("tpu_custom_call") >= 3  # splash forward, dq, dk and dv
    shapes = re.findall(r"\[([\d,]+)\]\{", text)
    sizes = {math.prod(map(int, shape.split(","))) for shape in shapes}
    assert BATCH * LENGTH * VOCAB // mesh.size not in sizes  # the logits of a device's tokens
    context = mesh.shape["context"]
    assert BATCH * LENGTH * model_cfg.model_dim // (mesh.shape["fsdp"] * context) in sizes
    memory = compiled.memory_analysis()
    params = 12 * model_cfg.num_params // 16  # float32 weights and two moments, evenly split
    assert memory.argument_size_in_bytes < 1.1 * params * (1 if "model" not in spec else 2)
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 16 * 2**30


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_temporaries_are_what_the_step_must_hold():
    """No second copy of the weights, no gathered table, no float32 stack of gradients."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    layers, length, chips = 4, 4096, 16
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    mesh = parallel.make_mesh("fsdp:16", devices=devices, exact=True)
    model = dataclasses.replace(
        PRESETS["llama3.1-8b"](), num_layers=layers, remat="full", compute_dtype="bfloat16"
    )
    cfg = TrainConfig()
    optimizer = make_optimizer(cfg)
    shapes = jax.eval_shape(lambda: init_state(lambda: Decoder(model, rngs=nnx.Rngs(0)), optimizer))
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    state = jax.tree.map(place, shapes, state_shardings(shapes, mesh))
    tokens = jax.ShapeDtypeStruct(
        (chips, length), jnp.int32, sharding=batch_sharding(mesh, (chips, length))
    )
    step = make_train_step(cfg, optimizer, mesh)
    compiled = step.lower(state, dict.fromkeys(("tokens", "targets"), tokens)).compile()
    text = compiled.as_text()

    width, hidden, vocab = model.model_dim, model.mlp_dim, model.vocab_size
    tables = 2 * vocab * width // chips  # entries of both on a chip
    weights = model.num_params // chips - tables
    residuals = 2 * layers * length * width
    gradients = 2 * weights + 4 * tables
    mlp = 2 * 11 * length * hidden  # its weights and activations, and their gradients
    bound = residuals + gradients + mlp
    assert compiled.memory_analysis().temp_size_in_bytes < bound

    sizes = {math.prod(map(int, s.split(","))) for s in re.findall(r"\[([\d,]+)\]", text)}
    assert vocab * width not in sizes and length * vocab not in sizes
    assert vocab * width // chips in sizes  # so the search finds them
    kernels = sum(kernel.count for kernel in analyze(text, dict(mesh.shape)).kernels)
    assert kernels == 4 * layers  # forward, forward again, gradients of q and of k and v
