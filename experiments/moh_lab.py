"""Mixture-of-head attention from a dense model: what conversion costs, and what heads are used for.

The shipped lab models get routers from the norms of their queries: half of the heads shared, half
of the others active for each token, 75 % in all (Jin et al., 2024, arXiv:2410.11842). Then three
models are tuned for equal steps, from the same weights and on the same batches:

    dense        the model as it is
    moh-75       converted, with the balance loss
    static-75    a quarter of the heads of each layer removed at random, the same for every token

Claimed: conversion alone loses accuracy on held-out questions; tuned, moh-75 has at least 95 % of
the accuracy of dense and more than static-75; tasks load heads differently (a permutation test over
the prompts of all tasks, p < 0.01 in every model).

    python -m experiments.moh_lab                       # lab, lab-1 and lab-2
    python -m experiments.moh --from=lab                # the same
    python -m experiments.moh_lab --from=path/to/checkpoint --data=path/to/text --lr=2e-5

The last form takes any dense checkpoint; accuracy is then that of the next token of held-out text,
and there are no tasks. `launch.train` tunes a checkpoint that needs several devices:

    python -m launch.train --model=DIR --mesh=data:32,model:4 --data=... \\
        --set model.attention="moh(router=query_norm,num_shared=16,top_k=8)"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

import jaxheads as jh
from experiments import common
from experiments.lab import OPTIONS
from experiments.retrieval_heads import names_of
from jaxheads.data import DataConfig, Tokenizer, make_dataset
from jaxheads.data.pipeline import parse_mixture
from jaxheads.data.tasks import TASKS, TaskPair, encode_pairs, generate
from jaxheads.data.tasks.lab import MIXTURES
from jaxheads.interventions import scale_heads, to_moh
from jaxheads.models import Decoder, ModelConfig, forward
from jaxheads.taps import record
from jaxheads.training.configs import TrainConfig
from jaxheads.training.loss import next_token_loss
from jaxheads.typing import Array
from launch import flags

ARMS = ("dense", "moh-75", "static-75")
LAB_TEXT = "lab=0.7,lab-colors=0.3"
"""What the lab models were trained on last."""
LENGTH, BATCH, COUNT, PERMUTATIONS = 256, 4, 100, 999
SETTINGS = TrainConfig(aux_weight=0.01)
Rows = Mapping[str, Array]
"""Packed rows [N,T]: tokens, targets, segment_ids, positions, weights."""
Params = tuple[Decoder, Array]
"""A model and a factor [L,H] on each of its heads, which is not trained."""


class Questions(NamedTuple):
    """Prompts of one task, padded on the right to a power of two."""

    tokens: np.ndarray
    """[P,T]"""
    segment_ids: np.ndarray
    """[P,T], 0 on padding"""
    last: np.ndarray
    """[P]: where the answer is read"""
    is_right: np.ndarray
    """[P,V] bool: the tokens that answer it."""


class Answers(NamedTuple):
    """What a model makes of `Questions`."""

    right: Array
    """[P] bool: its most likely token is right."""
    load: Array
    """[P,L,H] share of the tokens that activate a head; 1 in a dense model."""


def questions_of(pairs: Sequence[TaskPair], tokenizer: Tokenizer, vocab_size: int) -> Questions:
    """The clean prompts of pairs whose answers are single tokens."""
    batch = encode_pairs(pairs, tokenizer)
    width = max(32, 1 << (batch.clean.shape[1] - 1).bit_length())
    wide = lambda x: np.pad(x, ((0, 0), (0, width - x.shape[1])))
    is_right = np.arange(vocab_size) == batch.answer[:, None]
    for row, pair in enumerate(pairs):
        is_right[row, [int(tokenizer.encode(pair.clean + a)[-1]) for a in pair.accepted]] = True
    return Questions(wide(batch.clean), wide(batch.segment_ids), batch.last, is_right)


def lab_questions(tokenizer: Tokenizer, vocab_size: int, count: int) -> dict[str, Questions]:
    """task -> questions whose content no training document has; needles with codes of one word."""
    options = {**OPTIONS, "needle": {"needles": 3, "code_words": 1}}
    found = {}
    for task in TASKS:
        wanted = min(count, 60) if task in ("facts", "successors") else count  # there are no more
        pairs = generate(task, tokenizer, wanted, split="heldout", **options.get(task, {}))
        found[task] = questions_of(pairs, tokenizer, vocab_size)
    return found


def rows_of(path: str, tokenizer: Tokenizer, split: str, count: int, length: int) -> Rows:
    """`count` packed rows of a split of a corpus."""
    cfg = DataConfig(path=path, split=split, seq_len=length, batch_size=1, interleave=1, prefetch=0,
                     validation_fraction=0.1)  # fmt: skip
    batches = make_dataset(cfg, tokenizer=tokenizer)
    rows = [next(batches) for _ in range(count)]
    return {name: jnp.concatenate([row[name] for row in rows]) for name in rows[0]}


def draw_rows(key: Array, rows: Rows) -> Rows:
    """BATCH rows, with replacement."""
    chosen = jax.random.randint(key, (BATCH,), 0, len(rows["tokens"]))
    return {name: values[chosen] for name, values in rows.items()}


def static(gates: Array):
    """The forward with heads scaled by constants [L,H]."""
    return scale_heads(forward, jax.lax.stop_gradient(gates))


def loss(params: Params, batch: Rows) -> Array:
    """Cross-entropy of the next token, and the balance loss where heads are routed."""
    return next_token_loss(static(params[1]), params[0], batch, SETTINGS)[0]


def text_accuracy(params: Params, batch: Rows) -> Array:
    """Share of next tokens that are the most likely ones, weighed as in training."""
    return next_token_loss(static(params[1]), params[0], batch, SETTINGS)[1]["accuracy"]


@jax.jit
def answer(params: Params, asked: Questions) -> Answers:
    """The answers of one model to one task."""
    model, gates = params
    is_routed = model.cfg.attention != "dense"
    fwd = record(static(gates), "active") if is_routed else static(gates)
    out = fwd(model, asked.tokens, segment_ids=asked.segment_ids)
    picked = jnp.arange(len(asked.last))
    said = jnp.argmax(out.logits[picked, asked.last], axis=-1)
    load = jnp.ones((len(asked.last), *gates.shape))
    if is_routed:
        is_token = (asked.segment_ids != 0).astype(jnp.float32)
        total = jnp.einsum("lbth,bt->blh", out.seen["active"], is_token)
        load = total / is_token.sum(-1)[:, None, None]
    return Answers(jnp.asarray(asked.is_right)[picked, said], load)


def quiz(params: Params, asked: Mapping[str, Questions]) -> dict[str, list[Answers]]:
    """task -> the answers of each model; `params` lead with the models."""
    one = lambda i: jax.tree.map(lambda leaf: leaf[i], params)
    models = [one(i) for i in range(len(params[1]))]
    return {task: [jax.device_get(answer(m, q)) for m in models] for task, q in asked.items()}


def explained(loads: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Share of the variance of loads [P,N] that groups explain, for labels [..., P].

    sum_g n_g |mean_g - mean|^2 / sum_p |load_p - mean|^2; 0 for loads that do not vary.
    """
    centred = loads - loads.mean(0)
    total = np.sum(centred**2)
    member = labels[..., None, :] == np.unique(labels)[:, None]  # [...,G,P]
    counts = member.sum(-1)
    between = np.sum((member @ centred) ** 2, axis=-1) / counts  # [...,G]
    return between.sum(-1) / total if total else np.zeros(labels.shape[:-1])


