"""Sweeps that reuse a recorded run against whole forwards, and a sweep written as a loop."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import parallel
from jaxheads.discovery import (
    accuracy,
    kl_divergence,
    log_probability,
    logit_difference,
    sweep_heads,
    sweep_layers,
    sweep_positions,
)
from jaxheads.discovery import reuse as program
from jaxheads.interventions import ablate, scale_heads
from jaxheads.models import forward
from jaxheads.taps import Edit, intervene, record
from tests.configs import CONFIGS, model_of, tokens_of

ANSWER, WRONG = [4, 60], [5, 2]
LAST = logit_difference(ANSWER, WRONG)
PADDED = np.array([[1] * 11, [1] * 8 + [0] * 3])


def _prompts(name, padded=False):
    batch = {"tokens": tokens_of(name), "segment_ids": jnp.asarray(PADDED) if padded else None}
    donor = {**batch, "tokens": tokens_of(name, seed=8)}
    return batch, donor


def _both(call, *args, **options):
    """The sweep with and without reuse: equal, and not all the same number."""
    fast = call(*args, **options)
    slow = call(*args, **options, prefix_reuse=False)
    assert np.std(slow) > 1e-4
    chex.assert_trees_all_close(fast, slow, rtol=1e-5, atol=1e-5)
    return np.asarray(fast)


def _write(value, payload, ctx):
    return value.at[:, :, payload[1]].set(payload[0][:, :, payload[1]])


def test_a_sweep_equals_a_python_loop():
    model, (batch, donor) = model_of("llama"), _prompts("llama")
    got = sweep_heads(forward, model, batch, edit="patch", donor=donor, metric=LAST)
    source = record(forward, "z")(model, donor["tokens"]).seen["z"]
    needed = np.zeros((3, 4), np.float32)
    run = jax.jit(
        lambda model, source, layer, head: (
            forward(
                model,
                batch["tokens"],
                taps=intervene(forward, Edit("z", _write, (source, head), layer=layer)).taps,
            ).logits
        )
    )
    for layer in range(3):
        for head in range(4):
            logits = run(model, source[layer], layer, head)[:, -1]
            needed[layer, head] = np.mean(logits[[0, 1], ANSWER] - logits[[0, 1], WRONG])
    np.testing.assert_allclose(got, needed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name):
    batch, donor = _prompts(name, padded=name in ("neox", "gemma"))
    metric = logit_difference(ANSWER, WRONG, positions=jnp.array([10, 7]))
    _both(sweep_heads, forward, model_of(name), batch, edit="patch", donor=donor, metric=metric)


OPTIONS = {
    "q": {"site": "q", "edit": "zero"},
    "k of key/value heads": {"site": "k", "edit": "patch"},
    "v at some slots": {"site": "v", "edit": "mean", "positions": [2, 5, 9]},
    "rotated keys": {"site": "k_rot", "edit": "resample"},
    "pattern at the last slot": {"site": "pattern", "edit": "patch", "positions": "last"},
    "head_out": {"site": "head_out", "edit": "mean"},
    "z in small batches": {"edit": "resample", "batch_size": 3},
    "z at one slot each": {"edit": "zero", "positions": np.array([3, -1])},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sites_edits_and_positions(options):
    batch, donor = _prompts("llama")
    donor = donor if options["edit"] in ("patch", "mean") else None
    model = model_of("llama")
    got = _both(sweep_heads, forward, model, batch, metric=LAST, donor=donor, **options)
    assert got.shape == (3, 2 if options.get("site", "z")[0] in "kv" else 4)


METRICS = {
    "log_probability": lambda clean: log_probability(ANSWER),
    "kl_divergence": kl_divergence,
    "every position": lambda clean: kl_divergence(clean, positions=None),
    "a function": lambda clean: _largest,
}


def _largest(logits):
    return logits.max(axis=(1, 2))


@pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
def test_metrics(make):
    model, (batch, donor) = model_of("gpt2"), _prompts("gpt2")
    metric = make(forward(model, batch["tokens"]).logits)
    _both(sweep_heads, forward, model, batch, edit="patch", donor=donor, metric=metric)


def _add(value, payload, ctx):
    return value + payload.astype(value.dtype)


BASES = {
    "scaled heads": lambda f, model: scale_heads(f, jnp.linspace(0.5, 1.5, 12).reshape(3, 4)),
    "edited stream": lambda f, model: intervene(
        f, Edit("resid_pre", _add, jax.random.normal(jax.random.key(1), (3, 2, 11, 32)))
    ),
    "edited sums": lambda f, model: intervene(
        f, Edit("attn_out", _square, jnp.ones((3, 1))), Edit("resid_mid", _add, jnp.ones((3, 1)))
    ),
    "edited logits": lambda f, model: intervene(f, Edit("logits", _square, None)),
}


def _square(value, payload, ctx):
    return value * jnp.abs(value)


@pytest.mark.parametrize("name", ["gpt2", "neox"])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_forwards_with_edits_of_their_own(base, name):
    if name == "neox" and base is BASES["edited sums"]:
        pytest.skip("parallel blocks have no resid_mid")
    model, (batch, donor) = model_of(name), _prompts(name)
    edited = base(forward, model)
    patched = _both(sweep_heads, edited, model, batch, edit="patch", donor=donor, metric=LAST)
    plain = sweep_heads(forward, model, batch, edit="patch", donor=donor, metric=LAST)
    assert not np.allclose(patched, plain, atol=1e-3)


def _silence(forward, mask):
    return scale_heads(forward, 1 - mask)


def _silence_others(forward, mask):
    return scale_heads(forward, mask)


@pytest.mark.slow
def test_wrappers_as_edits():
    model, (batch, _) = model_of("neox"), _prompts("neox")
    got = _both(sweep_heads, forward, model, batch, edit=_silence, metric=LAST)
    zero = sweep_heads(forward, model, batch, edit="zero", metric=LAST)
    chex.assert_trees_all_close(got, zero, rtol=1e-5, atol=1e-5)
    ablated = sweep_heads(forward, model, batch, edit=ablate, metric=LAST)
    chex.assert_trees_all_close(ablated, zero, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="changes layers below"):
        sweep_heads(forward, model, batch, edit=_silence_others, metric=LAST)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "z", "attn_out", "mlp_out"])
def test_positions_and_layers(site):
    model, (batch, donor) = model_of("gpt2"), _prompts("gpt2")
    options = {"edit": "patch", "donor": donor, "metric": LAST, "site": site}
    by_slot = _both(sweep_positions, forward, model, batch, **options)
    assert by_slot.shape == (3, 11)
    if site == "resid_pre":
        corrupt = LAST(forward(model, donor["tokens"]).logits).mean()
        for prefix_reuse in (True, False):  # the whole stream carries the whole run, at any layer
            whole = sweep_layers(forward, model, batch, **options, prefix_reuse=prefix_reuse)
            np.testing.assert_allclose(whole, np.full(3, corrupt), rtol=1e-4, atol=1e-5)


def test_two_sets_of_heads_and_values_share_a_program():
    model, (batch, donor) = model_of("llama"), _prompts("llama")
    program.resumed_scores.clear_cache()
    for seed in (8, 9):
        donor = {"tokens": tokens_of("llama", seed=seed)}
        sweep_heads(forward, model, batch, edit="patch", donor=donor, metric=LAST)
    sweep_heads(forward, model, batch, edit="zero", metric=logit_difference(WRONG, ANSWER))
    assert program.resumed_scores._cache_size() == 1


@pytest.mark.parametrize("spec", ["data:8", "data:4,model:2"])
def test_sharded_equals_single(spec):
    model, (batch, donor) = model_of("llama"), _prompts("llama")
    options = {"edit": "patch", "donor": donor, "metric": LAST}
    single = sweep_heads(forward, model, batch, **options)
    mesh = parallel.make_mesh(spec)
    with jax.set_mesh(mesh):
        shared = sweep_heads(forward, parallel.shard(model, mesh), batch, **options)
    chex.assert_trees_all_close(np.asarray(shared), np.asarray(single), rtol=1e-5, atol=1e-5)


def test_inside_jit():
    model, (batch, donor) = model_of("gpt2"), _prompts("gpt2")
    options = {"edit": "patch", "donor": donor, "metric": LAST}
    inside = jax.jit(lambda model: sweep_heads(forward, model, batch, **options))(model)
    outside = sweep_heads(forward, model, batch, **options)
    chex.assert_trees_all_close(inside, outside, rtol=1e-5, atol=1e-5)


SLOW_SWEEP = """
    import sys, time, jax, numpy as np
    from jaxheads.discovery import logit_difference, progress, sweep_heads
    from jaxheads.models import forward
    from tests.configs import model_of, tokens_of
    put = progress.Partial.put
    def slowly(self, *args):
        put(self, *args)
        print(int(self.is_done.sum()), flush=True)
        time.sleep(float(sys.argv[2]))
    progress.Partial.put = slowly
    progress.SECONDS_BETWEEN_SAVES = 0.0
    metric = logit_difference([4, 60], [5, 2])
    scores = sweep_heads(forward, model_of("gpt2"), tokens_of("gpt2"), edit="zero", metric=metric,
                         batch_size=2, resume_file=sys.argv[1])
    print(np.asarray(scores).tolist())
