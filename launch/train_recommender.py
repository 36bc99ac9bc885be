"""Train a click model on a real log of behaviours, on any mesh.

    python -m launch.train_recommender --dataset=movielens --data_dir=ml-latest-small/ \\
        --model=dare --workdir=runs/movielens
    python -m launch.train_recommender --dataset=taobao --data_dir=taobao/ --model=dare \\
        --mesh=data:8 --workdir=runs/taobao --set model.representation_dim=128 \\
        --set model.attention_dim=64

The log is grouped by user into WORKDIR/data (or --grouped) the first time and mapped after that.
WORKDIR gets config.json, data/, metrics.jsonl, best/ (the model of the highest validation AUC, for
`launch.serve_recommender`) and result.json with its test scores, which are printed too.

`--set train.sparse_rows=rowwise_adagrad` (or adam) updates only the rows that a batch reads.

taobao and tmall follow the paper: histories of 200, users with 210 events, 19 training events each,
2 epochs in batches of 2048, Adam 0.01. MovieLens is small, so every event but the last two trains.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags as absl_flags

from jaxheads.fields import from_json, override, to_json, unknown
from launch import flags

SECTIONS = ("model", "samples", "train")
SAMPLES: Mapping[str, Mapping[str, int]] = {
    "taobao": {},
    "tmall": {},
    "movielens": dict(history=100, min_events=22, train_targets=2000, stride=1, batch_size=512),
}
EPOCHS = 2
_ODD = {
    "unsorted": "come before an earlier one of their user: sorted by time",
    "repeated": "repeat user, item and time of another: kept",
    "other_category": "have another category than the first one of their item: kept",
}


class Plan(NamedTuple):
    """What the flags ask for."""

    dataset: str
    data_dir: str
    grouped: Path
    workdir: Path
    mesh: str
    samples: Any
    """A `SampleConfig` of the training samples."""
    train: Any
    """A `TrainSettings`; steps=0 stands for epochs."""
    epochs: float
    model: str
    model_settings: Mapping[str, str]
    max_bad_rows: int | None


def resolve(
    *,
    dataset: str | None,
    data_dir: str | None,
    model: str = "dare",
    workdir: str | None = None,
    grouped: str | None = None,
    mesh: str = "",
    epochs: float | None = None,
    max_bad_rows: int | None = None,
    set: Sequence[str] = (),
) -> Plan:
    """The run that flags describe; arguments as the flags of the same name.

    Raises:
      ValueError: for anything that cannot be read or does not fit together.
    """
    from jaxheads.data import SampleConfig
    from jaxheads.data.behaviour_logs import LAYOUTS
    from jaxheads.models.recommender import RECOMMENDERS
    from jaxheads.parallel.mesh import parse_mesh
    from jaxheads.training.recommender import TrainSettings

    if dataset is None:
        raise ValueError(f"--dataset is missing; give one of {', '.join(LAYOUTS)}.")
    if dataset not in LAYOUTS:
        raise ValueError(unknown("dataset", dataset, LAYOUTS))
    if model not in RECOMMENDERS:
        raise ValueError(unknown("model", model, RECOMMENDERS))
    settings = flags.parse_settings(set, SECTIONS)
    if epochs is not None and "steps" in settings["train"]:
        raise ValueError("--epochs and --set train.steps both set the length; give one of them.")
    if epochs is not None and not epochs > 0:
        raise ValueError(f"--epochs={epochs} must be above 0.")
    for field in ("num_items", "num_categories", "row_multiple"):
        if field in settings["model"]:
            raise ValueError(f"--set model.{field} follows from the data and the mesh; leave it.")
    samples = override(
        from_json(SampleConfig, dict(SAMPLES[dataset])), settings["samples"], section="samples"
    )
    if samples.split != "train":
        raise ValueError(
            f"--set samples.split={samples.split}: the samples trained on are 'train'."
        )
    parse_mesh(mesh)
    directory = Path(workdir or f"runs/{dataset}").expanduser()
    return Plan(
        dataset=dataset,
        data_dir=data_dir or "",
        grouped=Path(grouped).expanduser() if grouped else directory / "data",
        workdir=directory,
        mesh=mesh,
        samples=samples,
        train=override(TrainSettings(), settings["train"], section="train"),
        epochs=0.0 if "steps" in settings["train"] else epochs or EPOCHS,
        model=model,
        model_settings=settings["model"],
        max_bad_rows=max_bad_rows,
    )


def open_data(plan: Plan) -> Any:
    """The grouped data of a plan; groups the log where that has not been done.

    Of several processes, process 0 groups while the others wait.
    """
    from jaxheads.data import group_events, open_behaviours, open_log
    from jaxheads.parallel.multihost import is_main_process, wait_for_all

    if is_main_process() and not plan.grouped.exists():
        if not plan.data_dir:
            raise ValueError(
                f"--data_dir is missing, and {plan.grouped} holds no grouped data set; give the "
                "directory of the log."
            )
        log = open_log(plan.dataset, plan.data_dir, max_bad_rows=plan.max_bad_rows)
        data = group_events(log, plan.grouped)
        print(f"{log.path.name}: {log.report}", file=sys.stderr)
        print(data, file=sys.stderr)
        for kind, words in _ODD.items():
            if count := data.info[f"{kind}_events"]:
                first = ", ".join(map(str, data.info[f"first_{kind}_lines"]))
                print(f"{count} events {words} (first lines: {first})", file=sys.stderr)
    wait_for_all(f"grouped {plan.grouped}")
    return open_behaviours(plan.grouped)


def run(plan: Plan, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Trains, tests, and writes the workdir; returns what result.json holds."""
    from jaxheads import parallel
    from jaxheads.checkpoints import recommender as files
    from jaxheads.data import eval_samples, make_samples
    from jaxheads.data.behaviour_samples import Samples
    from jaxheads.models.recommender import RECOMMENDERS
    from jaxheads.parallel.multihost import is_main_process
    from jaxheads.training import recommender as training

    mesh = parallel.make_mesh(plan.mesh)
    index, count = training.data_process(mesh, plan.samples.batch_size)
    data = open_data(plan)
    cfg = RECOMMENDERS[plan.model](
        data.num_items,
        data.num_categories,
        num_times=max(2000, plan.samples.history + 1),
        row_multiple=mesh.size,
    )
    cfg = override(cfg, plan.model_settings, section="model")
    train = plan.train
    if plan.epochs:
        steps = plan.epochs * len(Samples(data, plan.samples)) / plan.samples.batch_size
        train = dataclasses.replace(train, steps=max(1, round(steps)))
    config = {
        "model": to_json(cfg),
        "samples": to_json(plan.samples),
        "train": to_json(train),
        "mesh": plan.mesh,
        "dataset": plan.dataset,
        "data": data.info,
        **provenance,
    }
    if is_main_process():
        plan.workdir.mkdir(parents=True, exist_ok=True)
    flags.write_json(plan.workdir / "config.json", config)
    where = dict(process_index=index, process_count=count)

    def samples(split: str) -> Any:
        return eval_samples(data, dataclasses.replace(plan.samples, split=split), **where)

    batches = make_samples(data, plan.samples, **where)
    try:
        fitted = training.fit(
            cfg,
            batches,
            lambda: samples("validation"),
            plan.workdir,
            train,
            mesh=mesh,
            extra={"dataset": plan.dataset, "history": plan.samples.history},
        )
    finally:
        batches.close()
    best = files.load(plan.workdir / training.BEST, mesh=mesh)
    test = training.evaluate(*best, samples("test"), mesh=mesh)
    result = {
        "model": plan.model,
        "test": test._asdict(),
        "validation": fitted.scores._asdict(),
        "best_step": fitted.step,
        "steps": train.steps,
        "train_seconds": round(fitted.seconds, 1),
    }
    if is_main_process():
        flags.write_json(plan.workdir / "result.json", result)
    return result


