"""S2-attention over eight devices: split sequences and heads give what one device gives."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention.s2 import ShardPattern, s2_attention, s2_context_parallel
from jaxheads.attention.s2_parallel import mesh_plan, s2_over_mesh

P = jax.P
SLOW = pytest.mark.slow


def arrays(pattern, length, batch=2, head_dim=8, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda heads: jnp.asarray(rng.normal(size=(batch, length, heads, head_dim)), "float32")
    return normal(pattern.num_heads), normal(pattern.kv_heads), normal(pattern.kv_heads)


def mesh_of(**sizes):
    types = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


def outcome(f):
    """z, lse and the gradients of a functional of both."""

    def functional(q, k, v):
        z, lse = f(q, k, v)
        return (z**2).sum() + jnp.sin(lse).sum(), (z, lse)

    return jax.jit(jax.grad(functional, argnums=(0, 1, 2), has_aux=True))


# Every device owns equally many blocks of each class; unequally many; a halo over several devices.
LAYOUTS = {
    "even": (ShardPattern(16, 2, 4, 4), 8 * 4 * 16),
    "uneven classes": (ShardPattern(16, 2, 4, 4), 8 * 3 * 16),
    "long halo": (ShardPattern(16, 4, 4, 4), 8 * 1 * 16),
    "window only": (ShardPattern(16, 40, 4, 4), 8 * 2 * 16),
    "gqa, dense head": (ShardPattern(16, 1, 3, 6, 3, 1, num_dense_heads=1), 8 * 2 * 16),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("segments", [pytest.param(False, marks=SLOW), True])
def test_context_parallel_equals_one_device(layout, segments):
    pattern, length = LAYOUTS[layout]
    q, k, v = arrays(pattern, length)
    ids = jnp.asarray([[1] * (length // 3) + [2] * (length - length // 3)] * 2) * segments
    ids = ids if segments else None
    whole = outcome(
        lambda q, k, v: s2_attention(
            q, k, v, pattern, segment_ids=ids, impl="dense", return_lse=True
        )
    )
    heads = P(None, "context", None, None)

    def local(q, k, v, ids):
        return s2_context_parallel(
            q, k, v, pattern, axis_name="context", segment_ids=ids, return_lse=True
        )

    sharded = jax.shard_map(
        local,
        mesh=mesh_of(context=8),
        in_specs=(heads, heads, heads, P(None, "context")),
        out_specs=(heads, P(None, None, "context")),
    )
    split = outcome(lambda q, k, v: sharded(q, k, v, ids))
    chex.assert_trees_all_close(split(q, k, v), whole(q, k, v), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "sizes", [(2, 4, 1), (2, 2, 2), *(pytest.param(x, marks=SLOW) for x in ((1, 1, 8), (1, 8, 1)))]
)
def test_over_a_mesh_heads_keep_the_classes_of_the_whole_model(sizes):
    pattern = ShardPattern(16, 1, 8, 8)
    q, k, v = arrays(pattern, 8 * 2 * 16)
    whole = outcome(lambda q, k, v: s2_attention(q, k, v, pattern, impl="dense", return_lse=True))
    single = whole(q, k, v)
    mesh = mesh_of(**dict(zip(("data", "model", "context"), sizes, strict=True)))

    def f(q, k, v):
        plan = mesh_plan(q, k, pattern)
        assert plan is not None
        return s2_over_mesh(q, k, v, pattern, plan, scale=8**-0.5)

    with jax.set_mesh(mesh):
        placement = jax.NamedSharding(mesh, P("data", "context", "model", None))
        placed = [jax.device_put(x, placement) for x in (q, k, v)]
        split = outcome(f)(*placed)
    chex.assert_trees_all_close(split, single, rtol=2e-5, atol=2e-5)


def test_a_device_receives_its_classes_and_a_halo_not_the_sequence():
    """The compiled program gathers T/V keys and passes (L - 1) B tokens to the right."""
    pattern = ShardPattern(16, 2, 4, 4)
    length = 8 * 8 * 16
    mesh = mesh_of(context=8)
    spec = P(None, "context", None, None)
    f = jax.shard_map(
        lambda q, k, v: s2_context_parallel(q, k, v, pattern, axis_name="context"),
        mesh=mesh,
        in_specs=(spec,) * 3,
        out_specs=spec,
    )
    text = jax.jit(f).lower(*arrays(pattern, length, batch=1)).compile().as_text()
    kept = length // pattern.stride
    assert "all-gather" in text and "collective-permute" in text
    assert f"f32[1,4,{kept},8]" in text
    for shape in (f"f32[1,4,{length},8]", f"f32[1,{length},4,8]", f"{length},{length}"):
        assert shape not in text


def test_bad_input():
    pattern = ShardPattern(16, 2, 4, 4)
    mesh = mesh_of(context=8)
    spec = P(None, "context", None, None)

    def run(pattern, q, k, v, **options):
        f = lambda q, k, v: s2_context_parallel(q, k, v, pattern, axis_name="context", **options)
        return jax.shard_map(f, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)(q, k, v)

    with pytest.raises(ValueError, match="must not straddle devices"):
        run(pattern, *arrays(pattern, 8 * 24))
    local = pattern.for_heads(0, 2)
    with pytest.raises(ValueError, match="keep the model's pattern and pass residues"):
        run(pattern, *arrays(local, 8 * 16))
    relative = ShardPattern(16, 2, 4, 4, position="relative")
    with pytest.raises(NotImplementedError, match="causal local-stride"):
        run(relative, *arrays(relative, 8 * 16))
    dense = ShardPattern(16, 2, 4, 4, num_dense_heads=1)
    with pytest.raises(NotImplementedError, match="use dense layers"):
        run(dense, *arrays(dense, 8 * 16), residues=jnp.arange(4))
