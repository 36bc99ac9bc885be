"""Retrieval heads: a few heads copy facts out of the context, and without them none is found.

Heads are scored on needles at every depth of contexts of several lengths (`discovery.retrieval`).
Then those of the highest scores are masked, beside as many random others. Facts that the model
knows by heart must survive; answers worked out on a scratchpad must suffer more than others. Wu et
al., 2024, arXiv:2404.15574.

    python -m experiments.retrieval_heads              # three lab models, minutes on one core
    python -m experiments.retrieval_heads --size=real --model=/ckpt/Llama-2-7b-80k \\
        --needles=needles.json --haystack=essays.txt --batch_size=4 --mask_k=30,-30 \\
        --mode=uniform_decode --mesh=data:4,model:8

A model with the tokenizer of the lab language is asked in it, in contexts as long as it was trained
on (240 tokens). Other models get the needles of --needles (JSON: needle, question, answer) in the
text of --haystack; --size=real is the paper's grid, --lengths=1000:50000:20. It writes heads.json,
which `launch.evaluate --heads` reads, to --workdir.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags as absl_flags

import jaxheads as jh
from experiments import common
from experiments.retrieval_tasks import Task, file_task, lab_task
from jaxheads.discovery import RetrievalResult, correlate, retrieval_scores, split_half
from jaxheads.interventions import random_heads
from jaxheads.viz import head_table
from launch import flags, loading

THRESHOLD = 0.1
"""A head above it is a retrieval head."""
NUM_RANDOM = 5
"""Random sets of heads beside those of the highest scores."""
MODES = ("uniform_decode", "zero_output")
GRIDS = {
    "smoke": ("64:240:2", 2, 5),
    "default": ("64:240:4", 10, 5),
    "real": ("1000:50000:20", 10, 3),
}
"""size -> lengths, depths, and needles at each of them; flags change them."""


class Study(NamedTuple):
    """What one model showed."""

    found: RetrievalResult
    wrong: np.ndarray
    """[L,H] scores against spans that do not answer."""
    halves: float
    """Correlation of the score maps of two halves of the instances."""
    lengths: float
    """Correlation of the score maps of short and long contexts."""
    columns: tuple[str, ...]
    """What was asked: needles, and the names of `Task.asked`."""
    masked: dict[tuple[str, int], np.ndarray]
    """(mode, heads masked) -> [sets,columns]: shares answered, for each set of heads. A negative
    number of heads is at random; ("none", 0) masks nothing."""

    def fallen(self, column: str, mode: str, k: int) -> float:
        """How far a share falls, the mean over sets of heads."""
        change = self.masked["none", 0][0] - self.masked[mode, k].mean(axis=0)
        return round(float(change[self.columns.index(column)]), 9)  # 5 points are exactly 5


def spread(text: str) -> list[int]:
    """``"64,128"``, or ``"1000:50000:20"``: start, end and how many, evenly spaced.

    Raises:
      ValueError: for other text.
    """
    try:
        if ":" not in text:
            return [int(part) for part in text.split(",")]
        start, end, count = (int(part) for part in text.split(":"))
        return np.linspace(start, end, count).astype(int).tolist()
    except ValueError:
        raise ValueError(f"{text!r} cannot be read; write 64,128 or START:END:COUNT.") from None


def study(model: jh.Decoder, task: Task, *, mask_k: Sequence[int], modes: Sequence[str],
          num_random: int, batch_size: int, seed: int) -> Study:  # fmt: skip
    """Scores the heads of a model, then masks them."""

    def score(forward: Callable[..., Any], instances: Any = task.instances, **options: Any):
        return retrieval_scores(
            forward,
            model,
            instances,
            max_new=task.max_new,
            stop_ids=task.stop_ids,
            decode=task.decode,
            batch_size=batch_size,
            **options,
        )

    def answered(forward: Callable[..., Any]) -> list[float]:
        needles = score(forward, min_recall=-1).recall == 1
        return [float(needles.mean()), *answered_at_once(forward, model, task)]

    found = score(jh.forward)
    wrong = score(jh.forward, task.misplaced).score
    lengths = np.array([one.length for one in task.instances])
    is_short = lengths <= np.median(lengths)
    maps = [found.examples[found.is_kept & side] for side in (is_short, ~is_short)]
    masked = {("none", 0): np.array([answered(jh.forward)])}
    for mode in modes:
        for k in mask_k:
            sets = head_sets(found.score, k, num_random, seed)
            forwards = [jh.mask_heads(jh.forward, heads, mode) for heads in sets]
            masked[mode, k] = np.array([answered(forward) for forward in forwards])
    return Study(
        found,
        wrong,
        _alike(*split_half(found)),
        _alike(*(m.mean(axis=0) if len(m) else found.score * 0 for m in maps)),
        ("needles", *task.asked),
        masked,
    )


def _alike(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation; NaN, which holds no claim, where a map has one value only."""
    return float("nan") if 0 in (np.ptp(a), np.ptp(b)) else correlate(a, b)


