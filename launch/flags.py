"""What all launchers share: ``--set``, simulated devices, and clean error messages.

flags.set_flag()                                   # defines --set, --debug, --simulated_devices
settings = flags.settings(("model", "data"))       # {"model": {"num_layers": "6"}, "data": {}}
cfg = fields.override(cfg, settings["model"], section="model")
if __name__ == "__main__":
    flags.run(main)
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from jaxheads.fields import unknown

EXIT_BAD_INPUT = 2
EXIT_TRY_AGAIN = 75  # as `jaxheads.parallel.multihost.TRY_AGAIN`
_USER_ERRORS = (ValueError, TypeError, NotImplementedError, OSError, ImportError)


def define_common(into: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags that every launcher has."""
    flags.DEFINE_multi_string(
        "set",
        [],
        "SECTION.FIELD=VALUE, for example train.lr=3e-4; may be given many times.",
        flag_values=into,
    )
    flags.DEFINE_integer(
        "simulated_devices",
        0,
        "Run on this many simulated CPU devices.",
        lower_bound=0,
        flag_values=into,
    )
    flags.DEFINE_string(
        "processes",
        None,
        "Run together with other processes: 'auto' on TPU pods, GKE, SLURM and under MPI, or "
        "HOST:PORT,INDEX,COUNT with the address of process 0.",
        flag_values=into,
    )
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.", flag_values=into)


def parse_settings(
    assignments: Sequence[str], sections: Sequence[str]
) -> dict[str, dict[str, str]]:
    """``["model.num_layers=6"]`` as ``{"model": {"num_layers": "6"}, ...}``, a key per section.

    Raises:
      ValueError: for text without a section, field or ``=``, an unknown section, and a field that
        is given twice.
    """
    settings: dict[str, dict[str, str]] = {section: {} for section in sections}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        section, dot, field = name.strip().partition(".")
        if not (equals and dot and section and field):
            raise ValueError(
                f"--set {assignment!r} cannot be read; write SECTION.FIELD=VALUE, for example "
                f"--set {sections[0]}.FIELD=VALUE with a section of {', '.join(sections)}."
            )
        if section not in settings:
            raise ValueError(f"--set {assignment!r}: {unknown('section', section, sections)}")
        if field in settings[section]:
            raise ValueError(f"--set {name.strip()} is given twice.")
        settings[section][field] = value.strip()
    return settings


def simulate_devices(count: int) -> None:
    """Makes JAX show `count` CPU devices; call before anything touches a device.

    Raises:
      ValueError: when JAX already uses its devices.
    """
    import jax

    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise ValueError(
            f"simulated_devices={count} comes too late: JAX already uses "
            f"{jax.device_count()} devices; set it before the first computation."
        ) from error


def run(main: Callable[[], int | None]) -> None:
    """Runs ``main()`` as a command: its result is the exit code, bad input is a message and 2.

    The exceptions that a user can cause (`_USER_ERRORS`) print as one message; ``--debug`` shows
    where it came from.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
        except flags.Error as error:
            _fail(f"{error}", argv[0])
        if rest[1:]:
            _fail(f"unexpected argument {rest[1]!r}; flags are written --name=value.", argv[0])
        return rest

    def guarded(_: Sequence[str]) -> int | None:
        if not (flags.FLAGS.debug or flags.FLAGS["verbosity"].present):
            logging.set_verbosity(logging.WARNING)  # Orbax tells a story at every save
        try:
            if flags.FLAGS.simulated_devices:
                simulate_devices(flags.FLAGS.simulated_devices)
            if flags.FLAGS.processes:
                from jaxheads.parallel import multihost

                multihost.initialize(flags.FLAGS.processes)
            return main()
        except _USER_ERRORS as error:
            if flags.FLAGS.debug:
                traceback.print_exc()
            # Not to reach another process is no mistake of the input: a later try may do.
            code = EXIT_TRY_AGAIN if isinstance(error, TimeoutError) else EXIT_BAD_INPUT
            _fail(f"{type(error).__name__}: {error}", "--debug shows the traceback", code)

    app.run(guarded, flags_parser=parse)


def _fail(message: str, hint: str, code: int = EXIT_BAD_INPUT) -> Any:
    print(f"error: {message}\n({hint})", file=sys.stderr, flush=True)
    if "jax" in sys.modules:
        from jaxheads.parallel import multihost

        multihost.leave(code)
    sys.exit(code)


def provenance() -> dict[str, Any]:
    """The command, the versions and the commit that a run's results came from."""
    from importlib import metadata

    names = ("jaxheads", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"command": _command(), "versions": versions, "git": _git_hash()}


def _command() -> list[str]:
    """What was typed: a module of this checkout by its name, wherever the checkout lies."""
    root, script = Path(__file__).resolve().parent.parent, Path(sys.argv[0]).resolve()
    if script.suffix != ".py" or not script.is_relative_to(root):
        return list(sys.argv)
    module = ".".join(script.relative_to(root).with_suffix("").parts)
    return ["python", "-m", module, *sys.argv[1:]]


def _git_hash() -> str | None:
    """Commit of this checkout, with "+changes" when files differ from it; None outside git."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        # An installed copy may lie inside somebody else's repository.
        if not git("ls-files", "launch/flags.py"):
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Writes readable JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
