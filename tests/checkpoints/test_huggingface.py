"""Directories of weights: meshes, dtypes, layouts of files, saving, and everything malformed."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxheads import parallel
from jaxheads.attention import RopeConfig
from jaxheads.checkpoints import huggingface, safetensors
from jaxheads.checkpoints.huggingface import load, save
from jaxheads.models import Decoder, ModelConfig, forward

SHARED = Path(__file__).parents[2] / "../shared/models"
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 9))
LLAMA = ModelConfig(
    vocab_size=32, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=4, mlp_dim=24,
    max_positions=16, tie_embeddings=False,
)  # fmt: skip
GPT2 = ModelConfig(
    family="gpt2", vocab_size=32, num_layers=2, model_dim=16, num_heads=4, max_positions=16,
    positions="learned", norm="layernorm", activation="gelu_tanh", gated_mlp=False,
    qkv_bias=True, attn_out_bias=True, mlp_bias=True,
)  # fmt: skip
PHI3 = dataclasses.replace(LLAMA, family="phi3", num_kv_heads=2)


def make(cfg, seed=0):
    """A model whose every parameter is random."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 4, x.dtype), shapes)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Directories of three families, not to be written to."""
    root = tmp_path_factory.mktemp("models")
    for cfg in (LLAMA, GPT2, PHI3):
        save(make(cfg), root / cfg.family)
    return root


@pytest.fixture
def directory(stored, tmp_path):
    """A copy of the Llama directory to damage."""
    shutil.copytree(stored / "llama", tmp_path / "model")
    return tmp_path / "model"


def assert_same(a, b):
    """Equal configurations and bit-identical parameters."""
    assert a.cfg == b.cfg
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def rewrite(directory, change, name="model.safetensors"):
    """Apply `change` to the dictionary of tensors of a file."""
    tensors = load_file(directory / name)
    tensors = change(tensors) or tensors
    save_file(tensors, directory / name, metadata={"format": "pt"})


def reconfigure(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# Real models


@pytest.mark.parametrize("name", ["stories260K", "neox-stories-tiny", "gpt-nano-sort"])
def test_real_models_equal_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = SHARED / name
    if not path.is_dir():
        pytest.skip("shared models are not here")
    model = load(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    length = min(64, model.cfg.max_positions)
    tokens = np.random.default_rng(1).integers(0, model.cfg.vocab_size, (2, length))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(forward(model, tokens).logits, expected, atol=1e-4, rtol=0)

    save(model, tmp_path)
    assert_same(model, load(tmp_path))
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[k], after[k]) for k in before)


