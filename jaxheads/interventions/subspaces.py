"""Low-rank edits: keeping or removing what a site says inside a subspace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads import heads as head_sets
from jaxheads.interventions.per_head import intervene_per_head
from jaxheads.interventions.places import LayersLike, Place, PositionsLike, check_heads, mix
from jaxheads.models import ModelConfig
from jaxheads.taps import OUTER_SITES, SITES, Edit, TapContext, TappedForward
from jaxheads.typing import Array, ArrayLike, is_traced

SPACES = frozenset({"B T H D", "B S K D", "B T M"})
ORTHONORMAL = 1e-3


def keep_subspace(
    forward: Callable[..., Any],
    basis: ArrayLike,
    heads: head_sets.Heads | None = None,
    *,
    site: str,
    mean: ArrayLike | None = None,
    positions: PositionsLike = None,
    layers: LayersLike = None,
) -> TappedForward:
    """A forward in which a site keeps only what lies in a subspace: a low-rank q, k, v or z.

        x <- mean + P (x - mean),   P = basis basis^T

    Args:
      forward: a forward, wrapped or not.
      basis: [L,H,D,R] ([L,K,D,R] at key/value sites; one head axis of size one serves all heads),
        [L,M,R] at sites of the residual stream, [M,R] outside the layers. Columns are orthonormal
        or zero (a head of lower rank); `orthonormal_basis` makes them so.
      heads: as for `patch`; None for all.
      site: ``q``, ``k``, ``v``, ``q_rot``, ``k_rot``, ``z``, or one of the residual width. ``q``
        and ``k`` are before the rotation: the positions are turned in afterwards.
      mean: the basis's shape without R; None for zero.
      positions: as for `patch`.
      layers: as for `patch`.

    Raises:
      ValueError: for a basis that is not orthonormal, or of another shape.

    References: Lieberum et al., 2023, arXiv:2307.09458.
    """
    return _project(forward, basis, heads, site, mean, positions, layers, keep=True)


def project_out(
    forward: Callable[..., Any],
    basis: ArrayLike,
    heads: head_sets.Heads | None = None,
    *,
    site: str,
    mean: ArrayLike | None = None,
    positions: PositionsLike = None,
    layers: LayersLike = None,
) -> TappedForward:
    """A forward in which a site loses what lies in a subspace.

        x <- x - P (x - mean),   P = basis basis^T

    Arguments as for `keep_subspace`; with a `mean` the part inside the subspace becomes the mean's.

    References: Ravfogel et al., 2020, arXiv:2004.07667 (removing a subspace).
    """
    return _project(forward, basis, heads, site, mean, positions, layers, keep=False)


def _project(forward, basis, heads, site, mean, positions, layers, *, keep) -> TappedForward:
    place = Place.of(site, heads, layers, positions)
    if SITES[place.site] not in SPACES:
        able = [s for s, axes in SITES.items() if axes in SPACES]
        raise ValueError(
            f"site {place.site!r} is [{SITES[place.site].replace(' ', ',')}]; subspaces are of "
            f"{', '.join(able)}."
        )
    basis = jnp.asarray(basis)
    axes = ([] if place.site in OUTER_SITES else ["L"]) + SITES[place.site].split()[2:]
    if basis.ndim != len(axes) + 1:
        raise ValueError(
            f"basis has shape {basis.shape} at site {place.site!r}; needed [{','.join(axes)},R]."
        )
    if mean is not None and jnp.shape(mean) != basis.shape[:-1]:
        raise ValueError(
            f"mean has shape {jnp.shape(mean)}; needed that of the basis without its last axis, "
            f"{basis.shape[:-1]}."
        )
    _check_orthonormal(basis)
    mean = None if mean is None else jnp.asarray(mean)
    payload = Subspace(place, basis, mean, keep)
    return intervene_per_head(forward, Edit(place.site, project, payload))


def _check_orthonormal(basis: Array) -> None:
    """Raise where known columns are neither orthonormal nor zero."""
    if is_traced(basis) or not basis.is_fully_addressable:
        return
    columns = np.asarray(basis, np.float64)
    gram = np.einsum("...dr,...ds->...rs", columns, columns)
    diagonal = np.einsum("...rr->...r", gram)
    wanted = np.eye(gram.shape[-1]) * (diagonal > ORTHONORMAL)[..., None]
    error = np.abs(gram - wanted).max(initial=0)
    if not error <= ORTHONORMAL:
        raise ValueError(
            f"the basis is not orthonormal (basis^T basis is off by up to {error:.3g}); its "
            "columns must be unit vectors at right angles, or zero. Pass orthonormal_basis(basis)."
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Subspace:
    """A basis and where it acts: the payload of `keep_subspace` and `project_out`."""

    place: Place
    basis: Array
    mean: Array | None
    keep: bool = field(metadata={"static": True})

    def fit(self, site: str, cfg: ModelConfig) -> Subspace:
        """The same with a place of arrays; the basis checked against the model."""
        shape, axes = self.basis.shape, SITES[site].split()
        width = cfg.head_dim if axes[-1] == "D" else cfg.model_dim
        if shape[-2] != width:
            raise ValueError(
                f"basis has shape {shape}; vectors at site {site!r} have {width} numbers, the axis "
                "before the last."
            )
        if axes[-1] == "D" and shape[1] != 1:
            check_heads(shape[:2], site, cfg, "basis has", shape)
        elif site not in OUTER_SITES and shape[0] != cfg.num_layers:
            raise ValueError(f"basis has shape {shape}; this model has {cfg.num_layers} layers.")
        return Subspace(self.place.fit(site, cfg), self.basis, self.mean, self.keep)

    def check(self, length: int, is_cached: bool) -> None:
        """Raise for positions known to lie outside a text of this length."""
        self.place.check(length, is_cached)


def project(value: Array, payload: Subspace, ctx: TapContext) -> Array:
    """Edit of a value [B,T,H,D] or [B,T,M] by a basis [H|1,D,R] or [M,R]."""
    basis, x = payload.basis.astype(jnp.float32), value.astype(jnp.float32)
    mean = 0.0 if payload.mean is None else payload.mean.astype(jnp.float32)
    if basis.ndim == 3:
        basis = jnp.broadcast_to(basis, (value.shape[2], *basis.shape[1:]))
        inside = jnp.einsum("bthd,hdr->bthr", x - mean, basis)
        inside = jnp.einsum("bthr,hdr->bthd", inside, basis)
    else:
        inside = jnp.einsum("btm,mr->btr", x - mean, basis)
        inside = jnp.einsum("btr,mr->btm", inside, basis)
    new = mean + inside if payload.keep else x - inside
    return mix(value, payload.place.weights(value, ctx), new)


def orthonormal_basis(vectors: ArrayLike, rank: int | None = None) -> Array:
    """[..., D, N] vectors as columns -> [..., D, R] orthonormal columns that span them.

    The leading left singular vectors; where the vectors span less than R dimensions (singular
    values below 1e-6 of the largest) the columns left over are zero. R is `rank`, or min(D, N).

    Raises:
      ValueError: when `rank` is not from 1 to min(D, N).
    """
    vectors = jnp.asarray(vectors, jnp.float32)
    most = min(vectors.shape[-2:])
    rank = most if rank is None else rank
    if not 1 <= rank <= most:
        raise ValueError(f"rank={rank} must be from 1 to {most} for vectors {vectors.shape}.")
    left, sizes, _ = jnp.linalg.svd(vectors, full_matrices=False)
    held = sizes > 1e-6 * jnp.max(sizes, axis=-1, keepdims=True)
    return jnp.where(held[..., None, :], left, 0.0)[..., :rank]
