"""Attention patterns as one HTML file: every head, every token, two runs side by side.

The page holds everything it shows and asks nothing of the network; its content security policy
forbids it to. Attention is stored as the rounded square root, which keeps small values apart, and
compressed layer by layer.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from jaxheads.data import Tokenizer
from jaxheads.typing import ArrayLike

_THUMB = 32  # most pixels a side of a thumbnail
_FINE = 2**22  # up to this many numbers the file stays small with 16 bits each
_TOLERANCE = 1e-3  # rounding of a softmax in bfloat16


def attention_html(
    pattern: ArrayLike,
    tokens: Sequence[str],
    path: str | Path | None = None,
    *,
    key_tokens: Sequence[str] | None = None,
    compare: ArrayLike | None = None,
    compare_tokens: Sequence[str] | None = None,
    names: tuple[str, str] = ("clean", "corrupt"),
    title: str = "Attention",
    scores: ArrayLike | None = None,
    bits: int | None = None,
) -> str:
    """A page to look at the attention of every head, written to `path` when given.

    Choose a layer and a head from lists or from thumbnails, point at tokens (or walk with the
    arrow keys) to see a row or a column with its numbers, and compare two runs side by side or as
    a difference. A value is stored as ``round(m sqrt(p))`` with ``m = 2^bits - 1``; the page shows
    ``(code / m)^2`` and its error, at most ``sqrt(p) / m + 1 / (4 m^2)``: 0.004 at p = 1 and
    0.0004 at p = 0.01 with 8 bits, 1.6e-5 with 16.

    Args:
      pattern: [L,H,T,S] attention of one prompt, from 0 to 1: ``seen["pattern"][:, row]`` of
        ``record(forward, "pattern")``, cut to the tokens that are not padding.
      tokens: T texts, one a query token.
      path: where the page goes.
      key_tokens: S texts; None means `tokens`.
      compare: a second run, [L,H,T,S].
      compare_tokens: T texts of the second run; None means `tokens`.
      names: what the two runs are called.
      title: of the page.
      scores: [L,H] numbers (or `HeadScores`) written under the thumbnails; the page opens at the
        head of the highest.
      bits: 8 or 16; None takes 16 for up to 4 million numbers, else 8.

    Returns:
      The page. With 8 bits, 512 tokens x 12 layers x 12 heads take about 15 MB.
    """
    first = _pattern(pattern, "pattern")
    layers, heads, queries, keys = first.shape
    runs = [(names[0], first, tokens)]
    if compare is not None:
        second = _pattern(compare, "compare")
        if second.shape != first.shape:
            raise ValueError(
                f"compare has shape {second.shape} and pattern {first.shape}; two runs are "
                "compared position by position, so they must be the same."
            )
        runs.append((names[1], second, tokens if compare_tokens is None else compare_tokens))
    elif compare_tokens is not None:
        raise ValueError("compare_tokens goes with compare, the attention of the second run.")
    bits = (16 if first.size * len(runs) <= _FINE else 8) if bits is None else bits
    if bits not in (8, 16):
        raise ValueError(f"bits={bits} must be 8 or 16.")
    scale = 2**bits - 1
    about: dict[str, Any] = {
        "layers": layers,
        "heads": heads,
        "queries": queries,
        "keys": keys,
        "bits": bits,
        "scale": scale,
        "decimals": 4 if bits == 8 else 6,
        "precision": f"Attention is stored as its square root in {bits} bits: a value p is shown "
        f"to within sqrt(p) / {scale} of what the model computed.",
        "start": [0, 0],
        "runs": [],
    }
    if scores is not None:
        about |= _scores(scores, layers, heads)
    data = []
    for number, (name, values, texts) in enumerate(runs):
        run_keys = texts if key_tokens is None else key_tokens
        about["runs"].append({
            "name": str(name),
            "queries": _tokens(texts, queries, "tokens" if number == 0 else "compare_tokens"),
            "keys": _tokens(run_keys, keys, "tokens" if key_tokens is None else "key_tokens"),
        })  # fmt: skip
        thumbs = []
        for layer, codes in enumerate(_codes(values, scale)):
            thumbs.append(_thumbnails(codes, scale))
            raw = codes.astype(np.uint8 if bits == 8 else "<u2").tobytes()
            text = base64.b64encode(zlib.compress(raw, 6)).decode("ascii")
            data.append(f'<script type="text/plain" id="data-{number}-{layer}">{text}</script>')
        stack = np.stack(thumbs)  # [L,H,P,P]
        about["thumb"] = stack.shape[-1]
        about["runs"][-1]["thumbs"] = base64.b64encode(stack.tobytes()).decode("ascii")
    page = _page(title, about, "\n".join(data))
    if path is not None:
        Path(path).write_text(page, encoding="utf-8")
    return page


def token_texts(tokenizer: Tokenizer, ids: ArrayLike) -> list[str]:
    """The text of every token of ids [N], each with its leading space.

    A token's text is what it adds to the text before it; where a token ends inside a character
    (bytes), it is the token decoded by itself.
    """
    ids, texts, before = np.asarray(ids), [], ""
    for n in range(len(ids)):
        text = tokenizer.decode(ids[: n + 1], skip_special=False)
        alone = tokenizer.decode(ids[n : n + 1], skip_special=False)
        texts.append(text[len(before) :] if text.startswith(before) else alone)
        before = text
    return texts


def _pattern(values: ArrayLike, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 4 or not array.size:
        hint = (
            f" For one prompt of a recorded batch [L,B,H,T,S] pass {what}[:, row]."
            if array.ndim == 5
            else ""
        )
        raise ValueError(
            f"{what} has shape {array.shape}; it must be [L,H,T,S], the attention of one prompt."
            f"{hint}"
        )
    low, high = float(array.min()), float(array.max())
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):  # NaN fails as well
        raise ValueError(
            f"{what} runs from {low:g} to {high:g}; attention lies between 0 and 1 (record "
            "'pattern', not 'scores')."
        )
    return array


def _tokens(tokens: Sequence[str], count: int, what: str) -> list[str]:
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        raise TypeError(f"{what} must be a list of texts, one for each token.")
    if len(tokens) != count:
        raise ValueError(f"{what} has {len(tokens)} texts for {count} positions of the pattern.")
    return list(tokens)


def _scores(scores: ArrayLike, layers: int, heads: int) -> dict[str, Any]:
    values = np.asarray(scores, np.float64)
    if values.shape != (layers, heads) or not np.isfinite(values).all():
        raise ValueError(
            f"scores has shape {values.shape}; it must be [{layers}, {heads}], finite."
        )
    start = [int(n) for n in np.unravel_index(np.argmax(values), values.shape)]
    return {"scores": [[float(f"{x:.3g}") for x in row] for row in values], "start": start}


def _codes(values: np.ndarray, scale: int):
    """The codes [H,T,S] of each layer."""
    for layer in values:
        clipped = np.clip(layer.astype(np.float32), 0, 1)
        yield np.rint(np.sqrt(clipped) * np.float32(scale)).astype(np.uint16)


def _thumbnails(codes: np.ndarray, scale: int) -> np.ndarray:
    """[H,T,S] -> [H,P,P] uint8: the largest code in each of P x P regions."""
    queries, keys = codes.shape[1:]
    side = min(_THUMB, max(queries, keys))
    rows, columns = (np.arange(side) * n // side for n in (queries, keys))
    small = np.maximum.reduceat(np.maximum.reduceat(codes, rows, axis=1), columns, axis=2)
    return (small.astype(np.uint32) * 255 // scale).astype(np.uint8)


def _page(title: str, about: dict[str, Any], data: str) -> str:
    folder = resources.files("jaxheads.viz") / "viewer"
    page, style, script = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("page.html", "style.css", "viewer.js")
    )
    # A token may read "</script>" or "<!--"; neither survives as such.
    text = json.dumps(about).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    parts = {
        "title": html.escape(title),
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "style": style,
        "about": text,
        "data": data,
        "script": script,
    }
    # One pass, so that text which looks like a slot is left alone.
    pieces = page.split("{")
    out = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}")
        out += [parts[name], rest]
    return "".join(out)


def _hash(source: str) -> str:
    digest = hashlib.sha256(source.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