"""


@pytest.mark.slow
def test_a_killed_sweep_continues(tmp_path):
    script, held = tmp_path / "sweep.py", tmp_path / "partial.npz"
    script.write_text(textwrap.dedent(SLOW_SWEEP))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    start = lambda pause: subprocess.Popen(
        [sys.executable, script, held, pause], env=env, stdout=subprocess.PIPE, text=True
    )
    killed = start("60")
    assert killed.stdout is not None
    assert killed.stdout.readline().strip() == "2"
    deadline = time.monotonic() + 30
    while not held.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    second = start("0")
    lines = second.communicate()[0].splitlines()
    assert lines[0] == "4", "the first two heads were kept"
    model, tokens = model_of("gpt2"), tokens_of("gpt2")
    needed = sweep_heads(forward, model, tokens, edit="zero", metric=LAST)
    np.testing.assert_allclose(json.loads(lines[-1]), needed, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="holds another sweep"):
        sweep_heads(forward, model, tokens, edit="resample", metric=LAST, resume_file=held)
    held.write_bytes(b"no scores")
    with pytest.raises(ValueError, match="cannot be read"):
        sweep_heads(forward, model, tokens, edit="zero", metric=LAST, resume_file=held)


def test_accuracy_and_recorded_donors():
    model, (batch, donor) = model_of("gpt2"), _prompts("gpt2")
    run = record(forward, "z")(model, donor["tokens"])
    options = {"edit": "patch", "metric": LAST}
    first = sweep_heads(forward, model, batch, donor=donor, **options)
    for recorded in (run, run.seen, run.seen["z"]):
        chex.assert_trees_all_close(
            sweep_heads(forward, model, batch, donor=recorded, **options), first, atol=1e-6
        )
    top = forward(model, batch["tokens"]).logits[:, -1].argmax(-1)
    scores = sweep_heads(forward, model, batch, edit="patch", donor=batch, metric=accuracy(top))
    np.testing.assert_array_equal(scores, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": "patch"}, "needs donor="),
        ({"edit": "erase"}, "not one of zero"),
        ({"edit": 3}, "edit is a int"),
        ({"edit": "zero", "donor": np.ones((2, 11), int)}, "takes no donor"),
        ({"edit": "zero", "site": "mlp_out"}, "has no head axis"),
        ({"edit": "zero", "site": "logits"}, "no site of every layer"),
        ({"edit": "zero", "site": "q_rot"}, "no site 'q_rot'"),
        ({"edit": "zero", "site": "zz"}, "unknown site"),
        ({"edit": "zero", "batch_size": 0}, "batch_size=0"),
        ({"edit": "zero", "positions": 11}, "outside the prompts"),
        ({"edit": "patch", "donor": np.ones((2, 10), int)}, "equal length"),
        ({"edit": "patch", "donor": np.ones((3, 2, 11, 4, 9))}, "donor's values"),
        ({"edit": "patch", "donor": {"q": np.ones(3)}}, "did not record 'z'"),
        ({"edit": "zero", "metric": "loss"}, "needed a Metric"),
        ({"edit": _silence, "donor": np.ones((2, 11), int)}, "brings its own values"),
        ({"edit": lambda f, m: forward}, "returned a"),
    ],
)
def test_bad_input_is_named(options, message):
    model, (batch, _) = model_of("gpt2"), _prompts("gpt2")
    with pytest.raises((ValueError, TypeError), match=message):
        sweep_heads(forward, model, batch, **{"metric": LAST, **options})


def test_a_foreign_forward_needs_whole_runs():
    foreign = lambda model, tokens, **kwargs: forward(model, tokens, **kwargs)
    model, (batch, _) = model_of("gpt2"), _prompts("gpt2")
    with pytest.raises(NotImplementedError, match="prefix_reuse=False"):
        sweep_heads(foreign, model, batch, edit="zero", metric=LAST)
