"""The block update against whole softmax attention."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention import attention_block, blockwise_attention, finalize, vanilla_attention
from tests.attention.naive import value_and_grads
from tests.attention.split import MASKS, assert_exact, cotangents, exact, make_arrays

LENGTH = 24


def in_blocks(mask_fn, order, **more):
    """The whole from blocks of keys that come in any order."""

    def attend(arrays):
        state = None
        for start in order:
            k, v = (arrays[name][:, start : start + 8] for name in "kv")
            state = attention_block(
                arrays["q"],
                k,
                v,
                state,
                q_pos=jnp.arange(LENGTH),
                k_pos=jnp.arange(start, start + 8),
                mask_fn=mask_fn,
                **more,
            )
        out, lse = finalize(state)
        return out, lse

    return attend


@pytest.mark.parametrize("order", [(0, 8, 16), (16, 0, 8)])
@pytest.mark.parametrize(
    "mask_fn, options",
    [
        (None, {}),
        (lambda q, k: q >= k, {"causal": True}),
        (lambda q, k: q[:, None] >= k[None, :], {"causal": True}),
        (lambda q, k: (q - k <= 2) & (k <= q) & (k < 6), None),
    ],
    ids=["full", "causal", "own axes", "empty rows"],
)
def test_blocks_in_any_order_make_the_whole(mask_fn, options, order):
    arrays = make_arrays(4, 2, LENGTH, LENGTH)
    if options is None:
        options = {"window": (2, 0), "kv_lengths": np.array([6, 6], np.int32)}
    found = value_and_grads(in_blocks(mask_fn, order), arrays, *cotangents(arrays))
    assert_exact(found, exact(arrays, options))


def test_a_bias_function():
    arrays = make_arrays(2, 2, LENGTH, LENGTH)
    slopes = jnp.asarray([0.5, 0.25])[:, None, None]
    attend = in_blocks(None, (0, 8, 16), bias_fn=lambda q, k: -slopes * jnp.abs(q - k))
    found = value_and_grads(attend, arrays, *cotangents(arrays))
    assert_exact(found, exact(arrays, {"alibi_slopes": np.array([0.5, 0.25], np.float32)}))


@pytest.mark.parametrize("attend", [blockwise_attention, vanilla_attention])
@pytest.mark.parametrize("mask", ["causal", "two-sided", "segments"])
def test_the_references_on_one_device(attend, mask):
    arrays, options = make_arrays(4, 2, LENGTH, LENGTH), MASKS[mask](LENGTH, LENGTH)
    given = {name: jnp.asarray(x) if name == "segment_ids" else x for name, x in options.items()}
    function = lambda a: attend(a["q"], a["k"], a["v"], return_lse=True, **given)
    found = value_and_grads(function, arrays, *cotangents(arrays))
    assert_exact(found, exact(arrays, options))


def test_bad_functions_and_positions_are_refused():
    x = jnp.ones((1, 4, 1, 2))
    call = lambda **more: attention_block(
        x, x, x, **{"q_pos": jnp.arange(4), "k_pos": jnp.arange(4), **more}
    )
    with pytest.raises(TypeError, match="mask_fn must take two arguments"):
        call(mask_fn=lambda q: q > 0)
    with pytest.raises(ValueError, match="does not broadcast"):
        call(bias_fn=lambda q, k: jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="k_pos has shape"):
        call(k_pos=jnp.arange(3))
    with pytest.raises(TypeError, match="floating"):
        attention_block(x.astype(int), x, x, q_pos=jnp.arange(4), k_pos=jnp.arange(4))
