"""The neural memory's speed: against titans-pytorch, along the sequence, per decoded token.

    PYTHONPATH=. python benchmarks/titans.py                      # all parts that this machine has
    PYTHONPATH=. python benchmarks/titans.py --parts=peer,decode

Parts:
* `peer`: tokens/s of forward and backward of one memory layer (projections, gates, memory, output
  projection) against `titans_pytorch.NeuralMemory` at equal width, heads, chunk, expansion and
  depth, float32, two CPU threads each. Rounds alternate, so a busy machine slows both alike; the
  medians count, and the ratio of processor seconds beside them. The peer is timed as it comes
  (every gradient at M_0, the whole sequence in parallel) and with `batch_size=chunk`, which is what
  the paper and this library compute. Needs `pip install titans-pytorch`.
* `length`: seconds of a pass for T from 1k to 64k at one row, and the log-log slope.
* `decode`: time per token (tenth percentile) of `memory_step` after passes of growing length.
* `tpu`: cycles and bytes of the compiled pass for a TPU that is not there. Needs libtpu.
* `gpu`: tokens/s against cuDNN attention from 8k to 128k on a GPU, and where they cross.

Writes benchmarks/titans.json with the command, versions and machine. Parts that were not run keep
what the file held.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# The rows of a batch go to one device per core; XLA runs one chunk's small products on one core.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    )

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from jaxheads.memory import init_memory, init_state, memory_step, neural_memory
from jaxheads.parallel import make_mesh

PARTS = ("peer", "length", "decode", "tpu", "gpu")
_PARTS = flags.DEFINE_list("parts", list(PARTS), "Which parts to run.")
_REPS = flags.DEFINE_integer("reps", 5, "Timed rounds.")
_DEPTHS = flags.DEFINE_list("depths", ["1", "2"], "Depths of the memory in `peer`.")
_CHUNKED = flags.DEFINE_bool("chunked", True, "Time the peer with batch_size=chunk too (slow).")
_OUT = flags.DEFINE_string("out", str(Path(__file__).with_suffix(".json")), "Where to write.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "Of the part `tpu`.")

WIDTH, HEADS, HEAD_DIM, CHUNK, BATCH, LENGTH = 256, 4, 64, 16, 2, 1024


def unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)


def layer_params(key: jax.Array, depth: int) -> dict:
    """Projections, gates and memory of one layer."""
    keys = jax.random.split(key, 3)
    scale = WIDTH**-0.5
    return dict(
        qkv=scale * jax.random.normal(keys[0], (3, WIDTH, HEADS, HEAD_DIM)),
        gates=scale * jax.random.normal(keys[1], (3, WIDTH, HEADS)),
        out=scale * jax.random.normal(keys[2], (HEADS, HEAD_DIM, WIDTH)),
        memory=init_memory(key, HEADS, HEAD_DIM, depth),
    )


def layer(params: dict, x: jax.Array, theta_max: float = 0.1) -> jax.Array:
    """[B,T,M] -> [B,T,M]."""
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    q, k, v = jax.nn.silu(jnp.einsum("btm,nmhd->nbthd", x, params["qkv"]))
    theta, eta, alpha = jax.nn.sigmoid(jnp.einsum("btm,nmh->nbth", x, params["gates"]))
    y, _ = neural_memory(
        unit(k), v, unit(q), theta_max * theta, eta, alpha, params["memory"], chunk=CHUNK
    )
    return jnp.einsum("bthd,hdm->btm", y, params["out"])


def our_step(depth: int) -> Callable[[], None]:
    """Gradients of a scalar with respect to parameters and input, rows split over devices."""
    mesh = make_mesh(f"data:{jax.device_count()}")
    split, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))
    params = jax.device_put(layer_params(jax.random.key(0), depth), whole)
    x = jax.device_put(jax.random.normal(jax.random.key(1), (BATCH, LENGTH, WIDTH)), split)

    def local(params: dict, x: jax.Array):
        grads = jax.grad(lambda p, x: jnp.sum(jnp.sin(layer(p, x))), argnums=(0, 1))
        return grads(params, x)

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=(jax.P(), jax.P("data"))
    )
    step = jax.jit(sharded).lower(params, x).compile()
    return lambda: jax.block_until_ready(step(params, x))


def peer_step(depth: int, batch_size: int | None) -> Callable[[], None]:
    import torch
    from titans_pytorch import NeuralMemory

    torch.set_num_threads(2)
    torch.manual_seed(0)
    module = NeuralMemory(
        dim=WIDTH,
        dim_head=HEAD_DIM,
        heads=HEADS,
        chunk_size=CHUNK,
        batch_size=batch_size,
        default_model_kwargs=dict(depth=depth, expansion_factor=4.0),
    )
    x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)

    def run() -> None:
        module.zero_grad()
        x.grad = None
        module(x)[0].sin().sum().backward()

    return run


def timed(step: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def race(steps: dict[str, Callable[[], None]], reps: int) -> dict:
    """Medians of alternating rounds, after one that does not count."""
    for step in steps.values():
        step()
    rounds = [{name: timed(step) for name, step in steps.items()} for _ in range(reps)]
    median = lambda name, i: statistics.median(r[name][i] for r in rounds)
    return {
        name: dict(
            seconds=[round(r[name][0], 4) for r in rounds],
            tokens_per_second=round(BATCH * LENGTH / median(name, 0)),
            tokens_per_processor_second=round(BATCH * LENGTH / median(name, 1)),
        )
        for name in steps
    }


def peer(reps: int) -> dict:
    try:
        version = importlib.metadata.version("titans-pytorch")
    except importlib.metadata.PackageNotFoundError:
        return dict(skipped="titans-pytorch is not installed")
    out: dict = dict(
        version=version,
        shapes=dict(
            batch=BATCH,
            length=LENGTH,
            width=WIDTH,
            heads=HEADS,
            head_dim=HEAD_DIM,
            chunk=CHUNK,
            expansion=4,
        ),
    )
    for depth in map(int, _DEPTHS.value):
        steps = {
            "jaxheads": our_step(depth),
            "titans-pytorch": peer_step(depth, None),
        }
        if _CHUNKED.value:
            steps["titans-pytorch, batch_size=chunk"] = peer_step(depth, CHUNK)
        result = race(steps, reps)
        ours = result["jaxheads"]
        for name, row in result.items():
            for unit_ in ("second", "processor_second"):
                key = f"tokens_per_{unit_}"
                row[f"times_faster_per_{unit_}"] = round(ours[key] / row[key], 2)
            print(f"depth {depth}  {name}: {row}", flush=True)
        out[f"depth {depth}"] = result
    return out


def inputs(batch: int, length: int, heads: int, dim: int, dtype=jnp.float32) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 6)
    k, v, q = (jax.random.normal(key, (batch, length, heads, dim)) for key in keys[:3])
    gates = [jax.random.uniform(key, (batch, length, heads)) for key in keys[3:]]
    return [x.astype(dtype) for x in (unit(k), v, unit(q), 0.1 * gates[0], *gates[1:])]


def slope(lengths: list[int], seconds: list[float]) -> float:
    """Of log seconds over log length, by least squares."""
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])


def length(reps: int) -> dict:
    """Forward and backward of one row with 2 heads of 32, depth 2."""
    lengths = [1024 * 4**i for i in range(4)]
    params = init_memory(jax.random.key(0), 2, 32, 2)
    grads = jax.grad(lambda *a: jnp.sum(neural_memory(*a, params)[0] ** 2), argnums=range(6))
    wall, cpu = [], []
    for t in lengths:
        args = inputs(1, t, 2, 32)
        step = jax.jit(grads).lower(*args).compile()
        run = lambda step=step, args=args: jax.block_until_ready(step(*args))
        run()
        rounds = [timed(run) for _ in range(reps)]
        wall.append(min(r[0] for r in rounds))
        cpu.append(min(r[1] for r in rounds))
        print(f"T={t}: {wall[-1]:.4f} s, {cpu[-1]:.4f} processor seconds", flush=True)
    return dict(
        lengths=lengths,
        seconds=wall,
        processor_seconds=cpu,
        slope=slope(lengths, wall),
        processor_slope=slope(lengths, cpu),
    )


def decode(reps: int) -> dict:
    """One token after a pass over T; one row, 4 heads of 64, depth 2."""
    params = init_memory(jax.random.key(0), HEADS, HEAD_DIM, 2)
    step = jax.jit(functools.partial(memory_step, chunk=CHUNK), donate_argnums=0)
    prefill = jax.jit(functools.partial(neural_memory, chunk=CHUNK))
    token = [x[:, 0] for x in inputs(1, 1, HEADS, HEAD_DIM)]
    out = {}
    for t in (0, 1024, 16384):
        state = init_state(params, 1)
        if t:
            state = prefill(*inputs(1, t, HEADS, HEAD_DIM), params)[1]
        state = jax.tree.map(jnp.array, state)
        times = []
        for _ in range(100 * reps):
            start = time.perf_counter()
            y, state = step(state, *token)
            y.block_until_ready()
            times.append(time.perf_counter() - start)
        out[str(t)] = round(1e6 * float(np.quantile(times, 0.1)), 1)  # of the undisturbed tokens
        print(f"after {t} tokens: {out[str(t)]} us per token", flush=True)
    size = sum(x.nbytes for x in jax.tree.leaves(init_state(params, 1)))
    return dict(microseconds_per_token=out, state_bytes=size)


def tpu(reps: int) -> dict:
    """Forward and backward of B=8, T=4096, 16 heads of 128, bfloat16 outside, on one chip."""
    del reps
    if importlib.util.find_spec("libtpu") is None:
        return dict(skipped="libtpu is not installed")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jaxheads.parallel.program import analyze
    from jaxheads.parallel.topology import parse_topology

    slice_ = parse_topology(_TOPOLOGY.value)
    one = jax.sharding.SingleDeviceSharding(slice_.devices()[0])
    out = {}
    for chunk in (16, 64, 128):
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)
        args = jax.eval_shape(lambda: inputs(8, 4096, 16, 128, jnp.bfloat16))
        params = jax.eval_shape(lambda: init_memory(jax.random.key(0), 16, 128, 2))

        def scalar(args, params, chunk=chunk):
            return jnp.sum(neural_memory(*args, params, chunk=chunk)[0].astype(jnp.float32))

        step = jax.jit(jax.grad(scalar, argnums=(0, 1)))
        compiled = step.lower(*jax.tree.map(shape, (args, params))).compile()
        program = analyze(compiled.as_text())
        memory = compiled.memory_analysis()
        out[f"chunk {chunk}"] = dict(
            cycles=program.cycles,
            seconds=program.cycles / slice_.chip.clock_hz,
            tokens_per_second=round(8 * 4096 / (program.cycles / slice_.chip.clock_hz)),
            temporary_bytes=memory.temp_size_in_bytes,
        )
        print(f"{_TOPOLOGY.value} chunk {chunk}: {out[f'chunk {chunk}']}", flush=True)
    return dict(topology=_TOPOLOGY.value, **out)


def gpu(reps: int) -> dict:
    """Forward and backward at 16 heads of 64, bfloat16, 131,072 tokens in all."""
    if jax.default_backend() != "gpu":
        return dict(skipped="no GPU here")
    heads, dim, tokens = 16, 64, 131072
    params = init_memory(jax.random.key(0), heads, dim, 2)
    memory = lambda k, v, q, *gates: neural_memory(k, v, q, *gates, params, chunk=64)[0]
    attention = lambda k, v, q, *_: jax.nn.dot_product_attention(
        q, k, v, is_causal=True, implementation="cudnn"
    )
    rows, crossover = {}, None
    for t in (8192, 16384, 32768, 65536, 131072):
        args = inputs(tokens // t, t, heads, dim, jnp.bfloat16)
        rows[t] = {}
        for name, fn in (("memory", memory), ("cudnn", attention)):
            total = lambda *a, fn=fn: jnp.sum(fn(*a).astype(jnp.float32) ** 2)
            step = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*args).compile()
            run = lambda step=step, args=args: jax.block_until_ready(step(*args))
            run()
            rows[t][name] = round(tokens / min(timed(run)[0] for _ in range(reps)))
        if crossover is None and rows[t]["memory"] >= rows[t]["cudnn"]:
            crossover = t
        print(f"T={t}: {rows[t]} tokens/s", flush=True)
    return dict(tokens_per_second=rows, crossover=crossover, device=str(jax.devices()[0]))


RUN = dict(peer=peer, length=length, decode=decode, tpu=tpu, gpu=gpu)


def main(argv: list[str]) -> None:
    del argv
    path = Path(_OUT.value)
    record = json.loads(path.read_text()) if path.exists() else {}
    names = [name for name in ("jax", "torch", "titans-pytorch") if _installed(name)]
    for part in _PARTS.value:
        result = RUN[part](_REPS.value)
        if "skipped" in result:
            print(f"{part}: {result['skipped']}")
            continue
        result["command"] = " ".join(["python benchmarks/titans.py", *sys.argv[1:]])
        result["versions"] = {name: importlib.metadata.version(name) for name in names}
        result["load_average"] = round(os.getloadavg()[0], 1)
        result["machine"] = f"{os.cpu_count()} cores, {platform.platform()}"
        record[part] = result
        path.write_text(json.dumps(record, indent=1) + "\n")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    app.run(main)
