"""Agent attention: is a softmax through nine tokens as good as one over all, and what does it cost?

Vision transformers of 4 layers, width 32, classify scikit-learn's digits, enlarged to 16 x 16 (64
tokens), moved by up to two pixels and with noise. Equal steps, starts and batches (Han et al.,
2024, arXiv:2312.08874):

    softmax         every token reads every token
    agent           9 agents pooled from the queries, biases, convolution of V
    linear          features elu + 1 and the same convolution of V
    linear-plain    the same without it
    frozen          agents drawn once and never trained
    no-bias         agent without the biases of both softmaxes
    no-conv         agent without the convolution
    bare            without both

Claimed: agent loses at most a point of accuracy to softmax, gains one over linear and 0.1 over
frozen; neither the biases nor the convolution cost more than half a point; FLOPs grow linearly with
the tokens. Then agents are put into the trained softmax models without training (`agent_plugin`):
merged tokens are better agents than random ones, more agents are better, and the softer exponent
k2 = 0.3 is better than 1.

    python -m experiments.agent_attention                # trains 24 small models, about 40 minutes
    python -m experiments.agent_attention --data=shapes  # drawn shapes, without scikit-learn
    python -m experiments.agent_attention --from=DIR --data=FILE.npz

The last form tests the agents without training on the ViT or DeiT checkpoint of DIR. At scale,
`launch.train_vit` trains the published layer (49 agents):

    python -m launch.train_vit --model=agent-deit-s --data=imagenet.npz --mesh=data:64
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags
from flax import nnx

from experiments import common
from jaxheads import checkpoints
from jaxheads.attention import agent_attention, attention, pool_agents
from jaxheads.attention.token_merge import sizes_after
from jaxheads.data.images import Images, normalize, open_images
from jaxheads.heads.statistics import correlation
from jaxheads.interventions import agent_plugin
from jaxheads.models.vit import ViT, ViTConfig, forward
from jaxheads.typing import Array
from launch import flags

SIDE, BATCH, SHIFT, NOISE = 16, 32, 2, 0.3
NUM_AGENTS, RATIO = 9, 0.4
MODELS = {
    "softmax": "softmax",
    "agent": f"agent(num_agents={NUM_AGENTS})",
    "linear": "linear(use_dwc=true)",
    "linear-plain": "linear",
    "frozen": f"agent(num_agents={NUM_AGENTS},agents=frozen)",
    "no-bias": f"agent(num_agents={NUM_AGENTS},use_bias=false)",
    "no-conv": f"agent(num_agents={NUM_AGENTS},use_dwc=false)",
    "bare": f"agent(num_agents={NUM_AGENTS},use_bias=false,use_dwc=false)",
}
Batch = tuple[Array, Array]
"""Images [B,H,W,C] and labels [B]."""


def config(name: str, num_classes: int, channels: int) -> ViTConfig:
    """The model called `name` in `MODELS`."""
    sizes = dict(num_layers=4, model_dim=32, num_heads=4, mlp_dim=64)
    image = dict(image_size=SIDE, patch_size=2, num_classes=num_classes, channels=channels)
    return ViTConfig(attention=MODELS[name], **sizes, **image)


def enlarged(images: Images) -> Batch:
    """All images at `SIDE` pixels."""
    pixels = jnp.asarray(normalize(images))
    shape = (len(pixels), SIDE, SIDE, pixels.shape[-1])
    return jax.image.resize(pixels, shape, "bilinear"), jnp.asarray(images.labels)


def batch_of(key: Array, data: Batch) -> Batch:
    """Images drawn with replacement, moved by up to SHIFT pixels, with noise."""
    of_image, of_shift, of_noise = jax.random.split(key, 3)
    pixels, labels = data
    rows = jax.random.randint(of_image, (BATCH,), 0, len(labels))
    moved = ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0))
    wide = jnp.pad(pixels[rows], moved, constant_values=-1.0)
    start = jax.random.randint(of_shift, (BATCH, 2), 0, 2 * SHIFT + 1)
    cut = lambda image, s: jax.lax.dynamic_slice(image, (s[0], s[1], 0), pixels.shape[1:])
    images = jax.vmap(cut)(wide, start)
    return images + NOISE * jax.random.normal(of_noise, images.shape), labels[rows]


def plain_batch(key: Array, data: Batch) -> Batch:
    """Images drawn with replacement, as they are."""
    rows = jax.random.randint(key, (BATCH,), 0, len(data[1]))
    return data[0][rows], data[1][rows]


def loss(model: ViT, batch: Batch) -> Array:
    """Cross-entropy, in nats."""
    logs = jax.nn.log_softmax(forward(model, batch[0]).logits)
    return -jnp.mean(jnp.take_along_axis(logs, batch[1][:, None], axis=-1))


def accuracy(model: ViT, batch: Batch) -> Array:
    """Share of images whose class is the most likely one."""
    return jnp.mean(jnp.argmax(forward(model, batch[0]).logits, axis=-1) == batch[1])


def change(model: ViT, batch: Batch, **options: Any) -> tuple[Array, Array]:
    """What `agent_plugin` does: |logits' - logits| / |logits|, and the accuracy that is left."""
    before = forward(model, batch[0]).logits
    after = agent_plugin(forward, ratio=RATIO, **options)(model, batch[0]).logits
    right = jnp.mean(jnp.argmax(after, axis=-1) == batch[1])
    return jnp.linalg.norm(after - before) / jnp.linalg.norm(before), right


