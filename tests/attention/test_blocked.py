"""What blocked attention is for: linear memory, and no work on blocks nobody sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention import Mask, blocked_attention, dense_attention

LENGTH = 4096


def temporary_bytes(function, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "mask",
    [Mask(is_causal=True), Mask(is_causal=True, window=500), Mask()],
    ids=["causal", "window", "full"],
)
def test_memory_stays_far_below_the_pattern(mask):
    def loss(attend):
        return jax.grad(lambda x: attend(*x, mask, scale=1.0, soft_cap=5.0)[0].sum())

    shape = (1, LENGTH, 2, 16)
    blocked = lambda *x: loss(blocked_attention)(x)
    pattern_bytes = 2 * LENGTH * LENGTH * 4
    arrays_bytes = 4 * LENGTH * 2 * 16
    assert temporary_bytes(blocked, shape, shape, shape) < pattern_bytes / 8
    assert temporary_bytes(blocked, shape, shape, shape) < 40 * arrays_bytes
    # The same measure does see the pattern where there is one.
    dense = lambda *x: loss(dense_attention)(x)
    assert temporary_bytes(dense, shape, shape, shape) > pattern_bytes


def test_memory_grows_linearly():
    forward = lambda q, k, v: blocked_attention(q, k, v, Mask(is_causal=True), scale=1.0)[0]
    short, long = (temporary_bytes(forward, *[(1, n, 1, 16)] * 3) for n in (4096, 32768))
    assert long < 8 * short


@pytest.mark.parametrize(
    "mask, low, high",
    [
        (Mask(is_causal=True), 0, 64),
        (Mask(is_causal=True, window=20), 16, 64),
        (Mask(window=20), 16, 96),
    ],
    ids=["causal", "causal window", "two-sided window"],
)
def test_invisible_key_blocks_are_never_read(mask, low, high):
    """Queries 48..63 as the last block: NaN keys outside their range must not reach them."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 128, 1, 4)).astype(np.float32) for _ in range(3))
    for x in (k, v):
        x[:, :low] = np.nan
        x[:, high:] = np.nan

    def loss(q):
        z, _ = blocked_attention(q, k, v, mask, scale=0.5, block_q=16, block_k=16)
        return z[:, 48:64].sum(), z

    (_, z), grad = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(q))
    assert np.isfinite(z[:, 48:64]).all()
    assert np.isfinite(grad[:, 48:64]).all()


def test_any_length_with_default_blocks():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(1, 300, 2, 4)), jnp.float32)
    k = jnp.asarray(rng.normal(size=(1, 700, 1, 4)), jnp.float32)
    got = blocked_attention(q, k, k, Mask(), scale=0.5)
    want = dense_attention(q, k, k, Mask(), scale=0.5)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)
