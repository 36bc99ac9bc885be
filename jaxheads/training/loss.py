"""Next-token cross-entropy that never forms the logits of a whole batch.

The vocabulary is cut into chunks. One scan over them finds every token's log-normaliser as flash
attention does, and, when the loss is differentiated, a second one recomputes each chunk's logits
and takes the gradients: four products with the vocabulary in all (three when there is one chunk).
Cutting the sequence instead would take three, but every device would hold the gathered kernel and
a whole float32 gradient of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.attention.contract import is_count
from jaxheads.models import Decoder
from jaxheads.parallel import constrain, ways
from jaxheads.taps import TappedForward
from jaxheads.training.configs import TrainConfig
from jaxheads.typing import Array

CHUNK_BYTES = 2**27
"""Float32 logits of one chunk on one device that are always small enough to exist."""
LANES = 128  # width of a TPU vector register; chunks are multiples of it where they are wider
MOST_ENTRIES = 2.0**24  # numbered exactly in float32
NO_LOGIT = float(jnp.finfo(jnp.float32).min / 2)


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
    """Cross-entropy of ``softmax(cap(hidden @ kernel + bias))``, in chunks of the vocabulary.

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
      num_chunks: n; 0 lets `choose_num_chunks` choose.

    Raises:
      ValueError: for shapes that do not fit and more chunks than entries.
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
    num_chunks = num_chunks or choose_num_chunks(batch, length, vocab, width)
    if not 1 <= num_chunks <= vocab // ways("vocab", vocab):
        raise ValueError(
            f"loss_chunks={num_chunks} must lie between 1 and the {vocab // ways('vocab', vocab)} "
            "entries of the vocabulary on a device; 0 has a number chosen."
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
    logits = logits.astype(jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    picked = jnp.sum(jnp.where(index == targets[..., None], logits, 0), axis=-1)
    loss = lse - picked + z_loss * jnp.square(lse)
    correct = jnp.argmax(logits, axis=-1) == targets
    parts = (loss, jnp.ones_like(loss), correct, jnp.square(lse))
    return LossSums(*(jnp.sum(weights * part) for part in parts))


def _check_weights(weights: Array | None, targets: Array, vocab: int) -> Array:
    """Constant float32 weights [B,T], NaN where a token that counts is outside the vocabulary."""
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights
    if weights.shape != targets.shape:
        raise ValueError(f"weights {weights.shape} must have the shape of targets {targets.shape}.")
    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    known = (targets >= 0) & (targets < vocab) | (weights == 0)
    return jnp.where(known, weights, jnp.nan)


def choose_num_chunks(batch: int, length: int, vocab: int, width: int) -> int:
    """The fewest chunks of the vocabulary whose logits stay small on a device.

    Small is `CHUNK_BYTES`, or twice the float32 hidden states where that is more: less than what
    the MLP of one layer holds. On one device, whose gradients are whole anyway, it is four times
    `CHUNK_BYTES`: one chunk saves a product.
    """
    mesh = jax.sharding.get_abstract_mesh()
    small = CHUNK_BYTES * (4 if mesh.empty or mesh.size == 1 else 1)
    tokens = batch // ways("batch", batch) * (length // ways("length", length))
    entries = max(small // (4 * tokens), 2 * width)
    return -(-vocab // ways("vocab", vocab) // entries)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _sums(hidden, kernel, bias, targets, weights, options):
    return _Chunks(hidden, kernel, bias, targets, weights, options).sums()[0]


def _sums_fwd(hidden, kernel, bias, targets, weights, options):
    chunks = _Chunks(hidden, kernel, bias, targets, weights, options)
    sums, lse, top = chunks.sums()
    grads = chunks.gradients(lse, top)
    return sums, (grads, jnp.zeros((), hidden.dtype), jnp.zeros((), kernel.dtype), bias)


def _sums_bwd(options, residuals, cotangents):
    (d_hidden, d_kernel, d_bias), hidden, kernel, bias = residuals
    scale = cotangents[0]
    d_hidden = (scale * d_hidden).astype(hidden.dtype)
    d_kernel = (scale * d_kernel).astype(kernel.dtype)
    d_bias = None if bias is None else (scale * d_bias).astype(bias.dtype)
    return d_hidden, d_kernel, d_bias, None, None


_sums.defvjp(_sums_fwd, _sums_bwd)


class _Chunks:
    """The vocabulary in n chunks of C entries from each of the x devices it is split over.

    Entry c of chunk j on shard i is entry ``i V/x + j C + c`` of the vocabulary; the last chunk of
    a shard is filled up with entries that do not exist. Sums over the vocabulary stay apart for
    each shard until the end, so that a chunk costs no communication but its part of the kernel
    (gathered over fsdp, and scattered as a gradient): no device ever holds a whole kernel.
    """

    def __init__(self, hidden, kernel, bias, targets, weights, options: _Options):
        self.hidden, self.targets, self.weights = hidden, targets, weights
        self.options, self.dtype = options, hidden.dtype
        self.shape = kernel.shape  # [V,E] or [E,V]
        self.vocab = kernel.shape[0 if options.vocab_first else 1]
        self.ways = ways("vocab", self.vocab)  # x
        self.num, self.per_shard = options.num_chunks, self.vocab // self.ways
        self.size = -(-self.per_shard // self.num)  # C
        if self.num > 1 and self.size > LANES:
            self.size = -(-self.size // LANES) * LANES
        self.w = "xce" if options.vocab_first else "exc"
        # Cast before it is gathered: half the bytes.
        self.kernel = self._cut(kernel.astype(self.dtype))
        self.bias = None if bias is None else self._cut(bias.astype(jnp.float32))

    def _cut(self, a: Array) -> Array:
        """[V] -> [x,n,C], [E,V] -> [E,x,n,C], [V,E] -> [x,n,C,E]."""
        axis = a.ndim - 1 if not self.options.vocab_first else 0
        before, after = a.shape[:axis], a.shape[axis + 1 :]
        a = a.reshape(*before, self.ways, self.per_shard, *after)
        fill = [(0, 0)] * a.ndim
        fill[axis + 1] = (0, self.num * self.size - self.per_shard)
        a = jnp.pad(a, fill).reshape(*before, self.ways, self.num, self.size, *after)
        return constrain(a, self._axes(a.ndim, chunked=True))

    def _axes(self, ndim: int, *, chunked: bool, embed: str | None = "embed"):
        vocab = ("vocab", None, None) if chunked else ("vocab", None)
        if ndim == len(vocab):
            return vocab
        return (*vocab, embed) if self.options.vocab_first else (embed, *vocab)

    def _chunk(self, a: Array, j: Array) -> Array:
        """Chunk j of what `_cut` returns, whole over the model width."""
        axis = a.ndim - 2 - (a.ndim > 3 and self.options.vocab_first)
        a = jax.lax.dynamic_index_in_dim(a, j, axis, keepdims=False)
        return constrain(a, self._axes(a.ndim, chunked=False, embed=None))

    def _over_chunks(self, body: Callable, carry):
        """`jax.lax.scan` over the chunks; without a loop, and so merged, where there is one."""
        if self.num > 1:
            return jax.lax.scan(body, carry, jnp.arange(self.num))
        carry, out = body(carry, 0)
        return carry, jax.tree.map(lambda a: a[None], out)

    def _logits(self, block: Array, j: Array) -> tuple[Array, Array, Array]:
        """(logits [B,T,x,C] float32, which entry each is [x,C], which exist [x,C]) of chunk j."""
        logits = jnp.einsum(
            f"bte,{self.w}->btxc", self.hidden, block, preferred_element_type=jnp.float32
        )
        logits = constrain(logits, ("batch", "length", "act_vocab", None))
        if self.bias is not None:
            logits = logits + self._chunk(self.bias, j)
        cap = self.options.soft_cap
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        shape = (self.ways, self.size)
        within = j * self.size + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        entry = within + self.per_shard * jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        exists = within < self.per_shard
        return jnp.where(exists, logits, NO_LOGIT), jnp.where(exists, entry, self.vocab), exists

    def sums(self) -> tuple[tuple[Array, ...], Array, Array]:
        """((loss, correct, z) sums, lse [B,T], largest logit of each shard [B,T,x])."""
        target = self.targets[..., None]  # [B,T,1]

        def body(carry: _Running, j):
            logits, entry, _ = self._logits(self._chunk(self.kernel, j), j)
            return _add_chunk(carry, logits, entry, target), None

        start = _Running.start((*self.targets.shape, self.ways), self.vocab)
        end = self._over_chunks(body, start)[0]
        lse, picked, first_top = end.combine()
        z = jnp.square(lse)
        loss = lse - picked + self.options.z_loss * z
        parts = (loss, first_top == self.targets, z)
        return tuple(jnp.sum(self.weights * part) for part in parts), lse, end.top

    def gradients(self, lse: Array, top: Array) -> tuple[Array, Array, Array | None]:
        """Gradients of the loss sum with respect to hidden, kernel and bias."""
        # A single chunk shifts by `top` as `sums` did: compilers then form logits and exponentials
        # once for both.
        shift = top[..., None] if self.num == 1 else lse[..., None, None]  # [B,T,x,1]
        lse, weight = lse[..., None, None], self.weights[..., None, None]  # [B,T,1,1]
        target = self.targets[..., None, None]
        scale = jnp.exp(shift - lse) * (1 + 2 * self.options.z_loss * lse)

        def body(d_hidden, j):
            block = self._chunk(self.kernel, j)
            logits, entry, exists = self._logits(block, j)
            d = jnp.exp(logits - shift) * scale - (entry == target)
            d = weight * d
            if self.options.soft_cap is not None:
                slope = 1 - jnp.square(logits / self.options.soft_cap)
                d = jnp.where(exists, d * slope, 0)
            d_block = jnp.einsum(
                f"btxc,bte->{self.w}",
                d.astype(self.dtype),
                self.hidden,
                preferred_element_type=jnp.float32,
            )
            # Summed over all tokens in float32; kept, like the layers' gradients, as computed.
            d_block = constrain(d_block, self._axes(3, chunked=False)).astype(self.dtype)
            d_hidden = d_hidden + jnp.einsum(
                f"btxc,{self.w}->xbte",
                d.astype(self.dtype),
                block,
                preferred_element_type=jnp.float32,
            )
            d_bias = None if self.bias is None else d.sum((0, 1))  # [x,C]
            return constrain(d_hidden, groups), (d_block, d_bias)

        groups = ("act_vocab", "batch", "length", None)
        zeros = constrain(jnp.zeros((self.ways, *self.hidden.shape), jnp.float32), groups)
        d_hidden, (d_kernel, d_bias) = self._over_chunks(body, zeros)
        d_bias = None if d_bias is None else self._join(d_bias)
        return d_hidden.sum(0), self._join(d_kernel), d_bias

    def _join(self, chunks: Array) -> Array:
        """[n] + the shape of a chunk -> the shape of what was cut."""
        axis = 1 if chunks.ndim == 3 or self.options.vocab_first else 2
        a = jnp.moveaxis(chunks, 0, axis)  # [..., x,n,C, ...]
        before, after = a.shape[: axis - 1], a.shape[axis + 2 :]
        a = a.reshape(*before, self.ways, self.num * self.size, *after)
        a = jax.lax.slice_in_dim(a, 0, self.per_shard, axis=axis)
        return a.reshape(*before, self.vocab, *after)


class _Running(NamedTuple):
    """A softmax so far, for each token and shard of the vocabulary: [B,T,x] each."""

    top: Array
    """The largest logit."""
    total: Array
    """sum exp(logit - top)"""
    picked: Array
    """The target's logit; 0 until it is met."""
    first_top: Array
    """The first entry whose logit is `top`."""

    @classmethod
    def start(cls, shape: tuple[int, ...], vocab: int) -> _Running:
        zeros = jnp.zeros(shape, jnp.float32)
        return cls(zeros + NO_LOGIT, zeros, zeros, jnp.full(shape, vocab, jnp.int32))

    def combine(self) -> tuple[Array, Array, Array]:
        """(lse, picked, first_top) over the shards, [B,T] each."""
        top = jnp.max(self.top, axis=-1)
        total = jnp.sum(self.total * jnp.exp(self.top - top[..., None]), axis=-1)
        is_top = self.top == top[..., None]
        first = jnp.min(jnp.where(is_top, self.first_top, jnp.iinfo(jnp.int32).max), axis=-1)
        return jnp.log(total) + top, jnp.sum(self.picked, axis=-1), first


def _add_chunk(carry: _Running, logits: Array, entry: Array, target: Array) -> _Running:
    """The softmax so far with the logits [B,T,x,C] of entries [x,C] added.

    Comparisons instead of gathers and argmax, so that the vocabulary may be split over devices.
    """
    chunk_top = jnp.max(logits, axis=-1)
    top = jnp.maximum(carry.top, chunk_top)
    total = carry.total * jnp.exp(carry.top - top)
    total += jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
    is_target = entry == target[..., None]
    picked = carry.picked + jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    is_top = logits == chunk_top[..., None]
    # In float32, like the other sums, so that the compiler takes all in one pass over the logits.
    first = jnp.min(jnp.where(is_top, entry.astype(jnp.float32), MOST_ENTRIES), axis=-1)
    first = first.astype(entry.dtype)
    return _Running(top, total, picked, jnp.where(chunk_top > carry.top, first, carry.first_top))


Batch = Mapping[str, Array]


def check_entries(batch: Mapping[str, object]) -> None:
    """Raise unless the batch has tokens and targets."""
    for name in ("tokens", "targets"):
        if name not in batch:
            raise ValueError(f"the batch has no {name!r}; it holds: {', '.join(batch)}.")


def auxiliary_loss(aux: Mapping[str, Array]) -> Array:
    """The sum of the losses in `Output.aux`, which also holds counts; 0 without any."""
    losses = (value for name, value in aux.items() if not is_count(name))
    return sum(losses, start=jnp.zeros((), jnp.float32))


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
    aux = auxiliary_loss(out.aux)
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
