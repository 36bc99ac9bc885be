"""config.json of every family: defaults, published files, metadata, nonsense."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxheads.attention import RopeConfig
from jaxheads.checkpoints.families import FAMILIES, from_hf, shortest_pattern, to_hf
from jaxheads.models import PRESETS, ModelConfig

# Entries of published config.json files (model cards of the hub), metadata included.
PUBLISHED = {
    "gpt2": (
        {
            "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
            "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
            "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
            "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50257,
        },
        124_439_808,
    ),
    "pythia-70m": (
        {
            "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0,
            "hidden_act": "gelu", "hidden_size": 512, "initializer_range": 0.02,
            "intermediate_size": 2048, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
            "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
            "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
            "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": True,
            "use_parallel_residual": True, "vocab_size": 50304,
        },
        70_426_624,
    ),
    "opt-350m": (
        {
            "_name_or_path": "opt-350m", "activation_dropout": 0.0, "activation_function": "relu",
            "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2,
            "do_layer_norm_before": False, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 4096,
            "hidden_size": 1024, "init_std": 0.02, "layerdrop": 0.0,
            "max_position_embeddings": 2048, "model_type": "opt", "num_attention_heads": 16,
            "num_hidden_layers": 24, "pad_token_id": 1, "prefix": "</s>",
            "torch_dtype": "float16", "transformers_version": "4.20.0.dev0", "use_cache": True,
            "vocab_size": 50272, "word_embed_proj_dim": 512,
        },
        331_196_416,
    ),
    "llama-3.1-8b": (
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
            "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
            "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
            "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 128256,
        },
        8_030_261_248,
    ),
    "mistral-7b": (
        {
            "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
            "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
            "transformers_version": "4.34.0.dev0", "vocab_size": 32000,
        },
        7_241_732_096,
    ),
    "qwen2.5-0.5b": (
        {
            "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
            "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu",
            "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
            "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
            "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
            "transformers_version": "4.40.1", "use_mrope": False, "use_sliding_window": False,
            "vocab_size": 151936,
        },
        494_032_768,
    ),
    "qwen3-0.6b": (
        {
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
            "initializer_range": 0.02, "intermediate_size": 3072,
            "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
            "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
            "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
            "vocab_size": 151936,
        },
        596_049_920,
    ),
    "gemma-2-2b": (
        {
            "architectures": ["Gemma2ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2,
            "cache_implementation": "hybrid", "eos_token_id": 1,
            "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
            "initializer_range": 0.02, "intermediate_size": 9216,
            "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
            "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
            "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
            "sliding_window": 4096, "torch_dtype": "float32",
            "transformers_version": "4.42.4", "use_cache": True, "vocab_size": 256000,
        },
        2_614_341_888,
    ),
    "gemma-3-1b": (
        {
            "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2,
            "cache_implementation": "hybrid", "eos_token_id": [1, 106],
            "final_logit_softcapping": None, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
            "initializer_range": 0.02, "intermediate_size": 6912,
            "max_position_embeddings": 32768, "model_type": "gemma3_text",
            "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
            "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
            "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
        },
        999_885_952,
    ),
    "phi-3-mini-4k": (
        {
            "_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False, "attention_dropout": 0.0,
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 1,
            "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu",
            "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192,
            "max_position_embeddings": 4096, "model_type": "phi3", "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096, "pad_token_id": 32000,
            "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None,
            "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "transformers_version": "4.40.2", "use_cache": True,
            "vocab_size": 32064,
        },
        3_821_079_552,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    """Read, count the published number of parameters, and write back with every entry."""
    config, num_params = PUBLISHED[name]
    cfg = from_hf(config)
    assert cfg.num_params == num_params
    written = to_hf(cfg)
    assert written["model_type"] == config["model_type"]
    assert from_hf(written) == cfg
    # What says nothing is not written (no scaling, the window of a model without windows), nor
    # what layer_types says.
    silent = {"rope_scaling", "sliding_window", "max_window_layers", "sliding_window_pattern"}
    assert {k: written.get(k) for k in config.keys() - silent} == {
        k: v for k, v in config.items() if k not in silent
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_the_reference(family):
    transformers = pytest.importorskip("transformers")
    theirs = json.loads(transformers.CONFIG_MAPPING[family]().to_json_string(use_diff=False))
    theirs = {k: v for k, v in theirs.items() if k not in ("dtype", "num_labels")}
    ours = from_hf({"model_type": family})
    assert dataclasses.replace(from_hf(theirs), extras=()) == ours
    assert ours.extras == ()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_a_family(name):
    cfg = PRESETS[name]()
    assert to_hf(cfg)["model_type"] == cfg.family
    assert from_hf(to_hf(cfg)) == cfg


def test_how_a_model_is_run_is_no_part_of_the_file():
    cfg = PRESETS["tiny"]()
    run = dataclasses.replace(cfg, remat="full", implementation="dense", compute_dtype="bfloat16")
    assert to_hf(run) == to_hf(cfg)


def test_metadata_is_kept_verbatim():
    metadata = {"bos_token_id": [1, 2], "id2label": {"0": "LABEL_0"}, "architectures": ["Mine"]}
    config = {"model_type": "llama", **metadata, "pretraining_tp": 4}
    written = to_hf(from_hf(config))
    assert {k: written[k] for k in config} == config


def test_spellings_of_rotary_settings_agree():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    llama = {"model_type": "llama", "max_position_embeddings": 131072}
    spellings = [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **scaling}},
        {"rope_theta": 500000, "rope_parameters": {"rope_type": "llama3", **scaling}},
    ]
    assert len({from_hf({**llama, **s}) for s in spellings}) == 1
    assert from_hf({**llama, **spellings[0]}).rope == PRESETS["llama3.1-8b"]().rope

    neox = [
        {"rotary_pct": 0.5, "rotary_emb_base": 500},
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 500}},
        {"rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rotary_emb_base": 500,
         "rope_theta": 500, "rope_scaling": None},
    ]  # fmt: skip
    configs = {from_hf({"model_type": "gpt_neox", **s}) for s in neox}
    assert len(configs) == 1
    assert configs.pop().rope == RopeConfig(fraction=0.5, theta=500)

    gemma = [
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4,
         "rope_scaling": {"rope_type": "linear", "factor": 8}},
        {"rope_parameters": {
            "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}},
    ]  # fmt: skip
    assert len({from_hf({"model_type": "gemma3_text", **s}) for s in gemma}) == 1


def test_local_rotation_with_its_own_scaling_round_trips():
    both = {"rope_theta": 1e5, "rope_type": "linear", "factor": 2.0}
    config = {
        "model_type": "gemma3_text",
        "rope_parameters": {"full_attention": both, "sliding_attention": {**both, "factor": 4.0}},
    }
    cfg = from_hf(config)
    assert (cfg.rope.factor, cfg.local_rope.factor) == (2.0, 4.0)
    assert from_hf(to_hf(cfg)) == cfg


def test_yarn_and_longrope_derive_their_factor():
    yarn = {"type": "yarn", "original_max_position_embeddings": 1024}
    cfg = from_hf({"model_type": "qwen2", "max_position_embeddings": 4096, "rope_scaling": yarn})
    assert cfg.rope.factor == 4.0
    config = {
        "model_type": "phi3", "max_position_embeddings": 131072, "hidden_size": 64,
        "num_attention_heads": 8,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    }  # fmt: skip
    cfg = from_hf(config)
    assert (cfg.rope.scaling, cfg.rope.factor) == ("longrope", 32.0)
    assert to_hf(cfg)["rope_scaling"] == {**config["rope_scaling"], "type": "longrope"}


@given(st.lists(st.sampled_from([None, 4, 8]), min_size=1, max_size=9))
def test_shortest_pattern(items):
    pattern = shortest_pattern(items)
    repeat = lambda p: [p[i % len(p)] for i in range(len(items))]
    assert repeat(pattern) == items
    assert all(repeat(items[:n]) != items for n in range(1, len(pattern)))


LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4}
# (config, error, words of the message)
BAD = {
    "no model type": ({}, ValueError, ["model_type=None", "llama"]),
    "model type is a number": ({"model_type": 3}, ValueError, ["model_type=3"]),
    "unknown family": ({"model_type": "bert"}, NotImplementedError, ["'bert'", "gpt_neox"]),
    "not an object": ([1], ValueError, ["JSON object"]),
    "unknown fields": (
        {**LLAMA, "frobnicate": 1, "num_experts": 8}, ValueError, ["frobnicate, num_experts"],
    ),
    "unknown even when false": ({**LLAMA, "new_trick": False}, ValueError, ["new_trick"]),
    "negative size": ({**LLAMA, "hidden_size": -8}, ValueError, ["hidden_size=-8", "positive"]),
    "zero layers": ({**LLAMA, "num_hidden_layers": 0}, ValueError, ["num_hidden_layers=0"]),
    "a billion layers": ({**LLAMA, "num_hidden_layers": 10**9}, ValueError, ["up to 10000"]),
    "text for a number": ({**LLAMA, "vocab_size": "32k"}, ValueError, ["vocab_size='32k'"]),
    "float for a count": ({**LLAMA, "vocab_size": 32.5}, ValueError, ["vocab_size=32.5"]),
    "flag for a count": ({**LLAMA, "vocab_size": True}, ValueError, ["vocab_size=True"]),
    "number for a flag": (
        {**LLAMA, "attention_bias": 1}, ValueError, ["attention_bias=1", "true or false"],
    ),
    "null size": ({**LLAMA, "hidden_size": None}, ValueError, ["hidden_size=None"]),
    "nested garbage": ({**LLAMA, "rms_norm_eps": {"a": [1]}}, ValueError, ["rms_norm_eps="]),
    "nan": ({**LLAMA, "rms_norm_eps": float("nan")}, ValueError, ["plain JSON"]),
    "infinite": ({**LLAMA, "rope_theta": float("inf")}, ValueError, ["plain JSON"]),
    "nan in metadata": ({**LLAMA, "dropout": [float("nan")]}, ValueError, ["plain JSON"]),
    "no json value": ({**LLAMA, "bos_token_id": {1, 2}}, ValueError, ["plain JSON"]),
    "several at once": (
        {**LLAMA, "vocab_size": -1, "rms_norm_eps": "x", "odd": 1}, ValueError,
        ["vocab_size=-1", "rms_norm_eps='x'", "odd"],
    ),
    "heads do not divide": (
        {**LLAMA, "num_key_value_heads": 3}, ValueError, ["num_kv_heads=3", "llama"],
    ),
    "width does not divide": ({**LLAMA, "hidden_size": 30}, ValueError, ["model_dim=30"]),
    "activation": ({**LLAMA, "hidden_act": "mish"}, NotImplementedError, ["hidden_act='mish'"]),
    "activation is a number": ({**LLAMA, "hidden_act": 3}, ValueError, ["hidden_act=3"]),
    "dtype": ({**LLAMA, "torch_dtype": "int8"}, ValueError, ["torch_dtype='int8'", "bfloat16"]),
    "two dtypes": (
        {**LLAMA, "torch_dtype": "float16", "dtype": "float32"}, ValueError, ["disagree"],
    ),
    "dynamic rope": (
        {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, NotImplementedError,
        ["'dynamic'", "length of each call"],
    ),
    "unknown rope": ({**LLAMA, "rope_scaling": {"type": "x"}}, NotImplementedError, ["'x'"]),
    "rope type is a list": ({**LLAMA, "rope_scaling": {"type": []}}, NotImplementedError, ["[]"]),
    "rope is text": ({**LLAMA, "rope_scaling": "linear"}, ValueError, ["rope_scaling='linear'"]),
    "rope without factor": (
        {**LLAMA, "rope_scaling": {"type": "linear"}}, ValueError, ["has no factor"],
    ),
    "rope with a stray field": (
        {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 3}}, ValueError,
        ["does not use beta_fast"],
    ),
    "rope factor": (
        {**LLAMA, "rope_scaling": {"type": "linear", "factor": -2}}, ValueError, ["factor=-2"],
    ),
    "rope twice": (
        {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"a": 1}},
        ValueError, ["disagree"],
    ),
    "theta twice": (
        {**LLAMA, "rope_theta": 5, "rope_parameters": {"rope_theta": 6}}, ValueError,
        ["outside and 6 inside"],
    ),
    "theta is zero": ({**LLAMA, "rope_theta": 0}, ValueError, ["rope_theta=0"]),
    "llama rotates whole heads": (
        {**LLAMA, "partial_rotary_factor": 0.5}, NotImplementedError,
        ["partial_rotary_factor=0.5"],
    ),
    "rotary fraction": (
        {"model_type": "gpt_neox", "rotary_pct": 1.5}, ValueError, ["partial_rotary_factor=1.5"],
    ),
    "rotary names disagree": (
        {"model_type": "gpt_neox", "rotary_pct": 0.5, "partial_rotary_factor": 1.0}, ValueError,
        ["rotary_pct=0.5", "disagree"],
    ),
    "rotary dim": ({"model_type": "gptj", "rotary_dim": 999}, ValueError, ["rotary_dim=999"]),
    "rotary dim is null": ({"model_type": "gptj", "rotary_dim": None}, ValueError, ["rotary_dim"]),
    "not rotary": ({"model_type": "gptj", "rotary": False}, NotImplementedError, ["rotary=False"]),
    "longrope lengths": (
        {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
        ValueError, ["has no long_factor"],
    ),
    "phi3 llama3": (
        {"model_type": "phi3", "rope_scaling": {"type": "llama3"}}, NotImplementedError,
        ["default and longrope"],
    ),
    "phi3 bias": (
        {"model_type": "phi3", "attention_bias": True}, NotImplementedError, ["attention_bias"],
    ),
    "layer types": (
        {"model_type": "gemma2", "layer_types": ["full_attention"]}, ValueError,
        ["layer_types has 1 entries for 26 layers"],
    ),
    "odd layer type": (
        {"model_type": "qwen3", "layer_types": ["linear_attention"] * 32}, NotImplementedError,
        ["layer_types="],
    ),
    "windows without width": (
        {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 32}, ValueError,
        ["sliding_window=null"],
    ),
    "window": ({"model_type": "mistral", "sliding_window": -1}, ValueError, ["sliding_window=-1"]),
    "gemma 3 flat rope": (
        {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1.0}}, ValueError,
        ["full_attention and sliding_attention"],
    ),
    "gemma 3 soft-cap": (
        {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, NotImplementedError,
        ["attn_logit_softcapping=50.0"],
    ),
    "bidirectional": (
        {"model_type": "gemma3_text", "use_bidirectional_attention": True}, NotImplementedError,
        ["use_bidirectional_attention=True"],
    ),
    "unscaled attention": (
        {"model_type": "gpt2", "scale_attn_weights": False}, NotImplementedError,
        ["scale_attn_weights=False", "sqrt(head_dim)"],
    ),
    "cross attention": (
        {"model_type": "gpt2", "add_cross_attention": True}, NotImplementedError,
        ["add_cross_attention=True"],
    ),
    "opt without final norm": (
        {"model_type": "opt", "_remove_final_layer_norm": True}, NotImplementedError,
        ["_remove_final_layer_norm=True"],
    ),
    "norms without weights": (
        {"model_type": "opt", "layer_norm_elementwise_affine": False}, NotImplementedError,
        ["layer_norm_elementwise_affine=False"],
    ),
    "quantised": (
        {**LLAMA, "quantization_config": {"bits": 4}}, NotImplementedError,
        ["quantization_config=", "dequantised"],
    ),
    "pruned": ({"model_type": "gpt2", "pruned_heads": {"0": [1]}}, NotImplementedError, ["pruned"]),
    "encoder-decoder": (
        {**LLAMA, "is_encoder_decoder": True}, NotImplementedError, ["is_encoder_decoder=True"],
    ),
    "unsupported and unknown": (
        {**LLAMA, "hidden_act": "mish", "odd": 1}, NotImplementedError, ["mish", "odd"],
    ),
    "ours with an unknown field": (
        {"model_type": "jaxheads", "num_layer": 3}, ValueError, ["num_layers"],
    ),
    "ours with a wrong type": (
        {"model_type": "jaxheads", "num_layers": "3"}, ValueError, ["num_layers='3'"],
    ),
    "ours with a bad value": (
        {"model_type": "jaxheads", "positions": "abs"}, ValueError, ["positions='abs'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_configurations(case):
    config, error, words = BAD[case]
    with pytest.raises(error) as caught:
        from_hf(config)
    for word in words:
        assert word in str(caught.value)


_NAMES = sorted(
    {f.name for family in FAMILIES.values() for f in family.fields}
    | {"rope_scaling", "rope_parameters", "rope_theta", "sliding_window", "layer_types", "dtype"}
    | {"rotary_pct", "rotary_dim", "sliding_window_pattern", "architectures", "pruned_heads"}
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: (
        st.lists(x, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "rope_theta", "factor", "full_attention"]), x)
    ),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(st.sampled_from(_NAMES), _JSON))
def test_nonsense_raises_one_of_two_errors(family, fields):
    try:
        cfg = from_hf({"model_type": family, **fields})
    except (ValueError, NotImplementedError) as error:
        assert str(error).endswith(".")
        return
    assert isinstance(cfg, ModelConfig)
    assert from_hf(to_hf(cfg)) == cfg
