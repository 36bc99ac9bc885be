"""Optimisers by name, what they decay and freeze, and the schedules' values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads.models import Decoder
from jaxheads.training import TrainConfig, init_state, learning_rate, make_optimizer, train_step
from jaxheads.training.optimizers import decayed, optimizers, trainable
from tests.configs import CONFIGS, tokens_of
from tests.training.cases import random_model

NAMES = [
    "adamw",
    "adam",
    "sgd",
    "lion",
    "adafactor",
    "lamb",
    "muon",
    "adagrad",
    "nadamw",
    "rmsprop",
]


@pytest.mark.parametrize("name", NAMES)
def test_trains_a_quadratic_down(name):
    """0.5 |p - target|^2 over a matrix and a vector, under parameters with axes."""
    r = np.random.default_rng(0)

    class Toy(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(
                jnp.asarray(r.normal(size=(6, 4)), jnp.float32), axes=("embed", "mlp")
            )
            self.b = nnx.Param(jnp.asarray(r.normal(size=4), jnp.float32), axes=("mlp",))

    lr = {"adagrad": 0.5, "sgd": 0.1, "muon": 0.3}.get(name, 0.05)
    optimizer = make_optimizer(TrainConfig(optimizer=name, lr=lr, steps=200, grad_clip=0))
    loss = lambda m: 0.5 * (jnp.sum((m.w[...] - 1) ** 2) + jnp.sum((m.b[...] + 1) ** 2))

    @jax.jit
    def step(model, state):
        value, grads = jax.value_and_grad(loss)(model)
        updates, state = optimizer.update(grads, state, model)
        return jax.tree.map(jnp.add, model, updates), state, value

    model = Toy()
    state = optimizer.init(model)
    model, state, first = step(model, state)
    for _ in range(199):
        model, state, _ = step(model, state)
    assert loss(model) < 0.1 * first


def test_every_listed_optimizer_can_be_made():
    assert {"adamw", "adam", "sgd", "lion", "adafactor", "lamb", "muon"} <= set(optimizers())
    for name in optimizers():
        make_optimizer(TrainConfig(optimizer=name))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"optimizer": "adamv"}, ValueError, "did you mean 'adam"),
        ({"optimizer": "lbfgs"}, ValueError, "needs the loss function"),
        ({"optimizer": "sgd", "b2": 0.9}, ValueError, "b2=0.9 was given but optimizer='sgd'"),
        ({"optimizer": "adam", "weight_decay": 0.1}, ValueError, "has no such option"),
        ({"optimizer": "novograd", "weight_decay": 0.1}, ValueError, "decay_norms_and_biases"),
        ({"schedule": "cosin"}, ValueError, "did you mean 'cosine'"),
        ({"steps": 0}, ValueError, "steps=0 must be at least 1"),
        ({"steps": 1.5}, TypeError, "steps=1.5 must be an integer"),
        ({"lr": -1.0}, ValueError, "lr=-1.0 must be at least 0"),
        ({"lr": float("nan")}, ValueError, "lr=nan"),
        ({"lr": "fast"}, TypeError, "must be a number"),
        ({"b1": 1.0}, ValueError, "b1=1.0 must be below 1"),
        ({"final_lr_fraction": 1.5}, ValueError, "at most 1"),
        ({"warmup_steps": 20, "steps": 10}, ValueError, "warmup_steps=20 is more than steps=10"),
        ({"grad_accum": 0}, ValueError, "grad_accum=0"),
        ({"trainable": "*"}, ValueError, "must be a tuple of globs"),
        ({"trainable": ()}, ValueError, "must be a tuple of globs"),
    ],
)
def test_bad_settings_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        TrainConfig(**changes)


def test_config_is_hashable_and_comparable():
    assert hash(TrainConfig(lr=1e-3)) == hash(TrainConfig()) and TrainConfig(lr=1) != TrainConfig()


LR = 2e-3


@pytest.mark.parametrize(
    ("schedule", "values"),
    [  # 100 steps, 10 of warm-up, final fraction 0.1, decay fraction 0.2
        ("constant", {0: 0.1, 4: 0.5, 9: 1, 10: 1, 55: 1, 100: 1}),
        ("linear", {0: 0.1, 9: 1, 10: 1, 55: 0.55, 100: 0.1, 200: 0.1}),
        ("cosine", {0: 0.1, 9: 1, 10: 1, 55: 0.55, 100: 0.1, 200: 0.1}),
        ("wsd", {0: 0.1, 9: 1, 10: 1, 80: 1, 90: 0.55, 100: 0.1}),
    ],
)
def test_schedules_at_key_steps(schedule, values):
    at = learning_rate(TrainConfig(steps=100, warmup_steps=10, lr=LR, schedule=schedule))
    for step, fraction in values.items():
        np.testing.assert_allclose(at(step), LR * fraction, rtol=1e-5, err_msg=str(step))
    quarter = learning_rate(TrainConfig(steps=100, lr=LR, final_lr_fraction=0.0))(25)
    np.testing.assert_allclose(quarter, LR * (1 + np.cos(np.pi / 4)) / 2, rtol=1e-5)


def names_where(tree, model):
    flags = jax.tree.leaves(tree)
    paths = [jax.tree_util.keystr(p, simple=True, separator=".").removesuffix(".value")
             for p, _ in jax.tree_util.tree_leaves_with_path(model)]  # fmt: skip
    return {p for p, f in zip(paths, flags, strict=True) if f}


@pytest.mark.parametrize("name", ["gpt2", "opt-post", "gemma", "alibi-sinks", "gptj"])
def test_weight_decay_leaves_out_norms_and_biases(name):
    model = jax.eval_shape(lambda: Decoder(CONFIGS[name], rngs=nnx.Rngs(0)))
    no = {"weight", "bias", "bq", "bk", "bv", "bo", "b_in", "b_gate", "b_out", "sinks"}
    everything = names_where(jax.tree.map(lambda _: True, model), model)
    want = {n for n in everything if n.split(".")[-1] not in no}
    assert names_where(decayed(model), model) == want


def test_weight_decay_acts_where_it_should():
    """Zero gradients: AdamW's update is -lr * decay * p on decayed parameters, 0 elsewhere."""
    model = random_model(CONFIGS["gpt2"])
    zero = jax.tree.map(jnp.zeros_like, model)
    for all_too in (False, True):
        cfg = TrainConfig(lr=0.1, schedule="constant", decay_norms_and_biases=all_too)
        optimizer = make_optimizer(cfg)
        updates, _ = optimizer.update(zero, optimizer.init(model), model)
        np.testing.assert_allclose(
            updates.layers.mlp.w_in[...], -0.01 * model.layers.mlp.w_in[...], rtol=1e-5
        )
        np.testing.assert_allclose(
            updates.layers.attention.bq[...], -0.01 * all_too * model.layers.attention.bq[...],
            rtol=1e-5,
        )  # fmt: skip


