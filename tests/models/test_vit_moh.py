"""Mixtures of heads in a vision transformer, against loops over tokens and heads."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxheads as jh
from jaxheads.interventions import to_moh
from jaxheads.models import vit
from jaxheads.models.vit import ViT, ViTConfig
from jaxheads.models.vit_attention import VISION_ATTENTIONS
from jaxheads.parallel import make_mesh, shard
from jaxheads.taps import NO_TAP
from jaxheads.training.classifier import ClassifierTraining, classification_loss, train_step
from jaxheads.training.step import TrainState
from launch.train_vit import resolve, run
from tests.attention.test_moh import naive_gates, softmax

L, M, H, D = 2, 16, 4, 4
CFG = ViTConfig(
    image_size=6, patch_size=2, num_classes=3, num_layers=L, model_dim=M, num_heads=H, mlp_dim=16,
    attention="moh(num_shared=2,top_k=1)",
)  # fmt: skip
IMAGES = np.random.default_rng(1).normal(size=(4, 6, 6, 1)).astype(np.float32)
LABELS = np.array([0, 2, 1, 0])


def with_attention(text):
    return dataclasses.replace(CFG, attention=text)


def loud(make, seed=0):
    """A module with every parameter drawn here, large enough that each matters."""
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype)
    return jax.tree.map(draw, jax.eval_shape(make))


def build(cfg=CFG):
    return loud(lambda: ViT(cfg, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def out(model):
    return jh.record(vit.forward, "active", "gates", "z", "pattern")(model, IMAGES)


def raw(param):
    return np.asarray(param[...], np.float64)


def naive_layer(w, x, top_k):
    """[B,T,M] and the balance loss of one layer, a head at a time, in float64."""
    router = {name: raw(param) for name, param in w.router.items()}
    gates = naive_gates(x, router, top_k, "unit_mean")
    y = np.broadcast_to(raw(w.bo), x.shape).copy()
    for b, h in np.ndindex(len(x), H):
        q, k, v = (x[b] @ raw(getattr(w, f"w{s}"))[:, h] + raw(getattr(w, f"b{s}"))[h]
                   for s in "qkv")  # fmt: skip
        pattern = np.stack([softmax(row) for row in q @ k.T / np.sqrt(D)])
        y[b] += gates[b, :, h, None] * (pattern @ v) @ raw(w.wo)[h]
    logits = x.reshape(-1, M) @ router["routed"]
    probs = np.stack([softmax(row) for row in logits])
    num_routed = probs.shape[-1]
    load = (gates[..., -num_routed:] > 0).reshape(-1, num_routed).mean(0)
    return y, num_routed * np.sum(probs.mean(0) * load)


@pytest.mark.parametrize(("num_shared", "top_k"), [(2, 1), (1, 2)])
def test_a_layer_equals_loops_over_tokens_and_heads(num_shared, top_k):
    cfg = with_attention(f"moh(num_shared={num_shared},top_k={top_k})")
    row = VISION_ATTENTIONS["moh"]
    module = loud(lambda: row.module(cfg, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(2).normal(size=(2, cfg.num_tokens, M))
    y, aux = jax.jit(lambda w, x: row.attend(w, x, cfg, NO_TAP))(module, jnp.float32(x))
    want, balance = naive_layer(module, x, top_k)
    np.testing.assert_allclose(y, want, atol=2e-5)
    np.testing.assert_allclose(aux["moh_balance"], balance, rtol=1e-5)


def test_taps_show_which_heads_are_active(model, out):
    active, gates = (np.asarray(out.seen[name]) for name in ("active", "gates"))
    assert active.shape == gates.shape == (L, 4, CFG.num_tokens, H)
    assert (active[..., :2] == 1).all() and (active[..., 2:].sum(-1) == 1).all()
    np.testing.assert_array_equal(gates > 0, active == 1)
    assert (np.asarray(out.seen["z"])[active == 0] == 0).all()
    assert out.seen["pattern"].shape == (L, 4, H, CFG.num_tokens, CFG.num_tokens)
    # With one of two routed heads active, L_b = 2 sum P f lies between 0 and 2, at 1 if uniform.
    load = active[..., 2:].mean((1, 2))
    assert 0 < out.aux["moh_balance"] < 2 and np.ptp(load) > 0.05


def test_the_balance_loss_is_part_of_what_is_minimised(model):
    """Of an SGD step, what `aux_weight` adds is the gradient of the balance loss."""
    sgd = optax.sgd(1.0)
    state = TrainState(jnp.int32(0), model, sgd.init(model))
    batch = {"image": jnp.asarray(IMAGES), "label": jnp.asarray(LABELS)}

    @jax.jit
    def steps(state, batch):
        stepped = [
            train_step(state, batch, settings=ClassifierTraining(aux_weight=w), optimizer=sgd)
            for w in (0.0, 2.0)
        ]
        balance = lambda model: vit.forward(model, batch["image"]).aux["moh_balance"]
        return stepped, jax.grad(balance)(state.model), vit.forward(state.model, batch["image"])

    ((without, _), (with_it, metrics)), slope, out = steps(state, batch)
    router = lambda model: np.asarray(model.layers.attention.router["routed"][...])
    np.testing.assert_allclose(
        router(without.model) - router(with_it.model), 2 * router(slope), atol=1e-5
    )
    assert (np.abs(router(slope)) > 0).all()
    np.testing.assert_allclose(metrics["aux"], out.aux["moh_balance"], rtol=1e-5)
    cross = classification_loss(out.logits, batch["label"])  # the loss that is reported
    np.testing.assert_allclose(metrics["loss"], cross, rtol=1e-5)


def test_a_dense_model_is_converted_without_new_parameters():
    dense = build(with_attention("softmax"))
    plain = vit.forward(dense, IMAGES)
    of = lambda text: vit.forward(vit.with_config(dense, attention=text), IMAGES)
    every = of("moh(router=query_norm,num_shared=1,top_k=3)")
    np.testing.assert_array_equal(every.logits, plain.logits)
    assert plain.aux == {}
    some = of("moh(router=query_norm,num_shared=1,top_k=1)")
    want = to_moh(vit.forward, 1, 1)(dense, IMAGES)
    np.testing.assert_allclose(some.logits, want.logits, atol=1e-5)
    assert np.abs(some.logits - plain.logits).max() > 1e-2
    with pytest.raises(ValueError, match="build a ViT"):
        of("moh(num_shared=1,top_k=1)")


def test_gathering_gives_the_same_and_counts_what_it_drops(model, out):
    of = lambda extra: vit.forward(
        vit.with_config(model, attention=f"moh(num_shared=2,top_k=1,impl=gather{extra})"), IMAGES
    )
    exact = of("")
    np.testing.assert_allclose(exact.logits, out.logits, atol=1e-4)
    assert exact.aux["num_dropped"] == 0
    # Half of 10 tokens fit; layers and images sum.
    active = np.asarray(out.seen["active"])[:1, :, :, 2:].sum(2)
    assert of(",capacity_factor=1").aux["num_dropped"] >= np.maximum(active - 5, 0).sum() > 0


def test_a_split_batch_and_model_give_the_same_loss(model, out):
    mesh = make_mesh("data:2,fsdp:2,model:2")
    with jax.set_mesh(mesh):
        got = vit.forward(shard(model, mesh), IMAGES)
    np.testing.assert_allclose(got.logits, out.logits, atol=1e-4)
    np.testing.assert_allclose(got.aux["moh_balance"], out.aux["moh_balance"], rtol=1e-5)


def test_saved_and_loaded(model, tmp_path):
    jh.save(model, tmp_path)
    again = jh.load(tmp_path)
    assert again.cfg == model.cfg
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build(with_attention("moh(num_shared=5)")), r"num_shared=5 .*4 heads"),
        (lambda: build(with_attention("moh(num_shared=2,top_k=3)")), r"top_k=3 .*2 routed"),
        (lambda: build(with_attention("moh(num_shared=2,top_k=0)")), "top_k=0"),
        (lambda: build(with_attention("moh(router=query_norm,num_shared=3,top_k=1)")),
         "one routed head"),
        (lambda: with_attention("moh(topk=1)"), "did you mean 'top_k'"),
        (lambda: with_attention("moh(gate_scale=max)"), "gate_scale='max'"),
        (lambda: ClassifierTraining(aux_weight=-1), "aux_weight=-1"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_the_launcher_trains_it(tmp_path):
    settings = ["model.num_layers=2", "model.model_dim=16", "model.patch_size=4",
                "model.attention=moh(num_shared=2,top_k=1)", "train.steps=40",
                "train.batch_size=32", "train.warmup_steps=5"]  # fmt: skip
    plan = resolve(data="shapes", workdir=str(tmp_path), mesh="data:1", set=settings)
    result = run(plan, {})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0.9 < line["aux"] < 2 for line in lines) and result["test"]["accuracy"] > 0.2
    assert jh.load(tmp_path / "model").cfg.attention == "moh(num_shared=2,top_k=1)"
