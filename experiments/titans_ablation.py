"""What the parts of a neural memory are worth: momentum, forgetting, convolution, depth, ...

Three questions about Titans (Behrouz et al., 2024, arXiv:2501.00663):

    parts        recall of key -> value pairs that are redefined as the text goes on, for the memory
                 alone and without one part each; reported in the order measured
    forgetting   the same against alpha = 0: the newest binding must win, and the learned alpha
                 rises at the token that says that the bindings change
    depth        in-context regression on a random network: keys -> values of a fixed random MLP,
                 error at keys that were not shown, for memories of depth 1 and 2

    python -m experiments.titans_ablation                       # minutes a part on two cores
    python -m experiments.titans_ablation --parts=depth
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from experiments import common
from experiments.titans_recall import (
    BATCH,
    NUM_FILLERS,
    NUM_KEYS,
    NUM_VALUES,
    VOCAB,
    Batch,
    config,
    kept,
    train_and_read,
)
from jaxheads.memory import init_memory, memory_read, neural_memory
from jaxheads.models import Decoder, ModelConfig, forward
from jaxheads.taps import record
from jaxheads.typing import Array
from launch import flags

_PLAIN = "residual_norm=false,max_grad_norm=4,max_outer_growth=0"
_BASE = f"depth=1,theta_max=1,{_PLAIN}"
PARTS = {
    "full": f"{_BASE},persistent=4",
    "no momentum": f"{_BASE},persistent=4,momentum=false",
    "no forgetting": f"{_BASE},persistent=4,forgetting=false",
    "no convolution": f"{_BASE},persistent=4,conv=1",
    "no persistent memory": f"{_BASE},persistent=0",
    "deep": f"depth=2,theta_max=0.1,{_PLAIN},persistent=4",
}
"""Options of titans-lmm by name."""
NUM_NAMES, LENGTHS = 3, (72, 144)
SWITCH = VOCAB  # the token before new bindings


def redefinition_batch(key: Array, *, length: int, batch_size: int = BATCH) -> Batch:
    """The same keys bound to new values round after round, then asked for.

    A round is SWITCH, NUM_NAMES pairs and filler; the length decides how many rounds there are.
    """
    width = 16
    rounds = (length - 2 * NUM_NAMES) // width
    keys = jax.random.split(key, 5)
    order = lambda k, n: jax.vmap(lambda one: jax.random.permutation(one, n))(
        jax.random.split(k, batch_size)
    )
    names = order(keys[0], NUM_KEYS)[:, :NUM_NAMES]  # [B,N]
    shape = (batch_size, rounds, NUM_NAMES)
    values = NUM_KEYS + jax.random.randint(keys[1], shape, 0, NUM_VALUES)
    shown = jnp.stack([jnp.broadcast_to(names[:, None], shape), values], axis=-1)
    shown = shown.reshape(batch_size, rounds, 2 * NUM_NAMES)
    num = (batch_size, rounds, width - 1 - 2 * NUM_NAMES)
    filler = VOCAB - 1 - jax.random.randint(keys[2], num, 0, NUM_FILLERS)
    switch = jnp.full((batch_size, rounds, 1), SWITCH)
    text = jnp.concatenate([switch, shown, filler], axis=-1).reshape(batch_size, rounds * width)
    again = order(keys[3], NUM_NAMES)
    pick = lambda x: jnp.take_along_axis(x, again, axis=1)
    asked = jnp.stack([pick(names), pick(values[:, -1])], axis=-1).reshape(batch_size, -1)
    spare = length - text.shape[1] - asked.shape[1]
    more = VOCAB - 1 - jax.random.randint(keys[4], (batch_size, spare), 0, NUM_FILLERS)
    tokens = jnp.concatenate([text, more, asked], axis=1)
    slots = length - 2 * NUM_NAMES + 2 * jnp.arange(NUM_NAMES)
    return Batch(tokens, jnp.broadcast_to(slots, names.shape), pick(values[:, -1]))


def config_of(part: str) -> ModelConfig:
    """The decoder of one row of `PARTS`."""
    return dataclasses.replace(
        config("dense"), vocab_size=VOCAB + 1, architecture=f"titans-lmm({PARTS[part]})"
    )


def alpha_at_switch(model: Decoder, batch: Batch) -> Array:
    """Mean forgetting at SWITCH over that at other tokens, all layers and heads."""
    alpha = record(forward, "mem_alpha")(model, batch.tokens).seen["mem_alpha"]  # [L,B,T,H]
    at = jnp.broadcast_to((batch.tokens == SWITCH)[None, :, :, None], alpha.shape)
    return jnp.mean(alpha, where=at) / jnp.mean(alpha, where=~at)


WIDTH, SHOWN, HELD = 8, 128, 64


def regression_batch(key: Array, batch_size: int = 8) -> tuple[Array, Array]:
    """Unit keys [B,SHOWN+HELD,1,WIDTH] and what a random network of the row makes of them."""
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (batch_size, SHOWN + HELD, WIDTH))
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    first = jax.random.normal(keys[1], (batch_size, WIDTH, 4 * WIDTH)) * 2
    second = jax.random.normal(keys[2], (batch_size, 4 * WIDTH, WIDTH)) / np.sqrt(4 * WIDTH)
    y = jnp.einsum("btf,bfo->bto", jax.nn.gelu(jnp.einsum("bti,bif->btf", x, first)), second)
    return x[:, :, None], y[:, :, None]


def held_out_error(params: dict[str, Any], batch: tuple[Array, Array], *, passes: int = 2) -> Array:
    """Mean squared error at keys that were not shown, after reading the shown ones."""
    x, y = batch
    start = list(params["start"])
    shape = (x.shape[0], SHOWN, 1)
    gates = [jnp.broadcast_to(jax.nn.sigmoid(g), shape) for g in params["gates"]]
    theta, eta, alpha = params["theta_max"] * gates[0], gates[1], gates[2]
    state, shown = None, x[:, :SHOWN]
    for _ in range(passes):
        _, state = neural_memory(
            shown, y[:, :SHOWN], shown, theta, eta, alpha, start, chunk=16, state=state,
            residual_norm=False, max_grad_norm=4.0, max_outer_growth=4.0,
        )  # fmt: skip
    assert state is not None
    read = memory_read(state, x[:, SHOWN:], residual_norm=False)
    return jnp.mean(jnp.square(read - y[:, SHOWN:]))


def depth_result(depth: int, *, steps: int, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Held-out error of a memory of this depth whose start and gates were learned."""

    def init(key: Array) -> dict[str, Any]:
        return {
            "start": init_memory(key, 1, WIDTH, depth=depth, expansion=4),
            "gates": jnp.array([0.0, -1.0, -5.0]),
        }

    limit = 1.0 if depth == 1 else 0.1
    loss = lambda params, batch: held_out_error(params | {"theta_max": limit}, batch)
    trained = common.fit(loss, init, regression_batch, steps=steps, seeds=seeds, lr=1e-2)
    error = common.evaluate(loss, trained.params, regression_batch, seeds=seeds)
    return {"error": error.tolist()}