def test_clipping_bounds_the_gradient():
    model = {"a": jnp.zeros(3)}
    optimizer = make_optimizer(
        TrainConfig(optimizer="sgd", lr=1.0, schedule="constant", grad_clip=0.5)
    )
    updates, _ = optimizer.update({"a": jnp.array([3.0, 0, 4.0])}, optimizer.init(model), model)
    np.testing.assert_allclose(updates["a"], [-0.3, 0, -0.4], rtol=1e-6)


def test_only_trainable_parameters_move():
    cfg = TrainConfig(trainable=("*.attention.wo", "final_norm.*"), steps=3)
    optimizer = make_optimizer(cfg)
    state = init_state(random_model(CONFIGS["llama"]), optimizer)
    tokens = tokens_of("llama")
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    new, metrics = jax.jit(lambda s: train_step(s, batch, cfg=cfg, optimizer=optimizer))(state)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.model, new.model)
    assert names_where(moved, state.model) == {"layers.attention.wo", "final_norm.weight"}
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 4  # mu and nu of two parameters
    frozen = sum(jnp.sum(x**2) for x in jax.tree.leaves(state.model)) ** 0.5
    assert 0 < metrics["grad_norm"] < frozen
    with pytest.raises(ValueError, match="matches no parameter"):
        trainable(state.model, ("*.wz",))


def test_muon_reads_head_axes_as_matrices():
    """One Muon step moves wq by an orthogonal matrix M -> H*D in every layer."""
    model = random_model(CONFIGS["llama"])
    noise = lambda x: jax.random.normal(jax.random.key(x.size), x.shape)
    grads = jax.tree.map(noise, model)
    optimizer = make_optimizer(
        TrainConfig(optimizer="muon", lr=1.0, schedule="constant", grad_clip=0, weight_decay=0.0)
    )
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(model), model)
    for matrix in np.asarray(updates.layers.attention.wq[...]).reshape(3, 32, 32):
        values = np.linalg.svd(matrix, compute_uv=False)
        assert 0.5 < np.median(values) < 1.5  # Newton-Schulz lands near 1
