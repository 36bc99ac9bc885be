"""Damaged input files: a clear error or a valid result within seconds, and nothing else touched.

Each case copies a good directory, damages a file of it, and has a process of its own read it
(`worker.py`): one that may not allocate much, that is given seconds, and whose files are watched.
`-m slow` runs ten times as many cases.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxheads import heads
from jaxheads.checkpoints import orbax
from jaxheads.checkpoints.huggingface import save
from jaxheads.data import Tokenizer
from jaxheads.fields import to_json
from jaxheads.models import ModelConfig
from tests.fuzz import mutations
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 10.0
"""For one input."""
CASES = 12
"""Of every kind in the quick run; five kinds make 60."""
LLAMA = ModelConfig(
    vocab_size=32, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24,
    max_positions=16, tie_embeddings=False,
)  # fmt: skip
ALLOWED = {"ValueError", "OSError", "NotImplementedError", "TypeError"}


class Worker:
    """The reading process; started anew after one that crashed or hung."""

    def __init__(self, root: Path, good: dict[str, Path]):
        self.root, self.good, self.process = root, good, None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", str(self.root)],
            cwd=ROOT, env=os.environ | {"TPU_SKIP_MDS_QUERY": "1"}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.lines: queue.Queue[str] = queue.Queue()
        self.err: list[str] = []
        for stream, put in (("stdout", self.lines.put), ("stderr", self.err.append)):
            threading.Thread(
                target=lambda s, p: [p(line) for line in s] + [p("")],
                args=(getattr(self.process, stream), put),
                daemon=True,
            ).start()
        for kind, directory in self.good.items():  # everything gets imported
            report = self.ask({"kind": kind, "directory": str(directory)}, 120)
            assert report["error"] is None, report
        self.ask({"limit": True}, 30)

    def read(self, kind: str, directory: Path) -> dict:
        if self.process is None:
            self.start()
        return self.ask({"kind": kind, "directory": str(directory)}, SECONDS)

    def ask(self, job: dict, seconds: float) -> dict:
        assert self.process is not None and self.process.stdin is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            self.stop()
            return {"error": "Hang", "also": [], "message": f"no answer in {seconds} s",
                    "touched": [], "seconds": seconds}  # fmt: skip
        if not line:
            code = self.process.wait()
            self.process = None
            return {"error": "Crash", "also": [], "message": f"exit {code}: {self.err[-20:]}",
                    "touched": [], "seconds": 0.0}  # fmt: skip
        return json.loads(line)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def good(root):
    """Directories of every kind that are as they should be, and one that is not theirs."""
    model = tiny_model(LLAMA)
    made = {kind: root / "good" / kind for kind in ("model", "tokenizer", "heads", "checkpoint")}
    save(model, made["model"], max_shard_bytes=4000)
    save(model, root / "bait")
    save(model, made["tokenizer"])
    Tokenizer.load("bytes").save(made["tokenizer"])
    (made["tokenizer"] / "tokenizer_config.json").write_text('{"bos_token": "<|bos|>"}')
    made["heads"].mkdir(parents=True)
    scores = np.linspace(0, 1, 8).reshape(2, 4)
    heads.to_json(made["heads"] / "heads.json", num_layers=2, num_heads=4, scores=scores)
    heads.to_json(root / "list.json", num_layers=2, num_heads=4, heads=[(0, 1), (1, 3)])
    with orbax.Checkpoints(made["checkpoint"] / orbax.CHECKPOINTS) as checkpoints:
        checkpoints.save(
            3, model=model, training={"step": jnp.asarray(3)},
            config={"model": to_json(LLAMA)}, data_state={"step": 3},
        )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def worker(root, good):
    before = snapshot(root)
    worker = Worker(root, good)
    yield worker
    worker.stop()
    # What native code writes is not seen by the worker.
    assert snapshot(root) == before


def snapshot(root):
    """The bytes of all files but the damaged copies."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file())
    return {p: p.read_bytes() for p in files if not p.is_relative_to(root / "case")}


