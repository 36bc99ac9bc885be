"""The experiments' own tools: claims, the files of a run, and the training loop."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags as absl_flags

from experiments import common, run_all
from experiments.common import Claim

SEEDS = (3, 5)
STEPS = 7


def _init(key):
    return {"w": jax.random.normal(key, (4,))}


def _batch(key):
    x = jax.random.normal(key, (8, 4))
    return x, x @ jnp.array([1.0, -2.0, 0.5, 3.0])


def _loss(params, batch):
    x, y = batch
    return jnp.mean((x @ params["w"] - y) ** 2)


@pytest.fixture
def flag_values(monkeypatch):
    values = absl_flags.FlagValues()
    monkeypatch.setattr(absl_flags, "FLAGS", values)
    absl_flags.DEFINE_string("workdir", "runs/x", "", flag_values=values)
    absl_flags.DEFINE_list("seeds", ["0", "1", "2"], "", flag_values=values)
    absl_flags.DEFINE_bool("quick", False, "", flag_values=values)
    absl_flags.DEFINE_enum("size", "default", common.SIZES, "", flag_values=values)
    return values


@pytest.mark.parametrize("over_seeds", ["vmap", "map"])
def test_fit_equals_a_python_loop(over_seeds):
    optimizer = optax.sgd(0.05)
    got = common.fit(
        _loss, _init, _batch, steps=STEPS, seeds=SEEDS, optimizer=optimizer, over_seeds=over_seeds
    )
    assert got.losses.shape == (2, STEPS)
    for n, seed in enumerate(SEEDS):
        key = jax.random.key(seed)
        params = _init(jax.random.fold_in(key, 0))
        for step, k in enumerate(jax.random.split(jax.random.fold_in(key, 1), STEPS)):
            loss, grads = jax.value_and_grad(_loss)(params, _batch(k))
            np.testing.assert_allclose(got.losses[n, step], loss, rtol=1e-5)
            params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
        np.testing.assert_allclose(got.params["w"][n], params["w"], rtol=1e-5)


def test_fit_learns_and_fresh_batches_agree():
    got = common.fit(_loss, _init, _batch, steps=400, seeds=SEEDS, lr=0.1)
    fresh = common.evaluate(_loss, got.params, _batch, seeds=SEEDS)
    assert fresh.shape == (2,)
    assert (got.losses[:, 0] > 1).all()
    assert (fresh < 1e-2).all()
    assert not np.allclose(got.losses[0], got.losses[1])  # the seeds differ


def test_evaluate_draws_other_batches_than_fit():
    mean_of_batch = lambda params, batch: jnp.mean(batch[0])
    got = common.evaluate(mean_of_batch, _init_each(), _batch, seeds=SEEDS, num_batches=1)
    for n, seed in enumerate(SEEDS):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), STEPS)
        trained_on = [float(jnp.mean(_batch(k)[0])) for k in keys]
        assert np.abs(np.subtract(trained_on, got[n])).min() > 1e-6


def _init_each():
    return jax.vmap(_init)(jax.vmap(jax.random.key)(jnp.array(SEEDS, jnp.uint32)))


def test_bounds_decide_on_the_mean_and_nan_fails():
    assert common.at_least("a", [0.9, 1.0], 0.95) == Claim("a", 0.95, ">= 0.95", True)
    assert not common.at_least("a", [0.9, 0.9], 0.95).holds
    assert common.at_most("b", np.float32(0.25), 0.25).holds
    assert not common.at_most("b", [0.3], 0.25).holds
    assert not common.at_least("c", [np.nan, 1.0], 0.0).holds
    assert not common.at_most("c", [np.nan, 1.0], 2.0).holds


def test_finish_writes_what_was_found(tmp_path, capsys):
    claims = [Claim("first", 0.5, ">= 0.4", True), Claim("second", float("nan"), "<= 1", False)]
    rows = [{"name": "a", "loss": 0.123456}, {"name": "b", "loss": np.float32(2)}]
    drawn = lambda figure: figure.add_subplot().plot([1, 2])
    code = common.finish(
        claims, tmp_path / "new", table=rows, figure=drawn, data={"curve": np.ones(2)}
    )
    assert code == 1
    content = json.loads((tmp_path / "new" / "claims.json").read_text())
    assert [claim["holds"] for claim in content["claims"]] == [True, False]
    assert content["claims"][1]["measured"] == "nan"
    assert content["curve"] == [1.0, 1.0]
    assert {"command", "versions", "git", "machine", "seconds"} <= content.keys()
    assert "| a | 0.1235 |" in (tmp_path / "new" / "table.md").read_text()
    assert (tmp_path / "new" / "figure.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "holds: first: 0.5 (needed >= 0.4)" in printed
    assert "FAILS: second: nan" in printed


def test_finish_succeeds_only_when_all_hold(tmp_path):
    assert common.finish([Claim("a", 1.0, ">= 1", True)], tmp_path) == 0
    with pytest.raises(ValueError, match="at least one Claim"):
        common.finish([], tmp_path)


def test_options(flag_values):
    flag_values(["x", "--seeds=4,7", "--quick", "--workdir=out"])
    got = common.options()
    assert (str(got.workdir), got.seeds, got.quick) == ("out", (4, 7), True)


def test_sizes(flag_values):
    flag_values(["x", "--size=real"])
    assert common.options(has_real_size=True).size == "real"
    with pytest.raises(ValueError, match="--size=real: this experiment trains its own models"):
        common.options()
    flag_values(["x", "--size=smoke"])
    assert common.options().quick


@pytest.mark.parametrize("seeds", ["1,1", "", "one"])
def test_bad_seeds(flag_values, seeds):
    flag_values(["x", f"--seeds={seeds}"])
    with pytest.raises(ValueError, match="--seeds"):
        common.options()


def test_fit_refuses(tmp_path):
    with pytest.raises(ValueError, match="over_seeds='loop'"):
        common.fit(_loss, _init, _batch, steps=1, seeds=SEEDS, over_seeds="loop")
    with pytest.raises(ValueError, match="steps=0"):
        common.fit(_loss, _init, _batch, steps=0, seeds=SEEDS)


def test_results_page_lists_failing_claims(tmp_path, monkeypatch):
    for name, holds in (("one", True), ("two", False)):
        common.finish(
            [Claim(f"claim of {name}", 0.5, ">= 0.4", holds)], tmp_path / name, table=[{"x": 1}]
        )
    why = tmp_path / "why.json"
    why.write_text('{"two": {"claim of two": "It is too hard."}, "one": {"claim of one": "No."}}')
    monkeypatch.setattr(run_all, "WHY", why)
    monkeypatch.setattr(run_all, "PAPERS", {"two": "Somebody, arXiv:1"})
    text = run_all.report(run_all.read(tmp_path))
    assert "| one |  | 1 | 1 |" in text
    assert "| two | Somebody, arXiv:1 | 1 | 0 |" in text
    assert "- *claim of two* fails: It is too hard." in text and "No." not in text
    assert "| claim of two | 0.5 | >= 0.4 | **no** |" in text


def test_kept_results_are_readable():
    why = json.loads(run_all.WHY.read_text())
    for name, content in run_all.read(run_all.RESULTS).items():
        assert content["claims"], name
        assert (run_all.RESULTS.parent / f"{name}.py").exists(), name
        for claim in content["claims"]:
            assert claim.keys() == {"name", "measured", "needed", "holds"}, name
        failed = {claim["name"] for claim in content["claims"] if not claim["holds"]}
        assert failed == set(why.get(name, ())), f"{name}: say why in experiments/why.json"
        assert name in run_all.PAPERS
