"""Score every attention head of a model on pairs of prompts, and write heads.json, PNG and HTML.

    python -m launch.sweep --model=gpt2 --task=ioi --edit=patch --metric=logit_diff
    python -m launch.sweep --model=/path/to/Llama --task=pairs.jsonl --edit=ablate --mode=mean \\
        --metric=logprob --mesh=data:2,model:4 --batch_size=16 --dtype=bfloat16
    python -m launch.sweep --model=gpt2 --task=ioi --edit=path --receivers=9.9.q,9.6.q
    python -m launch.evaluate --model=gpt2 --tasks=pairs.jsonl --heads=runs/sweep-gpt2/heads.json \\
        --top_heads=4

A pair is a clean and a corrupt prompt that differ in what decides the answer (see
`jaxheads.data.tasks.pairs` for the file). A score says how much a head matters; higher is more:

    patch    the share of the metric that the head's clean value restores in the corrupt prompt
             (--into=corrupt), or that its corrupt value destroys in the clean one (--into=clean)
    ablate   how much the metric of the clean prompts falls (KL: rises) when the head becomes zero,
             its mean over the corrupt prompts, or its value in another prompt
    path     the share of the metric that the corrupt value destroys along direct paths only

Beside the scores stand intervals over prompts and a control: the highest-scoring heads edited
together, against random sets of as many others. Finished batches are kept in examples.npz, and the
same command goes on from there.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags as absl_flags

from launch import flags, loading
from launch.pair_effects import (
    Effects,
    Progress,
    Question,
    fingerprint,
    head_effects,
    joint_scores,
    run_batches,
    set_effects,
    to_scores,
)

EDITS = ("patch", "ablate", "path")
METRICS = ("logit_diff", "logprob", "kl", "accuracy")
MODES = ("zero", "mean", "resample")
_LONGEST_PAGE = 1024  # tokens of attention.html


def define_flags(into: absl_flags.FlagValues = absl_flags.FLAGS) -> None:
    """Defines the flags of this launcher."""
    flags.define_common(into)
    loading.define_model_flags(into)
    text = partial(absl_flags.DEFINE_string, flag_values=into)
    number = partial(absl_flags.DEFINE_integer, flag_values=into)
    choice = partial(absl_flags.DEFINE_bool, flag_values=into)
    text("task", None, "A generator (ioi), or a file of pairs (.jsonl): clean, corrupt, answer.")
    text("edit", "patch", f"What is done to a head: {', '.join(EDITS)}.")
    text("metric", "logit_diff", f"What is measured: {', '.join(METRICS)}.")
    text("mode", "zero", f"--edit=ablate: what a head becomes: {', '.join(MODES)}.")
    text("into", "corrupt", "--edit=patch: the prompts that are edited, corrupt or clean.")
    text("site", "z", "--edit=patch, ablate: where; q, k, v, z or another site with heads.")
    text(
        "positions", "all", "all, or last: the last position of each prompt. Path: last by default."
    )
    text("receivers", "logits", "--edit=path: logits, or heads and inputs such as 9.9.q,9.6.q.")
    choice("freeze_mlps", False, "--edit=path: hold MLPs at their clean values.")
    number("num_examples", None, "Pairs: at most this many of a file; default of a generator: 64.")
    number("batch_size", 16, "Pairs at once, over all devices.", lower_bound=1)
    number("edits_at_once", None, "Edited copies of a batch at once; default: what fits.")
    number("top", None, "Heads in the control; default: 2 % of them, at least one.")
    number("control_seeds", 20, "Random sets in the control; 0: no control.", lower_bound=0)
    choice("match_layers", False, "Random sets keep the layers of the top heads.")
    number("seed", 0, "Seed of the generator, the intervals and the control.", lower_bound=0)
    text("workdir", None, "Where results go; default: runs/sweep-MODEL.")
    choice("resume", True, "Go on from the examples.npz of the same command.")


def question(given: Any) -> Question:
    """The `Question` of the flags.

    Raises:
      ValueError: for an unknown name, or a flag that says nothing about the chosen edit.
    """
    from jaxheads.fields import unknown
    from jaxheads.interventions.per_head import head_axis
    from jaxheads.taps import resolve_site

    choices = {
        "edit": EDITS,
        "metric": METRICS,
        "mode": MODES,
        "into": ("corrupt", "clean"),
        "positions": ("all", "last"),
    }
    for name, known in choices.items():
        if given[name].value not in known:
            raise ValueError(f"--{name}: {unknown(name, given[name].value, known)}")
    edit = given.edit
    belongs = {
        "mode": ("ablate",),
        "into": ("patch",),
        "site": ("patch", "ablate"),
        "receivers": ("path",),
        "freeze_mlps": ("path",),
    }
    for name, edits in belongs.items():
        if given[name].present and edit not in edits:
            raise ValueError(f"--{name} goes with --edit={' or '.join(edits)}, not {edit}.")
    site, layer = resolve_site(given.site)
    if layer is not None:
        raise ValueError(f"--site={given.site} names a layer; a sweep edits all: --site={site}.")
    head_axis(site)
    receivers = given.receivers
    if receivers != "logits":
        parts = [p.strip() for p in receivers.split(",")]
        found = [re.fullmatch(r"(\d+)\.(\d+)\.?([qkv])", part) for part in parts]
        if not all(found):
            bad = parts[found.index(None)]
            raise ValueError(
                f"--receivers: {bad!r} cannot be read; write 'logits', or LAYER.HEAD.q, .k or .v."
            )
        receivers = tuple((int(m[1]), int(m[2]), m[3]) for m in found if m)
    positions = given.positions if given["positions"].present or edit != "path" else "last"
    return Question(
        edit, given.metric, given.mode, given.into, site, positions, receivers, given.freeze_mlps
    )


def read_task(task: str | None, tokenizer: Any, count: int | None, seed: int) -> Any:
    """The pairs of --task, encoded (a `PairBatch`)."""
    from jaxheads.data import encode_pairs, load_pairs
    from jaxheads.data.tasks import TASKS, generate
    from jaxheads.fields import unknown

    if not task:
        raise ValueError(
            "--task is missing; give a generator (ioi, ...) or a file of pairs (.jsonl)."
        )
    if count is not None and count < 1:
        raise ValueError(f"--num_examples={count} must be at least 1.")
    if task in TASKS:
        pairs = generate(task, tokenizer, 64 if count is None else count, seed=seed)
    elif Path(task).suffix:
        pairs = load_pairs(task)[:count]
    else:
        raise ValueError(f"--task: {unknown('task', task, tuple(TASKS))} A file ends in .jsonl.")
    return encode_pairs(pairs, tokenizer)


def check_fit(given: Any, ask: Question, cfg: Any, batch: Any) -> tuple[tuple[int, int], int]:
    """The shape of the scores, [L,H] or [L,K], and how many heads the control takes.

    Raises:
      ValueError: for prompts or numbers that this model cannot take.
    """
    from jaxheads.interventions.per_head import num_heads_of

    length = batch.clean.shape[1]
    if cfg.positions == "learned" and length > cfg.max_positions:
        raise ValueError(
            f"a prompt has {length} tokens, more than the {cfg.max_positions} learned positions of "
            "the model."
        )
    if given.edits_at_once is not None and given.edits_at_once < 1:
        raise ValueError(f"--edits_at_once={given.edits_at_once} must be at least 1.")
    if ask.mode == "resample" and min(len(batch), given.batch_size) < 2:
        raise ValueError("--mode=resample takes values from other prompts; give at least two.")
    shape = (cfg.num_layers, num_heads_of(ask.site, cfg)[0])
    total = shape[0] * shape[1]
    top = max(1, round(0.02 * total)) if given.top is None else given.top
    if not 1 <= top <= total // 2:
        raise ValueError(f"--top={top} must be from 1 to {total // 2}, half of the heads.")
    return shape, top


def find(
    given: Any, ask: Question, model: Any, batch: Any, workdir: Path
) -> tuple[Any, Effects, list[np.ndarray] | None]:
    """`HeadScores` with their control, what they were made of, and the first pair's attention."""
    from jaxheads.parallel.multihost import is_main_process
    from jaxheads.taps import SITES

    shape, top = check_fit(given, ask, model.cfg, batch)
    size, at_once = min(given.batch_size, len(batch)), given.edits_at_once
    is_first = is_main_process()
    workdir.mkdir(parents=True, exist_ok=True)
    mark = fingerprint(given.model, given.dtype, ask, batch)
    file = workdir / "examples.npz"
    progress = Progress(file, mark, resume=given.resume, writes=is_first)
    if progress.done and is_first:
        print(f"going on after {progress.done} of {len(batch)} pairs", flush=True)

    def discard() -> None:
        for unfinished in workdir.glob(f"heads-{mark[:12]}-*.npz") if is_first else ():
            unfinished.unlink()

    def one(pairs: Any, start: int) -> Effects:
        file = workdir / f"heads-{mark[:12]}-{start}.npz"
        return head_effects(model, pairs, ask, at_once, file)

    def together(masks: np.ndarray) -> np.ndarray:
        several = lambda pairs, _: set_effects(model, pairs, ask, masks, at_once)
        return joint_scores(batch, size, ask, several)

    if not given.resume:
        discard()
    for rows in run_batches(batch, size, progress.done, "heads", one):
        progress.add(rows)
        discard()
    rows = progress.rows
    scores = to_scores(
        rows,
        shape,
        ask,
        given.seed,
        model=given.model,
        meta=_meta(given, ask, batch, rows),
        kind="kv" if "K" in SITES[ask.site].split() else "query",
    )
    if given.control_seeds:
        is_path = ask.edit == "path"  # path patching knows single senders only
        scores = scores.with_control(
            top,
            None if is_path else together,
            seeds=tuple(range(given.seed, given.seed + given.control_seeds)),
            match=given.match_layers,
            method="" if is_path else "the heads of a set edited together",
        )
    is_short = batch.clean.shape[1] <= _LONGEST_PAGE
    return scores, rows, _patterns(model, batch) if is_short else None


