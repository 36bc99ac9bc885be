"""Generation against loops over full forwards, exact distributions and transformers."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads import models, parallel
from jaxheads.generation import generate, sample
from jaxheads.interventions import scale_heads
from jaxheads.models import Decoder, ModelConfig
from jaxheads.taps import Edit, as_tapped, intervene, sweep
from tests.tiny import tiny_model

SHARED = Path(__file__).parents[1] / "../shared"
SMALL = {"vocab_size": 29, "num_layers": 2, "model_dim": 16, "num_heads": 4, "mlp_dim": 24}
FAMILIES = {
    "llama": {"num_kv_heads": 2},
    "gpt2": {"positions": "learned", "norm": "layernorm", "gated_mlp": False, "max_positions": 64},
    "alibi": {"positions": "alibi"},
    "gemma": {
        "window": (3, None),
        "norm_placement": "sandwich",
        "qk_norm": True,
        "logit_soft_cap": 5.0,
        "num_kv_heads": 1,
    },
    "neox": {"residual": "parallel", "norm": "layernorm", "tie_embeddings": True},
}
PROMPT = np.array([[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]])


def make(name="llama", seed=0, **changes):
    """A tiny model whose text depends on all of its context."""
    cfg = ModelConfig(**{"tie_embeddings": False, **SMALL, **FAMILIES[name], **changes})
    return tiny_model(cfg, seed)


@pytest.fixture(scope="module")
def model():
    return make()


@jax.jit
def full_logits(forward, model, tokens):
    return forward(model, tokens).logits


def naive(model, row, num_new, forward=models.forward):
    """Greedy text of one row alone by full forwards, without a cache."""
    size = min(16, model.cfg.max_positions)
    ids = np.zeros((1, size), np.int32)  # causal: later tokens do not matter
    ids[0, : len(row)] = row
    for n in range(len(row), len(row) + num_new):
        logits = full_logits(as_tapped(forward), model, ids)
        ids[0, n] = np.argmax(logits[0, n - 1])
    return ids[0, : len(row) + num_new].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_rows_are_the_argmax_of_full_forwards_alone(family):
    model = make(family)
    prompts = [[5], [3, 1, 4, 1, 5, 9, 2], [2, 7, 1]]
    out = generate(model, prompts, max_new_tokens=6, pad_id=28)
    assert out.shape == (3, 13) and out.dtype == jnp.int32
    for row, prompt in zip(np.asarray(out), prompts):
        pad = 7 - len(prompt)
        assert row[:pad].tolist() == [28] * pad
        assert row[pad:].tolist() == naive(model, prompt, 6)
    assert len(set(np.asarray(out)[:, 7:].ravel().tolist())) > 2  # not one token repeated


def test_lengths_say_which_columns_are_padding(model):
    padded = np.array([[11, 12, 3, 1], [2, 7, 1, 8]])  # what stands before the prompt is ignored
    out = generate(model, padded, lengths=[2, 4], max_new_tokens=4, pad_id=1)
    same = generate(model, [[3, 1], [2, 7, 1, 8]], max_new_tokens=4, pad_id=1)
    np.testing.assert_array_equal(out, same)


def test_one_token_prompt_needs_no_prefill(model):
    out = generate(model, np.array([[4]]), max_new_tokens=5)
    assert np.asarray(out)[0].tolist() == naive(model, [4], 5)


def test_learned_positions_can_be_used_up_but_not_exceeded():
    model = make("gpt2", max_positions=9)
    out = generate(model, PROMPT, max_new_tokens=2)
    assert np.asarray(out)[0].tolist() == naive(model, PROMPT[0], 2)
    with pytest.raises(ValueError, match="9 learned positions"):
        generate(model, PROMPT, max_new_tokens=3)


def expected_probs(logits, temperature, top_k=None, top_p=None):
    """The documented distribution, in float64."""
    scores = np.asarray(logits, np.float64) / temperature
    probs = np.exp(scores - scores.max())
    order = np.argsort(-probs, kind="stable")
    keep = order[:top_k]
    mass = probs[keep] / probs[keep].sum()
    if top_p is not None:
        keep = keep[: int(np.searchsorted(np.cumsum(mass), top_p) + 1)]
    out = np.zeros_like(probs)
    out[keep] = probs[keep] / probs[keep].sum()
    return out


LOGITS = np.log(np.array([0.02, 0.3, 0.08, 0.2, 0.25, 0.1, 0.05]))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, None),
        (0.7, None, None),
        (2.0, 3, None),
        (1.0, None, 0.6),
        (1.0, None, 0.01),
        (1.3, 4, 0.7),
        (0.8, 1, None),
        (1.0, 7, 1.0),
    ],
)
def test_draws_follow_the_exact_distribution(temperature, top_k, top_p):
    draws = 20_000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (draws, 7))
    ids = sample(logits, jax.random.key(3), temperature, top_k=top_k, top_p=top_p)
    counts = np.bincount(np.asarray(ids), minlength=7)
    want = expected_probs(LOGITS, temperature, top_k, top_p) * draws
    assert counts[want == 0].sum() == 0
    some = want > 0
    chi2 = np.sum((counts[some] - want[some]) ** 2 / want[some])
    assert chi2 < 30  # 99.99 % of chi-square with 6 degrees of freedom lies below 27.9


def test_ties_never_give_more_than_asked():
    ids = sample(jnp.zeros((500, 6)), jax.random.key(0), 1.0, top_k=2)
    assert set(np.asarray(ids).tolist()) == {0, 1}
    ids = sample(jnp.zeros((500, 4)), jax.random.key(0), 1.0, top_p=0.5)
    assert set(np.asarray(ids).tolist()) == {0, 1}


def test_tiny_temperature_is_greedy(model):
    cold = generate(model, PROMPT, max_new_tokens=5, temperature=1e-38, key=jax.random.key(0))
    np.testing.assert_array_equal(cold, generate(model, PROMPT, max_new_tokens=5))


def test_first_sampled_token_follows_the_models_distribution(model):
    rows = np.broadcast_to(PROMPT[:1], (4000, 7))
    out = generate(model, rows, max_new_tokens=1, temperature=1.5, top_k=5, key=jax.random.key(1))
    counts = np.bincount(np.asarray(out)[:, -1], minlength=29)
    logits = np.asarray(models.forward(model, PROMPT[:1]).logits[0, -1])
    want = expected_probs(logits, 1.5, 5) * 4000
    some = want > 0
    assert counts[~some].sum() == 0
    assert np.sum((counts[some] - want[some]) ** 2 / want[some]) < 25


def test_sampling_repeats_with_the_key_and_does_not_depend_on_other_rows(model):
    draw = partial(generate, model, max_new_tokens=8, temperature=2.0)
    both = draw(PROMPT, key=jax.random.key(5))
    np.testing.assert_array_equal(both, draw(PROMPT, key=jax.random.key(5)))
    np.testing.assert_array_equal(both[:1], draw(PROMPT[:1], key=jax.random.key(5)))
    assert not np.array_equal(both, draw(PROMPT, key=jax.random.key(6)))
    steps = np.asarray(both)[0, 7:]
    assert len(set(steps.tolist())) > 2  # every step draws with its own key


def test_stop_tokens_end_a_row_and_padding_follows(model):
    free = np.asarray(generate(model, PROMPT, max_new_tokens=8))
    stop = int(free[0, 9])  # the third token row 0 generates
    first = [np.flatnonzero(row[7:] == stop) for row in free]
    out = np.asarray(generate(model, PROMPT, max_new_tokens=8, stop_tokens=[stop, 28], pad_id=27))
    for row, plain, hits in zip(out, free, first):
        end = 7 + (hits[0] + 1 if hits.size else 8)
        np.testing.assert_array_equal(row[:end], plain[:end])
        assert np.all(row[end:] == 27)
    assert np.all(out[0, 7 + first[0][0] + 1 :] == 27)


def test_the_loop_ends_when_every_row_has_stopped(model):
    steps = []
    free = np.asarray(generate(model, PROMPT[:1], max_new_tokens=3))
    stop = int(free[0, 7])
    generate(model, PROMPT[:1], max_new_tokens=50, stop_tokens=stop,
             callback=lambda step, new: steps.append((step, new.tolist())))  # fmt: skip
    assert steps == [(0, [stop])]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "key": jax.random.key(2)}])
def test_streaming_gives_the_tokens_of_the_fused_loop(model, options):
    seen = []
    options = {**options, "max_new_tokens": 6, "stop_tokens": [3]}
    prompts = [[5, 6], [3, 1, 4, 1]]
    out = generate(model, prompts, callback=lambda n, new: seen.append(new), **options)
    np.testing.assert_array_equal(out, generate(model, prompts, **options))
    np.testing.assert_array_equal(np.stack(seen, axis=1), np.asarray(out)[:, 4 : 4 + len(seen)])


GATES = np.ones((2, 4), np.float32)
GATES[0, 1] = GATES[1, 2] = GATES[1, 3] = 0


def test_under_an_intervention_equals_the_same_forward_in_a_loop():
    model = make("gemma")
    forward = scale_heads(models.forward, GATES * 3)
    out = np.asarray(generate(model, PROMPT, max_new_tokens=6, forward=forward))
    for row, prompt in zip(out, PROMPT):
        assert row.tolist() == naive(model, prompt, 6, forward)
    assert not np.array_equal(out, generate(model, PROMPT, max_new_tokens=6))


def forbid(logits, banned, ctx):
    return jnp.where(jnp.arange(logits.shape[-1]) == banned, -jnp.inf, logits)


def test_edits_of_the_logits_act(model):
    free = np.asarray(generate(model, PROMPT, max_new_tokens=4))
    banned = int(free[0, 7])
    forward = intervene(models.forward, Edit("logits", forbid, jnp.int32(banned)))
    out = np.asarray(generate(model, PROMPT, max_new_tokens=4, forward=forward))
    assert banned in free[0, 7:] and banned not in out[:, 7:]


TRACES = []


def counted(model, tokens, **kwargs):
    TRACES.append(jnp.shape(tokens))
    return models.forward(model, tokens, **kwargs)


def test_one_program_for_two_payloads_temperatures_and_stop_tokens(model):
    def run(gates, temperature, stop):
        return generate(model, PROMPT, max_new_tokens=3, temperature=temperature, top_p=0.9,
                        key=jax.random.key(0), stop_tokens=[stop],
                        forward=scale_heads(counted, gates))  # fmt: skip

    TRACES.clear()
    run(GATES, 1.0, 3)
    assert sorted(set(TRACES)) == [(2, 1), (2, 6)]
    traced = len(TRACES)
    run(GATES * 2, 0.5, 4)
    assert len(TRACES) == traced


def test_a_sweep_over_payloads_generates_in_one_program(model):
    payloads = jnp.stack([jnp.asarray(GATES), jnp.ones((2, 4)), jnp.asarray(GATES) * 2])

    def text(gates):
        forward = scale_heads(models.forward, gates)
        return generate(model, PROMPT, max_new_tokens=4, stop_tokens=[3], forward=forward)

    out = jax.jit(lambda p: sweep(text, p, batch_size=2))(payloads)
    for row, gates in zip(out, payloads):
        np.testing.assert_array_equal(row, text(gates))


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("model:4", {}),
        ("data:2,model:2", {"temperature": 1.5, "top_p": 0.95, "key": jax.random.key(4)}),
    ],
)
def test_on_a_mesh_equals_one_device(spec, options):
    model = make("llama", num_kv_heads=4, vocab_size=32)
    run = partial(generate, tokens=[[5, 6], [3, 1, 4, 1]], max_new_tokens=6, **options,
                  forward=scale_heads(models.forward, GATES))  # fmt: skip
    mesh = parallel.make_mesh(spec, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        out = run(parallel.shard(model, mesh))
    np.testing.assert_array_equal(out, run(model))


def test_the_cache_may_be_kept_in_bfloat16(model):
    out = generate(model, PROMPT, max_new_tokens=3, cache_dtype=jnp.bfloat16)
    assert out.shape == (2, 10)


def test_the_prefill_never_forms_all_logits():
    vocab, length = 50_000, 128
    model = jax.eval_shape(lambda: Decoder(ModelConfig(vocab_size=vocab), rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    run = jax.jit(lambda m, t: generate(m, t, max_new_tokens=2))
    temporary = run.lower(model, tokens).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * 2 * length * vocab / 2


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([], {}, "empty list"),
        (np.zeros((2, 0), int), {}, "empty prompt"),
        ([1, 2, 3], {}, "list of id lists"),
        (np.array([1, 2]), {}, "add a batch axis"),
        (np.ones((1, 2)), {}, "integer ids"),
        ([[1.5]], {}, "integer ids"),
        ([[1, 29]], {}, "token id 29 is outside the vocabulary of 29"),
        ([[-1]], {}, "token id -1"),
        ([[1]], {"max_new_tokens": 0}, "at least 1"),
        ([[1]], {"temperature": 0.5}, "needs a key"),
        ([[1]], {"temperature": -1.0}, "at least 0"),
        ([[1]], {"temperature": float("nan")}, "at least 0"),
        ([[1]], {"top_p": 0.0}, "above 0"),
        ([[1]], {"top_p": 1.5}, "at most 1"),
        ([[1]], {"top_k": 0}, "at least 1"),
        ([[1]], {"stop_tokens": [29]}, "outside the vocabulary"),
        ([[1]], {"stop_tokens": ["a"]}, "must be token ids"),
        ([[1]], {"pad_id": -1}, "pad_id=-1"),
        ([[1]], {"lengths": [1]}, "list of prompts has its own"),
        (np.array([[1, 2]]), {"lengths": [3]}, "1 to 2 tokens"),
        (np.array([[1, 2]]), {"lengths": [0]}, "1 to 2 tokens"),
        (np.array([[1, 2]]), {"lengths": [1, 1]}, "one a row"),
    ],
)
def test_bad_input_says_what_is_wrong(model, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, tokens, **{"max_new_tokens": 2, **options})


@pytest.mark.parametrize("options", [{"max_new_tokens": 2.5}, {"max_new_tokens": 1, "key": 3}])
def test_wrong_types(model, options):
    with pytest.raises(TypeError):
        generate(model, [[1]], **options)


@pytest.mark.parametrize("name", ["stories260K", "neox-stories-tiny"])
def test_greedy_text_of_real_weights_is_that_of_transformers(name):
    directory = SHARED / "models" / name
    if not directory.is_dir():
        pytest.skip("shared models are not here")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    huggingface = pytest.importorskip("jaxheads.checkpoints.huggingface")

    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = np.asarray([tokenizer("Once upon a time").input_ids])
    config = transformers.GenerationConfig(
        max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    want = reference.generate(torch.tensor(ids), generation_config=config).numpy()
    model = huggingface.load(directory)
    np.testing.assert_array_equal(generate(model, ids, max_new_tokens=100), want)
