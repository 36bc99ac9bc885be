"""Landmark attention against its definition, a query at a time in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxheads as jh
from jaxheads.attention import Mask, attention, grouped_softmax, landmark_attention
from jaxheads.attention.landmark import insert_landmarks, landmark_places, strip_landmarks

B, H, D = 2, 4, 8


def arrays(length, num_kv_heads=2, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda heads: jnp.asarray(rng.normal(size=(B, length, heads, D)), jnp.float32)
    return normal(H), normal(num_kv_heads), normal(num_kv_heads)


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def naive(q, k, v, is_landmark, ids=None, scale=D**-0.5):
    """y [B,T,H,D] and weights [B,H,T,S], from the sentences of the definition."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    is_landmark = np.asarray(is_landmark)
    length, first = k.shape[1], k.shape[1] - q.shape[1]
    ids = np.ones((B, length), int) if ids is None else np.asarray(ids)
    weights = np.zeros((B, H, q.shape[1], length))
    for b, h, t in np.ndindex(B, H, q.shape[1]):
        i, group = t + first, h // (H // k.shape[2])
        landmark = is_landmark[b] & (ids[b] != 0)
        block = [int(landmark[:j].sum()) for j in range(length)]
        s = scale * k[b, :, group] @ q[b, t, h]
        sees = [j for j in range(i + 1) if ids[b, j] == ids[b, i] != 0]
        own = [j for j in sees if block[j] == block[i] and not landmark[j]]
        gates = [j for j in sees if landmark[j] and block[j] < block[i]]
        if not own + gates:
            continue
        first_softmax = dict(zip(own + gates, softmax(s[own + gates])))
        for j in own:
            weights[b, h, t, j] = first_softmax[j]
        for gate in gates:
            inside = [j for j in sees if block[j] == block[gate] and not landmark[j]]
            if inside:
                weights[b, h, t, inside] = first_softmax[gate] * softmax(s[inside])
    values = np.repeat(v, H // k.shape[2], axis=2)
    return np.einsum("bhts,bshd->bthd", weights, values), weights


dense = jax.jit(functools.partial(landmark_attention, return_weights=True))
DZ = np.random.default_rng(9).normal(size=(B, 64, H, D)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("impl", "block_size"))
def grads(q, k, v, is_landmark, mask=None, impl="dense", block_size=None):
    def loss(q, k, v):
        y = landmark_attention(q, k, v, is_landmark, mask=mask, impl=impl, block_size=block_size)
        return (y * DZ[:, : q.shape[1]]).sum(), y

    (_, y), found = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return y, found


LENGTH = 17
IRREGULAR = np.zeros((B, LENGTH), bool)
IRREGULAR[0, [0, 4, 5, 11, 12, 13]] = True  # first of all, and beside each other
IRREGULAR[1, [2, 8, 16]] = True
IDS = np.array([[1] * 14 + [0] * 3, [0] * 3 + [1] * 6 + [2] * 8])


@pytest.mark.parametrize("ids", [None, IDS])
def test_any_placement_equals_the_definition(ids):
    q, k, v = arrays(LENGTH)
    mask = None if ids is None else Mask(is_causal=True, q_segment_ids=jnp.asarray(ids))
    y, weights = dense(q, k, v, jnp.asarray(IRREGULAR), mask=mask)
    want_y, want = naive(q, k, v, IRREGULAR, ids)
    np.testing.assert_allclose(weights, want, atol=1e-6)
    np.testing.assert_allclose(y, want_y, atol=1e-5)
    if ids is None:
        assert (y[0, 0] == 0).all()  # a landmark that nothing precedes
        assert (weights.sum(-1)[0, :, 14] < 0.999).any()  # an empty block took its share
        last = slice(12, 17)
        suffix, _ = dense(q[:, last], k, v, jnp.asarray(IRREGULAR))
        np.testing.assert_allclose(suffix, y[:, last], atol=1e-6)


def test_gradients_are_differences():
    q, k, v = arrays(LENGTH)
    mask = Mask(is_causal=True, q_segment_ids=jnp.asarray(IDS))
    _, found = grads(q, k, v, jnp.asarray(IRREGULAR), mask)
    inputs = [np.asarray(x, np.float64) for x in (q, k, v)]
    value = lambda inputs: (naive(*inputs, IRREGULAR, IDS)[0] * DZ[:, :LENGTH]).sum()
    for n, grad in enumerate(found):
        assert np.isfinite(grad).all()
        step = 1e-5 * np.random.default_rng(n).normal(size=grad.shape)
        ahead, behind = (
            value([x + sign * step if m == n else x for m, x in enumerate(inputs)])
            for sign in (1, -1)
        )
        np.testing.assert_allclose((grad * step).sum(), (ahead - behind) / 2, rtol=1e-4)


@pytest.mark.parametrize(("block", "length"), [(7, 48), (7, 72), (63, 128)])
def test_fused_equals_dense(block, length, monkeypatch):
    monkeypatch.setattr("jaxheads.attention.landmark_blocks.TILE", 16)  # several tiles
    q, k, v = arrays(length)
    q = q[:, -64:] if length > 64 else q
    is_landmark = jnp.asarray(np.tile(landmark_places(length, block), (B, 1)))
    ids = np.ones((B, length), np.int32)
    ids[0, -3:], ids[1, :5], ids[1, 10:] = 0, 0, 2  # padding, and a document from inside a block
    mask = Mask(is_causal=True, q_segment_ids=jnp.asarray(ids))
    y, found = grads(q, k, v, is_landmark, mask, impl="fused", block_size=block)
    want_y, want = grads(q, k, v, is_landmark, mask)
    np.testing.assert_allclose(y, want_y, atol=1e-5)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert (y[0, -3:] == 0).all()


def test_rows_sum_to_one_and_no_landmarks_is_plain_causal():
    q, k, v = arrays(LENGTH)
    regular = jnp.asarray(np.tile(landmark_places(LENGTH, 3), (B, 1)))
    _, weights = dense(q, k, v, regular)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert (weights[:, :, :, 3::4] == 0).all()
    y, _ = dense(q, k, v, jnp.zeros_like(regular))
    np.testing.assert_allclose(y, attention(q, k, v), atol=1e-6)


def test_grouped_softmax():
    rng = np.random.default_rng(0)
    scores, ids = rng.normal(size=(3, 9)) * 50, rng.integers(0, 4, (3, 9))
    where = rng.random((3, 9)) < 0.8
    found = grouped_softmax(jnp.asarray(scores), jnp.asarray(ids), num_groups=4, where=where)
    want = np.zeros((3, 9))
    for row, group in np.ndindex(3, 4):
        members = np.flatnonzero((ids[row] == group) & where[row])
        if members.size:
            want[row, members] = softmax(scores[row, members])
    np.testing.assert_allclose(found, want, atol=1e-5)
    with pytest.raises(ValueError, match="run from 0 to 3, outside 0 to 2"):
        grouped_softmax(jnp.asarray(scores), jnp.asarray(ids), num_groups=3)
    late = jax.jit(functools.partial(grouped_softmax, num_groups=3))(scores, jnp.asarray(ids))
    np.testing.assert_array_equal(np.isnan(late), ids == 3)


def test_group_dropout_takes_gates_only():
    q, k, v = arrays(16)
    regular = jnp.asarray(np.tile(landmark_places(16, 3), (B, 1)))
    _, whole = dense(q, k, v, regular)
    _, some = jax.jit(
        functools.partial(landmark_attention, group_dropout=0.5, return_weights=True)
    )(q, k, v, regular, key=jax.random.key(1))
    blocks = lambda w: np.asarray(w).reshape(B, H, 4, 4, 4, 4)  # query block, query, block, token
    whole, some = blocks(whole), blocks(some)
    ratio = []
    for mine in range(4):
        np.testing.assert_array_equal(some[:, :, mine, :, mine], whole[:, :, mine, :, mine])
        far = (slice(None), slice(None), mine, slice(None), slice(0, mine), slice(0, 3))
        ratio.append((some[far] / whole[far]).reshape(-1, 3))
    ratio = np.concatenate(ratio)
    np.testing.assert_allclose(ratio.min(-1), ratio.max(-1), atol=1e-5)  # whole blocks
    np.testing.assert_allclose(np.unique(ratio.round(4)), [0, 2])


def test_sharded_equals_single():
    q, k, v = arrays(24)
    regular = jnp.asarray(np.tile(landmark_places(24, 7), (B, 1)))
    want = grads(q, k, v, regular, impl="fused", block_size=7)
    mesh = jh.parallel.make_mesh("data:2,model:2", devices=jax.devices()[:4])
    spec = jax.NamedSharding(mesh, jax.P("data", None, "model"))
    placed = [jax.device_put(x, spec) for x in (q, k, v)]
    with jax.set_mesh(mesh):
        y, found = grads(*placed, regular, impl="fused", block_size=7)
    np.testing.assert_allclose(y, want[0], atol=1e-5)
    for a, b in zip(found, want[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert y.sharding.spec[2] == "model"


def test_landmarks_go_in_and_out():
    text = np.arange(1, 12)
    assert insert_landmarks(text[:7], 3, 0).tolist() == [1, 2, 3, 0, 4, 5, 6, 0, 7]
    whole = insert_landmarks(text, 3, 0)
    pieces = [insert_landmarks(text[:4], 3, 0), insert_landmarks(text[4:], 3, 0, phase=1)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    np.testing.assert_array_equal(whole == 0, landmark_places(len(whole), 3))
    np.testing.assert_array_equal(strip_landmarks(np.stack([whole] * 2), 0), [text] * 2)
    np.testing.assert_array_equal(jax.jit(lambda x: insert_landmarks(x, 3, 0))(text), whole)
    assert insert_landmarks(np.zeros((2, 0), int), 3, 9).shape == (2, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: insert_landmarks([1], 0, 5), "block_size=0 must be at least 1"),
        (lambda: insert_landmarks([1, 5], 2, 5), "insert landmarks once"),
        (lambda: insert_landmarks([1], 2, -1), "landmark_id=-1 is no token id"),
        (lambda: insert_landmarks([1], 2, 5, phase=2), "phase=2 must be from 0 to"),
        (lambda: strip_landmarks([[1, 0], [1, 1]], 0), "rows hold 1 to 2 tokens"),
        (lambda: attend(impl="flash"), "'flash'"),
        (lambda: attend(is_landmark=jnp.zeros((B, 3), bool)), r"needed bool \[B,S\] = \(2, 8\)"),
        (lambda: attend(impl="fused"), "needs block_size"),
        (lambda: attend(impl="fused", block_size=4), r"multiples of block_size \+ 1 = 5"),
        (lambda: attend(impl="fused", block_size=3), "token 3 differs"),
        (lambda: attend(group_dropout=0.5), "pass key=jax.random.key"),
        (lambda: attend(group_dropout=1.0), "below 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def attend(is_landmark=None, **options):
    q, k, v = arrays(8)
    is_landmark = jnp.zeros((B, 8), bool) if is_landmark is None else is_landmark
    return landmark_attention(q, k, v, is_landmark, **options)


def test_what_only_dense_can():
    with pytest.raises(NotImplementedError, match="need impl='dense'"):
        attend(impl="fused", block_size=7, return_weights=True)
    with pytest.raises(NotImplementedError, match="a mask with a sliding window"):
        attend(mask=Mask(is_causal=True, window=3))
    with pytest.raises(ValueError, match="of keys has shape"):
        attend(mask=jnp.ones((B, 3), bool))
