"""Attention: masks, positions, implementations, and the table of variants a decoder can use."""

from collections.abc import Mapping

from jaxheads.attention.agent import (
    AgentBias,
    adaptive_avg_pool_2d,
    agent_attention,
    agent_attention_matrix,
    agent_bias,
    agent_flops,
    depthwise_conv,
    init_agent_bias,
    pool_agents,
    resize_agent_bias,
)
from jaxheads.attention.api import (
    IMPLEMENTATIONS,
    AttentionOutput,
    Implementation,
    attend,
    attention,
    select_implementation,
)
from jaxheads.attention.blocked import blocked_attention
from jaxheads.attention.cca import (
    CCACache,
    CCAOptions,
    cca_attention,
    cca_costs,
    cca_effective_attention,
    core_tokens,
)
from jaxheads.attention.cca_variant import CCA
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
from jaxheads.attention.landmark import (
    LandmarkOutput,
    grouped_softmax,
    insert_landmarks,
    landmark_attention,
    landmark_places,
    strip_landmarks,
)
from jaxheads.attention.landmark_cache import LandmarkCache, stingy_positions
from jaxheads.attention.landmark_miss import MissOutput, landmark_miss_attention
from jaxheads.attention.landmark_variant import (
    LANDMARK,
    LandmarkOptions,
    Landmarks,
    landmarks_of,
)
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
from jaxheads.attention.token_merge import MergePlan, bipartite_soft_matching
from jaxheads.attention.token_merge import merge as merge_tokens
from jaxheads.attention.token_merge import unmerge as unmerge_tokens

VARIANTS: Mapping[str, Variant] = {
    "cca": CCA,
    "dense": SOFTMAX,
    "dmha": DMHA,
    "duo": DUO,
    "landmark": LANDMARK,
    "longheads": LONGHEADS,
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
    "AgentBias",
    "AttentionContext",
    "AttentionOutput",
    "AxisNames",
    "CCACache",
    "CCAOptions",
    "Cost",
    "DuoCache",
    "DuoOptions",
    "HeadsOut",
    "Implementation",
    "LandmarkCache",
    "LandmarkOptions",
    "LandmarkOutput",
    "Landmarks",
    "LongHeadsCache",
    "LongHeadsInfo",
    "LongHeadsOptions",
    "Mask",
    "MergePlan",
    "MissOutput",
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
    "adaptive_avg_pool_2d",
    "agent_attention",
    "agent_attention_matrix",
    "agent_bias",
    "agent_flops",
    "alibi_slopes",
    "attend",
    "attention",
    "attention_block",
    "attention_pool_flops",
    "attention_pool_params",
    "bipartite_soft_matching",
    "blocked_attention",
    "blockwise_attention",
    "cca_attention",
    "cca_costs",
    "cca_effective_attention",
    "chunk_representations",
    "core_tokens",
    "dense_attention",
    "dense_every",
    "depthwise_causal_conv",
    "depthwise_conv",
    "distributed_attention",
    "duo_attention_step",
    "duo_attention_train",
    "duo_layers",
    "finalize",
    "grouped_softmax",
    "init_agent_bias",
    "init_rel_conv",
    "insert_landmarks",
    "inverse_frequencies",
    "landmark_attention",
    "landmark_miss_attention",
    "landmark_places",
    "landmarks_of",
    "lengths_to_mask",
    "load_balance_loss",
    "longheads_attention",
    "low_rank_attention_pool",
    "low_rank_attention_scores",
    "mdha",
    "merge_partitions",
    "merge_tokens",
    "mha",
    "moh_attention",
    "moh_combine",
    "moh_gates",
    "norm_router_gates",
    "pool_agents",
    "rcmha",
    "relative_attention",
    "relative_position_scores",
    "relative_position_scores_gather",
    "relative_score_terms",
    "relative_table",
    "resize_agent_bias",
    "ring_schedule",
    "rmha",
    "rotate",
    "s2_attention",
    "s2_context_parallel",
    "s2_decode",
    "select_chunks",
    "select_implementation",
    "shard_sequence",
    "stingy_positions",
    "streaming_attention",
    "streaming_mask",
    "strip_landmarks",
    "unmerge_tokens",
    "unshard_sequence",
    "vanilla_attention",
]
