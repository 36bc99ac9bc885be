"""Steps that wait for their input are seen in the metrics, and others do not wait."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import parallel
from jaxheads.data import DataConfig
from jaxheads.models import ModelConfig
from jaxheads.training import feed, loop
from jaxheads.training.configs import TrainConfig
from jaxheads.training.loop import RunConfig, SampleConfig, train
from jaxheads.training.watch import Window

pytestmark = pytest.mark.usefixtures("compile_once")
SLOW = 0.7  # seconds that a batch takes, far more than a step of the small model


class Source:
    """Batches that take their time."""

    def __init__(self, inner, seconds):
        self.inner, self.seconds = inner, seconds

    def __next__(self):
        time.sleep(self.seconds)
        return next(self.inner)

    def __getattr__(self, name):
        return getattr(self.inner, name)


class Running:
    """The result of a step, done or not."""

    def __init__(self, done):
        self.done = done

    def is_ready(self):
        return self.done


def batches(rows=2, length=4):
    row = np.zeros((rows, length), np.int32)
    names = ("tokens", "targets", "segment_ids", "positions")
    while True:
        yield dict.fromkeys(names, row) | {"weights": np.ones((rows, length), np.float32)}


@pytest.mark.parametrize("done", [True, False])
def test_time_counts_when_the_step_was_over_first(done):
    class Data(Source):
        def get_state(self):
            return {}

    source = feed.Feed(Data(batches(), 0.05), parallel.make_mesh(""), (2, 4), 8)
    next(source)
    assert source.wait_seconds == 0
    batch = source.after({"loss": Running(True), "lr": Running(done)})
    assert isinstance(batch.arrays["tokens"], jax.Array)
    if done:
        assert 0.05 <= source.wait_seconds < 5
    else:
        assert source.wait_seconds == 0


def run(tmp_path, monkeypatch, seconds, model_dim, seq_len, steps=6):
    corpus = tmp_path / "text.txt"
    corpus.write_text("".join(f"line {i} of a text\n\n" for i in range(4000)))
    make = loop.make_dataset
    monkeypatch.setattr(loop, "make_dataset", lambda *a, **k: Source(make(*a, **k), seconds))
    train(
        RunConfig(
            model=ModelConfig(
                vocab_size=384, num_layers=1, model_dim=model_dim, num_heads=4,
                max_positions=seq_len,
            ),
            data=DataConfig(
                path=str(corpus), seq_len=seq_len, batch_size=8, validation_fraction=0
            ),
            train=TrainConfig(steps=steps, log_every=steps),
            sample=SampleConfig(tokens=0),
            workdir=str(tmp_path / "run"),
        )
    )  # fmt: skip
    rows = [json.loads(t) for t in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["step"] == steps and "loss" in row)


@pytest.mark.slow
def test_a_slow_source_is_seen(tmp_path, monkeypatch):
    line = run(tmp_path, monkeypatch, SLOW, model_dim=16, seq_len=16)
    assert line["input_wait_seconds"] > 0.5 * SLOW
    assert 0.5 < line["input_wait_share"] <= 1


def test_a_fast_source_is_not_waited_for(tmp_path, monkeypatch):
    line = run(tmp_path, monkeypatch, 0.0, model_dim=128, seq_len=256)
    assert line["input_wait_share"] < 0.1


def test_the_next_batch_is_sent_before_a_step_is_waited_for(tmp_path, monkeypatch):
    """Two batches are on the devices: the one in use and the next."""
    events = []
    put, read = feed.put, Window.read

    def noted_put(batch, *args):
        events.append("put")
        return put(batch, *args)

    def noted_read(self, in_flight):
        events.append("read")
        read(self, in_flight)

    monkeypatch.setattr(feed, "put", noted_put)
    monkeypatch.setattr(Window, "read", noted_read)
    run(tmp_path, monkeypatch, 0.0, model_dim=16, seq_len=16, steps=4)
    assert events[:6] == ["put", "put", "read", "put", "read", "put"]


def test_ready_is_what_jax_calls_it():
    array = jnp.ones(3) + 1
    array.block_until_ready()
    assert array.is_ready()
