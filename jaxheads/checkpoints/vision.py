"""Vision transformers in Hugging Face directories: configurations and tensor names of ViT and DeiT.

What `families.py` and `names.py` are for decoders. The three heads that are read are rows of
`FAMILIES`, by the name in ``architectures``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxheads.checkpoints.families import (
    LAYERS,
    Family,
    Field,
    Part,
    activation,
    check_is_json,
    read_family,
    write_family,
)
from jaxheads.checkpoints.names import NameMap, Row, linear_rows, norm_rows
from jaxheads.checkpoints.reader import COUNT, FLAG, NUMBER, Kind, Reader
from jaxheads.fields import from_json, to_json
from jaxheads.models.vit_configs import ViTConfig

OWN = "jaxheads-vit"
"""Model type of configurations that no Hugging Face family can express."""


def _side(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


SIDE = Kind(
    "a positive integer, or two that are equal (only square images and patches are supported)",
    lambda v: (
        COUNT.accepts(_side(v)) if not isinstance(v, list) else len(v) == 2 and v[0] == v[1] > 0
    ),
    _side,
)


def _default_labels(count: int) -> dict[str, Any]:
    """The names of classes that have none."""
    labels = [f"LABEL_{i}" for i in range(count)]
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _read_labels(reader: Reader, ours: Mapping[str, Any]) -> dict[str, Any]:
    """The number of classes; the names of classes stay, unless they only count them."""
    del ours
    names, count = reader.left.get("id2label"), reader.left.pop("num_labels", None)
    if isinstance(names, dict):
        if count is not None and count != len(names):
            reader.complain(f"num_labels={count!r} (id2label has {len(names)} entries)")
        count = len(names)
        for field, value in _default_labels(count).items():
            if reader.left.get(field) == value:
                del reader.left[field]
    count = 2 if count is None else count
    if not COUNT.accepts(count):
        reader.complain(f"num_labels={count!r} (needed {COUNT.needed})")
        count = 2
    return {"num_classes": count}


def _write_labels(cfg: ViTConfig) -> dict[str, Any]:
    named = dict(cfg.extras)
    fields = _default_labels(cfg.num_classes).items()
    return {name: value for name, value in fields if name not in named}


# The pooler belongs to bare models, the stride to masked-image pretraining.
_METADATA = """
    attention_probs_dropout_prob encoder_stride hidden_dropout_prob pooler_act pooler_output_size
"""


def _family(architecture: str, **fixed: Any) -> Family:
    return Family(
        architecture,
        (
            Field("image_size", "image_size", 224, SIDE),
            Field("patch_size", "patch_size", 16, SIDE),
            Field("num_channels", "channels", 3),
            Field("hidden_size", "model_dim", 768),
            Field("num_hidden_layers", "num_layers", 12, LAYERS),
            Field("num_attention_heads", "num_heads", 12),
            Field("intermediate_size", "mlp_dim", 3072),
            Field("layer_norm_eps", "norm_eps", 1e-12, NUMBER),
            Field("hidden_act", "activation", "gelu", activation()),
            Field("qkv_bias", "qkv_bias", True, FLAG),
        ),
        fixed,
        (Part(_read_labels, _write_labels),),
        metadata=frozenset(_METADATA.split()),
    )


_VIT, _DEIT = "ViTForImageClassification", "DeiTForImageClassification"
_TEACHER = "DeiTForImageClassificationWithTeacher"
FAMILIES: Mapping[str, Family] = {
    _VIT: _family(_VIT, distilled=False, teacher_head=False),
    _DEIT: _family(_DEIT, distilled=True, teacher_head=False),
    _TEACHER: _family(_TEACHER, distilled=True, teacher_head=True),
}
"""Supported models by the name of their architecture."""

MODEL_TYPES: Mapping[str, tuple[str, ...]] = {"vit": (_VIT,), "deit": (_DEIT, _TEACHER)}
"""The architectures of a model type; the first is that of a configuration that names none."""


def is_vision(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a vision transformer."""
    return config.get("model_type") in (*MODEL_TYPES, OWN)


def _architecture(config: Mapping[str, Any]) -> str:
    known = MODEL_TYPES[config["model_type"]]
    named = config.get("architectures") or [known[0]]
    if not isinstance(named, list) or len(named) != 1 or named[0] not in known:
        raise NotImplementedError(
            f"architectures={named!r} of model_type {config['model_type']!r} is not supported; "
            f"supported: {', '.join(known)} (a bare model has no classifier)."
        )
    return named[0]


