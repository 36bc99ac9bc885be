"""Needles at every depth: trained short, asked at the trained length and beyond.

Eight keys with a value each are hidden at random places of random filler, and asked for at the end.
Two layers, four heads, blocks of 8, one local block and one block in four beyond it. Accuracy is
reported by depth (where the needle lies), at the trained length and at two and four times it, for
heads with classes of their own and for heads that share one.

Paper: Lin et al., 2024, arXiv:2407.17678 (needles at 32K and 128K tokens).

    python -m experiments.s2_needle --workdir=runs/s2_needle    # 10 minutes

Expected: every depth >= 0.9 at the trained length and the mean >= 0.8 beyond it; sharing one class
at most 0.6.
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
from jaxheads.typing import Array
from launch import flags

TRAINED = 64
LENGTHS = (64, 128, 256)
NUM_NEEDLES, NUM_VALUES, NUM_FILLER = 8, 8, 8
FILLER = NUM_NEEDLES + NUM_VALUES
BATCH, STEPS, LEARNING_RATE = 32, 1200, 3e-3
DEPTHS = 5

_S2 = "block=8,local_blocks=1,stride=4,allow_small_blocks=true"
ARMS = {"heterogeneous": f"s2({_S2})", "homogeneous": f"s2({_S2},homogeneous=true)"}


def config(arm: str) -> ModelConfig:
    """The two-layer decoder of an arm."""
    return common.small_config(vocab_size=FILLER + NUM_FILLER, attention=ARMS[arm])


def batch(length: int, key: Array) -> dict[str, Array]:
    """Tokens [BATCH,length]; the depth in [0,1) and the value of each needle asked for."""
    hay = length - 2 * NUM_NEEDLES

    def one(key: Array) -> dict[str, Array]:
        place_key, value_key, ask_key, hay_key = jax.random.split(key, 4)
        places = 2 * jax.random.permutation(place_key, hay // 2)[:NUM_NEEDLES]
        values = NUM_NEEDLES + jax.random.randint(value_key, (NUM_NEEDLES,), 0, NUM_VALUES)
        asked = jax.random.permutation(ask_key, NUM_NEEDLES)
        tokens = jax.random.randint(hay_key, (length,), FILLER, FILLER + NUM_FILLER)
        tokens = tokens.at[places].set(jnp.arange(NUM_NEEDLES)).at[places + 1].set(values)
        questions = jnp.stack([asked, values[asked]], axis=-1).reshape(-1)
        tokens = tokens.at[hay:].set(questions)
        return {"tokens": tokens, "depth": places[asked] / hay, "value": values[asked]}

    return jax.vmap(one)(jax.random.split(key, BATCH))


def _log_probs(model: Decoder, data: dict[str, Array]) -> Array:
    """[BATCH,NUM_NEEDLES,vocabulary] at the keys asked for."""
    logits = forward(model, data["tokens"]).logits[:, -2 * NUM_NEEDLES :: 2]
    return jax.nn.log_softmax(logits)


def loss(model: Decoder, data: dict[str, Array]) -> Array:
    """Mean negative log probability of the values asked for."""
    return -jnp.take_along_axis(_log_probs(model, data), data["value"][..., None], axis=-1).mean()


def accuracy(model: Decoder, data: dict[str, Array]) -> dict[str, Array]:
    """Share of right answers, in all and by depth."""
    right = (_log_probs(model, data).argmax(-1) == data["value"]).astype(jnp.float32)
    at_depth = (data["depth"] * DEPTHS).astype(jnp.int32)[..., None] == jnp.arange(DEPTHS)
    by_depth = (right[..., None] * at_depth).sum((0, 1)) / jnp.maximum(at_depth.sum((0, 1)), 1)
    return {"all": right.mean(), "by_depth": by_depth}


def train(arm: str, run: common.Options) -> dict[int, dict[str, np.ndarray]]:
    """Accuracies at every length, [N] and [N,DEPTHS]."""
    fitted = common.fit(
        loss,
        lambda key: Decoder(config(arm), rngs=nnx.Rngs(key)),
        functools.partial(batch, TRAINED),
        steps=10 if run.quick else STEPS,
        seeds=run.seeds,
        lr=LEARNING_RATE,
    )
    measure = functools.partial(
        common.evaluate, accuracy, fitted.params, seeds=run.seeds, num_batches=16
    )
    return {n: measure(functools.partial(batch, n)) for n in LENGTHS}


def main() -> int:
    run = common.options()
    found = {arm: train(arm, run) for arm in ARMS}
    rows = [
        {
            "arm": arm,
            "tokens": n,
            "accuracy": float(at["all"].mean()),
            **{f"depth {(d + 0.5) / DEPTHS:.1f}": float(at["by_depth"][:, d].mean())
               for d in range(DEPTHS)},
        }
        for arm, by_length in found.items()
        for n, at in by_length.items()
    ]  # fmt: skip
    own, shared = found["heterogeneous"], found["homogeneous"]
    claims = [
        common.at_least(
            "heterogeneous: the worst depth at the trained length",
            own[TRAINED]["by_depth"].min(axis=1),
            0.9,
        ),
        *(
            common.at_least(f"heterogeneous: accuracy at {n} tokens", own[n]["all"], 0.8)
            for n in LENGTHS[1:]
        ),
        common.at_most("homogeneous: at the trained length", shared[TRAINED]["all"], 0.6),
    ]
    return common.finish(claims, run.workdir, table=rows, figure=functools.partial(draw, rows))


def draw(rows: list[dict[str, Any]], page: Any) -> None:
    """Accuracy by depth, a line for every arm and length."""
    axes = page.subplots()
    names = [name for name in rows[0] if name.startswith("depth")]
    for row in rows:
        style = "-" if row["arm"] == "heterogeneous" else "--"
        label = f"{row['arm']}, {row['tokens']} tokens"
        axes.plot([row[name] for name in names], style, marker="o", label=label)
    axes.set_xticks(range(DEPTHS), [name.removeprefix("depth ") for name in names])
    axes.set_xlabel("depth of the needle")
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize="small")


def define_flags() -> None:
    common.define_flags("s2_needle")


if __name__ == "__main__":
    define_flags()
    flags.run(main)
