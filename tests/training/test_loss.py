"""The chunked cross-entropy against a float64 formula written out in numpy."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxheads.models import Output, forward
from jaxheads.parallel import make_mesh
from jaxheads.taps import Edit, intervene
from jaxheads.training import TrainConfig, chunked_cross_entropy, next_token_loss
from jaxheads.training import loss as loss_module
from tests.configs import CONFIGS, tokens_of
from tests.training.cases import random_model

B, T, E, V = 3, 8, 5, 13
CAP = 2.5


def inputs(seed=0):
    r = np.random.default_rng(seed)
    return dict(
        hidden=r.normal(size=(B, T, E)),
        kernel=r.normal(size=(E, V)),
        bias=r.normal(size=V),
        targets=r.integers(0, V, (B, T)),
        weights=r.uniform(0, 2, (B, T)) * (r.uniform(size=(B, T)) > 0.3),
    )


def reference(x, *, z_loss=0.0, soft_cap=None, use_bias=True):
    """Sums, and gradients of the loss sum, by the formulas in float64."""
    w, t = x["weights"], x["targets"]
    raw = x["hidden"] @ x["kernel"] + (x["bias"] if use_bias else 0)
    logits = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
    lse = np.log(np.exp(logits).sum(-1))
    onehot = np.eye(V)[t]
    loss = lse - (logits * onehot).sum(-1) + z_loss * lse**2
    probs = np.exp(logits - lse[..., None])
    d = w[..., None] * (probs * (1 + 2 * z_loss * lse)[..., None] - onehot)
    if soft_cap is not None:
        d = d * (1 - (logits / soft_cap) ** 2)
    sums = ((w * loss).sum(), w.sum(), (w * (logits.argmax(-1) == t)).sum(), (w * lse**2).sum())
    grads = (
        np.einsum("btv,ev->bte", d, x["kernel"]),
        np.einsum("btv,bte->ev", d, x["hidden"]),
        d.sum((0, 1)),
    )
    return sums, grads


def ours(x, num_chunks, *, dtype=jnp.float32, vocab_first=False, use_bias=True, **options):
    kernel = x["kernel"].T if vocab_first else x["kernel"]
    args = (
        jnp.asarray(x["hidden"], dtype),
        jnp.asarray(kernel, jnp.float32),
        jnp.asarray(x["bias"], jnp.float32) if use_bias else None,
    )

    def f(hidden, kernel, bias):
        sums = chunked_cross_entropy(
            hidden,
            kernel,
            jnp.asarray(x["targets"]),
            jnp.asarray(x["weights"], jnp.float32),
            bias,
            num_chunks=num_chunks,
            vocab_first=vocab_first,
            **options,
        )
        return sums.loss_sum, sums

    argnums = (0, 1, 2) if use_bias else (0, 1)
    both = jax.jit(lambda *a: (jax.grad(f, argnums, has_aux=True)(*a), f(*a)[1]))
    (grads, sums), plain = both(*args)
    for a, b in zip(sums, plain):  # with and without differentiation
        np.testing.assert_allclose(a, b, rtol=1e-6)
    return sums, grads


@pytest.mark.parametrize(
    ("num_chunks", "options"),
    [
        (1, {}),
        (2, {"z_loss": 0.1, "vocab_first": True}),
        (4, {"soft_cap": CAP}),
        (8, {"z_loss": 0.05, "soft_cap": CAP, "vocab_first": True}),
        (4, {"z_loss": 0.05, "soft_cap": CAP}),
    ],
)
def test_sums_and_gradients_equal_the_formula(num_chunks, options):
    x = inputs()
    sums, grads = ours(x, num_chunks, **options)
    vocab_first = options.pop("vocab_first", False)
    want_sums, want_grads = reference(x, **options)
    np.testing.assert_allclose(np.array(sums), want_sums, rtol=1e-5)
    d_kernel = grads[1].T if vocab_first else grads[1]
    for got, want in zip((grads[0], d_kernel, grads[2]), want_grads):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_without_bias():
    x = inputs(1)
    want_sums, want_grads = reference(x, use_bias=False)
    sums, grads = ours(x, 4, use_bias=False)
    np.testing.assert_allclose(np.array(sums), want_sums, rtol=1e-5)
    np.testing.assert_allclose(grads[1], want_grads[1], rtol=1e-4, atol=1e-5)


def test_bfloat16_inputs_keep_float32_logits_and_kernel_gradients():
    x = inputs(2)
    rounded = {**x, "hidden": np.asarray(jnp.asarray(x["hidden"], jnp.bfloat16), np.float64)}
    rounded["kernel"] = np.asarray(jnp.asarray(x["kernel"], jnp.bfloat16), np.float64)
    want_sums, want_grads = reference(rounded, z_loss=0.1)
    sums, grads = ours(x, 2, dtype=jnp.bfloat16, z_loss=0.1)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32, jnp.float32]
    np.testing.assert_allclose(np.array(sums), want_sums, rtol=1e-4)  # only inputs are rounded
    for got, want in zip(grads, want_grads):
        np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=2e-2, atol=2e-2)


def test_gradient_scales_with_the_cotangent():
    x = inputs()
    f = lambda c: jax.grad(
        lambda h: c * chunked_cross_entropy(h, x["kernel"], x["targets"]).loss_sum
    )(jnp.asarray(x["hidden"], jnp.float32))
    np.testing.assert_allclose(f(3.0), 3 * f(1.0), rtol=1e-6)


def test_targets_outside_the_vocabulary():
    x = inputs()
    x["targets"][0, 0] = -100
    x["weights"][0, 0] = 0
    assert np.isfinite(ours(x, 2)[0].loss_sum)
    x["weights"][0, 0] = 1
    assert np.isnan(ours(x, 2)[0].loss_sum)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_chunks": 14}, "loss_chunks=14 must lie between 1 and the 13"),
        ({"targets": np.zeros((B, T + 1), int)}, "do not fit"),
        ({"kernel": np.zeros((E + 1, V))}, "kernel"),
        ({"weights": np.ones(T)}, "weights"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    x = {**inputs(), **change}
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(
            jnp.asarray(x["hidden"]),
            jnp.asarray(x["kernel"]),
            jnp.asarray(x["targets"]),
            jnp.asarray(x["weights"]),
            num_chunks=x.get("num_chunks", 0),
        )


def test_number_of_chunks_follows_size_and_mesh(monkeypatch):
    assert loss_module.choose_num_chunks(2, 64, 1000, 8) == 1
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 2 * 64 * 100)
    assert loss_module.choose_num_chunks(2, 64, 1000, 8) == 3  # 400 entries a chunk
    with jax.set_mesh(make_mesh("model:2")):
        assert loss_module.choose_num_chunks(2, 64, 1000, 8) == 5  # 100 of 500 on each device
    with jax.set_mesh(make_mesh("data:2,context:2,model:2")):
        assert loss_module.choose_num_chunks(2, 64, 1000, 8) == 2  # 400 of 500 on each device
        assert loss_module.choose_num_chunks(2, 64, 1001, 8) == 3  # whole on each device
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 1)
    assert loss_module.choose_num_chunks(2, 64, 1000, 100) == 5  # twice the width


def test_no_array_of_all_logits_and_no_gathered_kernel():
    """Chunks of one shape only, and the kernel's gradient lands in its shards."""
    batch, length, width, vocab = 8, 16, 32, 1000
    mesh = make_mesh("fsdp:4,model:2")
    place = lambda spec: NamedSharding(mesh, P(*spec))
    hidden = jax.device_put(jnp.ones((batch, length, width)), place(["fsdp"]))
    kernel = jax.device_put(jnp.ones((width, vocab)), place(["fsdp", "model"]))
    targets = jax.device_put(jnp.ones((batch, length), jnp.int32), place(["fsdp"]))
    loss = lambda h, k: chunked_cross_entropy(h, k, targets, num_chunks=5).loss_sum
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, kernel).compile()
    sizes = {
        math.prod(map(int, s.split(","))) for s in re.findall(r"\[([\d,]+)\]", compiled.as_text())
    }
    assert batch * length // 4 * 100 in sizes  # logits of a chunk: 100 of a shard's 500 entries
    assert batch * length // 4 * 500 not in sizes
    assert width * 500 not in sizes


