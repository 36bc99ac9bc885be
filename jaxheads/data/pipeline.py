"""From files to batches: documents -> shuffle -> tokens -> packed rows -> global batch.

A batch is a dict of arrays [b,T], b = batch_size / process_count:
  tokens       int32   inputs
  targets      int32   the token after each input, from the same document (EOS ends a document)
  segment_ids  int32   1, 2, ... per document in the row; 0 is padding
  positions    int32   from 0 in every segment
  weights      float32 how much the target counts: 0 at padding, 1 in plain text, less before the
                       answers of the lab language
With `DataConfig.landmark_block` every row has landmarks (`data/landmarks.py`).
Row r of batch n depends on the configuration and the data only, not on the number of processes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from jaxheads.data.landmarks import LandmarkBatches, add_landmarks
from jaxheads.data.packing import Batch, Document, PackedBatches, pack_once
from jaxheads.data.readahead import ReadAhead
from jaxheads.data.tasks.lab import MIXTURES, LabText, Pieces
from jaxheads.data.text import SPLITS, Source, open_source
from jaxheads.data.tokenizer import BYTES, Tokenizer


class BatchIterator(Protocol):
    """What `make_dataset` returns."""

    def __iter__(self) -> BatchIterator: ...
    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to read and how to lay it out."""

    path: str = "stdlib"  # 'a.txt,b/' is one corpus; 'a.txt=0.7,b.jsonl=0.3' mixes; or 'lab'
    tokenizer: str = BYTES  # 'bytes', 'lab', or a tokenizer.json or its directory
    field: str = "text"  # key of the text in .jsonl files
    seq_len: int = 1024  # T
    batch_size: int = 8  # global: rows over all processes
    seed: int = 0  # order of the documents
    shuffle: bool = True  # another order in every epoch; False reads in file order
    pack: bool = True  # False: one document per row, cut at seq_len
    split: str = "train"  # 'train', 'validation' or 'all'
    validation_fraction: float = 0.05  # share of documents held out, by hash of their text
    max_document_bytes: int = 16384  # longer text files are cut at blank lines
    interleave: int = 4  # documents open per row: neighbouring batches come from different ones
    add_bos: bool | None = None  # begin documents with BOS; None does as the tokenizer does
    prefetch: int = 2  # batches read ahead in a thread; 0 reads in the caller
    landmark_block: int = 0  # a landmark after this many tokens of every row; 0: none
    landmark_id: int | None = None  # its id; None: the one after the tokenizer's last
    landmark_targets: bool = True  # landmarks count as targets; False: only tokens of the text do
    landmark_jumps: int = 1  # J: positions jump ahead by 0 to J - 1 after each landmark in training

    def __post_init__(self):
        for name, least in (
            ("seq_len", 1),
            ("batch_size", 1),
            ("interleave", 1),
            ("max_document_bytes", 16),
            ("prefetch", 0),
            ("landmark_block", 0),
            ("landmark_jumps", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}={value!r} must be an integer")
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed} must be below 2**32")
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r} is not one of {', '.join(SPLITS)}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} must be at least 0 and below 1"
            )
        if self.landmark_block and self.seq_len % (self.landmark_block + 1) == self.landmark_block:
            raise ValueError(
                f"seq_len={self.seq_len} cuts off the landmark of the last block of "
                f"landmark_block={self.landmark_block} tokens; take seq_len={self.seq_len + 1}, a "
                "multiple of landmark_block + 1"
            )
        if self.landmark_jumps > 1 and not self.landmark_block:
            raise ValueError(
                f"landmark_jumps={self.landmark_jumps} without landmarks; set landmark_block"
            )
        parse_mixture(self.path)

    @property
    def text_len(self) -> int:
        """Tokens of a row beside its landmarks."""
        period = self.landmark_block + 1
        return self.seq_len - (self.seq_len // period if self.landmark_block else 0)


def parse_mixture(path: str) -> tuple[tuple[tuple[str, ...], float], ...]:
    """((paths, share), ...) of `DataConfig.path`; the shares sum to 1.

    Paths without weights are one corpus. A path that exists as written is never taken apart.
    """
    if not isinstance(path, str) or not path.strip():
        raise ValueError(f"path={path!r} is empty; give a file, a directory, a glob or 'stdlib'")
    if os.path.exists(os.path.expanduser(path)):
        return (((path,), 1.0),)
    entries = [entry.strip() for entry in path.split(",")]
    if not all(entries):
        raise ValueError(f"path={path!r} has an empty entry between commas")
    pairs = [_split_weight(entry) for entry in entries]
    without = [name for name, weight in pairs if weight is None]
    if len(without) == len(pairs):
        return ((tuple(without), 1.0),)
    if without:
        raise ValueError(
            f"path={path!r} gives weights to some entries but not to {', '.join(without)}; give "
            "every entry a weight (a.txt=0.7,b.txt=0.3) or none"
        )
    total = math.fsum(weight for _, weight in pairs if weight is not None)
    return tuple(((name,), weight / total) for name, weight in pairs if weight is not None)


def _split_weight(entry: str) -> tuple[str, float | None]:
    name, equals, number = entry.rpartition("=")
    if not equals or os.path.exists(os.path.expanduser(entry)):
        return entry, None
    try:
        weight = float(number)
    except ValueError:
        raise ValueError(f"weight {number!r} of {name!r} is not a number; write path=0.7") from None
    if not name or not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"weight {number} of {name!r} must be finite and above 0")
    return name, weight


