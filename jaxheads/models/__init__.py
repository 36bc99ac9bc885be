"""Models: Flax NNX modules that own parameters, and the functions that run them."""

from jaxheads.models.architectures import ARCHITECTURES
from jaxheads.models.cache import Cache, init_cache
from jaxheads.models.configs import LayerSpec, ModelConfig
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
from jaxheads.models.presets import PRESETS
from jaxheads.models.resume import Layers, read_out, resume, run_layer, run_layers
from jaxheads.models.vit import ViT, ViTConfig

__all__ = [
    "ARCHITECTURES",
    "PRESETS",
    "Cache",
    "Decoder",
    "LayerSpec",
    "Layers",
    "ModelConfig",
    "Output",
    "ViT",
    "ViTConfig",
    "check_token_ids",
    "compute_dtype",
    "forward",
    "init_cache",
    "read_out",
    "resume",
    "run_layer",
    "run_layers",
    "sites",
    "unembed",
    "with_config",
]
