"""Every model family against its reference implementation in transformers, on tiny random models.

Weights, norms and biases included, are random; windows are shorter than the sequences and
soft-caps cut in, so that a term left out shows.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.checkpoints.families import from_hf, to_hf
from jaxheads.checkpoints.huggingface import load, save
from jaxheads.models import forward, init_cache

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, T = 67, 14
GPT = {"vocab_size": V, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
SIZES = {
    "vocab_size": V,
    "max_position_embeddings": 32,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
NEOX = {**SIZES, "num_hidden_layers": 2, "rotary_pct": 0.5, "rotary_emb_base": 500}
OPT = {
    "vocab_size": V,
    "max_position_embeddings": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 40,
}
GQA = {**SIZES, "num_key_value_heads": 2, "rope_theta": 500.0}
MQA = {**SIZES, "num_key_value_heads": 1}
QWEN3 = {**GQA, "head_dim": 12}
GEMMA2 = {
    **GQA,
    "head_dim": 12,
    "query_pre_attn_scalar": 9,
    "sliding_window": 5,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 2.0,
}
GEMMA3 = {
    **QWEN3,
    "query_pre_attn_scalar": 9,
    "sliding_window": 5,
    "sliding_window_pattern": 2,
    "rope_theta": 9000.0,
    "rope_local_base_freq": 50.0,
}
PHI3 = {**GQA, "pad_token_id": 0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2, 4, 6, 9]}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}

CASES = {
    "gpt2": ("gpt2", GPT),
    "gpt2-options": (
        "gpt2",
        {
            **GPT,
            "n_inner": 40,
            "scale_attn_by_inverse_layer_idx": True,
            "tie_word_embeddings": False,
            "activation_function": "relu",
        },
    ),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox-sequential": ("gpt_neox", {**NEOX, "use_parallel_residual": False}),
    "gpt_neox-options": (
        "gpt_neox",
        {
            **NEOX,
            "attention_bias": False,
            "hidden_act": "gelu_fast",
            "tie_word_embeddings": True,
            "rope_scaling": {"type": "linear", "factor": 3.0},
        },
    ),
    "gptj": ("gptj", {**GPT, "rotary_dim": 4}),
    "gptj-inner": ("gptj", {**GPT, "rotary_dim": 6, "n_inner": 40}),
    "opt": ("opt", OPT),
    "opt-350m": ("opt", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt-no-bias": ("opt", {**OPT, "enable_bias": False, "tie_word_embeddings": False}),
    "llama-mha": ("llama", {**SIZES, "hidden_act": "gelu"}),
    "llama-gqa": ("llama", {**GQA, "tie_word_embeddings": True}),
    "llama-mqa": ("llama", {**MQA, "head_dim": 10}),
    "llama-bias": ("llama", {**GQA, "attention_bias": True, "mlp_bias": True}),
    "llama-3.1": ("llama", {**GQA, "rope_scaling": LLAMA3}),
    "llama-yarn": ("llama", {**GQA, "rope_scaling": YARN}),
    "mistral-gqa": ("mistral", {**GQA, "sliding_window": 5}),
    "mistral-mqa": ("mistral", {**MQA, "sliding_window": None}),
    "mistral-mha": ("mistral", {**SIZES, "num_key_value_heads": 4, "sliding_window": 4}),
    "qwen2-gqa": ("qwen2", GQA),
    "qwen2-mqa": ("qwen2", {**MQA, **WINDOW}),
    "qwen2-mha": ("qwen2", {**SIZES, "num_key_value_heads": 4}),
    "qwen3-gqa": ("qwen3", QWEN3),
    "qwen3-mqa": ("qwen3", {**MQA, **WINDOW, "attention_bias": True}),
    "qwen3-mha": ("qwen3", {**SIZES, "num_key_value_heads": 4, "head_dim": 8}),
    "gemma2-gqa": ("gemma2", GEMMA2),
    "gemma2-mqa": ("gemma2", {**GEMMA2, "num_key_value_heads": 1, "attention_bias": True}),
    "gemma2-mha": ("gemma2", {**GEMMA2, "num_key_value_heads": 4}),
    "gemma3-gqa": (
        "gemma3_text",
        {**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "gemma3-mqa": (
        "gemma3_text",
        {**GEMMA3, "num_key_value_heads": 1, "final_logit_softcapping": 2.0},
    ),
    "gemma3-mha": ("gemma3_text", {**GEMMA3, "num_key_value_heads": 4, "attention_bias": True}),
    "phi3-gqa": ("phi3", {**PHI3, "sliding_window": 5}),
    "phi3-mqa": ("phi3", {**MQA, "pad_token_id": 0, "partial_rotary_factor": 0.5}),
    "phi3-mha": ("phi3", {**SIZES, "pad_token_id": 0}),
    # 14 tokens are more than the original 8, so the long factors hold; with 16 the short ones.
    "phi3-long": (
        "phi3",
        {**PHI3, "rope_scaling": LONGROPE, "original_max_position_embeddings": 8},
    ),
    "phi3-short": (
        "phi3",
        {**PHI3, "rope_scaling": LONGROPE, "original_max_position_embeddings": 16},
    ),
}
# One case of each family and of each way of decoding: the fast run. The others are slow.
MAIN = [
    "gpt2", "gpt_neox", "gpt_neox-sequential", "gptj", "opt", "opt-350m", "llama-gqa", "llama-3.1",
    "mistral-gqa", "qwen2-mqa", "qwen3-gqa", "gemma2-gqa", "gemma3-gqa", "phi3-mqa", "phi3-long",
]  # fmt: skip

EVERY = [c if c in MAIN else pytest.param(c, marks=pytest.mark.slow) for c in CASES]

# Tiny models spend their time in the compiler; the arithmetic is the same at every level.
_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
_forward = _jit(lambda m, tokens, segments: forward(m, tokens, segment_ids=segments).logits)


def reference(family, config, seed=0):
    """A transformers model with every weight, norm and bias away from its default."""
    torch.manual_seed(seed)
    cfg = transformers.CONFIG_MAPPING[family].from_dict(json.loads(json.dumps(config)))
    model = transformers.AutoModelForCausalLM.from_config(cfg, attn_implementation="eager")
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_matrix = p.ndim == 2 and "embed" not in name and "wte" not in name
            scale = p.shape[-1] ** -0.5 if is_matrix else 0.3
            shift = 1.0 if "norm" in name or "ln_" in name else 0.0
            shift = 0.2 if shift and family.startswith("gemma") else shift
            p.copy_(torch.randn_like(p) * scale + shift * name.endswith("weight"))
    return model.eval()


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.numpy()


def write(model, directory, config=None):
    """Saved by transformers, with `config` as config.json where given."""
    model.save_pretrained(directory)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def rows(seed):
    """A full row and a row left-padded by 5: tokens and segment ids [2,T]."""
    tokens = np.random.default_rng(seed).integers(0, V, (2, T))
    segments = np.ones((2, T), np.int32)
    segments[1, :5] = 0
    return tokens, segments


@pytest.mark.parametrize("case", EVERY)
def test_logits_equal_the_reference(case, tmp_path):
    family, config = CASES[case]
    for seed in (0, 1):
        theirs = reference(family, config, seed)
        model = load(write(theirs, tmp_path))
        tokens, segments = rows(seed)
        got = np.asarray(_forward(model, tokens, segments))
        expected = torch_logits(theirs, tokens)
        assert np.ptp(expected) > 1  # the model says something
        np.testing.assert_allclose(got[0], expected[0], atol=1e-4, rtol=0)
        if case != "phi3-long":  # the reference would choose frequencies for the shorter row
            alone = torch_logits(theirs, tokens[1:, 5:])
            np.testing.assert_allclose(got[1, 5:], alone[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_old_and_new_keys_read_alike(case, tmp_path):
    """config.json as on the hub, and as today's transformers rewrites it."""
    family, config = CASES[case]
    config = {"model_type": family, **config}
    new = transformers.CONFIG_MAPPING[family].from_dict(json.loads(json.dumps(config)))
    new.save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    bare = lambda c: {**to_hf(c), **dict.fromkeys((k for k, _ in c.extras), None)}
    assert {k: v for k, v in bare(from_hf(new)).items() if v is not None} == {
        k: v for k, v in bare(from_hf(config)).items() if v is not None
    }
    for style in (config, new):
        cfg = from_hf(style)
        assert to_hf(cfg)["model_type"] == family
        assert from_hf(to_hf(cfg)) == cfg
        theirs = transformers.CONFIG_MAPPING[family].from_dict(to_hf(cfg))
        assert from_hf({**theirs.to_diff_dict(), "model_type": family}).rope == cfg.rope


