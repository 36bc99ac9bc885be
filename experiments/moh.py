"""Mixture-of-head attention: does a router that lets each token pick heads cost anything?

Byte-level decoders of 4 layers x 8 heads read the source of the Python standard library, for equal
steps, from the same starts and on the same batches (Jin et al., 2024, arXiv:2410.11842):

    mha           every head for every token
    moh-75        2 shared heads, 4 of the 6 others
    moh-50        2 shared heads, 2 of the 6 others
    random-75     moh-75 whose 4 heads are drawn at random for each token
    static-6      six heads for every token, the others do not exist
    no-balance    moh-75 without the balance loss
    routed-only   no shared heads, 6 of 8 routed

Claimed: moh-75 loses at most 0.02 nats to mha and gains 0.02 over random routing; the balance loss
keeps the busiest head under twice the mean load; shared heads help; heads differ more than in mha.

    python -m experiments.moh                     # about eight minutes on one idle core
    python -m experiments.moh --from=lab          # experiments.moh_lab: dense models converted
    python -m experiments.moh --from=path/to/checkpoint --data=path/to/text

`experiments.moh_vit` trains vision transformers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags
from flax import nnx

from experiments import common, moh_lab
from jaxheads.data.text import open_source
from jaxheads.models import Decoder, ModelConfig, forward
from jaxheads.taps import Edit, TapContext, intervene, record
from jaxheads.typing import Array
from launch import flags

LENGTH, BATCH, BETA = 64, 8, 0.01
NUM_SHARED, TOP_K, ROUTED = 2, 4, 6
MODELS: dict[str, dict[str, Any]] = {
    "mha": {},
    "moh-75": {"attention": f"moh(num_shared={NUM_SHARED},top_k={TOP_K})"},
    "moh-50": {"attention": f"moh(num_shared={NUM_SHARED},top_k=2)"},
    "random-75": {"attention": f"moh(num_shared={NUM_SHARED},top_k={TOP_K})"},
    "static-6": {"num_heads": 6, "head_dim": 8},
    "no-balance": {"attention": f"moh(num_shared={NUM_SHARED},top_k={TOP_K})"},
    "routed-only": {"attention": "moh(num_shared=0,top_k=6)"},
}
Batch = tuple[Array, Array]
"""[B,T+1] tokens and a random key."""


def config(name: str) -> ModelConfig:
    """The decoder called `name` in `MODELS`."""
    size = dict(vocab_size=256, num_layers=4, num_heads=8)
    return common.small_config(**{**size, **MODELS[name]})


def texts(path: str, limit: int) -> tuple[str, str]:
    """At most `limit` characters to train on, and characters of other documents, held out."""
    source = open_source(path)

    def of(split: str, most: int) -> str:
        documents, parts, size = source.split(split, 0.1), [], 0
        for i in np.random.default_rng(0).permutation(len(documents)):
            parts.append(documents[int(i)])
            size += len(parts[-1])
            if size >= most:
                break
        return "".join(parts)[:most]

    return of("train", limit), of("validation", limit // 8)


def batch_of(key: Array, data: Array) -> Batch:
    """Windows of a text of token ids."""
    start = jax.random.randint(key, (BATCH,), 0, data.shape[0] - LENGTH - 1)
    rows = data[start[:, None] + jnp.arange(LENGTH + 1)].astype(jnp.int32)
    return rows, jax.random.fold_in(key, 1)


def random_heads(active: Array, key: Array, ctx: TapContext) -> Array:
    """Edit of ``active`` [B,T,H]: TOP_K routed heads at random for each token."""
    del ctx
    drawn = jax.random.uniform(key, (*active.shape[:2], ROUTED))
    chosen = jax.nn.one_hot(jax.lax.top_k(drawn, TOP_K)[1], ROUTED, dtype=active.dtype).sum(-2)
    return active.at[..., NUM_SHARED:].set(chosen)


def run(name: str, model: Decoder, batch: Batch, *sites: str):
    """The forward of a model of `MODELS`, recording `sites`."""
    rows, key = batch
    fwd = forward
    if name == "random-75":
        fwd = intervene(fwd, Edit("active", random_heads, jax.random.split(key, 4)))
    return (record(fwd, *sites) if sites else fwd)(model, rows[:, :-1])


def cross_entropy(logits: Array, rows: Array) -> Array:
    """Mean over the next tokens, in nats."""
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:, 1:, None], axis=-1)
    return -jnp.mean(picked)


def loss(name: str, model: Decoder, batch: Batch, beta: float = BETA) -> Array:
    """Cross-entropy and beta times the balance loss."""
    out = run(name, model, batch)
    balance = out.aux.get("moh_balance", jnp.float32(0))
    return cross_entropy(out.logits, batch[0]) + beta * balance


def busiest(name: str, model: Decoder, batch: Batch) -> Array:
    """[L,E] share of the tokens that activate each routed head."""
    load = run(name, model, batch, "active").seen["active"].mean((1, 2))  # [L,H]
    return load if name == "routed-only" else load[:, NUM_SHARED:]


def similarity(name: str, model: Decoder, batch: Batch) -> tuple[Array, Array]:
    """How alike two heads of a layer are, over all pairs: their patterns, 1 - E||A - A'||_1 / 2,
    and the cosine of their outputs before gates."""
    seen = run(name, model, batch, "pattern", "v").seen
    pattern, v = seen["pattern"], seen["v"]
    num_heads = pattern.shape[2]
    upper = jnp.triu(jnp.ones((num_heads, num_heads), bool), 1)
    gaps = jax.vmap(lambda one: jnp.abs(pattern - one[:, :, None]).sum(-1).mean((0, 1, 3)))
    alike = 1 - gaps(jnp.moveaxis(pattern, 2, 0)) / 2  # [H,H]
    z = jnp.einsum("lbhts,lbshd->lbthd", pattern, v)
    unit = z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-9)
    cosine = jnp.einsum("lbthd,lbtgd->lbthg", unit, unit).mean((0, 1, 2))
    return alike.mean(where=upper), cosine.mean(where=upper)


def train(name: str, data: tuple[Array, Array], steps: int, seeds: tuple[int, ...]):
    """Held-out loss of one model per seed, its loads and the similarity of its heads."""
    build = lambda key: Decoder(config(name), rngs=nnx.Rngs(params=key))
    learn, read = (partial(batch_of, data=d) for d in data)
    beta = 0.0 if name == "no-balance" else BETA
    fitted = common.fit(partial(loss, name, beta=beta), build, learn, steps=steps, seeds=seeds,
                        lr=4e-3)  # fmt: skip
    measure = partial(common.evaluate, params=fitted.params, batches_fn=read, seeds=seeds)
    result = {"loss": measure(partial(loss, name, beta=0.0), num_batches=32).tolist()}
    if name in ("mha", "moh-75"):
        alike, cosine = measure(partial(similarity, name), num_batches=2, over_seeds="map")
        result |= {"pattern similarity": alike.tolist(), "output cosine": cosine.tolist()}
    if "moh" in config(name).attention:
        load = measure(partial(busiest, name))  # [N,L,E]
        result["busiest"] = (load.max(-1) / load.mean(-1)).tolist()
    return result


def claims_of(results: dict[str, Any]) -> list[common.Claim]:
    """What the models trained from scratch decide."""
    gap = lambda a, b: np.subtract(results[a]["loss"], results[b]["loss"])
    busy = lambda name: np.mean(results[name]["busiest"], axis=0)  # [L]
    alike = lambda key: np.subtract(results["moh-75"][key], results["mha"][key])
    return [
        common.at_most("loss of moh-75 minus mha, nats", gap("moh-75", "mha"), 0.02),
        common.at_least("loss of random routing minus moh-75", gap("random-75", "moh-75"), 0.02),
        common.at_most("busiest head over the mean, worst layer", busy("moh-75").max(), 2.0),
        common.at_least(
            "the same without the balance loss, minus with it, worst layers",
            busy("no-balance").max() - busy("moh-75").max(), 0.0,
        ),
        common.at_most("loss of moh-75 minus routed-only", gap("moh-75", "routed-only"), 0.0),
        common.at_most("pattern similarity of moh-75 minus mha", alike("pattern similarity"), 0.0),
        common.at_most("output cosine of moh-75 minus mha", alike("output cosine"), 0.0),
    ]  # fmt: skip


def from_scratch(options: common.Options) -> int:
    """Trains the models of `MODELS`."""
    steps = 2 if options.quick else absl_flags.FLAGS.steps
    pair = texts(absl_flags.FLAGS.data or "stdlib", 100_000 if options.quick else 2_000_000)
    data = tuple(jnp.asarray(np.frombuffer(t.encode(), np.uint8)) for t in pair)
    results: dict[str, Any] = {}
    for name in ("mha", "moh-75") if options.quick else MODELS:
        results[name] = train(name, data, steps, options.seeds)
        print(name, results[name], flush=True)
    rows = [
        {"model": name, "held-out loss, nats": float(np.mean(r["loss"])),
         "lowest": min(r["loss"]), "highest": max(r["loss"]),
         "busiest head": np.mean(r["busiest"], 0).max() if "busiest" in r else "-"}
        for name, r in results.items()
    ]  # fmt: skip
    claims = [common.at_least("it runs", 1.0, 1.0)] if options.quick else claims_of(results)
    return common.finish(
        claims, options.workdir, table=rows, data={"models": results, "steps": steps}
    )


def define_flags() -> None:
    """Defines the flags of this script."""
    common.define_flags("moh")
    absl_flags.DEFINE_string("data", None, "Text: files, a directory, or stdlib (the default).")
    absl_flags.DEFINE_integer("steps", 400, "Updates of each model trained from scratch.")
    moh_lab.define_tuning_flags(None)


def main() -> int:
    """Trains from scratch, or converts what --from names."""
    options, given = common.options(), absl_flags.FLAGS
    source = given["from"].value
    return moh_lab.convert(options, source, given.data) if source else from_scratch(options)


if __name__ == "__main__":
    define_flags()
    flags.run(main)
