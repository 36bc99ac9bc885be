"""`experiments.dare --dataset`: plans of the paper's runs, claims, and a run on a generated log."""

from types import SimpleNamespace

import pytest

from experiments import common, dare_logs
from tests.data.behaviour_files import random_events, taobao_lines, write

GIVEN = dict(
    dataset="taobao", data_dir="", mesh="", embedding_dim=16, models=["dare", "twin"], set=[]
)


def test_the_runs_of_the_paper(tmp_path):
    run = common.Options(tmp_path, (0, 1), "default")
    given = SimpleNamespace(**GIVEN | {"mesh": "data:8", "embedding_dim": 64})
    one = dare_logs.plan(given, run, "twin", 1)
    assert (one.model, one.mesh, one.epochs) == ("twin", "data:8", 2)
    assert (one.samples.seed, one.train.seed) == (1, 1)
    assert one.model_settings == {"representation_dim": "64"}
    assert one.grouped == dare_logs.plan(given, run, "dare", 0).grouped
    assert one.workdir != dare_logs.plan(given, run, "twin", 0).workdir


def test_claims_compare_seed_means():
    scores = {"dare": [0.92, 0.93], "twin": [0.915, 0.925], "din": [0.93, 0.94]}
    found = {claim.name: claim.holds for claim in dare_logs.decide(scores)}
    assert found == {"test AUC of DARE over twin": True, "test AUC of DARE over din": False}
    scores["twin"] = [0.918, 0.928]
    assert not dare_logs.decide(scores)[0].holds


@pytest.mark.slow
def test_from_a_log_to_claims(tmp_path, capsys):
    events = random_events(3, users=24, items=80, categories=6, rows=600)
    write(tmp_path / "UserBehavior.csv", taobao_lines(events))
    small = [
        "model.head_dims=8", "model.top_k=4", "samples.history=12", "samples.min_events=16",
        "samples.batch_size=16",
    ]  # fmt: skip
    given = GIVEN | {"data_dir": str(tmp_path), "embedding_dim": 4, "set": small}
    run = common.Options(tmp_path / "run", (0,), "smoke")
    code = dare_logs.main(run, SimpleNamespace(**given))
    text = (tmp_path / "run/table.md").read_text()
    assert code in (0, 1) and "| dare |" in text and "| twin |" in text
    assert (tmp_path / "run/dare-0/result.json").exists()
    with pytest.raises(ValueError, match="--models=twin needs dare and one to compare"):
        dare_logs.main(run, SimpleNamespace(**given | {"models": ["twin"]}))
