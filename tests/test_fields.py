"""Configurations from text and JSON."""

import dataclasses
import json

import pytest

from jaxheads.data import DataConfig
from jaxheads.fields import differences, from_json, override, parse, to_json
from jaxheads.models import PRESETS, ModelConfig
from jaxheads.training import TrainConfig


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("3", int, 3),
        ("1_000", int, 1000),
        ("3e-4", float, 3e-4),
        ("3", float, 3.0),
        ("True", bool, True),
        ("no", bool, False),
        (" a b ", str, "a b"),
        ("none", int | None, None),
        ("None", str | None, None),
        ("4", float | int, 4),
        ("", tuple[int, ...], ()),
        ("8,none", tuple[int | None, ...], (8, None)),
        ("(8,)", tuple[int, ...], (8,)),
        ("*q,*k", tuple[str, ...], ("*q", "*k")),
    ],
)
def test_text_becomes_the_annotated_type(text, annotation, value):
    parsed = parse(text, annotation, "name")
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("preset", PRESETS)
def test_json_round_trip_of_every_preset(preset):
    cfg = PRESETS[preset]()
    assert from_json(ModelConfig, json.loads(json.dumps(to_json(cfg)))) == cfg


def test_json_round_trip_of_other_configurations():
    cfg = ModelConfig(window=(8, None), extras=(("a", '"b"'),), attn_scale=0.5)
    assert from_json(ModelConfig, json.loads(json.dumps(to_json(cfg)))) == cfg
    for cfg in (DataConfig(add_bos=True), TrainConfig(b1=0.5, trainable=("*q", "*k"))):
        assert from_json(type(cfg), json.loads(json.dumps(to_json(cfg)))) == cfg


def test_derived_fields_follow_unless_set():
    tiny = PRESETS["tiny"]()  # 128 wide, 8 heads, mlp_dim 384
    wide = override(tiny, {"model_dim": "256"})
    assert (wide.head_dim, wide.embed_dim, wide.mlp_dim) == (32, 256, 384)
    assert override(tiny, {"num_heads": "4"}).num_kv_heads == 4
    llama = PRESETS["llama3-8b"]()
    assert override(llama, {"num_heads": "16"}).num_kv_heads == 8  # not the derived value
    assert override(tiny, {"head_dim": "64"}).head_dim == 64
    assert override(tiny, {}) is tiny


def test_nested_fields():
    cfg = override(ModelConfig(), {"rope.theta": "1e6", "local_rope.theta": "5", "window": "8"})
    assert cfg.rope.theta == 1e6 and cfg.local_rope is not None and cfg.local_rope.theta == 5
    assert override(cfg, {"local_rope": "none"}).local_rope is None


def test_differences_name_nested_fields():
    a = ModelConfig()
    b = dataclasses.replace(a, norm_eps=1e-6, rope=dataclasses.replace(a.rope, theta=5.0))
    assert differences(a, b) == ["rope.theta: 10000.0 -> 5.0", "norm_eps: 1e-05 -> 1e-06"]
    assert differences(a, a) == []