class _Documents:
    """Token ids of one document of a source: [BOS] text [EOS]."""

    def __init__(self, tokenizer: Tokenizer, add_bos: bool | None):
        self._tokenizer = tokenizer
        self._add_bos = tokenizer.adds_bos if add_bos is None else add_bos
        if self._add_bos and tokenizer.bos_id is None:
            raise ValueError(f"add_bos=True, but tokenizer {tokenizer.name!r} defines no BOS token")
        eos_id = tokenizer.eos_id
        self._end = np.asarray([] if eos_id is None else [eos_id], np.int32)

    def __call__(self, document: str | Pieces) -> Document:
        if isinstance(document, str):
            ids = self._tokenizer.encode(document, add_bos=self._add_bos)
            return Document(np.concatenate([ids, self._end]))
        parts, weights = [], []
        for number, (text, weight) in enumerate(document):
            add_bos = self._add_bos if number == 0 else False
            parts.append(self._tokenizer.encode(text, add_bos=add_bos))
            weights.append(np.full(len(parts[-1]), weight, np.float32))
        end = np.full(len(self._end), document[0][1], np.float32)
        return Document(np.concatenate([*parts, self._end]), np.concatenate([*weights, end]))


def _open_components(cfg: DataConfig) -> tuple[list[Source | LabText], list[float]]:
    mixture = parse_mixture(cfg.path)
    return [_open(cfg, paths) for paths, _ in mixture], [share for _, share in mixture]


def _open(cfg: DataConfig, paths: tuple[str, ...]) -> Source | LabText:
    if len(paths) == 1 and paths[0] in MIXTURES and not os.path.exists(paths[0]):
        return LabText(cfg.split, paths[0])
    source = open_source(paths, field=cfg.field, max_document_bytes=cfg.max_document_bytes)
    return source.split(cfg.split, cfg.validation_fraction)


def _rows_of(cfg: DataConfig, process_index: int, process_count: int) -> range:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} is not in 0 to {process_count - 1}")
    if cfg.batch_size % process_count:
        raise ValueError(
            f"batch_size={cfg.batch_size} is not divisible by process_count={process_count}; the "
            "global batch is split evenly over the processes"
        )
    size = cfg.batch_size // process_count
    return range(process_index * size, (process_index + 1) * size)


def _pad_id(tokenizer: Tokenizer) -> int:
    return tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id or 0


