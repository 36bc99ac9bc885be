"""Sliding windows in Hugging Face configurations: one width, and which layers have it.

Newer files list `layer_types`; older ones have a rule per family. Both are read, the list is
written. Every function here is a (read, write) pair: ``read(reader, our fields so far)`` gives
more of our fields, ``write(cfg)`` gives theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxheads.checkpoints.reader import COUNT, COUNT_OR_NULL, FLAG, Kind, Reader
from jaxheads.models.configs import ModelConfig

_NATURAL = Kind("an integer from 0", lambda v: type(v) is int and v >= 0)
_LAYER_TYPES = Kind(
    "a list of layer types",
    lambda v: v is None or (isinstance(v, list) and all(isinstance(x, str) for x in v)),
    supported=lambda v: not v or set(v) <= {"sliding_attention", "full_attention"},
)


def everywhere(default: int | None):
    """All layers alike (Mistral, Phi-3)."""
    return (
        lambda reader, ours: {"window": (reader.take("sliding_window", default, COUNT_OR_NULL),)},
        lambda cfg: {"sliding_window": cfg.window[0]},
    )


def from_layer():
    """Windows from layer `max_window_layers` on, where `use_sliding_window` says so (Qwen)."""

    def read(reader: Reader, ours: Mapping[str, Any]) -> dict[str, Any]:
        used = reader.take("use_sliding_window", False, FLAG)
        width = reader.take("sliding_window", 4096, COUNT_OR_NULL)
        first = reader.take("max_window_layers", 28, _NATURAL)
        width = width if used else None
        is_sliding = lambda i: width is not None and i >= first
        return {"window": _read_layers(reader, ours["num_layers"], width, is_sliding)}

    def write(cfg: ModelConfig) -> dict[str, Any]:
        sliding = [i for i, width in enumerate(per_layer(cfg)) if width is not None]
        return {
            "use_sliding_window": bool(sliding),
            "max_window_layers": sliding[0] if sliding else cfg.num_layers,
            "sliding_window": _width(cfg),
            "layer_types": _layer_types(cfg),
        }

    return read, write


def alternating(default_period: int, period_name: str = ""):
    """Every `period`-th layer sees everything, the others have a window (Gemma).

    Args:
      default_period: of the family.
      period_name: the field that may say otherwise, if the family has one.
    """

    def read(reader: Reader, ours: Mapping[str, Any]) -> dict[str, Any]:
        period = default_period
        if period_name:
            period = reader.take(period_name, default_period, COUNT)
        width = reader.take("sliding_window", 4096, COUNT_OR_NULL)
        is_sliding = lambda i: (i + 1) % period != 0
        return {"window": _read_layers(reader, ours["num_layers"], width, is_sliding)}

    def write(cfg: ModelConfig) -> dict[str, Any]:
        # The reference cannot run with null; without sliding layers any width will do.
        return {"sliding_window": _width(cfg) or 4096, "layer_types": _layer_types(cfg)}

    return read, write


def _read_layers(
    reader: Reader, num_layers: int, width: int | None, is_sliding: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """Windows from `layer_types`, or from the family's rule where that is absent."""
    types = reader.take("layer_types", None, _LAYER_TYPES)
    if types is None:
        sliding = [is_sliding(i) for i in range(num_layers)]
    else:
        sliding = [t == "sliding_attention" for t in types]
        if len(types) != num_layers:
            reader.complain(f"layer_types has {len(types)} entries for {num_layers} layers")
            return (None,)
    if any(sliding) and width is None:
        reader.complain("sliding_window=null, but layer_types has sliding_attention layers")
    return shortest_pattern([width if s else None for s in sliding])


def shortest_pattern(items: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest start of `items` whose repetition, the last one cut, gives `items`."""
    periods = range(1, len(items))
    period = next((p for p in periods if items[p:] == items[:-p]), len(items))
    return tuple(items[:period])


def per_layer(cfg: ModelConfig) -> list[int | None]:
    """The window of each layer."""
    return [cfg.window[i % len(cfg.window)] for i in range(cfg.num_layers)]


def _layer_types(cfg: ModelConfig) -> list[str]:
    return ["full_attention" if w is None else "sliding_attention" for w in per_layer(cfg)]


def _width(cfg: ModelConfig) -> int | None:
    return next((w for w in cfg.window if w is not None), None)
