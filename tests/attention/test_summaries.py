"""Summaries of the pattern made in blocks of queries equal those of the pattern itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import reductions
from jaxheads.attention.dense import dense_attention
from jaxheads.attention.summaries import reduce_pattern
from jaxheads.taps import Record, Tap, Taps
from tests.attention.cases import BATCH, CASES, NUM_QUERIES, make_case
from tests.attention.naive import naive_visible


def naive_pattern(arrays, mask, scale, soft_cap):
    """[B,H,T,S] float64 by the formula."""
    q, k = (np.asarray(arrays[n], np.float64) for n in "qk")
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = np.einsum("bthd,bshd->bhts", q, k) * scale
    scores = scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)
    scores = scores + arrays.get("bias", 0)
    shape = scores.shape
    if "alibi_slopes" in arrays:
        t = np.arange(shape[2]) if mask.q_index is None else np.asarray(mask.q_index)
        s = np.arange(shape[3]) if mask.k_index is None else np.asarray(mask.k_index)
        distance = np.abs(t[..., :, None] - s[..., None, :]).reshape(-1, 1, *shape[2:])
        scores = scores - np.asarray(arrays["alibi_slopes"])[:, None, None] * distance
    weights = np.where(naive_visible(*shape, mask), np.exp(scores), 0)
    total = weights.sum(-1, keepdims=True)
    if "sinks" in arrays:
        total = total + np.exp(arrays["sinks"])[:, None, None]
    return weights / np.where(total == 0, 1, total)


def blocks(name, reduction, block_q=5):
    arrays, mask, scale, soft_cap, *_ = make_case(name)

    @jax.jit
    def reduced(arrays, mask):
        rest = {n: arrays.get(n) for n in ("sinks", "alibi_slopes")}
        return reduce_pattern(
            arrays["q"], arrays["k"], mask, arrays.get("bias"), reduction,
            scale=scale, soft_cap=soft_cap, block_q=block_q, **rest,
        )  # fmt: skip

    return reduced(arrays, mask), naive_pattern(arrays, mask, scale, soft_cap)


@pytest.mark.parametrize("name", CASES)
def test_rows_in_blocks_are_the_pattern(name):
    """Blocks of 5 queries of 19, the last one cut short."""
    got, want = blocks(name, lambda rows: rows)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_each_reduction_is_its_formula():
    keys = np.array([[0, 2, 7], [1, -1, -1]])
    reduce = lambda rows: {
        "entropy": reductions.entropy(rows),
        "argmax": reductions.argmax(rows),
        "top": reductions.top_k(3)(rows),
        "listed": reductions.mass(keys)(rows),
        "masked": reductions.mass(np.arange(19) < 4)(rows),
    }
    got, p = blocks("segments", reduce)
    logs = np.log(np.where(p > 0, p, 1))
    np.testing.assert_allclose(got["entropy"], -(p * logs).sum(-1), atol=1e-5)
    np.testing.assert_array_equal(got["argmax"], p.argmax(-1))
    best = np.sort(p, axis=-1)[..., :-4:-1]
    np.testing.assert_allclose(got["top"].values, best, atol=1e-6)
    taken = np.take_along_axis(p, np.asarray(got["top"].positions), -1)
    np.testing.assert_allclose(taken, best, atol=1e-6)
    np.testing.assert_allclose(got["masked"], p[..., :4].sum(-1), atol=1e-6)
    want = np.stack([p[0][..., [0, 2, 7]].sum(-1), p[1][..., 1]])
    np.testing.assert_allclose(got["listed"], want, atol=1e-6)
    assert got["argmax"].dtype == got["top"].positions.dtype == jnp.int32


def test_gradient_through_blocks():
    arrays, mask, scale, *_ = make_case("causal gqa")

    def in_blocks(q):
        return reduce_pattern(q, arrays["k"], mask, None, reductions.entropy, scale=scale,
                              block_q=4).sum()  # fmt: skip

    def whole(q):
        tap = Tap(Taps(record=(Record("pattern", reductions.entropy),)))
        dense_attention(q, arrays["k"], arrays["v"], mask, scale=scale, tap=tap)
        return tap.seen["pattern"].sum()

    got, want = jax.jit(jax.grad(in_blocks))(arrays["q"]), jax.jit(jax.grad(whole))(arrays["q"])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_keys_of_mass_are_data():
    traces = []

    @jax.jit
    def traced(rows, reduction):
        traces.append(1)
        return reduction(rows)

    rows = jnp.full((BATCH, 1, NUM_QUERIES, 4), 0.25)
    assert traced(rows, reductions.mass([0, 1]))[0, 0, 0] == 0.5
    assert traced(rows, reductions.mass([3, -1]))[0, 0, 0] == 0.25
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: reductions.top_k(0), "k=0 must be at least 1"),
        (lambda: reductions.mass(0.5), "integer|columns"),
        (lambda: reductions.mass(np.zeros((2, 2, 2), int)), r"\[N\] or \[B,N\]"),
        (lambda: reductions.mass(np.ones(9, bool))(jnp.ones((1, 1, 1, 4))), "keys cover 9"),
    ],
)
def test_bad_sets_and_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
