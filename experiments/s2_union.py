"""The union of the heads' shards matters: heterogeneous classes retrieve from every block.

Two layers, four heads, 64 tokens in blocks of 8. Twenty key-value pairs fill the first 40 positions
(no pair straddles a block), eight keys are asked for in the last 16. Every head sees its own block
and one block in four: with a class of its own (S2), or all heads with the same one. A window of
three blocks is the control without far blocks. With one local block the layers cannot relay a
far block through windows, so what no head keeps is out of reach.

Paper: Lin et al., 2024, arXiv:2407.17678.

    python -m experiments.s2_union --workdir=runs/s2_union    # 20 minutes

Expected: heterogeneous >= 0.9, and >= 0.8 for pairs of every class; homogeneous <= 0.6, at chance
(1/8) where no head looks; the window at least 0.3 below heterogeneous.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import common
from jaxheads.models import Decoder, ModelConfig, forward
from jaxheads.typing import Array, PyTree
from launch import flags

BLOCK, STRIDE, LENGTH = 8, 4, 64
NUM_PAIRS, NUM_QUERIES, NUM_VALUES = 20, 8, 8
FIRST_QUERY = LENGTH - 2 * NUM_QUERIES
FILLER = NUM_PAIRS + NUM_VALUES
BATCH, STEPS, LEARNING_RATE = 64, 1200, 3e-3
LEARNED = 0.2  # nats: 95 % of the answers right, roughly

_SMALL = "block=8,allow_small_blocks=true"
ARMS = {
    "heterogeneous": f"s2({_SMALL},local_blocks=1,stride={STRIDE})",
    "homogeneous": f"s2({_SMALL},local_blocks=1,stride={STRIDE},homogeneous=true)",
    # The class 63 of 64 is never reached: a window and nothing else.
    "local window": f"s2({_SMALL},local_blocks=3,stride=64,head_offset=1,homogeneous=true)",
    "dense": "dense",
}


def config(arm: str) -> ModelConfig:
    """The two-layer decoder of an arm."""
    return common.small_config(vocab_size=FILLER + 1, attention=ARMS[arm])


def batch(key: Array) -> dict[str, Array]:
    """Sequences [BATCH,LENGTH], the pair each query asks for and its value [BATCH,NUM_QUERIES]."""

    def one(key: Array) -> dict[str, Array]:
        order_key, value_key, ask_key = jax.random.split(key, 3)
        keys = jax.random.permutation(order_key, NUM_PAIRS)
        values = NUM_PAIRS + jax.random.randint(value_key, (NUM_PAIRS,), 0, NUM_VALUES)
        asked = jax.random.permutation(ask_key, NUM_PAIRS)[:NUM_QUERIES]
        interleave = lambda a, b: jnp.stack([a, b], axis=-1).reshape(-1)
        sources = interleave(keys, values)
        queries = interleave(keys[asked], values[asked])
        filler = jnp.full(LENGTH - sources.size - queries.size, FILLER)
        tokens = jnp.concatenate([sources, filler, queries])
        return {"tokens": tokens, "source": asked, "value": values[asked]}

    return jax.vmap(one)(jax.random.split(key, BATCH))


def _log_probs(model: Decoder, data: dict[str, Array]) -> Array:
    """[BATCH,NUM_QUERIES,vocabulary] at the keys asked for."""
    logits = forward(model, data["tokens"]).logits[:, FIRST_QUERY::2]
    return jax.nn.log_softmax(logits)


def loss(model: Decoder, data: dict[str, Array]) -> Array:
    """Mean negative log probability of the values asked for."""
    return -jnp.take_along_axis(_log_probs(model, data), data["value"][..., None], axis=-1).mean()


def accuracy(model: Decoder, data: dict[str, Array]) -> dict[str, Array]:
    """Share of right answers, in all and by the class (block mod stride) of the pair."""
    right = (_log_probs(model, data).argmax(-1) == data["value"]).astype(jnp.float32)
    kind = data["source"] * 2 // BLOCK % STRIDE
    of_kind = kind[..., None] == jnp.arange(STRIDE)
    by_class = (right[..., None] * of_kind).sum((0, 1)) / of_kind.sum((0, 1))
    return {"all": right.mean(), "by_class": by_class}


def steps_to_learn(losses: np.ndarray) -> list[int]:
    """For each seed the step after which the loss, averaged over 25 steps, is below `LEARNED`."""
    kernel = np.ones(25) / 25
    smooth = [np.convolve(x, kernel, mode="valid") if len(x) >= 25 else x for x in losses]
    return [int(np.argmax(x < LEARNED)) + 25 if (x < LEARNED).any() else -1 for x in smooth]


def tiles(arm: str) -> float:
    """Mean tiles that a head visits."""
    cfg = config(arm)
    spec = cfg.pattern[0]
    if spec.options is None:
        n = LENGTH // BLOCK
        return n * (n + 1) / 2
    pattern = spec.options.pattern(4, 4, LENGTH)
    return float(pattern.tiles(LENGTH // BLOCK).mean())


def train(arm: str, seeds: tuple[int, ...], steps: int) -> tuple[PyTree, dict[str, Any]]:
    """One arm: the accuracies of every seed, and a row of the table."""
    init = lambda key: Decoder(config(arm), rngs=nnx.Rngs(key))
    fitted = common.fit(loss, init, batch, steps=steps, seeds=seeds, lr=LEARNING_RATE)
    found = common.evaluate(accuracy, fitted.params, batch, seeds=seeds, num_batches=16)
    row = {
        "arm": arm,
        "tiles/head": tiles(arm),
        "accuracy": float(found["all"].mean()),
        **{f"class {c}": float(found["by_class"][:, c].mean()) for c in range(STRIDE)},
        "steps to loss 0.2": " ".join(map(str, steps_to_learn(fitted.losses))),
        "final loss": float(fitted.losses[:, -25:].mean()),
    }
    print(row, flush=True)
    return found, row


def main() -> int:
    run = common.options()
    steps = 20 if run.quick else STEPS
    found, rows = {}, []
    for arm in ARMS:
        found[arm], row = train(arm, run.seeds, steps)
        rows.append(row)
    hetero, homo, window = (found[arm] for arm in list(ARMS)[:3])
    unseen = homo["by_class"][:, 1:]
    claims = [
        common.at_least("heterogeneous: accuracy", hetero["all"], 0.9),
        common.at_least(
            "heterogeneous: accuracy on the worst class", hetero["by_class"].min(1), 0.8
        ),
        common.at_most("homogeneous: accuracy", homo["all"], 0.6),
        common.at_most("homogeneous: accuracy on classes it cannot see", unseen.max(1), 0.3),
        common.at_least("heterogeneous - local window", hetero["all"] - window["all"], 0.3),
    ]
    return common.finish(claims, run.workdir, table=rows, figure=functools.partial(draw, rows))


def draw(rows: list[dict[str, Any]], page: Any) -> None:
    """Accuracy by the class of the block that holds the pair."""
    axes = page.subplots()
    width = 0.2
    for n, row in enumerate(rows):
        places = np.arange(STRIDE) + (n - 1.5) * width
        axes.bar(places, [row[f"class {c}"] for c in range(STRIDE)], width, label=row["arm"])
    axes.axhline(1 / NUM_VALUES, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(STRIDE), [f"blocks {c} mod {STRIDE}" for c in range(STRIDE)])
    axes.set_ylabel("accuracy (dotted: chance)")
    axes.legend(ncols=2)


def define_flags() -> None:
    common.define_flags("s2_union")


if __name__ == "__main__":
    define_flags()
    flags.run(main)
