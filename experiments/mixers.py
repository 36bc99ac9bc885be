"""What a mixer can do follows from its matrix: two tasks that tell mixers apart.

    retrieval   32 tokens: 8 pairs (key, value) at random places, one pair a token, and 8 queries
                at the end; the answer to a query is the value that stood with its key. The matrix
                must depend on what the tokens hold.
    copy        64 tokens: the token 32 places earlier. The matrix must depend on places only.

The same small model (two layers of mixer and MLP, learned positions) is trained with each mixer and
with two controls whose matrices are random and frozen: one matrix on the tokens as they are, and
two heads of one matrix each on learned values. The values of a sequence are a permutation of all
8, so that their multiset says nothing: chance is 1/8, and 1/16 for the tokens to copy.

    python -m experiments.mixers                  # about 10 minutes of processor time
    python -m experiments.mixers --mixers=all     # all fourteen, both tasks

Hè and Kabić, 2023, arXiv:2302.06218.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from experiments import common
from jaxheads.attention import mixing
from jaxheads.attention.mixing.protocol import Mixer, normal
from jaxheads.fields import unknown
from jaxheads.typing import Array, PyTree
from launch import flags

LENGTHS: Mapping[str, int] = {"retrieval": 32, "copy": 64}
NUM_PAIRS = NUM_VALUES = 8
NUM_KEYS = 32
NUM_TOKENS = 16  # of the copy task
OFFSET = 32


class Batch(NamedTuple):
    """A task's sequences: what each token holds (0 = nothing), and what is asked."""

    keys: Array
    """[B,T] a key or a token to copy, from 1."""
    values: Array
    """[B,T] a value, from 1."""
    targets: Array
    """[B,T] the answers, from 0."""
    weights: Array
    """[B,T] 1 where an answer is asked for, otherwise 0."""


def retrieval(key: Array, batch_size: int) -> Batch:
    """Pairs at random places of the first 24 tokens, then a query in each of the last 8."""

    def one(key: Array) -> Batch:
        place_key, key_key, value_key, query_key = jax.random.split(key, 4)
        first_query = LENGTHS["retrieval"] - NUM_PAIRS
        places = jax.random.permutation(place_key, first_query)[:NUM_PAIRS]
        keys = 1 + jax.random.permutation(key_key, NUM_KEYS)[:NUM_PAIRS]
        values = jax.random.permutation(value_key, NUM_VALUES)
        asked = jax.random.randint(query_key, (NUM_PAIRS,), 0, NUM_PAIRS)
        empty = jnp.zeros(LENGTHS["retrieval"], jnp.int32)
        return Batch(
            empty.at[places].set(keys).at[first_query:].set(keys[asked]),
            empty.at[places].set(1 + values),
            empty.at[first_query:].set(values[asked]),
            empty.at[first_query:].set(1),
        )

    return jax.vmap(one)(jax.random.split(key, batch_size))


def copy(key: Array, batch_size: int) -> Batch:
    """Random tokens; from token 32 on, the answer is the one 32 places earlier."""
    length = LENGTHS["copy"]
    tokens = jax.random.randint(key, (batch_size, length), 0, NUM_TOKENS)
    weights = jnp.broadcast_to(jnp.arange(length) >= OFFSET, tokens.shape)
    return Batch(
        1 + tokens, jnp.zeros_like(tokens), jnp.roll(tokens, OFFSET, axis=1), weights.astype(int)
    )