def head_sets(score: np.ndarray, k: int, num_random: int, seed: int) -> list[np.ndarray]:
    """Masks [L,H]: that of the top `k` heads, or for negative k random sets below the threshold."""
    if k == 0:
        raise ValueError("--mask_k=0 masks nothing; give numbers such as 30,-30.")
    if k > 0:
        return [jh.HeadScores(score).mask(k).astype(np.float32)]
    keys = jax.random.split(jax.random.key(seed), num_random)
    sets = (random_heads(key, -k, score > THRESHOLD, score.shape) for key in keys)
    return [np.asarray(heads, np.float32) for heads in sets]


def answered_at_once(forward: Callable[..., Any], model: jh.Decoder, task: Task) -> list[float]:
    """For each kind of `task.asked`, the share whose answer is the most likely token."""
    if not task.asked:
        return []
    prompts, answers = zip(*(question for kind in task.asked.values() for question in kind))
    said = jh.generate(model, list(prompts), max_new_tokens=1, forward=forward)[:, -1]
    is_right = np.asarray(said) == np.array(answers)
    ends = np.cumsum([len(kind) for kind in task.asked.values()])
    return [float(part.mean()) for part in np.split(is_right, ends[:-1])]


def claims_of(studies: Sequence[Study], mask_k: Sequence[int]) -> list[common.Claim]:
    """What every model has to show."""

    def every(name: str, values: Sequence[float], needed: str, low=-np.inf, high=np.inf):
        holds = all(low <= value <= high for value in values)
        return common.Claim(name, [float(value) for value in values], needed, holds)

    shares = [float((s.found.score > THRESHOLD).mean()) for s in studies]
    claims = [
        every("share of retrieval heads", shares, "> 0, <= 0.25", np.nextafter(0, 1), 0.25),
        every("score maps of two halves correlate", [s.halves for s in studies], ">= 0.8", 0.8),
        every("short and long contexts correlate", [s.lengths for s in studies], ">= 0.8", 0.8),
        every("highest score against a wrong span", [s.wrong.max() for s in studies], "< 0.1",
              high=np.nextafter(THRESHOLD, 0)),
    ]  # fmt: skip
    both_ways = [k for k in mask_k if k > 0 and -k in mask_k]
    for mode in dict.fromkeys(mode for mode, _ in studies[0].masked if mode != "none"):
        for k in both_ways[:1]:
            lost = lambda column, k, mode=mode: [s.fallen(column, mode, k) for s in studies]
            gaps = lambda a, b, n: [x - n * max(y, 0) for x, y in zip(a, b)]
            needles, random = lost("needles", k), lost("needles", -k)
            claims += [
                every(f"{mode}: needles lost without the top {k}", needles, ">= 0.3", 0.3),
                every(f"{mode}: that, less 3 times the mean of random {k}",
                      gaps(needles, random, 3), ">= 0", 0.0),
            ]  # fmt: skip
            if "facts" in studies[0].columns:
                claims += [
                    every(f"{mode}: facts lost without the top {k}", lost("facts", k), "<= 0.05",
                          high=0.05),
                    every(f"{mode}: choices lost with a scratchpad, less twice those without",
                          gaps(lost("scratchpad", k), lost("choices", k), 2), "> 0",
                          np.nextafter(0, 1)),
                ]  # fmt: skip
    return claims


def rows_of(studies: Sequence[Study]) -> list[dict[str, Any]]:
    """A row for each masking: shares answered, a number for each model."""
    rows = []
    for mode, k in studies[0].masked:
        name = {1: f"top {k}", -1: f"random {-k}", 0: "none"}[int(np.sign(k))]
        shares = np.array([s.masked[mode, k].mean(axis=0) for s in studies]).round(3)
        rows.append({"mode": mode, "masked": name, **dict(zip(studies[0].columns, shares.T))})
    return rows


def figure_of(studies: Sequence[Study]) -> Callable[[Any], None]:
    """The score map of the first model, and needles answered against heads masked."""

    def draw(page: Any) -> None:
        left, right = page.subplots(1, 2)
        image = left.imshow(studies[0].found.score, vmin=0, aspect="auto")
        left.set(xlabel="head", ylabel="layer", title="retrieval score")
        page.colorbar(image, ax=left, shrink=0.8)
        start = np.mean([s.masked["none", 0][0, 0] for s in studies])
        for mode in dict.fromkeys(mode for mode, _ in studies[0].masked if mode != "none"):
            for sign, style in ((1, "o-"), (-1, "x--")):
                ks = sorted(abs(k) for m, k in studies[0].masked if m == mode and k * sign > 0)
                line = [np.mean([s.masked[mode, sign * k][:, 0].mean() for s in studies])
                        for k in ks]  # fmt: skip
                label = f"{mode}, {'top' if sign > 0 else 'random'}"
                if ks:
                    right.plot([0, *ks], [start, *line], style, label=label)
        right.set(xlabel="heads masked", ylabel="needles answered", ylim=(-0.02, 1.02))
        right.legend(fontsize=7)

    return draw