@pytest.mark.parametrize("case", MAIN)
def test_cached_decoding_equals_the_full_forward(case, tmp_path):
    family, config = CASES[case]
    model = load(write(reference(family, config), tmp_path))
    tokens, segments = rows(3)
    full = np.asarray(_forward(model, tokens, segments))

    @_jit
    def decode(model, tokens, segments):
        first = 7
        start = forward(
            model, tokens[:, :first], segment_ids=segments[:, :first],
            cache=init_cache(model.cfg, 2, T),
        )  # fmt: skip

        def step(cache, xs):
            token, segment = xs
            out = forward(model, token[:, None], segment_ids=segment[:, None], cache=cache)
            return out.cache, out.logits[:, 0]

        _, rest = jax.lax.scan(step, start.cache, (tokens[:, first:].T, segments[:, first:].T))
        return jnp.concatenate([start.logits, rest.swapaxes(0, 1)], axis=1)

    got = np.asarray(decode(model, tokens, segments))
    np.testing.assert_allclose(got[0], full[0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(got[1, 5:], full[1, 5:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", EVERY)
def test_saved_directory_loads_in_transformers(case, tmp_path):
    """Bit for bit: their file -> our model -> our file -> their model."""
    from safetensors.numpy import load_file

    family, config = CASES[case]
    theirs = reference(family, config)
    model = load(write(theirs, tmp_path / "theirs"))
    save(model, tmp_path / "ours")
    before = load_file(tmp_path / "theirs/model.safetensors")
    after = load_file(tmp_path / "ours/model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)
    again = load(tmp_path / "ours")
    assert again.cfg == model.cfg
    assert jax.tree.all(jax.tree.map(np.array_equal, model, again))
    theirs_again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    tokens, _ = rows(5)
    # Not bit for bit: torch spells one activation in several ways, we write one of its names.
    got, expected = torch_logits(theirs_again, tokens), torch_logits(theirs, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
