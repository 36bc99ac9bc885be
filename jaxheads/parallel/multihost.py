"""Runs of many processes: how they find each other, agree, and end together.

    initialize("auto")                # TPU pods, GKE, SLURM, MPI; before anything uses a device
    initialize("10.0.0.1:1234,0,2")   # address of process 0, index of this one, how many

A process that dies takes the others with it: those that wait for it learn of it from a broken
connection at once, or from its missing heartbeats, and end with a message that says so.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

HEARTBEAT_SECONDS = 30
"""A process that was silent this long counts as dead, and all others end."""
CONNECT_SECONDS = 300
"""How long processes wait for each other at the start."""
TRY_AGAIN = 75
"""Exit code of a process that ends because of others, or of the network: start the run again."""
_SHUTDOWN_SECONDS = 60  # as CONNECT_SECONDS, at the end
_TPU_PORT = 8482  # free on TPU hosts, and where jax itself puts process 0


class Cluster(NamedTuple):
    """The place of this process among others."""

    found: str
    """What told: "SLURM", ..."""
    address: str
    """HOST:PORT where process 0 listens."""
    index: int
    count: int
    local_devices: tuple[int, ...] | None = None
    """Accelerators of this host that belong to this process; None: all."""


# (what it is, variable with the index, variable with the count)
_RANKS = (
    ("JAX_PROCESS_ID", "JAX_PROCESS_ID", "JAX_NUM_PROCESSES"),
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MPI (PMI)", "PMI_RANK", "PMI_SIZE"),
    ("SLURM", "SLURM_PROCID", "SLURM_NTASKS"),
    ("Kubernetes job", "JOB_COMPLETION_INDEX", "JAX_NUM_PROCESSES"),
    ("torchrun", "RANK", "WORLD_SIZE"),
)


def parse_processes(text: str) -> Cluster | None:
    """The cluster that ``HOST:PORT,INDEX,COUNT`` names, None for ``"auto"``.

    Raises:
      ValueError: for anything else.
    """
    if text == "auto":
        return None
    address, _, numbers = text.partition(",")
    index, _, count = numbers.partition(",")
    host, _, port = address.rpartition(":")
    is_address = bool(host) and port.isdigit() and 0 < int(port) < 65536
    if not (is_address and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(
            f"processes={text!r} cannot be read; write 'auto', or HOST:PORT,INDEX,COUNT with INDEX "
            "below COUNT, for example 10.0.0.1:1234,0,2."
        )
    return Cluster("--processes", address, int(index), int(count))


def detect(environment: Mapping[str, str]) -> Cluster | None:
    """The cluster that environment variables describe, None when they do not.

    In this order:
      GKE and TPU VMs with their variables: TPU_WORKER_ID and TPU_WORKER_HOSTNAMES (or
        TPU_PROCESS_ADDRESSES) inside a slice, MEGASCALE_NUM_SLICES, MEGASCALE_SLICE_ID and
        MEGASCALE_COORDINATOR_ADDRESS over slices, as a JobSet sets them.
      An address in JAX_COORDINATOR_ADDRESS (or MASTER_ADDR and MASTER_PORT), with index and count
        in JAX_PROCESS_ID and JAX_NUM_PROCESSES, or in those of Open MPI 4 and 5, PMI (MPICH, Intel
        MPI), SLURM, an indexed Kubernetes job (JOB_COMPLETION_INDEX, JAX_NUM_PROCESSES), torchrun.
      SLURM: the first node of the step is process 0. One task a node owns all of its accelerators;
        of several tasks a node each owns one.
    JAX_COORDINATOR_PORT replaces the port. JAX itself (`jax.distributed.initialize()`) detects TPU
    VMs by their metadata server, GKE TPUs, SLURM, Open MPI up to version 4, and Kubernetes jobs
    through the Kubernetes API when the `kubernetes` package is installed; what is not recognised
    here is left to it. Not detected by JAX: index and count in its own variables, Open MPI 5, PMI,
    torchrun, Kubernetes jobs without that package, and one SLURM task that owns a whole node.

    Raises:
      ValueError: for an address without index and count, or values that contradict each other.
    """
    port = environment.get("JAX_COORDINATOR_PORT")
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if names and "TPU_WORKER_ID" in environment:
        return _tpu(environment, names.split(","), port)
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if not address and environment.get("MASTER_ADDR") and environment.get("MASTER_PORT"):
        address = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    if address:
        return _addressed(environment, address)
    if all(f"SLURM_{name}" in environment for name in ("JOB_ID", "PROCID", "NTASKS", "LOCALID")):
        return _slurm(environment, port)
    return None


def _tpu(environment: Mapping[str, str], workers: list[str], port: str | None) -> Cluster:
    slices = _number(environment, "MEGASCALE_NUM_SLICES", 1)
    at = _number(environment, "MEGASCALE_SLICE_ID", 0)
    index = at * len(workers) + _number(environment, "TPU_WORKER_ID")
    host = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]
    host = host.partition(":")[0]
    address = f"{host}:{port or _TPU_PORT}"
    return _checked(Cluster("TPU_WORKER_ID", address, index, len(workers) * slices))


def _addressed(environment: Mapping[str, str], address: str) -> Cluster:
    for found, index, count in _RANKS:
        if index in environment and count in environment:
            place = _number(environment, index), _number(environment, count)
            local = _slurm_devices(environment) if found == "SLURM" else None
            return _checked(Cluster(found, address, *place, local))
    pairs = ", ".join(f"{index} and {count}" for _, index, count in _RANKS)
    raise ValueError(
        f"processes='auto': the environment has the address {address} of process 0, but not which "
        f"process this is, of how many ({pairs}); set JAX_PROCESS_ID and JAX_NUM_PROCESSES."
    )


def _slurm(environment: Mapping[str, str], port: str | None) -> Cluster | None:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        return None
    # "tpu[007-009,12],other", "gpu01,gpu02", "login": the first name.
    first = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    if first is None:
        raise ValueError(f"processes='auto': the node list {nodes!r} of SLURM cannot be read.")
    host = first[1] + (first[2] or "")
    # A port that jobs on the same node are unlikely to share.
    port = port or str(61440 + _number(environment, "SLURM_JOB_ID") % 4096)
    index, count = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_NTASKS")
    return _checked(Cluster("SLURM", f"{host}:{port}", index, count, _slurm_devices(environment)))


def _slurm_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    tasks = _number(environment, "SLURM_NTASKS")
    nodes = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES")
    if tasks == 1 or nodes == str(tasks) or "SLURM_LOCALID" not in environment:
        return None
    return (_number(environment, "SLURM_LOCALID"),)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name) or ("" if default is None else str(default))
    if not text.isdigit():
        raise ValueError(f"processes='auto': {name}={text!r} is not a number.")
    return int(text)


def _checked(cluster: Cluster) -> Cluster:
    if not cluster.index < cluster.count:
        raise ValueError(
            f"processes='auto': {cluster.found} says that this is process {cluster.index} of "
            f"{cluster.count}; indices are below the count."
        )
    return cluster


def initialize(
    spec: str,
    *,
    connect_seconds: int = CONNECT_SECONDS,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> None:
    """Joins this process with the others of its run; call before anything touches a device.

    From here on an error in one process ends all of them: see `_end_with`. A run of one process
    stays as it is.

    Args:
      spec: ``"auto"`` (`detect`), or ``HOST:PORT,INDEX,COUNT`` with the address of process 0.
      connect_seconds: how long to wait for process 0, and for all others.
      heartbeat_seconds: how long a process may be silent before it counts as dead.

    Raises:
      ValueError: for a spec that cannot be read, or no cluster to be found.
      TimeoutError: when process 0 cannot be reached, naming its address.
    """
    cluster = parse_processes(spec) or detect(os.environ)
    if cluster is not None and cluster.count == 1:
        return
    settings: dict[str, Any] = {
        "initialization_timeout": connect_seconds,
        "heartbeat_timeout_seconds": heartbeat_seconds,
        "shutdown_timeout_seconds": _SHUTDOWN_SECONDS,
    }
    if cluster is None:
        try:
            jax.distributed.initialize(**settings)
        except ValueError as error:
            raise ValueError(
                "processes='auto': no cluster was found (looked for TPU pods, GKE, SLURM, MPI and "
                "JAX_COORDINATOR_ADDRESS); give --processes=HOST:PORT,INDEX,COUNT."
            ) from error
    else:
        if cluster.local_devices is not None or cluster.found != "--processes":
            settings["cluster_detection_method"] = "deactivate"
        if cluster.index:
            _wait_for_address(cluster, connect_seconds)
        _last_words.say(_not_connected(cluster, connect_seconds))
        jax.distributed.initialize(
            coordinator_address=cluster.address,
            num_processes=cluster.count,
            process_id=cluster.index,
            local_device_ids=cluster.local_devices,
            **settings,
        )
    if jax.process_count() == 1:
        _last_words.say("")
        return
    _last_words.say(
        f"error: {_me()} ended without finishing: it was killed, or JAX's coordination service "
        "ended it because another process died or cannot be reached (the lines above then say "
        "which; task N is process N). Start all processes again: training goes on from the newest "
        "complete checkpoint."
    )
    if not is_main_process():
        logging.getLogger("jaxheads").setLevel(logging.ERROR)
    sys.excepthook = _end_with


def is_main_process() -> bool:
    """Whether this process is the one that talks, and writes what is written once."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come here; `name` must be the same on all."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def all_agree(value: bool) -> bool:
    """Whether `value` is true on every process; all must call."""
    if jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(value))))


