"""Training: loss, optimisers, the compiled step, metrics, and the loop over them."""

from jaxheads.training.configs import SCHEDULES, TrainConfig
from jaxheads.training.loss import LossSums, chunked_cross_entropy, next_token_loss
from jaxheads.training.metrics import flops_per_token, peak_flops, throughput
from jaxheads.training.optimizers import learning_rate, make_optimizer, noam_schedule
from jaxheads.training.sparse_step import SparseState, init_sparse, make_sparse_step
from jaxheads.training.step import (
    TrainState,
    batch_sharding,
    init_state,
    make_eval_step,
    make_train_step,
    train_step,
)

__all__ = [
    "SCHEDULES",
    "LossSums",
    "SparseState",
    "TrainConfig",
    "TrainState",
    "batch_sharding",
    "chunked_cross_entropy",
    "flops_per_token",
    "init_sparse",
    "init_state",
    "learning_rate",
    "make_eval_step",
    "make_optimizer",
    "make_sparse_step",
    "make_train_step",
    "next_token_loss",
    "noam_schedule",
    "peak_flops",
    "throughput",
    "train_step",
]
