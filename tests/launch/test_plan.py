"""Plans: bytes and FLOPs against formulas and the programs that really run, verdicts, bad input."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads import generation, parallel
from jaxheads.checkpoints.families import to_hf
from jaxheads.data.packing import FIELDS
from jaxheads.models import PRESETS, Decoder, ModelConfig, forward
from jaxheads.parallel.topology import CHIPS
from jaxheads.training import TrainConfig, init_state, make_optimizer, make_train_step
from launch import plan as launcher
from launch import plan_jobs, plan_search
from launch.plan_analytic import analytic_report
from launch.plan_report import model_flops, out_of_memory, plan

ROOT = Path(__file__).parents[2]
SMALL = ModelConfig(
    vocab_size=64, num_layers=2, model_dim=32, num_heads=4, mlp_dim=64, compute_dtype="float32"
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


NORMS = (2 * SMALL.num_layers + 1) * SMALL.model_dim
planned = functools.cache(plan)


def request(**changes) -> plan_jobs.Request:
    base = plan_jobs.Request(
        name="small",
        model=SMALL,
        topology="cpu:8",
        mesh="fsdp:8",
        batch_size=8,
        seq_len=16,
        new_tokens=4,
    )
    return dataclasses.replace(base, **changes)


def resolve(**given):
    defaults = {"topology": "cpu:8", "model": "tiny", "mesh": "fsdp:8"}
    return launcher.resolve(**defaults | given)


def test_argument_bytes_are_weights_moments_counters_and_rows():
    report = planned(request())
    state = 12 * ((SMALL.num_params - NORMS) // 8 + NORMS)  # norms are whole on every device
    rows = sum(4 * 8 * 16 // 8 for _ in FIELDS)
    assert 0 < report.memory.arguments - state - rows <= 16  # step and counters of optax
    assert plan_jobs.lower(request()).argument_bytes == report.memory.arguments
    assert report.memory.aliased == pytest.approx(state, abs=16)  # the state is donated


@pytest.mark.slow
def test_the_plan_is_the_step_that_trains():
    cfg = TrainConfig()
    optimizer = make_optimizer(cfg)
    mesh = parallel.make_mesh("data:2,fsdp:2,model:2")
    state = init_state(lambda: Decoder(SMALL, rngs=nnx.Rngs(0)), optimizer, mesh)
    batch = {name: np.ones((8, 16), dtype) for name, dtype in FIELDS.items()}
    step = make_train_step(cfg, optimizer, mesh)
    real = step.lower(state, jax.device_put(batch, plan_jobs.batch_sharding(mesh, (8, 16))))
    stats = real.compile().memory_analysis()
    memory = plan(request(mesh="data:2,fsdp:2,model:2")).memory
    assert memory.arguments == stats.argument_size_in_bytes
    assert memory.temporaries == stats.temp_size_in_bytes
    assert memory.outputs == stats.output_size_in_bytes


def test_data_parallel_gradients_are_reduced_once():
    rows = planned(request(mesh="data:8")).to_json()["collectives"]
    reduced = sum(r["payload_bytes"] for r in rows if r["kind"] == "all-reduce")
    # The tied table has two gradients, of the lookup and of the logits, each summed by itself.
    gradients = 4 * (SMALL.num_params + SMALL.vocab_size * SMALL.model_dim)
    assert gradients <= reduced <= gradients + 200  # and some sums
    assert {r["axes"] for r in rows} == {"data"}


def test_tensor_parallel_activations_are_reduced_over_model():
    rows = planned(request(mesh="model:4,data:2")).to_json()["collectives"]
    over_model = [r for r in rows if r["axes"] == "model" and r["kind"] == "all-reduce"]
    payload = sum(r["payload_bytes"] for r in over_model)
    activation = 4 * 16 * 32 * 4  # [4,16,32] float32 on each device
    # Forward after wo and w_out; backward through q, k, v and gate, in; the table at both ends.
    expected = (7 * SMALL.num_layers + 2) * activation
    assert expected <= payload <= expected + 2000


def test_compiled_flops_are_the_products_of_the_model():
    """Full attention is computed where the model needs half; everything else is counted once."""
    report = planned(request(topology="cpu:1", mesh="", batch_size=2))
    tokens = 2 * 16
    attention = 12 * SMALL.num_layers * SMALL.num_heads * SMALL.head_dim * 16
    expected = tokens * (6 * (SMALL.num_params - NORMS) + attention)
    assert report.compiled_flops == pytest.approx(expected, rel=0.01)
    assert report.model_flops < expected


@pytest.mark.parametrize("job", [j for j in plan_jobs.JOBS if j != "recommender"])
def test_every_job_plans(job):
    report = planned(request(job=job, mesh="fsdp:8"))
    assert report.source == "compiled" and report.fits is None
    assert report.compiled_flops and report.memory.peak >= report.memory.arguments > 0
    spent = report.compiled_flops * 8
    assert 0.3 < report.model_flops / spent < 1.1
    assert bool(report.notes) == (job == "sweep")  # whose runs begin at the edited layer
    text = launcher.table(report)
    assert f"{job} small" in text and "all-gather" in text
    json.dumps(report.to_json())


def test_a_decode_step_costs_two_flops_a_weight():
    flops = model_flops(request(job="decode", seq_len=4, new_tokens=5))
    seen = 4 * SMALL.num_layers * SMALL.num_heads * SMALL.head_dim * 8
    assert flops == pytest.approx(8 * (2 * (SMALL.num_params - NORMS) + seen), rel=0.02)


def test_what_is_planned_is_what_generates(monkeypatch):
    """`generate` traces to the same text as `generation.lower`."""
    model = Decoder(SMALL, rngs=nnx.Rngs(0))
    programs = {"prefill": "_jit_start", "decode": "_jit_advance"}
    texts = {}

    def spy(part, jitted):
        def call(*args):
            texts.setdefault(part, jitted.lower(*args).as_text())
            return jitted(*args)

        return call

    with monkeypatch.context() as patched:
        for part, name in programs.items():
            patched.setattr(generation, name, spy(part, getattr(generation, name)))
        tokens = jnp.ones((2, 6), jnp.int32)
        generation.generate(model, tokens, max_new_tokens=2, callback=lambda step, new: None)
    shapes = jax.eval_shape(lambda: model)
    for part in programs:
        planned = generation.lower(
            part, shapes, batch_size=2, prompt_length=6, max_new_tokens=2, forward=forward
        )
        assert planned.as_text() == texts[part]


BIG = dataclasses.replace(
    PRESETS["llama3.1-70b"](), compute_dtype="bfloat16", param_dtype="bfloat16"
)
TOO_BIG = plan_jobs.Request(
    name="llama3.1-70b", model=BIG, topology="h200:16", mesh="data:2,fsdp:8", batch_size=64,
    seq_len=4096,
)  # fmt: skip


def test_what_does_not_fit_exits_3_with_changes_that_do(capsys):
    content, code = launcher.run(TOO_BIG)
    assert code == launcher.EXIT_DOES_NOT_FIT and content["fits"] is False
    assert len(content["changes"]) == 3
    for row in content["changes"]:
        assert row["fits"]
        assert row["bytes_per_device"]["peak"] <= content["bytes_per_device"]["hbm"]
    assert [row["same_result"] for row in content["changes"]] == [True] * 3
    settings = {row["change"].rpartition("=")[0] for row in content["changes"]}
    assert len(settings) >= 2  # not three doses of one thing
    printed = capsys.readouterr().out
    assert "NO" in printed and content["changes"][0]["change"] in printed


def give_memory(monkeypatch, num_bytes: int):
    monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(CHIPS["cpu"], hbm_bytes=num_bytes))


@pytest.mark.slow
def test_a_suggested_change_fits_when_compiled(monkeypatch):
    asked = request(mesh="data:8", batch_size=64, seq_len=64)
    give_memory(monkeypatch, int(0.6 * plan(asked).memory.peak))
    options, _ = plan_search.make_it_fit(asked, wanted=1, most=4, say=lambda text: None)
    again = plan(options[0].change.request)
    assert again.fits and again.memory == options[0].report.memory


def test_nothing_that_fits_is_said(capsys):
    content, code = launcher.run(dataclasses.replace(TOO_BIG, topology="h200:1", mesh=""), most=2)
    assert code == launcher.EXIT_DOES_NOT_FIT and content["changes"] == []
    assert "larger slice" in capsys.readouterr().out


def test_search_gives_a_pareto_front(capsys):
    content, code = launcher.run(TOO_BIG, search=True, most=40)
    assert code == 0 and len(content["options"]) > 3
    peaks = [row["bytes_per_device"]["peak"] for row in content["pareto"]]
    times = [row["time"]["step"] for row in content["pareto"]]
    assert peaks == sorted(peaks, reverse=True) and times == sorted(times)
    fitting = [o for o in content["options"] if o["fits"]]
    assert min(o["bytes_per_device"]["peak"] for o in fitting) == peaks[-1]
    assert min(o["time"]["step"] for o in fitting) == times[0]
    assert "Pareto" in capsys.readouterr().out


@pytest.mark.slow
def test_search_compiles_where_it_can():
    content, code = launcher.run(request(topology="cpu:4", mesh="fsdp:4"), search=True, most=3)
    assert code == 0 and len(content["options"]) == 3
    assert content["best"]["source"] == "compiled"


def test_gpus_are_planned_by_formula_and_say_so():
    cfg = dataclasses.replace(PRESETS["llama3.1-8b"](), compute_dtype="bfloat16", remat="full")
    asked = request(
        name="llama3.1-8b", model=cfg, topology="h200:8", mesh="fsdp:8", batch_size=8, seq_len=4096
    )
    report = plan(asked)
    assert report == analytic_report(asked)
    assert report.source == "analytic" and "analytic" in launcher.table(report)
    weights = 12 * cfg.num_params / 8
    assert report.memory.arguments == pytest.approx(weights, rel=0.001)
    assert report.fits
    big = dataclasses.replace(PRESETS["llama3.1-70b"](), compute_dtype="bfloat16", remat="full")
    four = dataclasses.replace(asked, model=big, topology="h200:4", mesh="fsdp:4")
    assert plan(four).fits is False


def test_formula_activations_shrink_with_the_policy():
    asked = request(mesh="data:8", seq_len=64)
    sizes = [
        analytic_report(plan_search._model(asked, remat=remat)).memory.temporaries
        for remat in ("none", "dots", "full")
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


@pytest.mark.parametrize("where", ["file", "directory"])
def test_a_hugging_face_config_is_the_preset_it_describes(where, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_hf(PRESETS["qwen3-8b"]())))
    found = plan_jobs.resolve_model(str(path if where == "file" else tmp_path), {})
    assert found.num_params == PRESETS["qwen3-8b"]().num_params
    assert plan_jobs.resolve_model(str(path), {"num_layers": "2"}).num_layers == 2


def test_defaults_follow_the_machine_not_this_host():
    assert resolve(topology="v5e:2x2", mesh="fsdp:4").model.compute_dtype == "bfloat16"
    assert resolve().model.compute_dtype == "float32"
    served = resolve(topology="v5e:2x2", mesh="model:4", job="decode")
    assert served.model.param_dtype == "bfloat16"
    kept = resolve(
        topology="v5e:2x2", mesh="model:4", job="decode", set=["model.param_dtype=float32"]
    )
    assert kept.model.param_dtype == "float32"
    assert resolve(mesh="").mesh_shape["fsdp"] == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"topology": None}, "--topology is missing"),
        ({"topology": "v5q:8x8"}, "did you mean"),
        ({"topology": "v5p:8x8"}, "for example v5p"),
        ({"model": None}, "--model is missing"),
        ({"model": "lama3-8b"}, "llama3-8b"),
        ({"model": "/no/such/config.json"}, "config.json"),
        ({"mesh": "fsdp:4"}, "uses 4 of 8 devices"),
        ({"mesh": "fsdp:16"}, "topology cpu:8 has 8 devices"),
        ({"mesh": "fdsp:8"}, "unknown axis"),
        ({"topology": "tpu7x:2x2x1", "mesh": "fsdp:4"}, r"8 devices \(2 a chip\)"),
        ({"model": "llama3.1-8b", "topology": "v5e:4x4", "mesh": "model:16"}, "use model:8"),
        ({"model": "gpt2-small", "mesh": "model:8"}, "num_heads=12.*use model:4"),
        ({"sizes": {"batch_size": 9}}, "multiple of 8"),
        ({"grad_accum": "3"}, "grad_accum=3"),
        ({"sizes": {"seq_len": 0}}, "at least 1"),
        ({"model": "gpt2-small", "sizes": {"seq_len": 4096}}, "1024 learned positions"),
        ({"remat": "half"}, "remat"),
        ({"remat": "full", "set": ["model.remat=none"]}, "give one of them"),
        ({"set": ["model.layers=3"]}, "num_layers"),
        ({"set": ["serve.x=1"]}, "section"),
        ({"job": "decode", "grad_accum": "2"}, "does not train"),
        ({"compiler_options": ["xla_flag"]}, "NAME=VALUE"),
    ],
)
def test_bad_input_is_one_error(given, message):
    with pytest.raises(ValueError, match=message):
        resolve(**given)


def test_out_of_memory_messages_are_read():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (384.50G) exceeds available HBM (15.75G). HLO module: x."
    )
    assert out_of_memory(message) == int(384.5 * 2**30)
    older = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm."
    assert out_of_memory(older) == int(20.5 * 2**30)
    assert out_of_memory("INTERNAL: Mosaic failed to compile TPU kernel") is None


@pytest.mark.slow
def test_the_command_prints_writes_and_exits(tmp_path):
    command = [sys.executable, "-m", "launch.plan", "--topology=cpu:2", "--model=tiny",
               "--seq_len=32", "--batch_size=2", "--set=model.num_layers=1",
               f"--workdir={tmp_path}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "fits" in done.stdout and "compiled FLOPs" in done.stdout
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["devices"] == 2 and content["provenance"]["versions"]["jax"]
    bad = subprocess.run([*command, "--mesh=fsdp:3"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2 and "2 devices" in bad.stderr and "Traceback" not in bad.stderr


LLAMA = dataclasses.replace(
    PRESETS["llama3.1-8b"](),
    num_layers=2,
    model_dim=1024,
    embed_dim=1024,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    mlp_dim=4096,
    vocab_size=4096,
    compute_dtype="bfloat16",
)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("topology", "mesh", "job"),
    [
        ("v5e:2x2", "fsdp:4", "train"),
        ("v5p:2x2x1", "fsdp:2,model:2", "train"),
        ("v6e:2x2", "data:2,model:2", "prefill"),
        ("tpu7x:2x2x1", "fsdp:4,model:2", "decode"),
    ],
)
def test_tpu_plans(topology, mesh, job):
    model = dataclasses.replace(LLAMA, remat="full", param_dtype="bfloat16")
    asked = request(model=model, topology=topology, mesh=mesh, job=job, batch_size=8, seq_len=1024)
    report = plan(asked)
    assert report.fits and report.times is not None and report.summary is not None
    # The prefill's blocked attention skips blocks by their positions, which are data.
    assert ["trip count" in note for note in report.notes] == [True] * (job == "prefill")
    assert (0 if job == "decode" else 0.001) < report.times.mfu < 1
    assert report.summary.cycles >= report.summary.cycles_once > 0
    named = {axis for row in report.to_json()["collectives"] for axis in row["axes"].split("+")}
    assert named <= {*asked.mesh_shape, "none"}
    spent = report.compiled_flops * asked.slice.num_devices
    assert 0.5 < report.model_flops / spent < 1.1
    if job == "train":
        kernels = report.to_json()["kernels"]
        assert all(row["count"] % 2 == 0 and row["flops"] > 0 for row in kernels)  # both layers
        assert sum(row["count"] for row in kernels) >= 2 * 2  # forward and backward
        gathered = sum(
            row["payload_bytes"]
            for row in report.to_json()["collectives"]
            if "fsdp" in row["axes"] and row["kind"] in ("all-gather", "collective-permute")
        )
        layers = 2 * (model.num_params - 2 * model.vocab_size * model.model_dim)
        split = asked.mesh_shape["model"]
        # Every weight of the layers is gathered in bfloat16, forward and again backward.
        tables = 3 * 2 * 2 * model.vocab_size * model.model_dim
        assert 1.5 * layers / split < gathered < 2.5 * layers / split + tables


@needs_libtpu
@pytest.mark.slow
@pytest.mark.tpu_aot
def test_a_cache_in_host_memory_is_not_the_devices():
    held, length = [], 4096
    for offload in ("false", "true"):
        attention = f"landmark(block=63,policy=max_over_tokens,offload={offload})"
        model = dataclasses.replace(SMALL, head_dim=128, attention=attention)
        asked = request(model=model, topology="v5e:2x2", mesh="data:2,model:2", job="decode",
                        batch_size=8, seq_len=length)  # fmt: skip
        held.append(plan(asked).memory)
    blocks = -(-(length + 3) // 64)  # for the prompt and all new tokens but the last
    heads, one = SMALL.num_heads, 2 * SMALL.num_layers * 64 * 128 * 4  # keys, values, float32
    cache = 8 * blocks * heads * one // 4  # of one chip
    near, far = held
    assert (near.host, far.host) == (0, cache)
    assert near.peak > cache and far.peak < cache / 2  # not even the keys would fit
    assert near.arguments - far.arguments == pytest.approx(cache, rel=0.05)  # landmarks stay


@needs_libtpu
@pytest.mark.slow
@pytest.mark.tpu_aot
def test_a_tpu_that_is_too_small_gets_changes_that_fit(capsys):
    model = dataclasses.replace(LLAMA, vocab_size=1_100_000, num_layers=1)  # 2.3B parameters
    asked = request(model=model, topology="v5e:1x1", mesh="", batch_size=2, seq_len=1024)
    content, code = launcher.run(asked, most=4)
    assert code == launcher.EXIT_DOES_NOT_FIT
    assert content["bytes_per_device"]["peak"] > content["bytes_per_device"]["hbm"]
    assert content["changes"] and all(row["fits"] for row in content["changes"])
    assert "adafactor" in capsys.readouterr().out