def _me() -> str:
    return f"process {jax.process_index()} of {jax.process_count()} ({_here()})"


def _here() -> str:
    return f"{socket.gethostname()}, pid {os.getpid()}"


def _not_connected(cluster: Cluster, seconds: int) -> str:
    others = "all other processes" if cluster.index == 0 else "process 0 and all others"
    return (
        f"error: process {cluster.index} of {cluster.count} ({_here()}) did not find {others} at "
        f"{cluster.address} within {seconds} s; start all {cluster.count} with the same address, "
        "and see that the port is free and not blocked."
    )


def _wait_for_address(cluster: Cluster, seconds: float) -> None:
    """Returns when something listens at the address; JAX would abort the process instead."""
    host, _, port = cluster.address.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"process 0 cannot be reached at {cluster.address} ({error}; tried for "
                    f"{seconds:.0f} s); start it, give all processes its address, and see that the "
                    "port is not blocked."
                ) from error
        time.sleep(0.2)


# What errors say when another process, not this one, is the cause.
_LOST = re.compile(
    r"Gloo|NCCL|[Cc]onnection (reset|closed|refused)|coordination|heartbeat|Barrier failed|"
    r"UNAVAILABLE|DEADLINE_EXCEEDED|Socket closed"
)


def lost_another(error: BaseException) -> str | None:
    """The words in which JAX says that another process is gone, None for any other error."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, jax.errors.JaxRuntimeError) and _LOST.search(str(seen)):
            return str(seen).partition("\n")[0]
        seen = seen.__cause__ or seen.__context__
    return None


def _end_with(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ends this process now, with a message.

    Ending as Python does would first wait for threads and processes that wait for this one.
    """
    lost = lost_another(error)
    if lost is None:
        traceback.print_exception(kind, error, trace)
        print(f"error: {_me()} ends, and with it the others.", file=sys.stderr)
    else:
        print(
            f"error: {_me()} lost another process, which died or cannot be reached: {lost}\n"
            "Its own output says why. Start all processes again: training goes on from the newest "
            "complete checkpoint.",
            file=sys.stderr,
        )
    leave(1 if lost is None else TRY_AGAIN)


def leave(code: int) -> None:
    """Ends this process at once with an exit code; one that runs alone is left to Python.

    Leaving as usual waits for the others, and they may be waiting for this one.
    """
    if not jax.distributed.is_initialized():
        return
    _last_words.say("")
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main_process():
        time.sleep(1)  # without it the others end at once: let them tell their own errors first
    os._exit(code)


class _LastWords:
    """What to print when this process ends without a chance to print anything itself.

    JAX's coordination service aborts a process from C++, and a kill signal asks nobody. A small
    child keeps the last line it was told and prints it when its input ends.
    """

    _CHILD = "import sys; sys.stderr.write((['', *sys.stdin][-1]).lstrip(chr(10)))"

    def __init__(self):
        self._child: subprocess.Popen[str] | None = None

    def say(self, text: str) -> None:
        """Replaces the message; an empty one prints nothing."""
        if self._child is None and text and sys.executable:
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", self._CHILD],
                stdin=subprocess.PIPE,
                text=True,
                start_new_session=True,  # signals to the group of this process do not reach it
            )
            atexit.register(self.say, "")
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.write(f"{text}\n")
            self._child.stdin.flush()


_last_words = _LastWords()
