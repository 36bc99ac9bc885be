"""Does training through a deep memory stay finite, and what breaks it?

A small language model around one memory of depth 4 learns to continue sequences that repeat
themselves, in bfloat16 outside the inner loop (parameters and activations; the inner loop is
float32 by construction). Claims: with the default settings of the layers (theta_max 0.1,
residual_norm, a soft limit of 1 on the inner gradient) no loss, gradient or state is NaN or
infinite in any of the steps, and the loss falls. Two settings that break: without the limit the
values stay finite but the outer gradient grows from chunk to chunk (the layer norm of a memory that
has decayed amplifies) until it overflows; the plain memory with theta_max 1 diverges forward.

    python -m experiments.titans_stability            # 2,000 steps of length 4,096
    python -m experiments.titans_stability --quick    # seconds: 20 steps of length 256

References: Behrouz et al., 2024, arXiv:2501.00663; users of public implementations report NaN at
depth 4 and divergence at 4,096 tokens.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags as absl_flags

from experiments import common
from jaxheads.memory import init_memory, run_memory
from launch import flags

VOCAB, DEPTH = 32, 4
ARMS = {
    "default": dict(theta_max=0.1, residual_norm=True, max_grad_norm=1.0),
    "no limit": dict(theta_max=0.1, residual_norm=True, max_grad_norm=None),
    "no limit, plain, theta_max=1": dict(theta_max=1.0, residual_norm=False, max_grad_norm=None),
}
"""The first are the defaults of `models.titans_options.MemoryOptions`."""


def define_flags() -> None:
    common.define_flags("titans_stability")
    absl_flags.DEFINE_integer("steps", 2000, "Updates.")
    absl_flags.DEFINE_integer("seq_len", 4096, "T.")
    absl_flags.DEFINE_integer("memory_chunk", 16, "Tokens per chunk of the memory.")
    absl_flags.DEFINE_integer("width", 8, "Of the model, one head.")


def init(key: jax.Array, width: int) -> dict:
    """float32 master parameters; the model casts them."""
    keys = jax.random.split(key, 5)
    draw = lambda key, *shape: shape[0] ** -0.5 * jax.random.normal(key, shape)
    return dict(
        embed=jax.random.normal(keys[0], (VOCAB, width)),
        qkv=draw(keys[1], width, 3, width),
        gates=jnp.zeros((width, 3)),
        bias=jnp.array([0.0, 0.0, -3.0]),
        out=draw(keys[2], width, width),
        unembed=draw(keys[3], width, VOCAB),
        memory=init_memory(keys[4], 1, width, DEPTH),
    )


def norm(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype)


def unit(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def loss_fn(params, tokens, *, theta_max, residual_norm, max_grad_norm, chunk):
    """Mean cross-entropy, and the largest magnitude in the memory's end state."""
    half = lambda x: x.astype(jnp.bfloat16)
    outer = {name: half(x) for name, x in params.items() if name != "memory"}
    x = outer["embed"][tokens[:, :-1]]
    h = norm(x)
    q, k, v = jnp.moveaxis(jax.nn.silu(jnp.einsum("btm,mnd->btnd", h, outer["qkv"])), 2, 0)
    theta, eta, alpha = jnp.moveaxis(jax.nn.sigmoid(h @ outer["gates"] + outer["bias"]), -1, 0)
    head = lambda x: x[:, :, None]
    out = run_memory(
        head(unit(k)),
        head(v),
        head(unit(q)),
        head(theta_max * theta),
        head(eta),
        head(alpha),
        params["memory"],
        chunk=chunk,
        residual_norm=residual_norm,
        max_grad_norm=max_grad_norm,
    )
    x = x + norm(out.y[:, :, 0]) @ outer["out"]
    logits = (norm(x) @ outer["unembed"]).astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    largest = jnp.stack([jnp.max(jnp.abs(w)) for w in jax.tree.leaves(out.state[:2])])
    return jnp.mean(loss), jnp.max(largest)


