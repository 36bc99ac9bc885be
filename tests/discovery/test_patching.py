"""Path patching against its literal definition, and its limits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import parallel
from jaxheads.discovery import logit_difference, passes, path_patch, percent
from jaxheads.interventions import scale_heads
from jaxheads.models import forward, unembed
from jaxheads.models.layers import apply_mlp, normalize
from jaxheads.taps import record
from tests.configs import model_of, tokens_of
from tests.discovery.literal import path_scores

MODELS = ("gpt2", "neox", "llama")
"""GPT-2 style; parallel blocks with partly rotary positions; grouped queries."""

BATCH, LENGTH = 3, 7


def setup(name, positions=-1):
    """(model, clean tokens, corrupt tokens, logit difference) of a tiny model."""
    clean = tokens_of(name, BATCH, LENGTH, seed=3)
    corrupt = tokens_of(name, BATCH, LENGTH, seed=4)
    metric = logit_difference([5, 6, 7], [8, 9, 10], positions=positions)
    return model_of(name), clean, corrupt, metric


def mask_of(*slots):
    where = np.zeros((BATCH, LENGTH), bool)
    where[:, slots] = True
    return jnp.asarray(where)


LAST, ALL = mask_of(-1), mask_of(*range(LENGTH))
LOGITS_CASES = [("gpt2", False), ("neox", True), ("llama", False)] + [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (
        ("gpt2", True),
        ("neox", False),
        ("llama", True),
        ("gptj", False),
        ("gemma", False),
        ("gemma", True),
        ("opt-post", True),
    )
]


@pytest.mark.parametrize(("name", "freeze"), LOGITS_CASES)
def test_paths_to_the_logits_are_the_definition(name, freeze):
    model, clean, corrupt, metric = setup(name)
    got = path_patch(forward, model, clean, corrupt, metric, freeze_mlps=freeze, normalise=False)
    want = path_scores(
        model, clean, corrupt, metric, receivers="logits", where=LAST, freeze_mlps=freeze
    )
    assert float(jnp.abs(want).max()) > 0.02
    np.testing.assert_allclose(got, want, atol=1e-5)


HEADS_CASES = [
    ("gpt2", [(2, 1, "q")], "last", LAST, False),
    pytest.param(
        *("gpt2", [(2, 1, "q"), (1, 0, "v"), (1, 3, "k")], "all", ALL, True), marks=pytest.mark.slow
    ),
    ("neox", [(2, 0, "q"), (2, 2, "q"), (1, 1, "q")], "last", LAST, False),
    pytest.param(
        *("neox", [(2, 3, "v"), (2, 3, "k")], mask_of(2, 4), mask_of(2, 4), False),
        marks=pytest.mark.slow,
    ),
    ("llama", [(2, 1, "k"), (1, 0, "v")], "all", ALL, False),
    pytest.param(
        *("llama", [(2, 3, "q"), (1, 1, "v")], "last", LAST, True), marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("name", "receivers", "positions", "where", "freeze"), HEADS_CASES)
def test_paths_to_heads_are_the_definition(name, receivers, positions, where, freeze):
    model, clean, corrupt, metric = setup(name)
    got = path_patch(
        forward,
        model,
        clean,
        corrupt,
        metric,
        receivers=receivers,
        positions=positions,
        freeze_mlps=freeze,
        normalise=False,
    )
    want = path_scores(
        model, clean, corrupt, metric, receivers=receivers, where=where, freeze_mlps=freeze
    )
    assert float(jnp.abs(want).max()) > 1e-3
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_last_layer_sender_meets_only_its_own_mlp(name):
    model, clean, corrupt, metric = setup(name)
    free, frozen = (
        path_patch(forward, model, clean, corrupt, metric, freeze_mlps=f, normalise=False)
        for f in (False, True)
    )
    if model.cfg.residual == "parallel":
        np.testing.assert_allclose(free[-1], frozen[-1], atol=1e-6)
    else:
        assert not np.allclose(free[-1], frozen[-1], atol=1e-4)
        direct = _through_own_mlp(model, clean, corrupt, metric)
        np.testing.assert_allclose(free[-1], direct, atol=1e-5)


def _through_own_mlp(model, clean, corrupt, metric):
    """[H]: the last layer's senders, by hand from its residual stream."""
    cfg = model.cfg
    run = record(forward, "z", "resid_mid")
    seen, other = run(model, clean).seen, run(model, corrupt).seen
    block = jax.tree.map(lambda a: a[-1], model.layers)

    def value(mid):
        x = mid + apply_mlp(block.mlp, normalize(block.ln2, mid, cfg), cfg)
        return metric(unembed(model, normalize(model.final_norm, x, cfg))).mean()

    mid = seen["resid_mid"][-1]
    out = []
    for head in range(cfg.num_heads):
        gap = (other["z"] - seen["z"])[-1][:, :, head] @ block.attention.wo[...][head]
        out.append(value(mid + gap) - value(mid))
    return jnp.stack(out)


