"""Text in, batches out: tokenizers, corpora, packed and checkpointable batches, task files.

Labelled images come in by `open_images`, logs of behaviours by `open_log`, `group_events` and
`make_samples`.
"""

from jaxheads.data.behaviour_grouping import group_events
from jaxheads.data.behaviour_logs import open_log
from jaxheads.data.behaviour_samples import SampleConfig, eval_samples, make_samples
from jaxheads.data.behaviours import Behaviours, open_behaviours
from jaxheads.data.images import ImageData, image_batches, open_images
from jaxheads.data.packing import merge_states
from jaxheads.data.passkey import PassKey, make_passkeys
from jaxheads.data.pipeline import BatchIterator, DataConfig, eval_batches, make_dataset
from jaxheads.data.tasks import TaskExample, TaskPair, encode_pairs, load_pairs, load_tasks
from jaxheads.data.text import Source, open_source
from jaxheads.data.tokenizer import Tokenizer

__all__ = [
    "BatchIterator",
    "Behaviours",
    "DataConfig",
    "ImageData",
    "PassKey",
    "SampleConfig",
    "Source",
    "TaskExample",
    "TaskPair",
    "Tokenizer",
    "encode_pairs",
    "eval_batches",
    "eval_samples",
    "group_events",
    "image_batches",
    "load_pairs",
    "load_tasks",
    "make_dataset",
    "make_passkeys",
    "make_samples",
    "merge_states",
    "open_behaviours",
    "open_images",
    "open_log",
    "open_source",
]
