"""What a compiled program costs, read from its text: cycles, FLOPs, collectives, kernels.

    summary = analyze(compiled.as_text(), dict(mesh.shape))
    summary.cycles, summary.flops, summary.collective_table()

XLA's own `cost_analysis` counts the body of a loop once; here everything is multiplied by the
trip counts of the loops around it. `compile_with_text` compiles and gets the text where
`as_text` cannot read it back. No devices are touched.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxheads.parallel.hlo import Frame, Instruction, Program, Shape, parse, trip_count

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_HALVES = ("_causal", "_below")  # ends of the names of kernels that skip tiles past the diagonal
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")


@dataclass(frozen=True)
class Collective:
    """A communication of the program; all numbers are those of one chip and one execution."""

    name: str
    kind: str
    """One of `KINDS`."""
    axes: str
    """Mesh axes it runs over, joined by "+" ("fsdp", "data+fsdp"); "none" for a group of one."""
    group_size: int
    payload_bytes: int
    """The whole array: the result of an all-gather, the operand of every other kind."""
    wire_bytes: float
    """Bytes a chip sends in a ring: payload (g-1)/g, twice that for an all-reduce."""
    count: float
    """Executions: the product of the trip counts around it."""
    is_async: bool
    """Started and awaited by separate instructions."""
    hidden_cycles: float = 0.0
    """Estimated cycles of what is scheduled between start and end."""
    hidden_kernel_flops: float = 0.0
    """FLOPs of the Pallas kernels scheduled between start and end."""

    @property
    def is_overlapped(self) -> bool:
        """Asynchronous, with something to compute meanwhile."""
        return self.is_async and (self.hidden_cycles > 0 or self.hidden_kernel_flops > 0)


@dataclass(frozen=True)
class Kernel:
    """A Pallas kernel: the compiler has no estimate for it."""

    name: str
    count: float
    """Executions, times the trip counts."""
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    flops: float | None
    """FLOPs of one execution over all tiles: the kernel's own cost estimate, or from the shapes
    for attention kernels (masked tiles that it skips included); None when unknown."""
    grid_share: float
    """Tiles the grid visits at most, over all tiles: below 1 where the kernel's table of blocks
    is narrower than the keys (sliding windows)."""
    causal_share: float
    """Tiles on and below the diagonal, over all tiles."""

    @property
    def visited_share(self) -> float:
        """Share of the tiles that are computed; splash attention skips masked ones, and the
        library's masks are causal."""
        is_causal = self.name.startswith("splash") and "no_mask" not in self.name
        is_causal |= self.name.endswith(_HALVES)
        return min(self.grid_share, self.causal_share) if is_causal else self.grid_share

    @property
    def operand_bytes(self) -> int:
        """Bytes read and written at least once."""
        return sum(s.num_bytes for s in (*self.operands, *self.results))


