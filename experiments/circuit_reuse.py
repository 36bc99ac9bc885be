"""Do two tasks use the same heads? Circuits by path patching, their overlap, and a repair by hand.

For indirect objects (IOI), coloured objects and greater-than, `discover_circuit` keeps the heads
with the largest effect stage by stage: on the logits, on the queries of those heads, on the values
and keys of these, and on what feeds them. Claimed, for models that were trained on all three:

    overlap    IOI and coloured objects share more heads than a random draw would (95 %), and more
               than IOI and greater-than do
    ablation   without the shared heads both tasks fail; without as many others neither does
    repair     attention of the heads that tell IOI's movers where not to look, written onto the two
               wrong colours, raises accuracy on coloured objects; written elsewhere, or with other
               heads, it does not

    python -m experiments.circuit_reuse
    python -m experiments.circuit_reuse --models=/path/to/gpt2-medium --num_examples=100 --frac=0.02

MLPs are recomputed (`freeze_mlps=False`), as in the paper. Inhibition heads are what path patching
says: heads of the second stage (into the movers' queries) whose patch lowers the logit difference,
none of them chosen by hand. Merullo et al., 2023, arXiv:2310.08744.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

import jaxheads as jh
from experiments import common
from experiments.lab import OPTIONS, SEEDS
from jaxheads.data.tasks import PairBatch, TaskPair, encode_pairs, generate
from jaxheads.discovery import (
    Circuit,
    circuit_overlap,
    discover_circuit,
    logit_difference,
    overlap_at_cuts,
)
from jaxheads.taps import as_tapped
from launch import flags

TASKS = ("ioi", "colored_objects", "greater_than")
DRAWS = 5
"""Random sets of heads that each control averages."""


class Examples(NamedTuple):
    """Pairs of one task, and the same as arrays."""

    pairs: list[TaskPair]
    batch: PairBatch


def define_flags() -> None:
    """Defines the flags of this experiment."""
    common.define_flags("circuit_reuse")
    absl_flags.DEFINE_list("models", list(SEEDS), "Shipped names or directories, one a seed.")
    absl_flags.DEFINE_integer("num_examples", 500, "Pairs of each task.", lower_bound=2)
    absl_flags.DEFINE_float("frac", 0.05, "Share of all heads kept in a stage; the paper: 0.02.")


def examples(task: str, tokenizer: jh.Tokenizer, count: int, is_lab: bool, seed: int) -> Examples:
    """Held-out pairs of the lab language, or English for another tokenizer."""
    options = OPTIONS.get(task, {}) if is_lab else {}
    split = "heldout" if is_lab else "all"
    pairs = generate(task, tokenizer, count, seed=seed, split=split, **options)
    return Examples(pairs, encode_pairs(pairs, tokenizer))


@jax.jit
def _right(forward, model, tokens, segment_ids, last, answer):
    logits = forward(model, tokens, segment_ids=segment_ids).logits
    said = jnp.argmax(jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0], axis=-1)
    return jnp.mean(said == answer)


def accuracy(forward: Any, model: jh.Decoder, batch: PairBatch) -> float:
    """Share of prompts after which the answer is the most likely of all tokens, in percent."""
    args = (batch.clean, batch.segment_ids, batch.last, batch.answer)
    return 100 * float(_right(as_tapped(forward), model, *args))


def find_circuit(model: jh.Decoder, batch: PairBatch, frac: float) -> Circuit:
    """The circuit of one task."""
    metric = logit_difference(batch.answer, batch.wrong, positions=batch.last)
    clean, corrupt = batch.run("clean"), batch.run("corrupt")
    return discover_circuit(jh.forward, model, clean, corrupt, metric, frac=frac)


def inhibition_heads(circuit: Circuit) -> list[tuple[int, int]]:
    """Heads whose corruption, on its way into the movers' queries, lowers the logit difference."""
    if len(circuit.stages) < 2:
        return []
    stage = circuit.stages[1]
    return [head for head in stage.heads if stage.scores[head] > 0]


def ablations(
    model: jh.Decoder, found: dict[str, Examples], shared: np.ndarray, key: jax.Array
) -> dict[str, float]:
    """Percentage points lost without the shared heads, and without as many others."""
    lost = {}
    shape = shared.shape
    draws = [
        jh.interventions.random_heads(k, int(shared.sum()), shared, shape)
        for k in jax.random.split(key, DRAWS)
    ]
    for task in TASKS[:2]:
        batch = found[task].batch
        base = accuracy(jh.ablate(jh.forward, np.zeros(shape, bool)), model, batch)
        without = lambda mask, batch=batch: accuracy(jh.ablate(jh.forward, mask), model, batch)
        lost[f"{task}: shared"] = base - without(shared)
        lost[f"{task}: random"] = base - float(np.mean([without(mask) for mask in draws]))
    return lost


