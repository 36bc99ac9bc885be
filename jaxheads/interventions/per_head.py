"""Payloads with one entry a head, fitted to the model when the forward is called.

A wrapper such as ``ablate(forward, [(9, 6)])`` does not know the model yet. Its edit carries a
payload with a method ``fit(site, cfg)``; the forward returned by `intervene_per_head` replaces it
by arrays that lead with [L], after checking it against the model. Everything stays data: the
payload's arrays are leaves of the wrapped forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp

from jaxheads.models import ModelConfig, Output
from jaxheads.models.vit_configs import ViTConfig
from jaxheads.taps import NO_TAPS, SITES, Edit, TappedForward, Taps, as_tapped, resolve_site
from jaxheads.typing import PyTree


@runtime_checkable
class PerHead(Protocol):
    """A payload that becomes arrays once the model is known."""

    def fit(self, site: str, cfg: ModelConfig) -> PyTree:
        """Arrays leading with [L]; raises ValueError where it does not fit the model."""
        ...


@runtime_checkable
class HasPositions(Protocol):
    """A payload that names columns of the text, which may lie outside it."""

    def check(self, length: int, is_cached: bool) -> None:
        """Raises ValueError for columns known not to be there."""
        ...


@dataclass(frozen=True)
class HeadForward:
    """A forward that fits `PerHead` payloads to its model before it runs."""

    forward: Callable[..., Output]

    def __call__(self, model: Any, tokens: Any, *, taps: Taps = NO_TAPS, **kwargs: Any) -> Output:
        """`forward` with fitted taps."""
        edits = []
        for edit in taps.edits:
            if isinstance(edit.payload, HasPositions):
                text = kwargs.get("embeddings")
                length = num_tokens_of(model.cfg, tokens if text is None else text)
                edit.payload.check(length, kwargs.get("cache") is not None)
            if isinstance(edit.payload, PerHead):
                fitted = edit.payload.fit(edit.site, model.cfg)
                edit = dataclasses.replace(edit, payload=fitted)
            edits.append(edit)
        return self.forward(model, tokens, taps=Taps(tuple(edits), taps.record), **kwargs)


def num_tokens_of(cfg: Any, inputs: Any) -> int:
    """T: the length of a text (ids [B,T] or embeddings [B,T,M]), or how an image is cut."""
    return cfg.num_tokens if isinstance(cfg, ViTConfig) else jnp.shape(inputs)[1]


def intervene_per_head(forward: Callable[..., Any], edit: Edit) -> TappedForward:
    """`taps.intervene` for an edit whose payload is a `PerHead`."""
    inner = as_tapped(forward)
    base = inner.forward
    base = base if isinstance(base, HeadForward) else HeadForward(base)
    return TappedForward(base, inner.taps + Taps((edit,)))


def base_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The function under all wrappers."""
    base = as_tapped(forward).forward
    return base.forward if isinstance(base, HeadForward) else base


def head_axis(site: str) -> int:
    """Which axis of a site's value counts heads.

    Raises:
      ValueError: for a site without one.
    """
    letters = SITES[resolve_site(site)[0]].split()
    for letter in ("H", "K"):
        if letter in letters:
            return letters.index(letter)
    with_heads = [s for s, axes in SITES.items() if {"H", "K"} & set(axes.split())]
    raise ValueError(f"site {site!r} has no head axis; sites with one: {', '.join(with_heads)}.")


def num_heads_of(site: str, cfg: ModelConfig) -> tuple[int, str]:
    """How many heads a site counts, and which kind: query heads (H) or key/value heads (K)."""
    if "K" in SITES[site].split():
        return cfg.num_kv_heads or cfg.num_heads, "key/value heads"
    return cfg.num_heads, "query heads"
