"""Mixers against their formulas in float64, their matrices, and their recurrences."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention import mixing
from jaxheads.attention.mixing.features import orthogonal_rows, prefix_products
from jaxheads.attention.mixing.lowrank import pseudo_inverse

B, T, M, H = 2, 12, 8, 2
D = M // H
OPTIONS = {
    "softmax": {},
    "kernel": {"kernel": "rbf"},
    "linear": {"chunk": 5},
    "performer": {"num_features": 6, "chunk": 5},
    "linformer": {"rank": 5},
    "nystrom": {"num_landmarks": 4},
    "sparse": {"window": 3, "stride": 4},
    "fnet": {},
    "mlp_mixer": {"hidden": 7, "activation": "identity"},
    "gmlp": {},
    "long_conv": {},
    "s4d": {"num_states": 6},
    "pooling": {"window": 5},
    "identity": {},
}
CAUSAL = [name for name, mixer in mixing.MIXERS.items() if mixer.has_causal_form]
MODES = [
    (name, causal) for name in OPTIONS for causal in (False, True) if causal <= (name in CAUSAL)
]
RECURRENT = ("linear", "performer", "long_conv", "s4d")


def make(name, **options):
    """A mixer and a copy of its parameters, which have room for T + 3 tokens."""
    mixer, params = _made(name, **options)
    return mixer, dict(params)


@functools.cache
def _made(name, **options):
    base = {"model_dim": M, "num_heads": H, "length": T + 3}
    mixer = mixing.get(name, **{**base, **OPTIONS[name], **options})
    params = jax.jit(mixer.init)(jax.random.key(1))
    if name == "gmlp":  # a mixer that starts as the identity would hide mistakes
        params = jax.tree.map(lambda p: jax.random.normal(jax.random.key(2), p.shape), params)
    return mixer, params


def tokens(length=T, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (B, length, M), dtype)


@functools.partial(jax.jit, static_argnames=("mixer", "causal"))
def applied(mixer, params, x, causal=False, mask=None):
    """Y, compiled: eager calls would compile each operation."""
    return mixer.apply(params, x, causal=causal, mask=mask)


@functools.partial(jax.jit, static_argnames=("mixer", "causal"))
def matrix_of(mixer, params, x, causal=False, mask=None):
    """M(X), compiled."""
    return mixer.matrix(params, x, causal=causal, mask=mask)


@functools.partial(jax.jit, static_argnames=("mixer", "causal"))
def product(mixer, params, x, **options):
    """Y from the matrix."""
    y = mixing.combine(mixer.matrix(params, x, **options), mixer.values(params, x))
    return y + mixer.offset(params, x, **options)


# --- the formulas, float64 numpy, one sequence and head at a time ------------------------------


def _softmax(scores, visible=True):
    weights = np.where(visible, np.exp(scores), 0)
    return weights / weights.sum(-1, keepdims=True)


def _lower(causal):
    return np.tri(T, dtype=bool) if causal else np.ones((T, T), bool)


def by_head(weights):
    """The formula of a mixer with heads, from a function to weights [T,T] that are normalised."""

    def formula(p, x, causal, mixer):
        out = []
        for h in range(H):
            q, k, v = (x @ p[w][:, h] for w in ("wq", "wk", "wv"))
            out.append(weights(p, q, k, causal, mixer) @ v)
        return np.concatenate(out, axis=-1)

    return formula


def _normalised(weights, causal):
    weights = weights * _lower(causal)
    return weights / weights.sum(-1, keepdims=True)


def _rbf(p, q, k, causal, mixer):
    distance = ((q[:, None] - k[None]) ** 2).sum(-1)
    return _normalised(np.exp(-distance / (2 * math.sqrt(D))), causal)


def _linear(p, q, k, causal, mixer):
    phi = lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))) + 1
    return _normalised(phi(q) @ phi(k).T, causal)


def _performer(p, q, k, causal, mixer):
    def phi(z):
        z = z / D**0.25
        inner = z @ p["features"].T - 0.5 * (z**2).sum(-1, keepdims=True)
        return np.exp(inner) / math.sqrt(len(p["features"]))

    return _normalised(phi(q) @ phi(k).T, causal)


def _linformer(p, q, k, causal, mixer):
    e, f = p["e"][:, :T], p["f"][:, :T]
    return _softmax(q @ (e @ k).T / math.sqrt(D)) @ f


def _nystrom(p, q, k, causal, mixer):
    means = lambda z: z.reshape(mixer.num_landmarks, -1, D).mean(axis=1)
    scores = lambda a, b: _softmax(a @ b.T / math.sqrt(D))
    ql, kl = means(q), means(k)
    return scores(q, kl) @ np.linalg.pinv(scores(ql, kl)) @ scores(ql, k)


def _sparse(p, q, k, causal, mixer):
    visible = np.zeros((T, T), bool)
    for i, j in np.ndindex(T, T):
        near, same = abs(i - j) < mixer.window, (i - j) % mixer.stride == 0
        visible[i, j] = {"local": near, "strided": same, "local+strided": near or same}[
            mixer.pattern
        ]
    return _softmax(q @ k.T / math.sqrt(D), visible & _lower(causal))


def _pooling(p, x, causal, mixer):
    out = np.zeros_like(x)
    for i in range(T):
        low = i - mixer.window + 1 if causal else i - mixer.window // 2
        high = i if causal else i + mixer.window // 2
        out[i] = x[max(low, 0) : high + 1].mean(axis=0) - x[i]
    return out


def _s4d_recurrence(p, x, causal, mixer):
    a = -np.exp(p["log_decay"]) + 1j * p["frequency"]
    dt = np.exp(p["log_dt"])[:, None]
    b, c = (p[w][..., 0] + 1j * p[w][..., 1] for w in ("b", "c"))
    a_bar = np.exp(dt * a)
    b_bar = (a_bar - 1) / a * b
    state, out = np.zeros_like(a_bar), np.zeros_like(x)
    for t in range(T):
        state = a_bar * state + b_bar * x[t][:, None]
        out[t] = 2 * (c * state).sum(-1).real
    return out


def _long_conv(p, x, causal, mixer):
    return np.stack([sum(p["kernel"][t - s] * x[s] for s in range(t + 1)) for t in range(T)])


def _gmlp(p, x, causal, mixer):
    w = p["w"][:T, :T] * (np.tri(T) if causal else 1)
    return x[:, : M // 2] * (w @ x[:, M // 2 :] + p["b"][:T, None])


NAIVE = {
    "softmax": by_head(lambda p, q, k, causal, m: _softmax(q @ k.T / math.sqrt(D), _lower(causal))),
    "kernel": by_head(_rbf),
    "linear": by_head(_linear),
    "performer": by_head(_performer),
    "linformer": by_head(_linformer),
    "nystrom": by_head(_nystrom),
    "sparse": by_head(_sparse),
    "fnet": lambda p, x, causal, m: np.fft.fft2(x).real,
    "mlp_mixer": lambda p, x, causal, m: p["w2"][:T] @ (p["w1"][:, :T] @ x),
    "gmlp": _gmlp,
    "long_conv": _long_conv,
    "s4d": _s4d_recurrence,
    "pooling": _pooling,
    "identity": lambda p, x, causal, m: x,
}


def naive(name, mixer, params, x, causal):
    """Y [B,T,_] in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    return np.stack([NAIVE[name](p, np.asarray(row, np.float64), causal, mixer) for row in x])


