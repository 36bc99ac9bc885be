"""Relative convolutional attention against loops, limit cases and other convolutions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention import (
    VARIANTS,
    depthwise_causal_conv,
    init_rel_conv,
    mdha,
    mha,
    rcmha,
    relative_attention,
    relative_position_scores,
    relative_position_scores_gather,
    relative_score_terms,
    relative_table,
    rmha,
)
from jaxheads.attention.rcmha_variant import RCMHAOptions

B, H, D, P = 2, 3, 4, 12


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tables():
    return {
        "rel_key": normal(P, H, D, seed=1),
        "rel_bias": normal(P, H, seed=2),
        "query_bias": normal(H, D, seed=3),
    }


def heads(num_queries, num_keys):
    return (normal(B, n, H, D, seed=4 + i) for i, n in enumerate((num_queries, num_keys, num_keys)))


def identity(params):
    kernel, zero = jnp.zeros((3, D)).at[2].set(1), jnp.zeros(D)
    return params._replace(
        **{f"{x}_kernel": kernel for x in "qkv"}, **{f"{x}_bias": zero for x in "qkv"}
    )


def loop_scores(q, k, rel_key, rel_bias, query_bias, offset):
    """Three loops in float64: the scores, -inf at later keys, and their position part."""
    q, k, r, s, u = (np.asarray(a, np.float64) for a in (q, k, rel_key, rel_bias, query_bias))
    scores = np.full((B, H, q.shape[1], k.shape[1]), -np.inf)
    places = np.zeros_like(scores)
    for i in range(q.shape[1]):
        for j in range(min(k.shape[1], i + offset + 1)):
            d = i + offset - j
            for h in range(H):
                places[:, h, i, j] = q[:, i, h] @ r[d, h] + s[d, h]
                content = ((q[:, i, h] + u[h]) * k[:, j, h]).sum(-1)
                scores[:, h, i, j] = (content + places[:, h, i, j]) / np.sqrt(D)
    return scores, places


@pytest.mark.parametrize(("num_queries", "past"), [(7, 0), (4, 5)])
def test_shift_gather_and_loops_agree(num_queries, past):
    q, k, v = heads(num_queries, past + num_queries)
    given = tables()
    scores, places = loop_scores(q, k, **given, offset=past)
    weight = normal(*places.shape, seed=9)

    def both(form):
        f = lambda q, r, s: form(q, r, s, num_keys=k.shape[1], q_offset=past)
        loss = lambda *a: jnp.sum(jnp.sin(f(*a)) * weight)
        return jax.jit(lambda *a: (f(*a), jax.grad(loss, (0, 1, 2))(*a)))(
            q, given["rel_key"], given["rel_bias"]
        )

    shift, gather = both(relative_position_scores), both(relative_position_scores_gather)
    np.testing.assert_allclose(shift[0], places, atol=2e-6)
    np.testing.assert_allclose(gather[0], places, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), shift[1], gather[1])

    terms = relative_score_terms(q, k, q_offset=past, **given)
    seen = np.isfinite(scores)
    np.testing.assert_allclose(np.asarray(sum(terms.values()))[seen], scores[seen], atol=2e-6)
    z, weights = relative_attention(q, k, v, q_offset=past, return_weights=True, **given)
    wanted = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, wanted, atol=2e-6)
    np.testing.assert_allclose(z, np.einsum("bhij,bjhd->bihd", wanted, v), atol=2e-6)


def test_a_traced_offset_reads_the_same_rows():
    q = normal(B, 2, H, D)
    given = tables()["rel_key"], tables()["rel_bias"]
    f = jax.jit(lambda n: relative_position_scores(q, *given, num_keys=9, q_offset=n))
    for n in (0, 4, 7):
        want = relative_position_scores_gather(q, *given, num_keys=9, q_offset=n)
        np.testing.assert_allclose(f(n), want, atol=2e-6)


def test_what_is_switched_off_or_idle_changes_nothing():
    q, k, v = heads(6, 6)
    params = identity(init_rel_conv(jax.random.key(0), H, D, max_distance=P))
    plain = mha(q, k, v, return_weights=True)
    for variant in (mdha, rmha, rcmha):
        z, weights = variant(q, k, v, params, return_weights=True)
        np.testing.assert_array_equal(weights, plain.weights)
        np.testing.assert_array_equal(z, plain.z)
    drawn = init_rel_conv(jax.random.key(0), H, D, max_distance=P)
    assert abs(rcmha(q, k, v, drawn) - plain.z).max() > 0.01
    np.testing.assert_allclose(  # the tables beside the kernels
        rcmha(q, k, v, identity(params._replace(**tables()))),
        relative_attention(q, k, v, **tables()), atol=2e-6,
    )  # fmt: skip


@pytest.mark.parametrize("per_head", [False, True])
def test_convolution(per_head):
    """lax's grouped convolution; pieces with their state; nothing from the future."""
    x, shape = normal(B, 8, H, D), (H, D) if per_head else (D,)
    kernel, bias = normal(3, *shape, seed=1), normal(*shape, seed=2)
    y, state = depthwise_causal_conv(x, kernel, bias)
    by_head = kernel if per_head else kernel[:, None]
    rhs = jnp.broadcast_to(by_head, (3, H, D)).reshape(3, 1, H * D)
    wanted = jax.lax.conv_general_dilated(
        x.reshape(B, 8, H * D), rhs, (1,), [(2, 0)], feature_group_count=H * D,
        dimension_numbers=("NTC", "TIO", "NTC"), precision="highest",
    ).reshape(x.shape) + bias  # fmt: skip
    np.testing.assert_allclose(y, wanted, atol=2e-6)
    np.testing.assert_array_equal(state, x[:, -2:])
    held, pieces = None, []
    for start, stop in ((0, 1), (1, 5), (5, 8)):
        piece, held = depthwise_causal_conv(x[:, start:stop], kernel, bias, state=held)
        pieces.append(piece)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), y, atol=2e-6)
    slope = jax.grad(lambda x: depthwise_causal_conv(x, kernel, bias)[0][:, 4].sum())(x)
    assert (slope[:, 5:] == 0).all() and (slope[:, :2] == 0).all() and (slope[:, 2:5] != 0).all()


