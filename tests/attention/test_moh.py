"""Mixture-of-head attention against loops over tokens and heads, limits and bad input."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import parallel
from jaxheads.attention import (
    AttentionContext,
    Mask,
    attention,
    load_balance_loss,
    moh_attention,
    moh_combine,
    moh_gates,
    norm_router_gates,
)
from jaxheads.attention.moh_variant import MOH, MoHOptions
from jaxheads.models import ModelConfig, Output, forward, init_cache
from jaxheads.models.presets import PRESETS
from jaxheads.taps import Edit, intervene, record
from jaxheads.training.configs import TrainConfig
from jaxheads.training.loss import next_token_loss
from tests.tiny import tiny_model

B, T, M, H, D = 2, 6, 5, 4, 8
RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, T, M))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def naive_gates(x, weights, top_k, scale):
    """Gates [B,T,H], one token at a time, in float64."""
    routed, shared, types = (weights.get(n) for n in ("routed", "shared", "type"))
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        p = softmax(token @ routed) if routed is not None else np.zeros(0)
        m = np.zeros_like(p)
        m[np.argsort(-p, kind="stable")[:top_k]] = 1
        s = np.zeros(0)
        if shared is not None:
            s = softmax(token @ shared)
        elif types is not None:
            s = np.ones(1)
        a = softmax(token @ types) if types is not None else None
        if scale == "unit_mean":
            s, r = len(s) * s, p * m / max((p * m).sum(), 1e-7) * top_k
            a = None if a is None else 2 * a
        else:
            r = p * m
        rows.append(np.concatenate([s, r] if a is None else [a[0] * s, a[1] * r]))
    return np.stack(rows).reshape(*x.shape[:2], -1)


def gates_of(x, weights, top_k, scale):
    logits = lambda n: jnp.einsum("btm,me->bte", x, weights[n]) if n in weights else None
    routed, shared, types = (logits(n) for n in ("routed", "shared", "type"))
    return moh_gates(routed, shared, types, top_k=top_k, gate_scale=scale)


CASES = {  # hs, E, k
    "shared and routed": (2, 4, 2),
    "one shared": (1, 3, 2),
    "none shared": (0, 4, 3),
    "all shared": (3, 0, 0),
}


def router(num_shared, num_routed):
    widths = {"routed": num_routed, "type": 2 if num_shared and num_routed else 0,
              "shared": num_shared if num_shared > 1 else 0}  # fmt: skip
    return {n: RNG.normal(size=(M, w)) for n, w in widths.items() if w}


@pytest.mark.parametrize("scale", ["unit_mean", "paper"])
@pytest.mark.parametrize("case", CASES)
def test_gates_are_the_formula(case, scale):
    num_shared, num_routed, top_k = CASES[case]
    weights = router(num_shared, num_routed)
    gates, stats = gates_of(X, weights, top_k, scale)
    want = naive_gates(X, weights, top_k, scale)
    np.testing.assert_allclose(gates, want, atol=1e-5)
    assert gates.dtype == jnp.float32 and gates.shape == (B, T, num_shared + num_routed)
    routed = want[..., num_shared:] > 0
    np.testing.assert_array_equal(stats.mask, routed)
    np.testing.assert_allclose(stats.f, routed.mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(stats.P, stats.probs.mean((0, 1)), atol=1e-6)


@pytest.mark.parametrize("scale", ["unit_mean", "paper"])
def test_gradients_of_every_router_matrix(scale):
    """Against differences of the float64 loop, and through a whole layer's output."""
    weights = router(2, 4)
    out, mix = RNG.normal(size=(B, T, 6, D)), RNG.normal(size=(B, T, 6, D))
    loss = lambda w: jnp.sum(mix * moh_combine(jnp.asarray(out), gates_of(X, w, 2, scale)[0]))
    grads = jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, weights))
    naive = lambda w: np.sum(mix * out * naive_gates(X, w, 2, scale)[..., None])
    for name in weights:
        step = RNG.normal(size=weights[name].shape)
        ahead, behind = (
            naive({**weights, name: weights[name] + sign * 1e-5 * step}) for sign in (1, -1)
        )
        np.testing.assert_allclose(np.sum(grads[name] * step), (ahead - behind) / 2e-5, rtol=1e-3)