# --- what every mixer is -----------------------------------------------------------------------


def test_there_are_fourteen():
    assert set(mixing.MIXERS) == set(OPTIONS) == set(NAIVE)
    assert len(mixing.MIXERS) == 14


@pytest.mark.parametrize(("name", "causal"), MODES)
def test_apply_is_the_formula(name, causal):
    mixer, params = make(name)
    got = applied(mixer, params, tokens(), causal=causal)
    assert got.shape == (B, T, mixer.output_dim)
    want = naive(name, mixer, params, tokens(), causal)
    # float32 against float64; the transforms of FNet sum T * M = 96 numbers without normalising,
    # and the pseudo-inverse of Nystrom divides by small singular values
    scale = {"fnet": 10.0, "nystrom": 20.0}.get(name, 1.0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize(("name", "causal"), MODES)
def test_apply_is_the_matrix_times_the_values(name, causal):
    mixer, params = make(name)
    x = tokens()
    matrix, values = matrix_of(mixer, params, x, causal=causal), mixer.values(params, x)
    assert matrix.shape == (*values.shape[:3], T)
    assert values.shape[0] == B
    assert values.shape[1] * values.shape[3] == mixer.output_dim
    np.testing.assert_allclose(
        applied(mixer, params, x, causal=causal),
        product(mixer, params, x, causal=causal),
        rtol=1e-5,
        atol=1e-4 if name == "fnet" else 1e-5,
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kernel", {"kernel": "exp"}),
        ("kernel", {"kernel": "poly", "degree": 4}),
        ("sparse", {"pattern": "local"}),
        ("sparse", {"pattern": "strided"}),
        ("sparse", {"pattern": "strided", "stride": 5}),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_options_follow_their_formulas(name, options, causal):
    mixer, params = make(name, **options)
    got = applied(mixer, params, tokens(), causal=causal)
    np.testing.assert_allclose(
        got, product(mixer, params, tokens(), causal=causal), rtol=1e-5, atol=1e-5
    )
    formula = {"exp": NAIVE["softmax"], "poly": by_head(_poly)}.get(
        options.get("kernel"), NAIVE["sparse"]
    )
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    want = [formula(p, np.asarray(row, np.float64), causal, mixer) for row in tokens()]
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-5, atol=1e-5)


def _poly(p, q, k, causal, mixer):
    return _normalised((1 + q @ k.T / math.sqrt(D)) ** mixer.degree, causal)


def test_mlp_mixer_with_gelu():
    mixer, params = make("mlp_mixer", activation="gelu")
    w1, w2 = (np.asarray(params[w], np.float64) for w in ("w1", "w2"))
    hidden = w1[:, :T] @ np.asarray(tokens(), np.float64)
    gelu = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    np.testing.assert_allclose(mixer.apply(params, tokens()), w2[:T] @ gelu, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="activation='identity'"):
        mixer.matrix(params, tokens())


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_matrices_are_lower_triangular(name):
    mixer, params = make(name)
    matrix = matrix_of(mixer, params, tokens(), causal=True)
    assert not jnp.triu(matrix, 1).any()
    assert jnp.tril(matrix).any()


@pytest.mark.parametrize("name", CAUSAL)
def test_no_output_reads_a_later_token(name):
    mixer, params = make(name)

    @jax.jit
    def influence(x):  # [T,T]: of an input (second) on an output (first)
        jacobian = jax.jacrev(lambda x: mixer.apply(params, x, causal=True).sum(-1))(x)
        return jnp.abs(jacobian).sum(axis=(0, 2, 4))

    across = influence(tokens())
    rounding = 1e-6 * float(across.max()) if name in ("long_conv", "s4d") else 0  # of transforms
    assert jnp.triu(across, 1).max() <= rounding
    assert (across[-1] > 1e-4 * across.max()).sum() > (0 if name == "identity" else 4)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_fixed_matrices_do_not_depend_on_the_tokens(name):
    mixer, params = make(name)
    one, other = (matrix_of(mixer, params, tokens(seed=seed)) for seed in (0, 1))
    assert bool((one == other).all()) != mixer.is_data_dependent


@pytest.mark.parametrize("name", ["softmax", "kernel", "linear", "performer", "sparse"])
def test_rows_are_densities(name):
    mixer, params = make(name)
    matrix = matrix_of(mixer, params, tokens(), causal=True)
    assert (matrix >= 0).all()
    np.testing.assert_allclose(matrix.sum(-1), 1, rtol=1e-5)


# --- recurrences -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECURRENT)
def test_token_by_token_is_the_causal_form(name):
    with jax.enable_x64(True):
        mixer, params = make(name)
        params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        x = tokens(dtype=jnp.float64)
        dtype = jnp.complex128 if name == "s4d" else jnp.float64
        state, got = mixer.init_state(params, B, dtype), []
        step = jax.jit(mixer.step)
        for t in range(T):
            state, y = step(params, state, x[:, t])
            got.append(y)
        want = applied(mixer, params, x, causal=True)
        np.testing.assert_allclose(np.stack(got, axis=1), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 3, T, 4 * T])
