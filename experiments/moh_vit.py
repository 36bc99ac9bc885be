"""Mixture-of-head attention in a vision transformer: are 75 % of the heads enough for digits?

Vision transformers of 4 layers x 8 heads (width 64) classify scikit-learn's digits (8 x 8 pixels:
16 patches and a class token), trained with noise on the pixels. Equal steps, starts and batches
(Jin et al., 2024, arXiv:2410.11842):

    dense         every head for every token
    moh-75        2 shared heads, 4 of the 6 others, chosen by a learned router
    random-75     the same gates on 4 heads drawn at random for each token

Claimed: moh-75 loses at most a point of accuracy on the 359 test digits to dense, and the busiest
routed head of a layer has at most twice the mean load.

    python -m experiments.moh_vit                 # trains 9 small models
    python -m experiments.moh_vit --data=shapes   # drawn shapes, without scikit-learn

At scale, `launch.train_vit` trains the same layer:

    python -m launch.train_vit --model=deit-b --data=imagenet.npz --mesh=data:64 \\
        --set model.attention="moh(num_shared=3,top_k=6)"
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags
from flax import nnx

from experiments import common
from experiments.moh import BETA, NUM_SHARED, ROUTED, TOP_K, random_heads
from jaxheads.data.images import ImageData, Images, normalize, open_images
from jaxheads.models.vit import ViT, ViTConfig, forward
from jaxheads.taps import Edit, intervene, record
from jaxheads.training.classifier import classification_loss, for_data
from jaxheads.training.loss import auxiliary_loss
from jaxheads.typing import Array
from launch import flags

LAYERS, BATCH, NOISE = 4, 32, 0.3
MOH = f"moh(num_shared={NUM_SHARED},top_k={TOP_K})"
MODELS = {"dense": "softmax", "moh-75": MOH, "random-75": MOH}
Batch = tuple[Array, Array, Array]
"""Images [B,H,W,C], labels [B] and a random key."""


def config(name: str, data: ImageData) -> ViTConfig:
    """The model called `name` in `MODELS`."""
    cfg = ViTConfig(attention=MODELS[name], num_layers=LAYERS, model_dim=64,
                    num_heads=NUM_SHARED + ROUTED, mlp_dim=128)  # fmt: skip
    return for_data(cfg, data)


def placed(images: Images) -> tuple[Array, Array]:
    """Pixels [N,H,W,C] and labels [N] on the device."""
    return jnp.asarray(normalize(images)), jnp.asarray(images.labels)


def noisy_batch(key: Array, pixels: Array, labels: Array) -> Batch:
    """Images drawn with replacement, with noise."""
    of_image, of_noise, of_run = jax.random.split(key, 3)
    rows = jax.random.randint(of_image, (BATCH,), 0, len(labels))
    noise = jax.random.normal(of_noise, (BATCH, *pixels.shape[1:]))
    return pixels[rows] + NOISE * noise, labels[rows], of_run


def run(name: str, model: ViT, batch: Batch, *sites: str):
    """The forward of a model of `MODELS`, recording `sites`."""
    images, _, key = batch
    fwd = forward
    if name == "random-75":
        fwd = intervene(fwd, Edit("active", random_heads, jax.random.split(key, LAYERS)))
    return (record(fwd, *sites) if sites else fwd)(model, images)


def loss(name: str, model: ViT, batch: Batch) -> Array:
    """Cross-entropy and beta times the balance loss."""
    out = run(name, model, batch)
    return classification_loss(out.logits, batch[1]) + BETA * auxiliary_loss(out.aux)


def accuracy(name: str, model: ViT, batch: Batch) -> Array:
    """Share of images whose class is the most likely one."""
    return jnp.mean(jnp.argmax(run(name, model, batch).logits, axis=-1) == batch[1])


def load(name: str, model: ViT, batch: Batch) -> Array:
    """[L,E] share of the tokens that activate each routed head."""
    return run(name, model, batch, "active").seen["active"].mean((1, 2))[:, NUM_SHARED:]


def train(name: str, data: ImageData, steps: int, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Test accuracy of one model per seed, and the load of its busiest head."""
    cfg = config(name, data)
    build = lambda key: ViT(cfg, rngs=nnx.Rngs(params=key))
    pixels, labels = placed(data.train)
    test = placed(data.test)
    learn = partial(noisy_batch, pixels=pixels, labels=labels)
    whole = lambda key: (*test, key)  # the test images as they are
    fitted = common.fit(partial(loss, name), build, learn, steps=steps, seeds=seeds, lr=3e-3,
                        over_seeds="map")  # fmt: skip
    measure = partial(common.evaluate, params=fitted.params, batches_fn=whole, seeds=seeds,
                      num_batches=1, over_seeds="map")  # fmt: skip
    result = {"accuracy": measure(partial(accuracy, name)).tolist()}
    if name != "dense":
        loads = measure(partial(load, name))  # [N,L,E]
        result["busiest"] = (loads.max(-1) / loads.mean(-1)).tolist()
    return result


def claims_of(results: dict[str, Any]) -> list[common.Claim]:
    """What the trained models decide."""
    gap = np.subtract(results["moh-75"]["accuracy"], results["dense"]["accuracy"])
    busiest = np.mean(results["moh-75"]["busiest"], axis=0).max()
    return [
        common.at_least("accuracy of moh-75 minus dense", gap, -0.01),
        common.at_most("busiest head over the mean, worst layer", busiest, 2.0),
    ]


def define_flags() -> None:
    """Defines the flags of this script."""
    common.define_flags("moh_vit")
    absl_flags.DEFINE_string("data", "digits", "digits, shapes, or an .npz file of images.")
    absl_flags.DEFINE_integer("steps", 1000, "Updates of each model.")


def main() -> int:
    """Trains the models of `MODELS`."""
    options = common.options()
    data = open_images(absl_flags.FLAGS.data)
    steps = 2 if options.quick else absl_flags.FLAGS.steps
    results: dict[str, Any] = {}
    for name in ("dense", "moh-75") if options.quick else MODELS:
        results[name] = train(name, data, steps, options.seeds)
        print(name, results[name], flush=True)
    table = [
        {"model": name, "accuracy": float(np.mean(r["accuracy"])), "lowest": min(r["accuracy"]),
         "highest": max(r["accuracy"]),
         "busiest head": np.mean(r["busiest"], 0).max() if "busiest" in r else "-"}
        for name, r in results.items()
    ]  # fmt: skip
    claims = [common.at_least("it runs", 1.0, 1.0)] if options.quick else claims_of(results)
    return common.finish(claims, options.workdir, table=table,
                         data={"models": results, "steps": steps})  # fmt: skip


if __name__ == "__main__":
    define_flags()
    flags.run(main)
