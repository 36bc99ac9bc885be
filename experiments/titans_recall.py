"""A memory that learns while it reads recalls what a window of attention has long lost.

Key -> value pairs, filler, then queries: the model names the value of each queried key. The filler
is longer than the receptive field of the window, so only a memory can carry the values (Behrouz et
al., 2024, arXiv:2501.00663). Models of equal width: the four Titans layers, a linear and a deep
memory, a memory that is frozen, linear attention, sliding-window and full attention. Each is also
read at longer texts than it was trained on.

    python -m experiments.titans_recall                  # minutes a model on two cores
    python -m experiments.titans_recall --models=lmm-linear,swa

Results of each model are kept in WORKDIR/models; a run with other models adds to them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags
from flax import nnx

import jaxheads as jh
from experiments import common
from jaxheads.models import Decoder, ModelConfig, forward
from jaxheads.typing import Array
from launch import flags

NUM_PAIRS, NUM_KEYS, NUM_VALUES, NUM_FILLERS = 4, 12, 8, 16
VOCAB = NUM_KEYS + NUM_VALUES + NUM_FILLERS
TRAIN_LENGTH, LENGTHS = 64, (64, 256, 1024)
CHANCE = 1 / NUM_VALUES
BATCH, LEARNING_RATE = 64, 4e-3
# Without a limit on the inner gradient the linear memory recalls at 64 tokens, but steps of up to 1
# taken 16 at a time from the same weights diverge on longer texts: NaN at 1,024 tokens.
_PLAIN = "residual_norm=false,max_grad_norm=4,max_outer_growth=0,persistent=4"
_LINEAR = f"depth=1,theta_max=1,{_PLAIN}"
_DEEP = f"depth=2,theta_max=0.1,{_PLAIN}"

MODELS: Mapping[str, dict[str, Any]] = {
    "lmm-linear": {"architecture": f"titans-lmm({_LINEAR})"},
    "lmm-deep": {"architecture": f"titans-lmm({_DEEP})"},
    "mag": {"architecture": f"titans-mag({_LINEAR},window=8)"},
    "mal": {"architecture": f"titans-mal({_LINEAR},window=8)"},
    "mac": {"architecture": f"titans-mac({_LINEAR},segment=16)"},
    "frozen": {"architecture": f"titans-lmm({_LINEAR},learning=false)"},
    "linear-attention": {
        "architecture": f"titans-lmm({_LINEAR},chunk=64,momentum=false,forgetting=false)"
    },
    "swa": {"window": (8,)},
    "dense": {},
}
"""Decoders by name: what differs from `config`. Linear attention: every gradient at the start."""


def config(name: str) -> ModelConfig:
    """The decoder called `name` in `MODELS`."""
    size = dict(vocab_size=VOCAB, model_dim=32, num_heads=2, mlp_dim=64)
    return common.small_config(**size, **MODELS[name])


class Batch(NamedTuple):
    """Rows of a recall task."""

    tokens: Array  # [B,T]
    queries: Array  # [B,N] slots whose next token is asked for
    answers: Array  # [B,N]


def recall_batch(key: Array, *, length: int, batch_size: int = BATCH) -> Batch:
    """`k v` pairs with different keys, filler, then every key in another order with its value."""
    keys = jax.random.split(key, 4)
    order = jax.vmap(lambda k: jax.random.permutation(k, NUM_KEYS)[:NUM_PAIRS])
    names = order(jax.random.split(keys[0], batch_size))
    values = NUM_KEYS + jax.random.randint(keys[1], names.shape, 0, NUM_VALUES)
    again = jax.vmap(lambda k: jax.random.permutation(k, NUM_PAIRS))
    again = again(jax.random.split(keys[2], batch_size))
    pick = lambda x: jnp.take_along_axis(x, again, axis=1)
    pairs = lambda a, b: jnp.stack([a, b], axis=-1).reshape(batch_size, -1)
    shown, asked = pairs(names, values), pairs(pick(names), pick(values))
    num = length - shown.shape[1] - asked.shape[1]
    filler = VOCAB - 1 - jax.random.randint(keys[3], (batch_size, num), 0, NUM_FILLERS)
    tokens = jnp.concatenate([shown, filler, asked], axis=1)
    slots = length - 2 * NUM_PAIRS + 2 * jnp.arange(NUM_PAIRS)
    return Batch(tokens, jnp.broadcast_to(slots, names.shape), pick(values))


def answer_logits(model: Decoder, batch: Batch) -> Array:
    """[B,N,V] logits at the queries."""
    logits = forward(model, batch.tokens).logits
    return jnp.take_along_axis(logits, batch.queries[..., None], axis=1)


def loss(model: Decoder, batch: Batch) -> Array:
    """Mean cross-entropy of the answers, in nats."""
    log_probs = jax.nn.log_softmax(answer_logits(model, batch))
    return -jnp.mean(jnp.take_along_axis(log_probs, batch.answers[..., None], axis=-1))


def accuracy_by_query(model: Decoder, batch: Batch) -> Array:
    """[N] share of rows in which the answer is the most likely token, for each query in order.

    A model that holds which values were shown, but not with which keys, guesses among those not
    asked for yet: it is wrong mostly at the first query and right at the last.
    """
    return jnp.mean(jnp.argmax(answer_logits(model, batch), axis=-1) == batch.answers, axis=0)


def accuracy(model: Decoder, batch: Batch) -> Array:
    """The same over all queries."""
    return jnp.mean(accuracy_by_query(model, batch))


def train_and_read(
    cfg: ModelConfig,
    batch,
    *,
    lengths: tuple[int, ...],
    steps: int,
    seeds: tuple[int, ...],
    measures: Mapping[str, Callable[[Decoder, Batch], Array]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Accuracies {length: [N seeds]} and the last loss of a decoder trained at `lengths[0]`.

    `measures`, taken at the longest length, are put beside them, [N seeds] each.
    """
    build = lambda key: Decoder(cfg, rngs=nnx.Rngs(params=key))
    at = lambda length: partial(batch, length=length)
    trained = common.fit(loss, build, at(lengths[0]), steps=steps, seeds=seeds, lr=LEARNING_RATE)
    read = lambda metric, n: common.evaluate(
        metric, trained.params, at(n), seeds=seeds, num_batches=4
    ).tolist()
    return {
        "accuracy": {str(n): read(accuracy, n) for n in lengths},
        "accuracy_by_query": read(accuracy_by_query, lengths[0]),
        "loss": trained.losses[:, -50:].mean(axis=1).tolist(),
        **{name: read(measure, lengths[-1]) for name, measure in measures.items()},
    }


