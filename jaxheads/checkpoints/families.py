"""Hugging Face configurations of every supported family, read and written from tables.

`from_hf` turns a config.json into a `ModelConfig`, `to_hf` is its inverse. A family is a row of
`FAMILIES`: which of their fields is which of ours, what the family fixes, and which values would
change the maths in a way we do not compute. Nothing is dropped: metadata travels in
`ModelConfig.extras`, an unknown field is an error.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxheads.attention.rope import RopeConfig
from jaxheads.checkpoints import rope_fields, window_fields
from jaxheads.checkpoints.reader import (
    COUNT,
    COUNT_OR_NULL,
    FLAG,
    NUMBER,
    NUMBER_OR_NULL,
    Kind,
    Reader,
    choice,
)
from jaxheads.fields import from_json, to_json
from jaxheads.models.configs import ModelConfig

OWN = "jaxheads"
"""Model type of configurations that no Hugging Face family can express."""

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
}


def activation(gelu_tanh: str = "gelu_pytorch_tanh") -> Kind:
    """The activation's name; `gelu_tanh` is what the family calls the approximate GELU."""
    names = {"gelu": "gelu", "gelu_tanh": gelu_tanh}
    return Kind(
        "the name of an activation",
        lambda v: isinstance(v, str),
        _ACTIVATIONS.get,
        lambda v: names.get(v, v),
        supported=_ACTIVATIONS.__contains__,
    )


def _scalar_to_scale(scale: float) -> float:
    """The integer n with ``n ** -0.5 == scale`` where there is one."""
    nearest = round(scale**-2)
    return nearest if nearest and float(nearest) ** -0.5 == scale else scale**-2


SCALAR = NUMBER._replace(read=lambda v: float(v) ** -0.5, write=_scalar_to_scale)


LAYERS = COUNT._replace(
    needed="a positive integer up to 10000",
    accepts=lambda v: COUNT.accepts(v) and v <= 10_000,  # tables are made per layer
)


class Field(NamedTuple):
    """A field of config.json and the field (or fields) of `ModelConfig` it sets."""

    name: str
    ours: str | tuple[str, ...]
    default: Any
    kind: Kind = COUNT


class Part(NamedTuple):
    """Several fields that only make sense together."""

    read: Callable[[Reader, Mapping[str, Any]], dict[str, Any]]
    """(fields of config.json, our fields read so far) -> more of our fields."""
    write: Callable[[Any], dict[str, Any]]


class Only(NamedTuple):
    """The values of a field that leave the maths as the family has it, and what others do."""

    values: tuple[Any, ...]
    reason: str


@dataclass(frozen=True)
class Family:
    """How a family's config.json reads."""

    architecture: str
    fields: tuple[Field, ...]
    fixed: Mapping[str, Any]
    """Our fields that every model of the family shares."""
    parts: tuple[Part, ...] = ()
    only: Mapping[str, Only] = field(default_factory=dict)
    metadata: frozenset[str] = frozenset()
    """Fields of this family without influence on a forward pass."""


_METADATA = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures
    attention_dropout attn_implementation attn_pdrop auto_map bad_words_ids
    begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward
    classifier_dropout custom_pipelines decoder_start_token_id diversity_penalty do_sample
    early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing hidden_dropout id2label init_std initializer_range is_decoder
    keys_to_ignore_at_inference label2id length_penalty max_length min_length name_or_path
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class
    top_k top_p torchscript transformers_version typical_p unsloth_fixed unsloth_version
    use_bfloat16 use_cache
