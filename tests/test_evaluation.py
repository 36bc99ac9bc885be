"""Evaluation against float64 formulas written here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads import evaluation, models, parallel
from jaxheads.data import TaskExample, TaskPair, Tokenizer
from jaxheads.evaluation import answers_right, evaluate_tasks, evaluate_text, score_tokens
from jaxheads.interventions import ablate, place_landmarks, scale_heads
from jaxheads.models import Decoder, ModelConfig, with_config
from jaxheads.taps import Edit, as_tapped, intervene
from tests.tiny import tiny_model

V = 264
CFG = ModelConfig(vocab_size=V, num_layers=2, model_dim=16, num_heads=4, mlp_dim=16)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model():
    return tiny_model(CFG)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("bytes")


def batch(rows=4, length=12, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, V, (rows, length + 1))
    segments = np.ones((rows, length), np.int32)
    segments[0, 5:], segments[1, 9:] = 2, 0
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment_ids": segments,
        "weights": (segments != 0).astype(np.float32),
    }


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@jax.jit
def text_logits(forward, model, tokens, segment_ids):
    return forward(model, tokens, segment_ids=segment_ids).logits


def naive_sums(forward, model, b):
    logits = text_logits(as_tapped(forward), model, b["tokens"], b["segment_ids"])
    logp = np.take_along_axis(log_softmax(logits), b["targets"][..., None], -1)[..., 0]
    best = np.argmax(logits, -1) == b["targets"]
    w = b["weights"]
    return -(logp * w).sum(), (best * w).sum(), w.sum()


def test_text_is_the_weighted_mean_over_all_batches(model):
    batches = [batch(seed=0), batch(seed=1)]
    batches[1]["weights"][2, :4] = 0
    logits = text_logits(
        as_tapped(models.forward), model, batches[0]["tokens"], batches[0]["segment_ids"]
    )
    batches[0]["targets"] = np.where(
        RNG.random((4, 12)) < 0.5, np.argmax(logits, -1), batches[0]["targets"]
    )
    loss, correct, tokens = np.sum([naive_sums(models.forward, model, b) for b in batches], axis=0)
    out = evaluate_text(models.forward, model, iter(batches))
    assert out["tokens"] == tokens == sum(int(b["weights"].sum()) for b in batches)
    assert out["loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert out["perplexity"] == pytest.approx(np.exp(loss / tokens), rel=1e-4)
    assert out["accuracy"] == pytest.approx(correct / tokens) and out["accuracy"] > 0.1


def test_positions_segments_and_weights_are_optional(model):
    b = batch()
    plain = {"tokens": b["tokens"], "targets": b["targets"]}
    full = plain | {"segment_ids": np.ones((4, 12), int), "weights": np.ones((4, 12))}
    a, c = (evaluate_text(models.forward, model, [x]) for x in (plain, full))
    assert a == pytest.approx(c, rel=1e-6)


@pytest.mark.parametrize("limit", [1, 20 * V])
def test_chunks_equal_the_whole(model, limit, monkeypatch):
    whole = score_tokens(models.forward, model, batch())
    monkeypatch.setattr(evaluation, "MAX_LOGITS", limit)
    parts = score_tokens(models.forward, model, batch())
    np.testing.assert_allclose(parts.log_probs, whole.log_probs, atol=1e-5)
    np.testing.assert_array_equal(parts.is_best, whole.is_best)


def test_long_batches_never_form_all_logits(monkeypatch):
    cfg = ModelConfig(vocab_size=20_000, num_layers=1, model_dim=16, num_heads=2, mlp_dim=16)
    model = jax.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))
    ids = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    monkeypatch.setattr(evaluation, "MAX_LOGITS", 4 * 16 * 20_000)
    run = jax.jit(lambda m, t: score_tokens(models.forward, m, {"tokens": t, "targets": t}))
    temporary = run.lower(model, ids).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * (4 * 256 * 20_000) / 4


def add(logits, bias, ctx):
    return logits + bias


def test_edits_of_the_logits_count(model):
    bias = jnp.asarray(RNG.normal(size=V), jnp.float32)
    forward = intervene(models.forward, Edit("logits", add, bias))
    loss, _, tokens = naive_sums(forward, model, batch())
    out = evaluate_text(forward, model, [batch()])
    assert out["loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert out["loss"] != pytest.approx(evaluate_text(models.forward, model, [batch()])["loss"])


def test_a_plain_function_that_changes_logits_counts(model):
    def sharper(model, tokens, **kwargs):
        out = models.forward(model, tokens, **kwargs)
        return out._replace(logits=out.logits * 3)

    loss, _, tokens = naive_sums(sharper, model, batch())
    assert evaluate_text(sharper, model, [batch()])["loss"] == pytest.approx(
        loss / tokens, rel=1e-5
    )


def test_under_an_edit_and_one_program_for_two_payloads(model):
    gates = np.ones((2, 4), np.float32)
    gates[0, 1] = 0
    for factor in (1, 3):
        forward = scale_heads(models.forward, gates * factor)
        loss, _, tokens = naive_sums(forward, model, batch())
        got = evaluate_text(forward, model, [batch()])["loss"]
        assert got == pytest.approx(loss / tokens, rel=1e-5)
        if factor == 1:
            programs = evaluation._text_sums._cache_size()
    assert evaluation._text_sums._cache_size() == programs


def test_on_a_mesh_equals_one_device(model, tokenizer):
    forward = ablate(models.forward, [(1, 2)])
    examples = [TaskExample("ab", "c", ("d", "ef")), TaskExample("the ", "cat", ("dog",))]
    want = evaluate_text(forward, model, [batch()])
    tasks = evaluate_tasks(forward, model, tokenizer, examples, batch_size=4)
    mesh = parallel.make_mesh("data:2,model:2,context:2")
    with jax.set_mesh(mesh):
        sharded = parallel.shard(model, mesh)
        assert evaluate_text(forward, sharded, [batch()]) == pytest.approx(want, rel=1e-5)
        out = evaluate_tasks(forward, sharded, tokenizer, examples, batch_size=4)
    assert out["answer_log_prob"] == pytest.approx(tasks["answer_log_prob"], rel=1e-5)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no token to score"),
        ([batch() | {"weights": np.zeros((4, 12))}], "no token to score"),
        ([{"tokens": np.ones((1, 2), int)}], "no 'targets'"),
        ([batch() | {"targets": np.full((4, 12), V)}], f"token id {V} is outside"),
    ],
)
def test_bad_text(model, batches, message):
    with pytest.raises(ValueError, match=message):
        evaluate_text(models.forward, model, batches)


@jax.jit
def padded_logits(forward, model, ids):
    return forward(model, ids).logits


def naive_score(forward, model, ids, start):
    """(sum of log-probabilities from `start` on, greedy) of one text alone."""
    padded = np.zeros((1, 128), np.int32)  # causal: what follows does not matter
    padded[0, : len(ids)] = ids
    logp = log_softmax(padded_logits(as_tapped(forward), model, padded)[0])
    rows = range(start - 1, len(ids) - 1)
    return sum(logp[t, ids[t + 1]] for t in rows), all(
        np.argmax(logp[t]) == ids[t + 1] for t in rows
    )


EXAMPLES = [
    TaskExample("abc", "d", ("e", "xyz")),
    TaskExample(
        "a longer prompt than the others, so that it is padded to another width", "!", ("?",)
    ),
    TaskExample("", "good sentence", ("bad one",)),
    TaskExample("no distractors", "?"),
]


def test_tasks_score_each_continuation_as_if_alone(model, tokenizer):
    forward = scale_heads(models.forward, np.full((2, 4), 1.5))
    out = evaluate_tasks(forward, model, tokenizer, EXAMPLES, batch_size=3)
    assert out["examples"] == len(out["per_example"]) == 4 and out["merged_boundaries"] == 0
    for example, detail in zip(EXAMPLES, out["per_example"]):
        start = len(tokenizer.encode(example.prompt))
        for n, text in enumerate((example.answer, *example.distractors)):
            ids = tokenizer.encode(example.prompt + text)
            want, greedy = naive_score(forward, model, ids, start)
            assert detail["log_probs"][n] == pytest.approx(want, rel=1e-5, abs=1e-4)
            assert detail["num_tokens"][n] == len(text)
            if n == 0:
                assert detail["greedy"] == greedy
        assert detail["choice"] == int(np.argmax(detail["log_probs"]))
        if example.distractors:
            assert detail["correct"] == (detail["choice"] == 0)
    mean = np.mean([d["log_probs"][0] for d in out["per_example"]])
    assert out["answer_log_prob"] == pytest.approx(mean)
    assert out["accuracy"] == np.mean([d["correct"] for d in out["per_example"]])


MARK = V - 1
QUESTIONS = [
    TaskExample("abcde", "fghijk", ("xy",)),  # with BOS two blocks: a landmark before the answer
    TaskExample("abcdef", "g", ("hijkl", "m")),
    TaskExample("a", "?"),
]


def landmarked(model, block):
    return with_config(model, attention=f"landmark(block={block},force=true)")


def test_a_block_longer_than_the_questions_changes_nothing(model, tokenizer):
    got = evaluate_tasks(models.forward, landmarked(model, 100), tokenizer, QUESTIONS)
    plain = place_landmarks(models.forward, MARK)
    want = evaluate_tasks(plain, model, tokenizer, QUESTIONS)
    for one, other in zip(got["per_example"], want["per_example"], strict=True):
        np.testing.assert_allclose(one["log_probs"], other["log_probs"], rtol=1e-5)
        assert one["num_tokens"] == other["num_tokens"] and one["greedy"] == other["greedy"]


def test_questions_have_landmarks_that_do_not_count(model, tokenizer):
    marked = landmarked(model, 3)
    out = evaluate_tasks(models.forward, marked, tokenizer, QUESTIONS)
    for example, detail in zip(QUESTIONS, out["per_example"], strict=True):
        start = len(tokenizer.encode(example.prompt))
        for n, text in enumerate((example.answer, *example.distractors)):
            ids, asked = [], []
            for place, token in enumerate(tokenizer.encode(example.prompt + text).tolist()):
                if place >= start:
                    asked.append((len(ids) - 1, token))
                ids += [token] + ([MARK] if place % 3 == 2 else [])
            padded = np.pad(ids, (0, 128 - len(ids)))[None]
            logits = padded_logits(as_tapped(models.forward), marked, padded)[0]
            logp = log_softmax(np.delete(logits, MARK, axis=-1))
            assert detail["num_tokens"][n] == len(text) == len(asked)
            want = sum(logp[place, token] for place, token in asked)
            assert detail["log_probs"][n] == pytest.approx(want, rel=1e-5, abs=1e-4)
            if n == 0:
                assert detail["greedy"] == all(logp[at].argmax() == token for at, token in asked)
    bad = TaskExample("abc" + tokenizer.decode([103]), "d")
    with pytest.raises(ValueError, match="tokens hold landmark_id=103"):
        other = with_config(model, attention="landmark(block=3,token=103,force=true)")
        evaluate_tasks(models.forward, other, tokenizer, [bad])


def test_the_answer_that_greedy_decoding_writes_is_an_exact_match(model, tokenizer):
    ids = tokenizer.encode("abc")
    for _ in range(3):
        padded = np.pad(ids, (0, 128 - len(ids)))[None]
        logits = padded_logits(as_tapped(models.forward), model, padded)[0, len(ids) - 1, :128]
        ids = np.append(ids, np.argmax(logits))
    text = tokenizer.decode(ids)[3:]

    def low_ids(logits, payload, ctx):
        return jnp.where(jnp.arange(V) < 128, logits, -1e9)

    forward = intervene(models.forward, Edit("logits", low_ids))  # only ids that are characters
    out = evaluate_tasks(forward, model, tokenizer, [TaskExample("abc", text), EXAMPLES[3]])
    assert [d["greedy"] for d in out["per_example"]] == [True, False]
    assert out["accuracy"] == out["exact_match"] == 0.5 and out["margin"] is None


def test_answers_are_right_when_the_likeliest_token_is(model, tokenizer):
    tokens = np.concatenate([tokenizer.encode("ab"), [0]])[None]  # BOS in front
    logits = np.asarray(models.forward(model, tokens[:, :-1]).logits)[0, -1]
    best, other = int(logits[:128].argmax()), int(logits[:128].argmin())
    said = chr(best)
    model = intervene(models.forward, Edit("logits", _favour, np.array([best]))), model
    pairs = [
        TaskPair("ab", "ac", said),
        TaskPair("ab", "ac", chr(other)),
        TaskPair("ab", "ac", chr(other), accepted=(chr(other), said)),
        TaskPair("ab", "ac", said + said),
        TaskPair("ab", "ac", said + chr(other)),
    ]
    right = answers_right(*model, tokenizer, pairs, batch_size=2)
    assert right.tolist() == [True, False, True, True, False]
    with pytest.raises(ValueError, match="no pairs to evaluate"):
        answers_right(*model, tokenizer, [])


def _favour(value, payload, ctx):
    return value.at[..., payload].add(1e4)


def test_a_tie_is_not_a_success(model, tokenizer):
    def flat(logits, payload, ctx):
        return 0 * logits

    forward = intervene(models.forward, Edit("logits", flat))
    out = evaluate_tasks(forward, model, tokenizer, [TaskExample("a", "b", ("c",))])
    assert out["accuracy"] == 0 and out["margin"] == 0


class Merging:
    """A tokenizer in which "ab" is one token, so that text changes at a boundary."""

    adds_bos = True

    def encode(self, text, *, add_bos):
        return np.array([256, *[ord(c) for c in text.replace("ab", "\x80")]], np.int32)


def test_merged_boundaries_are_scored_from_before_the_merge(model):
    example = TaskExample("xa", "b", ("c",))  # "xab" is x, ab; "xac" is x, a, c
    out = evaluate_tasks(models.forward, model, Merging(), [example])
    assert out["merged_boundaries"] == 1
    detail = out["per_example"][0]
    assert detail["num_tokens"] == [1, 2]  # both from after "x" on
    answer, _ = naive_score(models.forward, model, [256, ord("x"), 128], 2)
    wrong, _ = naive_score(models.forward, model, [256, ord("x"), ord("a"), ord("c")], 2)
    np.testing.assert_allclose(detail["log_probs"], [answer, wrong], rtol=1e-5)


def test_few_programs_for_many_lengths(model, tokenizer):
    examples = [TaskExample("a" * n, "b", ("c",)) for n in range(1, 60)]
    before = evaluation._row_sums._cache_size()
    evaluate_tasks(ablate(models.forward, [(0, 0)]), model, tokenizer, examples, batch_size=8)
    assert evaluation._row_sums._cache_size() - before <= 3  # widths 16, 32 and 64


def test_long_examples_and_learned_positions(tokenizer):
    cfg = ModelConfig(vocab_size=V, num_layers=1, model_dim=8, num_heads=2, mlp_dim=8,
                      positions="learned", max_positions=20)  # fmt: skip
    model = tiny_model(cfg)
    fits = TaskExample("a" * 19, "b", ("c",))  # BOS and 19 letters fill the 20 positions
    assert evaluate_tasks(models.forward, model, tokenizer, [fits])["examples"] == 1
    with pytest.raises(ValueError, match="example 1 has 21 tokens, more than the 20 learned"):
        evaluate_tasks(models.forward, model, tokenizer, [fits, TaskExample("a" * 20, "b")])


def test_bad_tasks(model, tokenizer):
    with pytest.raises(ValueError, match="no examples"):
        evaluate_tasks(models.forward, model, tokenizer, [])
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate_tasks(models.forward, model, tokenizer, EXAMPLES, batch_size=0)

    class NoBos(Merging):
        def encode(self, text, *, add_bos):
            return super().encode(text, add_bos=False)[1:]

    with pytest.raises(ValueError, match="without BOS the first token has no context"):
        evaluate_tasks(models.forward, model, NoBos(), [TaskExample("", "a", ("bc",))])
