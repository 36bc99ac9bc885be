"""Costs read from compiled programs, against counts made by hand."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import parallel
from jaxheads.parallel.hlo import Frame, parse, trip_count
from jaxheads.parallel.program import analyze, compile_with_text


def text_of(fn, *args, **options) -> str:
    return jax.jit(fn, **options).lower(*args).compile().as_text()


def dots(x, w, times: int):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=times)[0]


def test_flops_of_a_scan_are_those_of_the_unrolled_loop():
    x, w = jnp.ones((8, 16)), jnp.ones((16, 16))
    summary = analyze(text_of(functools.partial(dots, times=7), x, w))
    assert summary.flops == 7 * 2 * 8 * 16 * 16
    assert summary.notes == ()

    def unrolled(x, w):
        for _ in range(7):
            x = jnp.tanh(x @ w)
        return x

    compiled = jax.jit(unrolled).lower(x, w).compile()
    assert analyze(compiled.as_text()).flops == summary.flops
    elementwise = 7 * 8 * 16
    assert summary.flops <= compiled.cost_analysis()["flops"] <= summary.flops + 2 * elementwise


def test_nested_scans_multiply():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    outer = lambda x, w: jax.lax.scan(
        lambda x, _: (dots(x, w, 3) + x @ w, None), x, None, length=5
    )[0]
    assert analyze(text_of(outer, x, w)).flops == 5 * (3 + 1) * 2 * 4 * 8 * 8


def test_the_backward_scan_counts_both_products():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    loss = lambda w: jnp.sum(dots(x, w, 6))
    flops = analyze(text_of(jax.grad(loss), w)).flops
    # forward, dx and dw; the first step's dx is not needed but computed by the loop
    assert flops == 3 * 6 * 2 * 4 * 8 * 8


@pytest.mark.parametrize(
    ("start", "stop", "step", "trips"),
    [(0, 10, 1, 10), (3, 10, 2, 4), (10, 0, -3, 4), (0, 0, 1, 0)],
)
def test_trip_counts_come_from_start_step_and_limit(start, stop, step, trips):
    """The text alone, without the compiler's own count."""

    def loop(x):
        running = lambda c: (c[0] < stop) if step > 0 else (c[0] > stop)
        body = lambda c: (c[0] + step, c[1] @ c[1])
        return jax.lax.while_loop(running, body, (jnp.int32(start), x))[1]

    text = text_of(loop, jnp.ones((4, 4)))
    stripped = text.replace("known_trip_count", "unused")
    if "while(" not in text:  # the compiler removed a loop that never runs
        assert trips == 0
        return
    assert analyze(stripped).flops == trips * 2 * 4**3


def test_an_unknown_trip_count_is_said():
    loop = lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)
    summary = analyze(text_of(loop, jnp.ones((4, 4)), jnp.int32(5)))
    assert summary.flops == 2 * 4**3
    assert "cannot be read" in " ".join(summary.notes)
    text = text_of(loop, jnp.ones((4, 4)), jnp.int32(5))
    assert analyze(text, unknown_trips=3.5).flops == 3.5 * summary.flops


def test_a_loop_that_may_end_early_gives_its_bound():
    def loop(x):
        going = lambda c: (c[0] < 9) & (jnp.sum(c[1]) < 1e9)
        return jax.lax.while_loop(going, lambda c: (c[0] + 1, c[1] @ c[1]), (0, x))[1]

    summary = analyze(text_of(loop, jnp.ones((4, 4))))
    assert summary.flops == 9 * 2 * 4**3
    assert "may end early" in " ".join(summary.notes)


def test_convolutions_count_only_real_positions():
    x, k = jnp.ones((2, 9, 3)), jnp.ones((4, 3, 5))
    conv = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(2,),
        padding=[(2, 1)],
        lhs_dilation=(3,),
        rhs_dilation=(2,),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    out = conv(x, k)
    pairs = sum(
        0 <= at < 25 and at % 3 == 0
        for o in range(out.shape[1])
        for at in (o * 2 + i * 2 - 2 for i in range(4))
    )
    assert analyze(text_of(conv, x, k)).flops == 2 * 2 * 3 * 5 * pairs


