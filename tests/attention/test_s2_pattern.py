"""ShardPattern: counts, lists, invariants and errors."""

import itertools
import math

import numpy as np
import pytest

from jaxheads.attention.s2 import ShardPattern

# T, B, L, V, H, mean tiles per head, ideal speed-up, slowest and fastest head (the paper's spec).
REFERENCE = [
    (8192, 64, 16, 8, 32, 2719.0, 3.04, 2.98, 3.09),
    (8192, 64, 8, 16, 16, 1449.75, 5.69, 5.47, 5.92),
    (32768, 64, 8, 4, 16, 35883.0, 3.66, 3.64, 3.68),
    (32768, 64, 8, 16, 16, 12021.75, 10.92, 10.71, 11.14),
    (131072, 64, 8, 16, 32, 146469.75, 14.32, 14.23, 14.42),
    (131072, 64, 8, 32, 32, 81412.9, 25.77, 25.46, 26.09),
    (131072, 128, 4, 16, 32, 36634.4, 14.33, 14.14, 14.51),
]


@pytest.mark.parametrize("row", REFERENCE)
def test_counts_of_the_reference_table(row):
    length, block, local, stride, heads, mean, ideal, slowest, fastest = row
    pattern = ShardPattern(block, local, stride, heads)
    n = pattern.num_blocks(length)
    tiles = pattern.tiles(n)
    dense = n * (n + 1) // 2
    assert round(float(tiles.mean()), 1) == round(mean, 1) or tiles.mean() == mean
    found = (pattern.ideal_speedup(n), dense / tiles.max(), dense / tiles.min())
    assert [round(float(x), 2) for x in found] == [ideal, slowest, fastest]
    assert pattern.density(n) == pytest.approx(1 / pattern.ideal_speedup(n))


def test_tiles_are_the_sum_of_the_mask_over_a_grid():
    grid = itertools.product(
        [(4, 4), (8, 4), (8, 1), (6, 3)], [1, 3, 7, 20], [1, 2, 5], [1, 2, 3, 8, 16], [0, 1, -3],
        [0, 1],
    )  # fmt: skip
    for (heads, kv_heads), n, local, stride, offset, dense in grid:
        p = ShardPattern(
            16, local, stride, heads, kv_heads, offset, dense, allow_incomplete_union=True
        )
        mask = p.block_mask(n)
        np.testing.assert_array_equal(p.tiles(n), mask.sum((1, 2)), err_msg=str(p))
        assert (mask.shape, mask.dtype) == ((heads, n, n), bool)


@pytest.mark.parametrize("causal", [True, False])
def test_lists_are_the_mask(causal):
    p = ShardPattern(16, 2, 3, 6, 3, num_dense_heads=1, causal=causal)
    n = 11
    by_kv_head = p.block_mask(n)[:: p.group_size]
    index, count = p.tile_lists(n)
    down, down_count = p.tile_lists_transposed(n)
    assert index.dtype == count.dtype == down.dtype == np.int32
    for head, i in np.ndindex(3, n):
        np.testing.assert_array_equal(
            index[head, i, : count[head, i]], by_kv_head[head, i].nonzero()[0]
        )
        np.testing.assert_array_equal(
            down[head, i, : down_count[head, i]], by_kv_head[head, :, i].nonzero()[0]
        )
    work = p.worklist(n)
    assert len(work.head) == p.tiles(n).sum()
    rebuilt = np.zeros_like(p.block_mask(n))
    rebuilt[work.head, work.q_tile, work.kv_tile] = True
    np.testing.assert_array_equal(rebuilt, p.block_mask(n))
    assert work.first.sum() == work.last.sum() == 6 * n
    assert len(p.worklist(n, grouped=True).head) == p.tiles(n)[::2].sum()


def test_residues_follow_the_kv_head_with_the_number_of_query_heads():
    assert [ShardPattern(64, 16, 8, 32, 8).residue(h) for h in range(4)] == [0, 7, 6, 5]
    wide = ShardPattern(64, 1, 8, 4, allow_incomplete_union=True, head_offset=1)
    assert [wide.residue(h) for h in range(4)] == [7, 5, 3, 1]  # step = 8 // 4
    grouped = ShardPattern(64, 1, 8, 4, 2, allow_incomplete_union=True)
    assert [grouped.residue(h) for h in range(2)] == [0, 6]  # step of 4 query heads, not of 2
    assert {ShardPattern(64, 1, 4, 8, homogeneous=True).residue(h) for h in range(8)} == {0}
    assert ShardPattern(64, 1, 3, 3, residues=(1, 0, 2)).residue(2) == 2


