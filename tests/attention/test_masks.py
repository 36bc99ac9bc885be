"""Masks against a loop over every entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxheads.attention import Mask
from tests.attention.naive import naive_visible

SIZES = st.sampled_from([1, 3, 6])


@st.composite
def masks(draw):
    """A mask with any subset of its parts, and its (B, H, T, S)."""
    shape = draw(SIZES), draw(st.sampled_from([1, 2])), draw(SIZES), draw(SIZES)
    batch, num_heads, num_queries, num_keys = shape
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    maybe = lambda make: make() if draw(st.booleans()) else None
    has_segments = draw(st.booleans())
    share = has_segments and num_queries == num_keys and draw(st.booleans())
    index = lambda n: rng.integers(0, 8, (batch, n) if draw(st.booleans()) else (n,))
    one = lambda n: draw(st.sampled_from([1, n]))
    arrays = {
        "q_index": maybe(lambda: index(num_queries)),
        "k_index": maybe(lambda: index(num_keys)),
        "q_segment_ids": rng.integers(0, 3, (batch, num_queries)) if has_segments else None,
        "k_segment_ids": rng.integers(0, 3, (batch, num_keys))
        if has_segments and not share
        else None,
        "key_mask": maybe(lambda: rng.random((batch, num_keys)) < 0.7),
        "head_mask": maybe(
            lambda: rng.random((one(batch), one(num_heads), one(num_queries), one(num_keys))) < 0.7
        ),
    }
    arrays = {name: None if x is None else jnp.asarray(x) for name, x in arrays.items()}
    window = draw(st.sampled_from([None, 1, 2, 5]))
    return Mask(is_causal=draw(st.booleans()), window=window, **arrays), shape


def full(visible, shape):
    return np.broadcast_to(True if visible is None else np.asarray(visible), shape)


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True)
@given(masks(), st.data())
def test_materialize_tile_rows_range_and_pad_agree_with_the_loop(case, data):
    mask, shape = case
    batch, num_heads, num_queries, num_keys = shape
    expected = naive_visible(*shape, mask)
    np.testing.assert_array_equal(full(mask.materialize(num_queries, num_keys), shape), expected)

    rows = mask.visible_rows(num_queries, num_keys)
    np.testing.assert_array_equal(full(rows, shape[:3]), expected.any(-1))

    t0, s0 = data.draw(st.integers(0, num_queries - 1)), data.draw(st.integers(0, num_keys - 1))
    t1 = data.draw(st.integers(t0 + 1, num_queries))
    s1 = data.draw(st.integers(s0 + 1, num_keys))
    tile = mask.tile((t0, t1 - t0), (s0, s1 - s0))
    part = (batch, num_heads, t1 - t0, s1 - s0)
    np.testing.assert_array_equal(full(tile, part), expected[:, :, t0:t1, s0:s1])

    low, high = mask.key_range((t0, t1 - t0), num_keys)
    outside = np.ones(num_keys, bool)
    outside[int(low) : int(high)] = False
    assert not expected[:, :, t0:t1, outside].any()

    padded = mask.pad(num_queries + 2, num_keys + 3)
    real = padded.tile((0, num_queries), (0, num_keys))
    np.testing.assert_array_equal(full(real, shape), expected)
    if mask.q_segment_ids is not None or mask.key_mask is not None:
        rest = padded.tile((0, num_queries), (num_keys, 3)) if num_keys > 1 else np.zeros(1, bool)
        assert not np.asarray(rest).any()


def test_key_range_skips_what_causality_and_window_hide():
    low, high = Mask(is_causal=True, window=3).key_range((10, 4), 32)
    assert (int(low), int(high)) == (8, 14)
    low, high = Mask(window=3).key_range((10, 4), 32)
    assert (int(low), int(high)) == (8, 16)
    low, high = Mask(is_causal=True, q_index=jnp.array([20, 21])).key_range((0, 2), 32)
    assert (int(low), int(high)) == (0, 22)


def test_structure_is_static_and_arrays_are_leaves():
    mask = Mask(is_causal=True, window=2, key_mask=jnp.ones((1, 4), bool))
    assert len(jax.tree.leaves(mask)) == 1
    again = jax.jit(lambda m: m)(mask)
    assert again.is_causal and again.window == 2


def test_plain_causal_mask_is_never_larger_than_queries_by_keys():
    assert Mask().materialize(4, 4) is None
    assert Mask(is_causal=True).materialize(4, 6).shape == (1, 1, 4, 6)
    assert Mask(key_mask=jnp.ones((2, 6), bool)).materialize(4, 6).shape == (2, 1, 1, 6)
    assert Mask(is_causal=True).visible_rows(4, 4) is None


def test_a_window_counts_the_query_itself():
    with pytest.raises(ValueError, match=r"window=0 .* at least 1"):
        Mask(window=0)


def test_key_segments_need_query_segments():
    with pytest.raises(ValueError, match="without q_segment_ids"):
        Mask(k_segment_ids=jnp.ones((1, 2), jnp.int32))
