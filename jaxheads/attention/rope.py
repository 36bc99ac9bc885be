"""Positions inside attention: rotary embeddings with their scalings, and ALiBi slopes.

Rotary embeddings turn the pair (a, b) of query and key channels by an angle position * inv_freq:

    (a, b) -> (a cos - b sin, b cos + a sin)

so that scores depend on relative positions (Su et al. 2021, arXiv:2104.09864). The scalings
stretch the frequencies of a trained model to longer inputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from jaxheads.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How positions turn into rotation angles. Hashable, so safe as a static argument."""

    theta: float = 10000.0  # base of the geometric series of wavelengths
    fraction: float = 1.0  # share of head_dim that rotates: int(head_dim * fraction) channels
    interleaved: bool = False  # pairs (2i, 2i+1) as in GPT-J; otherwise (i, i + R/2)
    scaling: str = "none"  # none, linear, llama3, yarn or longrope
    factor: float = 1.0  # how many times longer than the original the context is
    low_freq_factor: float = 1.0  # llama3: wavelengths above original/low are divided by factor
    high_freq_factor: float = 4.0  # llama3: wavelengths below original/high are kept
    original_max_positions: int | None = None  # context length before the extension
    beta_fast: float = 32.0  # yarn: rotations above which a channel is kept
    beta_slow: float = 1.0  # yarn: rotations below which a channel is interpolated
    attention_factor: float | None = None  # yarn, longrope: scale of cos and sin; None = derived
    mscale: float | None = None  # yarn: numerator of the derived attention factor (DeepSeek)
    mscale_all_dim: float | None = None  # yarn: its denominator
    truncate: bool = True  # yarn: round the ramp's ends to whole channels
    short_factor: tuple[float, ...] = ()  # longrope: per channel, inputs up to the original length
    long_factor: tuple[float, ...] = ()  # longrope: per channel, longer inputs

    def __post_init__(self):
        if self.theta <= 0:
            raise ValueError(f"theta={self.theta} must be positive.")
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"fraction={self.fraction} must be in (0, 1]; a model without rotation has no "
                "RopeConfig (None) instead."
            )
        if self.scaling not in _SCALINGS:
            raise ValueError(f"unknown scaling {self.scaling!r}; known: {', '.join(_SCALINGS)}.")
        if self.factor <= 0:
            raise ValueError(f"factor={self.factor} must be positive.")
        if self.scaling in ("llama3", "yarn", "longrope") and not self.original_max_positions:
            raise ValueError(
                f"scaling={self.scaling!r} needs original_max_positions, the context length the "
                f"model was trained with; got {self.original_max_positions}."
            )
        if self.scaling == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must be larger than "
                f"low_freq_factor={self.low_freq_factor}."
            )
        if self.scaling == "longrope" and not (self.short_factor and self.long_factor):
            raise ValueError("scaling='longrope' needs short_factor and long_factor.")

    @property
    def original_length(self) -> int:
        """`original_max_positions` where the scaling has it, else 0."""
        return self.original_max_positions or 0

    def rotary_dim(self, head_dim: int) -> int:
        """R, the number of channels that rotate."""
        return int(head_dim * self.fraction)


def inverse_frequencies(
    cfg: RopeConfig, head_dim: int, *, length: int | None = None
) -> tuple[np.ndarray, float]:
    """Angle per position of each channel pair, and the factor on cos and sin.

        inv_freq[i] = theta^(-2i / R),  then scaled as `cfg.scaling` says

    Args:
      cfg: the rotation.
      head_dim: D; the first R = int(D * fraction) channels rotate.
      length: longest input the frequencies are for (tokens, or the size of the cache). Only
        longrope reads it: `long_factor` when length > original_max_positions, otherwise
        (or None) `short_factor`. transformers applies the same rule to max(position) + 1 of each
        call; here the length is static, so a cache keeps one set of frequencies for its lifetime.
    Returns:
      ([R/2] float32 computed in float64, attention scaling as a Python float).
    References: linear: Chen et al. 2023, arXiv:2306.15595; llama3: Llama team 2024,
      arXiv:2407.21783; yarn: Peng et al. 2023, arXiv:2309.00071; longrope: Ding et al. 2024,
      arXiv:2402.13753.
    """
    rotary_dim = cfg.rotary_dim(head_dim)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(
            f"head_dim={head_dim} with fraction={cfg.fraction} rotates {rotary_dim} channels; "
            "channels rotate in pairs, so choose values that give a positive even number."
        )
    inv_freq = cfg.theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    inv_freq, attention_scaling = _SCALINGS[cfg.scaling](cfg, inv_freq, length)
    return inv_freq.astype(np.float32), float(attention_scaling)


