"""Finding the other processes, and the last words of one that is ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from jaxheads.parallel import multihost
from jaxheads.parallel.multihost import Cluster, detect, parse_processes

JOBSET = {
    "TPU_WORKER_ID": "1",
    "TPU_WORKER_HOSTNAMES": "job-0-0.set,job-0-1.set",
    "MEGASCALE_COORDINATOR_ADDRESS": "job-0-0.set",
    "MEGASCALE_NUM_SLICES": "4",
    "MEGASCALE_SLICE_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NODELIST": "tpu[007-009,12],other",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "4",
}
AT = {"JAX_COORDINATOR_ADDRESS": "a:12"}


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "address", "index", "count", "local"),
    [
        pytest.param(JOBSET, "job-0-0.set:8482", 7, 8, None, id="JobSet of slices"),
        pytest.param(
            {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "h0,h1,h2"},
            "h0:8482", 1, 3, None, id="one slice",
        ),
        pytest.param(
            {"TPU_WORKER_ID": "0", "TPU_PROCESS_ADDRESSES": "h0:9,h1:9",
             "TPU_WORKER_HOSTNAMES": "no"},
            "h0:8482", 0, 2, None, id="process addresses",
        ),
        pytest.param(
            JOBSET | {"JAX_COORDINATOR_PORT": "99", "MEGASCALE_COORDINATOR_ADDRESS": "b:8080"},
            "b:99", 7, 8, None, id="ports",
        ),
        pytest.param(SLURM, "tpu007:61809", 5, 8, (1,), id="SLURM, tasks share nodes"),
        pytest.param(
            SLURM | {"SLURM_STEP_NUM_NODES": "8", "SLURM_STEP_NODELIST": "gpu01,gpu02"},
            "gpu01:61809", 5, 8, None, id="SLURM, a task a node",
        ),
        pytest.param(
            without(SLURM, "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES")
            | {"SLURM_JOB_NODELIST": "login", "SLURM_NNODES": "8"},
            "login:61809", 5, 8, None, id="SLURM without srun's variables",
        ),
        pytest.param(SLURM | AT, "a:12", 5, 8, (1,), id="SLURM with an address"),
        pytest.param(
            AT | {"JAX_PROCESS_ID": "2", "JAX_NUM_PROCESSES": "3"}, "a:12", 2, 3, None, id="JAX"
        ),
        pytest.param(
            AT | {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"},
            "a:12", 2, 3, None, id="Open MPI",
        ),
        pytest.param(
            AT | {"PMI_RANK": "0", "PMI_SIZE": "3"}, "a:12", 0, 3, None, id="MPICH"
        ),
        pytest.param(
            AT | {"JOB_COMPLETION_INDEX": "1", "JAX_NUM_PROCESSES": "2"},
            "a:12", 1, 2, None, id="Kubernetes job",
        ),
        pytest.param(
            {"MASTER_ADDR": "m", "MASTER_PORT": "5", "RANK": "1", "WORLD_SIZE": "2"},
            "m:5", 1, 2, None, id="torchrun",
        ),
    ],
)  # fmt: skip
def test_detects(environment, address, index, count, local):
    found = detect(environment | {"HOME": "/"})
    assert found is not None and found[1:] == (address, index, count, local)


@pytest.mark.parametrize(
    "environment", [{}, {"RANK": "1"}, {"SLURM_JOB_ID": "3"}, {"TPU_WORKER_ID": "0"}]
)
def test_leaves_the_rest_to_jax(environment):
    assert detect(environment) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (AT, "not which process this is.*JAX_PROCESS_ID and JAX_NUM_PROCESSES"),
        (AT | {"RANK": "3", "WORLD_SIZE": "3"}, "process 3 of 3"),
        (AT | {"RANK": "x", "WORLD_SIZE": "3"}, "RANK='x' is not a number"),
        (JOBSET | {"MEGASCALE_SLICE_ID": "4"}, "process 9 of 8"),
        (SLURM | {"SLURM_STEP_NODELIST": "[1-2]"}, "node list"),
    ],
)
def test_environments_that_contradict_themselves(environment, message):
    with pytest.raises(ValueError, match=message):
        detect(environment)


def test_parses_addresses():
    assert parse_processes("auto") is None
    assert parse_processes("10.0.0.1:1234,0,2") == Cluster("--processes", "10.0.0.1:1234", 0, 2)
    assert parse_processes("[::1]:80,3,4") == Cluster("--processes", "[::1]:80", 3, 4)


def test_one_process_stays_as_it_is():
    multihost.initialize("nowhere:1,0,1")
    assert not jax.distributed.is_initialized()


def test_an_address_where_nobody_listens():
    with socket.socket() as taken:  # bound, so that nobody else listens there
        taken.bind(("localhost", 0))
        address = f"localhost:{taken.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(TimeoutError, match=rf"process 0 cannot be reached at {address} .*1 s"):
            multihost.initialize(f"{address},1,2", connect_seconds=1)
    assert time.monotonic() - begin < 10


def test_errors_that_mean_another_process():
    gloo = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer\n")
    assert multihost.lost_another(gloo) == str(gloo).strip()
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = jax.errors.JaxRuntimeError("UNAVAILABLE: Task 3 heartbeat timeout")
    assert "Task 3" in (multihost.lost_another(wrapped) or "")
    own = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 8 GB")
    assert multihost.lost_another(own) is None
    assert multihost.lost_another(ValueError("Connection reset")) is None


LAST_WORDS = """
import os, signal, sys
from jaxheads.parallel.multihost import _LastWords
words = _LastWords()
words.say("first")
words.say(sys.argv[1])
print("ready", flush=True)
if sys.argv[2] != "end":
    os.kill(os.getpid(), int(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("text", "end", "told"),
    [
        ("it died", str(int(signal.SIGKILL)), "it died\n"),
        ("it died", str(int(signal.SIGABRT)), "it died\n"),
        ("", str(int(signal.SIGKILL)), ""),
        ("it died", "end", ""),
    ],
)
def test_last_words_of_a_process_that_is_ended(text, end, told):
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", LAST_WORDS, text, end],
        capture_output=True, text=True, timeout=60, env=env,
    )  # fmt: skip
    assert done.stdout == "ready\n" and done.stderr == told
    assert done.returncode == (0 if end == "end" else -int(end))


@pytest.mark.slow
def test_process_0_that_nobody_joins_says_what_it_waits_for():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    code = (
        "import sys; from jaxheads.parallel import multihost; "
        "multihost.initialize(sys.argv[1], connect_seconds=3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"{address},0,2"],
        capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.returncode != 0
    assert f"process 0 of 2 ({socket.gethostname()}" in done.stderr
    assert f"did not find all other processes at {address} within 3 s" in done.stderr
