"""One number a head, layers x heads: as text for a terminal and as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxheads.heads import HeadScores
from jaxheads.typing import ArrayLike

_SHADES = " ░▒▓█"
_MOST_PRINTED = 1024  # numbers in a picture; 32 layers x 32 heads are still readable


def _values(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"values has shape {array.shape}; a head map needs [L,H], layers x heads.")
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise ValueError(f"values holds {array.dtype}; a head map needs numbers.")
    return array.astype(np.float64)


def head_table(values: ArrayLike, *, title: str = "", decimals: int = 2) -> str:
    """A map [L,H] in plain text: one line a layer, a shade and the number for each head.

    The shade grows with the magnitude, relative to the largest one. NaN is shown as ``-``.

    Example:
      >>> print(head_table([[0.0, 1.0], [0.5, -0.25]], decimals=1))
            H0    H1
      L0   0.0 █ 1.0
      L1 ▒ 0.5 ░-0.2
    """
    array = _values(values)
    finite = np.abs(array[np.isfinite(array)])
    largest = finite.max(initial=0.0)
    texts = [["-" if np.isnan(x) else f"{x:.{decimals}f}" for x in row] for row in array]
    head_names = [f"H{h}" for h in range(array.shape[1])]
    width = max(map(len, [*head_names, *(t for row in texts for t in row)]))
    label = len(f"L{len(array) - 1}")
    lines = [title] if title else []
    lines.append(" " * (label + 1) + " ".join(f"{name:>{width + 1}}" for name in head_names))
    for layer, (row, numbers) in enumerate(zip(array, texts)):
        cells = (f"{_shade(x, largest)}{text:>{width}}" for x, text in zip(row, numbers))
        lines.append(f"{f'L{layer}':<{label}} " + " ".join(cells))
    return "\n".join(lines)


def _shade(value: float, largest: float) -> str:
    if np.isnan(value) or value == 0:
        return _SHADES[0]
    share = 1.0 if np.isinf(value) else min(abs(value) / largest, 1.0)
    return _SHADES[max(1, round(share * (len(_SHADES) - 1)))]


def head_map(
    values: ArrayLike,
    path: str | Path | None = None,
    *,
    title: str = "",
    label: str = "",
    marks: ArrayLike | None = None,
    annotate: bool | None = None,
    decimals: int = 2,
) -> Any:
    """A map [L,H] as a matplotlib figure, written to `path` as a PNG when given.

    Negative values give a diverging scale symmetric about zero, others a sequential one from zero.

    Args:
      values: [L,H] numbers, or `HeadScores`; NaN is left blank.
      path: where the PNG goes.
      title: above the map.
      label: what the numbers are, at the colour bar.
      marks: [L,H] bool, heads that get a star; None marks those of `HeadScores` whose confidence
        interval leaves out 0.
      annotate: print the number in every cell; None prints up to 1,024 of them.
      decimals: of the printed numbers.

    Returns:
      The `matplotlib.figure.Figure`.

    Raises:
      ImportError: without matplotlib (the extra ``viz``).
    """
    array = _values(values)
    scores = values if isinstance(values, HeadScores) else None
    if marks is None and scores is not None and scores.ci is not None:
        marks = scores.significant()
    stars = np.zeros(array.shape, bool) if marks is None else np.asarray(marks, bool)
    if stars.shape != array.shape:
        raise ValueError(f"marks has shape {stars.shape}; it must be {array.shape}, as the values.")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("head_map needs matplotlib: pip install jaxheads[viz].") from error

    layers, heads = array.shape
    annotate = array.size <= _MOST_PRINTED if annotate is None else annotate
    side = 0.5 if annotate else 0.35  # inches
    figure = Figure(figsize=(2 + side * heads, 1.5 + side * layers), layout="constrained")
    axes = figure.add_subplot()
    bound = float(np.abs(array[np.isfinite(array)]).max(initial=0)) or 1.0
    colours, low = ("RdBu_r", -bound) if np.nanmin(array, initial=0) < 0 else ("viridis", 0.0)
    image = axes.imshow(array, cmap=colours, vmin=low, vmax=bound, aspect="equal")
    what = "key/value head" if scores is not None and scores.kind == "kv" else "head"
    note = "\n* the confidence interval leaves out 0" if scores is not None and stars.any() else ""
    axes.set(xlabel=what + note, ylabel="layer", title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    for layer, head in np.argwhere(~np.isnan(array)):
        text = f"{array[layer, head]:.{decimals}f}" if annotate else ""
        text += "*" if stars[layer, head] else ""
        if text:
            red, green, blue, _ = image.cmap(image.norm(array[layer, head]))
            is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(head, layer, text, ha="center", va="center", fontsize=6,
                      color="white" if is_dark else "black")  # fmt: skip
    figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    if path is not None:
        figure.savefig(path, format="png", dpi=150)
    return figure
