"""What compiled programs contain: the schedule's collective, no whole rows of scores, skips."""

import importlib.util
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention import distributed_attention, shard_sequence, unshard_sequence
from jaxheads.attention.costs import attention_cost, tile_scores
from tests.attention.split import make_mesh

LENGTH, HEADS, WIDTH, RING = 2048, 2, 16, 4


def program(schedule, **options):
    """The text of forward + backward on four devices."""
    mesh = make_mesh(seq=RING)
    spec = jax.sharding.NamedSharding(mesh, jax.P(None, "context"))
    x = jax.ShapeDtypeStruct((1, LENGTH, HEADS * RING, WIDTH), jnp.float32, sharding=spec)

    def loss(q, k, v):
        z = distributed_attention(
            q, k, v, mesh=mesh, schedule=schedule, block_q=64, block_k=64, **options
        )
        return (z * z).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().as_text()


def collectives(text):
    found = re.findall(r" (all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
                       text)  # fmt: skip
    return set(found)


@pytest.mark.parametrize(
    "schedule, layout, wanted",
    [
        ("ring", "zigzag", {"collective-permute"}),
        ("gather", "contiguous", {"all-gather", "reduce-scatter"}),
        ("all_to_all", "striped", {"all-to-all"}),
    ],
)
def test_a_schedule_uses_its_collective_and_holds_no_row_of_scores(schedule, layout, wanted):
    text = program(schedule, layout=layout, causal=True)
    assert collectives(text) == wanted
    sizes = [
        math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)
    ]
    assert max(sizes) >= LENGTH // RING * HEADS * RING * WIDTH  # the search finds the arrays
    # A device's queries against all keys, of one head. (All heads share an array of the tiles.)
    limit = LENGTH // RING * LENGTH if schedule != "all_to_all" else LENGTH * LENGTH
    assert max(sizes) < limit


def test_a_window_ends_the_ring_early():
    text = program("ring", causal=True, window=100)
    # One step: k and v there, k and v again, dk and dv home.
    assert 4 <= len(re.findall(r" collective-permute(?:-start)?\(", text)) <= 6


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("options", [{}, {"window": 9}], ids=["causal", "window"])
def test_blocks_nobody_sees_are_not_computed(layout, options):
    """NaN in keys that a block of queries cannot see must not reach it, as it would if masked."""
    n, length, block = 2, 32, 4
    mesh = make_mesh(seq=n)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, length, 1, 4)).astype(np.float32) for _ in range(3))
    last = 15  # queries from here on may read NaN
    k[:, last + 1 :] = v[:, last + 1 :] = np.nan
    deal = lambda x: shard_sequence(jnp.asarray(x), layout, n)
    z = distributed_attention(
        deal(q), deal(k), deal(v), mesh=mesh, layout=layout, schedule="ring", causal=True,
        block_q=block, block_k=block, **options,
    )  # fmt: skip
    z = np.asarray(unshard_sequence(z, layout, n))
    # In a striped layout a tile spans n times as many tokens.
    clean = last + 1 - (block * n - 1 if layout == "striped" else 0)
    assert np.isfinite(z[:, :clean]).all()
    assert np.isnan(z[:, last + block * n :]).all()


@pytest.mark.parametrize("n", [2, 4, 8])
def test_balance(n):
    """Zigzag is even; contiguous has 2n/(n+1) times the mean on its last device."""
    scores = lambda layout, block: tile_scores(
        layout, 64 * n, 64 * n, n, True, None, block, block
    )  # fmt: skip
    assert scores("contiguous", 64).tolist() == [64 * 64 * (r + 1) for r in range(n)]
    assert (scores("zigzag", 32) == (2 * n + 1) * 32 * 32).all()
    assert (scores("striped", 64) == n * 64 * 64).all()


def test_tiles_counted_are_those_that_hold_a_visible_score():
    from jaxheads.attention.layouts import layout_order

    for layout in ("contiguous", "zigzag", "striped"):
        order = layout_order(layout, 32, 2)
        for window in (None, 6, (3, 0)):
            left = {None: 99, 6: 5, (3, 0): 3}[window]
            gap = order[:, None] - order[None, :]
            sees = (gap >= 0) & (gap <= left)
            tiles = sees.reshape(8, 4, 2, 4, 4).any(axis=(1, 4))  # [q block, device, k block]
            first = tiles.argmax(-1)
            last = 4 - tiles[..., ::-1].argmax(-1)
            run = np.where(tiles.any(-1), last - first, 0).sum(-1).reshape(2, 4).sum(-1) * 16
            np.testing.assert_array_equal(
                tile_scores(layout, 32, 32, 2, True, window, 4, 4),
                run,
                err_msg=f"{layout} {window}",
            )


def test_cost_is_the_formulas():
    call = dict(batch=2, num_queries=4096, num_heads=16, num_kv_heads=4, head_dim=64, heads=2,
                itemsize=2)  # fmt: skip
    ring, gather, exchange = (
        attention_cost(seq=4, schedule=name, **call) for name in ("ring", "gather", "all_to_all")
    )
    assert ring.comm_bytes == gather.comm_bytes == 2 * 1024 * 2 * 64 * 2 * 3 * 2
    assert exchange.comm_bytes == (2 * 8 + 2 * 4) * 1024 * 64 * 2 * 3 / 4 * 2
    assert ring.flops == 4 * 2 * 4096**2 * 16 * 64 / (4 * 2)
    assert ring.peak_bytes < gather.peak_bytes
    alone = attention_cost(**call)
    assert alone.comm_bytes == 0 and alone.flops == 4 * ring.flops
    causal = attention_cost(seq=4, causal=True, layout="zigzag", **call)
    assert 0.5 < causal.flops / ring.flops < 0.6


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_forward_and_backward_compile_for_a_slice(layout):
    """A ring of 16 chips as a scan: splash forward, permutes that run beside it, small memory."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    from jaxheads import parallel

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    mesh = parallel.make_mesh("context:16", devices=devices, exact=True)
    place = jax.sharding.NamedSharding(mesh, jax.P(None, "context"))
    length, heads = 16 * 2048, 2
    x = jax.ShapeDtypeStruct((1, length, heads, 128), jnp.bfloat16, sharding=place)

    def loss(q, k, v):
        z = distributed_attention(q, k, v, causal=True, schedule="ring", layout=layout)
        return (z.astype(jnp.float32) ** 2).sum()

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    text = compiled.as_text()
    assert "tpu_custom_call" in text and "collective-permute-start" in text
    assert "all-gather" not in text
    local = 2 * length // 16 * heads * 128
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * local