def test_scores_are_ratios_of_batch_means():
    model, clean, corrupt, metric = setup("gpt2")
    raw = path_patch(forward, model, clean, corrupt, metric, normalise=False)
    before, after = (metric(forward(model, t).logits).mean() for t in (clean, corrupt))
    got = path_patch(forward, model, clean, corrupt, metric)
    np.testing.assert_allclose(got, raw / (after - before), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(percent(got), -100 * got)
    each = path_patch(forward, model, clean, corrupt, metric, normalise=False, per_example=True)
    assert each.shape == (*raw.shape, BATCH)
    np.testing.assert_allclose(each.mean(-1), raw, atol=1e-6)


def test_all_slots_are_the_last_one_for_the_logits():
    model, clean, corrupt, metric = setup("llama")
    run = lambda p: path_patch(forward, model, clean, corrupt, metric, positions=p)
    last = run("last")
    np.testing.assert_allclose(run("all"), last, atol=1e-5)
    np.testing.assert_allclose(run(jnp.arange(LENGTH)), last, atol=1e-5)
    np.testing.assert_allclose(run([LENGTH - 1] * BATCH), last, atol=1e-5)
    np.testing.assert_allclose(run(jnp.array([1, 2])), 0, atol=1e-5)  # nothing moves to the end


def test_a_metric_of_every_slot_sees_every_path():
    model, clean, corrupt, _ = setup("neox")
    metric = logit_difference([5, 6, 7], [8, 9, 10], positions=None)
    for positions, where in (("all", ALL), ("last", LAST)):
        got = path_patch(
            forward, model, clean, corrupt, metric, positions=positions, normalise=False
        )
        want = path_scores(
            model, clean, corrupt, metric, receivers="logits", where=where, freeze_mlps=False
        )
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    "receivers", ["logits", pytest.param([(2, 1, "q"), (2, 0, "v")], marks=pytest.mark.slow)]
)
def test_edited_forwards_and_plain_functions_give_the_same(receivers):
    model, clean, corrupt, metric = setup("gpt2")
    options = dict(receivers=receivers, positions="all", normalise=False)
    want = path_patch(forward, model, clean, corrupt, metric, **options)
    edited = scale_heads(forward, np.ones((3, 4)))
    np.testing.assert_allclose(
        path_patch(edited, model, clean, corrupt, metric, **options), want, atol=1e-5
    )
    got = path_patch(forward, model, clean, corrupt, _difference_at_the_end, **options)
    np.testing.assert_allclose(got, want, atol=1e-5)
    silent = scale_heads(forward, np.zeros((3, 4)))
    np.testing.assert_allclose(
        path_patch(silent, model, clean, corrupt, metric, **options), 0, atol=1e-5
    )


def _difference_at_the_end(logits):
    rows = jnp.arange(BATCH)
    return logits[rows, -1, 5 + rows] - logits[rows, -1, 8 + rows]


def test_the_mean_of_the_corrupt_prompts_can_be_sent():
    model, clean, corrupt, metric = setup("gpt2")
    same = jnp.broadcast_to(corrupt[:1], corrupt.shape)
    got, want = (
        path_patch(forward, model, clean, same, metric, sender_value=v, normalise=False)
        for v in ("mean", "corrupt")
    )
    np.testing.assert_allclose(got, want, atol=1e-5)
    other = path_patch(forward, model, clean, corrupt, metric, sender_value="mean", normalise=False)
    assert not np.allclose(other, want, atol=1e-3)


