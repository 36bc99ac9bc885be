"""What the parentheses of ``model.architecture="titans-mac(chunk=16,persistent=128)"`` may set."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from jaxheads.models.titans_masks import check_groups, check_window

LOSSES = ("half", "sum", "mean")
GATES = ("sigmoid", "silu", "tanh")
STABLE_THETA = 0.3


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """The neural memory of a layer; alone it is the architecture ``titans-lmm``.

    Defaults follow arXiv:2501.00663 (NeurIPS 2025 text) except `theta_max`, which keeps a deep
    memory stable (the gradient of a deep memory is not bounded by its keys).

    Raises:
      ValueError: for a value outside its range, naming field, value and rule.
    """

    chunk: int = 16  # b, tokens whose gradients are taken at the same weights
    depth: int = 2  # L_M, matrices of the memory network; 1 is a linear memory
    expansion: int = 4  # hidden width of the memory network over head_dim
    residual_norm: bool = True  # M(x) = x + LN(mlp(x)) instead of mlp(x)
    theta_max: float = 0.1  # largest step size of the inner gradient descent
    max_grad_norm: float = 1.0  # soft limit of a token's inner gradient; 0: none (NaN when deep)
    max_outer_growth: float = 4.0  # limit of derivatives through inner gradients; 0: none (NaN too)
    loss: str = "half"  # inner loss: half | sum | mean (over head_dim)
    read: str = "post"  # post | pre: a token reads the memory after or before its own write
    conv: int = 4  # width of the causal depthwise convolution of k, v, q; 1: none
    persistent: int = 128  # N_p, learned tokens before the sequence; 0: none
    momentum: bool = True  # False: eta = 0
    forgetting: bool = True  # False: alpha = 0
    forget_bias: float = -4.0  # of the forgetting gate before training: sigmoid(-4) = 2 % a token
    learning: bool = True  # False: theta = 0, a memory frozen at its learned start
    stop_inner_grad: bool = False  # train through the memory as if its gradients were constants
    per_layer_gates: bool = False  # gates of their own for every matrix of the memory
    # Forget each input channel of the first matrix by itself; the tap mem_alpha is of the others.
    channelwise_alpha: bool = False
    documents: str = "reset"  # reset | carry: what becomes of the memory where a document begins

    def __post_init__(self):
        for name in ("chunk", "depth", "expansion", "conv"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.channelwise_alpha and not self.forgetting:
            raise ValueError("channelwise_alpha=True has no meaning with forgetting=False.")
        if self.persistent < 0:
            raise ValueError(f"persistent={self.persistent} must not be negative.")
        if not 0 < self.theta_max <= 1:
            raise ValueError(f"theta_max={self.theta_max} must be above 0 and at most 1.")
        for name in ("max_grad_norm", "max_outer_growth"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        choices = {"loss": LOSSES, "read": ("post", "pre"), "documents": ("reset", "carry")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}."
                )
        if self.depth > 1 and not self.residual_norm and self.theta_max > STABLE_THETA:
            warnings.warn(
                f"theta_max={self.theta_max} with a plain memory of depth {self.depth} diverges "
                f"within a sequence; stay at or below {STABLE_THETA}, or set residual_norm=true.",
                stacklevel=3,
            )


def _check_gate(gate: str) -> None:
    if gate not in GATES:
        raise ValueError(f"gate={gate!r} is not one of {', '.join(GATES)}.")


@dataclass(frozen=True, kw_only=True)
class MagOptions(MemoryOptions):
    """Memory as gate: sliding-window attention times a gate from the memory."""

    window: int = 2048  # keys of the sliding window
    gate: str = "sigmoid"  # non-linearity of the memory's branch

    def __post_init__(self):
        super().__post_init__()
        check_window(self.window)
        _check_gate(self.gate)


@dataclass(frozen=True, kw_only=True)
class MalOptions(MemoryOptions):
    """Memory as layer: sliding-window attention over what the memory reads out."""

    window: int = 2048  # keys of the sliding window

    def __post_init__(self):
        super().__post_init__()
        check_window(self.window)


@dataclass(frozen=True, kw_only=True)
class MacOptions(MemoryOptions):
    """Memory as context: attention within segments over persistent and memory tokens."""

    segment: int = 512  # C, tokens of a segment; a multiple of `chunk`
    memory_tokens: int | None = None  # N_l, memory tokens of a segment; None: one a token
    mode: str = "causal"  # causal | literal (the paper's equations; refused by decoders)
    gate: str = "sigmoid"  # non-linearity of the memory's branch

    def __post_init__(self):
        super().__post_init__()
        _check_gate(self.gate)
        if self.mode not in ("causal", "literal"):
            raise ValueError(f"mode={self.mode!r} is neither 'causal' nor 'literal'.")
        if self.segment < 1 or self.segment % self.chunk:
            raise ValueError(
                f"segment={self.segment} is not a multiple of chunk={self.chunk}; a chunk of the "
                "memory must not straddle two segments."
            )
        check_groups(self.num_memory, self.segment)

    @property
    def num_memory(self) -> int:
        """N_l."""
        return self.segment if self.memory_tokens is None else self.memory_tokens


OPTIONS: dict[str, type[MemoryOptions]] = {
    "lmm": MemoryOptions,
    "mag": MagOptions,
    "mal": MalOptions,
    "mac": MacOptions,
}
"""Options by variant."""
