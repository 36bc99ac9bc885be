"""Wrappers: each takes a forward and arrays, and returns a forward of the same signature."""

from jaxheads.interventions.ablate import ablate, mean_z
from jaxheads.interventions.per_head import base_forward
from jaxheads.interventions.scale import scale_heads

__all__ = ["ablate", "base_forward", "mean_z", "scale_heads"]