"""
METADATA = frozenset(_METADATA.split())
"""Fields of any family that do not change a forward pass: kept in `extras`, written back."""

COMMON_ONLY: Mapping[str, Only] = {
    "add_cross_attention": Only((False, None), "cross-attention is not part of a decoder LM"),
    "cross_attention_hidden_size": Only((None,), "cross-attention is not part of a decoder LM"),
    "is_encoder_decoder": Only((False, None), "only decoders are supported"),
    "tie_encoder_decoder": Only((False, None), "only decoders are supported"),
    "pruned_heads": Only(({}, [], None), "heads are pruned; ablate them instead"),
    "per_layer_config": Only(({}, None), "layers differ in ways the stack cannot hold"),
    "quantization_config": Only((None,), "weights are quantised; save a dequantised copy first"),
    "use_bidirectional_attention": Only((False, None), "attention is causal here"),
}


_EMBED_SCALE = Part(lambda reader, ours: {"embed_scale": ours["model_dim"] ** 0.5}, lambda cfg: {})


def _gptj_rope(reader: Reader, ours: Mapping[str, Any]) -> dict[str, Any]:
    rotary_dim = reader.take("rotary_dim", 64, COUNT)
    head_dim = ours["model_dim"] // ours["num_heads"]
    if not 0 < rotary_dim <= head_dim:
        reader.complain(f"rotary_dim={rotary_dim} (needed at most the head size, {head_dim})")
        return {}
    fraction = rotary_dim / head_dim
    if int(head_dim * fraction) < rotary_dim:  # the quotient was rounded down
        fraction = math.nextafter(fraction, 1.0)
    return {"rope": RopeConfig(fraction=fraction, interleaved=True)}


def _tied(default: bool) -> Field:
    return Field("tie_word_embeddings", "tie_embeddings", default, FLAG)


def _gpt_sizes(vocab, positions, width, layers, heads) -> tuple[Field, ...]:
    """Sizes under the names of OpenAI's release."""
    return (
        Field("vocab_size", "vocab_size", vocab),
        Field("n_positions", "max_positions", positions),
        Field("n_embd", "model_dim", width),
        Field("n_layer", "num_layers", layers, LAYERS),
        Field("n_head", "num_heads", heads),
        Field("n_inner", "mlp_dim", None, COUNT_OR_NULL),
        Field("activation_function", "activation", "gelu_new", activation("gelu_new")),
        Field("layer_norm_epsilon", "norm_eps", 1e-5, NUMBER),
    )


def _sizes(vocab, positions, width, layers, heads, mlp, mlp_name="intermediate_size"):
    """Sizes under the names most families have."""
    return (
        Field("vocab_size", "vocab_size", vocab),
        Field("max_position_embeddings", "max_positions", positions),
        Field("hidden_size", "model_dim", width),
        Field("num_hidden_layers", "num_layers", layers, LAYERS),
        Field("num_attention_heads", "num_heads", heads),
        Field(mlp_name, "mlp_dim", mlp),
    )


def _llama_like(sizes, kv_heads, head_dim, eps, *, tied=False, act="hidden_act", silu="silu"):
    """The fields that every descendant of Llama has."""
    return (
        *sizes,
        Field("num_key_value_heads", "num_kv_heads", kv_heads, COUNT_OR_NULL),
        Field("head_dim", "head_dim", head_dim, COUNT_OR_NULL),
        Field("rms_norm_eps", "norm_eps", eps, NUMBER),
        Field(act, "activation", silu, activation()),
        _tied(tied),
    )


_QKVO = ("qkv_bias", "attn_out_bias")
_GPT = {"norm": "layernorm", "gated_mlp": False, "mlp_bias": True}
_LEARNED = {**_GPT, "positions": "learned"}
_LLAMA = {"norm": "rmsnorm", "gated_mlp": True, "positions": "rope"}
_GEMMA = {**_LLAMA, "norm_offset": 1.0, "norm_placement": "sandwich"}
_GEMMA_FIELDS = (
    Field("attention_bias", _QKVO, False, FLAG),
    Field("query_pre_attn_scalar", "attn_scale", 256, SCALAR),
)
_SUMMARY = frozenset(
    f"summary_{x}" for x in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")
)
_ROPE = Part(*rope_fields.flat("rope_theta"))
_QWEN_WINDOWS = Part(*window_fields.from_layer())
_NO_MROPE = Only((False, None), "positions of images are not supported")

FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        (
            *_gpt_sizes(50257, 1024, 768, 12, 12),
            Field("scale_attn_by_inverse_layer_idx", "scale_by_layer", False, FLAG),
            _tied(True),
        ),
        {**_LEARNED, "qkv_bias": True, "attn_out_bias": True},
        only={
            "scale_attn_weights": Only((True,), "scores would not be divided by sqrt(head_dim)"),
        },
        # The order of scaling and upcasting only matters below float32, and ours is in float32.
        metadata=_SUMMARY | {"n_ctx", "reorder_and_upcast_attn", "predict_special_tokens"},
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        (
            *_sizes(50432, 2048, 6144, 44, 64, 24576),
            Field("layer_norm_eps", "norm_eps", 1e-5, NUMBER),
            Field("hidden_act", "activation", "gelu", activation("gelu_new")),
            Field(
                "use_parallel_residual",
                "residual",
                True,
                choice({True: "parallel", False: "sequential"}),
            ),
            Field("attention_bias", _QKVO, True, FLAG),
            _tied(False),
        ),
        {**_GPT, "positions": "rope"},
        (
            Part(
                *rope_fields.flat(
                    "rotary_emb_base", "rope_theta", fraction="rotary_pct", default_fraction=0.25
                )
            ),
        ),
        metadata=frozenset({"attention_probs_dropout_prob", "hidden_dropout_prob"}),
    ),
    "gptj": Family(
        "GPTJForCausalLM",
        (*_gpt_sizes(50400, 2048, 4096, 28, 16), _tied(False)),
        {
            **_GPT,
            "positions": "rope",
            "residual": "parallel_shared_norm",
            "unembed_bias": True,
        },
        (Part(_gptj_rope, lambda cfg: {"rotary_dim": cfg.rope.rotary_dim(cfg.head_dim)}),),
        only={
            "rotary": Only((True,), "positions would not be rotary"),
            "scale_attn_weights": Only((True,), "scores would not be divided by sqrt(head_dim)"),
        },
        metadata=_SUMMARY,
    ),
    "opt": Family(
        "OPTForCausalLM",
        (
            *_sizes(50272, 2048, 768, 12, 12, 3072, "ffn_dim"),
            Field("word_embed_proj_dim", "embed_dim", None, COUNT_OR_NULL),
            Field("activation_function", "activation", "relu", activation("gelu_new")),
            Field(
                "do_layer_norm_before",
                "norm_placement",
                True,
                choice({True: "pre", False: "post"}),
            ),
            Field("enable_bias", (*_QKVO, "mlp_bias"), True, FLAG),
            _tied(True),
        ),
        {"norm": "layernorm", "gated_mlp": False, "positions": "learned", "position_offset": 2},
        only={
            "_remove_final_layer_norm": Only((False,), "the final norm would be left out"),
            "layer_norm_elementwise_affine": Only((True,), "norms would have no weights"),
        },
        metadata=frozenset({"activation_dropout", "dropout", "layerdrop"}),
    ),
    "llama": Family(
        "LlamaForCausalLM",
        (
            *_llama_like(_sizes(32000, 2048, 4096, 32, 32, 11008), None, None, 1e-6),
            Field("attention_bias", _QKVO, False, FLAG),
            Field("mlp_bias", "mlp_bias", False, FLAG),
        ),
        _LLAMA,
        (_ROPE,),
        only={"rope_interleaved": Only((False, None), "rotary pairs would be interleaved")},
        # How products were split over devices in training, with the same result.
        metadata=frozenset({"pretraining_tp"}),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _llama_like(_sizes(32000, 131072, 4096, 32, 32, 14336), 8, None, 1e-6),
        _LLAMA,
        (_ROPE, Part(*window_fields.everywhere(4096))),
        only={"attention_bias": Only((False, None), "the family has no such bias")},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _llama_like(_sizes(151936, 32768, 4096, 32, 32, 22016), 32, None, 1e-6),
        {**_LLAMA, "qkv_bias": True},
        (_ROPE, _QWEN_WINDOWS),
        only={"use_mrope": _NO_MROPE},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        (
            *_llama_like(_sizes(151936, 32768, 4096, 32, 32, 22016), 32, 128, 1e-6),
            Field("attention_bias", _QKVO, False, FLAG),
        ),
        {**_LLAMA, "qk_norm": True},
        (_ROPE, _QWEN_WINDOWS),
        only={"use_mrope": _NO_MROPE},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        (
            *_llama_like(
                _sizes(256000, 8192, 2304, 26, 8, 9216), 4, 256, 1e-6, tied=True,
                act="hidden_activation", silu="gelu_pytorch_tanh",
            ),
            *_GEMMA_FIELDS,
            Field("attn_logit_softcapping", "attn_soft_cap", 50.0, NUMBER_OR_NULL),
            Field("final_logit_softcapping", "logit_soft_cap", 30.0, NUMBER_OR_NULL),
        ),
        _GEMMA,
        (_ROPE, Part(*window_fields.alternating(2)), _EMBED_SCALE),
        # The reference reads `hidden_activation` only; these are copies for other programs.
        metadata=frozenset({"hidden_act", "sliding_window_size"}),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        (
            *_llama_like(
                _sizes(262208, 131072, 2304, 26, 8, 9216), 4, 256, 1e-6, tied=True,
                act="hidden_activation", silu="gelu_pytorch_tanh",
            ),
            *_GEMMA_FIELDS,
            Field("final_logit_softcapping", "logit_soft_cap", None, NUMBER_OR_NULL),
        ),
        {**_GEMMA, "qk_norm": True},
        (
            Part(rope_fields.read_by_layer_type, rope_fields.write_by_layer_type),
            Part(*window_fields.alternating(6, "sliding_window_pattern")),
            _EMBED_SCALE,
        ),
        only={
            "attn_logit_softcapping": Only(
                (None,), "the reference implementation reads it and then does not cap"
            ),
        },
        metadata=frozenset({"_sliding_window_pattern", "hidden_act"}),
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _llama_like(_sizes(32064, 4096, 3072, 32, 32, 8192), None, None, 1e-5),
        _LLAMA,
        (
            Part(rope_fields.read_phi3, rope_fields.write_phi3),
            Part(*window_fields.everywhere(None)),
        ),
        only={
            "attention_bias": Only((False, None), "the family has no such bias"),
            "mlp_bias": Only((False, None), "the family has no such bias"),
            "lm_head_bias": Only((False, None), "the family has no such bias"),
            "full_attn_mod": Only((1, None), "windows would differ by layer"),
        },
        metadata=frozenset({"interpolate_factor", "original_max_position_embeddings"}),
    ),
}  # fmt: skip
"""Supported families by Hugging Face model type."""


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face config.json.

    Fields left out take the defaults of the family's reference implementation. Both key styles of
    rotary positions are read (`rope_theta` with `rope_scaling`, and `rope_parameters`).

    Raises:
      ValueError: naming every unknown field and every value of a wrong kind.
      NotImplementedError: naming every value that asks for maths we do not have.
    """
    check_is_json(config)
    kind = config.get("model_type")
    if kind == OWN:
        return _from_own(config)
    if not isinstance(kind, str):
        raise ValueError(f"config.json has model_type={kind!r}, needed one of {_known()}.")
    if kind not in FAMILIES:
        raise NotImplementedError(
            f"model_type={kind!r} is no supported family; supported: {_known()}."
        )
    ours = read_family(config, FAMILIES[kind])
    try:
        return ModelConfig(family=kind, **ours)
    except ValueError as error:
        raise ValueError(f"config.json of model_type {kind!r}: {error}") from error


def read_family(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Our fields of a config.json of this family, `param_dtype` and `extras` among them."""
    reader = Reader(config, ignoring=("model_type",))
    ours: dict[str, Any] = dict(family.fixed)
    for f in family.fields:
        value = reader.take(f.name, f.default, f.kind)
        ours |= dict.fromkeys((f.ours,) if isinstance(f.ours, str) else f.ours, value)
    for part in family.parts:
        ours |= part.read(reader, ours)
    ours["param_dtype"] = reader.take_any(("dtype", "torch_dtype"), "float32", _DTYPE)
    ours["extras"] = _extras(reader, family)
    reader.finish(f"model_type {config['model_type']!r}")
    return ours


