"""Low-rank attention pooling: can its heads find two words in a text, and what does that cost?

Texts of 50 to 100 tokens are noise except for two keywords at random places; the class is the pair
(16 classes). The same classifier (embedding, bidirectional GRU, MLP) pools its states with

    mean, max, additive, structured, transformer      what there was before
    lama        as published: scores within -1..1, so weights are nearly uniform
    lama_ctx    the same with the mean embedding as context
    scaled      lama with a learned scale per head, from e^2
    frozen      scaled, with its factors and its view of the words left as they are drawn: the GRU
                adapts to any fixed query, so the share of attention on the keywords decides, not
                accuracy

and a table of time and operations for 128 to 4,096 tokens (Mehta et al., 2019, arXiv:1912.00835).

    python -m experiments.lama                                  # about 6 minutes on one idle core
    python -m experiments.lama --data=path/to/sst/train.tsv.gz  # a fifth is held out
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags as absl_flags
from flax import nnx

from experiments import common
from jaxheads.attention import attention_pool_flops, attention_pool_params, low_rank_attention_pool
from jaxheads.models.text_pool import PoolingClassifier, PoolingConfig
from jaxheads.typing import Array, PyTree
from launch import flags

VOCAB, SHORTEST, LONGEST, VALUES = 400, 50, 100, 4
HEADS, BATCH, NUM_TRAIN, NUM_TEST = 8, 64, 1000, 1500
POOLS: dict[str, dict[str, Any]] = {
    "mean": {},
    "max": {},
    "additive": {},
    "structured": {},
    "transformer": {},
    "lama": {},
    "lama_ctx": {},
    "scaled": {"pool": "lama", "logit_scale": None},
    "frozen": {"pool": "lama", "logit_scale": None},
}
LENGTHS = (128, 256, 512, 1024, 2048, 4096)


class Texts(NamedTuple):
    """Labelled texts."""

    tokens: Array
    """[N,T], 0 is padding."""
    lengths: Array
    """[N]"""
    labels: Array
    """[N]"""
    needles: Array
    """[N,T] bool, the keywords."""


def needle_texts(key: Array, num_texts: int) -> Texts:
    """Noise with a keyword of each of two kinds at random places."""

    def one(key: Array) -> Texts:
        length_key, noise_key, place_key, value_key = jax.random.split(key, 4)
        length = jax.random.randint(length_key, (), SHORTEST, LONGEST + 1)
        place = jnp.arange(LONGEST)
        noise = jax.random.randint(noise_key, (LONGEST,), 1 + 2 * VALUES, VOCAB)
        drawn = jnp.where(place < length, jax.random.uniform(place_key, (LONGEST,)), -1)
        places = jax.lax.top_k(drawn, 2)[1]
        values = jax.random.randint(value_key, (2,), 0, VALUES)
        tokens = noise.at[places].set(1 + values + VALUES * jnp.arange(2))
        needles = jnp.zeros(LONGEST, bool).at[places].set(True)
        tokens = jnp.where(place < length, tokens, 0)
        return Texts(tokens, length, VALUES * values[0] + values[1], needles)

    return jax.vmap(one)(jax.random.split(key, num_texts))


def batch_of(key: Array, data: Texts, size: int = BATCH) -> Texts:
    """`size` texts at random."""
    rows = jax.random.randint(key, (size,), 0, data.labels.shape[0])
    return jax.tree.map(lambda a: a[rows], data)


def config(name: str, **changes: Any) -> PoolingConfig:
    """The classifier called `name` in `POOLS`."""
    size = dict(vocab_size=VOCAB, num_classes=VALUES**2, embed_dim=16, gru_hidden=8,
                num_heads=HEADS, mlp_dim=64)  # fmt: skip
    return PoolingConfig(**{"pool": name, **size, **POOLS[name], **changes})


def freeze(name: str, model: PoolingClassifier) -> PoolingClassifier:
    """`frozen` with its attention, but for the scale, as constants."""
    if name != "frozen":
        return model
    copied = jax.tree.map(lambda leaf: leaf, model)
    for part in ("w_word", "b_word", "context", "P", "Q"):
        weight = getattr(copied, part)
        weight[...] = jax.lax.stop_gradient(weight[...])
    return copied


def loss(name: str, model: PoolingClassifier, batch: Texts) -> Array:
    """Mean cross-entropy."""
    logits = freeze(name, model)(batch.tokens, batch.lengths)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


def accuracy(model: PoolingClassifier, batch: Texts) -> Array:
    """Share of right classes."""
    return jnp.mean(jnp.argmax(model(batch.tokens, batch.lengths), -1) == batch.labels)


def needle_ratio(model: PoolingClassifier, batch: Texts) -> Array:
    """Attention on the two keywords over that of uniform weights, mean over heads and texts."""
    weights = model.run(batch.tokens, batch.lengths).weights
    if weights is None:
        return jnp.float32(jnp.nan)
    share = jnp.einsum("bmt,bt->bm", weights, batch.needles.astype(jnp.float32)).mean(1)
    return jnp.mean(share * batch.lengths / 2)


def train(name: str, cfg: PoolingConfig, data: Texts, steps: int, seeds: tuple[int, ...]) -> PyTree:
    """One model per seed."""
    build = lambda key: PoolingClassifier(cfg, rngs=nnx.Rngs(params=key))
    return common.fit(
        partial(loss, name), build, partial(batch_of, data=data), steps=steps, seeds=seeds,
        optimizer=optax.adam(2e-3),
    ).params  # fmt: skip


def needles(run: common.Options, names: tuple[str, ...]) -> dict[str, dict[str, np.ndarray]]:
    """Accuracy and share of attention [N] of every pooling on fresh texts."""
    steps = 2 if run.quick else absl_flags.FLAGS.steps
    data = needle_texts(jax.random.key(1234), NUM_TRAIN)
    fresh = partial(needle_texts, num_texts=250)
    found = {}
    for name in names:
        params = train(name, config(name), data, steps, run.seeds)
        measure = partial(common.evaluate, params=params, batches_fn=fresh, seeds=run.seeds,
                          num_batches=NUM_TEST // 250)  # fmt: skip
        both = measure(lambda model, batch: (accuracy(model, batch), needle_ratio(model, batch)))
        found[name] = dict(zip(("accuracy", "ratio"), both, strict=True))
        print(name, found[name], flush=True)
    return found


def needle_claims(found: Mapping[str, Mapping[str, np.ndarray]]) -> list[common.Claim]:
    """What the keywords decide."""
    mean = lambda name, what: float(np.mean(found[name][what]))
    state_dim = config("lama").state_dim
    share = attention_pool_params("lama", state_dim, HEADS) / attention_pool_params(
        "transformer", state_dim, HEADS
    )
    scaled = mean("scaled", "accuracy")
    trained_over_frozen = mean("scaled", "ratio") / mean("frozen", "ratio")
    return [
        common.at_least("accuracy with a learned scale", scaled, 0.97),
        common.at_least("the same minus mean pooling", scaled - mean("mean", "accuracy"), 0.08),
        common.at_most(
            "accuracy of structured minus learned scale", mean("structured", "accuracy") - scaled,
            0.02,
        ),
        common.at_most("P, Q and c over q, k, v and o of transformer pooling", share, 1 / 3),
        common.at_least("attention on the keywords over uniform, learned scale",
                        mean("scaled", "ratio"), 8.0),
        common.at_least("the same over that of frozen factors", trained_over_frozen, 1.5),
    ]  # fmt: skip


def scaling(run: common.Options) -> tuple[list[common.Claim], list[dict[str, Any]]]:
    """Seconds and operations of the two poolings alone, by length; slopes over the longest."""
    lengths = LENGTHS[:2] if run.quick else LENGTHS
    dim, rng = 64, np.random.default_rng(0)
    factor = [jnp.asarray(rng.normal(size=(dim, HEADS)), jnp.float32) for _ in range(2)]

    def low_rank(states: Array) -> Array:
        return low_rank_attention_pool(states, states, states[0, 0], *factor).S

    def transformer(states: Array) -> Array:
        heads = states.reshape(*states.shape[:2], HEADS, -1)
        scores = jnp.einsum("bthd,bshd->bhts", heads, heads)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), heads).mean(1)

    def seconds(fn: Callable[[Array], Array], length: int) -> float:
        states = jnp.asarray(rng.normal(size=(1, length, dim)), jnp.float32)
        compiled = jax.jit(fn).lower(states).compile()
        times = []
        for _ in range(8):
            begin = time.perf_counter()
            jax.block_until_ready(compiled(states))
            times.append(time.perf_counter() - begin)
        return min(times)

    rows = [
        {"tokens": n, "lama, ms": 1e3 * seconds(low_rank, n),
         "transformer, ms": 1e3 * seconds(transformer, n),
         "lama, MFLOP": attention_pool_flops("lama", n, dim, HEADS) / 1e6,
         "transformer, MFLOP": attention_pool_flops("transformer", n, dim, HEADS) / 1e6}
        for n in lengths
    ]  # fmt: skip

    def slope(column: str) -> float:
        half = rows[len(rows) // 2 - 1 :]  # fixed costs hide the growth of short ones
        return float(np.polyfit(*(np.log([r[c] for r in half]) for c in ("tokens", column)), 1)[0])

    return [
        common.at_most("growth of lama's time, log over log", slope("lama, ms"), 1.2),
        common.at_least("growth of transformer attention's", slope("transformer, ms"), 1.6),
    ], rows


def read_texts(path: Path) -> tuple[list[list[str]], np.ndarray]:
    """Words and labels of a table (.tsv or .tsv.gz) with the label in the first column.

    Of a column ``label5`` (0..4) the neutral texts are left out and the rest is made two classes.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        columns = next(lines).rstrip("\n").split("\t")
        rows = [line.rstrip("\n").split("\t") for line in lines]
    if columns[0] == "label5":
        rows = [[str(int(int(row[0]) > 2)), *row[1:]] for row in rows if row[0] != "2"]
    words = [" ".join(row[1:]).lower().split() for row in rows]
    kept = [n for n, text in enumerate(words) if text]
    names = sorted({row[0] for row in rows})
    return [words[n] for n in kept], np.asarray([names.index(rows[n][0]) for n in kept])


