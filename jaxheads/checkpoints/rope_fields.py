"""Rotary settings in Hugging Face configurations, in their old and new spelling.

    old   {"rope_theta": 5e5, "rope_scaling": {"type" or "rope_type": "llama3", "factor": 8, ...}}
    new   {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8, ...}}

Both are read. The old one is written: every version of the reference implementation reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxheads.attention.rope import RopeConfig
from jaxheads.checkpoints.reader import COUNT, FLAG, NUMBER, NUMBERS, OBJECT_OR_NULL, Kind, Reader
from jaxheads.models.configs import ModelConfig

_FIELDS: Mapping[str, tuple[str, Kind]] = {
    "factor": ("factor", NUMBER),
    "low_freq_factor": ("low_freq_factor", NUMBER),
    "high_freq_factor": ("high_freq_factor", NUMBER),
    "original_max_position_embeddings": ("original_max_positions", COUNT),
    "beta_fast": ("beta_fast", NUMBER),
    "beta_slow": ("beta_slow", NUMBER),
    "attention_factor": ("attention_factor", NUMBER),
    "mscale": ("mscale", NUMBER),
    "mscale_all_dim": ("mscale_all_dim", NUMBER),
    "truncate": ("truncate", FLAG),
    "short_factor": ("short_factor", NUMBERS),
    "long_factor": ("long_factor", NUMBERS),
}


class _Type(NamedTuple):
    scaling: str
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


_ORIGINAL = "original_max_position_embeddings"
_TYPES: Mapping[str, _Type] = {
    "default": _Type("none"),
    "linear": _Type("linear", ("factor",)),
    "llama3": _Type("llama3", ("factor", "low_freq_factor", "high_freq_factor"), (_ORIGINAL,)),
    "yarn": _Type(
        "yarn",
        (),
        ("factor", _ORIGINAL, "beta_fast", "beta_slow", "attention_factor", "mscale",
         "mscale_all_dim", "truncate"),
    ),
    "longrope": _Type(
        "longrope", ("short_factor", "long_factor"), ("factor", _ORIGINAL, "attention_factor")
    ),
}  # fmt: skip
_WITH_ORIGINAL = tuple(t for t, row in _TYPES.items() if _ORIGINAL in row.optional)
_REASONS = {
    "dynamic": "its frequencies depend on the length of each call",
    "mrope": "positions of images are not supported",
}
_ANY = Kind("any value", lambda v: True)
_FRACTION = Kind("a number in (0, 1]", lambda v: type(v) in (int, float) and 0 < v <= 1, float)
_WHOLE = _FRACTION._replace(supported=lambda v: v == 1)
Reading = Callable[[Reader, Mapping[str, Any]], dict[str, Any]]
Writing = Callable[[ModelConfig], dict[str, Any]]


def flat(*theta: str, fraction: str = "", default_fraction: float = 1.0) -> tuple[Reading, Writing]:
    """One rotation for all layers.

    Args:
      theta: names of the base at top level, the one to write first.
      fraction: older name of `partial_rotary_factor`; empty: heads rotate whole.
      default_fraction: of the family.
    """

    def read(reader: Reader, ours: Mapping[str, Any]) -> dict[str, Any]:
        settings = reader.take_any(("rope_scaling", "rope_parameters"), None, OBJECT_OR_NULL)
        base = reader.take_any(theta, None, _ANY)
        names = (fraction, "partial_rotary_factor") if fraction else ("partial_rotary_factor",)
        share = reader.take_any(names, None, _ANY)
        kind = _FRACTION if fraction else _WHOLE
        outer = {"rope_theta": base, "partial_rotary_factor": share}
        rope = _rope(reader, settings or {}, outer, ours, kind, default_fraction)
        return {"rope": rope}

    def write(cfg: ModelConfig) -> dict[str, Any]:
        shares = {fraction: cfg.rope.fraction} if fraction else {}
        return {theta[0]: cfg.rope.theta, **shares, **_scaling(cfg.rope)}

    return read, write


def _rope(
    reader: Reader,
    settings: Mapping[str, Any],
    outer: Mapping[str, Any],
    ours: Mapping[str, Any],
    fraction: Kind = _WHOLE,
    default_fraction: float = 1.0,
    default_theta: float = 10000.0,
    where: str = "rope_parameters",
) -> RopeConfig:
    """The rotation of a settings object; `outer` holds the same settings given outside it."""
    for name, value in outer.items():
        if value is not None and settings.get(name, value) != value:
            reader.complain(f"{name}={value!r} outside and {settings[name]!r} inside {where}")
    given = {n: v for n, v in {**outer, **settings}.items() if v is not None}
    inner = reader.inner(given, where)
    found = {
        "theta": inner.take("rope_theta", default_theta, NUMBER),
        "fraction": inner.take("partial_rotary_factor", default_fraction, fraction),
    }
    name = inner.left.pop("rope_type", inner.left.get("type", "default"))
    inner.left.pop("type", None)
    inner.left.pop("finetuned", None)  # whether the model was trained further: no maths
    row = _TYPES.get(name) if isinstance(name, str) else None
    if row is None:
        known = isinstance(name, str)
        reason = _REASONS.get(name, f"known: {', '.join(_TYPES)}") if known else "needed a name"
        reader.refuse(f"{where}.rope_type", name, reason)
        return RopeConfig()
    for missing in sorted(set(row.needed) - set(inner.left)):
        reader.complain(f"{where} of type {name!r} has no {missing}")
    for field in (*row.needed, *row.optional):
        if field in inner.left:
            key, kind = _FIELDS[field]
            found[key] = inner.take(field, kind.write(getattr(RopeConfig(), key)), kind)
    if inner.left:
        unread = ", ".join(sorted(inner.left))
        reader.complain(f"{where} of type {name!r} does not use {unread}")
    if name in _WITH_ORIGINAL:
        found.setdefault("original_max_positions", ours["max_positions"])
        found.setdefault("factor", ours["max_positions"] / found["original_max_positions"])
    try:
        return RopeConfig(scaling=row.scaling, **found)
    except ValueError as error:
        reader.complain(f"{where}: {str(error).rstrip('.')}")
        return RopeConfig()


def _settings(rope: RopeConfig) -> dict[str, Any]:
    """The fields of the rotation's type; {} for an unscaled one."""
    name = "default" if rope.scaling == "none" else rope.scaling
    row, standard = _TYPES[name], RopeConfig()
    written = {}
    for field in (*row.needed, *row.optional):
        key, kind = _FIELDS[field]
        value = getattr(rope, key)
        # Optional settings are written where they say something; the derived ones always do.
        if field in (*row.needed, "factor", _ORIGINAL) or value != getattr(standard, key):
            written[field] = kind.write(value)
    return {"rope_type": name, **written}


