"""Where every parameter of a model family lies in its Hugging Face tensors: one table per family.

A row says ``our parameter <- their tensor, and how the axes of the two correspond``:

    Row("layers.attention.wq", "model.layers.{l}.self_attn.q_proj.weight", "(h d) m -> m h d")

The left side of a layout is the tensor in the file, the right side our parameter (of layer `l`
where the name has one). Axes merged in parentheses are split; a digit is an axis of that size of
which the row takes one entry (`part`). Rows whose parameter a model does not have are not used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from jaxheads.models.configs import ModelConfig
from jaxheads.models.vit_configs import ViTConfig


class Row(NamedTuple):
    """One parameter of ours, one tensor (or a part of one) of theirs."""

    path: str
    """Path in our model; under ``layers.`` it is stacked over layers."""
    name: str
    """Name of the tensor, ``{l}`` is the layer."""
    layout: str
    part: int = 0
    """Entry of the digit axis, or of `sections`."""
    sections: tuple[str, ...] = ()
    """Lengths of the parts along the tensor's first axis when they differ, as axis letters."""


class NameMap(NamedTuple):
    """The tensor names of a family."""

    rows: tuple[Row, ...]
    prefix: str = "model."
    """Start of the names, which files written from the bare model leave out."""
    aliases: Mapping[str, str] = {}
    """Other names of tensors -> the name in `rows`."""


IGNORED = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias|embed_positions)$|inv_freq$")
"""Buffers that old versions stored: causal masks and rotary tables, both computed here."""


def axis_sizes(cfg: ModelConfig | ViTConfig) -> dict[str, int]:
    """Sizes of the letters in layouts."""
    if isinstance(cfg, ViTConfig):
        own = {"c": cfg.channels, "i": cfg.patch_size, "j": cfg.patch_size, "p": cfg.num_tokens}
    else:
        own = {"e": cfg.embed_dim, "p": cfg.max_positions + cfg.position_offset}
    return {
        "m": cfg.model_dim,
        "h": cfg.num_heads,
        "k": cfg.num_kv_heads,
        "d": cfg.head_dim,
        "f": cfg.mlp_dim,
        "v": cfg.vocab_size,
        **own,
    }


def _split(layout: str) -> tuple[list[list[str]], list[str]]:
    """``"(h d) m -> m h d"`` -> ``([["h", "d"], ["m"]], ["m", "h", "d"])``."""
    left, right = layout.split("->")
    groups = [g.strip("()").split() for g in re.findall(r"\([^)]*\)|\w+", left)]
    return groups, right.split()


def _length(letters: Iterable[str], sizes: Mapping[str, int]) -> int:
    return int(np.prod([sizes.get(x) or int(x) for x in letters], dtype=np.int64))