def test_a_zero_router_with_every_head_active_gives_ones():
    zeros = lambda n: jnp.zeros((1, 2, n))
    gates, _ = moh_gates(zeros(4), zeros(2), zeros(2), top_k=4)
    np.testing.assert_array_equal(gates, 1)
    _, stats = moh_gates(zeros(4), zeros(2), zeros(2), top_k=2)
    np.testing.assert_array_equal(stats.mask[0, 0], [1, 1, 0, 0])  # ties: the lower heads


def heads(num_kv_heads=2, length=T, num_heads=H):
    normal = lambda n: jnp.asarray(RNG.normal(size=(B, length, n, D)), jnp.float32)
    return normal(num_heads), normal(num_kv_heads), normal(num_kv_heads)


def test_query_norm_gates_are_the_formula():
    q = heads()[0]
    route = jax.jit(lambda q: norm_router_gates(q, num_shared=1, top_k=2))
    gates, stats = route(q)
    for b, t in np.ndindex(B, T):
        n = np.sqrt((np.asarray(q[b, t, 1:], np.float64) ** 2).sum(-1))
        p = softmax(n / n.std(ddof=1))
        np.testing.assert_allclose(stats.probs[b, t], p, atol=1e-5)
        active = np.isin(np.arange(3), np.argsort(-p)[:2])
        np.testing.assert_array_equal(gates[b, t], [1, *active])  # forward: exactly 1 and 0
    np.testing.assert_array_equal(route(1000 * q)[0], gates)
    slope = jax.jit(jax.grad(lambda q: route(q)[0].sum()))(jnp.zeros_like(q))
    assert jnp.isfinite(slope).all()


def test_every_head_active_is_plain_attention_bit_for_bit():
    q, k, v = heads()

    @jax.jit
    def both(q, k, v):
        gates, _ = norm_router_gates(q, num_shared=1, top_k=3)
        return moh_attention(q, k, v, gates, mask=Mask(is_causal=True)).z, attention(q, k, v)

    np.testing.assert_array_equal(*both(q, k, v))


def test_straight_through_hands_the_gates_gradient_to_the_probabilities():
    q = heads()[0]
    of_gates = jnp.asarray(RNG.normal(size=(B, T, H)), jnp.float32)  # d loss / d g
    gates = partial(norm_router_gates, num_shared=1, top_k=1)

    @jax.jit
    def slopes(q):
        loss = lambda q, **options: jnp.sum(of_gates * gates(q, **options)[0])
        pull = jax.vjp(lambda q: gates(q)[1].probs, q)[1]
        return (
            jax.grad(loss)(q), pull(of_gates[..., 1:])[0],
            jax.grad(partial(loss, straight_through=False))(q), gates(q)[0],
        )  # fmt: skip

    through, wanted, hard, forward_gates = slopes(q)
    np.testing.assert_allclose(through, wanted, atol=1e-6)
    np.testing.assert_array_equal(hard, 0)
    silent = np.asarray(forward_gates) == 0
    assert (np.abs(through[silent]).max(-1) > 0).all()  # heads that were not selected learn too


MASKS = {
    "all visible": None,
    "causal segments": Mask(
        is_causal=True, q_segment_ids=np.array([[1, 1, 1, 2, 2, 0], [3] * 6]),
    ),
    "bool by head": RNG.random((B, H, T, T)) < 0.7,
}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
def test_gathered_equals_dense(mask):
    q, k, v = heads()
    gates, _ = moh_gates(*(jnp.asarray(RNG.normal(size=(B, T, n))) for n in (3, 1, 2)), top_k=2)
    options = dict(impl="gather", num_shared=1, top_k=2)

    @jax.jit
    def run(q, k, v, gates):
        return [
            moh_attention(q, k, v, gates, mask=MASKS[mask]),
            moh_attention(q, k, v, gates, mask=MASKS[mask], capacity_factor=1.5, **options),
            moh_attention(q, k, v, gates, mask=MASKS[mask], impl="gather", capacity_factor=1.5),
        ]

    dense, *gathered = run(q, k, v, gates)
    for out in gathered:  # with and without knowing which heads are shared
        np.testing.assert_allclose(out.z, dense.z, atol=1e-5)
        assert out.num_dropped == 0


