"""Pruning a few heads settles conflicts between prompt and memory, in either direction.

The prompt contradicts a fact. Every head is scored by path patching its direct path to the two
answers' probabilities (200 prompts); the highest scores of one group are pruned, at a rate from 1
to 15 % of all heads that 100 validation prompts choose; 500 other prompts decide. Pruning context
heads should raise the rate of memorised answers (RM), pruning memory heads that of stated ones
(RC). Paper: Jin et al., 2024, arXiv:2402.18154.

    python -m experiments.ph3 --workdir=runs/ph3

The real thing:

    python -m experiments.ph3 --model=/ckpt/Llama-2-7b --facts=/data/world_capital.json \\
      --n_score=200 --rates=1,3,5,7,9,15 --direction=both --mesh=data:2,model:4

Beside it: ten random sets of as many heads of the same layers (of other heads, where a layer has
enough), pruning by the gradient of a gate, context-aware decoding, an instruction before the prompt
(not in the lab, whose language has no words for it), a second relation, the overlap with heads
scored on 4 prompts, and how the answers flow: attention knocked out from the last token, saliency,
and a lens on what layers write.

Readings of what could not be checked against the paper's code: the corrupt prompt is the same
template about another subject with another answer; scores are drops of probabilities
(--quantity=logit where those saturate); only the memory filter is applied, since every prompt
states its answer in the same words; transfer is the gain of the same heads on the second relation
over their gain on the first (heads scored on the second stand beside it). Names of heads hold for
this distribution of prompts alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

import jaxheads as jh
from experiments import common, conflicts
from experiments.conflicts import Prompts
from jaxheads.decoding import context_aware_logits
from jaxheads.discovery import (
    attention_saliency,
    conflict_scores,
    knockout_profile,
    layer_lens,
    log_probability,
    rates,
    select,
    sweep_rates,
)
from jaxheads.discovery.conflict import PruneSweep
from jaxheads.models import unembed
from jaxheads.typing import Array
from launch import flags

PRUNED = {"memory": "context", "context": "memory"}  # for more of the one, prune heads of the other
CAD = {"memory": (-0.25, -0.5, -0.75, -1.0), "context": (0.25, 0.5, 0.75, 1.0)}
INSTRUCTIONS = {
    "memory": "The first statement is false. Answer from what you know. ",
    "context": "Answer from the first statement, even if it is false. ",
}
NUM_RANDOM = 10


class Found(NamedTuple):
    """What one model shows."""

    rows: list[dict[str, Any]]
    """One a direction."""
    sweeps: Mapping[str, PruneSweep]
    """goal -> rates on the validation prompts"""
    profiles: Mapping[str, np.ndarray]
    """"source, answer" -> [L]"""
    flow: dict[str, Any]


def one_model(loaded: Any, run: common.Options, seed: int) -> Found:
    """Scores, the pruning rate of each direction, and everything measured on the test set."""
    given, model = absl_flags.FLAGS, loaded.model
    sizes = (20, 10, 20) if run.quick else (given.n_score, given.n_validate, given.n_test)
    score, validate, test = conflicts.prompts(loaded, "capital", sum(sizes), seed).split(*sizes)
    if not test.size:
        raise ValueError(f"{score.size + validate.size} prompts are left: none to test on.")
    other = _second_relation(loaded, sizes, seed)
    scores = _scores(model, score)
    few = _scores(model, score.take(slice(0, 4)))
    rhos = tuple(float(rate) / 100 for rate in given.rates)
    goals = tuple(PRUNED) if given.direction == "both" else (given.direction,)
    sweeps = {
        goal: sweep_rates(
            jh.forward, model, validate.clean, *validate.answers, scores,
            group=PRUNED[goal], rhos=rhos,
        )
        for goal in goals
    }  # fmt: skip
    rows = []
    for goal, swept in sweeps.items():
        n = swept.best(goal)
        mask, rho = swept.masks[n], swept.rhos[n]
        row = {"goal": goal, "rho": rho, "heads": ",".join(map(jh.heads.label,
               jh.heads.from_mask(mask)))}  # fmt: skip
        row |= _against_random(model, test, mask, goal, seed)
        row["gradient"] = _by_gradient(model, score, test, goal, int(mask.sum()))
        row["CAD"] = _by_decoding(model, validate, test, goal)
        row["instruction"] = _by_instruction(loaded, sizes, goal, seed) - row["before"]
        overlap = mask & _selected(few, rho, PRUNED[goal])
        row["overlap with 4 prompts"] = overlap.sum() / mask.sum()
        row |= _transfer(model, other, mask, rho, goal)
        rows.append(row)
    profiles, flow = information_flow(model, test.take(slice(0, 20 if run.quick else 100)))
    return Found(rows, sweeps, profiles, flow)


def _scores(model: Any, found: Prompts) -> np.ndarray:
    quantity = absl_flags.FLAGS.quantity
    return np.asarray(
        conflict_scores(
            jh.forward, model, found.clean, found.corrupt, *found.answers, quantity=quantity
        )
    )


def _selected(scores: np.ndarray, rho: float, group: str) -> np.ndarray:
    """As `select`; no head where no score is positive."""
    sign = 1 if group == "memory" else -1
    return select(scores, rho, group) if (sign * scores > 0).any() else np.zeros(scores.shape, bool)


def _rates(model: Any, found: Prompts, pruned: Sequence[np.ndarray]):
    """Rates [1 + N] without an edit and with each mask pruned."""
    masks = np.stack([np.zeros_like(pruned[0], bool), *pruned])
    return rates(jh.forward, model, found.clean, *found.answers, gates=1.0 - masks)


def _wanted(found: Any, goal: str) -> np.ndarray:
    return found.mem if goal == "memory" else found.ctx


def _against_random(model, test: Prompts, mask: np.ndarray, goal: str, seed: int) -> dict:
    """Rates before and after, and what random heads of the same layers change."""
    draws = []
    for n in range(NUM_RANDOM):
        draw = functools.partial(
            jh.heads.random_heads, *mask.shape, None, seed * NUM_RANDOM + n, match=mask
        )
        try:
            heads = draw(exclude=mask)
        except ValueError:  # most of a layer is in the set
            heads = draw()
        draws.append(jh.heads.mask(heads, *mask.shape))
    found = _rates(model, test, [mask, *draws])
    wanted = _wanted(found, goal)
    gains = wanted[2:] - wanted[0]
    return {
        "before": wanted[0], "after": wanted[1], "gain": wanted[1] - wanted[0],
        "random gain": gains.mean(), "best random": gains.max(),
        "other": found.other[0], "other, pruned": found.other[1],
    }  # fmt: skip


def _by_gradient(model: Any, score: Prompts, test: Prompts, goal: str, count: int) -> float:
    """Gain by pruning the heads whose gate moves the unwanted answer's loss most."""
    unwanted = score.ctx if goal == "memory" else score.mem
    metric = log_probability(unwanted, positions=conflicts.last(score, "clean"))
    shape = (model.cfg.num_layers, model.cfg.num_heads)
    slopes = _gate_gradient(model, score.clean, metric, jnp.ones(shape))
    mask = jh.heads.mask(jh.heads.top_k(np.abs(slopes), count), *shape)
    wanted = _wanted(_rates(model, test, [mask]), goal)
    return float(wanted[1] - wanted[0])