def test_prefix_products_for_any_chunk(chunk):
    with jax.enable_x64(True):
        fq, fk, v = (jax.random.normal(jax.random.key(n), (B, T, H, D)) for n in range(3))
        got = prefix_products(fq, fk, v, chunk=chunk)
        want = jnp.einsum("bhts,bshw->bthw", jnp.tril(jnp.einsum("bthr,bshr->bhts", fq, fk)), v)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_convolution_does_not_wrap_around():
    x = jnp.zeros((1, T, 1)).at[0, T - 1].set(1.0)
    kernel = jnp.ones((T, 1))
    got = mixing.fft_convolve(x, kernel)[0, :, 0]
    np.testing.assert_allclose(got, np.eye(T)[T - 1], atol=1e-6)
    np.testing.assert_allclose(mixing.toeplitz(kernel)[0], np.tri(T))


def test_s4d_starts_at_s4d_lin():
    mixer, params = make("s4d", num_states=8)
    np.testing.assert_allclose(-np.exp(params["log_decay"]), -0.5, rtol=1e-6)
    np.testing.assert_allclose(params["frequency"][3], np.pi * np.arange(4), rtol=1e-6)
    assert ((params["log_dt"] >= np.log(1e-3)) & (params["log_dt"] <= np.log(1e-1))).all()
    # A slow mode (dt -> 0) adds up its inputs: kappa_t = 2 Re(C B) dt.
    slow = {**params, "log_dt": jnp.full(M, -12.0), "c": params["b"]}
    kernel = mixer.kernel(slow, 4)
    np.testing.assert_allclose(kernel, 2 * 4 * math.exp(-12), rtol=1e-3)


