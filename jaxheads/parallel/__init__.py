"""Meshes, and the one table that maps logical axis names to mesh axes."""

from jaxheads.parallel import multihost
from jaxheads.parallel.compiler import TPU_OPTIONS, compiler_options
from jaxheads.parallel.embedding import (
    Lookup,
    from_round_robin,
    lookup,
    sharded_lookup,
    to_round_robin,
)
from jaxheads.parallel.mesh import MESH_AXES, make_mesh, parse_mesh
from jaxheads.parallel.rules import (
    RULES,
    Rules,
    constrain,
    initialize,
    partition_spec,
    shard,
    shardings,
    ways,
)

__all__ = [
    "MESH_AXES",
    "RULES",
    "TPU_OPTIONS",
    "Lookup",
    "Rules",
    "compiler_options",
    "constrain",
    "from_round_robin",
    "initialize",
    "lookup",
    "make_mesh",
    "multihost",
    "parse_mesh",
    "partition_spec",
    "shard",
    "sharded_lookup",
    "shardings",
    "to_round_robin",
    "ways",
]
