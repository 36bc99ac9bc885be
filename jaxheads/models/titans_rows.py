"""Titans layers as rows of the table of architectures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxheads.models.attend import Mixed
from jaxheads.models.configs import LayerSpec, ModelConfig
from jaxheads.models.run import Run
from jaxheads.models.titans_layers import (
    LayerInput,
    TitansParams,
    init_lmm,
    init_mag,
    init_mal,
    lmm,
    mag,
    mal,
)
from jaxheads.models.titans_mac import init_mac, mac
from jaxheads.models.titans_options import (
    MacOptions,
    MagOptions,
    MalOptions,
    MemoryOptions,
)
from jaxheads.taps import MEMORY_SITES, Tap
from jaxheads.typing import Array, PyTree


class Variant(NamedTuple):
    """One way to put a memory into a layer."""

    options: type[MemoryOptions]
    apply: Callable[..., tuple[Array, PyTree]]
    """(parameters, options, LayerInput, state) -> (y [B,T,M], state)."""
    init_state: Callable[..., PyTree]
    """(cfg, batch_size, num_slots, dtype, options) -> state."""
    sites: frozenset[str]


_ATTENTION_SITES = MEMORY_SITES | {"q", "k", "v", "z"}
TITANS: Mapping[str, Variant] = {
    "lmm": Variant(MemoryOptions, lmm, init_lmm, MEMORY_SITES | {"z"}),
    "mag": Variant(MagOptions, mag, init_mag, _ATTENTION_SITES),
    "mal": Variant(MalOptions, mal, init_mal, _ATTENTION_SITES),
    "mac": Variant(MacOptions, mac, init_mac, _ATTENTION_SITES),
}

# Settings of a decoder's attention that Titans layers do not have, and the value that asks nothing.
_UNUSED: Mapping[str, Any] = {
    "attention": "dense",
    "window": (None,),
    "local_rope": None,
    "qk_norm": False,
    "qkv_bias": False,
    "attn_out_bias": False,
    "attn_soft_cap": None,
    "attn_sinks": False,
    "scale_by_layer": False,
}


def check(cfg: ModelConfig, name: str) -> None:
    """Raise for settings of the decoder that a Titans layer would ignore."""
    for field, nothing in _UNUSED.items():
        if getattr(cfg, field) != nothing:
            raise ValueError(
                f"{field}={getattr(cfg, field)!r} has no meaning for architecture titans-{name}; "
                f"leave it at {nothing!r}"
                + (
                    " and set the window in the architecture's options."
                    if field == "window"
                    else "."
                )
            )
    if cfg.positions == "alibi":
        raise ValueError(
            f"positions='alibi' has no meaning for architecture titans-{name}; use 'rope', "
            "'learned' or 'none'."
        )


def build(name: str, cfg: ModelConfig, *, rngs: nnx.Rngs) -> TitansParams:
    """The parameters of one layer of a decoder."""
    check(cfg, name)
    options: Any = cfg.mixer.options
    if getattr(options, "mode", "causal") != "causal":
        raise ValueError(
            f"mode={options.mode!r} lets tokens see later ones; a causal language model cannot be "
            "built of it. Use mode='causal', or TitansLayer for analysis."
        )
    return TitansParams(cfg, options, name, rngs=rngs)


def mix(
    name: str,
    spec: LayerSpec,
    run: Run,
    module: TitansParams,
    variant_params: PyTree,
    x: Array,
    state: PyTree,
    layer: Array,
    tap: Tap,
) -> Mixed:
    """A Titans layer in the place of attention."""
    del spec, variant_params, layer
    if run.reads is not None:
        raise NotImplementedError(
            f"architecture titans-{name} computes all tokens of a row in order; outputs at chosen "
            "slots alone need a transformer."
        )
    call = LayerInput(run.cfg, x, run.positions, run.segment_ids, run.slots, tap)
    y, state = TITANS[name].apply(module, run.cfg.mixer.options, call, state)
    return Mixed(y, state, {})


def state_axes(name: str, options: Any) -> PyTree:
    """Batch over its mesh axes, heads over theirs."""
    from jaxheads.models.configs import ModelConfig

    cfg = ModelConfig(num_heads=2, model_dim=4)
    shapes = jax.eval_shape(lambda: TITANS[name].init_state(cfg, 1, 1, "float32", options))

    def axes(path: Any, leaf: Any) -> tuple[str | None, ...]:
        names = {getattr(key, "name", None) for key in path}
        if names & {"weights", "momentum", "ref_weights", "at_start"}:
            return ("batch", "act_heads", None, None)
        if names & {"tails", "tail", "queries"}:
            return ("batch", None, "act_heads", None)
        if leaf.ndim == 4:
            return ("batch", None, "act_kv_heads", None)
        return ("batch", *(None,) * (leaf.ndim - 1))

    return jax.tree_util.tree_map_with_path(axes, shapes)


def work(name: str, cfg: ModelConfig, seq_len: int) -> tuple[float, float]:
    """(mean visible keys, forward FLOPs of the recurrence) of one token in one layer.

    A memory of matrices W_l takes, per head and token, products of 2 |W_l| operations: for the keys
    one, for the deltas one (not the first matrix), to read two (weights and momentum), to write
    two. Products of tokens with tokens add 2 b (d_in + d_out) a matrix.
    """
    options: Any = cfg.mixer.options
    d = cfg.head_dim
    widths = [d, *[options.expansion * d] * (options.depth - 1), d]
    flops = 0.0
    for layer, (a, b) in enumerate(itertools.pairwise(widths)):
        flops += (12 if layer else 10) * a * b + 2 * options.chunk * (a + b)
    visible = 0.0
    if name == "mac":
        c = min(options.segment, seq_len)
        visible = options.persistent + (c + 1) / 2 * (1 + options.num_memory / options.segment)
    elif name in ("mag", "mal"):
        w = min(options.window, seq_len)
        visible = w - w * (w - 1) / (2 * seq_len) + (options.persistent if name == "mag" else 0)
    return visible, cfg.num_heads * flops


def titans_row(name: str) -> tuple:
    """(module, mix, options, init_state, state_axes, sites, work) of an architecture."""
    variant = TITANS[name]
    return (
        partial(build, name),
        partial(mix, name),
        variant.options,
        variant.init_state,
        partial(state_axes, name),
        variant.sites,
        partial(work, name),
    )
