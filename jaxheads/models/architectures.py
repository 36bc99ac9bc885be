"""The table of architectures: what mixes tokens in a layer of the decoder.

The norms, the MLP, the residual stream, the taps of all of them, the embedding and the read-out
are the decoder's. An architecture owns the part between the first norm and the residual stream.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxheads.attention import VARIANTS
from jaxheads.models.attend import Mixed, attend
from jaxheads.models.configs import LayerSpec, ModelConfig
from jaxheads.models.layers import Attention
from jaxheads.models.titans_rows import TITANS, titans_row
from jaxheads.typing import PyTree


class Work(NamedTuple):
    """What mixing costs one token in one layer, besides its parameters."""

    visible: float
    """Mean number of keys that attention sees."""
    flops: float
    """Other forward FLOPs."""


class Architecture(NamedTuple):
    """A row of `ARCHITECTURES`."""

    module: Callable[..., Any]
    """(cfg, *, rngs) -> the module that holds a layer's parameters, at `Block.attention`; the
    options are `cfg.mixer.options`."""
    mix: Callable[..., Mixed]
    """(spec, run, module, variant_params, x [B,T,M], state, layer, tap) -> `Mixed`."""
    options: type | None = None
    """A frozen dataclass with defaults: what parentheses after the name may set."""
    init_state: Callable[..., PyTree] | None = None
    """(cfg, batch_size, num_slots, dtype, options) -> what one layer keeps between calls, batch
    first; None: what the layer's attention variant keeps."""
    state_axes: Callable[..., PyTree] | None = None
    """options -> the logical axes of each array of the state, a tuple in its place; None: only
    the batch is split."""
    sites: frozenset[str] | None = None
    """The tap sites of the part that mixes tokens; None: those of attention."""
    work: Callable[..., Work] | None = None
    """(cfg, seq_len) -> `Work` of one layer and token; None: attention over the visible keys."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "transformer": Architecture(Attention, attend),
    **{f"titans-{name}": Architecture(*titans_row(name)) for name in TITANS},
}
"""What ``model.architecture`` may name. A new one is a new file and a row here."""


class OwnState(NamedTuple):
    """How the layers at one place of the pattern keep a state of their own."""

    init: Callable[..., PyTree]
    options: Any
    axes: PyTree | None


def own_state(cfg: ModelConfig, spec: LayerSpec) -> OwnState | None:
    """What a layer of this kind keeps between calls; None: rows of the key/value cache."""
    name, options = cfg.mixer
    row: Any = ARCHITECTURES[name]
    if row.init_state is None:
        row, options = VARIANTS[spec.attention], spec.options
    if row.init_state is None:
        return None
    axes = None if row.state_axes is None else row.state_axes(options)
    return OwnState(row.init_state, options, axes)


@functools.lru_cache(maxsize=256)
def num_mixer_params(cfg: ModelConfig) -> int:
    """Parameters of the part of one layer that mixes tokens, counted from their shapes."""
    build = lambda: ARCHITECTURES[cfg.mixer.name].module(cfg, rngs=nnx.Rngs(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(build)))
