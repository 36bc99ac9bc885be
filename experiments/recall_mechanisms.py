"""One head decides between prompt and memory: scaling its values switches the model's answers.

The prompt contradicts a fact ("The capital of Poland is London. Q: What is the capital of Poland?
A:"). Heads are ranked by what they add to the stated answer's logit over the memorised one's. On a
tuning set of 100 prompts a search over the ten strongest heads of either sign and 15 factors finds
the (head, factor) of the highest rate of either answer; 500 other prompts decide. Ten random heads
are tuned the same way. Paper: Yu, Merullo and Pavlick, 2023, arXiv:2310.15910.

    python -m experiments.recall_mechanisms --workdir=runs/recall_mechanisms

The real thing (raw attribution as in the paper):

    python -m experiments.recall_mechanisms --model=/ckpt/pythia-1.4b --facts=/data/capitals.csv \\
      --norm=raw --tune=50 --mesh=data:8

Readings of what the paper leaves open: subjects that the model does not know without the statement
are left out (--nofilter keeps them); factors are -10, -8, ..., -1, -0.5, 0, 0.5, 1, 2, ..., 10; a
head's rank is that of |attribution| among all heads; random heads are drawn from all but the chosen
one; the opposite head is the strongest of the other sign at the chosen factor; the p-value of the
frequency analysis shuffles exposures among subjects, since prompts about one subject are not
independent. Rates are those of the first token. One template: a head may be specific to it, so
`--other_facts` and `--other_template` (in the lab: another relation) are reported as transfer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags as absl_flags

import jaxheads as jh
from experiments import common, conflicts
from experiments.conflicts import Prompts
from jaxheads.discovery import (
    AlphaTable,
    accuracy,
    head_attribution,
    rank_heads,
    rates,
    read_metric,
    search_alpha,
)
from jaxheads.discovery.conflict import ALPHAS, GROUPS
from jaxheads.discovery.head_attribution import HeadRanks
from jaxheads.heads import Head, correlation
from launch import flags

CANDIDATES = 10  # of either sign, and as many random heads
SHUFFLES = 2000


class Found(NamedTuple):
    """What one model shows."""

    row: dict[str, Any]
    table: AlphaTable
    """The search on the tuning set."""
    ranks: HeadRanks
    asked: Prompts
    """All prompts."""
    memorised: np.ndarray
    """[B] bool: the unedited model gave the memorised answer"""


def gates(shape: tuple[int, int], head: Head, alpha: float) -> np.ndarray:
    """[L,H]: `alpha` at one head, 1 elsewhere."""
    out = np.ones(shape, np.float32)
    out[head] = alpha
    return out


def one_model(loaded: Any, run: common.Options, seed: int) -> Found:
    """Attribution and search on the tuning set, everything else on the test set."""
    given, model = absl_flags.FLAGS, loaded.model
    shape = (model.cfg.num_layers, model.cfg.num_heads)
    sizes = (20, 40) if run.quick else (given.tune, given.test)
    asked = conflicts.prompts(loaded, "capital", sum(sizes), seed)
    tune, test = asked.split(*sizes)
    if not test.size:
        raise ValueError(f"{tune.size} prompts are left: none to test on; lower --tune={sizes[0]}.")

    delta = head_attribution(
        jh.forward, model, tune.clean, tune.ctx, tune.mem,
        norm=given.norm, position=conflicts.last(tune, "clean"),
    ).mean(-1)  # fmt: skip
    delta = np.asarray(delta)
    ranks = rank_heads(delta, min(CANDIDATES, delta.size))
    candidates = [*ranks.memory, *ranks.context]
    drawn = jh.heads.random_heads(*shape, min(CANDIDATES + 1, delta.size), seed)
    searched = list(dict.fromkeys([*candidates, *drawn]))
    alphas = (-10.0, 0.0, 10.0) if run.quick else ALPHAS
    table = search_alpha(jh.forward, model, tune.clean, *tune.answers, searched, alphas)

    before = rates(jh.forward, model, tune.clean, *tune.answers)
    best = {goal: table.best(goal, candidates) for goal in GROUPS}
    goal = max(GROUPS, key=lambda g: abs(best[g].rates.ctx - before.ctx))
    chosen = best[goal]
    random = table.best(goal, [head for head in drawn if head != chosen.head][:CANDIDATES])
    is_memory = chosen.head in ranks.memory
    opposite = (ranks.context if is_memory else ranks.memory)[:1]
    choices = [(c.head, c.alpha) for c in (chosen, random, *best.values())]
    choices += [(head, chosen.alpha) for head in opposite]
    edits = np.stack([np.ones(shape), *(gates(shape, *choice) for choice in choices)])
    after = rates(jh.forward, model, test.clean, *test.answers, gates=edits)
    change = after.ctx - after.ctx[0]
    order = jh.heads.top_k(np.abs(delta), delta.size)
    row = {
        "in-context": after.ctx[0], "memorised": after.mem[0], "other": after.other[0],
        "head": jh.heads.label(chosen.head), "type": "memory" if is_memory else "context",
        "rank": 1 + order.index(chosen.head), "alpha": chosen.alpha, "goal": goal,
        "in-context, scaled": after.ctx[1], "other, scaled": after.other[1], "change": change[1],
        "random head": jh.heads.label(random.head), "its rank": 1 + order.index(random.head),
        "random change": change[2], "most memory": after.mem[3], "most context": after.ctx[4],
        "opposite change": change[5] if opposite else np.nan,
        **_side_effects(loaded, edits[1], test, seed, run.quick),
    }  # fmt: skip
    memorised = accuracy(asked.mem, positions=conflicts.last(asked, "clean"))
    memorised = np.asarray(read_metric(jh.forward, model, asked.clean, memorised)) > 0
    return Found(row, table, ranks, asked, memorised)


def _side_effects(loaded: Any, edit: np.ndarray, test: Prompts, seed: int, quick: bool) -> dict:
    """What the chosen edit does to questions without a statement, other text, another relation."""
    model, scaled = loaded.model, jh.scale_heads(jh.forward, edit)
    text = conflicts.unrelated(loaded, 20 if quick else 200)
    plain, edited = (conflicts.perplexity(f, model, text) for f in (jh.forward, scaled))
    knows = accuracy(test.mem, positions=conflicts.last(test))
    return {
        "knows, scaled": float(read_metric(scaled, model, test.question, knows).mean()),
        "perplexity": plain, "perplexity change": edited / plain - 1,
        "transfer change": _transfer(loaded, edit, test.size, seed),
    }  # fmt: skip


def _transfer(loaded: Any, edit: np.ndarray, count: int, seed: int) -> float:
    """The change of the in-context rate on the second relation; NaN where there is none."""
    try:
        found = conflicts.prompts(loaded, "language", count, seed)
    except (ValueError, OSError) as error:
        print(f"no second relation: {error}", flush=True)
        return float("nan")
    both = np.stack([np.ones_like(edit), edit])
    after = rates(jh.forward, loaded.model, found.clean, *found.answers, gates=both)
    return float(after.ctx[1] - after.ctx[0])


def frequency(
    subjects: Sequence[str], memorised: np.ndarray, counts: dict[str, float]
) -> tuple[float, float]:
    """Spearman of log exposures and memorised answers, and its p-value under shuffled subjects.

    NaN where the model always, or never, answers from memory.
    """
    if np.ptp(memorised) == 0:
        return float("nan"), float("nan")
    names, which = np.unique(np.asarray(subjects), return_inverse=True)
    logs = np.log([max(counts.get(name, 0.0), 1e-12) for name in names.tolist()])
    rng, spearman = np.random.default_rng(0), functools.partial(correlation, method="spearman")
    value = spearman(logs[which], memorised)
    chance = [spearman(rng.permutation(logs)[which], memorised) for _ in range(SHUFFLES)]
    return value, float((1 + np.sum(np.asarray(chance) >= value)) / (1 + SHUFFLES))


def frequencies(found: Sequence[Found], counts: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each model and one for all: exposures of the subject asked about, and of the one
    that the statement is true of; memorised answers from the rarest third to the most frequent."""
    rows = []
    for part in (*([one] for one in found), found):
        subject, memory, stated = (
            [word for one in part for word in getattr(one.asked, key).tolist()]
            for key in ("subject", "memory", "stated")
        )
        memorised = np.concatenate([one.memorised for one in part]).astype(float)
        owner = dict(zip(memory, subject))
        value, p = frequency(subject, memorised, counts)
        stated = frequency([owner.get(word, word) for word in stated], memorised, counts)
        order = np.argsort([counts.get(name, 0.0) for name in subject], kind="stable")
        thirds = [float(memorised[third].mean()) for third in np.array_split(order, 3)]
        rows.append({"spearman": value, "p": p, "spearman (stated)": stated[0],
                     "p (stated)": stated[1], "memorised by thirds": thirds})  # fmt: skip
    return rows


