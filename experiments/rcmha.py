"""Convolution or relative positions: which of the two does attention need, and for what?

Four attentions, mha, mdha (convolved queries, keys and values), rmha (relative positions) and rcmha
(both), in the same model (Sugiharto et al., 2023, arXiv:2308.03429):

    induction   one layer of attention and an MLP; among random tokens a passage of 8 to 16 is
                repeated, and only its repetition is asked for. One layer of plain attention cannot
                find what followed a token before; a convolved key holds its predecessor. `frozen`
                is rcmha with kernels that stay the identity.
    text        a small Transformer-XL on the source of the Python standard library, or on --data:
                held-out loss, parameters with and without the table of positions, and the memory
                that the compiled training step takes.

    python -m experiments.rcmha                     # about 6 minutes on one idle core
    python -m experiments.rcmha --parts=text --data=path/to/text
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags as absl_flags
from flax import nnx

from experiments import common
from jaxheads.data.text import open_source
from jaxheads.models.transformer_xl import TransformerXL, TransformerXLConfig
from jaxheads.taps import Record, Taps
from jaxheads.typing import Array
from launch import flags

VARIANTS = ("mha", "mdha", "rmha", "rcmha")
PARTS = ("induction", "text")
VOCAB, LENGTH, LONG = 32, 64, 128
SEGMENT, MEMORY, BATCH = 32, 32, 16


class Repeated(NamedTuple):
    """Sequences with a repeated passage."""

    tokens: Array
    """[B,T+1]"""
    weights: Array
    """[B,T] 1 where the next token is one of the repetition, after its first."""
    shift: Array
    """[B] how far behind the first occurrence is."""


def repeated(key: Array, length: int, batch_size: int = 32) -> Repeated:
    """Random tokens; a passage of 8 to 16 occurs again after a gap of any size."""

    def one(key: Array) -> Repeated:
        size_key, start_key, again_key, token_key = jax.random.split(key, 4)
        size = jax.random.randint(size_key, (), 8, 17)
        start = jax.random.randint(start_key, (), 0, length + 2 - 2 * size)
        again = jax.random.randint(again_key, (), start + size, length + 2 - size)
        place = jnp.arange(length + 1)
        is_copy = (place >= again) & (place < again + size)
        source = jnp.where(is_copy, place - again + start, place)
        tokens = jax.random.randint(token_key, (length + 1,), 0, VOCAB)[source]
        asked = is_copy[1:] & (place[1:] > again)
        return Repeated(tokens, asked.astype(jnp.float32), again - start)

    return jax.vmap(one)(jax.random.split(key, batch_size))


def induction_config(name: str) -> TransformerXLConfig:
    """One layer."""
    return TransformerXLConfig(
        variant="rcmha" if name == "frozen" else name, vocab_size=VOCAB, num_layers=1, model_dim=64,
        num_heads=4, mlp_dim=128, mem_len=0, max_distance=LONG, max_positions=LONG,
    )  # fmt: skip


def freeze(name: str, model: TransformerXL) -> TransformerXL:
    """`frozen` with kernels that are the identity, so that no gradient reaches them."""
    if name != "frozen":
        return model
    copied = jax.tree.map(lambda leaf: leaf, model)
    for which in "qkv":
        kernel, bias = (getattr(copied.layers, f"{which}_{part}") for part in ("kernel", "bias"))
        kernel[...] = jnp.zeros_like(kernel[...]).at[:, -1].set(1)
        bias[...] = jnp.zeros_like(bias[...])
    return copied


def asked_loss(name: str, model: TransformerXL, batch: Repeated) -> Array:
    """Cross-entropy where the repetition is asked for."""
    logits, _ = freeze(name, model)(batch.tokens[:, :-1])
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.tokens[:, 1:, None], -1)[..., 0]
    return -jnp.sum(picked * batch.weights) / jnp.sum(batch.weights)


def asked_accuracy(name: str, model: TransformerXL, batch: Repeated) -> Array:
    """Share of the asked tokens that are the most likely ones."""
    logits, _ = freeze(name, model)(batch.tokens[:, :-1])
    is_right = jnp.argmax(logits, -1) == batch.tokens[:, 1:]
    return jnp.sum(is_right * batch.weights) / jnp.sum(batch.weights)


def induction_weights(name: str, model: TransformerXL, batch: Repeated) -> Array:
    """[H] mean attention from a token of the repetition to the one after its first occurrence."""
    taps = Taps(record=(Record("pattern"),))
    pattern = freeze(name, model).run(batch.tokens[:, :-1], taps=taps).seen["pattern"][0]
    length = pattern.shape[-1]
    target = jnp.clip(jnp.arange(length) - batch.shift[:, None] + 1, 0, length - 1)  # [B,T]
    weights = jnp.take_along_axis(pattern, target[:, None, :, None], axis=-1)[..., 0]  # [B,H,T]
    return jnp.einsum("bht,bt->h", weights, batch.weights) / jnp.sum(batch.weights)


def induction(run: common.Options) -> tuple[list[common.Claim], list[dict[str, Any]], dict]:
    """Trains the five models and asks what they find."""
    steps = 2 if run.quick else absl_flags.FLAGS.steps
    short, long = (partial(repeated, length=n) for n in (LENGTH, LONG))
    accuracy, found = {}, {}
    for name in ("rcmha", "mdha", "frozen", "rmha", "mha"):
        build = lambda key, n=name: TransformerXL(induction_config(n), rngs=nnx.Rngs(params=key))
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))
        params = common.fit(
            partial(asked_loss, name), build, short, steps=steps, seeds=run.seeds,
            optimizer=optimizer,
        ).params  # fmt: skip
        measure = partial(common.evaluate, params=params, seeds=run.seeds)
        for length, batches in ((LENGTH, short), (LONG, long)):
            metric = partial(asked_accuracy, name)
            accuracy[name, length] = measure(metric, batches_fn=batches)
        found[name] = measure(partial(induction_weights, name), batches_fn=short).max(-1)  # [N]
        print(name, *(accuracy[name, n] for n in (LENGTH, LONG)), found[name], flush=True)
    rows = [
        {
            "part": "induction",
            "variant": name,
            "accuracy at 64": accuracy[name, LENGTH].round(3),
            "at 128": accuracy[name, LONG].round(3),
            "weight on the token to copy": found[name].round(3),
        }
        for name in found
    ]
    return induction_claims(accuracy, found["rcmha"]), rows, {"induction_steps": steps}


def induction_claims(
    accuracy: Mapping[tuple[str, int], np.ndarray], weights: np.ndarray
) -> list[common.Claim]:
    """From accuracies [N] by variant and length, and rcmha's weights [N] on the token to copy."""
    of = lambda *names: np.mean([accuracy[name, LENGTH] for name in names], axis=0)
    gap = accuracy["rcmha", LONG] - accuracy["mdha", LONG]
    at_least, at_most = common.at_least, common.at_most
    return [
        at_least("induction: accuracy with convolution, 64 tokens", of("mdha", "rcmha"), 0.9),
        at_most("induction: accuracy without convolution", of("mha", "rmha"), 0.3),
        at_least("induction: rcmha minus mdha at unseen 128 tokens", gap, 0.05),
        at_most("induction: rcmha with the kernels of the identity", of("frozen"), 0.3),
        at_least("induction: weight on the token to copy, best head of rcmha", weights, 0.5),
    ]


