"""`launch.train_recommender` on small generated logs: from CSV to a served model."""

import dataclasses
import json

import numpy as np
import pytest

from jaxheads.checkpoints import recommender as files
from jaxheads.data import group_events, open_behaviours
from jaxheads.parallel import make_mesh
from jaxheads.training.recommender import data_process
from launch.train_recommender import resolve, run
from tests.data.behaviour_files import (
    movielens_lines,
    random_events,
    taobao_lines,
    tmall_lines,
    write,
)
from tests.launch.processes import finish, make_environment, start_pair

SMALL = (
    "model.representation_dim=4", "model.top_k=4", "model.head_dims=8",
    "samples.history=12", "samples.min_events=16", "samples.batch_size=16",
    "samples.train_targets=4", "samples.stride=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    events = random_events(3, users=24, items=80, categories=6, rows=600)
    write(folder / "UserBehavior.csv", ["garbage", *taobao_lines(events)])
    write(folder / "user_log_format1.csv", tmall_lines(events))
    write(folder / "ratings.csv", movielens_lines(events))
    films = sorted(set(events[:, 1].tolist()))
    rows = [f"{film},Film {film},{('Drama', 'War')[film % 2]}" for film in films]
    write(folder / "movies.csv", ["movieId,title,genres", *rows])
    return folder


def plan(log, workdir, *settings, dataset="taobao", **flags):
    return resolve(
        dataset=dataset,
        data_dir=str(log),
        workdir=str(workdir),
        set=[*SMALL, "train.steps=3", "train.eval_every=2", *settings],
        **flags,
    )


@pytest.fixture(scope="module")
def single(log, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("single")
    return workdir, run(plan(log, workdir), {"command": ["x"]})


def test_what_a_run_leaves(single, log, capsys):
    workdir, result = single
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in lines] == [2, 3]
    best = max(lines, key=lambda entry: entry["auc"])
    assert result["best_step"] == best["step"] and result["validation"]["auc"] == best["auc"]
    assert json.loads((workdir / "result.json").read_text()) == result
    config = json.loads((workdir / "config.json").read_text())
    assert config["samples"]["history"] == 12 and config["command"] == ["x"]
    assert config["data"]["log"]["malformed"] == 1
    cfg, extra = files.load_config(workdir / "best")
    data = open_behaviours(workdir / "data")
    assert (cfg.num_items, cfg.num_categories) == (data.num_items, data.num_categories)
    assert extra["step"] == result["best_step"] and extra["history"] == 12
    assert all(0 <= result["test"][name] <= 1 for name in ("auc", "gauc"))


def test_a_mesh_trains_the_same_model(single, log, tmp_path):
    """Eight devices with a part of samples and tables each, against one; data grouped before."""
    workdir, want = single
    got = run(plan(log, tmp_path, mesh="data:4,model:2", grouped=str(workdir / "data")), {})
    assert not (tmp_path / "data").exists()
    # Loss and tables; of other weights, Adam turns gradients that are rounding errors into steps.
    for name in ("test", "validation"):
        assert got[name]["logloss"] == pytest.approx(want[name]["logloss"], rel=1e-5)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (workdir, tmp_path)]
    for a, b in zip(*lines, strict=True):
        assert json.loads(a)["loss"] == pytest.approx(json.loads(b)["loss"], rel=1e-5)
    one, many = (files.load(folder / "best").model for folder in (workdir, tmp_path))
    for use in ("attention", "representation"):
        a, b = one.tables(use)["item"], many.tables(use)["item"]
        assert len(b) == -(-len(a) // 8) * 8 > len(a)
        np.testing.assert_allclose(b[: len(a)], a, atol=1e-5)


def test_rows_by_lazy_adam(single, log, tmp_path):
    """For two steps that is Adam: a row is first read as it began, or as its first step left it."""
    workdir = single[0]
    given = plan(log, tmp_path, "train.sparse_rows=adam", grouped=str(workdir / "data"))
    got = run(given, {})
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (workdir, tmp_path)]
    dense, sparse = ([json.loads(line) for line in text] for text in lines)
    assert sparse[0]["loss"] == pytest.approx(dense[0]["loss"], rel=1e-5)
    assert got["steps"] == 3 and 0 <= got["test"]["auc"] <= 1
    assert json.loads((tmp_path / "config.json").read_text())["train"]["sparse_rows"] == "adam"
    one, other = (files.load(folder / "best").model for folder in (workdir, tmp_path))
    for use in ("attention", "representation"):
        assert one.tables(use)["item"].shape == other.tables(use)["item"].shape


def but(*settings):
    """SMALL with other settings."""
    ours = {text.partition("=")[0] for text in settings}
    return [*(text for text in SMALL if text.partition("=")[0] not in ours), *settings]


def test_twin_on_movielens_for_an_epoch(log, tmp_path):
    given = resolve(
        dataset="movielens",
        data_dir=str(log),
        workdir=str(tmp_path),
        model="twin",
        epochs=1,
        set=but("samples.batch_size=128"),
    )
    result = run(given, {})
    users = int((np.diff(open_behaviours(tmp_path / "data").offsets) >= 16).sum())
    assert result["steps"] == round(users * 4 * 3 / 128)
    assert 0 <= result["test"]["auc"] <= 1


