"""Attention over a split sequence against float64, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention import AxisNames, distributed_attention
from tests.attention.naive import value_and_grads
from tests.attention.split import (
    HEAD_DIM,
    MASKS,
    assert_exact,
    cotangents,
    exact,
    make_arrays,
    make_mesh,
    split,
)

LENGTH = 48
MESHES = {
    "1x8": dict(heads=1, seq=8),
    "2x4": dict(heads=2, seq=4),
    "4x2": dict(heads=4, seq=2),
    "8x1": dict(heads=8, seq=1),
    "2x2x2": dict(data=2, heads=2, seq=2),
}
# Each schedule, layout, mask, mesh and grouping of heads at least once.
QUICK = [
    ("ring", "zigzag", "causal", "2x2x2", (4, 2)),
    ("ring", "contiguous", "window", "2x4", (4, 2)),
    ("ring", "striped", "segments", "4x2", (4, 4)),
    ("gather", "zigzag", "prefix", "2x2x2", (2, 2)),
    ("gather", "contiguous", "two-sided", "4x2", (4, 4)),
    ("all_to_all", "zigzag", "alibi", "2x2x2", (4, 2)),
    ("all_to_all", "striped", "lengths", "2x2x2", (4, 2)),
    ("ring", "contiguous", "empty rows", "2x2x2", (2, 2)),
    ("auto", "contiguous", "soft cap", "8x1", (8, 8)),
]


def check(schedule, layout, mask, mesh, heads, num_queries=LENGTH, num_keys=LENGTH, **more):
    options = MASKS[mask](num_queries, num_keys)
    arrays = make_arrays(*heads, num_queries, num_keys)
    found = split(arrays, options, make_mesh(**MESHES[mesh]), schedule, layout, **more)
    assert_exact(found, exact(arrays, options))


@pytest.mark.parametrize("schedule, layout, mask, mesh, heads", QUICK)
def test_equals_float64(schedule, layout, mask, mesh, heads):
    check(schedule, layout, mask, mesh, heads)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("schedule", ["ring", "gather", "all_to_all"])
def test_every_schedule_layout_and_mesh(schedule, layout, mesh):
    masks = ["causal", "segments", "window", "prefix", "alibi"]
    mask = masks[(list(MESHES).index(mesh) + len(layout)) % len(masks)]
    check(schedule, layout, mask, mesh, (8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("schedule", ["ring", "all_to_all"])
@pytest.mark.filterwarnings("ignore:layout='zigzag'")
def test_every_mask(schedule, mask):
    check(schedule, "zigzag", mask, "2x2x2", (4, 2))


def test_cross_attention_of_other_lengths():
    check("ring", "contiguous", "full", "2x2x2", (4, 2), num_queries=16, num_keys=40)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["ring", "gather", "all_to_all"])
def test_cross_attention_and_tiles_that_do_not_divide(schedule):
    options = {"num_queries": 24, "num_keys": 56, "block_q": 5, "block_k": 6}
    check(schedule, "striped", "causal", "2x2x2", (4, 2), **options)


@pytest.mark.slow
def test_one_kv_head_is_repeated_for_the_exchange():
    check("all_to_all", "zigzag", "causal", "1x8", (8, 1))
    check("ring", "zigzag", "causal", "1x8", (8, 1))


@pytest.mark.slow
def test_a_long_ring_is_a_scan(monkeypatch):
    from jaxheads.attention import ring

    monkeypatch.setattr(ring, "UNROLLED_STEPS", 2)
    for schedule in ("ring", "gather"):
        check(schedule, "zigzag", "segments", "1x8", (2, 2))


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_a_hundred_do_not_overflow(sign):
    mesh = make_mesh(seq=2)
    rng = np.random.default_rng(0)
    arrays = make_arrays(1, 1, 16, 16)
    arrays["q"] = np.full_like(arrays["q"], 10 * sign)
    arrays["k"] = 10 * np.abs(arrays["k"]) + rng.normal(size=arrays["k"].shape).astype(np.float32)
    scores = np.einsum("btd,bsd->bts", arrays["q"][:, :, 0], arrays["k"][:, :, 0]) / HEAD_DIM**0.5
    assert np.abs(scores).max() > 100
    found = split(arrays, {"causal": True}, mesh, "ring", "contiguous")
    assert_exact(found, exact(arrays, {"causal": True}), rtol=3e-5)


def test_inside_a_shard_map_with_checked_types():
    """Local arrays in a shard_map of the caller's, whose types say what varies over the mesh."""
    mesh, spec = make_mesh(heads=2, seq=2), jax.P(None, "context", "model", None)
    arrays = make_arrays(2, 2, 16, 16)
    attend = lambda q, k, v: tuple(
        distributed_attention(q, k, v, causal=True, schedule="ring", return_lse=True, block_q=8)
    )
    over_mesh = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(spec,) * 3,
        out_specs=(spec, jax.P(None, "model", "context")),
    )
    found = value_and_grads(
        lambda a: over_mesh(a["q"], a["k"], a["v"]), arrays, *cotangents(arrays)
    )
    assert_exact(found, exact(arrays, {"causal": True}))