def _known() -> str:
    return ", ".join((*FAMILIES, OWN))


_DTYPE = Kind(
    "float32, bfloat16 or float16",
    lambda v: v is None or v in ("float32", "bfloat16", "float16", "auto"),
    lambda v: v if v not in (None, "auto") else "float32",
)


def check_is_json(config: Any) -> None:
    """Raise unless `config` is a plain JSON object of finite numbers."""
    if not isinstance(config, Mapping):
        raise ValueError(f"a configuration is a JSON object, got {type(config).__name__}.")
    try:
        json.dumps(dict(config), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"config.json holds a value that is not plain JSON: {error}.") from error


def _extras(reader: Reader, family: Family) -> tuple[tuple[str, str], ...]:
    """Takes the fields that change nothing, and complains about those that would."""
    extras = {}
    for name, only in {**COMMON_ONLY, **family.only}.items():
        if name in reader.left:
            extras[name] = value = reader.left.pop(name)
            if value not in only.values:
                reader.refuse(name, value, only.reason)
    for name in list(reader.left):
        if name in METADATA or name in family.metadata:
            extras[name] = reader.left.pop(name)
    if extras.get("architectures") == [family.architecture]:
        del extras["architectures"]
    return tuple((name, json.dumps(extras[name])) for name in sorted(extras))


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of a configuration, such that ``from_hf(to_hf(cfg)) == cfg``.

    Equal up to how the model is run (implementation, remat, compute dtype). Where the family
    cannot express the configuration the model type is "jaxheads" and the fields are ours.
    """
    if cfg.family in FAMILIES:
        try:
            written = write_family(FAMILIES[cfg.family], cfg)
            if _maths(from_hf(written)) == _maths(cfg):
                return written
        except (ValueError, NotImplementedError, OverflowError):
            pass  # a value the family has no room for
    return {"model_type": OWN, **to_json(cfg)}


def write_family(family: Family, cfg: Any) -> dict[str, Any]:
    """The config.json of a configuration that the family can express: what `read_family` reads."""
    written: dict[str, Any] = {"model_type": cfg.family}
    for f in family.fields:
        ours = f.ours if isinstance(f.ours, str) else f.ours[0]
        written[f.name] = f.kind.write(getattr(cfg, ours))
    for part in family.parts:
        written |= part.write(cfg)
    written["torch_dtype"] = cfg.param_dtype
    extras = {name: json.loads(text) for name, text in cfg.extras}
    return {"architectures": [family.architecture], **extras, **written}


def _maths(cfg: ModelConfig) -> ModelConfig:
    """`cfg` without what only says how it is run, in one spelling."""
    return dataclasses.replace(
        cfg,
        window=window_fields.shortest_pattern(window_fields.per_layer(cfg)),
        implementation="auto",
        remat="none",
        compute_dtype="auto",
        extras=tuple(sorted(cfg.extras)),
    )


def _from_own(config: Mapping[str, Any]) -> ModelConfig:
    fields = {name: value for name, value in config.items() if name != "model_type"}
    try:
        return from_json(ModelConfig, fields)
    except TypeError as error:
        raise ValueError(f"config.json of model_type {OWN!r}: {error}") from error