def permutation_test(
    loads: np.ndarray, labels: np.ndarray, *, count: int = PERMUTATIONS, seed: int = 0
) -> tuple[float, float]:
    """What `explained` gives, and the share of shuffled labels that explain as much, p.

    p = (1 + number of permutations that explain at least as much) / (1 + count)
    """
    rng = np.random.default_rng(seed)
    found = explained(loads, labels)
    shuffled = np.stack([rng.permutation(labels) for _ in range(count)])
    chance = np.concatenate([explained(loads, part) for part in np.array_split(shuffled, 20)])
    return float(found), float((1 + np.sum(chance >= found)) / (1 + count))


def task_loads(answers: Mapping[str, list[Answers]], num_shared: int) -> dict[str, Any]:
    """load[task, layer, head] of the routed heads of each model, and whether tasks differ."""
    labels = np.repeat(np.arange(len(answers)), [len(a[0].right) for a in answers.values()])
    found: dict[str, Any] = {"tasks": list(answers), "load": [], "explained": [], "p": []}
    for i in range(len(next(iter(answers.values())))):
        routed = [a[i].load[..., num_shared:] for a in answers.values()]  # [P,L,E] a task
        share, p = permutation_test(np.concatenate(routed).reshape(len(labels), -1), labels)
        found["load"].append(np.stack([load.mean(0) for load in routed]).tolist())
        found["explained"].append(share)
        found["p"].append(p)
    return found