def main() -> int:
    """Runs the command; returns the exit code."""
    import jax

    from jaxheads.viz import head_table

    given = absl_flags.FLAGS
    if given.set:
        raise ValueError(f"--set {given.set[0]!r}: a sweep has no settings; it takes flags only.")
    ask = question(given)
    model, tokenizer, mesh = loading.load(
        given.model, given.tokenizer, given.mesh, given.dtype, given.dcn_mesh
    )
    batch = read_task(given.task, tokenizer, given.num_examples, given.seed)
    workdir = Path(given.workdir or f"runs/sweep-{Path(given.model).name}")
    with jax.set_mesh(mesh):
        scores, rows, seen = find(given, ask, model, batch, workdir)
    if jax.process_index() != 0:
        return 0
    top = 4 if scores.control is None else scores.control.num_heads
    print(head_table(scores.values, title=_title(ask)), flush=True)
    print(_summary(scores, rows, top), flush=True)
    _write(workdir, scores, ask, tokenizer, batch, seen)
    print(
        f"\nwritten to {workdir}/. To act on the heads found:\n"
        f"  python -m launch.evaluate --model={given.model} --heads={workdir / 'heads.json'} "
        f"--top_heads={top}",
        flush=True,
    )
    return 0


def _patterns(model: Any, batch: Any) -> list[np.ndarray]:
    """[L,H,T,T] attention of the first pair's prompts, clean and corrupt."""
    import jaxheads as jh

    end = int(batch.last[0]) + 1
    look = jh.record(jh.forward, "pattern")
    return [np.asarray(look(model, tokens[:1, :end]).seen["pattern"])[:, 0]
            for tokens in (batch.clean, batch.corrupt)]  # fmt: skip


