"""Answer requests for click probabilities over long histories, and measure how fast.

    python -m launch.serve_recommender --model=runs/dare --data=grouped/ < requests.jsonl
    python -m launch.serve_recommender --model=dare --synthetic=200 --history=10000 \\
        --set model.num_items=100000 --set model.attention_dim=16
    python -m launch.serve_recommender --model=dare --synthetic=64 --history=100000 \\
        --simulated_devices=8 --mesh=context:8

Stage 1 scores every behaviour with the attention table alone and keeps the best K; stage 2 looks up
the representation of those K and of the candidate. --stages=one looks up both for all, as training
does, and gives the same answers. Requests and answers are JSON lines (`launch/
recommender_requests.py`); the measurements go to stderr: requests per second, latency of a
request from its batch's start to its answer (p50, p90, p99), and bytes of table rows per request.
A batch is answered when --batch_size requests are there or the stream ends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from absl import flags as absl_flags

from launch import flags
from launch import recommender_requests as requests_
from launch.recommender_requests import Refused, Request

_SHORTEST = 64  # of padded histories
STAGES = ("two", "one")


def define_flags() -> None:
    """Defines the flags of this launcher."""
    flags.define_common()
    text, integer = absl_flags.DEFINE_string, absl_flags.DEFINE_integer
    text("model", None, "Directory of a saved recommender, or a preset with random parameters.")
    text("data", None, "Directory of a grouped data set: users, and ids as in its log.")
    text("requests", "-", "File of JSON lines, - for stdin.")
    text("answers", "-", "Where answers go; - for stdout.")
    integer("synthetic", 0, "Instead of --requests: this many random ones.", lower_bound=0)
    integer("history", 10_000, "Behaviours of each --synthetic request.", lower_bound=0)
    integer("batch_size", 8, "Requests answered together.", lower_bound=1)
    integer(
        "max_history",
        None,
        "Longer histories are cut to the newest; default: the length trained on, or what the time "
        "table has rows for.",
    )
    absl_flags.DEFINE_enum("stages", "two", STAGES, "One looks up everything, for comparison.")
    text("mesh", "", "Device mesh, such as context:8 to split histories; one axis may be -1.")
    integer("seed", 0, "Of --synthetic requests and random parameters.")


class Service(NamedTuple):
    """A model ready to answer."""

    model: Any
    stats: Any
    mesh: Any
    run: Any
    """The jitted (model, stats, batch) -> Served."""
    batch_size: int
    longest: int
    """Longest padded history: a multiple of the mesh's context axis below num_times."""

    def length(self, requests: list[Request]) -> int:
        """The padded length for these requests."""
        return requests_.bucket(
            max(len(request.history) for request in requests),
            shortest=min(max(_SHORTEST, self.model.cfg.top_k), self.longest),
            longest=self.longest,
            multiple=self.mesh.shape["context"],
        )

    def answer(self, requests: list[Request]) -> list[dict[str, Any]]:
        """The answers to at most `batch_size` requests."""
        import jax

        length = self.length(requests)
        batch = requests_.pad(requests, self.batch_size, length)
        with jax.set_mesh(self.mesh):
            served = jax.device_get(self.run(self.model, self.stats, batch))
        rows = zip(requests, served.probability.tolist(), served.index, served.weights)
        return [requests_.answer(*row, length) for row in rows]


def make_service(
    model: Any, stats: Any, mesh: Any, *, batch_size: int, max_history: int | None, stages: str
) -> Service:
    """A service whose tables are whole on every device of the mesh.

    Raises:
      ValueError: for sizes that do not fit each other.
      NotImplementedError: for a model that cannot be served in two stages.
    """
    import jax

    from jaxheads.models import recommender_serving as serving

    serving.check_servable(model.cfg)
    rows, parts = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"]
    if batch_size % rows:
        raise ValueError(
            f"--batch_size={batch_size} is not divisible by {rows}, the mesh's data and fsdp."
        )
    most = model.cfg.num_times - 1 if model.cfg.time_mode != "none" else 1 << 20
    if max_history is not None and not 1 <= max_history <= most:
        raise ValueError(
            f"--max_history={max_history} must be between 1 and {most}: the model has "
            f"num_times={model.cfg.num_times} time ids."
        )
    longest = (max_history or most) // parts * parts
    if longest < model.cfg.top_k:
        raise ValueError(
            f"histories of at most {longest} behaviours with top_k={model.cfg.top_k}; serve longer "
            "ones (--max_history) or on fewer devices of context."
        )
    run = serving.serve if stages == "two" else serving.serve_one_stage
    whole = jax.NamedSharding(mesh, jax.P())
    model, stats = jax.device_put((model, stats), whole)
    return Service(model, stats, mesh, jax.jit(run), batch_size, longest)


class Loaded(NamedTuple):
    """What --model stands for."""

    model: Any
    stats: Any
    history: int | None
    """Length of the histories it was trained on, where that is known."""


