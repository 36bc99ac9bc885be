"""Longer context helps where the task needs it: windows of 16 to 256 tokens, two tasks.

Decoders of one layer whose queries see the last c tokens are trained at length 256:

    retrieval   16 of the last 32 tokens ask for the value of a key; the pair (key, value) stands at
                a distance drawn evenly from 1 to 224. With window c, a query can be answered when
                the distance is below c.
    3-gram      each token is drawn from a fixed table given the two before it: all that helps is
                in the last two tokens.

    python -m experiments.long_context_helps      # about 5 minutes of processor time

Hè and Kabić, 2023, arXiv:2302.06218.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags
from flax import nnx

import jaxheads as jh
from experiments import common
from jaxheads.typing import Array
from launch import flags

LENGTH = 256
WINDOWS = (16, 32, 64, 128, 256)
NUM_KEYS = 32
NUM_VALUES = 16
NUM_QUERIES = 16
QUERY_ZONE = 32
FARTHEST = LENGTH - QUERY_ZONE
NUM_SYMBOLS = 4  # of the 3-gram task

# One table of embeddings: nothing, keys, values; the last serve as symbols of the 3-gram task.
NOTHING = 0
FIRST_KEY = 1
FIRST_VALUE = FIRST_KEY + NUM_KEYS
VOCAB = FIRST_VALUE + NUM_VALUES


class Batch(NamedTuple):
    """Sequences of tokens that hold two things each, and what is asked."""

    first: Array
    """[B,T] embedding rows."""
    second: Array
    """[B,T] embedding rows; the token's embedding is the sum of both."""
    targets: Array
    """[B,T] embedding rows of the answers."""
    weights: Array
    """[B,T] 1 where an answer is asked for, otherwise 0."""
    distance: Array
    """[B,T] how far back the answer stands."""


def retrieval(key: Array, batch_size: int) -> Batch:
    """See the module. A query whose pair would fall on another token in use is not asked."""

    def one(key: Array) -> Batch:
        place_key, distance_key, key_key, value_key = jax.random.split(key, 4)
        zone = jax.random.permutation(place_key, QUERY_ZONE)[:NUM_QUERIES]
        queries = LENGTH - QUERY_ZONE + zone
        distance = jax.random.randint(distance_key, (NUM_QUERIES,), 1, FARTHEST + 1)
        places = queries - distance
        keys = FIRST_KEY + jax.random.permutation(key_key, NUM_KEYS)[:NUM_QUERIES]
        values = jax.random.randint(value_key, (NUM_QUERIES,), FIRST_VALUE, VOCAB)
        empty = jnp.zeros(LENGTH, jnp.int32)
        owner = (empty - 1).at[places].max(jnp.arange(NUM_QUERIES))
        owner = owner.at[queries].set(-1)
        is_asked = owner[places] == jnp.arange(NUM_QUERIES)
        holds = owner >= 0
        return Batch(
            first=jnp.where(holds, keys[owner], NOTHING).at[queries].set(keys),
            second=jnp.where(holds, values[owner], NOTHING),
            targets=empty.at[queries].set(values),
            weights=empty.at[queries].set(is_asked.astype(jnp.int32)),
            distance=empty.at[queries].set(distance),
        )

    return jax.vmap(one)(jax.random.split(key, batch_size))


def three_gram(key: Array, batch_size: int) -> Batch:
    """A second-order Markov chain; every token from the third on is asked for."""
    logits = 3.0 * jax.random.normal(jax.random.key(0), (NUM_SYMBOLS,) * 3)  # one table for all

    def step(last: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], Array]:
        before, now = last
        drawn = jax.random.categorical(key, logits[before, now])
        return (now, drawn), drawn

    start_key, chain_key = jax.random.split(key)
    start = jax.random.randint(start_key, (2, batch_size), 0, NUM_SYMBOLS)
    keys = jax.random.split(chain_key, LENGTH - 1)
    _, drawn = jax.lax.scan(step, (start[0], start[1]), keys)
    tokens = FIRST_VALUE + jnp.concatenate([start, drawn]).T  # [B,T+1]
    nothing = jnp.zeros((batch_size, LENGTH), jnp.int32)
    asked = jnp.broadcast_to(jnp.arange(LENGTH) > 0, nothing.shape).astype(jnp.int32)
    return Batch(tokens[:, :-1], nothing, tokens[:, 1:], asked, nothing + 1)


TASKS: Mapping[str, Callable[[Array, int], Batch]] = {"retrieval": retrieval, "3-gram": three_gram}
STEPS: Mapping[str, int] = {"retrieval": 400, "3-gram": 800}


def config(window: int) -> jh.ModelConfig:
    """One layer, so that a query reaches exactly `window` tokens back."""
    return jh.ModelConfig(
        vocab_size=VOCAB,
        num_layers=1,
        model_dim=32,
        num_heads=2,
        mlp_dim=64,
        window=(window,),
        tie_embeddings=False,
    )


