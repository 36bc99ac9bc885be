"""Random decoders made without compiling anything, whose text depends on all of its context."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxheads.models import Decoder, ModelConfig


def tiny_model(cfg: ModelConfig, seed: int = 0, scale: float = 0.4) -> Decoder:
    """Every matrix normal with deviation `scale`; norm weights near 1."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        mean, spread = (1 - cfg.norm_offset, 0.1) if ".weight" in name else (0, scale)
        return jnp.asarray(rng.normal(mean, spread, leaf.shape), leaf.dtype)

    abstract = jax.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))
    return jax.tree_util.tree_map_with_path(fill, abstract)