def test_overflow_is_counted_and_comes_last():
    """Every token wants heads 1 and 2: rows beyond the capacity are zero, the rest exact."""
    q, k, v = heads()
    gates = jnp.broadcast_to(jnp.array([0.5, 1.0, 2.0, 0.0]), (B, T, H))
    options = dict(impl="gather", num_shared=1, top_k=2, capacity_factor=1.0)
    run = jax.jit(lambda *a: (moh_attention(*a, **options), moh_attention(*a).z))
    out, dense = run(q, k, v, gates)  # C = ceil(6 * 2 / 3) = 4
    assert out.num_dropped == B * 2 * (T - 4)
    np.testing.assert_allclose(out.z[:, :4], dense[:, :4], atol=1e-5)
    np.testing.assert_array_equal(out.z[:, 4:, 1:], 0)
    np.testing.assert_allclose(out.z[:, 4:, 0], dense[:, 4:, 0], atol=1e-5)


def test_flops_fall_with_the_share_of_active_heads():
    shape = jax.ShapeDtypeStruct((1, 256, 8, 16), jnp.float32)
    gates = jax.ShapeDtypeStruct((1, 256, 8), jnp.float32)

    def flops(**options):
        f = lambda q, k, v, g: moh_attention(q, k, v, g, mask=Mask(is_causal=True), **options)
        compiled = jax.jit(f).lower(shape, shape, shape, gates).compile()
        return compiled.cost_analysis()["flops"]

    whole = flops()
    for top_k in (4, 2):
        share = flops(impl="gather", num_shared=2, top_k=top_k, capacity_factor=1.0) / whole
        assert share == pytest.approx((2 + top_k) / 8, rel=0.1)


def test_the_balance_loss_of_uniform_and_collapsed_routers():
    uniform = jnp.zeros((2, 4, 6))
    stats = moh_gates(uniform, top_k=2)[1]
    even = stats._replace(f=jnp.full(6, 2 / 6))
    assert load_balance_loss(even) == pytest.approx(2)
    assert load_balance_loss(even, scale="paper") == pytest.approx(2 / 6)
    collapsed = moh_gates(uniform.at[..., 3].set(50.0), top_k=1)[1]
    assert load_balance_loss(collapsed) == pytest.approx(6)  # 1 when uniform
    nothing = moh_gates(None, jnp.zeros((2, 4, 6)), top_k=0)[1]
    assert load_balance_loss(nothing) == 0


def test_the_balance_loss_counts_tokens_once_however_they_are_split():
    logits = jnp.asarray(RNG.normal(size=(4, T, 6)), jnp.float32)
    real = jnp.asarray(RNG.random((4, T)) < 0.6)
    balance = lambda x, real, **options: load_balance_loss(
        moh_gates(x, top_k=2)[1], token_mask=real, **options
    )
    each = jax.vmap(partial(balance, axis_name="i"), axis_name="i")
    everything = lambda x, real: (*jax.value_and_grad(balance)(x, real), each(x, real))
    whole, slope, split = jax.jit(everything)(logits, real)
    probs = np.apply_along_axis(softmax, -1, np.asarray(logits, np.float64))
    mask = np.argsort(np.argsort(-probs)) < 2
    p, f = (x[np.asarray(real)].mean(0) for x in (probs, mask))
    assert whole == pytest.approx(6 * np.sum(p * f), rel=1e-5)
    np.testing.assert_allclose(split, whole, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(slope)[~np.asarray(real)], 0)


CFG = ModelConfig(
    vocab_size=32, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=16,
    attention="moh(num_shared=4,top_k=0)+moh(num_shared=1,top_k=2)",
)  # fmt: skip
TOKENS = RNG.integers(0, 32, (4, 8))
BATCH = {"tokens": jnp.asarray(TOKENS), "targets": jnp.asarray(np.roll(TOKENS, -1, 1))}


@pytest.fixture(scope="module")
def model():
    return tiny_model(CFG, scale=0.3)


@pytest.fixture(scope="module")
def out(model):
    return record(forward, "active", "gates")(model, TOKENS)


