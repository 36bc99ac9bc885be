"""Named configurations: what ``--model=`` accepts besides a directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

from jaxheads.attention.rope import RopeConfig
from jaxheads.models.configs import ModelConfig


def tiny() -> ModelConfig:
    """The demo's byte-level model: about 0.9 million parameters, trains in minutes on a laptop."""
    return ModelConfig(mlp_dim=384, max_positions=1024)


def gpt2_small() -> ModelConfig:
    """GPT-2 small, 124 million parameters (Radford et al., 2019)."""
    return ModelConfig(
        family="gpt2",
        vocab_size=50257,
        num_layers=12,
        model_dim=768,
        num_heads=12,
        max_positions=1024,
        positions="learned",
        norm="layernorm",
        activation="gelu_tanh",
        gated_mlp=False,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
    )


def pythia_6_9b() -> ModelConfig:
    """Pythia 6.9B (Biderman et al., 2023, arXiv:2304.01373)."""
    return ModelConfig(
        family="gpt_neox",
        vocab_size=50432,
        num_layers=32,
        model_dim=4096,
        num_heads=32,
        rope=RopeConfig(fraction=0.25),
        norm="layernorm",
        residual="parallel",
        activation="gelu",
        gated_mlp=False,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        tie_embeddings=False,
    )


def lm_7b() -> ModelConfig:
    """A Llama-like decoder of 7.2 billion parameters for texts of up to a million tokens.

    The sizes of Mistral 7B (Jiang et al., 2023, arXiv:2310.06825) without its window: 8 kv heads
    keep what a ring of devices passes around small. The rotation's base grows with the length as
    in Xiong et al., 2023, arXiv:2309.16039.
    """
    return ModelConfig(
        vocab_size=32000,
        num_layers=32,
        model_dim=4096,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=14336,
        max_positions=1048576,
        rope=RopeConfig(theta=1e8),
        tie_embeddings=False,
    )


def llama3_8b() -> ModelConfig:
    """Llama 3 8B (Grattafiori et al., 2024, arXiv:2407.21783)."""
    return ModelConfig(
        vocab_size=128256,
        num_layers=32,
        model_dim=4096,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=14336,
        max_positions=8192,
        rope=RopeConfig(theta=500000.0),
        tie_embeddings=False,
    )


def llama3_1_8b() -> ModelConfig:
    """Llama 3.1 8B: Llama 3 8B with rotary scaling to 131,072 positions (arXiv:2407.21783)."""
    return dataclasses.replace(llama3_8b(), max_positions=131072, rope=_LLAMA_3_1_ROPE)


def llama3_1_70b() -> ModelConfig:
    """Llama 3.1 70B (arXiv:2407.21783)."""
    return dataclasses.replace(
        llama3_1_8b(),
        num_layers=80,
        model_dim=8192,
        embed_dim=8192,
        num_heads=64,
        head_dim=128,
        mlp_dim=28672,
    )


def qwen3_8b() -> ModelConfig:
    """Qwen3 8B (Yang et al., 2025, arXiv:2505.09388)."""
    return ModelConfig(
        family="qwen3",
        vocab_size=151936,
        num_layers=36,
        model_dim=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=12288,
        max_positions=40960,
        rope=RopeConfig(theta=1000000.0),
        norm_eps=1e-6,
        qk_norm=True,
        tie_embeddings=False,
    )


def gemma3_27b() -> ModelConfig:
    """The text part of Gemma 3 27B (Gemma team, 2025, arXiv:2503.19786)."""
    return ModelConfig(
        family="gemma3_text",
        vocab_size=262208,
        num_layers=62,
        model_dim=5376,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        mlp_dim=21504,
        max_positions=131072,
        rope=RopeConfig(theta=1000000.0, scaling="linear", factor=8.0),
        local_rope=RopeConfig(theta=10000.0),
        window=(1024,) * 5 + (None,),
        norm_eps=1e-6,
        norm_offset=1.0,
        norm_placement="sandwich",
        qk_norm=True,
        activation="gelu_tanh",
        attn_scale=168**-0.5,
        embed_scale=5376**0.5,
    )


def titans_760m(variant: str) -> ModelConfig:
    """Titans of 760 million parameters: 24 blocks, width 1,536, 16 heads (arXiv:2501.00663).

    The paper gives no MLP width; it is chosen so that the total is about 760 million. MAC keeps 256
    memory tokens for segments of 512, MAG and MAL a window of 2,048.
    """
    extra = {"mac": "segment=512,memory_tokens=256", "mag": "window=2048", "mal": "window=2048"}
    options = extra.get(variant, "")
    return ModelConfig(
        family="jaxheads",
        architecture=f"titans-{variant}({options})" if options else f"titans-{variant}",
        vocab_size=32000,
        num_layers=24,
        model_dim=1536,
        num_heads=16,
        mlp_dim=3584 if variant == "lmm" else 2048,
        max_positions=4096,
        norm_eps=1e-6,
    )


def moh_lm(size: str) -> ModelConfig:
    """Language models with mixture-of-head attention (arXiv:2410.11842): S 186M, B 882M.

    A quarter of the heads is shared and half of them routed to, so that 75 % are active. The
    vocabulary is chosen to give the published totals.
    """
    layers, width, mlp, heads = {"s": (12, 768, 2048, 12), "b": (24, 1536, 4096, 16)}[size]
    return ModelConfig(
        family="jaxheads",
        attention="moh",
        vocab_size=65536,
        num_layers=layers,
        model_dim=width,
        num_heads=heads,
        mlp_dim=mlp,
        max_positions=2048,
        tie_embeddings=False,
    )


_LLAMA_3_1_ROPE = RopeConfig(
    theta=500000.0,
    scaling="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=8192,
)

PRESETS: Mapping[str, Callable[[], ModelConfig]] = {
    "tiny": tiny,
    "gpt2-small": gpt2_small,
    "pythia-6.9b": pythia_6_9b,
    "lm-7b": lm_7b,
    "llama3-8b": llama3_8b,
    "llama3.1-8b": llama3_1_8b,
    "llama3.1-70b": llama3_1_70b,
    "qwen3-8b": qwen3_8b,
    "gemma3-27b": gemma3_27b,
    "moh-lm-s": partial(moh_lm, "s"),
    "moh-lm-b": partial(moh_lm, "b"),
    "titans-lmm-760m": partial(titans_760m, "lmm"),
    "titans-mac-760m": partial(titans_760m, "mac"),
    "titans-mag-760m": partial(titans_760m, "mag"),
    "titans-mal-760m": partial(titans_760m, "mal"),
}
"""Named configurations: what ``--model=`` accepts besides a directory."""
