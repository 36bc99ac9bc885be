"""Problems whose sequence is split over devices, and their float64 answers."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.attention import distributed_attention, shard_sequence, unshard_sequence
from tests.attention.naive import naive_attention, value_and_grads

BATCH, HEAD_DIM = 2, 8
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625, 0.03, 0.02, 0.01, 0.005], np.float32)


def make_mesh(data=1, heads=1, seq=1):
    sizes = (data, heads, seq)
    types = (jax.sharding.AxisType.Auto,) * 3
    devices = jax.devices()[: data * heads * seq]
    return jax.make_mesh(sizes, ("data", "model", "context"), axis_types=types, devices=devices)


def segments(length, seed=0):
    """Packed documents, the last tokens of the first row padding."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(1, 4, (BATCH, length)), axis=1)
    ids[0, -length // 8 :] = 0
    return ids.astype(np.int32)


# name -> options of the call, given T and S; arrays are in the order of the text.
MASKS = {
    "full": lambda t, s: {},
    "causal": lambda t, s: {"causal": True},
    "window": lambda t, s: {"causal": True, "window": 7},
    "two-sided": lambda t, s: {"window": (5, 9)},
    "segments": lambda t, s: {"causal": True, "segment_ids": segments(t)},
    "lengths": lambda t, s: {"kv_lengths": np.array([s // 3, s], np.int32)},
    "empty rows": lambda t, s: {"window": (2, 0), "kv_lengths": np.array([s // 4, 0], np.int32)},
    "prefix": lambda t, s: {"causal": True, "prefix_lengths": np.array([s // 2, 3], np.int32)},
    "alibi": lambda t, s: {"causal": True, "alibi_slopes": SLOPES},
    "soft cap": lambda t, s: {"causal": True, "soft_cap": 1.5},
}


def visible(num_queries, num_keys, causal=False, window=None, segment_ids=None,
            kv_segment_ids=None, kv_lengths=None, prefix_lengths=None, **other):  # fmt: skip
    """[B,T,S] bool from the sentences of the docstring."""
    t, s = np.arange(num_queries)[None, :, None], np.arange(num_keys)[None, None, :]
    out = np.ones((BATCH, num_queries, num_keys), bool)
    if window is not None:
        left, right = (window - 1, window - 1) if isinstance(window, int) else window
        out &= (t - s <= left) & (s - t <= right)
    if causal:
        out &= s <= t
    if prefix_lengths is not None:
        out |= s < prefix_lengths[:, None, None]
    if segment_ids is not None:
        keys = segment_ids if kv_segment_ids is None else kv_segment_ids
        out &= (segment_ids[:, :, None] == keys[:, None, :]) & (keys[:, None, :] != 0)
    if kv_lengths is not None:
        out &= s < kv_lengths[:, None, None]
    return out


def make_arrays(num_heads, num_kv_heads, num_queries, num_keys, size=1.0, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return {
        "q": normal(BATCH, num_queries, num_heads, HEAD_DIM) * np.float32(size),
        "k": normal(BATCH, num_keys, num_kv_heads, HEAD_DIM),
        "v": normal(BATCH, num_keys, num_kv_heads, HEAD_DIM),
    }


def cotangents(arrays, seed=1):
    rng = np.random.default_rng(seed)
    batch, num_queries, num_heads, _ = arrays["q"].shape
    dz = rng.normal(size=arrays["q"].shape).astype(np.float32)
    return dz, rng.normal(size=(batch, num_heads, num_queries)).astype(np.float32)


def exact(arrays, options):
    """((z, lse), gradients) in float64, with the softmax shifted by its highest score."""
    num_queries, num_keys = arrays["q"].shape[1], arrays["k"].shape[1]
    sees = visible(num_queries, num_keys, **options)[:, None]
    gap = np.abs(np.arange(num_queries)[:, None] - np.arange(num_keys)[None, :])
    arrays = dict(arrays)
    if "alibi_slopes" in options:
        arrays["alibi_slopes"] = options["alibi_slopes"][: arrays["q"].shape[2]]
    with jax.enable_x64(True):
        double = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
        dz, dlse = cotangents(arrays)
        scale, cap = HEAD_DIM**-0.5, options.get("soft_cap")
        function = lambda arrays: naive_attention(arrays, sees, gap, scale, cap)
        out, grads = value_and_grads(function, double, dz, dlse, jit=lambda f: f)
        return jax.tree.map(np.asarray, (out, {name: grads[name] for name in "qkv"}))


def split(arrays, options, mesh, schedule, layout, **more):
    """The same from `distributed_attention`; inputs and results in the order of the text."""
    n = mesh.shape["context"]
    deal = lambda x: shard_sequence(jnp.asarray(x), layout, n)
    options = dict(options)
    for name in ("segment_ids", "kv_segment_ids"):
        if name in options:
            options[name] = deal(options[name])
    if "alibi_slopes" in options:
        options["alibi_slopes"] = jnp.asarray(options["alibi_slopes"][: arrays["q"].shape[2]])

    def attend(arrays):
        q, k, v = (deal(arrays[name]) for name in "qkv")
        out = distributed_attention(
            q,
            k,
            v,
            mesh=mesh,
            schedule=schedule,
            layout=layout,
            return_lse=True,
            **{"block_q": 8, "block_k": 8, **options, **more},
        )
        return unshard_sequence(out.z, layout, n), unshard_sequence(out.lse, layout, n, axis=2)

    return value_and_grads(attend, arrays, *cotangents(arrays))


def assert_exact(found, wanted, rtol=1e-5):
    """Agreement relative to the largest entry of each array; -inf in the same places."""
    (out, grads), (true_out, true_grads) = found, wanted
    for name, a, b in [
        ("z", out[0], true_out[0]),
        ("lse", out[1], true_out[1]),
        *((f"d{name}", grads[name], true_grads[name]) for name in true_grads),
    ]:
        a, b = np.asarray(a), np.asarray(b)
        is_finite = np.isfinite(b)
        np.testing.assert_array_equal(np.isfinite(a), is_finite, err_msg=name)
        scale = max(1.0, np.abs(b[is_finite]).max(initial=0))
        np.testing.assert_allclose(
            a[is_finite] / scale, b[is_finite] / scale, rtol=0, atol=rtol, err_msg=name
        )
