"""Vision transformers: against transformers and a plain formula, under taps, on disk, on a mesh."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxheads as jh
from jaxheads import parallel
from jaxheads.checkpoints import vision
from jaxheads.models import vit
from jaxheads.models.vit import ViT, ViTConfig

SHARED = Path(__file__).parents[2] / ".." / "shared"
TRAINED, MNIST = SHARED / "models" / "vit-mnist-tiny", SHARED / "data" / "mnist" / "mnist.npz"

TINY = ViTConfig(
    image_size=12,
    patch_size=4,
    channels=2,
    num_classes=5,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    mlp_dim=24,
    distilled=True,
    teacher_head=True,
)
IMAGES = np.random.default_rng(0).normal(size=(3, 12, 12, 2)).astype(np.float32)


def random_vit(cfg, seed=0):
    """Every parameter random, norms and biases included, so that a term left out shows."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        is_norm = jax.tree_util.keystr(path, simple=True, separator=".").endswith("weight")
        mean, spread = (1, 0.1) if is_norm else (0, 0.3)
        return jnp.asarray(rng.normal(mean, spread, leaf.shape), leaf.dtype)

    abstract = jax.eval_shape(lambda: ViT(cfg, rngs=nnx.Rngs(0)))
    return jax.tree_util.tree_map_with_path(fill, abstract)


@pytest.fixture(scope="module")
def model():
    return random_vit(TINY)


@pytest.fixture(scope="module")
def logits(model):
    return vit.forward(model, IMAGES).logits


def naive_logits(model, image):
    """The logits of one image [H,W,C], with loops over tokens and heads, in float64."""
    cfg = model.cfg
    f = lambda leaf: np.asarray(leaf[...], np.float64)
    embed, layers = model.embed, model.layers

    def norm(weights, x, layer=None):
        pick = lambda leaf: f(leaf) if layer is None else f(leaf)[layer]
        centred = x - x.mean(-1, keepdims=True)
        variance = np.mean(centred**2, -1, keepdims=True) + cfg.norm_eps
        return centred / np.sqrt(variance) * pick(weights.weight) + pick(weights.bias)

    gelu = np.vectorize(lambda t: t * (1 + math.erf(t / math.sqrt(2))) / 2)
    p, tokens = cfg.patch_size, [f(embed.class_token), f(embed.distillation_token)]
    for row in range(cfg.grid[0]):
        for column in range(cfg.grid[1]):
            patch = image[row * p : (row + 1) * p, column * p : (column + 1) * p]
            tokens.append(np.tensordot(patch, f(embed.kernel), 3) + f(embed.bias))
    x = np.stack(tokens) + f(embed.positions)
    for n in range(cfg.num_layers):
        w, normed = layers.attention, norm(layers.ln1, x, n)
        total = np.broadcast_to(f(w.bo)[n], x.shape).copy()
        for h in range(cfg.num_heads):
            q, k, v = (
                normed @ f(getattr(w, f"w{s}"))[n, :, h] + f(getattr(w, f"b{s}"))[n, h]
                for s in "qkv"
            )
            scores = np.exp(q @ k.T / math.sqrt(cfg.head_dim))
            total += scores / scores.sum(-1, keepdims=True) @ v @ f(w.wo)[n, h]
        x, m = x + total, layers.mlp
        hidden = gelu(norm(layers.ln2, x, n) @ f(m.w_in)[n] + f(m.b_in)[n])
        x = x + hidden @ f(m.w_out)[n] + f(m.b_out)[n]
    x = norm(model.final_norm, x)
    heads = [x[i] @ f(c.kernel) + f(c.bias) for i, c in enumerate(
        (model.classifier, model.teacher_classifier))]  # fmt: skip
    return np.mean(heads, axis=0)


def test_logits_are_those_of_the_formula(model, logits):
    for image, got in zip(IMAGES, np.asarray(logits)):
        np.testing.assert_allclose(got, naive_logits(model, image), rtol=1e-4, atol=1e-4)


