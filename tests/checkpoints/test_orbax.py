"""Checkpoints: round trip on other meshes, what is kept, what interrupted saves leave."""

import dataclasses
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads import parallel
from jaxheads.checkpoints import orbax
from jaxheads.fields import to_json
from jaxheads.models import Decoder, ModelConfig

CFG = ModelConfig(vocab_size=32, num_layers=2, model_dim=16, num_heads=4, max_positions=32)
DATA = {"step": 3, "rows": [0, 4], "documents": [[[1]]], "used": [[[2]]], "description": {}}


def build(cfg=CFG, seed=0):
    return Decoder(cfg, rngs=nnx.Rngs(seed))


def make_training(model):
    moments = jax.tree.map(lambda x: x * 2, model)
    return {"step": jnp.asarray(7), "key": jax.random.key(5), "opt_state": (moments, jnp.ones(3))}


def save(checkpoints, step, model, eval_loss=None, cfg=CFG):
    checkpoints.save(
        step,
        model=model,
        training=make_training(model),
        config={"model": to_json(cfg)},
        data_state=DATA,
        eval_loss=eval_loss,
    )


def like(mesh, cfg=CFG):
    return (
        orbax.abstract(lambda: build(cfg), mesh),
        orbax.abstract(lambda: make_training(build(cfg)), mesh),
    )


def assert_same(a, b):
    flat_a, flat_b = orbax.flatten(a), orbax.flatten(b)
    assert flat_a.keys() == flat_b.keys()
    for name, x in flat_a.items():
        y = flat_b[name]
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


@pytest.mark.parametrize("mesh", ["data:2,fsdp:2,model:2", "model:4", "fsdp:2", "1"])
def test_restores_bit_for_bit_on_any_mesh(tmp_path, mesh):
    model = parallel.shard(build(), parallel.make_mesh("fsdp:2,model:4"))
    with orbax.Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 3, model)
    mesh = parallel.make_mesh(mesh)
    with orbax.Checkpoints(tmp_path) as checkpoints:
        read = checkpoints.restore(*like(mesh))
    assert read.step == 3 and read.data_state == DATA
    assert_same(read.model, model)
    assert_same(read.training, make_training(model))
    assert read.model.cfg == CFG
    places = parallel.shardings(read.model, mesh)
    for array, place in zip(jax.tree.leaves(read.model), jax.tree.leaves(places), strict=True):
        assert array.sharding == place


def test_arrays_may_be_donated_right_after_save(tmp_path):
    step = jax.jit(lambda m: jax.tree.map(lambda x: x + 1, m), donate_argnums=0)
    model = parallel.shard(build(), parallel.make_mesh("fsdp:2"))
    before = jax.tree.map(np.array, model)
    with orbax.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(
            1,
            model=model,
            training={"step": jnp.ones(())},
            config={"model": to_json(CFG)},
            data_state=DATA,
        )
        for _ in range(20):
            model = step(model)
        checkpoints.wait()
        assert_same(orbax.load_model(tmp_path), before)


def test_keeps_the_last_and_the_best(tmp_path):
    model, losses = build(), {1: 5.0, 2: 1.0, 3: 2.0, 4: None, 5: 3.0, 6: None}
    with orbax.Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        for step, loss in losses.items():
            save(checkpoints, step, model, loss)
        checkpoints.wait()
        assert checkpoints.steps == [2, 5, 6]
        assert checkpoints.best_step == 2
    with orbax.Checkpoints(tmp_path, keep_last=1, keep_best=2) as checkpoints:  # a resumed run
        save(checkpoints, 7, model, 0.5)
        checkpoints.wait()
        assert checkpoints.steps == [2, 7]


def test_saving_a_step_again_changes_nothing(tmp_path):
    with orbax.Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, build())
        checkpoints.wait()
        save(checkpoints, 1, build(seed=1))
    assert_same(orbax.load_model(tmp_path), build())


@pytest.mark.parametrize("damage", ["metadata", "item", "temporary"])
def test_incomplete_checkpoints_are_skipped_with_a_warning(tmp_path, caplog, damage):
    with orbax.Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, build())
        save(checkpoints, 2, build(seed=1))
    if damage == "metadata":
        (tmp_path / "2/_CHECKPOINT_METADATA").unlink()
    elif damage == "item":
        shutil.rmtree(tmp_path / "2/training")
    else:
        (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp-17")
    with caplog.at_level(logging.WARNING), orbax.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1]
        assert "2" in caplog.text and ("incomplete" in caplog.text or "unfinished" in caplog.text)
        read = checkpoints.restore(*like(parallel.make_mesh("")))
        assert_same(read.model, build())
        save(checkpoints, 2, build(seed=2))  # the step can be reached again
        checkpoints.wait()
        assert checkpoints.steps == [1, 2]


def test_another_model_is_an_error_that_names_the_fields(tmp_path):
    with orbax.Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, build())
        other = dataclasses.replace(CFG, num_layers=3, remat="full")
        with pytest.raises(ValueError, match=r"num_layers: 2 -> 3 ") as error:
            checkpoints.wait()
            checkpoints.restore(*like(parallel.make_mesh(""), other))
        assert "remat" not in str(error.value)


def test_another_optimizer_is_an_error_that_names_the_arrays(tmp_path):
    with orbax.Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, build())
        checkpoints.wait()
        model, training = like(parallel.make_mesh(""))
        training = {"step": training["step"], "momentum": training["opt_state"][1]}
        with pytest.raises(ValueError, match=r"no momentum; a spare key.*optimizer settings"):
            checkpoints.restore(model, training)


def test_load_model_reads_workdir_directory_and_step(tmp_path):
    directory = tmp_path / "checkpoints"
    with orbax.Checkpoints(directory) as checkpoints:
        save(checkpoints, 1, build())
        save(checkpoints, 2, build(seed=1))
    for path, seed in ((tmp_path, 1), (directory, 1), (directory / "1", 0)):
        assert orbax.is_checkpoint(path)
        assert_same(orbax.load_model(path), build(seed=seed))
    half = orbax.load_model(tmp_path, dtype="bfloat16", mesh=parallel.make_mesh("model:2"))
    assert half.cfg.param_dtype == "bfloat16"
    np.testing.assert_array_equal(
        np.asarray(half.embed.table[...]),
        np.asarray(build(seed=1).embed.table[...].astype(jnp.bfloat16)),
    )
    assert len(half.layers.attention.wq[...].sharding.device_set) == 2


def test_paths_without_checkpoints(tmp_path):
    assert not orbax.is_checkpoint(tmp_path) and not orbax.is_checkpoint(tmp_path / "no")
    with pytest.raises(ValueError, match=r"holds no complete checkpoint; give the workdir"):
        orbax.load_model(tmp_path)
    with orbax.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps == [] and checkpoints.best_step is None
        with pytest.raises(ValueError, match=r"holds no checkpoint; complete ones: none"):
            checkpoints.config()
        save(checkpoints, 4, build())
        checkpoints.wait()
        with pytest.raises(ValueError, match=r"no checkpoint of step 9; complete ones: 4"):
            checkpoints.config(9)
