"""Every test sees eight simulated CPU devices; set up before JAX starts."""

import itertools
import os
from pathlib import Path

import pytest

collect_ignore = ["discovery/make_transformerlens_arrays.py"]  # needs an environment of its own
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests in parallel processes compile for TPUs that are not there.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Tests compile thousands of small programs and run each once: a third less time without LLVM's
# costly passes.
_XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
_given = os.environ.get("XLA_FLAGS", "").split()
_names = {flag.split("=")[0] for flag in _given}
os.environ["XLA_FLAGS"] = " ".join(
    [*_given, *(flag for flag in _XLA_FLAGS if flag.split("=")[0] not in _names)]
)


_finished = itertools.count(1)


@pytest.fixture(autouse=True)
def few_memory_maps():
    """Drop compiled programs in time: each takes some ten of the 65,530 maps a process may have."""
    yield
    maps = Path("/proc/self/maps")
    if next(_finished) % 10 or not maps.exists():  # looking takes milliseconds
        return
    if maps.read_text().count("\n") > 25_000:
        import jax

        jax.clear_caches()
