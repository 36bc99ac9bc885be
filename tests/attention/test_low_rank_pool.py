"""Low-rank attention pooling against explicit matrices, its symmetries and its bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention import (
    attention_pool_flops,
    attention_pool_params,
    lengths_to_mask,
    low_rank_attention_pool,
    low_rank_attention_scores,
)

B, T, D, M = 3, 7, 6, 4
LENGTHS = np.asarray([7, 3, 5])


def inputs(seed=0, heads=M):
    rng = np.random.default_rng(seed)
    shapes = {"values": (B, T, D), "u": (B, T, D), "context": (D,), "P": (D, heads),
              "Q": (D, heads)}  # fmt: skip
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


MASK = lengths_to_mask(LENGTHS, T)
POOL = jax.jit(low_rank_attention_pool)


def by_hand(values, u, context, P, Q, scale=1.0):
    """Full D x D matrices per head, float64, token by token."""
    f = np.zeros((B, T, P.shape[1]))
    for b, t in np.ndindex(B, T):
        for i in range(P.shape[1]):
            f[b, t, i] = np.tanh(context.astype(float) @ np.outer(P[:, i], Q[:, i]) @ u[b, t])
        f[b, t] /= np.linalg.norm(f[b, t])
    A = np.exp(scale * f) * np.asarray(MASK)[..., None]
    A = np.moveaxis(A / A.sum(1, keepdims=True), 1, 2)
    return f, A, A @ values


def test_equals_explicit_matrices():
    given = inputs()
    f, A, S = by_hand(**given)
    scores = low_rank_attention_scores(*(given[n] for n in ("u", "context", "P", "Q")))
    np.testing.assert_allclose(scores, f, atol=1e-6)
    out = POOL(**given, mask=MASK)
    np.testing.assert_allclose(out.A, A, atol=1e-6)
    np.testing.assert_allclose(out.S, S, atol=1e-6)
    assert (np.asarray(out.A)[np.broadcast_to(~MASK[:, None], A.shape)] == 0).all()
    scaled = POOL(**given, mask=MASK, logit_scale=jnp.full(M, 5.0))
    np.testing.assert_allclose(scaled.A, by_hand(**given, scale=5.0)[1], atol=1e-5)
    own = POOL(**{**given, "context": np.tile(given["context"], (B, 1))}, mask=MASK)
    np.testing.assert_allclose(own.A, A, atol=1e-6)


def test_symmetries_of_the_factors():
    given = inputs()
    A = POOL(**given, mask=MASK).A
    order = [2, 0, 3, 1]
    turned = {**given, "P": given["P"][:, order], "Q": given["Q"][:, order]}
    np.testing.assert_allclose(POOL(**turned, mask=MASK).A, A[:, order], atol=1e-6)
    flipped = {**given, "P": -given["P"], "Q": -given["Q"]}
    np.testing.assert_allclose(POOL(**flipped, mask=MASK).A, A, atol=1e-6)


def test_padding_changes_nothing():
    given = inputs()
    longer = {n: np.pad(a, ((0, 0), (0, 50), (0, 0)), constant_values=3.0) if a.ndim == 3 else a
              for n, a in given.items()}  # fmt: skip
    out, more = POOL(**given, mask=MASK), POOL(**longer, mask=lengths_to_mask(LENGTHS, T + 50))
    np.testing.assert_allclose(more.S, out.S, atol=1e-6)
    np.testing.assert_allclose(more.A[..., :T], out.A, atol=1e-6)


def test_the_published_scale_bounds_every_weight():
    rng = np.random.default_rng(0)
    many = lambda *shape: rng.normal(size=(1000, *shape)).astype(np.float32) * 3
    u, context, P, Q = many(1, T, D), many(D), many(D, M), many(D, M)
    A = jax.jit(jax.vmap(low_rank_attention_pool))(u, u, context, P, Q).A
    bound = np.e**2 / (np.e**2 + T - 1)
    assert 0.3 < A.max() <= bound + 1e-6
    one = inputs(heads=1)
    apart = np.where(np.arange(T) == 2, 1.0, -1.0)[None, :, None] * one["Q"][:, 0]
    apart = np.tile(apart, (B, 1, 1)).astype(np.float32)  # f is 1 at token 2 and -1 elsewhere
    reached = POOL(**{**one, "u": apart, "context": one["P"][:, 0]}).A
    np.testing.assert_allclose(reached[:, 0, 2], bound, rtol=1e-5)
    f = low_rank_attention_scores(*(one[n] for n in ("u", "context", "P", "Q")))
    np.testing.assert_allclose(abs(f), 1, atol=1e-6)


def test_gradients():
    """Finite differences in float64; finite where a token's view is zero; an empty text."""
    given = inputs()
    given["u"][0, 2] = 0
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(a, jnp.float64) for n, a in given.items()}
        loss = jax.jit(lambda x: jnp.sum(jnp.sin(low_rank_attention_pool(**x, mask=MASK).S)))
        grads = jax.jit(jax.grad(loss))(wide)
        assert all(jnp.isfinite(g).all() for g in grads.values())
        for name in ("P", "Q", "context"):
            along = np.random.default_rng(1).normal(size=wide[name].shape)
            moved = [loss({**wide, name: wide[name] + s * 1e-6 * along}) for s in (1, -1)]
            np.testing.assert_allclose(
                (grads[name] * along).sum(), (moved[0] - moved[1]) / 2e-6, atol=1e-5, rtol=1e-5
            )
    empty = POOL(**inputs(), mask=MASK.at[1].set(False))
    assert (empty.S[1] == 0).all() and (empty.A[1] == 0).all()


def test_counts():
    assert attention_pool_params("lama", 16, 8) == 272 and attention_pool_params("max", 16, 8) == 0
    assert attention_pool_params("transformer", 16, 8) == 1024
    assert attention_pool_flops("lama", 100, 16, 8) == 256 + 25_600 + 2_400 + 25_600
    ratio = lambda kind: (
        attention_pool_flops(kind, 4096, 16, 8) / attention_pool_flops(kind, 2048, 16, 8)
    )
    assert ratio("lama") < 2.01 and ratio("transformer") > 3.9
    with pytest.raises(ValueError, match="kind='lamma'"):
        attention_pool_flops("lamma", 1, 1, 1)


def changed(**changes):
    return low_rank_attention_pool(**{**inputs(), "mask": MASK, **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: changed(P=np.ones((D, 2))), r"P has shape \(6, 2\) and Q \(6, 4\)"),
        (lambda: changed(P=np.ones((D, 0)), Q=np.ones((D, 0))), "at least 1"),
        (lambda: changed(Q=np.ones((5, M))), r"Q has shape \(5, 4\)"),
        (lambda: changed(context=np.ones(5)), r"context has shape \(5,\)"),
        (lambda: changed(mask=MASK.at[1].set(False)), "mask leaves text 1 without a token"),
        (lambda: changed(mask=MASK * 2), "mask has values other than 0 and 1"),
        (lambda: changed(mask=MASK[:, 1:]), r"mask has shape \(3, 6\)"),
        (lambda: changed(logit_scale=0.0), "logit_scale=0.0 must be positive"),
        (lambda: changed(logit_scale=np.ones(3)), r"logit_scale has shape \(3,\)"),
        (lambda: changed(activation="relu"), "activation='relu'"),
        (lambda: changed(values=np.ones((B, 2, D))), r"values has shape \(3, 2, 6\)"),
        (lambda: lengths_to_mask(np.asarray([0, 2]), 5), r"lengths=\[0, 2\] must be"),
        (lambda: lengths_to_mask(np.asarray([6]), 5), r"lengths=\[6\] must be"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
