"""Other ways to run a job: what would make it fit, and which meshes and policies are worth it.

Every variation is planned again like the request itself; formulas only decide the order in which
they are tried.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from launch import plan_jobs
from launch.plan_analytic import argument_bytes, quick_seconds, working_bytes
from launch.plan_jobs import Request
from launch.plan_report import CompilerError, Report, plan, tokens_of

REMATS = ("none", "dots", "full")
SPLITS = ("fsdp", "model")
Say = Callable[[str], None]


class Change(NamedTuple):
    """A variation of a request."""

    text: str
    request: Request
    is_same_result: bool
    """The job computes the same; only its speed and memory differ."""
    count: int = 1
    """Settings that change."""


class Option(NamedTuple):
    """A change that was planned."""

    change: Change
    report: Report


def changes(request: Request) -> Iterator[Change]:
    """Single changes that save memory; those that cannot run are left out."""
    for change in _all_changes(request):
        try:
            plan_jobs.check(change.request)
        except ValueError:
            continue
        yield change


def _all_changes(request: Request) -> Iterator[Change]:
    is_train = request.job == "train"
    if is_train:
        order = REMATS.index(request.model.remat) if request.model.remat in REMATS else 0
        for remat in REMATS[order + 1 :]:
            yield Change(f"--remat={remat}", _model(request, remat=remat), True)
        for times in (2, 4, 8):
            count = request.train.grad_accum * times
            train = dataclasses.replace(request.train, grad_accum=count)
            yield Change(
                f"--set train.grad_accum={count}", dataclasses.replace(request, train=train), True
            )
    for mesh in _other_meshes(request):
        yield Change(f"--mesh={mesh}", dataclasses.replace(request, mesh=mesh), True)
    if request.job == "sweep" and request.sweep_batch > 1:
        less = request.sweep_batch // 2
        yield Change(f"--sweep_batch={less}", dataclasses.replace(request, sweep_batch=less), True)
    if is_train and request.train.optimizer in ("adamw", "adam"):
        train = dataclasses.replace(
            request.train, optimizer="adafactor", b1=None, b2=None, eps=None, weight_decay=None
        )
        yield Change(
            "--set train.optimizer=adafactor", dataclasses.replace(request, train=train), False
        )
    if request.model.param_dtype == "float32":
        yield Change(
            "--set model.param_dtype=bfloat16", _model(request, param_dtype="bfloat16"), False
        )
    for less in (request.batch_size // 2, request.batch_size // 4):
        if less:
            yield Change(
                f"--batch_size={less}", dataclasses.replace(request, batch_size=less), False
            )
    if request.seq_len > 1:
        less = request.seq_len // 2
        yield Change(f"--seq_len={less}", dataclasses.replace(request, seq_len=less), False)


def _model(request: Request, **fields) -> Request:
    return dataclasses.replace(request, model=dataclasses.replace(request.model, **fields))


def _spell(shape: dict[str, int]) -> str:
    return ",".join(f"{axis}:{size}" for axis, size in shape.items() if size > 1)


def _other_meshes(request: Request) -> Iterator[str]:
    """The mesh with a factor moved from one axis to another that splits the state further."""
    shape = request.mesh_shape
    for source, target in (("data", "fsdp"), ("data", "model"), ("fsdp", "model")):
        for factor in (2, 4, 8, shape[source]):
            if factor > 1 and shape[source] % factor == 0:
                moved = {source: shape[source] // factor, target: shape[target] * factor}
                yield _spell(shape | moved)


def pairs(singles: Sequence[Change]) -> Iterator[Change]:
    """Two changes of different settings together, of those that keep the result."""
    for first in singles:
        if not first.is_same_result:
            continue
        for second in changes(first.request):
            # One order is enough: remat before grad_accum before mesh.
            if second.is_same_result and _setting(first) > _setting(second):
                yield Change(f"{first.text} {second.text}", second.request, True, 2)


def _covers(change: Change, known: Change) -> bool:
    """Whether `change` touches everything that `known` does."""
    return {*_setting(known).split()} <= {*_setting(change).split()}


def _setting(change: Change) -> str:
    """What changes, without its value."""
    return re.sub(r"=\S+(?= |$)", "", change.text.replace("--set ", ""))


def make_it_fit(
    request: Request, *, wanted: int = 3, most: int = 12, say: Say = print
) -> tuple[list[Option], int]:
    """(the cheapest changes after which the request fits, how many were planned).

    Changes that keep the results come first, single ones before pairs, then by estimated time a
    token. At most `most` plans are made, in an order given by formula.
    """
    if request.slice.chip.platform == "gpu":
        most = 10 * most  # by formula; it costs nothing
    singles = list(changes(request))
    fitting: list[Option] = []
    tried = 0
    queue, later = _ranked([*singles, *pairs(singles)]), []
    while (queue or later) and tried < most and len(fitting) < wanted:
        change = (queue or later).pop(0)
        # A stronger dose of what already fits, or more besides it, teaches little.
        if queue and any(_covers(change, o.change) for o in fitting):
            later.append(change)
            continue
        tried += 1
        report = _try(change, say)
        if report is not None and report.fits:
            fitting.append(Option(change, report))
    return sorted(fitting, key=_cost)[:wanted], tried


def _cost(option: Option) -> tuple[bool, int, float]:
    """What keeps the result is cheaper than what does not, then few changes, then speed."""
    report = option.report
    per_token = _time(report) / tokens_of(report.request)
    return not option.change.is_same_result, option.change.count, per_token


def _ranked(found: Sequence[Change]) -> list[Change]:
    """In the order they are worth planning; those whose arguments alone are too big left out.

    First what fits by formula, then what keeps the result, single changes, speed a token.
    """
    unique = {c.request: c for c in reversed(found)}
    rows = []
    for change in unique.values():
        hbm = change.request.slice.chip.hbm_bytes or math.inf
        held = argument_bytes(change.request)
        if held > hbm:
            continue
        is_tight = held + working_bytes(change.request) > hbm
        per_token = quick_seconds(change.request) / tokens_of(change.request)
        key = (is_tight, not change.is_same_result, change.count, per_token)
        rows.append((key, change))
    return [change for _, change in sorted(rows, key=lambda row: row[0])]


def _try(change: Change, say: Say) -> Report | None:
    try:
        report = plan(change.request)
    except (ValueError, CompilerError) as error:
        say(f"  {change.text}: cannot run ({str(error).splitlines()[0]})")
        return None
    verdict = "fits" if report.fits else "does not fit"
    say(
        f"  {change.text}: {report.memory.peak / 2**30:.2f} GiB, {verdict} "
        f"({report.compile_seconds:.0f} s to compile)"
    )
    return report


def _time(report: Report) -> float:
    return report.times.step if report.times else quick_seconds(report.request)


def meshes(request: Request) -> list[str]:
    """Every mesh of data, fsdp and model over the slice on which the request can run."""
    count = request.slice.num_devices
    found = []
    for model in _divisors(count):
        for fsdp in _divisors(count // model):
            shape = {"data": count // model // fsdp, "fsdp": fsdp, "model": model}
            found.append(_spell(shape))
    return found


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def search(request: Request, *, most: int = 12, say: Say = print) -> list[Option]:
    """Meshes and remat policies planned, the most promising first by formula.

    Meshes whose arguments alone exceed the memory, or whose formula says hopeless (more than
    twice the memory), are not compiled.
    """
    remats = REMATS if request.job == "train" else (request.model.remat,)
    candidates = []
    for mesh in meshes(request):
        for remat in remats:
            new = _model(dataclasses.replace(request, mesh=mesh), remat=remat)
            try:
                plan_jobs.check(new)
            except ValueError:
                continue
            hbm = new.slice.chip.hbm_bytes or math.inf
            held = argument_bytes(new)
            if held > hbm or held + working_bytes(new) > 2 * hbm:
                continue
            is_tight = held + working_bytes(new) > hbm
            text = f"--mesh={mesh}" + (f" --remat={remat}" if request.job == "train" else "")
            candidates.append(((is_tight, quick_seconds(new)), Change(text, new, True)))
    candidates.sort(key=lambda c: c[0])
    say(f"{len(candidates)} meshes x policies may fit; planning the best {most} by formula.")
    options = []
    for _, change in candidates[:most]:
        report = _try(change, say)
        if report is not None:
            options.append(Option(change, report))
    return options


def pareto(options: Sequence[Option]) -> list[Option]:
    """Options that no other beats in both memory and time, by time; those that fit only."""
    fit = sorted(
        (o for o in options if o.report.fits is not False),
        key=lambda o: (_time(o.report), o.report.memory.peak),
    )
    front, least = [], math.inf
    for option in fit:
        if option.report.memory.peak < least:
            least = option.report.memory.peak
            front.append(option)
    return front
