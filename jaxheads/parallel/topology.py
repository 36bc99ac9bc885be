"""Machines by name: what a chip can do, and TPU slices that need not be there.

    slice_ = parse_topology("v5p:8x8x8")       # 512 chips
    mesh = make_mesh("fsdp:64,model:8", devices=slice_.devices(), exact=True)

Peak FLOP/s, HBM and interconnect are the vendors' published figures (Google Cloud's pages on
system architecture of each TPU version, NVIDIA's data sheets), halved where JAX shows a chip as two
devices. Two columns are derived or measured:

* `clock_hz` turns a compiler's cycles into seconds: peak FLOP/s / FLOPs per cycle of the matrix
  units (their number and size are published). A bfloat16 product of 8192 x 8192 matrices then takes
  70 to 90 % of the peak by the compiler's own estimate, on every chip of the table.
* `hbm_bytes` is what libtpu 0.0.52 calls available in its out-of-memory errors: a little less than
  the capacity.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxheads.fields import unknown

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device, as JAX counts devices."""

    name: str
    platform: str
    """tpu, gpu or cpu."""
    peak_flops: float | None
    """Dense bfloat16 FLOP/s."""
    hbm_bytes: int | None
    """Memory a program can use."""
    hbm_bandwidth: float | None
    """Bytes/s."""
    link_bandwidth: float | None
    """Bytes/s in one direction: of one link of the torus, or of a GPU's NVLink ports together."""
    clock_hz: float | None = None
    """Cycles of ``estimated_cycles`` per second."""
    devices_per_chip: int = 1
    rank: int = 1
    """Dimensions of the interconnect."""
    largest: int = 4096
    """Chips of the largest slice."""
    examples: tuple[str, ...] = ()


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            platform="tpu",
            peak_flops=197e12,
            hbm_bytes=int(15.75 * _GIB),
            hbm_bandwidth=819e9,
            link_bandwidth=50e9,
            clock_hz=1.5e9,
            rank=2,
            largest=256,
            examples=("v5e:2x2", "v5e:4x4", "v5e:16x16"),
        ),
        Chip(
            name="v5p",
            platform="tpu",
            peak_flops=459e12,
            hbm_bytes=int(95.73 * _GIB),
            hbm_bandwidth=2765e9,
            link_bandwidth=100e9,
            clock_hz=1.75e9,
            rank=3,
            largest=6144,
            examples=("v5p:2x2x1", "v5p:8x8x8", "v5p:16x16x16"),
        ),
        Chip(
            name="v6e",
            platform="tpu",
            peak_flops=918e12,
            hbm_bytes=int(31.24 * _GIB),
            hbm_bandwidth=1638e9,
            link_bandwidth=100e9,
            clock_hz=1.75e9,
            rank=2,
            largest=256,
            examples=("v6e:2x2", "v6e:4x4", "v6e:16x16"),
        ),
        Chip(
            name="tpu7x",
            platform="tpu",
            peak_flops=1153.5e12,
            hbm_bytes=int(94.74 * _GIB),
            hbm_bandwidth=3690e9,
            link_bandwidth=50e9,  # 100e9 a chip, shared by its two devices
            clock_hz=2.2e9,
            devices_per_chip=2,
            rank=3,
            largest=9216,
            examples=("tpu7x:2x2x1", "tpu7x:4x4x4", "tpu7x:8x16x16"),
        ),
        Chip(
            name="a100",
            platform="gpu",
            peak_flops=312e12,
            hbm_bytes=80 * 10**9,
            hbm_bandwidth=2039e9,
            link_bandwidth=300e9,
            examples=("a100:8",),
        ),
        Chip(
            name="h100",
            platform="gpu",
            peak_flops=989e12,
            hbm_bytes=80 * 10**9,
            hbm_bandwidth=3350e9,
            link_bandwidth=450e9,
            examples=("h100:8", "h100:64"),
        ),
        Chip(
            name="h200",
            platform="gpu",
            peak_flops=989e12,
            hbm_bytes=141 * 10**9,
            hbm_bandwidth=4800e9,
            link_bandwidth=450e9,
            examples=("h200:8", "h200:64"),
        ),
        Chip(
            name="b200",
            platform="gpu",
            peak_flops=2250e12,
            hbm_bytes=180 * 10**9,
            hbm_bandwidth=8000e9,
            link_bandwidth=900e9,
            examples=("b200:8",),
        ),
        Chip(
            name="cpu",
            platform="cpu",
            peak_flops=None,
            hbm_bytes=None,
            hbm_bandwidth=None,
            link_bandwidth=None,
            largest=512,
            examples=("cpu:1", "cpu:8"),
        ),
    )
}
"""Every machine that can be named in a topology."""