@jax.jit
def _gate_gradient(model: Any, batch: Any, metric: Any, gates: Array) -> Array:
    """[L,H]: the gradient of the mean metric with respect to a gate on each head."""

    def value(gates: Array) -> Array:
        out = jh.scale_heads(jh.forward, gates)(model, **batch)
        return jnp.mean(metric.from_hidden(model, out.hidden))

    return jax.grad(value)(gates)


@jax.jit
def _next_logits(model: Any, batch: dict[str, Array], slots: Array) -> Array:
    """[B,V] float32 at one slot of each prompt."""
    hidden = jh.forward(model, **batch).hidden
    return unembed(model, jnp.take_along_axis(hidden, slots[:, None, None], axis=1)[:, 0])


def _by_decoding(model: Any, validate: Prompts, test: Prompts, goal: str) -> float:
    """Gain by context-aware decoding, its strength chosen on the validation prompts."""

    def shares(found: Prompts) -> list[float]:
        both = [
            _next_logits(model, getattr(found, which), conflicts.last(found, which))
            for which in ("clean", "question")
        ]
        wanted = found.mem if goal == "memory" else found.ctx
        tops = [context_aware_logits(*both, a).argmax(-1) for a in (0.0, *CAD[goal])]
        return [float(np.mean(np.asarray(top) == wanted)) for top in tops]

    best = 1 + int(np.argmax(shares(validate)[1:]))
    found = shares(test)
    return found[best] - found[0]


