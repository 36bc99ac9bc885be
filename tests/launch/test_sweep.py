"""`python -m launch.sweep`: its numbers against loops over heads, its files, and bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags as absl_flags

import jaxheads as jh
from jaxheads import discovery
from jaxheads.data import Tokenizer, encode_pairs, load_pairs
from jaxheads.data.tasks import generate
from jaxheads.heads import HeadScores
from launch import pair_effects, sweep
from tests.data.test_pairs import TEXTS
from tests.data.tokenizers import word_tokenizer
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
L, H, K = 2, 4, 2


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A random grouped-query model that knows the words of the pairs below."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = word_tokenizer(directory, TEXTS)
    cfg = jh.ModelConfig(
        vocab_size=tokenizer.vocab_size, num_layers=L, model_dim=32, num_heads=H, num_kv_heads=K,
        mlp_dim=16, max_positions=64,
    )  # fmt: skip
    jh.save(tiny_model(cfg, scale=0.3), directory)
    return directory


@pytest.fixture(scope="module")
def task(model_dir, tmp_path_factory):
    """Five pairs of two lengths."""
    pairs = generate("ioi", Tokenizer.load(model_dir), 40, seed=3)
    pairs = [p for p in pairs if p.clean.startswith(("When", "Because"))][:5]
    rows = [
        {"clean": p.clean, "corrupt": p.corrupt, "answer": p.answer, "wrong": p.wrong}
        for p in pairs
    ]
    assert len({len(p.clean.split()) for p in pairs}) == 2
    file = tmp_path_factory.mktemp("task") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def command(monkeypatch, model_dir, tmp_path):
    """Runs the launcher in this process."""

    def run(*args, workdir=tmp_path / "out", main=sweep.main):
        values = absl_flags.FlagValues()
        monkeypatch.setattr(absl_flags, "FLAGS", values)
        sweep.define_flags(values)
        given = {a.partition("=")[0] for a in args}
        usual = [f"--model={model_dir}", f"--workdir={workdir}", "--control_seeds=2"]
        values(["sweep", *(u for u in usual if u.partition("=")[0] not in given), *args])
        main()
        return HeadScores.from_json(Path(workdir) / "heads.json")

    return run


def setting(model_dir, task):
    model, tokenizer = jh.load(model_dir), Tokenizer.load(model_dir)
    return model, encode_pairs(load_pairs(task), tokenizer)


def logit_difference(forward, model, batch, which):
    """[B], from whole logits, one prompt at a time and without padding."""
    out = []
    for n, end in enumerate(batch.last + 1):
        tokens = batch.run(which)["tokens"][n : n + 1, :end]
        logits = np.asarray(forward(n, end)(model, tokens).logits, np.float64)[0, -1]
        out.append(logits[batch.answer[n]] - logits[batch.wrong[n]])
    return np.array(out)


def donor(model, batch, which, site, n, end):
    tokens = batch.run(which)["tokens"][n : n + 1, :end]
    return jh.record(jh.forward, site)(model, tokens)


def loop(model, batch, into, site, count):
    """[L,N] shares of patching each head, and the metric of both runs, as a plain loop."""
    from jaxheads.interventions import patch

    plain = lambda n, end: jh.forward
    clean, corrupt = (logit_difference(plain, model, batch, w) for w in ("clean", "corrupt"))
    other = "clean" if into == "corrupt" else "corrupt"
    scores = np.zeros((L, count))
    for layer in range(L):
        for head in range(count):
            edited = lambda n, end, chosen=[(layer, head)]: patch(
                jh.forward, donor(model, batch, other, site, n, end).seen[site], chosen, site=site
            )
            value = logit_difference(edited, model, batch, into)
            start, end = (corrupt, clean) if into == "corrupt" else (clean, corrupt)
            scores[layer, head] = (value - start).mean() / (end - start).mean()
    return scores, clean, corrupt


@pytest.mark.parametrize(
    ("into", "site", "count"),
    [
        ("corrupt", "z", H),
        pytest.param("clean", "z", H, marks=pytest.mark.slow),
        pytest.param("corrupt", "v", K, marks=pytest.mark.slow),
    ],
)
def test_patching_equals_a_loop_without_padding(command, model_dir, task, into, site, count):
    model, batch = setting(model_dir, task)
    scores = command(f"--task={task}", f"--into={into}", f"--site={site}", "--batch_size=2")
    want, clean, corrupt = loop(model, batch, into, site, count)
    np.testing.assert_allclose(scores.values, want, atol=2e-4)
    assert scores.kind == ("query" if site == "z" else "kv")
    assert scores.meta["clean"] == pytest.approx(clean.mean(), abs=1e-4)
    assert scores.meta["corrupt"] == pytest.approx(corrupt.mean(), abs=1e-4)
    assert np.all(scores.ci.low <= scores.values) and np.all(scores.values <= scores.ci.high)


@pytest.mark.parametrize(
    "metric",
    [
        "kl",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("logit_diff", "logprob", "accuracy")),
    ],
)
def test_ablation_equals_a_loop(command, model_dir, task, metric):
    model, batch = setting(model_dir, task)
    scores = command(f"--task={task}", "--edit=ablate", f"--metric={metric}", "--batch_size=5")

    def measure(forward):
        values = []
        for n, end in enumerate(batch.last + 1):
            logits = forward(model, batch.clean[n : n + 1, :end]).logits
            log_p = np.asarray(logits, np.float64)[0, -1]
            log_p = log_p - np.log(np.exp(log_p).sum())
            base = np.asarray(jh.forward(model, batch.clean[n : n + 1, :end]).logits, np.float64)
            base = base[0, -1] - np.log(np.exp(base[0, -1]).sum())
            values.append({
                "logit_diff": log_p[batch.answer[n]] - log_p[batch.wrong[n]],
                "logprob": log_p[batch.answer[n]],
                "kl": -(np.exp(base) * (base - log_p)).sum(),
                "accuracy": float(log_p.argmax() == batch.answer[n]),
            }[metric])  # fmt: skip
        return np.mean(values)

    for head in [(0, 1), (1, 3)]:
        want = measure(jh.forward) - measure(jh.ablate(jh.forward, [head]))
        assert scores.values[head] == pytest.approx(want, abs=1e-4)


@pytest.mark.slow
def test_paths_equal_path_patching(command, model_dir, task):
    model, batch = setting(model_dir, task)
    scores = command(
        f"--task={task}", "--edit=path", "--receivers=1.2.q,1.3.q", "--freeze_mlps", "--top=1"
    )
    metric = discovery.logit_difference(batch.answer, batch.wrong, positions=batch.last)
    want = discovery.path_patch(
        jh.forward, model, batch.run("clean"), batch.run("corrupt"), metric,
        receivers=[(1, 2, "q"), (1, 3, "q")], freeze_mlps=True,
    )  # fmt: skip
    np.testing.assert_allclose(scores.values, want, atol=1e-4)
    assert np.all(scores.values[1] == 0)  # no path leads from layer 1 to its own queries
    assert scores.meta["flags"]["receivers"] == "1.2.q,1.3.q"
    assert scores.meta["flags"]["positions"] == "last"
    assert "mean value" in scores.control.method


@pytest.mark.slow
def test_the_control_edits_sets_together(command, model_dir, task):
    from jaxheads.interventions import patch

    model, batch = setting(model_dir, task)
    scores = command(
        f"--task={task}", "--top=2", "--control_seeds=3", "--seed=5", "--positions=last"
    )
    control = scores.control
    assert control.num_heads == 2 and control.seeds == (5, 6, 7) and len(control.random) == 3
    plain = lambda n, end: jh.forward
    clean, corrupt = (logit_difference(plain, model, batch, w) for w in ("clean", "corrupt"))
    sets = [scores.top_k(2), *(
        jh.heads.random_heads(L, H, 2, seed, exclude=scores.top_k(2)) for seed in control.seeds
    )]  # fmt: skip
    for chosen, got in zip(sets, [control.chosen, *control.random]):
        edited = lambda n, end, chosen=chosen: patch(
            jh.forward, donor(model, batch, "clean", "z", n, end).seen["z"], chosen, positions=-1
        )
        value = logit_difference(edited, model, batch, "corrupt")
        want = (value - corrupt).mean() / (clean - corrupt).mean()
        assert got == pytest.approx(want, abs=2e-4)


def test_an_interrupted_sweep_goes_on(command, task, monkeypatch, tmp_path, capsys):
    arguments = (f"--task={task}", "--batch_size=2", "--control_seeds=0")
    whole = command(*arguments, workdir=tmp_path / "whole")
    calls = []

    def counted(*args):
        calls.append(len(args[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pair_effects.head_effects(*args)

    monkeypatch.setattr(sweep, "head_effects", counted)
    with pytest.raises(KeyboardInterrupt):
        command(*arguments)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["examples.npz"]
    capsys.readouterr()
    scores = command(*arguments)
    assert "going on after 4 of 5 pairs" in capsys.readouterr().out
    assert len(calls) == 4  # two before, the one that failed, one more
    np.testing.assert_array_equal(scores.values, whole.values)
    np.testing.assert_array_equal(scores.ci, whole.ci)

    command(*arguments)
    assert len(calls) == 4  # everything was there
    with pytest.raises(ValueError, match="belongs to another command"):
        command(*arguments, "--into=clean")
    command(*arguments, "--into=clean", "--resume=false")
    assert len(calls) == 7


@pytest.mark.slow
def test_the_loop_is_closed_from_the_command_line(model_dir, task, tmp_path):
    """Find on a mesh, look, and evaluate without the heads found."""
    run = lambda *args: subprocess.run(
        [sys.executable, "-m", *args], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    done = run(
        "launch.sweep", f"--model={model_dir}", "--task=ioi", "--num_examples=6", "--seed=1",
        "--batch_size=4", "--mesh=data:2,model:2", "--simulated_devices=4", "--top=2",
        "--control_seeds=3", f"--workdir={tmp_path / 'find'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 random sets of 2" in done.stdout and "written to" in done.stdout
    scores = HeadScores.from_json(tmp_path / "find/heads.json")
    assert scores.values.shape == (L, H) and scores.model == str(model_dir)
    assert scores.meta["flags"]["task"] == "ioi" and scores.meta["seeds"]["task"] == 1
    assert scores.meta["versions"]["jax"] and scores.meta["command"][2] == "launch.sweep"
    assert (tmp_path / "find/head_map.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "find/attention.html").read_text()
    names = json.loads(re.search(r'id="about">(.*?)</script>', page)[1])["runs"]
    clean, corrupt = (run["queries"] for run in names)
    assert len(clean) == len(corrupt) and sum(a != b for a, b in zip(clean, corrupt)) == 1
    assert "".join(clean) == generate("ioi", Tokenizer.load(model_dir), 6, seed=1)[0].clean

    acted = run(
        "launch.evaluate", f"--model={model_dir}", f"--tasks={task}",
        f"--heads={tmp_path / 'find/heads.json'}", "--top_heads=2", f"--workdir={tmp_path / 'act'}",
    )  # fmt: skip
    assert acted.returncode == 0, acted.stderr
    results = json.loads((tmp_path / "act/results.json").read_text())
    assert results["edited_heads"] == [list(head) for head in scores.top_k(2)]
    margins = [results["results"][name]["tasks"]["margin"] for name in ("baseline", "ablate")]
    assert margins[0] != margins[1]


GOOD = {"clean": "Lily said that", "corrupt": "Tim said that", "answer": " she", "wrong": " he"}
BAD = {
    "no task": ([], [], "--task is missing"),
    "unknown task": ([], ["--task=iooi"], "unknown task 'iooi'; did you mean 'ioi'?"),
    "missing file": ([], ["--task=none.jsonl"], "none.jsonl does not exist"),
    "empty file": ([], None, "holds no pairs"),
    "not JSON": (["{"], None, "line 1 is not valid JSON"),
    "no corrupt": ([{"clean": "a", "answer": " b"}], None, "line 1 has no 'corrupt'"),
    "lengths": ([GOOD, {**GOOD, "corrupt": "Tim ran"}], None, "line 2: clean has 3 tokens and cor"),
    "long answer": (
        [{**GOOD, "answer": " she ran"}],
        None,
        "line 1: answer ' she ran' is 2 tokens",
    ),
    "no wrong": (
        [{k: v for k, v in GOOD.items() if k != "wrong"}],
        None,
        "--metric=logit_diff needs 'wrong' in every pair",
    ),
    "no model": ([GOOD], ["--model=", "--task={file}"], "--model is missing"),
    "metric": ([GOOD], ["--metric=logitdif"], "unknown metric 'logitdif'; did you mean 'logit_di"),
    "edit": ([GOOD], ["--edit=swap"], "--edit: unknown edit 'swap'"),
    "mode": (
        [GOOD],
        ["--edit=ablate", "--mode=media"],
        "unknown mode 'media'; did you mean",
    ),
    "into": ([GOOD], ["--into=both"], "unknown into 'both'"),
    "positions": ([GOOD], ["--positions=first"], "unknown positions 'first'"),
    "mode of a patch": ([GOOD], ["--mode=mean"], "--mode goes with --edit=ablate, not patch"),
    "receivers of a patch": ([GOOD], ["--receivers=1.0.q"], "--receivers goes with --edit=path"),
    "site of a path": ([GOOD], ["--edit=path", "--site=v"], "--site goes with --edit=patch or abl"),
    "site": ([GOOD], ["--site=zz"], "unknown site 'zz'"),
    "site without heads": ([GOOD], ["--site=mlp_out"], "mlp_out"),
    "site of a layer": (
        [GOOD],
        ["--site=blocks.1.attn.hook_z"],
        "names a layer; a sweep edits all",
    ),
    "receivers": (
        [GOOD],
        ["--edit=path", "--receivers=1.0"],
        "'1.0' cannot be read; write",
    ),
    "receiver": ([GOOD], ["--edit=path", "--receivers=7.0.q"], "out of range"),
    "top": ([GOOD], ["--top=5"], "--top=5 must be from 1 to 4, half of the heads"),
    "count": ([GOOD], ["--num_examples=0"], "--num_examples=0 must be at least 1"),
    "one to resample": ([GOOD], ["--edit=ablate", "--mode=resample"], "give at least two"),
    "set": ([GOOD], ["--set=train.lr=1"], "a sweep has no settings"),
    "mesh": ([GOOD], ["--mesh=rows:2"], "unknown axis 'rows'"),
    "dcn_mesh": ([GOOD], ["--dcn_mesh=data:2"], "needs 2 slices"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(command, tmp_path, name):
    rows, arguments, message = BAD[name]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    if arguments is None:
        arguments = []
    given = [a.replace("{file}", str(file)) for a in arguments]
    if name != "no task" and not any(a.startswith("--task") for a in given):
        given.append(f"--task={file}")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        command(*given)
    assert len(str(error.value)) < 900


def test_prompts_that_score_alike_have_no_shares(command, model_dir, tmp_path):
    """A model without weights cannot tell the prompts apart."""
    blank = tmp_path / "blank"
    Tokenizer.load(model_dir).save(blank)
    jh.save(jax.tree.map(jnp.zeros_like, jh.load(model_dir)), blank)
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(GOOD) + "\n")
    with pytest.raises(ValueError, match="a share of no difference is undefined"):
        command(f"--task={file}", f"--model={blank}")


def test_bytes_have_no_names(command, tmp_path):
    cfg = jh.ModelConfig(vocab_size=384, num_layers=1, model_dim=8, num_heads=2, mlp_dim=8)
    jh.save(tiny_model(cfg), tmp_path / "bytes")
    Tokenizer.load("bytes").save(tmp_path / "bytes")
    with pytest.raises(ValueError, match="'bytes' writes 0 of 78 names as one token"):
        command("--task=ioi", f"--model={tmp_path / 'bytes'}")


def test_one_pair_has_no_interval(command, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(GOOD) + "\n")
    scores = command(f"--task={file}", "--control_seeds=0")
    assert scores.ci is None and scores.control is None
    assert "at least two prompts" in scores.meta["bootstrap"]


@pytest.mark.slow
def test_the_tutorial_finds_what_it_says(command, tmp_path):
    """docs/heads.md: two heads of stories260K carry the pronoun's gender."""
    model = ROOT / "../shared/models/stories260K"
    if not model.exists():
        pytest.skip("no shared models")
    task = ROOT / "docs/tutorials/pronouns.jsonl"
    scores = command(
        f"--task={task}", f"--model={model}", "--top=2", "--batch_size=48", "--control_seeds=20"
    )
    assert scores.top_k(2) == [(4, 2), (4, 0)]
    np.testing.assert_allclose(
        [scores.values[4, 2], scores.values[4, 0]], [0.753, 0.170], atol=2e-3
    )
    np.testing.assert_allclose(scores.ci.low[4, 2], 0.718, atol=2e-3)
    assert scores.control.chosen == pytest.approx(0.923, abs=2e-3)
    assert scores.control.random.max() < 0.2 and scores.control.p_value == pytest.approx(1 / 21)
