"""A plan: a request compiled, weighed against its machine, and put into words.

`plan(request)` gives a `Report`; `Report.to_json()` is what ``--out`` writes, `launch.plan.table`
prints it.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxheads.fields import to_json
from jaxheads.parallel.program import Collective, Kernel, Summary, analyze, compile_with_text
from jaxheads.parallel.topology import Chip
from jaxheads.training.metrics import flops_per_token
from launch import plan_jobs
from launch.plan_jobs import Request

KERNEL_EFFICIENCY = 0.5
"""Share of the peak that attention kernels are taken to reach."""
TORUS_LINKS = 2
"""Links a collective over one mesh axis is taken to use: both ways along one dimension."""


class CompilerError(Exception):
    """The compiler refused the program for another reason than its memory."""


class Memory(NamedTuple):
    """Bytes of one device. None: not known, because the program does not fit."""

    arguments: int
    """Parameters, optimiser state and batch."""
    temporaries: int | None
    outputs: int | None
    aliased: int | None
    """Outputs that take the place of arguments (donation)."""
    peak: int
    """Most bytes in use at once; what the compiler asked for when it does not fit."""
    hbm: int | None
    """Memory of the device that a program can use."""
    host: int = 0
    """Memory of the host that is used for one device (``remat=offload``, an offloaded cache)."""

    @property
    def headroom(self) -> int | None:
        """Bytes left; negative when it does not fit."""
        return None if self.hbm is None else self.hbm - self.peak


class Times(NamedTuple):
    """Estimated seconds of one execution."""

    compute: float
    """The compiler's cycles at the chip's clock."""
    kernels: float
    """Pallas kernels."""
    exposed: float
    """Collectives, where nothing is scheduled to hide them."""
    step: float
    tokens_per_second: float
    mfu: float | None
    """Model FLOPs over peak FLOPs of all chips for that long."""


@dataclass(frozen=True)
class Report:
    """What a request costs on its machine."""

    request: Request
    source: str
    """compiled, or analytic where no compiler is at hand."""
    fits: bool | None
    """None: unknown, because the memory of the machine is."""
    memory: Memory
    model_flops: float
    """FLOPs the job needs, over all devices."""
    compiled_flops: float | None
    """FLOPs the program spends per device: products outside kernels and those of kernels."""
    times: Times | None
    summary: Summary | None
    assumptions: tuple[str, ...]
    notes: tuple[str, ...] = ()
    lower_seconds: float = 0.0
    compile_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        request, topology = self.request, self.request.slice
        summary = self.summary
        result: dict[str, Any] = {
            "model": request.name,
            "job": request.job,
            "topology": request.topology,
            "mesh": {a: n for a, n in request.mesh_shape.items() if n > 1},
            "batch_size": request.batch_size,
            "seq_len": request.seq_len,
            "remat": request.model.remat,
            "grad_accum": request.grad_accum,
            "chips": topology.num_chips,
            "devices": topology.num_devices,
            "num_params": request.model.num_params,
            "source": self.source,
            "fits": self.fits,
            "bytes_per_device": {**self.memory._asdict(), "headroom": self.memory.headroom},
            "flops": {"model": self.model_flops, "compiled_per_device": self.compiled_flops},
            "time": None if self.times is None else self.times._asdict(),
        }
        if rows := sparse_rows(request):
            result["sparse_layers"] = rows
        if (describe := plan_jobs.JOBS[request.job].describe) is not None:
            result[request.job] = describe(request)
        if summary is not None:
            result["cycles"] = {
                "total": summary.cycles,
                "loops_once": summary.cycles_once,
                "instructions": summary.num_costed,
                "by_opcode": dict(summary.cycles_by_opcode),
            }
            result["collectives"] = collective_rows(summary, topology.chip)
            result["kernels"] = kernel_rows(summary.kernels)
        return result | {
            "assumptions": list(self.assumptions),
            "notes": list(self.notes),
            "lower_seconds": self.lower_seconds,
            "compile_seconds": self.compile_seconds,
            "settings": to_json(request),
        }


def plan(request: Request) -> Report:
    """The report of a request: compiled where there is a compiler, analytic for GPUs.

    Raises:
      ValueError: for a request that cannot run.
      CompilerError: for a program that the compiler refuses, but not for its memory.
    """
    if request.slice.chip.platform == "gpu":
        from launch.plan_analytic import analytic_report

        if plan_jobs.JOBS[request.job].flops is not None:
            raise ValueError(
                f"job={request.job} has no formulas for {request.topology}; plan it for a TPU or "
                "for cpu:N, which are compiled for."
            )
        return analytic_report(request)
    job = plan_jobs.lower(request)
    chip = request.slice.chip
    start = time.perf_counter()
    try:
        compiled, text = compile_with_text(
            job.lowered, dict(request.compiler_options), platform=chip.platform
        )
    except RuntimeError as error:
        needed = out_of_memory(str(error))
        if needed is None:
            raise CompilerError(
                f"the compiler refuses this program: {str(error).strip().splitlines()[0]}"
            ) from error
        seconds = time.perf_counter() - start
        peak = max(needed, job.argument_bytes)
        memory = Memory(job.argument_bytes, None, None, None, peak, chip.hbm_bytes)
        return Report(
            request,
            "compiled",
            False,
            memory,
            model_flops(request),
            None,
            None,
            None,
            (),
            ("the compiler ran out of device memory; 'peak' is what it asked for.",),
            job.seconds,
            seconds,
        )
    seconds = time.perf_counter() - start
    summary = analyze(
        text,
        dict(job.mesh.shape),
        unknown_trips=request.unknown_trips,
        kernel_share=request.kernel_share,
    )
    memory = measure(compiled, chip)
    kernels = kernel_rows(summary.kernels)
    flops = summary.flops + sum(k["flops"] or 0.0 for k in kernels)
    times = estimate(request, summary)
    fits = None if memory.headroom is None else memory.headroom >= 0
    return Report(
        request,
        "compiled",
        fits,
        memory,
        model_flops(request),
        flops,
        times,
        summary,
        () if times is None else assumptions(chip),
        (*summary.notes, *(_kernel_note(kernels)), *plan_jobs.JOBS[request.job].notes),
        job.seconds,
        seconds,
    )


def measure(compiled: Any, chip: Chip) -> Memory:
    """Bytes per device of a compiled program."""
    stats = compiled.memory_analysis()
    total = (
        stats.argument_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
    )
    host = lambda name: getattr(stats, f"host_{name}_size_in_bytes", 0)
    on_host = host("argument") + host("output") - host("alias")
    # The compiler's own peak can exceed the sum, which leaves out buffers outside the entry; it
    # counts arguments and outputs in host memory, which are not the device's.
    peak = max(total, getattr(stats, "peak_memory_in_bytes", 0) - on_host)
    return Memory(
        stats.argument_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        peak,
        chip.hbm_bytes,
        on_host + host("temp"),
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def out_of_memory(message: str) -> int | None:
    """Bytes that an out-of-memory error of the TPU compiler says are needed; None for others."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    patterns = (
        r"required for [^()]*\(([\d.]+)([KMGT]?)\) exceeds available",
        r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm",
        r"([\d.]+)([KMGT]?)i?B? .*exceeds",
    )
    for pattern in patterns:
        found = re.search(pattern, message)
        if found:
            return int(float(found[1]) * _UNITS[found[2]])
    return 0