def from_hf(config: Mapping[str, Any]) -> ViTConfig:
    """The `ViTConfig` of a config.json for which `is_vision` holds.

    Raises:
      ValueError: naming every unknown field and every value of a wrong kind.
      NotImplementedError: naming every value that asks for maths we do not have.
    """
    check_is_json(config)
    kind = config["model_type"]
    try:
        if kind == OWN:
            fields = {name: value for name, value in config.items() if name != "model_type"}
            return from_json(ViTConfig, fields)
        return ViTConfig(**read_family(config, FAMILIES[_architecture(config)]))
    except (TypeError, ValueError) as error:
        if str(error).startswith("config.json"):
            raise
        raise ValueError(f"config.json of model_type {kind!r}: {error}") from error


def to_hf(cfg: ViTConfig) -> dict[str, Any]:
    """The config.json of a configuration, such that ``from_hf(to_hf(cfg)) == cfg``.

    Equal up to how the model is run (implementation, remat, compute dtype). Where no architecture
    can express it, the model type is `OWN` and the fields are ours.
    """
    try:
        for family in FAMILIES.values():
            if all(getattr(cfg, name) == value for name, value in family.fixed.items()):
                written = write_family(family, cfg)
                if _maths(from_hf(written)) == _maths(cfg):
                    return written
    except (ValueError, NotImplementedError, OverflowError):
        pass  # a value the family has no room for
    return {"model_type": OWN, **to_json(cfg)}


def _maths(cfg: ViTConfig) -> ViTConfig:
    """`cfg` without what only says how it is run."""
    return dataclasses.replace(
        cfg,
        implementation="auto",
        remat="none",
        compute_dtype="auto",
        extras=tuple(sorted(cfg.extras)),
    )


def labels(cfg: ViTConfig) -> list[str]:
    """The names of the classes, as far as config.json has them."""
    names = json.loads(dict(cfg.extras).get("id2label", "{}"))
    return [names.get(str(i), f"LABEL_{i}") for i in range(cfg.num_classes)]


def _rows(prefix: str) -> tuple[Row, ...]:
    layer = f"{prefix}.encoder.layer.{{l}}"
    embed = f"{prefix}.embeddings"
    patches = f"{embed}.patch_embeddings.projection"
    return (
        Row("embed.kernel", f"{patches}.weight", "m c i j -> i j c m"),
        Row("embed.bias", f"{patches}.bias", "m -> m"),
        Row("embed.class_token", f"{embed}.cls_token", "1 1 m -> m"),
        Row("embed.distillation_token", f"{embed}.distillation_token", "1 1 m -> m"),
        Row("embed.positions", f"{embed}.position_embeddings", "1 p m -> p m"),
        *norm_rows("layers.ln1", f"{layer}.layernorm_before"),
        *norm_rows("layers.ln2", f"{layer}.layernorm_after"),
        *(
            row
            for x in ("query", "key", "value")
            for row in linear_rows(
                f"layers.attention.w{x[0]}",
                f"{layer}.attention.attention.{x}",
                "(h d) m -> m h d",
                "(h d) -> h d",
            )
        ),
        *linear_rows(
            "layers.attention.wo",
            f"{layer}.attention.output.dense",
            "m (h d) -> h d m",
            "m -> m",
        ),
        *linear_rows("layers.mlp.w_in", f"{layer}.intermediate.dense", "f m -> m f", "f -> f"),
        *linear_rows("layers.mlp.w_out", f"{layer}.output.dense", "m f -> f m", "m -> m"),
        *norm_rows("final_norm", f"{prefix}.layernorm"),
    )


def _classifier(path: str, name: str) -> tuple[Row, ...]:
    return (
        Row(f"{path}.kernel", f"{name}.weight", "v m -> m v"),
        Row(f"{path}.bias", f"{name}.bias", "v -> v"),
    )


def name_map(config: Mapping[str, Any]) -> NameMap | None:
    """Tensor names of a config.json for which `is_vision` holds; None: our own."""
    kind = config["model_type"]
    if kind == OWN:
        return None
    heads = _classifier("classifier", "classifier")
    if _architecture(config) == _TEACHER:
        heads = (
            *_classifier("classifier", "cls_classifier"),
            *_classifier("teacher_classifier", "distillation_classifier"),
        )
    return NameMap((*_rows(kind), *heads), prefix=f"{kind}.")