@pytest.fixture
def check(root, good, worker):
    """``check(kind, {file: bytes or a function of the path})``: damage, read, judge."""
    count = 0

    def run(kind, damage):
        nonlocal count
        count += 1
        directory = root / "case" / f"{kind}-{count}"
        shutil.copytree(good[kind], directory, symlinks=True)
        try:
            for name, content in damage.items():
                path = directory / name
                if callable(content):
                    content(path)
                else:
                    path.write_bytes(content)
            report = worker.read(kind, directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        assert report["touched"] == [], report
        assert report["seconds"] < SECONDS, report
        if report["error"] is not None:
            assert ALLOWED & set(report["also"]), report
            message = report["message"]
            names = [directory.name, *(Path(name).name for name in damage)]
            assert any(name in message for name in names), report
            assert len(message) < 5000, len(message)
            assert "Traceback" not in message, report
        return report

    return run


def cases(test):
    """Runs a test of one argument for some cases, and for many as a slow test."""

    def quick(check, good):
        _explore(test, check, good, CASES)

    def many(check, good):
        _explore(test, check, good, 10 * CASES)

    return quick, pytest.mark.slow(many)


def _explore(test, check, good, number):
    @settings(
        max_examples=number, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def run(data):
        test(check, good, data.draw)

    run()


def shards(good):
    return sorted(p.name for p in good["model"].glob("*.safetensors"))


def safetensors_file(check, good, draw):
    name = draw(st.sampled_from(shards(good)))
    data = (good["model"] / name).read_bytes()
    check("model", {name: draw(mutations.damaged_safetensors(data))})


def model_json(check, good, draw):
    name = draw(st.sampled_from(("config.json", "model.safetensors.index.json")))
    data = (good["model"] / name).read_bytes()
    damaged = mutations.damaged_json(json.loads(data)) | mutations.damaged_bytes(data)
    check("model", {name: draw(damaged)})


def tokenizer_json(check, good, draw):
    name = draw(st.sampled_from(("tokenizer.json", "tokenizer_config.json", "config.json")))
    data = (good["tokenizer"] / name).read_bytes()
    damaged = mutations.damaged_json(json.loads(data)) | mutations.damaged_bytes(data)
    check("tokenizer", {name: draw(damaged)})


def heads_json(check, good, draw):
    name = draw(st.sampled_from(("good/heads/heads.json", "list.json")))
    data = (good["heads"].parents[1] / name).read_bytes()
    damaged = mutations.damaged_json(json.loads(data)) | mutations.damaged_bytes(data)
    check("heads", {"heads.json": draw(damaged)})


def checkpoint_file(check, good, draw):
    top = good["checkpoint"]
    names = sorted(str(p.relative_to(top)) for p in top.rglob("*") if p.is_file())
    name = draw(st.sampled_from(names))
    data = (top / name).read_bytes()
    damaged = mutations.damaged_bytes(data)
    with contextlib.suppress(ValueError):
        damaged |= mutations.damaged_json(json.loads(data))
    damage = {name: draw(damaged)}
    if draw(st.booleans()):  # what checksums would find reaches Orbax without them
        sums = (n for n in names if Path(n).name.startswith("checksums") and n != name)
        damage |= {other: lambda path: path.unlink() for other in sums}
    check("checkpoint", damage)


test_safetensors, test_many_safetensors = cases(safetensors_file)
test_model_json, test_many_model_json = cases(model_json)
test_tokenizers, test_many_tokenizers = cases(tokenizer_json)
test_heads_files, test_many_heads_files = cases(heads_json)
test_checkpoints, test_many_checkpoints = cases(checkpoint_file)


def link(target):
    def make(path):
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return make


@pytest.mark.parametrize("where", ["config.json", "shard", "index"])
@pytest.mark.parametrize("target", ["../../bait/{}", "loop", "/dev/zero", "/dev/null", "."])
def test_links(check, good, where, target):
    name = {"shard": shards(good)[0], "index": "model.safetensors.index.json"}.get(where, where)
    bait = "model.safetensors" if where == "shard" else "config.json"
    report = check("model", {name: link(target.format(bait) if target != "loop" else name)})
    assert report["error"] is not None


def test_a_single_file_of_weights_that_lies_elsewhere(check, good):
    for name in shards(good):
        assert (good["model"] / name).exists()
    removed = {name: lambda path: path.unlink() for name in shards(good)}
    removed["model.safetensors.index.json"] = lambda path: path.unlink()
    report = check("model", removed | {"model.safetensors": link("../../bait/model.safetensors")})
    assert "outside the directory" in report["message"]


@pytest.mark.parametrize("name", ["../../bait/model.safetensors", "/etc/passwd", "a/b", "..", "",
                                  "x\x00", "..\\x"])  # fmt: skip
def test_an_index_that_names_files_elsewhere(check, good, name):
    path = good["model"] / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = sorted(index["weight_map"])[0]
    index["weight_map"][first] = name
    report = check("model", {path.name: json.dumps(index).encode()})
    assert report["error"] == "ValueError"


def test_pipes_do_not_hang_the_reader(check, good):
    def pipe(path):
        path.unlink()
        os.mkfifo(path)

    for kind, name in (("model", "config.json"), ("model", shards(good)[0]),
                       ("tokenizer", "tokenizer.json"), ("heads", "heads.json")):  # fmt: skip
        assert check(kind, {name: pipe})["error"] is not None


def test_the_judge_notices(root, worker, good):
    """The worker itself: what it must see, it sees."""
    report = worker.read("model", root / "bait")
    assert report["error"] is None and report["touched"] == []
    script = (
        "import resource, numpy\n"
        "from tests.fuzz import worker\n"
        f"watch = worker.Watch({str(root)!r})\n"
        f"worker.READERS['x'] = lambda d: open({str(root / 'bait/config.json')!r}).read()\n"
        f"worker.READERS['y'] = lambda d: open({str(root / 'case/new')!r}, 'w').close()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "worker.READERS['z'] = lambda d: numpy.ones(4 << 30, numpy.uint8)\n"
        "for kind in 'xyz':\n"
        f"    r = worker.attempt(watch, kind, {str(good['model'])!r})\n"
        "    print(kind, r['error'], [t.split()[0] for t in r['touched']])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == [
        "x None ['read']", "y None ['written']", "z MemoryError []"
    ], done.stderr  # fmt: skip
