"""Finders: a forward, a model and a batch in, a score for every head out."""

from jaxheads.discovery.activation import (
    activation_patch,
)
from jaxheads.discovery.attribution import (
    LogitAttribution,
    attribution_patch,
    logit_attribution,
)
from jaxheads.discovery.circuits import (
    Circuit,
    Overlap,
    Stage,
    circuit_overlap,
    discover_circuit,
    overlap_at_cuts,
)
from jaxheads.discovery.conflict import (
    AlphaTable,
    PruneSweep,
    Rates,
    conflict_rates,
    conflict_scores,
    rates,
    search_alpha,
    select,
    sweep_rates,
)
from jaxheads.discovery.duo import (
    GateConfig,
    TwoStream,
    load_pattern,
    save_pattern,
    sparsify,
    train_gates,
)
from jaxheads.discovery.edges import (
    EdgeScores,
    edge_attribution,
)
from jaxheads.discovery.head_attribution import head_attribution, rank_heads
from jaxheads.discovery.information_flow import (
    LayerLens,
    attention_saliency,
    knockout_profile,
    layer_lens,
)
from jaxheads.discovery.metrics import (
    Metric,
    accuracy,
    as_metric,
    kl_divergence,
    log_probability,
    logit_difference,
)
from jaxheads.discovery.path import (
    path_patch,
    percent,
)
from jaxheads.discovery.retrieval import (
    NeedleInstance,
    RetrievalResult,
    batch_instances,
    copy_hits,
    correlate,
    find_span,
    make_needle_instances,
    retrieval_scores,
    split_half,
    unigram_recall,
)
from jaxheads.discovery.sets import edit_sets, read_metric
from jaxheads.discovery.sweeps import (
    sweep_heads,
    sweep_layers,
    sweep_positions,
)

__all__ = [
    "AlphaTable",
    "Circuit",
    "EdgeScores",
    "GateConfig",
    "LayerLens",
    "LogitAttribution",
    "Metric",
    "NeedleInstance",
    "Overlap",
    "PruneSweep",
    "Rates",
    "RetrievalResult",
    "Stage",
    "TwoStream",
    "accuracy",
    "activation_patch",
    "as_metric",
    "attention_saliency",
    "attribution_patch",
    "batch_instances",
    "circuit_overlap",
    "conflict_rates",
    "conflict_scores",
    "copy_hits",
    "correlate",
    "discover_circuit",
    "edge_attribution",
    "edit_sets",
    "find_span",
    "head_attribution",
    "kl_divergence",
    "knockout_profile",
    "layer_lens",
    "load_pattern",
    "log_probability",
    "logit_attribution",
    "logit_difference",
    "make_needle_instances",
    "overlap_at_cuts",
    "path_patch",
    "percent",
    "rank_heads",
    "rates",
    "read_metric",
    "retrieval_scores",
    "save_pattern",
    "search_alpha",
    "select",
    "sparsify",
    "split_half",
    "sweep_heads",
    "sweep_layers",
    "sweep_positions",
    "sweep_rates",
    "train_gates",
    "unigram_recall",
]
