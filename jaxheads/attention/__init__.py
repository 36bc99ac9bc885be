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
from jaxheads.attention.duo import (
    DuoCache,
    duo_attention_step,
    duo_attention_train,
    streaming_attention,
    streaming_mask,
)
from jaxheads.attention.duo_variant import DUO, DuoOptions, duo_layers
from jaxheads.attention.layouts import ring_schedule, shard_sequence, unshard_sequence
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
    "duo": DUO,
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
    "DuoCache",
    "DuoOptions",
    "HeadsOut",
    "Implementation",
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
    "dense_attention",
    "dense_every",
    "distributed_attention",
    "duo_attention_step",
    "duo_attention_train",
    "duo_layers",
    "finalize",
    "inverse_frequencies",
    "merge_partitions",
    "ring_schedule",
    "rotate",
    "s2_attention",
    "s2_context_parallel",
    "s2_decode",
    "select_implementation",
    "shard_sequence",
    "streaming_attention",
    "streaming_mask",
    "unshard_sequence",
    "vanilla_attention",
]