# --- approximations ----------------------------------------------------------------------------


def _performer_error(num_features):
    """Mean squared distance of the matrix from that of softmax, over 8 draws of the features."""
    mixer, params = make("performer", num_features=num_features)
    x = 0.5 * tokens()
    exact = matrix_of(make("softmax")[0], params, x)
    rows = orthogonal_rows(jax.random.key(5), 8 * num_features, D).reshape(8, num_features, D)
    matrix = jax.jit(jax.vmap(lambda rows: mixer.matrix({**params, "features": rows}, x)))(rows)
    return float(jnp.mean((matrix - exact) ** 2))


@pytest.mark.slow
def test_performer_approaches_softmax_as_features_grow():
    errors = [_performer_error(m) for m in (16, 128, 1024)]
    for few, many in itertools.pairwise(errors):
        assert few / 16 < many < few / 4  # eight times the features: an eighth of the variance
    assert math.sqrt(errors[-1]) < 0.005  # entries are 1/12 in the mean


def test_performer_rows_are_orthogonal_and_gaussian():
    """Gaussian in every direction: signs left to the factorisation would empty half the sphere."""
    rows = orthogonal_rows(jax.random.key(0), 10, D)
    block = rows[:D] @ rows[:D].T
    np.testing.assert_allclose(block, jnp.diag(jnp.diagonal(block)), atol=1e-5)
    many = jax.jit(orthogonal_rows, static_argnums=(1, 2))(jax.random.key(1), 8000, D)
    np.testing.assert_allclose(many.T @ many / len(many), np.eye(D), atol=0.06)
    np.testing.assert_allclose(many.mean(axis=0), np.zeros(D), atol=0.05)


def test_performer_survives_large_logits():
    mixer, params = make("performer")
    x = 100 * tokens()
    y = applied(mixer, params, x)
    grad = jax.jit(jax.grad(lambda x: mixer.apply(params, x).sum()))(x)
    assert jnp.isfinite(y).all() and jnp.isfinite(grad).all()


