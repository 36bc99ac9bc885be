"""Meshes, and the one table that maps logical axis names to mesh axes."""

from jaxheads.parallel.mesh import MESH_AXES, make_mesh, parse_mesh
from jaxheads.parallel.rules import (
    RULES,
    Rules,
    constrain,
    initialize,
    partition_spec,
    shard,
    shardings,
)

__all__ = [
    "MESH_AXES",
    "RULES",
    "Rules",
    "constrain",
    "initialize",
    "make_mesh",
    "parse_mesh",
    "partition_spec",
    "shard",
    "shardings",
]
