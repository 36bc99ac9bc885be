"""Patching between runs: single activations, paths between heads, circuits of paths."""

from jaxheads.discovery.activation import activation_patch
from jaxheads.discovery.circuits import (
    Circuit,
    Overlap,
    Stage,
    circuit_overlap,
    discover_circuit,
    overlap_at_cuts,
)
from jaxheads.discovery.path import path_patch, percent

__all__ = [
    "Circuit",
    "Overlap",
    "Stage",
    "activation_patch",
    "circuit_overlap",
    "discover_circuit",
    "overlap_at_cuts",
    "path_patch",
    "percent",
]