@jax.jit
def loss_and_grads(model, batch):
    f = lambda model: next_token_loss(forward, model, batch, TrainConfig())
    return jax.value_and_grad(f, has_aux=True)(model)


@pytest.fixture(scope="module")
def trained(model):
    return loss_and_grads(model, BATCH)


def test_tokens_activate_their_heads_and_the_balance_loss_trains(out, trained):
    active, gates = (np.asarray(out.seen[site]) for site in ("active", "gates"))  # [L,B,T,H]
    assert active.shape == (2, 4, 8, 4)
    assert (
        (active[0] == 1).all() and (active[1].sum(-1) == 3).all() and (active[1, ..., 0] == 1).all()
    )
    np.testing.assert_array_equal(gates > 0, active > 0)
    assert list(out.aux) == ["moh_balance"]  # of the one layer that routes
    (loss, metrics), grads = trained
    np.testing.assert_allclose(metrics["aux"], out.aux["moh_balance"], rtol=1e-5)
    np.testing.assert_allclose(loss, metrics["loss"] + 0.01 * metrics["aux"], rtol=1e-5)
    for place in grads.variants:
        assert all((np.abs(g) > 0).any() for g in jax.tree.leaves(place))


@pytest.mark.slow
def test_sharded_equals_single_loss_and_gradients(model, trained):
    mesh = parallel.make_mesh("data:4,model:2")
    with jax.set_mesh(mesh):
        got = loss_and_grads(parallel.shard(model, mesh), BATCH)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(trained), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_cached_decoding_equals_the_whole_forward(model, out):
    cache, got = init_cache(CFG, 4, 8), []
    for start, stop in ((0, 7), (7, 8)):
        step = forward(model, TOKENS[:, start:stop], cache=cache)
        cache = step.cache
        got.append(step.logits)
    np.testing.assert_allclose(np.concatenate(got, axis=1), out.logits, atol=2e-5)


def only_the_last_heads(active, payload, ctx):
    return active.at[..., 1:].set(jnp.array([0.0, 1.0, 1.0]))


def test_an_edit_of_active_decides_which_heads_are_used(model):
    edited = intervene(forward, Edit("active", only_the_last_heads, jnp.zeros(2)))
    gates = record(edited, "gates")(model, TOKENS).seen["gates"][1]
    assert (gates[..., 1] == 0).all() and (gates[..., 2:] > 0).all()
    assert np.std(gates.sum(-1)) > 0  # the types of heads are weighed


def test_balance_is_the_mean_over_layers_and_dropped_pairs_are_their_sum():
    options = "num_shared=0,top_k=1,router=query_norm,impl=gather,capacity_factor=0.5"
    cfg = dataclasses.replace(CFG, attention=f"moh({options})")
    out = record(forward, "active", "q")(tiny_model(cfg, scale=0.3), TOKENS)
    load = np.asarray(out.seen["active"]).sum(2)  # [L,B,H]
    assert out.aux["num_dropped"] == np.maximum(load - 1, 0).sum() > 0  # C = ceil(.5 * 8 / 4)

    @jax.jit
    def balance(q):
        return load_balance_loss(norm_router_gates(q, num_shared=0, top_k=1)[1])

    each = [balance(q) for q in out.seen["q"]]
    np.testing.assert_allclose(out.aux["moh_balance"], np.mean(each), rtol=1e-5)


def test_counts_are_no_part_of_the_loss():
    aux = {"moh_balance": jnp.float32(2), "num_dropped": jnp.float32(99)}
    fake = lambda *args, **kwargs: Output(jnp.zeros((4, 8, 32)), aux=aux)
    loss, metrics = next_token_loss(fake, None, BATCH, TrainConfig())
    assert metrics["aux"] == 2 and loss == pytest.approx(np.log(32) + 0.02)


def test_published_models_have_their_sizes():
    sizes = {"moh-lm-s": 186e6, "moh-lm-b": 882e6}
    for name, size in sizes.items():
        cfg = PRESETS[name]()
        assert cfg.num_params == pytest.approx(size, rel=0.01)
        num_shared, top_k = cfg.pattern[0].options.split(cfg.num_heads)
        assert (num_shared + top_k) / cfg.num_heads == 0.75