@pytest.mark.parametrize(
    "pattern",
    [
        ShardPattern(16, 2, 8, 8, head_offset=3),
        ShardPattern(16, 2, 4, 8, 4, num_dense_heads=1),
        ShardPattern(16, 2, 4, 8, 4, residues=(3, 1, 0, 2)),
        ShardPattern(16, 1, 1, 8, ranges=((2, 1), (6, 2), (math.inf, 8))),
        ShardPattern(16, 2, 4, 8, homogeneous=True, head_offset=1),
    ],
)
def test_slices_of_heads_keep_the_classes_of_the_model(pattern):
    whole = pattern.block_mask(13)
    parts = [pattern.for_heads(start, start + 4).block_mask(13) for start in (0, 4)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    again = pattern.for_heads(2, 8).for_heads(2, 6).block_mask(13)
    np.testing.assert_array_equal(again, whole[4:8])


def test_invariants():
    assert ShardPattern(16, 1, 8, 8).is_union_complete()
    assert ShardPattern(16, 1, 8, 2, num_dense_heads=1).is_union_complete()
    assert not ShardPattern(16, 1, 8, 2, allow_incomplete_union=True).is_union_complete()
    assert not ShardPattern(16, 1, 4, 8, homogeneous=True).is_union_complete()
    assert ShardPattern(16, 1, 8, 8).is_kv_cache_efficient()
    assert not ShardPattern(16, 1, 8, 8, position="relative").is_kv_cache_efficient()
    assert not ShardPattern(16, 2, 3, 4, causal=False).is_kv_cache_efficient()
    nested = ShardPattern(
        16, 1, 1, 4, ranges=((4, 1), (8, 2), (math.inf, 4)), residues=(0, 1, 2, 3)
    )
    assert nested.is_kv_cache_efficient()
    crossed = ShardPattern(16, 1, 1, 6, ranges=((4, 1), (8, 2), (math.inf, 3)))
    assert not crossed.is_kv_cache_efficient()


def test_kv_cache_efficiency_is_what_the_mask_says():
    for pattern in (
        ShardPattern(16, 3, 4, 4),
        ShardPattern(16, 1, 1, 4, ranges=((3, 1), (6, 2), (math.inf, 4))),
        ShardPattern(16, 2, 3, 3, position="relative"),
    ):
        mask = pattern.block_mask(40)
        comes_back = [
            mask[h, i + 1, j] and not mask[h, i, j]
            for h in range(len(mask))
            for i in range(39)
            for j in range(i)
        ]
        assert pattern.is_kv_cache_efficient() == (not any(comes_back))


def test_cache_slots():
    p = ShardPattern(64, 4, 8, 8, num_dense_heads=1)
    for length in (1, 64, 256, 257, 1000, 8192):
        n = -(-length // 64)
        wanted = [4 * 64 + 64 * math.ceil(max(0, n - 4 - p.residue(h)) / 8) for h in range(7)]
        np.testing.assert_array_equal(p.cache_slots(length), [*wanted, n * 64])


def test_local_stride_as_ranges_is_the_same_pattern():
    ranged = ShardPattern(16, 1, 1, 4, ranges=[(3, 1), (math.inf, 4)])
    assert ranged == ShardPattern(16, 3, 4, 4) and hash(ranged) == hash(ShardPattern(16, 3, 4, 4))


def test_chunks_of_the_mask():
    p = ShardPattern(16, 2, 4, 4)
    np.testing.assert_array_equal(
        p.block_mask(3, 5, q_start=6, kv_start=2), p.block_mask(9)[:, 6:9, 2:7]
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block": 48}, "power of two"),
        ({"block": 8}, "at least 16"),
        ({"local_blocks": 0}, "local_blocks=0 must be at least 1"),
        ({"local_blocks": (1, 2)}, "causal=False"),
        ({"stride": 0}, "stride=0 must be at least 1"),
        ({"num_kv_heads": 3}, "not divisible by num_kv_heads=3"),
        ({"num_heads": 0}, "not divisible"),
        ({"stride": 8}, "no head would see the other blocks"),
        ({"residues": (0, 1)}, "needed one per kv head"),
        ({"residues": (0, 1, 2, 4)}, "4 is outside 0..3"),
        ({"residues": (0, 1, 2, 2)}, "no head would see"),
        ({"num_dense_heads": 5}, "num_dense_heads=5 is outside"),
        ({"position": "sideways"}, "'absolute', 'relative' or None"),
        ({"ranges": ((3, 1), (2, 4))}, "bounds must increase"),
        ({"ranges": ((3, 1), (8, 4))}, "no head would see"),
        ({"ranges": ((3, 0),)}, "stride must be at least 1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        ShardPattern(**{"block": 16, "local_blocks": 2, "stride": 4, "num_heads": 4, **fields})


def test_bad_calls():
    p = ShardPattern(16, 2, 4, 8, 4)
    for start, stop in ((1, 4), (0, 10), (4, 4)):
        with pytest.raises(ValueError, match="whole groups"):
            p.for_heads(start, stop)
    with pytest.raises(ValueError, match="not one of the 4 kv heads"):
        p.residue(4)
    empty = ShardPattern(16, 1, 1, 4, ranges=((math.inf, 4),), always_diagonal=False)
    with pytest.raises(ValueError, match="sees no block"):
        empty.tile_lists(8)
    with pytest.raises(ValueError, match="form a prefix"):
        ShardPattern(16, 2, 4, 4, position="relative").cache_slots(100)
