"""JobSet manifests for TPU slices on GKE.

    print(to_yaml(manifest(JobSet(name="llama", image=..., slice=parse("v5p:4x4x4")), job)))

A JobSet (https://jobset.sigs.k8s.io) runs one Job per slice with one pod per machine, names the
pods behind a headless service of its own, and starts all of them again when one fails. GKE sets
TPU_WORKER_ID and TPU_WORKER_HOSTNAMES in each pod; between slices JAX reads MEGASCALE_*, which are
set here from the JobSet's annotations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launch.job import Job, check_name
from launch.tpu.slices import Slice

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_IMAGE = r"[a-z0-9][-a-z0-9._/:]*[a-z0-9](:[A-Za-z0-9_][-A-Za-z0-9_.]*)?(@sha256:[0-9a-f]{64})?"
_JOBS = "slice"  # name of the replicated job
_ANNOTATION = "jobset.sigs.k8s.io"
_COORDINATOR_PORT = 8482  # where JAX listens in process 0
_MEGASCALE_PORT = 8080
GRACE_SECONDS = 120
"""For the checkpoint that a run saves when its pod is taken away."""


@dataclass(frozen=True, kw_only=True)
class JobSet:
    """Where and how a job runs on GKE.

    Raises:
      ValueError: for names that Kubernetes would refuse, and slices that cannot work together.
    """

    name: str
    image: str
    slice: Slice
    slices: int = 1
    namespace: str = "default"
    spot: bool = False
    max_restarts: int = 100
    claim: str = ""
    """PersistentVolumeClaim (ReadWriteMany) for the workdir."""
    mount: str = "/workdir"
    """Where the claim appears in the pods."""
    service_account: str = ""
    queue: str = ""
    """LocalQueue of Kueue."""

    def __post_init__(self):
        if self.slices < 1:
            raise ValueError(f"--slices={self.slices} must be at least 1.")
        if self.slices > 1 and self.slice.hosts < 2:
            raise ValueError(
                f"--slices={self.slices} of {self.slice.name}: slices "
                "of one machine cannot work together; take one larger slice."
            )
        check_name("name", self.name, _LABEL, "a name of lower-case letters, digits and '-'")
        # NAME-slice-SLICE-HOST-xxxxx is the name of a pod, which is also its host name.
        longest = f"-{_JOBS}-{self.slices - 1}-{self.slice.hosts - 1}-abcde"
        if len(self.name + longest) > 63:
            raise ValueError(
                f"--name={self.name!r} is too long; at most {63 - len(longest)} characters, so "
                "that pod names keep to the 63 of Kubernetes."
            )
        check_name("image", self.image, _IMAGE, "a container image such as REGISTRY/NAME:TAG")
        if ":" not in self.image.rpartition("/")[2]:
            raise ValueError(f"--image={self.image!r} names no tag; give NAME:TAG or NAME@sha256:.")
        check_name("namespace", self.namespace, _LABEL, "a Kubernetes namespace")
        for flag in ("claim", "service_account", "queue"):
            if value := getattr(self, flag):
                check_name(flag, value, r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", "a Kubernetes name")
        if self.max_restarts < 0:
            raise ValueError(f"--max_restarts={self.max_restarts} must be at least 0.")


def manifest(target: JobSet, job: Job) -> dict[str, Any]:
    """The JobSet of a job.

    Raises:
      ValueError: when the job writes where no volume is.
    """
    workdir = job.run.workdir
    if target.claim and not (workdir + "/").startswith(target.mount.rstrip("/") + "/"):
        raise ValueError(
            f"workdir={workdir!r} is not below {target.mount}, where --claim={target.claim} "
            "appears in the pods; checkpoints would be lost with the pods."
        )
    if not target.claim and target.slices * target.slice.hosts > 1:
        raise ValueError(
            "a run on several machines needs a volume that all of them see for its checkpoints: "
            "give a PersistentVolumeClaim with access ReadWriteMany as --claim."
        )
    hosts = target.slice.hosts
    metadata: dict[str, Any] = {
        "name": target.name,
        "namespace": target.namespace,
        # One slice is one node pool: its pods share it, and no other pods of the set do.
        "annotations": {f"alpha.{_ANNOTATION}/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    if target.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": target.queue}
    jobs = {
        "name": _JOBS,
        "replicas": target.slices,
        "template": {
            "spec": {
                "parallelism": hosts,
                "completions": hosts,
                "completionMode": "Indexed",
                "backoffLimit": 0,  # a pod alone cannot come back; the set restarts as a whole
                "template": {"spec": _pod(target, job)},
            }
        },
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": target.name},
            "failurePolicy": {"maxRestarts": target.max_restarts},
            "successPolicy": {"operator": "All"},
            "replicatedJobs": [jobs],
        },
    }


def _pod(target: JobSet, job: Job) -> dict[str, Any]:
    facts = target.slice.facts
    chips = {"google.com/tpu": target.slice.chips_per_host}
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    if target.claim:
        mounts.append({"name": "workdir", "mountPath": target.mount})
        volumes.append({"name": "workdir", "persistentVolumeClaim": {"claimName": target.claim}})
    selector = {
        "cloud.google.com/gke-tpu-accelerator": facts.gke,
        "cloud.google.com/gke-tpu-topology": target.slice.topology,
    }
    if target.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": selector,
        # The nodes of a TPU pool, and spot nodes, accept only pods that say they may go there.
        "tolerations": [
            {"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"},
            *(
                [{
                    "key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true",
                    "effect": "NoSchedule",
                }]
                if target.spot
                else []
            ),
        ],
        "containers": [
            {
                "name": "train",
                "image": target.image,
                # The devices and the memory that libtpu locks belong to root.
                "securityContext": {"privileged": True, "runAsUser": 0},
                "command": job.command(),
                "env": _env(target, job),
                "ports": [{"containerPort": p} for p in (_COORDINATOR_PORT, _MEGASCALE_PORT)],
                "resources": {"requests": dict(chips), "limits": dict(chips)},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }  # fmt: skip
    if target.service_account:
        spec["serviceAccountName"] = target.service_account
    return spec


def _env(target: JobSet, job: Job) -> list[dict[str, Any]]:
    env: list[dict[str, Any]] = [{"name": n, "value": v} for n, v in sorted(job.env.items())]
    if target.slices > 1:
        first = f"{target.name}-{_JOBS}-0-0.{target.name}"
        index = f"metadata.annotations['{_ANNOTATION}/job-index']"
        env += [
            {"name": "MEGASCALE_NUM_SLICES", "value": str(target.slices)},
            {"name": "MEGASCALE_SLICE_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
            {"name": "MEGASCALE_COORDINATOR_ADDRESS", "value": f"{first}:{_MEGASCALE_PORT}"},
        ]
    return env


def chips(content: dict[str, Any]) -> int:
    """How many chips a manifest asks for, from its own numbers."""
    total = 0
    for jobs in content["spec"]["replicatedJobs"]:
        spec = jobs["template"]["spec"]
        pods = jobs["replicas"] * spec["parallelism"]
        containers = spec["template"]["spec"]["containers"]
        total += pods * sum(c["resources"]["limits"]["google.com/tpu"] for c in containers)
    return total


def to_yaml(content: dict[str, Any]) -> str:
    """A manifest as text.

    Raises:
      ImportError: without PyYAML.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError("--target=gke writes YAML; pip install pyyaml.") from error
    return yaml.safe_dump(content, sort_keys=False, width=100)
