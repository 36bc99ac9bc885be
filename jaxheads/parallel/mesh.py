"""Device meshes from strings: ``make_mesh("data:2,model:4")``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

MESH_AXES = ("data", "fsdp", "model", "context", "expert")
"""Every mesh has these axes; those not named have size 1."""


def parse_mesh(spec: str) -> dict[str, int]:
    """Sizes of the named axes: ``"data:2,model:-1"`` gives ``{"data": 2, "model": -1}``.

    The empty string and ``"1"`` name a mesh of one device.

    Raises:
      ValueError: for a malformed entry, an unknown or repeated axis, a size that is neither
        positive nor -1, or two sizes of -1.
    """
    sizes: dict[str, int] = {}
    entries = [] if spec.strip() in ("", "1") else spec.split(",")
    for entry in entries:
        name, colon, size = (part.strip() for part in entry.partition(":"))
        if name not in MESH_AXES:
            raise ValueError(
                f"mesh {spec!r}: unknown axis {name!r}; axes are {', '.join(MESH_AXES)}, "
                "written like 'data:2,model:4'."
            )
        if name in sizes:
            raise ValueError(f"mesh {spec!r}: axis {name!r} is given twice.")
        try:
            sizes[name] = int(size)
        except ValueError:
            raise ValueError(
                f"mesh {spec!r}: axis {name!r} needs an integer size after a colon, got "
                f"{colon + size!r}."
            ) from None
        if sizes[name] < 1 and sizes[name] != -1:
            raise ValueError(
                f"mesh {spec!r}: axis {name!r} has size {sizes[name]}; a size is positive, or -1 "
                "for 'all remaining devices'."
            )
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh {spec!r}: at most one axis may be -1.")
    return sizes


def mesh_shape(sizes: Mapping[str, int], num_devices: int, *, exact: bool) -> tuple[int, ...]:
    """Sizes of all `MESH_AXES` for `num_devices` devices, the -1 filled in.

    Raises:
      ValueError: when the sizes need more devices than there are, do not divide them, or
        (`exact`) leave some unused.
    """
    known = math.prod(s for s in sizes.values() if s != -1)
    shape = tuple(
        num_devices // known if sizes.get(a) == -1 else sizes.get(a, 1) for a in MESH_AXES
    )
    total = math.prod(shape)
    if total > num_devices or total == 0:
        raise ValueError(
            f"mesh {dict(sizes)} needs {known} devices but there are {num_devices}; make an axis "
            "smaller, or on CPU simulate more with "
            "XLA_FLAGS=--xla_force_host_platform_device_count=N."
        )
    if -1 in sizes.values() and total != num_devices:
        raise ValueError(
            f"mesh {dict(sizes)}: {num_devices} devices are not a multiple of {known}, so -1 has "
            "no whole value."
        )
    if exact and total != num_devices:
        raise ValueError(
            f"mesh {dict(sizes)} uses {total} of {num_devices} devices; name them all (one axis "
            "may be -1)."
        )
    return shape


def make_mesh(
    spec: str | Mapping[str, int] = "",
    devices: Sequence[Any] | None = None,
    *,
    exact: bool = False,
) -> Mesh:
    """A mesh with all of `MESH_AXES`, of Auto axis type (the compiler propagates shardings).

    Args:
      spec: ``"data:2,model:4"`` or a mapping; axes left out have size 1 and one may be -1.
      devices: default: `jax.devices()`. A mesh that needs fewer devices takes the first ones.
      exact: raise when devices would be left over.

    Raises:
      ValueError: as `parse_mesh` and `mesh_shape`.
    """
    sizes = parse_mesh(spec) if isinstance(spec, str) else dict(spec)
    for name in sizes:
        if name not in MESH_AXES:
            raise ValueError(f"unknown mesh axis {name!r}; axes are {', '.join(MESH_AXES)}.")
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(sizes, len(devices), exact=exact)
    return jax.make_mesh(
        shape,
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices[: math.prod(shape)],
    )
