"""One frozen configuration for every decoder family.

A family (GPT-2, Llama, Gemma, ...) is a setting of these fields, not a class: `models/decoder.py`
reads them. `checkpoints/families.py` converts Hugging Face configurations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from jaxheads.attention.rope import RopeConfig
from jaxheads.fields import override, unknown

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
    "scan_unroll",
    "norm_eps",
    "embed_scale",
    "embed_std",
    "attn_scale",
    "attn_soft_cap",
    "logit_soft_cap",
)


class Named(NamedTuple):
    """A row of a table, and its options."""

    name: str
    options: Any
    """An instance of the row's `options`, a frozen dataclass; None for a row without any."""


class LayerSpec(NamedTuple):
    """What distinguishes one layer of the repeating pattern from another."""

    attention: str
    """A row of `jaxheads.attention.VARIANTS`."""
    window: int | None
    """Sliding-window width in tokens, None for full attention."""
    options: Any = None
    """The variant's options: an instance of ``VARIANTS[attention].options``, None without any."""


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
    # Deviation of embeddings before training. Small models learn to look tokens up many times
    # faster from about 0.3: at 0.02 the first layers' outputs drown what the token was.
    embed_std: float = 0.02

    architecture: str = "transformer"  # a row of models.ARCHITECTURES: what mixes tokens
    attention: str = "dense"  # variants of the layers, repeating: "dense", "s2(block=64)*3+dense"
    window: tuple[int | None, ...] = (None,)  # sliding windows of the layers, repeating
    attn_scale: float | None = None  # None: head_dim ** -0.5
    scale_by_layer: bool = False  # divide the scores of layer l by l + 1 (an option of GPT-2)
    attn_soft_cap: float | None = None  # c * tanh(scores / c)
    logit_soft_cap: float | None = None  # c * tanh(logits / c)
    attn_sinks: bool = False  # a learned logit per head that only joins the softmax denominator

    implementation: str = "auto"  # attention implementation: auto | dense | blocked | splash | ...
    # Kept for the backward pass: none (of it recomputed) | full | dots | names:q,k,... (sites) |
    # offload (layer inputs, in host memory) | offload:lse,... (those, and tap sites)
    remat: str = "none"
    mlp_chunk: int = 0  # tokens of a device that the MLP takes at a time; 0: all
    scan_unroll: int = 1  # repeats of the layer pattern in one step of the loop over layers
    param_dtype: str = "float32"
    compute_dtype: str = "auto"  # auto: bfloat16 on TPU and GPU, float32 on CPU
    extras: tuple[tuple[str, str], ...] = ()  # other config.json entries, JSON-encoded, kept as is

    def __post_init__(self):
        for name in ("num_layers", "model_dim", "num_heads"):
            check_positive(name, getattr(self, name))
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
                check_positive(name, getattr(self, name))
        check_choices(self, _CHOICES)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}; "
                "query heads are grouped evenly over kv heads."
            )
        if not self.window or any(w is not None and w < 1 for w in self.window):
            raise ValueError(f"window={self.window!r} must hold positive widths or None.")
        if self.norm_placement == "post" and self.residual != "sequential":
            raise ValueError("norm_placement='post' needs residual='sequential'.")
        if isinstance(self.mlp_chunk, bool) or not self.mlp_chunk >= 0:
            raise ValueError(
                f"mlp_chunk={self.mlp_chunk!r} must be a number of tokens, or 0 for all."
            )
        parse_remat(self.remat)
        _ = self.mixer, self.layout
        self._check_variants()

    def _check_variants(self) -> None:
        from jaxheads.attention import VARIANTS

        for spec in self.pattern:
            check = VARIANTS[spec.attention].check
            if check is not None:
                check(self, spec)

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
            LayerSpec(name, self.window[i % len(self.window)], options)
            for i, (name, options) in ((i, variants[i % len(variants)]) for i in range(period))
        )

    @property
    def mixer(self) -> Named:
        """The architecture and its options."""
        from jaxheads.models.architectures import ARCHITECTURES

        return parse_named(self.architecture, ARCHITECTURES, "architecture")

    @property
    def layout(self) -> str:
        """The order in which layers take tokens over a context axis (`attention.layouts`).

        Raises:
          ValueError: layers of one pattern that want tokens in different orders.
        """
        wanted = {spec: getattr(spec.options, "layout", "contiguous") for spec in self.pattern}
        if len(set(wanted.values())) > 1:
            raise ValueError(
                f"attention={self.attention!r} mixes layouts "
                f"{', '.join(sorted(set(wanted.values())))}: tokens are put in one order for all "
                "layers, so give every layer of the pattern the same layout (variants without the "
                "option are contiguous)."
            )
        return next(iter(wanted.values()))

    def require_transformer(self, what: str) -> None:
        """Raise where `what` rests on heads whose outputs a layer projects and adds, and on them
        alone: other architectures put norms, gates or a recurrence between."""
        if self.mixer.name != "transformer":
            raise NotImplementedError(
                f"{what} is defined for architecture 'transformer', not {self.mixer.name!r}, whose "
                "heads do not simply add to the residual stream; use ablate, patch, "
                "activation_patch or attribution_patch."
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
        mixer = (
            m * (heads + 2 * kv) + heads * m
            + self.qkv_bias * (heads + 2 * kv) + self.attn_out_bias * m
            + self.qk_norm * 2 * d + self.attn_sinks * self.num_heads
        )  # fmt: skip
        if self.mixer.name != "transformer":
            from jaxheads.models.architectures import num_mixer_params

            mixer = num_mixer_params(self)
        layer = (
            mixer
            + m * f * (3 if self.gated_mlp else 2)
            + self.mlp_bias * (f * (2 if self.gated_mlp else 1) + m)
            + num_norms * norm
        )  # fmt: skip
        outer = self.vocab_size * self.embed_dim * (1 if self.tie_embeddings else 2)
        outer += self.unembed_bias * self.vocab_size
        outer += 0 if self.norm_placement == "post" else norm
        if self.embed_dim != m:
            outer += 2 * m * self.embed_dim
        if self.positions == "learned":
            outer += (self.max_positions + self.position_offset) * m
        return self.num_layers * layer + outer


def check_choices(config: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Raise for a field of a configuration whose value is not one of its choices."""
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is not one of {', '.join(allowed)}."
            )


def check_positive(name: str, value: Any) -> None:
    """Raise unless a field's value is a positive number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{name}={value!r} must be a positive number.")


def parse_attention(text: str) -> tuple[Named, ...]:
    """Variants of a repeating block: ``"s2*2+dense"`` gives s2, s2, dense, each with its options.

    Raises:
      ValueError: for malformed text, a name that is no row of `attention.VARIANTS`, or options
        that its variant does not have.
    """
    from jaxheads.attention import VARIANTS

    layers: list[Named] = []
    for part in re.split(r"\+(?![^(]*\))", text):  # at every + outside parentheses
        match = re.fullmatch(r"\s*(\S.*?)(?:\s*\*\s*(\d+))?\s*", part)
        if not match or match[2] == "0":
            raise ValueError(
                f"attention={text!r}: cannot read {part!r}; write 'dense', 's2*3+dense' or "
                "'s2(block=64)'."
            )
        layers += [parse_named(match[1], VARIANTS, "attention")] * int(match[2] or 1)
    return tuple(layers)


def parse_named(text: str, table: Mapping[str, Any], field: str) -> Named:
    """``"name(option=value,...)"`` as a row of `table` and its options.

    Args:
      text: the name of a row, and in parentheses settings of the dataclass `row.options`.
      table: rows by name.
      field: what the text is a value of, for messages.

    Raises:
      ValueError: for malformed text, an unknown row, or a setting that its options refuse.
    """
    match = re.fullmatch(r"\s*([a-z][\w-]*)\s*(?:\((.*)\))?\s*", text)
    if not match:
        raise ValueError(f"{field}: cannot read {text!r}; write a name, or name(option=value,...).")
    name, inner = match[1], match[2]
    if name not in table:
        raise ValueError(f"{field}={text!r}: {unknown(field, name, table)}")
    kind = table[name].options
    settings = [
        part.partition("=") for part in re.split(r",(?![^(]*\))", inner or "") if part.strip()
    ]
    if kind is None:
        if settings:
            raise ValueError(f"{field}={text!r}: {name!r} has no options.")
        return Named(name, None)
    if not all(equals for _, equals, _ in settings):
        raise ValueError(f"{field}={text!r}: options are written option=value, split by commas.")
    given = {option.strip(): value.strip() for option, _, value in settings}
    return Named(name, override(kind(), given, section=name))


def parse_remat(text: str) -> tuple[str, tuple[str, ...]]:
    """``(kind, names)`` of a rematerialisation policy: ``"names:q,k"`` gives ``("names", (...))``.

    ``"offload"`` gives ``("offload", ("resid_pre",))``: the layer inputs wait in host memory.

    Raises:
      ValueError: for an unknown kind or a name that is no tap site.
    """
    from jaxheads.taps import STACK_SITES, resolve_site

    kind, _, rest = text.partition(":")
    allowed = {"none": (False,), "full": (False,), "dots": (False,), "names": (True,),
               "offload": (False, True)}  # fmt: skip
    if bool(rest) not in allowed.get(kind, ()):
        raise ValueError(
            f"remat={text!r} is not one of none, full, dots, names:SITE,SITE,..., offload or "
            "offload:SITE,SITE,..."
        )
    names = tuple(resolve_site(n.strip())[0] for n in rest.split(",")) if rest else ()
    for name in names:
        if name not in STACK_SITES:
            raise ValueError(f"remat={text!r}: {name!r} is outside the layer stack.")
    if kind == "offload":
        names = ("resid_pre", *(n for n in names if n != "resid_pre"))
    return kind, names