@pytest.mark.slow
def test_padding_moves_the_last_slot():
    model, clean, corrupt, _ = setup("llama")
    ids = jnp.ones((BATCH, LENGTH), jnp.int32).at[1, 5:].set(0).at[2, 4:].set(0)
    ends = jnp.array([6, 4, 3])
    metric = logit_difference([5, 6, 7], [8, 9, 10], positions=ends)
    pair = [{"tokens": t, "segment_ids": ids} for t in (clean, corrupt)]
    for receivers in ("logits", [(2, 1, "q")]):
        got = path_patch(
            forward, model, *pair, metric, receivers=receivers, normalise=False, per_example=True
        )
        for row, end in enumerate(ends.tolist()):
            alone = logit_difference([5 + row], [8 + row])
            cut = [t[row : row + 1, : end + 1] for t in (clean, corrupt)]
            want = path_patch(forward, model, *cut, alone, receivers=receivers, normalise=False)
            np.testing.assert_allclose(got[..., row], want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("receivers", ["logits", [(2, 1, "q"), (1, 0, "k")]])
def test_sharded_equals_unsharded(receivers):
    model, _, _, _ = setup("llama")
    clean, corrupt = (tokens_of("llama", 4, LENGTH, seed=s) for s in (3, 4))
    metric = logit_difference([5, 6, 7, 8], [9, 10, 11, 12])
    run = lambda m, a, b: path_patch(forward, m, a, b, metric, receivers=receivers)
    want = run(model, clean, corrupt)
    mesh = parallel.make_mesh("data:2,fsdp:2,model:2")
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
        got = run(parallel.shard(model, mesh), *jax.device_put((clean, corrupt), rows))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_one_program_serves_every_receiver_of_a_kind():
    model, clean, corrupt, metric = setup("gpt2")
    run = lambda r: path_patch(forward, model, clean, corrupt, metric, receivers=r)
    run([(2, 1, "q")])
    before = passes.sweep_parts._cache_size()
    run([(1, 3, "q")])
    run([(2, 0, "q"), (1, 2, "q")])
    assert passes.sweep_parts._cache_size() == before


BAD = [
    (dict(receivers=[]), "empty"),
    (dict(receivers="query"), "not 'logits'"),
    (dict(receivers=[(2, 1, "z")]), "give all three"),
    (dict(receivers=[(2, 1, "pattern")]), "not one of q, k, v"),
    (dict(receivers=[(2, 9, "q")]), "out of range"),
    (dict(receivers=[(3, 0, "q")]), "out of range"),
    (dict(receivers=[(2, 3, "k")]), "key/value head 1"),
    (dict(receivers=[(2, 1, "q"), (2, 1, "q")]), "listed twice"),
    (dict(receivers=[(0, 1, "q")]), "layer 0"),
    (dict(receivers=[(2, "q")]), "must be"),
    (dict(positions="first"), "not 'last'"),
    (dict(positions=99), "outside the prompts"),
    (dict(sender_value="zero"), "sender_value"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_requests_say_what_to_do(options, message):
    model, clean, corrupt, metric = setup("llama")
    with pytest.raises(ValueError, match=message):
        path_patch(forward, model, clean, corrupt, metric, **options)


def test_prompts_must_correspond():
    model, clean, corrupt, metric = setup("llama")
    with pytest.raises(ValueError, match="equal length"):
        path_patch(forward, model, clean, corrupt[:, :-1], metric)
    ids = jnp.ones((BATCH, LENGTH), jnp.int32)
    with pytest.raises(ValueError, match="row 1"):
        other = {"tokens": corrupt, "segment_ids": ids.at[1, -1].set(0)}
        path_patch(forward, model, {"tokens": clean, "segment_ids": ids}, other, metric)
    with pytest.raises(ValueError, match="no effect to normalise by"):
        path_patch(forward, model, clean, clean, metric)
    with pytest.raises(ValueError, match="one integer token"):
        path_patch(forward, model, clean, corrupt, logit_difference([[5, 6]], [[7, 8]]))
