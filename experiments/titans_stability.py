"""Does training through a deep memory stay finite, and what breaks it?

A decoder of one `titans-lmm` layer with a memory of depth 4 learns the source of the Python
standard library, byte by byte, in rows of 4,096, in bfloat16 outside the inner loop (which is
float32 by construction). Claims: with the default settings of the layer no loss, gradient or memory
is NaN or infinite in any of the steps, and the loss falls. The same with `forget_bias=-6`, under
which the memory lasts: by default a token forgets 2 % of each of the four matrices, and the memory
has decayed to nothing at the end of a row (its norm is in the table). Settings that should break:

    no outer limit   lasting, max_outer_growth=0: values are finite, but derivatives grow from chunk
                     to chunk on their way back until they overflow
    no limits        max_grad_norm=0, max_outer_growth=0
    plain            the same without the memory's norm and with theta_max=1: diverges forward

    python -m experiments.titans_stability            # 2,000 steps of length 4,096
    python -m experiments.titans_stability --quick    # seconds: 20 steps of length 256

References: Behrouz et al., 2024, arXiv:2501.00663; users of public implementations report NaN at
depth 4 and divergence at 4,096 tokens.
"""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags as absl_flags
from flax import nnx

from experiments import common
from experiments.titans_lm import corpus
from jaxheads.models import Decoder, forward
from jaxheads.taps import record
from launch import flags

VOCAB, DEPTH = 256, 4
_UNLIMITED = "max_grad_norm=0,max_outer_growth=0"
ARMS = {
    "default": "",
    "lasting": ",forget_bias=-6",
    "no outer limit": ",forget_bias=-6,max_outer_growth=0",
    "no limits": f",{_UNLIMITED}",
    "plain": f",residual_norm=false,theta_max=1,{_UNLIMITED}",
}
"""Options of titans-lmm after its depth."""
BREAKING = ("no outer limit", "no limits", "plain")


def define_flags() -> None:
    common.define_flags("titans_stability")
    absl_flags.DEFINE_integer("steps", 2000, "Updates.")
    absl_flags.DEFINE_integer("seq_len", 4096, "T.")
    absl_flags.DEFINE_integer("width", 16, "Of the model, one head.")


def build(key: jax.Array, width: int, arm: str) -> Decoder:
    """The decoder of an arm; float32 parameters, bfloat16 computation."""
    size = dict(num_layers=1, model_dim=width, mlp_dim=2 * width, num_heads=1, vocab_size=VOCAB)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what "plain" is here for
        cfg = common.small_config(
            **size,
            architecture=f"titans-lmm(depth={DEPTH}{ARMS[arm]})",
            compute_dtype="bfloat16",
        )
        return Decoder(cfg, rngs=nnx.Rngs(params=key))


def loss_fn(model: Decoder, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy in nats, and the norm of the memory after the last token."""
    out = record(forward, "mem_norm")(model, tokens[:, :-1])
    loss = optax.softmax_cross_entropy_with_integer_labels(out.logits, tokens[:, 1:])
    return jnp.mean(loss), jnp.max(out.seen["mem_norm"])


def batch(key: jax.Array, data: jax.Array, length: int) -> jax.Array:
    """One row [1,T+1] of the text."""
    start = jax.random.randint(key, (), 0, data.shape[0] - length - 1)
    return jax.lax.dynamic_slice(data, (start,), (length + 1,)).astype(jnp.int32)[None]


@functools.partial(jax.jit, static_argnames=("steps", "length", "width", "arm"))
def train(seed, data, *, steps, length, width, arm):
    """[steps] of loss, norm of the gradient and norm of the memory."""
    optimizer = common.adamw(3e-3, steps=steps)
    model = build(jax.random.fold_in(jax.random.key(seed), 0), width, arm)

    def step(carry, key):
        model, state = carry
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (value, memory), grads = value_and_grad(model, batch(key, data, length))
        updates, state = optimizer.update(grads, state, model)
        numbers = (value, optax.global_norm(grads), memory)
        return (optax.apply_updates(model, updates), state), numbers

    keys = jax.random.split(jax.random.key(seed), steps)
    _, numbers = jax.lax.scan(step, (model, optimizer.init(model)), keys)
    return numbers


def main() -> int:
    run = common.options()
    given = absl_flags.FLAGS
    steps, length = (20, 256) if run.quick else (given.steps, given.seq_len)
    text, _ = corpus("stdlib", 200_000 if run.quick else 4_000_000)
    rows, losses, broken = [], {}, {}
    for name in ARMS:
        count = min(steps, 50) if name in BREAKING else steps  # what breaks, breaks soon
        for seed in run.seeds:
            numbers = train(seed, text, steps=count, length=length, width=given.width, arm=name)
            loss, grad, memory = map(np.asarray, numbers)
            finite = np.isfinite(loss) & np.isfinite(grad) & np.isfinite(memory)
            losses[name, seed] = loss
            broken.setdefault(name, []).append(int((~finite).sum()))
            last = max(1, count // 20)
            rows.append(
                dict(
                    arm=name,
                    seed=seed,
                    steps=count,
                    finite_steps=int(finite.sum()),
                    first_loss=float(loss[0]),
                    last_loss=float(loss[-last:].mean()),
                    largest_gradient=float(np.max(grad)),
                    largest_memory=float(np.max(memory)),
                    smallest_memory=float(np.min(memory)),
                )
            )
            print(rows[-1], flush=True)
    fall = lambda arm: [r["first_loss"] - r["last_loss"] for r in rows if r["arm"] == arm]
    claims = []
    for name in ("default", "lasting"):
        claims.append(common.at_most(f"steps with NaN or infinity, {name}", broken[name], 0))
        least = 0.0 if run.quick else 0.5
        claims.append(common.at_least(f"fall of the loss, {name}", fall(name), least))
    for name in BREAKING if not run.quick else BREAKING[-1:]:  # 256 tokens are too few to overflow
        claims.append(common.at_least(f"steps with NaN or infinity, {name}", broken[name], 1))

    def figure(page):
        axes = page.subplots()
        for (name, seed), values in losses.items():
            axes.plot(values, label=f"{name}, seed {seed}", linewidth=0.8)
        axes.set(xlabel="step", ylabel="loss")
        axes.legend(fontsize=7)

    data = dict(length=length, depth=DEPTH, width=given.width)
    return common.finish(claims, run.workdir, table=rows, figure=figure, data=data)


if __name__ == "__main__":
    define_flags()
    flags.run(main)
