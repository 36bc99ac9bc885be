"""`launch.serve_recommender`: requests in every form, answers, what is refused, and the command."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from jaxheads import parallel
from jaxheads.checkpoints import recommender as files
from jaxheads.data import group_events
from jaxheads.data.behaviour_logs import Events
from jaxheads.models.recommender import (
    RECOMMENDERS,
    LongSequenceRecommender,
    apply,
    init_stats,
)
from launch import recommender_requests as requests_
from launch import serve_recommender
from launch.recommender_requests import Ids, Oddities, Refused, parse
from tests.data.behaviour_files import random_events

ROOT = Path(__file__).parents[2]
EVENTS = random_events(0, users=12, items=40, categories=5, rows=600)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "grouped"
    return group_events([Events(*EVENTS.T)], folder)


@pytest.fixture(scope="module")
def model(data):
    cfg = RECOMMENDERS["dare"](
        data.num_items,
        data.num_categories,
        num_times=100,
        attention_dim=3,
        representation_dim=4,
        top_k=5,
        head_dims=(8,),
        init_std=0.5,
    )
    return LongSequenceRecommender(cfg, rngs=nnx.Rngs(0)), init_stats(cfg)


def serve(model, stream, mesh="", **options):
    settings = dict(batch_size=4, max_history=None, stages="two")
    service = serve_recommender.make_service(
        *model, parallel.make_mesh(mesh), **(settings | options)
    )
    found, oddities = [], Oddities()
    measured = serve_recommender.answer_all(service, stream, found.append, oddities)
    return found, measured, oddities, service


def test_answers_are_the_forward_of_training(data, model):
    """Users by their id in the log, in batches whose histories differ in length."""
    ids = Ids(data, data.num_items, data.num_categories)
    users = [int(u) for u in data.users[:6]]
    items = [int(i) for i in data.item_ids[1:7]]
    lines = [json.dumps({"user": u, "item": i}) for u, i in zip(users, items)]
    found, measured, oddities, _ = serve(model, requests_.read(lines, ids, 99))
    assert [answer["line"] for answer in found] == [1, 2, 3, 4, 5, 6]
    assert len(measured.latencies) == 6 and measured.seconds > 0 and not str(oddities)
    for n, answer in enumerate(found):
        rows = EVENTS[EVENTS[:, 0] == users[n]]
        rows = rows[np.argsort(rows[:, 3], kind="stable")]
        number = {int(raw): k for k, raw in enumerate(data.item_ids)}
        history = np.asarray([[number[i] for i in rows[:, 1]]], np.int32)
        category = data.item_category[history].astype(np.int32)
        batch = {
            "item": np.asarray([number[items[n]]], np.int32),
            "category": data.item_category[[number[items[n]]]],
            "history_item": history,
            "history_category": category,
        }
        out = apply(*model, batch, train=False)
        assert answer["probability"] == pytest.approx(1 / (1 + np.exp(-out.logit[0])), abs=2e-6)
        want = [len(rows) - int(at) for at in out.index[0]]
        assert [top["position"] for top in answer["top"]] == want
        assert [top["item"] for top in answer["top"]] == [int(rows[-p, 1]) for p in want]
        assert sum(top["weight"] for top in answer["top"]) == pytest.approx(1, abs=1e-4)


def random_requests(cfg, count=5, length=40):
    return list(requests_.synthetic(count, length, cfg.num_items, cfg.num_categories, 0))


@pytest.mark.parametrize(
    "options",
    [dict(stages="one"), dict(mesh="data:2,context:4"), dict(batch_size=1)],
    ids=["one stage", "mesh", "one by one"],
)
def test_stages_meshes_and_batches_give_the_same_answers(model, options):
    stream = random_requests(model[0].cfg)
    want = serve(model, stream)[0]
    got = serve(model, stream, **options)[0]
    for a, b in zip(got, want, strict=True):
        assert a["probability"] == pytest.approx(b["probability"], abs=3e-6)
        assert [t["position"] for t in a["top"]] == [t["position"] for t in b["top"]]


def test_few_programs_serve_all_lengths(model):
    cfg = model[0].cfg
    stream = [
        request for length in (0, 3, 17, 64, 65, 99) for request in random_requests(cfg, 1, length)
    ]
    found, measured, _, service = serve(model, stream, batch_size=1)
    assert measured.num_programs == 2  # 64 and 99
    assert found[0]["top"] == []
    assert "6 requests of 41 behaviours on average" in serve_recommender.summary(measured, service)


def test_buckets():
    sizes = [
        requests_.bucket(n, shortest=64, longest=1999, multiple=1) for n in (0, 64, 65, 129, 1999)
    ]
    assert sizes == [64, 64, 128, 256, 1999]
    sizes = [requests_.bucket(n, shortest=20, longest=96, multiple=8) for n in (1, 24, 25, 60, 96)]
    assert sizes == [24, 24, 48, 96, 96]


def test_padding_is_in_front():
    request = requests_.Request(1, 5, 2, np.asarray([[3, 1], [4, 2]], np.int32), np.asarray([3, 4]))
    batch = requests_.pad([request], 2, 4)
    assert batch["history_item"].tolist() == [[0, 0, 3, 4], [0, 0, 0, 0]]
    assert batch["history_category"].tolist() == [[0, 0, 1, 2], [0, 0, 0, 0]]
    assert batch["item"].tolist() == [5, 0]


def line(**given):
    fields = {"history": [[1, 1]], "item": 2, "category": 1} | given
    return json.dumps({k: v for k, v in fields.items() if v is not None})


REFUSED = {
    "nope": "not valid JSON: Expecting value",
    "[1]": "holds a list, needed an object such as",
    "[" * 100_000: "not valid JSON",
    line(itm=3): "unknown field 'itm'; known: category, history",
    line(history=None): "give either 'user' or 'history'",
    line(user=1): "give either 'user' or 'history'",
    line(history=None, user=1): "'user' needs a data set (--data)",
    line(item=None): "'item' is missing",
    line(category=None): "'category' of the item is missing",
    line(item="2"): "item='2' is not an integer",
    line(item=True): "item=True is not an integer",
    line(item=0): "item 0 is not in 1 to 9",
    line(item=10): "item 10 is not in 1 to 9",
    line(item=2**70): "",
    line(category=-1): "category -1 is not in 1 to 3",
    line(history=[[1, 4]]): "category 4 is not in 1 to 3",
    line(history=[[10, 1]]): "item 10 is not in 1 to 9",
    line(history=[1, 2]): "'history' must be a list of [item, category]",
    line(history=[[1, 1.5]]): "'history' must hold integers",
    line(history=[[1, 1]], times=[1, 2]): "'times' must be a list with one time for each",
    line(history=[[1, 1]], times=["x"]): "'times' must hold integers",
}


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_refused_requests(text):
    found = parse(text, 7, Ids(None, 9, 3), 100)
    assert isinstance(found, Refused) and found.line == 7
    assert REFUSED[text] in found.error


def test_refused_requests_with_a_data_set(data):
    ids = Ids(data, data.num_items, data.num_categories)
    known = int(data.item_ids[1])
    for given, message in (
        (dict(user=-5, item=known), "user -5 is not in the data set"),
        (dict(user=int(data.users[0]), item=10**9), "item 1000000000 is not in the data set"),
        (dict(user=int(data.users[0]), item=0), "item 0 is not in the data set"),
        (dict(history=[[known, 7]], item=known), "category 7 is not in the data set"),
    ):
        found = parse(json.dumps(given), 1, ids, 100)
        assert isinstance(found, Refused) and message in found.error
    with pytest.raises(ValueError, match="give the data set it was trained on"):
        Ids(data, data.num_items + 1, data.num_categories)


def test_odd_requests_are_answered_and_counted(model):
    cfg = model[0].cfg
    pairs = [[n % cfg.num_items + 1, n % cfg.num_categories + 1] for n in range(120)]
    lines = [
        line(),
        "",
        line(history=[]),
        line(history=pairs),
        "nope",
        line(history=[[1, 1], [2, 2], [3, 3]], times=[5, 9, 7]),
        line(history=[[1, 1], [3, 3], [2, 2]]),
    ]
    ids = Ids(None, cfg.num_items, cfg.num_categories)
    found, _, oddities, _ = serve(model, requests_.read(lines, ids, 99))
    assert [answer["line"] for answer in found] == [1, 3, 4, 5, 6, 7]
    notes = [answer.get("notes") for answer in found]
    assert notes == [
        None, ["empty history"], ["history cut to the newest 99"], None, ["unsorted times"], None,
    ]  # fmt: skip
    assert found[3]["error"].startswith("not valid JSON")
    assert {k: v for k, v in found[4].items() if k not in ("line", "notes")} == {
        k: v for k, v in found[5].items() if k != "line"
    }
    assert max(top["position"] for top in found[2]["top"]) <= 99
    assert oddities.refused == 1
    assert "1 requests: refused (lines 5)" in str(oddities)
    assert "1 requests: empty history (lines 3)" in str(oddities)


def flags_(**given):
    return SimpleNamespace(**(dict(model=None, set=[], history=10, seed=0) | given))


def service(model, mesh="", **options):
    settings = dict(batch_size=4, max_history=None, stages="two") | options
    return serve_recommender.make_service(*model, parallel.make_mesh(mesh), **settings)


BAD = {
    "no model": (lambda m: serve_recommender.load(flags_()), "--model is missing"),
    "preset": (lambda m: serve_recommender.load(flags_(model="dere")), "did you mean 'dare'"),
    "folder": (lambda m: serve_recommender.load(flags_(model="tests")), "holds no config.json"),
    "setting": (
        lambda m: serve_recommender.load(flags_(model="dare", set=["model.topk=3"])),
        "unknown field of model 'topk'; did you mean 'top_k'?",
    ),
    "section": (
        lambda m: serve_recommender.load(flags_(model="dare", set=["data.topk=3"])),
        "unknown section 'data'",
    ),
    "setting of a directory": (
        lambda m: serve_recommender.load(flags_(model="tests", set=["model.top_k=3"])),
        "--set model.top_k goes with a preset",
    ),
    "batch": (lambda m: service(m, "data:8"), "--batch_size=4 is not divisible by 8"),
    "history": (lambda m: service(m, max_history=100), "must be between 1 and 99"),
    "short": (lambda m: service(m, max_history=4), "histories of at most 4 behaviours with top_k"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name, model):
    case, message = BAD[name]
    with pytest.raises(ValueError) as error:
        case(model)
    assert message in str(error.value)


def test_a_model_that_pools_everything_is_not_served():
    cfg = RECOMMENDERS["mean"](9, 3, representation_dim=2, head_dims=(4,))
    with pytest.raises(NotImplementedError, match="pooling='mean'"):
        service((LongSequenceRecommender(cfg, rngs=nnx.Rngs(0)), init_stats(cfg)))


def test_the_command(tmp_path, data, model):
    files.save(*model, tmp_path / "model", extra={"history": 20})
    (tmp_path / "requests").write_text(f'{{"user": {data.users[0]}, "item": {EVENTS[0, 1]}}}\nx\n')
    command = [
        sys.executable, "-m", "launch.serve_recommender", f"--model={tmp_path}/model",
        f"--data={data.directory}", f"--requests={tmp_path}/requests", "--simulated_devices=2",
        "--mesh=context:2", "--batch_size=2",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(text) for text in io.StringIO(done.stdout)]
    assert 0 < answers[0]["probability"] < 1 and answers[1]["line"] == 2
    assert answers[0]["notes"] == ["history cut to the newest 20"]  # what it was trained on
    assert "table rows read per request" in done.stderr
    assert "1 requests: refused (lines 2)" in done.stderr
    done = subprocess.run(
        [*command, "--max_history=999"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "--max_history=999" in done.stderr
    assert "Traceback" not in done.stderr and jax.device_count() == 8
