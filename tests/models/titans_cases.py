"""Small Titans decoders: one of each variant, chunks and segments that do not divide the text."""

from __future__ import annotations

import functools

import jax
from flax import nnx

from jaxheads import parallel
from jaxheads.models import Decoder, ModelConfig

_SMALL = dict(vocab_size=61, num_layers=2, model_dim=16, num_heads=2, mlp_dim=24)

CASES = {
    "lmm": "titans-lmm(chunk=4,persistent=5)",
    "mag": "titans-mag(chunk=4,persistent=5,window=6)",
    "mal": "titans-mal(chunk=4,persistent=3,window=6,channelwise_alpha=true)",
    "mac": "titans-mac(chunk=4,persistent=3,segment=8)",
    "mac-pooled": "titans-mac(chunk=4,persistent=0,segment=8,memory_tokens=2,depth=1)",
}
EASY = ("lmm", "mag", "mal", "mac")


def config_of(name: str, **changes) -> ModelConfig:
    """The configuration of a case."""
    return ModelConfig(**{**_SMALL, "architecture": CASES[name], **changes})


@functools.cache
def model_of(name: str, seed: int = 0) -> Decoder:
    """A decoder with random parameters."""
    return parallel.initialize(lambda: Decoder(config_of(name), rngs=nnx.Rngs(seed)))


def tokens_of(batch: int = 2, length: int = 21, seed: int = 3) -> jax.Array:
    """Random token ids."""
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 61)
