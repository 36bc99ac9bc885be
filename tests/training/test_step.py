"""The train step: what it computes, what it never forms, what it reuses."""

import dataclasses
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads.models import Output, forward, with_config
from jaxheads.parallel import make_mesh
from jaxheads.taps import Edit, intervene, record
from jaxheads.training import (
    TrainConfig,
    init_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
    next_token_loss,
)
from tests.training.cases import TINY, random_batch, random_model

SGD = TrainConfig(optimizer="sgd", lr=1.0, schedule="constant", grad_clip=0, steps=10)


def sgd_gradients(cfg: TrainConfig, batch, fwd=forward, mesh=None):
    """The gradients a step applied (lr 1, no momentum), and its metrics."""
    model = random_model(TINY)
    before = jax.tree.map(np.asarray, model)
    optimizer = make_optimizer(cfg)
    step = make_train_step(cfg, optimizer, mesh, fwd)
    new, metrics = step(init_state(model, optimizer, mesh), batch)
    return jax.tree.map(lambda a, b: a - np.asarray(b), before, new.model), metrics


@pytest.mark.parametrize("mesh", [None, pytest.param("data:2", marks=pytest.mark.slow)])
def test_accumulated_gradients_are_those_of_the_whole_batch(mesh):
    mesh = mesh and make_mesh(mesh)
    batch = random_batch(TINY)
    batch["weights"][1] = 0  # microbatches of unequal weight
    want, want_metrics = sgd_gradients(SGD, batch)
    got, metrics = sgd_gradients(dataclasses.replace(SGD, grad_accum=4), batch, mesh=mesh)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
    for name in want_metrics:
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5, err_msg=name)


def test_metrics_are_what_they_say():
    batch = random_batch(TINY)
    grads, metrics = sgd_gradients(SGD, batch)
    model = random_model(TINY)
    loss, means = next_token_loss(forward, model, batch, SGD)
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in tree))
    want = {
        "loss": loss,
        "accuracy": means["accuracy"],
        "weights": batch["weights"].sum(),
        "lr": 1.0,
        "aux": 0.0,
        "z_loss": 0.0,
        "grad_norm": norm(jax.tree.leaves(grads)),
        "param_norm": norm(
            np.asarray(p) - g for p, g in zip(jax.tree.leaves(model), jax.tree.leaves(grads))
        ),
    }
    assert set(metrics) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_loss_falls_and_the_function_is_traced_once():
    traces = []

    def counted(model, tokens, **kwargs):
        traces.append(1)
        return forward(model, tokens, **kwargs)

    cfg = TrainConfig(steps=30, lr=2e-2)
    optimizer = make_optimizer(cfg)
    mesh = make_mesh("data:2,model:2")
    state = init_state(random_model(TINY), optimizer, mesh)
    step = make_train_step(cfg, optimizer, mesh, counted)
    losses = []
    for i in range(30):
        state, metrics = step(state, random_batch(TINY, seed=i % 2))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert len(traces) == 1 and int(state.step) == 30


def sizes_with(text: str, vocab: int) -> list[int]:
    """Element counts of every array in a compiled program that has the vocabulary as an axis."""
    shapes = [tuple(map(int, s.split(","))) for s in re.findall(r"\w+\[(\d+(?:,\d+)*)\]", text)]
    return [int(np.prod(s)) for s in shapes if vocab in s]


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_logits_of_the_whole_batch_never_exist(tied):
    """In no dtype and no arrangement ([B,T,V], [B*T,V], transposed), forward or backward."""
    cfg = dataclasses.replace(TINY, vocab_size=97, tie_embeddings=tied)
    rows, length = 8, 32
    whole = rows * length * 97
    batch = random_batch(cfg, rows, length)
    train = TrainConfig(loss_chunks=4)
    optimizer = make_optimizer(train)
    state = init_state(random_model(cfg), optimizer)
    text = make_train_step(train, optimizer).lower(state, batch).compile().as_text()
    evaluate = make_eval_step(train).lower(state.model, batch).compile().as_text()
    for program in (text, evaluate):
        assert rows * length * 25 in sizes_with(program, 25)  # a chunk's logits: found at all
        assert max(sizes_with(program, 97), default=0) < whole
        assert max(sizes_with(program, 100), default=0) < whole  # nor of the padded vocabulary

    whole_logits = lambda m, t, **kw: Output(forward(m, t, **kw).logits)
    step = make_train_step(train, optimizer, forward=whole_logits)
    assert max(sizes_with(step.lower(state, batch).compile().as_text(), 97)) == whole


def remat_run(model, batch, cfg, policy):
    model = with_config(model, remat=policy)
    f = jax.jit(jax.value_and_grad(lambda m: next_token_loss(forward, m, batch, cfg)[0]))
    compiled = f.lower(model).compile()
    loss, grads = compiled(model)
    return compiled.memory_analysis().temp_size_in_bytes, float(loss), grads


