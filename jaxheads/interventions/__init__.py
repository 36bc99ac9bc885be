"""Wrappers: each takes a forward and arrays, and returns a forward of the same signature."""

from jaxheads.interventions.ablate import ablate, mean_activation, mean_z
from jaxheads.interventions.affine import AffineEdit, steer
from jaxheads.interventions.agent import agent_plugin
from jaxheads.interventions.attention_rows import (
    PatternOverride,
    ScoreBias,
    bias_scores,
    knock_out,
    override_pattern,
    override_rows,
)
from jaxheads.interventions.duo import reorder_heads, stream_heads
from jaxheads.interventions.landmark import place_landmarks
from jaxheads.interventions.longheads import chunks_read, with_longheads
from jaxheads.interventions.mask_heads import mask_heads, random_heads
from jaxheads.interventions.moh import to_moh
from jaxheads.interventions.patch import patch
from jaxheads.interventions.per_head import base_forward
from jaxheads.interventions.prune import fold_pruned, prune_heads
from jaxheads.interventions.scale import scale_heads
from jaxheads.interventions.subspaces import keep_subspace, orthonormal_basis, project_out
from jaxheads.interventions.vocabulary import for_text, only_tokens

__all__ = [
    "AffineEdit",
    "PatternOverride",
    "ScoreBias",
    "ablate",
    "agent_plugin",
    "base_forward",
    "bias_scores",
    "chunks_read",
    "fold_pruned",
    "for_text",
    "keep_subspace",
    "knock_out",
    "mask_heads",
    "mean_activation",
    "mean_z",
    "only_tokens",
    "orthonormal_basis",
    "override_pattern",
    "override_rows",
    "patch",
    "place_landmarks",
    "project_out",
    "prune_heads",
    "random_heads",
    "reorder_heads",
    "scale_heads",
    "steer",
    "stream_heads",
    "to_moh",
    "with_longheads",
]
