"""Pictures and tables of heads."""

from jaxheads.viz.attention import attention_html, token_texts
from jaxheads.viz.head_map import head_map, head_table
from jaxheads.viz.notebook import tree_html

__all__ = ["attention_html", "head_map", "head_table", "token_texts", "tree_html"]