def claims_of(parts: dict[str, Any], depths: dict[str, Any]) -> list[common.Claim]:
    """What has been decided by the parts that were run."""
    claims = []
    longest = str(LENGTHS[-1])
    if {"full", "no forgetting"} <= parts.keys():
        read = lambda name: float(np.mean(parts[name]["accuracy"][longest]))
        gain = read("full") - read("no forgetting")
        claims.append(common.at_least("forgetting helps the newest binding", gain, 0.1))
        rise = parts["full"]["alpha_at_switch"]
        claims.append(common.at_least("learned alpha at a switch over elsewhere", rise, 1.0))
    if {"1", "2"} <= depths.keys():
        ratio = np.mean(depths["2"]["error"]) / np.mean(depths["1"]["error"])
        claims.append(common.at_most("held-out error of depth 2 over depth 1", float(ratio), 0.8))
    return claims


def define_flags() -> None:
    """Defines the flags of this script."""
    common.define_flags("titans_ablation")
    absl_flags.DEFINE_list("parts", ["parts", "depth"], "What to run: parts, depth.")
    absl_flags.DEFINE_integer("steps", 1000, "Updates of each model.")


def main() -> int:
    """Trains the ablated models and writes what they do."""
    run = common.options()
    steps = 2 if run.quick else absl_flags.FLAGS.steps
    settings = {"steps": steps, "seeds": list(run.seeds)}
    parts: dict[str, Any] = {}
    depths: dict[str, Any] = {}
    wanted = absl_flags.FLAGS.parts
    if "depth" in wanted:
        for depth in (1, 2):
            make = partial(depth_result, depth, steps=steps, seeds=run.seeds)
            depths[str(depth)] = kept(run.workdir, f"depth-{depth}", settings, make)
    if "parts" in wanted:
        lengths = LENGTHS[:1] if run.quick else LENGTHS
        for name in list(PARTS)[:1] if run.quick else PARTS:
            make = partial(train_and_read, config_of(name), redefinition_batch, lengths=lengths,
                           steps=steps, seeds=run.seeds,
                           measures={"alpha_at_switch": alpha_at_switch})  # fmt: skip
            parts[name] = kept(run.workdir, name.replace(" ", "-"), settings, make)
    rows = [
        {"model": name, **{f"{n} tokens": round(float(np.mean(a)), 3)
                           for n, a in result["accuracy"].items()}}
        for name, result in sorted(
            parts.items(), key=lambda item: -np.mean(list(item[1]["accuracy"].values())[-1])
        )
    ]  # fmt: skip
    claims = claims_of(parts, depths)
    if run.quick or not claims:
        claims = [common.at_least("it runs", 1.0, 1.0)]
    return common.finish(
        claims, run.workdir, table=rows, data={"parts": parts, "depths": depths, "steps": steps}
    )


if __name__ == "__main__":
    define_flags()
    flags.run(main)
