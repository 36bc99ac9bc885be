"""The landmark cache against loops over tokens, heads and blocks, and against the whole text."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxheads as jh
from jaxheads.attention import (
    RopeConfig,
    inverse_frequencies,
    landmark_attention,
    landmark_places,
    rotate,
)
from jaxheads.attention.host_memory import HostBlocks
from jaxheads.attention.landmark_cache import (
    POLICIES,
    LandmarkCache,
    attend_chunk,
    extend,
    init,
    retrieve,
    stingy_positions,
)

B, T, H, K, D, L = 2, 45, 4, 2, 8, 3
P, CHUNK = L + 1, 9
INV_FREQ, _ = inverse_frequencies(RopeConfig(theta=100.0), D)
turn = functools.partial(rotate, inv_freq=INV_FREQ, interleaved=False)


def arrays(length=T, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda heads: jnp.asarray(rng.normal(size=(B, length, heads, D)), jnp.float32)
    return normal(H), normal(K), normal(K)


@functools.partial(jax.jit, static_argnames=("top_k", "policy"))
def step(cache, q, k, v, top_k, policy="per_token_and_head"):
    return attend_chunk(cache, q, k, v, None, top_k, policy, rotate=turn)


def feed(qkv, sizes, num_blocks, top_k, policy="per_token_and_head"):
    """(y, cache, infos) of a text fed in chunks."""
    cache, at, ys, infos = init(B, num_blocks, K, D, block_size=L), 0, [], []
    for size in sizes:
        y, cache, info = step(cache, *(x[:, at : at + size] for x in qkv), top_k, policy)
        ys, infos, at = [*ys, y], [*infos, info], at + size
    return jnp.concatenate(ys, axis=1), cache, infos


def turned(x, position):
    angle = position * INV_FREQ.astype(np.float64)
    a, b = x[: D // 2], x[D // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle),
                           b * np.cos(angle) + a * np.sin(angle)])  # fmt: skip


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def naive(qkv, num_blocks, top_k, policy):
    """y [B,T,H,D] and the blocks read by each token and head, a chunk at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in qkv)
    scale, y, read = D**-0.5, np.zeros(q.shape), {}
    for b, first in np.ndindex(B, T // CHUNK):
        first *= CHUNK
        chunk = range(first, first + CHUNK)
        done = first // P  # complete blocks before the chunk
        held = list(range(max(0, done - num_blocks), done))
        few = len(held) <= top_k
        late = held[-top_k:]
        begin = (len(held) if few else top_k + 1) * P  # position of token done * P
        at = lambda t, begin=begin, done=done: begin + t - done * P

        def scored(block, late=late, begin=begin, done=done):
            places = begin // P - (done - block) if block in late else 0
            return places * P + L

        gamma = np.zeros((CHUNK, H, len(held)))
        for c, h in np.ndindex(CHUNK, H):
            query = turned(q[b, first + c, h], at(first + c))
            keys = [turned(k[b, n * P + L, h // 2], scored(n)) for n in held]
            if held:
                gamma[c, h] = softmax(scale * np.array([query @ x for x in keys]))
        if policy == "max_over_heads":
            gamma = np.broadcast_to(gamma.max(1, keepdims=True), gamma.shape)
        if policy == "max_over_tokens":
            gamma = np.broadcast_to(gamma.max(0, keepdims=True), gamma.shape)
        for t, h in ((t, h) for t in chunk for h in range(H)):
            score = gamma[t - first, h]
            order = sorted(range(len(held)), key=lambda n: (-score[n], -held[n]))
            blocks = sorted(held[n] for n in order[:top_k])
            read[b, t, h] = blocks
            query = turned(q[b, t, h], at(t))
            outer, values = [], []
            for rank, n in enumerate(blocks):
                place = rank if few or n not in late else rank + 1
                inside = [query @ turned(k[b, n * P + j, h // 2], place * P + j) for j in range(P)]
                outer.append(scale * inside[L])
                values.append(
                    softmax(scale * np.array(inside[:L])) @ v[b, n * P : n * P + L, h // 2]
                )
            for n in range(done, t // P):  # blocks that the chunk has completed
                inside = [query @ turned(k[b, n * P + j, h // 2], at(n * P + j)) for j in range(P)]
                outer.append(scale * inside[L])
                values.append(
                    softmax(scale * np.array(inside[:L])) @ v[b, n * P : n * P + L, h // 2]
                )
            for j in range(t // P * P, t + 1):
                if j % P != L:
                    outer.append(scale * query @ turned(k[b, j, h // 2], at(j)))
                    values.append(v[b, j, h // 2])
            y[b, t, h] = softmax(np.array(outer)) @ np.array(values)
    return y, read


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_equal_loops(policy):
    qkv = arrays()
    y, cache, infos = feed(qkv, [CHUNK] * 5, num_blocks=6, top_k=2, policy=policy)
    want, read = naive(qkv, 6, 2, policy)
    np.testing.assert_allclose(y, want, atol=1e-5)
    for n, info in enumerate(infos):
        blocks = np.broadcast_to(info.blocks, (B, H, CHUNK, 2))
        for b, h, c in np.ndindex(B, H, CHUNK):
            got = [x for x in blocks[b, h, c] if x >= 0]
            assert got == read[b, n * CHUNK + c, h]
    assert cache.num_complete.tolist() == [11, 11] and cache.num_tail.tolist() == [1, 1]
    assert cache.num_held.tolist() == [6, 6]
    highest = np.array([int(info.max_position.max()) for info in infos])
    tails = np.arange(5) * CHUNK % P
    assert (highest < 3 * P + tails + CHUNK).all() and highest[-1] == 3 * P + tails[-1] + CHUNK - 1


@pytest.fixture(scope="module")
def whole():
    """A text and the attention over all of it."""
    q, k, v = arrays()
    is_landmark = jnp.asarray(np.tile(landmark_places(T, L), (B, 1)))
    place = jnp.arange(T)
    run = jax.jit(landmark_attention)
    return (q, k, v), run(turn(q, place), turn(k, place), v, is_landmark)


@pytest.mark.parametrize(
    "policy", [POLICIES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in POLICIES[1:])]
)
def test_with_enough_blocks_chunks_equal_the_whole(whole, policy):
    qkv, want = whole
    y, _, _ = feed(qkv, [15] * 3, num_blocks=11, top_k=20, policy=policy)
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_any_chunking_leaves_the_same_cache(whole):
    qkv, _ = whole
    caches = [feed(qkv, sizes, 6, 2)[1] for sizes in ([CHUNK] * 5, [1] * T, [T])]
    for other in caches[1:]:
        for a, b in zip(caches[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    k = np.asarray(qkv[1])
    for n in range(5, 11):
        np.testing.assert_array_equal(caches[0].k[:, n % 6], k[:, n * P : (n + 1) * P])
    np.testing.assert_array_equal(caches[0].tail_k[:, :1], k[:, 44:])
    assert (caches[0].tail_k[:, 1:] == 0).all()


def test_among_equals_the_later_block_wins():
    """Landmarks that are all alike: of the older blocks, which share a place, the latest."""
    q, k, v = arrays()
    k = k.at[:, L::P].set(k[:, L : L + 1])
    _, cache, _ = feed((q, k, v), [CHUNK] * 5, 11, 2)
    asked = jax.jit(functools.partial(retrieve, top_k=2, policy=POLICIES[0], rotate=turn))
    blocks = np.asarray(asked(cache, q[:, :CHUNK] * 3))
    assert {tuple(x) for x in blocks.reshape(-1, 2)} <= {(9, 10), (8, 10), (8, 9), (7, 8)}
    assert (blocks == 8).any()


@functools.partial(jax.jit, static_argnames="policy")
def run_all(cache, q, k, v, valid=None, policy="max_over_heads"):
    return extend(
        cache, q, k, v, turn, top_k=2, policy=policy, chunk=CHUNK, scale=D**-0.5, valid=valid
    )


def test_extend_takes_chunks_and_leaves_padding_out(whole):
    """Rows padded anywhere, one of them shorter, equal each row alone."""
    (q, k, v), _ = whole
    padded = [jnp.pad(x, ((0, 0), (4, 5), (0, 0), (0, 0)), constant_values=7.0) for x in (q, k, v)]
    valid = np.zeros((B, T + 9), bool)
    valid[:, 4 : 4 + T] = True
    valid[1, 4 + 18 :] = False
    y, cache = run_all(init(B, 6, K, D, block_size=L), *padded, jnp.asarray(valid))
    want, _, _ = feed((q, k, v), [CHUNK] * 5, 6, 2, "max_over_heads")
    np.testing.assert_allclose(y[0, 4 : 4 + T], want[0], atol=1e-5)
    np.testing.assert_allclose(y[1, 4:22], want[1, :18], atol=1e-5)
    assert (y[~valid] == 0).all()
    assert cache.num_complete.tolist() == [11, 4] and cache.num_tail.tolist() == [1, 2]


def test_blocks_in_host_memory_are_the_same_blocks(whole):
    """Rows of different lengths, a ring that turns over, chunks of several sizes."""
    qkv, _ = whole
    valid = np.ones((B, T), bool)
    valid[1, 23:] = False
    fed = (*qkv, jnp.asarray(valid))
    here, there = (init(B, 5, K, D, block_size=L, offload=far) for far in (False, True))
    y, cache = run_all(here, *fed, policy=POLICIES[2])
    z, far = run_all(there, *fed, policy=POLICIES[2])
    np.testing.assert_allclose(z, y, atol=1e-6)
    assert far.k.array.sharding.memory_kind == far.v.array.sharding.memory_kind == "pinned_host"
    assert far.num_complete.tolist() == [11, 5] and far.num_blocks == 5
    for held, same in ((far.k, cache.k), (far.v, cache.v)):
        np.testing.assert_array_equal(np.asarray(held.array)[0].swapaxes(2, 3), same)
    np.testing.assert_array_equal(far.landmarks, cache.k[:, :, -1])
    with pytest.raises(ValueError, match="policy='max_over_heads' wants other blocks"):
        run_all(there, *fed)


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_a_tpu_holds_none_of_the_blocks_in_host_memory():
    """In a program for two chips: they stay on the host, updated in place, never copied whole."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = jh.parallel.make_mesh("data:2,model:2", devices=devices, exact=True)
    rows, blocks, heads, block, width, length = 2, 64, 4, 31, 128, 256
    place = lambda shape, spec, dtype=jnp.bfloat16, memory=None: jax.ShapeDtypeStruct(
        shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec), memory_kind=memory)
    )
    token = lambda n, k: place((rows, n, k, width), ("data", None, "model"))
    far = HostBlocks(
        place((2, rows, blocks, heads, block + 1, width), (None, "data", None, "model"),
              memory="pinned_host")
    )  # fmt: skip
    tail, count = token(block + 1, heads), place((rows,), ("data",), jnp.int32)
    cache = LandmarkCache(far, far, tail, tail, count, count, token(blocks, heads))
    inv_freq, _ = inverse_frequencies(RopeConfig(), width)
    rotated = functools.partial(rotate, inv_freq=jnp.asarray(inv_freq), interleaved=False)

    def run(cache, *qkv):
        def layer(blocks, n):
            mine = cache._replace(k=blocks[0].of_layer(n), v=blocks[1].of_layer(n))
            y, new = extend(
                mine, *qkv, rotated, top_k=2, policy=POLICIES[2], chunk=64, scale=width**-0.5
            )
            return (new.k.of_layer(None), new.v.of_layer(None)), y

        return jax.lax.scan(layer, (cache.k, cache.v), jnp.arange(2))

    with jax.set_mesh(mesh):
        new = token(length, heads)
        program = jax.jit(run, donate_argnums=0).lower(cache, token(length, 8), new, new).compile()
    memory = program.memory_analysis()
    held = 2 * 2 * 2 * rows * blocks * heads * (block + 1) * width // mesh.size  # bytes on a chip
    assert memory.host_argument_size_in_bytes == memory.host_alias_size_in_bytes == held
    assert memory.host_temp_size_in_bytes == 0
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < held
    assert "HostExecute" not in program.as_text()  # copies from host to host would be


@pytest.mark.slow
def test_sharded_equals_single(whole):
    qkv, _ = whole
    want = feed(qkv, [CHUNK] * 5, 6, 2)[0]
    mesh = jh.parallel.make_mesh("data:2,model:2", devices=jax.devices()[:4])
    spec = jax.NamedSharding(mesh, jax.P("data", None, "model"))
    placed = [jax.device_put(x, spec) for x in qkv]
    with jax.set_mesh(mesh):
        y, _ = run_all(init(B, 6, K, D, block_size=L), *placed, policy=POLICIES[0])
        far, held = run_all(
            init(B, 6, K, D, block_size=L, offload=True), *placed, policy=POLICIES[2]
        )
    np.testing.assert_allclose(y, want, atol=1e-5)
    assert y.sharding.spec[2] == "model"
    np.testing.assert_allclose(far, feed(qkv, [CHUNK] * 5, 6, 2, POLICIES[2])[0], atol=1e-5)
    split = held.k.array.sharding
    assert split.memory_kind == "pinned_host" and split.spec == jax.P(None, "data", None, "model")


def test_positions_are_stingy():
    assert stingy_positions(2, 4, 3).landmarks.tolist() == [3, 7]
    assert stingy_positions(2, 4, 3).start == 8
    far = stingy_positions(100, 4, 3)
    assert far.start == 20 and far.landmarks.tolist() == [3] * 96 + [7, 11, 15, 19]
    assert stingy_positions(0, 1, 3).start == 0


def small(**changes):
    q, k, v = arrays(5)
    cache = init(B, 6, K, D, block_size=L)
    given = dict(is_landmark=None, top_k=2, policy=POLICIES[0], rotate=turn)
    return attend_chunk(cache, q, k, v, **{**given, **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: init(B, 0, K, D, block_size=L), "num_blocks=0 leaves no past"),
        (lambda: init(B, 4, K, D, block_size=0), "block_size=0 must be at least 1"),
        (lambda: small(top_k=0), "top_k=0 blocks must be at least 1"),
        (lambda: small(policy="best"), "'best'"),
        (lambda: small(is_landmark=jnp.zeros((B, 5), bool)), "row 0 does not continue blocks of 3"),
        (lambda: small(is_landmark=jnp.zeros((B, 4), bool)), r"needed \(2, 5\)"),
        (lambda: small(rotate=lambda x, at: x), "same result"),
        (lambda: small(max_position=18), "at most 4 tokens at once"),
        (lambda: stingy_positions(-1, 2, 3), "nb=-1"),
        (lambda: attend_chunk(init(B, 6, H, D, block_size=L), *arrays(5), None, 2, POLICIES[0],
                              rotate=turn), "the cache was made for batch"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_landmarks_elsewhere_are_nan_at_run_time():
    places = np.tile(landmark_places(5, L), (B, 1))
    places[1] = False
    y, _, _ = jax.jit(lambda x: small(is_landmark=x))(jnp.asarray(places))
    assert not jnp.isnan(y[0]).any() and jnp.isnan(y[1]).all()