def real_texts(path: Path, run: common.Options) -> int:
    """Trains five poolings on four fifths of a file, drawn at random, and measures the rest."""
    words, labels = read_texts(path)
    order = np.random.default_rng(0).permutation(len(words))  # files may be sorted
    words, labels = [words[n] for n in order], labels[order]
    first = len(words) * 4 // 5
    counts: dict[str, int] = {}
    for text in words[:first]:
        for word in text:
            counts[word] = counts.get(word, 0) + 1
    known = [w for w, n in counts.items() if n > 1]
    ids = {word: 2 + n for n, word in enumerate(known)}  # 0 pads, 1 is unknown
    longest = min(LONGEST, max(len(text) for text in words))
    tokens = np.zeros((len(words), longest), np.int32)
    for row, text in zip(tokens, words, strict=True):
        found = [ids.get(word, 1) for word in text[:longest]]
        row[: len(found)] = found
    lengths = np.asarray([min(len(text), longest) for text in words])
    every = Texts(*(jnp.asarray(a) for a in (tokens, lengths, labels, tokens > 0)))
    data, held = (
        jax.tree.map(lambda a, s=s: a[s], every) for s in (slice(first), slice(first, None))
    )
    size = dict(vocab_size=2 + len(ids), num_classes=int(labels.max()) + 1, embed_dim=32,
                gru_hidden=16)  # fmt: skip
    rows = []
    for name in ("mean", "additive", "structured", "lama", "scaled"):
        steps = 2 if run.quick else absl_flags.FLAGS.steps
        params = train(name, config(name, **size), data, steps, run.seeds)
        measured = common.evaluate(accuracy, params, partial(batch_of, data=held, size=256),
                                   seeds=run.seeds, num_batches=8)  # fmt: skip
        rows.append({"pooling": name, "held-out accuracy": measured.round(4)})
        print(rows[-1], flush=True)
    commonest = np.bincount(labels[first:]).max() / len(labels[first:])
    best = max(float(np.mean(row["held-out accuracy"])) for row in rows[3:])
    claims = [common.at_least("accuracy of lama over the commonest class", best - commonest, 0.05)]
    return common.finish(claims, run.workdir, table=rows, data={"texts": len(words)})


