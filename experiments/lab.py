"""What the shipped lab models can do: accuracy on every task, on contents they never saw.

    python -m experiments.lab                         the shipped models
    python -m experiments.lab --models=runs/lab       another one
    python -m experiments.lab --train=lab,lab-1       trains them again, into the package

Training has two runs: `python -m launch.train --config=lab` with the settings of `RECIPES`, then
`--config=lab/colors` from there, on text of which 30 % asks for colours of objects.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags as absl_flags

from experiments import common
from jaxheads.checkpoints.directory import ASSETS
from jaxheads.fields import unknown
from launch import flags

RECIPES: Mapping[str, tuple[str, ...]] = {
    "lab": ("--seed=0",),
    "lab-1": ("--seed=1",),
    "lab-2": ("--seed=2",),
    "lab-gqa": ("--seed=0", "--set", "model.num_kv_heads=2"),
}
"""shipped model -> its settings beside ``--config=lab``; the second run is the same for all"""
MODELS = tuple(name for name in RECIPES if (ASSETS / name / "config.json").is_file())
"""Those that this version of the package has."""
SEEDS = tuple(name for name in MODELS if name != "lab-gqa")
"""The shipped model, and the same recipe with other seeds."""
LEARNED = {
    "induction": 0.95,
    "needle": 0.95,
    "ioi": 0.95,
    "successors": 0.95,
    "multiple_choice": 0.95,
}
"""Tasks that a model has to know, and how well."""
CONTESTED = ("colored_objects", "conflict")
"""Tasks on which a model has to be of two minds: from 30 to 80 %, or nothing is left to explain."""
OPTIONS: Mapping[str, dict[str, Any]] = {
    "colored_objects": {"capitalised": False, "order": "either"},
    "needle": {"code_words": 3, "needles": 3},
}
"""How the lab language is asked."""
COUNT = 150  # some tasks have hardly more held-out questions


def define_flags() -> None:
    """Defines the flags of this experiment."""
    common.define_flags("lab")
    absl_flags.DEFINE_list("models", list(MODELS), "Shipped names or directories.")
    absl_flags.DEFINE_list("train", [], "Shipped models to train again first.")


def train(name: str) -> None:
    """Trains a shipped model in runs/`name` and puts it into the package."""
    import jaxheads as jh

    if name not in RECIPES:
        raise ValueError(f"--train: {unknown('model', name, RECIPES)}")
    first, last = f"runs/{name}-first", f"runs/{name}"
    for command in (
        ["--config=lab", f"--workdir={first}", *RECIPES[name]],
        ["--config=lab/colors", f"--model={first}", f"--workdir={last}"],
    ):
        print("python -m launch.train", *command, flush=True)
        subprocess.run([sys.executable, "-m", "launch.train", *command], check=True)
    jh.save(jh.load(last), ASSETS / name)
    jh.Tokenizer.load("lab").save(ASSETS / name)


def card(name: str, found: Mapping[str, float]) -> str:
    """README.md of a shipped model: how it was made, and its accuracy on held-out questions."""
    rows = [{"task": task, "accuracy": share} for task, share in found.items()]
    return "\n".join([
        f"# {name}",
        "",
        "Trained on the lab language (docs/lab.md) and measured on held-out questions by",
        "",
        f"    python -m experiments.lab --train={name} --models={name}",
        "",
        common.markdown(rows),
    ])  # fmt: skip


def measure(name: str, count: int) -> dict[str, float]:
    """task -> share of right answers on held-out contents."""
    import jaxheads as jh
    from jaxheads.data.tasks import TASKS, generate
    from jaxheads.evaluation import answers_right

    model, tokenizer = jh.load(name), jh.Tokenizer.load(name)
    found = {}
    asked = {task: (task, OPTIONS.get(task, {})) for task in TASKS}
    for order in ("before", "after"):
        options = {**OPTIONS["colored_objects"], "order": order}
        asked[f"colored_objects, colours {order}"] = ("colored_objects", options)
    for row, (task, options) in asked.items():
        wanted = min(count, 60) if task in ("facts", "successors") else count
        pairs = generate(task, tokenizer, wanted, split="heldout", **options)
        found[row] = float(answers_right(jh.forward, model, tokenizer, pairs).mean())
    return found


def main() -> int:
    """Runs the experiment; returns its exit code."""
    run = common.options()
    names = absl_flags.FLAGS.models
    for name in absl_flags.FLAGS.train:
        train(name)
    found = {name: measure(name, 30 if run.quick else COUNT) for name in names}
    for name in set(names).intersection(absl_flags.FLAGS.train):
        (ASSETS / name / "README.md").write_text(card(name, found[name]), encoding="utf-8")
    claims = [
        common.at_least(f"{name}: {task}", found[name][task], bound)
        for name in names
        for task, bound in LEARNED.items()
    ]
    for name in names:
        for task in CONTESTED:
            share = found[name][task]
            holds = 0.3 <= share <= 0.8
            claims.append(common.Claim(f"{name}: {task}", share, "0.3 to 0.8", holds))
    table = [{"task": task, **{n: found[n][task] for n in names}} for task in found[names[0]]]
    return common.finish(claims, run.workdir, table=table)


if __name__ == "__main__":
    define_flags()
    flags.run(main)
