"""Labelled images for classifiers: scikit-learn's digits, drawn shapes, and .npz files.

    data = open_images("digits")                        # or "shapes", or a path
    batches = image_batches(data.train, 128, seed=0)    # {"image" [B,H,W,C], "label" [B]}, no end

Pixels stay integers until `normalize` makes floats of a batch.
"""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxheads.fields import unknown

TEST_SHARE = 0.2
"""Of the digits, which come without a split."""


class Images(NamedTuple):
    """Images and their classes."""

    pixels: np.ndarray
    """uint8 [N,H,W,C], from 0 to `peak`."""
    labels: np.ndarray
    """int32 [N], from 0."""
    peak: int = 255

    @property
    def side(self) -> int:
        """H = W."""
        return self.pixels.shape[1]


class ImageData(NamedTuple):
    """A data set with its split."""

    train: Images
    test: Images
    num_classes: int


def open_images(name: str | Path, *, seed: int = 0) -> ImageData:
    """A data set of square images.

    Args:
      name: "digits" (scikit-learn's 1,797 digits, 8 x 8), "shapes" (`draw_shapes`, 2,000 + 500 of
        16 x 16), or the path of an .npz file or of a directory that holds one. Such a file has
        train_x and test_x, uint8 [N,H,W] or [N,H,W,C], and train_y and test_y, integers [N].
      seed: of the split of the digits, and of the shapes.
    Raises:
      ValueError: for an unknown name, or a file that is not as described.
      ImportError: for "digits" without scikit-learn.
    """
    if str(name) in _SETS:
        return _SETS[str(name)](seed)
    path = Path(name).expanduser()
    if path.is_dir():
        inside = sorted(path.glob("*.npz"))
        if len(inside) != 1:
            raise ValueError(f"{path} holds {len(inside)} .npz files, needed one; give its path.")
        path = inside[0]
    if not path.is_file():
        known = [*_SETS, "the path of an .npz file"]
        raise ValueError(unknown("data set", str(name), known))
    return _read_npz(path)


def _read_npz(path: Path) -> ImageData:
    names = ("train_x", "train_y", "test_x", "test_y")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file.files]
            if missing:
                raise ValueError(f"it has no {', '.join(missing)} (it has {', '.join(file.files)})")
            train_x, train_y, test_x, test_y = (file[name] for name in names)
        train, test = _check(train_x, train_y, "train"), _check(test_x, test_y, "test")
        if train.pixels.shape[1:] != test.pixels.shape[1:]:
            raise ValueError(
                f"train_x holds images {train.pixels.shape[1:]}, test_x {test.pixels.shape[1:]}"
            )
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no file of images: {error}.") from error
    return ImageData(train, test, int(max(train.labels.max(), test.labels.max())) + 1)


def _check(pixels: np.ndarray, labels: np.ndarray, split: str) -> Images:
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    shape = pixels.shape
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or shape[1] != shape[2] or 0 in shape:
        raise ValueError(
            f"{split}_x is {pixels.dtype}{list(shape)}, needed square images uint8 [N,H,W,C]"
        )
    if labels.shape != shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{split}_y is {labels.dtype}{list(labels.shape)}, needed integers [{shape[0]}]"
        )
    if labels.min() < 0:
        raise ValueError(f"{split}_y holds {labels.min()}; classes count from 0")
    return Images(pixels, labels.astype(np.int32))


def _digits(seed: int) -> ImageData:
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed; pip install scikit-learn, "
            "or take 'shapes'."
        )
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels.reshape(-1, 8, 8, 1).astype(np.uint8)  # whole numbers from 0 to 16
    order = np.random.default_rng(seed).permutation(len(labels))
    test, train = np.split(order, [round(TEST_SHARE * len(order))])
    part = lambda rows: Images(pixels[rows], labels[rows].astype(np.int32), peak=16)
    return ImageData(part(train), part(test), 10)


SHAPES = ("square", "disc", "ring", "cross")
"""The classes of `draw_shapes`."""


def draw_shapes(count: int, *, seed: int, side: int = 16) -> Images:
    """Grey shapes of random place, size and brightness on a noisy ground.

    A square |x|, |y| <= r, a disc x^2 + y^2 <= r^2, a ring 0.6 r <= sqrt(x^2 + y^2) <= r and a
    cross min(|x|, |y|) <= r / 3 within the square, for r from side / 5 to side / 3.

    Args:
      count: N; classes are drawn uniformly.
      seed: the same seed, the same images.
      side: H = W.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(SHAPES), count).astype(np.int32)
    radius = rng.uniform(side / 5, side / 3, (count, 1, 1))
    low, high = radius, side - 1 - radius
    y, x = (
        np.abs(axis - rng.uniform(low, high)) / radius for axis in np.mgrid[:side, :side][:, None]
    )
    far, near, distance = np.maximum(x, y), np.minimum(x, y), np.hypot(x, y)
    inside = np.stack(
        [far <= 1, distance <= 1, (distance <= 1) & (distance >= 0.6), (far <= 1) & (3 * near <= 1)]
    )
    chosen = inside[labels, np.arange(count)]
    bright = rng.uniform(120, 220, (count, 1, 1))
    pixels = chosen * bright + rng.uniform(0, 35, chosen.shape)
    return Images(pixels.astype(np.uint8)[..., None], labels)


def _shapes(seed: int) -> ImageData:
    train, test = draw_shapes(2000, seed=2 * seed), draw_shapes(500, seed=2 * seed + 1)
    return ImageData(train, test, len(SHAPES))


_SETS: Mapping[str, Callable[[int], ImageData]] = {"digits": _digits, "shapes": _shapes}


def normalize(images: Images, *, mean: float = 0.5, std: float = 0.5) -> np.ndarray:
    """``(pixel / peak - mean) / std`` as float32 [N,H,W,C]."""
    return ((images.pixels / np.float32(images.peak) - mean) / std).astype(np.float32)


def _rows(images: Images, rows: np.ndarray) -> Images:
    return images._replace(pixels=images.pixels[rows], labels=images.labels[rows])


Batch = dict[str, np.ndarray]


def image_batches(
    images: Images,
    batch_size: int,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Batches without end: every pass in a new order, an incomplete last batch left out.

    Args:
      images: what to draw from.
      batch_size: of all processes together.
      seed: of the orders.
      process_index, process_count: of a batch, every process gets its own part, in turn.
    Returns:
      an iterator of {"image": float32 [B,H,W,C], "label": int32 [B]}.
    Raises:
      ValueError: for a batch larger than the set, or one that processes cannot share evenly.
    """
    count = len(images.labels)
    if not 0 < batch_size <= count:
        raise ValueError(f"batch_size={batch_size} must lie between 1 and the {count} images.")
    if batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} does not split over {process_count} processes.")
    size = batch_size // process_count

    def batches() -> Iterator[Batch]:
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(count)
            for start in range(0, count - batch_size + 1, batch_size):
                first = start + process_index * size
                yield _batch(_rows(images, order[first : first + size]))

    return batches()


def eval_image_batches(images: Images, batch_size: int) -> Iterator[Batch]:
    """Every image once, in order; the last batch is filled up with images of label -1."""
    for start in range(0, len(images.labels), batch_size):
        batch = _batch(_rows(images, np.arange(start, min(start + batch_size, len(images.labels)))))
        short = batch_size - len(batch["label"])
        image = np.pad(batch["image"], ((0, short), (0, 0), (0, 0), (0, 0)))
        yield {"image": image, "label": np.pad(batch["label"], (0, short), constant_values=-1)}


def _batch(images: Images) -> Batch:
    return {"image": normalize(images), "label": images.labels}
