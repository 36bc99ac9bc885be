"""The repeated passages are repeated, and the claims can fail."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import rcmha


def test_what_is_asked_for_was_there_before():
    batch = rcmha.repeated(jax.random.key(0), rcmha.LENGTH, 64)
    tokens, asked = np.asarray(batch.tokens), np.asarray(batch.weights) > 0
    row, place = np.nonzero(asked)
    shift = np.asarray(batch.shift)[row]
    assert (tokens[row, place + 1] == tokens[row, place + 1 - shift]).all()
    assert (tokens[row, place] == tokens[row, place - shift]).all()  # the cue was there, too
    sizes = asked.sum(1)
    assert sizes.min() == 7 and sizes.max() == 15  # 8 to 16 without the first
    assert (np.asarray(batch.shift) >= sizes + 1).all() and len(set(shift)) > 20


def test_frozen_kernels_are_the_identity():
    build = lambda: rcmha.TransformerXL(rcmha.induction_config("frozen"), rngs=nnx.Rngs(0))
    layers = rcmha.freeze("frozen", build()).layers
    kernel = np.zeros((1, 3, 16))
    kernel[:, 2] = 1
    for name in "qkv":
        np.testing.assert_array_equal(getattr(layers, f"{name}_kernel")[...], kernel)
        assert (getattr(layers, f"{name}_bias")[...] == 0).all()


def test_claims_follow_the_numbers():
    good = {"mha": 0.1, "rmha": 0.1, "mdha": 0.95, "rcmha": 0.95, "frozen": 0.1}
    accuracy = {(n, t): np.full(3, a) for n, a in good.items() for t in (64, 128)}
    accuracy["mdha", 128] = np.full(3, 0.8)
    weights = np.asarray([0.6, 0.7, 0.5])
    assert all(claim.holds for claim in rcmha.induction_claims(accuracy, weights))
    accuracy["frozen", 64] = accuracy["rmha", 64] = np.full(3, 0.9)
    holds = [claim.holds for claim in rcmha.induction_claims(accuracy, weights / 2)]
    assert holds == [True, False, True, False, False]
    assert rcmha.text_claim(np.asarray([2.0, 2.1, 2.2]), np.asarray([1.9, 2.0, 2.1])).holds
    assert not rcmha.text_claim(np.asarray([2.0, 2.3, 2.0]), np.asarray([1.9, 2.0, 2.1])).holds


def test_windows_hold_two_segments():
    rows = rcmha.windows(jax.random.key(0), jnp.arange(200, dtype=jnp.uint8))
    assert rows.shape == (rcmha.BATCH, 65) and (jnp.diff(rows, axis=1) == 1).all()