def test_functions_of_positions_may_differ_by_head():
    mesh = make_mesh(heads=2, seq=2)
    arrays = make_arrays(4, 2, 16, 16)
    slopes = jnp.asarray([0.5, 0.25, 0.1, 0.05])[:, None, None]
    for schedule in ("ring", "all_to_all"):
        found = split(
            arrays,
            {},
            mesh,
            schedule,
            "striped",
            bias_fn=lambda q, k: -slopes * jnp.abs(q - k),
            mask_fn=lambda q, k: q >= k,
        )
        options = {"causal": True, "alibi_slopes": np.asarray(slopes[:, 0, 0], np.float32)}
        assert_exact(found, exact(arrays, options))


def test_bfloat16_is_within_two_hundredths():
    arrays = make_arrays(2, 2, 32, 32)
    half = {name: jnp.asarray(x, jnp.bfloat16) for name, x in arrays.items()}
    z = distributed_attention(
        half["q"], half["k"], half["v"], mesh=make_mesh(seq=4), causal=True, schedule="ring"
    )
    assert z.dtype == jnp.bfloat16
    wanted = exact(arrays, {"causal": True})[0][0]
    np.testing.assert_allclose(np.asarray(z, np.float32), wanted, atol=2e-2)


def test_without_a_mesh_it_is_attention_on_one_device():
    arrays = make_arrays(4, 2, 13, 13)
    z = distributed_attention(arrays["q"], arrays["k"], arrays["v"], causal=True)
    np.testing.assert_allclose(z, exact(arrays, {"causal": True})[0][0], atol=1e-5)


def call(length=16, heads=(4, 2), dtype=jnp.float32, mesh=None, keys=None, **options):
    x = lambda n, h: jnp.ones((2, n, h, HEAD_DIM), dtype)
    keys = length if keys is None else keys
    mesh = make_mesh(heads=2, seq=4) if mesh is None else mesh
    return distributed_attention(x(length, heads[0]), x(keys, heads[1]), x(keys, heads[1]),
                                 mesh=mesh, **options)  # fmt: skip


IDS = np.ones((2, 16), np.int32)
BAD = {
    "length": (dict(length=18), ValueError, "Pad it to 20"),
    "zigzag length": (dict(length=20, layout="zigzag", causal=True), ValueError, "Pad it to 24"),
    "heads": (dict(heads=(3, 3)), ValueError, "num_heads=3"),
    "kv heads": (dict(heads=(4, 1)), ValueError, "num_kv_heads=1"),
    "groups": (dict(heads=(4, 3)), ValueError, "grouped evenly"),
    "exchange": (dict(heads=(4, 2), schedule="all_to_all"), ValueError, "do not divide over 4"),
    "window": (dict(window=0), ValueError, "at least 1"),
    "window pair": (dict(window=(-1, 2)), ValueError, "at least 0"),
    "segments": (dict(keys=24, segment_ids=IDS), ValueError, "kv_segment_ids"),
    "segment shape": (dict(segment_ids=IDS[:, :8]), ValueError, "segment_ids has shape"),
    "dtype": (dict(dtype=jnp.int32), TypeError, "floating"),
    "axis": (dict(axis_names=AxisNames(seq="time")), ValueError, "no axis 'time'"),
    "axis twice": (dict(axis_names=AxisNames(heads="context")), ValueError, "twice"),
    "lengths": (dict(kv_lengths=np.array([3, 17])), ValueError, "exceed the 16 keys"),
    "lengths shape": (dict(kv_lengths=np.array([3])), ValueError, "kv_lengths has shape"),
    "slopes": (dict(alibi_slopes=jnp.ones(3)), ValueError, "alibi_slopes has shape"),
    "schedule": (dict(schedule="tree"), ValueError, "ring, all_to_all, gather"),
    "layout": (dict(layout="spiral"), ValueError, "contiguous, zigzag, striped"),
    "local": (dict(local_impl="magic"), ValueError, "unknown local_impl"),
    "arity": (dict(mask_fn=lambda q: q > 0), TypeError, "two arguments"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    options, error, match = BAD[name]
    with pytest.raises(error, match=match):
        call(**options)


def test_zigzag_without_causality_warns():
    with pytest.warns(UserWarning, match="balances causal work"):
        call(layout="zigzag")
