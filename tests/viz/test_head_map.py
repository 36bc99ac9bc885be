"""Head maps as text and as PNG."""

import numpy as np
import pytest

from jaxheads.heads import HeadScores
from jaxheads.viz import head_map, head_table


def test_table_aligns_and_shades_by_magnitude():
    lines = head_table([[0, 1, 10.5], [-21, np.nan, 5.25]], title="scores", decimals=1).split("\n")
    assert lines[0] == "scores"
    assert lines[1:] == [
        "       H0     H1     H2",
        "L0    0.0 ░  1.0 ▒ 10.5",
        "L1 █-21.0      - ░  5.2",
    ]


@pytest.mark.parametrize("values", [np.zeros((12, 10)), np.ones((1, 1), bool), [[np.inf, 1.0]]])
def test_table_of_unusual_values_keeps_its_columns(values):
    lines = head_table(values).split("\n")
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 1 + len(values)


@pytest.mark.parametrize("values", [[[0.5, 1.0]], [[-1.0, np.nan], [0.2, 0.1]], [[0, 0]]])
def test_map_writes_a_png(tmp_path, values):
    pytest.importorskip("matplotlib")
    file = tmp_path / "map.png"
    figure = head_map(values, file, title="copying")
    assert file.read_bytes()[:4] == b"\x89PNG"
    image = figure.axes[0].images[0]
    np.testing.assert_array_equal(np.asarray(image.get_array().filled(np.nan)), np.array(values))
    low, high = image.get_clim()
    assert low == (-high if np.nanmin(values) < 0 else 0)
    assert figure.axes[0].get_title() == "copying"


@pytest.mark.parametrize("values", [[1.0, 2.0], np.zeros((0, 3)), [["a"]], np.zeros((2, 2, 2))])
def test_other_shapes_are_refused(values):
    for draw in (head_map, head_table):
        with pytest.raises(ValueError, match="head map needs"):
            draw(values)


def texts(figure):
    return [t.get_text() for t in figure.axes[0].texts]


def test_map_prints_numbers_and_stars():
    pytest.importorskip("matplotlib")
    values = np.array([[0.5, -1.0, np.nan], [0.25, 2.0, 0.0]])
    marks = values > 0.3
    assert texts(head_map(values, marks=marks)) == ["0.50*", "-1.00", "0.25", "2.00*", "0.00"]
    assert texts(head_map(values, marks=marks, annotate=False)) == ["*", "*"]
    assert texts(head_map(values, annotate=False)) == []
    assert texts(head_map(np.zeros((33, 32)))) == []  # too many to print
    colours = [t.get_color() for t in head_map([[0.0, 1.0]]).axes[0].texts]
    assert colours == ["white", "black"]  # viridis is dark at 0
    with pytest.raises(ValueError, match=r"marks has shape \(1, 1\)"):
        head_map(values, marks=[[True]])


def test_map_of_scores_marks_what_is_not_zero(tmp_path):
    pytest.importorskip("matplotlib")
    scores = HeadScores(
        [[0.5, -1.0]], ci=([[-0.1, -1.5]], [[1.0, -0.5]]), kind="kv", meta={"method": "m"}
    )
    figure = head_map(scores, tmp_path / "map.png", decimals=1)
    assert texts(figure) == ["0.5", "-1.0*"]
    assert figure.axes[0].get_xlabel().startswith("key/value head\n* the confidence")
    assert figure.axes[0].images[0].get_clim() == (-1.0, 1.0)
    assert "0.50" in head_table(scores)