def define_flags() -> None:
    """Defines the flags of this launcher."""
    flags.define_common()
    text = absl_flags.DEFINE_string
    text("dataset", None, "taobao, tmall or movielens.")
    text("data_dir", None, "Directory with its files, as they are distributed (or gzipped).")
    text("grouped", None, "Directory of the grouped data set; default: WORKDIR/data.")
    text("model", "dare", "A preset: dare, twin, twin-projection, din, ...")
    text("mesh", "", "Devices per axis, for example data:8; one may be -1.")
    text("workdir", None, "Where everything is written; default: runs/DATASET.")
    absl_flags.DEFINE_float("epochs", None, f"Passes over the training samples; default {EPOCHS}.")
    absl_flags.DEFINE_integer("max_bad_rows", None, "More malformed rows are an error.")


def main() -> int:
    """Runs the command; returns the exit code."""
    from jaxheads.parallel.multihost import is_main_process

    given = absl_flags.FLAGS
    logging.getLogger("jaxheads.training.recommender").setLevel(logging.INFO)
    names = ("dataset", "data_dir", "model", "workdir", "grouped", "mesh", "epochs", "set")
    settings = {name: getattr(given, name) for name in (*names, "max_bad_rows")}
    try:
        result = run(resolve(**settings), flags.provenance())
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    if is_main_process():
        print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    define_flags()
    flags.run(main)
