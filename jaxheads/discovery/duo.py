"""Which kv heads need the whole context: gates learned beside a frozen model.

Two streams run through the model: the model as it is, and one whose heads mix streaming and full
attention by a gate a of each kv head. The gates keep the last hidden states equal where answers
are, and an L1 term pulls them to 0:

    L = sum over answers of mean_d (X_full - X_mixed)^2 / |answers| + reg mean |alpha|

    alpha, history = train_gates(TwoStream(sink=4, recent=16), model, batches, GateConfig())
    pattern, realised = sparsify(alpha, sparsity=0.5)
    quick = jh.stream_heads(jh.forward, pattern, sink=4, recent=16)

References: Xiao et al., 2024, arXiv:2410.10819, section 2.3; released code:
mit-han-lab/duo-attention (which means the L1 term; the paper writes a sum).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxheads.attention.duo import MIX_SOURCES, Streams, clip_gates, mix_heads
from jaxheads.attention.duo_streaming import check_sizes
from jaxheads.interventions.duo import check_gates, stream_heads
from jaxheads.models import Decoder, ModelConfig, forward, with_config
from jaxheads.taps import Edit, TapContext, intervene, record
from jaxheads.typing import Array, ArrayLike

GATES, SIZES = "full_attention_heads.tsv", "config.json"  # names of the released patterns


@dataclass(frozen=True)
class TwoStream:
    """Both streams of a model: (model, tokens [B,T], alpha [L,K]) -> Streams of [B,T,M].

    The full stream runs once, and its head outputs z [L,B,T,H,D] are kept: as much memory as one
    residual stream a layer. The mixed stream is the same model under a streaming mask with
    z <- (1 - a) z + a F.

    Attributes:
      sink, recent: what streaming heads see.
      mix_source: "teacher": F are the head outputs of the full stream (the released code). "self":
        full attention of the mixed stream's own queries and keys (the formula of the paper); it
        forms the [T,T] maps, so it is for short texts.
      forward: a forward, wrapped or not.
    """

    sink: int = 128
    recent: int = 256
    mix_source: str = "teacher"
    forward: Callable[..., Any] = forward

    def __post_init__(self):
        check_sizes(self.sink, self.recent)
        if self.mix_source not in MIX_SOURCES:
            raise ValueError(
                f"mix_source={self.mix_source!r} is not one of {', '.join(MIX_SOURCES)}."
            )

    def __call__(self, model: Decoder, tokens: Array, alpha: Array) -> Streams:
        """The hidden states after the last norm of both streams."""
        model.cfg.require_transformer("DuoAttention")
        check_gates(alpha, model.cfg)
        gates = clip_gates(alpha)
        if self.mix_source == "self":
            full = self.forward(model, tokens).hidden
            mixed = stream_heads(self.forward, gates, self.sink, self.recent)(model, tokens).hidden
            return Streams(jax.lax.stop_gradient(full), mixed)
        teacher = record(self.forward, "z")(model, tokens)
        gates = jnp.repeat(gates, model.cfg.num_groups, axis=1)  # [L,H]
        student = intervene(self.forward, Edit("z", _mix, (gates, teacher.seen["z"])))
        streaming = with_config(model, attention=f"duo(sink={self.sink},recent={self.recent})")
        return Streams(teacher.hidden, student(streaming, tokens).hidden)


def _mix(value: Array, payload: tuple[Array, Array], ctx: TapContext) -> Array:
    """Edit of z [B,T,H,D] by gates [H] and the teacher's z."""
    del ctx
    gates, full = payload
    return mix_heads(value, full, gates)


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """How gates are trained; the defaults are the paper's."""

    num_steps: int = 2000  # N
    lr: float = 0.02  # at its highest
    reg: float = 0.05  # of the L1 term

    def __post_init__(self):
        if self.num_steps < 1 or self.lr <= 0 or self.reg < 0:
            raise ValueError(
                f"num_steps={self.num_steps}, lr={self.lr}, reg={self.reg}: needed at least 1 "
                "step, a positive rate and a weight of at least 0."
            )

    def rate(self, step: Any) -> Array:
        """lr min(1, max((i+1) / (N/5), 0.1), max((N-i) / (N/5), 0.1))."""
        fifth = self.num_steps / 5
        step = jnp.asarray(step)
        rise = jnp.maximum((step + 1) / fifth, 0.1)
        fall = jnp.maximum((self.num_steps - step) / fifth, 0.1)
        return self.lr * jnp.minimum(1.0, jnp.minimum(rise, fall))


