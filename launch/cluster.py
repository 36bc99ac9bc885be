"""Start a training run on a cluster: the flags of `launch.train`, plus where it runs.

    python -m launch.cluster --target=tpu --action=all --name=llama --topology=v5e:4x4 --spot \\
        --project=my-project --zone=us-east5-b --dry_run -- \\
        --model=llama3-8b --mesh=fsdp:16 --seq_len=4096 --batch_size=16 --workdir=/mnt/runs/llama
    python -m launch.cluster --target=gke --name=llama --topology=v5p:4x4x4 --slices=2 \\
        --image=REGISTRY/jaxheads:tpu --claim=runs -- --mesh=fsdp:64 --dcn_mesh=data:2 \\
        --batch_size=128 --workdir=/workdir/llama
    python -m launch.cluster --target=slurm --name=llama --nodes=4 --output=llama.sbatch -- \\
        --model=llama3-8b --mesh=fsdp:32 --batch_size=32 --workdir=/scratch/llama
    python -m launch.cluster --target=docker --image=jaxheads:cuda --accelerator=cuda -- \\
        --model=tiny --workdir=/tmp/run

The flags of the run are checked here, by launch.train's own parser, together with the mesh and the
batch on the devices asked for; a mistake ends in a message and exit code 2 before anything is made.
--dry_run prints the commands and runs none.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from jaxheads.fields import unknown
from launch import flags
from launch.docker import commands as docker
from launch.gke import jobset
from launch.job import Job, make_job
from launch.slurm import sbatch
from launch.tpu import commands as tpu
from launch.tpu import slices
from launch.tpu.controller import CommandError, Controller, DryRun, Shell

ACTIONS: Mapping[str, tuple[str, ...]] = {
    "tpu": ("all", "create", "sync", "run", "resume", "status", "logs", "stop", "delete"),
    "gke": ("render", "submit", "status", "logs", "delete"),
    "slurm": ("render", "submit", "status", "delete"),
    "docker": ("render", "build", "run"),
}
"""Target -> its actions, the default first."""
_COMMON = ("target", "action", "dry_run", "env")
_FLAGS: Mapping[str, tuple[str, ...]] = {
    "tpu": (
        "name", "topology", "slices", "project", "zone", "spot", "queue", "runtime_version",
        "service_account", "network", "setup", "repository", "max_restarts",
    ),
    "gke": (
        "name", "topology", "slices", "image", "namespace", "spot", "claim", "mount",
        "service_account", "kueue_queue", "max_restarts", "output",
    ),
    "slurm": (
        "name", "nodes", "gpus_per_node", "time", "partition", "account", "cpus_per_task",
        "repository", "python", "max_restarts", "output",
    ),
    "docker": ("image", "accelerator", "repository"),
}  # fmt: skip
"""Target -> the flags it reads besides `_COMMON`; others are an error."""


def define_flags(into: absl_flags.FlagValues) -> None:
    """Defines the flags of this launcher; those of launch.train live apart."""

    def text(name: str, default: Any, about: str) -> None:
        absl_flags.DEFINE_string(name, default, about, flag_values=into)

    def number(name: str, default: int, about: str) -> None:
        absl_flags.DEFINE_integer(name, default, about, flag_values=into)

    def yes(name: str, default: bool, about: str) -> None:
        absl_flags.DEFINE_bool(name, default, about, flag_values=into)

    absl_flags.DEFINE_enum("target", None, list(ACTIONS), "Where it runs.", flag_values=into)
    text("action", None, f"What to do; default: the first. {_describe(ACTIONS)}")
    yes("dry_run", False, "Print the commands instead of running them.")
    absl_flags.DEFINE_multi_string(
        "env", [], "NAME=VALUE for the run; no secrets.", flag_values=into
    )
    text("name", None, "Of the TPU, the JobSet or the batch job.")
    number("max_restarts", 100, "How often a run that was stopped is started again.")
    text("repository", None, "Checkout to send, to build from, or to run in; default: this one.")
    # TPU slices, on Cloud TPU or GKE
    text("topology", None, "Of a slice: v5e:4x4, v5p:4x4x8, ...")
    number("slices", 1, "Slices that work together.")
    yes("spot", False, "Take spot machines, which may be taken away.")
    text("service_account", "", "The identity of the machines or pods.")
    # Cloud TPU
    text("project", None, "Google Cloud project.")
    text("zone", None, "Google Cloud zone.")
    yes("queue", True, "Ask for a queued resource; --noqueue creates a TPU VM at once or fails.")
    text("runtime_version", "", "Of the machines; default: that of the TPU generation.")
    text("network", "", "VPC network of the machines.")
    text("setup", "", "Shell command for every machine, such as mounting a file system.")
    # GKE and Docker
    text("image", None, "Container image, with its tag.")
    text("namespace", "default", "Kubernetes namespace.")
    text("claim", "", "PersistentVolumeClaim for the workdir, ReadWriteMany.")
    text("mount", "/workdir", "Where the claim appears in the pods.")
    text("kueue_queue", "", "Kueue's LocalQueue.")
    text("accelerator", "cpu", f"Of the image: {', '.join(docker.ACCELERATORS)}.")
    # Slurm
    number("nodes", 1, "Nodes.")
    number("gpus_per_node", 8, "GPUs, and processes, of a node.")
    number("cpus_per_task", 8, "Processor cores per process.")
    text("time", "24:00:00", "Time limit; the run saves before it and is queued again.")
    text("partition", "", "Slurm partition.")
    text("account", "", "Slurm account.")
    text("python", "python", "The interpreter on the nodes.")
    # The rendered text
    text("output", None, "File for the manifest or the script; default: standard output.")


def _describe(actions: Mapping[str, tuple[str, ...]]) -> str:
    return "; ".join(f"{target}: {', '.join(names)}" for target, names in actions.items())


def split(argv: Sequence[str]) -> tuple[absl_flags.FlagValues, list[str]]:
    """(our flags, the arguments of launch.train); ``--`` may stand between them.

    Raises:
      ValueError: for values of a wrong type, and flags that the target does not read.
    """
    given = absl_flags.FlagValues()
    define_flags(given)
    given.set_gnu_getopt(True)  # flags of the run may stand before ours
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    try:
        rest = given(["launch.cluster", *words[:cut]], known_only=cut == len(words))[1:]
    except absl_flags.UnrecognizedFlagError as error:
        raise ValueError(unknown("flag", error.flagname, given)) from error
    except absl_flags.Error as error:
        raise ValueError(str(error)) from error
    if cut < len(words) and rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; flags are written --name=value.")
    if given.target is None:
        raise ValueError(f"--target is missing; give one of {', '.join(ACTIONS)}.")
    actions = ACTIONS[given.target]
    if given.action is None:
        given.action = actions[0]
    if given.action not in actions:
        raise ValueError(unknown(f"action of --target={given.target}", given.action, actions))
    allowed = {*_COMMON, *_FLAGS[given.target]}
    for name in given:
        if given[name].present and name not in allowed:
            raise ValueError(
                f"--{name} has no meaning with --target={given.target}; its flags are "
                f"{', '.join(sorted(allowed))}."
            )
    return given, rest if cut == len(words) else words[cut + 1 :]


def _repository(given: Any) -> str:
    return given.repository or str(Path(__file__).resolve().parent.parent)


def _job(given: Any, training: Sequence[str], devices: int | None, **options: Any) -> Job:
    """The job; `devices` are those of one slice."""
    names = list(given)
    job = make_job(training, env=given.env, devices=devices, also=names, **options)
    if not job.model_is_here:
        print(
            "note: the weights of --model are not on this machine; the model's own settings are "
            "checked when the run starts.",
            file=sys.stderr,
        )
    return job


def on_tpu(given: Any, training: Sequence[str]) -> int:
    """--target=tpu."""
    if not given.topology:
        raise ValueError("--topology is missing; give that of a slice, for example v5e:4x4.")
    pod = tpu.Pod(
        name=given.name, project=given.project, zone=given.zone,
        slice=slices.parse(given.topology), slices=given.slices, spot=given.spot,
        queue=given.queue, runtime=given.runtime_version,
        service_account=given.service_account, network=given.network,
    )  # fmt: skip
    needs_run = given.action in ("all", "run", "resume")
    checked = needs_run or training  # a mistake in the run is told before anything is made
    job = Job((), None)
    if checked:
        job = _job(given, training, pod.slice.devices, slices=pod.slices)
    # What a dry run of `resume` finds is a pod that was taken away.
    begin = {"all": "ABSENT", "create": "ABSENT", "resume": "SUSPENDED"}.get(given.action, "ACTIVE")
    runner = DryRun(pod.hosts, begin) if given.dry_run else Shell()
    control = Controller(
        pod, job, runner, repository=_repository(given), setup=given.setup,
        max_restarts=given.max_restarts,
    )  # fmt: skip

    def everything() -> int:
        code = control.keep_running()
        if code == 0:
            control.delete()
        else:
            print(f"{pod.name} is kept; --action=delete removes it.", file=sys.stderr)
        return code

    def show_status() -> int:
        state = control.state()
        print(state)
        return runner(tpu.poll(pod)).code if state in ("ACTIVE", "READY") else 0

    actions: Mapping[str, Callable[[], int | None]] = {
        "all": everything,
        "create": control.create,
        "sync": control.sync,
        "run": control.start,
        "resume": control.keep_running,
        "status": show_status,
        "logs": lambda: runner(tpu.logs(pod)).code,
        "stop": lambda: runner(tpu.stop(pod)).code,
        "delete": control.delete,
    }
    return actions[given.action]() or 0


def on_gke(given: Any, training: Sequence[str]) -> int:
    """--target=gke."""
    if given.action in ("status", "logs", "delete"):
        place = [given.name, f"--namespace={given.namespace}"]
        pods = f"--selector=jobset.sigs.k8s.io/jobset-name={given.name}"
        return _run_all(
            given,
            {
                "status": ["kubectl", "get", "jobset", *place],
                "logs": ["kubectl", "logs", place[1], pods, "--follow", "--max-log-requests=1000"],
                "delete": ["kubectl", "delete", "jobset", *place],
            }[given.action],
        )
    if not given.topology:
        raise ValueError("--topology is missing; give that of a slice, for example v5p:4x4x4.")
    target = jobset.JobSet(
        name=given.name, image=given.image, slice=slices.parse(given.topology),
        slices=given.slices, namespace=given.namespace, spot=given.spot,
        max_restarts=given.max_restarts, claim=given.claim, mount=given.mount,
        service_account=given.service_account, queue=given.kueue_queue,
    )  # fmt: skip
    job = _job(given, training, target.slice.devices, slices=target.slices)
    text = jobset.to_yaml(jobset.manifest(target, job))
    return _hand_over(given, text, ".yaml", ["kubectl", "apply", "-f"])


def on_slurm(given: Any, training: Sequence[str]) -> int:
    """--target=slurm."""
    batch = sbatch.Batch(
        name=given.name, nodes=given.nodes, gpus_per_node=given.gpus_per_node, time=given.time,
        partition=given.partition, account=given.account, cpus_per_task=given.cpus_per_task,
        repository=given.repository or "", python=given.python, max_restarts=given.max_restarts,
    )  # fmt: skip
    if given.action in ("status", "delete"):
        verb = {"status": "squeue", "delete": "scancel"}[given.action]
        return _run_all(given, [verb, f"--name={batch.name}", "--me"])
    job = _job(given, training, batch.devices)
    return _hand_over(given, sbatch.script(batch, job), ".sbatch", ["sbatch"])


def on_docker(given: Any, training: Sequence[str]) -> int:
    """--target=docker."""
    target = docker.Container(
        image=given.image, accelerator=given.accelerator, repository=_repository(given)
    )
    if given.action == "build":
        return _run_all(given, docker.build(target))
    job = _job(given, training, None, distributed=False)
    if given.action == "run":
        return _run_all(given, docker.run(target, job))
    show = DryRun(1)
    show(docker.build(target))
    show(docker.run(target, job))
    return 0


def _run_all(given: Any, *argvs: Sequence[str]) -> int:
    """Run commands up to the first that fails; its exit code."""
    runner = DryRun(1) if given.dry_run else Shell()
    return next((code for argv in argvs if (code := runner(argv).code)), 0)


def _hand_over(given: Any, text: str, suffix: str, submit: list[str]) -> int:
    """Write the text where it was asked for, and submit it for --action=submit."""
    if given.output:
        Path(given.output).write_text(text, encoding="utf-8")
        print(f"written to {given.output}", file=sys.stderr)
    if given.action == "render":
        if not given.output:
            print(text, end="")
        return 0
    if given.output:
        return _run_all(given, [*submit, given.output])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{given.name}{suffix}"
        path.write_text(text, encoding="utf-8")
        return _run_all(given, [*submit, str(path)])


TARGETS: Mapping[str, Callable[[Any, Sequence[str]], int]] = {
    "tpu": on_tpu,
    "gke": on_gke,
    "slurm": on_slurm,
    "docker": on_docker,
}


def main(argv: Sequence[str]) -> int:
    """Runs the command with these arguments; returns the exit code."""
    if "--help" in argv:
        own = absl_flags.FlagValues()
        define_flags(own)
        print(__doc__, own.get_help(), sep="\n")
        return 0
    try:
        given, training = split(argv)
        return TARGETS[given.target](given, training)
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return flags.EXIT_BAD_INPUT
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
