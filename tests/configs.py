"""Small decoder configurations that between them use every option of `ModelConfig`."""

from __future__ import annotations

import functools

import jax
from flax import nnx

from jaxheads import parallel
from jaxheads.attention import RopeConfig
from jaxheads.models import Decoder, ModelConfig

_SMALL = dict(vocab_size=61, num_layers=3, model_dim=32, num_heads=4, mlp_dim=48, max_positions=64)

CONFIGS = {
    "gpt2": ModelConfig(
        **_SMALL,
        family="gpt2",
        positions="learned",
        norm="layernorm",
        activation="gelu_tanh",
        gated_mlp=False,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
    ),
    "neox": ModelConfig(
        **_SMALL,
        family="gpt_neox",
        rope=RopeConfig(fraction=0.5),
        norm="layernorm",
        residual="parallel",
        activation="gelu",
        gated_mlp=False,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        tie_embeddings=False,
    ),
    "gptj": ModelConfig(
        **_SMALL,
        family="gptj",
        rope=RopeConfig(fraction=0.5, interleaved=True),
        norm="layernorm",
        residual="parallel_shared_norm",
        activation="gelu_tanh",
        gated_mlp=False,
        mlp_bias=True,
        tie_embeddings=False,
        unembed_bias=True,
    ),
    "llama": ModelConfig(**_SMALL, num_kv_heads=2),
    "gemma": ModelConfig(
        **{**_SMALL, "num_layers": 5},
        family="gemma3_text",
        num_kv_heads=1,
        head_dim=16,
        local_rope=RopeConfig(theta=100.0),
        window=(3, None),
        norm_offset=1.0,
        norm_placement="sandwich",
        qk_norm=True,
        activation="gelu_tanh",
        attn_scale=0.2,
        embed_scale=32**0.5,
        attn_soft_cap=5.0,
        logit_soft_cap=4.0,
    ),
    "opt-post": ModelConfig(
        **_SMALL,
        family="opt",
        positions="learned",
        position_offset=2,
        embed_dim=16,
        norm="layernorm",
        norm_placement="post",
        activation="relu",
        gated_mlp=False,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
    ),
    "alibi-sinks": ModelConfig(**_SMALL, positions="alibi", attn_sinks=True, num_kv_heads=2),
}


@functools.cache
def model_of(name: str, seed: int = 0) -> Decoder:
    """A model of `CONFIGS` whose every parameter is random: norms and biases too."""
    model = parallel.initialize(lambda: Decoder(CONFIGS[name], rngs=nnx.Rngs(seed)))
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    return jax.tree.unflatten(tree, noisy)


def tokens_of(name: str, batch: int = 2, length: int = 11, seed: int = 3) -> jax.Array:
    """Random token ids for a model of `CONFIGS`."""
    vocab = CONFIGS[name].vocab_size
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, vocab)
