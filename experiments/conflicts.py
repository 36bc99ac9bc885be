"""What the two experiments on conflicts between prompt and memory share: models and prompts.

By default they run on the lab models (`lab`, `lab-1`, `lab-2`: one a seed) with the task `conflict`
of their language. Any other model takes `--model=DIR` and a file of facts:

    --facts=FILE            JSON or CSV (`data.tasks.world_capitals.load_facts`); default: the
                            capitals in ../shared/data/relations, where that folder is
    --template=TEXT         the prompt, with {subject} and {stated}
    --other_facts, --other_template     the second relation
    --counts=FILE           JSON {subject: how often a corpus names it}, for the frequency analysis
    --nofilter              keep subjects that the model does not answer without the statement
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

import jaxheads as jh
from experiments import common
from experiments.lab import OPTIONS
from jaxheads.data import DataConfig, eval_batches
from jaxheads.data.tasks import world_capitals
from jaxheads.data.tasks.world_capitals import Conflict
from jaxheads.discovery import read_metric
from jaxheads.discovery.metrics import Metric, accuracy
from jaxheads.typing import Array
from launch import loading

RELATIONS = ("capital", "language")
_FACTS = Path(__file__).parents[2] / "shared/data/relations/factual"
_FILES = {"capital": "country_capital_city.json", "language": "country_language.json"}
_WORDS = ("subject", "memory", "stated")
_OTHER_TASKS = ("induction", "ioi", "greater_than", "colored_objects", "successors")


class Prompts(NamedTuple):
    """Encoded conflicts; every array leads with [B], token arrays are padded on the right."""

    clean: dict[str, np.ndarray]
    corrupt: dict[str, np.ndarray]
    question: dict[str, np.ndarray]
    """The question alone."""
    mem: np.ndarray
    """First token of the memorised answer."""
    ctx: np.ndarray
    """First token of the stated one."""
    subject: np.ndarray
    """Words."""
    memory: np.ndarray
    """Words."""
    stated: np.ndarray
    """Words."""
    marks: dict[str, np.ndarray]
    """Spans as bool [B,T] over the clean prompt: subject and stated (of the statement), question
    (all of it but the last token) and subject2 (in the question)."""

    @property
    def size(self) -> int:
        """B"""
        return len(self.mem)

    def take(self, rows: Any) -> Prompts:
        """The prompts of a slice or of indices."""
        return jax.tree.map(lambda x: x[rows], self)

    def split(self, *sizes: int) -> list[Prompts]:
        """Consecutive parts of these sizes; the last may be shorter."""
        ends = np.cumsum(sizes)
        return [self.take(slice(end - size, end)) for size, end in zip(sizes, ends)]

    @property
    def answers(self) -> tuple[np.ndarray, np.ndarray]:
        """(mem, ctx)"""
        return self.mem, self.ctx


def define_flags(name: str) -> None:
    """The flags of the module's docstring, those of every experiment, and --model, --mesh, ..."""
    common.define_flags(name)
    loading.define_model_flags()
    text = absl_flags.DEFINE_string
    text("facts", None, "Facts of the main relation, JSON or CSV.")
    text("template", world_capitals.TEMPLATE, "Prompt with {subject} and {stated}.")
    text("other_facts", None, "Facts of the second relation.")
    text("other_template", None, "Its prompt; default: --template with 'language' for 'capital'.")
    text("counts", None, "JSON {subject: count in a corpus}.")
    text("data", None, "Text for side effects; default: other tasks (lab) or the held-out stdlib.")
    absl_flags.DEFINE_bool("filter", True, "Keep subjects answered without the statement.")


def models(seeds: Sequence[int]) -> Iterator[tuple[str, loading.Loaded]]:
    """(name, model) of --model (several with commas), or of the lab models of the seeds."""
    given = absl_flags.FLAGS
    lab = ["lab" if seed == 0 else f"lab-{seed}" for seed in seeds]
    for name in given.model.split(",") if given.model else lab:
        yield name, loading.load(name, given.tokenizer, given.mesh, given.dtype, given.dcn_mesh)