class Trained(NamedTuple):
    """What `train_gates` returns."""

    alpha: np.ndarray
    """[L,K] float32 in [0,1]"""
    history: dict[str, np.ndarray]
    """[steps] of `loss`, `distill`, `reg` (the mean gate)."""


def gate_loss(
    streams: Streams, answers: Array, alpha: Array, reg: float
) -> tuple[Array, dict[str, Array]]:
    """The loss (see the module) over the tokens [B,T] that `answers` marks, and its parts."""
    full, mixed = (x.astype(jnp.float32) for x in streams)
    error = jnp.mean((full - mixed) ** 2, axis=-1)  # [B,T]
    marked = answers.astype(jnp.float32)
    distill = jnp.sum(error * marked) / jnp.sum(marked)
    mean = jnp.mean(jnp.abs(alpha))
    loss = distill + reg * mean
    return loss, {"loss": loss, "distill": distill, "reg": mean}


def train_gates(
    forward_two_stream: Callable[[Any, Array, Array], Streams],
    params: Decoder,
    data: Iterable[tuple[ArrayLike, ArrayLike]],
    cfg: GateConfig = GateConfig(),
) -> Trained:
    """Learns one gate for each kv head; the model is frozen.

    Gates start at 1 and are put back into [0,1] before every step of AdamW without decay. With
    `jax.set_mesh`, parameters and batches keep their shards: sums over answers are global.

    Args:
      forward_two_stream: `TwoStream`, or another hashable (model, tokens, alpha) -> Streams.
      params: a `Decoder`, sharded or not.
      data: batches (tokens [B,T], answers [B,T] bool), as `data.passkeys` makes them; a sequence
        is repeated, an iterator has to last. Lengths that differ compile anew.
      cfg: steps, rate, weight of the L1 term.

    Raises:
      ValueError: for a batch that marks no token, and for data that ends early.
    """
    alpha = jnp.ones((params.cfg.num_layers, params.cfg.num_kv_heads), jnp.float32)
    state = _optimizer(cfg).init(alpha)
    batches = itertools.cycle(data) if isinstance(data, Sequence) else iter(data)
    history = []
    for step in range(cfg.num_steps):
        batch = next(batches, None)
        if batch is None:
            raise ValueError(f"data ended after {step} batches, needed {cfg.num_steps}.")
        tokens, answers = batch
        if isinstance(answers, np.ndarray) and not answers.any():
            raise ValueError(f"batch {step} marks no token as part of an answer; nothing to learn.")
        alpha, state, seen = _step(forward_two_stream, params, alpha, state, tokens, answers, cfg)
        history.append(seen)
    columns = jax.device_get(history)
    return Trained(
        np.clip(np.asarray(alpha), 0, 1),
        {name: np.array([row[name] for row in columns]) for name in columns[0]},
    )


def _optimizer(cfg: GateConfig) -> optax.GradientTransformation:
    return optax.adamw(cfg.rate, b1=0.9, b2=0.999, weight_decay=0.0)


@partial(jax.jit, static_argnames=("two_stream", "cfg"))
def _step(two_stream, model, alpha, state, tokens, answers, cfg: GateConfig):
    alpha = jnp.clip(alpha, 0, 1)

    def loss(alpha: Array):
        return gate_loss(two_stream(model, jnp.asarray(tokens), alpha), answers, alpha, cfg.reg)

    grads, seen = jax.grad(loss, has_aux=True)(alpha)
    updates, state = _optimizer(cfg).update(grads, state, alpha)
    return optax.apply_updates(alpha, updates), state, seen