# Meshes


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("spec", ["fsdp:2,model:2", "model:4", "data:2,fsdp:4"])
def test_load_onto_a_mesh(stored, family, spec):
    single = load(stored / family)
    size = {"data:2,fsdp:4": 8}.get(spec, 4)
    mesh = parallel.make_mesh(spec, devices=jax.devices()[:size])
    if family == "phi3" and spec == "model:4":
        with pytest.raises(ValueError, match="kv_heads"):
            load(stored / family, mesh=mesh)
        return
    placed = load(stored / family, mesh=mesh)
    assert_same(single, placed)
    wanted = jax.tree.leaves(parallel.shardings(single, mesh))
    for x, sharding in zip(jax.tree.leaves(placed), wanted, strict=True):
        assert x.sharding == sharding
    assert any(not s.is_fully_replicated for s in wanted)
    with jax.set_mesh(mesh):
        got = jax.jit(forward)(placed, TOKENS).logits
    np.testing.assert_allclose(got, forward(single, TOKENS).logits, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_shards_read_only_their_bytes(stored, family, monkeypatch):
    """Every stored element is copied once, and none of a parameter's parts is larger than it."""
    copied, largest = [], []
    real = safetensors.copy

    def counting(target, source, tensor):
        copied.append(target.size)
        largest.append(target.size / np.prod(tensor.shape))
        real(target, source, tensor)

    monkeypatch.setattr(safetensors, "copy", counting)
    mesh = parallel.make_mesh("fsdp:2,model:2", devices=jax.devices()[:4])
    model = load(stored / family, mesh=mesh)
    assert sum(copied) == sum(x.size for x in jax.tree.leaves(model))
    split = [x for x in jax.tree.leaves(model) if not x.sharding.is_fully_replicated]
    assert split and min(largest) <= 0.25


def test_one_copy_for_devices_that_hold_the_same_part(stored, monkeypatch):
    calls = []
    monkeypatch.setattr(safetensors, "copy", lambda *a: calls.append(a))
    load(stored / "llama", mesh=parallel.make_mesh("data:8"))
    assert len(calls) == len(load_file(stored / "llama/model.safetensors"))


# Dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_kept(dtype, tmp_path):
    model = make(dataclasses.replace(LLAMA, param_dtype=dtype))
    save(model, tmp_path)
    again = load(tmp_path)
    assert_same(model, again)
    assert again.cfg.param_dtype == dtype and again.cfg.compute_dtype == "auto"
    assert {x.dtype for x in jax.tree.leaves(again)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", jnp.float32, np.dtype("float32")])
def test_dtype_asked_for(stored, dtype):
    model, full = load(stored / "gpt2", dtype=dtype), load(stored / "gpt2")
    name = jnp.dtype(dtype).name
    assert (model.cfg.param_dtype, model.cfg.compute_dtype) == (name, name)
    for x, y in zip(jax.tree.leaves(model), jax.tree.leaves(full), strict=True):
        np.testing.assert_array_equal(x, y.astype(dtype))


def test_mixed_dtypes_stay_exact(directory, tmp_path):
    import ml_dtypes

    def narrow(tensors):
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    rewrite(directory, narrow)
    model = load(directory)
    assert model.cfg.param_dtype == "bfloat16"
    assert model.layers.ln1.weight.dtype == jnp.float32
    assert model.layers.attention.wq.dtype == jnp.bfloat16
    save(model, tmp_path / "again")
    before = load_file(directory / "model.safetensors")
    after = load_file(tmp_path / "again/model.safetensors")
    assert all(before[n].dtype == after[n].dtype for n in before)
    assert all(np.array_equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("dtype", ["int8", "float64", "fp8", 3.5])
def test_unknown_dtype(stored, dtype):
    with pytest.raises(ValueError, match="is not one of float32, bfloat16, float16"):
        load(stored / "gpt2", dtype=dtype)


# Files


def test_sharded_equals_single(stored, tmp_path):
    model = load(stored / "phi3")
    save(model, tmp_path, max_shard_bytes=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == files
    whole = load_file(stored / "phi3/model.safetensors")
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in whole.values())
    biggest = max(v.nbytes for v in whole.values())
    for name in files:
        assert sum(v.nbytes for v in load_file(tmp_path / name).values()) <= max(4000, biggest)
    assert_same(model, load(tmp_path))


def test_names_without_prefix_and_old_buffers(stored, tmp_path):
    """As in the first GPT-2 files: no "transformer.", causal masks as tensors."""
    shutil.copytree(stored / "gpt2", tmp_path, dirs_exist_ok=True)

    def old(tensors):
        new = {name.removeprefix("transformer."): v for name, v in tensors.items()}
        for i in range(2):
            new[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.uint8))
            new[f"h.{i}.attn.masked_bias"] = np.float32([-1e4])
        return new

    rewrite(tmp_path, old)
    assert_same(load(tmp_path), load(stored / "gpt2"))


@pytest.mark.parametrize("equal", [True, False])
def test_tied_model_that_stores_its_output_matrix(stored, tmp_path, equal):
    shutil.copytree(stored / "gpt2", tmp_path, dirs_exist_ok=True)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + (not equal)

    rewrite(tmp_path, add)
    if equal:
        assert_same(load(tmp_path), load(stored / "gpt2"))
        return
    with pytest.raises(ValueError, match="output matrix differs"):
        load(tmp_path)
    reconfigure(tmp_path, tie_word_embeddings=False)
    kernel = load(tmp_path).unembed.kernel[...]
    np.testing.assert_array_equal(kernel.T, load(stored / "gpt2").embed.table[...] + 1)


OWN = {
    "alibi": {"positions": "alibi"},
    "sinks": {"attn_sinks": True},
    "no positions": {"positions": "none"},
    "two widths": {"window": (4, None, 2), "num_layers": 3},
    "gated gpt": {"norm": "layernorm", "qkv_bias": True},
    "rope on part": {"rope": RopeConfig(fraction=0.5, theta=99.5)},
    "unknown family": {"family": "mine", "qk_norm": True},
    "post norm": {"norm_placement": "post", "embed_dim": 8},
}


@pytest.mark.parametrize("case", OWN)
def test_configurations_of_our_own(case, tmp_path):
    extras = (("note", '{"a": [1, null]}'),)
    model = make(dataclasses.replace(LLAMA, **OWN[case], remat="full", extras=extras))
    save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "jaxheads"
    assert "embed.table" in load_file(tmp_path / "model.safetensors")
    assert_same(load(tmp_path), model)
    mesh = parallel.make_mesh("model:2", devices=jax.devices()[:2])
    for x, y in zip(*map(jax.tree.leaves, (load(tmp_path, mesh=mesh), model)), strict=True):
        np.testing.assert_array_equal(x, y)


# Saving


def test_save_replaces_what_was_there_and_nothing_else(tmp_path):
    first, second = make(LLAMA, 1), make(GPT2, 2)
    save(first, tmp_path, max_shard_bytes=3000)
    (tmp_path / "tokenizer.json").write_text("{}")
    save(second, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert_same(load(tmp_path), second)
    save(load(tmp_path), tmp_path)  # onto the files it was read from
    assert_same(load(tmp_path), second)


def test_interrupted_save_leaves_the_old_model(stored, directory, monkeypatch):
    def fail(path, tensors):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        save(make(LLAMA, 7), directory)
    assert_same(load(directory), load(stored / "llama"))
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]


def test_sharded_model_is_saved_whole(stored, tmp_path):
    mesh = parallel.make_mesh("fsdp:2,model:2,data:2")
    save(load(stored / "phi3", mesh=mesh), tmp_path)
    assert_same(load(tmp_path), load(stored / "phi3"))


def test_loaded_arrays_do_not_follow_the_file(directory):
    model = load(directory)
    before = np.array(model.embed.table[...])
    with open(directory / "model.safetensors", "r+b") as file:
        file.seek(2000)
        file.write(b"\xff" * 4000)
    np.testing.assert_array_equal(model.embed.table[...], before)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda d: save({"a": 1}, d), TypeError, "needs a Decoder"),
        (lambda d: save(make(LLAMA), d / "config.json"), ValueError, "is a file"),
        (lambda d: save(make(LLAMA), d, max_shard_bytes=0), ValueError, "must be positive"),
        (lambda d: load(d / "model.safetensors"), ValueError, "is a file; give the directory"),
        (lambda d: load(d / "nothing"), ValueError, "no directory"),
        (lambda d: load("./nowhere/at/all"), ValueError, "no directory"),
        (lambda d: load("tests/nowhere"), ValueError, "no directory"),
        (lambda d: load("no-such-model"), ValueError, "no shipped model"),
        (lambda d: load(None), TypeError, "needs a path or a name"),
        (lambda d: load(str(d).replace("/", "\\")), ValueError, "no directory"),
    ],
)
def test_bad_calls(directory, call, error, match, monkeypatch):
    monkeypatch.setattr("jaxheads.checkpoints.directory._download", lambda name: 1 / 0)
    with pytest.raises(error, match=match):
        call(directory)


