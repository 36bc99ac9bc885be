"""Agent attention: the definition in loops, its limits, its parts on grids, and eight devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention import (
    AgentBias,
    adaptive_avg_pool_2d,
    agent_attention,
    agent_attention_matrix,
    agent_bias,
    agent_flops,
    attention,
    depthwise_conv,
    init_agent_bias,
    pool_agents,
    resize_agent_bias,
)
from jaxheads.attention.agent_grid import bias_shapes, resize_bilinear

B, H, K, D, N = 2, 4, 2, 8, 4
GRID, KEYS = (4, 6), (2, 5)
T, S = 24, 10
P = jax.P


def arrays(seed=0, tokens=T, keys=S, kv_heads=K, agents=N):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return (normal(B, tokens, H, D), normal(B, keys, kv_heads, D), normal(B, keys, kv_heads, D),
            normal(B, agents, H, D))  # fmt: skip


def biases(seed=1, tokens=T, keys=S):
    rng = np.random.default_rng(seed)
    return {
        "bias_qa": rng.normal(size=(H, tokens, N)).astype(np.float32),
        "bias_ak": rng.normal(size=(H, N, keys)).astype(np.float32),
    }


MASK = np.arange(S) < np.array([[S], [6]])


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def by_hand(q, k, v, agents, bias_qa, bias_ak, key_mask, scale, scale2, shortcut=0.0):
    """One image, head, agent and query at a time, in float64."""
    q, k, v, agents = (np.asarray(x, np.float64) for x in (q, k, v, agents))
    z = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        c, real = h // (q.shape[2] // k.shape[2]), np.flatnonzero(key_mask[b])
        read = [
            softmax(np.array([scale * a @ k[b, s, c] + bias_ak[h, n, s] for s in real]))
            @ v[b, real, c]
            for n, a in enumerate(agents[b, :, h])
        ]
        for t in range(q.shape[1]):
            p = softmax(scale2 * agents[b, :, h] @ q[b, t, h] + bias_qa[h, t])
            z[b, t, h] = p @ np.array(read) + (shortcut * v[b, t, c] if shortcut else 0)
    return z


RUN = jax.jit(functools.partial(agent_attention, scale=0.3, scale2=0.7))


def test_equals_the_definition():
    given = arrays()
    z = RUN(*given, key_mask=MASK, **biases())
    wanted = by_hand(*given, **biases(), key_mask=MASK, scale=0.3, scale2=0.7)
    np.testing.assert_allclose(z, wanted, atol=1e-5)
    square = arrays(tokens=S)
    z = jax.jit(functools.partial(agent_attention, shortcut=0.075))(*square)
    none = {"bias_qa": np.zeros((H, S, N)), "bias_ak": np.zeros((H, N, S))}
    wanted = by_hand(*square, **none, key_mask=np.ones((B, S), bool), scale=D**-0.5,
                     scale2=D**-0.5, shortcut=0.075)  # fmt: skip
    np.testing.assert_allclose(z, wanted, atol=1e-5)


def test_is_linear_attention_with_softmax_features():
    q, k, v, agents = given = arrays()
    options = dict(key_mask=MASK, **biases())
    matrix = np.asarray(
        agent_attention_matrix(q, k, agents, scale=0.3, scale2=0.7, **options), np.float64
    )
    assert (matrix >= 0).all() and (matrix[1, :, :, 6:] == 0).all()
    np.testing.assert_allclose(matrix.sum(-1), 1, atol=1e-6)
    assert np.linalg.matrix_rank(matrix[0, 0], tol=1e-5) <= N
    z = np.einsum("bhts,bshw->bthw", matrix, np.repeat(v, H // K, axis=2))
    np.testing.assert_allclose(RUN(*given, **options), z, atol=1e-5)


def test_limits():
    q, k, v, _ = given = arrays(agents=1)
    one = RUN(*given)
    np.testing.assert_allclose(one, np.broadcast_to(one[:, :1], one.shape), atol=1e-6)
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)  # each is its own nearest agent, and alone
    own = jax.jit(functools.partial(agent_attention, scale2=1e5))(q, k, v, q)
    np.testing.assert_allclose(own, attention(q, k, v, is_causal=False), atol=1e-5)
    shared = RUN(q, k, v, q[0, :N])  # one set for all images
    np.testing.assert_allclose(shared, RUN(q, k, v, np.stack([q[0, :N]] * B)), atol=1e-6)
    nothing = RUN(*arrays(), key_mask=MASK & (np.arange(B) == 0)[:, None])
    assert (nothing[1] == 0).all() and (nothing[0] != 0).any()


def test_gradients():
    """Finite differences in float64, through pooling and both softmaxes."""
    q, k, v, _ = arrays(kv_heads=H, keys=T)
    with jax.enable_x64(True):
        wide = {"q": q, "k": k, "v": v, **biases(keys=T)}
        wide = {name: jnp.asarray(x, jnp.float64) for name, x in wide.items()}
        mask = np.arange(T) < np.array([[T], [20]])

        @jax.jit
        def loss(x):
            agents = pool_agents(x["q"], GRID, N, mask=mask)
            return jnp.sum(jnp.sin(agent_attention(**x, agents=agents, key_mask=mask)))

        grads = jax.jit(jax.grad(loss))(wide)
        for name, x in wide.items():
            along = np.random.default_rng(2).normal(size=x.shape)
            moved = [loss({**wide, name: x + s * 1e-6 * along}) for s in (1, -1)]
            np.testing.assert_allclose(
                (grads[name] * along).sum(), (moved[0] - moved[1]) / 2e-6, rtol=1e-6, atol=1e-6
            )


def test_bfloat16():
    given = arrays()
    z = RUN(*(jnp.asarray(x, jnp.bfloat16) for x in given), key_mask=MASK)
    assert z.dtype == jnp.bfloat16
    np.testing.assert_allclose(z.astype(np.float32), RUN(*given, key_mask=MASK), atol=4e-2)


@pytest.mark.parametrize(("grid", "p"), [((10, 7), (3, 4)), ((6, 6), (3, 3)), ((5, 4), (5, 1))])
def test_pooling_in_loops(grid, p):
    x = np.random.default_rng(0).normal(size=(2, *grid, 3)).astype(np.float32)
    wanted = np.zeros((2, *p, 3))
    for i, j in np.ndindex(*p):
        rows = range(math.floor(i * grid[0] / p[0]), math.ceil((i + 1) * grid[0] / p[0]))
        columns = range(math.floor(j * grid[1] / p[1]), math.ceil((j + 1) * grid[1] / p[1]))
        wanted[:, i, j] = np.mean([x[:, a, b].astype(float) for a in rows for b in columns], 0)
    np.testing.assert_allclose(adaptive_avg_pool_2d(x, p), wanted, atol=1e-6)


def test_agents_are_pooled_queries():
    q = arrays()[0]
    agents = pool_agents(q, GRID, N)
    np.testing.assert_allclose(agents[:, 1], q.reshape(B, 4, 6, H, D)[:, :2, 3:].mean((1, 2)),
                               atol=1e-6)  # fmt: skip
    real = np.ones((B, T), bool).reshape(B, 4, 6)
    real[1, :, 4:] = False
    real[1, 2:, 3:] = False
    agents = pool_agents(q, GRID, N, mask=real.reshape(B, T))
    np.testing.assert_allclose(agents[1, 1], q.reshape(B, 4, 6, H, D)[1, :2, 3].mean(0), atol=1e-6)
    assert (agents[1, 3] == 0).all()


def bilinear(x, size):
    """Half-pixel centres, edges repeated, no anti-aliasing; one output pixel at a time."""
    out = np.zeros((*x.shape[:-2], *size))
    (h, w), (to_h, to_w) = x.shape[-2:], size

    def ends(i, n, to):
        at = min(max((i + 0.5) * n / to - 0.5, 0), n - 1)
        low = math.floor(at)
        return low, min(low + 1, n - 1), at - low

    for i, j in np.ndindex(*size):
        (a, b, s), (c, d, t) = ends(i, h, to_h), ends(j, w, to_w)
        top, bottom = (x[..., r, c] * (1 - t) + x[..., r, d] * t for r in (a, b))
        out[..., i, j] = top * (1 - s) + bottom * s
    return out


@pytest.mark.parametrize("size", [(10, 14), (3, 5), (7, 7)])
def test_biases_are_resized_without_anti_aliasing(size):
    x = np.random.default_rng(0).normal(size=(2, 3, 7, 7)).astype(np.float32)
    np.testing.assert_allclose(resize_bilinear(x, size), bilinear(x.astype(float), size), atol=1e-5)


def test_bias_in_loops():
    @jax.jit
    def make(key):
        params = init_agent_bias(key, H, N, GRID, KEYS, extra_tokens=2)
        return params, agent_bias(params, GRID, KEYS, extra_tokens=2)

    @jax.jit
    def refine(params):
        finer = resize_agent_bias(params, (8, 12), (4, 10))
        return finer, agent_bias(finer, (8, 12), (4, 10), extra_tokens=2)

    params, (bias_qa, bias_ak) = jax.device_get(make(jax.random.key(0)))
    assert bias_qa.shape == (H, 2 + T, N) and bias_ak.shape == (H, N, 2 + S)
    p = {name: np.asarray(x, float) for name, x in params._asdict().items()}
    an, na = bilinear(p["an"], KEYS), bilinear(p["na"], GRID)
    for h, a in np.ndindex(H, N):
        for y, x in np.ndindex(*KEYS):
            wanted = an[h, a, y, x] + p["ah"][0, h, a, y, 0] + p["aw"][0, h, a, 0, x]
            np.testing.assert_allclose(bias_ak[h, a, 2 + 5 * y + x], wanted, atol=1e-6)
        for y, x in np.ndindex(*GRID):
            wanted = na[h, a, y, x] + p["ha"][0, h, y, 0, a] + p["wa"][0, h, 0, x, a]
            np.testing.assert_allclose(bias_qa[h, 2 + 6 * y + x, a], wanted, atol=1e-6)
    np.testing.assert_array_equal(bias_ak[:, :, :2], params.ac[0])
    np.testing.assert_array_equal(bias_qa[:, :2], params.ca[0])
    assert 0.015 < np.std(params.an) < 0.02 and np.abs(params.an).max() <= 0.04
    finer, again = jax.device_get(refine(params))
    assert again[0].shape == (H, 2 + 96, N)
    np.testing.assert_allclose(
        finer.ha[0, :, :, 0].swapaxes(1, 2),
        bilinear(p["ha"][0, :, :, 0].swapaxes(1, 2)[:, :, None], (1, 8))[:, :, 0], atol=1e-6,
    )  # fmt: skip


def convolved(v, weight, bias, grid):
    image = v.reshape(v.shape[0], *grid, *v.shape[2:]).astype(float)
    out = np.zeros_like(image)
    for y, x in np.ndindex(*grid):
        out[:, y, x] = bias
        for i, j in np.ndindex(3, 3):
            if 0 <= y + i - 1 < grid[0] and 0 <= x + j - 1 < grid[1]:
                out[:, y, x] += weight[i, j] * image[:, y + i - 1, x + j - 1]
    return out.reshape(v.shape)


def conv_weights():
    rng = np.random.default_rng(3)
    return (rng.normal(size=(3, 3, H, D)).astype(np.float32),
            rng.normal(size=(H, D)).astype(np.float32))  # fmt: skip


def test_convolution_in_loops():
    v, (weight, bias) = arrays()[0], conv_weights()
    np.testing.assert_allclose(
        depthwise_conv(v, weight, bias, GRID), convolved(v, weight, bias, GRID), atol=1e-5
    )


def test_eight_devices_equal_one():
    """Rows of the image over devices: pooling, both softmaxes, biases, padding and convolution."""
    grid, tokens = (16, 3), 48
    q, k, v, _ = arrays(tokens=tokens, keys=tokens)
    weight, bias = conv_weights()
    table = biases(tokens=tokens, keys=tokens)
    mask = np.arange(tokens) < np.array([[tokens], [10]])  # no device but two sees the second image

    def run(q, k, v, qa, ak, mask, local, axis_name):
        agents = pool_agents(q, grid, N, mask=mask, axis_name=axis_name)
        z = agent_attention(q, k, v, agents, bias_qa=qa, bias_ak=ak, key_mask=mask,
                            axis_name=axis_name)  # fmt: skip
        v = jnp.repeat(v, H // K, axis=2)
        return z + depthwise_conv(v, weight, bias, local, axis_name=axis_name)

    mesh = jax.make_mesh((8,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
    row = P(None, "seq")
    sharded = jax.shard_map(
        functools.partial(run, local=(2, 3), axis_name="seq"), mesh=mesh,
        in_specs=(row, row, row, row, P(None, None, "seq"), row), out_specs=row,
    )  # fmt: skip
    single = functools.partial(run, local=grid, axis_name=None)

    def outcome(f):
        def functional(q, k, v):
            z = f(q, k, v, table["bias_qa"], table["bias_ak"], mask)
            return jnp.sum(jnp.sin(z)), z

        return jax.jit(jax.value_and_grad(functional, (0, 1, 2), has_aux=True))(q, k, v)

    ((_, z), grads), ((_, wanted), wanted_grads) = outcome(sharded), outcome(single)
    np.testing.assert_allclose(z, wanted, atol=1e-5)
    for one, other in zip(grads, wanted_grads):
        np.testing.assert_allclose(one, other, atol=1e-4)


def flops(f, tokens):
    x = jax.ShapeDtypeStruct((1, tokens, H, D), jnp.float32)
    return jax.jit(f).lower(x, x, x).compile().cost_analysis()["flops"]


def test_cost_is_linear_in_tokens():
    def agents(q, k, v):
        side = math.isqrt(q.shape[1])
        return agent_attention(q, k, v, pool_agents(q, (side, side), 9))

    assert 3.8 <= flops(agents, 1024) / flops(agents, 256) <= 4.3
    softmax = functools.partial(attention, is_causal=False, implementation="dense")
    assert flops(softmax, 1024) / flops(softmax, 256) > 12
    assert agent_flops(4096, 49, 64, has_conv=True)[0] == 4096 * 64 * (8 * 49 + 18)
    assert agent_flops(4096, 49, 64)[1] == 4 * 4096**2 * 64


def call(**changes):
    names = dict(zip(("q", "k", "v", "agents"), arrays()))
    return agent_attention(**{**names, **changes})


PARAMS = AgentBias(
    **{name: np.zeros(shape) for name, shape in bias_shapes(H, N, GRID, GRID).items()}
)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: call(causal=True), "no causal form"),
        (lambda: call(key_mask=np.ones((T, S), bool)), r"key_mask has shape \(24, 10\).*\[T,S\]"),
        (lambda: call(agents=np.ones((B, N, 3, D), np.float32)), r"agents has shape \(2, 4, 3, 8"),
        (lambda: call(agents=np.ones((B, N, H, 5), np.float32)), "one set a query head"),
        (lambda: call(agents=np.ones((3, N, H, D), np.float32)), r"must be \[2,n,4,8\]"),
        (lambda: call(bias_qa=np.ones((H, N, T))), r"bias_qa .*\[H,T,n\] = \(4, 24, 4\)"),
        (lambda: call(bias_ak=np.ones((3, N, S))), r"bias_ak .*\[H,n,S\] = \(4, 4, 10\)"),
        (lambda: call(shortcut=0.1), "24 queries and 10 values"),
        (lambda: call(k=np.ones((B, S, 3, D), np.float32)), "differ in batch, length or heads"),
        (lambda: pool_agents(arrays()[0], GRID, 5), "num_agents=5 is not a perfect square"),
        (lambda: pool_agents(arrays()[0], (5, 5), 4), "25 cells but there are 24 tokens"),
        (lambda: pool_agents(arrays()[0], GRID, 25), "5 cells along a side of 4"),
        (lambda: pool_agents(arrays()[0], GRID, 4, mask=np.ones((B, 3))), r"mask has shape"),
        (lambda: agent_bias(PARAMS, (8, 6), GRID), r"bias ha has shape .*needed \(1, 4, 8, 1, 4\)"),
        (lambda: agent_bias(PARAMS, GRID, GRID, 1), "bias ac has shape None"),
        (lambda: depthwise_conv(arrays()[0], *conv_weights(), (4, 4)), "16 cells"),
        (lambda: depthwise_conv(arrays()[0], np.ones((3, 3, D)), np.ones(D), GRID), r"\[3,3,H,D\]"),
    ],
)
def test_bad_input(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
