"""Tokens per second of one train step (forward, backward, clipping, AdamW): jaxheads against
Hugging Face's GPT2LMHeadModel in eager torch, on this machine's CPU.

Same shapes and work on both sides: GPT-2 small cut to 4 layers (width 768, 12 heads, 50,257
tokens), B=8, T=256, float32, no dropout, all cores, torch with its fused attention and fused
AdamW. Steps alternate, so that a busy machine slows both alike; medians and their ratio count. On a
shared machine the ratio of processor seconds is the steadier of the two.

    python -m benchmarks.train_step --reps=5          # about 3 minutes on two cores
    python -m benchmarks.train_step --compile=true    # torch.compile as a third contender

Writes benchmarks/train_step.json with the command, versions and machine. Needs the `test` extra.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from jaxheads.models import Decoder
from jaxheads.models.presets import gpt2_small
from jaxheads.training import TrainConfig, init_state, make_optimizer, make_train_step

_REPS = flags.DEFINE_integer("reps", 5, "Timed steps of each contender.")
_LAYERS = flags.DEFINE_integer("layers", 4, "Layers of width 768.")
_BATCH = flags.DEFINE_integer("batch_size", 8, "B.")
_LENGTH = flags.DEFINE_integer("seq_len", 256, "T.")
_CHUNKS = flags.DEFINE_integer("loss_chunks", 0, "Chunks of the cross-entropy; 0 = by size.")
_COMPILE = flags.DEFINE_bool("compile", False, "Also time torch.compile.")
_TORCH = flags.DEFINE_bool("torch", True, "Time torch at all.")
_OUT = flags.DEFINE_string("out", str(Path(__file__).with_suffix(".json")), "Where to write.")

Step = Callable[[], float]


def jaxheads_step(batch: dict[str, np.ndarray], layers: int, chunks: int) -> Step:
    """A function that takes one step and returns the loss."""
    model_cfg = dataclasses.replace(gpt2_small(), num_layers=layers)
    cfg = TrainConfig(steps=1000, schedule="constant", loss_chunks=chunks)
    optimizer = make_optimizer(cfg)
    state = init_state(lambda: Decoder(model_cfg, rngs=nnx.Rngs(0)), optimizer)
    step = make_train_step(cfg, optimizer)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return run


def torch_step(batch: dict[str, np.ndarray], layers: int, *, compiled: bool) -> Step:
    """The same in torch."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(os.cpu_count() or 1)
    config = GPT2Config(n_layer=layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    call = torch.compile(model) if compiled else model
    tokens = torch.tensor(batch["tokens"], dtype=torch.long)
    targets = torch.tensor(batch["targets"], dtype=torch.long)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = call(tokens, shift_labels=targets, labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return run


def measure(steps: dict[str, Step], reps: int) -> dict[str, dict]:
    """Wall and processor seconds of `reps` alternating steps after two warm-up steps each."""
    results: dict[str, dict] = {
        name: {"first_loss": step(), "seconds": [], "cpu_seconds": []}
        for name, step in steps.items()
    }
    for step in steps.values():
        step()
    for _ in range(reps):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            results[name]["last_loss"] = step()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            results[name]["seconds"].append(round(wall, 4))
            results[name]["cpu_seconds"].append(round(cpu, 4))
            print(f"{name:14s} {wall:8.3f} s wall {cpu:8.3f} s processor", flush=True)
    return results


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines()
                    if x.startswith("model name")), cpu)  # fmt: skip
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform()}


def main(argv: list[str]) -> None:
    """Run the contenders and write the report."""
    del argv
    jax.config.update("jax_platforms", "cpu")
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50257, (_BATCH.value, _LENGTH.value + 1), dtype=np.int32)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:]}
    steps = {"jaxheads": jaxheads_step(batch, _LAYERS.value, _CHUNKS.value)}
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    if _TORCH.value:
        import torch
        import transformers

        versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
        steps["torch"] = torch_step(batch, _LAYERS.value, compiled=False)
        if _COMPILE.value:
            steps["torch.compile"] = torch_step(batch, _LAYERS.value, compiled=True)
    results = measure(steps, _REPS.value)
    tokens = _BATCH.value * _LENGTH.value
    for result in results.values():
        result["median_seconds"] = statistics.median(result["seconds"])
        result["median_cpu_seconds"] = statistics.median(result["cpu_seconds"])
        result["tokens_per_second"] = round(tokens / result["median_seconds"], 1)
    ours = results["jaxheads"]
    ratio = lambda key: {
        name: round(result[key] / ours[key], 3)
        for name, result in results.items()
        if name != "jaxheads"
    }
    report = {
        "command": "python -m benchmarks.train_step " + " ".join(sys.argv[1:]),
        "shapes": {"layers": _LAYERS.value, "width": 768, "heads": 12, "vocab": 50257,
                   "batch": _BATCH.value, "length": _LENGTH.value, "dtype": "float32"},
        "machine": machine(),
        "versions": versions,
        "results": results,
        "speedup": ratio("median_seconds"),
        "speedup_per_processor_second": ratio("median_cpu_seconds"),
    }  # fmt: skip
    Path(_OUT.value).write_text(json.dumps(report, indent=1) + "\n")
    for name, result in results.items():
        print(f"{name:14s} {result['tokens_per_second']:8.1f} tokens/s")
    print("speedup", report["speedup"], "per processor second",
          report["speedup_per_processor_second"])  # fmt: skip


if __name__ == "__main__":
    app.run(main)
