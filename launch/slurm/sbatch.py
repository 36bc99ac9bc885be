"""Batch scripts for GPU nodes under Slurm.

    print(script(Batch(name="llama", nodes=4, gpus_per_node=8), job))

One process per GPU. JAX finds the other processes from Slurm's variables and takes the GPU of its
local number, so that every process must see all GPUs of its node: they are asked for per node, and
not per task, which would hide all but one from each.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from launch.job import STOPPED, Job, check_name

GRACE_SECONDS = 120
"""Before the time limit: for the checkpoint that a stopping run saves."""
_NAME = r"[A-Za-z0-9][-A-Za-z0-9_.]{0,62}"
_TIME = r"(\d+-)?\d{1,3}(:\d{2}){0,2}"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Where and how a job runs under Slurm.

    Raises:
      ValueError: for values that sbatch would refuse.
    """

    name: str
    nodes: int = 1
    gpus_per_node: int = 8
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    cpus_per_task: int = 8
    repository: str = ""
    """Checkout on the cluster; default: where sbatch is called."""
    python: str = "python"
    max_restarts: int = 100

    def __post_init__(self):
        check_name("name", self.name, _NAME, "a job name of letters, digits, '-', '_' and '.'")
        check_name("time", self.time, _TIME, "a time such as 24:00:00 or 2-00:00:00")
        for flag in ("partition", "account"):
            if value := getattr(self, flag):
                check_name(flag, value, r"[A-Za-z0-9][-A-Za-z0-9_.,]*", f"a Slurm {flag}")
        for flag in ("nodes", "gpus_per_node", "cpus_per_task"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag}={getattr(self, flag)} must be at least 1.")
        if self.max_restarts < 0:
            raise ValueError(f"--max_restarts={self.max_restarts} must be at least 0.")
        for flag in ("repository", "python"):
            if any(c in getattr(self, flag) for c in "\n\r\0"):
                raise ValueError(f"--{flag} must be one line.")

    @property
    def devices(self) -> int:
        return self.nodes * self.gpus_per_node


def script(batch: Batch, job: Job) -> str:
    """The batch script of a job, for `sbatch`."""
    options = {
        "job-name": batch.name,
        "nodes": batch.nodes,
        "ntasks-per-node": batch.gpus_per_node,
        "gpus-per-node": batch.gpus_per_node,
        "cpus-per-task": batch.cpus_per_task,
        "time": batch.time,
        "partition": batch.partition,
        "account": batch.account,
        "output": f"{batch.name}-%j.log",
        "open-mode": "append",  # restarts write on in the same log
        "signal": f"B:TERM@{GRACE_SECONDS}",
    }
    header = [f"#SBATCH --{name}={value}" for name, value in options.items() if value]
    folder = shlex.quote(batch.repository) if batch.repository else '"$SLURM_SUBMIT_DIR"'
    env = [f"export {name}={shlex.quote(value)}" for name, value in sorted(job.env.items())]
    command = shlex.join(job.command(batch.python))
    lines = [
        "#!/usr/bin/env bash",
        *header,
        "#SBATCH --requeue",
        "# One process per GPU. Made by launch.cluster.",
        "set -uo pipefail",
        f"cd {folder} || exit 2",
        *env,
        # When one process ends, the others have time to save or to notice before they are ended.
        f"srun --kill-on-bad-exit=0 --wait={GRACE_SECONDS} {command} &",
        "step=$!",
        "stopped=0",
        "# Slurm tells this shell before the time is over; srun tells all processes.",
        "trap 'stopped=1; kill -TERM \"$step\"' TERM",
        'wait "$step"',
        "code=$?",
        'if [ "$stopped" = 1 ]; then  # the signal ended that wait, and the run is still saving',
        '  wait "$step"',
        "  code=$?",
        "fi",
        'case "$code" in',
        '  0 | 1 | 2) exit "$code" ;;  # finished, or would end the same way again',
        "esac",
        f"# {STOPPED}: stopped before its last step, with a checkpoint; others: it crashed.",
        f'if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {batch.max_restarts} ]; then',
        '  scontrol requeue "$SLURM_JOB_ID" && exit 0',
        "fi",
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"
