"""The pieces that fused kernels compute: splash interpreted, and the GPU route by XLA."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention import distributed_attention, ring_kernels
from tests.attention import split as problems
from tests.attention.split import assert_exact, exact, make_arrays, make_mesh, split

LENGTH = 512


@pytest.fixture
def interpreted(monkeypatch):
    """Both kernels where there is no TPU or GPU."""
    monkeypatch.setattr(problems, "HEAD_DIM", 128)
    runs = {
        "splash": functools.partial(ring_kernels.splash_run, interpret=True),
        "cudnn": functools.partial(ring_kernels.cudnn_run, implementation="xla"),
    }
    monkeypatch.setattr(ring_kernels, "RUNS", runs)
    gradients = functools.partial(ring_kernels.pieces_gradients, interpret=True)
    monkeypatch.setattr(ring_kernels, "GRADIENTS", {"splash": gradients})
    monkeypatch.setattr(ring_kernels, "choose_local", lambda walk, *_: walk.local)


@pytest.mark.parametrize(
    "local, layout, options",
    [
        ("splash", "zigzag", {"causal": True, "kv_lengths": np.array([300, 512], np.int32)}),
        ("cudnn", "zigzag", {"causal": True}),
        pytest.param("splash", "striped", {"causal": True}, marks=pytest.mark.slow),
        pytest.param("splash", "contiguous", {"causal": True}, marks=pytest.mark.slow),
        pytest.param("splash", "contiguous", {}, marks=pytest.mark.slow),
        pytest.param("cudnn", "contiguous", {"causal": True}, marks=pytest.mark.slow),
    ],
)
def test_blocks_by_kernels_equal_float64(interpreted, local, layout, options):
    arrays = make_arrays(2, 1, LENGTH, LENGTH)
    more = {"local_impl": local, "block_q": 128, "block_k": 128}
    found = split(arrays, options, make_mesh(seq=2), "ring", layout, **more)
    assert_exact(found, exact(arrays, options), rtol=2e-5)


@pytest.mark.slow
def test_segments_by_splash(interpreted):
    options = {"causal": True, "segment_ids": problems.segments(LENGTH)}
    arrays = make_arrays(1, 1, LENGTH, LENGTH)
    more = {"local_impl": "splash", "block_q": 128, "block_k": 128}
    found = split(arrays, options, make_mesh(seq=2), "gather", "zigzag", **more)
    assert_exact(found, exact(arrays, options), rtol=2e-5)


def test_a_kernel_asked_for_by_name_is_used_or_refused():
    x = jnp.ones((1, 256, 1, 128))
    for name, match in (("splash", "does not run on cpu"), ("cudnn", "does not run on cpu")):
        with pytest.raises(NotImplementedError, match=match):
            distributed_attention(
                x, x, x, mesh=make_mesh(seq=2), schedule="ring", local_impl=name, causal=True
            )


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_relations_say_what_positions_say(layout):
    """Every pair of pieces, in every step and on every device, against the global positions."""
    from jaxheads.attention.layouts import local_index
    from jaxheads.attention.ring import Walk

    n, length = 4, 8
    walk = Walk("ring", "context", n, layout, True, None, 1.0, None, 1, 1, "splash", False)
    pieces = 2 if layout == "zigzag" else 1
    index = lambda rank: np.split(np.asarray(local_index(layout, length, n, rank)), pieces)
    for step in range(n):
        for rank in range(n):
            source = (rank - step) % n
            for i, q in enumerate(index(rank)):
                for j, k in enumerate(index(source)):
                    kind = ring_kernels.relation(walk, i, j, step, rank, source)
                    if not isinstance(kind, str):
                        kind = kind[1] if kind[0] else kind[2]
                    size = len(q)
                    expected = {
                        "full": np.ones((size, size), bool),
                        "none": np.zeros((size, size), bool),
                        "causal": np.tri(size, dtype=bool),
                        "below": np.tri(size, k=-1, dtype=bool),
                    }[kind]
                    np.testing.assert_array_equal(q[:, None] >= k[None, :], expected)
