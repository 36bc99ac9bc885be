"""What a token mixer is: the template, the checks and the arithmetic that all mixers share."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.attention.masks import Mask
from jaxheads.typing import Array, PyTree


class MixerCost(NamedTuple):
    """What mixing one sequence takes, forward, without projections to queries, keys and values."""

    flops: float
    """Floating-point operations; a multiplication with an addition counts two."""
    bytes: float
    """Least traffic to memory: inputs and parameters read once, outputs written once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixer:
    """One way for tokens to mix: ``Y = M(X) V(X) + offset(X)``, per head or per channel.

    A mixer is a frozen set of options (hashable: a static argument under `jax.jit`); parameters
    are a dictionary of arrays. Heads are merged in the output, and neither output projection nor
    residual belongs to a mixer.

    Attributes:
      model_dim: M, width of the tokens.
      num_heads: H, for the mixers that have heads.
      length: longest sequence, for the mixers whose parameters have a token axis; shorter ones use
        the first rows.
    """

    model_dim: int = 64
    num_heads: int = 4
    length: int = 256

    name: ClassVar[str]
    is_data_dependent: ClassVar[bool]
    """Whether the matrix is a function of x."""
    has_causal_form: ClassVar[bool] = True
    takes_pair_mask: ClassVar[bool] = False
    """Whether `mask` may be [B,H,T,T], each query with keys of its own."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"{field.name}={value} of mixer {self.name!r} must be 1 or more.")
        if self.model_dim % self.num_heads:
            raise ValueError(
                f"model_dim={self.model_dim} is not divisible by num_heads={self.num_heads}; every "
                "head has model_dim / num_heads channels."
            )

    @property
    def head_dim(self) -> int:
        """D, the channels of one head."""
        return self.model_dim // self.num_heads

    @property
    def output_dim(self) -> int:
        """Width of Y."""
        return self.model_dim

    def init(self, key: Array) -> PyTree:
        """Parameters as a dictionary of float32 arrays; empty for a mixer without any."""
        return {}

    def apply(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """Mixes the tokens.

        Args:
          params: what `init` returned.
          x: [B,T,M].
          causal: no token reads a later one. Convolutions and state spaces never do.
          mask: [B,T] bool, the tokens that are there (nobody reads the others), or, for softmax,
            sparse and kernel, bool broadcastable to [B,H,T,T] with four axes.
        Returns:
          Y [B,T,output_dim], the dtype of x.
        Raises:
          NotImplementedError: `causal` for a mixer without a causal form, or a mask by pairs for
            one that never compares pairs.
        """
        raise NotImplementedError

    def matrix(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """The operator M(X), [B,H,T,T] per head or [B,M,T,T] per channel: an oracle for small T."""
        raise NotImplementedError

    def values(self, params: PyTree, x: Array) -> Array:
        """V(X), [B,H,T,W] per head or [B,M,T,1] per channel."""
        raise NotImplementedError

    def offset(
        self, params: PyTree, x: Array, *, causal: bool = False, mask: Array | None = None
    ) -> Array:
        """What Y has beside ``M(X) V(X)``: zero except for the bias of gMLP."""
        return jnp.zeros((*x.shape[:2], self.output_dim), x.dtype)

    def cost(self, length: int, *, causal: bool = False, itemsize: int = 4) -> MixerCost:
        """FLOPs and bytes to mix one sequence of `length` tokens.

        Args:
          length: T.
          causal: whether half the pairs are never needed.
          itemsize: bytes of a number.
        """
        raise NotImplementedError

    def check(self, x: Array, *, causal: bool, mask: Array | None) -> Mask:
        """Refuses what the mixer cannot do; the mask as a `Mask`."""
        if x.ndim != 3:
            raise ValueError(f"x has shape {x.shape}; a mixer needs [B,T,M].")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"x holds {x.dtype}; a mixer needs floating-point tokens.")
        if causal and not self.has_causal_form:
            raise NotImplementedError(
                f"mixer {self.name!r} has no causal form: each of its outputs is made of all "
                "tokens. Use causal=False, or a mixer whose has_causal_form is True."
            )
        if mask is None or mask.ndim != 2:
            return Mask(is_causal=causal, head_mask=self._pair_mask(x, mask))
        if mask.shape != x.shape[:2]:
            raise ValueError(f"mask has shape {mask.shape}; x needs [B,T] {x.shape[:2]}.")
        return Mask(is_causal=causal, key_mask=_is_bool(mask))

    def _pair_mask(self, x: Array, mask: Array | None) -> Array | None:
        if mask is None:
            return None
        if not self.takes_pair_mask:
            raise NotImplementedError(
                f"mixer {self.name!r} never compares pairs of tokens, so a mask of shape "
                f"{mask.shape} cannot be honoured; pass [B,T], the tokens that are there."
            )
        batch, length, _ = x.shape
        full = (batch, self.num_heads, length, length)
        if mask.ndim != 4 or any(m not in (1, n) for m, n in zip(mask.shape, full)):
            raise ValueError(
                f"mask has shape {mask.shape}; it must be [B,T] or broadcast to [B,H,T,T] {full}."
            )
        return _is_bool(mask)


def _is_bool(mask: Array) -> Array:
    if mask.dtype != bool:
        raise TypeError(f"mask holds {mask.dtype}; it must be bool, True for tokens to read.")
    return mask


def combine(matrix: Array, values: Array) -> Array:
    """``M V`` with heads merged: [B,H,T,T], [B,H,T,W] -> [B,T,H*W]; the real part if complex."""
    y = jnp.einsum("bhts,bhsw->bthw", matrix, values).real
    return y.reshape(*y.shape[:2], -1)  # [B,T,H*W]


def accumulator(x: Array) -> jnp.dtype:
    """float32, or float64 where x is: what sums over tokens are kept in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def width_of(x: Array, expected: int, what: str) -> None:
    """Raises unless the tokens are as wide as the parameters say."""
    if x.shape[-1] != expected:
        raise ValueError(
            f"x has shape {x.shape} but {what} were made for model_dim={expected}; make them again "
            "with the width of x."
        )


