"""Retrieval scores against loops over stored attention, with caches, masks, padding and meshes."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import parallel
from jaxheads.checkpoints import load
from jaxheads.data import Tokenizer
from jaxheads.discovery import (
    NeedleInstance,
    batch_instances,
    copy_hits,
    correlate,
    make_needle_instances,
    retrieval_scores,
    split_half,
)
from jaxheads.discovery.retrieval import _decode
from jaxheads.interventions import mask_heads
from jaxheads.models import ModelConfig, Output, forward
from jaxheads.taps import record
from launch.loading import edited_forward
from tests.tiny import tiny_model

SHARED = Path(__file__).parents[2] / "../shared"
CFG = ModelConfig(vocab_size=7, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=16)
L, H, N, NEW, WIDTH = 2, 4, 6, 5, 24
OPTIONS = dict(max_new=NEW, batch_size=N, min_recall=-1, stop_ids=[])


@pytest.fixture(scope="module")
def model():
    return tiny_model(CFG)


@pytest.fixture(scope="module")
def instances():
    """Prompts of unequal length whose wide spans of few ids are often hit."""
    rng, made = np.random.default_rng(0), []
    for size in (17, 24, 20, 24, 21, 18):
        start, width = rng.integers(0, 5), rng.integers(8, 12)
        ids = rng.integers(0, CFG.vocab_size, size).astype(np.int32)
        answer = ids[start : start + width]
        made.append(NeedleInstance(ids, int(start), int(start + width), answer, size, 50.0))
    return made


@pytest.fixture(scope="module")
def plain(model, instances):
    return retrieval_scores(forward, model, batch_instances(instances, WIDTH), **OPTIONS)


class Looped(NamedTuple):
    """What loops over the definition give."""

    count: np.ndarray
    set: np.ndarray
    recall: np.ndarray


def loop(model, instances, tokens) -> Looped:
    """Scores of generated tokens [N,new], from one run without a cache on prompts + tokens."""
    width = max(len(one.prompt_ids) for one in instances) + tokens.shape[1] - 1
    rows = [np.concatenate([one.prompt_ids, new[:-1]]) for one, new in zip(instances, tokens)]
    text = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
    out = jax.jit(record(forward, "pattern"))(model, text)
    pattern, logits = np.asarray(out.seen["pattern"]), np.asarray(out.logits)
    shape = (len(instances), *pattern.shape[:3:2])
    count, distinct, recall = np.zeros(shape), np.zeros(shape), np.zeros(len(instances))
    for n, one in enumerate(instances):
        size, prompt = len(one.prompt_ids), list(one.prompt_ids)
        span = range(one.needle_start, one.needle_end)
        stored = pattern[:, n, :, size - 1 :]  # [L,H,steps,S]
        assert (logits[n, size - 1 : size - 1 + tokens.shape[1]].argmax(-1) == tokens[n]).all()
        for layer, head in np.ndindex(*shape[1:]):
            copied = set()
            for t, token in enumerate(tokens[n]):
                row, j = stored[layer, head, t], 0
                for k in range(size + t):
                    j = k if row[k] > row[j] else j
                if j in span and prompt[j] == token:
                    count[n, layer, head] += 1 / len(span)
                    copied.add(token)
            distinct[n, layer, head] = len(copied) / len({prompt[j] for j in span})
        left = list(tokens[n])
        for token in one.answer_ids:
            if token in left:
                left.remove(token)
                recall[n] += 1 / len(one.answer_ids)
    return Looped(count, distinct, recall)


def test_scores_are_those_of_a_loop_over_stored_attention(model, instances, plain):
    """Left padding and a cache there, right padding and a single run here."""
    want = loop(model, instances, plain.tokens)
    assert 0 < want.count.mean() < 1 and np.abs(want.count - want.set).max() > 0.05
    np.testing.assert_allclose(plain.examples, want.count, atol=1e-6)
    np.testing.assert_allclose(plain.recall, want.recall, atol=1e-6)
    np.testing.assert_allclose(plain.score, want.count.mean(0), atol=1e-6)
    np.testing.assert_allclose(plain.freq, (want.count > 0).mean(0), atol=1e-6)
    assert plain.kept == N
    by_set = retrieval_scores(
        forward, model, batch_instances(instances, WIDTH), **OPTIONS, kind="set"
    )
    np.testing.assert_allclose(by_set.examples, want.set, atol=1e-6)
    bound = float(np.median(want.recall))
    some = retrieval_scores(
        forward, model, batch_instances(instances, WIDTH), **OPTIONS | {"min_recall": bound}
    )
    kept = want.recall > bound
    assert 0 < some.kept == kept.sum() < N
    np.testing.assert_allclose(some.score, want.count[kept].mean(0), atol=1e-6)


def test_padding_and_batching_change_nothing(model, instances, plain):
    """As a list the prompts come in several lengths, and the last batch is filled up."""
    listed = retrieval_scores(forward, model, instances, **OPTIONS | {"batch_size": 4})
    np.testing.assert_array_equal(listed.tokens, plain.tokens)
    np.testing.assert_array_equal(listed.examples, plain.examples)
    np.testing.assert_array_equal(listed.recall, plain.recall)


def test_sharded_equals_single(model, instances, plain):
    mesh = parallel.make_mesh("data:2,model:2,context:2")
    with jax.set_mesh(mesh):
        placed = parallel.shard(model, mesh)
        out = retrieval_scores(forward, placed, batch_instances(instances, WIDTH), **OPTIONS)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_array_equal(out.examples, plain.examples)


def test_masks_are_data(model, instances, plain):
    """Two masks share a program; zero_output is the model without the heads' slices of W_O."""
    batch = batch_instances(instances, WIDTH)
    mask = np.zeros((L, H), np.float32)
    mask[[0, 1], [2, 1]] = 1
    score = lambda fwd, model=model: retrieval_scores(fwd, model, batch, **OPTIONS)
    masked = score(mask_heads(forward, mask, "zero_output"))
    programs = _decode._cache_size()
    other = score(mask_heads(forward, 1 - mask, "zero_output"))
    assert _decode._cache_size() == programs
    wo = model.layers.attention.wo
    cut = jax.tree.map(lambda x: x, model)
    cut.layers.attention.wo = wo.replace(wo[...] * (1 - mask)[:, :, None, None])
    without = score(forward, cut)
    np.testing.assert_array_equal(masked.tokens, without.tokens)
    np.testing.assert_array_equal(masked.examples, without.examples)
    assert (masked.tokens != plain.tokens).any() and (other.tokens != masked.tokens).any()


