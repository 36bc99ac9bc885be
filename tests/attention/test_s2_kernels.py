"""S2 kernels, interpreted on CPU, against float64; and lowered for CUDA."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import parallel
from jaxheads.attention import s2_pallas_gpu, s2_pallas_tpu, s2_splash, s2_worklist
from jaxheads.attention.s2 import ShardPattern
from tests.attention.s2_cases import arrays_of, naive_s2, relative, run_s2

SCALE = 0.3
Launch = s2_pallas_gpu.Launch


def check(attend, pattern, length, head_dim, tolerance=1e-5, dtype=jnp.float32, batch=1):
    arrays = arrays_of(pattern, length, head_dim, batch)
    if dtype != jnp.float32:  # what the kernel reads
        arrays[:3] = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in arrays[:3]]
    attend = functools.partial(attend, pattern=pattern, scale=SCALE)
    found = run_s2(attend, *arrays, dtype=dtype)
    wanted = naive_s2(*arrays, pattern=pattern, scale=SCALE)
    for name, a, b in zip(("z", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        assert relative(a, b) < tolerance, name


# (pattern, length, options): a kernel's own block sizes scale the cases.
def cases(block):
    return {
        "heterogeneous": (ShardPattern(block, 1, 4, num_heads=4), 6 * block, {}),
        "gqa, a dense head, an offset, a ragged end": (
            ShardPattern(
                block, 1, 3, num_heads=6, num_kv_heads=3, num_dense_heads=1, head_offset=1
            ),
            5 * block - 28,
            {},
        ),
        "stride above heads": (
            ShardPattern(block, 2, 4, num_heads=2, allow_incomplete_union=True),
            6 * block,
            {},
        ),
        "homogeneous": (ShardPattern(block, 1, 2, num_heads=2, homogeneous=True), 4 * block, {}),
        "bidirectional": (
            ShardPattern(block, (1, 2), 2, num_heads=2, causal=False),
            4 * block - 9,
            {},
        ),
        "explicit classes": (
            ShardPattern(block, 1, 2, num_heads=2, residues=(1, 0)),
            4 * block,
            {},
        ),
    }


QUICK = ("heterogeneous", "gqa, a dense head, an offset, a ragged end", "bidirectional")
TPU_CASES = [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in cases(128)]


@pytest.mark.parametrize("name", TPU_CASES)
def test_the_tpu_kernel_is_softmax_over_the_visible_tokens(name):
    pattern, length, options = cases(128)[name]
    check(functools.partial(s2_pallas_tpu.attend, **options), pattern, length, 16)


@pytest.mark.parametrize("name", cases(32))
def test_the_gpu_kernel_is_softmax_over_the_visible_tokens(name):
    pattern, length, options = cases(32)[name]
    check(functools.partial(s2_pallas_gpu.attend, **options), pattern, length, 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(128))
def test_splash_by_class_is_softmax_over_the_visible_tokens(name):
    # Splash interpreted on CPU multiplies float32 in its own precision.
    pattern, length, _ = cases(128)[name]
    check(s2_splash.attend, pattern, length, 128, tolerance=2e-5)


@pytest.mark.parametrize("module", [s2_pallas_tpu, s2_pallas_gpu])
def test_bfloat16(module):
    pattern = ShardPattern(128, 1, 2, num_heads=4, num_kv_heads=2)
    check(module.attend, pattern, 500, 32, tolerance=2e-2, dtype=jnp.bfloat16)


def test_stride_one_and_a_long_window_are_dense_causal_attention():
    dense = jax.nn.dot_product_attention
    q, k, v = (
        jnp.asarray(x, jnp.float32) for x in arrays_of(ShardPattern(32, 1, 1, 2), 150, 16)[:3]
    )
    wanted = dense(q, k, v, is_causal=True)
    for pattern in (ShardPattern(32, 1, 1, 2), ShardPattern(32, 5, 2, 2)):
        z, _ = s2_pallas_gpu.attend(q, k, v, pattern)
        assert relative(np.asarray(z), np.asarray(wanted)) < 1e-5


def test_rows_merge_into_larger_query_tiles():
    pattern = ShardPattern(128, 2, 3, num_heads=3)
    check(functools.partial(s2_pallas_tpu.attend, block_q=512), pattern, 900, 16)


@pytest.mark.slow
def test_blocks_larger_than_a_tile_are_split():
    launch = Launch(32, 16, 4, 2)
    attend = functools.partial(s2_pallas_gpu.attend, forward=launch, backward=launch)
    check(attend, ShardPattern(64, 1, 2, num_heads=2), 200, 16)
    check(s2_pallas_tpu.attend, ShardPattern(1024, 1, 2, num_heads=2), 700, 8)


@pytest.mark.parametrize("block", [16, 64])
def test_merged_tiles_of_the_gpu_kernel(block):
    launches = {"forward": Launch(64, 16, 4, 2), "backward": Launch(128, 16, 4, 2)}
    attend = functools.partial(s2_pallas_gpu.attend, **launches)
    check(attend, ShardPattern(block, 3, 4, num_heads=4), 230, 16)


@pytest.mark.slow
def test_long_worklists_are_split_into_launches():
    pattern = ShardPattern(128, 1, 2, num_heads=4, num_kv_heads=2)
    whole = s2_pallas_tpu.make_lists(pattern, _shape(pattern, 1024, 128), 10_000, 1)
    split = s2_pallas_tpu.make_lists(pattern, _shape(pattern, 1024, 128), 20, 1)
    assert whole.rows.shape[1] == 1 and split.rows.shape[1] > 2
    check(functools.partial(s2_pallas_tpu.attend, max_steps=20), pattern, 1024, 16, batch=2)


def _shape(pattern, length, block_q, block_k=None):
    block_k = min(block_q, pattern.block) if block_k is None else block_k
    return s2_worklist.shape_of(pattern, length, block_q, block_k, max(block_q, block_k))


@pytest.mark.parametrize(
    "pattern",
    [
        ShardPattern(64, 4, 16, num_heads=16),
        ShardPattern(64, 2, 4, num_heads=8, num_kv_heads=4, num_dense_heads=1, head_offset=3),
    ],
)
def test_one_visit_per_visible_tile(pattern):
    shape = _shape(pattern, 64 * 50, 64)
    tiles = s2_worklist.tiles_of(pattern, shape)
    counts = np.bincount(tiles.head)
    group = pattern.num_heads // pattern.kv_heads
    np.testing.assert_array_equal(np.repeat(counts, group), pattern.tiles(50))
    seen = np.zeros((pattern.kv_heads, 50, 50), bool)
    seen[tiles.head, tiles.q, tiles.k] = True
    np.testing.assert_array_equal(np.repeat(seen, group, axis=0), pattern.block_mask(50))
    np.testing.assert_array_equal(tiles.is_partial, tiles.q == tiles.k)


def test_a_worklist_entry_holds_every_field():
    pattern = ShardPattern(128, 2, 4, num_heads=4)
    shape = _shape(pattern, 128 * 64, 512, 128)
    tiles = s2_worklist.tiles_of(pattern, shape)
    words = s2_pallas_tpu.make_lists(pattern, shape, 10**6, 1).rows[0, 0]
    assert words[0] == len(tiles.head)
    visit = s2_pallas_tpu._unpack(shape, jnp.asarray(words[1:]))
    for field in ("head", "q", "k", "rows", "is_partial"):
        np.testing.assert_array_equal(getattr(visit, field), getattr(tiles, field))


def test_lists_of_a_million_tokens_fit_scalar_memory():
    pattern = ShardPattern(512, 2, 16, num_heads=32, num_kv_heads=16)
    lists = s2_pallas_tpu.make_lists(pattern, _shape(pattern, 2**20, 512), 180_000, 1)
    tiles = pattern.tiles(2048)[::2].sum()
    assert lists.rows[0, :, 0].sum() == lists.columns[0, :, 0].sum() == tiles
    assert lists.rows.shape[-1] * 4 < 2**20


@pytest.mark.parametrize("module", [s2_pallas_tpu, s2_pallas_gpu])
def test_heads_and_batch_over_a_mesh_keep_their_classes(module):
    pattern = ShardPattern(128, 1, 4, num_heads=8, num_kv_heads=4)
    q, k, v, dz, dlse = (jnp.asarray(x, jnp.float32) for x in arrays_of(pattern, 640, 8, batch=2))

    def both(q, k, v):
        z, lse = module.attend(q, k, v, pattern)
        return (z * dz).sum() + (lse * dlse).sum(), (z, lse)

    run = lambda: jax.jit(jax.value_and_grad(both, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    alone = run()
    with jax.set_mesh(parallel.make_mesh("data:2,model:4")):
        spread = run()
    for a, b in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=2e-5)


def test_vmap_is_a_batch():
    pattern = ShardPattern(32, 1, 2, num_heads=2)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays_of(pattern, 96, 16, batch=4)[:3])
    attend = lambda q, k, v: s2_pallas_gpu.attend(q, k, v, pattern)
    pairs = lambda x: x.reshape(2, 2, *x.shape[1:])
    z, lse = jax.vmap(attend)(pairs(q), pairs(k), pairs(v))
    wanted_z, wanted_lse = attend(q, k, v)
    np.testing.assert_allclose(z.reshape(wanted_z.shape), wanted_z, atol=1e-6)
    np.testing.assert_allclose(lse.reshape(wanted_lse.shape), wanted_lse, atol=1e-6)


def _some_gpu():
    """A GPU to lower for, where this JAX asks which; older ones do not."""
    if "platform" not in inspect.signature(jax.sharding.AbstractDevice).parameters:
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA H200", None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_gpu_kernels_lower_for_cuda(dtype):
    pattern = ShardPattern(64, 4, 8, num_heads=16, num_kv_heads=8)
    q, k = (jax.ShapeDtypeStruct((2, 1000, n, 96), dtype) for n in (16, 8))

    def loss(q, k, v):
        z, lse = s2_pallas_gpu.attend(q, k, v, pattern)
        return z.astype(jnp.float32).sum() + lse.sum()

    with _some_gpu():
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"stablehlo.custom_call @\S*triton\(", text)) == 3
    assert "atomic" not in text


BAD = ShardPattern(64, 1, 2, num_heads=2)


@pytest.mark.parametrize(
    ("module", "pattern", "shapes", "options", "message"),
    [
        (s2_pallas_tpu, BAD, [(1, 128, 2, 8)] * 3, {}, "at least 128"),
        (s2_splash, BAD, [(1, 128, 2, 8)] * 3, {}, "block >= 128"),
        (s2_pallas_gpu, BAD, [(1, 128, 4, 8)] * 3, {}, "for_heads"),
        (s2_pallas_gpu, BAD, [(1, 128, 2, 8), (1, 64, 2, 8), (1, 64, 2, 8)], {}, "do not fit"),
        (
            s2_pallas_gpu,
            BAD,
            [(1, 128, 2, 8)] * 3,
            {"forward": Launch(48, 16, 4, 2)},
            "not a power of two",
        ),
        (
            s2_pallas_gpu,
            BAD,
            [(1, 128, 2, 8)] * 3,
            {"forward": Launch(64, 128, 4, 2)},
            "larger than the sparse block",
        ),
        (
            s2_pallas_tpu,
            ShardPattern(128, 1, 2, num_heads=2, causal=False),
            [(1, 256, 2, 8)] * 3,
            {"block_q": 256},
            "prefix",
        ),
        (
            s2_pallas_tpu,
            ShardPattern(128, 1, 2, num_heads=2),
            [(1, 2048, 2, 8)] * 3,
            {"max_steps": 3},
            "whole rows",
        ),
    ],
)
def test_bad_input_says_what_to_do(module, pattern, shapes, options, message):
    q, k, v = (jnp.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        module.attend(q, k, v, pattern, **options)


def test_bad_dtypes_and_splash_over_shards_of_heads():
    pattern = ShardPattern(128, 1, 2, num_heads=2)
    x = jnp.ones((1, 128, 2, 8))
    with pytest.raises(TypeError, match="one of bfloat16"):
        s2_pallas_gpu.attend(x.astype(jnp.bfloat16), x, x, pattern)
    with (
        jax.set_mesh(parallel.make_mesh("data:4,model:2")),
        pytest.raises(ValueError, match="do not divide"),
    ):
        s2_pallas_tpu.attend(x, x, x, pattern)
    many = jnp.ones((4, 128, 2, 8))
    with (
        jax.set_mesh(parallel.make_mesh("data:4,model:2")),
        pytest.raises(NotImplementedError, match="pallas_tpu"),
    ):
        s2_splash.attend(many, many, many, pattern)
