"""Logical axes to mesh axes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxheads import parallel
from jaxheads.models import Decoder, ModelConfig
from jaxheads.parallel import RULES, constrain, make_mesh, partition_spec

CFG = ModelConfig(vocab_size=64, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2)
P = jax.P


def build():
    """The model of these tests."""
    return Decoder(CFG, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("embed", "heads", "head_dim"), (32, 4, 8), P("fsdp", "model", None)),
        (("layers", "mlp", "embed"), (2, 64, 32), P(None, "model", "fsdp")),
        (("batch", "length", "act_embed"), (4, 8, 32), P(("data", "fsdp"), None, None)),
        (("batch", None), (8, 3), P(("data", "fsdp"), None)),
    ],
)
def test_specs(axes, shape, spec):
    assert partition_spec(axes, shape, make_mesh("data:2,fsdp:2,model:2")) == spec


def test_two_names_on_one_mesh_axis_is_an_error():
    with pytest.raises(ValueError, match="'heads' and 'mlp' both map to mesh axis 'model'"):
        partition_spec(("heads", "mlp"), (4, 4), make_mesh("model:2"))


def test_uneven_heads_are_an_error_naming_the_numbers():
    mesh = make_mesh("model:4")
    with pytest.raises(ValueError, match=r"attention.wk: axis 'kv_heads' has size 2, .* size 4"):
        parallel.shardings(jax.eval_shape(build), mesh)
    rules = {**RULES, "kv_heads": None}
    places = parallel.shardings(jax.eval_shape(build), mesh, rules)
    assert places.layers.attention.wk.get_value().spec == P(None, None, None, None)


def test_uneven_vocabulary_is_kept_whole():
    assert partition_spec(("vocab", "embed"), (51, 32), make_mesh("model:2")) == P(None, None)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [(("foo",), (2,), "no rule for logical axis 'foo'"), (("embed",), (2, 2), "1 axis names")],
)
def test_bad_axes(axes, shape, message):
    with pytest.raises(ValueError, match=message):
        partition_spec(axes, shape, make_mesh("data:2"))


def test_initialize_gives_each_device_its_shard_of_the_same_model():
    mesh = make_mesh("fsdp:2,model:2")
    model, alone = parallel.initialize(build, mesh), parallel.initialize(build)
    wq = model.layers.attention.wq[...]
    assert wq.addressable_shards[0].data.shape == (2, 16, 2, 8)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-6)


def test_optimiser_state_is_sharded_like_the_parameters():
    mesh = make_mesh("fsdp:2,model:2")
    state = jax.eval_shape(lambda: optax.adamw(1e-3).init(build()))
    places = parallel.shardings(state, mesh)
    assert places[0].mu.layers.mlp.w_in.get_value().spec == P(None, "fsdp", "model")
    assert places[0].nu.embed.table.get_value().spec == P("model", "fsdp")
    assert places[0].count.spec == P()


def test_shard_moves_a_model():
    mesh = make_mesh("model:2")
    model = parallel.shard(parallel.initialize(build), mesh)
    assert model.layers.mlp.w_out[...].sharding.spec == P(None, "model", None)


def test_constrain_is_the_identity_without_a_mesh_and_inside_shard_map():
    x = jnp.ones((8, 4, 4))
    axes = ("batch", "length", "act_heads")
    assert constrain(x, axes) is x
    mesh = make_mesh("data:4,model:2")
    with jax.set_mesh(mesh):
        assert jax.jit(lambda x: constrain(x, axes))(x).sharding.spec == P("data", None, "model")
        one = jax.jit(lambda x: constrain(x, axes))(x[:1])
        assert one.sharding.spec == P(None, None, "model")
    local = jax.shard_map(
        lambda x: constrain(x, axes), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    assert local(x).shape == x.shape