def draw(found: Mapping[str, Mapping[str, np.ndarray]]) -> Callable[[Any], None]:
    """Accuracy and attention on the keywords; dots are seeds."""

    def figure(page: Any) -> None:
        for axes, what in zip(page.subplots(1, 2), ("accuracy", "ratio"), strict=True):
            for n, (name, result) in enumerate(found.items()):
                axes.bar(name, np.mean(result[what]), color="#7799bb")
                axes.plot([n] * len(result[what]), result[what], "k.", markersize=4)
            axes.set_title({"ratio": "attention on keywords / uniform"}.get(what, what))
            axes.tick_params(axis="x", rotation=60)

    return figure


def define_flags() -> None:
    """Defines the flags of this script."""
    common.define_flags("lama")
    absl_flags.DEFINE_integer("steps", 500, "Updates of each model.", lower_bound=1)
    absl_flags.DEFINE_string("data", None, "A .tsv or .tsv.gz with labels in its first column.")


def main() -> int:
    """Keywords and lengths, or the texts of --data."""
    run = common.options()
    if absl_flags.FLAGS.data:
        return real_texts(Path(absl_flags.FLAGS.data), run)
    found = needles(run, ("mean", "structured", "scaled", "frozen") if run.quick else tuple(POOLS))
    grows, lengths = scaling(run)
    table = [
        {"pooling": name, **{k: v.round(3) for k, v in r.items()}} for name, r in found.items()
    ]
    return common.finish(
        needle_claims(found) + grows, run.workdir, table=table, figure=draw(found),
        data={"seeds": run.seeds, "lengths": lengths},
    )  # fmt: skip


if __name__ == "__main__":
    define_flags()
    flags.run(main)
