"""Runs of the loop: resumed, moved to other meshes, stopped, broken; and what they write."""

import dataclasses
import io
import json
import os
import signal

import jax
import numpy as np
import pytest

from jaxheads import parallel
from jaxheads.checkpoints import orbax
from jaxheads.data import DataConfig
from jaxheads.models import ModelConfig
from jaxheads.training import feed, loop, watch
from jaxheads.training.configs import TrainConfig
from jaxheads.training.loop import RunConfig, SampleConfig, train

pytestmark = pytest.mark.usefixtures("compile_once")
MODEL = ModelConfig(vocab_size=384, num_layers=2, model_dim=16, num_heads=4, max_positions=64)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, compile_once):
    """Documents that a tiny model learns something about in a few steps."""
    path = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    rng = np.random.default_rng(0)
    rows = [{"text": "ab" * int(rng.integers(5, 60))} for _ in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_run(corpus, workdir, mesh="data:2,fsdp:2,model:2", **changes):
    settings = {"steps": 8, "lr": 1e-2, "log_every": 1, "eval_batches": 1} | changes
    return RunConfig(
        model=MODEL,
        data=DataConfig(path=corpus, seq_len=16, batch_size=8, validation_fraction=0.2),
        train=TrainConfig(**settings),
        sample=SampleConfig(tokens=0),
        mesh=mesh,
        workdir=str(workdir),
    )


@pytest.fixture
def at_batch(monkeypatch):
    """``at_batch(n, act)``: call ``act(rows)`` when batch n of a run is prepared."""
    real = feed.Feed.__next__

    def install(number, act):
        count = 0

        def wrapped(self):
            nonlocal count
            count += 1
            batch = real(self)
            if count == number:
                changed = act(batch.rows)
                if changed is not None:
                    batch = batch._replace(
                        rows=changed, arrays=feed.put(changed, self._sharding, self._shape)
                    )
            return batch

        monkeypatch.setattr(feed.Feed, "__next__", wrapped)

    return install


def send(number):
    return lambda rows: os.kill(os.getpid(), number)


def lines(workdir, name="loss"):
    text = (workdir / "metrics.jsonl").read_text()
    return {r["step"]: r[name] for r in map(json.loads, text.splitlines()) if name in r}


def leaves(result):
    return {n: np.asarray(a) for n, a in orbax.flatten(result.state).items()}


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    result = train(make_run(corpus, workdir))
    assert result.step == 8 and result.stopped_by is None
    return workdir, result


def test_resumed_equals_uninterrupted_bit_for_bit(corpus, tmp_path, uninterrupted, at_batch):
    """Also the second part of the claim: the signal saved at a step boundary."""
    at_batch(4, send(signal.SIGTERM))
    first = train(make_run(corpus, tmp_path))
    assert (first.step, first.stopped_by) == (3, "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # handed back
    second = train(make_run(corpus, tmp_path))
    assert second.step == 8
    expected_dir, expected = uninterrupted
    assert leaves(second).keys() == leaves(expected).keys()
    for name, value in leaves(expected).items():
        np.testing.assert_array_equal(leaves(second)[name], value, err_msg=name)
    assert lines(tmp_path) == lines(expected_dir)
    assert lines(tmp_path, "eval/loss")[8] == lines(expected_dir, "eval/loss")[8]
    states = [
        json.loads((d / "checkpoints/8/data/metadata").read_text())
        for d in (tmp_path, expected_dir)
    ]
    assert states[0] == states[1] and states[0]["step"] == 8


@pytest.mark.slow
def test_resumes_on_four_and_two_devices(corpus, tmp_path, uninterrupted, at_batch):
    """8 -> 4 -> 2 devices; float32 sums in another order, Adam's steps of lr = 1e-2."""
    for mesh, stop in (("data:2,fsdp:2,model:2", 4), ("data:2,model:2", 3)):
        at_batch(stop, send(signal.SIGTERM))
        train(make_run(corpus, tmp_path, mesh))
    result = train(make_run(corpus, tmp_path, "fsdp:2"))
    assert len(result.state.model.embed.table[...].sharding.device_set) == 2
    expected_dir, expected = uninterrupted
    losses = lines(expected_dir)
    assert lines(tmp_path).keys() == losses.keys()
    for step, loss in lines(tmp_path).items():
        np.testing.assert_allclose(loss, losses[step], rtol=1e-5, err_msg=f"step {step}")
    for name, value in leaves(expected).items():
        np.testing.assert_allclose(leaves(result)[name], value, atol=1e-5, err_msg=name)


@pytest.fixture
def default_sigint():
    """Python's own handler, which a process started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_sigint_saves_and_the_second_interrupts(default_sigint):
    before = signal.getsignal(signal.SIGINT)
    with watch.stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass
    assert signal.getsignal(signal.SIGINT) == before


def test_writes_metrics_and_config(uninterrupted):
    workdir, result = uninterrupted
    losses = lines(workdir)
    assert list(losses) == list(range(1, 9))
    assert losses[8] < losses[1] - 0.3
    line = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[4])
    wanted = {"step", "loss", "accuracy", "grad_norm", "lr", "tokens_per_second"}
    assert wanted | {"input_wait_seconds", "input_wait_share"} <= line.keys()
    assert line["tokens_per_second"] > 0 and 0 <= line["input_wait_seconds"] < 10
    assert "mfu" not in line  # the peak of a CPU is unknown
    assert result.metrics["eval/loss"] == lines(workdir, "eval/loss")[8]
    assert result.metrics["loss"] == losses[8]

    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["num_heads"] == 4 and config["train"]["steps"] == 8


def test_tensorboard_reads_the_scalars(uninterrupted):
    name = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(name, reason="needs tensorboard")
    workdir, _ = uninterrupted
    events = accumulator.EventAccumulator(str(workdir / "tensorboard"))
    events.Reload()
    scalars = {e.step: e.value for e in events.Scalars("train/loss")}
    assert scalars == pytest.approx(lines(workdir))
    assert {"eval/loss", "train/lr", "train/grad_norm"} <= set(events.Tags()["scalars"])


def test_evaluation_is_the_loss_of_the_model_on_held_out_text(corpus, uninterrupted):
    """The same number from logits, in float64 numpy."""
    from jaxheads.data import eval_batches
    from jaxheads.models import forward

    workdir, result = uninterrupted
    data = dataclasses.replace(make_run(corpus, workdir).data, split="validation")
    (batch,) = eval_batches(data, 1)
    model = orbax.load_model(workdir)
    out = forward(
        model, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )
    logits = np.asarray(out.logits, np.float64)
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    target = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    loss = ((log_z - target) * batch["weights"]).sum() / batch["weights"].sum()
    np.testing.assert_allclose(result.metrics["eval/loss"], loss, rtol=1e-5)


def test_a_step_that_is_not_finite_stops_the_run(corpus, tmp_path, at_batch):
    def spoil(rows):
        return {**rows, "weights": np.full_like(rows["weights"], np.nan)}

    at_batch(6, spoil)
    with pytest.raises(watch.NonFiniteLossError, match=r"step 6: .*loss is nan.*step-6") as error:
        train(make_run(corpus, tmp_path, "fsdp:2", checkpoint_every=1, keep_last=9))
    assert "lower train.lr" in str(error.value)
    saved = np.load(tmp_path / "nonfinite-step-6-process-0.npz")
    assert saved["step"] == 6 and saved["tokens"].shape == (8, 16)
    assert np.isnan(saved["weights"]).all()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [1, 2, 3, 4, 5]
    assert all(np.isfinite(a).all() for a in orbax.flatten(orbax.load_model(tmp_path)).values())
    assert lines(tmp_path)[6] is None


def test_parameters_that_overflow_are_not_saved(corpus, tmp_path):
    """The loss of the step is finite; what it leaves is not."""
    run = make_run(corpus, tmp_path, "fsdp:2", checkpoint_every=1, lr=1e38, grad_clip=0)
    with pytest.raises(watch.NonFiniteLossError, match=r"step 1: .*param_norm is inf"):
        train(run)
    assert not orbax.is_checkpoint(tmp_path)


def test_keeps_the_last_and_the_best(corpus, tmp_path, monkeypatch):
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 4.0}
    monkeypatch.setattr(loop._Trainer, "evaluate", lambda self: losses[self.step])
    train(make_run(corpus, tmp_path, "fsdp:2", checkpoint_every=2, eval_every=2, keep_last=1))
    with orbax.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps == [4, 8] and checkpoints.best_step == 4


def test_starts_from_given_parameters_and_sets_an_earlier_run_aside(corpus, uninterrupted):
    workdir, _ = uninterrupted
    mesh = parallel.make_mesh("fsdp:2")
    source = lambda: orbax.load_model(workdir, mesh=mesh)
    tuned = workdir.parent / "tuned"
    run = make_run(corpus, tuned, "fsdp:2")
    train(run, model=source)
    assert lines(tuned)[1] == pytest.approx(lines(workdir)[8], abs=0.4)  # a new model is at 5.9
    train(run, model=lambda: pytest.fail("a checkpoint comes before given parameters"))
    train(run, model=source, resume=False)
    assert (tuned / "earlier-1/checkpoints/8").is_dir()
    assert list(lines(tuned)) == list(lines(workdir))


def test_writer_tells_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    writer = loop.RunWriter(tmp_path, first_step=2, total_steps=5)
    writer.write(2, {"loss": 1.5})
    writer.write(3, {"loss": float("nan")})
    writer.close()
    assert lines(tmp_path) == {1: 3, 2: 1.5, 3: None}
    loop.RunWriter(tmp_path / "none", first_step=1, total_steps=5, active=False).write(1, {})
    assert not (tmp_path / "none").exists()


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "100")
    writer = loop.RunWriter(tmp_path, first_step=3, total_steps=8)
    writer.progress(6, {"loss": 1.25, "accuracy": 0.5, "lr": 1e-3, "tokens_per_second": 12345.0})
    writer.say("a message")
    writer.close()
    last = screen.getvalue().split("\r")[-1]
    assert "6/8" in last and "loss=1.2500, acc=50.0%, tokens/s=12.3k" in last
    assert "lr" not in last


class _Device:
    def __init__(self, process_index):
        self.process_index = process_index


@pytest.mark.parametrize(
    ("mesh", "process_of", "blocks"),
    [
        ("data:8", lambda i: i // 4, [((0, 4), (0, 16)), ((4, 8), (0, 16))]),
        # two processes under one model axis hold the same rows
        ("data:2,model:4", lambda i: i % 4 // 2, [((0, 8), (0, 16))] * 2),
        ("data:2,context:4", lambda i: i // 2, [((0, 4), (0, 8)), ((0, 4), (8, 16)),
                                                ((4, 8), (0, 8)), ((4, 8), (8, 16))]),
    ],
)  # fmt: skip
def test_local_block_is_what_the_devices_of_a_process_hold(mesh, process_of, blocks):
    shape = (8, 16)
    sharding = feed.batch_sharding(parallel.make_mesh(mesh), shape)
    index = {d.id: process_of(d.id) for d in jax.devices()}

    class Sharding:
        mesh = sharding.mesh

        @staticmethod
        def devices_indices_map(shape):
            real = sharding.devices_indices_map(shape)
            return {_Device(index[d.id]): block for d, block in real.items()}

    for process, (rows, columns) in enumerate(blocks):
        block = feed.local_block(Sharding, shape, process)
        assert block == (slice(*rows), slice(*columns))


def test_batches_are_global_arrays(corpus):
    mesh = parallel.make_mesh("data:2,context:2,model:2")
    rows = {"tokens": np.arange(32, dtype=np.int32).reshape(4, 8)}
    put = feed.put(rows, feed.batch_sharding(mesh, (4, 8)), (4, 8))["tokens"]
    np.testing.assert_array_equal(np.asarray(put), rows["tokens"])
    assert put.addressable_shards[0].data.shape == (2, 4)


def test_a_corpus_too_small_to_hold_text_out_is_told_at_the_start(tmp_path, capsys):
    (tmp_path / "one.txt").write_text("a single document\n" * 9)
    run = make_run(str(tmp_path / "one.txt"), tmp_path, "fsdp:2")
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, validation_fraction=0.01))
    result = train(run)
    assert "eval/loss" not in result.metrics
    out = capsys.readouterr().out
    assert out.index("no evaluation: split='validation'") < out.index("step 1/8")