@pytest.mark.slow
def test_rematerialisation_changes_memory_and_nothing_else():
    deep = dataclasses.replace(TINY, num_layers=12)
    model, batch, cfg = random_model(deep), random_batch(deep, 8, 64), TrainConfig()
    memory, loss, grads = remat_run(model, batch, cfg, "none")
    used = {}
    for policy in ("full", "dots", "names:q,k,v"):
        used[policy], other, other_grads = remat_run(model, batch, cfg, policy)
        np.testing.assert_allclose(other, loss, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert used["full"] < 0.5 * memory
    assert used["full"] < used["names:q,k,v"] < memory


def test_state_is_donated():
    optimizer = make_optimizer(TrainConfig())
    for mesh in (None, make_mesh("fsdp:2,model:2")):
        state = init_state(random_model(TINY), optimizer, mesh)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "Some donated buffers were not usable"
            new, _ = make_train_step(TrainConfig(), optimizer, mesh)(state, random_batch(TINY))
        assert all(x.is_deleted() for x in jax.tree.leaves(state))
        assert not any(x.is_deleted() for x in jax.tree.leaves(new))


def test_packed_documents_train_as_separate_ones():
    r = np.random.default_rng(0)
    docs = [r.integers(0, 64, n + 1).astype(np.int32) for n in (6, 10)]
    packed = {
        "tokens": np.concatenate([d[:-1] for d in docs])[None],
        "targets": np.concatenate([d[1:] for d in docs])[None],
        "segment_ids": np.repeat([1, 2], [6, 10])[None].astype(np.int32),
    }
    apart = {k: np.zeros((2, 16), np.int32) for k in ("tokens", "targets", "segment_ids")}
    for i, d in enumerate(docs):
        n = len(d) - 1
        apart["tokens"][i, :n], apart["targets"][i, :n], apart["segment_ids"][i, :n] = (
            d[:-1], d[1:], 1,
        )  # fmt: skip
    apart["weights"] = (apart["segment_ids"] > 0).astype(np.float32)
    model = random_model(TINY)
    f = jax.jit(jax.value_and_grad(lambda m, b: next_token_loss(forward, m, b, SGD)[0]))
    (a, a_grads), (b, b_grads) = f(model, packed), f(model, apart)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(a_grads), jax.tree.leaves(b_grads)):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    packed.pop("segment_ids")
    assert abs(f(model, packed)[0] - b) > 1e-4  # the segments matter


def multiply(value, payload, ctx):
    return value * payload


@pytest.mark.parametrize("mesh", [None, pytest.param("data:2,model:2", marks=pytest.mark.slow)])
def test_training_under_a_wrapped_forward(mesh):
    """Gates on z: all open changes nothing, head 3 of layer 1 shut stops that head's training."""
    mesh = mesh and make_mesh(mesh)
    batch = random_batch(TINY)
    gates = np.ones((2, 1, 1, 8, 1), np.float32)
    plain, _ = sgd_gradients(SGD, batch)
    opened, _ = sgd_gradients(SGD, batch, intervene(forward, Edit("z", multiply, gates)), mesh)
    for a, b in zip(jax.tree.leaves(opened), jax.tree.leaves(plain)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
    gates[1, ..., 3, 0] = 0
    shut_forward = record(intervene(forward, Edit("z", multiply, gates)), "z")
    shut, _ = sgd_gradients(SGD, batch, shut_forward, mesh)
    per_head = np.abs(shut.layers.attention.wo[...]).sum((2, 3))  # [L,H]
    assert per_head[1, 3] == 0 and np.count_nonzero(per_head) == 15
    assert np.abs(shut.embed.table[...] - plain.embed.table[...]).max() > 1e-3


def test_integer_leaves_ride_along():
    model = random_model(TINY)
    model.buffer = nnx.Variable(jnp.arange(3))
    cfg = TrainConfig()
    optimizer = make_optimizer(cfg)
    new, _ = make_train_step(cfg, optimizer)(init_state(model, optimizer), random_batch(TINY))
    np.testing.assert_array_equal(new.model.buffer[...], [0, 1, 2])


@pytest.mark.slow
def test_bfloat16_compute_keeps_float32_masters():
    cfg = TrainConfig()
    optimizer = make_optimizer(cfg)
    half = with_config(random_model(TINY), compute_dtype="bfloat16")
    new, metrics = make_train_step(cfg, optimizer)(init_state(half, optimizer), random_batch(TINY))
    assert {x.dtype for x in jax.tree.leaves(new.model)} == {jnp.dtype("float32")}
    want = next_token_loss(forward, random_model(TINY), random_batch(TINY), cfg)[0]
    np.testing.assert_allclose(metrics["loss"], want, rtol=2e-2)


def test_evaluation_sums_add_up_over_batches():
    model, cfg = random_model(TINY), TrainConfig()
    batch = random_batch(TINY)
    evaluate = make_eval_step(cfg, make_mesh("data:2"))
    halves = [evaluate(model, {k: v[i : i + 4] for k, v in batch.items()}) for i in (0, 4)]
    total = jax.tree.map(jnp.add, *halves)
    want, means = next_token_loss(forward, model, batch, cfg)
    np.testing.assert_allclose(total.loss_sum / total.weight_sum, want, rtol=1e-5)
    np.testing.assert_allclose(total.correct_sum / total.weight_sum, means["accuracy"], rtol=1e-6)
