"""Layouts: which device holds which token."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention.layouts import (
    LAYOUTS,
    layout_order,
    local_index,
    ring_schedule,
    shard_sequence,
    unshard_sequence,
)


def naive_order(layout, length, n):
    chunk = length // (2 * n)
    held = {
        "contiguous": lambda r: range(r * length // n, (r + 1) * length // n),
        "striped": lambda r: range(r, length, n),
        "zigzag": lambda r: [
            *range(r * chunk, (r + 1) * chunk),
            *range((2 * n - 1 - r) * chunk, (2 * n - r) * chunk),
        ],
    }[layout]
    return [token for rank in range(n) for token in held(rank)]


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_devices_hold_what_the_layout_says(layout, n):
    length = 48
    order = layout_order(layout, length, n)
    expected = range(length) if n == 1 else naive_order(layout, length, n)
    assert order.tolist() == list(expected)
    parts = [local_index(layout, length // n, n, rank) for rank in range(n)]
    np.testing.assert_array_equal(np.concatenate(parts), order)
    assert all((np.diff(part) > 0).all() for part in parts)


@pytest.mark.parametrize("module", [np, jnp])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unshard_is_the_inverse(layout, axis, module):
    x = module.arange(16**3).reshape(16, 16, 16)
    dealt = shard_sequence(x, layout, 4, axis=axis)
    assert isinstance(dealt, np.ndarray) == (module is np)
    np.testing.assert_array_equal(dealt, x.take(layout_order(layout, 16, 4), axis=axis))
    np.testing.assert_array_equal(unshard_sequence(dealt, layout, 4, axis=axis), x)


def test_every_block_is_somewhere_and_everyone_sees_it():
    table = ring_schedule(5)
    assert table[0].tolist() == [0, 1, 2, 3, 4] and table[1].tolist() == [4, 0, 1, 2, 3]
    for line in (*table, *table.T):
        assert sorted(line) == [0, 1, 2, 3, 4]


def test_what_cannot_be_dealt_is_refused():
    with pytest.raises(ValueError, match="Pad it to 12"):
        shard_sequence(np.arange(10), "contiguous", 4, axis=0)
    with pytest.raises(ValueError, match="Pad it to 16"):
        shard_sequence(np.arange(12), "zigzag", 4, axis=0)
    with pytest.raises(ValueError, match="contiguous, zigzag, striped"):
        shard_sequence(np.arange(12), "spiral", 4, axis=0)
    with pytest.raises(ValueError, match="at least one"):
        ring_schedule(0)