def is_lab(tokenizer: Any) -> bool:
    """Whether prompts are those of the lab language: its tokenizer, and no other facts."""
    return not absl_flags.FLAGS.facts and tokenizer.digest == jh.Tokenizer.load("lab").digest


def prompts(
    loaded: loading.Loaded, relation: str, count: int, seed: int = 0, prefix: str = ""
) -> Prompts:
    """`count` conflicts of a relation of `RELATIONS` that pass the filter, in random order.

    `prefix` is put before every prompt; the order does not depend on it.

    Raises:
      ValueError: where nothing remains.
    """
    rows = [
        c._replace(prompt=prefix + c.prompt, corrupt=prefix + c.corrupt)
        for c in _conflicts(loaded.tokenizer, relation, seed)
    ]
    found, collisions, long = encode(rows, loaded.tokenizer)
    named = Counter(long).most_common(5)
    print(
        f"{relation}: {found.size} prompts; {collisions} left out (both answers have one first "
        f"token, or no twin of equal length); of {len(long)} longer answers the first token counts "
        f"{[word for word, _ in named]}",
        flush=True,
    )
    if absl_flags.FLAGS.filter:
        found = keep_known(loaded.model, found, relation)
    return found.take(slice(0, count))


def keep_known(model: Any, found: Prompts, relation: str) -> Prompts:
    """The prompts about subjects that the model answers without the statement."""
    knows = accuracy(found.mem, positions=last(found))
    kept = np.flatnonzero(np.asarray(read_metric(jh.forward, model, found.question, knows)))
    names = len(set(found.subject.tolist())), len(set(found.subject[kept].tolist()))
    print(f"{relation}: the model knows {names[1]} of {names[0]} subjects", flush=True)
    if not kept.size:
        raise ValueError(
            f"the model answers no {relation} question without the statement, so there is no "
            "memory to conflict with; --nofilter keeps all prompts."
        )
    return found.take(kept)


def last(found: Prompts, which: str = "question") -> np.ndarray:
    """[B]: the last slot of each question or clean prompt."""
    return getattr(found, which)["segment_ids"].sum(1) - 1


def _conflicts(tokenizer: Any, relation: str, seed: int) -> list[Conflict]:
    given = absl_flags.FLAGS
    if is_lab(tokenizer):
        from jaxheads.data.tasks import facts

        known, template = dict(facts.FACTS[relation]), lab_template(relation)
    else:
        main = relation == RELATIONS[0]
        path = given.facts if main else given.other_facts
        known = world_capitals.load_facts(path or _FACTS / _FILES[relation])
        other = given.other_template or given.template.replace(*RELATIONS)
        template = given.template if main else other
    rows = world_capitals.cross_product(known, template)
    return world_capitals.pair_up(rows, tokenizer, len(rows), seed)


def lab_template(relation: str) -> str:
    """The prompt of the lab language's task `conflict`."""
    from jaxheads.data.tasks import facts

    text = (facts.STATED + facts.ASKED).replace("{relation}", relation)
    return text.replace("{subject2}", "{subject}")


def encode(rows: Sequence[Conflict], tokenizer: Any) -> tuple[Prompts, int, list[str]]:
    """Prompts, how many were left out because both answers begin alike, and long answers."""
    ids = tokenizer.encode
    kept, collisions, long = [], 0, []
    for row in rows:
        clean, corrupt = ids(row.prompt), ids(row.corrupt)
        firsts = []
        for answer in (row.memory, row.stated):
            whole = ids(f"{row.prompt} {answer}")
            if not np.array_equal(whole[: len(clean)], clean):
                raise ValueError(
                    f"tokenizer {tokenizer.name!r} merges the end of {row.prompt[-10:]!r} with the "
                    "answer; end the template where a token ends."
                )
            long += [answer] if len(whole) > len(clean) + 1 else []
            firsts.append(whole[len(clean)])
        if firsts[0] == firsts[1] or len(clean) != len(corrupt):
            collisions += 1
            continue
        begins = re.search(r"\bQ ?:", row.prompt)
        question = row.prompt[begins.start() :] if begins else row.prompt
        kept.append((row, clean, corrupt, ids(question), *firsts, _spans(row, ids)))
    if not kept:
        raise ValueError("no conflict is left; the two answers must differ in their first token.")
    length = max(len(row[1]) for row in kept)
    pad = lambda x: np.pad(x, (0, length - len(x)))
    batch = lambda n: {
        "tokens": np.stack([pad(row[n]) for row in kept]).astype(np.int32),
        "segment_ids": np.stack([pad(np.ones(len(row[n]), np.int32)) for row in kept]),
    }
    column = lambda n: np.array([row[n] for row in kept], np.int32)
    names = [row[0] for row in kept]
    marks = {key: np.stack([pad(row[6][key]) for row in kept]) for key in kept[0][6]}
    return (
        Prompts(
            batch(1), batch(2), batch(3), column(4), column(5),
            *(np.array([getattr(c, key) for c in names]) for key in _WORDS), marks,
        ),
        collisions,
        long,
    )  # fmt: skip