MESH = {"data": 2, "fsdp": 2, "model": 2, "context": 1, "expert": 1}
SPLIT = ("data", "fsdp", "model")


def collectives(fn, x, in_specs, out_specs):
    mesh = parallel.make_mesh("data:2,fsdp:2,model:2")
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return analyze(text_of(mapped, x), MESH).collectives


@pytest.mark.parametrize("axes", ["data", "fsdp", "model", ("data", "model"), SPLIT])
@pytest.mark.parametrize("kind", ["all-gather", "all-reduce", "reduce-scatter", "all-to-all"])
def test_collectives_have_their_axes_and_bytes(kind, axes):
    x = jnp.arange(8 * 64.0).reshape(64, 8)
    names = (axes,) if isinstance(axes, str) else axes
    size = math.prod(MESH[a] for a in names)
    run = {
        "all-gather": lambda x: jax.lax.all_gather(x, axes, tiled=True),
        "all-reduce": lambda x: jax.lax.psum(x, axes),
        "reduce-scatter": lambda x: jax.lax.psum_scatter(x, axes, tiled=True),
        "all-to-all": lambda x: jax.lax.all_to_all(x, axes, 0, 1, tiled=True),
    }[kind]
    spec = jax.P(SPLIT, None)
    found = collectives(run, x, spec, spec)
    assert [(c.kind, c.axes, c.group_size) for c in found] == [(kind, "+".join(names), size)]
    local = 4 * 8 * 8  # float32 [8,8] on each device
    payload = local * size if kind == "all-gather" else local
    passes = 2 if kind == "all-reduce" else 1
    assert found[0].payload_bytes == payload
    assert found[0].wire_bytes == passes * payload * (size - 1) / size


def test_a_collective_in_a_scan_counts_every_turn():
    def body(x):
        step = lambda x, _: (jax.lax.psum(x, "model") * 0.5, None)
        return jax.lax.scan(step, x, None, length=11)[0]

    found = collectives(body, jnp.ones((64, 8)), jax.P(SPLIT), jax.P(SPLIT))
    assert [(c.kind, c.count) for c in found] == [("all-reduce", 11.0)]


def test_a_permutation_names_the_axis_it_moves_along():
    ring = lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)])
    (found,) = collectives(ring, jnp.ones((64, 8)), jax.P(SPLIT), jax.P(SPLIT))
    assert (found.kind, found.axes, found.payload_bytes) == ("collective-permute", "fsdp", 256)


GROUPS = """HloModule made_by_hand, is_scheduled=true, num_partitions=8

ENTRY %main (p: f32[16]) -> f32[16] {{
  %p = f32[16]{{0}} parameter(0)
  ROOT %r = f32[16]{{0}} all-reduce(%p), channel_id=1, replica_groups={}, to_apply=%add
}}
"""


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", "model", 2),
        ("[2,4]<=[8]", "fsdp+model", 4),
        ("[2,4]<=[2,2,2]T(1,0,2)", "data+model", 4),
        ("[4,2]<=[2,4]T(1,0)", "data", 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", "data", 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1':(1)2}", "fsdp", 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1':(2)2}", "model", 2),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1','axis_0'}", "data+fsdp+model", 8),
        ("{}", "data+fsdp+model", 8),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", "none", 1),
    ],
)
def test_every_form_of_groups_is_read(groups, axes, size):
    (found,) = analyze(GROUPS.format(groups), MESH).collectives
    assert (found.axes, found.group_size) == (axes, size)
    assert found.wire_bytes == 2 * 64 * (size - 1) / size