def test_nystrom_with_every_token_a_landmark_is_softmax():
    with jax.enable_x64(True):
        mixer, params = make("nystrom", num_landmarks=T)
        params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        x = tokens(dtype=jnp.float64)
        want = make("softmax")[0].matrix(params, x)
        np.testing.assert_allclose(matrix_of(mixer, params, x), want, rtol=1e-8, atol=1e-8)
        got, want = applied(mixer, params, x), naive("softmax", mixer, params, x, causal=False)
        np.testing.assert_allclose(got, want, atol=1e-8)


def test_nystrom_by_products_of_matrices():
    exact, params = make("nystrom")
    iterated = make("nystrom", pinv_iterations=12)[0]
    np.testing.assert_allclose(
        matrix_of(iterated, params, tokens()), matrix_of(exact, params, tokens()), atol=1e-3
    )
    a = jax.nn.softmax(jax.random.normal(jax.random.key(0), (3, 5, 5)) * 2)
    np.testing.assert_allclose(pseudo_inverse(a, 20) @ a, np.tile(np.eye(5), (3, 1, 1)), atol=1e-3)


def test_nystrom_without_the_scale_of_softmax_would_differ():
    mixer, params = make("nystrom", num_landmarks=T)
    doubled = {**params, "wq": 2 * params["wq"]}
    gap = jnp.abs(matrix_of(mixer, doubled, tokens()) - matrix_of(mixer, params, tokens())).max()
    assert gap > 1e-2


# --- masks, gradients, dtypes, shapes ----------------------------------------------------------


@pytest.mark.parametrize(("name", "causal"), MODES)
def test_nobody_reads_tokens_that_are_away(name, causal):
    mixer, params = make(name)
    mask = jnp.array([[True] * 5 + [False] * 2 + [True] * 5, [True] * 9 + [False] * 3])
    run = lambda x: applied(mixer, params, x, causal=causal, mask=mask)
    x = tokens()
    disturbed = jnp.where(mask[..., None], x, 7.0)
    np.testing.assert_array_equal(
        jnp.where(mask[..., None], run(x), 0), jnp.where(mask[..., None], run(disturbed), 0)
    )
    matrix = matrix_of(mixer, params, x, causal=causal, mask=mask)
    assert not jnp.where(mask[:, None, None, :], 0, matrix).any()
    np.testing.assert_allclose(
        run(x), product(mixer, params, x, causal=causal, mask=mask), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    "name",
    ["softmax", "kernel", "linear", "performer", "sparse", "pooling", "long_conv", "s4d", "gmlp"],
)
def test_padding_at_the_end_changes_nothing(name):
    mixer, params = make(name)
    mask = jnp.arange(T) < 8
    padded = applied(mixer, params, tokens(), mask=jnp.broadcast_to(mask, (B, T)))[:, :8]
    np.testing.assert_allclose(
        padded, applied(mixer, params, tokens()[:, :8]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["softmax", "kernel", "sparse"])
def test_masks_by_pairs(name):
    mixer, params = make(name)
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, (B, H, T, T)).at[:, :, 4].set(False)
    matrix = matrix_of(mixer, params, tokens(), causal=True, mask=mask)
    assert not jnp.where(mask, 0, matrix).any()
    assert not jnp.triu(matrix, 1).any()
    y = applied(mixer, params, tokens(), causal=True, mask=mask)
    np.testing.assert_allclose(
        y, product(mixer, params, tokens(), causal=True, mask=mask), rtol=1e-5, atol=1e-5
    )
    assert not y[:, 4].any()  # a token that may read nothing


