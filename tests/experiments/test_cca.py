"""The CCA experiment: what its rows promise, that only projections are tuned, and that it runs."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxheads as jh
from experiments import cca
from jaxheads.attention import CCAOptions
from jaxheads.models import ModelConfig, with_config
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
LAB = jh.Tokenizer.load("lab")
CFG = ModelConfig(vocab_size=512, num_layers=1, model_dim=16, num_heads=2, max_positions=256)


def test_rows_are_long_documents():
    rows = cca.documents("lab", LAB, "validation", 20, seed=0)
    assert rows["tokens"].shape == (20, cca.LENGTH)
    columns = (rows[name] for name in ("tokens", "targets", "weights"))
    for tokens, targets, weights in zip(*columns, strict=True):
        end = np.flatnonzero(weights)[-1] + 1
        assert end >= 4 * cca.WINDOW and weights[:end].min() > 0
        np.testing.assert_array_equal(targets[: end - 1], tokens[1:end])
        if end < cca.LENGTH:
            assert targets[end - 1] == LAB.eos_id
    assert len({row.tobytes() for row in rows["tokens"]}) == 20
    train = cca.documents("lab", LAB, "train", 20, seed=0)
    assert not {row.tobytes() for row in train["tokens"]} & {r.tobytes() for r in rows["tokens"]}


def test_short_texts_are_refused(tmp_path):
    texts = tmp_path / "short.jsonl"
    texts.write_text('{"text": "ball red cup"}\n' * 500)
    with pytest.raises(ValueError, match="give longer texts"):
        cca.documents(str(texts), LAB, "all", 4, seed=0)


def test_needles_lie_before_every_window_of_their_question():
    rows = cca.far_needles(LAB, 8, seed=1)
    assert len(rows["tokens"]) == 8
    in_group = []
    columns = (rows[name] for name in ("tokens", "targets", "weights"))
    for tokens, targets, weights in zip(*columns, strict=True):
        (last,) = np.flatnonzero(weights)
        words = LAB.decode(tokens[: last + 1]).split()
        (told,) = np.flatnonzero([word == "Codes" for word in words])
        question = len(words) - 1 - words[::-1].index("Q")
        assert words[told + 3] == LAB.decode(targets[last : last + 1])
        assert words[told + 2] in words[question:]
        assert told + 3 <= question - cca.KEYS_OF_WINDOW  # seen by no query of the question
        assert last < cca.LENGTH
        in_group.append((told + 3) % cca.GROUP)
    assert sorted(in_group) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_arms_see_as_many_keys():
    assert cca.KEYS_OF_WINDOW == 16 + 256 // 4
    assert np.all(np.diff(cca.shares()) < 0)


def test_keys_seen_by_arm():
    weights = np.zeros((2, cca.LENGTH))
    weights[0, :100], weights[1, :20] = 0.1, 1
    options = CCAOptions(cca.GROUP, cca.WINDOW)
    count = dict.fromkeys(cca.ARMS, 0.0)
    for t in [*range(100), *range(20)]:
        cores = max(0, int(options.num_cores_seen(np.int32(t))))
        exact = int(np.sum(options.sees_exactly(np.int32(t), np.arange(t + 1))))
        for arm in count:
            count[arm] += cores + exact
        count["full"] += t + 1 - cores - exact
        count["window only"] += min(t + 1, 80) - cores - exact
        count["shorter window"] += min(t + 1, 43) - cores - exact
    found = cca.keys_seen({"weights": weights})
    assert found == pytest.approx({arm: total / 120 for arm, total in count.items()})


def test_only_projections_of_queries_keys_and_values_are_tuned():
    model = with_config(tiny_model(CFG), **cca.ARMS["cca"])
    before = jax.tree.map(np.array, model)
    rows = cca.cut(cca.documents("lab", LAB, "train", 5, seed=0), 2)
    assert len(rows) == 2
    tuned = cca.Tuning(2)(model, rows)
    flat = jax.tree_util.tree_leaves_with_path
    moved = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for (path, old), (_, new) in zip(flat(before), flat(tuned), strict=True)
        if (np.asarray(old) != new).any()
    ]
    assert sorted(name.split(".attention.")[1][:2] for name in moved) == ["wk", "wq", "wv"]
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), before, model)
    assert all(jax.tree.leaves(same))  # other arms start from it


def test_key_norms_of_the_first_layer():
    model = tiny_model(CFG)
    tokens = np.random.default_rng(0).integers(2, 400, (2, 16))
    seen = jh.record(jh.forward, "q_rot", "k_rot")(model, tokens).seen
    q, k = (np.asarray(seen[name][0], np.float64) for name in ("q_rot", "k_rot"))
    total = count = 0.0
    for b in range(2):
        for i in range(4):
            for h in range(2):
                group = k[b, 4 * i : 4 * i + 4, h]
                logits = group @ q[b, 4 * i + 3, h] / np.sqrt(q.shape[-1])
                weights = np.exp(logits - logits.max())
                total += np.linalg.norm(weights @ group / weights.sum())
                count += 1
    expected = total / count / np.linalg.norm(k, axis=-1).mean()
    assert cca.key_norms(model, tokens) == pytest.approx(expected, rel=1e-5)
    assert expected < 1


def study(**changes) -> cca.Study:
    losses = {"full": 1.0, "cca": 1.02, "mean pool": 1.03, "last member": 1.1,
              "random member": 1.1, "window only": 1.2}  # fmt: skip
    found = {"full": 1.0, "cca": 0.9, "window only": 0.2}
    good = cca.Study(
        {**losses, "cca": 2.0}, losses, found, {}, {2: 1.01, 4: 1.02, 8: 1.03, 16: 1.2}, 0.7
    )
    return good._replace(**{
        name: {**getattr(good, name), **change} for name, change in changes.items()
    })  # fmt: skip


COSTS = {"cache bytes over formula": 1.0, "cache over full": 0.07, "the same over the formula": 1.0}


@pytest.mark.parametrize(
    ("changes", "costs", "lost"),
    [({}, {}, []), ({"swapped": {"cca": 1.0}}, {}, ["raises"]),
     ({"tuned": {"full": 0.9}}, {}, ["over full"]),
     ({"tuned": {"window only": 1.05}}, {}, ["window only, over cca"]),
     ({"tuned": {"mean pool": 1.01}}, {}, ["mean pooling"]),
     ({"tuned": {"random member": 1.01}}, {}, ["random members"]),
     ({"by_group": {16: 1.0}}, {}, ["rank correlation"]),
     ({"needles": {"window only": 0.7}}, {}, ["needles"]),
     ({}, {"cache bytes over formula": 1.01}, ["cache bytes"]),
     ({}, {"cache over full": 0.08}, ["131,072"]),
     ({}, {"the same over the formula": 1.2}, ["FLOPs"])],
)  # fmt: skip
def test_every_claim_can_fail(changes, costs, lost):
    claims = cca.claims_of([study(**changes)] * 2, COSTS | costs)
    failed = [claim.name for claim in claims if not claim.holds]
    assert len(claims) == 10 and len(failed) == len(lost)
    assert all(word in name for word, name in zip(lost, failed))


@pytest.mark.slow
def test_the_script_runs(tmp_path):
    jh.save(tiny_model(CFG), tmp_path / "model")
    LAB.save(tmp_path / "model")
    command = [sys.executable, "-m", "experiments.cca", "--size=smoke", "--seeds=0"]
    command += [f"--model={tmp_path / 'model'}", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    content = json.loads((tmp_path / "claims.json").read_text())
    assert len(content["claims"]) == 10 and len(content["models"]) == 1
    assert content["models"][0]["by_group"]["4"] == content["models"][0]["tuned"]["cca"]
