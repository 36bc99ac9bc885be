import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxheads.data import Tokenizer

MODELS = Path(__file__).parents[2] / "../shared/models"
STORIES = MODELS / "stories260K"
TEXT = "Once upon a time, Lily saw 3 big dogs.\n  Hé said: 日本!"


@pytest.fixture(scope="module")
def word_file(tmp_path_factory):
    """A word-level tokenizer.json with a template that adds BOS, and stored truncation."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    backend = tokenizers.Tokenizer(
        models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    directory = tmp_path_factory.mktemp("word")
    backend.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = Tokenizer.load("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids[0] == tokenizer.bos_id
    assert bytes(ids[1:].tolist()) == text.encode("utf-8")
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, add_bos=False).tolist() == ids[1:].tolist()


def test_bytes_ids():
    tokenizer = Tokenizer.load("bytes")
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (256, 257, 258)
    assert tokenizer.vocab_size == 384
    assert (tokenizer.name, tokenizer.spec) == ("bytes", "bytes")
    assert tokenizer.decode([0xE2, 0x82, 65]) == "\ufffdA"
    assert tokenizer.decode([257, 65, 258, 300]) == "A"
    assert tokenizer.decode([257, 65, 258], skip_special=False) == "<|bos|>A<|eos|>"
    assert tokenizer.decode(np.zeros(0)) == ""


@pytest.fixture(scope="module")
def saved_bytes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bytes")
    Tokenizer.load("bytes").save(directory)
    return directory


def test_saved_bytes_load_as_bytes(saved_bytes):
    assert Tokenizer.load(saved_bytes).spec == "bytes"
    assert Tokenizer.load(saved_bytes / "tokenizer.json").spec == "bytes"


# Other libraries take the spelling of a special token in a text for the token itself.
@given(st.text().filter(lambda text: "<|" not in text))
def test_saved_bytes_give_the_same_ids_elsewhere(saved_bytes_backend, text):
    expected = Tokenizer.load("bytes").encode(text).tolist()
    assert saved_bytes_backend.encode(text).ids == expected
    assert saved_bytes_backend.decode(expected) == text


@pytest.fixture(scope="module")
def saved_bytes_backend(saved_bytes):
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(saved_bytes / "tokenizer.json"))


def test_saved_bytes_in_transformers(saved_bytes):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(saved_bytes)
    assert reference("hé")["input_ids"] == [257, 104, 0xC3, 0xA9]
    ids = (reference.pad_token_id, reference.bos_token_id, reference.eos_token_id)
    assert ids == (256, 257, 258)
    assert len(reference) == 384


def test_template_bos_is_not_doubled(word_file):
    (word_file.parent / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True})
    )
    tokenizer = Tokenizer.load(word_file)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, None)
    assert tokenizer.adds_bos
    for add_bos, expected in ((None, [0, 3, 4]), (True, [0, 3, 4]), (False, [3, 4])):
        assert tokenizer.encode("a b", add_bos=add_bos).tolist() == expected
    assert tokenizer.encode("<s> a", add_bos=True).tolist() == [0, 3]
    assert tokenizer.decode([0, 3, 4, 1]) == "a b"


def test_stored_truncation_and_padding_are_off(word_file):
    tokenizer = Tokenizer.load(word_file.parent)
    assert len(tokenizer.encode("a b " * 50, add_bos=False)) == 100


def test_spec_rebuilds_and_digest_identifies(word_file, tmp_path):
    tokenizer = Tokenizer.load(word_file.parent)
    assert Tokenizer.load(json.loads(json.dumps(tokenizer.spec))).digest == tokenizer.digest
    tokenizer.save(tmp_path / "copy")
    copy = Tokenizer.load(tmp_path / "copy")
    assert copy.digest == tokenizer.digest != Tokenizer.load("bytes").digest
    assert copy.encode("b a x").tolist() == tokenizer.encode("b a x").tolist()


def test_special_ids_from_model_config(word_file, tmp_path):
    (tmp_path / "tokenizer.json").write_text(word_file.read_text())
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 2}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


def test_encode_batch():
    tokenizer = Tokenizer.load("bytes")
    rows = tokenizer.encode_batch(["", "ab"])
    assert [row.tolist() for row in rows] == [[257], [257, 97, 98]]


@pytest.mark.parametrize("model", ["stories260K", "neox-stories-tiny", "bert-agnews-tiny"])
def test_same_ids_as_transformers(model):
    if not (MODELS / model).exists():
        pytest.skip("no shared models")
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.load(MODELS / model)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(MODELS / model)
    for text in (TEXT, "", " ", "Once"):
        assert tokenizer.encode(text).tolist() == reference(text)["input_ids"]
        bare = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text, add_bos=False).tolist() == bare
    assert tokenizer.bos_id == reference.bos_token_id
    assert tokenizer.eos_id == reference.eos_token_id


def test_stories_round_trip():
    if not STORIES.exists():
        pytest.skip("no shared models")
    tokenizer = Tokenizer.load(STORIES)
    assert tokenizer.name == "stories260K"
    assert tokenizer.vocab_size == 512
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "none", "does not exist; give a tokenizer.json"),
        (lambda d: _write(d / "tokenizer.json", "{oops"), "not valid JSON"),
        (lambda d: _write(d / "tokenizer.json", ""), "damaged or incomplete"),
        (lambda d: _write(d / "tokenizer.json", '{"a": 1}'), "not in the format of the tokenizers"),
        (lambda d: _write(d / "t.model", ""), "sentencepiece model; convert it once"),
        (lambda d: _write(d / "sub/tokenizer.model", "").parent, "holds tokenizer.model: convert"),
        (lambda d: d, "holds no tokenizer.json"),
        (lambda d: d / "weights.pt", "is a pickle, which can run code"),
        (lambda d: d / "weights.bin", "holds model weights"),
        (lambda d: d / "model.safetensors", "holds model weights"),
    ],
)
def test_load_errors(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(make(tmp_path))


def test_broken_config_beside_the_tokenizer(tmp_path, word_file):
    _write(tmp_path / "tokenizer.json", word_file.read_text())
    _write(tmp_path / "tokenizer_config.json", "[")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json beside the tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.decode([384]), ValueError, "token id 384 is outside the vocabulary"),
        (lambda t: t.decode([5, -1]), ValueError, "token id -1 is outside"),
        (lambda t: t.decode([[1]]), ValueError, r"shape \(1, 1\)"),
        (lambda t: t.decode([1.5]), ValueError, "integer type"),
        (lambda t: t.encode(["a"]), TypeError, "encode takes one string, got list"),
        (lambda t: t.encode_batch("a"), TypeError, "got one string"),
        (lambda t: Tokenizer.load(3), TypeError, "given as int"),
    ],
)
def test_call_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(Tokenizer.load("bytes"))