def batch(key: jax.Array, length: int) -> jax.Array:
    """One row that repeats a random text of 32 tokens, a tenth of it replaced."""
    text, noise, where = jax.random.split(key, 3)
    repeats = -(-(length + 1) // 32)
    row = jnp.tile(jax.random.randint(text, (32,), 0, VOCAB), repeats)[: length + 1]
    other = jax.random.randint(noise, row.shape, 0, VOCAB)
    return jnp.where(jax.random.bernoulli(where, 0.1, row.shape), other, row)[None]


@functools.partial(jax.jit, static_argnames=("steps", "length", "width", "chunk", "arm"))
def train(seed, *, steps, length, width, chunk, arm):
    """[steps] of loss, norm of the gradient and largest magnitude of the state."""
    optimizer = common.adamw(3e-3, steps=steps)
    params = init(jax.random.fold_in(jax.random.key(seed), 0), width)
    loss = functools.partial(loss_fn, chunk=chunk, **ARMS[arm])

    def step(carry, key):
        params, state = carry
        (value, largest), grads = jax.value_and_grad(loss, has_aux=True)(params, batch(key, length))
        updates, state = optimizer.update(grads, state, params)
        numbers = (value, optax.global_norm(grads), largest)
        return (optax.apply_updates(params, updates), state), numbers

    keys = jax.random.split(jax.random.key(seed), steps)
    _, numbers = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return numbers


def main() -> int:
    run = common.options()
    given = absl_flags.FLAGS
    steps, length = (20, 256) if run.quick else (given.steps, given.seq_len)
    # The arms that may break need few steps; seeds run one after another in small programs.
    rows, losses, finite = [], {}, {}
    for name in ARMS:
        count = steps if name == "default" else min(steps, 50)
        for seed in run.seeds[: 1 if name == "default" else 3]:
            numbers = train(
                seed,
                steps=count,
                length=length,
                width=given.width,
                chunk=given.memory_chunk,
                arm=name,
            )
            loss, grad, largest = map(np.asarray, numbers)
            good = np.isfinite(loss) & np.isfinite(grad) & np.isfinite(largest)
            losses[name, seed] = loss
            finite.setdefault(name, []).append(good)
            last = max(1, count // 20)
            rows.append(
                dict(
                    arm=name,
                    seed=seed,
                    steps=count,
                    finite_steps=int(good.sum()),
                    first_loss=float(loss[0]),
                    last_loss=float(loss[-last:].mean()),
                    largest_gradient=float(np.max(grad)),
                    largest_state=float(np.max(largest)),
                )
            )
            print(rows[-1], flush=True)
    broken = [float((~good).sum()) for good in finite["default"]]
    drop = [row["first_loss"] - row["last_loss"] for row in rows if row["arm"] == "default"]
    breaks = lambda arm: [float((~good).sum()) for good in finite[arm]]
    claims = [
        common.at_most("steps with NaN or infinity, default settings", broken, 0),
        common.at_least("fall of the loss, default settings", drop, 0.0 if run.quick else 0.1),
        common.at_least(
            "steps with NaN or infinity, plain memory with theta_max=1",
            breaks("no limit, plain, theta_max=1"),
            1,
        ),
    ]

    if not run.quick:  # 256 tokens are too few to overflow
        name = "steps with NaN or infinity, no limit on the inner gradient"
        claims.append(common.at_least(name, breaks("no limit"), 1))

    def figure(page):
        axes = page.subplots()
        for (name, seed), values in losses.items():
            axes.plot(values, label=f"{name}, seed {seed}", linewidth=0.8)
        axes.set(xlabel="step", ylabel="loss")
        axes.legend(fontsize=7)

    data = dict(length=length, depth=DEPTH, chunk=given.memory_chunk, width=given.width)
    return common.finish(claims, run.workdir, table=rows, figure=figure, data=data)


if __name__ == "__main__":
    define_flags()
    flags.run(main)
