"""Hashes against exact integer arithmetic, and collisions against the birthday formula."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxheads.embeddings.hashing import (
    bucket_statistics,
    collision_statistics,
    expected_collisions,
    hash_ids,
    multi_hash,
    split_int64,
)

WORD = 2**32


def by_hand(number: int, num_buckets: int, seed: int = 0) -> int:
    """The hash of one id in Python's integers."""

    def mix(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D % WORD
        x = (x ^ (x >> 15)) * 0x846CA68B % WORD
        return x ^ (x >> 16)

    low, high = number % WORD, (number >> 32) % WORD
    x = mix((low + mix((seed + 0x9E3779B9) % WORD)) % WORD)
    return mix((x + high * 0x9E3779B9) % WORD) % num_buckets


@pytest.mark.parametrize("seed", [0, 7, WORD - 1])
def test_hashes_are_the_formula(seed):
    ids = np.array([0, 1, 2, 12345, 2**31 - 1, -1, -77], np.int32)
    expected = [by_hand(int(i), 1000, seed) for i in ids]
    np.testing.assert_array_equal(hash_ids(ids, 1000, seed=seed), expected)
    np.testing.assert_array_equal(jax.jit(lambda i: hash_ids(i, 1000, seed=seed))(ids), expected)


def test_64_bit_ids_hash_by_both_words():
    ids = np.array([5, -5, 5 + WORD, 2**62 + 3, -(2**63)], np.int64)
    low, high = split_int64(ids)
    got = np.asarray(hash_ids(low, 10**6, high=high))
    np.testing.assert_array_equal(got, [by_hand(int(i), 10**6) for i in ids])
    assert got[0] != got[2]
    # A number hashes alike whatever its width.
    np.testing.assert_array_equal(got[:2], hash_ids(ids[:2].astype(np.int32), 10**6))


def test_many_hashes_collide_less():
    ids = np.arange(5000, dtype=np.int32)
    rows = np.asarray(multi_hash(ids, 4000, 2))
    assert rows.shape == (5000, 2)
    np.testing.assert_array_equal(rows[:, 0], hash_ids(ids, 4000))
    assert len(np.unique(rows[:, 0])) < 3000
    pairs = len(np.unique(rows, axis=0))
    assert pairs >= 4995  # of 5000; 5000^2 / 2 / 4000^2 = 0.8 pairs are expected to meet


@pytest.mark.parametrize("ids", ["counting", "multiples", "random"])
@pytest.mark.parametrize(("count", "buckets"), [(20_000, 30_000), (20_000, 4096)])
def test_collisions_are_those_of_a_random_function(ids, count, buckets):
    numbers = {
        "counting": np.arange(count),
        "multiples": np.arange(count, dtype=np.int64) * buckets,  # all equal under id % V
        "random": np.random.default_rng(0).integers(-(2**62), 2**62, count),
    }[ids]
    found = collision_statistics(np.concatenate([numbers, numbers[:100]]), buckets)
    assert found.unique_ids == count
    share = found.expected_share
    # The count of ids alone in their bucket is close to binomial; five standard deviations.
    assert abs(found.colliding_share - share) < 5 * np.sqrt(share * (1 - share) / count) + 1e-3
    used = buckets * (1 - (1 - 1 / buckets) ** count)
    assert abs(found.buckets_used - used) < 5 * np.sqrt(used)
    assert found.largest_bucket < count / buckets + 8 * np.sqrt(count / buckets) + 4


def test_expected_share_by_drawing():
    rng = np.random.default_rng(1)
    draws = rng.integers(0, 50, (4000, 30))
    shared = [np.mean(np.isin(d, np.flatnonzero(np.bincount(d) > 1))) for d in draws]
    assert expected_collisions(30, 50) == pytest.approx(np.mean(shared), abs=0.01)
    assert expected_collisions(1, 50) == 0 and expected_collisions(2, 1) == 1
    assert expected_collisions(10**9, 10**8) == pytest.approx(1 - np.exp(-10), rel=1e-6)


def test_statistics_of_counts():
    found = bucket_statistics([0, 3, 1, 0, 2], 5)
    assert found[:3] == (6, 3, 5 / 6) and found.largest_bucket == 3
    assert bucket_statistics([], 5) == (0, 0, 0.0, 0.0, 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hash_ids(np.arange(3), 10), TypeError, "split_int64"),
        (lambda: hash_ids(np.ones(3, np.float32), 10), TypeError, "float32; hashing needs"),
        (lambda: hash_ids(np.int32(1), 0), ValueError, "num_buckets=0"),
        (lambda: hash_ids(np.int32(1), 10, seed=-1), ValueError, "seed=-1"),
        (lambda: multi_hash(np.int32(1), 10, 0), ValueError, "num_hashes=0"),
        (lambda: split_int64(np.ones(2)), TypeError, "float64"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
