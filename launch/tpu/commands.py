"""The commands that make, use and delete TPU slices with gcloud: pure functions, nothing runs here.

Everything is a list of arguments. What runs on the machines of a slice is one shell command, given
to all of them at once; `start` leaves the run behind on its own, so that a lost connection does not
end it, and `poll` says how it stands.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from launch.job import Job, check_name
from launch.tpu.slices import Slice

PYTHON_VERSION = "3.12"
_NODE_NAME = r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?"
_PROJECT = r"([a-z][-a-z0-9.]{0,60}:)?[a-z][-a-z0-9]{4,28}[a-z0-9]"
_ZONE = r"[a-z]+(-[a-z]+)+[0-9]+-[a-z][a-z0-9]*"
MARK = "jaxheads-run:"
"""Comes before what `poll` prints."""


@dataclass(frozen=True, kw_only=True)
class Pod:
    """Slices that run one job together.

    Raises:
      ValueError: for names that the API would refuse, and combinations that it does not have.
    """

    name: str
    project: str
    zone: str
    slice: Slice
    slices: int = 1
    spot: bool = False
    queue: bool = True
    """Ask for it as a queued resource instead of a TPU VM at once."""
    runtime: str = ""
    """Runtime version; default: that of the generation."""
    service_account: str = ""
    network: str = ""

    def __post_init__(self):
        check_name("name", self.name, _NODE_NAME, "a name of lower-case letters, digits and '-'")
        check_name("project", self.project, _PROJECT, "a Google Cloud project id")
        check_name("zone", self.zone, _ZONE, "a zone such as us-east5-b")
        if self.slices < 1:
            raise ValueError(f"--slices={self.slices} must be at least 1.")
        if self.slices > 1 and not self.queue:
            raise ValueError(f"--slices={self.slices} needs a queued resource; leave --queue on.")
        if self.slices > 1 and self.slice.hosts < 2:
            raise ValueError(
                f"--slices={self.slices} of {self.slice.name}: slices "
                "of one machine cannot work together; take one larger slice."
            )
        if self.runtime:
            check_name("runtime_version", self.runtime, r"[a-z0-9][-.a-z0-9]*", "a runtime version")
        if self.service_account:
            check_name(
                "service_account", self.service_account, r"[-a-z0-9]+@[-a-z0-9.]+",
                "the e-mail address of a service account",
            )  # fmt: skip
        if self.network:
            check_name("network", self.network, r"[-a-z0-9/_.]+", "the name of a network")
        self.slice.accelerator_type  # noqa: B018  (raises for a slice that the API does not have)

    @property
    def _place(self) -> list[str]:
        return [f"--project={self.project}", f"--zone={self.zone}"]

    @property
    def hosts(self) -> int:
        return self.slices * self.slice.hosts

    @property
    def folder(self) -> str:
        """Where the code lies on the machines, below the home directory."""
        return f"jaxheads-{self.name}"


_TPUS = ["gcloud", "compute", "tpus"]


def create(pod: Pod) -> list[str]:
    """Ask for the slices; returns before they are there (queued) or when they are."""
    runtime = pod.runtime or pod.slice.facts.runtime
    kind = f"--accelerator-type={pod.slice.accelerator_type}"
    options = [*pod._place, kind]
    if pod.queue:
        options.append(f"--runtime-version={runtime}")
        if pod.slices == 1:
            options.append(f"--node-id={pod.name}")
        else:
            options += [f"--node-count={pod.slices}", f"--node-prefix={pod.name}"]
    else:
        options.append(f"--version={runtime}")
    options += ["--spot"] if pod.spot else []
    options += [f"--service-account={pod.service_account}"] if pod.service_account else []
    options += [f"--network={pod.network}"] if pod.network else []
    return [*_TPUS, _group(pod), "create", pod.name, *options]


def describe(pod: Pod) -> list[str]:
    """Prints the state in one word."""
    field = "state.state" if pod.queue else "state"
    return [*_TPUS, _group(pod), "describe", pod.name, *pod._place, f"--format=value({field})"]


def delete(pod: Pod) -> list[str]:
    """Delete the slices and the request for them; no questions asked."""
    force = ["--force"] if pod.queue else []
    return [*_TPUS, _group(pod), "delete", pod.name, *pod._place, *force, "--quiet"]


def _group(pod: Pod) -> str:
    return "queued-resources" if pod.queue else "tpu-vm"


def _reach(pod: Pod, verb: str) -> list[str]:
    """``gcloud ... ssh`` or ``scp``, up to their own arguments."""
    return [*_TPUS, "tpu-vm" if pod.slices == 1 else "queued-resources", verb]


def _workers(pod: Pod, worker: str = "all") -> list[str]:
    node = [] if pod.slices == 1 else [f"--node={'all' if worker == 'all' else 0}"]
    return [*pod._place, f"--worker={worker}", *node]


def on_workers(pod: Pod, command: str, worker: str = "all") -> list[str]:
    """Run a shell command on all machines, or the first one of the first slice."""
    return [*_reach(pod, "ssh"), pod.name, *_workers(pod, worker), f"--command={command}"]


def archive(pod: Pod, repository: str) -> list[str]:
    """Pack the committed code."""
    return [
        *("git", "-C", repository, "archive", "--format=tar.gz"),
        f"--output={_archive_path(pod)}",
        "HEAD",
    ]


def _archive_path(pod: Pod) -> str:
    return f"/tmp/{pod.folder}.tar.gz"


def sync(pod: Pod, repository: str) -> list[list[str]]:
    """Pack the committed code, copy it to all machines and unpack it there."""
    name = f"{pod.folder}.tar.gz"
    unpack = f"mkdir -p ~/{pod.folder} && tar -xzf ~/{name} -C ~/{pod.folder}"
    copy = [*_reach(pod, "scp"), _archive_path(pod), f"{pod.name}:{name}", *_workers(pod)]
    return [archive(pod, repository), copy, on_workers(pod, unpack)]


def install(pod: Pod, setup: str = "") -> list[str]:
    """Make a virtual environment with the code and its TPU extra on all machines.

    The images bring an older Python than the package needs; uv fetches one.

    Args:
      setup: a shell command that comes first, for example to mount a file system.
    """
    python = f"~/{pod.folder}-env/bin/python"
    steps = [
        *([setup] if setup else []),
        "python3 -m pip install --quiet --user uv",
        f"~/.local/bin/uv venv --quiet --allow-existing --python {PYTHON_VERSION} "
        f"~/{pod.folder}-env",
        f"~/.local/bin/uv pip install --quiet --python {python} "
        f'--editable "$HOME/{pod.folder}[tpu]"',
    ]
    return on_workers(pod, " && ".join(steps))


def start(pod: Pod, job: Job) -> list[str]:
    """Start the run on all machines, if it is not running already, and leave it there.

    It writes train.log; its exit code goes to the file `exit`, and a lock says that it is alive.
    """
    python = f"../{pod.folder}-env/bin/python"
    run = f"{job.shell_command(python)} >> train.log 2>&1; echo $? > exit"
    return on_workers(
        pod,
        # The lock is taken here and inherited, so that it is held when this returns.
        f"cd ~/{pod.folder} && exec 9> lock && if flock --nonblock 9; then rm -f exit; "
        f"nohup setsid bash -c {shlex.quote(run)} < /dev/null > /dev/null 2>&1 & "
        "else echo already running; fi",
    )


def poll(pod: Pod) -> list[str]:
    """Every machine prints the exit code of its run, or that it runs, or that it is gone."""
    return on_workers(
        pod,
        f"cd ~/{pod.folder} 2> /dev/null && if ! flock --nonblock lock true; then "
        f'echo {MARK} running; elif [ -f exit ]; then echo "{MARK} $(cat exit)"; '
        f"else echo {MARK} gone; fi || echo {MARK} gone",
    )


def read_poll(text: str) -> list[str]:
    """What `poll` printed, one word per machine."""
    return re.findall(rf"{MARK} (\w+)", text)


def stop(pod: Pod) -> list[str]:
    """Ask the run to save and end, on all machines."""
    pattern = shlex.quote(f"{pod.folder}-env/bin/python -m launch[.]train")
    return on_workers(pod, f"pkill -TERM -f {pattern} || true")


def logs(pod: Pod) -> list[str]:
    """Show the log of process 0 as it grows."""
    return on_workers(pod, f"tail -n 200 -F ~/{pod.folder}/train.log", worker="0")


def tail(pod: Pod) -> list[str]:
    """The end of every machine's log."""
    return on_workers(pod, f"tail -n 20 ~/{pod.folder}/train.log")