@pytest.mark.slow
@pytest.mark.parametrize(("name", "causal"), MODES)
def test_gradients_are_finite_differences(name, causal):
    """In float64 along a random direction, of x and of every parameter."""
    with jax.enable_x64(True):
        mixer, params = make(name)
        frozen = {"features": params.pop("features")} if name == "performer" else {}
        double = lambda a: a.astype(jnp.float64)
        args = jax.tree.map(double, (params, tokens()))
        weights = np.random.default_rng(0).normal(size=(B, T, mixer.output_dim))

        def loss(args):
            # Attention works in float32: its gradient is checked through the matrix.
            exact = name in ("softmax", "sparse")
            run = functools.partial(product, mixer) if exact else mixer.apply
            return jnp.sum(run({**args[0], **frozen}, args[1], causal=causal) * weights)

        direction = jax.tree.map(lambda a: np.random.default_rng(a.size).normal(size=a.shape), args)

        @jax.jit
        def slopes(args):
            move = lambda size: jax.tree.map(lambda a, d: a + size * d, args, direction)
            products = jax.tree.map(lambda g, d: jnp.sum(g * d), jax.grad(loss)(args), direction)
            ends = jax.lax.map(lambda size: loss(move(size)), jnp.array([1e-5, -1e-5]))
            return sum(jax.tree.leaves(products)), (ends[0] - ends[1]) / 2e-5

        np.testing.assert_allclose(*slopes(args), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "sparse"])
def test_gradients_of_attention_are_those_of_its_matrix(name):
    mixer, params = make(name)
    total = lambda run: lambda p, x: jnp.sum(jnp.sin(run(p, x, causal=True)))
    grads = lambda run: jax.jit(jax.grad(total(run), argnums=(0, 1)))(params, tokens())
    got, want = grads(mixer.apply), grads(functools.partial(product, mixer))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OPTIONS))
def test_under_vmap_and_in_bfloat16(name):
    mixer, params = make(name)
    x = tokens()
    y = applied(mixer, params, x)  # the mixer is a static argument
    each = jax.jit(jax.vmap(lambda x: mixer.apply(params, x)))(x[:, None])[:, 0]
    np.testing.assert_allclose(each, y, rtol=1e-5, atol=1e-4)
    low = applied(mixer, params, x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    error = float(jnp.abs(low.astype(jnp.float32) - y).max() / jnp.maximum(jnp.abs(y).max(), 1))
    # The pseudo-inverse of Nystrom multiplies the rounding of its inputs by a condition number.
    assert error < (0.2 if name == "nystrom" else 0.05)


def test_gmlp_starts_as_its_gate():
    mixer = mixing.get("gmlp", model_dim=M, length=T)
    y = mixer.apply(mixer.init(jax.random.key(0)), tokens())
    np.testing.assert_allclose(y, tokens()[..., : M // 2], atol=1e-2)


# --- costs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "power"),
    [
        ("softmax", 2),
        ("kernel", 2),
        ("gmlp", 2),
        ("linear", 1),
        ("performer", 1),
        ("linformer", 1),
        ("nystrom", 1),
        ("mlp_mixer", 1),
        ("fnet", 1),
        ("long_conv", 1),
        ("s4d", 1),
        ("pooling", 1),
    ],
)
def test_cost_grows_as_the_table_says(name, power):
    mixer, _ = make(name)
    flops, bytes_ = mixer.cost(2**16)
    more, more_bytes = mixer.cost(2**20)
    slope = math.log2(more / flops) / 4
    assert power - 0.02 < slope < power + 0.1  # a logarithm shows as a little more
    assert more_bytes > bytes_ > 0


@pytest.mark.parametrize(
    "name", ["softmax", "linear", "performer", "linformer", "mlp_mixer", "gmlp"]
)
def test_cost_is_what_the_compiler_counts(name):
    length = 128
    options = {"model_dim": 64, "num_heads": 2, "length": length}
    own = {
        "performer": {"num_features": 64},
        "linformer": {"rank": 32},
        "mlp_mixer": {"hidden": 96},
    }
    mixer = mixing.get(name, **options, **own.get(name, {}))
    shapes = jax.eval_shape(mixer.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, length, 64), jnp.float32)
    compiled = jax.jit(mixer.apply).lower(shapes, x).compile()
    counted = compiled.cost_analysis()["flops"]
    projections = 3 * 2 * length * 64 * 64 if "wq" in shapes else 0
    # The compiler also counts softmax, activations and normalisation, one or a few per entry.
    assert 0.95 < (counted - projections) / mixer.cost(length).flops < 1.3


def test_sparse_cost_counts_the_pairs_of_its_matrix():
    for pattern in ("local", "strided", "local+strided"):
        for causal in (False, True):
            mixer, params = make("sparse", pattern=pattern)
            pairs = float((mixer.matrix(params, tokens(), causal=causal)[0, 0] > 0).sum())
            assert mixer.cost(T, causal=causal).flops == 4 * pairs * M


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - set(CAUSAL)))
def test_mixers_without_a_causal_form_refuse(name):
    mixer, params = make(name)
    for function in (mixer.apply, mixer.matrix):
        with pytest.raises(NotImplementedError, match=f"'{name}' has no causal form"):
            function(params, tokens(), causal=True)


