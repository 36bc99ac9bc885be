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
from jaxheads.attention.distributed import (
    AxisNames,
    attention_block,
    blockwise_attention,
    distributed_attention,
    finalize,
    vanilla_attention,
)
from jaxheads.attention.dmha import DMHA
from jaxheads.attention.layouts import ring_schedule, shard_sequence, unshard_sequence
from jaxheads.attention.longheads import (
    LongHeadsCache,
    LongHeadsInfo,
    LongHeadsOptions,
    chunk_representations,
    longheads_attention,
    select_chunks,
)
from jaxheads.attention.longheads_variant import LONGHEADS
from jaxheads.attention.masks import MASK_VALUE, Mask
from jaxheads.attention.merge import merge_partitions
from jaxheads.attention.rope import RopeConfig, alibi_slopes, inverse_frequencies, rotate
from jaxheads.attention.s2 import (
    S2Cache,
    ShardPattern,
    s2_attention,
    s2_context_parallel,
    s2_decode,
)
from jaxheads.attention.s2_variant import S2, S2Options, dense_every
from jaxheads.attention.softmax import SOFTMAX

VARIANTS: Mapping[str, Variant] = {
    "dense": SOFTMAX,
    "dmha": DMHA,
    "longheads": LONGHEADS,
    "s2": S2,
}
"""Every way for heads to attend that a decoder can be built with. A new one is a new file and a
row here."""

__all__ = [
    "IMPLEMENTATIONS",
    "MASK_VALUE",
    "VARIANTS",
    "AttentionContext",
    "AttentionOutput",
    "AxisNames",
    "Cost",
    "HeadsOut",
    "Implementation",
    "LongHeadsCache",
    "LongHeadsInfo",
    "LongHeadsOptions",
    "Mask",
    "Request",
    "RopeConfig",
    "S2Cache",
    "S2Options",
    "ShardPattern",
    "Supports",
    "Variant",
    "alibi_slopes",
    "attend",
    "attention",
    "attention_block",
    "blocked_attention",
    "blockwise_attention",
    "chunk_representations",
    "dense_attention",
    "dense_every",
    "distributed_attention",
    "finalize",
    "inverse_frequencies",
    "longheads_attention",
    "merge_partitions",
    "ring_schedule",
    "rotate",
    "s2_attention",
    "s2_context_parallel",
    "s2_decode",
    "select_chunks",
    "select_implementation",
    "shard_sequence",
    "unshard_sequence",
    "vanilla_attention",
]