TASKS: Mapping[str, Callable[[Array, int], Batch]] = {"retrieval": retrieval, "copy": copy}
STEPS: Mapping[str, int] = {"retrieval": 1800, "copy": 300}  # enough for those that can
CHANCE: Mapping[str, float] = {"retrieval": 1 / NUM_VALUES, "copy": 1 / NUM_TOKENS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomMixing(Mixer):
    """The control: ``Y = M X`` with one random matrix that is never trained."""

    name = "random"
    is_data_dependent = False
    has_causal_form = False

    def init(self, key: Array) -> PyTree:
        """m [T,T] normal with deviation 1/sqrt(T)."""
        return {"m": normal(key, (self.length, self.length), self.length**-0.5)}

    def apply(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """[B,T,M]; the matrix gets no gradient."""
        self.check(x, causal=causal, mask=mask)
        return jnp.einsum("ts,bsm->btm", jax.lax.stop_gradient(params["m"]), x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomHeads(Mixer):
    """The stronger control: ``Y = [M_h X W_h]`` with frozen random matrices, learned values."""

    name = "random_heads"
    is_data_dependent = False
    has_causal_form = False

    def init(self, key: Array) -> PyTree:
        """m [H,T,T] normal with deviation 1/sqrt(T); w [H,M,M/H] trained."""
        of_matrix, of_values = jax.random.split(key)
        m, h = self.model_dim, self.num_heads
        return {
            "m": normal(of_matrix, (h, self.length, self.length), self.length**-0.5),
            "w": normal(of_values, (h, m, m // h), m**-0.5),
        }

    def apply(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """[B,T,M]; the matrices get no gradient."""
        self.check(x, causal=causal, mask=mask)
        mixing_matrices = jax.lax.stop_gradient(params["m"])
        y = jnp.einsum("hts,bsm,hmd->bthd", mixing_matrices, x, params["w"])
        return y.reshape(x.shape)


CONTROLS: Mapping[str, type[Mixer]] = {
    control.name: control for control in (RandomMixing, RandomHeads)
}


class Net(NamedTuple):
    """Two layers of mixer and MLP: x + W_o norm(mixer(norm x)), then x + MLP(norm x)."""

    mixer: Mixer
    num_layers: int = 2

    def init(self, key: Array) -> PyTree:
        """Parameters of embeddings, layers and readout."""
        width, inner = self.mixer.model_dim, 2 * self.mixer.model_dim
        mixed = self.mixer.output_dim
        keys = iter(jax.random.split(key, 5 + 4 * self.num_layers))
        matrix = lambda *shape: normal(next(keys), shape, shape[0] ** -0.5)
        return {
            "keys": normal(next(keys), (1 + max(NUM_KEYS, NUM_TOKENS), width), 1.0),
            "values": normal(next(keys), (1 + NUM_VALUES, width), 1.0),
            "positions": normal(next(keys), (self.mixer.length, width), 1.0),
            "readout": matrix(width, max(NUM_VALUES, NUM_TOKENS)),
            "layers": [
                {
                    "mixer": self.mixer.init(next(keys)),
                    "out": matrix(mixed, width),
                    "up": matrix(width, inner),
                    "down": matrix(inner, width),
                }
                for _ in range(self.num_layers)
            ],
        }

    def logits(self, params: PyTree, batch: Batch) -> Array:
        """[B,T,answers]."""
        x = params["keys"][batch.keys] + params["values"][batch.values] + params["positions"]
        for layer in params["layers"]:
            x += _norm(self.mixer.apply(layer["mixer"], _norm(x))) @ layer["out"]
            x += jax.nn.gelu(_norm(x) @ layer["up"]) @ layer["down"]
        return _norm(x) @ params["readout"]

    def loss(self, params: PyTree, batch: Batch) -> Array:
        """Mean cross-entropy of the answers, nats."""
        log_probs = jax.nn.log_softmax(self.logits(params, batch))
        taken = jnp.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(taken * batch.weights) / jnp.sum(batch.weights)

    def accuracy(self, params: PyTree, batch: Batch) -> Array:
        """Share of answers whose logit is the highest."""
        is_right = jnp.argmax(self.logits(params, batch), axis=-1) == batch.targets
        return jnp.sum(is_right * batch.weights) / jnp.sum(batch.weights)


def _norm(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def make_mixer(name: str, task: str) -> Mixer:
    """A mixer of the size used here, or one of `CONTROLS`."""
    sizes = {"model_dim": 64, "num_heads": 2, "length": LENGTHS[task]}
    own: Mapping[str, Mapping[str, Any]] = {
        "linformer": {"rank": 32},
        "nystrom": {"num_landmarks": 16, "pinv_iterations": 6},
        "sparse": {"window": 8, "stride": 8},
    }
    if name in CONTROLS:
        return CONTROLS[name](**sizes)
    return mixing.get(name, **sizes, **own.get(name, {}))


class Needed(NamedTuple):
    """What the claims ask of an accuracy."""

    task: str
    mixer: str
    bound: float
    is_lower: bool

    def claim(self, accuracy: np.ndarray) -> common.Claim:
        """The claim on the mean over seeds."""
        decide = common.at_least if self.is_lower else common.at_most
        return decide(f"{self.task}: accuracy of {self.mixer}", accuracy, self.bound)


NEEDED = (
    Needed("retrieval", "softmax", 0.95, True),
    Needed("retrieval", "linear", 0.6, True),
    Needed("retrieval", "fnet", 0.4, False),
    Needed("retrieval", "mlp_mixer", 0.4, False),
    Needed("retrieval", "long_conv", 0.4, False),
    Needed("retrieval", "random", CHANCE["retrieval"] + 0.1, False),
    Needed("retrieval", "random_heads", CHANCE["retrieval"] + 0.1, False),
    Needed("copy", "long_conv", 0.95, True),
    Needed("copy", "s4d", 0.95, True),
    Needed("copy", "softmax", 0.95, True),
    Needed("copy", "random", CHANCE["copy"] + 0.1, False),
    Needed("copy", "random_heads", CHANCE["copy"] + 0.1, False),
)


class Result(NamedTuple):
    """One mixer trained on one task."""

    task: str
    mixer: str
    accuracy: np.ndarray
    """[N] on fresh sequences, one entry a seed."""
    losses: np.ndarray
    """[N,steps]."""

    def row(self) -> dict[str, Any]:
        """A row of the table."""
        return {
            "task": self.task,
            "mixer": self.mixer,
            "accuracy": float(self.accuracy.mean()),
            "each seed": [round(float(a), 3) for a in self.accuracy],
            "last loss": float(self.losses[:, -20:].mean()),
        }


def train(
    task: str, name: str, *, steps: int, seeds: Sequence[int], batch_size: int, lr: float
) -> Result:
    """Trains one model per seed and measures it on sequences it has not seen."""
    net = Net(make_mixer(name, task))
    batches = lambda key: TASKS[task](key, batch_size)
    fitted = common.fit(
        net.loss, net.init, batches, steps=steps, seeds=seeds, lr=lr, over_seeds="map"
    )
    accuracy = common.evaluate(net.accuracy, fitted.params, batches, seeds=seeds, over_seeds="map")
    print(f"{task:10} {name:10} accuracy {accuracy.round(3)}", flush=True)
    return Result(task, name, accuracy, fitted.losses)


def draw(results: Sequence[Result]) -> Callable[[Any], None]:
    """Accuracies as bars, one panel a task; dots are seeds."""

    def figure(page: Any) -> None:
        for axes, task in zip(page.subplots(1, len(TASKS), sharey=True), TASKS):
            shown = [r for r in results if r.task == task]
            axes.bar([r.mixer for r in shown], [r.accuracy.mean() for r in shown], color="#7799bb")
            for n, r in enumerate(shown):
                axes.plot([n] * len(r.accuracy), r.accuracy, "k.", markersize=4)
            axes.axhline(CHANCE[task], color="gray", linestyle=":", label="chance")
            axes.set_title(task)
            axes.tick_params(axis="x", rotation=60)
        page.axes[0].set_ylabel("accuracy")
        page.axes[0].legend()

    return figure


def define_flags() -> None:
    """Defines the flags of this script."""
    common.define_flags("mixers")
    absl_flags.DEFINE_list("mixers", [], "Mixers beside those of the claims, or 'all'.")
    absl_flags.DEFINE_integer("batch_size", 32, "Sequences a step.", lower_bound=1)
    absl_flags.DEFINE_float("lr", 3e-3, "Peak learning rate.")


def pairs(extra: Sequence[str]) -> list[tuple[str, str]]:
    """(task, mixer) to train: those that a claim reads, and the extra mixers on both tasks."""
    extra = list(mixing.MIXERS) if list(extra) == ["all"] else list(extra)
    known = (*mixing.MIXERS, *CONTROLS)
    for name in extra:
        if name not in known:
            raise ValueError(unknown("mixer", name, known))
    wanted = [(n.task, n.mixer) for n in NEEDED] + [(t, m) for t in TASKS for m in extra]
    return sorted(set(wanted), key=wanted.index)


def main() -> int:
    """Trains every pair of task and mixer, then decides the claims."""
    given, run = absl_flags.FLAGS, common.options()
    results = {}
    for task, name in pairs(given.mixers):
        steps = 3 if run.quick else STEPS[task]
        results[task, name] = train(
            task, name, steps=steps, seeds=run.seeds, batch_size=given.batch_size, lr=given.lr
        )
    claims = [needed.claim(results[needed.task, needed.mixer].accuracy) for needed in NEEDED]
    every = list(results.values())
    return common.finish(
        claims,
        run.workdir,
        table=[result.row() for result in every],
        figure=draw(every),
        data={"seeds": run.seeds, "steps": STEPS, "chance": CHANCE},
    )


if __name__ == "__main__":
    define_flags()
    flags.run(main)
