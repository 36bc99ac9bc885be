"""One fact, far back: how a memory and a window of attention hold a needle as texts grow.

A single key -> value pair lies at a random depth of a text of filler; at the end the key is asked
for. Decoders are trained at 64 tokens and read at up to sixteen times that length. The state of a
Titans layer has the same size at every length (Behrouz et al., 2024, arXiv:2501.00663).

    python -m experiments.titans_needle                     # minutes a model on two cores
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from experiments import common
from experiments.titans_recall import (
    BATCH,
    CHANCE,
    MODELS,
    NUM_FILLERS,
    NUM_KEYS,
    NUM_VALUES,
    VOCAB,
    Batch,
    config,
    figure_of,
    kept,
    table_of,
    train_and_read,
)
from jaxheads.typing import Array
from launch import flags

NEEDLE_MODELS = ("lmm-linear", "mac", "swa", "dense")
LENGTHS = (64, 256, 512, 1024)
WINDOW = 8


def needle_batch(key: Array, *, length: int, batch_size: int = BATCH) -> Batch:
    """Filler with one `key value` at a depth that no window of the model reaches from the end."""
    keys = jax.random.split(key, 4)
    filler = VOCAB - 1 - jax.random.randint(keys[0], (batch_size, length), 0, NUM_FILLERS)
    name = jax.random.randint(keys[1], (batch_size,), 0, NUM_KEYS)
    value = NUM_KEYS + jax.random.randint(keys[2], (batch_size,), 0, NUM_VALUES)
    depth = jax.random.randint(keys[3], (batch_size,), 0, length - 2 - 2 * WINDOW - 2)
    row = jnp.arange(batch_size)
    tokens = filler.at[row, depth].set(name).at[row, depth + 1].set(value)
    tokens = tokens.at[:, -2].set(name).at[:, -1].set(value)
    slots = jnp.full((batch_size, 1), length - 2)
    return Batch(tokens, slots, value[:, None])


def claims_of(results: dict[str, dict[str, Any]]) -> list[common.Claim]:
    """What the needle experiment decides, for the models that have been run."""
    at = lambda name, n: results[name]["accuracy"][str(n)]
    claims = []
    for name in ("lmm-linear", "mac"):
        if name in results:
            claims.append(
                common.at_least(f"{name} finds the needle in 64 tokens", at(name, 64), 0.8)
            )
            drop = float(np.mean(at(name, 64)) - np.mean(at(name, 512)))
            claims.append(common.at_most(f"{name} loses little at 512 tokens", drop, 0.15))
    if "swa" in results:
        claims.append(common.at_most("a window alone guesses", at("swa", 64), 0.2))
    return claims


def define_flags() -> None:
    """Defines the flags of this script."""
    common.define_flags("titans_needle")
    absl_flags.DEFINE_list("models", list(NEEDLE_MODELS), "Models to train.")
    absl_flags.DEFINE_integer("steps", 1000, "Updates of each model.")


def main() -> int:
    """Trains the models and writes what they find."""
    run = common.options()
    steps = 2 if run.quick else absl_flags.FLAGS.steps
    lengths = LENGTHS[:1] if run.quick else LENGTHS
    settings = {"steps": steps, "seeds": list(run.seeds), "lengths": list(lengths)}
    results = {}
    for name in absl_flags.FLAGS.models:
        if name not in MODELS:
            raise ValueError(f"--models: no model {name!r}; models: {', '.join(MODELS)}.")
        train = partial(train_and_read, config(name), needle_batch, lengths=lengths, steps=steps,
                        seeds=run.seeds)  # fmt: skip
        results[name] = kept(run.workdir, name, settings, train)
    claims = [] if run.quick else claims_of(results)
    if not claims:
        losses = [np.mean(r["loss"]) for r in results.values()]
        claims = [common.at_least("losses are numbers", float(np.isfinite(losses).all()), 1)]
    return common.finish(
        claims,
        run.workdir,
        table=table_of(results),
        figure=figure_of(results),
        data={"models": results, "chance": CHANCE, "steps": steps},
    )


if __name__ == "__main__":
    define_flags()
    flags.run(main)
