"""Models: Flax NNX modules that own parameters, and the functions that run them."""

from jaxheads.models.cache import Cache, init_cache
from jaxheads.models.configs import PRESETS, LayerSpec, ModelConfig
from jaxheads.models.decoder import (
    Decoder,
    Output,
    check_token_ids,
    compute_dtype,
    forward,
    sites,
    unembed,
    with_config,
)

__all__ = [
    "PRESETS",
    "Cache",
    "Decoder",
    "LayerSpec",
    "ModelConfig",
    "Output",
    "check_token_ids",
    "compute_dtype",
    "forward",
    "init_cache",
    "sites",
    "unembed",
    "with_config",
]