def test_hub_id_without_the_hub(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install jaxheads\[hub\]"):
        load("nobody/no-such-model")


# Malformed directories: (what to do to a good one, words the one error must have)


def _index(directory, **files):
    """Move tensors into files named by an index; keyword values are extra entries."""
    tensors = load_file(directory / "model.safetensors")
    os.rename(directory / "model.safetensors", directory / "a.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors")
    weight_map |= {name.replace("_", "."): file for name, file in files.items()}
    text = json.dumps({"weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)


def _truncate(directory):
    with open(directory / "model.safetensors", "r+b") as file:
        file.truncate(os.path.getsize(file.name) - 10)


def _transposed(tensors):
    tensors["model.embed_tokens.weight"] = np.ascontiguousarray(
        tensors["model.embed_tokens.weight"].T
    )


def _several(tensors):
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["score.weight"] = np.zeros((2, 16), np.float32)
    _transposed(tensors)


def _no_layers(tensors):
    return {n: v for n, v in tensors.items() if "layers" not in n} | {
        f"extra.{i}": np.zeros(1, np.float32) for i in range(9)
    }


def _link(directory):
    outside = directory.parent / "outside.safetensors"
    os.rename(directory / "model.safetensors", outside)
    os.symlink(outside, directory / "b.safetensors")
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "b.safetensors"}})
    )


def _only(name):
    def change(directory):
        os.remove(directory / "model.safetensors")
        (directory / name).write_bytes(b"x")

    return change


def _text(name, text):
    return lambda directory: (directory / name).write_bytes(text)


