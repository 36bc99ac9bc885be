"""Next-token cross-entropy that never forms the logits of a whole batch.

The sequence is cut into n interleaved chunks (chunk j holds positions j, j+n, j+2n, ...), so a
sequence split over devices stays split. One scan forms a chunk's logits, its loss and, when the
loss is differentiated, its gradients: three products with the vocabulary in all, where
recomputing the logits in a backward pass takes four.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.models import Decoder
from jaxheads.parallel import RULES, constrain
from jaxheads.taps import TappedForward
from jaxheads.training.configs import TrainConfig
from jaxheads.typing import Array

CHUNK_BYTES = 2**27
"""Float32 logits of one chunk on one device, at most, when the number of chunks is not given."""


class LossSums(NamedTuple):
    """Sums over the weighted tokens of a batch; divide by `weight_sum` for means."""

    loss_sum: Array
    """sum w (cross-entropy + z_loss * lse^2)"""
    weight_sum: Array
    """sum w"""
    correct_sum: Array
    """sum w [argmax logits = target]"""
    z_sum: Array
    """sum w lse^2, the squared log-normaliser"""


class _Options(NamedTuple):
    num_chunks: int
    z_loss: float
    soft_cap: float | None
    vocab_first: bool


def chunked_cross_entropy(
    hidden: Array,
    kernel: Array,
    targets: Array,
    weights: Array | None = None,
    bias: Array | None = None,
    *,
    num_chunks: int = 0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    vocab_first: bool = False,
) -> LossSums:
    """Cross-entropy of ``softmax(cap(hidden @ kernel + bias))``, in chunks of the sequence.

        loss = sum w (lse - logit[target] + z_loss lse^2),  lse = log sum_v exp(logit_v),
        cap(x) = soft_cap tanh(x / soft_cap)

    Logits are float32 whatever the inputs are; products take the dtype of `hidden`. Gradients
    flow from `loss_sum` to `hidden`, `kernel` and `bias` (the last two accumulated in float32);
    targets and weights are data, and the other sums carry no gradient.

    Args:
      hidden: [B,T,E].
      kernel: [E,V], or [V,E] (an embedding table) with `vocab_first`.
      targets: [B,T] ids. One outside the vocabulary gives NaN unless its weight is 0.
      weights: [B,T]; None counts every token once.
      bias: [V], added before the soft-cap.
      num_chunks: n, a divisor of T; 0 takes the fewest (at least 2) whose logits stay below
        `CHUNK_BYTES` on a device.

    Raises:
      ValueError: for shapes that do not fit and chunks that do not divide T.
    """
    if hidden.ndim != 3 or targets.shape != hidden.shape[:2]:
        raise ValueError(
            f"hidden {hidden.shape} and targets {targets.shape} do not fit; needed [B,T,E] and "
            "[B,T]."
        )
    width, vocab = kernel.shape[::-1] if vocab_first else kernel.shape
    if width != hidden.shape[2]:
        raise ValueError(
            f"kernel {kernel.shape} does not fit hidden {hidden.shape}; needed "
            f"{'[V,E] (vocab_first)' if vocab_first else '[E,V]'} with E={hidden.shape[2]}."
        )
    batch, length = targets.shape
    num_chunks = num_chunks or choose_num_chunks(batch, length, vocab)
    if num_chunks < 1 or length % num_chunks:
        raise ValueError(
            f"loss_chunks={num_chunks} does not divide the sequence length {length}; choose a "
            "divisor, or 0 to have one chosen."
        )
    weights = _check_weights(weights, targets, vocab)
    options = _Options(num_chunks, z_loss, soft_cap, vocab_first)
    sums: tuple[Array, ...] = _sums(hidden, kernel, bias, targets, weights, options)
    return LossSums(sums[0], jnp.sum(weights), *sums[1:])


def cross_entropy(
    logits: Array, targets: Array, weights: Array | None = None, *, z_loss: float = 0.0
) -> LossSums:
    """`chunked_cross_entropy` from logits [B,T,V] that exist already; plain autodiff."""
    weights = _check_weights(weights, targets, logits.shape[-1])
    loss, correct, lse, _ = _measure(logits.astype(jnp.float32), targets, z_loss)
    parts = (loss, jnp.ones_like(loss), correct, jnp.square(lse[..., 0]))
    return LossSums(*(jnp.sum(weights * part) for part in parts))


def _check_weights(weights: Array | None, targets: Array, vocab: int) -> Array:
    """Constant float32 weights [B,T], NaN where a token that counts is outside the vocabulary."""
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights
    if weights.shape != targets.shape:
        raise ValueError(f"weights {weights.shape} must have the shape of targets {targets.shape}.")
    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    known = (targets >= 0) & (targets < vocab) | (weights == 0)
    return jnp.where(known, weights, jnp.nan)


def choose_num_chunks(batch: int, length: int, vocab: int) -> int:
    """The fewest chunks, at least 2, whose logits stay below `CHUNK_BYTES` on a device."""
    local = length // _ways("length", length)
    rows = batch // _ways("batch", batch)
    row_bytes = 4 * rows * (vocab // _ways("act_vocab", vocab))
    divisors = [n for n in range(min(2, local), local + 1) if local % n == 0]
    return next((n for n in divisors if local // n * row_bytes <= CHUNK_BYTES), divisors[-1])


def _ways(axis: str, size: int) -> int:
    """Over how many devices of the current mesh an activation axis of this size is split."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return 1
    rule = RULES[axis]
    ways = math.prod(mesh.shape[a] for a in ((rule,) if isinstance(rule, str) else rule or ()))
    return 1 if size % ways else ways


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _sums(hidden, kernel, bias, targets, weights, options):
    return _scan(hidden, kernel, bias, targets, weights, options, with_grads=False)[0]