def define_flags() -> None:
    """Defines the flags of this script."""
    common.define_flags("retrieval_heads")
    loading.define_model_flags()
    absl_flags.FLAGS.set_default("model", "lab")
    text, number = absl_flags.DEFINE_string, absl_flags.DEFINE_integer
    text("lengths", None, "Tokens of context: 64,128 or START:END:COUNT; default: of --size.")
    number("depths", None, "Depths of a needle, evenly spaced from 0 to 100 %.", lower_bound=1)
    number("num_needles", None, "Needles at every length and depth.", lower_bound=1)
    number("people", 3, "Lab language: people with a code in a text; one is asked about.",
           lower_bound=1)  # fmt: skip
    text("needles", None, "JSON list of needle, question, answer; default: the lab language.")
    text("haystack", None, "Text around the needles of --needles: files, directories or globs.")
    number("max_new", None, "Tokens generated at most; default: 50 (lab: the answer's).")
    text("mask_k", None, "Heads masked, such as 30,-30 (at random); default: around 5 %.")
    absl_flags.DEFINE_list("mode", list(MODES), "How heads are masked.")
    number("batch_size", 50, "Prompts at once, over all devices.", lower_bound=1)


def names_of(model: str, seeds: Sequence[int]) -> list[str]:
    """A model for each seed: the lab models differ by the seed of their training."""
    return [f"lab-{seed}" if model == "lab" and seed else model for seed in seeds]


def make_task(given: Any, tokenizer: Any, size: str, seed: int) -> Task:
    """The questions that the flags ask for."""
    asked = (given.lengths, given.depths, given.num_needles)
    text, count, num_needles = (a or b for a, b in zip(asked, GRIDS[size]))
    lengths, depths = spread(text), np.linspace(0, 100, count).tolist()
    options = dict(num_needles=num_needles, max_new=given.max_new, seed=seed)
    speaks_lab = tokenizer.digest == jh.Tokenizer.load("lab").digest
    if given.needles is None and speaks_lab:
        return lab_task(tokenizer, lengths, depths, people=given.people, **options)
    return file_task(tokenizer, lengths, depths, given.needles, given.haystack, **options)


def main() -> int:
    """Runs the experiment; returns its exit code."""
    given, run = absl_flags.FLAGS, common.options(has_real_size=True)
    unknown = [mode for mode in given.mode if mode not in MODES]
    if unknown:
        raise ValueError(f"--mode={unknown[0]} is not one of {', '.join(MODES)}.")
    studies, mask_k = [], []
    for name, seed in zip(names_of(given.model, run.seeds), run.seeds):
        model, tokenizer, mesh = loading.load(
            name, given.tokenizer, given.mesh, given.dtype, given.dcn_mesh
        )
        share = max(2, round(0.05 * model.cfg.num_layers * model.cfg.num_heads))
        curve = [share] if run.quick else [share // 2, share, 2 * share, 4 * share]
        random = [-share] if run.quick else [-share, -4 * share]
        mask_k = spread(given.mask_k) if given.mask_k else curve + random
        task = make_task(given, tokenizer, run.size, seed)
        with jax.set_mesh(mesh):
            one = study(
                model,
                task,
                mask_k=mask_k,
                modes=given.mode,
                num_random=2 if run.quick else NUM_RANDOM,
                batch_size=given.batch_size,
                seed=seed,
            )
        studies.append(one)
        print(head_table(one.found.score, title=f"\n{name}: {one.found.kept} of "
                         f"{len(task.instances)} needles answered"), flush=True)  # fmt: skip
        if len(studies) == 1:
            run.workdir.mkdir(parents=True, exist_ok=True)
            one.found.to_scores(model=name, meta=flags.provenance()).to_json(
                run.workdir / "heads.json"
            )
    return common.finish(
        claims_of(studies, mask_k),
        run.workdir,
        table=rows_of(studies),
        figure=figure_of(studies),
        data={
            "models": names_of(given.model, run.seeds),
            "kept": [[s.found.kept, len(s.found.recall)] for s in studies],
            "scores": [s.found.score for s in studies],
            "activation_frequency": [s.found.freq for s in studies],
        },
    )


if __name__ == "__main__":
    define_flags()
    flags.run(main)