def fits(x: Array, longest: int, name: str) -> None:
    """Raises for a sequence longer than the parameters' token axis."""
    if x.shape[1] > longest:
        raise ValueError(
            f"x has {x.shape[1]} tokens but the parameters of mixer {name!r} were made for "
            f"length={longest}; make them with length={x.shape[1]} or more."
        )


def hide(x: Array, mask: Mask) -> Array:
    """x [B,T,...] with zeros in place of the tokens that are not there."""
    if mask.key_mask is None:
        return x
    return jnp.where(mask.key_mask.reshape(*x.shape[:2], *(1,) * (x.ndim - 2)), x, 0)


def hide_columns(matrix: Array, mask: Mask) -> Array:
    """A matrix [...,T,T] -> [B,H,T,T] that reads nothing from tokens that are not there."""
    if mask.key_mask is None:
        return matrix
    return jnp.where(mask.key_mask[:, None, None, :], matrix, 0)


def normal(key: Array, shape: tuple[int, ...], deviation: float) -> Array:
    """Initial values."""
    return deviation * jax.random.normal(key, shape, jnp.float32)


def init_qkv(key: Array, mixer: Mixer) -> dict[str, Array]:
    """wq, wk, wv [M,H,D], normal with deviation 1/sqrt(M)."""
    shape = (mixer.model_dim, mixer.num_heads, mixer.head_dim)
    keys = jax.random.split(key, 3)
    return {w: normal(k, shape, mixer.model_dim**-0.5) for w, k in zip(("wq", "wk", "wv"), keys)}


def project(params: PyTree, x: Array, *names: str) -> tuple[Array, ...]:
    """[B,T,H,D] for each named matrix, for example ``q, k = project(params, x, "wq", "wk")``."""
    width_of(x, params[names[0]].shape[0], "the projections")
    return tuple(jnp.einsum("btm,mhd->bthd", x, params[w].astype(x.dtype)) for w in names)


def merge_heads(z: Array) -> Array:
    """[B,T,H,W] -> [B,T,H*W]."""
    return z.reshape(*z.shape[:2], -1)


def head_values(params: PyTree, x: Array) -> Array:
    """``X W_v`` as [B,H,T,D], the values of every mixer that has queries and keys."""
    (v,) = project(params, x, "wv")
    return jnp.swapaxes(v, 1, 2)