def test_a_uniform_head_points_at_the_first_token(model, instances):
    """Under uniform_decode all keys tie, and the first one wins."""
    starts_late = [one for one in instances if one.needle_start > 0]
    assert len(starts_late) >= 3
    fwd = mask_heads(forward, np.ones((L, H), np.float32), "uniform_decode")
    out = retrieval_scores(fwd, model, batch_instances(starts_late, WIDTH), **OPTIONS)
    assert not out.examples.any()


def test_copy_hits():
    rng = np.random.default_rng(1)
    shape = (2, 3, 4)
    at, token = rng.integers(0, 9, shape), rng.integers(0, 2, 3)
    prompt = rng.integers(0, 2, (3, 7))
    start, end = np.array([0, 2, 3]), np.array([4, 5, 7])
    want = np.zeros(shape, bool)
    for layer, b, head in np.ndindex(shape):
        j = at[layer, b, head]
        want[layer, b, head] = start[b] <= j < end[b] and prompt[b, j] == token[b]
    assert 0 < want.mean() < 1
    np.testing.assert_array_equal(jax.jit(copy_hits)(at, token, prompt, start, end), want)
    several = jax.vmap(copy_hits, (0, None, None, None, None))
    np.testing.assert_array_equal(several(at[None], token, prompt, start, end)[0], want)


# A forward that says and looks at what the test wrote down: head h of step t looks at LOOKS[h][t].
SAYS = [4, 5, 4, 6, 3]
LOOKS = [[1, 2, 3, 8, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 7]]
PROMPT = [0, 4, 5, 4, 6, 0, 1, 2]  # the needle, columns 1 to 4, holds 4 twice


def scripted(model, tokens, *, positions, segment_ids, cache, taps):
    step = jnp.clip(positions[:, -1] - len(PROMPT) + 1, 0, len(SAYS) - 1)
    logits = jax.nn.one_hot(jnp.asarray(SAYS)[step], CFG.vocab_size)[:, None]
    looks = jnp.asarray(LOOKS)[:, step]  # [3,B]
    at = jnp.stack([looks.T, jnp.zeros_like(looks.T)])  # the second layer looks at column 0
    return Output(logits, cache, {"attn_argmax": at} if taps.record else {})


def blind(model, tokens, *, positions, segment_ids, cache, taps):
    return scripted(
        model, tokens, positions=positions, segment_ids=segment_ids, cache=cache, taps=taps
    )._replace(seen={})


NEEDLE = NeedleInstance(np.asarray(PROMPT, np.int32), 1, 5, [4, 5, 4, 6], 8, 0.0)


def script(model, fwd=scripted, **options):
    return retrieval_scores(fwd, model, [NEEDLE], **{"max_new": 5, "stop_ids": []} | options)


