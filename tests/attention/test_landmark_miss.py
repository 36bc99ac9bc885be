"""Landmark attention with a context-miss token against its definition, a query at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention import Mask, landmark_attention, landmark_miss_attention
from tests.attention.test_landmark import IDS, IRREGULAR, LENGTH, B, D, H, arrays, softmax

CONTROLLED = np.random.default_rng(3).random((B, LENGTH)) < 0.5
CUTOFF = 0.3


def miss_key(seed=5):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, 2, D)), jnp.float32)


def naive(q, k, v, key, controlled, ids, cutoff):
    """y [B,T,H,D] and the miss token's shares [B,H,T], from the sentences of the definition."""
    q, k, v, key = (np.asarray(x, np.float64) for x in (q, k, v, key))
    y, shares = np.zeros(q.shape), np.zeros((B, H, LENGTH))
    for b, h, i in np.ndindex(B, H, LENGTH):
        landmark = IRREGULAR[b] & (ids[b] != 0)
        block = [int(landmark[:j].sum()) for j in range(LENGTH)]
        s = D**-0.5 * k[b, :, h // 2] @ q[b, i, h]
        sees = [j for j in range(i + 1) if ids[b, j] == ids[b, i] != 0]
        own = [j for j in sees if block[j] == block[i] and not landmark[j]]
        gates = [j for j in sees if landmark[j] and block[j] < block[i]]
        free = [j for j in gates if not controlled[b, j]]
        held = [j for j in gates if controlled[b, j]]
        first = softmax([*s[own + free], D**-0.5 * key[b, h // 2] @ q[b, i, h]])
        share = first[-1] if first[-1] >= cutoff else 0.0
        shares[b, h, i] = share
        weight = dict(zip(own + free, first[:-1]))
        if held:
            weight |= dict(zip(held, share * softmax(s[held])))
        for j in own:
            y[b, i, h] += weight[j] * v[b, j, h // 2]
        for gate in gates:
            inside = [j for j in sees if block[j] == block[gate] and not landmark[j]]
            if inside:
                y[b, i, h] += weight[gate] * softmax(s[inside]) @ v[b, inside, h // 2]
    return y, shares


@jax.jit
def run(q, k, v, key, controlled, mask):
    both = [
        landmark_miss_attention(
            q, k, v, jnp.asarray(IRREGULAR), key, controlled, mask=mask, rem_cutoff=cutoff
        )
        for cutoff in (0.0, CUTOFF)
    ]
    loss = lambda *x: landmark_miss_attention(
        *x[:3], jnp.asarray(IRREGULAR), x[3], controlled, mask=mask
    ).y.sum()
    return both, jax.grad(loss, (0, 1, 2, 3))(q, k, v, key)


def test_equals_the_definition():
    """With landmarks anywhere, documents and padding, with a cutoff and without."""
    q, k, v = arrays(LENGTH)
    mask = Mask(is_causal=True, q_segment_ids=jnp.asarray(IDS))
    found, grads = run(q, k, v, miss_key(), jnp.asarray(CONTROLLED), mask)
    for cutoff, out in zip((0.0, CUTOFF), found, strict=True):
        y, shares = naive(q, k, v, miss_key(), CONTROLLED, IDS, cutoff)
        np.testing.assert_allclose(out.y, y, atol=1e-5)
        np.testing.assert_allclose(out.miss, shares, atol=1e-5)
        assert (out.weights.sum(-1) < 1.00001).all()
    assert 0 < (found[1].miss == 0).sum() < found[1].miss.size
    assert not np.allclose(found[0].y, found[1].y, atol=1e-3)
    assert all(np.isfinite(x).all() and (x != 0).any() for x in grads)


def test_a_token_that_nobody_wants_leaves_landmark_attention():
    """All landmarks free, and a key that scores far below the others."""
    q, k, v = arrays(LENGTH)
    q = q.at[..., 0].set(1.0)
    mask = Mask(is_causal=True, q_segment_ids=jnp.ones((B, LENGTH), int))
    far = jnp.zeros((B, 2, D)).at[..., 0].set(-1e4)
    out, _ = run(q, k, v, far, jnp.zeros((B, LENGTH), bool), mask)
    want = landmark_attention(q, k, v, jnp.asarray(IRREGULAR))
    np.testing.assert_allclose(out[0].y, want, atol=1e-6)
    assert (out[0].miss[0, :, 0] == 1).all()  # of a landmark that nothing precedes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"miss_key": jnp.zeros((B, H, D))}, r"needed \[B,K,D\] = \(2, 2, 8\)"),
        ({"is_controlled": jnp.zeros((B, 3), bool)}, r"needed bool \[B,S\] = \(2, 17\)"),
        ({"rem_cutoff": 1.5}, "rem_cutoff=1.5 is a share"),
        ({"is_landmark": jnp.zeros((B, LENGTH))}, "is_landmark has shape"),
    ],
)
def test_bad_input(change, message):
    given = dict(
        is_landmark=jnp.asarray(IRREGULAR), miss_key=miss_key(),
        is_controlled=jnp.asarray(CONTROLLED),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        landmark_miss_attention(*arrays(LENGTH), **(given | change))