Q = jnp.ones((B, T, H, D))
ONE = jnp.ones((B, T, H))
L3, L2 = jnp.zeros((B, T, 3)), jnp.zeros((B, T, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: norm_router_gates(Q, num_shared=5, top_k=1), r"num_shared=5 .*0 to the 4 heads"),
        (lambda: norm_router_gates(Q, num_shared=-1, top_k=1), "num_shared=-1"),
        (lambda: norm_router_gates(Q, num_shared=1.0, top_k=1), "num_shared=1.0"),
        (lambda: norm_router_gates(Q, num_shared=3, top_k=1), "leaves one routed head"),
        (lambda: norm_router_gates(Q, num_shared=4, top_k=0), "straight_through=True"),
        (lambda: norm_router_gates(Q, num_shared=1, top_k=4), r"top_k=4 .*1 to the 3 routed"),
        (lambda: norm_router_gates(Q, num_shared=1, top_k=0), r"top_k=0 .*1 to the 3 routed"),
        (lambda: norm_router_gates(Q[0], num_shared=1, top_k=1), r"q has shape"),
        (lambda: moh_gates(L3, top_k=4), r"top_k=4 .*1 to the 3 routed"),
        (lambda: moh_gates(L3, top_k=0), "top_k=0"),
        (lambda: moh_gates(L3, top_k=1.5), "top_k=1.5"),
        (lambda: moh_gates(L3, top_k=True), "top_k=True"),
        (lambda: moh_gates(None, L2, top_k=1), r"top_k=1 .*0 to the 0 routed"),
        (lambda: moh_gates(None, top_k=0), "no logits"),
        (lambda: moh_gates(L3, L2, top_k=1), "type_logits belong"),
        (lambda: moh_gates(None, L2, L2, top_k=0), "type_logits belong"),
        (lambda: moh_gates(L3, L2, L3, top_k=1), r"type_logits has shape .*\[B,T,2\]"),
        (lambda: moh_gates(L3, L2[:1], L2, top_k=1), "differ in their tokens"),
        (lambda: moh_gates(L3, top_k=1, gate_scale="unit"), "gate_scale='unit' .*unit_mean, paper"),
        (lambda: moh_combine(Q, ONE[:, 1:]), r"gates has shape .*\[B,T,H\]"),
        (lambda: moh_attention(Q, Q, Q, ONE[..., 1:]), r"gates has shape .*\[B,T,H\]"),
        (lambda: moh_attention(Q, Q, Q, ONE, impl="fast"), "impl='fast' .*dense, gather"),
        (lambda: moh_attention(Q, Q, Q, ONE, capacity_factor=0), "capacity_factor=0 must be pos"),
        (lambda: moh_attention(Q, Q, Q, ONE, impl="gather", num_shared=5), "num_shared=5"),
        (
            lambda: moh_attention(Q, Q, Q, ONE, impl="gather", mask=jnp.zeros((T, T))),
            "cannot index an additive mask",
        ),
        (lambda: load_balance_loss(moh_gates(L3, top_k=1)[1], scale="x"), "scale='x'"),
        (
            lambda: load_balance_loss(moh_gates(L3, top_k=1)[1], token_mask=jnp.ones((B, 1))),
            "token_mask has shape",
        ),
        (lambda: MoHOptions(router="linear"), "moh: router='linear' is not one of"),
        (lambda: MoHOptions(capacity_factor=-1.0), "capacity_factor=-1.0"),
        (lambda: MoHOptions(num_shared=2, top_k=3).split(4), "top_k=3 .*1 to the 2"),
        (lambda: MoHOptions(num_shared=3, router="query_norm").split(4), "one routed head"),
        (
            lambda: MOH.apply(None, Q, Q, Q, AttentionContext(mask=Mask())),
            "AttentionContext.x",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_gathered_heads_refuse_what_differs_by_head():
    ctx = AttentionContext(mask=Mask(), sinks=jnp.zeros(H), x=jnp.zeros((B, T, 3)),
                           options=MoHOptions(impl="gather", router="query_norm"))  # fmt: skip
    with pytest.raises(NotImplementedError, match="sinks"):
        MOH.apply(None, Q, Q, Q, ctx)