def batch_of(name, seed=3):
    tokens = np.asarray(tokens_of(name, batch=2, length=9, seed=seed))
    weights = np.random.default_rng(seed).uniform(0, 1, (2, 8)).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


@functools.cache
def one_layer(name):
    """A one-layer model with the outer parts of `CONFIGS[name]`."""
    return random_model(dataclasses.replace(CONFIGS[name], num_layers=1, window=(None,)))


@pytest.mark.parametrize("name", ["llama", "gptj", "opt-post", "gemma"])
def test_model_loss_equals_the_loss_of_its_logits(name):
    """Tied; untied with an output bias; through a narrower embedding; soft-capped."""
    model, batch = one_layer(name), batch_of(name)
    cfg = TrainConfig(z_loss=1e-2)

    def direct(model):
        logits = forward(model, batch["tokens"]).logits
        lse = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        loss = lse - picked + cfg.z_loss * lse**2
        return jnp.sum(batch["weights"] * loss) / jnp.sum(batch["weights"])

    chunked = lambda model: next_token_loss(forward, model, batch, cfg)[0]
    got, got_grads = jax.jit(jax.value_and_grad(chunked))(model)
    want, want_grads = jax.jit(jax.value_and_grad(direct))(model)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads)):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


def test_all_weights_zero_is_zero_not_nan():
    model, batch = one_layer("llama"), batch_of("llama")
    batch["weights"] = np.zeros_like(batch["weights"])
    f = lambda m: next_token_loss(forward, m, batch, TrainConfig(z_loss=0.1))
    (loss, metrics), grads = jax.jit(jax.value_and_grad(f, has_aux=True))(model)
    assert loss == 0 and all(v == 0 for v in metrics.values())
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grads))


def add_payload(value, payload, ctx):
    return value + payload


def logits_only(model, tokens, **kwargs):
    return Output(forward(model, tokens, **kwargs).logits + 0.0)


def test_edited_logits_count():
    """A forward that edits `logits` is trained on what it edits, not on what it ignores."""
    model, batch = one_layer("llama"), batch_of("llama")
    bias = jnp.zeros(61).at[7].set(3.0)
    edited = intervene(forward, Edit("logits", add_payload, bias))
    logits = forward(model, batch["tokens"]).logits + bias
    want = loss_module.cross_entropy(logits, batch["targets"], batch["weights"])
    got = next_token_loss(edited, model, batch, TrainConfig())[1]
    np.testing.assert_allclose(got["loss"], want.loss_sum / want.weight_sum, rtol=1e-6)
    plain = next_token_loss(forward, model, batch, TrainConfig())[1]
    assert abs(plain["loss"] - got["loss"]) > 1e-3
    without_hidden = next_token_loss(logits_only, model, batch, TrainConfig())[1]
    for name in plain:
        np.testing.assert_allclose(without_hidden[name], plain[name], rtol=1e-5)


def test_missing_batch_entries_are_named():
    with pytest.raises(ValueError, match="no 'targets'"):
        next_token_loss(forward, one_layer("llama"), {"tokens": np.zeros((1, 2))}, TrainConfig())
