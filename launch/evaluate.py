"""Evaluate a trained model on text and on task files, with and without an edit of its heads.

    python -m launch.evaluate --model=runs/tiny
    python -m launch.evaluate --model=/path/to/Llama --data=corpus.jsonl --mesh=data:2,model:4 \\
        --seq_len=4096 --batch_size=16 --dtype=bfloat16
    python -m launch.evaluate --model=runs/tiny --tasks=questions.jsonl --heads=heads.json \\
        --edit=ablate
    python -m launch.evaluate --model=lab --tasks=needle --heads=heads.json --edit=ablate

With --heads every number is computed twice, without and with the edit, and shown side by side.
Text defaults to the held-out part of the standard library's source, unless only --tasks is given.
It prints a table and writes results.json, and examples.jsonl for task files, to --workdir.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from launch import flags, loading

_DEFAULT_DATA = "stdlib"
_NUM_QUESTIONS = 100  # of a named task


def define_flags() -> None:
    """Defines the flags of this launcher."""
    flags.define_common()
    loading.define_flags()
    text, number = absl_flags.DEFINE_string, absl_flags.DEFINE_integer
    text("data", None, "Text: files, directories or globs; default: stdlib, its held-out part.")
    text("tasks", None, "Task file (.json, .jsonl), or a task of jaxheads.data.tasks (ioi, ...).")
    text("workdir", None, "Where results go; default: runs/evaluate-MODEL.")
    number("batch_size", 8, "Sequences at once, over all devices.")
    number("seq_len", None, "Tokens in a sequence; default: 1024, or what the model can take.")
    number("limit", None, "At most this many batches of text and this many examples.")


def data_config(model: Any, tokenizer: Any, path: str | None, batch_size: int,
                seq_len: int | None, settings: dict[str, str]) -> Any:  # fmt: skip
    """The `DataConfig` of the text to evaluate; ``--set data.FIELD`` has the last word.

    Where the model takes landmarks, the text has them, and they do not count.
    """
    from jaxheads.attention import landmarks_of
    from jaxheads.data import DataConfig
    from jaxheads.fields import override

    cfg = model.cfg
    marks = landmarks_of(cfg)
    if marks is not None:
        own = {"landmark_block": marks.block_size, "landmark_id": marks.token,
               "landmark_targets": "false"}  # fmt: skip
        settings = {name: str(value) for name, value in own.items()} | settings
    longest = cfg.max_positions
    if seq_len is not None and cfg.positions == "learned" and seq_len > longest:
        raise ValueError(
            f"--seq_len={seq_len} exceeds the {longest} learned positions of the model."
        )
    base = DataConfig(
        path=_DEFAULT_DATA if path is None else path,
        tokenizer=tokenizer.spec,
        split="validation" if path is None else "all",  # a run trains on the rest of the default
        batch_size=batch_size,
        seq_len=min(1024, longest) if seq_len is None else seq_len,
    )
    return override(base, settings, section="data")


def global_batches(cfg: Any, tokenizer: Any, mesh: Any, limit: int | None) -> Iterator[Any]:
    """Batches of text, split over the mesh."""
    import jax

    from jaxheads.data import eval_batches
    from jaxheads.parallel import partition_spec

    shape = (cfg.batch_size, cfg.seq_len)
    spec = partition_spec(("batch", "length"), shape, mesh, name="--batch_size x --seq_len")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    # Every process reads all rows, and places those of its own devices.
    for batch in eval_batches(cfg, limit, tokenizer=tokenizer):
        yield {
            name: jax.make_array_from_callback(shape, sharding, value.__getitem__)
            for name, value in batch.items()
        }


def read_tasks(asked: str, tokenizer: Any, limit: int | None) -> list[Any]:
    """The examples of a file, or held-out questions of a named task."""
    from jaxheads.data import TaskExample, load_tasks
    from jaxheads.data.tasks import TASKS, generate

    if asked not in TASKS:
        return load_tasks(asked)[:limit]
    pairs = generate(asked, tokenizer, _NUM_QUESTIONS if limit is None else limit, split="heldout")
    return [TaskExample(pair.clean, pair.answer, pair.distractors) for pair in pairs]


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The numbers of one or two evaluations side by side, and their difference.

    Args:
      results: evaluation -> part ("text", "tasks") -> name -> number or None.
    """
    names = list(results)
    header = ["", *names] + (["change"] if len(names) == 2 else [])
    rows = [header]
    first = results[names[0]]
    for part, numbers in first.items():
        for name in numbers:
            values = [results[run][part][name] for run in names]
            row = [f"{part} {name}", *map(_show, values)]
            if len(names) == 2:
                known = all(isinstance(v, int | float) for v in values)
                row.append(f"{values[1] - values[0]:+.4g}" if known else "-")
            rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    line = lambda row: "  ".join(
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths))
    ).rstrip()
    return "\n".join(map(line, rows))


