"""DARE against its baselines on a real log: `python -m experiments.dare --dataset=...`.

    python -m experiments.dare --dataset=movielens --data_dir=ml-latest-small/     # minutes
    python -m experiments.dare --dataset=taobao --data_dir=taobao/ --embedding_dim=16 \\
        --seeds=0,1,2,3,4 --mesh=data:8

Every model is trained and tested by `launch.train_recommender` with the settings of the data set,
once a seed (of parameters, negatives and order), on data that is grouped once. The claims are those
of the paper for Taobao at 16 numbers a field (five seeds: DARE .92568, TWIN .91688).
Feng et al., 2024, arXiv:2410.02604.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags as absl_flags

from experiments import common
from launch import flags, train_recommender

MODELS = ("dare", "twin", "twin-projection", "twin-no-tr", "twin-4e", "din")
MARGIN = 0.004
"""AUC by which DARE is above TWIN."""


def define_flags() -> None:
    """Defines the flags of runs on real logs."""
    text = absl_flags.DEFINE_string
    text("dataset", None, "taobao, tmall or movielens: a real log instead of the synthetic one.")
    text("data_dir", None, "Directory with the files of --dataset.")
    text("mesh", "", "Devices per axis for --dataset, for example data:8; one may be -1.")
    absl_flags.DEFINE_integer("embedding_dim", 16, "Numbers a field, for --dataset.", lower_bound=1)
    absl_flags.DEFINE_list("models", list(MODELS), "Presets to compare on --dataset.")


def decide(scores: Mapping[str, Sequence[float]]) -> list[common.Claim]:
    """DARE over TWIN by `MARGIN`, and over every other model, in mean AUC over seeds."""
    ours = np.asarray(scores["dare"])
    return [
        common.at_least(
            f"test AUC of DARE over {name}",
            ours - np.asarray(found),
            MARGIN if name == "twin" else 0.0,
        )
        for name, found in scores.items()
        if name != "dare"
    ]


def plan(given: Any, run: common.Options, model: str, seed: int) -> train_recommender.Plan:
    """The run of one model and seed.

    Raises:
      ValueError: as `launch.train_recommender.resolve`.
    """
    ours = [
        f"model.representation_dim={given.embedding_dim}",
        f"train.seed={seed}",
        f"samples.seed={seed}",
        *(["train.steps=2"] if run.quick else []),
    ]
    return train_recommender.resolve(
        dataset=given.dataset,
        data_dir=given.data_dir,
        model=model,
        mesh=given.mesh,
        workdir=str(run.workdir / f"{model}-{seed}"),
        grouped=str(run.workdir / f"data-{given.dataset}"),
        set=[*ours, *given.set],
    )


def main(run: common.Options, given: Any) -> int:
    """Trains and tests every model on every seed, then decides the claims.

    Args:
      run: seeds and workdir.
      given: values of the flags of `define_flags`.
    """
    if "dare" not in given.models or len(set(given.models)) < 2:
        raise ValueError(
            f"--models={','.join(given.models)} needs dare and one to compare it with."
        )
    plans = {m: [plan(given, run, m, seed) for seed in run.seeds] for m in given.models}
    scores: dict[str, list[float]] = {}
    rows, seconds = [], 0.0
    for model, each in plans.items():
        results = [train_recommender.run(one, flags.provenance()) for one in each]
        scores[model] = [result["test"]["auc"] for result in results]
        seconds += sum(result["train_seconds"] for result in results)
        mean = lambda name, found=results: round(
            float(np.mean([r["test"][name] for r in found])), 4
        )
        rows.append(
            {
                "model": model,
                "AUC": mean("auc"),
                "AUC of each seed": [round(score, 4) for score in scores[model]],
                "grouped AUC": mean("gauc"),
                "log-loss": mean("logloss"),
                "steps": results[0]["steps"],
            }
        )
        print(rows[-1], flush=True)
    return common.finish(
        decide(scores),
        run.workdir,
        table=rows,
        data={"dataset": given.dataset, "seeds": run.seeds, "train_seconds": round(seconds, 1)},
    )
