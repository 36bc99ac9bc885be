"""Affine edits, steering, subspaces, masked and pruned heads: what the contract leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.interventions import (
    AffineEdit,
    fold_pruned,
    keep_subspace,
    mask_heads,
    orthonormal_basis,
    project_out,
    prune_heads,
    random_heads,
    scale_heads,
    steer,
)
from jaxheads.interventions.per_head import intervene_per_head
from jaxheads.models import ModelConfig, forward, init_cache
from jaxheads.taps import as_tapped, record
from tests.tiny import tiny_model

L, B, H, K, D, M, T = 2, 2, 4, 2, 4, 16, 6
CFG = ModelConfig(vocab_size=17, num_layers=L, model_dim=M, num_heads=H, num_kv_heads=K, mlp_dim=16)
TOKENS = np.arange(B * T).reshape(B, T)
RNG = np.random.default_rng(0)
BASIS = np.asarray(orthonormal_basis(RNG.normal(size=(L, H, D, 2))))
VECTOR = RNG.normal(size=M).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return tiny_model(CFG, scale=0.3)


@jax.jit
def run(fwd, model):
    return fwd(model, TOKENS)


def test_scaling_values_is_scaling_outputs(model):
    """One value head of a group is all its query heads; bias and rotation do not matter."""
    gates = np.array([[0.5, -2.0], [3.0, 1.0]], np.float32)
    by_v = run(scale_heads(forward, gates, site="v"), model).logits
    by_z = run(scale_heads(forward, gates.repeat(2, axis=1)), model).logits
    np.testing.assert_allclose(by_v, by_z, atol=1e-5)


def test_gates_of_each_row(model):
    gates = RNG.uniform(0, 2, (B, L, H)).astype(np.float32)
    out = run(scale_heads(forward, gates), model).logits
    for row in range(B):
        np.testing.assert_allclose(
            out[row], run(scale_heads(forward, gates[row]), model).logits[row], atol=1e-5
        )
    with pytest.raises(ValueError, match="3 rows; the batch has 2"):
        scale_heads(forward, np.ones((3, L, H)))(model, TOKENS)
    with pytest.raises(ValueError, match="NaN"):
        scale_heads(forward, np.full((L, H), np.nan))


def test_numbers_broadcast_in_an_affine_edit(model):
    plain = run(record(forward, "attn_out"), model).seen["attn_out"][0]
    fwd = intervene_per_head(forward, AffineEdit("attn_out", 2.0, VECTOR))
    out = run(record(fwd, "attn_out"), model).seen["attn_out"][0]
    np.testing.assert_allclose(out, 2 * plain + VECTOR, atol=1e-5)


def test_affine_edits_of_a_whole_text_under_a_cache(model):
    """Columns past the text of the edit are left alone."""
    value = RNG.normal(size=(L, B, 4, H, D)).astype(np.float32)
    gate = np.full((L, 1, 4, 1, 1), 0.5, np.float32)
    longer = np.concatenate([value, np.zeros((L, B, 2, H, D))], axis=2).astype(np.float32)
    gates = np.concatenate([gate, np.ones((L, 1, 2, 1, 1))], axis=2).astype(np.float32)
    want = run(intervene_per_head(forward, AffineEdit("z", gates, longer)), model).logits
    fwd, cache, got = intervene_per_head(forward, AffineEdit("z", gate, value)), None, []
    step = jax.jit(lambda tokens, cache: fwd(model, tokens, cache=cache))
    cache = init_cache(CFG, B, 8)
    for t in range(0, T, 3):
        out = step(TOKENS[:, t : t + 3], cache)
        cache = out.cache
        got.append(out.logits)
    np.testing.assert_allclose(jnp.concatenate(got, 1), want, atol=1e-5)
    with pytest.raises(ValueError, match="4 positions; the text of this call has 6"):
        fwd(model, TOKENS)


def test_steering(model):
    plain = run(record(forward, "resid_post", "embed"), model)
    fwd = record(steer(forward, VECTOR, layers=1, scale=np.array([2.0, -1.0])), "resid_post")
    got = run(fwd, model).seen["resid_post"]
    np.testing.assert_allclose(got[0], plain.seen["resid_post"][0], atol=1e-6)
    want = plain.seen["resid_post"][1] + np.array([2, -1])[:, None, None] * VECTOR
    np.testing.assert_allclose(got[1], want, atol=1e-5)
    outer = run(record(steer(forward, VECTOR, site="embed", positions=0), "embed"), model)
    change = np.asarray(outer.seen["embed"] - plain.seen["embed"])
    np.testing.assert_allclose(change[:, 0], np.stack([VECTOR] * B), atol=1e-6)
    assert not change[:, 1:].any()


def test_keeping_and_removing_a_subspace_add_up(model):
    site = dict(site="q")
    seen = lambda fwd: np.asarray(run(record(fwd, "q"), model).seen["q"])[0]
    kept = seen(keep_subspace(forward, BASIS, **site))
    lost = seen(project_out(forward, BASIS, **site))
    np.testing.assert_allclose(kept + lost, seen(as_tapped(forward)), atol=1e-5)
    whole = orthonormal_basis(RNG.normal(size=(L, H, D, D)))
    np.testing.assert_allclose(
        seen(keep_subspace(forward, whole, **site)), seen(as_tapped(forward)), atol=1e-5
    )
    rank = np.linalg.matrix_rank(kept[:, :, 0].reshape(-1, D), tol=1e-4)
    assert rank == 2


def test_orthonormal_basis_pads_with_zeros():
    vectors = RNG.normal(size=(3, D, 1)) @ np.ones((1, 3))
    basis = np.asarray(orthonormal_basis(vectors))
    assert basis.shape == (3, D, 3)
    np.testing.assert_allclose(np.einsum("ndr,nds->nrs", basis, basis)[:, 0, 0], 1, atol=1e-6)
    assert not basis[..., 1:].any()
    direction = vectors[..., :1] / np.linalg.norm(vectors[..., :1], axis=-2, keepdims=True)
    np.testing.assert_allclose(
        np.einsum("ndr,ner->nde", basis, basis), direction @ direction.swapaxes(1, 2), atol=1e-6
    )
    assert orthonormal_basis(np.zeros((D, 2))).sum() == 0
    with pytest.raises(ValueError, match="rank=5 must be from 1 to 3"):
        orthonormal_basis(vectors, rank=5)


def test_uniform_decoding(model):
    """Prefill as usual; then every visible key gets the same attention."""
    fwd = record(mask_heads(forward, [(0, 1), (1, 3)], "uniform_decode"), "pattern")
    step = jax.jit(lambda fwd, tokens, cache: fwd(model, tokens, cache=cache))
    out = step(fwd, TOKENS[:, :4], init_cache(CFG, B, 8))
    want = step(record(forward, "pattern"), TOKENS[:, :4], init_cache(CFG, B, 8))
    np.testing.assert_allclose(out.seen["pattern"], want.seen["pattern"], atol=1e-6)
    for t in (4, 5):
        out = step(fwd, TOKENS[:, t : t + 1], out.cache)
        rows = np.asarray(out.seen["pattern"])[[0, 1], :, [1, 3], 0]
        even = np.where(np.arange(8) <= t, 1 / (t + 1), 0)
        np.testing.assert_allclose(rows, np.broadcast_to(even, rows.shape), atol=1e-6)
        assert np.abs(np.asarray(out.seen["pattern"])[0, :, 0, 0] - even).max() > 1e-3


def test_decoding_needs_a_cache(model):
    with pytest.raises(ValueError, match="this call has no cache; pass where='all'"):
        mask_heads(forward, [(0, 1)], "uniform_decode")(model, TOKENS)


def test_random_heads():
    exclude = np.zeros((3, 4), bool)
    exclude[0] = True
    drawn = [np.asarray(random_heads(jax.random.key(n), 5, exclude, (3, 4))) for n in range(20)]
    assert all(m.sum() == 5 and not m[0].any() for m in drawn)
    assert len({m.tobytes() for m in drawn}) > 10
    assert np.stack(drawn).any(axis=0)[1:].all()
    assert random_heads(jax.random.key(0), 12, None, (3, 4)).all()
    with pytest.raises(ValueError, match="cannot be drawn from 8"):
        random_heads(jax.random.key(0), 9, exclude, (3, 4))


def test_pruning_folds_into_the_weights(model):
    keep = RNG.uniform(size=(L, H)) > 0.5
    want = run(prune_heads(forward, keep), model).logits
    folded = fold_pruned(model, keep)
    np.testing.assert_allclose(run(as_tapped(forward), folded).logits, want, atol=1e-5)
    assert np.abs(want - run(as_tapped(forward), model).logits).max() > 1e-3
    with pytest.raises(ValueError, match=r"keep has shape \(2, 2\)"):
        fold_pruned(model, np.ones((L, K)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AffineEdit("z", np.ones((1,) * 6)), r"broadcast to \[L,B,T,H,D\]"),
        (lambda: AffineEdit("lse", 2.0), "read-only"),
        (lambda: AffineEdit("blocks.1.attn.hook_z", 0.0), "takes the site 'z' and a gate"),
        (lambda: intervene_per_head(forward, AffineEdit("z", np.ones((3, 1, 1, H, 1)))), "L=2"),
        (lambda: steer(forward, VECTOR), "layers= is needed"),
        (lambda: steer(forward, VECTOR[:3], layers=0), r"needs \[16\] or \[2, 16\]"),
        (lambda: steer(forward, VECTOR, site="q", layers=0), r"\[B,T,H,D\]; a vector"),
        (lambda: steer(forward, VECTOR, layers=[0, 5]), "layer 5 is out of range"),
        (lambda: steer(forward, VECTOR, layers=0, scale=np.ones(3)), "3 rows; the batch has 2"),
        (lambda: steer(forward, VECTOR, layers=0, scale=np.ones((2, 2))), "a number, or"),
        (lambda: project_out(forward, 2 * BASIS, site="q"), "not orthonormal.*orthonormal_basis"),
        (lambda: project_out(forward, BASIS, site="k"), r"\[2, 2\], layers x key/value heads"),
        (lambda: project_out(forward, BASIS[0], site="q"), r"needed \[L,H,D,R\]"),
        (lambda: project_out(forward, BASIS, site="pattern"), "subspaces are of"),
        (lambda: keep_subspace(forward, np.eye(3)[None, None].repeat(L, 0), site="q"),
         "have 4 numbers"),
        (lambda: keep_subspace(forward, BASIS, site="q", mean=np.zeros(D)), "mean has shape"),
        (lambda: mask_heads(forward, [(0, 0)], "random"), "uniform_decode, zero_output"),
        (lambda: mask_heads(forward, [(0, 0)], "zero_output", where="later"), "a column of the"),
        (lambda: mask_heads(forward, [(0, 0)], "zero_output", where=0.5), "must be a column"),
        (lambda: mask_heads(forward, np.ones((L, K)), "zero_output"), "key/value heads: act on"),
        (lambda: mask_heads(forward, [(0, 7)], "zero_output"), "head 0.7 is out of range"),
    ],
)  # fmt: skip
def test_what_does_not_fit(model, make, message):
    with pytest.raises(ValueError, match=message):
        make()(model, TOKENS)
