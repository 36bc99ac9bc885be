"""Text to token ids and back: a `tokenizer.json` file, or raw bytes.

Byte ids: 0-255 are the byte values, 256 pad, 257 bos, 258 eos; 259-383 are reserved so that the
vocabulary (384) divides evenly over 128-wide TPU lanes and any usual `model` mesh axis.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxheads.fields import shorten

BYTES = "bytes"
_ASSETS = Path(__file__).parents[1] / "assets"  # shipped models, each with its tokenizer
_BYTE_VOCAB_SIZE = 384
_BYTE_SPECIALS = {"pad": 256, "bos": 257, "eos": 258}

# Files beside tokenizer.json that name special tokens; earlier files win.
_SPECIAL_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
)
_MARK = "jaxheads_tokenizer"  # key of tokenizer_config.json: the file stands for 'bytes'
_RESAVE = (
    "convert it once with transformers: "
    "AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY) writes a tokenizer.json"
)
_UNSUPPORTED = {
    ".model": f"is a sentencepiece model; {_RESAVE}",
    ".tiktoken": f"is a tiktoken file; {_RESAVE}",
    ".bin": "holds model weights, not a tokenizer; give a tokenizer.json or its directory",
    ".safetensors": "holds model weights, not a tokenizer; give a tokenizer.json or its directory",
}
for _suffix in (".pt", ".pth", ".pkl", ".pickle"):
    _UNSUPPORTED[_suffix] = (
        "is a pickle, which can run code when opened and is never read; "
        "give a tokenizer.json, its directory, or 'bytes'"
    )


class Tokenizer:
    """Encodes text to int32 ids and decodes ids to text. Make one with `Tokenizer.load`.

    Attributes:
      name: 'bytes', or the name of the directory the tokenizer came from.
      spec: the string that loads the same tokenizer again: `Tokenizer.load(tokenizer.spec)`.
      vocab_size: one more than the largest id.
      pad_id, bos_id, eos_id: special ids; None when the tokenizer does not define one.
      adds_bos: whether `encode` puts BOS first unless told otherwise.

    Example:
      >>> tokenizer = Tokenizer.load("bytes")
      >>> tokenizer.encode("hi", add_bos=False)
      array([104, 105], dtype=int32)
      >>> tokenizer.decode(tokenizer.encode("hi"))
      'hi'
    """

    def __init__(self, backend: Any, spec: str, name: str, special: dict[str, int], add_bos: bool):
        self._backend = backend  # a tokenizers.Tokenizer, or None for bytes
        self.spec = spec
        self.name = name
        self.pad_id = special.get("pad")
        self.bos_id = special.get("bos")
        self.eos_id = special.get("eos")
        self.vocab_size = _BYTE_VOCAB_SIZE
        if backend is not None:
            self.vocab_size = 1 + max(
                backend.get_vocab(with_added_tokens=True).values(), default=-1
            )
        self.adds_bos = self.bos_id is not None and (add_bos or self._template_adds_bos())

    def __repr__(self) -> str:
        return f"Tokenizer({self.spec!r}, vocab_size={self.vocab_size})"

    @property
    def digest(self) -> str:
        """A short hash of what the tokenizer does, wherever its file lies."""
        text = BYTES if self._backend is None else self._backend.to_str()
        text += f" {self.bos_id} {self.eos_id} {self.adds_bos}"
        return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Loads 'bytes', a `tokenizer.json` file, a directory with one, or that of a shipped model.

        Special ids come from tokenizer_config.json, special_tokens_map.json,
        generation_config.json and config.json beside it, in this order. Truncation and padding
        stored in the file are switched off: they would cut documents silently.
        """
        if not isinstance(path, str | Path):
            raise TypeError(
                f"the tokenizer is given as {type(path).__name__}; it must be 'bytes' or a path to "
                "a tokenizer.json or its directory"
            )
        if str(path) == BYTES:
            return cls(None, BYTES, BYTES, _BYTE_SPECIALS, add_bos=True)
        file = _find_file(Path(path).expanduser())
        if _read_config(file.parent / _SPECIAL_FILES[0]).get(_MARK) == BYTES:
            return cls.load(BYTES)
        backend = _read_backend(file)
        backend.no_truncation()
        backend.no_padding()
        special, add_bos = _read_special(file.parent, backend)
        file = file.resolve()
        return cls(backend, str(file), file.parent.name, special, add_bos)

    def _template_adds_bos(self) -> bool:
        return self._backend is not None and self._ids("", True)[:1].tolist() == [self.bos_id]

    def _ids(self, text: str, add_special: bool) -> np.ndarray:
        return np.asarray(self._backend.encode(text, add_special_tokens=add_special).ids, np.int32)

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `load` and transformers read.

        For bytes this is a byte-level tokenizer without merges, so that other libraries get the
        same ids; `load` knows it and gives bytes again.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        backend = _byte_backend() if self._backend is None else self._backend
        backend.save(str(directory / "tokenizer.json"))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        ids = {"pad": self.pad_id, "bos": self.bos_id, "eos": self.eos_id}
        config |= {
            f"{kind}_token": backend.id_to_token(i) for kind, i in ids.items() if i is not None
        }
        if self._backend is None:
            config[_MARK] = BYTES
        if self.bos_id is not None:
            config["add_bos_token"] = self.adds_bos
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def encode(self, text: str, *, add_bos: bool | None = None) -> np.ndarray:
        """Token ids of a text.

        Args:
          text: any string.
          add_bos: True puts exactly one BOS first (also when the file's own template adds one, or
            the text already begins with it); False adds no special token; None does what the
            tokenizer itself does: the template of tokenizer.json, or BOS for bytes.
        Returns:
          [N] int32.
        """
        if not isinstance(text, str):
            raise TypeError(
                f"encode takes one string, got {type(text).__name__}; use encode_batch for a list"
            )
        if add_bos and self.bos_id is None:
            raise ValueError(f"add_bos=True, but tokenizer {self.name!r} defines no BOS token")
        if self._backend is None:
            ids = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)
        else:
            ids = self._ids(text, add_special=add_bos is None)
        if not (self.adds_bos if add_bos is None else add_bos) or ids[:1].tolist() == [self.bos_id]:
            return ids
        return np.concatenate([np.asarray([self.bos_id], np.int32), ids])

    def encode_batch(
        self, texts: Sequence[str], *, add_bos: bool | None = None
    ) -> list[np.ndarray]:
        """`encode` of every text; the rows have different lengths."""
        if isinstance(texts, str):
            raise TypeError("encode_batch takes a list of strings, got one string; use encode")
        return [self.encode(text, add_bos=add_bos) for text in texts]

    def decode(self, ids: Any, *, skip_special: bool = True) -> str:
        """Text of ids [N]; bytes that are not UTF-8 become U+FFFD.

        Special tokens are left out unless `skip_special=False`. Reserved byte ids have no text.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(
                f"decode takes ids [N] of an integer type, got shape {ids.shape} {ids.dtype}; "
                "decode the rows of a batch one by one"
            )
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            bad = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise ValueError(
                f"token id {bad} is outside the vocabulary of {self.name!r} (0 to "
                f"{self.vocab_size - 1}); the ids come from another tokenizer"
            )
        if self._backend is not None:
            return self._backend.decode(ids.tolist(), skip_special_tokens=skip_special)
        names = {} if skip_special else {i: f"<|{n}|>".encode() for n, i in _BYTE_SPECIALS.items()}
        parts = (bytes([i]) if i < 256 else names.get(i, b"") for i in ids.tolist())
        return b"".join(parts).decode("utf-8", errors="replace")


def _find_file(path: Path) -> Path:
    if path.suffix.lower() in _UNSUPPORTED:
        raise ValueError(f"tokenizer {path} {_UNSUPPORTED[path.suffix.lower()]}")
    if not path.exists():
        shipped = _ASSETS / path / "tokenizer.json"
        if len(path.parts) == 1 and shipped.is_file():
            return shipped
        raise ValueError(
            f"tokenizer {path} does not exist; give a tokenizer.json, a directory that holds one, "
            "'lab', or 'bytes'"
        )
    if path.is_file():
        return path
    if (path / "tokenizer.json").is_file():
        return path / "tokenizer.json"
    old = [n for n in ("tokenizer.model", "vocab.json", "vocab.txt") if (path / n).exists()]
    hint = f"it holds {', '.join(old)}: {_RESAVE}" if old else "or use 'bytes'"
    raise ValueError(f"directory {path} holds no tokenizer.json; {hint}")


def _read_backend(file: Path) -> Any:
    import tokenizers

    try:
        text = file.read_text(encoding="utf-8")
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"tokenizer {file} is not valid JSON ({error}); the file is damaged or incomplete: "
            "copy it again"
        ) from error
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the Rust side raises plain Exception
        raise ValueError(
            f"tokenizer {file} is JSON, but not in the format of the tokenizers library "
            f"({shorten(error)}); give the tokenizer.json, not another file of the model"
        ) from error


def _read_special(directory: Path, backend: Any) -> tuple[dict[str, int], bool]:
    """Special ids by name, and whether the configuration asks for BOS."""
    special: dict[str, int] = {}
    add_bos = False
    for name in _SPECIAL_FILES:
        config = _read_config(directory / name)
        add_bos = add_bos or config.get("add_bos_token") is True
        for kind in ("pad", "bos", "eos"):
            token, index = config.get(f"{kind}_token"), config.get(f"{kind}_token_id")
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(index, list):  # several stop ids: the first is the document separator
                index = index[0] if index else None
            if isinstance(token, str):
                index = backend.token_to_id(token)
            if kind not in special and isinstance(index, int):
                special[kind] = index
    return special, add_bos


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} beside the tokenizer is not valid JSON ({error}); repair or remove it"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{file} beside the tokenizer must hold a JSON object; repair or remove it"
        )
    return config


def _byte_backend() -> Any:
    """The byte tokenizer in the format of the tokenizers library."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    # Byte-level BPE writes a byte as its Latin-1 character when that is printable, and numbers
    # the others from U+0100 in order.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [b for b in range(256) if b not in printable]
    vocab = {chr(b if b in printable else 256 + others.index(b)): b for b in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = [f"<|{kind}|>" for kind in _BYTE_SPECIALS]
    names += [f"<|reserved_{i}|>" for i in range(256 + len(names), _BYTE_VOCAB_SIZE)]
    backend.add_special_tokens(names)
    bos = "<|bos|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, _BYTE_SPECIALS["bos"])]
    )
    return backend
