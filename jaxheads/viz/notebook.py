"""Models, masks and scores as foldable trees with pictures of their arrays, for notebooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tree_html(value: Any, path: str | Path | None = None) -> str:
    """Any tree (a model, payloads, `HeadScores`, a mask) as HTML, written to `path` when given.

    Arrays are drawn as heat maps. The HTML is self-contained. In a notebook, the last line of a
    cell is shown the same way after ``treescope.basic_interactive_setup()``.

    Args:
      value: whatever `treescope` can draw: pytrees, dataclasses, Flax modules, arrays.
      path: where the page goes.

    Raises:
      ImportError: without treescope (the extra ``notebook``; Flax brings it along).
    """
    try:
        import treescope
    except ImportError as error:
        raise ImportError("tree_html needs treescope: pip install jaxheads[notebook].") from error

    with treescope.active_autovisualizer.set_scoped(treescope.ArrayAutovisualizer()):
        page = treescope.render_to_html(value, compressed=False)
    if path is not None:
        Path(path).write_text(page, encoding="utf-8")
    return page