def repair(
    model: jh.Decoder, told: Examples, heads: list[tuple[int, int]], key: jax.Array
) -> dict[str, float]:
    """Percentage points gained on coloured objects by writing rows of attention."""
    shape = (model.cfg.num_layers, model.cfg.num_heads)
    rng = np.random.default_rng(int(jax.random.randint(key, (), 0, 1 << 30)))
    wrong = np.array([[pair.marks["wrong_1"], pair.marks["wrong_2"]] for pair in told.pairs])
    colors = np.array([[*row, pair.marks["right"]] for row, pair in zip(wrong, told.pairs)])
    elsewhere = np.stack([
        rng.choice(np.setdiff1d(np.arange(c.min() - 4, end), c), 2, replace=False)
        for c, end in zip(colors, told.batch.last)
    ])  # fmt: skip

    def gain(heads: Any, targets: np.ndarray) -> float:
        mask = jh.heads.mask(heads, *shape)
        told_to = jh.override_rows(jh.forward, mask, targets, query=told.batch.last)
        return accuracy(told_to, model, told.batch) - base

    base = accuracy(jh.forward, model, told.batch)
    inhibits = jh.heads.mask(heads, *shape)
    others = [
        jh.interventions.random_heads(k, len(heads), inhibits, shape)
        for k in jax.random.split(key, DRAWS)
    ]
    return {
        "base": base,
        "repair": gain(heads, wrong),
        "elsewhere": gain(heads, elsewhere),
        "other heads": float(np.mean([gain(mask, wrong) for mask in others])),
    }


def study(name: str, seed: int, count: int, frac: float) -> dict[str, Any]:
    """Everything about one model."""
    model, tokenizer = jh.load(name), jh.Tokenizer.load(name)
    is_lab = name in SEEDS or tokenizer.digest == jh.Tokenizer.load("lab").digest
    found = {task: examples(task, tokenizer, count, is_lab, seed) for task in TASKS}
    circuits = {task: find_circuit(model, found[task].batch, frac) for task in TASKS}
    ioi, colored, greater = (circuits[task] for task in TASKS)
    shared = ioi.mask() & colored.mask()
    key = jax.random.key(seed)
    heads = inhibition_heads(ioi)
    other_cuts = overlap_at_cuts(ioi, greater)
    label = lambda hs: " ".join(jh.heads.label(h) for h in hs)
    result = {
        "model": name,
        "colored": circuit_overlap(ioi, colored),
        "greater": circuit_overlap(ioi, greater),
        "cuts": {
            str(cut): [both.frac, other_cuts[cut].frac]
            for cut, both in overlap_at_cuts(ioi, colored).items()
        },
        "heads": {task: [label(s.heads) for s in circuits[task].stages] for task in TASKS},
        "shared": label(map(tuple, np.argwhere(shared))),
        "inhibition": label(heads),
        "lost": ablations(model, found, shared, key) if shared.any() else None,
        "repair": repair(model, found["colored_objects"], heads, key) if heads else None,
        "scores": ioi.stages[0].scores.tolist(),
    }
    print(f"{name}: shared {result['shared'] or 'none'}; inhibition {result['inhibition']}")
    return result


def claims_of(results: list[dict[str, Any]]) -> list[common.Claim]:
    """The paper's claims, over the models."""
    p_values = [r["colored"].p_value for r in results]
    claims = [
        common.Claim(
            "IOI and coloured objects share more heads than chance (p, every model)",
            p_values,
            "< 0.05",
            all(p < 0.05 for p in p_values),
        ),
        common.at_least(
            "overlap with coloured objects minus overlap with greater-than",
            [r["colored"].frac - r["greater"].frac for r in results],
            0.15,
        ),
    ]
    nothing = float("nan")  # no shared heads, or no inhibition heads: nothing to measure
    lost = lambda which: [(r["lost"] or {}).get(which, nothing) for r in results]
    for task in TASKS[:2]:
        without, others = lost(f"{task}: shared"), lost(f"{task}: random")
        claims += [
            common.at_least(f"{task}: points lost without the shared heads", without, 30),
            common.at_most(f"{task}: points lost without as many others", others, 10),
        ]
    gained = lambda which: [(r["repair"] or {}).get(which, nothing) for r in results]
    return [
        *claims,
        common.at_least("repair: points gained on coloured objects", gained("repair"), 10),
        common.at_most("repair: points gained by looking elsewhere", gained("elsewhere"), 3),
        common.at_most("repair: points gained by other heads", gained("other heads"), 3),
    ]


def main() -> int:
    """Runs the experiment; returns its exit code."""
    run, given = common.options(), absl_flags.FLAGS
    count = 24 if run.quick else given.num_examples
    names = given.models[:1] if run.quick else given.models
    results = [study(name, seed, count, given.frac) for seed, name in enumerate(names)]
    table = [
        {
            "model": r["model"],
            "IOI/colour": r["colored"].frac,
            "chance": r["colored"].null_mean,
            "IOI/greater": r["greater"].frac,
            "shared heads": r["shared"],
            "inhibition": r["inhibition"],
            "accuracy": (r["repair"] or {}).get("base"),
            "repaired by": (r["repair"] or {}).get("repair"),
        }
        for r in results
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(results), squeeze=False)[0]
        for ax, r in zip(axes, results, strict=True):
            scores = 100 * np.asarray(r["scores"])
            size = np.abs(scores).max()
            ax.imshow(scores, cmap="RdBu", vmin=-size, vmax=size)
            ax.set(title=f"{r['model']}: IOI, % of logits", xlabel="head", ylabel="layer")

    keep = ("model", "cuts", "heads", "lost", "repair")
    data = {"details": [{k: r[k] for k in keep} for r in results]}
    return common.finish(claims_of(results), run.workdir, table=table, figure=draw, data=data)


if __name__ == "__main__":
    define_flags()
    flags.run(main)