def _by_instruction(loaded: Any, sizes: tuple[int, ...], goal: str, seed: int) -> float:
    """The rate with an instruction before the prompt; NaN in the lab language."""
    if conflicts.is_lab(loaded.tokenizer):
        return float("nan")
    told = conflicts.prompts(loaded, "capital", sum(sizes), seed, INSTRUCTIONS[goal])
    test = told.split(*sizes)[-1]
    return float(_wanted(rates(jh.forward, loaded.model, test.clean, *test.answers), goal))


def _second_relation(loaded: Any, sizes: tuple[int, ...], seed: int) -> list[Prompts] | None:
    try:
        score, _, test = conflicts.prompts(loaded, "language", sum(sizes), seed).split(*sizes)
    except (ValueError, OSError) as error:
        print(f"no second relation: {error}", flush=True)
        return None
    return [score, test] if test.size else None


def _transfer(model: Any, other: list[Prompts] | None, mask, rho: float, goal: str) -> dict:
    """Gain on the second relation with the heads of the first, and with its own."""
    if other is None:
        return {"gain on B": np.nan, "own gain on B": np.nan}
    own = _selected(_scores(model, other[0]), rho, PRUNED[goal])
    wanted = _wanted(_rates(model, other[1], [mask, own]), goal)
    return {"gain on B": wanted[1] - wanted[0], "own gain on B": wanted[2] - wanted[0]}


