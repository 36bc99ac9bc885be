"""Device meshes from strings: ``make_mesh("data:2,model:4")``, and over slices with `dcn`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
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
    dcn: str | Mapping[str, int] = "",
    exact: bool = False,
) -> Mesh:
    """A mesh with all of `MESH_AXES`, of Auto axis type (the compiler propagates shardings).

    With `dcn` the mesh is hybrid: `spec` is laid out inside each slice, where the network is fast,
    and `dcn` over the slices. An axis named in both has the product of the two sizes, the slices
    outermost: of ``make_mesh("data:2,model:4", dcn="data:3")`` the axis data has size 6, and its
    entries 0 and 1 lie in the first slice.

    Args:
      spec: ``"data:2,model:4"`` or a mapping; axes left out have size 1 and one may be -1.
      devices: default: `jax.devices()`. A mesh that needs fewer devices takes the first ones (of
        each slice).
      dcn: the axes over slices, as `spec`; empty for devices of one slice. Where devices know of
        no slices (CPU, GPU of one domain), neighbouring processes make one.
      exact: raise when devices would be left over.

    Raises:
      ValueError: as `parse_mesh` and `mesh_shape`; for a `dcn` that does not name all slices, and
        for slices of different sizes.
    """
    sizes, outer = _sizes(spec), _sizes(dcn)
    devices = list(jax.devices() if devices is None else devices)
    found = _slices(devices)
    if math.prod(outer.values()) == 1:
        if len(found) > 1:
            raise ValueError(
                f"mesh {dict(sizes)}: the devices lie in {len(found)} slices; say which axis runs "
                f"over them, for example --dcn_mesh=data:{len(found)}, and give --mesh for one."
            )
        shape = mesh_shape(sizes, len(devices), exact=exact)
        return _mesh(_laid_out(devices, shape))
    slices = found if len(found) > 1 else _process_groups(devices, outer)
    over = _dcn_shape(outer, len(slices))
    counts = sorted({len(members) for members in slices})
    if len(counts) > 1:
        raise ValueError(f"slices have different sizes, {counts} devices; a mesh needs equal ones.")
    shape = mesh_shape(sizes, counts[0], exact=exact)
    blocks = [_laid_out(members, shape) for members in slices]
    grid = np.empty([n * m for n, m in zip(over, shape)], object)
    for block, place in zip(blocks, itertools.product(*map(range, over))):
        grid[tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, shape))] = block
    return _mesh(grid)


def _sizes(spec: str | Mapping[str, int]) -> dict[str, int]:
    sizes = parse_mesh(spec) if isinstance(spec, str) else dict(spec)
    for name in sizes:
        if name not in MESH_AXES:
            raise ValueError(f"unknown mesh axis {name!r}; axes are {', '.join(MESH_AXES)}.")
    return sizes


def _mesh(grid: np.ndarray) -> Mesh:
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _laid_out(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The first devices of one slice in a grid that follows their links."""
    from jax.experimental import mesh_utils

    first = list(devices)[: math.prod(shape)]
    # A v5e's links form one plane: any axis may have to be cut out of a longer one.
    flat = first[0].device_kind in ("TPU v5 lite", "TPU v5e")
    try:
        grid = mesh_utils.create_device_mesh(shape, first, allow_split_physical_axes=flat)
    except NotImplementedError:  # no axes of the torus have these sizes, such as 128 x 4 on 8x8x8
        grid = mesh_utils.create_device_mesh(shape, first, allow_split_physical_axes=True)
    return _in_a_ring(grid, MESH_AXES.index("context"))


def _in_a_ring(grid: np.ndarray, axis: int) -> np.ndarray:
    """The grid with entries along `axis` reordered so that neighbours share a link.

    A ring of attention passes keys from entry to entry. An axis laid over several dimensions of
    the torus is walked like a snake: back and forth along the last one.
    """
    fibre = np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)[:, 0]
    if getattr(fibre[0], "coords", None) is None:
        return grid
    places = np.array([[*d.coords, getattr(d, "core_on_chip", 0)] for d in fibre])
    levels = [np.unique(column) for column in places.T]
    index = np.stack([np.searchsorted(u, c) for u, c in zip(levels, places.T)], axis=1)
    # From the outermost dimension in: odd rows of what lies outside run backwards.
    keys, outside = [], np.zeros(len(fibre), int)
    for column, level in zip(index.T, levels):
        run = np.where(outside % 2, len(level) - 1 - column, column)
        keys.append(run)
        outside = outside + column
    order = np.lexsort(keys[::-1])
    return np.take(grid, order, axis=axis)


def _slices(devices: Sequence[Any]) -> list[list[Any]]:
    """The devices by slice, in the order of the slices' numbers; one list where they have none."""
    groups: dict[int, list[Any]] = {}
    for device in devices:
        groups.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    return [groups[index] for index in sorted(groups)]


def _process_groups(devices: Sequence[Any], outer: Mapping[str, int]) -> list[list[Any]]:
    """What stands for slices where devices know of none: runs of neighbouring processes."""
    groups: dict[int, list[Any]] = {}
    for device in devices:
        groups.setdefault(device.process_index, []).append(device)
    hosts = [groups[index] for index in sorted(groups)]
    count = math.prod(n for n in outer.values() if n != -1)
    count = len(hosts) if -1 in outer.values() else count
    if len(hosts) % count:
        raise ValueError(
            f"dcn_mesh {dict(outer)} needs {count} slices, but the devices lie in one slice and "
            f"belong to {len(hosts)} process{'es' if len(hosts) > 1 else ''}; leave dcn_mesh out, "
            "or start as many processes as it has slices (or a multiple)."
        )
    each = len(hosts) // count
    return [
        [device for host in hosts[i : i + each] for device in host]
        for i in range(0, len(hosts), each)
    ]


def _dcn_shape(outer: Mapping[str, int], num_slices: int) -> tuple[int, ...]:
    """Sizes of all `MESH_AXES` over the slices."""
    known = math.prod(n for n in outer.values() if n != -1)
    shape = tuple(num_slices // known if outer.get(a) == -1 else outer.get(a, 1) for a in MESH_AXES)
    if math.prod(shape) != num_slices:
        raise ValueError(
            f"dcn_mesh {dict(outer)} is over {known} slices but there are {num_slices}; its sizes "
            "multiply to the number of slices (one may be -1)."
        )
    return shape
