"""Splash attention on a mesh: sharded = single in the interpreter, and compiled for a real TPU."""

import functools
import importlib.util
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention import Mask, attention, dense_attention
from jaxheads.attention.contract import Request
from jaxheads.attention.kernels import splash_attention
from jaxheads.taps import NO_TAP

AXES = ("data", "fsdp", "model", "context")


def make_mesh(devices, **sizes):
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "model": 2}, {"fsdp": 2, "context": 2}], ids=["batch-heads", "context"]
)
def test_sharded_splash_equals_dense(sizes):
    """On the context axis each shard must mask with the global index of its queries."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    q, k, v = normal(2, 256, 4, 16), normal(2, 256, 2, 16), normal(2, 256, 2, 16)
    sinks, segments = normal(4), jnp.asarray([[1] * 90 + [2] * 150 + [0] * 16, [1] * 256])
    mask = Mask(is_causal=True, window=120, q_segment_ids=segments)

    def splash(q, k, v, sinks):
        return splash_attention(
            Request(
                q=q,
                k=k,
                v=v,
                mask=mask,
                bias=None,
                scale=0.25,
                soft_cap=None,
                sinks=sinks,
                alibi_slopes=None,
                tap=NO_TAP,
                needs_lse=False,
                platform="cpu",
            )
        )[0]

    dense = lambda q, k, v, sinks: dense_attention(q, k, v, mask, scale=0.25, sinks=sinks)[0]
    grads = lambda f: jax.jit(
        jax.value_and_grad(lambda *x: (f(*x) ** 2).sum(), argnums=(0, 1, 2, 3))
    )(q, k, v, sinks)
    with jax.set_mesh(make_mesh(jax.devices()[:4], **sizes)):
        got = grads(splash)
    chex.assert_trees_all_close(got, grads(dense), rtol=1e-4, atol=1e-4)


@functools.cache
def tpu_devices():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    "sizes, head_dim, options",
    [
        ({"data": 2, "model": 2}, 128, {}),
        ({"fsdp": 4}, 64, {"window": 256, "segment_ids": True}),
        ({"model": 2, "context": 2}, 256, {"soft_cap": 30.0, "segment_ids": True}),
        ({"data": 4}, 96, {"is_causal": False, "sinks": True}),
    ],
    ids=["data-model", "fsdp", "model-context", "bidirectional"],
)
def test_splash_compiles_for_tpu_forward_and_backward(sizes, head_dim, options):
    mesh = make_mesh(tpu_devices(), **sizes)
    sharding = lambda *spec: jax.sharding.NamedSharding(mesh, jax.P(*spec))
    batch = ("data", "fsdp")
    qkv = sharding(batch, "context", "model", None)
    array = lambda heads: jax.ShapeDtypeStruct(
        (4, 1024, heads, head_dim), jnp.bfloat16, sharding=qkv
    )
    segments = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=sharding(batch, "context"))
    sinks = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding("model"))

    def loss(q, k, v, sinks, segments):
        given = {"sinks": sinks, "segment_ids": segments}
        z = attention(
            q,
            k,
            v,
            **{key: given.get(key, value) for key, value in options.items()},
        )
        return z.astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
        args = (array(8), array(4), array(4), sinks, segments)
        compiled = step.trace(*args).lower(lowering_platforms=("tpu",)).compile()
    # One kernel forward, one for dq and one for dk and dv.
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
