"""Plan a job for a machine that need not be there: bytes, FLOPs, collectives, time.

    python -m launch.plan --topology=v5p:8x8x8 --model=llama3.1-8b --mesh=fsdp:64,model:8 \\
        --seq_len=8192 --batch_size=512 --remat=full --out=plan.json
    python -m launch.plan --topology=v5e:4x4 --model=llama3.1-8b --search
    python -m launch.plan --topology=v6e:2x4 --model=path/to/config.json --mesh=model:8 --job=decode
    python -m launch.plan --topology=h200:8 --model=llama3.1-8b --mesh=fsdp:8
    python -m launch.plan --topology=v5e:16x16 --model=dare-100m --mesh=data:256 \\
        --job=recommender --batch_size=16384 --seq_len=200

The job's own jitted program is compiled for the named slice: for TPUs by libtpu on this host's
CPU, for ``cpu:N`` on simulated devices. GPUs are planned by formula, and the report says so.
Exits with 0 when the job fits, 3 when it does not (and prints changes after which it does).
docs/plan.md explains every line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from jaxheads.fields import override, unknown
from launch import flags

if TYPE_CHECKING:
    from launch.plan_jobs import Request
    from launch.plan_report import Report
    from launch.plan_search import Option

EXIT_DOES_NOT_FIT = 3
SECTIONS = ("model", "train")
JOB_NAMES = ("train", "prefill", "decode", "sweep", "recommender")
EVERYDAY: Mapping[str, tuple[str, str]] = {
    "remat": ("model", "remat"),
    "dtype": ("model", "compute_dtype"),
    "grad_accum": ("train", "grad_accum"),
}
"""Flags that are short names of fields."""


def resolve(
    *,
    topology: str | None,
    model: str | None,
    mesh: str = "",
    job: str = "train",
    set: Sequence[str] = (),
    compiler_options: Sequence[str] = (),
    sizes: Mapping[str, int] | None = None,
    **everyday: str | None,
) -> Request:
    """The request that flags describe.

    Args:
      sizes: batch_size, seq_len, new_tokens, sweep_batch where given.
      compiler_options: NAME=VALUE each, for the compiler.

    Raises:
      ValueError: for anything that cannot be read or cannot run.
    """
    from jaxheads.training import TrainConfig
    from launch import plan_jobs

    if not topology:
        raise ValueError("--topology is missing; name a machine, for example v5p:8x8x8 or cpu:8.")
    if not model:
        raise ValueError("--model is missing; give a preset such as llama3.1-8b, or a config.json.")
    settings = flags.parse_settings(set, SECTIONS)
    for name, text in everyday.items():
        if text is None:
            continue
        section, field = EVERYDAY[name]
        if field in settings[section]:
            raise ValueError(f"--{name} and --set {section}.{field} both set it; give one of them.")
        settings[section][field] = str(text)
    if job not in plan_jobs.JOBS:
        raise ValueError(unknown("job", job, plan_jobs.JOBS))
    if not mesh:
        mesh = "fsdp:-1"
    request = plan_jobs.Request(
        name=model,
        model=plan_jobs.JOBS[job].model(model, settings["model"]),
        train=override(TrainConfig(), settings["train"], section="train"),
        topology=topology,
        mesh=mesh,
        job=job,
        compiler_options=tuple(_option(text) for text in compiler_options),
        **(sizes or {}),
    )
    request = plan_jobs.platform_defaults(request, tuple(settings["model"]))
    if request.job != "train" and settings["train"]:
        raise ValueError(
            f"--job={job} does not train a decoder; leave out --set train.* and --grad_accum."
        )
    plan_jobs.check(request)
    return request


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"compiler_options {text!r} cannot be read; write NAME=VALUE.")
    return name, value


def gib(count: float | None) -> str:
    """Bytes in words."""
    if count is None:
        return "?"
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 2**27 else f"{count / 2**20:.2f} MiB"


def table(report: Report) -> str:
    """The report as text."""
    from launch.plan_jobs import JOBS

    request, memory = report.request, report.memory
    content = report.to_json()
    topology = request.slice
    per = "chip" if topology.chip.devices_per_chip == 1 else "device (half a chip)"
    mesh = ",".join(f"{a}:{n}" for a, n in content["mesh"].items()) or "one device"
    shape = f"batch {request.batch_size} x {request.seq_len} {JOBS[request.job].unit}"
    if request.job in ("prefill", "decode"):
        shape += f" + {request.new_tokens} new"
    lines = [
        f"{request.job} {request.name} ({request.model.num_params / 1e9:.3f}B parameters) on "
        f"{request.topology}, mesh {mesh}",
        f"{shape}, remat {request.model.remat}, grad_accum {request.grad_accum}, "
        f"{request.model.compute_dtype} compute, {request.model.param_dtype} parameters",
        "",
        f"  chips             {topology.num_chips}"
        + (f" ({topology.num_devices} devices)" if per != "chip" else ""),
        f"  per {per}:",
        f"    arguments       {gib(memory.arguments)}",
        f"    temporaries     {gib(memory.temporaries)}",
        f"    peak            {gib(memory.peak)}"
        + (f" of {gib(memory.hbm)}, headroom {gib(memory.headroom)}" if memory.hbm else ""),
        *([f"    host memory     {gib(memory.host)}"] if memory.host else []),
        f"  fits              {_VERDICT[report.fits]}",
        f"  model FLOPs       {report.model_flops:.4g}",
    ]
    if report.compiled_flops is not None:
        total = report.compiled_flops * topology.num_devices
        share = report.model_flops / total if total else 0
        lines.append(f"  compiled FLOPs    {total:.4g} ({share:.0%} of them are the model's)")
    if "cycles" in content and content["cycles"]["total"]:
        cycles = content["cycles"]
        lines.append(
            f"  estimated cycles  {cycles['total']:.4g} in {cycles['instructions']} instructions "
            f"({cycles['loops_once']:.4g} with loops counted once)"
        )
    lines += [
        f"  S2 layers         {row['layers']}: {row['tiles']:,} of {row['dense_tiles']:,} tiles of "
        f"{row['block']} x {row['block']} a sequence, ideal speed-up {row['ideal_speedup']:.2f}"
        for row in content.get("sparse_layers", ())
    ]
    lines += [*_collective_lines(content), *_kernel_lines(content), *_time_lines(report)]
    lines.append(f"  compiled in       {report.compile_seconds:.1f} s ({report.source})")
    for title, texts in (("assumptions", report.assumptions), ("notes", report.notes)):
        lines += [f"  {title}:", *(f"    - {t}" for t in texts)] if texts else []
    return "\n".join(lines)


_VERDICT = {True: "yes", False: "NO", None: "unknown: the memory of this machine is not known"}


def _collective_lines(content: dict[str, Any]) -> list[str]:
    rows = [r for r in content.get("collectives", []) if r["wire_bytes"] >= 1]
    if not rows:
        return []
    lines = ["  collectives per step and chip (bytes sent):"]
    for row in rows:
        text = (
            f"    {row['kind']:<20} {row['axes']:<14} {row['count']:>8.0f} x  "
            f"{gib(row['wire_bytes']):>11}  overlapped {row['overlapped_share']:>4.0%}"
        )
        if "seconds" in row:
            text += f"  {row['seconds'] * 1e3:9.2f} ms, {row['exposed_seconds'] * 1e3:9.2f} exposed"
        lines.append(text)
    return lines


def _kernel_lines(content: dict[str, Any]) -> list[str]:
    rows = content.get("kernels", [])
    lines = ["  Pallas kernels per chip:"] if rows else []
    for row in rows:
        flops = "unknown cost" if row["flops"] is None else f"{row['flops']:.4g} FLOPs"
        lines.append(f"    {row['name']:<42} {row['count']:>6.0f} x  {flops}")
    return lines


def _time_lines(report: Report) -> list[str]:
    times = report.times
    if times is None:
        return []
    parts = f"compute {times.compute:.4g} + kernels {times.kernels:.4g} + exposed collectives "
    lines = [f"  estimated time    {times.step:.4g} s = {parts}{times.exposed:.4g}"]
    if times.mfu is not None:
        lines.append(
            f"  share of peak     {times.mfu:.1%} (model FLOPs), "
            f"{times.tokens_per_second:,.0f} tokens/s"
        )
    return lines


def option_lines(options: Sequence[Option]) -> list[str]:
    """A line per planned change: memory, time, result."""
    width = max((len(o.change.text) for o in options), default=0)
    lines = []
    for option in options:
        report, times = option.report, option.report.times
        seconds = "" if times is None else f"  {times.step:10.4g} s"
        mfu = "" if times is None or times.mfu is None else f"  {times.mfu:6.1%} of peak"
        result = "" if option.change.is_same_result else "  (changes the result)"
        fits = "" if report.fits is not False else "  does not fit"
        lines.append(
            f"  {option.change.text:<{width}}  {gib(report.memory.peak):>11}{seconds}{mfu}"
            f"{result}{fits}"
        )
    return lines


def _row(option: Option) -> dict[str, Any]:
    report = option.report
    return {
        "change": option.change.text,
        "same_result": option.change.is_same_result,
        "fits": report.fits,
        "bytes_per_device": report.memory._asdict(),
        "time": None if report.times is None else report.times._asdict(),
        "compile_seconds": report.compile_seconds,
    }


def run(request: Request, *, search: bool = False, most: int = 12) -> tuple[dict[str, Any], int]:
    """Plans, prints, and returns (the JSON content, the exit code)."""
    from launch import plan_search
    from launch.plan_jobs import JOBS
    from launch.plan_report import plan

    say = lambda text: print(text, flush=True)
    has_formulas = JOBS[request.job].flops is None
    if search and not has_formulas:
        raise ValueError(
            f"--search has no formulas for --job={request.job}; plan meshes one by one."
        )
    if search:
        options = plan_search.search(request, most=most, say=say)
        front = plan_search.pareto(options)
        say("\nPareto front, memory against time:")
        say("\n".join(option_lines(front)) or "  nothing fits")
        content = {
            "options": [_row(o) for o in options],
            "pareto": [_row(o) for o in front],
            "best": front[0].report.to_json() if front else None,
        }
        return content, 0 if front else EXIT_DOES_NOT_FIT
    report = plan(request)
    say(table(report))
    content = report.to_json()
    if report.fits is not False:
        return content, 0
    if not has_formulas:
        say("\nDoes not fit; use more chips, a smaller batch, or narrower tables.")
        return content | {"changes": []}, EXIT_DOES_NOT_FIT
    say(f"\nDoes not fit. Planning changes (at most {most}) ...")
    options, tried = plan_search.make_it_fit(request, most=most, say=say)
    say(f"\nThe cheapest changes after which it fits, of {tried} planned:")
    say("\n".join(option_lines(options)) or "  none found; use a larger slice.")
    return content | {"changes": [_row(o) for o in options]}, EXIT_DOES_NOT_FIT


def define_flags() -> None:
    """Defines the flags of this launcher."""
    flags.define_common()
    text, number = absl_flags.DEFINE_string, absl_flags.DEFINE_integer
    text(
        "topology", None, "The machine: v5e:4x4, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, h200:8, cpu:8."
    )
    text("model", None, "A preset (llama3.1-8b, ...), or a Hugging Face config.json or directory.")
    text("mesh", "", "Devices per axis, such as fsdp:64,model:8; default: fsdp over all.")
    absl_flags.DEFINE_enum("job", "train", JOB_NAMES, "What to run.")
    number("batch_size", 8, "Rows, over all devices.")
    number("seq_len", 1024, "Tokens of a training row, or of a prompt.")
    number("new_tokens", 128, "Tokens generated after the prompt (prefill and decode).")
    number("sweep_batch", 1, "Heads that a sweep ablates at once.")
    text(
        "remat",
        None,
        "What the backward pass recomputes: none, dots, full, names:SITE,..., offload.",
    )
    text("dtype", None, "Of computation; default: bfloat16 on TPU and GPU, float32 on CPU.")
    text("grad_accum", None, "Microbatches of a step.")
    absl_flags.DEFINE_multi_string("compiler_options", [], "NAME=VALUE for the compiler.")
    absl_flags.DEFINE_bool("search", False, "Try meshes and remat policies; print the best.")
    number("max_plans", 12, "Most variations to plan, for --search and for what does not fit.")
    text("out", None, "File for the report as JSON.")
    text("workdir", None, "Directory for the report as plan.json.")


def main() -> int:
    """Runs the command; returns the exit code."""
    from jaxheads.parallel.topology import parse_topology
    from launch.plan_report import CompilerError

    given = absl_flags.FLAGS
    values: dict[str, Any] = given.flag_values_dict()
    if given.topology:
        machine = parse_topology(given.topology)
        _host_platform(machine.num_devices if machine.chip.platform == "cpu" else 0)
    names = ("topology", "model", "mesh", "job", "set", "compiler_options", *EVERYDAY)
    request = resolve(
        **{name: values[name] for name in names},
        sizes={n: values[n] for n in ("batch_size", "seq_len", "new_tokens", "sweep_batch")},
    )
    try:
        content, code = run(request, search=given.search, most=given.max_plans)
    except CompilerError as error:
        raise ValueError(str(error)) from error
    content["provenance"] = flags.provenance()
    place = given.out or (given.workdir and str(Path(given.workdir) / "plan.json"))
    if place:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        flags.write_json(Path(place), content)
        print(f"written to {place}")
    return code


def _host_platform(devices: int) -> None:
    """This host only compiles: its CPU, with `devices` simulated ones where asked."""
    import jax

    if devices:
        flags.simulate_devices(devices)
    else:
        jax.config.update("jax_platforms", "cpu")


if __name__ == "__main__":
    define_flags()
    flags.run(main)