def starts(models: Sequence[Decoder], num_shared: int, top_k: int, seeds: Sequence[int]):
    """arm -> parameters that lead with the models."""
    stack = lambda all_of: jax.tree.map(lambda *leaves: jnp.stack(leaves), *all_of)
    cfg = models[0].cfg
    heads, removed = cfg.num_heads, cfg.num_heads - num_shared - top_k
    ones = jnp.ones((len(models), cfg.num_layers, heads))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    drawn = jax.vmap(lambda key: jax.random.uniform(key, ones.shape[1:]))(keys)
    kept = (jnp.argsort(jnp.argsort(drawn, axis=-1), axis=-1) >= removed).astype(jnp.float32)
    return {
        "dense": (stack(models), ones),
        "moh-75": (stack([to_moh(m, num_shared, top_k) for m in models]), ones),
        "static-75": (stack(models), kept),
    }


def claims_of(results: Mapping[str, Any], loads: Mapping[str, Any] | None) -> list[common.Claim]:
    """What the tuned models decide."""
    mean = lambda arm, when: float(np.mean(results[arm][when]))
    lost = mean("moh-75", "before") - mean("dense", "before")
    gained = mean("moh-75", "after") - mean("static-75", "after")
    claims = [
        common.Claim("accuracy right after conversion minus dense", lost, "< 0", lost < 0),
        common.at_least("accuracy after tuning over that of the dense model tuned alike",
                        mean("moh-75", "after") / mean("dense", "after"), 0.95),
        common.Claim("accuracy minus that with static heads, tuned alike", gained, "> 0",
                     gained > 0),
    ]  # fmt: skip
    if loads is not None:
        worst = max(loads["p"])
        claims.append(
            common.Claim("p of loads that differ between tasks (largest model)", worst, "< 0.01",
                         worst < 0.01)
        )  # fmt: skip
    return claims


def table_of(results: Mapping[str, Any]) -> list[common.Row]:
    """Accuracy before and after tuning, mean over models; by task where there are tasks."""
    rows = [
        {"accuracy": "mean", **{f"{arm}, {when}": float(np.mean(found[when]))
                                for arm, found in results.items() for when in ("before", "after")}}
    ]  # fmt: skip
    for task in results[ARMS[0]]["tasks after"]:
        rows.append(
            {"accuracy": task, **{f"{arm}, {when}": float(np.mean(found[f"tasks {when}"][task]))
                                  for arm, found in results.items()
                                  for when in ("before", "after")}}
        )  # fmt: skip
    return rows


class Material(NamedTuple):
    """What models are tuned and measured on."""

    learn: Callable[[Array], Rows]
    """key -> rows to train on"""
    read: Callable[[Array], Rows] | None
    """key -> held-out rows; None where there are questions."""
    asked: Mapping[str, Questions]
    """task -> held-out questions"""


def material(path: str | None, tokenizer: Tokenizer, cfg: ModelConfig, steps: int, count: int):
    """Text of `path` and `count` questions of each task, or held-out text if it asks none."""
    speaks_lab = tokenizer.digest == Tokenizer.load("lab").digest
    path = path or (LAB_TEXT if speaks_lab else "stdlib")
    is_lab = speaks_lab and all(set(paths) <= set(MIXTURES) for paths, _ in parse_mixture(path))
    rows = partial(rows_of, path, tokenizer, length=min(LENGTH, cfg.max_positions))
    learn = partial(draw_rows, rows=rows(split="train", count=BATCH * max(steps, 4)))
    if is_lab:
        return Material(learn, None, lab_questions(tokenizer, cfg.vocab_size, count))
    return Material(learn, partial(draw_rows, rows=rows(split="validation", count=64)), {})