def stored_shape(row: Row, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of the whole tensor `row.name` in a file."""
    shape = [_length(group, sizes) for group in _split(row.layout)[0]]
    if row.sections:
        shape[0] = sum(_length(s, sizes) for s in row.sections)
    return tuple(shape)


def view(tensor: np.ndarray, row: Row, sizes: Mapping[str, int]) -> np.ndarray:
    """The row's parameter (of one layer) as a view of the stored tensor; nothing is read."""
    if row.sections:
        ends = np.cumsum([0] + [_length(s, sizes) for s in row.sections])
        tensor = tensor[ends[row.part] : ends[row.part + 1]]
    groups, right = _split(row.layout)
    axes = [x for group in groups for x in group]
    tensor = tensor.reshape([_length([x], sizes) for x in axes])
    for i, axis in reversed(list(enumerate(axes))):
        if axis.isdigit():
            tensor = tensor[(slice(None),) * i + (row.part,)]
    axes = [x for x in axes if not x.isdigit()]
    return tensor.transpose([axes.index(x) for x in right])


def assemble(rows: list[Row], values: list[np.ndarray], sizes: Mapping[str, int]) -> np.ndarray:
    """The stored tensor from the values of all rows that read it: the inverse of `view`."""
    dtype = np.result_type(*values)
    tensor = np.empty(stored_shape(rows[0], sizes), dtype)
    for row, value in zip(rows, values):
        view(tensor, row, sizes)[...] = value
    return tensor


def linear_rows(path: str, name: str, weight: str, bias: str, part: int = 0) -> tuple[Row, ...]:
    """Rows of a weight ``....wq`` and its bias ``....bq``, where the model has one."""
    owner, _, last = path.rpartition(".")
    return (
        Row(path, f"{name}.weight", weight, part),
        Row(f"{owner}.b{last[1:]}", f"{name}.bias", bias, part),
    )


def norm_rows(path: str, name: str, axis: str = "m") -> tuple[Row, ...]:
    """Rows of a norm's weight and bias."""
    same = f"{axis} -> {axis}"
    return (
        Row(f"{path}.weight", f"{name}.weight", same),
        Row(f"{path}.bias", f"{name}.bias", same),
    )


def _attention(name: str, out: str = "o_proj") -> tuple[Row, ...]:
    """Separate projections, each a torch Linear [out,in]."""
    return (
        *linear_rows("layers.attention.wq", f"{name}.q_proj", "(h d) m -> m h d", "(h d) -> h d"),
        *linear_rows("layers.attention.wk", f"{name}.k_proj", "(k d) m -> m k d", "(k d) -> k d"),
        *linear_rows("layers.attention.wv", f"{name}.v_proj", "(k d) m -> m k d", "(k d) -> k d"),
        *_out(f"{name}.{out}"),
    )


def _out(name: str, layout: str = "m (h d) -> h d m") -> tuple[Row, ...]:
    return linear_rows("layers.attention.wo", name, layout, "m -> m")


def _fused(name: str, weight: str, bias: str) -> tuple[Row, ...]:
    """Query, key and value in one tensor, of equal sizes."""
    paths = ("layers.attention.wq", "layers.attention.wk", "layers.attention.wv")
    return tuple(
        row
        for part, path in enumerate(paths)
        for row in linear_rows(path, name, weight, bias, part)
    )


def _mlp(into: str, out: str, gate: str = "", w_in="f m -> m f", w_out="m f -> f m"):
    """The MLP's linear maps, stored [out,in] unless said otherwise."""
    rows = (
        *linear_rows("layers.mlp.w_in", into, w_in, "f -> f"),
        *linear_rows("layers.mlp.w_out", out, w_out, "m -> m"),
    )
    return rows + (linear_rows("layers.mlp.w_gate", gate, w_in, "f -> f") if gate else ())


def _outer(embed: str, final_norm: str, head: str = "lm_head") -> tuple[Row, ...]:
    return (
        Row("embed.table", f"{embed}.weight", "v e -> v e"),
        *norm_rows("final_norm", final_norm),
        Row("unembed.kernel", f"{head}.weight", "v e -> e v"),
        Row("unembed.bias", f"{head}.bias", "v -> v"),
    )


_L = "model.layers.{l}"
_LLAMA_OUTER = _outer("model.embed_tokens", "model.norm")
_GATED = _mlp(f"{_L}.mlp.up_proj", f"{_L}.mlp.down_proj", f"{_L}.mlp.gate_proj")
_LLAMA = (
    *_LLAMA_OUTER,
    *norm_rows("layers.ln1", f"{_L}.input_layernorm"),
    *norm_rows("layers.ln2", f"{_L}.post_attention_layernorm"),
    *_attention(f"{_L}.self_attn"),
    *norm_rows("layers.attention.q_norm", f"{_L}.self_attn.q_norm", "d"),
    *norm_rows("layers.attention.k_norm", f"{_L}.self_attn.k_norm", "d"),
    *_GATED,
)
_GEMMA = (
    *(row for row in _LLAMA if not row.path.startswith("layers.ln2")),
    *norm_rows("layers.ln1_post", f"{_L}.post_attention_layernorm"),
    *norm_rows("layers.ln2", f"{_L}.pre_feedforward_layernorm"),
    *norm_rows("layers.ln2_post", f"{_L}.post_feedforward_layernorm"),
)
_H = "transformer.h.{l}"
_GPT2 = (
    *_outer("transformer.wte", "transformer.ln_f"),
    Row("position.table", "transformer.wpe.weight", "p m -> p m"),
    *norm_rows("layers.ln1", f"{_H}.ln_1"),
    *norm_rows("layers.ln2", f"{_H}.ln_2"),
    *_fused(f"{_H}.attn.c_attn", "m (3 h d) -> m h d", "(3 h d) -> h d"),
    *_out(f"{_H}.attn.c_proj", "(h d) m -> h d m"),
    *_mlp(f"{_H}.mlp.c_fc", f"{_H}.mlp.c_proj", w_in="m f -> m f", w_out="f m -> f m"),
)
_GPTJ = (
    *_outer("transformer.wte", "transformer.ln_f"),
    *norm_rows("layers.ln1", f"{_H}.ln_1"),
    *_attention(f"{_H}.attn", "out_proj"),
    *_mlp(f"{_H}.mlp.fc_in", f"{_H}.mlp.fc_out"),
)
_N = "gpt_neox.layers.{l}"
_NEOX = (
    *_outer("gpt_neox.embed_in", "gpt_neox.final_layer_norm", head="embed_out"),
    *norm_rows("layers.ln1", f"{_N}.input_layernorm"),
    *norm_rows("layers.ln2", f"{_N}.post_attention_layernorm"),
    *_fused(f"{_N}.attention.query_key_value", "(h 3 d) m -> m h d", "(h 3 d) -> h d"),
    *_out(f"{_N}.attention.dense"),
    *_mlp(f"{_N}.mlp.dense_h_to_4h", f"{_N}.mlp.dense_4h_to_h"),
)
_O = "model.decoder.layers.{l}"
_OPT = (
    *_outer("model.decoder.embed_tokens", "model.decoder.final_layer_norm"),
    Row("position.table", "model.decoder.embed_positions.weight", "p m -> p m"),
    Row("project_in", "model.decoder.project_in.weight", "m e -> e m"),
    Row("project_out", "model.decoder.project_out.weight", "e m -> m e"),
    *norm_rows("layers.ln1", f"{_O}.self_attn_layer_norm"),
    *norm_rows("layers.ln2", f"{_O}.final_layer_norm"),
    *_attention(f"{_O}.self_attn", "out_proj"),
    *_mlp(f"{_O}.fc1", f"{_O}.fc2"),
)
_QKV = ("hd", "kd", "kd")
_PHI3 = (
    *_LLAMA_OUTER,
    *norm_rows("layers.ln1", f"{_L}.input_layernorm"),
    *norm_rows("layers.ln2", f"{_L}.post_attention_layernorm"),
    *(
        Row(f"layers.attention.w{x}", f"{_L}.self_attn.qkv_proj.weight", layout, part, _QKV)
        for part, (x, layout) in enumerate(
            (("q", "(h d) m -> m h d"), ("k", "(k d) m -> m k d"), ("v", "(k d) m -> m k d"))
        )
    ),
    *_out(f"{_L}.self_attn.o_proj"),
    Row("layers.mlp.w_gate", f"{_L}.mlp.gate_up_proj.weight", "(2 f) m -> m f", 0),
    Row("layers.mlp.w_in", f"{_L}.mlp.gate_up_proj.weight", "(2 f) m -> m f", 1),
    Row("layers.mlp.w_out", f"{_L}.mlp.down_proj.weight", "m f -> f m"),
)

NAME_MAPS: Mapping[str, NameMap] = {
    "gpt2": NameMap(_GPT2, "transformer."),
    "gpt_neox": NameMap(_NEOX, "gpt_neox.", {"lm_head.weight": "embed_out.weight"}),
    "gptj": NameMap(_GPTJ, "transformer."),
    "opt": NameMap(_OPT),
    "llama": NameMap(_LLAMA),
    "mistral": NameMap(_LLAMA),
    "qwen2": NameMap(_LLAMA),
    "qwen3": NameMap(_LLAMA),
    "gemma2": NameMap(_GEMMA),
    "gemma3_text": NameMap(_GEMMA),
    "phi3": NameMap(_PHI3),
}
"""Tensor names by Hugging Face model type."""
