"""A word-level tokenizer made in memory, for tasks that need words to be single tokens."""

from __future__ import annotations

from pathlib import Path

from jaxheads.data import Tokenizer


def word_tokenizer(directory: Path, texts: list[str], *, bos: bool = False) -> Tokenizer:
    """A tokenizer that knows exactly the words of `texts`, saved to `directory`.

    A word keeps its leading space (``"Ġword"``); spaces, words and punctuation are split apart.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocab = {word: n for n, word in enumerate(["<unk>", "<s>", *words])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<unk>", "<s>"])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    return Tokenizer.load(directory)