def main() -> int:
    run = common.options()
    found, rows, counts = [], [], None
    for seed, (name, loaded) in zip(run.seeds, conflicts.models(run.seeds)):
        with jax.set_mesh(loaded.mesh):
            found.append(one_model(loaded, run, seed))
        counts = conflicts.exposures(loaded.tokenizer, "capital")
        rows.append({"model": name, **found[-1].row})
        print(common.markdown(rows[-1:]), flush=True)
    column = lambda key: np.array([row[key] for row in rows], float)
    change = column("change")
    share = lambda key: column(key) / np.where(change == 0, np.nan, change)
    claims = [
        common.at_least("one head changes the in-context rate by (smallest seed)",
                        np.abs(change).min(), 0.25),
        common.at_most("the best random head's share of that (largest seed)",
                       np.abs(share("random change")).max(), 0.5),
        common.at_most("attribution rank of the chosen head (largest seed)",
                       column("rank").max(), 5),
        common.at_most("perplexity of other tasks changes by (largest seed)",
                       np.abs(column("perplexity change")).max(), 0.05),
        common.at_most("change by the opposite head over that of the chosen (largest seed)",
                       share("opposite change").max(), 0.0),
    ]  # fmt: skip
    data = {}
    if counts:
        data["frequency"] = frequencies(found, counts)
        smallest = np.min([row["spearman"] for row in data["frequency"][:-1]])
        claims += [
            common.at_least("Spearman of log exposures and memorised answers (smallest seed)",
                            smallest, 0.2),
            common.at_most("its p-value over all seeds", data["frequency"][-1]["p"], 0.01),
        ]  # fmt: skip
    draw_all = functools.partial(draw, found)
    return common.finish(claims, run.workdir, table=rows, figure=draw_all, data=data)


