"""Pictures and tables of heads."""

from jaxheads.viz.head_map import head_map, head_table

__all__ = ["head_map", "head_table"]
