"""jaxheads: attention heads as first-class, editable, shardable objects in JAX.

import jaxheads as jh

model = jh.load("gpt2-directory")
logits = jh.forward(model, tokens).logits
quiet = jh.ablate(jh.forward, [(9, 6), (9, 9)])
text = jh.generate(model, tokens, max_new_tokens=20, forward=quiet)
"""

from jaxheads import attention, discovery, heads, interventions, models, parallel, taps
from jaxheads.checkpoints import load, save
from jaxheads.data import Tokenizer
from jaxheads.discovery import path_patch, sweep_heads, sweep_positions
from jaxheads.generation import generate
from jaxheads.heads import HeadScores
from jaxheads.interventions import (
    ablate,
    bias_scores,
    keep_subspace,
    mask_heads,
    override_pattern,
    override_rows,
    patch,
    project_out,
    scale_heads,
    steer,
    stream_heads,
)
from jaxheads.models import Cache, Decoder, ModelConfig, Output, forward, init_cache
from jaxheads.taps import NO_TAPS, SITES, Edit, Taps, intervene, record, sweep

__version__ = "0.1.0"

__all__ = [
    "NO_TAPS",
    "SITES",
    "Cache",
    "Decoder",
    "Edit",
    "HeadScores",
    "ModelConfig",
    "Output",
    "Taps",
    "Tokenizer",
    "ablate",
    "attention",
    "bias_scores",
    "discovery",
    "forward",
    "generate",
    "heads",
    "init_cache",
    "intervene",
    "interventions",
    "keep_subspace",
    "load",
    "mask_heads",
    "models",
    "override_pattern",
    "override_rows",
    "parallel",
    "patch",
    "path_patch",
    "project_out",
    "record",
    "save",
    "scale_heads",
    "steer",
    "stream_heads",
    "sweep",
    "sweep_heads",
    "sweep_positions",
    "taps",
]