INDEX = "model.safetensors.index.json"
MALFORMED = {
    "index leaves upwards": (lambda d: _index(d, x="../x.safetensors"), ["'../x.safetensors'"]),
    "index is absolute": (lambda d: _index(d, x="/etc/passwd"), ["'/etc/passwd'", "not a file"]),
    "index names a folder": (lambda d: _index(d, x="sub/x.safetensors"), ["'sub/x.safetensors'"]),
    "index names ..": (lambda d: _index(d, x=".."), ["'..'"]),
    "index with backslash": (lambda d: _index(d, x="..\\x"), ["not a file of this directory"]),
    "index follows a link": (_link, ["b.safetensors is a link to", "outside the directory"]),
    "index names a missing file": (lambda d: _index(d, x="b.safetensors"), ["b.safetensors, n"]),
    "index has three faults": (
        lambda d: _index(d, x="../x", y="/y", z="z.safetensors"),
        ["3 problems", "'../x'", "'/y'", "z.safetensors"],
    ),
    "index names a missing tensor": (lambda d: _index(d, x="a.safetensors"), ["x is not in a."]),
    "index is no json": (_text(INDEX, b"{"), ["not valid JSON"]),
    "index is a list": (_text(INDEX, b"[]"), ["needed a JSON object"]),
    "index without map": (_text(INDEX, b"{}"), ["no weight_map"]),
    "index of numbers": (_text(INDEX, b'{"weight_map": {"a": 1}}'), ["no weight_map"]),
    "truncated file": (_truncate, ["model.safetensors is not a complete safetensors file"]),
    "empty file": (_text("model.safetensors", b""), ["not a complete safetensors file"]),
    "garbage file": (_text("model.safetensors", b"\x80\x02pickle" * 9), ["not a complete"]),
    "header too long": (_text("model.safetensors", b"\xff" * 64), ["not a complete"]),
    "wrong shape": (lambda d: rewrite(d, _transposed), ["embed_tokens", "[16, 32]", "[32, 16]"]),
    "missing tensor": (
        lambda d: rewrite(d, lambda t: t.pop("lm_head.weight") is None or t),
        ["lm_head.weight [32, 16] is missing"],
    ),
    "several at once": (
        lambda d: rewrite(d, _several),
        ["4 problems", "model.norm.weight", "layers.1.mlp.up_proj.weight [24, 16] is missing",
         "score.weight [2, 16] is not part of the model", "embed_tokens"],
    ),
    "more than twenty": (lambda d: rewrite(d, _no_layers), ["27 problems", "... and 7 more"]),
    "integers": (
        lambda d: rewrite(d, lambda t: {n: v.astype(np.int8) for n, v in t.items()}),
        ["stored as I8", "F32, F16, BF16"],
    ),
    "float64": (
        lambda d: rewrite(d, lambda t: {n: v.astype(np.float64) for n, v in t.items()}),
        ["stored as F64"],
    ),
    "two names of one tensor": (
        lambda d: rewrite(d, lambda t: {**t, "norm.weight": t["model.norm.weight"]}),
        ["stored twice"],
    ),
    "pickle": (_only("pytorch_model.bin"), ["pytorch_model.bin", "save_pretrained"]),
    "torch file": (_only("weights.pt"), ["weights.pt", "convert"]),
    "gguf": (_only("model.gguf"), ["model.gguf", "convert"]),
    "adapter": (_only("adapter_config.json"), ["LoRA", "merge"]),
    "no weights": (lambda d: os.remove(d / "model.safetensors"), ["neither model.safetensors"]),
    "no config": (lambda d: os.remove(d / "config.json"), ["neither config.json"]),
    "config is no json": (_text("config.json", b"{'a': 1}"), ["not valid JSON"]),
    "config is a list": (_text("config.json", b"[1]"), ["needed a JSON object"]),
    "config holds NaN": (_text("config.json", b'{"model_type": NaN}'), ["NaN is not allowed"]),
    "config nests": (_text("config.json", b"[" * 100000), ["not valid JSON"]),
    "config is not text": (_text("config.json", b"\xff\xfe\x00"), ["not valid JSON"]),
    "config with an unknown field": (lambda d: reconfigure(d, odd=1), ["unknown fields odd"]),
    "config of another model": (
        lambda d: reconfigure(d, num_hidden_layers=3), ["9 problems", "layers.2"],
    ),
    "config without bias": (
        lambda d: reconfigure(d, attention_bias=True), ["8 problems", "q_proj.bias [16] is"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_directory(directory, case):
    damage, words = MALFORMED[case]
    damage(directory)
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        load(directory)
    for word in words:
        assert word in str(caught.value)
    assert str(directory) in str(caught.value)


def test_link_inside_a_hub_cache_is_fine(stored, tmp_path):
    """The hub's cache: snapshots/REVISION/file -> ../../blobs/HASH."""
    snapshot, blobs = tmp_path / "models--a--b/snapshots/c0ffee", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save(load(stored / "llama"), snapshot, max_shard_bytes=3000)
    for i, path in enumerate(sorted(snapshot.iterdir())):
        os.rename(path, blobs / str(i))
        os.symlink(f"../../blobs/{i}", path)
    assert_same(load(snapshot), load(stored / "llama"))


def test_training_checkpoint_is_handed_on(tmp_path, monkeypatch):
    orbax = pytest.importorskip("jaxheads.checkpoints.orbax")
    calls = []
    monkeypatch.setattr(orbax, "is_checkpoint", lambda path: True)
    monkeypatch.setattr(orbax, "load_model", lambda path, **kw: calls.append((path, kw)))
    load(tmp_path, dtype=jnp.bfloat16)
    assert calls == [(tmp_path, {"dtype": "bfloat16", "mesh": None})]


def test_huggingface_reads_no_pickle():
    for module in (huggingface, safetensors):
        source = Path(module.__file__).read_text()
        assert "import pickle" not in source and "torch.load" not in source
