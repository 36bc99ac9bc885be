"""Train a vision transformer to classify images, on any mesh.

    python -m launch.train_vit --data=digits --workdir=runs/digits
    python -m launch.train_vit --data=cifar10.npz --mesh=data:8 --workdir=runs/cifar \\
        --set model.patch_size=4 --set model.model_dim=128 --set train.steps=5000
    python -m launch.train_vit --data=digits --model=runs/digits/model --set train.lr=1e-4

--data is "digits" (scikit-learn's, 8 x 8), "shapes" (drawn, 16 x 16) or an .npz file with train_x,
train_y, test_x, test_y. --model is a preset, fitted to the images, or a directory to train on.

WORKDIR gets config.json, metrics.jsonl, tensorboard/, model/ (a Hugging Face directory for
`jaxheads.load`) and result.json with the accuracy on the test images, which is printed too. Only
the last model is kept: a run that was stopped starts anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags as absl_flags

from jaxheads.fields import override, to_json, unknown
from launch import flags

SECTIONS = ("model", "train")


class Plan(NamedTuple):
    """What the flags ask for."""

    data: str
    model: str
    workdir: Path
    mesh: str
    train: Any
    """A `ClassifierTraining`."""
    model_settings: Mapping[str, str]


def resolve(
    *,
    data: str | None,
    model: str = "vit-tiny",
    workdir: str | None = None,
    mesh: str = "",
    set: Sequence[str] = (),
) -> Plan:
    """The run that flags describe; arguments as the flags of the same name.

    Raises:
      ValueError: for anything that cannot be read or does not fit together.
    """
    from jaxheads.models.vit import VIT_PRESETS
    from jaxheads.parallel.mesh import parse_mesh
    from jaxheads.training.classifier import ClassifierTraining

    if data is None:
        raise ValueError("--data is missing; give digits, shapes or the path of an .npz file.")
    settings = flags.parse_settings(set, SECTIONS)
    if model not in VIT_PRESETS and not Path(model).is_dir():
        raise ValueError(unknown("model", model, [*VIT_PRESETS, "a directory"]))
    if model not in VIT_PRESETS and settings["model"]:
        name = next(iter(settings["model"]))
        raise ValueError(f"--set model.{name}: the configuration of {model} is fixed; leave it.")
    for name in ("image_size", "channels", "num_classes"):
        if name in settings["model"]:
            raise ValueError(f"--set model.{name} follows from the data; leave it.")
    parse_mesh(mesh)
    return Plan(
        data=data,
        model=model,
        workdir=Path(workdir or f"runs/{Path(data).stem}"),
        mesh=mesh,
        train=override(ClassifierTraining(), settings["train"], section="train"),
        model_settings=settings["model"],
    )


def run(plan: Plan, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Trains, tests, and writes the workdir; returns what result.json holds."""
    from jaxheads import parallel
    from jaxheads.data.images import open_images
    from jaxheads.models.vit import VIT_PRESETS
    from jaxheads.parallel.multihost import is_main_process
    from jaxheads.training.classifier import fit, for_data

    mesh = parallel.make_mesh(plan.mesh)
    data = open_images(plan.data)
    if plan.model in VIT_PRESETS:
        # Settings last: a patch size that was asked for is used or refused.
        source = for_data(VIT_PRESETS[plan.model](), data)
        source = cfg = override(source, plan.model_settings, section="model")
    else:
        source = _load(plan.model, mesh)
        cfg = source.cfg
    config = {
        "model": to_json(cfg),
        "train": to_json(plan.train),
        "mesh": plan.mesh,
        "data": plan.data,
        **provenance,
    }
    if is_main_process():
        plan.workdir.mkdir(parents=True, exist_ok=True)
        flags.write_json(plan.workdir / "config.json", config)
    fitted = fit(source, data, plan.train, mesh=mesh, workdir=plan.workdir)
    result = {
        "test": fitted.test._asdict(),
        "test_images": len(data.test.labels),
        "steps": plan.train.steps,
        "seconds": round(fitted.seconds, 1),
    }
    if is_main_process():
        flags.write_json(plan.workdir / "result.json", result)
    return result


def _load(directory: str, mesh: Any) -> Any:
    from jaxheads.checkpoints import load
    from jaxheads.models.vit import ViT

    model = load(directory, mesh=mesh)
    if not isinstance(model, ViT):
        raise ValueError(f"--model={directory} holds a {type(model).__name__}, needed a ViT.")
    return model


def define_flags() -> None:
    """Defines the flags of this launcher."""
    flags.define_common()
    text = absl_flags.DEFINE_string
    text("data", None, "digits, shapes, or the path of an .npz file.")
    text("model", "vit-tiny", "A preset (vit-tiny, deit-s, ...) or a directory to train on.")
    text("mesh", "", "Devices per axis, for example data:8; one may be -1.")
    text("workdir", None, "Where everything is written; default: runs/DATA.")


def main() -> int:
    """Runs the command; returns the exit code."""
    import sys

    from jaxheads.parallel.multihost import is_main_process

    given = absl_flags.FLAGS
    names = ("data", "model", "workdir", "mesh", "set")
    try:
        plan = resolve(**{name: getattr(given, name) for name in names})
        result = run(plan, flags.provenance())
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    if is_main_process():
        print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    define_flags()
    flags.run(main)