def _spans(row: Conflict, ids: Any) -> dict[str, np.ndarray]:
    """The spans of `Prompts.marks`; empty for what the template leaves out."""
    text, size = row.prompt, len(ids(row.prompt))
    place = np.arange(size)
    at = lambda end: len(ids(text[:end].rstrip()))
    subject = text.index(row.subject)
    after = text.find(row.stated, subject + len(row.subject))
    stated = text.index(row.stated) if after < 0 else after
    begins = re.search(r"\bQ ?:", text)
    asks = begins.start() if begins else len(text)
    again = text.find(row.subject, asks)
    spans = {
        "subject": (at(subject), at(subject + len(row.subject))),
        "stated": (at(stated), at(stated + len(row.stated))),
        "question": (at(asks), size - 1),
        "subject2": (at(again), at(again + len(row.subject))) if again >= 0 else (0, 0),
    }
    return {key: (place >= a) & (place < b) for key, (a, b) in spans.items()}


def exposures(tokenizer: Any, relation: str) -> dict[str, float] | None:
    """How often training or a corpus names each subject; None where nobody counted."""
    if absl_flags.FLAGS.counts:
        return json.loads(Path(absl_flags.FLAGS.counts).read_text(encoding="utf-8"))
    if not is_lab(tokenizer):
        return None
    from jaxheads.data.tasks import facts

    return facts.exposures(relation)


def unrelated(loaded: loading.Loaded, count: int) -> dict[str, Array]:
    """Text without conflicts: tokens, segment_ids, targets and weights, all [B,T]."""
    given = absl_flags.FLAGS
    if given.data or not is_lab(loaded.tokenizer):
        data = DataConfig(
            path=given.data or "stdlib", tokenizer=loaded.tokenizer.spec, batch_size=count,
            split="all" if given.data else "validation", seq_len=64, pack=False,
        )  # fmt: skip
        return {k: jnp.asarray(v) for k, v in next(iter(eval_batches(data, limit=1))).items()}
    from jaxheads.data.tasks import generate

    texts = []
    for name in _OTHER_TASKS:
        each, options = count // len(_OTHER_TASKS), OPTIONS.get(name, {})
        pairs = generate(name, loaded.tokenizer, each, split="heldout", **options)
        texts += [loaded.tokenizer.encode(pair.clean + pair.answer) for pair in pairs]
    width = max(map(len, texts))
    tokens = np.stack([np.pad(t, (0, width - len(t))) for t in texts]).astype(np.int32)
    real = np.stack([np.arange(width) < len(t) for t in texts])
    return {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "segment_ids": jnp.asarray(real[:, :-1].astype(np.int32)),
        "targets": jnp.asarray(tokens[:, 1:]),
        "weights": jnp.asarray(real[:, 1:].astype(np.float32)),
    }


def perplexity(forward: Any, model: Any, text: dict[str, Array]) -> float:
    """exp of the mean loss per token of `unrelated` text."""
    per_row = Metric(_losses, (text["targets"], text["weights"]), name="losses")
    batch = {key: text[key] for key in ("tokens", "segment_ids")}
    losses = np.asarray(read_metric(forward, model, batch, per_row), np.float64)
    return float(np.exp(losses.sum() / float(text["weights"].sum())))


def _losses(logits: Array, payload: tuple[Array, Array]) -> Array:
    targets, weights = payload
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - chosen), axis=-1)