HF_SIZES = {
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 2,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "num_labels": 5,
}
ARCHITECTURES = {
    "ViTForImageClassification": {"qkv_bias": False, "hidden_act": "relu", "layer_norm_eps": 1e-3},
    "DeiTForImageClassification": {},
    "DeiTForImageClassificationWithTeacher": {},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_gives_the_same_logits_and_reads_what_save_writes(architecture, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    build = getattr(transformers, architecture)
    config = transformers.ViTConfig if architecture[0] == "V" else transformers.DeiTConfig
    torch.manual_seed(0)
    theirs = build(config(**HF_SIZES, **ARCHITECTURES[architecture])).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        want = theirs(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).logits.numpy()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = jh.load(tmp_path / "theirs")
    assert isinstance(ours, ViT)
    np.testing.assert_allclose(vit.forward(ours, IMAGES).logits, want, rtol=1e-4, atol=1e-4)

    jh.save(ours, tmp_path / "ours")
    again, report = build.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name].numpy(), tensor.numpy())


def test_a_directory_gives_the_model_back_bit_for_bit(model, tmp_path):
    jh.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "deit"
    back = jh.load(tmp_path)
    assert back.cfg == model.cfg
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(a, b)


def test_names_of_classes_survive_and_a_wrong_count_is_an_error(model, tmp_path):
    names = {"id2label": {str(i): f"digit {i}" for i in range(5)}}
    extras = tuple((name, json.dumps(value)) for name, value in names.items())
    cfg = dataclasses.replace(TINY, extras=extras)
    assert vision.labels(vision.from_hf(vision.to_hf(cfg))) == [f"digit {i}" for i in range(5)]
    jh.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"num_labels": 4}, "num_labels=4"),
        ({"image_size": [12, 8]}, "image_size"),
        ({"rope_theta": 1.0}, "unknown fields rope_theta"),
        ({"patch_size": 5}, "not divisible by patch_size=5"),
        ({"image_size": 16}, "the configuration needs"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            jh.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["DeiTModel"]}))
    with pytest.raises(NotImplementedError, match="has no classifier"):
        jh.load(tmp_path)


@pytest.mark.skipif(not TRAINED.exists() or not MNIST.exists(), reason="no ../shared folder")
def test_trained_weights_reach_the_accuracy_and_logits_of_the_reference():
    ours = jh.load(TRAINED)
    with np.load(MNIST) as data:
        images = ((data["test_x"] / 255 - 0.5) / 0.5).astype(np.float32)[..., None]
        labels = data["test_y"]
    got = np.asarray(vit.forward(ours, images).logits)
    assert np.mean(got.argmax(-1) == labels) == pytest.approx(0.9485, abs=1e-9)
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ViTForImageClassification.from_pretrained(TRAINED).eval()
    with torch.no_grad():
        want = theirs(torch.tensor(images[:64].transpose(0, 3, 1, 2))).logits.numpy()
    np.testing.assert_allclose(got[:64], want, atol=1e-4)


def test_silencing_a_head_is_removing_its_output_weights(model, logits):
    heads = [(0, 3), (1, 1)]
    got = jh.ablate(vit.forward, heads)(model, IMAGES).logits
    wo = np.array(model.layers.attention.wo[...])
    for layer, head in heads:
        wo[layer, head] = 0
    without = jax.tree.map(lambda leaf: leaf, model)
    without.layers.attention.wo = model.layers.attention.wo.replace(jnp.asarray(wo))
    np.testing.assert_allclose(got, vit.forward(without, IMAGES).logits, atol=1e-5)
    assert np.abs(got - logits).max() > 0.01


