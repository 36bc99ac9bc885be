"""A training run that is to be started elsewhere: its flags, checked here.

What `launch.train` would refuse on the cluster it refuses here, by the same code: the flags are
parsed by its own parser and resolved to its `RunConfig`, and the mesh and the batch are compared
with the devices that are asked for.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags as absl_flags

from jaxheads.fields import unknown
from jaxheads.parallel.multihost import TRY_AGAIN
from launch import train

STOPPED = TRY_AGAIN
"""Exit code of a run that ended before its last step for a reason of the cluster's."""
_SECRET = re.compile(r"token|secret|passw|credential|api_?key|private", re.IGNORECASE)
_OURS = {"processes": "auto", "stop_exit_code": str(STOPPED)}


@dataclass(frozen=True)
class Job:
    """A checked run of `launch.train`."""

    flags: tuple[str, ...]
    """Arguments of launch.train."""
    run: Any
    """Their `training.loop.RunConfig`; without the model's own where its weights are not here."""
    model_is_here: bool = True
    env: Mapping[str, str] = field(default_factory=dict)

    def command(self, python: str = "python") -> list[str]:
        """The command of one process, as a list of arguments."""
        return [python, "-m", "launch.train", *self.flags]

    def shell_command(self, python: str = "python") -> str:
        """The command of one process, quoted for a shell, with its environment before it."""
        env = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.env.items())]
        return " ".join([*env, shlex.join(self.command(python))])


def make_job(
    flags: Sequence[str],
    *,
    env: Sequence[str] = (),
    devices: int | None = None,
    slices: int = 1,
    distributed: bool = True,
    also: Iterable[str] = (),
) -> Job:
    """Checks the flags of a training run.

    Args:
      flags: as after ``python -m launch.train``.
      env: NAME=VALUE pairs for its environment.
      devices: how many it will have in a slice; None: not known.
      slices: how many slices it will have.
      distributed: whether its processes find each other (``--processes=auto``).
      also: names of flags that are not launch.train's but could have been meant.
    Raises:
      ValueError, TypeError: what launch.train itself would say, and for flags that make no sense
        on a cluster.
    """
    given = _parse(flags, also)
    if given.simulated_devices:
        raise ValueError("--simulated_devices is for one machine without accelerators; leave it.")
    if not given.resume:
        raise ValueError(
            "--resume=false would throw away the run at every restart; give a new --workdir."
        )
    ours = _OURS if distributed else {"stop_exit_code": _OURS["stop_exit_code"]}
    for name, value in ours.items():
        if given[name].present and str(given[name].value) != value:
            raise ValueError(f"--{name} is set by the launcher (to {value}); leave it out.")
    run, is_here = _resolve(given)
    if not Path(run.workdir).is_absolute():
        raise ValueError(
            f"workdir={run.workdir!r} must be an absolute path that every machine of the run sees, "
            "for example on a network file system; checkpoints are written there by all of them."
        )
    if devices is not None:
        _check_devices(run, devices, slices)
    mine = [f"--{name}={value}" for name, value in ours.items() if not given[name].present]
    return Job((*flags, *mine), run, is_here, parse_env(env))


def _parse(flags: Sequence[str], also: Iterable[str]) -> Any:
    """The flags by launch.train's own parser."""
    given = absl_flags.FlagValues()
    train.define_flags(given)
    try:
        rest = given(["launch.train", *flags])
    except absl_flags.UnrecognizedFlagError as error:
        raise ValueError(unknown("flag", error.flagname, [*also, *given])) from error
    except absl_flags.Error as error:
        raise ValueError(f"launch.train: {error}") from error
    if rest[1:]:
        raise ValueError(
            f"launch.train: unexpected argument {rest[1]!r}; flags are written --name=value."
        )
    return given


def _resolve(given: Any) -> tuple[Any, bool]:
    """(RunConfig, whether the model could be looked at)."""
    name = given.model
    if name is None or not Path(name).is_absolute() or Path(name).exists():
        return train.resolve_flags(given).run, True
    # The weights lie on the cluster: all but the model's own settings can be checked.
    given.model = None
    given.set = [text for text in given.set if not text.strip().startswith("model.")]
    if given["dtype"].present:
        given.dtype = None
    return train.resolve_flags(given).run, False


def _check_devices(run: Any, devices: int, slices: int) -> None:
    """Raise unless the meshes and the batch fit the devices and the slices."""
    from jaxheads.parallel.mesh import MESH_AXES, mesh_shape, parse_mesh
    from jaxheads.training.loop import check_run

    outer = parse_mesh(run.dcn_mesh)
    if slices > 1 and not outer:
        raise ValueError(
            f"--slices={slices} needs an axis over the slices, for example "
            f"--dcn_mesh=data:{slices}; --mesh is then of one slice."
        )
    try:
        over = mesh_shape(outer, slices, exact=True)
    except ValueError as error:
        raise ValueError(
            f"dcn_mesh={run.dcn_mesh!r} does not name {slices} slice{'s' if slices > 1 else ''}; "
            "its sizes multiply to --slices."
        ) from error
    inside = mesh_shape(parse_mesh(run.mesh), devices, exact=True)
    shape = {axis: m * n for axis, m, n in zip(MESH_AXES, over, inside)}
    check_run(run, SimpleNamespace(shape=shape))  # type: ignore[arg-type]


def parse_env(pairs: Sequence[str]) -> dict[str, str]:
    """``["A=1"]`` as ``{"A": "1"}``.

    Raises:
      ValueError: for text that is no NAME=VALUE, and for names of secrets: what is rendered here is
        readable text that ends up in files, process lists and logs.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (equals and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)):
            raise ValueError(f"env={pair!r} cannot be read; write NAME=VALUE.")
        if _SECRET.search(name):
            raise ValueError(
                f"env={name!r} looks like a secret, and everything here is written as readable "
                "text; give it to the machine by its own means (a service account, a mounted "
                "secret, a file only you can read)."
            )
        if name in found:
            raise ValueError(f"env={name!r} is given twice.")
        found[name] = value
    return found


def check_name(flag: str, value: str | None, pattern: str, needed: str) -> str:
    """`value` when it matches all of `pattern`; an error that names flag, value and rule if not."""
    if not value:
        raise ValueError(f"--{flag} is missing; give {needed}.")
    if not re.fullmatch(pattern, value):
        raise ValueError(f"--{flag}={value!r} is not {needed}.")
    return value