def _scaling(rope: RopeConfig) -> dict[str, Any]:
    return {} if rope.scaling == "none" else {"rope_scaling": _settings(rope)}


def read_phi3(reader: Reader, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Phi-3: the original length stands at top level, and its yarn and su mean longrope."""
    settings = dict(
        reader.take_any(("rope_scaling", "rope_parameters"), None, OBJECT_OR_NULL) or {}
    )
    outer = {
        "rope_theta": reader.take("rope_theta", None, _ANY),
        "partial_rotary_factor": reader.take("partial_rotary_factor", None, _ANY),
    }
    name = settings.pop("rope_type", settings.get("type", "default"))
    settings.pop("type", None)
    name = {"su": "longrope", "yarn": "longrope"}.get(name, name) if isinstance(name, str) else name
    if name not in ("default", "longrope"):
        reader.refuse("rope_scaling.type", name, "the family has default and longrope")
        return {}
    if name == "longrope":
        # The reference lets the outer value win over one inside, and defaults to it.
        settings[_ORIGINAL] = reader.take(_ORIGINAL, 4096, COUNT)
    settings["rope_type"] = name
    return {"rope": _rope(reader, settings, outer, ours, _FRACTION)}


def write_phi3(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_phi3`."""
    rope = cfg.rope
    written: dict[str, Any] = {
        "rope_theta": rope.theta,
        "partial_rotary_factor": rope.fraction,
    }
    if rope.scaling != "none":
        settings = _settings(rope)
        written[_ORIGINAL] = settings.pop(_ORIGINAL, None)
        # Older readers insist on exactly type, short_factor and long_factor.
        settings["type"] = settings.pop("rope_type")
        if settings.get("factor") == cfg.max_positions / written[_ORIGINAL]:
            del settings["factor"]
        written["rope_scaling"] = settings
    return written


_BOTH = ("full_attention", "sliding_attention")


def read_by_layer_type(reader: Reader, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 3: one rotation for full layers, another for those with a window."""
    new = reader.take("rope_parameters", None, OBJECT_OR_NULL) or {}
    scaling = reader.take("rope_scaling", None, OBJECT_OR_NULL) or {}
    full = reader.take("rope_theta", None, _ANY)
    local = reader.take("rope_local_base_freq", None, _ANY)
    if set(new) - set(_BOTH) or not all(isinstance(v, dict | None) for v in new.values()):
        reader.complain(f"rope_parameters={new!r} (needed objects {' and '.join(_BOTH)})")
        return {}
    settings = {**(new.get("full_attention") or {}), **scaling}
    return {
        "rope": _rope(
            reader, settings, {"rope_theta": full}, ours, default_theta=1e6,
            where="rope_parameters.full_attention",
        ),
        "local_rope": _rope(
            reader, new.get("sliding_attention") or {}, {"rope_theta": local}, ours,
            where="rope_parameters.sliding_attention",
        ),
    }  # fmt: skip


def write_by_layer_type(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_by_layer_type`."""
    local = cfg.local_rope or cfg.rope
    if dataclasses.replace(local, theta=1.0) == RopeConfig(theta=1.0):
        return {
            "rope_theta": cfg.rope.theta,
            "rope_local_base_freq": local.theta,
            **_scaling(cfg.rope),
        }
    return {
        "rope_parameters": {
            name: {"rope_theta": rope.theta, **_settings(rope)}
            for name, rope in zip(_BOTH, (cfg.rope, local))
        }
    }
