"""The configuration of vision transformers, and those of known ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxheads.models.configs import (
    Derived,
    ModelConfig,
    Named,
    check_choices,
    check_positive,
    parse_named,
    parse_remat,
)

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "activation": ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu"),
    "param_dtype": ("float32", "bfloat16", "float16"),
    "compute_dtype": ("auto", "float32", "bfloat16", "float16"),
}
_POSITIVE = (
    "image_size",
    "patch_size",
    "channels",
    "num_classes",
    "num_layers",
    "model_dim",
    "num_heads",
    "mlp_dim",
    "norm_eps",
)
_DERIVED: Any = None


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A vision transformer that classifies square images. Hashable, so a safe static argument.

    Raises:
      ValueError: for a value outside its choices, naming field, value and rule.
    """

    image_size: int = 28  # pixels of a side
    patch_size: int = 7  # pixels of a patch's side; divides image_size
    channels: int = 1
    num_classes: int = 10

    num_layers: int = 4  # L
    model_dim: int = 64  # M, residual width
    num_heads: int = 4  # H
    mlp_dim: Derived = _DERIVED  # F; None: 4 * model_dim
    norm_eps: float = 1e-12
    activation: str = "gelu"  # the exact one
    qkv_bias: bool = True

    distilled: bool = False  # a distillation token after the class token (DeiT)
    teacher_head: bool = False  # a classifier of the distillation token; logits are the mean of two

    attention: str = "softmax"  # a row of VISION_ATTENTIONS, options in parentheses behind the name

    implementation: str = "auto"  # of softmax attention: auto | dense | blocked | splash | ...
    remat: str = "none"  # as ModelConfig.remat
    param_dtype: str = "float32"
    compute_dtype: str = "auto"  # auto: bfloat16 on TPU and GPU, float32 on CPU
    extras: tuple[tuple[str, str], ...] = ()  # other config.json entries, JSON-encoded, kept as is

    def __post_init__(self):
        if self.mlp_dim is None:
            object.__setattr__(self, "mlp_dim", 4 * self.model_dim)
        for name in _POSITIVE:
            check_positive(name, getattr(self, name))
        check_choices(self, _CHOICES)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not divisible by patch_size={self.patch_size}; "
                "an image is cut into whole patches."
            )
        if self.model_dim % self.num_heads:
            raise ValueError(
                f"model_dim={self.model_dim} is not divisible by num_heads={self.num_heads}; heads "
                "share the width evenly."
            )
        if self.teacher_head and not self.distilled:
            raise ValueError(
                "teacher_head=True classifies the distillation token, which distilled=False leaves "
                "out; set distilled=True."
            )
        parse_remat(self.remat)
        _ = self.mixer

    @property
    def family(self) -> str:
        """The Hugging Face model type: only DeiT has a distillation token."""
        return "deit" if self.distilled else "vit"

    @property
    def grid(self) -> tuple[int, int]:
        """(Hg, Wg): the image in patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def extra_tokens(self) -> int:
        """E: the tokens before the patches, 1 (class) or 2 (class, distillation)."""
        return 2 if self.distilled else 1

    @property
    def num_tokens(self) -> int:
        """T = E + Hg Wg."""
        return self.extra_tokens + self.grid[0] * self.grid[1]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.model_dim // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        """K = H: query heads share no keys."""
        return self.num_heads

    @property
    def num_groups(self) -> int:
        """G = 1."""
        return 1

    @property
    def vocab_size(self) -> int:
        """V: the classes, as the axis of logits is called."""
        return self.num_classes

    @property
    def mixer(self) -> Named:
        """The row of `VISION_ATTENTIONS` and its options."""
        from jaxheads.models.vit_attention import VISION_ATTENTIONS

        return parse_named(self.attention, VISION_ATTENTIONS, "attention")

    @property
    def block(self) -> ModelConfig:
        """The same as a stack of pre-norm layers: what `models.layers` reads."""
        return ModelConfig(
            family=self.family,
            vocab_size=self.num_classes,
            num_layers=self.num_layers,
            model_dim=self.model_dim,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            max_positions=self.num_tokens,
            positions="learned",
            norm="layernorm",
            norm_eps=self.norm_eps,
            activation=self.activation,
            gated_mlp=False,
            qkv_bias=self.qkv_bias,
            attn_out_bias=True,
            mlp_bias=True,
            unembed_bias=True,
            tie_embeddings=False,
            implementation=self.implementation,
            remat=self.remat,
            param_dtype=self.param_dtype,
            compute_dtype=self.compute_dtype,
        )


def _imagenet(model_dim: int, num_heads: int, attention: str = "softmax") -> ViTConfig:
    return ViTConfig(
        image_size=224,
        patch_size=16,
        channels=3,
        num_classes=1000,
        num_layers=12,
        model_dim=model_dim,
        num_heads=num_heads,
        attention=attention,
    )


VIT_PRESETS: Mapping[str, Callable[[], ViTConfig]] = {
    "vit-tiny": ViTConfig,
    "vit-b": lambda: _imagenet(768, 12),
    "deit-t": lambda: _imagenet(192, 3),
    "deit-s": lambda: _imagenet(384, 6),
    "deit-b": lambda: _imagenet(768, 12),
    "agent-deit-t": lambda: _imagenet(192, 3, "agent(num_agents=49)"),
    "agent-deit-s": lambda: _imagenet(384, 6, "agent(num_agents=49)"),
    "agent-deit-b": lambda: _imagenet(768, 12, "agent(num_agents=81)"),
}
"""Sizes by name: ViT-B/16 (Dosovitskiy et al., 2021, arXiv:2010.11929), DeiT without distillation
(Touvron et al., 2021, arXiv:2012.12877), the same with agent attention (Han et al., 2024,
arXiv:2312.08874), and one for 28 x 28 pixels."""
