"""Flags of the launchers that use a trained model."""

import numpy as np
import pytest

from jaxheads import heads, models
from jaxheads.checkpoints import huggingface
from jaxheads.data import Tokenizer
from jaxheads.interventions import ablate, scale_heads
from jaxheads.models import ModelConfig
from launch import loading
from tests.tiny import tiny_model

CFG = ModelConfig(vocab_size=384, num_layers=2, model_dim=16, num_heads=4, mlp_dim=16)
TOKENS = np.array([[1, 2, 3, 4]])


@pytest.fixture(scope="module")
def model():
    return tiny_model(CFG)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """heads.json with a list, and one with scores."""
    directory = tmp_path_factory.mktemp("heads")
    size = {"num_layers": 2, "num_heads": 4}
    heads.to_json(directory / "list.json", heads=[(0, 1), (1, 3)], **size)
    heads.to_json(directory / "scores.json", scores=SCORES, **size)
    heads.to_json(directory / "other.json", heads=[(2, 0)], num_layers=3, num_heads=4)
    return directory


SCORES = np.array([[0.1, 0.9, 0.2, 0.3], [0.4, 0.0, 1.0, 0.5]], np.float32)
LIST = heads.mask([(0, 1), (1, 3)], 2, 4)
BEST = heads.mask([(1, 2), (0, 1), (1, 3)], 2, 4)


@pytest.mark.parametrize(
    ("given", "options", "want"),
    [
        (None, {}, models.forward),
        ("0.1,1.3", {}, ablate(models.forward, LIST)),
        ("list.json", {}, ablate(models.forward, LIST)),
        ("scores.json", {"top_heads": 3}, ablate(models.forward, BEST)),
        ("scores.json", {"edit": "scale"}, scale_heads(models.forward, SCORES)),
        ("list.json", {"edit": "scale", "factor": 0.5},
         scale_heads(models.forward, 1 - 0.5 * LIST)),
        ("scores.json", {"edit": "scale", "top_heads": 3, "factor": 2.0},
         scale_heads(models.forward, 1 + BEST)),
    ],
)  # fmt: skip
def test_the_forward_that_flags_ask_for(model, files, given, options, want):
    given = str(files / given) if given and given.endswith("json") else given
    forward, chosen = loading.edited_forward(model, given, **options)
    np.testing.assert_allclose(
        forward(model, TOKENS).logits, want(model, TOKENS).logits, rtol=1e-6, atol=1e-6
    )
    assert (chosen is None) == (given is None)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("0.4", {}, "head 0.4 is out of range"),
        ("0.1,0.1", {}, "listed twice"),
        ("none.json", {}, "does not exist"),
        ("0-1", {}, "does not exist"),
        ("other.json", {}, "3 layers x 4 heads; this model has 2 x 4"),
        ("scores.json", {}, "--top_heads"),
        ("scores.json", {"top_heads": 9}, "k=9"),
        ("list.json", {"top_heads": 1}, "needs scores"),
        ("list.json", {"edit": "scale"}, "--factor=0.5"),
        ("list.json", {"factor": 0.5}, "goes with --edit=scale"),
        ("scores.json", {"edit": "scale", "factor": 0.5}, "are the gates themselves"),
        (None, {"top_heads": 1}, "give --heads too"),
        (None, {"factor": 1.0}, "give --heads too"),
    ],
)
def test_flags_that_do_not_fit(model, files, given, options, message):
    given = str(files / given) if given and given.endswith("json") else given
    with pytest.raises(ValueError, match=message):
        loading.edited_forward(model, given, **options)


def test_load_finds_the_tokenizer_beside_the_model(model, tmp_path):
    huggingface.save(model, tmp_path / "model")
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json; give one with --tokenizer"):
        loading.load(str(tmp_path / "model"), None, "", None)
    asked = loading.load(str(tmp_path / "model"), "bytes", "model:4", None)
    assert asked.mesh.shape["model"] == 4
    Tokenizer.load("bytes").save(tmp_path / "model")
    loaded = loading.load(str(tmp_path / "model"), None, "", "bfloat16")
    assert loaded.tokenizer.spec == "bytes" and loaded.model.cfg == models.with_config(
        model, param_dtype="bfloat16", compute_dtype="bfloat16", extras=loaded.model.cfg.extras
    ).cfg  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "--model is missing"),
        ({"model": "no-such-model"}, "no directory"),
        ({"mesh": "date:2"}, "unknown axis 'date'"),
        ({"mesh": "model:3"}, "4|3"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"tokenizer": "none.json"}, "does not exist"),
    ],
)
def test_load_refuses(model, tmp_path, changes, message):
    huggingface.save(model, tmp_path / "model")
    flags = {"model": str(tmp_path / "model"), "tokenizer": "bytes", "mesh": "", "dtype": None}
    with pytest.raises(ValueError, match=message):
        loading.load(**{**flags, **changes})


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path):
    small = tiny_model(ModelConfig(vocab_size=100, num_layers=1, model_dim=8, num_heads=2))
    huggingface.save(small, tmp_path)
    with pytest.raises(ValueError, match="384 ids but the model's vocab_size is 100"):
        loading.load(str(tmp_path), "bytes", "", None)