def test_every_site_is_recorded_in_its_documented_shape(model, logits):
    names = vit.sites(TINY)
    out = jh.record(vit.forward, *names)(model, IMAGES)
    np.testing.assert_allclose(out.logits, logits, atol=1e-5)
    sizes = {"B": 3, "T": 11, "S": 11, "H": 4, "K": 4, "D": 4, "M": 16, "F": 24, "V": 5, "1": 1}
    for name in names:
        axes = jh.SITES[name].split()
        shape = tuple(sizes[a] for a in axes)
        shape = (2, *shape) if name in jh.taps.STACK_SITES else shape
        # Classifiers stand where tokens do.
        assert out.seen[name].shape == ((3, 2, 5) if name == "logits" else shape), name
    np.testing.assert_allclose(out.seen["pattern"].sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(out.seen["head_out"].sum(3) + model.layers.attention.bo[...][
        :, None, None], out.seen["attn_out"], atol=1e-5)  # fmt: skip
    assert np.all(np.asarray(out.seen["pattern"]) > 0)  # in both directions


def test_wrappers_of_heads_act_on_images(model, logits):
    """Positions count tokens, the class token first; means and layers as in text."""
    changed = lambda forward: np.abs(forward(model, IMAGES).logits - logits).max()
    site = "blocks.1.attn.hook_pattern"
    seen = jh.record(vit.forward, "z", site)(model, IMAGES).seen
    assert seen[site].shape == (3, 4, 11, 11)
    mean = jh.interventions.mean_activation(vit.forward, model, IMAGES)
    np.testing.assert_allclose(mean, seen["z"].mean((1, 2)), atol=1e-5)
    assert changed(jh.ablate(vit.forward, ["1.2"], mode="mean", means=mean)) > 1e-3
    # The last layer is read at the class token and the distillation token alone.
    last, tokens = [(1, h) for h in range(4)], np.arange(11)
    assert changed(jh.ablate(vit.forward, last, positions=tokens > 1)) < 1e-5
    assert changed(jh.ablate(vit.forward, last, positions=tokens == 0)) > 1e-3
    with pytest.raises(ValueError, match="outside the text of 11 tokens"):
        jh.ablate(vit.forward, last, positions=[11])(model, IMAGES)


def _score(gates, model):
    return jnp.sum(jh.scale_heads(vit.forward, gates)(model, IMAGES).logits[:, 0])


def test_gradients_of_gates_are_those_of_differences(model):
    score = jax.jit(jax.value_and_grad(_score))
    step = jnp.zeros((2, 4)).at[1, 2].set(1e-2)
    (up, _), (down, _) = score(1 + step, model), score(1 - step, model)
    gradient = score(jnp.ones((2, 4)), model)[1]
    np.testing.assert_allclose(gradient[1, 2], (up - down) / 2e-2, rtol=2e-2, atol=2e-3)


@pytest.mark.slow
def test_rematerialised_layers_have_the_same_gradients(model):
    gradient = jax.jit(jax.grad(_score, argnums=1))
    of = lambda remat: gradient(jnp.ones((2, 4)), vit.with_config(model, remat=remat))
    want, got = of("none"), of("full")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_split_model_and_batch_give_the_same_logits(model, logits):
    mesh = parallel.make_mesh("data:2,fsdp:2,model:2")
    images = np.concatenate([IMAGES, IMAGES[:1]])
    with jax.set_mesh(mesh):
        got = vit.forward(parallel.shard(model, mesh), images).logits
    np.testing.assert_allclose(got[:3], logits, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 5}, "image_size=12 is not divisible by patch_size=5"),
        ({"num_heads": 3}, "model_dim=16 is not divisible by num_heads=3"),
        ({"distilled": False}, "teacher_head=True"),
        ({"attention": "softmacks"}, "did you mean 'softmax'"),
        ({"activation": "sine"}, "activation='sine'"),
        ({"channels": 0}, "channels=0"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_images_that_do_not_fit_and_sites_that_are_not_there_are_refused(model):
    with pytest.raises(ValueError, match="channels last"):
        vit.forward(model, IMAGES.transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match="even for one image"):
        vit.forward(model, IMAGES[0])
    with pytest.raises(TypeError, match="needed floats"):
        vit.forward(model, IMAGES.astype(np.uint8))
    with pytest.raises(ValueError, match="no site 'q_rot'"):
        jh.record(vit.forward, "q_rot")(model, IMAGES)
    with pytest.raises(ValueError, match="build a ViT"):
        vit.with_config(model, num_layers=3)