def test_a_token_copied_twice_counts_twice_or_once(model):
    count, by_set = script(model), script(model, kind="set")
    # Head 0 copies 4, 5 and 4 again; head 1 copies 4 from column 1 twice; head 2 nothing.
    np.testing.assert_allclose(count.score, [[3 / 4, 2 / 4, 0], [0, 0, 0]])
    np.testing.assert_allclose(by_set.score, [[2 / 3, 1 / 3, 0], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(count.freq, [[1, 1, 0], [0, 0, 0]])
    assert count.tokens.tolist() == [SAYS] and count.recall.tolist() == [1.0]


def test_a_stop_token_ends_the_answer(model):
    out = script(model, stop_ids=[5], min_recall=0)
    assert out.tokens.tolist() == [[4, 5, -1, -1, -1]]
    np.testing.assert_allclose(out.score[0], [2 / 4, 1 / 4, 0])  # the stop token was generated too
    assert out.recall.tolist() == [0.25]  # but is no part of the answer


def test_recall_may_be_of_words(model):
    words = {4: "red", 5: "ball", 6: "key", 3: "."}
    out = script(model, decode=lambda ids: " ".join(words[i].upper() for i in ids))
    assert out.recall.tolist() == [1.0]


def test_scores_become_a_file_that_launchers_read(model, plain, tmp_path):
    scores = plain.to_scores(model="tiny", meta={"seed": 3})
    np.testing.assert_allclose(scores.values, plain.score, atol=1e-6)
    assert scores.ci is not None and (scores.ci.low <= plain.score + 1e-6).all()
    scores.to_json(tmp_path / "heads.json")
    meta = json.loads((tmp_path / "heads.json").read_text())["meta"]
    assert meta["kept"] == N and meta["instances"] == N and meta["seed"] == 3
    _, heads = edited_forward(model, str(tmp_path / "heads.json"), top_heads=2)
    assert [tuple(head) for head in heads or ()] == scores.top_k(2)
    assert script(model).to_scores().ci is None


def test_halves_and_correlation(plain):
    halves = split_half(plain)
    for half, rows in zip(halves, ([0, 2, 4], [1, 3, 5])):
        np.testing.assert_allclose(half, plain.examples[rows].mean(0), atol=1e-6)
    want = np.corrcoef(halves[0].ravel(), halves[1].ravel())[0, 1]
    np.testing.assert_allclose(correlate(*halves), want, atol=1e-6)
    np.testing.assert_allclose(correlate(plain, plain.to_scores()), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mean"}, "kind='mean' is not one of count, set"),
        ({"max_new": 0}, "must be at least 1"),
        ({"min_recall": 1.0}, "none of 1 instances was answered: the highest unigram recall is 1"),
        ({"fwd": blind}, "no 'attn_argmax'"),
    ],
)
def test_what_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        script(model, **options)


def test_what_does_not_fit_the_model(model):
    with pytest.raises(ValueError, match="vocab"):
        retrieval_scores(
            forward, model, [NeedleInstance(np.full(9, 7), 1, 2, [1], 9, 0)], **OPTIONS
        )
    with pytest.raises(ValueError, match="there are no instances"):
        retrieval_scores(forward, model, [], **OPTIONS)
    lone = retrieval_scores(scripted, model, [NEEDLE], **OPTIONS)
    with pytest.raises(ValueError, match="two halves need at least two"):
        split_half(lone)


def test_a_trained_model_reads_a_needle():
    """A model too small to answer is told so; its hits are exact all the same."""
    if not (SHARED / "models/stories260K").exists() or not (SHARED / "data/needles").exists():
        pytest.skip("no shared models")
    model = load(SHARED / "models/stories260K")
    tokenizer = Tokenizer.load(SHARED / "models/stories260K")
    encode = lambda text: tokenizer.encode(text, add_bos=False)
    row = json.loads((SHARED / "data/needles/needles.json").read_text())[8]
    before = row["needle"].split(row["answer"])[0].rstrip()
    needle = encode(f" {row['needle']}")
    span = (len(encode(f" {before}")), len(encode(f" {before} {row['answer']}")))
    text = encode(" ".join(["Tom had a red ball. He went to the park to play with Sue."] * 12))
    made = make_needle_instances(
        text, needle, span, encode(f" {before}"), [160, 200], [50], buffer=20,
        sentence_end_ids=[int(encode("park.")[-1])], prefix_ids=[tokenizer.bos_id],
    )  # fmt: skip
    assert tokenizer.decode(made[0].answer_ids).strip() == row["answer"]
    options = dict(max_new=12, stop_ids=[], batch_size=2)
    with pytest.raises(ValueError, match="none of 2 instances was answered"):
        retrieval_scores(forward, model, batch_instances(made), **options)
    # It goes on with the text around the needle: as if that were the answer.
    wide = [
        dataclasses.replace(one, needle_start=1, needle_end=len(one.prompt_ids)) for one in made
    ]
    out = retrieval_scores(forward, model, batch_instances(wide), **options, min_recall=-1)
    want = loop(model, wide, out.tokens)
    assert want.count.any()
    np.testing.assert_allclose(out.examples, want.count, atol=1e-6)
