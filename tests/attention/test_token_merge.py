"""Merged tokens against a loop over tokens, and what must hold for every plan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.attention.token_merge import bipartite_soft_matching, merge, sizes_after, unmerge

B, GRID, STRIDE, C = 3, (4, 6), (2, 3), 5
N, CELLS = 24, 4


def images(seed=0):
    return np.random.default_rng(seed).normal(size=(B, N, C)).astype(np.float32)


def clusters_of(x, into, r):
    """Of one image, a loop: the tokens of every merged token, in order."""
    x = x / np.linalg.norm(x.astype(float), axis=-1, keepdims=True)
    sources = [t for t in range(len(x)) if t not in into]
    alike = {t: [x[t] @ x[d] for d in into] for t in sources}
    order = sorted(sources, key=lambda t: -max(alike[t]))  # stable
    members = [[d] for d in into]
    for t in order[:r]:
        members[int(np.argmax(alike[t]))].append(t)
    return [[t] for t in order[r:]] + members


PLAN = jax.jit(bipartite_soft_matching, static_argnums=(1, 2, 3, 4))


@jax.jit
def there_and_back(x, plan):
    few = merge(x, plan)
    return few, unmerge(few, plan)


@pytest.mark.parametrize("seed", [None, 1])
def test_equals_a_loop(seed):
    x, r, r_agent = images(), 9, 17
    plan = PLAN(x, GRID, STRIDE, r, r_agent, None if seed is None else jax.random.key(seed))
    assert (plan.num_tokens, plan.num_agents) == (N - r, N - r_agent)
    ends = np.asarray(plan.slots) >= N - r - CELLS  # in a destination's slot
    cells = np.arange(N).reshape(2, 2, 2, 3).swapaxes(1, 2).reshape(CELLS, 6)
    if seed is None:
        into = cells[:, 0]
    else:  # the one token of each cell that no image ever leaves unmerged or moves to another cell
        bare = PLAN(x, GRID, STRIDE, 0, 0, jax.random.key(seed))
        into = np.flatnonzero((np.asarray(bare.slots) >= N - CELLS).all(0))
        into = sorted(into, key=lambda t: [t in c for c in cells].index(True))
        assert [sum(t in c for t in into) for c in cells] == [1] * CELLS
    assert ends[:, into].all()
    for p, size in ((plan, r), (plan.for_agents, r_agent)):
        few, all_ = jax.device_get(there_and_back(x, p))
        for b in range(B):
            wanted = clusters_of(x[b], list(into), size)
            np.testing.assert_allclose(few[b], [x[b, m].mean(0) for m in wanted], atol=1e-6)
            back = all_[b]
            for m in wanted:
                np.testing.assert_array_equal(back[m], np.broadcast_to(back[m[0]], (len(m), C)))
                if len(m) == 1:
                    np.testing.assert_array_equal(back[m[0]], x[b, m[0]])


def test_merging_nothing_is_the_identity():
    x = images()
    plan = PLAN(x, GRID, STRIDE, 0, 0, jax.random.key(0))
    np.testing.assert_array_equal(there_and_back(x, plan)[1], x)
    np.testing.assert_array_equal(np.sort(plan.slots, axis=1), [np.arange(N)] * B)


def test_merging_everything_leaves_a_mean_a_cell_of_matches():
    x = images()
    plan = PLAN(x, GRID, STRIDE, 999, 999)
    assert plan.num_tokens == plan.num_agents == CELLS
    few = np.asarray(there_and_back(x, plan)[0])
    sizes = np.stack([np.bincount(s, minlength=CELLS) for s in np.asarray(plan.slots)])
    np.testing.assert_allclose((few * sizes[..., None]).sum(1), x.sum(1), atol=1e-5)


def test_ties_go_to_the_first():
    plan = PLAN(np.ones((1, N, C), np.float32), GRID, STRIDE, 2, 2)
    np.testing.assert_array_equal(plan.slots[0, [1, 2]], [N - 2 - CELLS] * 2)  # into the first cell
    np.testing.assert_array_equal(plan.slots[0, [4, 5]], [0, 1])


def test_cropped_grid_and_gradients():
    x = np.random.default_rng(0).normal(size=(1, 35, C)).astype(np.float32)

    def total(x):
        plan = bipartite_soft_matching(x, (5, 7), (2, 3), 5, 10, crop=True)
        few = merge(x, plan)
        return jnp.sum(jnp.sin(few) * jnp.arange(30)[:, None]), (plan, few)

    slope, (plan, few) = jax.device_get(jax.jit(jax.grad(total, has_aux=True))(x))
    assert plan.num_tokens == 30 and plan.num_agents == 25
    sizes = np.bincount(plan.slots[0])
    by_token = (np.cos(few[0]) * np.arange(30)[:, None] / sizes[:, None])[plan.slots[0]]
    np.testing.assert_allclose(slope[0], by_token, atol=1e-5)


def test_sizes():
    assert sizes_after((64, 64), (4, 4), 0.4, 0.95) == (4096 - 1638, 256)  # capped: one a cell
    assert sizes_after((64, 64), (2, 2), 0.4, 0.5) == (4096 - 1638, 2048)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: bipartite_soft_matching(images(), (4, 5), (2, 1), 1, 1), r"must be \[B,20,C\]"),
        (lambda: bipartite_soft_matching(images(), GRID, (3, 3), 1, 1), "does not divide grid"),
        (lambda: bipartite_soft_matching(images(), GRID, (5, 3), 1, 1), "must lie between 1 and"),
        (lambda: bipartite_soft_matching(images(), GRID, STRIDE, -1, 1), "r=-1"),
        (lambda: sizes_after(GRID, (2, 2), 0.8, 0.9), r"ratio=0.8 must lie in 0..0.75"),
        (lambda: sizes_after(GRID, (2, 2), 0.5, 1.5), "agent_ratio=1.5"),
        (lambda: merge(images()[:, 1:], PLAN(images(), GRID, STRIDE, 1, 1)), "the plan is for"),
        (lambda: unmerge(images(), PLAN(images(), GRID, STRIDE, 1, 1)), "merged tokens"),
    ],
)
def test_bad_input(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
