"""jaxheads: attention heads as first-class, editable, shardable objects in JAX.

import jaxheads as jh

model = jh.load("gpt2-directory")
logits = jh.forward(model, tokens).logits
quiet = jh.ablate(jh.forward, [(9, 6), (9, 9)])
text = jh.generate(model, tokens, max_new_tokens=20, forward=quiet)
"""

from jaxheads import attention, heads, models, parallel, taps
from jaxheads.checkpoints import load, save
from jaxheads.data import Tokenizer
from jaxheads.generation import generate
from jaxheads.interventions import ablate, scale_heads
from jaxheads.models import Cache, Decoder, ModelConfig, Output, forward, init_cache
from jaxheads.taps import NO_TAPS, SITES, Edit, Taps, intervene, record, sweep

__version__ = "0.1.0"

__all__ = [
    "NO_TAPS",
    "SITES",
    "Cache",
    "Decoder",
    "Edit",
    "ModelConfig",
    "Output",
    "Taps",
    "Tokenizer",
    "ablate",
    "attention",
    "forward",
    "generate",
    "heads",
    "init_cache",
    "intervene",
    "load",
    "models",
    "parallel",
    "record",
    "save",
    "scale_heads",
    "sweep",
    "taps",
]