class Measured(NamedTuple):
    """Accuracies of N models."""

    accuracy: list[float]
    """[N]; the mean over tasks where there are some."""
    by_task: dict[str, list[float]]
    answers: dict[str, list[Answers]]


def measure(params: Params, given: Material, seeds: Sequence[int]) -> Measured:
    """How well models that lead `params` answer questions, or else predict text."""
    if given.read is not None:
        found = common.evaluate(text_accuracy, params, given.read, seeds=seeds, num_batches=32,
                                over_seeds="map")  # fmt: skip
        return Measured(found.tolist(), {}, {})
    answers = quiz(params, given.asked)
    right = {task: [float(a.right.mean()) for a in each] for task, each in answers.items()}
    return Measured(np.mean(list(right.values()), axis=0).tolist(), right, answers)


def convert(options: common.Options, source: str, path: str | None) -> int:
    """Converts the models of `source` and tunes them, beside two controls."""
    flag, seeds = absl_flags.FLAGS, options.seeds
    steps = 2 if options.quick else flag.tune_steps
    names = names_of(source, seeds)
    loaded = {name: jh.load(name) for name in dict.fromkeys(names)}
    tokenizer, models = Tokenizer.load(names[0]), [loaded[name] for name in names]
    if not isinstance(models[0], Decoder):
        raise ValueError(f"--from={source} holds a {type(models[0]).__name__}, needed a decoder.")
    cfg = models[0].cfg
    given = material(path, tokenizer, cfg, steps, 4 if options.quick else COUNT)
    num_shared, top_k = cfg.num_heads // 2, cfg.num_heads // 4
    results: dict[str, Any] = {}
    loads = None
    for arm, start in starts(models, num_shared, top_k, seeds).items():
        before = measure(start, given, seeds)
        fitted = common.fit(loss, _no_start, given.learn, steps=steps, seeds=seeds, lr=flag.lr,
                            start=start, over_seeds="map")  # fmt: skip
        after = measure(fitted.params, given, seeds)
        results[arm] = {"before": before.accuracy, "after": after.accuracy,
                        "tasks before": before.by_task, "tasks after": after.by_task}  # fmt: skip
        print(f"{arm}: accuracy {before.accuracy} before, {after.accuracy} after", flush=True)
        if arm == "moh-75" and after.answers:
            loads = task_loads(after.answers, num_shared)
            print(f"tasks explain {loads['explained']} of the loads, p {loads['p']}", flush=True)
    claims = claims_of(results, loads)
    if options.quick:
        claims = [common.at_least("it runs", 1.0, 1.0)]
    data = {"names": names, "models": results, "loads": loads, "steps": steps}
    return common.finish(claims, options.workdir, table=table_of(results), data=data,
                         figure=partial(draw, loads) if loads else None)  # fmt: skip


def _no_start(key: Array) -> Params:
    raise NotImplementedError("every model starts from given parameters")


def draw(loads: Mapping[str, Any], page: Any) -> None:
    """load[task, layer x head] of the first model."""
    load = np.asarray(loads["load"][0])  # [tasks,L,E]
    axes = page.subplots()
    image = axes.imshow(load.reshape(len(load), -1), vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(len(load)), loads["tasks"])
    axes.set_xticks(np.arange(load.shape[1]) * load.shape[2], range(load.shape[1]))
    axes.set(xlabel="routed heads, by layer", title="share of tokens that activate a head")
    page.colorbar(image, ax=axes)


def define_tuning_flags(source: str | None) -> None:
    """Defines the flags of `convert` but --data; `source` is the default of --from."""
    absl_flags.DEFINE_string("from", source, "Dense models to convert: lab, or a checkpoint.")
    absl_flags.DEFINE_integer("tune_steps", 150, "Updates after a conversion.")
    absl_flags.DEFINE_float("lr", 5e-4, "Peak learning rate after a conversion.")


def define_flags() -> None:
    """Defines the flags of this script."""
    common.define_flags("moh_lab")
    absl_flags.DEFINE_string("data", None, "Text to tune on; default: the lab text, or stdlib.")
    define_tuning_flags("lab")


def main() -> int:
    """Runs the experiment; returns its exit code."""
    given = absl_flags.FLAGS
    return convert(common.options(), given["from"].value, given.data)


if __name__ == "__main__":
    define_flags()
    flags.run(main)