def flops_ratio(fn: Any, tokens: int) -> float:
    """FLOPs of the compiled function of q, k, v for 4 N tokens over those for N."""

    def flops(n: int) -> float:
        x = jax.ShapeDtypeStruct((1, n, 4, 32), jnp.float32)
        return jax.jit(fn).lower(x, x, x).compile().cost_analysis()["flops"]

    return flops(4 * tokens) / flops(tokens)


def through_agents(q: Array, k: Array, v: Array) -> Array:
    """Agent attention of a square image, pooling included."""
    side = math.isqrt(q.shape[1])
    return agent_attention(q, k, v, pool_agents(q, (side, side), 49))


def over_all(q: Array, k: Array, v: Array) -> Array:
    """Softmax attention."""
    return attention(q, k, v, is_causal=False, implementation="dense")


def agent_counts(grid: tuple[int, int], stride: int) -> list[int]:
    """At most six numbers of agents, from one a cell to the most with which there are agents."""
    tokens, least = sizes_after(grid, (stride, stride), RATIO, 1.0)
    return sorted({round(n) for n in np.linspace(least, (tokens - 1) // 2, 6)})


def without_training(params: ViT, data: Batch, seeds: tuple[int, ...], *, is_quick: bool):
    """Errors of `agent_plugin` by kind of agents and their number, [N] each, and the numbers."""
    grid = params.cfg.grid
    stride = next(s for s in (4, 2, 7, 1) if not (grid[0] % s or grid[1] % s) and grid[0] > s)
    counts, length = agent_counts(grid, stride), grid[0] * grid[1]
    counts = counts[:1] if is_quick else counts
    measure = partial(common.evaluate, params=params, batches_fn=partial(plain_batch, data=data),
                      seeds=seeds, num_batches=1 if is_quick else 8)  # fmt: skip
    kinds = {"merged": {}, "random": {"agents": "random"}, "k2=1": {"k2": 1.0},
             "no shortcut": {"shortcut": 0.0}}  # fmt: skip
    found: dict[str, Any] = {"counts": counts, "stride": stride}
    for kind, options in kinds.items():
        ways = [
            partial(change, stride=(stride, stride), agent_ratio=1 - n / length, **options)
            for n in counts
        ]
        both = [measure(way) for way in ways]
        found[kind] = np.stack([error for error, _ in both]).tolist()  # [counts,N]
        found[f"{kind} accuracy"] = np.stack([right for _, right in both]).tolist()
    merging = partial(change, stride=(stride, stride), agents="none")
    found["merging alone"] = measure(merging)[0].tolist()
    print("without training", found, flush=True)
    return found


def train(name: str, num_classes: int, data: tuple[Batch, Batch], steps: int, seeds, num_batches):
    """One model of `MODELS` per seed, and what it reached on test images."""
    cfg = config(name, num_classes, data[0][0].shape[-1])
    build = lambda key: ViT(cfg, rngs=nnx.Rngs(params=key))
    learn, read = (partial(batch_of, data=part) for part in data)
    fitted = common.fit(loss, build, learn, steps=steps, seeds=seeds, lr=3e-3, over_seeds="map")
    right = common.evaluate(accuracy, fitted.params, read, seeds=seeds, num_batches=num_batches,
                            over_seeds="map")  # fmt: skip
    print(name, right, flush=True)
    return fitted.params, {"accuracy": right.tolist(), "loss": fitted.losses[:, -1].tolist()}


def claims_of_models(results: dict[str, Any]) -> list[common.Claim]:
    """What the trained models decide."""
    gain = lambda a, b: np.subtract(results[a]["accuracy"], results[b]["accuracy"])
    return [
        common.at_least("accuracy of agent minus softmax", gain("agent", "softmax"), -0.01),
        common.at_least("accuracy of agent minus linear", gain("agent", "linear"), 0.01),
        common.at_least("accuracy of agent minus frozen agents", gain("agent", "frozen"), 0.001),
        common.at_least("accuracy of agent minus no biases", gain("agent", "no-bias"), -0.005),
        common.at_least("accuracy of agent minus no convolution", gain("agent", "no-conv"), -0.005),
    ]


def claims_of_cost(agent: float, softmax: float) -> list[common.Claim]:
    """What the compiled programs decide."""
    return [
        common.at_least("FLOPs of 4 N tokens over N, agents", agent, 3.8),
        common.at_most("FLOPs of 4 N tokens over N, agents, at most", agent, 4.3),
        common.at_least("FLOPs of 4 N tokens over N, softmax", softmax, 12.0),
    ]


def claims_without_training(found: dict[str, Any]) -> list[common.Claim]:
    """What agents in trained models decide."""
    error = {kind: np.asarray(found[kind]) for kind in ("merged", "random", "k2=1")}  # [counts,N]
    counts = np.asarray(found["counts"])
    ratio = lambda kind: (error["merged"] / error[kind]).mean(0)
    claims = [
        common.at_most("error with merged agents over that with random ones", ratio("random"), 1.0),
        common.at_most("error with k2 = 0.3 over that with k2 = 1", ratio("k2=1"), 1.0),
    ]
    if len(counts) > 2:
        ranks = [correlation(counts, e, method="spearman") for e in error["merged"].T]
        claims.append(common.at_most("rank correlation of error and number of agents", ranks, -0.9))
    return claims


def rows_of(found: dict[str, Any]) -> list[common.Row]:
    """The table of agents in trained models."""
    kinds = ("merged", "random", "k2=1", "no shortcut")
    return [
        {
            "model": "softmax, changed",
            "agents": n,
            **{k: float(np.mean(found[k][i])) for k in kinds},
        }
        for i, n in enumerate(found["counts"])
    ]


def from_scratch(options: common.Options) -> int:
    """Trains the models of `MODELS`, then changes the softmax ones."""
    given = open_images(absl_flags.FLAGS.data)
    data = enlarged(given.train), enlarged(given.test)
    steps = 2 if options.quick else absl_flags.FLAGS.steps
    results, trained = {}, {}
    for name in ("softmax", "agent") if options.quick else MODELS:
        params, results[name] = train(name, given.num_classes, data, steps, options.seeds,
                                      1 if options.quick else 64)  # fmt: skip
        trained[name] = params
    found = without_training(trained["softmax"], data[1], options.seeds, is_quick=options.quick)
    size = 256 if options.quick else 1024
    cost = {"agent": flops_ratio(through_agents, size), "softmax": flops_ratio(over_all, size)}
    table = [
        {"model": name, "accuracy": float(np.mean(r["accuracy"])), "lowest": min(r["accuracy"]),
         "highest": max(r["accuracy"])} for name, r in results.items()
    ]  # fmt: skip
    claims = [common.at_least("it runs", 1.0, 1.0)]
    if not options.quick:
        claims = [
            *claims_of_models(results),
            *claims_of_cost(**cost),
            *claims_without_training(found),
        ]
    print(common.markdown(rows_of(found)))
    extra = {"models": results, "without_training": found, "flops": cost, "steps": steps}
    return common.finish(claims, options.workdir, table=table, data=extra,
                         figure=partial(draw, found))  # fmt: skip


def from_checkpoint(options: common.Options) -> int:
    """Changes the checkpoint of --from."""
    model = checkpoints.load(absl_flags.FLAGS["from"].value)
    if not isinstance(model, ViT):
        raise ValueError(f"--from holds a {type(model).__name__}, needed a vision transformer.")
    images = open_images(absl_flags.FLAGS.data).test
    data = jnp.asarray(normalize(images)), jnp.asarray(images.labels)
    one = jax.tree.map(lambda leaf: leaf[None], model)
    found = without_training(one, data, options.seeds[:1], is_quick=options.quick)
    return common.finish(claims_without_training(found), options.workdir, table=rows_of(found),
                         data={"without_training": found}, figure=partial(draw, found))  # fmt: skip


def draw(found: dict[str, Any], page: Any) -> None:
    """Error by number of agents."""
    axes = page.subplots()
    for kind in ("merged", "random", "k2=1", "no shortcut"):
        axes.plot(found["counts"], np.mean(found[kind], axis=1), marker="o", label=kind)
    axes.axhline(np.mean(found["merging alone"]), ls="--", color="grey", label="merging alone")
    axes.set_xlabel("agents")
    axes.set_ylabel("relative error of the logits")
    axes.legend()


def define_flags() -> None:
    """Defines the flags of this script."""
    common.define_flags("agent_attention")
    absl_flags.DEFINE_string("data", "digits", "digits, shapes, or an .npz file of images.")
    absl_flags.DEFINE_string("from", None, "A trained ViT or DeiT directory to change.")
    absl_flags.DEFINE_integer("steps", 2000, "Updates of each model.")


def main() -> int:
    """Trains from scratch, or changes the checkpoint of --from."""
    options = common.options()
    return from_checkpoint(options) if absl_flags.FLAGS["from"].value else from_scratch(options)


if __name__ == "__main__":
    define_flags()
    flags.run(main)
