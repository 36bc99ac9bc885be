"""One frozen configuration for every decoder family, and named presets.

A family (GPT-2, Llama, Gemma, ...) is a setting of these fields, not a class: `models/decoder.py`
reads them. `checkpoints/families.py` converts Hugging Face configurations.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from jaxheads.attention.rope import RopeConfig

if TYPE_CHECKING:
    Derived: TypeAlias = int
else:
    Derived: TypeAlias = int | None
"""A size that may be left out and is then derived from the others: never None once built."""
_DERIVED: Any = None

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "positions": ("rope", "learned", "alibi", "none"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_placement": ("pre", "sandwich", "post"),
    "residual": ("sequential", "parallel", "parallel_shared_norm"),
    "activation": ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu"),
    "param_dtype": ("float32", "bfloat16", "float16"),
    "compute_dtype": ("auto", "float32", "bfloat16", "float16"),
}
_POSITIVE = (
    "vocab_size",
    "num_layers",
    "model_dim",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_dim",
    "max_positions",
    "embed_dim",
    "norm_eps",
    "embed_scale",
    "attn_scale",
    "attn_soft_cap",
    "logit_soft_cap",
)


class LayerSpec(NamedTuple):
    """What distinguishes one layer of the repeating pattern from another."""

    attention: str
    """A row of `jaxheads.attention.VARIANTS`."""
    window: int | None
    """Sliding-window width in tokens, None for full attention."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder language model. Hashable, so a safe static argument.

    Raises:
      ValueError: for a value outside its choices, naming field, value and rule.
    """

    family: str = "llama"  # Hugging Face model type whose layout `save` writes
    vocab_size: int = 384  # V; default: the byte tokenizer's
    num_layers: int = 4  # L
    model_dim: int = 128  # M, residual width
    num_heads: int = 8  # H, query heads
    num_kv_heads: Derived = _DERIVED  # K; None: as many as query heads
    head_dim: Derived = _DERIVED  # D; None: model_dim / num_heads
    mlp_dim: Derived = _DERIVED  # F; None: 4 * model_dim
    max_positions: int = 2048  # longest sequence of learned positions; nominal for RoPE
    embed_dim: Derived = _DERIVED  # width of the embedding table where it differs from model_dim

    positions: str = "rope"  # rope | learned | alibi | none
    position_offset: int = 0  # rows of the position table before position 0 (OPT: 2)
    rope: RopeConfig = RopeConfig()
    local_rope: RopeConfig | None = None  # rotary settings of the layers with a window (Gemma 3)

    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # added to the norm's weight (Gemma stores weight - 1)
    norm_placement: str = (
        "pre"  # pre | sandwich (before and after each part) | post (after the sum)
    )
    qk_norm: bool = False  # RMS norm over each head's q and k before rotation (Qwen 3, Gemma 3)
    residual: str = "sequential"  # sequential | parallel | parallel_shared_norm (GPT-J)

    activation: str = "silu"
    gated_mlp: bool = True  # activation(x w_gate) * (x w_in)
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    unembed_bias: bool = False
    tie_embeddings: bool = True
    embed_scale: float = 1.0  # multiplies the token embedding (Gemma: sqrt(model_dim))

    attention: str = "dense"  # variants of the layers, repeating: "dense", "s2*3+dense"
    window: tuple[int | None, ...] = (None,)  # sliding windows of the layers, repeating
    attn_scale: float | None = None  # None: head_dim ** -0.5
    scale_by_layer: bool = False  # divide the scores of layer l by l + 1 (an option of GPT-2)
    attn_soft_cap: float | None = None  # c * tanh(scores / c)
    logit_soft_cap: float | None = None  # c * tanh(logits / c)
    attn_sinks: bool = False  # a learned logit per head that only joins the softmax denominator

    implementation: str = "auto"  # attention implementation: auto | dense | blocked | splash | ...
    remat: str = "none"  # none | full | dots | names:q,k,... (tap sites kept for the backward pass)
    param_dtype: str = "float32"
    compute_dtype: str = "auto"  # auto: bfloat16 on TPU and GPU, float32 on CPU
    extras: tuple[tuple[str, str], ...] = ()  # other config.json entries, JSON-encoded, kept as is

    def __post_init__(self):
        for name in ("num_layers", "model_dim", "num_heads"):
            _check_positive(name, getattr(self, name))
        derived = {
            "num_kv_heads": self.num_heads,
            "head_dim": self.model_dim // self.num_heads,
            "mlp_dim": 4 * self.model_dim,
            "embed_dim": self.model_dim,
        }
        if self.head_dim is None and self.model_dim % self.num_heads:
            raise ValueError(
                f"model_dim={self.model_dim} is not divisible by num_heads={self.num_heads}; give "
                "head_dim explicitly, or change one of them."
            )
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in _POSITIVE:
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}."
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}; "
                "query heads are grouped evenly over kv heads."
            )
        if not self.window or any(w is not None and w < 1 for w in self.window):
            raise ValueError(f"window={self.window!r} must hold positive widths or None.")
        if self.norm_placement == "post" and self.residual != "sequential":
            raise ValueError("norm_placement='post' needs residual='sequential'.")
        parse_remat(self.remat)
        _ = self.pattern

    @property
    def num_groups(self) -> int:
        """G, query heads per kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def score_scale(self) -> float:
        """Factor of q.k before the softmax."""
        return self.attn_scale if self.attn_scale is not None else self.head_dim**-0.5

    @property
    def pattern(self) -> tuple[LayerSpec, ...]:
        """The shortest block of layers whose repetition (the last one cut) gives the model."""
        variants = parse_attention(self.attention)
        period = math.lcm(len(variants), len(self.window))
        period = min(period, self.num_layers)
        return tuple(
            LayerSpec(variants[i % len(variants)], self.window[i % len(self.window)])
            for i in range(period)
        )

    def rope_of(self, spec: LayerSpec) -> RopeConfig | None:
        """Rotary settings of a layer, None without rotary positions."""
        if self.positions != "rope":
            return None
        return self.local_rope if self.local_rope and spec.window else self.rope

    @property
    def num_params(self) -> int:
        """Number of parameters outside attention variants that own some."""
        m, d, f = self.model_dim, self.head_dim, self.mlp_dim
        heads = self.num_heads * d
        kv = self.num_kv_heads * d
        norm = m * (2 if self.norm == "layernorm" else 1)
        num_norms = {"sandwich": 4}.get(self.norm_placement, 2)
        num_norms -= self.residual == "parallel_shared_norm"
        layer = (
            m * (heads + 2 * kv) + heads * m
            + self.qkv_bias * (heads + 2 * kv) + self.attn_out_bias * m
            + m * f * (3 if self.gated_mlp else 2)
            + self.mlp_bias * (f * (2 if self.gated_mlp else 1) + m)
            + num_norms * norm + self.qk_norm * 2 * d + self.attn_sinks * self.num_heads
        )  # fmt: skip
        outer = self.vocab_size * self.embed_dim * (1 if self.tie_embeddings else 2)
        outer += self.unembed_bias * self.vocab_size
        outer += 0 if self.norm_placement == "post" else norm
        if self.embed_dim != m:
            outer += 2 * m * self.embed_dim
        if self.positions == "learned":
            outer += (self.max_positions + self.position_offset) * m
        return self.num_layers * layer + outer


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{name}={value!r} must be a positive number.")


