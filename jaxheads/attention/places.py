"""Where attention runs: which mesh axes split batch, heads and sequence, and how many ways."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

Names = str | tuple[str, ...] | None


class AxisNames(NamedTuple):
    """The mesh axes that each array axis is split over; None, or an absent default: not split."""

    data: Names = ("data", "fsdp")
    heads: Names = "model"
    seq: Names = "context"


AXES = AxisNames()  # those of `jaxheads.parallel.MESH_AXES`
ALSO = AxisNames(("data",), "heads", "seq")  # what other code calls the same axes


class Sizes(NamedTuple):
    """Devices along each."""

    data: int
    heads: int
    seq: int


class Place(NamedTuple):
    """Where a call runs."""

    mesh: Any  # None: one device
    axes: AxisNames  # mesh axes that exist; None where there is none
    sizes: Sizes
    is_inside: bool  # already inside a shard_map, on local arrays


def find_place(mesh: Any, names: AxisNames) -> Place:
    """The place of a call with these arguments.

    Raises:
      ValueError: an axis name that the mesh does not have, a mesh axis used twice, or a surrounding
        `shard_map` that leaves out an axis the arrays are split over.
    """
    current = jax.sharding.get_abstract_mesh()
    is_inside = mesh is None and bool(current.manual_axes)
    mesh = current if mesh is None else mesh
    if mesh.empty:
        return Place(None, AxisNames(None, None, None), Sizes(1, 1, 1), False)
    present = set(mesh.shape)
    axes = AxisNames(*(_axes(f, names, present, mesh) for f in AxisNames._fields))
    flat = [axis for part in axes for axis in _tuple(part)]
    if len(flat) != len(set(flat)):
        raise ValueError(
            f"{names} uses a mesh axis twice; batch, heads and sequence are split over different "
            "axes."
        )
    manual = set(current.manual_axes) if is_inside else present
    sizes = [math.prod(mesh.shape[axis] for axis in _tuple(part)) for part in axes]
    if is_inside:
        for field, part, size in zip(AxisNames._fields, axes, sizes, strict=True):
            if field != "data" and size > 1 and not set(_tuple(part)) <= manual:
                raise ValueError(
                    f"called inside a shard_map over {sorted(manual)}, which leaves out the "
                    f"{field} axis {part!r} of size {size}; add it to the shard_map, or name other "
                    "axes."
                )
    return Place(mesh, axes, Sizes(*sizes), is_inside)


def _axes(field: str, names: AxisNames, present: set[str], mesh) -> Names:
    """The mesh axes of one field, in the form they were named; None for none."""
    wanted = getattr(names, field)
    is_default = wanted == getattr(AxisNames(), field)
    found = tuple(axis for axis in _tuple(wanted) if axis in present)
    if is_default and not found:
        found = tuple(axis for axis in _tuple(getattr(ALSO, field)) if axis in present)
    unknown = [axis for axis in _tuple(wanted) if axis not in present]
    if unknown and not is_default:
        raise ValueError(
            f"axis_names.{field}={wanted!r}: the mesh has no axis {unknown[0]!r}; its axes are "
            f"{', '.join(mesh.shape)}."
        )
    if not found:
        return None
    return found[0] if len(found) == 1 else found


def _tuple(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())