@dataclass(frozen=True)
class Summary:
    """Costs of one execution of a program on one chip."""

    cycles: float
    """``estimated_cycles`` times the trip counts of the loops around."""
    cycles_once: float
    """The same with every loop body counted once."""
    num_costed: int
    """Instructions that carry an estimate."""
    cycles_by_opcode: Mapping[str, float]
    flops: float
    """FLOPs of matrix products and convolutions (2 per multiply-add), loops multiplied out;
    Pallas kernels apart."""
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]
    notes: tuple[str, ...]
    """What could not be known, in words; empty when every count is exact."""

    def collective_table(self) -> list[dict[str, Any]]:
        """A row per kind and mesh axes: executions, bytes, and the share that overlaps compute."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for c in self.collectives:
            row = rows.setdefault(
                (c.kind, c.axes),
                {"kind": c.kind, "axes": c.axes, "group_size": 0, "count": 0.0}
                | dict.fromkeys(("payload_bytes", "wire_bytes", "async_bytes", "hidden"), 0.0),
            )
            row["group_size"] = max(row["group_size"], c.group_size)
            row["count"] += c.count
            row["payload_bytes"] += c.count * c.payload_bytes
            row["wire_bytes"] += c.count * c.wire_bytes
            row["async_bytes"] += c.count * c.wire_bytes * c.is_async
            row["hidden"] += c.count * c.wire_bytes * c.is_overlapped
        for row in rows.values():
            wire = row["wire_bytes"]
            row["async_share"] = row.pop("async_bytes") / wire if wire else 0.0
            row["overlapped_share"] = row.pop("hidden") / wire if wire else 0.0
        return sorted(rows.values(), key=lambda r: -r["wire_bytes"])


def analyze(
    text: str,
    mesh_shape: Mapping[str, int] | None = None,
    *,
    unknown_trips: float = 1.0,
    kernel_share: float = 1.0,
) -> Summary:
    """The costs of ``compiled.as_text()``.

    Args:
      mesh_shape: axis -> size in the mesh's order (``dict(mesh.shape)``), to name the axes of
        collectives. Devices are numbered as in ``mesh.devices.flat``.
      unknown_trips: what a loop counts whose trip count is not in the program (a note says so).
      kernel_share: how often a conditional takes the branch with Pallas kernels.
    """
    program = parse(text)
    shape = dict(mesh_shape or {})
    if math.prod(shape.values()) != program.num_partitions:
        shape = {"devices": program.num_partitions}
    walk = _Walk(program, shape, unknown_trips, kernel_share)
    totals = walk.visit(Frame(program.computations[program.entry]))
    return Summary(
        totals.cycles,
        totals.cycles_once,
        totals.num_costed,
        totals.by_opcode,
        totals.flops,
        tuple(totals.collectives),
        tuple(totals.kernels),
        walk.said(),
    )


def compile_with_text(
    lowered: Any, compiler_options: Mapping[str, Any] | None = None, *, platform: str = "tpu"
) -> tuple[Any, str]:
    """``(lowered.compile(), its text)``.

    `as_text` parses the program a second time, which fails where the compiler is newer than
    jaxlib (SparseCore offloading on v5p and later with libtpu 0.0.52); then the compiler's own
    dump is read, from a directory that is deleted again.

    Args:
      compiler_options: of `jax.stages.Lowered.compile`.
      platform: what is compiled for; the compiler is asked for its dump on "tpu" only.
    """
    options = dict(compiler_options or {})
    with tempfile.TemporaryDirectory(prefix="jaxheads-plan-") as place:
        dump: dict[str, Any] = {}
        if "xla_dump_to" not in options and platform == "tpu":
            dump = {"xla_dump_to": place, "xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": ""}
        compiled = lowered.compile(compiler_options=options | dump or None)
        if not dump:
            return compiled, compiled.as_text()
        dumped = sorted(
            (p for p in Path(place).glob("*.txt") if p.name.endswith("after_codegen.txt")),
            key=lambda p: p.stat().st_size,
        )
        return compiled, dumped[-1].read_text() if dumped else compiled.as_text()


@dataclass
class _Totals:
    cycles: float = 0.0
    cycles_once: float = 0.0
    num_costed: int = 0
    flops: float = 0.0
    by_opcode: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    kernels: list[Kernel] = dataclasses.field(default_factory=list)

    @property
    def kernel_flops(self) -> float:
        return sum(k.count * (k.flops or 0.0) * k.visited_share for k in self.kernels)

    def add(self, other: _Totals, times: float = 1.0) -> None:
        self.cycles += times * other.cycles
        self.cycles_once += other.cycles_once
        self.num_costed += other.num_costed
        self.flops += times * other.flops
        for opcode, cycles in other.by_opcode.items():
            self.by_opcode[opcode] = self.by_opcode.get(opcode, 0.0) + times * cycles
        scaled = lambda x: dataclasses.replace(x, count=x.count * times)
        self.collectives += [scaled(c) for c in other.collectives]
        self.kernels += [scaled(k) for k in other.kernels]


class _Open(NamedTuple):
    collectives: tuple[Collective, ...]
    cycles: float
    kernel_flops: float


class _Walk:
    """One pass over the call graph; `notes` collects what is not exact."""

    def __init__(
        self,
        program: Program,
        mesh_shape: Mapping[str, int],
        unknown_trips: float,
        kernel_share: float,
    ):
        self.unknown_trips = unknown_trips
        self.kernel_share = kernel_share
        self.program = program
        self.mesh_shape = mesh_shape
        self.notes: dict[tuple[str, str], set[str]] = {}
        # A collective split over fusions (start, continue, done) shows once per part.
        self.started = {
            _channel(i)
            for c in program.computations.values()
            for i in c.instructions.values()
            if _part(c, i) == "start"
        }

    def said(self) -> tuple[str, ...]:
        """A line for each kind of doubt, however many loops share it."""
        subject = lambda kind, names: (
            f"{kind} {min(names)}" if len(names) == 1 else f"{len(names)} {kind}s"
        )
        lines = [f"{subject(kind, names)}: {text}" for (kind, text), names in self.notes.items()]
        return tuple(sorted(lines))

    def _note(self, kind: str, instruction: Instruction, text: str) -> None:
        self.notes.setdefault((kind, text), set()).add(instruction.name)

    def visit(self, frame: Frame) -> _Totals:
        """Costs of one execution of a computation."""
        totals = _Totals()
        opened: dict[str, _Open] = {}
        for instruction in frame.computation.instructions.values():
            kind, step = _split_opcode(instruction.opcode)
            if kind in KINDS or kind == "async":
                self._communicate(frame, instruction, kind, step, totals, opened)
            elif instruction.opcode == "fusion" and self._async_parts(instruction):
                self._async_fusion(frame, instruction, totals, opened)
            else:
                self._compute(frame, instruction, totals)
        for left in opened.values():
            totals.collectives += left.collectives
        return totals

    def _compute(self, frame: Frame, instruction: Instruction, totals: _Totals) -> None:
        program = self.program
        found = _CYCLES.search(instruction.attributes)
        if found:
            cycles = float(found[1])
            totals.add(_Totals(cycles, cycles, 1, 0.0, {instruction.opcode: cycles}))
        match instruction.opcode:
            case "while":
                trips = trip_count(program, frame, instruction)
                body = instruction.called("body")[0]
                inner = self.visit(Frame(program.computations[body], instruction, frame))
                has_cost = inner.cycles or inner.flops or inner.collectives or inner.kernels
                if has_cost and trips.count is None:
                    what = "the trip count cannot be read from the program; counted"
                    self._note("loop", instruction, f"{what} {self.unknown_trips:g} times.")
                elif has_cost and trips.is_bound:
                    self._note("loop", instruction, f"may end early; counted {trips.count} times.")
                totals.add(inner, self.unknown_trips if trips.count is None else float(trips.count))
            case "fusion" | "call":
                called = instruction.called("calls") or instruction.called("to_apply")
                inner = self.visit(Frame(program.computations[called[0]], instruction, frame))
                if found:  # its estimate covers what is fused
                    inner.cycles = inner.cycles_once = inner.num_costed = 0
                    inner.by_opcode = {}
                totals.add(inner)
            case "conditional":
                branches = instruction.called("branch_computations") or (
                    *instruction.called("true_computation"),
                    *instruction.called("false_computation"),
                )
                costs = [
                    self.visit(Frame(program.computations[b], instruction, frame)) for b in branches
                ]
                most = max(costs, key=lambda c: (c.kernel_flops, c.cycles, c.flops))
                share = self.kernel_share if most.kernels else 1.0
                if most.cycles or most.flops or most.collectives or most.kernels:
                    what = "the costliest branch is counted"
                    what += "." if share == 1 else f" {share:g} times."
                    self._note("conditional", instruction, what)
                totals.add(most, share)
            case "dot":
                totals.flops += _dot_flops(frame, instruction)
            case "convolution":
                totals.flops += _convolution_flops(frame, instruction)
            case "custom-call" if 'custom_call_target="tpu_custom_call"' in instruction.attributes:
                totals.kernels.append(_kernel(frame, instruction))

    def _communicate(self, frame, instruction, kind, step, totals, opened) -> None:
        if step in ("update", "done"):
            begun = opened.pop(instruction.operands[0], None)
            if begun is not None and step == "update":
                opened[instruction.name] = begun
            elif begun is not None:
                totals.collectives += [self._close(c, begun, totals) for c in begun.collectives]
            return
        if kind == "async":
            called = self.program.computations[instruction.called("calls")[0]]
            inner = self.visit(Frame(called, instruction, frame))
            found = tuple(dataclasses.replace(c, is_async=True) for c in inner.collectives)
            inner.collectives = []
            totals.add(inner)
        else:
            if _channel(instruction) in self.started:
                return
            found = (self._collective(frame, instruction, kind, step == "start"),)
        if step == "start":
            opened[instruction.name] = _Open(found, totals.cycles, totals.kernel_flops)
        else:
            totals.collectives += found

    def _async_fusion(self, frame, instruction, totals, opened) -> None:
        """A fusion that starts, carries on or ends collectives of a chain of fusions."""
        computation = self.program.computations[instruction.called("calls")[0]]
        inner = Frame(computation, instruction, frame)
        before = (totals.cycles, totals.kernel_flops)
        self._compute(frame, instruction, totals)
        for part in computation.instructions.values():
            kind, _ = _split_opcode(part.opcode)
            name = _channel(part)
            match _part(computation, part):
                case "start":
                    found = self._collective(inner, part, kind, True)
                    opened[name] = _Open((found,), *before)
                case "done" if name in opened:
                    begun = opened.pop(name)
                    totals.collectives += [self._close(c, begun, totals) for c in begun.collectives]

    def _async_parts(self, instruction: Instruction) -> bool:
        computation = self.program.computations[instruction.called("calls")[0]]
        return any(_channel(i) in self.started for i in computation.instructions.values())

    @staticmethod
    def _close(collective: Collective, begun: _Open, totals: _Totals) -> Collective:
        return dataclasses.replace(
            collective,
            hidden_cycles=totals.cycles - begun.cycles,
            hidden_kernel_flops=totals.kernel_flops - begun.kernel_flops,
        )

    def _collective(self, frame, instruction, kind: str, is_async: bool) -> Collective:
        table = frame.computation.instructions
        operands = instruction.operands[:1] if kind == "collective-permute" else None
        shapes = [
            s
            for name in (instruction.operands if operands is None else operands)
            if name in table
            for s in table[name].shapes
        ]
        size = sum(s.num_bytes for s in shapes)
        if kind == "all-reduce" and "all-reduce-scatter" in frame.computation.name:
            kind = "reduce-scatter"
        members = _members(instruction, kind, math.prod(self.mesh_shape.values()))
        axes, group = _axes(members, self.mesh_shape)
        if kind == "collective-permute":
            group = math.prod(self.mesh_shape.get(a, 1) for a in axes.split("+"))
        if kind == "collective-permute":
            wire = float(size) * (group > 1)
        else:
            payload = size * group if kind == "all-gather" else size
            wire = payload * (group - 1) / group * (2 if kind == "all-reduce" else 1)
            size = payload
        return Collective(instruction.name, kind, axes, group, size, wire, 1.0, is_async)


def _split_opcode(opcode: str) -> tuple[str, str]:
    """``("all-gather", "start")`` of ``"all-gather-start"``; the step is "" for one instruction."""
    base, _, step = opcode.rpartition("-")
    return (base, step) if step in ("start", "update", "done") else (opcode, "")


def _channel(instruction: Instruction) -> str:
    """What the parts of one collective share; unique for an instruction without a channel."""
    found = _CHANNEL.search(instruction.attributes)
    return f"channel {found[1]}" if found else f"instruction {instruction.name}"


def _part(computation, instruction: Instruction) -> str | None:
    """Whether a collective inside a fused computation starts or ends there."""
    if instruction.opcode not in KINDS:
        return None
    for other in computation.instructions.values():
        if other.opcode == "custom-call" and instruction.name in other.operands:
            if "AsyncCollectiveStart" in other.attributes:
                return "start"
            if "AsyncCollectiveDone" in other.attributes:
                return "done"
    return None


def _members(instruction: Instruction, kind: str, num_devices: int) -> np.ndarray:
    """Device numbers [groups, group size]; for a permutation the pairs [pairs, 2]."""
    text = instruction.attributes
    if kind == "collective-permute":
        return _lists(instruction.braces("source_target_pairs") or "")
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))
    named = re.search(r"replica_groups=(?:@)?mesh\[([^\]]*)\]((?:.(?!\{))*?)\s*\{([^}]*)\}", text)
    if named:
        return _named_groups(named[1], named[2], named[3])
    groups = _lists(instruction.braces("replica_groups") or "")
    return groups if groups.size else np.arange(num_devices)[None]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n.strip()]


def _lists(text: str) -> np.ndarray:
    """``"{0,1},{2,3}"`` as an array [2,2]."""
    rows = [_numbers(row) for row in re.findall(r"\{([\d,\s]+)\}", text)]
    return np.array(rows if rows else np.zeros((0, 2)), dtype=np.int64)


def _iota(dims: str, transpose: str | None) -> np.ndarray:
    """``[4,2]T(1,0)``: numbers in order, reshaped and transposed, flat."""
    shape = _numbers(dims)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose(_numbers(transpose)) if transpose else ids).reshape(-1)


def _named_groups(mesh: str, order: str, axes: str) -> np.ndarray:
    """``mesh['x'=4,'y'=2] {'x'}``: groups along the named axes, or parts of them ('x':(1)2)."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    found = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    ids = _iota(found[1], found[2]) if found else np.arange(math.prod(sizes.values()))
    parts: list[int] = []
    wanted: list[int] = []
    chosen = {
        name: (int(pre or 1), int(size) if size else None)
        for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    for name, size in sizes.items():
        if name not in chosen:
            parts.append(size)
            continue
        before, length = chosen[name]
        length = size if length is None else length
        wanted.append(len(parts) + 1)
        parts += [before, length, size // (before * length)]
    rest = [i for i in range(len(parts)) if i not in wanted]
    group = math.prod(parts[i] for i in wanted)
    return ids.reshape(parts).transpose(rest + wanted).reshape(-1, group)


def _axes(members: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, int]:
    """Mesh axes along which the members of a group differ, and the size of a group."""
    if not members.size:
        return "none", 1
    shape = tuple(mesh_shape.values()) or (1,)
    if members.max() >= math.prod(shape):
        return "unknown", members.shape[1]
    coordinates = np.unravel_index(members, shape)
    names = [name for name, c in zip(mesh_shape, coordinates) if bool(np.any(c != c[:, :1]))]
    return "+".join(names) or "none", members.shape[1] if names else 1


def _shape_of(frame: Frame, name: str) -> Shape:
    return frame.computation.instructions[name].shapes[0]


def _dot_flops(frame: Frame, dot: Instruction) -> float:
    left = _shape_of(frame, dot.operands[0])
    contracted = _numbers(dot.braces("lhs_contracting_dims") or "")
    return 2.0 * dot.shapes[0].size * math.prod(left.dims[i] for i in contracted)


def _convolution_flops(frame: Frame, conv: Instruction) -> float:
    """2 x (input features / groups) x output features x batch x valid window positions.

    TPU compilers write matrix products as convolutions, with padding and dilation; a product with
    padding or with a hole costs nothing.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", conv.attributes)
    if not labels:
        return 0.0
    left = _shape_of(frame, conv.operands[0]).dims
    in_labels, out_labels = labels[1], labels[3]
    out = conv.shapes[0].dims
    window = _window(conv.braces("window") or "", sum(c.isdigit() for c in in_labels))
    flops = 2.0 * left[in_labels.index("f")] * out[out_labels.index("f")]
    flops *= left[in_labels.index("b")]
    for attribute in ("feature_group_count", "batch_group_count"):
        flops /= int(conv.attribute(attribute) or 1)
    for i, w in enumerate(window):
        n = left[in_labels.index(str(i))]
        flops *= _valid_positions(n, out[out_labels.index(str(i))], *w)
    return flops


def _window(text: str, rank: int) -> list[tuple[int, int, int, int, int]]:
    """(size, stride, low padding, input dilation, window dilation) of each spatial dimension."""
    fields = dict(part.split("=", 1) for part in text.split() if "=" in part)

    def of(name: str, default: int) -> list[int]:
        values = fields[name].split("x") if name in fields else [str(default)] * rank
        return [int(v.split("_")[0]) for v in values]

    names = (("size", 1), ("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
    return list(zip(*(of(name, default) for name, default in names), strict=True))


@functools.cache
def _valid_positions(n: int, out: int, size: int, stride: int, pad: int, dilate: int,
                     spread: int) -> int:  # fmt: skip
    """Pairs (output position, window position) that meet an element of the input."""
    few, many = sorted(
        (np.arange(out) * stride - pad, np.arange(size) * spread), key=lambda x: x.shape
    )
    end = (n - 1) * dilate + 1
    total = 0
    for first in few:
        at = many + first
        total += int(np.sum((at >= 0) & (at < end) & (at % dilate == 0)))
    return total


# Matrix products of one tile in each attention kernel: forward q k^T and p v; the backward kernels
# form q k^T and do v^T again.
_PRODUCTS = (
    ("ring_backward_kv", 4),
    ("ring_backward_q", 3),
    ("dkv", 4),
    ("dq", 3),
    ("splash", 2),
    ("flash", 2),
)


def _kernel(frame: Frame, call: Instruction) -> Kernel:
    name = re.sub(r"[.\d]+$", "", call.name)
    table = frame.computation.instructions
    operands = tuple(s for o in call.operands if o in table for s in table[o].shapes[:1])
    own = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', call.attributes)
    values = [s for s in operands if s.dtype in ("bf16", "f32", "f16") and len(s.dims) >= 3]
    products = next((n for word, n in _PRODUCTS if word in name), None)
    flops = None
    if own:
        flops = float(own[1])
    elif products is not None and len(values) >= 3:
        q, k = values[0], values[1]
        products += "dkv" in name and any(s.dims == q.dims for s in call.shapes)  # and dq with it
        flops = 2.0 * products * q.size * k.dims[-2]
    lengths = {s.dims[-2] for s in values}  # which segment ids have too, and tables of tiles not
    tables = [
        s
        for s in operands
        if s.dtype in ("s8", "s32", "s16") and len(s.dims) >= 3 and lengths.isdisjoint(s.dims)
    ]
    share = causal = 1.0
    if tables and not own and tables[0].dims[-2]:
        rows, columns = sorted(tables[0].dims[-2:], reverse=True)
        share = columns / rows
        # Splash without a mask to compute is not given the numbers of its queries [T,128], which
        # look like their segment ids.
        rank_two = [s for s in operands if s.dtype == "s32" and len(s.dims) == 2]
        numbered = sum(s.dims[0] in lengths for s in rank_two) - ("segmented" in name)
        has_mask = "splash" not in name or numbered > 0
        causal = (rows + 1) / (2 * rows) if has_mask else 1.0
    elif name.endswith(_HALVES):
        causal = 0.5
    return Kernel(name, 1.0, operands, call.shapes, flops, share, causal)
