"""Text in, batches out: tokenizers, corpora, packed and checkpointable batches, task files."""

from jaxheads.data.packing import merge_states
from jaxheads.data.pipeline import BatchIterator, DataConfig, eval_batches, make_dataset
from jaxheads.data.tasks import TaskExample, TaskPair, encode_pairs, load_pairs, load_tasks
from jaxheads.data.text import Source, open_source
from jaxheads.data.tokenizer import Tokenizer

__all__ = [
    "BatchIterator",
    "DataConfig",
    "Source",
    "TaskExample",
    "TaskPair",
    "Tokenizer",
    "encode_pairs",
    "eval_batches",
    "load_pairs",
    "load_tasks",
    "make_dataset",
    "merge_states",
    "open_source",
]
