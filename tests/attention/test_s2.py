"""S2-attention against the formula in float64, and its limits, chunks and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention import attention
from jaxheads.attention.s2 import ShardPattern, merge_partitions, s2_attention

HEAD_DIM = 8
SLOW = pytest.mark.slow

# pattern, T
CASES = {
    "heterogeneous": (ShardPattern(16, 2, 4, 4), 192),
    "one local block": (ShardPattern(16, 1, 4, 4), 160),
    "gqa, dense head, offset": (
        ShardPattern(16, 2, 4, 8, 4, head_offset=3, num_dense_heads=1),
        192,
    ),
    "stride > heads": (ShardPattern(16, 1, 8, 2, allow_incomplete_union=True), 272),
    "homogeneous": (ShardPattern(16, 2, 4, 4, homogeneous=True), 192),
    "ragged length": (ShardPattern(16, 2, 4, 4), 181),
    "wide window": (ShardPattern(32, 3, 2, 2), 250),
    "bidirectional": (ShardPattern(16, 2, 3, 2, causal=False), 176),
    "bidirectional, two sides, dense head": (
        ShardPattern(16, (1, 2), 3, 4, 2, num_dense_heads=1, causal=False),
        170,
    ),
    "bidirectional, absolute": (
        ShardPattern(16, 1, 3, 4, causal=False, position="absolute"),
        176,
    ),
    "causal, relative": (ShardPattern(16, 2, 3, 2, position="relative"), 181),
    "ranges": (ShardPattern(16, 1, 1, 4, ranges=((2, 1), (5, 2), (float("inf"), 4))), 200),
    "ranges without the diagonal": (
        ShardPattern(16, 1, 1, 4, ranges=((4, 2), (float("inf"), 4))),
        200,
    ),
    "residues": (ShardPattern(16, 1, 3, 3, residues=(1, 0, 2)), 192),
    "stride 1": (ShardPattern(16, 2, 1, 2), 100),
    "window >= T": (ShardPattern(16, 8, 4, 4), 100),
}


def arrays(pattern, length, num_keys=None, dtype=jnp.float32, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    num_keys = length if num_keys is None else num_keys
    q = normal(batch, length, pattern.num_heads, HEAD_DIM)
    k = normal(batch, num_keys, pattern.kv_heads, HEAD_DIM)
    return q, k, normal(batch, num_keys, pattern.kv_heads, HEAD_DIM)


def visible_tokens(p, length):
    """[H,T,T] bool, one entry at a time from the spec's sentences."""
    n = -(-length // p.block)
    left, right = p.window
    out = np.zeros((p.num_heads, length, length), bool)
    for head in range(p.num_heads):
        kv_head = head // (p.num_heads // p.num_kv_heads)
        blocks = np.zeros((n, n), bool)
        for i in range(n):
            for j in range(n):
                if p.ranges is not None:
                    low = 0
                    sees = i == j
                    for high, stride in p.ranges:
                        step = max(1, stride // p.num_heads)
                        kept = (j + kv_head * step + p.head_offset) % stride == 0
                        sees |= low <= abs(i - j) < high and kept
                        low = high
                elif p.position == "relative":
                    l, u = max(0, i - j - left + 1), max(0, j - i - right + 1)
                    sees = (l + u) % p.stride == 0
                else:
                    step = max(1, p.stride // p.num_heads)
                    residue = -((0 if p.homogeneous else kv_head) * step + p.head_offset) % p.stride
                    if p.residues is not None:
                        residue = p.residues[kv_head]
                    near = (i - j < left) and (j - i < right)
                    sees = near or j % p.stride == residue
                sees |= kv_head >= p.num_kv_heads - p.num_dense_heads
                blocks[i, j] = sees and (not p.causal or j <= i)
        tokens = np.kron(blocks, np.ones((p.block, p.block), bool))[:length, :length]
        out[head] = np.tril(tokens) if p.causal else tokens
    return out


def naive(q, k, v, visible):
    """z and lse of softmax attention, in the dtype of the inputs (float64 under x64)."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = jnp.where(visible, jnp.exp(scores), 0)
    total = weights.sum(-1)
    z = jnp.einsum("bhts,bshw->bthw", weights / total[..., None], v)
    return z, jnp.log(total)


def outcome(f, q, k, v):
    """z, lse and the gradients of a fixed functional of both: what an implementation is."""

    def functional(q, k, v):
        z, lse = f(q, k, v)
        rng = np.random.default_rng(7)
        loss = (z * rng.normal(size=z.shape)).sum() + (lse * rng.normal(size=lse.shape)).sum()
        return loss, (z, lse)

    grads, out = jax.jit(jax.grad(functional, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return dict(zip(("z", "lse", "dq", "dk", "dv"), (*out, *grads), strict=True))


@pytest.mark.parametrize("impl", [pytest.param("dense", marks=SLOW), "blocked"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula_in_float64(case, impl):
    pattern, length = CASES[case]
    inputs = arrays(pattern, length)
    f = functools.partial(s2_attention, pattern=pattern, impl=impl, return_lse=True)
    found = outcome(f, *inputs)
    visible = visible_tokens(pattern, length)
    np.testing.assert_array_equal(pattern.token_mask(length), visible)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x), jnp.float64) for x in inputs]
        wanted = outcome(lambda q, k, v: naive(q, k, v, visible), *exact)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("pattern", [ShardPattern(16, 2, 1, 4, 2), ShardPattern(16, 13, 2, 4, 2)])
@pytest.mark.parametrize("impl", ["dense", "blocked"])
def test_stride_one_and_wide_windows_are_dense_attention(pattern, impl):
    q, k, v = arrays(pattern, 200)
    wanted = attention(q, k, v, return_lse=True)
    z, lse = s2_attention(q, k, v, pattern, impl=impl, return_lse=True)
    np.testing.assert_allclose(z, wanted.z, atol=2e-6)
    np.testing.assert_allclose(lse, wanted.lse, atol=2e-6)


CHUNKS = {
    "one kv": [(0, 160)],
    "two kv": [(0, 80), (80, 160)],
    "ring": [(0, 48), (48, 96), (96, 144), (144, 160)],
}


@pytest.mark.parametrize("impl", [pytest.param("dense", marks=SLOW), "blocked"])
@pytest.mark.parametrize("chunks", [pytest.param("one kv", marks=SLOW), "two kv", "ring"])
def test_chunks_merge_into_the_whole(chunks, impl):
    """Queries in chunks, each over chunks of keys, joined by their lse; gradients included."""
    pattern = ShardPattern(16, 2, 4, 8, 4, num_dense_heads=1)
    inputs = arrays(pattern, 160)

    def merged(q, k, v):
        rows = []
        for start, stop in CHUNKS["two kv" if chunks == "one kv" else chunks]:
            parts = [
                s2_attention(
                    q[:, start:stop], k[:, low:high], v[:, low:high], pattern,
                    q_start=start, kv_start=low, impl=impl, return_lse=True,
                )
                for low, high in CHUNKS[chunks]
            ]  # fmt: skip
            rows.append(merge_partitions([z for z, _ in parts], [lse for _, lse in parts]))
        return jnp.concatenate([z for z, _ in rows], 1), jnp.concatenate([x for _, x in rows], 2)

    whole = functools.partial(s2_attention, pattern=pattern, impl="dense", return_lse=True)
    found, wanted = outcome(merged, *inputs), outcome(whole, *inputs)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("impl", ["dense", "blocked"])
def test_a_chunk_that_contributes_nothing(impl):
    pattern = ShardPattern(16, 1, 4, 4)
    q, k, v = arrays(pattern, 32)
    later = functools.partial(
        s2_attention, pattern=pattern, q_start=0, kv_start=64, impl=impl, return_lse=True
    )
    z, lse = later(q, k, v)
    assert (z == 0).all() and (lse == -jnp.inf).all()
    grads = jax.grad(lambda *a: later(*a)[0].sum(), argnums=(0, 1, 2))(q, k, v)
    assert all((g == 0).all() for g in grads)


def test_traced_chunk_starts():
    pattern = ShardPattern(16, 2, 4, 4)
    q, k, v = arrays(pattern, 64, 96)
    f = functools.partial(s2_attention, pattern=pattern, impl="blocked")
    traced = jax.jit(lambda a, b: f(q, k, v, q_start=a, kv_start=b))
    for starts in ((96, 16), (32, 0), (0, 64)):
        wanted = s2_attention(q, k, v, pattern, q_start=starts[0], kv_start=starts[1], impl="dense")
        np.testing.assert_allclose(traced(*starts), wanted, atol=1e-5)


@pytest.mark.parametrize("case", ["gqa, dense head, offset", "bidirectional", "ragged length"])
def test_segments(case):
    pattern, length = CASES[case]
    q, k, v = arrays(pattern, length)
    ids = np.ones((2, length), np.int32)
    ids[0, 70:] = 2
    ids[1, :9] = 0
    found = outcome(
        lambda *a: s2_attention(*a, pattern, segment_ids=ids, impl="blocked", return_lse=True),
        q, k, v,
    )  # fmt: skip
    same = (ids[:, None, :, None] == ids[:, None, None, :]) & (ids[:, None, None, :] != 0)
    visible = jnp.asarray(same & visible_tokens(pattern, length))
    sees = np.asarray(visible.any(-1))  # [B,H,T]
    z, lse = naive(q, k, v, visible)
    np.testing.assert_allclose(
        found["z"], jnp.where(jnp.moveaxis(sees, 1, 2)[..., None], z, 0), atol=1e-5
    )
    np.testing.assert_allclose(found["lse"], jnp.where(sees, lse, -jnp.inf), atol=1e-5)


@pytest.mark.parametrize("impl", ["dense", "blocked"])
def test_bfloat16(impl):
    pattern, length = CASES["gqa, dense head, offset"]
    inputs = arrays(pattern, length, dtype=jnp.bfloat16)
    f = functools.partial(s2_attention, pattern=pattern, impl=impl, return_lse=True)
    found = outcome(f, *inputs)
    wanted = outcome(f, *(x.astype(jnp.float32) for x in inputs))
    for name, value in wanted.items():
        scale = float(jnp.abs(value).max())
        np.testing.assert_allclose(
            found[name].astype(jnp.float32), value, atol=2e-2 * scale, err_msg=name
        )


def test_memory_is_linear_in_the_length():
    """No T x T array, and twice the tokens need about twice the temporary memory."""

    def temporary(length):
        pattern = ShardPattern(16, 2, 4, 4)
        shapes = [jax.ShapeDtypeStruct((1, length, 4, 8), jnp.float32)] * 3
        f = jax.grad(lambda *a: s2_attention(*a, pattern, impl="blocked").sum(), argnums=(0, 1, 2))
        compiled = jax.jit(f).lower(*shapes).compile()
        assert f"{length},{length}" not in compiled.as_text()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.3 * temporary(4096)


def test_bad_input():
    pattern = ShardPattern(16, 2, 4, 4)
    q, k, v = arrays(pattern, 64)
    run = lambda q, k, v, p=pattern, **options: s2_attention(q, k, v, p, **options)
    with pytest.raises(TypeError, match="needed a ShardPattern"):
        run(q, k, v, (16, 2, 4))
    with pytest.raises(ValueError, match="do not fit"):
        run(q, k, v[:, :32])
    with pytest.raises(ValueError, match="do not fit"):
        run(q[..., :4], k, v)
    with pytest.raises(ValueError, match=r"must be \[B,T,H,D\]"):
        run(q[0], k, v)
    with pytest.raises(ValueError, match=r"pattern.for_heads\(start, stop\)"):
        run(q[:, :, :2], k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="q_start=8 is not a multiple of block=16"):
        run(q, k, v, q_start=8)
    with pytest.raises(ValueError, match="last queries have no keys"):
        run(q, k[:, :32], v[:, :32])
    with pytest.raises(ValueError, match="segment_ids has shape"):
        run(q, k, v, segment_ids=jnp.ones((2, 32), jnp.int32))
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        run(q, k, v, impl="fast")
    for impl in ("splash", "pallas_tpu", "pallas_gpu"):
        with pytest.raises(NotImplementedError, match="the platform is cpu"):
            run(q, k, v, impl=impl)
    empty = ShardPattern(16, 1, 1, 4, ranges=((float("inf"), 4),), always_diagonal=False)
    with pytest.raises(ValueError, match="sees no block"):
        run(q, k, v, empty)
