"""The algebra of merging partial attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxheads.attention.merge import merge_pair, merge_partitions

SHAPE = (2, 3, 2, 4)  # B, T, H, D


def part(seed, empty=0.3):
    """Outputs and lse with some empty rows, whose outputs are zero as everywhere."""
    rng = np.random.default_rng(seed)
    lse = rng.normal(size=(2, 2, 3), scale=5).astype(np.float32)
    lse = np.where(rng.random(lse.shape) < empty, -np.inf, lse)
    out = rng.normal(size=SHAPE).astype(np.float32)
    return np.where(np.isfinite(lse).transpose(0, 2, 1)[..., None], out, 0), lse


def exact(parts):
    """In float64, weights of each row written out."""
    outs = np.stack([np.float64(out) for out, _ in parts])
    lses = np.stack([np.float64(lse) for _, lse in parts])
    with np.errstate(divide="ignore", invalid="ignore"):
        total = np.exp(lses).sum(axis=0)
        share = np.where(total == 0, 0, np.exp(lses) / total)
        return np.einsum("cbht,cbthd->bthd", share, outs), np.log(total)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=5))
@settings(deadline=None, max_examples=25)
def test_equals_float64_in_any_order_and_grouping(seeds):
    parts = [part(seed) for seed in seeds]
    wanted = exact(parts)
    grouped = parts[0]
    for other in parts[1:]:
        grouped = merge_partitions([grouped[0], other[0]], [grouped[1], other[1]])
    for found in (
        merge_partitions(*zip(*parts, strict=True)),
        merge_partitions(*(jnp.stack(x) for x in zip(*parts[::-1], strict=True))),
        grouped,
    ):
        np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)
        np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5, atol=1e-5)


def test_nothing_is_the_identity():
    out, lse = part(0)
    nothing = np.zeros(SHAPE, np.float32), np.full((2, 2, 3), -np.inf, np.float32)
    merged = merge_partitions([out, nothing[0]], [lse, nothing[1]])
    np.testing.assert_array_equal(merged[0], out)
    np.testing.assert_array_equal(merged[1], lse)
    both = merge_partitions([nothing[0]] * 2, [nothing[1]] * 2)
    assert (both[0] == 0).all() and np.isneginf(both[1]).all()


def test_gradients_are_finite_where_rows_are_empty():
    parts = [part(seed, empty=0.6) for seed in range(3)]
    outs, lses = (jnp.stack(x) for x in zip(*parts, strict=True))

    def loss(outs, lses):
        out, lse = merge_partitions(outs, lses)
        return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    douts, dlses = jax.grad(loss, (0, 1))(outs, lses)
    assert jnp.isfinite(douts).all() and jnp.isfinite(dlses).all()
    assert (dlses[jnp.isneginf(lses)] == 0).all()
    step = 1e-2 * np.random.default_rng(5).normal(size=lses.shape).astype(np.float32)
    measured = (loss(outs, lses + step) - loss(outs, lses - step)) / 2
    np.testing.assert_allclose((dlses * step).sum(), measured, rtol=1e-2, atol=1e-4)


def test_pairs_merge_like_partitions():
    (a, lse_a), (b, lse_b) = part(1), part(2)
    heads_first = lambda x: jnp.einsum("bthd->bhtd", x)
    out, lse = merge_pair((heads_first(a), lse_a), (heads_first(b), lse_b))
    wanted = merge_partitions([a, b], [lse_a, lse_b])
    np.testing.assert_allclose(jnp.einsum("bhtd->bthd", out), wanted[0], atol=1e-6)
    np.testing.assert_allclose(lse, wanted[1], atol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="each part has one of both"):
        merge_partitions([jnp.zeros(SHAPE)], [])
    with pytest.raises(ValueError, match="do not fit"):
        merge_partitions(jnp.zeros((1, *SHAPE)), jnp.zeros((1, 2, 3, 2)))
