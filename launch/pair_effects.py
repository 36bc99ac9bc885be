"""What a sweep computes: how far editing heads moves the metric of pairs of prompts.

Values are kept for every prompt, so that intervals can be drawn over prompts and an interrupted
sweep goes on after the last finished batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Question(NamedTuple):
    """What is asked of every head, checked."""

    edit: str
    metric: str
    mode: str
    into: str
    site: str
    positions: str
    receivers: Any
    freeze_mlps: bool


def make_metric(name: str, model: Any, batch: Any) -> Any:
    """The `Metric` of a batch of pairs, read at the last position of each prompt."""
    from jaxheads import discovery, models

    at = {"positions": batch.last}
    if name == "logit_diff":
        if batch.wrong is None:
            raise ValueError(
                "--metric=logit_diff needs 'wrong' in every pair; add it, or take --metric=logprob."
            )
        return discovery.logit_difference(batch.answer, batch.wrong, **at)
    if name == "kl":
        return discovery.kl_divergence(models.forward(model, **batch.run("clean")).logits, **at)
    make = {"logprob": discovery.log_probability, "accuracy": discovery.accuracy}[name]
    return make(batch.answer, **at)


class Effects(NamedTuple):
    """How far an edit moves each prompt's metric, and the distance it could move.

    The score of a head is ``mean(effect) / mean(span)``; without spans (ablation) the mean effect.
    """

    effect: np.ndarray
    """[B,N] for N heads or sets of heads; positive: they matter."""
    clean: np.ndarray
    """[B] metric of the clean prompts."""
    corrupt: np.ndarray
    """[B] metric of the corrupt prompts."""


def base_metrics(model: Any, batch: Any, metric: Any) -> tuple[np.ndarray, np.ndarray]:
    """[B] metric of the clean prompts, and of the corrupt ones."""
    from jaxheads import models
    from jaxheads.discovery.sets import read_metric

    clean, corrupt = (
        np.asarray(read_metric(models.forward, model, batch.run(which), metric), np.float64)
        for which in ("clean", "corrupt")
    )
    return clean, corrupt


def _edit(batch: Any, ask: Question) -> tuple[str, dict[str, Any]]:
    """Which prompts are edited, and the arguments of `sweep_heads` and `edit_sets` alike."""
    into = ask.into if ask.edit == "patch" else "clean"
    edit = ask.mode if ask.edit == "ablate" else "patch"
    donor = batch.run("clean" if into == "corrupt" else "corrupt")
    takes = edit in ("patch", "mean")
    return into, {"edit": edit, "donor": donor if takes else None, "site": ask.site}


def _oriented(values: Any, base: tuple[np.ndarray, np.ndarray], into: str, ask: Question):
    """`Effects` of edited metrics [B,N]."""
    clean, corrupt = base
    values = np.asarray(values, np.float64)
    effect = values - corrupt[:, None] if into == "corrupt" else clean[:, None] - values
    if ask.edit == "ablate" and ask.metric == "kl":  # the one metric that edits raise
        effect = -effect
    return Effects(effect, clean, corrupt)


def head_effects(
    model: Any, batch: Any, ask: Question, at_once: int | None, partial: Path | None = None
) -> Effects:
    """`Effects` of editing each head alone: [B, L*H].

    Args:
      partial: where the heads that are finished are kept while the batch runs.
    """
    from jaxheads import discovery, models

    metric = make_metric(ask.metric, model, batch)
    base = base_metrics(model, batch, metric)
    if ask.edit == "path":
        moved = discovery.path_patch(
            models.forward,
            model,
            batch.run("clean"),
            batch.run("corrupt"),
            metric,
            receivers=ask.receivers,
            positions=ask.positions,
            freeze_mlps=ask.freeze_mlps,
            normalise=False,
            sender_batch=at_once,
            per_example=True,
        )  # [L,H,B]
        effect = -np.asarray(moved, np.float64).reshape(-1, len(batch)).T
        return Effects(effect, *base)
    into, edit = _edit(batch, ask)
    values = discovery.sweep_heads(
        models.forward,
        model,
        batch.run(into),
        metric=metric,
        positions=ask.positions,
        batch_size=at_once,
        resume_file=partial,
        per_example=True,
        **edit,
    )  # [L,H,B]
    return _oriented(np.asarray(values).reshape(-1, len(batch)).T, base, into, ask)


def set_effects(
    model: Any, batch: Any, ask: Question, masks: np.ndarray, at_once: int | None
) -> Effects:
    """`Effects` of editing the heads of each mask [N,L,H] together: [B,N]."""
    from jaxheads import models
    from jaxheads.discovery.sets import edit_sets

    metric = make_metric(ask.metric, model, batch)
    base = base_metrics(model, batch, metric)
    into, edit = _edit(batch, ask)
    values = edit_sets(
        models.forward,
        model,
        batch.run(into),
        masks,
        metric,
        positions=batch.last[:, None] if ask.positions == "last" else None,
        set_batch=at_once or 8,
        **edit,
    )
    return _oriented(np.asarray(values).T, base, into, ask)


class Progress:
    """Finished prompts, kept on disk so that the same command goes on after an interruption."""

    def __init__(self, file: Path, fingerprint: str, *, resume: bool, writes: bool):
        self._file, self._fingerprint, self._writes = file, fingerprint, writes
        self.rows: Any = None
        if not (resume and file.is_file()):
            return
        with np.load(file, allow_pickle=False) as held:
            if str(held["fingerprint"]) != fingerprint:
                raise ValueError(
                    f"{file} belongs to another command (model, task or flags differ); give "
                    "another --workdir, or --resume=false to start over."
                )
            self.rows = Effects(held["effect"], held["clean"], held["corrupt"])

    @property
    def done(self) -> int:
        """Prompts that are finished."""
        return 0 if self.rows is None else len(self.rows.clean)

    def add(self, new: Effects) -> None:
        """Keep the prompts of one more batch."""
        old = self.rows
        self.rows = new if old is None else Effects(*map(np.concatenate, zip(old, new)))
        if self._writes:
            partial = self._file.with_suffix(".partial")
            with partial.open("wb") as out:
                np.savez(out, fingerprint=self._fingerprint, **self.rows._asdict())
            os.replace(partial, self._file)


def fingerprint(model: str, dtype: str | None, ask: Question, batch: Any) -> str:
    """What two runs must share for one to go on where the other stopped."""
    from jaxheads.discovery import progress

    parts = (batch.clean, batch.corrupt, batch.last, batch.answer, batch.wrong)
    return progress.fingerprint(
        repr((model, dtype, ask)), *("-" if part is None else part for part in parts)
    )


def padded(batch: Any, first: int, size: int) -> tuple[Any, int]:
    """`size` pairs from `first` on, and how many count: after the last pair come the first again.

    One size needs one program, and no pair meets itself where edits take values of the next one.
    """
    rows = np.arange(first, first + size) % len(batch)
    return batch[rows], min(size, len(batch) - first)


def to_scores(
    rows: Effects, shape: tuple[int, int], ask: Question, seed: int, **fields: Any
) -> Any:
    """`HeadScores` of the finished prompts, with intervals where there are two or more.

    Raises:
      ValueError: when the clean and the corrupt prompts have the same mean metric.
    """
    from jaxheads.heads import HeadScores

    examples = rows.effect.reshape(-1, *shape)
    span = None if ask.edit == "ablate" else rows.clean - rows.corrupt
    if span is not None and abs(span.mean()) < 1e-6:
        raise ValueError(
            f"the metric is {rows.clean.mean():.4g} on clean and {rows.corrupt.mean():.4g} on "
            "corrupt prompts; a share of no difference is undefined. The model cannot tell the "
            "prompts apart: take another task or metric."
        )
    try:
        return HeadScores.from_examples(examples, denominator=span, seed=seed, **fields)
    except ValueError as error:  # too few prompts for an interval
        fields["meta"] = {**fields.get("meta", {}), "bootstrap": f"none: {error}"}
        scale = 1.0 if span is None else span.mean()
        return HeadScores(examples.mean(axis=0) / scale, **fields)


def run_batches(
    batch: Any, size: int, first: int, label: str, measure: Callable[[Any, int], Effects]
) -> Iterator[Effects]:
    """``measure(pairs, start)`` of batch after batch from `first` on, the pairs that count."""
    from tqdm import tqdm

    from jaxheads.parallel.multihost import is_main_process

    starts = range(first, len(batch), size)
    for start in tqdm(starts, desc=label, unit="batch", disable=not is_main_process()):
        pairs, count = padded(batch, start, size)
        yield Effects(*(values[:count] for values in measure(pairs, start)))


def joint_scores(batch: Any, size: int, ask: Question, measure: Any) -> np.ndarray:
    """[N]: the score of each set of heads over all pairs."""
    parts = list(run_batches(batch, size, 0, "control", measure))
    rows = Effects(*map(np.concatenate, zip(*parts)))
    scale = 1.0 if ask.edit == "ablate" else (rows.clean - rows.corrupt).mean()
    return rows.effect.mean(axis=0) / scale
