"""Small models with random parameters, made without compiling anything, and batches for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxheads.models import Decoder, ModelConfig

TINY = ModelConfig(
    vocab_size=64, num_layers=2, model_dim=32, num_heads=8, num_kv_heads=4, head_dim=8, mlp_dim=64
)
"""Rotary positions, grouped queries, tied embeddings; divisible by every mesh of the tests."""


def random_model(cfg: ModelConfig, seed: int = 0) -> Decoder:
    """A model whose every parameter is random: norms near their start, biases too."""
    r = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))

    def fill(path, s):
        name = jax.tree_util.keystr(path)
        start = 1.0 if "norm.weight" in name or (".ln" in name and "weight" in name) else 0.0
        into = any(w in name for w in (".wq", ".wk", ".wv"))
        fan_in = s.shape[1] if into else np.prod(s.shape[1:-1])
        scale = 0.2 if s.ndim < 3 else fan_in**-0.5
        return jnp.asarray(start + scale * r.normal(size=s.shape), s.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def random_batch(cfg: ModelConfig, rows: int = 8, length: int = 16, seed: int = 0):
    """Learnable text: each token is mostly the last plus one; uneven weights, some 0."""
    r = np.random.default_rng(seed)
    steps = np.where(r.uniform(size=(rows, length + 1)) < 0.8, 1, r.integers(0, 9))
    ids = ((r.integers(0, cfg.vocab_size, (rows, 1)) + steps.cumsum(1)) % cfg.vocab_size).astype(
        np.int32
    )
    weights = r.uniform(0.2, 1, (rows, length)) * (r.uniform(size=(rows, length)) < 0.9)
    return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights.astype(np.float32)}