def rotate(
    x: Array, positions: Array, inv_freq: Array, *, interleaved: bool, scaling: float = 1.0
) -> Array:
    """Rotates the first R channels of every head by its position; the others pass through.

    Args:
      x: [B,T,H,D] queries or keys.
      positions: [T], [B,T] or, for heads that differ, [B,T,H].
      inv_freq: [R/2] from `inverse_frequencies`.
      interleaved: pairs are (2i, 2i+1) instead of (i, i + R/2).
      scaling: factor on cos and sin.
    Returns:
      [B,T,H,D], the dtype of `x`; computed in float32.
    Example:
      >>> x = jnp.ones((1, 2, 1, 2))
      >>> rotate(x, jnp.arange(2), jnp.ones(1), interleaved=False)[0, 0, 0].tolist()
      [1.0, 1.0]
    """
    half = len(inv_freq)
    if positions.ndim < 3:
        positions = positions[..., None]
    angles = positions.astype(jnp.float32)[..., None] * inv_freq  # [(B,)T,1|H,R/2]
    cos, sin = jnp.cos(angles) * scaling, jnp.sin(angles) * scaling
    rotary, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = rotary[..., 0::2], rotary[..., 1::2]
        turned = jnp.stack((a * cos - b * sin, b * cos + a * sin), axis=-1).reshape(rotary.shape)
    else:
        a, b = rotary[..., :half], rotary[..., half:]
        turned = jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)
    turned = turned.astype(x.dtype)
    return jnp.concatenate((turned, rest), axis=-1) if rest.shape[-1] else turned


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slope of the linear distance penalty of each head, [H] float32.

    For a power of two the slopes are 2^(-8h/H), h = 1..H; otherwise the slopes of the power of
    two below H, then every other slope of the next one.

    References: Press et al. 2021, arXiv:2108.12409 (and its released code for other H).
    """
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads} must be at least 1.")
    below = 2 ** int(math.log2(num_heads))
    slopes = _geometric_slopes(below)
    if below < num_heads:
        slopes = np.concatenate((slopes, _geometric_slopes(2 * below)[::2]))[:num_heads]
    return slopes.astype(np.float32)


def _geometric_slopes(count: int) -> np.ndarray:
    return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)


def _unscaled(cfg: RopeConfig, inv_freq: np.ndarray, length: int | None):
    return inv_freq, 1.0


def _linear(cfg: RopeConfig, inv_freq: np.ndarray, length: int | None):
    return inv_freq / cfg.factor, 1.0


def _llama3(cfg: RopeConfig, inv_freq: np.ndarray, length: int | None):
    """Long wavelengths are divided by factor, short ones kept, the rest blended."""
    rotations = cfg.original_length * inv_freq / (2 * math.pi)
    keep = (rotations - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return keep * inv_freq + (1 - keep) * inv_freq / cfg.factor, 1.0


def _yarn(cfg: RopeConfig, inv_freq: np.ndarray, length: int | None):
    """Channels that turn often are kept, slow ones interpolated, with a ramp between."""
    rotary_dim = 2 * len(inv_freq)

    def channel(num_rotations: float) -> float:
        """The channel that turns `num_rotations` times over the original context."""
        turns = cfg.original_length / (num_rotations * 2 * math.pi)
        return rotary_dim * math.log(turns) / (2 * math.log(cfg.theta))

    low, high = channel(cfg.beta_fast), channel(cfg.beta_slow)
    if cfg.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = (high - low) or 0.001  # the reference's guard against an empty ramp
    interpolate = np.clip((np.arange(len(inv_freq)) - low) / width, 0.0, 1.0)
    scaled = inv_freq * (1 - interpolate) + inv_freq / cfg.factor * interpolate
    return scaled, _yarn_attention_factor(cfg)


def _yarn_attention_factor(cfg: RopeConfig) -> float:
    if cfg.attention_factor is not None:
        return cfg.attention_factor

    def magnitude(mscale: float) -> float:
        return 1.0 if cfg.factor <= 1 else 0.1 * mscale * math.log(cfg.factor) + 1.0

    if cfg.mscale and cfg.mscale_all_dim:
        return magnitude(cfg.mscale) / magnitude(cfg.mscale_all_dim)
    return magnitude(1.0)


def _longrope(cfg: RopeConfig, inv_freq: np.ndarray, length: int | None):
    is_long = length is not None and length > cfg.original_length
    name = "long_factor" if is_long else "short_factor"
    factors = np.asarray(getattr(cfg, name), np.float64)
    if len(factors) != len(inv_freq):
        raise ValueError(
            f"{name} has {len(factors)} entries; {len(inv_freq)} channel pairs rotate, so it needs "
            f"{len(inv_freq)}."
        )
    attention_factor = cfg.attention_factor
    if attention_factor is None:
        growth = math.log(max(cfg.factor, 1.0)) / math.log(cfg.original_length)
        attention_factor = math.sqrt(1 + growth)
    return inv_freq / factors, attention_factor


_SCALINGS: Mapping[str, Callable] = {
    "none": _unscaled,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
