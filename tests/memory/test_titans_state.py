"""The state: pieces of any length, documents, padding, saving; and what is refused."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.memory import (
    MemoryState,
    init_memory,
    init_state,
    memory_read,
    memory_step,
    neural_memory,
)
from tests.memory import reference
from tests.memory.inputs import FAST_COMPILE, assert_close, tokens

LENGTH, CHUNK = 21, 8


@functools.partial(jax.jit, static_argnames="pad", compiler_options=FAST_COMPILE)
def run(args, state=None, mask=None, reset=None, pad=True):
    options = dict(chunk=CHUNK, residual_norm=False, state=state, mask=mask, reset=reset, pad=pad)
    return neural_memory(*args, **options)


def piece(args, begin, end):
    return (*(x[:, begin:end] for x in args[:6]), args[6])


@pytest.fixture(scope="module")
def args():
    return tokens(LENGTH)


@pytest.mark.parametrize("cuts", [(8, 16), (5, 6, 16), (1, 20)])
def test_pieces_of_any_length_give_one_pass(args, cuts):
    y, end = run(args)
    state, outs = None, []
    for begin, stop in zip((0, *cuts), (*cuts, LENGTH)):
        out, state = run(piece(args, begin, stop), state)
        outs.append(out)
    assert_close(jnp.concatenate(outs, 1), y, 1e-6)
    assert_close(state, end, 1e-6)


def test_pieces_outside_jit_know_where_they_stand(args):
    _, end = run(args)
    _, state = run(piece(args, 0, 16))
    assert state.offset.tolist() == [0, 0]
    rest = piece(args, 16, LENGTH)
    _, state = neural_memory(*rest, chunk=CHUNK, residual_norm=False, state=state)
    assert_close(state, end, 1e-6)


def test_steps_give_one_pass(args):
    y, end = run(args)
    options = dict(chunk=CHUNK, residual_norm=False)
    step = jax.jit(functools.partial(memory_step, **options), compiler_options=FAST_COMPILE)
    state = init_state(args[6], 2)
    for t in range(LENGTH):
        z, state = step(state, *(x[:, t] for x in args[:6]))
        assert_close(z, y[:, t], 1e-6)
    assert_close(state, end, 1e-6)


def test_a_state_is_saved_and_resumed_as_it_is(args, tmp_path):
    _, state = run(piece(args, 0, 13))
    leaves, tree = jax.tree.flatten(state)
    np.savez(tmp_path / "state.npz", *leaves)
    with np.load(tmp_path / "state.npz") as file:
        loaded = jax.tree.unflatten(tree, [jnp.asarray(file[name]) for name in file.files])
    rest = piece(args, 13, LENGTH)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, run(rest, loaded), run(rest, state)))


def test_padding_anywhere_changes_nothing(args):
    y, end = run(args)
    mask = jnp.zeros((2, LENGTH + 6), bool).at[0, 6:].set(True).at[1, :9].set(True)
    mask = mask.at[1, 15:].set(True)  # left padding in one row, a hole in the other
    place = lambda x: jnp.stack(
        [jnp.zeros((LENGTH + 6, *x.shape[2:]), x.dtype).at[mask[row]].set(x[row]) for row in (0, 1)]
    )
    z, state = run((*map(place, args[:6]), args[6]), mask=mask)
    for row in (0, 1):
        assert_close(z[row][mask[row]], y[row], 1e-6)
        assert not np.any(z[row][~mask[row]])
    assert_close(state, end, 1e-6)


def test_a_document_at_a_chunk_is_as_if_alone(args):
    reset = jnp.zeros((2, LENGTH), bool).at[:, 16].set(True)
    y, state = run(args, reset=reset)
    alone, end = run(piece(args, 16, LENGTH))
    assert_close(y[:, 16:], alone, 1e-6)
    assert_close(state, end, 1e-6)
    assert_close(y[:, :16], run(args)[0][:, :16], 1e-6)


def test_nothing_passes_from_one_document_to_the_next(args):
    reset = jnp.zeros((2, LENGTH), bool).at[:, 11].set(True)
    y, _ = run(args, reset=reset)
    other = (args[0], args[1].at[:, :11].add(1.0), *args[2:])
    z, _ = run(other, reset=reset)
    assert jnp.array_equal(y[:, 11:], z[:, 11:])
    assert not jnp.array_equal(y[:, :11], z[:, :11])
    # the document's own definition: gradients at M_0 until the grid's next chunk
    k, v, q, theta, eta, alpha, params = piece(args, 11, 16)
    expected, _ = reference.titans(k, v, q, theta, eta, alpha, params, chunk=5, residual_norm=False)
    np.testing.assert_allclose(y[:, 11:16], expected, atol=1e-5)


def test_reading_writes_nothing(args):
    _, state = run(args)
    q = args[2][:, :5]
    y = memory_read(state, q, residual_norm=False)
    weights = [np.asarray(w[1, 1], np.float64) for w in state.weights]
    expected = reference.network(weights, np.asarray(q[1, 3, 1], np.float64), False)
    np.testing.assert_allclose(y[1, 3, 1], expected, atol=1e-5)
    np.testing.assert_allclose(memory_read(state, q[:, 3], residual_norm=False), y[:, 3], atol=1e-6)


def bad(name):
    """(args, options, error, text) of one mistake."""
    k, v, q, theta, eta, alpha, params = tokens(12)
    good = [k, v, q, theta, eta, alpha, params]
    names = ("k", "v", "q", "t", "e", "a", "params")
    swap = lambda **new: [new.get(name, x) for name, x in zip(names, good)]
    state = init_state(params, 2)
    cases = dict(
        chunks=(good, dict(chunk=8, pad=False), ValueError, "T=12 is not divisible by chunk=8"),
        chunk=(good, dict(chunk=0), ValueError, "chunk=0"),
        gate=(swap(t=theta + 1), {}, ValueError, r"theta must lie in \[0, 1\]"),
        nan=(swap(e=eta * jnp.nan), {}, ValueError, r"eta must lie in \[0, 1\]"),
        gate_shape=(swap(a=alpha[..., :1]), {}, ValueError, "alpha has shape"),
        shapes=(swap(v=v[:, :5]), {}, ValueError, "must have one shape"),
        heads=(swap(params=init_memory(jax.random.key(0), 3, 4)), {}, ValueError, "3"),
        depth=(swap(params=[]), {}, ValueError, "at least one matrix"),
        width=(swap(params=params[:1]), {}, ValueError, "16 outputs"),
        loss=(good, dict(loss="l1"), ValueError, "loss='l1'"),
        read=(good, dict(read="now"), ValueError, "read='now'"),
        impl=(good, dict(impl="fast"), ValueError, "impl='fast'"),
        limit=(good, dict(max_grad_norm=0.0), ValueError, "max_grad_norm"),
        state_depth=(
            good,
            dict(state=init_state(init_memory(jax.random.key(0), 2, 4, 1), 2)),
            ValueError,
            "has depth 1",
        ),
        state_batch=(good, dict(state=init_state(params, 3)), ValueError, "batch of 2"),
        state_dtype=(
            good,
            dict(state=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)),
            TypeError,
            "bfloat16",
        ),
        state_type=(good, dict(state=(1, 2)), TypeError, "MemoryState"),
        state_chunk=(
            good,
            dict(state=state._replace(offset=state.offset + 9), chunk=8),
            ValueError,
            "another chunk",
        ),
        mask=(good, dict(mask=jnp.ones((2, 12))), ValueError, "mask must be bool"),
    )
    return cases[name] if name else list(cases)


@pytest.mark.parametrize("name", bad(None))
def test_bad_input_is_told(name):
    args, options, error, text = bad(name)
    with pytest.raises(error, match=text):
        neural_memory(*args, **options)


def test_bad_memories_are_told():
    with pytest.raises(ValueError, match="depth=0"):
        init_memory(jax.random.key(0), 2, 4, depth=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        init_state(init_memory(jax.random.key(0), 2, 4), 0)
    state = init_state(init_memory(jax.random.key(0), 2, 4), 2)
    assert isinstance(state, MemoryState)
    with pytest.raises(ValueError, match="B=2"):
        memory_read(state, jnp.zeros((3, 2, 4)))