def draw(found: Sequence[Found], page: Any) -> None:
    """In-context rate over the factor: the strongest head of either type, and all others tried."""
    left, right = page.subplots(1, 2, sharex=True)
    for n, one in enumerate(found):
        for axes, rate in ((left, one.table.rates.ctx), (right, one.table.rates.mem)):
            for kind, heads, color in (("memory", one.ranks.memory, "tab:blue"),
                                       ("in-context", one.ranks.context, "tab:red")):  # fmt: skip
                if heads:
                    curve = rate[one.table.heads.index(heads[0])]
                    label = f"strongest {kind} head" if n == 0 else None
                    axes.plot(one.table.alphas, curve, color=color, label=label)
            others = [h for h in one.table.heads if not any(h in group for group in one.ranks)]
            if others:
                rows = [one.table.heads.index(h) for h in others]
                axes.plot(one.table.alphas, rate[rows].mean(0), color="0.7",
                          label="mean of random others" if n == 0 else None)  # fmt: skip
    left.set(ylabel="in-context answers (tuning set)", xlabel="factor of the head's values")
    right.set(ylabel="memorised answers", xlabel="factor of the head's values")
    left.legend()


def define_flags() -> None:
    conflicts.define_flags("recall_mechanisms")
    absl_flags.DEFINE_enum("norm", "frozen", ["frozen", "gain", "raw"], "As head_attribution.")
    absl_flags.DEFINE_integer("tune", 100, "Prompts of the search.", lower_bound=1)
    absl_flags.DEFINE_integer("test", 500, "Prompts that decide.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    flags.run(main)
