"""Commands that build the container image and run a job in it, on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launch.job import Job, check_name

ACCELERATORS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "cpu": ("", ()),
    "cuda": ("cuda", ("--gpus=all",)),
    "tpu": ("tpu", ("--privileged", "--network=host", "--user=root")),  # devices belong to root
}
"""Accelerator -> (extra of pyproject.toml, options of docker run)."""
DOCKERFILE = "launch/docker/Dockerfile"
_IMAGE = r"[a-z0-9][-a-z0-9._/:]*[a-z0-9](:[A-Za-z0-9_][-A-Za-z0-9_.]*)?"
GRACE_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class Container:
    """An image and the container of a run."""

    image: str
    accelerator: str = "cpu"
    repository: str = "."

    def __post_init__(self):
        check_name("image", self.image, _IMAGE, "a container image such as NAME:TAG")
        if self.accelerator not in ACCELERATORS:
            raise ValueError(
                f"--accelerator={self.accelerator!r} is not one of {', '.join(ACCELERATORS)}."
            )


def build(target: Container) -> list[str]:
    """Build the image from a checkout."""
    extra = ACCELERATORS[target.accelerator][0]
    return [
        *("docker", "build", f"--file={target.repository}/{DOCKERFILE}"),
        f"--build-arg=EXTRAS={extra}",
        f"--tag={target.image}",
        target.repository,
    ]


def run(target: Container, job: Job) -> list[str]:
    """Run the job; its workdir is the same directory outside and inside."""
    env = [f"--env={name}={value}" for name, value in sorted(job.env.items())]
    return [
        *("docker", "run", "--rm", f"--stop-timeout={GRACE_SECONDS}", "--shm-size=8g"),
        *ACCELERATORS[target.accelerator][1],
        *env,
        f"--volume={job.run.workdir}:{job.run.workdir}",
        target.image,
        *job.command()[2:],  # the image's entry point is python -m
    ]
