"""Language modelling with Titans layers beside attention, on real text.

Byte-level decoders of one width read the source of the Python standard library (--data reads other
text, such as WikiText-2): the four Titans layers, full attention and a sliding window. Reported is
the loss on held-out text, in bits per byte, as measured: models this small decide nothing about
large ones (Behrouz et al., 2024, arXiv:2501.00663, table 1 has those).

    python -m experiments.titans_lm                            # minutes a model on two cores
    python -m experiments.titans_lm --data=path/to/wikitext-2
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
from experiments.titans_recall import kept
from jaxheads.models import Decoder, ModelConfig, forward
from jaxheads.typing import Array
from launch import flags

LENGTH, BATCH, VOCAB = 128, 8, 256
_LIMITS = "max_grad_norm=4,max_outer_growth=0"
_MEMORY = f"depth=1,residual_norm=false,theta_max=0.5,{_LIMITS},persistent=4"
MODELS: dict[str, dict[str, Any]] = {
    "mac": {"architecture": f"titans-mac({_MEMORY},segment=32)"},
    "mag": {"architecture": f"titans-mag({_MEMORY},window=32)"},
    "mal": {"architecture": f"titans-mal({_MEMORY},window=32)"},
    "lmm": {"architecture": f"titans-lmm({_MEMORY})"},
    "swa": {"window": (32,)},
    "dense": {},
}


def config(name: str) -> ModelConfig:
    """The decoder called `name` in `MODELS`."""
    return common.small_config(vocab_size=VOCAB, **MODELS[name])


def corpus(path: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` bytes to train on, and bytes of other documents, held out."""
    from jaxheads.data.text import open_source

    source = open_source(path)

    def text_of(split: str, most: int) -> np.ndarray:
        documents, text = source.split(split, 0.1), bytearray()
        for i in np.random.default_rng(0).permutation(len(documents)):
            text += documents[int(i)].encode()
            if len(text) >= most:
                break
        return np.frombuffer(bytes(text[:most]), np.uint8)

    return text_of("train", limit), text_of("validation", limit // 8)


def batch_of(key: Array, data: Array) -> Array:
    """[B,T+1] windows of the text."""
    start = jax.random.randint(key, (BATCH,), 0, data.shape[0] - LENGTH - 1)
    return data[start[:, None] + jnp.arange(LENGTH + 1)].astype(jnp.int32)


def loss(model: Decoder, rows: Array) -> Array:
    """Mean cross-entropy of the next byte, in nats."""
    logits = jax.nn.log_softmax(forward(model, rows[:, :-1]).logits)
    return -jnp.mean(jnp.take_along_axis(logits, rows[:, 1:, None], axis=-1))


def train(name: str, texts, *, steps: int, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Bits per byte of one model on held-out text."""
    build = lambda key: Decoder(config(name), rngs=nnx.Rngs(params=key))
    train_on, read_on = (partial(batch_of, data=jnp.asarray(t)) for t in texts)
    fitted = common.fit(loss, build, train_on, steps=steps, seeds=seeds, lr=4e-3)
    bits = common.evaluate(loss, fitted.params, read_on, seeds=seeds)
    return {"bits_per_byte": (bits / math.log(2)).tolist(), "first": fitted.losses[:, 0].tolist(),
            "last": fitted.losses[:, -20:].mean(axis=1).tolist()}  # fmt: skip


def define_flags() -> None:
    """Defines the flags of this script."""
    common.define_flags("titans_lm")
    absl_flags.DEFINE_string("data", "stdlib", "Text: files, a directory, or stdlib.")
    absl_flags.DEFINE_list("models", list(MODELS), "Models to train.")
    absl_flags.DEFINE_integer("steps", 600, "Updates of each model.")


def main() -> int:
    """Trains the models and writes their loss on held-out text."""
    run = common.options()
    steps = 2 if run.quick else absl_flags.FLAGS.steps
    names = absl_flags.FLAGS.models[:1] if run.quick else absl_flags.FLAGS.models
    texts = corpus(absl_flags.FLAGS.data, 100_000 if run.quick else 2_000_000)
    settings = {"steps": steps, "seeds": list(run.seeds), "data": absl_flags.FLAGS.data}
    results = {
        name: kept(run.workdir, name, settings, partial(train, name, texts, steps=steps,
                                                        seeds=run.seeds))
        for name in names
    }  # fmt: skip
    rows = [
        {"model": name, "bits per byte": round(float(np.mean(r["bits_per_byte"])), 3),
         "lowest": round(float(np.min(r["bits_per_byte"])), 3),
         "highest": round(float(np.max(r["bits_per_byte"])), 3)}
        for name, r in results.items()
    ]  # fmt: skip
    claims = [
        common.at_least(
            f"the loss of {name} falls, in nats", float(np.mean(r["first"]) - np.mean(r["last"])),
            -1.0 if run.quick else 1.0,
        )
        for name, r in results.items()
    ]  # fmt: skip
    return common.finish(claims, run.workdir, table=rows, data={"models": results, "steps": steps})


if __name__ == "__main__":
    define_flags()
    flags.run(main)
