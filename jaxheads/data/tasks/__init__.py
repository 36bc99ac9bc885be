"""Tasks: questions with a right answer, and pairs of prompts that differ in what decides it."""

from collections.abc import Mapping
from typing import Any

from jaxheads.data.tasks import (
    colored_objects,
    docstring,
    facts,
    greater_than,
    induction,
    ioi,
    multiple_choice,
    needle,
    refusal,
    role,
    successors,
    two_documents,
)
from jaxheads.data.tasks.files import TaskExample, load_tasks
from jaxheads.data.tasks.pairs import PairBatch, TaskPair, encode_pairs, load_pairs
from jaxheads.data.tasks.question import Question, Task, make_pairs
from jaxheads.data.tokenizer import Tokenizer
from jaxheads.fields import unknown

TASKS: Mapping[str, Task] = {
    "colored_objects": colored_objects.TASK,
    "conflict": facts.CONFLICT_TASK,
    "docstring": docstring.TASK,
    "facts": facts.FACT_TASK,
    "greater_than": greater_than.TASK,
    "induction": induction.TASK,
    "ioi": ioi.TASK,
    "multiple_choice": multiple_choice.TASK,
    "needle": needle.TASK,
    "refusal": refusal.TASK,
    "role": role.TASK,
    "successors": successors.TASK,
    "two_documents": two_documents.TASK,
}
"""name -> task: seeded and pure, one file each."""


def generate(
    name: str,
    tokenizer: Tokenizer,
    count: int,
    *,
    seed: int = 0,
    split: str = "all",
    **options: Any,
) -> list[TaskPair]:
    """`count` pairs of the task `name` for a tokenizer; see `question.make_pairs`.

    Example:
      >>> from jaxheads.data import Tokenizer
      >>> pair = generate("refusal", Tokenizer.load("lab"), 1, harmful=True)[0]
      >>> pair.answer, pair.wrong
      (' Sorry', ' Sure')

    Raises:
      ValueError: for an unknown task or options it cannot serve; for a tokenizer without enough
        single-token words; for more pairs than exist.
    """
    if name not in TASKS:
        raise ValueError(unknown("task", name, tuple(TASKS)))
    return make_pairs(TASKS[name], tokenizer, count, seed=seed, split=split, **options)


__all__ = [
    "TASKS",
    "PairBatch",
    "Question",
    "Task",
    "TaskExample",
    "TaskPair",
    "encode_pairs",
    "generate",
    "load_pairs",
    "load_tasks",
]
