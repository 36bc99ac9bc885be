"""Sentence classifiers: embedding -> bidirectional GRU -> pooling -> MLP.

`PoolingConfig.pool` picks how the states of a text become m vectors: low-rank attention with a
learned context (lama) or the mean embedding as one (lama_ctx), additive attention (one head),
structured self-attention (Lin et al., 2017, arXiv:1703.03130), multi-head self-attention and its
mean (transformer), mean or max. Mehta et al., 2019, arXiv:1912.00835.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.attention.api import attention
from jaxheads.attention.low_rank_pool import (
    ACTIVATIONS,
    KINDS,
    lengths_to_mask,
    low_rank_attention_pool,
    token_softmax,
)
from jaxheads.fields import unknown
from jaxheads.models.layers import Initializer, fan_in, normal, param, zeros
from jaxheads.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolingConfig:
    """Sizes of a `PoolingClassifier`."""

    pool: str = "lama"  # lama | lama_ctx | additive | structured | transformer | mean | max
    vocab_size: int
    num_classes: int
    embed_dim: int = 100  # E
    gru_hidden: int = 50  # h, of each direction; D = 2h
    num_heads: int = 15  # m; 1 for additive, mean and max whatever it says
    mlp_dim: int = 64  # of the classifier; 0: one linear map
    word_mlp: bool = True  # u = tanh(W h + b), otherwise u = h
    activation: str = "tanh"  # of lama's scores: tanh | linear
    logit_scale: float | None = 1.0  # 1: the paper's; None: learned, one per head, from e^2
    structured_dim: int | None = None  # a; None = D

    def __post_init__(self):
        for name, choices in (("pool", KINDS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(unknown(name, getattr(self, name), choices))
        for name in ("vocab_size", "num_classes", "embed_dim", "gru_hidden", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.logit_scale is not None and not self.logit_scale > 0:
            raise ValueError(f"logit_scale={self.logit_scale} must be positive, or None: learned.")
        if self.pool == "transformer" and self.state_dim % self.num_heads:
            raise ValueError(
                f"pool='transformer': num_heads={self.num_heads} must divide D = {self.state_dim}."
            )

    @property
    def state_dim(self) -> int:
        """D."""
        return 2 * self.gru_hidden

    @property
    def num_summaries(self) -> int:
        """Vectors that the classifier reads."""
        return self.num_heads if self.pool in ("lama", "lama_ctx", "structured") else 1


class ClassifierOutput(NamedTuple):
    """What `PoolingClassifier.run` returns."""

    logits: Array
    """[B,C]"""
    summaries: Array
    """[B,m,D] before the classifier, after `head_gates`."""
    weights: Array | None
    """[B,m,T] how much each head takes of each token; None for max and transformer."""


def uniform(limit: float) -> Initializer:
    """Uniform in -limit..limit."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)


class GRU(nnx.Module):
    """Parameters of one direction; gates r, z, n along the axis of three."""

    def __init__(self, embed_dim: int, hidden: int, *, rngs: nnx.Rngs):
        init = uniform(hidden**-0.5)
        self.w_in = param(rngs, (embed_dim, 3, hidden), ("embed", None, "mlp"), init)
        self.b_in = param(rngs, (3, hidden), (None, "mlp"), init)
        self.w_state = param(rngs, (hidden, 3, hidden), (None, None, "mlp"), init)
        self.b_state = param(rngs, (3, hidden), (None, "mlp"), init)

    def __call__(self, x: Array) -> Array:
        """States [B,T,h] of inputs [B,T,E], from zeros.

        r, z = sigmoid(W_i x + b_i + W_h h + b_h),   n = tanh(W_i x + b_i + r (W_h h + b_h))
        h' = (1 - z) n + z h
        """
        inputs = jnp.einsum("bte,egh->tbgh", x, self.w_in[...]) + self.b_in[...]
        w_state, b_state = self.w_state[...], self.b_state[...]

        def step(h: Array, a: Array):
            b = jnp.einsum("bk,kgh->bgh", h, w_state) + b_state
            r, z = (jax.nn.sigmoid(a[:, i] + b[:, i]) for i in range(2))
            h = (1 - z) * jnp.tanh(a[:, 2] + r * b[:, 2]) + z * h
            return h, h

        start = jnp.zeros((x.shape[0], b_state.shape[1]), inputs.dtype)
        return jnp.einsum("tbh->bth", jax.lax.scan(step, start, inputs)[1])


class BiGRU(nnx.Module):
    """A GRU each way over every text's own tokens; zeros at padding."""

    def __init__(self, embed_dim: int, hidden: int, *, rngs: nnx.Rngs):
        self.forth = GRU(embed_dim, hidden, rngs=rngs)
        self.back = GRU(embed_dim, hidden, rngs=rngs)

    def __call__(self, x: Array, seq_lengths: Array) -> Array:
        """[B,T,2h] of x [B,T,E] and lengths [B]."""
        place, length = jnp.arange(x.shape[1]), seq_lengths[:, None]
        turned = jnp.where(place < length, length - 1 - place, place)[..., None]  # [B,T,1]
        back = self.back(jnp.take_along_axis(x, turned, axis=1))
        states = [self.forth(x), jnp.take_along_axis(back, turned, axis=1)]
        return jnp.where((place < length)[..., None], jnp.concatenate(states, axis=-1), 0)


