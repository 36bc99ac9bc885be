"""Train or fine-tune a decoder language model on a mesh.

    python -m launch.train --workdir=runs/tiny --simulated_devices=8 --mesh=data:2,model:4
    python -m launch.train --model=llama3-8b --data=corpus/ --mesh=fsdp:-1 --workdir=runs/llama \\
        --seq_len=8192 --batch_size=64 --steps=10000 --set data.tokenizer=tokenizer.json \\
        --set model.remat=full --set train.lr=3e-4 --set train.warmup_steps=200
    python -m launch.train --model=path/to/model --data=notes.txt --workdir=runs/tuned

Without --data it reads the source of the Python standard library. The same command again goes on
where the run ended. WORKDIR gets config.json, metrics.jsonl, tensorboard/, checkpoints/,
tokenizer.json, sample.txt, compile_cache/ and, with --profile, profile/.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags as absl_flags

from jaxheads.fields import from_json, override, unknown
from launch import compile_cache, flags

SECTIONS = ("model", "data", "train", "sample")
# The everyday flags that are short names of fields.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "data": ("data.path",),
    "steps": ("train.steps",),
    "batch_size": ("data.batch_size",),
    "seq_len": ("data.seq_len",),
    "seed": ("train.seed", "data.seed"),
    "dtype": ("model.compute_dtype",),
}


class Plan(NamedTuple):
    """What the flags ask for."""

    run: Any
    """A `training.loop.RunConfig`."""
    load: Callable[[], Any] | None
    """Gives the parameters to start from, None for new ones."""


def parse_profile(text: str) -> dict[str, str]:
    """``"10:15"``: trace steps 10 to 14, as settings of the section `train`."""
    start, colon, stop = text.partition(":")
    if not (colon and start.isdigit() and stop.isdigit() and 1 <= int(start) < int(stop)):
        raise ValueError(
            f"profile={text!r} cannot be read; write START:STOP with 1 <= START < STOP, for "
            "example 10:15."
        )
    return {"profile_start": start, "profile_steps": str(int(stop) - int(start))}


def resolve(
    *,
    model: str | None = None,
    workdir: str | None = None,
    mesh: str | None = None,
    dcn_mesh: str | None = None,
    profile: str | None = None,
    config: str | None = None,
    set: Sequence[str] = (),
    **everyday: str | None,
) -> Plan:
    """The run that flags describe; arguments as the flags of the same name, None when not given.

    Raises:
      ValueError: for anything that cannot be read or does not fit together.
    """
    from jaxheads.data import DataConfig
    from jaxheads.training.configs import TrainConfig
    from jaxheads.training.loop import RunConfig, SampleConfig

    settings = flags.parse_settings(set, SECTIONS)
    for name, value in everyday.items():
        if value is not None:
            _add(settings, dict.fromkeys(FIELDS[name], value), f"--{name}")
    if profile:
        fields = {f"train.{field}": text for field, text in parse_profile(profile).items()}
        _add(settings, fields, "--profile")

    base = _read_config(config) if config else {}
    kinds = {"data": DataConfig, "train": TrainConfig, "sample": SampleConfig}
    # A long run should not lose everything, nor go unwatched, because nobody set these.
    base = {"train": {"eval_every": 200, "checkpoint_every": 200}, **base}
    sections = {
        name: override(
            from_json(kind, base.get(name, {}), section=name), settings[name], section=name
        )
        for name, kind in kinds.items()
    }
    name = model or ("" if "model" in base else "tiny")
    cfg, data, source = _resolve_model(name, base, settings, sections["data"])
    run = RunConfig(
        model=cfg,
        data=data,
        train=sections["train"],
        sample=sections["sample"],
        mesh=str(base.get("mesh", "")) if mesh is None else mesh,
        dcn_mesh=str(base.get("dcn_mesh", "")) if dcn_mesh is None else dcn_mesh,
        workdir=f"runs/{Path(name or 'model').name}" if workdir is None else workdir,
    )
    return Plan(run, None if source is None else lambda: _load(source, run))


def _add(settings: dict[str, dict[str, str]], fields: Mapping[str, str], flag: str) -> None:
    for name, text in fields.items():
        section, _, field = name.partition(".")
        if field not in settings[section]:
            settings[section][field] = text
        elif flag != "--seed":  # seeds may be set apart
            raise ValueError(f"{flag} and --set {name} both set {name}; give one of them.")


def _read_config(path: str) -> dict[str, Any]:
    from jaxheads.checkpoints.directory import ASSETS

    file = Path(path).expanduser()
    shipped = ASSETS / path / "training.json"
    if not file.exists() and shipped.is_file():  # the recipe of a shipped model, by its name
        file = shipped
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config={path!r} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config={path!r} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"config={path!r} must hold a JSON object, as config.json of a run does.")
    own = {*SECTIONS, "mesh", "dcn_mesh", "workdir", "command", "versions", "git"}
    for name in content:
        if name not in own:
            raise ValueError(f"config={path!r}: {unknown('section', name, own)}")
    return content


def _resolve_model(name: str, base, settings, data):
    """(ModelConfig, DataConfig, directory of weights or None) of --model and its settings."""
    from jaxheads.checkpoints.directory import locate
    from jaxheads.data import Tokenizer
    from jaxheads.models import PRESETS, ModelConfig

    ours = settings["model"]
    if not name:
        return override(from_json(ModelConfig, base["model"]), ours, section="model"), data, None
    if name in PRESETS:
        cfg = override(PRESETS[name](), ours, section="model")
        if "vocab_size" not in ours:
            tokenizer = Tokenizer.load(data.tokenizer)
            size = tokenizer.vocab_size + (1 if data.landmark_block else 0)
            cfg = dataclasses.replace(cfg, vocab_size=size)
        return cfg, data, None
    try:
        path = locate(name)
    except ValueError as error:
        message = f"model={name!r}: {unknown('preset', name, PRESETS)} Nor is it weights: {error}"
        raise ValueError(message) from error
    stored, tokenizer = _stored(path)
    if "tokenizer" not in settings["data"] and tokenizer is not None:
        data = dataclasses.replace(data, tokenizer=tokenizer)
    cfg = override(stored, ours, section="model")
    _check_same_parameters(stored, cfg, name)
    return cfg, data, path


def _stored(path: Path):
    """(ModelConfig, tokenizer or None) of a directory with weights."""
    from jaxheads.checkpoints import orbax

    if orbax.is_checkpoint(path):
        content = orbax.load_config(path)
        return content["model"], content["data"].tokenizer
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model={str(path)!r} holds neither config.json and weights (Hugging Face) nor "
            "checkpoints of a training run."
        )
    from jaxheads.checkpoints.directory import read_json
    from jaxheads.checkpoints.families import from_hf

    cfg = from_hf(read_json(path / "config.json"))
    return cfg, str(path) if (path / "tokenizer.json").is_file() else None


def _check_same_parameters(stored, cfg, name: str) -> None:
    """Raise when settings change the parameters that are to be loaded."""
    import jax
    from flax import nnx

    from jaxheads.checkpoints.orbax import flatten
    from jaxheads.models import Decoder

    def parameters(cfg):
        tree = jax.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))
        return {name: array.shape for name, array in flatten(tree).items()}

    shapes = parameters(stored), parameters(cfg)
    changed = sorted(n for n in shapes[0] | shapes[1] if shapes[0].get(n) != shapes[1].get(n))
    if changed:
        raise ValueError(
            f"model={name!r}: the settings of --set model.* change its parameters "
            f"({', '.join(changed[:4])}{', ...' if len(changed) > 4 else ''}), which are loaded; "
            "change only how they are used."
        )


def _load(path: Path, run):
    """The stored parameters on the run's mesh, under the run's configuration."""
    import jaxheads as jh
    from jaxheads.models import with_config

    mesh = jh.parallel.make_mesh(run.mesh, dcn=run.dcn_mesh)
    model = jh.load(path, dtype=run.model.param_dtype, mesh=mesh)
    fields = dataclasses.fields(run.model)
    return with_config(model, **{f.name: getattr(run.model, f.name) for f in fields})


def define_flags(into: absl_flags.FlagValues = absl_flags.FLAGS) -> None:
    """Defines the flags of this launcher."""
    flags.define_common(into)
    text = functools.partial(absl_flags.DEFINE_string, flag_values=into)
    text(
        "model",
        None,
        "A preset (tiny, llama3-8b, ...), or weights to fine-tune: a directory or name.",
    )
    text("data", None, "Text to train on: files, directories or globs; default: stdlib.")
    text("mesh", None, "Devices per axis, for example data:2,model:4; one may be -1.")
    text("dcn_mesh", None, "Axes over slices, for example data:4; --mesh is then of one slice.")
    text("steps", None, "Steps of the whole run.")
    text("batch_size", None, "Sequences in a step, over all devices.")
    text("seq_len", None, "Tokens in a sequence.")
    text("seed", None, "Of the initial parameters, the order of the data, and sampling.")
    text("workdir", None, "Where everything is written; default: runs/MODEL.")
    text("dtype", None, "Of computation: auto, float32 or bfloat16.")
    text("profile", None, "START:STOP: steps to trace into WORKDIR/profile.")
    text("config", None, "Settings to start from: config.json of another run, or lab.")
    text(
        "compile_cache",
        compile_cache.AUTO,
        "Where compiled programs are kept: a directory, off, or auto: JAX_COMPILATION_CACHE_DIR, "
        f"else WORKDIR/{compile_cache.FOLDER}.",
    )
    absl_flags.DEFINE_bool(
        "resume", True, "Go on from the newest checkpoint in the workdir.", flag_values=into
    )
    absl_flags.DEFINE_integer(
        "stop_exit_code",
        0,
        "Exit code of a run that a signal ended before its last step.",
        lower_bound=0,
        upper_bound=125,
        flag_values=into,
    )


def resolve_flags(given: absl_flags.FlagValues) -> Plan:
    """`resolve` of flags that `define_flags` defined and a command line set."""
    names = ("model", "workdir", "mesh", "dcn_mesh", "profile", "config", "set", *FIELDS)
    settings: dict[str, Any] = {name: given[name].value for name in names}
    return resolve(**settings)


def main() -> int:
    """Runs the command; returns the exit code."""
    from jaxheads.training.loop import train
    from jaxheads.training.watch import NonFiniteLossError

    given = absl_flags.FLAGS
    plan = resolve_flags(given)
    compile_cache.enable(given.compile_cache, plan.run.workdir)
    try:
        result = train(
            plan.run, model=plan.load, resume=given.resume, provenance=flags.provenance()
        )
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return given.stop_exit_code if result.stopped_by else 0


if __name__ == "__main__":
    define_flags()
    flags.run(main)