def model_flops(request: Request) -> float:
    """FLOPs one execution of the job needs, whatever the program spends.

    Training: `flops_per_token`, forward and backward. A prefill leaves out the logits, which
    nobody reads; a decode step attends to a full cache; a sweep runs the layers from each head's
    own on.
    """
    cfg, own = request.model, plan_jobs.JOBS[request.job].flops
    if own is not None:
        return own(request)
    tokens = request.batch_size * request.seq_len
    if request.job == "train":
        return tokens * flops_per_token(cfg, request.seq_len)
    forward = flops_per_token(cfg, request.seq_len) / 3
    logits = 2.0 * cfg.vocab_size * cfg.embed_dim
    if request.job == "prefill":
        return tokens * (forward - logits)
    if request.job == "sweep":
        heads, share = cfg.num_layers * cfg.num_heads, (cfg.num_layers + 1) / (2 * cfg.num_layers)
        edited = heads * (share * tokens * (forward - logits) + request.batch_size * logits)
        return edited + tokens * (forward - logits)
    slots = request.seq_len + request.new_tokens - 1
    seen = sum(
        min(cfg.pattern[i % len(cfg.pattern)].window or slots, slots) for i in range(cfg.num_layers)
    )
    weights = flops_per_token(cfg, 1) / 3 - 4.0 * cfg.num_heads * cfg.head_dim * cfg.num_layers
    return request.batch_size * (weights + 4.0 * cfg.num_heads * cfg.head_dim * seen)


def tokens_of(request: Request) -> int:
    """Tokens one execution of the job deals with."""
    if request.job == "decode":
        return request.batch_size
    heads = request.model.num_layers * request.model.num_heads if request.job == "sweep" else 1
    return heads * request.batch_size * request.seq_len


def sparse_rows(request: Request) -> list[dict[str, Any]]:
    """A row per kind of S2 layer: its tiles over all heads of one sequence, and dense ones'."""
    cfg, rows = request.model, []
    for spec in dict.fromkeys(getattr(cfg, "pattern", ())):
        if spec.attention != "s2":
            continue
        pattern = spec.options.pattern(cfg.num_heads, cfg.num_kv_heads, request.seq_len)
        n = pattern.num_blocks(request.seq_len)
        kinds = [cfg.pattern[i % len(cfg.pattern)] for i in range(cfg.num_layers)]
        rows.append(
            {
                "layers": kinds.count(spec),
                "block": pattern.block,
                "local_blocks": pattern.local_blocks,
                "stride": pattern.stride,
                "tiles": int(pattern.tiles(n).sum()),
                "dense_tiles": cfg.num_heads * n * (n + 1) // 2,
                "ideal_speedup": pattern.ideal_speedup(n),
            }
        )
    return rows


