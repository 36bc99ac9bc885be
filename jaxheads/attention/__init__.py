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
from jaxheads.attention.low_rank_pool import (
    Pooled,
    attention_pool_flops,
    attention_pool_params,
    lengths_to_mask,
    low_rank_attention_pool,
    low_rank_attention_scores,
)
from jaxheads.attention.masks import MASK_VALUE, Mask
from jaxheads.attention.merge import merge_partitions
from jaxheads.attention.moh import (
    MoHOutput,
    MoHStats,
    load_balance_loss,
    moh_attention,
    moh_combine,
    moh_gates,
    norm_router_gates,
)
from jaxheads.attention.moh_variant import MOH, MoHOptions
from jaxheads.attention.rcmha_variant import RCMHA, RCMHAOptions
from jaxheads.attention.relative_conv import (
    RelConvParams,
    WeightedOutput,
    depthwise_causal_conv,
    init_rel_conv,
    mdha,
    mha,
    rcmha,
    relative_attention,
    relative_position_scores,
    relative_position_scores_gather,
    relative_score_terms,
    relative_table,
    rmha,
)
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
    "moh": MOH,
    "rcmha": RCMHA,
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
    "Mask",
    "MoHOptions",
    "MoHOutput",
    "MoHStats",
    "Pooled",
    "RCMHAOptions",
    "RelConvParams",
    "Request",
    "RopeConfig",
    "S2Cache",
    "S2Options",
    "ShardPattern",
    "Supports",
    "Variant",
    "WeightedOutput",
    "alibi_slopes",
    "attend",
    "attention",
    "attention_block",
    "attention_pool_flops",
    "attention_pool_params",
    "blocked_attention",
    "blockwise_attention",
    "dense_attention",
    "dense_every",
    "depthwise_causal_conv",
    "distributed_attention",
    "finalize",
    "init_rel_conv",
    "inverse_frequencies",
    "lengths_to_mask",
    "load_balance_loss",
    "low_rank_attention_pool",
    "low_rank_attention_scores",
    "mdha",
    "merge_partitions",
    "mha",
    "moh_attention",
    "moh_combine",
    "moh_gates",
    "norm_router_gates",
    "rcmha",
    "relative_attention",
    "relative_position_scores",
    "relative_position_scores_gather",
    "relative_score_terms",
    "relative_table",
    "ring_schedule",
    "rmha",
    "rotate",
    "s2_attention",
    "s2_context_parallel",
    "s2_decode",
    "select_implementation",
    "shard_sequence",
    "unshard_sequence",
    "vanilla_attention",
]