def test_the_settings_of_the_paper_are_the_default(log):
    for dataset in ("taobao", "tmall"):
        given = resolve(dataset=dataset, data_dir=str(log))
        found = dataclasses.asdict(given.samples)
        assert [found[n] for n in ("history", "min_events", "train_targets", "stride")] == [
            200, 210, 19, 5,
        ]  # fmt: skip
        assert (found["batch_size"], found["negatives"], given.epochs) == (2048, 2, 2)
        assert (given.train.lr, given.train.eval_every) == (0.01, 150)
    assert resolve(dataset="movielens", data_dir=str(log)).samples.stride == 1


def bad(*settings, **flags):
    def case(log, tmp):
        given = dict(dataset="taobao", data_dir=str(log), workdir=str(tmp / "run")) | flags
        return run(resolve(set=but(*settings), **given), {})

    return case


CASES = {
    "no data set": (bad(dataset=None), "--dataset is missing; give one of taobao"),
    "data set": (bad(dataset="tmal"), "unknown dataset 'tmal'; did you mean 'tmall'?"),
    "no log": (bad(data_dir=None), "--data_dir is missing"),
    "log": (bad(data_dir="/none"), "needed UserBehavior.csv or UserBehavior.csv.gz in /none"),
    "model": (bad(model="dara"), "unknown model 'dara'; did you mean 'dare'?"),
    "mesh": (bad(mesh="rows:2"), "unknown axis 'rows'"),
    "batch": (bad("samples.batch_size=12", mesh="data:8"), "batch_size=12 is not divisible by 8"),
    "rows": (bad(max_bad_rows=0), "more than max_bad_rows=0 malformed rows"),
    "users": (bad("samples.min_events=999"), "none of 24 users has min_events=999 events"),
    "epochs": (bad(epochs=-1.0), "--epochs=-1.0 must be above 0"),
    "length": (bad("train.steps=3", epochs=1.0), "--epochs and --set train.steps both"),
    "items": (bad("model.num_items=5"), "model.num_items follows from the data"),
    "split": (bad("samples.split=test"), "the samples trained on are 'train'"),
    "field": (bad("samples.histroy=5"), "'histroy'; did you mean 'history'?"),
    "lr": (bad("train.lr=-1"), "lr=-1.0 must be above 0"),
    "rows of Adam": (bad("train.sparse_rows=adagrad"), "unknown row optimizer 'adagrad'"),
    "steps": (bad("train.steps=0"), "steps=0 must be at least 1"),
    "twin": (bad("model.attention_dim=2", model="twin"), "attention_dim=2 with decoupling='sh"),
    "short": (bad("model.top_k=13"), "histories of length 12 with top_k=13"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, log, tmp_path, capsys):
    case, message = CASES[name]
    with pytest.raises(ValueError) as error:
        case(log, tmp_path)
    assert message in str(error.value)


def test_a_run_that_diverges_ends(log, tmp_path):
    with pytest.raises(FloatingPointError, match="lower lr"):
        run(plan(log, tmp_path, "train.lr=1e30"), {})


def test_the_part_of_a_process():
    assert data_process(make_mesh("data:8"), 16) == (0, 1)
    with pytest.raises(ValueError, match="batch_size=4 is not divisible by 8"):
        data_process(make_mesh("data:8"), 4)


def test_groups_are_not_made_twice(single, tmp_path):
    with pytest.raises(ValueError, match="exists; give a new directory"):
        group_events([], single[0] / "data")


@pytest.mark.slow
def test_two_processes_train_as_one_does(single, log, tmp_path):
    """Each reads its half of every batch and holds its half of the tables."""
    workdir, want = single
    flags = [f"--set={text}" for text in (*SMALL, "train.steps=3", "train.eval_every=2")]
    flags += ["--dataset=taobao", f"--data_dir={log}", "--simulated_devices=2", "--mesh=data:4"]
    environment = make_environment(tmp_path / "cache")
    for attempt in range(3):  # Gloo waits 30 s for the other process: a crowded machine is slower
        pair = tmp_path / f"pair{attempt}"
        module = "launch.train_recommender"
        done = finish(start_pair(environment, module, *flags, f"--workdir={pair}"))
        if not any("Gloo context initialization failed" in err for _, _, err in done):
            break
    assert [code for code, _, _ in done] == [0, 0], done
    got = json.loads(done[0][1])
    assert not done[1][1].strip()  # only process 0 talks
    for name in ("test", "validation"):
        assert got[name]["logloss"] == pytest.approx(want[name]["logloss"], rel=1e-5)
    one, two = (files.load(folder / "best").model for folder in (workdir, pair))
    a, b = one.attention.item[...], two.attention.item[...]
    np.testing.assert_allclose(b[: len(a)], a, atol=1e-5)
