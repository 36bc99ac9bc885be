"""The public function: which implementation it picks, and what it says when it cannot."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention import AttentionContext, Mask, api, attend, attention
from jaxheads.attention.contract import Request
from jaxheads.taps import NO_TAP, Record, Tap, Taps

Q, KV = jnp.ones((2, 6, 4, 8)), jnp.ones((2, 6, 2, 8))


def request(q=(1, 256, 4, 64), k=(1, 256, 2, 64), dtype=jnp.bfloat16, platform="cpu", **fields):
    defaults = {
        "mask": Mask(is_causal=True),
        "bias": None,
        "scale": 0.125,
        "soft_cap": None,
        "sinks": None,
        "alibi_slopes": None,
        "tap": NO_TAP,
        "needs_lse": False,
    }
    q, k = jax.ShapeDtypeStruct(q, dtype), jax.ShapeDtypeStruct(k, dtype)
    return Request(q=q, k=k, v=k, platform=platform, **{**defaults, **fields})


LONG = {"q": (1, 8192, 4, 64), "k": (1, 8192, 2, 64)}
PATTERN = Tap(Taps(record=(Record("pattern"),)))


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"platform": "tpu"}, "splash"),
        ({"platform": "gpu"}, "cudnn"),
        ({"platform": "cpu"}, "dense"),
        ({"platform": "cpu", **LONG}, "blocked"),
        ({"platform": "tpu", **LONG, "bias": Q}, "blocked"),
        ({"platform": "gpu", **LONG, "dtype": jnp.float32}, "blocked"),
        ({"platform": "tpu", "tap": PATTERN}, "dense"),
        ({"platform": "cpu", **LONG, "tap": PATTERN}, "dense"),
        ({"platform": "tpu", "q": (1, 1, 4, 64)}, "dense"),
    ],
)
def test_auto_picks(fields, expected):
    assert api.select_implementation(request(**fields)) == expected


@pytest.mark.parametrize(
    "name, fields, reason",
    [
        ("splash", {}, "it runs on TPU, not on cpu"),
        ("pallas_tpu", {"platform": "tpu", "bias": Q}, "it takes no bias"),
        ("splash", {"platform": "tpu", "alibi_slopes": Q}, "no ALiBi"),
        ("splash", {"platform": "tpu", "mask": Mask(head_mask=Q > 0)}, "differs per head"),
        ("splash", {"platform": "tpu", "mask": Mask(q_index=Q)}, "not index arrays"),
        ("splash", {"platform": "tpu", "needs_lse": True}, "no derivative"),
        ("splash", {"platform": "tpu", "q": (1, 200, 4, 64)}, "multiples of 128"),
        (
            "splash",
            {"platform": "tpu", "q": (1, 256, 4, 192), "k": (1, 256, 2, 192)},
            "multiple of it, not 192",
        ),
        ("splash", {"platform": "tpu", "tap": PATTERN}, "never forms 'pattern'"),
        ("cudnn", {"platform": "tpu"}, "NVIDIA GPUs, not on tpu"),
        ("cudnn", {"platform": "gpu", "dtype": jnp.float32}, "not float32"),
        (
            "cudnn",
            {"platform": "gpu", "q": (1, 256, 4, 60), "k": (1, 256, 2, 60)},
            "multiple of 8 up to 128, not 60",
        ),
        ("cudnn", {"platform": "gpu", "bias": Q}, "bias"),
        ("xla", {"soft_cap": 3.0}, "no soft_cap"),
        ("xla", {"sinks": Q}, "no sinks"),
        ("xla", {"needs_lse": True}, "log-sum-exp"),
        ("blocked", {"tap": PATTERN}, "never forms 'pattern'"),
    ],
)
def test_a_named_implementation_is_used_or_refused_with_the_reason(name, fields, reason):
    with pytest.raises(NotImplementedError, match=reason) as error:
        api.select_implementation(request(**fields), name)
    assert "implementation='auto', 'dense'" in str(error.value)


def test_fallback_is_logged_once_with_its_reason(caplog):
    api._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            api.select_implementation(request(platform="tpu", bias=Q))
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["attention: not using splash: it takes no bias."]


@pytest.mark.parametrize("name", ["dense", "blocked", "xla"])
def test_plain_arrays(name):
    z = attention(Q, KV, KV, implementation=name)
    assert z.shape == Q.shape
    np.testing.assert_allclose(z, Q, rtol=1e-6)  # averages of ones


def test_bool_mask_combines_with_the_options():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in (Q, KV))
    keys = jnp.asarray(rng.random((2, 1, 1, 6)) < 0.5)
    by_array = attention(q, k, k, keys, window=3, return_lse=True)
    mask = Mask(is_causal=True, window=3, key_mask=keys[:, 0, 0])
    by_mask = attention(q, k, k, mask, return_lse=True)
    for a, b in zip(by_array, by_mask, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_default_scale_is_one_over_the_root_of_head_dim():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in (Q, KV))
    np.testing.assert_array_equal(attention(q, k, k), attention(q, k, k, scale=8**-0.5))


def test_segments_and_window_pass_through():
    ids = jnp.asarray([[1, 1, 1, 2, 2, 0]] * 2)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in (Q, KV))
    z = attention(q, k, k, segment_ids=ids)
    alone = attention(q[:, 3:5], k[:, 3:5], k[:, 3:5])
    np.testing.assert_allclose(z[:, 3:5], alone, rtol=1e-5, atol=1e-6)
    assert (z[:, 5] == 0).all()


BAD = [
    (lambda: attention(Q[0], KV, KV), ValueError, r"q has shape \(6, 4, 8\)"),
    (lambda: attention(Q.astype(int), KV, KV), TypeError, "floating dtype"),
    (lambda: attention(Q[:, :, :3], KV, KV), ValueError, "num_heads=3 .* num_kv_heads=2"),
    (lambda: attention(Q, KV, KV[:, :5]), ValueError, "differ in batch, length or heads"),
    (lambda: attention(Q[:1], KV, KV), ValueError, "differ in batch or head_dim"),
    (lambda: attention(Q, KV, KV, window=0), ValueError, "window=0"),
    (lambda: attention(Q, KV, KV, soft_cap=0.0), ValueError, "soft_cap=0.0 must be positive"),
    (lambda: attention(Q, KV, KV, jnp.ones((3, 6, 6), bool)), ValueError, "does not broadcast"),
    (lambda: attention(Q, KV, KV, jnp.ones((6, 6))), TypeError, "mask is bool"),
    (lambda: attention(Q, KV, KV, bias=jnp.ones((5,))), ValueError, "bias has shape"),
    (lambda: attention(Q, KV, KV, sinks=jnp.ones(2)), ValueError, r"sinks .* \[H\] = \(4,\)"),
    (lambda: attention(Q, KV, KV, alibi_slopes=jnp.ones(2)), ValueError, "alibi_slopes has shape"),
    (lambda: attention(Q, KV, KV, segment_ids=jnp.ones(6)), ValueError, "q_segment_ids has shape"),
    (
        lambda: attention(Q[:, :3], KV, KV, segment_ids=jnp.ones((2, 3))),
        ValueError,
        "pass the keys' segment ids",
    ),
    (lambda: attention(Q, KV, KV, Mask(), window=3), ValueError, "together with window"),
    (lambda: attention(Q, KV, KV, implementation="flash"), ValueError, "known: auto, dense"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_context_passes_through_jit_and_vmap():
    ctx = AttentionContext(mask=Mask(is_causal=True), bias=jnp.zeros((3, 1, 1, 6, 6)))
    run = jax.jit(jax.vmap(lambda c: attend(Q, KV, KV, c)[0]))
    assert run(ctx).shape == (3, *Q.shape)