class PoolingClassifier(nnx.Module):
    """Parameters of the classifier; those that its pooling does not need are None."""

    def __init__(self, cfg: PoolingConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        e, d, m = cfg.embed_dim, cfg.state_dim, cfg.num_heads
        matrix = lambda a, b: param(rngs, (a, b), ("embed", None), fan_in(1))
        vector = lambda n: param(rngs, (n,), (None,), zeros)
        is_lama = cfg.pool in ("lama", "lama_ctx")
        sees_words = cfg.word_mlp and (is_lama or cfg.pool == "additive")
        self.embed = param(rngs, (cfg.vocab_size, e), ("vocab", "embed"), normal(1.0))
        self.gru = BiGRU(e, cfg.gru_hidden, rngs=rngs)
        self.w_word = matrix(d, d) if sees_words else None
        self.b_word = vector(d) if sees_words else None
        has_context = cfg.pool in ("lama", "additive")
        self.context = param(rngs, (d,), (None,), normal(0.1)) if has_context else None
        factor = lambda rows: param(rngs, (rows, m), (None, "heads"), uniform(m**-0.5))
        self.P = factor(e if cfg.pool == "lama_ctx" else d) if is_lama else None
        self.Q = factor(d) if is_lama else None
        learns = is_lama and cfg.logit_scale is None
        two = lambda key, shape, dtype: jnp.full(shape, 2, dtype)
        self.log_scale = param(rngs, (m,), ("heads",), two) if learns else None
        a = d if cfg.structured_dim is None else cfg.structured_dim
        is_structured = cfg.pool == "structured"
        self.w_1 = matrix(d, a) if is_structured else None
        self.w_2 = matrix(a, m) if is_structured else None
        is_transformer, axes = cfg.pool == "transformer", ("embed", "heads", "head_dim")
        project = lambda: param(rngs, (d, m, d // m), axes, fan_in(1)) if is_transformer else None
        self.wq, self.wk, self.wv = project(), project(), project()
        self.wo = matrix(d, d) if is_transformer else None
        flat, hidden = cfg.num_summaries * d, cfg.mlp_dim
        self.w_in = matrix(flat, hidden) if hidden else None
        self.b_in = vector(hidden) if hidden else None
        self.w_out = matrix(hidden or flat, cfg.num_classes)
        self.b_out = vector(cfg.num_classes)

    def __call__(self, tokens: Array, lengths: Array) -> Array:
        """Logits [B,C] of texts [B,T] with `lengths` [B] tokens each; the rest is padding."""
        return self.run(tokens, lengths).logits

    def run(
        self, tokens: Array, lengths: Array, *, head_gates: Array | None = None
    ) -> ClassifierOutput:
        """`__call__` with the summaries and weights of its heads.

        Args:
          tokens: [B,T] ids.
          lengths: [B], 1..T.
          head_gates: [m] or [B,m] factors on the summaries: 0 ablates a head.
        """
        mask = lengths_to_mask(lengths, tokens.shape[1])
        x = jnp.take(self.embed[...], tokens, axis=0, mode="fill")
        states = self.gru(x, lengths)
        summaries, weights = self._pool(x, states, mask)
        if head_gates is not None:
            summaries = summaries * head_gates[..., None]
        y = summaries.reshape(summaries.shape[0], -1)  # [B,m*D], heads outermost
        if self.w_in is not None and self.b_in is not None:
            y = jax.nn.relu(y @ self.w_in[...] + self.b_in[...])
        return ClassifierOutput(y @ self.w_out[...] + self.b_out[...], summaries, weights)

    def _pool(self, x: Array, states: Array, mask: Array) -> tuple[Array, Array | None]:
        """Summaries [B,m,D] and weights [B,m,T]."""
        pool = self.cfg.pool
        if pool in ("lama", "lama_ctx"):
            return self._low_rank(x, states, mask)
        if pool == "max":
            lowest = jnp.finfo(states.dtype).min
            return jnp.where(mask[..., None], states, lowest).max(1)[:, None], None
        if pool == "transformer":
            return self._transformer(states, mask), None
        if pool == "mean":
            scores = jnp.zeros((mask.shape[0], 1, mask.shape[1]))
        elif pool == "additive":
            scores = jnp.einsum("btd,d->bt", self._words(states), _value(self.context))[:, None]
        else:
            hidden = jnp.tanh(jnp.einsum("btd,da->bta", states, _value(self.w_1)))
            scores = jnp.einsum("bta,am->bmt", hidden, _value(self.w_2))
        weights = token_softmax(scores, mask)
        return jnp.einsum("bmt,btd->bmd", weights, states), weights

    def _low_rank(self, x: Array, states: Array, mask: Array) -> tuple[Array, Array]:
        if self.context is None:
            total = jnp.sum(jnp.where(mask[..., None], x, 0), axis=1)
            context = total / jnp.maximum(jnp.sum(mask, axis=1), 1e-9)[:, None]
        else:
            context = self.context[...]
        scale = self.cfg.logit_scale if self.log_scale is None else jnp.exp(self.log_scale[...])
        assert scale is not None
        return low_rank_attention_pool(
            states, self._words(states), context, _value(self.P), _value(self.Q), mask=mask,
            activation=self.cfg.activation, logit_scale=scale,
        )  # fmt: skip

    def _words(self, states: Array) -> Array:
        if self.w_word is None or self.b_word is None:
            return states
        return jnp.tanh(states @ self.w_word[...] + self.b_word[...])

    def _transformer(self, states: Array, mask: Array) -> Array:
        q, k, v = (
            jnp.einsum("btd,dhk->bthk", states, _value(w)) for w in (self.wq, self.wk, self.wv)
        )
        z = attention(q, k, v, mask[:, None, None], is_causal=False)
        assert isinstance(z, jax.Array)
        y = z.reshape(states.shape) @ _value(self.wo)  # [B,T,H*D/m]
        y = jnp.where(mask[..., None], y, 0).sum(1) / mask.sum(1)[:, None]
        return y[:, None]


def _value(weight: nnx.Param | None) -> Array:
    assert weight is not None
    return weight[...]