SCHEDULE = """HloModule made_by_hand, is_scheduled=true, num_partitions=8

%body (c: (s32[], f32[16])) -> (s32[], f32[16]) {
  %c = (s32[], f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[16]{0} get-tuple-element(%c), index=1
  %s = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=3,
    source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}
  %busy = f32[16]{0} fusion(%x), kind=kLoop, calls=%fused,
    backend_config={"window_config":{"estimated_cycles":"100"}}
  %d = f32[16]{0} collective-permute-done(%s)
  %late = f32[16]{0} fusion(%d), kind=kLoop, calls=%fused,
    backend_config={"window_config":{"estimated_cycles":"30"}}
  ROOT %t = (s32[], f32[16]{0}) tuple(%next, %late)
}

%condition (c.1: (s32[], f32[16])) -> pred[] {
  %c.1 = (s32[], f32[16]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  %eight = s32[] constant(8)
  ROOT %lt = pred[] compare(%i.1, %eight), direction=LT
}

%fused (q: f32[16]) -> f32[16] {
  %q = f32[16]{0} parameter(0)
  ROOT %n = f32[16]{0} negate(%q), backend_config={"estimated_cycles":"7"}
}

ENTRY %main (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  %zero = s32[] constant(0)
  %copied = s32[] copy(%zero)
  %begin = (s32[], f32[16]{0}) tuple(%copied, %p)
  %w = (s32[], f32[16]{0}) while(%begin), condition=%condition, body=%body
  %y = f32[16]{0} get-tuple-element(%w), index=1
  ROOT %r = f32[16]{0} all-reduce(%y), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}},
    to_apply=%add
}
"""


def test_cycles_and_overlap_of_a_schedule():
    program = parse(SCHEDULE)
    main = Frame(program.computations["main"])
    assert trip_count(program, main, main.computation.instructions["w"]) == (4, False)
    summary = analyze(SCHEDULE, MESH)
    assert summary.cycles == 4 * 130  # what is fused is in the fusion's estimate
    assert summary.cycles_once == 130
    moved, reduced = sorted(summary.collectives, key=lambda c: c.kind, reverse=True)
    assert (moved.count, moved.is_async, moved.hidden_cycles) == (4, True, 100)
    assert moved.is_overlapped
    assert not reduced.is_async and not reduced.is_overlapped
    rows = {row["kind"]: row for row in summary.collective_table()}
    assert rows["collective-permute"]["overlapped_share"] == 1
    assert rows["all-reduce"]["overlapped_share"] == 0


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="pass compiled"):
        analyze("module @jit_f {}")


def test_compiling_returns_the_text_too():
    lowered = jax.jit(jnp.tanh).lower(np.ones(4, np.float32))
    compiled, text = compile_with_text(lowered, platform="cpu")
    assert text == compiled.as_text()


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("has_mask", [False, True])
def test_only_kernels_that_mask_are_counted_as_causal(segmented, has_mask):
    """Operands as splash has them: tables, q, k, v, [segment ids,] [numbers of the queries]."""
    ids = ["s32[1024,128]{1,0}", "s32[8,1024]{1,0}"] if segmented else []
    numbers = ["s32[1024,128]{1,0}"] if has_mask else []
    arrays = ["bf16[8,1024,128]{2,1,0}"] * 3
    operands = ["s8[1,2,2]{2,1,0}"] * 2 + arrays + ids + numbers
    name = "splash_mha_fwd" + ("_segmented" if segmented else "") + "_residuals"
    lines = [f"  %p{i} = {shape} parameter({i})" for i, shape in enumerate(operands)]
    given = ", ".join(f"%p{i}" for i in range(len(operands)))
    text = "\n".join(
        [
            "HloModule m, num_partitions=1",
            "",
            "ENTRY %main (p0: s8[1,2,2]) -> bf16[8,1024,128] {",
            *lines,
            f"  ROOT %{name}.1 = bf16[8,1024,128]{{2,1,0}} custom-call({given}), "
            'custom_call_target="tpu_custom_call"',
            "}",
        ]
    )
    (kernel,) = analyze(text).kernels
    assert kernel.flops == 2 * 2 * 8 * 1024 * 1024 * 128
    assert kernel.visited_share == (0.75 if has_mask else 1.0)
