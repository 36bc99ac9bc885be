"""Embeddings that attend: relevance search and pooling over long histories of behaviours."""

from jaxheads.embeddings.dare import (
    PADDED_SCORE,
    TIME_MODES,
    Pooled,
    embed,
    history_times,
    masked_mean,
    pool_all,
    relevance_of_ids,
    relevance_scores,
    search_topk,
    take_rows,
    target_aware_features,
    two_stage_pool,
)

__all__ = [
    "PADDED_SCORE",
    "TIME_MODES",
    "Pooled",
    "embed",
    "history_times",
    "masked_mean",
    "pool_all",
    "relevance_of_ids",
    "relevance_scores",
    "search_topk",
    "take_rows",
    "target_aware_features",
    "two_stage_pool",
]
