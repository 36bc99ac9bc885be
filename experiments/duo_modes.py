"""DuoAttention on real checkpoints: learning gates, needles with two caches, and what they save.

The modes of `experiments.duo` other than its claims; flags are defined there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxheads as jh
from experiments import common
from experiments.retrieval_heads import spread
from experiments.retrieval_tasks import file_task
from jaxheads.attention import duo_layers
from jaxheads.data import open_source
from jaxheads.data.passkeys import TEXT, passkeys
from jaxheads.discovery import (
    GateConfig,
    TwoStream,
    load_pattern,
    save_pattern,
    sparsify,
    train_gates,
    unigram_recall,
)
from jaxheads.models import with_config
from launch import flags


def train_mode(given: Any, model: Any, tokenizer: Any, workdir: Path) -> None:
    """Learns gates on text and writes them as a pattern."""
    if given.data is None:
        raise ValueError("--mode=train needs --data: text files for the haystack.")
    paragraphs = [f"{part}\n\n" for text in open_source(given.data) for part in text.split("\n\n")]
    data = passkeys(tokenizer, paragraphs, TEXT, lengths=spread(given.ctx),
                    batch_size=given.batch_size)  # fmt: skip
    cfg = GateConfig(num_steps=given.num_steps or 2000, lr=given.lr, reg=given.reg)
    model = with_config(model, remat="full")
    alpha, history = train_gates(TwoStream(given.sink, given.recent), model, data, cfg)
    save_pattern(workdir, alpha, given.sink, given.recent)
    flags.write_json(workdir / "history.json", {k: v.tolist() for k, v in history.items()})
    print(f"mean gate {alpha.mean():.3f}, above 0.5: {(alpha > 0.5).mean():.3f}; {workdir}")


def policy_of(given: Any, model: Any) -> tuple[str, float]:
    """The attention of the pattern that the flags name, and the share of streaming heads."""
    if given.pattern is None:
        raise ValueError(f"--mode={given.mode} needs --pattern: a directory that train wrote.")
    mask, realised = sparsify(load_pattern(given.pattern, model.cfg).alpha, given.sparsity)
    return duo_layers(mask, sink=given.sink, recent=given.recent), realised


def eval_mode(given: Any, model: Any, tokenizer: Any, workdir: Path) -> None:
    """Needles answered when decoding with the whole cache and with two."""
    policy, realised = policy_of(given, model)
    task = file_task(tokenizer, spread(given.lengths), np.linspace(0, 100, 5).tolist(),
                     given.needles, given.data, num_needles=3, max_new=None, seed=0)  # fmt: skip
    rows = []
    for one in task.instances:
        recall = {}
        for name, cache in (("full", None), ("duo", policy)):
            prompt = np.asarray(one.prompt_ids)[None]
            out = jh.generate(
                model,
                prompt,
                max_new_tokens=task.max_new,
                cache_policy=cache,
                stop_tokens=task.stop_ids,
                prefill_chunk=given.prefill_chunk,
            )
            said = np.asarray(out)[0, prompt.shape[1] :]
            recall[name] = unigram_recall(task.decode(one.answer_ids), task.decode(said))
        rows.append({"length": int(one.length), "depth": float(one.depth), **recall})
    write_rows(given, workdir, rows, sparsity=realised)


def bench_mode(given: Any, model: Any, tokenizer: Any, workdir: Path) -> None:
    """Seconds of reading a prompt and of a token after it, and bytes of keys and values."""
    del tokenizer
    policy, realised = policy_of(given, model)
    rows = []
    for length in spread(given.lengths):
        prompt = np.ones((1, length), np.int32)
        for name, cache in (("full", None), ("duo", policy)):
            run = partial(jh.generate, model, prompt, cache_policy=cache,
                          prefill_chunk=given.prefill_chunk)  # fmt: skip
            seconds = {count: _seconds(run, count) for count in (1, 33)}
            cfg = model.cfg if cache is None else with_config(model, attention=cache).cfg
            shapes = jax.eval_shape(partial(jh.init_cache, cfg, 1, length))
            rows.append({
                "length": length, "cache": name, "prefill_s": seconds[1],
                "token_s": (seconds[33] - seconds[1]) / 32,
                "bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)),
            })  # fmt: skip
    write_rows(given, workdir, rows, sparsity=realised)


def _seconds(run: Any, count: int) -> float:
    jax.block_until_ready(run(max_new_tokens=count))  # compiles
    begin = time.perf_counter()
    jax.block_until_ready(run(max_new_tokens=count))
    return round(time.perf_counter() - begin, 4)


def write_rows(given: Any, workdir: Path, rows: list[dict[str, Any]], **fields: Any) -> None:
    """Prints a table, and writes it with what it depends on."""
    asked = {name: getattr(given, name) for name in ("sink", "recent", "prefill_chunk")}
    content = {**flags.provenance(), "machine": common.machine(), **asked, **fields, "table": rows}
    workdir.mkdir(parents=True, exist_ok=True)
    flags.write_json(workdir / f"{given.mode}.json", content)
    print(common.markdown(rows))


MODES: Mapping[str, Callable[..., None]] = {
    "train": train_mode,
    "eval": eval_mode,
    "bench": bench_mode,
}
"""--mode -> (flags, model, tokenizer, workdir)"""