def loss_and_accuracy(model: jh.Decoder, batch: Batch) -> tuple[Array, Array]:
    """Mean cross-entropy of the answers in nats, and the share whose logit is the highest."""
    table = model.embed.table[...]
    logits = jh.forward(model, None, embeddings=table[batch.first] + table[batch.second]).logits
    log_probs = jax.nn.log_softmax(logits)
    taken = jnp.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0]
    is_right = jnp.argmax(logits, axis=-1) == batch.targets
    count = jnp.sum(batch.weights)
    return -jnp.sum(taken * batch.weights) / count, jnp.sum(is_right * batch.weights) / count


class Result(NamedTuple):
    """One task at one window; arrays [N], one entry a seed."""

    task: str
    window: int
    loss: np.ndarray
    accuracy: np.ndarray

    def row(self) -> dict[str, Any]:
        """A row of the table."""
        return {
            "task": self.task,
            "window": self.window,
            "loss": float(self.loss.mean()),
            "accuracy": float(self.accuracy.mean()),
            "loss of each seed": [round(float(x), 4) for x in self.loss],
        }


def train(
    task: str, window: int, *, steps: int, seeds: Sequence[int], batch_size: int, lr: float
) -> Result:
    """Trains one model per seed and measures it on sequences it has not seen."""
    batches = lambda key: TASKS[task](key, batch_size)
    fitted = common.fit(
        lambda model, batch: loss_and_accuracy(model, batch)[0],
        lambda key: jh.Decoder(config(window), rngs=nnx.Rngs(params=key)),
        batches,
        steps=steps,
        seeds=seeds,
        lr=lr,
        over_seeds="map",
    )
    loss, accuracy = common.evaluate(
        loss_and_accuracy, fitted.params, batches, seeds=seeds, num_batches=32, over_seeds="map"
    )
    print(f"{task:10} window {window:3}: loss {loss}, accuracy {accuracy}", flush=True)
    return Result(task, window, loss, accuracy)


def decide(results: Mapping[tuple[str, int], Result]) -> list[common.Claim]:
    """The three claims."""
    losses = [float(results["retrieval", c].loss.mean()) for c in WINDOWS]
    falls = all(longer < shorter for shorter, longer in itertools.pairwise(losses))
    short, long = (results["retrieval", c].accuracy for c in (WINDOWS[0], WINDOWS[-1]))
    local = [results["3-gram", c].loss.mean() for c in (WINDOWS[0], WINDOWS[-1])]
    return [
        common.Claim(
            f"retrieval: loss at windows {', '.join(map(str, WINDOWS))}",
            [round(loss, 4) for loss in losses],
            "each below the one before",
            falls,
        ),
        common.at_least("retrieval: accuracy(256) - accuracy(16)", long - short, 0.4),
        common.at_most(
            "3-gram: |loss(256) - loss(16)| / loss(16)", abs(local[1] - local[0]) / local[0], 0.02
        ),
    ]


def draw(results: Sequence[Result]) -> Callable[[Any], None]:
    """Loss against window, one line a task; dots are seeds."""

    def figure(page: Any) -> None:
        axes = page.add_subplot()
        for task in TASKS:
            shown = [r for r in results if r.task == task]
            windows = [r.window for r in shown]
            (line,) = axes.plot(windows, [r.loss.mean() for r in shown], label=task)
            for r in shown:
                axes.plot([r.window] * len(r.loss), r.loss, ".", color=line.get_color())
        axes.set_xscale("log", base=2)
        axes.set_xticks(WINDOWS, [str(c) for c in WINDOWS])
        axes.set_xlabel("window (tokens)")
        axes.set_ylabel("loss (nats)")
        axes.legend()

    return figure


def define_flags() -> None:
    """Defines the flags of this script."""
    common.define_flags("long_context_helps")
    absl_flags.DEFINE_integer("batch_size", 8, "Sequences a step.", lower_bound=1)
    absl_flags.DEFINE_float("lr", 5e-3, "Peak learning rate.")


def main() -> int:
    """Trains every task at every window, then decides the claims."""
    given, run = absl_flags.FLAGS, common.options()
    results = {}
    for task in TASKS:
        for window in WINDOWS:
            results[task, window] = train(
                task,
                window,
                steps=2 if run.quick else STEPS[task],
                seeds=run.seeds,
                batch_size=given.batch_size,
                lr=given.lr,
            )
    every = list(results.values())
    return common.finish(
        decide(results),
        run.workdir,
        table=[result.row() for result in every],
        figure=draw(every),
        data={"seeds": run.seeds, "steps": STEPS},
    )


if __name__ == "__main__":
    define_flags()
    flags.run(main)