def parse_attention(text: str) -> tuple[str, ...]:
    """Variant names of a repeating block: ``"s2*3+dense"`` gives ``("s2","s2","s2","dense")``.

    Raises:
      ValueError: for malformed text or a name that is no row of `attention.VARIANTS`.
    """
    from jaxheads.attention import VARIANTS

    names: list[str] = []
    for part in text.split("+"):
        match = re.fullmatch(r"\s*([a-z][\w-]*)(?:\*(\d+))?\s*", part)
        if not match or match[2] == "0":
            raise ValueError(
                f"attention={text!r}: cannot read {part!r}; write 'dense' or 's2*3+dense'."
            )
        if match[1] not in VARIANTS:
            raise ValueError(
                f"attention={text!r}: no variant {match[1]!r}; variants: {', '.join(VARIANTS)}."
            )
        names += [match[1]] * int(match[2] or 1)
    return tuple(names)


def parse_remat(text: str) -> tuple[str, tuple[str, ...]]:
    """``(kind, names)`` of a rematerialisation policy: ``"names:q,k"`` gives ``("names", (...))``.

    Raises:
      ValueError: for an unknown kind or a name that is no tap site.
    """
    from jaxheads.taps import STACK_SITES, resolve_site

    kind, _, rest = text.partition(":")
    if kind not in ("none", "full", "dots", "names") or bool(rest) != (kind == "names"):
        raise ValueError(f"remat={text!r} is not one of none, full, dots, names:SITE,SITE,...")
    names = tuple(resolve_site(n.strip())[0] for n in rest.split(",")) if rest else ()
    for name in names:
        if name not in STACK_SITES:
            raise ValueError(f"remat={text!r}: {name!r} is outside the layer stack.")
    return kind, names


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
    "llama3-8b": llama3_8b,
    "llama3.1-8b": llama3_1_8b,
    "llama3.1-70b": llama3_1_70b,
    "qwen3-8b": qwen3_8b,
    "gemma3-27b": gemma3_27b,
}
"""Named configurations: what ``--model=`` accepts besides a directory."""