def text_config(name: str) -> TransformerXLConfig:
    """Two layers over bytes."""
    return TransformerXLConfig(
        variant=name, vocab_size=256, num_layers=2, model_dim=64, num_heads=4, mlp_dim=128,
        mem_len=MEMORY, max_distance=256, max_positions=SEGMENT,
    )  # fmt: skip


def texts(path: str, limit: int) -> tuple[Array, Array]:
    """At most `limit` bytes to train on, and an eighth of it of other documents."""
    source = open_source(path)

    def of(split: str, most: int) -> Array:
        documents, parts, size = source.split(split, 0.1), [], 0
        for i in np.random.default_rng(0).permutation(len(documents)):
            parts.append(documents[int(i)].encode())
            size += len(parts[-1])
            if size >= most:
                break
        return jnp.asarray(np.frombuffer(b"".join(parts)[:most], np.uint8))

    return of("train", limit), of("validation", limit // 8)


def windows(key: Array, data: Array) -> Array:
    """[B,2 SEGMENT + 1] bytes."""
    start = jax.random.randint(key, (BATCH,), 0, data.shape[0] - 2 * SEGMENT - 1)
    return data[start[:, None] + jnp.arange(2 * SEGMENT + 1)].astype(jnp.int32)


def text_loss(model: TransformerXL, rows: Array) -> Array:
    """Cross-entropy over two segments, the second with the first in memory; nats per byte."""
    first, memory = model(rows[:, :SEGMENT])
    second, _ = model(rows[:, SEGMENT : 2 * SEGMENT], memory)
    log_probs = jax.nn.log_softmax(jnp.concatenate([first, second], axis=1))
    return -jnp.mean(jnp.take_along_axis(log_probs, rows[:, 1:, None], axis=-1))


def footprint(name: str) -> dict[str, int]:
    """Parameters, with and without the table of positions; bytes of the compiled gradient step."""
    model = jax.eval_shape(lambda: TransformerXL(text_config(name), rngs=nnx.Rngs(0)))
    rows = jax.ShapeDtypeStruct((BATCH, 2 * SEGMENT + 1), jnp.int32)
    compiled = jax.jit(jax.grad(text_loss)).lower(model, rows).compile()
    memory: Any = compiled.memory_analysis()
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))
    layers = model.layers
    table = sum(
        math.prod(leaf.shape) for leaf in (layers.rel_key, layers.rel_bias, model.position)
        if leaf is not None
    )  # fmt: skip
    return {"parameters": total, "without positions": total - table,
            "temporary KiB": memory.temp_size_in_bytes // 1024}  # fmt: skip


def text(run: common.Options) -> tuple[list[common.Claim], list[dict[str, Any]], dict]:
    """Trains the four variants on the same windows."""
    steps = 2 if run.quick else absl_flags.FLAGS.text_steps
    data = texts(absl_flags.FLAGS.data, 100_000 if run.quick else 2_000_000)
    learn, read = (partial(windows, data=d) for d in data)
    losses, rows = {}, []
    for name in VARIANTS:
        build = lambda key, n=name: TransformerXL(text_config(n), rngs=nnx.Rngs(params=key))
        params = common.fit(text_loss, build, learn, steps=steps, seeds=run.seeds, lr=4e-3).params
        losses[name] = common.evaluate(text_loss, params, read, seeds=run.seeds, num_batches=64)
        each = losses[name].round(4)
        rows.append({"part": "text", "variant": name, "held-out loss": each, **footprint(name)})
        print(rows[-1], flush=True)
    kib = {row["variant"]: row["temporary KiB"] for row in rows}
    more = {"text_steps": steps, "temporary KiB, rcmha over rmha": kib["rcmha"] / kib["rmha"]}
    return [text_claim(losses["mha"], losses["rcmha"])], rows, more


def text_claim(plain: np.ndarray, both: np.ndarray) -> common.Claim:
    """From the losses [N] of mha and rcmha, seed by seed."""
    gap = plain - both
    error = np.std(gap, ddof=1) / math.sqrt(len(gap)) if len(gap) > 1 else math.inf
    name = "text: loss of mha minus rcmha, less 2 standard errors, nats"
    return common.at_least(name, gap.mean() - 2 * error, 0.0)


def draw(rows: list[dict[str, Any]]) -> Callable[[Any], None]:
    """Bars of accuracies and losses; dots are seeds."""

    def figure(page: Any) -> None:
        panels = [
            ("induction", "accuracy at 64"),
            ("induction", "at 128"),
            ("text", "held-out loss"),
        ]
        for axes, (part, column) in zip(page.subplots(1, 3), panels, strict=True):
            for n, row in enumerate(row for row in rows if row["part"] == part):
                axes.bar(row["variant"], np.mean(row[column]), color="#7799bb")
                axes.plot([n] * len(row[column]), row[column], "k.", markersize=4)
            axes.set_title(f"{part}: {column}", fontsize=9)
            axes.tick_params(axis="x", rotation=60)

    return figure


def define_flags() -> None:
    """Defines the flags of this script."""
    common.define_flags("rcmha")
    absl_flags.DEFINE_list("parts", list(PARTS), "Which parts to run.")
    absl_flags.DEFINE_integer("steps", 400, "Updates of the induction models.", lower_bound=1)
    absl_flags.DEFINE_integer("text_steps", 200, "Updates on text.", lower_bound=1)
    absl_flags.DEFINE_string("data", "stdlib", "Text: files, a directory, or stdlib.")


def main() -> int:
    """Runs the parts asked for, then decides their claims."""
    run = common.options()
    claims, data, rows = [], {"seeds": run.seeds}, []
    for name in absl_flags.FLAGS.parts:
        if name not in PARTS:
            raise ValueError(f"--parts: {name!r} is not one of {', '.join(PARTS)}.")
        decided, found, more = {"induction": induction, "text": text}[name](run)
        claims, rows, data = claims + decided, rows + found, data | more
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [{key: row.get(key, "-") for key in columns} for row in rows]
    return common.finish(claims, run.workdir, table=table, figure=draw(rows), data=data)


if __name__ == "__main__":
    define_flags()
    flags.run(main)
