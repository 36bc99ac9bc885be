"""Attention: masks, positions, implementations, and the table of variants a decoder can use."""

from collections.abc import Mapping

from jaxheads.attention.api import (
    IMPLEMENTATIONS,
    AttentionOutput,
    Implementation,
    attend,
    attention,
    select_implementation,
)
from jaxheads.attention.blocked import blocked_attention
from jaxheads.attention.contract import (
    AttentionContext,
    Cost,
    HeadsOut,
    Request,
    Supports,
    Variant,
)
from jaxheads.attention.dense import dense_attention
from jaxheads.attention.masks import MASK_VALUE, Mask
from jaxheads.attention.rope import RopeConfig, alibi_slopes, inverse_frequencies, rotate
from jaxheads.attention.softmax import SOFTMAX

VARIANTS: Mapping[str, Variant] = {
    "dense": SOFTMAX,
}
"""Every way for heads to attend that a decoder can be built with. A new one is a new file and a
row here."""

__all__ = [
    "IMPLEMENTATIONS",
    "MASK_VALUE",
    "VARIANTS",
    "AttentionContext",
    "AttentionOutput",
    "Cost",
    "HeadsOut",
    "Implementation",
    "Mask",
    "Request",
    "RopeConfig",
    "Supports",
    "Variant",
    "alibi_slopes",
    "attend",
    "attention",
    "blocked_attention",
    "dense_attention",
    "inverse_frequencies",
    "rotate",
    "select_implementation",
]
