"""Trees as HTML."""

import numpy as np
import pytest

import jaxheads as jh
from jaxheads.heads import HeadScores
from jaxheads.viz import tree_html
from tests.tiny import tiny_model

pytest.importorskip("treescope")


def test_scores_show_their_fields_and_their_map(tmp_path):
    scores = HeadScores(
        np.eye(3, 5), control=[0.1, 0.2], meta={"method": "copying <b>"}, model="lab"
    )
    page = tree_html(scores, tmp_path / "scores.html")
    assert (tmp_path / "scores.html").read_text(encoding="utf-8") == page
    for text in ("HeadScores", "values", "control", "copying", "lab"):
        assert text in page
    assert "copying <b>" not in page  # a text stays a text
    assert "arrayviz" in page  # drawn, not only named


def test_models_and_masks_show_names_and_shapes():
    cfg = jh.ModelConfig(vocab_size=32, num_layers=2, model_dim=16, num_heads=4, mlp_dim=16)
    page = tree_html({"model": tiny_model(cfg), "mask": jh.heads.mask([(1, 2)], 2, 4)})
    for text in ("Decoder", "wq", "heads", "mask", "arrayviz"):
        assert text in page
    gates = jh.scale_heads(jh.forward, np.ones((2, 4), np.float32))
    assert "TappedForward" in tree_html(gates)