def kernel_rows(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """A row per kernel: executions, and FLOPs over all of them with causality counted.

    Causal kernels skip the tiles above the diagonal: half of them, and half a tile more per row.
    A grid narrower than the keys (a window) visits that share instead.
    """
    rows: dict[str, dict[str, Any]] = {}
    for kernel in kernels:
        row = rows.setdefault(kernel.name, {"name": kernel.name, "count": 0.0, "flops": 0.0})
        row["count"] += kernel.count
        if kernel.flops is None or row["flops"] is None:
            row["flops"] = None
        else:
            row["flops"] += kernel.count * kernel.flops * kernel.visited_share
        row["operands"] = [f"{s.dtype}{list(s.dims)}" for s in kernel.operands]
    return list(rows.values())


def _kernel_note(rows: Sequence[dict[str, Any]]) -> list[str]:
    unknown = [r["name"] for r in rows if r["flops"] is None]
    return [f"no cost is known for kernel {name}; it is left out of the time." for name in unknown]


def collective_seconds(c: Collective, chip: Chip) -> float:
    """Seconds of one execution, if it has its links to itself."""
    links = 1 if c.kind == "collective-permute" else TORUS_LINKS  # which goes one way
    return c.wire_bytes / (links * (chip.link_bandwidth or 1.0))


def exposed_seconds(c: Collective, chip: Chip) -> float:
    """Seconds of one execution that nothing scheduled meanwhile hides."""
    seconds = collective_seconds(c, chip)
    if not c.is_async:
        return seconds
    hidden = c.hidden_cycles / (chip.clock_hz or 1.0)
    hidden += c.hidden_kernel_flops / ((chip.peak_flops or 1.0) * KERNEL_EFFICIENCY)
    return max(0.0, seconds - hidden)


def collective_rows(summary: Summary, chip: Chip) -> list[dict[str, Any]]:
    """`Summary.collective_table` with estimated seconds, where the links are known."""
    rows = summary.collective_table()
    if chip.link_bandwidth is None:
        return rows
    for row in rows:
        mine = [c for c in summary.collectives if (c.kind, c.axes) == (row["kind"], row["axes"])]
        row["seconds"] = sum(c.count * collective_seconds(c, chip) for c in mine)
        row["exposed_seconds"] = sum(c.count * exposed_seconds(c, chip) for c in mine)
    return rows


def estimate(request: Request, summary: Summary) -> Times | None:
    """Seconds of one execution, None without a clock to count cycles by."""
    chip = request.slice.chip
    if chip.clock_hz is None or chip.peak_flops is None:
        return None
    compute = summary.cycles / chip.clock_hz
    flops = sum(r["flops"] or 0.0 for r in kernel_rows(summary.kernels))
    kernels = flops / (chip.peak_flops * KERNEL_EFFICIENCY)
    exposed = sum(c.count * exposed_seconds(c, chip) for c in summary.collectives)
    return total_times(request, compute, kernels, exposed)


def total_times(request: Request, compute: float, kernels: float, exposed: float) -> Times:
    """`Times` of these parts."""
    chip, count = request.slice.chip, request.slice.num_devices
    step = compute + kernels + exposed
    mfu = None
    if chip.peak_flops and step:
        mfu = model_flops(request) / (step * chip.peak_flops * count)
    speed = tokens_of(request) / step if step else 0.0
    return Times(compute, kernels, exposed, step, speed, mfu)


def assumptions(chip: Chip) -> tuple[str, ...]:
    """What an estimated time stands on, in words."""
    return (
        f"compute: the compiler's estimated cycles at {(chip.clock_hz or 0) / 1e9:.2f} GHz (peak "
        "FLOP/s over FLOPs per cycle of the matrix units); they already tell memory-bound from "
        "compute-bound operations.",
        f"attention kernels: FLOPs of the tiles they visit at {KERNEL_EFFICIENCY:.0%} of "
        f"{(chip.peak_flops or 0) / 1e12:.0f} TFLOP/s.",
        f"collectives: bytes of a ring at {TORUS_LINKS} links x "
        f"{(chip.link_bandwidth or 0) / 1e9:.0f} GB/s, of a permutation at one; asynchronous ones "
        "hide behind what is scheduled between their start and end, the others add to the step.",
        "branches with kernels (a causal ring skips what is not seen) count as often as the layout "
        "says they are taken, on average over devices.",
        "no time for input, checkpoints, stragglers or waits between hosts; links shared by two "
        "collectives count for each alone.",
    )


def with_notes(report: Report, *notes: str) -> Report:
    """The report with more notes."""
    return dataclasses.replace(report, notes=(*report.notes, *notes))
