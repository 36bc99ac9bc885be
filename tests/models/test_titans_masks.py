"""The masks of Titans layers against their definitions, pair by pair."""

from __future__ import annotations

import numpy as np
import pytest

from jaxheads.models.titans_masks import mac_mask, swa_prefix_mask


@pytest.mark.parametrize("mode", ["causal", "literal"])
@pytest.mark.parametrize(("persistent", "memory", "segment"), [(3, 6, 6), (0, 3, 6), (2, 1, 4)])
def test_mac_mask_pair_by_pair(mode, persistent, memory, segment):
    mask = mac_mask(persistent, memory, segment, mode=mode)
    assert mask.shape == (segment, persistent + memory + segment)
    group = segment // memory
    for i in range(segment):
        for p in range(persistent):
            assert mask[i, p]
        for g in range(memory):
            newest = (g + 1) * group - 1  # the last query pooled into memory token g
            assert mask[i, persistent + g] == (mode == "literal" or newest <= i)
        for j in range(segment):
            assert mask[i, persistent + memory + j] == (j <= i)


@pytest.mark.parametrize(("length", "window", "persistent"), [(7, 3, 2), (5, 1, 0), (4, 9, 3)])
def test_window_with_a_prefix_pair_by_pair(length, window, persistent):
    mask = swa_prefix_mask(length, window, persistent)
    want = np.zeros((persistent + length,) * 2, bool)
    for i in range(persistent + length):
        for j in range(persistent + length):
            want[i, j] = 0 <= i - j < window or j < persistent
    np.testing.assert_array_equal(mask, want)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mac_mask(2, 3, 8), "3 memory tokens do not divide"),
        (lambda: mac_mask(2, 0, 8), "0 memory tokens"),
        (lambda: mac_mask(-1, 8, 8), "num_persistent=-1"),
        (lambda: mac_mask(2, 8, 8, mode="both"), "mode='both'"),
        (lambda: swa_prefix_mask(4, 0, 2), "window=0"),
        (lambda: swa_prefix_mask(4, 2, -2), "num_persistent=-2"),
    ],
)
def test_sizes_that_do_not_fit(call, words):
    with pytest.raises(ValueError, match=words):
        call()
