"""Controls, questions, loads and claims of the experiments on converted models and on images."""

import json

import jax
import numpy as np
import pytest

import jaxheads as jh
from experiments import moh_lab, moh_vit
from experiments.lab import OPTIONS
from jaxheads.data.tasks import generate
from jaxheads.evaluation import answers_right
from jaxheads.models import ModelConfig
from tests.launch.processes import finish, make_environment, start
from tests.tiny import tiny_model

CFG = ModelConfig(vocab_size=512, num_layers=2, model_dim=16, num_heads=8, mlp_dim=16)


@pytest.fixture(scope="module")
def tokenizer():
    return jh.Tokenizer.load("lab")


def asked_of(task, tokenizer, count, **options):
    pairs = generate(task, tokenizer, count, split="heldout", **options)
    return pairs, moh_lab.questions_of(pairs, tokenizer, CFG.vocab_size)


def test_questions_end_where_the_answer_is_read(tokenizer):
    every = moh_lab.lab_questions(tokenizer, CFG.vocab_size, 3)
    assert len(every) == 13 and {q.tokens.shape[1] for q in every.values()} <= {32, 64, 128, 256}
    for q in every.values():
        np.testing.assert_array_equal(q.segment_ids.sum(-1), q.last + 1)
    pairs, years = asked_of("greater_than", tokenizer, 3)
    for pair, row in zip(pairs, years.is_right):
        said = {tokenizer.decode([i]).strip() for i in np.flatnonzero(row)}
        assert said == {a.strip() for a in pair.accepted} and len(said) > 1
    assert (every["needle"].is_right.sum(-1) == 1).all()


def test_answers_are_those_of_the_evaluation(tokenizer):
    model = jh.load("lab")
    pairs, asked = asked_of("colored_objects", tokenizer, 16, **OPTIONS["colored_objects"])
    params = jax.tree.map(lambda leaf: leaf[None], (model, np.ones((5, 8), np.float32)))
    (got,) = moh_lab.quiz(params, {"": asked})[""]
    want = answers_right(jh.forward, model, tokenizer, pairs, batch_size=16)
    np.testing.assert_array_equal(got.right, want)
    assert 0 < want.mean() < 1 and (got.load == 1).all()


def test_a_quarter_of_the_heads_is_left_out(tokenizer):
    """Removed from the control; in the mixture, loads are those of the largest queries."""
    models = [tiny_model(CFG, seed) for seed in (0, 1)]
    arms = moh_lab.starts(models, 4, 2, seeds=(0, 1))
    kept = np.asarray(arms["static-75"][1])
    assert kept.shape == (2, 2, 8) and (kept.sum(-1) == 6).all() and (kept[0] != kept[1]).any()
    assert (arms["dense"][1] == 1).all() and tuple(arms) == moh_lab.ARMS
    _, asked = asked_of("induction", tokenizer, 3)
    got = moh_lab.quiz(arms["moh-75"], {"": asked})[""]
    q = jh.record(jh.forward, "q")(models[1], asked.tokens).seen["q"][0]  # of the first layer
    norms = np.linalg.norm(np.asarray(q, np.float64), axis=-1)[..., 4:]  # [P,T,E]
    for row, (last, load) in enumerate(zip(asked.last, got[1].load)):
        order = np.argsort(-norms[row, : last + 1], axis=-1)[:, :2]
        want = [np.mean((order == e).any(-1)) for e in range(4)]
        np.testing.assert_allclose(load[0], [1, 1, 1, 1, *want], atol=1e-6)
    assert len(set(asked.last)) > 1 and np.ptp(got[1].load) > 0.1


def test_the_permutation_test_finds_groups_that_differ_and_no_others():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 12)
    noise = rng.normal(size=(36, 5))
    assert moh_lab.permutation_test(noise, labels, count=199)[1] > 0.05
    shifted = noise + np.where(labels == 1, 1.0, 0.0)[:, None]
    share, p = moh_lab.permutation_test(shifted, labels, count=199)
    assert p == 1 / 200
    groups = [shifted[labels == g] for g in range(3)]
    within = sum(np.sum((g - g.mean(0)) ** 2) for g in groups)
    assert share == pytest.approx(1 - within / np.sum((shifted - shifted.mean(0)) ** 2))
    assert moh_lab.permutation_test(0 * noise, labels, count=19) == (0, 1)


def test_claims_of_converted_models_follow_the_numbers():
    arm = lambda before, after: {"before": [before] * 3, "after": [after] * 3}
    results = {"dense": arm(0.9, 0.9), "moh-75": arm(0.8, 0.86), "static-75": arm(0.7, 0.85)}
    holds = lambda results, p: [c.holds for c in moh_lab.claims_of(results, {"p": p})]
    assert holds(results, [0.001, 0.009]) == [True, True, True, True]
    results["moh-75"] = arm(0.9, 0.85)
    assert holds(results, [0.001, 0.01]) == [False, False, False, False]
    assert len(moh_lab.claims_of(results, None)) == 3


def test_claims_on_images_follow_the_numbers():
    results = {"dense": {"accuracy": [0.96, 0.94]}, "moh-75": {"accuracy": [0.95, 0.935]}}
    results["moh-75"]["busiest"] = [[1.2, 1.8], [1.4, 2.4]]
    assert [c.holds for c in moh_vit.claims_of(results)] == [True, False]
    results["moh-75"] = {"accuracy": [0.94, 0.93], "busiest": [[1.2, 1.9]]}
    assert [c.holds for c in moh_vit.claims_of(results)] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "more"), [("moh", ("--from=lab",)), ("moh_vit", ("--data=shapes",))]
)
def test_a_quick_run_writes_its_claims(tmp_path, script, more):
    everyday = ("--quick", "--seeds=0", f"--workdir={tmp_path}")
    process = start(make_environment(tmp_path / "cache"), f"experiments.{script}", *everyday, *more)
    code, out, error = finish([process])[0]
    assert code == 0, out + error
    content = json.loads((tmp_path / "claims.json").read_text())
    if script == "moh":
        assert content["names"] == ["lab"] and (tmp_path / "figure.png").exists()
        assert np.shape(content["loads"]["load"]) == (1, 13, 5, 4)
    assert len(content["table"]) == (14 if script == "moh" else 2)