def _sums_fwd(hidden, kernel, bias, targets, weights, options):
    sums, grads = _scan(hidden, kernel, bias, targets, weights, options, with_grads=True)
    return sums, (grads, jnp.zeros((), hidden.dtype), jnp.zeros((), kernel.dtype), bias)


def _sums_bwd(options, residuals, cotangents):
    (d_hidden, d_kernel, d_bias), hidden, kernel, bias = residuals
    scale = cotangents[0]
    d_hidden = (scale * d_hidden).astype(hidden.dtype)
    d_kernel = (scale * d_kernel).astype(kernel.dtype)
    d_bias = None if bias is None else (scale * d_bias).astype(bias.dtype)
    return d_hidden, d_kernel, d_bias, None, None


_sums.defvjp(_sums_fwd, _sums_bwd)


def _measure(logits: Array, target: Array, z_loss: float):
    """(loss [B,C], correct [B,C], lse [B,C,1], is_target [B,C,V]) of logits [B,C,V].

    Comparisons instead of gathers and argmax, so that the vocabulary may be split over devices.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    is_target = index == target[..., None]
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    lse = jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True)) + top
    picked = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    first_top = jnp.min(jnp.where(logits == top, index, logits.shape[-1]), axis=-1)
    loss = lse[..., 0] - picked + z_loss * jnp.square(lse[..., 0])
    return loss, first_top == target, lse, is_target


def _logit_gradients(logits, lse, is_target, weight, options: _Options) -> Array:
    """d loss_sum / d (logits before the soft-cap) [B,C,V]."""
    probs = jnp.exp(logits - lse)
    grads = weight[..., None] * (probs * (1 + 2 * options.z_loss * lse) - is_target)
    if options.soft_cap is not None:
        grads = grads * (1 - jnp.square(logits / options.soft_cap))
    return grads


def _scan(hidden, kernel, bias, targets, weights, options: _Options, *, with_grads: bool):
    """((loss, correct, z) sums, (d_hidden, d_kernel, d_bias) or None), chunk after chunk."""
    (batch, length, width), dtype = hidden.shape, hidden.dtype
    vocab = kernel.shape[0 if options.vocab_first else 1]
    n = options.num_chunks
    w_axes = ("vocab", None) if options.vocab_first else (None, "vocab")
    w = "ve" if options.vocab_first else "ev"
    # Whole over the model width on every device, gathered once rather than once a chunk.
    matrix = constrain(kernel.astype(dtype), w_axes)
    # One accumulator for each group of devices that share no tokens: summed once, at the end.
    x = _ways("batch", batch)
    y = _ways("length", length // n)
    groups = lambda a: a.reshape(x, batch // x, y, length // n // y, a.shape[-1])

    def interleave(a):  # [B,T,...] -> [n,B,T/n,...]
        a = a.reshape(batch, length // n, n, *a.shape[2:])
        return jnp.moveaxis(a, 2, 0)

    def body(carry, chunk):
        h, target, weight = chunk  # [B,C,E] [B,C] [B,C]
        raw = jnp.einsum(f"bce,{w}->bcv", h, matrix, preferred_element_type=jnp.float32)
        raw = constrain(raw, ("batch", "length", "act_vocab"))  # [B,C,V]
        logits = raw if bias is None else raw + bias.astype(jnp.float32)
        if options.soft_cap is not None:
            logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)
        loss, correct, lse, is_target = _measure(logits, target, options.z_loss)
        parts = (loss, correct, jnp.square(lse[..., 0]))
        sums = tuple(total + jnp.sum(weight * part) for total, part in zip(carry[0], parts))
        if not with_grads:
            return (sums, None), None
        d_logits = _logit_gradients(logits, lse, is_target, weight, options)
        d = d_logits.astype(dtype)
        d_h = jnp.einsum(f"bcv,{w}->bce", d, matrix)
        d_kernel = jnp.einsum(
            f"xbycv,xbyce->xy{w}",
            groups(d),
            groups(h),
            preferred_element_type=jnp.float32,
        )
        d_kernel = constrain(carry[1][0] + d_kernel, ("batch", "length", *w_axes))
        d_bias = None if bias is None else carry[1][1] + groups(d_logits).sum((1, 3))
        return (sums, (d_kernel, d_bias)), d_h

    zero = jnp.zeros((), jnp.float32)
    grads = None
    if with_grads:
        d_kernel = jnp.zeros((x, y, *kernel.shape), jnp.float32)
        d_bias = None if bias is None else jnp.zeros((x, y, vocab), jnp.float32)
        grads = (constrain(d_kernel, ("batch", "length", *w_axes)), d_bias)
    xs = (interleave(hidden), interleave(targets), interleave(weights))
    (sums, grads), d_hidden = jax.lax.scan(body, ((zero, zero, zero), grads), xs)
    if d_hidden is None:
        return sums, None
    d_hidden = jnp.moveaxis(d_hidden, 0, 2).reshape(batch, length, width)
    d_kernel, d_bias = jax.tree.map(lambda a: a.sum((0, 1)), grads)
    return sums, (d_hidden, d_kernel, d_bias)


Batch = Mapping[str, Array]


def check_entries(batch: Mapping[str, object]) -> None:
    """Raise unless the batch has tokens and targets."""
    for name in ("tokens", "targets"):
        if name not in batch:
            raise ValueError(f"the batch has no {name!r}; it holds: {', '.join(batch)}.")


def loss_sums(
    forward: Callable, model: Decoder, batch: Batch, cfg: TrainConfig
) -> tuple[LossSums, Array]:
    """Sums of the loss over a batch, and the sum of the variants' auxiliary losses.

    The logits of `forward` stay unread, hence uncomputed under `jax.jit`: the loss starts from
    `Output.hidden`. Only when `forward` edits the site `logits`, or returns no hidden, is the
    loss taken from the logits, which then exist whole.

    Args:
      forward: ``forward(model, tokens, positions=, segment_ids=) -> Output``, wrapped or not.
      batch: arrays [B,T]: tokens, targets, and optionally positions, segment_ids, weights.
    """
    check_entries(batch)
    out = forward(
        model,
        batch["tokens"],
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
    )
    aux = sum(out.aux.values(), start=jnp.zeros((), jnp.float32))
    targets, weights = batch["targets"], batch.get("weights")
    if out.hidden is None or _edits_logits(forward):
        return cross_entropy(out.logits, targets, weights, z_loss=cfg.z_loss), aux
    hidden = out.hidden
    if model.project_out is not None:
        hidden = jnp.einsum("btm,me->bte", hidden, model.project_out[...].astype(hidden.dtype))
    kernel = model.unembed.kernel
    sums = chunked_cross_entropy(
        hidden,
        model.embed.table[...] if kernel is None else kernel[...],
        targets,
        weights,
        None if model.unembed.bias is None else model.unembed.bias[...],
        soft_cap=model.cfg.logit_soft_cap,
        vocab_first=kernel is None,
        num_chunks=cfg.loss_chunks,
        z_loss=cfg.z_loss,
    )
    return sums, aux


def _edits_logits(forward: Callable) -> bool:
    return isinstance(forward, TappedForward) and any(
        e.site == "logits" for e in forward.taps.edits
    )


def next_token_loss(
    forward: Callable, model: Decoder, batch: Batch, cfg: TrainConfig
) -> tuple[Array, dict[str, Array]]:
    """Mean loss over the batch's weights, and metrics.

        loss = sum w (cross-entropy + z_loss lse^2) / sum w + aux_weight * aux

    Returns:
      (loss, metrics): float32 scalars; metrics as `mean_metrics`. All zero, not NaN, when every
      weight is 0.
    """
    sums, aux = loss_sums(forward, model, batch, cfg)
    loss = sums.loss_sum / nonzero(sums.weight_sum) + cfg.aux_weight * aux
    return loss, mean_metrics(sums, aux, cfg)


def mean_metrics(sums: LossSums, aux: Array, cfg: TrainConfig) -> dict[str, Array]:
    """loss (cross-entropy in nats, without z-loss and aux), accuracy, z_loss, aux, weights."""
    total = nonzero(sums.weight_sum)
    z_loss = cfg.z_loss * sums.z_sum / total
    return {
        "loss": sums.loss_sum / total - z_loss,
        "accuracy": sums.correct_sum / total,
        "z_loss": z_loss,
        "aux": aux,
        "weights": sums.weight_sum,
    }


def nonzero(weight_sum: Array) -> Array:
    """A divisor for means: 1 in place of 0."""
    return jnp.where(weight_sum == 0, 1, weight_sum)
