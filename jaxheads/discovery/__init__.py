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
from jaxheads.discovery.edges import (
    EdgeScores,
    edge_attribution,
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
    "Circuit",
    "EdgeScores",
    "LogitAttribution",
    "Metric",
    "NeedleInstance",
    "Overlap",
    "RetrievalResult",
    "Stage",
    "accuracy",
    "activation_patch",
    "as_metric",
    "attribution_patch",
    "batch_instances",
    "circuit_overlap",
    "copy_hits",
    "correlate",
    "discover_circuit",
    "edge_attribution",
    "edit_sets",
    "find_span",
    "kl_divergence",
    "log_probability",
    "logit_attribution",
    "logit_difference",
    "make_needle_instances",
    "overlap_at_cuts",
    "path_patch",
    "percent",
    "read_metric",
    "retrieval_scores",
    "split_half",
    "sweep_heads",
    "sweep_layers",
    "sweep_positions",
    "unigram_recall",
]