GPUS_PER_NODE = 8
NODE_BANDWIDTH = 50e9
"""Bytes/s a GPU sends beyond its node, one 400 Gbit/s port each."""


@dataclass(frozen=True)
class Topology:
    """A named slice of chips."""

    name: str
    chip: Chip
    dims: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        """Chips of the slice."""
        return math.prod(self.dims)

    @property
    def num_devices(self) -> int:
        """Devices as JAX counts them: two a chip on tpu7x."""
        return self.num_chips * self.chip.devices_per_chip

    @property
    def wraps(self) -> tuple[bool, ...] | None:
        """Along which sizes the links close into rings; None where no TPU is meant.

        A cube of 4 chips is the unit that optical switches close: slices of three dimensions are
        tori when every size is a multiple of 4. A plane is closed along a side of 16 chips.
        """
        if self.chip.platform != "tpu":
            return None
        if self.chip.rank == 3:
            return (all(n % 4 == 0 for n in self.dims),) * 3
        return (*(n == 16 for n in self.dims), False)

    def devices(self) -> list[Any]:
        """Devices to compile for; none of them need exist (CPU: the simulated ones).

        Raises:
          ValueError: for a slice that the compiler refuses, or too few simulated CPU devices.
          ImportError: without libtpu.
          NotImplementedError: for GPUs, whose compiler needs one.
        """
        if self.chip.platform == "gpu":
            raise NotImplementedError(
                f"{self.name}: compiling for GPUs needs a GPU; plan it analytically instead."
            )
        return _cpu_devices(self) if self.chip.platform == "cpu" else _tpu_devices(self)


def parse_topology(text: str) -> Topology:
    """The slice of ``"v5p:8x8x8"``, ``"h200:8"`` or ``"cpu:8"``.

    Raises:
      ValueError: for an unknown chip, malformed or impossible sizes; with names that work.
    """
    name, colon, sizes = text.strip().lower().partition(":")
    if name not in CHIPS:
        raise ValueError(f"topology={text!r}: {unknown('chip', name, CHIPS)} {_examples()}")
    chip = CHIPS[name]
    good = ", ".join(chip.examples)
    if not colon or not re.fullmatch(r"\d+(x\d+)*", sizes):
        raise ValueError(f"topology={text!r} needs sizes after the chip, for example {good}.")
    dims = tuple(int(n) for n in sizes.split("x"))
    if len(dims) != chip.rank or min(dims) < 1:
        raise ValueError(
            f"topology={text!r}: {name} slices have {chip.rank} positive sizes, got {len(dims)}; "
            f"for example {good}."
        )
    if math.prod(dims) > chip.largest:
        raise ValueError(
            f"topology={text!r} has {math.prod(dims)} chips, but the largest {name} slice has "
            f"{chip.largest}; for example {good}."
        )
    return Topology(f"{name}:{sizes}", chip, dims)


def _examples() -> str:
    return "For example " + ", ".join(c.examples[-1] for c in CHIPS.values()) + "."


def _cpu_devices(topology: Topology) -> list[Any]:
    import jax

    devices = jax.devices("cpu")
    if len(devices) < topology.num_devices:
        raise ValueError(
            f"topology={topology.name!r} needs {topology.num_devices} CPU devices but there are "
            f"{len(devices)}; simulate them with --simulated_devices={topology.num_devices}."
        )
    return devices[: topology.num_devices]


def _tpu_devices(topology: Topology) -> list[Any]:
    import importlib.util

    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"topology={topology.name!r} needs the TPU compiler, which runs without a TPU; install "
            "it with: pip install libtpu"
        )
    # No metadata server to ask, and other processes may compile at the same time.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return list(
            topologies.get_topology_desc(
                platform="tpu", topology_name=topology.name, wrap=topology.wraps
            ).devices
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"topology={topology.name!r} is refused by the TPU compiler ({reason}); use sizes that "
            f"hold whole hosts, for example {', '.join(topology.chip.examples)}."
        ) from error
