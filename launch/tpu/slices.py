"""TPU slices by topology: what Cloud TPU and GKE call them, and how many machines they have.

    parse("v5e:4x4").accelerator_type      # "v5litepod-16"
    parse("v5p:4x4x4").hosts               # 16

Topologies are those of `jaxheads.parallel.topology`; what they are called is from
https://cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x) and
https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jaxheads.parallel.topology import Topology, parse_topology

_CHIPS_PER_HOST = 4  # of every slice that has several hosts


class Generation(NamedTuple):
    """What the slices of one generation are called."""

    api: str
    """Beginning of the accelerator type of the Cloud TPU API; "" where only GKE has it."""
    counted: int
    """What the number in the accelerator type counts, per chip: 2 for TensorCores."""
    runtime: str
    """Runtime version of the Cloud TPU API."""
    gke: str
    """Node label cloud.google.com/gke-tpu-accelerator."""


GENERATIONS: Mapping[str, Generation] = {
    "v5e": Generation("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": Generation("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": Generation("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
    "tpu7x": Generation("", 2, "", "tpu7x"),
}
"""Chip of a topology -> its names."""
_ONE_HOST = {  # shapes of a single machine, by rank
    2: ((1, 1), (2, 2), (2, 4)),
    3: ((2, 2, 1),),
}


@dataclass(frozen=True)
class Slice:
    """A slice of a TPU pod."""

    of: Topology

    @property
    def facts(self) -> Generation:
        return GENERATIONS[self.of.chip.name]

    @property
    def name(self) -> str:
        """``"v5e:4x4"``."""
        return self.of.name

    @property
    def topology(self) -> str:
        """As GKE writes it: ``"4x4"``."""
        return "x".join(map(str, self.of.dims))

    @property
    def chips(self) -> int:
        return self.of.num_chips

    @property
    def hosts(self) -> int:
        """Virtual machines of the slice."""
        one = self.of.dims in _ONE_HOST[self.of.chip.rank]
        return 1 if one else self.chips // _CHIPS_PER_HOST

    @property
    def chips_per_host(self) -> int:
        return self.chips // self.hosts

    @property
    def devices(self) -> int:
        """What `jax.device_count` says on it."""
        return self.of.num_devices

    @property
    def accelerator_type(self) -> str:
        """The slice's name in the Cloud TPU API.

        Raises:
          ValueError: for a generation that only GKE has, and for a shape that is not the one the
            name stands for.
        """
        facts, chip = self.facts, self.of.chip
        if not facts.api:
            raise ValueError(f"{chip.name} slices are only offered on GKE; use --target=gke.")
        found = f"{facts.api}-{self.chips * facts.counted}"
        usual = default_shape(chip.rank, self.chips)
        if self.of.dims != usual:
            means = "x".join(map(str, usual))
            raise ValueError(
                f"topology {self.name} has no accelerator type of its own"
                + (f": {found} means {chip.name}:{means}. Use that shape" if usual else "")
                + ", or --target=gke."
            )
        return found


def default_shape(rank: int, chips: int) -> tuple[int, ...]:
    """The shape that `chips` chips have when only their number is asked for.

    In two dimensions as square as powers of two allow, the longer side last. In three the sides
    double from the last one on: 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8.
    """
    power = chips.bit_length() - 1
    if 2**power != chips:
        return ()
    if rank == 2:
        return (2 ** (power // 2), 2 ** (power - power // 2))
    if chips == 4:
        return (2, 2, 1)
    small, larger = divmod(power, 3)
    return tuple(2 ** (small + (axis >= 3 - larger)) for axis in range(3))


def parse(text: str) -> Slice:
    """The slice of a topology such as ``"v5e:4x4"``.

    Raises:
      ValueError: as `parse_topology`; for what is no TPU, and for a shape that no slice has.
    """
    found = parse_topology(text)
    if found.chip.name not in GENERATIONS:
        raise ValueError(
            f"topology={text!r} is no TPU slice; the TPUs are {', '.join(GENERATIONS)}."
        )
    one_host = _ONE_HOST[found.chip.rank]
    chips = found.num_chips
    small = chips <= math.prod(one_host[-1])
    if found.dims not in one_host and (small or chips % _CHIPS_PER_HOST):
        hosts = ", ".join("x".join(map(str, s)) for s in one_host)
        raise ValueError(
            f"topology={text!r} is no slice: one machine has {hosts}, several have a multiple of "
            f"{_CHIPS_PER_HOST} chips."
        )
    return Slice(found)