def _show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def main() -> int:
    """Runs the command; returns the exit code."""
    import jax

    from jaxheads import models
    from jaxheads.attention import landmarks_of
    from jaxheads.data.tasks import TASKS
    from jaxheads.evaluation import evaluate_tasks, evaluate_text
    from jaxheads.interventions import place_landmarks
    from jaxheads.parallel.multihost import is_main_process

    given = absl_flags.FLAGS
    if given.limit is not None and given.limit < 1:
        raise ValueError(f"--limit={given.limit} must be at least 1.")
    settings = flags.parse_settings(given.set, ("data",))["data"]
    is_file = bool(given.tasks) and given.tasks not in TASKS
    tasks = read_tasks(given.tasks, None, given.limit) if is_file else None  # before the model
    model, tokenizer, mesh = loading.load(
        given.model, given.tokenizer, given.mesh, given.dtype, given.dcn_mesh
    )
    if given.tasks and not is_file:
        tasks = read_tasks(given.tasks, tokenizer, given.limit)
    edited, heads = loading.edited_forward(
        model, given.heads, edit=given.edit, top_heads=given.top_heads, factor=given.factor
    )
    text = None
    if given.data is not None or tasks is None:
        text = data_config(model, tokenizer, given.data, given.batch_size, given.seq_len, settings)
    elif settings:
        raise ValueError("--set data.FIELD goes with --data.")
    workdir = Path(given.workdir or f"runs/evaluate-{Path(given.model).name}")
    workdir.mkdir(parents=True, exist_ok=True)

    def evaluate(forward: Callable[..., Any]) -> dict[str, dict[str, Any]]:
        parts: dict[str, dict[str, Any]] = {}
        if text is not None:
            batches = global_batches(text, tokenizer, mesh, given.limit)
            parts["text"] = dict(evaluate_text(forward, model, batches))
        if tasks is not None:
            parts["tasks"] = evaluate_tasks(
                forward, model, tokenizer, tasks, batch_size=given.batch_size
            )
        return parts

    runs = {"baseline": models.forward} | ({} if heads is None else {given.edit: edited})
    marks = landmarks_of(model.cfg)
    if marks is not None:  # they are in the text, and out of question
        runs = {name: place_landmarks(forward, marks.token) for name, forward in runs.items()}
    with jax.set_mesh(mesh):
        results = {name: evaluate(forward) for name, forward in runs.items()}
    details = {name: parts["tasks"].pop("per_example") for name, parts in results.items()
               if tasks is not None}  # fmt: skip

    if is_main_process():
        print(table(results), flush=True)
        asked = {name: given[name].value for name in
                 ("model", "data", "tasks", "heads", "edit", "top_heads", "factor", "mesh",
                  "dcn_mesh", "batch_size", "seq_len", "limit", "dtype", "set")}  # fmt: skip
        flags.write_json(
            workdir / "results.json",
            {**flags.provenance(), "flags": asked, "edited_heads": heads, "results": results},
        )
        if details:
            lines = [
                json.dumps({"run": name, "example": number, **detail}) + "\n"
                for name, rows in details.items()
                for number, detail in enumerate(rows)
            ]
            (workdir / "examples.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"\nwritten to {workdir}/", flush=True)
    return 0


if __name__ == "__main__":
    define_flags()
    flags.run(main)