class Sparse(NamedTuple):
    """What `sparsify` returns."""

    mask: np.ndarray
    """[L,K] bool, True for the retrieval heads."""
    realised: float
    """The share of streaming heads."""


def sparsify(
    alpha: ArrayLike, sparsity: float | None = None, threshold: float | None = None
) -> Sparse:
    """The heads that keep their whole context.

    With `threshold`, those with alpha >= threshold. With `sparsity`, those at or above that
    quantile of all gates (linear interpolation). Of equal gates the earlier in (layer, head) order
    streams first, where the released code draws noise.

    Args:
      alpha: [L,K] gates, clipped to [0,1].
      sparsity: share of heads that stream, in [0,1]; 0: none, 1: all.
      threshold: instead of `sparsity`.
    Example:
      >>> sparsify([[0.9, 0.1], [0.4, 1.0]], sparsity=0.5).mask.astype(int).tolist()
      [[1, 0], [0, 1]]
    """
    gates = np.asarray(alpha, np.float64)
    if gates.ndim != 2 or not gates.size or not np.isfinite(gates).all():
        raise ValueError(f"alpha has shape {gates.shape}, needed finite gates [L,K].")
    if (sparsity is None) == (threshold is None):
        raise ValueError(f"sparsity={sparsity}, threshold={threshold}: give one of them.")
    gates = np.clip(gates, 0, 1)
    if threshold is not None:
        mask = gates >= threshold
    elif sparsity is None or not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity} must be in [0,1], the share of streaming heads.")
    else:
        num = gates.size
        streams = num if sparsity == 1 else math.ceil(sparsity * (num - 1) - 1e-9)
        mask = np.ones(num, bool)
        mask[np.argsort(gates.reshape(-1), kind="stable")[:streams]] = False
        mask = mask.reshape(gates.shape)
    return Sparse(mask, 1 - float(mask.mean()))


class Pattern(NamedTuple):
    """Gates and the sizes they were learned with or are to be used with."""

    alpha: np.ndarray
    """[L,K] float32"""
    sink: int
    recent: int


def save_pattern(directory: str | Path, alpha: ArrayLike, sink: int, recent: int) -> None:
    """Writes gates as full_attention_heads.tsv (L rows of K numbers) and the sizes as config.json.

    These are the files of the released patterns.
    """
    check_sizes(sink, recent)
    gates = np.asarray(alpha, np.float32)
    if gates.ndim != 2 or not np.isfinite(gates).all():
        raise ValueError(f"alpha has shape {gates.shape}, needed finite gates [L,K].")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rows = ["\t".join(repr(float(x)) for x in row) for row in gates]
    (directory / GATES).write_text("\n".join(rows) + "\n", encoding="utf-8")
    sizes = {"sink_size": sink, "recent_size": recent}
    (directory / SIZES).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")


def load_pattern(directory: str | Path, cfg: ModelConfig | None = None) -> Pattern:
    """A pattern that `save_pattern` wrote, or a released one.

    Args:
      directory: with full_attention_heads.tsv and config.json.
      cfg: of the model it is for, to check the shape.

    Raises:
      ValueError: naming the file and what is wrong with it.
    """
    path, sizes_path = Path(directory) / GATES, Path(directory) / SIZES
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [[float(x) for x in line.split("\t")] for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path}: not a table of numbers split by tabs ({error}).") from None
    if not rows or len({len(row) for row in rows}) > 1 or not np.isfinite(rows).all():
        raise ValueError(f"{path}: needed L rows of K finite numbers.")
    alpha = np.array(rows, np.float32)
    if cfg is not None:
        try:
            check_gates(alpha, cfg)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    try:
        found = json.loads(sizes_path.read_text(encoding="utf-8"))
        sizes = [found[name] for name in ("sink_size", "recent_size")]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{sizes_path}: needed sink_size and recent_size ({error!r}).") from None
    if not all(type(size) is int for size in sizes):
        raise ValueError(f"{sizes_path}: sink_size and recent_size are {sizes}, needed integers.")
    check_sizes(*sizes)
    return Pattern(alpha, *sizes)
