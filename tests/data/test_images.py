"""Images for classifiers: what is read, drawn and refused, and the order of batches."""

import itertools

import numpy as np
import pytest

from jaxheads.data.images import (
    SHAPES,
    Images,
    draw_shapes,
    eval_image_batches,
    image_batches,
    normalize,
    open_images,
)


def numbered(count):
    """Images whose only pixel says which they are."""
    return Images(
        np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1), np.arange(count, dtype=np.int32)
    )


def write(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "train_x": rng.integers(0, 256, (6, 4, 4), np.uint8),
        "train_y": np.array([0, 1, 2, 0, 1, 2]),
        "test_x": rng.integers(0, 256, (3, 4, 4), np.uint8),
        "test_y": np.array([2, 1, 0]),
    }
    arrays = {name: x for name, x in {**arrays, **changes}.items() if x is not None}
    np.savez(path, **arrays)
    return arrays


def test_a_file_is_read_by_path_and_by_directory(tmp_path):
    arrays = write(tmp_path / "small.npz")
    for name in (tmp_path / "small.npz", tmp_path):
        data = open_images(name)
        assert data.num_classes == 3
        np.testing.assert_array_equal(data.train.pixels[..., 0], arrays["train_x"])
        np.testing.assert_array_equal(data.test.labels, arrays["test_y"])
    np.testing.assert_allclose(
        normalize(data.test)[..., 0], (arrays["test_x"] / 255 - 0.5) / 0.5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_y": None}, "it has no test_y"),
        ({"train_x": np.zeros((6, 4, 5), np.uint8)}, "needed square images"),
        ({"train_x": np.zeros((6, 4, 4))}, "float64"),
        ({"train_y": np.zeros(5, int)}, r"needed integers \[6\]"),
        ({"train_y": np.full(6, -1)}, "count from 0"),
        ({"test_x": np.zeros((3, 8, 8), np.uint8)}, "test_x"),
        ({"train_x": np.array([{}], object)}, "is no file of images"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, changes, message):
    write(tmp_path / "bad.npz", **changes)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / "bad.npz")


def test_names_that_are_none_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        open_images("digit")
    with pytest.raises(ValueError, match=r"holds 0 \.npz files"):
        open_images(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        open_images("digits")


def test_digits_are_split_without_overlap():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    data, again = open_images("digits", seed=3), open_images("digits", seed=3)
    np.testing.assert_array_equal(data.test.pixels, again.test.pixels)
    whole = sklearn_datasets.load_digits()
    held = lambda images: {image.tobytes() for image in images.astype(np.uint8)}
    both = np.concatenate([data.train.pixels, data.test.pixels])
    assert both.shape == (1797, 8, 8, 1) and len(data.test.labels) == 359
    assert held(both) == held(whole.images)
    assert normalize(data.train).min() == -1 and normalize(data.train).max() == 1


def test_shapes_are_what_their_formulas_say():
    images = draw_shapes(400, seed=0)
    again = draw_shapes(400, seed=0)
    np.testing.assert_array_equal(images.pixels, again.pixels)
    assert set(images.labels) == {0, 1, 2, 3}
    lit = images.pixels[..., 0] > 80
    for image, label in zip(lit, images.labels):
        rows, columns = np.nonzero(image)
        height, width = (np.ptp(axis) + 1 for axis in (rows, columns))
        assert abs(height - width) <= 1
        share = image.sum() / (height * width)
        centre = image[rows.min() + height // 2, columns.min() + width // 2]
        kind = SHAPES[label]
        assert (share == 1) == (kind == "square") or kind == "disc"
        assert centre == (kind != "ring")
        if kind == "cross":
            assert not image[rows.min(), columns.min()]


def test_every_pass_shows_every_image_once_in_a_new_order():
    batches = image_batches(numbered(10), 5, seed=1)
    labels = [next(batches)["label"] for _ in range(4)]
    passes = [np.concatenate(labels[:2]), np.concatenate(labels[2:])]
    for one in passes:
        assert sorted(one) == list(range(10))
    assert not np.array_equal(*passes)
    again = image_batches(numbered(10), 5, seed=1)
    np.testing.assert_array_equal([next(again)["label"] for _ in range(4)], labels)
    batch = next(again)
    pixels = (batch["image"][:, 0, 0, 0] * 0.5 + 0.5) * 255
    np.testing.assert_allclose(pixels, batch["label"], atol=1e-4)


def test_processes_share_a_batch_and_leave_an_incomplete_one_out():
    whole = image_batches(numbered(11), 4, seed=2)
    parts = [
        image_batches(numbered(11), 4, seed=2, process_index=i, process_count=2) for i in range(2)
    ]
    for batch in itertools.islice(whole, 5):
        halves = [next(part)["label"] for part in parts]
        np.testing.assert_array_equal(np.concatenate(halves), batch["label"])
    with pytest.raises(ValueError, match="does not split over 2 processes"):
        image_batches(numbered(11), 3, seed=0, process_count=2)
    with pytest.raises(ValueError, match="between 1 and the 11 images"):
        image_batches(numbered(11), 12, seed=0)


def test_evaluation_sees_every_image_once_and_marks_what_fills_up():
    labels = np.concatenate([b["label"] for b in eval_image_batches(numbered(5), 3)])
    np.testing.assert_array_equal(labels, [0, 1, 2, 3, 4, -1])