def _title(ask: Question) -> str:
    how = {"patch": f"into {ask.into}", "ablate": ask.mode, "path": f"to {_to(ask.receivers)}"}
    return f"{ask.edit} ({how[ask.edit]}), {ask.metric}"


def _to(receivers: Any) -> str:
    if receivers == "logits":
        return receivers
    return ",".join(f"{layer}.{head}.{part}" for layer, head, part in receivers)


def _meta(given: Any, ask: Question, batch: Any, rows: Effects) -> dict[str, Any]:
    names = ("task", "num_examples", "batch_size", "mesh", "dcn_mesh", "dtype", "match_layers",
             "seed", "set")  # fmt: skip
    asked = {**ask._asdict(), "receivers": _to(ask.receivers)}
    return {
        "method": "launch.sweep",
        "metric": ask.metric,
        "flags": {**asked, **{name: given[name].value for name in names}},
        "seeds": {"task": given.seed, "bootstrap": given.seed},
        "examples": len(batch),
        "clean": float(rows.clean.mean()),
        "corrupt": float(rows.corrupt.mean()),
        **flags.provenance(),
    }


def _summary(scores: Any, rows: Effects, top: int) -> str:
    from jaxheads.heads import label

    lines = [
        f"\nmetric: {rows.clean.mean():.4f} on clean, {rows.corrupt.mean():.4f} on corrupt prompts "
        f"({len(rows.clean)} pairs)"
    ]
    for head in scores.top_k(min(max(top, 5), scores.values.size)):
        line = f"  {label(head):>6}  {scores.values[head]:+.4f}"
        if scores.ci is not None:
            line += f"  [{scores.ci.low[head]:+.4f}, {scores.ci.high[head]:+.4f}]"
        lines.append(line)
    control = scores.control
    if control is not None:
        lines.append(
            f"top {control.num_heads}: {control.chosen:+.4f}; {len(control.random)} random sets of "
            f"{control.num_heads}: {control.mean:+.4f} +- {control.std:.4f} "
            f"(p = {control.p_value:.3f}; {control.method})"
        )
    return "\n".join(lines)


def _write(
    workdir: Path, scores: Any, ask: Question, tokenizer: Any, batch: Any, seen: Any
) -> None:
    from jaxheads.viz import attention_html, head_map, token_texts

    scores.to_json(workdir / "heads.json")
    try:
        head_map(scores, workdir / "head_map.png", title=_title(ask), label="score")
    except ImportError as error:
        print(f"no head_map.png: {error}", flush=True)
    if seen is None:
        print(f"no attention.html: the prompts exceed {_LONGEST_PAGE} tokens", flush=True)
        return
    end = int(batch.last[0]) + 1
    clean, corrupt = (token_texts(tokenizer, ids[0, :end]) for ids in (batch.clean, batch.corrupt))
    attention_html(
        seen[0],
        clean,
        workdir / "attention.html",
        compare=seen[1],
        compare_tokens=corrupt,
        title=f"{scores.model}: attention on the first pair; {_title(ask)}",
        scores=scores if scores.kind == "query" else None,
    )


if __name__ == "__main__":
    define_flags()
    flags.run(main)