def test_those_without_a_causal_form_are_the_four():
    assert set(OPTIONS) - set(CAUSAL) == {"fnet", "mlp_mixer", "linformer", "nystrom"}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_bad_tokens_and_masks(name):
    mixer, params = make(name)
    with pytest.raises(ValueError, match=r"\[B,T,M\]"):
        mixer.apply(params, tokens()[0])
    with pytest.raises(TypeError, match="int32"):
        mixer.apply(params, jnp.ones((B, T, M), jnp.int32))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 11\)"):
        mixer.apply(params, tokens(), mask=jnp.ones((B, T - 1), bool))
    with pytest.raises(TypeError, match="mask holds float32"):
        mixer.apply(params, tokens(), mask=jnp.ones((B, T)))
    pairs = jnp.ones((1, 1, T, T), bool)
    if mixer.takes_pair_mask:
        with pytest.raises(ValueError, match=r"\[B,H,T,T\]"):
            mixer.apply(params, tokens(), mask=pairs[..., :-1])
    else:
        with pytest.raises(NotImplementedError, match="never compares pairs"):
            mixer.apply(params, tokens(), mask=pairs)


@pytest.mark.parametrize("name", ["linformer", "mlp_mixer", "gmlp", "long_conv"])
def test_sequences_longer_than_the_parameters(name):
    mixer, params = make(name)
    with pytest.raises(ValueError, match=f"x has {T + 4} tokens but .* length={T + 3}"):
        mixer.apply(params, tokens(T + 4))


@pytest.mark.parametrize("name", ["softmax", "linear", "nystrom", "long_conv", "s4d"])
def test_tokens_of_another_width(name):
    mixer, params = make(name)
    with pytest.raises(ValueError, match="model_dim=8"):
        mixer.apply(params, jnp.ones((B, T, M + 2)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sofmax", {}, "did you mean 'softmax'"),
        ("linear", {"num_head": 2}, "did you mean 'num_heads'"),
        ("softmax", {"model_dim": 10, "num_heads": 4}, "model_dim=10 is not divisible"),
        ("sparse", {"window": 0}, "window=0"),
        ("sparse", {"pattern": "strides"}, "did you mean 'strided'"),
        ("kernel", {"kernel": "gauss"}, "unknown kernel 'gauss'"),
        ("kernel", {"kernel": "poly", "degree": 3}, "degree=3"),
        ("pooling", {"window": 4}, "window=4 has no centre"),
        ("mlp_mixer", {"activation": "relu"}, "unknown activation 'relu'"),
        ("s4d", {"num_states": 7}, "num_states=7 is odd"),
        ("s4d", {"dt_min": 0.5}, "dt_min=0.5"),
        ("gmlp", {"model_dim": 9, "num_heads": 1}, "model_dim=9 is odd"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        mixing.get(name, **options)


def test_nystrom_names_the_length_to_pad_to():
    mixer, params = make("nystrom", num_landmarks=5)
    with pytest.raises(ValueError, match="T=12 is not divisible by num_landmarks=5; pad to 15"):
        mixer.apply(params, tokens())
