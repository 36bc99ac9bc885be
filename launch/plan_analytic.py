"""Plans by formula: for GPUs, whose compiler needs one, and to order what is worth compiling.

Arguments are exact (shapes and shardings). What a step keeps besides them is a sum of terms that
each have a line in `working_bytes`; on CPU and TPU the compiler's figures replace it.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp

from jaxheads.models import ModelConfig
from jaxheads.models.configs import parse_remat
from jaxheads.parallel.topology import GPUS_PER_NODE, NODE_BANDWIDTH
from jaxheads.training.loss import CHUNK_BYTES
from launch import plan_jobs
from launch.plan_jobs import Request
from launch.plan_report import Memory, Report, model_flops, total_times

EFFICIENCY = 0.5
"""Share of the peak that matrix products are taken to reach."""


def argument_bytes(request: Request) -> int:
    """Parameters, optimiser state and batch of one device: exact, without tile padding."""
    # What does not move a byte of them is left out of the key.
    model = dataclasses.replace(request.model, remat="none", compute_dtype="auto")
    train = dataclasses.replace(request.train, grad_accum=1)
    return _argument_bytes(dataclasses.replace(request, model=model, train=train))


@functools.lru_cache(maxsize=1024)
def _argument_bytes(request: Request) -> int:
    return plan_jobs.bytes_per_device(
        plan_jobs.arguments(request, plan_jobs.abstract_mesh(request))
    )


def kept_per_layer(cfg: ModelConfig, tokens: float, parts: int, remat: str) -> float:
    """Bytes of activations that one layer keeps for the backward pass.

    Args:
      tokens: of one device and microbatch.
      parts: size of the mesh axis `model`, which splits heads and MLP.
      remat: a policy of `ModelConfig.remat`.
    """
    kind, names = parse_remat(remat)
    heads, kv = cfg.num_heads * cfg.head_dim / parts, cfg.num_kv_heads * cfg.head_dim / parts
    mlp = cfg.mlp_dim / parts
    m = cfg.model_dim
    gates = 2 if cfg.gated_mlp else 1
    sizes = {"q": heads, "k": kv, "v": kv, "q_rot": heads, "k_rot": kv, "z": heads,
             "mlp_pre": mlp, "mlp_post": mlp}  # fmt: skip
    widths = {
        "none": 4 * m + 2 * heads + 3 * kv + heads + (gates + 2) * mlp,
        "dots": 3 * m + heads + 2 * kv + gates * mlp,
        "full": m,
        "names": m + sum(sizes.get(name, m) for name in names),
        "offload": 0,  # of the device
    }
    return tokens * widths[kind] * _width(cfg)


def _width(cfg: ModelConfig) -> int:
    return 2 if cfg.compute_dtype == "auto" else jnp.dtype(cfg.compute_dtype).itemsize


def working_bytes(request: Request) -> float:
    """Bytes of one device besides the arguments, by formula."""
    cfg, shape = request.model, request.mesh_shape
    rows = request.batch_size / (shape["data"] * shape["fsdp"]) / request.grad_accum
    tokens = rows * request.seq_len / shape["context"]
    if request.job == "decode":
        tokens = rows
    parts, split = shape["model"], shape["model"] * shape["fsdp"] * shape["context"]
    layer = (cfg.num_params - 2 * cfg.vocab_size * cfg.embed_dim) / cfg.num_layers
    gathered = 2 * layer / parts * _width(cfg)  # weights of a layer and of the next, whole
    one_layer = kept_per_layer(cfg, tokens, parts, "none")
    if request.job == "train":
        gradients = cfg.num_params / split * _width(cfg)
        if request.grad_accum > 1:  # their sums, in float32
            gradients += 4 * cfg.num_params / split
        kept = cfg.num_layers * kept_per_layer(cfg, tokens, parts, cfg.remat)
        return gathered + 2 * one_layer + loss_bytes(cfg, tokens, parts) + gradients + kept
    logits = 4.0 * rows * cfg.vocab_size / parts  # of the last position
    cache = 0.0
    if request.job in ("prefill", "decode"):
        slots = request.seq_len + request.new_tokens - 1
        cache = 2.0 * cfg.num_layers * rows * slots * cfg.num_kv_heads * cfg.head_dim / parts
        cache *= _width(cfg)
    heads = request.sweep_batch if request.job == "sweep" else 1
    return gathered + 2 * heads * one_layer + logits + cache


def loss_bytes(cfg: ModelConfig, tokens: float, parts: int) -> float:
    """Bytes of one device that the cross-entropy works in: logits of a chunk of the vocabulary and
    their gradient, the chunk of the kernel, and the gradient of the hidden states.

    Chunks as `training.loss.choose_num_chunks` makes them.
    """
    entries = max(CHUNK_BYTES / (4 * tokens), 2 * cfg.embed_dim)
    vocab = cfg.vocab_size / parts
    size = vocab / math.ceil(vocab / entries)
    return size * (8 * tokens + 2 * cfg.embed_dim * _width(cfg)) + 4 * tokens * cfg.embed_dim


def quick_seconds(request: Request) -> float:
    """Seconds of one execution by formula; to compare variations of one request."""
    compute, exposed = _seconds(request)
    return compute + exposed


def _seconds(request: Request) -> tuple[float, float]:
    """(compute, exposed collectives)."""
    cfg, shape, topology = request.model, request.mesh_shape, request.slice
    chip, count = topology.chip, topology.num_devices
    again = {"full": 4 / 3, "dots": 1.05, "names": 1.15, "offload": 4 / 3}.get(
        parse_remat(cfg.remat)[0], 1.0
    )
    again = again if request.job == "train" else 1.0
    compute = again * model_flops(request) / (count * (chip.peak_flops or 1e12) * EFFICIENCY)
    if request.job == "decode":  # every weight is read once
        read = argument_bytes(request) / (chip.hbm_bandwidth or 1e11)
        compute = max(compute, read)
    fast = chip.link_bandwidth or 1e10
    rows = request.batch_size / (shape["data"] * shape["fsdp"])
    tokens = rows * (1 if request.job == "decode" else request.seq_len / shape["context"])
    passes = 4 if request.job == "train" else 2
    tensor = 0.0
    if shape["model"] > 1:  # two all-reduces a layer, forward and backward
        share = 2 * (shape["model"] - 1) / shape["model"]
        tensor = passes * cfg.num_layers * tokens * cfg.model_dim * _width(cfg) * share
    weights = cfg.num_params * _width(cfg) / shape["model"]
    split = shape["fsdp"] * shape["context"]
    passes = 4 * request.grad_accum if request.job == "train" else 1
    moved = passes * weights * (split > 1)
    if request.job == "train" and shape["data"] > 1:
        moved += 8 * cfg.num_params / (shape["model"] * split)
    wide = fast
    if chip.platform == "gpu" and count > GPUS_PER_NODE:
        wide = NODE_BANDWIDTH
    return compute, tensor / fast + max(0.0, moved / wide - compute)


def analytic_report(request: Request) -> Report:
    """A report by formula alone, marked as such."""
    plan_jobs.check(request)
    chip = request.slice.chip
    held = argument_bytes(request)
    working = int(working_bytes(request))
    state = held if request.job == "train" else 0
    memory = Memory(held, working, state, state, held + working, chip.hbm_bytes)
    compute, exposed = _seconds(request)
    return Report(
        request,
        "analytic",
        None if memory.headroom is None else memory.headroom >= 0,
        memory,
        model_flops(request),
        None,
        total_times(request, compute, 0.0, exposed),
        None,
        (
            "analytic: no compiler for this machine is at hand. Arguments are exact; temporaries "
            "are a formula over remat policy, layer sizes and mesh.",
            f"compute: model FLOPs, with recomputation, at {EFFICIENCY:.0%} of "
            f"{(chip.peak_flops or 0) / 1e12:.0f} TFLOP/s.",
            "collectives: tensor-parallel sums add to the step, gathered weights and reduced "
            "gradients hide behind compute where there is enough of it; "
            f"{NODE_BANDWIDTH / 1e9:.0f} GB/s a GPU between nodes of {GPUS_PER_NODE}.",
        ),
    )