def information_flow(model: Any, found: Prompts) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Knock-out profiles of either answer, saliency of flows by layer, and the lens."""
    sources = [name for name, where in found.marks.items() if where.any(1).all()]
    profiles = {
        f"{source}, {name}": np.asarray(
            knockout_profile(jh.forward, model, found.clean, answer, found.marks[source])
        )
        for source in sources
        for name, answer in (("memorised", found.mem), ("stated", found.ctx))
    }
    last = conflicts.last(found, "clean")
    is_last = np.arange(found.clean["tokens"].shape[1]) == last[:, None]
    spans = {**found.marks, "last": is_last}
    flow: dict[str, Any] = {"knockout": profiles}
    for name, answer in (("memorised", found.mem), ("stated", found.ctx)):
        loss = log_probability(answer, positions=last)
        saliency = np.asarray(attention_saliency(jh.forward, model, found.clean, loss))
        for source, target in [("subject", "question"), *((name, "last") for name in sources)]:
            pairs = spans[target][:, :, None] & spans[source][:, None]  # [B,T,S]
            flow[f"saliency {source} -> {target}, {name}"] = np.einsum(
                "lbts,bts->l", saliency, pairs
            ) / max(pairs.sum(), 1)
    lens = layer_lens(jh.forward, model, found.clean, np.stack(found.answers, axis=1))
    flow["lens attention (memorised, stated)"] = np.asarray(lens.attention.mean(1))
    flow["lens mlp (memorised, stated)"] = np.asarray(lens.mlp.mean(1))
    flow["conflict layer"] = lens.conflict_layer(1 / model.cfg.vocab_size)
    return profiles, flow


def main() -> int:
    run = common.options()
    found, rows = [], []
    for seed, (name, loaded) in zip(run.seeds, conflicts.models(run.seeds)):
        with jax.set_mesh(loaded.mesh):
            found.append(one_model(loaded, run, seed))
        for row in found[-1].rows:
            rows.append({"model": name, **row})
            print(common.markdown(rows[-1:]), flush=True)
    claims = []
    for goal, group in PRUNED.items():
        own = [row for row in rows if row["goal"] == goal]
        if own:
            claims += _claims(own, f"pruning {group} heads")
    data = {"flow": [one.flow for one in found], "sweeps": [
        {goal: {"rhos": s.rhos, **s.rates._asdict()} for goal, s in one.sweeps.items()}
        for one in found
    ]}  # fmt: skip
    draw_all = functools.partial(draw, found)
    return common.finish(claims, run.workdir, table=rows, figure=draw_all, data=data)


def _claims(rows: list[dict[str, Any]], what: str) -> list[common.Claim]:
    column = lambda key: np.array([row[key] for row in rows], float)
    gain, rate = column("gain"), ("RM" if rows[0]["goal"] == "memory" else "RC")
    share = lambda key: np.where(gain > 0, column(key) / gain, np.nan)  # NaN: no gain, no share
    claims = [
        common.Claim(f"{what} raises {rate} (smallest seed)", float(gain.min()),
                     ">= 0.2, or a rate of 0.95",
                     bool(np.all((gain >= 0.2) | (column("after") >= 0.95)))),
        common.at_most(f"{what}: share of the gain by random heads (largest seed)",
                       share("random gain").max(), 0.5),
        common.at_most(f"{what}: other answers rise by (largest seed)",
                       (column("other, pruned") - column("other")).max(), 0.1),
    ]  # fmt: skip
    if np.isfinite(column("gain on B")).all():
        name = f"{what}: share of the gain kept on the second relation (smallest seed)"
        claims.append(common.at_least(name, share("gain on B").min(), 0.5))
    return claims


def draw(found: Sequence[Found], page: Any) -> None:
    """Rates over the pruning rate, and what knocking attention out does."""
    left, right = page.subplots(1, 2)
    colors = {"memory": "tab:blue", "context": "tab:red"}
    for n, one in enumerate(found):
        for goal, swept in one.sweeps.items():
            label = f"{PRUNED[goal]} heads pruned: {goal} rate" if n == 0 else None
            percent = 100 * np.asarray(swept.rhos)
            left.plot(percent, _wanted(swept.rates, goal), color=colors[goal], label=label)
    left.set(xlabel="heads pruned (%)", ylabel="rate (validation)", ylim=(0, 1.02))
    left.legend()
    for name in found[0].profiles:
        style = {"stated": "-", "subject2": "--"}.get(name.split(",")[0])
        if style:
            mean = np.mean([one.profiles[name] for one in found], axis=0)
            color = colors["memory" if name.endswith("memorised") else "context"]
            right.plot(mean, color=color, linestyle=style, label=f"{name} answer")
    right.set(xlabel="layer of the window", ylabel="relative change of probability")
    right.set_yscale("symlog", linthresh=1)
    right.legend(title="attention to ..., p of ...", fontsize="small")


def define_flags() -> None:
    conflicts.define_flags("ph3")
    number = functools.partial(absl_flags.DEFINE_integer, lower_bound=1)
    number("n_score", 200, "Prompts that score heads.")
    number("n_validate", 100, "Prompts that choose the pruning rate.")
    number("n_test", 500, "Prompts that decide.")
    absl_flags.DEFINE_list("rates", ["1", "3", "5", "7", "9", "15"], "Pruning rates in percent.")
    absl_flags.DEFINE_enum("direction", "both", ["both", *PRUNED], "Which answer is wanted.")
    absl_flags.DEFINE_enum("quantity", "prob", ["prob", "logit"], "As conflict_scores.")


if __name__ == "__main__":
    define_flags()
    flags.run(main)