def landmark_token(cfg: DataConfig, tokenizer: Tokenizer) -> int:
    """The id of the landmarks that `cfg` puts in."""
    return tokenizer.vocab_size if cfg.landmark_id is None else cfg.landmark_id


def make_dataset(
    cfg: DataConfig,
    *,
    tokenizer: Tokenizer | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """An endless iterator of training batches (see the module's docstring).

    Every epoch visits the documents in another order. `get_state()` gives a JSON-serialisable dict
    after any batch; `set_state` on an iterator of the same configuration continues bit for bit,
    whatever was read ahead. The state refuses other data or settings.

    Args:
      tokenizer: default: the one `cfg.tokenizer` names.
      process_index, process_count: this process reads rows
        [process_index * b, (process_index + 1) * b) of the global batch.
    """
    import grain

    rows = _rows_of(cfg, process_index, process_count)
    tokenizer = tokenizer or Tokenizer.load(cfg.tokenizer)
    tokenize = _Documents(tokenizer, cfg.add_bos)
    sources, weights = _open_components(cfg)
    streams = []
    for number, source in enumerate(sources):
        stream = grain.MapDataset.source(source)
        if cfg.shuffle:  # components must not be shuffled alike
            stream = stream.shuffle(seed=(cfg.seed + 0x9E3779B9 * number) % 2**32)
        streams.append(stream.repeat().map(tokenize))
    layout = ("seq_len", "batch_size", "seed", "shuffle", "pack", "interleave", "add_bos")
    batches = PackedBatches(
        streams,
        weights,
        rows=rows,
        batch_size=cfg.batch_size,
        seq_len=cfg.text_len,
        interleave=cfg.interleave,
        pack=cfg.pack,
        pad_id=_pad_id(tokenizer),
        description={name: getattr(cfg, name) for name in layout}
        | {
            "data": [source.digest for source in sources],
            "weights": weights,
            "tokenizer": tokenizer.digest,
        }
        | ({"landmark_block": cfg.landmark_block} if cfg.landmark_block else {})
        | ({"landmark_jumps": cfg.landmark_jumps} if cfg.landmark_jumps > 1 else {}),
    )
    if cfg.landmark_block:
        mark = landmark_token(cfg, tokenizer)
        batches = LandmarkBatches(batches, cfg.landmark_block, mark, cfg.landmark_targets,
                                  cfg.landmark_jumps, cfg.seed)  # fmt: skip
    return ReadAhead(batches, cfg.prefetch) if cfg.prefetch else batches


def eval_batches(
    cfg: DataConfig,
    limit: int | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """One pass over the documents of `cfg.split`, in order, as batches of the same layout.

    The last batch is filled up with padding of weight 0. Mixture components follow one another;
    weights, seed, shuffle and jumps of positions do not apply. Every process tokenizes everything
    and keeps its rows, so all processes see the same number of batches.

    Args:
      limit: at most this many batches; None: all.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None for everything")
    rows = _rows_of(cfg, process_index, process_count)
    tokenizer = tokenizer or Tokenizer.load(cfg.tokenizer)
    tokenize = _Documents(tokenizer, cfg.add_bos)
    sources, _ = _open_components(cfg)
    batches = pack_once(
        (tokenize(source[i]) for source in sources for i in range(len(source))),
        batch_size=cfg.batch_size,
        seq_len=cfg.text_len,
        pack=cfg.pack,
        pad_id=_pad_id(tokenizer),
    )
    if cfg.landmark_block:
        mark = landmark_token(cfg, tokenizer)
        add = functools.partial(
            add_landmarks, block_size=cfg.landmark_block, landmark_id=mark,
            count_targets=cfg.landmark_targets,
        )  # fmt: skip
        batches = map(add, batches)
    mine = slice(rows.start, rows.stop)
    return (
        {name: value[mine] for name, value in batch.items()}
        for batch in itertools.islice(batches, limit)
    )
