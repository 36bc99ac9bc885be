"""Keeps a run going on TPU slices: makes them, starts the run, and starts it again when it stops.

    control = Controller(pod, job, shell=Shell())
    control.keep_running()

A preempted queued resource ends in the state SUSPENDED and can only be deleted and asked for
again. The run itself continues from its newest checkpoint, because the command is the same one.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from launch.job import STOPPED, Job
from launch.tpu import commands
from launch.tpu.commands import Pod

ABSENT = "ABSENT"
_READY = ("ACTIVE", "READY")
_LOST = ("SUSPENDED", "FAILED", "PREEMPTED", "TERMINATED", "STOPPED")
_VERDICTS = {"1", "2"}  # exit codes of launch.train itself: starting again would end the same way
_LOOK_EVERY = 60.0  # seconds between looks at a run
_UNREACHABLE = 5  # looks in a row without an answer before the machines count as lost


class Done(NamedTuple):
    """What a command ended with."""

    code: int
    out: str = ""
    err: str = ""


class Runner(Protocol):
    """Runs commands."""

    def __call__(self, argv: Sequence[str], *, capture: bool = False) -> Done: ...


class Shell:
    """Runs commands on this machine, and shows each before it runs."""

    def __call__(self, argv: Sequence[str], *, capture: bool = False) -> Done:
        if not capture:
            print(f"$ {shlex.join(argv)}", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(list(argv), text=True, capture_output=capture, check=False)
        except FileNotFoundError as error:
            raise ValueError(
                f"{argv[0]} is not installed on this machine; install it, or see the commands "
                "with --dry_run."
            ) from error
        return Done(done.returncode, done.stdout or "", done.stderr or "")


@dataclass
class DryRun:
    """Prints the commands that would run, and answers as if all went well."""

    hosts: int
    state: str = ABSENT
    show: Callable[[str], None] = print

    def __call__(self, argv: Sequence[str], *, capture: bool = False) -> Done:
        self.show(shlex.join(argv))
        verb = argv[4] if argv[:1] == ["gcloud"] else ""
        if verb == "create":
            self.state = "ACTIVE"
        elif verb == "delete":
            self.state = ABSENT
        elif verb == "describe":
            return Done(1, "", "NOT_FOUND") if self.state == ABSENT else Done(0, self.state)
        return Done(0, f"{commands.MARK} 0\n" * self.hosts)


class CommandError(RuntimeError):
    """A command failed."""


@dataclass
class Controller:
    """One run on one pod.

    Args:
      repository: the checkout whose commit is sent.
      setup: a shell command for every machine, before the code is installed.
      max_restarts: how often a run that stopped is started again.
    """

    pod: Pod
    job: Job
    run: Runner
    repository: str = "."
    setup: str = ""
    max_restarts: int = 100
    sleep: Callable[[float], None] = time.sleep
    say: Callable[[str], None] = field(default=lambda text: print(text, file=sys.stderr))

    def state(self) -> str:
        """Of the queued resource or the TPU VM; ABSENT when there is none."""
        done = self.run(commands.describe(self.pod), capture=True)
        if done.code == 0:
            return done.out.strip() or "UNKNOWN"
        if "NOT_FOUND" in done.err or "not found" in done.err.lower():
            return ABSENT
        raise CommandError(f"the state of {self.pod.name} is not known: {done.err.strip()[-500:]}")

    def create(self) -> None:
        """Make the slices, unless they are there; returns when they can be used."""
        while (state := self.state()) not in _READY:
            if state in _LOST:
                self.say(f"{self.pod.name} is {state}: deleting it, and asking again.")
                self._must(commands.delete(self.pod))
            elif state == ABSENT:
                self._must(commands.create(self.pod))
            else:
                self.say(f"{self.pod.name} is {state}; waiting.")
                self.sleep(30.0)

    def sync(self) -> None:
        """Send the committed code to all machines, and install it."""
        for command in commands.sync(self.pod, self.repository):
            self._must(command)
        self._must(commands.install(self.pod, self.setup))

    def start(self) -> None:
        """Start the run on all machines; nothing happens where it runs already."""
        self._must(commands.start(self.pod, self.job))

    def delete(self) -> None:
        """Delete the slices, if there are any."""
        if self.state() != ABSENT:
            self._must(commands.delete(self.pod))

    def keep_running(self) -> int:
        """Make what is missing and see the run through to its last step, over preemptions.

        Returns:
          The exit code of the run: 0, or what it gave up with.
        """
        for _ in range(1 + self.max_restarts):
            self.create()
            try:
                self.sync()
                self.start()
                codes = self.watch()
            except CommandError:
                if self.state() in _READY:
                    raise
                codes = []
            if codes and set(codes) <= {"0"}:
                self.say("the run is finished.")
                return 0
            if codes and set(codes) <= _VERDICTS | {"0"}:
                self.run(commands.tail(self.pod))
                self.say(f"the run ended by itself with exit codes {', '.join(codes)}.")
                return max(map(int, codes))
            what = f"stopped with exit codes {', '.join(codes)}" if codes else "lost its machines"
            self.say(f"the run {what}; it goes on from its newest checkpoint.")
        self.say(f"the run was started again {self.max_restarts} times; giving up.")
        return STOPPED

    def watch(self) -> list[str]:
        """Wait until no machine runs any more.

        Returns:
          Exit codes, one per machine ("gone": without one); empty when the machines are lost.
        """
        silent = 0
        while True:
            done = self.run(commands.poll(self.pod), capture=True)
            seen = commands.read_poll(done.out)
            if len(seen) == self.pod.hosts and "running" not in seen:
                return seen
            if len(seen) < self.pod.hosts:
                silent += 1
                if self.state() not in _READY or silent >= _UNREACHABLE:
                    return []
            else:
                silent = 0
            self.sleep(_LOOK_EVERY)

    def _must(self, argv: Sequence[str]) -> None:
        done = self.run(argv)
        if done.code:
            raise CommandError(f"exit code {done.code} of: {shlex.join(argv)}")