def test_segments_are_convolved_apart():
    x, kernel, bias = normal(1, 7, H, D), normal(3, D, seed=1), normal(D, seed=2)
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2, 2]])
    y, _ = depthwise_causal_conv(x, kernel, bias, segment_ids=ids)
    alone = depthwise_causal_conv(x[:, 3:], kernel, bias)[0]
    np.testing.assert_allclose(y[:, 3:], alone, atol=2e-6)


def test_released_table_runs_the_other_way():
    official = np.arange(8)[:, None] * np.ones((1, H))
    np.testing.assert_array_equal(relative_table(official)[:, 0], [4, 3, 2, 1])
    with pytest.raises(ValueError, match="official has 7 rows"):
        relative_table(official[:7])


def test_cost_has_the_position_term():
    cfg = type("cfg", (), {"num_heads": H, "num_kv_heads": H, "head_dim": D})
    cost = lambda **on: (
        VARIANTS["rcmha"].cost(cfg, 10, 10, options=RCMHAOptions(use_conv=False, **on)).flops
    )
    assert cost() - cost(use_relative=False) == 2 * 10 * 20 * H * D


PARAMS = init_rel_conv(jax.random.key(0), H, D, max_distance=P)


def attend(num_keys=5, offset=2, **changes):
    q, k, v = heads(3, num_keys)
    return rcmha(q, k, v, PARAMS._replace(**changes), q_offset=offset)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: init_rel_conv(jax.random.key(0), H, D, width=0), "width=0 must be at least 1"),
        (lambda: attend(14, 11), "P = 12 distances; 3 queries after an offset of 11 need 14"),
        (lambda: attend(offset=-1), "q_offset=-1 puts query 0 before every key"),
        (lambda: attend(rel_key=normal(P, 2, D)), r"rel_key has shape \(12, 2, 4\)"),
        (lambda: attend(rel_bias=normal(P, 2)), r"rel_bias has shape \(12, 2\)"),
        (lambda: attend(query_bias=normal(2, D)), r"query_bias has shape \(2, 4\)"),
        (lambda: attend(k_kernel=None), "params lacks k_kernel, which use_conv=True needs"),
        (lambda: attend(k_kernel=normal(3, 5)), r"kernel has shape \(3, 5\)"),
        (
            lambda: mha(normal(1, 3, 4, D), *[normal(1, 3, 2, D)] * 2),
            "q has 4 heads, k 2 and v 2",
        ),
        (
            lambda: mha(normal(1, 3, H, D), *[normal(1, 3, H, D).astype(jnp.bfloat16)] * 2),
            "q is float32, k bfloat16",
        ),
        (
            lambda: rcmha(*heads(3, 3), PARAMS, conv_state=normal(B, 1, H, D)),
            r"state has shape \(2, 1, 3, 4\); a kernel of width 3 needs the W-1 = 2",
        ),
        (
            lambda: mha(*heads(3, 3), mask=jnp.ones((3, 4), bool)),
            r"mask is bool \(3, 4\); it must be bool and broadcastable",
        ),
        (
            lambda: mha(*heads(3, 3), mask=jnp.arange(3) > 0),
            "6 rows without a visible key, the first at batch 0, head 0, query 0"[2:],
        ),
        (lambda: relative_score_terms(*[normal(1, 2, H, D)] * 2, terms=("key",), **tables()),
         "terms: 'key' is not one of content"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_options_are_checked():
    with pytest.raises(ValueError, match="max_distance=0 must be at least 1"):
        RCMHAOptions(max_distance=0)
    small = dataclasses.replace(RCMHAOptions(), max_distance=4)
    cfg = type("cfg", (), {"num_heads": H, "num_kv_heads": H, "head_dim": D})
    with pytest.raises(ValueError, match="a cache of 5 tokens exceeds max_distance=4"):
        VARIANTS["rcmha"].init_state(cfg, 1, 5, jnp.float32, small)
