"""Tasks: questions with a right answer, and pairs of prompts that differ in what decides it."""

from collections.abc import Callable, Mapping

from jaxheads.data.tasks import ioi
from jaxheads.data.tasks.files import TaskExample, load_tasks
from jaxheads.data.tasks.pairs import PairBatch, TaskPair, encode_pairs, load_pairs

GENERATORS: Mapping[str, Callable[..., list[TaskPair]]] = {"ioi": ioi.generate}
"""name -> ``generate(tokenizer, count, *, seed)``: seeded and pure, one file a task."""

__all__ = [
    "GENERATORS",
    "PairBatch",
    "TaskExample",
    "TaskPair",
    "encode_pairs",
    "load_pairs",
    "load_tasks",
]
