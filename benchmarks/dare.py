"""DARE's speed: stage-1 search by attention dimension and length, and training against torch.

    python -m benchmarks.dare                            # both parts, a few minutes on two cores
    python -m benchmarks.dare --parts=search --reps=5

Parts:
* `search`: seconds of stage 1 for 256 requests with T behaviours each: attention rows of
  128, 64 and 32 numbers a field are gathered and scored, and the 20 best kept. Lengths 200,
  2,000 and 20,000; requests are taken in chunks whose vectors fit into `--memory_gb`, the same for
  all dimensions, which take turns in every round.
* `train`: examples/s of training steps (forward, backward, dense Adam) of DARE with its auxiliary
  head, T = 200, 16 numbers a field, against the same model in torch (`nn.Embedding`, eager, as the
  definition reads; same shapes, same initial distribution, fused Adam). Steps alternate, so that a
  busy machine slows both alike; medians count, and the ratio of processor seconds beside them.

Writes benchmarks/dare.json with the command, versions and machine; parts that were not run keep
what the file held. arXiv:2410.02604.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx

from jaxheads.embeddings import relevance_of_ids, search_topk
from jaxheads.models.recommender import RECOMMENDERS, LongSequenceRecommender, init_stats, loss

_PARTS = flags.DEFINE_list("parts", ["search", "train"], "Which parts to run.")
_REPS = flags.DEFINE_integer("reps", 5, "Timed rounds.")
_BATCH = flags.DEFINE_integer("batch_size", 2048, "Examples of a training step.")
_ITEMS = flags.DEFINE_integer("num_items", 100_000, "Items in the tables.")
_CATEGORIES = flags.DEFINE_integer("num_categories", 5_000, "Categories in the tables.")
_MEMORY = flags.DEFINE_float("memory_gb", 0.5, "Most that the gathered vectors may take.")
_OUT = flags.DEFINE_string("out", str(Path(__file__).with_suffix(".json")), "Where to write.")

REQUESTS, TOP_K = 256, 20
LENGTHS, DIMS = (200, 2_000, 20_000), (128, 64, 32)
TRAIN_LENGTH, TRAIN_DIM, LR = 200, 16, 0.01


def measure(steps: dict[str, Callable[[], float]], reps: int) -> dict[str, dict]:
    """Wall and processor seconds of `reps` alternating rounds after two that do not count."""
    results: dict[str, dict] = {
        name: {"first_value": step(), "seconds": [], "cpu_seconds": []}
        for name, step in steps.items()
    }
    for step in steps.values():
        step()
    for _ in range(reps):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            results[name]["last_value"] = step()
            results[name]["seconds"].append(round(time.perf_counter() - wall, 4))
            results[name]["cpu_seconds"].append(round(time.process_time() - cpu, 4))
    return results


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    cpu, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "cores_used": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
    }


def ids(rng: np.random.Generator, shape: tuple[int, ...], most: int) -> np.ndarray:
    """Ids from 1, uniform."""
    return rng.integers(1, most + 1, shape, dtype=np.int32)


@functools.partial(jax.jit, static_argnames=("dim", "chunks"))
def stage_one(tables: dict, batch: dict, dim: int, chunks: int) -> tuple[jax.Array, jax.Array]:
    """Gather, score and keep the best, a chunk of the requests at a time."""

    def some(batch: dict) -> tuple[jax.Array, jax.Array]:
        scores = relevance_of_ids(tables, **batch)
        return search_topk(scores, TOP_K)

    split = lambda x: x.reshape(chunks, -1, *x.shape[1:])  # [chunks, requests, ...]
    return jax.lax.map(some, jax.tree.map(split, batch))


def search(reps: int) -> dict:
    """Seconds by length and dimension, and the ratio to twice the dimension."""
    rng = np.random.default_rng(0)
    rows = dict(item=20_000, category=1_000, time=max(LENGTHS) + 1)
    tables = {
        dim: {n: jnp.asarray(rng.normal(size=(r, dim)), jnp.float32) for n, r in rows.items()}
        for dim in DIMS
    }
    out = {}
    for length in LENGTHS:
        size = REQUESTS * length * 3 * max(DIMS) * 4
        chunks = 2 ** max(math.ceil(math.log2(size / (_MEMORY.value * 1e9))), 0)
        batch = {
            "item": ids(rng, (REQUESTS,), rows["item"] - 1),
            "category": ids(rng, (REQUESTS,), rows["category"] - 1),
            "history_item": ids(rng, (REQUESTS, length), rows["item"] - 1),
            "history_category": ids(rng, (REQUESTS, length), rows["category"] - 1),
        }
        batch = jax.device_put(batch)
        step = lambda dim, batch=batch, chunks=chunks: float(
            jax.block_until_ready(stage_one(tables[dim], batch, dim, chunks))[0][0, 0, 0]
        )
        results = measure({str(dim): functools.partial(step, dim) for dim in DIMS}, reps)
        seconds = {dim: min(results[str(dim)]["cpu_seconds"]) for dim in DIMS}
        wall = {dim: statistics.median(results[str(dim)]["seconds"]) for dim in DIMS}
        out[str(length)] = {
            "requests": REQUESTS,
            "chunks": chunks,
            "seconds": wall,
            "least_processor_seconds": seconds,
            "ratio_64_to_128": round(seconds[64] / seconds[128], 3),
            "ratio_32_to_64": round(seconds[32] / seconds[64], 3),
        }
        print(f"T={length}: {out[str(length)]}", flush=True)
    return out


def our_step(batch: dict) -> Callable[[], float]:
    """A function that takes one step and returns the loss."""
    cfg = RECOMMENDERS["dare"](_ITEMS.value, _CATEGORIES.value, representation_dim=TRAIN_DIM)
    optimizer = optax.adam(LR)
    state = LongSequenceRecommender(cfg, rngs=nnx.Rngs(0)), init_stats(cfg)
    state = (*state, optimizer.init(state[0]))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        model, stats, opt = state
        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(model, stats, batch)
        updates, opt = optimizer.update(grads, opt, model)
        return (optax.apply_updates(model, updates), out.stats, opt), value

    batch = jax.device_put(batch)

    def run() -> float:
        nonlocal state
        state, value = step(state, batch)
        jax.block_until_ready(state)
        return float(value)

    return run


def torch_step(batch: dict) -> Callable[[], float]:
    """The same model in torch, as its definition reads."""
    import torch
    from torch import nn

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    d, width, length = TRAIN_DIM, 3 * TRAIN_DIM, TRAIN_LENGTH
    sizes = dict(item=_ITEMS.value + 1, category=_CATEGORIES.value + 1, time=2000)

    def head(*hidden: int) -> nn.Sequential:
        layers: list[nn.Module] = [nn.BatchNorm1d(3 * width)]
        for a, b in zip((3 * width, *hidden), hidden):
            layers += [nn.Linear(a, b), nn.PReLU(init=0.1)]
        return nn.Sequential(*layers, nn.Linear(hidden[-1], 1))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            tables = lambda: nn.ModuleDict({n: nn.Embedding(r, d) for n, r in sizes.items()})
            self.attention, self.representation = tables(), tables()
            self.main, self.aux = head(200, 80), head(200)
            for table in (*self.attention.values(), *self.representation.values()):
                nn.init.normal_(table.weight, std=0.01)
            for module in (*self.main, *self.aux):
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.01)

        @staticmethod
        def vectors(tables, item, category, time):
            parts = (tables["item"](item), tables["category"](category), tables["time"](time))
            return torch.cat(parts, dim=-1)

        def forward(self, item, category, past_item, past_category):
            zero = torch.zeros_like(item)
            times = (length - torch.arange(length)).expand_as(past_item)
            q = self.vectors(self.attention, item, category, zero)
            k = self.vectors(self.attention, past_item, past_category, times)
            r = self.vectors(self.representation, item, category, zero)
            v = self.vectors(self.representation, past_item, past_category, times)
            semantic = torch.einsum("bd,btd->bt", q[:, : 2 * d], k[..., : 2 * d])
            recency = torch.einsum("bd,btd->bt", q[:, 2 * d :], k[..., 2 * d :])
            scores = semantic / (2 * d) ** 0.5 + recency / d**0.5
            scores = scores.masked_fill(past_item == 0, -(2.0**32) + 1)
            best, index = scores.topk(TOP_K, dim=1)
            kept = v.gather(1, index[..., None].expand(-1, -1, width))
            h = torch.einsum("bk,bkd->bd", best.softmax(dim=1), kept)
            full = torch.einsum("bt,btd->bd", scores.softmax(dim=1), v)
            features = lambda h: torch.cat([r, h, h * r], dim=1)
            return self.main(features(h))[:, 0], self.aux(features(full))[:, 0]

    model = Model().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    names = ("item", "category", "history_item", "history_category")
    inputs = [torch.tensor(batch[name], dtype=torch.long) for name in names]
    sign = 2 * torch.tensor(batch["label"]) - 1
    penalised = [
        p for part in (model.main, model.aux) for n, p in part.named_parameters() if "bias" not in n
    ]

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        value = sum(-torch.log(torch.sigmoid(sign * z) + 1e-8).mean() for z in model(*inputs))
        value = value + 1e-6 * sum(p.square().sum() for p in penalised)
        value.backward()
        optimizer.step()
        return float(value.detach())

    return run


def train(reps: int) -> dict:
    """Examples/s of both, and their ratio."""
    rng = np.random.default_rng(0)
    shape = (_BATCH.value, TRAIN_LENGTH)
    batch = {
        "item": ids(rng, shape[:1], _ITEMS.value),
        "category": ids(rng, shape[:1], _CATEGORIES.value),
        "history_item": ids(rng, shape, _ITEMS.value),
        "history_category": ids(rng, shape, _CATEGORIES.value),
        "label": rng.integers(0, 2, shape[:1]).astype(np.float32),
    }
    results = measure({"jaxheads": our_step(batch), "torch": torch_step(batch)}, reps)
    for result in results.values():
        for key in ("seconds", "cpu_seconds"):
            result[f"median_{key}"] = statistics.median(result[key])
        result["examples_per_second"] = round(_BATCH.value / result["median_seconds"], 1)
    ours, theirs = results["jaxheads"], results["torch"]
    ratio = lambda key: round(theirs[key] / ours[key], 2)
    sizes = dict(items=_ITEMS.value, categories=_CATEGORIES.value, batch=_BATCH.value)
    return {
        "shapes": sizes | dict(length=TRAIN_LENGTH, dim=TRAIN_DIM),
        "results": results,
        "speedup": ratio("median_seconds"),
        "speedup_per_processor_second": ratio("median_cpu_seconds"),
    }


RUN = {"search": search, "train": train}


def main(argv: list[str]) -> None:
    """Run the parts and write the report."""
    del argv
    jax.config.update("jax_platforms", "cpu")
    path = Path(_OUT.value)
    record = json.loads(path.read_text()) if path.exists() else {}
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    for part in _PARTS.value:
        result = RUN[part](_REPS.value)
        if part == "train":
            import torch

            versions["torch"] = torch.__version__
            print({k: v for k, v in result.items() if k.startswith("speedup")})
        record[part] = result | {
            "command": " ".join(["python -m benchmarks.dare", *sys.argv[1:]]),
            "versions": dict(versions),
            "machine": machine(),
            "load_average": round(os.getloadavg()[0], 1),
        }
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
