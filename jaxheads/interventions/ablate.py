"""Taking heads out: zero, mean and resample ablation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxheads import heads as head_sets
from jaxheads.interventions.per_head import intervene_per_head
from jaxheads.models import ModelConfig
from jaxheads.taps import Edit, TapContext, TappedForward, record
from jaxheads.typing import Array, ArrayLike, PyTree


def ablate(
    forward: Callable[..., Any],
    heads: head_sets.Heads,
    *,
    mode: str = "zero",
    means: ArrayLike | None = None,
    key: Array | None = None,
) -> TappedForward:
    """A forward in which the output z of the given heads is replaced.

        z[:, :, h] <- (1 - mask[l, h]) * z[:, :, h] + mask[l, h] * replacement

    The replacement is 0 (``zero``), ``means[l, h]`` (``mean``), or the z of the same head and
    position in another row of the batch (``resample``: rows are rolled by a random offset, the
    same for all heads and layers, so no row meets itself).

    Args:
      forward: a forward, wrapped or not.
      heads: an array [L,H], bool or numbers from 0 (keep) to 1 (replace), or a list such as
        ``[(9, 6)]`` or ``["9.6"]``. Arrays of one model and lists of one length share a compiled
        program.
      mode: ``"zero"``, ``"mean"`` or ``"resample"``.
      means: [L,H,D] for ``mean``; `mean_z` computes them on reference text.
      key: a typed random key for ``resample``.

    Raises:
      ValueError: for an unknown mode, a missing or needless argument, a head listed twice; when
        called, for heads the model does not have.
    """
    needs = {"zero": (), "mean": ("means",), "resample": ("key",)}
    if mode not in needs:
        raise ValueError(f"mode={mode!r} is not one of {', '.join(needs)}.")
    for name, value in (("means", means), ("key", key)):
        if (value is not None) != (name in needs[mode]):
            must = "needs" if value is None else "takes no"
            hint = " Compute them with interventions.mean_z." if must == "needs" else ""
            hint = " Pass key=jax.random.key(0)." if must == "needs" and name == "key" else hint
            raise ValueError(f"mode={mode!r} {must} {name}.{hint}")
    source = key if means is None else jnp.asarray(means)
    if head_sets.is_mask(heads):
        payload = Ablation(heads, source, is_mask=True)
    else:
        pairs = np.asarray(head_sets.parse_heads(heads), np.int32).reshape(-1, 2)  # [N,2]
        payload = Ablation(pairs, source, is_mask=False)
    return intervene_per_head(forward, Edit("z", _EDITS[mode], payload))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ablation:
    """Which heads, and what their replacement needs: nothing, means [L,H,D], or a key."""

    heads: ArrayLike
    """[L,H] mask, or [N,2] pairs (layer, head)"""
    source: PyTree
    is_mask: bool = field(metadata={"static": True})

    def fit(self, site: str, cfg: ModelConfig) -> PyTree:
        """(mask [L,H], means [L,H,D] or keys [L] or None), checked against the model."""
        size = (cfg.num_layers, cfg.num_heads)
        if self.is_mask:
            head_sets.check_shape(jnp.shape(self.heads), *size, "the head mask")
            mask = jnp.asarray(self.heads, jnp.float32)
        else:
            mask = _mask_of_pairs(self.heads, *size)
        source = self.source
        if source is not None and jnp.issubdtype(source.dtype, jax.dtypes.prng_key):
            source = jnp.broadcast_to(source, size[:1])
        elif source is not None and jnp.shape(source) != (*size, cfg.head_dim):
            raise ValueError(
                f"means has shape {jnp.shape(source)}; this model needs "
                f"{[*size, cfg.head_dim]}, layers x heads x head_dim."
            )
        return mask, source


def _mask_of_pairs(pairs: ArrayLike, num_layers: int, num_heads: int) -> Array:
    """[N,2] pairs as a mask [L,H]. Traced pairs out of range give NaN, as bad token ids do."""
    if not isinstance(pairs, Tracer):
        head_sets.check_range(np.asarray(pairs).tolist(), num_layers, num_heads)
    layer, head = jnp.asarray(pairs)[:, 0], jnp.asarray(pairs)[:, 1]
    mask = jnp.zeros((num_layers, num_heads), jnp.float32).at[layer, head].set(1.0, mode="drop")
    is_known = jnp.all((layer < num_layers) & (head < num_heads))
    return jnp.where(is_known, mask, jnp.nan)


def zero_heads(z: Array, payload: PyTree, ctx: TapContext) -> Array:
    """Edit of z [B,T,H,D]: heads of the mask [H] become 0."""
    del ctx
    mask, _ = payload
    return z * (1 - mask).astype(z.dtype)[:, None]


def mean_heads(z: Array, payload: PyTree, ctx: TapContext) -> Array:
    """Edit of z [B,T,H,D]: heads of the mask [H] become their means [H,D]."""
    del ctx
    mask, means = payload
    return _mix(z, mask, jnp.asarray(means))


def resample_heads(z: Array, payload: PyTree, ctx: TapContext) -> Array:
    """Edit of z [B,T,H,D]: heads of the mask [H] take the values of another row."""
    del ctx
    mask, key = payload
    if z.shape[0] < 2:
        raise ValueError("mode='resample' takes values of another row; the batch has one row.")
    return _mix(z, mask, jnp.roll(z, jax.random.randint(key, (), 1, z.shape[0]), axis=0))


def _mix(z: Array, mask: Array, replacement: Array) -> Array:
    weight = mask.astype(z.dtype)[:, None]
    return z * (1 - weight) + replacement.astype(z.dtype) * weight


_EDITS = {"zero": zero_heads, "mean": mean_heads, "resample": resample_heads}


def mean_z(
    forward: Callable[..., Any],
    model: Any,
    tokens: Array,
    *,
    segment_ids: Array | None = None,
) -> Array:
    """[L,H,D] float32: each head's z averaged over the tokens of a batch, padding left out.

    Holds z of all layers, [L,B,T,H,D]: use a batch of moderate size.
    """
    z = record(forward, "z")(model, tokens, segment_ids=segment_ids).seen["z"]
    if segment_ids is None:
        return jnp.mean(z, axis=(1, 2), dtype=jnp.float32)
    weights = (segment_ids != 0).astype(jnp.float32)
    total = jnp.einsum("lbthd,bt->lhd", z, weights, preferred_element_type=jnp.float32)
    return total / jnp.maximum(jnp.sum(weights), 1)
