"""One number a head, layers x heads: as text for a terminal and as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxheads.typing import ArrayLike

_SHADES = " ░▒▓█"


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
    values: ArrayLike, path: str | Path | None = None, *, title: str = "", label: str = ""
) -> Any:
    """A map [L,H] as a matplotlib figure, written to `path` as a PNG when given.

    Negative values give a diverging scale centred at zero, others a sequential one from zero.

    Args:
      values: [L,H] numbers; NaN is left blank.
      path: where the PNG goes.
      title: above the map.
      label: what the numbers are, at the colour bar.

    Returns:
      The `matplotlib.figure.Figure`.

    Raises:
      ImportError: without matplotlib (the extra ``viz``).
    """
    array = _values(values)
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("head_map needs matplotlib: pip install jaxheads[viz].") from error

    layers, heads = array.shape
    figure = Figure(figsize=(2 + 0.35 * heads, 1.5 + 0.35 * layers), layout="constrained")
    axes = figure.add_subplot()
    bound = float(np.abs(array[np.isfinite(array)]).max(initial=0)) or 1.0
    colours, low = ("RdBu_r", -bound) if np.nanmin(array, initial=0) < 0 else ("viridis", 0.0)
    image = axes.imshow(array, cmap=colours, vmin=low, vmax=bound, aspect="equal")
    axes.set(xlabel="head", ylabel="layer", title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label=label)
    if path is not None:
        figure.savefig(path, format="png", dpi=150)
    return figure
