"""Quality at equal steps: dense attention, S2, S2 with every second layer dense, and a control.

A two-layer byte model on a mix of tokens: half of the rows are the source code of the Python
standard library, half are synthetic: a random string, repeated after a gap (copying needs a key far
away). Every arm sees the same batches. The control gives all heads one residue class.

Paper: Lin et al., 2024, arXiv:2407.17678 (its models have 1.3B and 7B parameters).

    python -m experiments.s2_quality --workdir=runs/s2_quality    # 10 minutes

Expected: S2 + dense within 2 % of the loss of dense, S2 within 5 %, homogeneous worse than S2.
"""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import common
from jaxheads.attention import dense_every
from jaxheads.models import Decoder, ModelConfig, forward
from jaxheads.typing import Array
from launch import flags

LENGTH, BATCH, STEPS, LEARNING_RATE = 128, 16, 1000, 3e-3
REPEATED, ALPHABET = 24, 64  # a string of 24 of 64 symbols, twice in every synthetic row
VOCABULARY = 256 + ALPHABET
FILES, BYTES = 60, 400_000  # of the standard library; the last tenth is held out

_S2 = "block=8,local_blocks=1,stride=4,allow_small_blocks=true"
ARMS = {
    "dense": "dense",
    "s2": f"s2({_S2})",
    "s2 + dense": dense_every(2, f"s2({_S2})"),
    "homogeneous": f"s2({_S2},homogeneous=true)",
}


def config(arm: str) -> ModelConfig:
    """The two-layer decoder of an arm."""
    return common.small_config(vocab_size=VOCABULARY, attention=ARMS[arm])


@functools.cache
def corpus() -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the standard library for training, and others for measuring."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:FILES]
    text = b"\n".join(path.read_bytes() for path in files)[:BYTES]
    data = np.frombuffer(text, np.uint8)
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def synthetic(key: Array) -> Array:
    """A random string, noise, and the string again at the end: [LENGTH] symbols."""
    string_key, noise_key, place_key = jax.random.split(key, 3)
    symbols = functools.partial(jax.random.randint, minval=256, maxval=VOCABULARY)
    string = symbols(string_key, (REPEATED,))
    row = symbols(noise_key, (LENGTH,))
    place = jax.random.randint(place_key, (), 0, LENGTH - 2 * REPEATED)
    row = jax.lax.dynamic_update_slice(row, string, (place,))
    return jax.lax.dynamic_update_slice(row, string, (LENGTH - REPEATED,))


def batch(data: Array, key: Array) -> Array:
    """[BATCH,LENGTH] tokens: half source code, half synthetic."""
    half = BATCH // 2
    start_key, row_key = jax.random.split(key)
    starts = jax.random.randint(start_key, (half,), 0, len(data) - LENGTH)
    code = jax.vmap(lambda s: jax.lax.dynamic_slice(data, (s,), (LENGTH,)))(starts)
    made = jax.vmap(synthetic)(jax.random.split(row_key, half))
    return jnp.concatenate([code.astype(jnp.int32), made])


def losses(model: Decoder, tokens: Array) -> dict[str, Array]:
    """Mean negative log probability of code, of the repeated strings, and of both (`all`).

    Noise cannot be predicted, so synthetic rows count from the third symbol of the repetition on.
    """
    logits = forward(model, tokens).logits[:, :-1]
    lost = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    half = BATCH // 2
    code, copied = lost[:half].mean(), lost[half:, -(REPEATED - 2) :].mean()
    return {"all": (code + copied) / 2, "code": code, "copied": copied}


def train(arm: str, seeds: tuple[int, ...], steps: int) -> dict[str, np.ndarray]:
    """Held-out losses of an arm, one entry per seed."""
    seen, held_out = (jnp.asarray(part) for part in corpus())
    fitted = common.fit(
        lambda model, tokens: losses(model, tokens)["all"],
        lambda key: Decoder(config(arm), rngs=nnx.Rngs(key)),
        functools.partial(batch, seen),
        steps=steps,
        seeds=seeds,
        lr=LEARNING_RATE,
    )
    measured = functools.partial(batch, held_out)
    return common.evaluate(losses, fitted.params, measured, seeds=seeds, num_batches=32)


def main() -> int:
    run = common.options()
    found, rows = {}, []
    for arm in ARMS:
        found[arm] = train(arm, run.seeds, 10 if run.quick else STEPS)
        rows.append({"arm": arm, **{name: float(x.mean()) for name, x in found[arm].items()}})
        print(rows[-1], flush=True)
    dense, sparse, hybrid, same = (found[arm]["all"] for arm in ARMS)
    claims = [
        common.at_most("S2 + dense: loss over that of dense", hybrid / dense, 1.02),
        common.at_most("S2: loss over that of dense", sparse / dense, 1.05),
        common.at_least("homogeneous: loss above that of S2", same - sparse, 1e-3),
    ]
    data = {"losses by seed": {arm: values["all"] for arm, values in found.items()}}
    draw_rows = functools.partial(draw, rows)
    return common.finish(claims, run.workdir, table=rows, figure=draw_rows, data=data)


def draw(rows: list[dict[str, Any]], page: Any) -> None:
    """Held-out loss of every arm on both kinds of rows."""
    axes = page.subplots()
    for n, kind in enumerate(("code", "copied")):
        places = np.arange(len(rows)) + (n - 0.5) * 0.4
        axes.bar(places, [row[kind] for row in rows], 0.4, label=kind)
    axes.set_xticks(range(len(rows)), [row["arm"] for row in rows])
    axes.set_ylabel("held-out loss (nats)")
    axes.legend()


def define_flags() -> None:
    common.define_flags("s2_quality")


if __name__ == "__main__":
    define_flags()
    flags.run(main)