def load(given: Any) -> Loaded:
    """Parameters and statistics of --model: stored ones, or random ones of a preset."""
    import jax
    from flax import nnx

    from jaxheads.checkpoints import recommender as files
    from jaxheads.fields import override, unknown
    from jaxheads.models.recommender import (
        RECOMMENDERS,
        LongSequenceRecommender,
        init_stats,
    )

    settings = flags.parse_settings(given.set, ("model",))["model"]
    name = given.model
    if not name:
        raise ValueError(
            f"--model is missing; give a directory, or a preset of {', '.join(RECOMMENDERS)}."
        )
    if name in RECOMMENDERS:
        # Sizes of a small shop; num_times lets every synthetic history in.
        sizes = dict(num_items=10_000, num_categories=100)
        cfg = RECOMMENDERS[name](**sizes, num_times=max(2000, given.history + 1))
        cfg = override(cfg, settings, section="model")
        model = jax.jit(lambda: LongSequenceRecommender(cfg, rngs=nnx.Rngs(given.seed)))()
        return Loaded(model, init_stats(cfg), None)
    if settings:
        raise ValueError(f"--set model.{next(iter(settings))} goes with a preset, not {name!r}.")
    if not Path(name).expanduser().is_dir():
        raise ValueError(
            f"model={name!r} is no directory, and {unknown('preset', name, RECOMMENDERS)}"
        )
    history = files.load_config(name)[1].get("history")
    return Loaded(*files.load(name), history if isinstance(history, int) else None)


class Measured(NamedTuple):
    """What a run of the service took; programs are compiled outside of all times."""

    latencies: np.ndarray
    """[n] seconds of each answered request."""
    seconds: float
    compile_seconds: float
    num_programs: int
    lengths: np.ndarray
    """[n] behaviours of each answered request."""


def answer_all(
    service: Service, stream: Iterable[Request | Refused], write: Any, oddities: Any
) -> Measured:
    """Answers a stream in order, `batch_size` requests at a time."""
    latencies: list[float] = []
    lengths: list[int] = []
    compiled: dict[int, float] = {}
    seconds = 0.0
    for group in _groups(stream, service.batch_size):
        for request in group:
            oddities.add(request)
        good = [request for request in group if isinstance(request, Request)]
        answers: dict[int, dict[str, Any]] = {
            r.line: {"line": r.line, "error": r.error} for r in group if isinstance(r, Refused)
        }
        if good:
            length = service.length(good)
            if length not in compiled:
                start = time.perf_counter()
                service.answer(good)
                compiled[length] = time.perf_counter() - start
            start = time.perf_counter()
            answers |= {found["line"]: found for found in service.answer(good)}
            took = time.perf_counter() - start
            seconds += took
            latencies += [took] * len(good)
            lengths += [len(request.history) for request in good]
        for request in group:
            write(answers[request.line])
    return Measured(
        np.asarray(latencies), seconds, sum(compiled.values()), len(compiled), np.asarray(lengths)
    )


def _groups(stream: Iterable[Request | Refused], size: int) -> Iterator[list[Request | Refused]]:
    iterator = iter(stream)
    while group := list(itertools.islice(iterator, size)):
        yield group


def summary(measured: Measured, service: Service) -> str:
    """The measurements in words."""
    from jaxheads.models.recommender_serving import lookup_bytes

    count = len(measured.latencies)
    if not count:
        return "no request was answered."
    p50, p90, p99 = (1e3 * np.percentile(measured.latencies, q) for q in (50, 90, 99))
    length = int(measured.lengths.mean())
    reads = lookup_bytes(service.model.cfg, length)
    return (
        f"{count} requests of {length} behaviours on average, {service.batch_size} at a time: "
        f"{count / measured.seconds:.1f} a second\n"
        f"latency p50 {p50:.1f} ms, p90 {p90:.1f} ms, p99 {p99:.1f} ms\n"
        f"table rows read per request: {reads.two_stage:,} bytes in two stages, "
        f"{reads.one_stage:,} in one ({reads.two_stage / reads.one_stage:.2f})\n"
        f"{measured.num_programs} programs compiled in {measured.compile_seconds:.1f} s "
        "(first batches included, not in the times above)"
    )


@contextlib.contextmanager
def _opened(name: str, mode: str, standard: TextIO) -> Iterator[TextIO]:
    if name == "-":
        yield standard
        return
    with open(Path(name).expanduser(), mode, encoding="utf-8") as file:
        yield file


def main() -> int:
    """Runs the command; returns the exit code."""
    from jaxheads import parallel
    from jaxheads.data import open_behaviours

    given = absl_flags.FLAGS
    model, stats, history = load(given)
    service = make_service(
        model,
        stats,
        parallel.make_mesh(given.mesh),
        batch_size=given.batch_size,
        max_history=given.max_history or history,
        stages=given.stages,
    )
    cfg = service.model.cfg
    ids = requests_.Ids(
        open_behaviours(given.data) if given.data else None, cfg.num_items, cfg.num_categories
    )
    oddities = requests_.Oddities()
    with contextlib.ExitStack() as stack:
        if given.synthetic:
            if given.history > service.longest:
                raise ValueError(
                    f"--history={given.history} is longer than {service.longest}, the longest "
                    "served; set model.num_times or --max_history."
                )
            sizes = (cfg.num_items, cfg.num_categories)
            stream = requests_.synthetic(given.synthetic, given.history, *sizes, given.seed)
        else:
            lines = stack.enter_context(_opened(given.requests, "r", sys.stdin))
            stream = requests_.read(lines, ids, service.longest)
        quiet = given.synthetic and given.answers == "-"
        out = stack.enter_context(_opened(given.answers, "w", sys.stdout))

        def write(found: dict[str, Any]) -> None:
            if not quiet:
                print(json.dumps(found), file=out, flush=True)

        measured = answer_all(service, stream, write, oddities)
    print(summary(measured, service), file=sys.stderr)
    if str(oddities):
        print(oddities, file=sys.stderr)
    return 0


if __name__ == "__main__":
    define_flags()
    flags.run(main)