def kept(workdir: Path, name: str, settings: dict[str, Any], make) -> dict[str, Any]:
    """The result called `name` from WORKDIR/models, made if it is not there with these settings."""
    path = workdir / "models" / f"{name}.json"
    if path.exists():
        held = json.loads(path.read_text())
        if held.pop("settings") == settings:
            return held
    result = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    flags.write_json(path, {"settings": settings, **result})
    print(name, json.dumps(result), flush=True)
    return result


NEEDED = {
    "lmm-linear": (common.at_least, 0.9),
    "mag": (common.at_least, 0.8),
    "mal": (common.at_least, 0.8),
    "mac": (common.at_least, 0.8),
    "swa": (common.at_most, 0.2),
    "frozen": (common.at_most, 0.45),
}


def claims_of(results: dict[str, dict[str, Any]]) -> list[common.Claim]:
    """What the recall experiment decides, for the models that have been run."""
    mean = lambda name, n: float(np.mean(results[name]["accuracy"][str(n)]))
    short, long = TRAIN_LENGTH, 256
    claims = [
        check(f"{name} recalls beyond the window", results[name]["accuracy"][str(short)], bound)
        for name, (check, bound) in NEEDED.items()
        if name in results
    ]
    drops = {name: mean(name, short) - mean(name, long) for name in results if str(long) in
             results[name]["accuracy"]}  # fmt: skip
    for name in ("lmm-linear", "mac"):
        if name in drops:
            claims.append(
                common.at_most(f"{name} loses little at {long} tokens", drops[name], 0.15)
            )
    if {"dense", "lmm-linear"} <= drops.keys():
        claims.append(
            common.at_least(
                "full attention loses more at four times the length",
                drops["dense"] - drops["lmm-linear"],
                1e-6,
            )
        )
    return claims


def figure_of(results: dict[str, dict[str, Any]]):
    """Accuracy against length, one line a model."""

    def draw(page: Any) -> None:
        axes = page.subplots()
        for name, result in results.items():
            lengths = [int(n) for n in result["accuracy"]]
            axes.plot(lengths, [np.mean(a) for a in result["accuracy"].values()], "o-", label=name)
        axes.axhline(CHANCE, color="grey", linestyle=":", label="chance")
        axes.set(xscale="log", xlabel="tokens (trained at 64)", ylabel="recall", ylim=(0, 1.02))
        axes.legend(fontsize=7, ncols=2)

    return draw


def table_of(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and lowest accuracy of every model at every length."""
    rows = []
    for name, result in results.items():
        row: dict[str, Any] = {"model": name}
        for length, values in result["accuracy"].items():
            row[f"{length} tokens"] = f"{np.mean(values):.3f} (min {np.min(values):.3f})"
        rows.append(row | {"loss": round(float(np.mean(result["loss"])), 3)})
    return rows


def define_flags() -> None:
    """Defines the flags of this script."""
    common.define_flags("titans_recall")
    absl_flags.DEFINE_list("models", list(MODELS), "Models to train, of those in MODELS.")
    absl_flags.DEFINE_integer("steps", 1500, "Updates of each model.")


def main() -> int:
    """Trains the models and writes what they recall."""
    run = common.options()
    steps = 4 if run.quick else absl_flags.FLAGS.steps
    lengths = LENGTHS[:2] if run.quick else LENGTHS
    for name in absl_flags.FLAGS.models:
        if name not in MODELS:
            raise ValueError(f"--models: no model {name!r}; models: {', '.join(MODELS)}.")
    settings = {"steps": steps, "seeds": list(run.seeds), "lengths": list(lengths)}
    results = {}
    for name in MODELS:
        train = partial(train_and_read, config(name), recall_batch, lengths=lengths, steps=steps,
                        seeds=run.seeds)  # fmt: skip
        made = (run.workdir / "models" / f"{name}.json").exists()
        if name in absl_flags.FLAGS.models or made:
            results[name] = kept(run.workdir, name, settings, train)
    return common.finish(
        claims_of(results),
        run.workdir,
        table=table_of(results),
        figure=figure_of(results),
        data={"models": results, "steps": steps, "version": jh.__version__},
    )


if __name__ == "__main__":
    define_flags()
    flags.run(main)
